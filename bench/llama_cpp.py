"""llama.cpp beside ours: the language model of the same shape, with random weights, decoded by its own `llama-bench`.

Needs llama.cpp, built (https://github.com/ggml-org/llama.cpp), and `pip install gguf`.
"""

import json
import subprocess
from functools import partial
from pathlib import Path

import numpy as np
import torch

from bench.shapes import SHAPES

VOCABULARY = 32064
PEERS = ("llama.cpp BF16", "llama.cpp Q8_0", "llama.cpp Q4_0")
TOKENS = 64


def runs(program, shape, names):
    """{name: function (context) -> tokens a second} of the types of weights asked for."""
    return {name: partial(decode, program, model_of(shape, name.split()[1])) for name in names}


def decode(program, model, context):
    """Tokens a second of one row after `context` others. Raises SystemExit with what the program said if it fails."""
    command = [program, "-m", model, "-p", 0, "-n", TOKENS, "-d", context, "-t", torch.get_num_threads(), "-r", 1, "-o", "json"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"bench: {program} has failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)[-1]["avg_ts"]


def model_of(shape, kind, cache=Path("bench/checkpoints")):
    """The file of a language model of this shape, with weights of this type; the head of those in 4 bits has 8. Made on first use."""
    import gguf

    path = cache / f"{shape}-{kind}.gguf"
    if path.is_file():
        return path
    cache.mkdir(parents=True, exist_ok=True)
    hidden, intermediate, layers, heads = SHAPES[shape]
    writer = gguf.GGUFWriter(path.with_suffix(".partial"), "llama")
    writer.add_block_count(layers)
    writer.add_context_length(8192)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(intermediate)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("no_vocab")
    shapes = {"token_embd": (VOCABULARY, hidden), "output": (VOCABULARY, hidden), "output_norm": (hidden,)}
    for i in range(layers):
        shapes |= {f"blk.{i}.attn_{name}": (hidden, hidden) for name in ("q", "k", "v", "output")}
        shapes |= {f"blk.{i}.ffn_{name}": (intermediate, hidden) for name in ("gate", "up")}
        shapes |= {f"blk.{i}.ffn_down": (hidden, intermediate), f"blk.{i}.attn_norm": (hidden,), f"blk.{i}.ffn_norm": (hidden,)}
    random = np.random.default_rng(0)
    for name, size in shapes.items():
        if len(size) == 1:
            writer.add_tensor(f"{name}.weight", np.ones(size, np.float32))
            continue
        head = name in ("output", "token_embd") and kind == "Q4_0"
        stored = gguf.GGMLQuantizationType["Q8_0" if head else kind]
        weights = random.standard_normal(size, np.float32) * np.float32(0.02)
        writer.add_tensor(f"{name}.weight", gguf.quantize(weights, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".partial").rename(path)
    return path
