"""The original authors' layout (haotian-liu/LLaVA and mu-cai/ViP-LLaVA), and the way from it to the published one.

Their code writes a Llama with three more things in it: a projector, settings that begin with `mm_`, and sometimes the vision
tower. `convert.py` puts the parts together. Here is what it needs to know: names, settings, and files that are read and written one
at a time, so that a 7B takes no more memory than one file of it.
"""

import json
import pickle
from pathlib import Path

import torch
import torch.nn as nn
from safetensors.torch import load_file

from weights.checkpoint import read_headers, read_json, write_tensors
from weights.config import TEXT, VIP_LAYERS, VIT_L_14_336, check, only, text_config, vision_config

# The front of a name, and what takes its place; None: the tensor is left out. The first that fits.
PUBLISHED = (
    ("model.mm_projector.clip_layernorm.", "multi_modal_projector.projector_layernorm."),  # ViP-LLaVA's
    ("model.mm_projector.final_linear.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.final_linear.2.", "multi_modal_projector.linear_2."),
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("model.image_newline", None),  # LLaVA-NeXT's, which these models never read
    ("model.vision_tower.vision_tower.vision_model.", "vision_tower.vision_model."),
    ("vision_model.", "vision_tower.vision_model."),  # a CLIP's own repository
    ("lm_head.", "language_model.lm_head."),
    ("model.embed_tokens.", "language_model.model.embed_tokens."),
    ("model.layers.", "language_model.model.layers."),
    ("model.norm.", "language_model.model.norm."),
)
COMPUTED = (".position_ids", ".inv_freq")  # tables that every model computes
CLIP_TEXT = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")  # the other half of a CLIP

VIP_TOWER = "clip_4layers_336"  # five layers, in spite of its name
TOWERS = ("openai/clip-vit-large-patch14-336", VIP_TOWER)  # whose shape is known without their files
SETTINGS = {  # of their config.json: what these models do not have is refused by its name
    "mm_projector_type": only("mlp2x_gelu"),
    "mm_use_im_start_end": only(False, None),
    "mm_patch_merge_type": only("flat", None),
    "mm_vision_select_feature": only("patch", "cls_patch"),
    "image_aspect_ratio": only("square", "pad", None),
    "s2": only(False, None),  # a tower at several scales
}
PROJECTOR = "mm_projector.bin"  # the file of a projector alone
PEFT = "base_model.model."  # what PEFT puts before a name
SHARD = 2 * 10**9  # bytes: how much is written at once


def published(name):
    """What a tensor of theirs, or of a CLIP's or a Llama's repository, is called in the published layout; None: it is left out."""
    if name.endswith(COMPUTED) or name.startswith(CLIP_TEXT):
        return None
    for old, new in PUBLISHED:
        if name.startswith(old):
            return None if new is None else new + name.removeprefix(old)
    raise ValueError(f"the tensor {name} is none of a LLaVA's; the names that are known stand in PUBLISHED in weights/original.py")


def kind_of(folder):
    """What a folder holds: "lora", "projector", "llava", "llama" (a language model alone), or None for none of theirs."""
    if (folder / "non_lora_trainables.bin").is_file():
        return "lora"
    if not (folder / "config.json").is_file():
        return "projector" if (folder / PROJECTOR).is_file() else None
    raw = read_json(folder / "config.json")
    if (folder / PROJECTOR).is_file() and not weight_files(folder):
        return "projector"
    if raw.get("mm_vision_tower") is not None:
        return "llava"
    return "llama" if raw.get("model_type") in ("llama", "mistral") else None


# Reading


def weight_files(folder):
    """The paths of a folder's weight files, safetensors before .bin; an empty list if there are none.

    Raises FileNotFoundError if some of those that its index names are missing.
    """
    for file in ("model.safetensors", "pytorch_model.bin"):
        if (folder / file).is_file():
            return [folder / file]
        index = folder / f"{file}.index.json"
        if index.is_file():
            names = read_json(index).get("weight_map")
            if not isinstance(names, dict) or any(not isinstance(name, str) or Path(name).name != name for name in names.values()):
                raise ValueError(f"{index} has no weight_map from tensor names to names of files beside it")
            paths = [folder / name for name in sorted(set(names.values()))]
            missing = [path.name for path in paths if not path.is_file()]
            if missing:
                raise FileNotFoundError(
                    f"{folder} lacks {len(missing)} of its {len(paths)} weight files, {missing[0]} first; fetch it again"
                )
            return paths
    return []


def read_pickle(path):
    """The tensors of a .bin file, {name: tensor}, mapped into memory. Raises ValueError for one that holds anything but tensors: a
    pickle can name a function to be called, so PyTorch is told to read weights only."""
    try:
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{path} holds more than weights, which could run code when it is read; it is refused") from None
    except (RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is damaged, or of a PyTorch before 1.6 ({str(error).splitlines()[0]}); fetch it again") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise ValueError(f"{path} does not hold tensors by their names")
    return tensors


def read_tensors(folder):
    """(name, tensor) of all weights in a folder, from one file after another, so that only one is in memory."""
    paths = weight_files(folder)
    if not paths:
        raise FileNotFoundError(f"{folder} has no weights: neither model.safetensors nor pytorch_model.bin, nor an index of several")
    for path in paths:
        if path.suffix == ".bin":
            yield from read_pickle(path).items()
        else:
            for tensor in read_headers(folder, path.name).values():
                yield tensor.name, tensor.read()


def read_projector(path):
    """The projector in an mm_projector.bin or a non_lora_trainables.bin: {published name: tensor}.

    Raises ValueError for a file that holds anything else.
    """
    tensors = {}
    for name, tensor in read_pickle(path).items():
        new = published("model." + name[name.find("mm_projector.") :]) if "mm_projector." in name else None
        if new is None:
            raise ValueError(f"{path} holds {name}; expected a projector of two layers alone (mlp2x_gelu)")
        tensors[new] = tensor
    return tensors


def read_adapter(folder):
    """(PEFT's name, tensor) of their LoRA run: the changes of the linear layers, then the projector."""
    safe, pickled = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    if not safe.is_file() and not pickled.is_file():
        raise FileNotFoundError(f"{folder} has no {safe.name} and no {pickled.name} beside its non_lora_trainables.bin")
    for name, tensor in (load_file(safe) if safe.is_file() else read_pickle(pickled)).items():
        if not name.startswith(f"{PEFT}model.layers."):
            raise ValueError(f"{folder} holds {name}; expected changes of the language model's layers alone")
        yield name.replace(f"{PEFT}model.layers.", f"{PEFT}model.language_model.layers."), tensor
    for name, tensor in read_projector(folder / "non_lora_trainables.bin").items():
        yield f"{PEFT}model.{name}", tensor


def projector_names(projector):
    """What the authors call each tensor of a projector: {name in the module `projector`: theirs}.

    Raises ValueError for a projector that their code does not have.
    """
    names = [name for name, _ in projector.named_parameters()]
    vip, to_theirs = "projector_layernorm.weight" in names, {}
    for old, new in PUBLISHED:
        of_vip = "clip_layernorm" in old or "final_linear" in old
        if new is not None and new.startswith("multi_modal_projector.") and of_vip == vip:
            to_theirs[new.removeprefix("multi_modal_projector.")] = old
    theirs = {}
    for name in names:
        layer, _, leaf = name.rpartition(".")
        if f"{layer}." not in to_theirs:
            raise ValueError(f"{PROJECTOR} has no place for a projector's {name}; expected {', '.join(sorted(to_theirs))} alone")
        theirs[name] = to_theirs[f"{layer}."] + leaf
    return theirs


def save_projector(projector, path, tensors=None):
    """Write a projector as their stage 1 does: an mm_projector.bin, 40 MB for a 7B, which `read_projector` and their code read.

    tensors: {name in the module `projector`: tensor} to be written in place of its own. Put in place when whole.
    Raises ValueError for a projector that their code does not have, and OSError, as for a full disk.
    """
    tensors = tensors or {name: parameter.detach().cpu() for name, parameter in projector.named_parameters()}
    partial = path.with_name(f"{path.name}.partial")
    try:
        torch.save({theirs: tensors[name] for name, theirs in projector_names(projector).items()}, partial)
    except RuntimeError as reason:  # PyTorch's writer reports a full disk so
        raise OSError(f"{path} could not be written ({reason})") from None
    partial.replace(path)


def load_projector(projector, path):
    """Give a projector the weights of an mm_projector.bin.

    path: the file, or its folder. Raises FileNotFoundError, or ValueError if they are of a projector of another shape.
    """
    file = path / PROJECTOR if path.is_dir() else path
    found = {name.removeprefix("multi_modal_projector."): tensor for name, tensor in read_projector(file).items()}
    own = dict(projector.named_parameters())
    for name in [*own, *found]:
        there, here = (tuple(tensors[name].shape) if name in tensors else "absent" for tensors in (found, own))
        if there != here:
            raise ValueError(f"{file} is the projector of another model: {name} is {there} in it, and {here} in this one")
    for name, parameter in own.items():
        parameter.data = found[name].to(parameter.device, parameter.dtype, copy=True)


def fresh_projector(vision_width, text_width, seed=0):
    """A projector that has learnt nothing, as stage 1 begins with it: {published name: tensor}, in float32."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = {"linear_1": nn.Linear(vision_width, text_width), "linear_2": nn.Linear(text_width, text_width)}
    names = [(layer, leaf) for layer in layers for leaf in ("weight", "bias")]
    return {f"multi_modal_projector.{layer}.{leaf}": getattr(layers[layer], leaf).detach() for layer, leaf in names}


# The files beside the weights


def check_settings(folder, raw):
    """Raises ValueError for a setting that these models do not have."""
    check(f"{folder}: config.json", raw, SETTINGS)
    if raw.get("mm_vision_tower") is not None:
        check(f"{folder}: config.json", {"mm_projector_type": None} | raw, SETTINGS)  # left out, it is a single layer


def vision_settings(raw, clip):
    """The `vision_config` of the tower. clip: the folder of a CLIP, or None, if the name in `mm_vision_tower` tells its shape."""
    if clip is not None:
        found = read_json(clip / "config.json")
        found = found.get("vision_config", found)
        values = {name: found[name] for name in VIT_L_14_336 if name in found}
        return {"model_type": "clip_vision_model", **vars(vision_config(values))}
    tower = raw.get("mm_vision_tower")
    if tower not in TOWERS:
        raise ValueError(f"mm_vision_tower is {tower!r}; give a folder with this CLIP as --vision")
    return {"model_type": "clip_vision_model", **VIT_L_14_336}


def text_settings(raw):
    """The `text_config` of the language model, with two more rows, filled up to a multiple of 64: 32,000 become 32,064."""
    values = {name: raw[name] for name in TEXT if raw.get(name) is not None}
    mistral = "mistral" in f"{raw.get('model_type')} {raw.get('architectures')}".lower()
    values["model_type"] = "mistral" if mistral else "llama"
    if mistral and "sliding_window" in raw:
        values["sliding_window"] = raw["sliding_window"]  # null is a value here: no window
    text_config(values)
    values["vocab_size"] = -(-(values.get("vocab_size", 32000) + 2) // 64) * 64
    return values


def published_config(raw, text, clip, dtype):
    """config.json in the published layout. raw: the settings of their code, {} for a fresh projector; text: of the language model.

    Raises ValueError for what these models do not have.
    """
    vip = raw.get("mm_vision_tower") == VIP_TOWER
    words = text.get("vocab_size", 32000)
    config = {
        "architectures": ["VipLlavaForConditionalGeneration" if vip else "LlavaForConditionalGeneration"],
        "model_type": "vipllava" if vip else "llava",
        "image_token_index": words,
        "pad_token_id": words + 1,
        "bos_token_id": text.get("bos_token_id", 1),
        "eos_token_id": text.get("eos_token_id", 2),
        "tie_word_embeddings": text.get("tie_word_embeddings", False),
        "dtype": str(dtype).removeprefix("torch."),
        "projector_hidden_act": "gelu",
        "chat_style": "v1",  # what their code trains and measures with
        "image_aspect_ratio": raw.get("image_aspect_ratio") or "square",
        "vision_config": vision_settings(raw, clip),
        "text_config": text_settings(text),
    }
    config["image_seq_length"] = (config["vision_config"]["image_size"] // config["vision_config"]["patch_size"]) ** 2
    if vip:  # its mm_vision_select_layer says -2, and means nothing
        config |= {"vision_feature_layer": list(VIP_LAYERS), "projector_layernorm_eps": 1e-5}
    else:
        full = raw.get("mm_vision_select_feature") == "cls_patch"
        config |= {
            "vision_feature_layer": raw.get("mm_vision_select_layer", -2),
            "vision_feature_select_strategy": "full" if full else "default",
        }
        config["image_seq_length"] += full
    return config


# Writing


def with_more_rows(weight, rows):
    """(V, D) -> (rows, D): the new rows are the mean of the others. `<image>`'s is never read, and `<pad>`'s is masked out."""
    mean = weight.float().mean(0).to(weight.dtype)
    return torch.cat([weight, mean.expand(rows - len(weight), -1)])


def write_shards(tensors, out):
    """Write (name, tensor) pairs into safetensors files of two gigabytes in the folder `out`, with an index if there are several."""
    written, held, size = [], {}, 0
    for name, tensor in tensors:
        if held and size + tensor.nbytes > SHARD:
            written.append(_write_part(held, out, len(written)))
            held, size = {}, 0
        held[name] = tensor.contiguous()
        size += tensor.nbytes
    written.append(_write_part(held, out, len(written)))
    if len(written) == 1:
        written[0][0].rename(out / "model.safetensors")
        return
    weight_map = {}
    for n, (path, names, _) in enumerate(written, 1):
        file = f"model-{n:05}-of-{len(written):05}.safetensors"
        path.rename(out / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(size for *_, size in written)}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_part(tensors, out, number):
    """One file: its path, the names of its tensors, and their bytes."""
    path = out / f"part-{number}.safetensors"
    write_tensors(tensors, path)
    return path, list(tensors), sum(tensor.nbytes for tensor in tensors.values())
