"""What a run says about itself while it goes on: a bar, the losses on held-out data, and a file with a line for every step."""

import json
import sys
import time

from tqdm import tqdm

HELD_OUT_EVERY = 120  # seconds between two looks at held-out data


def losses_file(out):
    """The file beside the result: {"step", "loss", "lr"} for each step, {"step", "held_out": {file: loss}} now and then."""
    return out.with_name(f"{out.name}.losses.jsonl")


class Report:
    def __init__(self, out, stage, step, steps, rank):
        """step: how many are done already. The first process alone writes."""
        self.bar = tqdm(total=steps, initial=step, unit="step", desc=f"stage {stage}")
        self.file = None
        if rank == 0:
            kept = lines_until(losses_file(out), step)
            out.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(losses_file(out), "w", encoding="utf-8")
            self.file.writelines(kept)
        self.held_out_at = time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()
        if self.file is not None:
            self.file.close()

    def step(self, step, loss, rate):
        self.bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        self.bar.update()
        self.write({"step": step, "loss": loss, "lr": rate})

    def due(self):
        """Whether held-out data should be looked at again."""
        return time.monotonic() - self.held_out_at > HELD_OUT_EVERY

    def held_out(self, step, losses):
        """losses: {name of a file: its loss}."""
        said = ", ".join(f"{loss:.4f} ({name})" for name, loss in losses.items())
        self.bar.write(f"step {step}: held-out loss {said}", file=sys.stderr)
        self.write({"step": step, "held_out": losses})
        self.held_out_at = time.monotonic()

    def write(self, line):
        if self.file is not None:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()


def lines_until(path, step):
    """The lines of an earlier part of the run, without those of steps that will be done again and half a line at the end."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else ():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    return kept
