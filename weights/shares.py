"""How a LLaVA is shared by several processes: which of its matrices are cut by their output, which by their input, and whether
a number of processes can share it evenly. The cutting itself is in hardware/parallel.py."""

from dataclasses import replace

from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from hardware.parallel import cut

# By output (nn.Linear's weight is (out, in), so these are its rows) or by input; linear maps alone, all else is everywhere. So a
# process has whole heads of its own, and the KV cache holds those alone.
PLAN = {
    "vision_tower.layers.*.self_attn.[qkv]_proj": ColwiseParallel(),
    "vision_tower.layers.*.self_attn.out_proj": RowwiseParallel(),
    "vision_tower.layers.*.mlp.fc1": ColwiseParallel(),
    "vision_tower.layers.*.mlp.fc2": RowwiseParallel(),
    "projector.linear_1": ColwiseParallel(),
    "projector.linear_2": RowwiseParallel(),
    "language_model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),  # by words: 0 for a word of another process
    "language_model.layers.*.self_attn.[qkv]_proj": ColwiseParallel(),
    "language_model.layers.*.self_attn.o_proj": RowwiseParallel(),
    "language_model.layers.*.mlp.gate_proj": ColwiseParallel(),
    "language_model.layers.*.mlp.up_proj": ColwiseParallel(),
    "language_model.layers.*.mlp.down_proj": RowwiseParallel(),
    "language_model.lm_head": ColwiseParallel(output_layouts=Replicate()),  # by words, and then all of them for everyone
}


def check_size(config, size):
    """Raises ValueError, saying what works, unless `size` processes can share the heads and the MLPs of a LlavaConfig evenly."""
    vision, text = config.vision, config.text
    parts = {
        "key/value heads": text.num_key_value_heads,
        "heads of the vision tower": vision.num_attention_heads,
        "units of an MLP": text.intermediate_size,
        "units of the vision tower's": vision.intermediate_size,
        "units of the projector": text.hidden_size,
    }
    if any(count % size for count in parts.values()):
        fit = [n for n in range(1, text.num_key_value_heads + 1) if not any(count % n for count in parts.values())]
        what = next(f"{count} {name}" for name, count in parts.items() if count % size)
        raise ValueError(f"{size} processes cannot share {what} evenly; --nproc-per-node {' or '.join(map(str, fit))} works for this model")


def split(model, mesh, device, dtype):
    """Leave each process of a one-dimensional DeviceMesh its share of a Llava, on its device and in dtype.

    model: as `from_pretrained` gives it on the CPU. The config's `num_key_value_heads` becomes that of the share, and with it the
    KV cache's. Raises ValueError if the heads cannot be shared evenly.
    """
    check_size(model.config, mesh.size())
    cut(model, PLAN, mesh, device, dtype)
    text = model.config.text
    if text.tie_word_embeddings:
        model.language_model.lm_head.weight = model.language_model.embed_tokens.weight
    for block in model.vision_tower.layers:
        block.self_attn.num_heads //= mesh.size()
    model.config = replace(model.config, text=replace(text, num_key_value_heads=text.num_key_value_heads // mesh.size()))
