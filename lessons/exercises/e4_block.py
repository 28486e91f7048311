"""Exercise 4: a decoder block's norm and MLP.

RMSNorm (https://arxiv.org/abs/1910.07467, equation 4) divides a vector by the root of the mean of its squares; eps is
added to that mean. The mean is taken in float32, whatever the type of x, and the result has x's type again before it is
multiplied by the weight.

SwiGLU (https://arxiv.org/abs/2002.05202, equation 6) has two matrices where a plain MLP has one: the SiLU of the first
product gates the second.

`norm` becomes `llama.RMSNorm.forward` (self has `weight` and `eps`), `mlp` becomes `llama.MLP.forward` (self has
`gate_proj`, `up_proj` and `down_proj`).
"""


def norm(self, x):
    """x: (B, T, D). Returns the same shape and type."""
    raise NotImplementedError("exercise 4: write RMSNorm")


def mlp(self, x):
    """x: (B, T, D). Returns the same shape."""
    raise NotImplementedError("exercise 4: write SwiGLU")
