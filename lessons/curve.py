"""Draw how a training run has gone, from the file of losses that train.py writes beside its result.

python -m lessons.curve OUT.losses.jsonl                     # writes OUT.losses.png
python -m lessons.curve OUT.losses.jsonl --out curve.png     # needs matplotlib
"""

import argparse
import json
import sys
from pathlib import Path

MEMORY = 0.9  # share of the smoothed loss that stays from step to step


def read(path):
    """The steps, their losses, and {file of held-out data: [(step, loss)]}. Raises ValueError for a file that is none of train.py's."""
    steps, losses, held_out = [], [], {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            said = json.loads(line)
            for name, loss in said.get("held_out", {}).items():
                held_out.setdefault(name, []).append((said["step"], loss))
            if "loss" in said:
                steps.append(said["step"])
                losses.append(said["loss"])
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not a file of losses as train.py writes it ({error!r})") from None
    if not steps:
        raise ValueError(f"{path} holds no losses")
    return steps, losses, held_out


def smooth(losses):
    """A running mean that forgets: what a single batch shows of the loss is mostly noise."""
    mean, means = losses[0], []
    for loss in losses:
        mean = MEMORY * mean + (1 - MEMORY) * loss
        means.append(mean)
    return means


def draw(path, out):
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise ValueError("to draw a curve: pip install matplotlib") from None
    steps, losses, held_out = read(path)
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    axes.plot(steps, losses, color="0.8", label="each step")
    axes.plot(steps, smooth(losses), label="smoothed")
    for name, points in held_out.items():
        axes.plot(*zip(*points), "o-", label=f"held out: {name}")
    axes.set_xlabel("step")
    axes.set_ylabel("loss of the assistant's words")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(out, bbox_inches="tight")
    pyplot.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--out", type=Path, help="the picture [beside the file]")
    args = parser.parse_args()
    try:
        draw(args.file, args.out or args.file.with_suffix(".png"))
    except (ValueError, OSError) as error:
        sys.exit(f"lessons.curve: {error}")


if __name__ == "__main__":
    main()
