"""A checkpoint in, another out.

    python convert.py llava-v1.5-7b OUT --vision CLIP              # from the original authors' layout; CLIP: a clip-vit-large-patch14-336
    python convert.py vicuna-7b-v1.5 OUT --vision CLIP             # a language model and a CLIP, with a new projector: for stage 1
    python convert.py STAGE1 OUT --base MODEL                      # a projector alone (mm_projector.bin), put into a checkpoint
    python convert.py STAGE1 OUT --base vicuna-7b-v1.5 --vision CLIP   # or put between a language model and a CLIP
    python convert.py LORA ADAPTER                                 # their LoRA run, for --adapter
    python convert.py LORA OUT --base MODEL                        # or merged into MODEL, a converted base
    python convert.py llava-1.5-7b-hf OUT --quantize int4          # the language model in 4 bits
    python convert.py llava-1.5-7b-hf OUT --adapter ADAPTER        # with an adapter of train.py --lora in its weights

The result is a folder like any other checkpoint's. It is put in place when it is whole.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch

from llava import Llava
from training.lora import CONFIG, WEIGHTS, fingerprint, load_adapter, merge, refuse_merged
from weights import original
from weights.checkpoint import checkpoint_folder, published_name, read_json, save_checkpoint, write_checkpoint, write_tensors
from weights.config import LlavaConfig
from weights.quantize import FILE, GROUPS, QuantizedLinear
from weights.settings import write_settings


def quantize(source, out, scheme):
    """Write the checkpoint `source` with its language model in 8 or 4 bits into the folder `out`."""
    model = Llava.from_pretrained(source, quantize=scheme)
    tensors = {published_name(name): parameter for name, parameter in model.named_parameters()}
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            tensors |= {published_name(f"{name}.weight"): layer.packed(2), published_name(f"{name}.scales"): layer.scales.contiguous()}
    write_checkpoint(tensors, source, out, FILE, {"quantization_config": {"quant_method": "llava.py", "scheme": scheme}})


def merge_adapter(source, out, adapter):
    """Write the checkpoint `source` with the adapter merged into its weights into the folder `out`, whose config.json says so."""
    model = Llava.from_pretrained(source)
    load_adapter(model, adapter)
    refuse_merged(source, adapter)
    merge(model)
    merged = [*read_json(source / "config.json").get("merged_adapters", []), fingerprint(adapter)]
    save_checkpoint(model, source, out, model.dtype, fields={"merged_adapters": merged})


def convert_model(settings, language, projector, clip, out):
    """Write a whole model into the folder `out`, from parts that may be of different folders.

    settings: what the authors' config.json says, {} if there is none; language: the folder of the language model, with everything
    else if it has it; projector: {published name: tensor}, or None if it is there, too; clip: the folder of a CLIP, or None likewise.
    """
    original.check_settings(language, settings)
    words = next(tensor for name, tensor in original.read_tensors(language) if name == "model.embed_tokens.weight")
    config = original.published_config(settings, read_json(language / "config.json"), clip, words.dtype)
    out.mkdir(parents=True)
    write_settings(out, config, tokenizer_model(language))
    LlavaConfig.from_pretrained(out)  # raises for what these models cannot have, before the weights are written
    original.write_shards(model_tensors(config, words.dtype, language, projector, clip), out)
    Llava.from_pretrained(out)  # raises if a tensor is missing or of a wrong shape; the weights stay in their files


def model_tensors(config, dtype, language, projector, clip):
    """(published name, tensor) of all parts of a model, one after another, in one type."""
    rows, tower_is_here = config["text_config"]["vocab_size"], False
    for name, tensor in original.read_tensors(language):
        new = original.published(name)
        if new is None or (projector is not None and new.startswith("multi_modal_projector.")):
            continue
        tower_is_here |= new.startswith("vision_tower.")
        if new.endswith(("embed_tokens.weight", "lm_head.weight")):
            tensor = original.with_more_rows(tensor, rows)
        yield new, tensor.to(dtype)
    for name, tensor in (projector or {}).items():
        yield name, tensor.to(dtype)
    if tower_is_here:
        return
    if clip is None:
        raise ValueError(f"{language} has no vision tower in it; give the folder of an openai/clip-vit-large-patch14-336 as --vision")
    for name, tensor in original.read_tensors(clip):
        new = original.published(name)
        if new is not None:
            yield new, tensor.to(dtype)


def tokenizer_model(folder):
    if not (folder / "tokenizer.model").is_file():
        raise FileNotFoundError(f"{folder} has no tokenizer.model (the SentencePiece model of Llama's vocabulary)")
    return folder / "tokenizer.model"


def convert_projector(source, base, clip, out):
    """A projector alone, as their stage 1 saves it, put on a base: a checkpoint, or a language model and a CLIP."""
    if base is not None and original.kind_of(base) is None:
        put_projector(source, base, clip, out)
        return
    if base is None or clip is None:
        raise ValueError(
            f"{source} holds a projector alone; give the checkpoint that it was trained in as --base, "
            "or the language model as --base and the CLIP as --vision"
        )
    projector = original.read_projector(source / original.PROJECTOR)
    vip = any("projector_layernorm" in name for name in projector)
    settings = {"mm_projector_type": "mlp2x_gelu", "mm_vision_tower": original.VIP_TOWER if vip else original.TOWERS[0]}
    if (source / "config.json").is_file():
        settings = read_json(source / "config.json")
        original.check_settings(source, settings)
    convert_model(settings, base, projector, clip, out)


def put_projector(source, base, clip, out):
    """Write the checkpoint `base` with the projector of the folder `source` in place of its own into the folder `out`."""
    if clip is not None:
        raise ValueError(f"--vision is for a --base without a vision tower, and {base} has one")
    model = Llava.from_pretrained(base)
    if model.config.quantized:
        raise ValueError(f"{base} is quantised; give the checkpoint that it was made from, and quantise what comes out")
    original.load_projector(model.projector, source)
    save_checkpoint(model, base, out, model.dtype)


def convert_language_model(source, clip, out):
    """A language model and a CLIP with a projector that has learnt nothing: what stage 1 begins with."""
    if clip is None:
        raise ValueError(f"{source} is a language model alone; give the folder of an openai/clip-vit-large-patch14-336 as --vision")
    width = original.vision_settings({}, clip)["hidden_size"]
    projector = original.fresh_projector(width, read_json(source / "config.json").get("hidden_size", 4096))
    convert_model({}, source, projector, clip, out)


def convert_lora(source, out):
    """Their LoRA run, as an adapter: the changes of the linear layers, and the projector, which was trained whole."""
    settings = read_json(source / "config.json")
    original.check_settings(source, settings)
    out.mkdir(parents=True)
    tensors = {}
    for name, tensor in original.read_adapter(source):
        tensors[name] = tensor.contiguous()
    config = read_json(source / CONFIG)
    layers = sorted({name.removeprefix(original.PEFT).rpartition(".lora_")[0] for name in tensors if ".lora_" in name})
    config |= {"target_modules": layers, "modules_to_save": ["multi_modal_projector"], "task_type": None}
    (out / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    write_tensors(tensors, out / WEIGHTS)


def convert_original(kind, source, out, clip, base):
    """Write what is in the authors' layout into the folder `out`. kind: as original.kind_of says."""
    if kind == "projector":
        convert_projector(source, base, clip, out)
    elif kind == "lora" and base is None:
        convert_lora(source, out)
    elif kind == "lora":
        adapter = out.with_name(f"{out.name}.adapter")
        shutil.rmtree(adapter, ignore_errors=True)  # of a run that was killed
        convert_lora(source, adapter)
        merge_adapter(base, out, adapter)
        shutil.rmtree(adapter)
    elif base is not None:
        raise ValueError(f"--base is for a projector or a LoRA run, and {source} is a whole model")
    elif kind == "llama":
        convert_language_model(source, clip, out)
    else:
        convert_model(read_json(source / "config.json"), source, None, clip, out)


def convert(source, out, scheme=None, adapter=None, vision=None, base=None):
    """Write the checkpoint `source` to the new folder `out`: from the authors' layout, quantised, or with an adapter merged.

    Raises ValueError or OSError.
    """
    if out.exists():
        raise ValueError(f"{out} exists; give a folder that does not")
    source = checkpoint_folder(source, "*.bin")
    clip = None if vision is None else checkpoint_folder(vision, "*.bin")
    base = None if base is None else checkpoint_folder(base, "*.bin")
    kind, changes = original.kind_of(source), [change for change in (scheme, adapter) if change is not None]
    if kind is not None and changes:
        raise ValueError(f"{source} is in the original authors' layout; first convert it, then what comes out")
    if kind is None and (clip is not None or base is not None):
        raise ValueError(f"--vision and --base are for the original authors' layout, and {source} is not in it")
    if kind is None and len(changes) != 1:
        raise ValueError("give --quantize or --adapter, one of the two; to do both, merge the adapter first and quantise the result")
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    if kind is not None:
        convert_original(kind, source, partial, clip, base)
    elif adapter is None:
        quantize(source, partial, scheme)
    else:
        merge_adapter(source, partial, adapter)
    partial.rename(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="IN", help="checkpoint folder, or name on the Hugging Face hub")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to be made")
    parser.add_argument("--vision", metavar="DIR", help="the CLIP, where IN has no vision tower in it: a folder or a name on the hub")
    parser.add_argument("--base", metavar="DIR", help="what a projector or a LoRA run was trained on: a folder or a name on the hub")
    parser.add_argument("--quantize", choices=GROUPS, help="int4-32 and int4-128: with groups of 32 and 128 in place of 64")
    parser.add_argument("--adapter", metavar="DIR", help="what train.py --lora made for this model, or PEFT")
    args = parser.parse_args()
    try:
        with torch.no_grad():
            convert(args.source, args.out, args.quantize, args.adapter, args.vision, args.base)
    except (ValueError, OSError) as error:
        sys.exit(f"convert.py: {error}")


if __name__ == "__main__":
    main()
