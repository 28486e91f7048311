"""What a CPU does faster than the plain forms in llama.py and clip.py. `weights.load.suit` puts it into a model once, when it is loaded.

A decode step has one row, and multiplies each matrix with a vector: it takes as long as reading the matrices takes. A prompt has many
rows, and takes as long as its arithmetic. What is slow in the plain form, and what stands here in its place:

| when                              | slow without it                                   | here                                      |
|-----------------------------------|---------------------------------------------------|-------------------------------------------|
| one row, with numba               | float32 weights are twice the bytes               | row_times_16_bits, …_8_bits, …_4_bits     |
| one query, with numba             | PyTorch's fused attention, on AMD's CPUs          | attention_of_one                          |
| without numba, bfloat16, AMD:     |                                                   |                                           |
| · one row                         | oneDNN, PyTorch's library, is made for many rows  | row_by_pytorch                            |
| · one query                       | PyTorch's fused attention                         | attention_in_two_products                 |
| 512 rows or more, with bfloat16   | a number of rows that is no multiple of 8         | padded_linear                             |
| many rows, a CPU without          | all weights in float32 are twice the memory       | rows_times_16_bits: a few at a time       |

numba is optional, and its kernels (`kernels.py`) are for large models alone: the weights of a small one are in the CPU's cache. What
each of these wins on which CPU stands in docs/speed.md. Products with quantised weights are in packed.py.
"""

from contextlib import contextmanager
from functools import cache, wraps
from importlib.util import find_spec

import torch
import torch.nn as nn
import torch.nn.functional as F

from hardware.device import multiplies_bfloat16

PART = 512  # outputs whose weights become float32 at once: a few megabytes, which stay in the CPU's cache
NUMPY = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}  # NumPy has no bfloat16, and numba no float16: as the bits they are


# numba's kernels, and how PyTorch calls them.


@cache
def has_kernels():
    """Whether there are kernels for one row here: numba is installed, and the CPU is one that they were written for."""
    return find_spec("numba") is not None and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


@cache
def start_kernels():
    """Load numba and the kernels. numba's start gives all cores to the OpenMP that PyTorch uses too, so PyTorch's number is set again."""
    threads = torch.get_num_threads()
    import numba

    from hardware import kernels

    numba.set_num_threads(1)  # starts it
    torch.set_num_threads(threads)
    return numba, kernels


def kernels():
    """The module of kernels, with as many threads as PyTorch has. It compiles each at the first call, and keeps it in a file."""
    numba, module = start_kernels()
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    return module


def array(tensor):
    """The NumPy array over a tensor's memory, as the kernels take it."""
    return tensor.detach().view(NUMPY.get(tensor.dtype, tensor.dtype)).numpy()


@contextmanager
def onednn(enabled):
    """Let PyTorch use the library oneDNN, or only what it has itself."""
    before, torch.backends.mkldnn.enabled = torch.backends.mkldnn.enabled, enabled
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


def opaque(result):
    """Make a function an operation that torch.compile takes as a whole. result: of the same arguments, an empty tensor like its result."""

    def decorate(function):
        operation = torch.library.custom_op(f"llava_py::{function.__name__}", function, mutates_args=())
        operation.register_fake(result)

        @wraps(function)
        def call(*tensors):
            return operation(*tensors) if torch.compiler.is_compiling() else function(*tensors)

        return call

    return decorate


# Products of one row, x Wᵀ: x (1, K) with a weight of N outputs gives (1, N), in x's type.


@opaque(lambda x, weight: x.new_empty(1, len(weight)))
def row_by_pytorch(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """By PyTorch's own kernel for bfloat16, without oneDNN. weight: (N, K)."""
    with onednn(False):
        return F.linear(x, weight)


@opaque(lambda x, weight: x.new_empty(1, len(weight)))
def row_times_16_bits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """With a weight (N, K) in 16 bits."""
    y = torch.empty(1, len(weight))
    kernels().matrix_times_vector(array(weight), array(x[0].float()), array(y[0]))
    return y.to(x.dtype)


@opaque(lambda x, weight, scales: x.new_empty(1, len(weight)))
def row_times_8_bits(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """With w ≈ scale · q. weight: q (N, K) int8; scales: (N,)."""
    y = torch.empty(1, len(weight))
    kernels().matrix_times_vector(array(weight), array(x[0].float()), array(y[0]))
    return (y * scales).to(x.dtype)


@opaque(lambda x, weight, scales: x.new_empty(1, scales.shape[1]))
def row_times_4_bits(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """With w ≈ scale · (q − 8) + zero. weight: packed q (N / R, K, R / 2) uint8; scales: scales and zeros (K / group, N, 2)."""
    y = torch.empty(1, scales.shape[1])
    grids = scales.view(torch.int32).squeeze(-1).view(torch.uint32)
    kernels().four_bits_times_vector(array(weight), array(grids), array(x[0].float()), array(y[0]))
    return y.to(x.dtype)


# Attention of one query a row, over the first S slots of a cache: q (B, H, 1, E), k and v (B, K, S, E), mask (B, 1, 1, S), which is
# added to the scores; returns (B, H, 1, E).


@opaque(lambda q, k, v, mask: torch.empty_like(q))
def attention_of_one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """By the kernel: it reads keys and values once, in the type that they have."""
    (B, H, _, E), K = q.shape, k.shape[1]
    if k.stride() != v.stride() or k.stride()[2:] != (E, 1):  # not of a cache
        k, v = k.contiguous(), v.contiguous()
    row_step, head_step = (step // E for step in k.stride()[:2])
    slots = (B - 1) * row_step + (K - 1) * head_step + k.shape[2]  # from the first head's first to the last one's last
    keys, values = (tensor.as_strided((slots, E), (E, 1)) for tensor in (k, v))
    out = torch.empty(B, H, E)
    masks = mask.float().view(B, -1)
    queries = array(q.float().view(B, H, E).contiguous())
    kernels().one_query(queries, array(keys), array(values), row_step, head_step, H // K, array(masks), array(out))
    return out.view(q.shape).to(q.dtype)


@opaque(lambda q, k, v, mask: torch.empty_like(q))
def attention_in_two_products(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """By PyTorch, as its two products, in place of its fused kernel."""
    queries = q.view(*k.shape[:2], -1, q.shape[-1])  # (B, K, H / K, E): the query heads that share a head of k
    with onednn(queries.shape[2] > 1):
        # As k qᵀ, not q kᵀ: of a transposed part of the cache oneDNN would make a copy first.
        scores = (k @ queries.transpose(-1, -2)).transpose(-1, -2)
    scores = scores.float() * q.shape[-1] ** -0.5 + mask  # (B, K, H / K, S)
    return (scores.softmax(-1).to(v.dtype) @ v).view(q.shape)


# A linear layer for one row and for many.


class SixteenBitLinear(nn.Linear):
    """A linear layer of a CPU whose weight stays in 16 bits, whatever type it computes in."""

    def __init__(self, linear, one_row):
        """one_row: the product for a single row: `row_times_16_bits`, `row_by_pytorch` or F.linear."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias, self.one_row = linear.weight, linear.bias, one_row
        self.in_bfloat16 = multiplies_bfloat16()  # asked once: torch.compile cannot look into a file

    def forward(self, x):
        weight, bias, rows = self.weight, self.bias, x.shape[:-1].numel()
        if type(x) is not torch.Tensor or not x.is_cpu or x.requires_grad or torch.is_autocast_enabled("cpu"):
            return plain_linear(x, weight, bias)
        if rows == 1:
            y = self.one_row(x.reshape(1, -1), weight)
        elif x.dtype == weight.dtype == torch.bfloat16 and self.in_bfloat16:
            return padded_linear(x, weight, bias)
        else:
            y = rows_times_16_bits(x.flatten(0, -2), weight)
        y = y.view(*x.shape[:-1], -1)
        return y if bias is None else y + bias


def plain_linear(x, weight, bias):
    """The layer's formula and no more, for what trains it, moves it to another device, or shares it between processes."""
    if torch.is_autocast_enabled("cpu"):  # it brings the types together itself
        return F.linear(x, weight, bias)
    return F.linear(x, weight.to(x.dtype), bias)


def padded_linear(x, weight, bias):
    """The layer with its rows filled up by zeros to a multiple of 8. oneDNN cuts the rows into blocks, and the vision tower has 577 of
    them, a prime number: 584 it multiplies faster."""
    rows = x.shape[:-1].numel()
    if rows < 512 or rows % 8 == 0:  # of few rows, the zeros cost more than they win
        return F.linear(x, weight, bias)
    filled = F.pad(x.flatten(0, -2), (0, 0, 0, -rows % 8))
    return F.linear(filled, weight, bias)[:rows].unflatten(0, x.shape[:-1])


def rows_times_16_bits(x, weight):
    """x Wᵀ, (M, K) -> (M, N), in float32: part by part the weights become float32, and are used before they leave the cache."""
    x32 = x.float()
    return torch.cat([F.linear(x32, part.float()) for part in weight.split(PART)], 1).to(x.dtype)
