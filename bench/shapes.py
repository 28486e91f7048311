"""Random checkpoints in the published shapes, for what does not depend on what a model knows: speed and memory."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from llava import Llava
from weights.checkpoint import published_name
from weights.config import VIT_L_14_336, LlavaConfig

TINY = Path(__file__).parent.parent / "tiny" / "llava"
SHAPES = {  # hidden size, MLP, layers, heads of the language model
    "1b": (2048, 5504, 16, 16),
    "7b": (4096, 11008, 32, 32),
    "13b": (5120, 13824, 40, 40),
}


def checkpoint_of(shape, dtype, cache=Path("bench/checkpoints"), shard=2e9):
    """The folder of a checkpoint of this shape and type; made on first use, in files of about so many bytes, of which one at a
    time is in memory. "tiny" is the bundled one."""
    if shape == "tiny":
        return TINY
    folder = cache / f"{shape}-{str(dtype)[6:]}"
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_configs(shape, folder)
        with torch.device("meta"):
            model = Llava(LlavaConfig.from_pretrained(folder))
        tile = (torch.randn(2**22, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
        weight_map, tensors, left = {}, {}, len(list(model.parameters()))
        for name, parameter in model.named_parameters():
            size = parameter.numel()
            norm = "norm" in name and name.endswith(".weight")
            values = torch.ones(size, dtype=dtype) if norm else tile.repeat(-(-size // len(tile)))[:size]
            tensors[published_name(name)] = values.view(parameter.shape)
            left -= 1
            if not left or sum(tensor.nbytes for tensor in tensors.values()) > shard:
                file = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
                save_file(tensors, folder / file, metadata={"format": "pt"})
                weight_map |= dict.fromkeys(tensors, file)
                tensors = {}
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=1))
    return folder


def write_configs(shape, folder):
    """The bundled model's tokenizer and files, with the sizes of another shape."""
    for file in TINY.iterdir():
        if file.suffix in (".json", ".model"):
            shutil.copyfile(file, folder / file.name)
    hidden, intermediate, layers, heads = SHAPES[shape]
    raw = json.loads((TINY / "config.json").read_text())
    raw["vision_config"], raw["image_seq_length"] = {"model_type": "clip_vision_model", **VIT_L_14_336}, 576
    raw["text_config"] = {
        "model_type": "llama", "vocab_size": 32064, "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(raw, indent=1))
    raw = json.loads((TINY / "preprocessor_config.json").read_text())
    raw["size"], raw["crop_size"] = {"shortest_edge": 336}, {"height": 336, "width": 336}
    (folder / "preprocessor_config.json").write_text(json.dumps(raw, indent=1))
