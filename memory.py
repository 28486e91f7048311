"""What a model takes, in bytes, and what would make it fit."""

import torch

from device import free_memory
from llava import Llava
from quantize import replace


def size(bytes):
    """In words, decimal: 1 GB is 10⁹ bytes."""
    return f"{bytes / 1e9:.1f} GB" if bytes >= 1e9 else f"{bytes / 1e6:.1f} MB"


def weight_bytes(config, dtype, scheme):
    """What the weights take: quantised layers in their own types, all else in dtype."""
    with torch.device("meta"):
        model = Llava(config)
        if scheme is not None:
            replace(model, scheme)
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize + sum(buffer.nbytes for buffer in model.buffers())


def smaller(config, dtype, scheme, free):
    """The options with which the weights would fit, the least change first; None if there are none."""
    dtypes = {"": dtype} | ({"--dtype bfloat16": torch.bfloat16} if dtype == torch.float32 else {})
    schemes = {"": scheme} | ({"--quantize int8": "int8", "--quantize int4": "int4"} if scheme is None else {})
    for s, name in schemes.items():
        for d, other in dtypes.items():
            try:
                fits = weight_bytes(config, other, name) < free
            except ValueError:  # its layers cannot have this scheme
                continue
            if fits:
                return "use " + " ".join(option for option in (d, s) if option)
    return None


def cache_bytes(config, dtype, tokens):
    """What the KV cache takes for a row of so many tokens."""
    text = config.text
    return 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * tokens * dtype.itemsize


def worth_copying(config, dtype):
    """Whether a CPU should copy its weights into memory, where it computes faster with them, or leave them mapped from their files:
    what would take half of the free memory stays there."""
    return weight_bytes(config, dtype, None) < (free_memory("cpu") or 0) / 2
