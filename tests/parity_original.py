"""Converted checkpoints in transformers: python -m tests.parity_original

Random tiny models in the original authors' layout are converted, loaded by transformers and by us, and their logits and tokens
compared; a LoRA run, too, if peft is there. Exit status 1 if one is over 1e-5, and 2 without transformers.
"""

import sys
import tempfile
from pathlib import Path

import torch

from convert import convert
from llava import Llava
from tests import test_convert as tiny
from tests.compare import TOLERANCE, relative
from tokenizer import Tokenizer

try:
    import transformers
except ImportError:
    print("tests.parity_original compares with transformers, which is not installed: pip install transformers", file=sys.stderr)
    sys.exit(2)

TEXT = "USER: <image>\nWhat is shown, é, in this image? ASSISTANT: Two.</s>USER: Why?"


def clip_folder(folder, vision):
    folder.mkdir()
    tiny.save_file(vision, folder / "model.safetensors")
    (folder / "config.json").write_text(tiny.json.dumps({"model_type": "clip", "vision_config": tiny.VISION}))
    return folder


@torch.no_grad()
def difference(folder, vip=False):
    """The relative error of the logits of a converted checkpoint, ours beside those of transformers; and that its tokenizer agrees."""
    family = transformers.VipLlavaForConditionalGeneration if vip else transformers.LlavaForConditionalGeneration
    theirs, loading = family.from_pretrained(folder, output_loading_info=True)
    assert not any(loading[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading
    ours, features = Llava.from_pretrained(folder), 4
    torch.manual_seed(1)
    ids, pixels = torch.tensor([[1] + [tiny.WORDS] * features + [5, 7, 300]]), torch.randn(1, 3, 28, 28)
    theirs_read = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs_read(TEXT)["input_ids"] == Tokenizer.from_pretrained(folder).encode(TEXT), "the tokenizers differ"
    transformers.AutoImageProcessor.from_pretrained(folder)
    return relative(ours(ids, pixels).logits, theirs(input_ids=ids, pixel_values=pixels).logits)


def main():
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    worst = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        words, eyes = tiny.language(), tiny.tower()
        clip = clip_folder(folder / "clip", eyes)
        for vip in (False, True):
            for form in ("safetensors", "bin", "sharded"):
                source, out = folder / f"{form}-{vip}", folder / f"{form}-{vip}-out"
                tiny.put(source, words | tiny.projector(vip)[0], (tiny.VIP if vip else tiny.LLAVA) | tiny.TEXT, form)
                convert(source, out, vision=clip)
                worst = max(worst, error := difference(out, vip))
                print(f"{'ViP-LLaVA' if vip else 'LLaVA'} {form}: {error:.1e}")
        for window in (3, None):
            source, out = folder / f"bakllava-{window}", folder / f"bakllava-{window}-out"
            tensors, settings = tiny.language(heads=2) | tiny.projector()[0], tiny.TEXT | tiny.BAKLLAVA | {"sliding_window": window}
            convert(tiny.put(source, tensors, settings, "bin"), out, vision=clip)
            worst = max(worst, error := difference(out))
            print(f"BakLLaVA, window {window}: {error:.1e}")
        vicuna = tiny.put(folder / "vicuna", words, tiny.TEXT | {"model_type": "llama"}, "bin")
        convert(vicuna, folder / "base", vision=clip)
        tiny.lora_run(folder / "lora", "bin")
        convert(folder / "lora", folder / "merged", base=folder / "base")
        worst = max(worst, error := difference(folder / "merged"))
        print(f"LoRA, merged: {error:.1e}")
    print(f"{'passed' if worst <= TOLERANCE else 'FAILED'}: tolerance {TOLERANCE}, with transformers {transformers.__version__}")
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
