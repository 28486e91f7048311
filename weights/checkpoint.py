"""A Hugging Face checkpoint on disk: where it is, what its tensors are called, how they come in and go out.

Imports nothing of ours. The model's parameters carry the published leaf names (`q_proj`, `layer_norm1`), so weights need
no surgery; only the path in front of a leaf differs, and the two tables below are all there is to that.
"""

import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

# Four layouts of names exist: as published, and what three generations of transformers save. Each rewrite is tried once,
# in order, on the front of a name, and leads to the names of our modules.
TO_OURS = (
    ("model.", ""),
    ("language_model.model.", "language_model."),
    ("lm_head.", "language_model.lm_head."),
    ("multi_modal_projector.", "projector."),
    ("vision_tower.vision_model.", "vision_tower."),
    ("vision_tower.embeddings.", "vision_tower."),
    ("vision_tower.encoder.", "vision_tower."),
)
# And back, to the published layout, for what is saved: the first that fits.
TO_PUBLISHED = (
    ("language_model.lm_head.", "language_model.lm_head."),
    ("language_model.", "language_model.model."),
    ("projector.", "multi_modal_projector."),
    ("vision_tower.layers.", "vision_tower.vision_model.encoder.layers."),
    ("vision_tower.pre_layrnorm.", "vision_tower.vision_model.pre_layrnorm."),
    ("vision_tower.post_layernorm.", "vision_tower.vision_model.post_layernorm."),
    ("vision_tower.", "vision_tower.vision_model.embeddings."),
)
COMPUTED = (".position_ids", ".rotary_emb.inv_freq")  # tables that old files store and every model computes
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
PACKED = DTYPES | {"I8": torch.int8, "U8": torch.uint8}  # what quantised layers are stored in


def our_name(name):
    for old, new in TO_OURS:
        if name.startswith(old):
            name = new + name.removeprefix(old)
    return name


def published_name(name):
    return next(new + name.removeprefix(old) for old, new in TO_PUBLISHED if name.startswith(old))


def checkpoint_folder(folder_or_hub_name):
    """The local folder of a checkpoint, fetched from the Hugging Face hub if it is a name there, like "llava-hf/llava-1.5-7b-hf"."""
    name = str(folder_or_hub_name)
    if Path(name).is_dir():
        return Path(name)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{name}: no such folder; a name on the hub is like llava-hf/llava-1.5-7b-hf")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(f"{name}: no such folder; to fetch it from the hub, pip install huggingface_hub") from None
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.model", "*.safetensors"]))
    except Exception as error:  # of the network, the hub or the disk, in the types of several libraries
        raise FileNotFoundError(f"{name} could not be fetched from the hub: {' '.join(str(error).split()) or repr(error)}") from None


def read_json(path):
    """The object that a JSON file holds."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.parent} has no {path.name}: it must hold a whole Hugging Face checkpoint") from None
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are kinds of ValueError
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds a {type(raw).__name__}; expected a JSON object")
    return raw


class Stored(NamedTuple):
    """A tensor that has not been read yet."""

    file: Path
    name: str  # in that file
    shape: tuple[int, ...]
    kind: str  # a key of DTYPES, if it is a type we know

    def read(self, device="cpu"):
        """The tensor: mapped on a CPU, copied straight to a GPU."""
        device = str(device) if torch.device(device).type == "cuda" else "cpu"
        with safe_open(self.file, "pt", device) as tensors:  # opened anew each time, so that no earlier tensor's pages stay mapped
            return tensors.get_tensor(self.name)


def read_headers(folder, file="model.safetensors"):
    """What the weight files hold, from their headers alone: {our name: Stored}."""
    single, index = folder / file, folder / f"{file}.index.json"
    if single.is_file():
        files = [single.name]
    elif index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise ValueError(f"{index} has no weight_map from tensor names to file names")
        files = sorted(set(weight_map.values()))
        if outside := [file for file in files if Path(file).name != file or "\\" in file]:
            raise ValueError(f"{index} names {outside[0]!r}; expected names of files beside it, without folders")
    else:
        raise FileNotFoundError(f"{folder} has no {single.name} and no {index.name}")
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise FileNotFoundError(f"{folder} lacks {len(missing)} of its {len(files)} weight files, {missing[0]} first; fetch it again")

    stored = {}
    for file in files:
        try:
            with safe_open(folder / file, "pt") as tensors:
                for name in tensors.keys():
                    if not name.endswith(COMPUTED):
                        header = tensors.get_slice(name)
                        if our_name(name) in stored:
                            raise ValueError(f"{folder / file} holds {name} a second time")
                        stored[our_name(name)] = Stored(folder / file, name, tuple(header.get_shape()), header.get_dtype())
        except SafetensorError as error:
            raise ValueError(f"{folder / file} is damaged or cut short ({error}); fetch it again") from None
    return stored


def fill(model, stored, device, dtype, quantizers=None, copy=False):
    """Give a model on the meta device its parameters, one at a time, each straight to its device and type. dtype None: the type
    that the word embeddings are stored in. Buffers, which only quantised layers have, keep their types.

    quantizers: {name of a weight: a function of it that makes the module to put in its layer's place}.
    copy: also what changes neither device nor type. It stays in its file otherwise, which the system maps into memory.
    Raises ValueError, before any weight is read, if the parameters are not exactly those of the files.
    """
    quantizers, buffers = quantizers or {}, dict(model.named_buffers())
    shapes = {name: tuple(tensor.shape) for name, tensor in [*model.named_parameters(), *buffers.items()]}
    problems = {
        "missing": [name for name in shapes if name not in stored],
        "unexpected": [tensor.name for name, tensor in stored.items() if name not in shapes],
        "of a wrong shape": [
            f"{stored[name].name} {stored[name].shape}, expected {shape}"
            for name, shape in shapes.items()
            if name in stored and stored[name].shape != shape
        ],
        "of a type other than F16, BF16 and F32": [
            f"{tensor.name} {tensor.kind}" for name, tensor in stored.items() if tensor.kind not in DTYPES and name not in buffers
        ],
        "not quantised as config.json says": [
            f"{stored[name].name} {stored[name].kind}, expected {buffer.dtype}"
            for name, buffer in buffers.items()
            if name in stored and PACKED.get(stored[name].kind) != buffer.dtype
        ],
    }
    if any(problems.values()):
        found = [
            f"{len(names)} {what}: {'; '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
            for what, names in problems.items()
            if names
        ]
        where = " (names are mapped by TO_OURS in checkpoint.py)" if problems["missing"] and problems["unexpected"] else ""
        raise ValueError(f"config.json and the weights disagree. Tensors {'. Tensors '.join(found)}{where}")
    dtype = dtype or DTYPES[stored["language_model.embed_tokens.weight"].kind]
    for name in tqdm(shapes, desc="loading", unit="tensor", delay=1, disable=None):
        module, _, leaf = name.rpartition(".")
        # Cast where it is: there the memory is faster.
        tensor = stored[name].read(device).to(device, None if name in buffers else dtype, copy=copy and name not in quantizers)
        if name in quantizers:
            model.set_submodule(module, quantizers[name](tensor))
        else:
            setattr(model.get_submodule(module), leaf, tensor if name in buffers else nn.Parameter(tensor, requires_grad=False))


def save_checkpoint(model, source, out, dtype, given=None):
    """Write the model in the published layout, with the other files of the folder `source` beside it, into `out`.

    given: {our name: tensor}, to be written as they are in place of the model's.
    """
    given = given or {}
    tensors = {
        published_name(name): given[name] if name in given else parameter.detach().to("cpu", dtype)
        for name, parameter in model.named_parameters()
    }
    write_checkpoint(tensors, source, out, "model.safetensors")


def write_checkpoint(tensors, source, out, file, fields=None):
    """Write tensors {published name: tensor} into a file of the folder `out`, and beside it the other files of the folder
    `source`, config.json with `fields` added."""
    out.mkdir(parents=True, exist_ok=True)
    for found in source.iterdir():
        copied = found.suffix in (".json", ".jinja", ".model") and not found.name.endswith(".index.json")
        if copied and source.resolve() != out.resolve():
            shutil.copyfile(found, out / found.name)
    if fields:
        (out / "config.json").write_text(json.dumps(read_json(out / "config.json") | fields, indent=2) + "\n", encoding="utf-8")
    write_tensors(tensors, out / file)


def write_tensors(tensors, path):
    """Write a safetensors file, put in place when whole: a run may be killed at any moment. Raises OSError, as for a full disk."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        save_file(tensors, partial, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path} could not be written ({error})") from None
    os.chmod(partial, 0o644)  # save_file leaves it to its owner alone
    os.replace(partial, path)
