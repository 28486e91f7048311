"""Draw the curves of one or several records: python -m bench.plot bench/cpu-1b-curves.json --out bench/curves.png

Needs `pip install matplotlib`.
"""

import argparse
import json
import sys
from pathlib import Path

try:
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator
except ImportError:
    sys.exit("bench.plot: matplotlib is not installed: pip install matplotlib")

AXES = {  # of each curve: its horizontal axis
    "prefill, s": "tokens of the prompt",
    "decode, ms a token": "tokens in the context",
    "throughput, tokens/s": "rows of the batch",
}


def plot(records, out):
    figure, rows = plt.subplots(len(records), len(AXES), figsize=(12, 3.6 * len(records)), squeeze=False, layout="constrained")
    for record, row in zip(records, rows):
        for axis, (name, x) in zip(row, AXES.items()):
            for (library, points), style in zip(record["curves"][name].items(), ("o-", "s--")):
                axis.plot(*zip(*points), style, label=library)
            axis.set(xscale="log", xlabel=x, ylabel=name)
            ticks = [x for x, _ in points]
            axis.set_xticks(ticks, [str(tick) for tick in ticks])
            axis.minorticks_off()
            if name.startswith("decode"):
                axis.set_ylim(bottom=0)
            else:
                axis.set_yscale("log")
                axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.yaxis.set_major_formatter("{x:g}")
                axis.yaxis.set_minor_locator(NullLocator())
            axis.grid(alpha=0.3)
        row[0].legend()
        row[1].set_title(f"{record['shape']} in {record['dtype']} on {record['machine']}")
    figure.savefig(out, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("records", nargs="+", type=Path, help="JSON files of `python -m bench --curves`")
    parser.add_argument("--out", type=Path, default=Path("bench/curves.png"))
    args = parser.parse_args()
    plot([json.loads(path.read_text()) for path in args.records], args.out)


if __name__ == "__main__":
    main()
