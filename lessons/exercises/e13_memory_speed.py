"""Exercise 13: a matrix times a vector, as fast as memory gives the matrix. Needs `pip install numba`.

A decode step is 200 products like this one, y[r] = Σ_k w[r, k] · x[k], and it uses each weight once. So it takes as long as reading the
weights takes, if the multiplying keeps up. In Python it does not, by a factor of a thousand. Four lines that numba compiles do:
one loop over the rows, which the cores share (`prange`), and one over the columns, which each core does 8 or 16 at a time.

`w` holds the bits of bfloat16 or float16 numbers, or integers of 8 bits; `number(w[r, k])` is the float32 that they stand for. Take the
row out of the matrix before the inner loop: an index into one row is simpler to compile than an index into the matrix. Begin the sum as
`float32(0)`: from `0` numba would make an integer.

Write `@kernel` above your function. It takes the place of hardware/kernels.py's, and

    python -m lessons.memory_speed

measures it beside Python's own loop, NumPy, the one of this project, and the speed at which this machine reads.
"""

# from numpy import float32

# from hardware.kernels import kernel, number, prange


def matrix_times_vector(w, x, y):
    """w: (N, K); x: (K,) float32; y: (N,) float32, to be filled. Returns nothing."""
    raise NotImplementedError("exercise 13: two loops")
