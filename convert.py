"""A checkpoint in, another out.

    python convert.py llava-1.5-7b-hf llava-1.5-7b-int4 --quantize int4     # the language model in 4 bits
    python convert.py llava-1.5-7b-hf merged --adapter ADAPTER              # with an adapter of train.py --lora in its weights

The result is a folder like any other checkpoint's. It is put in place when it is whole.
"""

import argparse
import json
import sys
from pathlib import Path

from llava import Llava
from training.lora import fingerprint, load_adapter, merge, refuse_merged
from weights.checkpoint import checkpoint_folder, published_name, read_json, save_checkpoint, write_checkpoint
from weights.quantize import FILE, GROUPS, QuantizedLinear


def quantize(source, out, scheme):
    """Write the checkpoint `source` with its language model in 8 or 4 bits into the folder `out`."""
    folder = checkpoint_folder(source)
    model = Llava.from_pretrained(folder, quantize=scheme)
    tensors = {published_name(name): parameter for name, parameter in model.named_parameters()}
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            tensors |= {published_name(f"{name}.weight"): layer.packed(2), published_name(f"{name}.scales"): layer.scales.contiguous()}
    write_checkpoint(tensors, folder, out, FILE, {"quantization_config": {"quant_method": "llava.py", "scheme": scheme}})


def merge_adapter(source, out, adapter):
    """Write the checkpoint `source` with the adapter merged into its weights into the folder `out`, whose config.json says so."""
    folder = checkpoint_folder(source)
    model = Llava.from_pretrained(folder)
    load_adapter(model, adapter)
    refuse_merged(folder, adapter)
    merge(model)
    save_checkpoint(model, folder, out, model.dtype)
    config = read_json(out / "config.json")
    config["merged_adapters"] = [*config.get("merged_adapters", []), fingerprint(adapter)]
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def convert(source, out, scheme=None, adapter=None):
    """Write the checkpoint `source` to the new folder `out`: quantised, or with an adapter merged. Raises ValueError or OSError."""
    if (scheme is None) == (adapter is None):
        raise ValueError("give --quantize or --adapter, one of the two; to do both, merge the adapter first and quantise the result")
    if out.exists():
        raise ValueError(f"{out} exists; give a folder that does not")
    partial = out.with_name(f"{out.name}.partial")
    if adapter is None:
        quantize(source, partial, scheme)
    else:
        merge_adapter(source, partial, adapter)
    partial.rename(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="IN", help="checkpoint folder, or name on the Hugging Face hub")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to be made")
    parser.add_argument("--quantize", choices=GROUPS, help="int4-32 and int4-128: with groups of 32 and 128 in place of 64")
    parser.add_argument("--adapter", metavar="DIR", help="what train.py --lora made for this model, or PEFT")
    args = parser.parse_args()
    try:
        convert(args.source, args.out, args.quantize, args.adapter)
    except (ValueError, OSError) as error:
        sys.exit(f"convert.py: {error}")


if __name__ == "__main__":
    main()
