"""Thirteen exercises that together are the model and what feeds it. Each is a file with a task and a stub; what is written there
takes the place of the real function, and the project's own tests say whether it is right: `make exercise N=1`. In a notebook:

    from lessons.exercises import check, hint
    check(1)        # is what stands in lessons/exercises/e1_splice.py right?
    hint(1)         # the first hint; hint(1, 2) is the second one
"""

import subprocess
import sys

from lessons.exercises.hints import HINTS


def check(number, solution=False):
    """Print whether what stands in the exercise's file is right, and if not, which test failed and how.

    solution: check the one that is kept beside it instead. It runs in a process of its own: this one's model stays as it is.
    """
    known(number)
    command = [sys.executable, "-m", "lessons.exercises", str(number), *["--solution"][: int(solution)]]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    said = (done.stdout + done.stderr).strip()
    print(said.splitlines()[-1] if done.returncode == 0 else said)


def hint(number, which=1):
    """Print a hint to an exercise; the first one is the mildest."""
    hints = known(number)
    if not 1 <= which <= len(hints):
        raise ValueError(f"exercise {number} has hints 1 to {len(hints)}, not {which}")
    print(f"Exercise {number}, hint {which} of {len(hints)}: {hints[which - 1]}")


def known(number):
    """The hints of an exercise. Raises ValueError if there is no exercise of that number."""
    if number not in HINTS:
        raise ValueError(f"there is no exercise {number!r}; expected 1 to {len(HINTS)}")
    return HINTS[number]
