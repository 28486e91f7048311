"""train.py with kill -9: processes are killed at random moments, others go on in another number of them, and the losses and
the weights in the end are those of a run that nobody disturbed.

    python -m tests.killed                # 10 kills
    python -m tests.killed 30 --seed 1    # others

The model is tiny/llava with noise on its language model, so that there is something to learn again. Needs Linux's /proc.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from llava import Llava
from tiny.world import write
from training.report import losses_file
from weights.checkpoint import save_checkpoint


def learner(folder):
    model, noise = Llava.from_pretrained("tiny/llava", dtype=torch.float32), torch.Generator().manual_seed(0)
    for parameter in model.language_model.parameters():
        if parameter.ndim == 2:
            parameter += parameter.std() * torch.randn(parameter.shape, generator=noise)
    save_checkpoint(model, Path("tiny/llava"), folder, torch.float32)


def start(folder, name, size):
    """A run of so many processes, called by its name; returns torchrun, or the one process."""
    together = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)] if size > 1 else []
    command = f"--stage 2 --model {folder}/model --data {folder}/instruct.json --images {folder} --out {folder}/{name} --device cpu"
    options = "--batch-size 4 --accumulate 2 --epochs 4 --lr 5e-4 --save-every 0.01"
    return subprocess.Popen(
        [sys.executable, *together, "train.py", *command.split(), *options.split()],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=open(f"{folder}/{name}.err", "w"),
    )  # fmt: skip


def losses(log):
    """{step: loss} of all steps that were computed; of those that were computed again the last."""
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    steps = [json.loads(line) for line in lines if line.endswith("\n")]
    return {step["step"]: step["loss"] for step in steps}


def disturb(run, folder, name):
    """Kill one of the processes of a run, half of the time while a state is being written. Returns what was done, or None if the
    run was faster."""
    log, states = losses_file(folder / name), folder / name / "training-state"
    wanted, while_saving = len(losses(log)) + random.randint(0, 4), random.random() < 0.5
    half = lambda: [state.name for state in states.glob("[0-9]*") if not (state / "complete.json").exists()]
    while run.poll() is None and (len(losses(log)) < wanted or while_saving and not half()):
        time.sleep(0.002)
    time.sleep(random.choice([0, random.uniform(0, 1), random.uniform(0, 5)]))
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
    processes = [run.pid, *map(int, children.read_text().split())] if run.poll() is None else []
    if not processes:
        return None
    victim = random.choice(processes)
    os.kill(victim, 9)
    who, began = "torchrun" if victim == run.pid and len(processes) > 1 else "one", time.monotonic()
    killed = f"{who} is killed, with {len(half())} states half written"
    run.wait(timeout=60)
    while any(Path(f"/proc/{pid}").exists() for pid in processes):
        if time.monotonic() - began > 60:
            raise TimeoutError(f"{processes} do not end")
    return killed


def main(kills, seed):
    random.seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        folder, done, size, name = Path(folder), 0, 1, "undisturbed"
        write(folder, 64, seed=5)
        learner(folder / "model")
        if start(folder, name, size).wait():
            raise RuntimeError((folder / f"{name}.err").read_text())
        expected, weights = losses(losses_file(folder / name)), load_file(folder / name / "model.safetensors")
        while done < kills:
            name, finished = f"killed-{done}", False
            while not finished:
                size = random.choice([number for number in (1, 2, 4) if number != size])
                run = start(folder, name, size)
                killed = disturb(run, folder, name) if done < kills else None
                if killed:
                    done += 1
                    print(f"{done}: of {size} processes {killed}, after {len(losses(losses_file(folder / name)))} steps", flush=True)
                elif run.wait():
                    raise RuntimeError((folder / f"{name}.err").read_text())
                else:
                    finished = True
            found, result = losses(losses_file(folder / name)), load_file(folder / name / "model.safetensors")
            loss = max(abs(loss - expected[step]) for step, loss in found.items())
            weight = max((result[key] - weights[key]).abs().max().item() for key in weights)
            complete = found.keys() == expected.keys()
            print(f"{len(expected)} steps, {len(found)} computed: losses within {loss:.1e}, weights within {weight:.1e}", flush=True)
            if not complete or loss > 1e-4 or weight > 1e-3:
                return 1
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kills", type=int, nargs="?", default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sys.exit(main(args.kills, args.seed))
