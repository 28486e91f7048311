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
multiplied as integers: x becomes integers of 16 bits, with a step for each group of weights (`four_bits_times_vector`). The
compiler does not find the right instruction by itself, so the innermost loop is written in its own terms, those of LLVM.

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


@intrinsic
def power_of_two(context, n):
    """2ⁿ of a whole float32, made from its bits."""

    def code(context, builder, signature, arguments):
        whole = builder.fptosi(arguments[0], INT32)
        return builder.bitcast(builder.shl(builder.add(whole, ir.Constant(INT32, 127)), ir.Constant(INT32, 23)), ir.FloatType())

    return types.float32(n), code


@njit(fastmath={"reassoc", "contract", "nsz"})
def exponential(x):
    """eˣ of a float32 up to 0, to 2e-7: the compiler cannot do `np.exp` for 16 numbers at once. eˣ = 2ⁿ · eʳ with |r| ≤ ln 2 / 2."""
    n = np.floor(x * float32(1.44269504) + float32(0.5))
    r = x - n * float32(0.693359375) + n * float32(2.12194440e-4)  # ln 2 in two parts: the first has few digits, so n times it is exact
    series = float32(1 / 720)
    for k in (1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
        series = series * r + float32(k)
    return float32(0) if x < float32(-87) else series * power_of_two(n)


@kernel
def one_query(q, keys, values, row_step, head_step, shared, mask, out):
    """out[b, h] = Σ_s p[s] · values[s], p = softmax(keys q[b, h] / √E + mask[b]): attention of one query for each head of each row.

    q, out: (B, H, E) float32; keys, values: (slots of all rows and heads, E); mask: (B, S), added to the scores. The slots of row
    b and key/value head h begin at b · row_step + h · head_step. `shared` query heads share a key/value head.
    """
    B, H, E = q.shape
    slots, scale = mask.shape[1], float32(1 / np.sqrt(E))
    half = (slots + 1) // 2
    for i in prange(B * H):
        b, h = i // H, i % H
        query, result, hidden = q[b, h], out[b, h], mask[b]
        start = b * row_step + h // shared * head_step
        head_keys, head_values = keys[start : start + slots], values[start : start + slots]
        scores = np.empty(slots, float32)
        for s in range(half):  # two slots at a time, as two rows above
            s2 = min(s + half, slots - 1)
            key, key2, dot, dot2 = head_keys[s], head_keys[s2], float32(0), float32(0)
            for e in range(E):
                dot += number(key[e]) * query[e]
                dot2 += number(key2[e]) * query[e]
            scores[s], scores[s2] = dot * scale + hidden[s], dot2 * scale + hidden[s2]
        largest, total = float32(-np.inf), float32(0)
        for s in range(slots):
            largest = max(largest, scores[s])
        for s in range(slots):
            scores[s] = exponential(scores[s] - largest)
            total += scores[s]
        result[:] = 0
        for s in range(half):
            s2, weight, weight2 = min(s + half, slots - 1), scores[s] / total, float32(0)
            if s + half < slots:
                weight2 = scores[s2] / total
            value, value2 = head_values[s], head_values[s2]
            for e in range(E):
                result[e] += weight * number(value[e]) + weight2 * number(value2[e])
