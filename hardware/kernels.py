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

4 bits need a fifth thing. Two weights share a byte, and making a float32 of each takes longer than reading them. So they are
multiplied as integers: x becomes integers of 16 bits, with a step for each group of weights (`four_bits_times_vector`).

Shapes: N outputs of a layer, K inputs; S slots of a KV cache, E width of a head; for 4 bits R outputs packed together, G groups.
"""

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
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


AHEAD = 4096  # bytes that the core fetches ahead
INT8, INT16, INT32, INT64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))


@intrinsic
def multiply_16_columns(context, packed, first, width, x, k, size, sums):
    """The integer sums of 16 bytes' two outputs each over a group's inputs, Σ_k q[k] · x[k], by the CPU's own instruction `pmaddwd`:
    it multiplies 16 pairs of 16-bit integers and adds neighbours. So two inputs are taken at a time.

    packed: bytes; those of input i of the group are the 16 from first + i · width on. x: int16, of which the group has x[k : k + size].
    sums: int32; those of the low four bits go to sums[:16], those of the high ones, times 16, to sums[width : width + 16].
    """

    def code(context, builder, signature, arguments):
        data = lambda n: context.make_array(signature.args[n])(context, builder, arguments[n]).data
        bytes16, words16, words8 = ir.VectorType(INT8, 16), ir.VectorType(INT16, 16), ir.VectorType(INT32, 8)
        number = lambda n: ir.Constant(INT64, n)
        all_of = lambda type, n: ir.Constant(type, [n] * type.count)
        _, first, width, _, k, size, _ = arguments
        rows = builder.gep(data(0), [first])
        pairs = builder.bitcast(builder.gep(data(3), [k]), INT32.as_pointer())  # (x[k], x[k + 1]) as one integer
        multiply = builder.module.declare_intrinsic("llvm.x86.avx2.pmadd.wd", (), ir.FunctionType(words8, [words16, words16]))
        touch = ir.FunctionType(ir.VoidType(), [INT8.as_pointer(), INT32, INT32, INT32])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [INT8.as_pointer()], touch)
        totals = [cgutils.alloca_once_value(builder, all_of(words8, 0)) for _ in range(4)]
        with cgutils.for_range(builder, builder.udiv(size, number(2))) as loop:
            row = builder.gep(rows, [builder.mul(builder.mul(loop.index, number(2)), width)])
            builder.call(prefetch, [builder.gep(row, [number(AHEAD)]), *(ir.Constant(INT32, n) for n in (0, 3, 1))])  # to read, soon, data
            first_row, second_row = (
                builder.load(builder.bitcast(place, bytes16.as_pointer()), align=1) for place in (row, builder.gep(row, [width]))
            )
            pair = builder.load(builder.gep(pairs, [loop.index]), align=2)
            pair = builder.insert_element(ir.Constant(words8, ir.Undefined), pair, ir.Constant(INT32, 0))
            pair = builder.bitcast(builder.shuffle_vector(pair, pair, all_of(words8, 0)), words16)
            for part in (0, 1):  # the first eight bytes of both rows, then the others
                order = [n // 2 + 8 * part + 16 * (n % 2) for n in range(16)]  # a byte of the first row, one of the second, …
                order = ir.Constant(ir.VectorType(INT32, 16), order)
                both = builder.zext(builder.shuffle_vector(first_row, second_row, order), words16)
                for bits, mask in enumerate((0x0F, 0xF0)):
                    products = builder.call(multiply, [builder.and_(both, all_of(words16, mask)), pair])
                    total = totals[2 * bits + part]
                    builder.store(builder.add(builder.load(total), products), total)
        for bits, place in enumerate((number(0), width)):
            for part in (0, 1):
                where = builder.gep(data(6), [builder.add(place, number(8 * part))])
                builder.store(builder.load(totals[2 * bits + part]), builder.bitcast(where, words8.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(packed, first, width, x, k, size, sums), code


@intrinsic
def lower_half(context, bits):
    """The float32 of the bfloat16 in the lower 16 bits of a uint32."""
    code = lambda _, builder, signature, bits: builder.bitcast(builder.shl(bits[0], ir.Constant(INT32, 16)), ir.FloatType())
    return types.float32(bits), code


@intrinsic
def upper_half(context, bits):
    """The float32 of the bfloat16 in the upper 16 bits of a uint32."""
    code = lambda _, builder, signature, bits: builder.bitcast(builder.and_(bits[0], ir.Constant(INT32, 0xFFFF0000)), ir.FloatType())
    return types.float32(bits), code


@kernel
def four_bits_times_vector(packed, grids, x, y):
    """y = w x, w ≈ scale · (q − 8) + zero. So a group adds scale · (Σ_k q[k] · x[k] − 8 Σ_k x[k]) + zero · Σ_k x[k].

    packed: q (N / R, K, R / 2) uint8, as weights.quantize.pack makes it, R / 2 a multiple of 16; grids: (G, N) uint32, a scale and a
    zero in bfloat16 each; x: (K,), y: (N,), float32. For the first sum x is rounded to 16-bit integers, in steps of max |x| / 32767
    in its group: it errs by at most half a step.
    """
    blocks, K, half = packed.shape
    groups = len(grids)
    size = K // groups
    columns, by_half, rows = packed.reshape(-1), grids.reshape(groups, 2 * blocks, half), y.reshape(2 * blocks, half)

    integers, steps, sums = np.empty(K, np.int16), np.empty(groups, float32), np.empty(groups, float32)
    for g in range(groups):
        largest, total = float32(1e-30), float32(0)
        for k in range(g * size, (g + 1) * size):
            largest = max(largest, abs(x[k]))
            total += x[k]
        steps[g], sums[g] = largest / float32(32767), total
        for k in range(g * size, (g + 1) * size):
            integers[k] = np.int16(np.rint(x[k] * (float32(32767) / largest)))

    for b in prange(blocks):
        products = np.empty((groups, 2 * half), np.int32)
        for g in range(groups):
            for column in range(0, half, 16):
                first = (b * K + g * size) * half + column
                multiply_16_columns(columns, first, half, integers, g * size, size, products[g, column:])
        for bits in range(2):  # the outputs in the low four bits, then those in the high ones
            row = rows[2 * b + bits]
            row[:] = 0
            for g in range(groups):
                product, grid = products[g, bits * half : (bits + 1) * half], by_half[g, 2 * b + bits]
                step, total, eight = steps[g], sums[g], float32(8) * sums[g]
                if bits == 1:
                    step *= float32(1 / 16)
                for n in range(half):
                    row[n] += (float32(product[n]) * step - eight) * lower_half(grid[n]) + total * upper_half(grid[n])


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
