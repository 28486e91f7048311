"""Random checkpoints in the published shapes, for what does not depend on what a model knows: speed and memory."""

import json
import shutil
from pathlib import Path

import torch

from checkpoint import save_checkpoint
from config import VIT_L_14_336, LlavaConfig
from llava import Llava

TINY = Path(__file__).parent.parent / "tiny" / "llava"
SHAPES = {  # hidden size, MLP, layers, heads of the language model
    "1b": (2048, 5504, 16, 16),
    "7b": (4096, 11008, 32, 32),
    "13b": (5120, 13824, 40, 40),
}


def checkpoint_of(shape, dtype, cache=Path("bench/checkpoints")):
    """The folder of a checkpoint of this shape and type; made on first use. "tiny" is the bundled one."""
    if shape == "tiny":
        return TINY
    folder = cache / f"{shape}-{str(dtype)[6:]}"
    if not (folder / "model.safetensors").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_configs(shape, folder)
        with torch.device("meta"):
            model = Llava(LlavaConfig.from_pretrained(folder))
        tile = (torch.randn(2**22, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
        for name, parameter in list(model.named_parameters()):
            module, _, leaf = name.rpartition(".")
            size = parameter.numel()
            values = torch.ones(size, dtype=dtype) if "norm" in name and leaf == "weight" else tile.repeat(-(-size // len(tile)))[:size]
            setattr(model.get_submodule(module), leaf, torch.nn.Parameter(values.view(parameter.shape), requires_grad=False))
        save_checkpoint(model, folder, folder, dtype)
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
