"""8- and 4-bit weights for the language model's linear layers, made while a checkpoint is read.

A decode step reads every weight once, so it takes as long as reading them takes: half the bytes, half the time. Only weights
are quantised; a product is that of 16-bit numbers with the weights' nearest neighbours on a grid:

    int8    w ≈ scale · q                   q in −127 … 127, one scale for each output channel: max |w| / 127
    int4    w ≈ scale · (q − 8) + zero      q in 0 … 15, a scale and a zero for each group of 32, 64 or 128 inputs:
                                            (max w − min w) / 15 and min w + 8 · scale

The first is symmetric: 0 stays 0. The second is asymmetric: 16 steps are too few to waste any beyond the smallest or the
largest weight. (Jacob et al. 2018, https://arxiv.org/abs/1712.05877, equation 1, where zero is −S·(Z − 8); a scale for each
channel: Krishnamoorthi 2018, https://arxiv.org/abs/1806.08342, section 3.) Rounding to a grid of step s errs by at most s / 2, and
by s / √12 in the mean square.

First come these formulas, then two q in a byte, then a layer that holds a quantised weight, then which layers of a model get one.

Shapes: N outputs of a layer, K inputs, M rows that it is applied to, R rows of weights that are packed together.
"""

from functools import partial

import torch
import torch.nn as nn

from hardware.packed import IN_4_BITS, IN_8_BITS, aligned, fast_product, lacks_bfloat16, rows_of_the_kernel

# The schemes, and of those in 4 bits the size of a group. With its scale and zero a weight of "int4" takes 4.5 bits.
GROUPS = {"int8": None, "int4": 64, "int4-32": 32, "int4-128": 128}
FILE = "quantized.safetensors"  # not model.safetensors, which transformers would take for plain weights
TINY = torch.finfo(torch.bfloat16).tiny  # a scale is never 0
TOGETHER = 512  # outputs whose weights a CPU unpacks at once: two megabytes at K = 2048, which stay in its cache
FEW_OUTPUTS = 64  # that are quantised at once: larger blocks, freed again, would leave holes in the memory between those that stay


# The formulas. Scales and zeros are rounded to bfloat16, as they are kept, before q is computed: so q is the best for them.


def quantize_int8(weight):
    """(N, K) -> q (N, K) int8 and its scales (N,)."""
    w = weight.float()
    scales = (w.abs().amax(1) / 127).clamp(min=TINY).bfloat16()
    return (w / scales.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scales


def dequantize_int8(q, scales, dtype):
    """What they stand for, (N, K)."""
    return q.to(dtype) * scales.to(dtype)[:, None]


def quantize_int4(weight, group):
    """(N, K) -> q (N, K) uint8, and its scales and zeros (K / group, N, 2)."""
    w = weight.float().unflatten(1, (-1, group))  # (N, K / group, group)
    low, high = w.aminmax(dim=2)
    scales = ((high - low) / 15).clamp(min=TINY).bfloat16().float()
    zeros = (low + 8 * scales).bfloat16().float()
    q = ((w - zeros[..., None]) / scales[..., None]).round().add(8).clamp(0, 15).to(torch.uint8)
    return q.flatten(1), torch.stack([scales, zeros], 2).transpose(0, 1).contiguous().bfloat16()


def dequantize_int4(q, scales, dtype):
    """What they stand for, (N, K), as a transposed (K, N): so `unpack` gives q."""
    scales, zeros = scales.to(dtype).permute(2, 0, 1).contiguous()[:, :, None]  # (K / group, 1, N), each in one piece
    q = (q.T.view(torch.int8) - 8).to(dtype).unflatten(0, (len(scales), -1))  # (K / group, group, N), −8 … 7
    return torch.addcmul(zeros, q, scales, out=q).flatten(0, 1).T  # zero + scale · q, rounded once


# Two to a byte.


def pack(q, rows):
    """q (N, K) -> (N / R, K, R / 2), where of R = `rows` rows the first half has the low four bits of the bytes and the second half
    the high ones: as a CPU's kernel wants it, which computes a column of R outputs at once."""
    low, high = q.view(-1, 2, rows // 2, q.shape[1]).unbind(1)  # (N / R, R / 2, K)
    return (low | high << 4).transpose(1, 2).contiguous()


def unpack(packed):
    """And back: (N / R, K, R / 2) -> q (N, K), as a transposed (K, N), in which order it is faster to make."""
    packed = packed.transpose(0, 1)
    return torch.stack([packed & 15, packed >> 4], 2).flatten(1).T


# How a weight is laid out in two tensors, and what can be done with them: a class for each number of bits, with the same functions.
#
#     empty         two tensors for so many outputs and inputs, to be filled
#     quantize      plain weights (N, K) -> the two tensors; dequantize: and back
#     split         into parts of so many outputs each
#     repack        the weight as a kernel with this R takes it


class Int8:
    """weight: q as it is, (N, K) int8; scales: (N,)."""

    products = IN_8_BITS
    outputs = 0  # the dimension of scales that they lie along
    dequantize = staticmethod(dequantize_int8)

    @staticmethod
    def empty(outputs, inputs, group, rows, device):
        weight = torch.empty(outputs, inputs, dtype=torch.int8, device=device)
        return weight, torch.empty(outputs, dtype=torch.bfloat16, device=device)

    @staticmethod
    def split(weight, scales, outputs):
        return zip(weight.split(outputs), scales.split(outputs))

    @staticmethod
    def quantize(plain, group, rows):
        return quantize_int8(plain)

    @staticmethod
    def repack(weight, rows):
        return aligned(weight)  # in 8 bits no rows are packed together


class Int4:
    """weight: packed q, (N / R, K, R / 2) uint8; scales: scales and zeros, (K / group, N, 2)."""

    products = IN_4_BITS
    outputs = 1

    @staticmethod
    def dequantize(weight, scales, dtype):
        return dequantize_int4(unpack(weight), scales, dtype)

    @staticmethod
    def empty(outputs, inputs, group, rows, device):
        weight = torch.empty(outputs // rows, inputs, rows // 2, dtype=torch.uint8, device=device)
        return weight, torch.empty(inputs // group, outputs, 2, dtype=torch.bfloat16, device=device)

    @staticmethod
    def split(weight, scales, outputs):
        rows = 2 * weight.shape[2]
        return zip(weight.split(outputs // rows), scales.split(outputs, dim=1))

    @staticmethod
    def quantize(plain, group, rows):
        q, scales = quantize_int4(plain, group)
        return pack(q, rows), scales

    @staticmethod
    def repack(weight, rows):
        return weight if rows == 2 * weight.shape[2] else pack(unpack(weight).contiguous(), rows)


LAYOUTS = {torch.int8: Int8, torch.uint8: Int4}


def rows_together(outputs, device):
    """R of a layer with so many outputs on a device: on a CPU as its kernel wants it, 2 where there is none."""
    rows = rows_of_the_kernel(pack) if device.type == "cpu" else 2
    return rows if outputs % rows == 0 else 2


# The layer.


def dequantize(weight, scales, dtype):
    """What a layer's two tensors stand for: (N, K), for int4 as a transposed (K, N)."""
    return LAYOUTS[weight.dtype].dequantize(weight, scales, dtype)


def plain_product(x, weight, scales):
    """x Wᵀ, (M, K) -> (M, N), with the weight unpacked; on a CPU part by part, each of which stays in its cache."""
    parts = LAYOUTS[weight.dtype].split(weight, scales, TOGETHER if x.device.type == "cpu" else 2**20)
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


class QuantizedLinear(nn.Module):
    """x Wᵀ + b with W in 8 or 4 bits, in the place of an nn.Linear. weight and scales: as in Int8 or Int4."""

    def __init__(self, weight, scales, bias=None):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales)
        self.bias = bias
        self.layout = LAYOUTS[weight.dtype]
        self.one_row = None  # loading may put a function (x, weight, scales) here that is faster for a single row on a CPU
        self.in_features, self.out_features = weight.shape[1], scales.shape[self.layout.outputs]

    def forward(self, x):
        y = self.product(x.flatten(0, -2)).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias

    def product(self, x):
        """x Wᵀ, (M, K) -> (M, N). With few rows the time goes into reading weights, so they are taken as they are packed, if the
        device can; with many into arithmetic, which is fastest on plain weights."""
        if x.requires_grad:  # the fast products have no derivative
            return TrainingProduct.apply(x, self.weight, self.scales)
        if self.one_row is not None and len(x) == 1 and x.device.type == "cpu":
            return self.one_row(x, self.weight, self.scales)
        y = fast_product(self.layout.products, x, self.weight, self.scales)
        return plain_product(x, self.weight, self.scales) if y is None else y

    @classmethod
    def empty(cls, outputs, inputs, scheme, rows=2, device=None, bias=None):
        """One to be filled. rows: R of int4; in a file 2."""
        check_scheme(scheme, outputs, inputs)
        layout = Int8 if scheme == "int8" else Int4
        return cls(*layout.empty(outputs, inputs, GROUPS[scheme], rows, device), bias)

    @classmethod
    def of(cls, weight, scheme, bias=None):
        """Quantise the weight (N, K) of a layer. At most one part of it is in more bits at a time."""
        rows = rows_together(len(weight), weight.device)
        layer = cls.empty(*weight.shape, scheme, rows, weight.device, bias)
        places = layer.layout.split(layer.weight, layer.scales, FEW_OUTPUTS)
        for part, (place, place_of_scales) in zip(weight.split(FEW_OUTPUTS), places):
            q, scales = layer.layout.quantize(part, GROUPS[scheme], rows)
            place.copy_(q)
            place_of_scales.copy_(scales)
        return layer

    def packed(self, rows):
        """The weight, of int4 with so many rows together; in a file they are 2."""
        return self.layout.repack(self.weight, rows)

    def settle(self):
        """After loading: put the weight and the scales as the device's products want them.

        Scales that a GPU cannot take in bfloat16 become float16, which is as small and holds more digits; only below 6e-5 it may
        round, by 3e-8 at most.
        """
        self.weight = self.layout.repack(self.weight, rows_together(self.out_features, self.weight.device))
        if lacks_bfloat16(self.weight.device):
            self.scales = self.scales.half()


# A model's layers.


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
