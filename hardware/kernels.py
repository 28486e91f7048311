"""A matrix times a vector, as fast as memory gives the matrix: a few lines of Python each, compiled by numba (`pip install numba`).
`hardware/cpu.py` imports this file where numba is there.

A decode step takes every weight once, for one multiplication and one addition: y[r] = Σ_k w[r, k] · x[k]. A core can do hundreds of
those while memory delivers one line of 64 bytes. So the fewer bytes a weight has, and the less the core does to make a number of
them, the faster the step. Four things decide whether such a loop is fast:

- All cores work: `prange` deals the rows out to them.
- A core multiplies 8 or 16 numbers at once. The compiler arranges that only if it may add in another order than the loop's
  (`reassoc`). `fastmath=True` would allow more than that: to assume that there are no infinities and no NaN.
- Integers stay small. numba makes 64 bits of whatever an operation on integers gives, and then nothing is done 16 at once. So `number`
  turns the bits of a weight into a float32 without a detour.
- Two rows at a time, from two places of the matrix: the core fetches ahead in both, and takes each x[k] once for two products.

Shapes: N outputs of a layer, K inputs; S slots of a KV cache, E width of a head.
"""

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic
from numpy import float32

kernel = njit(parallel=True, cache=True, fastmath={"reassoc", "contract", "nsz"})


@intrinsic
def number(context, bits):
    """The float32 that a stored number is. uint16: bfloat16, the upper half of a float32; int16: float16; or an integer."""

    def code(context, builder, signature, arguments):
        (bits,) = arguments
        kind, word = signature.args[0], ir.IntType(32)
        if kind == types.uint16:
            return builder.bitcast(builder.shl(builder.zext(bits, word), ir.Constant(word, 16)), ir.FloatType())
        if kind == types.int16:
            return builder.fpext(builder.bitcast(bits, ir.HalfType()), ir.FloatType())
        if kind == types.int8:
            return builder.sitofp(bits, ir.FloatType())
        return bits  # float32 already

    return types.float32(bits), code


@kernel
def matrix_times_vector(w, x, y):
    """y = w x. w: (N, K), 16-bit floats or 8-bit integers; x: (K,), y: (N,), float32."""
    half = (len(w) + 1) // 2
    for r in prange(half):
        r2 = min(r + half, len(w) - 1)  # of an odd number of rows the last is computed twice
        row, row2 = w[r], w[r2]
        sum1 = sum2 = float32(0)
        for k in range(len(x)):
            sum1 += number(row[k]) * x[k]
            sum2 += number(row2[k]) * x[k]
        y[r], y[r2] = sum1, sum2


@kernel
def one_query(q, keys, values, starts, mask, out):
    """out[i] = Σ_s p[s] · values[s], p = softmax(keys q[i] / √E + mask): attention of one query for each head.

    q, out: (heads, E) float32; keys, values: (slots of all heads, E), of which head i has those from starts[i] on; mask: (heads, S).
    """
    scale = float32(1 / np.sqrt(q.shape[1]))
    for i in prange(len(q)):
        scores, result = np.empty(mask.shape[1], float32), np.zeros(q.shape[1], float32)
        largest, total = float32(-np.inf), float32(0)
        for s in range(len(scores)):
            key, dot = keys[starts[i] + s], float32(0)
            for e in range(q.shape[1]):
                dot += number(key[e]) * q[i, e]
            scores[s] = dot * scale + mask[i, s]
            largest = max(largest, scores[s])
        for s in range(len(scores)):
            value, weight = values[starts[i] + s], np.exp(scores[s] - largest)
            total += weight
            for e in range(q.shape[1]):
                result[e] += weight * number(value[e])
        for e in range(q.shape[1]):
            out[i, e] = result[e] / total
