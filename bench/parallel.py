"""What each of several processes holds that share a model, and how fast they answer together, on this machine's CPU.

    python -m bench.parallel                                # 1.25 billion random weights in float32: one process, then two
    python -m bench.parallel --shape 1b --processes 1 2 4

The peak is of a process's resident memory, from the start through loading, a picture and 16 tokens; PyTorch itself, in it, is
given too. On a CPU this proves the memory, not the speed: the processes share the memory's bandwidth.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.distributed.device_mesh import init_device_mesh

from bench.shapes import SHAPES, checkpoint_of
from chat import Chat
from images import open_image
from weights.shares import split


def peak():
    """The most bytes that have been resident at once in this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def work(rank, size, model, dtype, store, results):
    """One process's part; writes (bytes before loading, peak, seconds a token) to results/rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
    before = peak()
    chat = Chat.from_pretrained(model, dtype=dtype if size == 1 else None)
    if size > 1:
        split(chat.model, init_device_mesh("cpu", (size,)), "cpu", dtype)
    ids = torch.tensor([chat.tokenizer.encode(chat.prompt("What is this?", [open_image("tiny/example.png")]))])
    steps = chat.model.generate(ids, chat.processor([open_image("tiny/example.png")]), max_new_tokens=17, eos_ids=())
    next(steps)
    start = time.perf_counter()
    count = sum(1 for _ in steps)
    torch.save((before, peak(), (time.perf_counter() - start) / count), f"{results}/{rank}")
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=["tiny", *SHAPES], default="1b")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    model = checkpoint_of(args.shape, dtype)
    print("| processes | before loading, GB | peak of each, GB | ms a token |\n|---|---|---|---|")
    for size in args.processes:
        with tempfile.TemporaryDirectory() as folder:
            multiprocessing.spawn(work, (size, model, dtype, f"{folder}/store", folder), nprocs=size)
            found = [torch.load(f"{folder}/{rank}") for rank in range(size)]
        before, most, token = (max(values) for values in zip(*found))
        print(f"| {size} | {before / 1e9:.2f} | {most / 1e9:.2f} | {token * 1e3:.0f} |", flush=True)


if __name__ == "__main__":
    main()
