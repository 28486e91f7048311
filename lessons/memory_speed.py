"""A matrix times a vector in Python, in NumPy and as a compiled loop, beside the speed at which this machine reads its memory.

    python -m lessons.memory_speed             # exercise 13's, too, once you have written it

The matrix has 16-bit weights, for NumPy 32-bit ones: it has no bfloat16, and its float16 is slow.
"""

import sys
import time
from importlib.util import find_spec

import torch

from lessons.exercises.e13_memory_speed import matrix_times_vector as yours

ROWS, COLUMNS = 16384, 4096  # 134 MB in 16 bits: more than a CPU's cache holds


def gigabytes_a_second(run, size, seconds=1.0):
    """The best of as many runs as fit into that time."""
    run()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return size / best / 1e9


def in_python(w, x, y):
    """As it is written on the board."""
    for r in range(len(w)):
        total = 0.0
        for k in range(len(x)):
            total += w[r][k] * x[k]
        y[r] = total


def main():
    if find_spec("numba") is None:
        sys.exit("lessons.memory_speed: this needs numba: pip install numba")
    from hardware.cpu import array, kernels

    weights, x, y = torch.randn(ROWS, COLUMNS).bfloat16(), torch.randn(COLUMNS), torch.empty(ROWS)
    bits, wide, few = array(weights), weights.float().numpy(), weights[:16].float().tolist()
    vector, result, words = x.numpy(), y.numpy(), weights.view(torch.int64)
    rows = [
        ("Python", lambda: in_python(few, vector.tolist(), result), 2 * 16 * COLUMNS),
        ("NumPy, float32", lambda: wide @ vector, 2 * weights.nbytes),
        ("hardware/kernels.py", lambda: kernels().matrix_times_vector(bits, vector, result), weights.nbytes),
        ("yours", lambda: yours(bits, vector, result), weights.nbytes),
        ("reading alone", words.amax, weights.nbytes),
    ]
    print("| | GB/s | billion weights a second |\n|---|---|---|")
    for name, run, size in rows:
        try:
            speed = gigabytes_a_second(run, size)
        except NotImplementedError:  # not written yet
            continue
        print(f"| {name} | {speed:.3g} | {speed / (4 if 'float32' in name else 2):.3g} |", flush=True)


if __name__ == "__main__":
    main()
