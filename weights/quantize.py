"""8- and 4-bit weights for the language model's linear layers, made while a checkpoint is read.

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


class Int8:
    """The grid of 8 bits. weight: q (N, K) int8; scales: (N,)."""

    few = 8  # rows up to which a CPU is faster with packed weights than after unpacking them

    @staticmethod
    def empty(outputs, inputs, device):
        return torch.empty(outputs, inputs, dtype=torch.int8, device=device), torch.empty(outputs, dtype=torch.bfloat16, device=device)

    @staticmethod
    def outputs(scales):
        return len(scales)

    @staticmethod
    def fill(weight, scales, plain):
        """Quantise plain weights (N, K) into the two tensors that are there for them."""
        q, best = quantize_int8(plain)
        weight.copy_(q)
        scales.copy_(best)

    @staticmethod
    def split(weight, scales, outputs):
        return zip(weight.split(outputs), scales.split(outputs))

    @staticmethod
    def dequantize(weight, scales, dtype):
        return weight.to(dtype) * scales.to(dtype)[:, None]

    @staticmethod
    def row_product(x, weight, scales):
        return (weight.float() * x.float()).sum(1) * scales.float()

    @staticmethod
    def packed(weight, rows):
        """The weight with `rows` rows packed together: in 8 bits none are."""
        return weight

    @staticmethod
    def settled(weight):
        """A CPU's kernel crashes on memory (of a mapped file) that does not begin at a multiple of 16 bytes."""
        return weight.clone() if weight.data_ptr() % 16 else weight

    @staticmethod
    def cpu_kernel(x, weight, scales):
        """PyTorch's kernel for few rows on a CPU, or None where it cannot be used: it reads rows of other lengths beyond their end."""
        if x.shape[1] % 64:
            return None
        return torch.ops.aten._weight_int8pack_mm(x.bfloat16(), weight, scales.bfloat16())


class Int4:
    """The grid of 4 bits. weight: packed (N / R, K, R / 2) uint8; scales: scales and zeros (K / group, N, 2)."""

    few = 32

    @staticmethod
    def empty(outputs, inputs, device, group, rows):
        packed = torch.empty(outputs // rows, inputs, rows // 2, dtype=torch.uint8, device=device)
        return packed, torch.empty(inputs // group, outputs, 2, dtype=torch.bfloat16, device=device)

    @staticmethod
    def outputs(scales):
        return scales.shape[1]

    @staticmethod
    def fill(weight, scales, plain):
        """Quantise plain weights (N, K) into the two tensors that are there for them."""
        q, best = quantize_int4(plain, plain.shape[1] // len(scales))
        weight.copy_(pack(q, 2 * weight.shape[2]))
        scales.copy_(best)

    @staticmethod
    def split(weight, scales, outputs):
        rows = 2 * weight.shape[2]
        return zip(weight.split(outputs // rows), scales.split(outputs, dim=1))

    @staticmethod
    def dequantize(weight, scales, dtype):
        q = unpack(weight).T  # (K, N), 0 … 15
        q = q.view(torch.int8).sub_(8).to(dtype)  # −8 … 7
        q = q.view(len(scales), -1, scales.shape[1])  # (K / group, group, N)
        scales, zeros = scales.to(dtype).permute(2, 0, 1).contiguous()[:, :, None]  # (K / group, 1, N), each in one piece
        return torch.addcmul(zeros, q, scales, out=q).flatten(0, 1).T

    @staticmethod
    def row_product(x, weight, scales):
        blocks, inputs, half = weight.shape  # N / R, K, R / 2
        groups = len(scales)
        weight = weight.view(blocks, groups, inputs // groups, half)
        x = x.float().view(groups, inputs // groups, 1)
        grids = scales.float().view(groups, blocks, 2, half, 2).transpose(0, 1)
        scales, zeros = grids[:, :, None].unbind(-1)  # (N / R, groups, 1, 2, R / 2) each
        sums = []
        for i, q in enumerate((weight & 15, weight >> 4)):  # unpack: the first half of the rows, then the second
            near = (q.float() - 8) * scales[..., i, :] + zeros[..., i, :]  # scale: (N / R, groups, group, R / 2)
            sums.append((near * x).sum((1, 2)))  # sum: (N / R, R / 2)
        return torch.stack(sums, 1).flatten()

    @staticmethod
    def packed(weight, rows):
        """The weight with `rows` rows packed together."""
        return pack(unpack(weight).contiguous(), rows)

    @staticmethod
    def settled(weight):
        """As many rows together as the device's kernel wants."""
        blocks, _, half = weight.shape
        rows = rows_together(2 * blocks * half, weight.device)
        return weight if rows == 2 * half else Int4.packed(weight, rows)

    @staticmethod
    def cpu_kernel(x, weight, scales):
        """PyTorch's kernel for few rows on a CPU, or None where it packs otherwise."""
        if weight.shape[2] == 1:
            return None
        group, packed = x.shape[1] // len(scales), weight.view(-1, x.shape[1] // 2)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x.bfloat16(), packed, group, scales.bfloat16())


def grid_of(weight):
    """Int8 or Int4: which grid a packed weight is on."""
    return Int8 if weight.dtype == torch.int8 else Int4


def dequantize(weight, scales, dtype):
    """What the packed weight stands for: (N, K), for int4 as a transposed (K, N)."""
    return grid_of(weight).dequantize(weight, scales, dtype)


def row_product(x, weight, scales):
    """x Wᵀ for one row, (K,) -> (N,), written as one reduction over the packed weights, into which a compiler can fuse the rest."""
    return grid_of(weight).row_product(x, weight, scales)


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


def plain_product(x, weight, scales):
    """x Wᵀ, (M, K) -> (M, N), with the weight unpacked; on a CPU part by part, each of which stays in its cache."""
    parts = grid_of(weight).split(weight, scales, TOGETHER if x.device.type == "cpu" else 2**20)
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
def lacks_bfloat16(device):
    """Whether a device is a GPU older than compute capability 8 (a T4, a V100). PyTorch refuses to compile for it what has an input
    in bfloat16, and runs the many small kernels instead."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)


@cache
def compiled_row_product(device):
    """row_product as one kernel, which reads packed weights and nothing else, or None where PyTorch cannot make it."""
    if find_spec("triton") is None or torch.cuda.get_device_capability(device) < (7, 0):
        return None
    return torch.compile(row_product, dynamic=False)


def gpu_product(x, weight, scales):
    """x Wᵀ for a few rows on a GPU, (M, K) -> (M, N), one kernel for each row; None where PyTorch cannot compile it."""
    rows = x
    if torch.compiler.is_compiling():
        product = row_product  # it becomes a part of what is being compiled
    else:
        product = compiled_row_product(x.device)
        if x.dtype == torch.bfloat16 and lacks_bfloat16(x.device):
            rows = x.float()
    if product is None:
        return None
    return torch.stack([product(row, weight, scales) for row in rows]).to(x.dtype)


class QuantizedLinear(nn.Module):
    """x Wᵀ + b with W in 8 or 4 bits, in the place of an nn.Linear.

    weight: q, for int8 (N, K), for int4 packed (N / R, K, R / 2); scales: (N,), or scales and zeros (K / group, N, 2).
    """

    def __init__(self, weight, scales, bias=None):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales)
        self.bias = bias
        self.grid = grid_of(weight)
        self.one_row = None  # loading may put a function (x, weight, scales) here that is faster for a single row on a CPU
        self.in_features, self.out_features = weight.shape[1], self.grid.outputs(scales)

    @classmethod
    def empty(cls, outputs, inputs, scheme, rows=2, device=None, bias=None):
        """One to be filled. rows: R of int4; in a file 2."""
        check_scheme(scheme, outputs, inputs)
        if scheme == "int8":
            weight, scales = Int8.empty(outputs, inputs, device)
        else:
            weight, scales = Int4.empty(outputs, inputs, device, GROUPS[scheme], rows)
        return cls(weight, scales, bias)

    @classmethod
    def of(cls, weight, scheme, bias=None):
        """Quantise the weight (N, K) of a layer. At most one part of it is in more bits at a time."""
        rows = rows_together(len(weight), weight.device)
        layer = cls.empty(*weight.shape, scheme, rows, weight.device, bias)
        places = layer.grid.split(layer.weight, layer.scales, FEW_OUTPUTS)
        for plain, (place, place_of_scales) in zip(weight.split(FEW_OUTPUTS), places):
            layer.grid.fill(place, place_of_scales, plain)
        return layer

    def packed(self, rows):
        """The weight, of int4 with so many rows together; in a file they are 2."""
        return self.grid.packed(self.weight, rows)

    def settle(self):
        """After loading: put the weight and the scales as the device's kernel wants them.

        Scales that a GPU cannot take in bfloat16 become float16, which is as small and holds more digits; only below 6e-5 it may
        round, by 3e-8 at most.
        """
        self.weight = self.grid.settled(self.weight)
        if lacks_bfloat16(self.weight.device):
            self.scales = self.scales.half()

    def forward(self, x):
        y = self.product(x.flatten(0, -2)).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias

    def product(self, x):
        """x Wᵀ, (M, K) -> (M, N), in the fastest way that the device has. With few rows the time goes into reading weights, so
        they are taken as they are packed; with many into arithmetic, which is fastest on plain weights."""
        weight, scales, device = self.weight, self.scales, x.device.type
        if x.requires_grad:  # the kernels below have no derivative
            return TrainingProduct.apply(x, weight, scales)
        y = None
        if device == "cpu" and len(x) == 1 and self.one_row is not None:
            y = self.one_row(x, weight, scales)
        elif device == "cpu" and len(x) <= self.grid.few:
            y = self.grid.cpu_kernel(x, weight, scales)  # fast in bfloat16 alone: in other types it takes 5 to 30 times as long
        elif device == "cuda" and len(x) <= 8:
            y = gpu_product(x, weight, scales)
        return plain_product(x, weight, scales) if y is None else y.to(x.dtype)


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
