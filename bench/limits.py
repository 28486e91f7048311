"""What the machine can do at most, measured: bytes read and multiplications done in a second."""

import time

import torch

from weights.memory import cache_bytes


def fastest(run, device, seconds=1.0):
    """The shortest time of `run`, repeated for about so long; on a GPU of eight in a row, so that none waits for its launch."""
    wait, launches = (torch.cuda.synchronize, 8) if device.type == "cuda" else (lambda: None, 1)
    best, end = float("inf"), time.perf_counter() + seconds
    run()
    wait()
    while time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(launches):
            run()
        wait()
        best = min(best, (time.perf_counter() - start) / launches)
    return best


def read_bandwidth(device, size):
    """Bytes per second in which so many bytes are read, again and again: what fits a cache comes from there. The fastest of three
    ways to read them: which one that is differs between machines."""
    values = torch.zeros(min(size, 2**30) // 8, device=device, dtype=torch.int64)
    ways = (values.amax, values.view(torch.int8).amax, values.view(torch.float32).sum)
    return values.nbytes / min(fastest(way, device) for way in ways)


def matrix_throughput(device, dtype):
    """Floating-point operations per second in a product of two large square matrices."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / fastest(lambda: a @ b, device)


def decode_bytes(config, weights, rows, context, dtype):
    """Bytes that a decode step must read: the language model's weights once, and each row's keys and values."""
    return weights["text"] * dtype.itemsize + cache_bytes(config, dtype, rows * context)


def prefill_operations(config, weights, pictures, context, new):
    """Operations that `new` tokens after `context` others must take, the pictures' way through the vision tower included.

    Two for each weight and token (a multiplication and a sum), and as many for each pair of tokens and each of the two
    products of attention. Of the last block, the tokens before the last need their keys and values alone (their queries, which
    come along with them, are counted: 0.3 % of a 7B's prefill); of the output head, none.
    """
    text, vision = config.text, config.vision
    blocks, width, head = text.num_hidden_layers, text.num_attention_heads * text.head_dim, text.vocab_size * text.hidden_size
    block, inputs = (weights["text"] - head) / blocks, text.hidden_size * (width + 2 * text.num_key_value_heads * text.head_dim)
    pairs = (blocks - 1) * (new * context + new * (new + 1) / 2) + context + new
    words = 2 * new * (block * (blocks - 1) + inputs) + 2 * (block - inputs + head) + 4 * pairs * width
    depth = (
        max(k % (vision.num_hidden_layers + 1) for k in config.vision_layers) / vision.num_hidden_layers
    )  # of the blocks that are needed
    patches = vision.num_patches + 1
    seen = 2 * weights["vision"] * depth * patches + 4 * patches**2 * vision.num_hidden_layers * depth * vision.hidden_size
    seen += 2 * weights["projector"] * vision.num_patches
    return words + pictures * seen
