"""Products with weights in 8 or 4 bits that read them as they are packed. weights/quantize.py says what is packed how.

A decode step has one row, or a few, and takes as long as reading the weights takes. The plain way reads the packed weights, writes
them in 16 bits and reads those again: more bytes than if they had stayed in 16 bits. The products here unpack a weight in the
core, where it is used. A prompt has many rows, and takes as long as its arithmetic: there the plain way is the fast one.

    a CPU   PyTorch has a kernel for each kind of weight (`few_rows_in_8_bits`, `few_rows_in_4_bits`)
    a GPU   the product is written as one sum (`row_in_8_bits`, `row_in_4_bits`), of which torch.compile makes one kernel

How much each wins stands in docs/speed.md.

Shapes: N outputs of a layer, K inputs, M rows that it is applied to, R rows of weights that are packed together.
8 bits: weight q (N, K) int8; scales (N,). 4 bits: weight (N / R, K, R / 2) uint8; scales, with zeros, (K / group, N, 2).
"""

from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch

ROWS_ON_A_GPU = 8  # each row reads the weights anew


class Products(NamedTuple):
    """The fast products with one kind of weights: functions (x, weight, scales)."""

    few_rows: object  # on a CPU, (M, K) -> (M, N); None where the kernel does not take the weight
    most_rows: int  # up to which that is faster than unpacking the weight first
    row: object  # (K,) -> (N,), to be compiled for a GPU


def fast_product(products, x, weight, scales):
    """x Wᵀ, (M, K) -> (M, N) in x's type, without unpacking W in memory; None where there is no such way, or it is not faster."""
    y = None
    if x.device.type == "cpu" and len(x) <= products.most_rows:
        y = products.few_rows(x, weight, scales)
    elif x.device.type == "cuda" and len(x) <= ROWS_ON_A_GPU:
        y = few_rows_on_a_gpu(products.row, x, weight, scales)
    return None if y is None else y.to(x.dtype)


# On a CPU. The kernels are fast in bfloat16 alone: in other types they take 5 to 30 times as long.


def few_rows_in_8_bits(x, weight, scales):
    if x.shape[1] % 64:
        return None  # the kernel would read rows of such a length beyond their end
    return torch.ops.aten._weight_int8pack_mm(x.bfloat16(), weight, scales.bfloat16())


def few_rows_in_4_bits(x, weight, scales):
    if weight.shape[2] == 1:
        return None  # R = 2, which is not the kernel's
    group, packed = x.shape[1] // len(scales), weight.view(-1, x.shape[1] // 2)
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x.bfloat16(), packed, group, scales.bfloat16())


@cache
def rows_of_the_kernel(pack):
    """R of the kernel for 4 bits on this CPU: 64 with AVX-512, 32 with AVX2; 2 where it packs in another way than `pack`, which is
    that of weights/quantize.py."""
    probe = (torch.arange(64)[:, None] // 4 % 16).expand(64, 32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(probe.int().contiguous(), 1).flatten()
    return next((rows for rows in (64, 32) if torch.equal(pack(probe.to(torch.uint8), rows).flatten(), packed)), 2)


def aligned(weight):
    """A weight that begins at a multiple of 16 bytes. One that is mapped from a file need not, and on it the kernel for 8 bits crashes."""
    return weight.clone() if weight.data_ptr() % 16 else weight


# On a GPU. A row's product is written as one sum over the packed weights, into which the compiler fuses the unpacking.


def row_in_8_bits(x, weight, scales):
    return (weight.float() * x.float()).sum(1) * scales.float()


def row_in_4_bits(x, weight, scales):
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


def few_rows_on_a_gpu(row_product, x, weight, scales):
    """One kernel for each row; None where PyTorch cannot compile it."""
    rows = x
    if not torch.compiler.is_compiling():  # if it is, row_product becomes a part of what is being compiled
        row_product = compiled(row_product, x.device)
        if x.dtype == torch.bfloat16 and lacks_bfloat16(x.device):
            rows = x.float()
    if row_product is None:
        return None
    return torch.stack([row_product(row, weight, scales) for row in rows])


@cache
def compiled(row_product, device):
    """A row's product as one kernel, which reads packed weights and nothing else; None where PyTorch cannot make it."""
    if find_spec("triton") is None or torch.cuda.get_device_capability(device) < (7, 0):
        return None
    return torch.compile(row_product, dynamic=False)


@cache
def lacks_bfloat16(device):
    """Whether a device is a GPU older than compute capability 8 (a T4, a V100). PyTorch refuses to compile for it what has an input
    in bfloat16, and runs the many small kernels instead."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)


IN_8_BITS = Products(few_rows_in_8_bits, 8, row_in_8_bits)
IN_4_BITS = Products(few_rows_in_4_bits, 32, row_in_4_bits)
