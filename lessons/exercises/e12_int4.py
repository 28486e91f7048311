"""Exercise 12: four bits a weight. Why a 13B fits where a 7B did not.

A row of weights is cut into groups of 32, 64 or 128 neighbours. Each group has a grid of 16 steps from its smallest weight to
its largest, and of a weight only the number of the nearest step is kept, q in 0 … 15:

    w ≈ scale · (q − 8) + zero        scale = (max w − min w) / 15        zero = min w + 8 · scale

Scales and zeros are stored in bfloat16, so round them before q is computed from them: q can make up for their rounding. A group
whose weights are all equal has no range; its scale must not be 0 all the same (`quantize.TINY` will do), or q is 0 / 0.

Two q go into a byte. Of each R rows that are packed together, the first half has the low four bits and the second half the high
ones, and a byte's neighbours are those of the other rows in the same column, because that is how a CPU's vector
instructions want them: byte [i, k, j] holds q[i · R + j, k] + 16 · q[i · R + R / 2 + j, k].

`quantize_int4`, `pack` and `unpack` become those of weights/quantize.py.
"""


def quantize_int4(weight, group):
    """weight: (N, K). Returns q (N, K) uint8, and scales and zeros (K / group, N, 2) in bfloat16, in this order."""
    raise NotImplementedError("exercise 12: round each group to its grid")


def pack(q, rows):
    """q: (N, K) uint8, R = rows, which divides N. Returns (N / R, K, R / 2) uint8, contiguous."""
    raise NotImplementedError("exercise 12: two to a byte")


def unpack(packed):
    """packed: (N / R, K, R / 2). Returns q (N, K)."""
    raise NotImplementedError("exercise 12: take the bytes apart")
