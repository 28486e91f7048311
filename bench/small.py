"""What large models take in 16, 8 and 4 bits: memory while loading, seconds for an answer, and what fits on which card.

    python -m bench.small                                                     # what weights and cache take, computed
    python -m bench.small --shape 13b --schemes int4 --device cpu             # loaded, and an answer of 32 tokens: measured

Loading should take the quantised model and the largest single tensor, not more.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from bench.__main__ import Worker
from bench.shapes import SHAPES, checkpoint_of, write_configs
from hardware.device import choose_device
from llava import Llava
from weights.checkpoint import read_headers
from weights.config import LlavaConfig
from weights.load import outline
from weights.memory import cache_bytes, weight_bytes
from weights.quantize import GROUPS

ANSWER = 512


def sizes(dtype):
    """The table of weights, and of weights with the cache for a picture and an answer, of each shape and scheme."""
    print(f"| GB | weights | with the cache for a picture and {ANSWER} tokens |\n|---|---|---|")
    for shape in ("7b", "13b"):
        with tempfile.TemporaryDirectory() as folder:
            write_configs(shape, Path(folder))
            config = LlavaConfig.from_pretrained(folder)
        for scheme in (None, *GROUPS):
            weights = weight_bytes(outline(Llava, config, scheme), dtype)
            both = weights + cache_bytes(config, dtype, config.features_per_image + ANSWER)
            print(f"| {shape.upper()}, {scheme or str(dtype)[6:]} | {weights / 1e9:.1f} | {both / 1e9:.1f} |")


def measured(shape, schemes, device, dtype):
    """Load, and answer, each scheme in a process of its own."""
    folder = checkpoint_of(shape, dtype)
    config = LlavaConfig.from_pretrained(folder)
    largest = max(torch.Size(tensor.shape).numel() for tensor in read_headers(folder).values()) * dtype.itemsize
    print(f"the largest tensor is {largest / 1e9:.2f} GB")
    print("| | weights, GB | peak while loading, GB | load, s | first token, s | tokens/s | peak, GB |\n|---|---|---|---|---|---|---|")
    for scheme in schemes:
        worker = Worker("ours" if scheme == "none" else f"ours, {scheme}", folder, device, str(dtype)[6:])
        first, each = worker("generate", batch=1, length=0, tokens=32)
        weights = weight_bytes(outline(Llava, config, None if scheme == "none" else scheme), dtype)
        cells = [weights / 1e9, worker.loaded / 1e9, worker.load, first, 1 / each, worker("memory")[0] / 1e9]
        print(f"| {scheme} | " + " | ".join(f"{cell:.3g}" for cell in cells) + " |", flush=True)
        worker.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, help="load a random model of this shape; otherwise sizes are computed")
    parser.add_argument("--schemes", nargs="+", default=["int8", "int4"], choices=("none", *GROUPS))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    if args.shape is None:
        sizes(dtype)
    else:
        measured(args.shape, args.schemes, choose_device(args.device), dtype)


if __name__ == "__main__":
    main()
