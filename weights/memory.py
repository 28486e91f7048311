"""What a model takes, in bytes."""

from hardware.device import free_memory


def size(bytes):
    """In words, decimal: 1 GB is 10⁹ bytes."""
    return f"{bytes / 1e9:.1f} GB" if bytes >= 1e9 else f"{bytes / 1e6:.1f} MB"


def weight_bytes(model, dtype):
    """What the weights of a model take in dtype; quantised layers have their own types. The model may be on the meta device."""
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize + sum(buffer.nbytes for buffer in model.buffers())


def cache_bytes(config, dtype, tokens):
    """What the KV cache takes for a row of so many tokens."""
    text = config.text
    return 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * tokens * dtype.itemsize


def worth_copying(weights):
    """Whether a CPU should copy so many bytes of weights into memory, where it computes faster with them, or leave them mapped from
    their files: what would take half of the free memory stays there."""
    return weights < (free_memory("cpu") or 0) / 2
