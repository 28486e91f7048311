"""Exercise 4, with SiLU written out."""


def norm(self, x):
    wide = x.float()
    scale = (wide.square().sum(-1, keepdim=True) / x.shape[-1] + self.eps).sqrt()
    return self.weight * (wide / scale).to(x.dtype)


def mlp(self, x):
    gate = self.gate_proj(x)
    return self.down_proj(gate * gate.sigmoid() * self.up_proj(x))
