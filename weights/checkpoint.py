"""A Hugging Face checkpoint on disk: what its tensors are called, where it is, how they come in and go out. Imports nothing of ours.

The model's parameters carry the published leaf names (`q_proj`, `layer_norm1`), so weights need no surgery. Only the path in front
of a leaf differs, and the two tables below are all there is to that.

A weight file (safetensors) begins with a header: names, shapes and types. So a checkpoint is compared with the model before any weight is
read; then the weights come one at a time, each straight to its device and type, and no second copy of the model is ever in memory.
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

# Names. Four layouts of them exist: as published, and what three generations of transformers save. Each rewrite is tried once,
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


def our_name(name):
    for old, new in TO_OURS:
        if name.startswith(old):
            name = new + name.removeprefix(old)
    return name


def published_name(name):
    return next(new + name.removeprefix(old) for old, new in TO_PUBLISHED if name.startswith(old))


# The folder, and the JSON files in it.

NULL_IS_A_VALUE = ("sliding_window",)  # a Mistral whose window is null has none; one that leaves it out has the default one
JSON_NAMES = {dict: "object", list: "list"}
LFS_POINTER = b"version https://git-lfs"  # how the file begins that stands for a large one in a git repository


def checkpoint_folder(folder_or_hub_name, *more):
    """The local folder of a checkpoint, fetched from the Hugging Face hub if it is a name there, like "llava-hf/llava-1.5-7b-hf".

    more: patterns of files to fetch beside the usual ones, like "*.bin".
    """
    name = str(folder_or_hub_name)
    if Path(name).is_dir():
        return Path(name)
    if Path(name).is_file():
        raise ValueError(f"{name} is a file; give the folder that it is in, which must hold a whole Hugging Face checkpoint")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{name}: no such folder; a name on the hub is like llava-hf/llava-1.5-7b-hf")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(f"{name}: no such folder; to fetch it from the hub, pip install huggingface_hub") from None
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.jinja", "*.model", "*.safetensors", *more]))
    except Exception as error:  # of the network, the hub or the disk, in the types of several libraries
        reason = " ".join(str(error).split()) or repr(error)
        raise FileNotFoundError(f"{name}: no such folder, and it could not be fetched from the hub: {reason}") from None


def read_json(path, kind=dict):
    """What a JSON file holds: an object, or with kind=list a list. A field that is null counts as left out.

    Raises FileNotFoundError, OSError or ValueError, naming the file.
    """
    raw = _parse(path, object_pairs_hook=_without_null)
    if not isinstance(raw, kind):
        raise ValueError(f"{path} holds a {type(raw).__name__}; expected a JSON {JSON_NAMES[kind]}")
    return raw


def _parse(path, **options):
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors on Windows begin a file with a byte order mark
        return json.loads(text, **options)
    except OSError as error:
        raise unreadable(path, error) from None
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are kinds of ValueError
        refuse_pointer(path)
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def _without_null(pairs):
    return {name: value for name, value in pairs if value is not None or name in NULL_IS_A_VALUE}


def unreadable(path, error):
    """What to raise where the system refuses to open a file of a checkpoint."""
    if isinstance(error, FileNotFoundError) and path.is_symlink():
        return FileNotFoundError(f"{path} is a link to {os.readlink(path)}, which is not there; fetch the checkpoint again")
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{path.parent} has no {path.name}: it must hold a whole Hugging Face checkpoint")
    if isinstance(error, PermissionError):
        return PermissionError(f"{path} may not be read: permission denied; ask its owner, or fetch the checkpoint anew")
    return OSError(f"{path} cannot be read: {error.strerror}; fetch or copy the checkpoint again")  # a loop of links, a damaged disk


def refuse_pointer(path):
    """Raises OSError for a file that may not be read, and ValueError for one that `git clone` left to Git LFS to fetch."""
    try:
        with open(path, "rb") as file:
            start = file.read(len(LFS_POINTER))
    except OSError as error:
        raise unreadable(path, error) from None
    if start == LFS_POINTER:
        raise ValueError(f"{path} is a Git LFS pointer, not the file itself; run `git lfs install` and `git lfs pull` in {path.parent}")


# The weight files, and what their headers say that they hold.

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
PACKED = DTYPES | {"I8": torch.int8, "U8": torch.uint8}  # what quantised layers are stored in


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


def weight_files(folder, file="model.safetensors"):
    """The paths of a checkpoint's weight files: the only one, or those that its index names.

    Raises FileNotFoundError for what is not there, and ValueError for an index that names no files, or files elsewhere: it is
    untrusted input.
    """
    single, index = folder / file, folder / f"{file}.index.json"
    if single.exists() or single.is_symlink():
        return [single]
    if not (index.exists() or index.is_symlink()):
        raise FileNotFoundError(f"{folder} has no {single.name} and no {index.name}{other_weights(folder)}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index} has no weight_map from tensor names to file names")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or "\\" in name:
            raise ValueError(f"{index} names {name!r}; expected names of files beside it, without folders")
    paths = [folder / name for name in names]
    missing = [path.name for path in paths if not (path.is_file() or path.is_symlink())]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {len(missing)} of its {len(paths)} weight files, {missing[0]} first; fetch it again")
    return paths


def other_weights(folder):
    """What a folder without our weights has instead, and what to do about it, for the end of an error."""
    if (folder / "adapter_config.json").is_file():
        return ": it holds an adapter; give the checkpoint that it changes, and this folder as --adapter"
    for pattern in ("*.bin", "*.bin.index.json", "*.pth", "*.pt", "*.ckpt", "*.gguf", "*.h5", "*.msgpack"):
        for found in sorted(folder.glob(pattern)):
            return (
                f", but {found.name}, which is not read: weights must be safetensors. Save it again with transformers' save_pretrained; "
                f"if it is in the original LLaVA authors' layout, python convert.py {folder} OUT"
            )
    return ""


def read_headers(folder, file="model.safetensors"):
    """What the weight files hold, from their headers alone: {our name: Stored}."""
    stored = {}
    for path in weight_files(folder, file):
        for tensor in headers_of(path):
            name = our_name(tensor.name)
            if name in stored:
                raise ValueError(f"{path} holds {tensor.name} a second time")
            if not name.endswith(COMPUTED):
                stored[name] = tensor
    return stored


def headers_of(path):
    """The tensors of one safetensors file, as a list of Stored."""
    refuse_pointer(path)
    try:
        with safe_open(path, "pt") as tensors:
            headers = [(name, tensors.get_slice(name)) for name in tensors.keys()]
            return [Stored(path, name, tuple(header.get_shape()), header.get_dtype()) for name, header in headers]
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut short ({error}); fetch it again") from None
    except OSError as error:
        raise OSError(f"{path} cannot be mapped into memory ({error}), as on some network disks; copy it to a local disk") from None


# Into a model.


def differences(shapes, packed, stored):
    """Where a model and the files disagree: {what is wrong: [names, with what was found]}, without what is right.

    shapes: {name: shape} of all tensors of the model; packed: {name: type} of those of quantised layers; stored: {name: Stored}.
    """
    missing, unexpected, misshapen, mistyped, misquantised = [], [], [], [], []
    for name, shape in shapes.items():
        if name not in stored:
            missing.append(name)
        elif stored[name].shape != shape:
            misshapen.append(f"{stored[name].name} {stored[name].shape}, expected {shape}")
    for name, tensor in stored.items():
        if name not in shapes:
            unexpected.append(tensor.name)
        if name in packed:
            if PACKED.get(tensor.kind) != packed[name]:
                misquantised.append(f"{tensor.name} {tensor.kind}, expected {packed[name]}")
        elif tensor.kind not in DTYPES:
            mistyped.append(f"{tensor.name} {tensor.kind}")
    found = {
        "missing": missing,
        "unexpected": unexpected,
        "of a wrong shape": misshapen,
        "of a type other than F16, BF16 and F32": mistyped,
        "not quantised as config.json says": misquantised,
    }
    return {what: names for what, names in found.items() if names}


def refuse(found):
    """Raises ValueError with the first three of each kind of difference."""
    sentences = []
    for what, names in found.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        sentences.append(f"Tensors {len(names)} {what}: {'; '.join(names[:3])}{more}")
    where = " (names are mapped by TO_OURS in checkpoint.py)" if "missing" in found and "unexpected" in found else ""
    raise ValueError(f"config.json and the weights disagree. {'. '.join(sentences)}{where}")


def fill(model, stored, device, dtype, quantizers=None, copy=False, keep=()):
    """Give a model on the meta device its parameters, one at a time, each straight to its device and type. dtype None: the type
    that the word embeddings are stored in. Buffers, which only quantised layers have, and the names in `keep` have the types that
    they are stored in.

    quantizers: {name of a weight: a function of it that makes the module to put in its layer's place}.
    copy: also what changes neither device nor type. It stays in its file otherwise, which the system maps into memory.
    Raises ValueError, before any weight is read, if the parameters are not exactly those of the files.
    """
    quantizers = quantizers or {}
    packed = {name: buffer.dtype for name, buffer in model.named_buffers()}
    shapes = {name: tuple(tensor.shape) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    found = differences(shapes, packed, stored)
    if found:
        refuse(found)
    dtype = dtype or DTYPES[stored["language_model.embed_tokens.weight"].kind]
    for name in tqdm(shapes, desc="loading", unit="tensor", delay=1, disable=None):
        parent, _, leaf = name.rpartition(".")
        tensor = stored[name].read(device)  # and cast there, where the memory is faster
        if name in quantizers:  # only what is made of it stays: a copy would be for nothing
            model.set_submodule(parent, quantizers[name](tensor.to(device, dtype)))
        elif name in packed:
            setattr(model.get_submodule(parent), leaf, tensor.to(device, copy=copy))
        else:
            wanted = tensor.dtype if name in keep else dtype
            parameter = nn.Parameter(tensor.to(device, wanted, copy=copy), requires_grad=False)
            setattr(model.get_submodule(parent), leaf, parameter)


# And out of it.


def save_checkpoint(model, source, out, dtype, given=None, fields=None):
    """Write the model in the published layout, with the other files of the folder `source` beside it, into `out`.

    given: {our name: tensor}, to be written as they are in place of the model's; fields: what is put into config.json.
    """
    given = given or {}
    tensors = {
        published_name(name): given[name] if name in given else parameter.detach().to("cpu", dtype)
        for name, parameter in model.named_parameters()
    }
    write_checkpoint(tensors, source, out, "model.safetensors", fields)


def write_checkpoint(tensors, source, out, file, fields=None):
    """Write tensors {published name: tensor} into a file of the folder `out`, and beside it the other files of the folder
    `source`, config.json with `fields` added."""
    out.mkdir(parents=True, exist_ok=True)
    for found in source.iterdir():
        copied = found.suffix in (".json", ".jinja", ".model") and not found.name.endswith(".index.json")
        if copied and source.resolve() != out.resolve():
            shutil.copyfile(found, out / found.name)
    if fields:  # all else stays as it stands there, null too
        config = _parse(out / "config.json") | fields
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
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
