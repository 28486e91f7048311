"""8- and 4-bit weights for the language model's linear layers, made while a checkpoint is read. Imports nothing of ours.

A decode step reads every weight once, so it takes as long as reading them takes: half the bytes, half the time. Only weights
are quantised; a product is that of 16-bit numbers with the weights' nearest neighbours on a grid:

    int8    w ≈ scale · q                   q in −127 … 127, one scale for each output channel: max |w| / 127
    int4    w ≈ scale · (q − 8) + zero      q in 0 … 15, a scale and a zero for each group of 32, 64 or 128 inputs:
                                            (max w − min w) / 15 and min w + 8 · scale

The first is symmetric: 0 stays 0. The second is asymmetric: 16 steps are too few to waste any beyond the smallest or the
largest weight. (Jacob et al. 2018, https://arxiv.org/abs/1712.05877, equation 1, where zero is −S·(Z − 8); a scale for each
channel: Krishnamoorthi 2018, https://arxiv.org/abs/1806.08342, section 3.) Rounding to a grid of step s errs by at most s / 2, and
by s / √12 in the mean square. Scales and zeros are kept in bfloat16, and rounded before q is, so q is the best for them.

Shapes: N outputs of a layer, K inputs, M rows that it is applied to, R rows of weights that are packed together.
"""

from functools import cache, partial
from importlib.util import find_spec

import torch
import torch.nn as nn

# The schemes, and of those in 4 bits the size of a group. With its scale and zero a weight of "int4" takes 4.5 bits.
GROUPS = {"int8": None, "int4": 64, "int4-32": 32, "int4-128": 128}
TINY = torch.finfo(torch.bfloat16).tiny  # a scale is never 0
TOGETHER = 512  # outputs whose weights a CPU unpacks at once: two megabytes at K = 2048, which stay in its cache
FEW_OUTPUTS = 64  # that are quantised at once: larger blocks, freed again, would leave holes in the memory between those that stay
FEW = {torch.int8: 8, torch.uint8: 32}  # rows up to which a CPU is faster with packed weights than after unpacking them
FILE = "quantized.safetensors"  # not model.safetensors, which transformers would take for plain weights


def quantize_int8(weight):
    """(N, K) -> q (N, K) int8 and its scales (N,)."""
    scales = (weight.float().abs().amax(1) / 127).clamp(min=TINY).bfloat16()
    return (weight.float() / scales.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scales


def quantize_int4(weight, group):
    """(N, K) -> q (N, K) uint8, and its scales and zeros (K / group, N, 2)."""
    w = weight.float().unflatten(1, (-1, group))  # (N, K / group, group)
    low, high = w.aminmax(dim=2)
    scales = ((high - low) / 15).clamp(min=TINY).bfloat16().float()
    zeros = (low + 8 * scales).bfloat16().float()
    q = ((w - zeros[..., None]) / scales[..., None]).round().add(8).clamp(0, 15).to(torch.uint8)
    return q.flatten(1), torch.stack([scales, zeros], 2).transpose(0, 1).contiguous().bfloat16()


def pack(q, rows):
    """Two to a byte: q (N, K) -> (N / R, K, R / 2), where of R = `rows` rows the first half has the low four bits of the bytes
    and the second half the high ones."""
    low, high = q.view(-1, 2, rows // 2, q.shape[1]).unbind(1)  # (N / R, R / 2, K)
    return (low | high << 4).transpose(1, 2).contiguous()


def unpack(packed):
    """And back: (N / R, K, R / 2) -> q (N, K), as a transposed (K, N), in which order it is faster to make."""
    packed = packed.transpose(0, 1)
    return torch.stack([packed & 15, packed >> 4], 2).flatten(1).T


def dequantize(weight, scales, dtype):
    """What the packed weight stands for: (N, K), for int4 as a transposed (K, N)."""
    if weight.dtype == torch.int8:
        return weight.to(dtype) * scales.to(dtype)[:, None]
    q = unpack(weight).T.view(torch.int8).sub_(8).to(dtype).view(len(scales), -1, scales.shape[1])  # (K / group, group, N)
    scales, zeros = scales.to(dtype).permute(2, 0, 1).contiguous()[:, :, None]  # (K / group, 1, N), each in one piece
    return torch.addcmul(zeros, q, scales, out=q).flatten(0, 1).T


def rows_together(outputs, device):
    """R of a layer with so many outputs on a device: on a CPU as its kernel wants it, 2 where there is none."""
    rows = cpu_rows() if device.type == "cpu" else 2
    return rows if outputs % rows == 0 else 2


@cache
def cpu_rows():
    """R of the kernel that PyTorch has for 4 bits on this CPU: 64 with AVX-512, 32 with AVX2; 2 where it packs otherwise."""
    probe = (torch.arange(64)[:, None] // 4 % 16).expand(64, 32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(probe.int().contiguous(), 1).flatten()
    return next((rows for rows in (64, 32) if torch.equal(pack(probe.to(torch.uint8), rows).flatten(), packed)), 2)


def split(weight, scales, outputs):
    """A packed weight and its scales, in parts of so many outputs (a multiple of R)."""
    if weight.dtype == torch.int8:
        return zip(weight.split(outputs), scales.split(outputs))
    return zip(weight.split(outputs // (2 * weight.shape[2])), scales.split(outputs, dim=1))


def row_product(x, weight, scales):
    """x Wᵀ for one row, (K,) -> (N,), written as one reduction over the packed weights, into which a compiler can fuse the rest."""
    x = x.float()
    if weight.dtype == torch.int8:
        return (weight.float() * x).sum(1) * scales.float()
    groups, n = len(scales), len(weight)
    scales, zeros = scales.float().view(groups, n, 2, -1, 2).transpose(0, 1)[:, :, None].unbind(-1)  # (N / R, K / group, 1, 2, R / 2)
    x, weight = x.view(groups, -1, 1), weight.view(n, groups, -1, weight.shape[2])
    halves = [
        ((((weight >> 4 * i & 15).float() - 8) * scales[..., i, :] + zeros[..., i, :]) * x).sum((1, 2)) for i in range(2)
    ]  # (N / R, R / 2) each
    return torch.stack(halves, 1).flatten()


def plain_product(x, weight, scales):
    """x Wᵀ, (M, K) -> (M, N), with the weight unpacked; on a CPU part by part, each of which stays in its cache."""
    parts = split(weight, scales, TOGETHER if x.device.type == "cpu" else 2**20)
    return torch.cat([x @ dequantize(*part, x.dtype).T for part in parts], 1)


class TrainingProduct(torch.autograd.Function):
    """plain_product for an x that wants a gradient. By itself PyTorch would keep each unpacked weight for the backward pass, the
    whole model in 16 bits; this keeps the packed ones, which are there anyway, and unpacks them again."""

    @staticmethod
    def forward(ctx, x, weight, scales):
        ctx.save_for_backward(weight, scales)
        return plain_product(x, weight, scales)

    @staticmethod
    def backward(ctx, gradient):  # of y = x Wᵀ, (M, N): that of x is gradient · W
        return gradient @ dequantize(*ctx.saved_tensors, gradient.dtype), None, None


@cache
def compiled_row_product(device):
    """row_product as one kernel, which reads packed weights and nothing else, or None where PyTorch cannot make it."""
    if find_spec("triton") is None or torch.cuda.get_device_capability(device) < (7, 0):
        return None
    return torch.compile(row_product, dynamic=False)


class QuantizedLinear(nn.Module):
    """x Wᵀ + b with W in 8 or 4 bits, in the place of an nn.Linear.

    weight: q, for int8 (N, K), for int4 packed (N / R, K, R / 2); scales: (N,), or scales and zeros (K / group, N, 2).
    """

    def __init__(self, weight, scales, bias=None):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales)
        self.bias = bias
        self.in_features, self.out_features = weight.shape[1], len(scales) if weight.dtype == torch.int8 else scales.shape[1]

    @classmethod
    def empty(cls, outputs, inputs, scheme, rows=2, device=None, bias=None):
        """One to be filled. rows: R of int4; in a file 2."""
        check_scheme(scheme, outputs, inputs)
        make, group = partial(torch.empty, device=device), GROUPS[scheme]
        if scheme == "int8":
            return cls(make(outputs, inputs, dtype=torch.int8), make(outputs, dtype=torch.bfloat16), bias)
        packed = make(outputs // rows, inputs, rows // 2, dtype=torch.uint8)
        return cls(packed, make(inputs // group, outputs, 2, dtype=torch.bfloat16), bias)

    @classmethod
    def of(cls, weight, scheme, bias=None):
        """Quantise the weight (N, K) of a layer. Never is more of it than a part in more bits."""
        rows = rows_together(len(weight), weight.device)
        layer = cls.empty(*weight.shape, scheme, rows, weight.device, bias)
        for part, (place, place_of_scales) in zip(weight.split(FEW_OUTPUTS), split(layer.weight, layer.scales, FEW_OUTPUTS)):
            q, scales = quantize_int8(part) if scheme == "int8" else quantize_int4(part, GROUPS[scheme])
            place.copy_(q if scheme == "int8" else pack(q, rows))
            place_of_scales.copy_(scales)
        return layer

    def packed(self, rows):
        """The weight, of int4 with so many rows together; in a file they are 2."""
        return self.weight if self.weight.dtype == torch.int8 else pack(unpack(self.weight).contiguous(), rows)

    def settle(self):
        """After loading: put the weight as the device's kernel wants it. int8's on a CPU crashes on memory (of a mapped file)
        that does not begin at a multiple of 16 bytes."""
        if self.weight.dtype == torch.uint8:
            rows = rows_together(self.out_features, self.weight.device)
            if rows != 2 * self.weight.shape[2]:
                self.weight = self.packed(rows)
        elif self.weight.data_ptr() % 16:
            self.weight = self.weight.clone()

    def forward(self, x):
        y = self.product(x.flatten(0, -2)).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias

    def product(self, x):
        """x Wᵀ, (M, K) -> (M, N), in the fastest way that the device has. With few rows the time goes into reading weights, so
        they are taken as they are packed; with many into arithmetic, which is fastest on plain weights."""
        weight, scales, device = self.weight, self.scales, x.device.type
        if x.requires_grad:  # the kernels below have no derivative
            return TrainingProduct.apply(x, weight, scales)
        if device == "cpu" and len(x) <= FEW[weight.dtype]:
            # PyTorch's kernels are fast in bfloat16 alone: in other types they take 5 to 30 times as long.
            if weight.dtype == torch.int8 and x.shape[1] % 64 == 0:  # rows of other lengths are read beyond their end
                return torch.ops.aten._weight_int8pack_mm(x.bfloat16(), weight, scales.bfloat16()).to(x.dtype)
            if weight.dtype == torch.uint8 and weight.shape[2] > 1:
                group, packed = x.shape[1] // len(scales), weight.view(-1, x.shape[1] // 2)
                return torch.ops.aten._weight_int4pack_mm_for_cpu(x.bfloat16(), packed, group, scales.bfloat16()).to(x.dtype)
        if device == "cuda" and len(x) <= 8:
            step = row_product if torch.compiler.is_compiling() else compiled_row_product(x.device)
            if step is not None:
                return torch.stack([step(row, weight, scales) for row in x]).to(x.dtype)
        return plain_product(x, weight, scales)


def check_scheme(scheme, outputs=2, inputs=None):
    """Raises ValueError for a scheme that there is not, or that a layer of this shape cannot have."""
    if scheme not in GROUPS:
        raise ValueError(f"{scheme!r} is no scheme of quantisation; expected one of {', '.join(GROUPS)}")
    group = GROUPS[scheme]
    if group and (outputs % 2 or inputs and inputs % group):
        raise ValueError(
            f"{scheme} takes inputs in groups of {group} and outputs in pairs, and a layer has {inputs} inputs and {outputs} outputs; "
            "take int8, or another group"
        )


def plan(model, scheme):
    """{name: scheme} of the linear layers of a model's language model. The head has 8 bits in every scheme: its errors go into
    the words straight away. Raises ValueError for a scheme that a layer cannot have."""
    layers = {name: layer for name, layer in model.named_modules() if name.startswith("language_model.") and isinstance(layer, nn.Linear)}
    schemes = {name: "int8" if name.endswith("lm_head") and scheme in GROUPS else scheme for name in layers}
    for name, layer in layers.items():
        check_scheme(schemes[name], *layer.weight.shape)
    return schemes


def put_quantized(model, scheme):
    """Put empty quantised layers in the places of linear ones."""
    for name, of_layer in plan(model, scheme).items():
        layer = model.get_submodule(name)
        model.set_submodule(name, QuantizedLinear.empty(*layer.weight.shape, of_layer, bias=layer.bias))


def quantizers(model, scheme):
    """{name of a weight: the function that makes of it what takes its layer's place}, for checkpoint.fill."""
    return {f"{name}.weight": partial(QuantizedLinear.of, scheme=of_layer) for name, of_layer in plan(model, scheme).items()}
