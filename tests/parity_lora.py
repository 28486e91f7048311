"""Compare adapters with PEFT, live, over random configurations: python -m tests.parity_lora [how many] [first seed]

Three ways for each: an adapter of ours that PEFT puts on transformers' model, one of PEFT's that we put on ours, and ours
merged into a checkpoint that transformers reads. Prints the relative error of the logits. Exit status 1 if one is over
1e-5 or an adapter changes nothing, and 2 without transformers and peft.
"""

import random
import sys
import tempfile
import warnings
from pathlib import Path

import torch

from convert import convert
from llava import Llava
from tests.compare import TOLERANCE, relative
from training.lora import LAYERS, add_adapter, load_adapter, save_adapter

try:
    import peft
    import transformers
except ImportError as error:
    print(f"tests.parity_lora compares with transformers and peft; pip install {error.name}", file=sys.stderr)
    sys.exit(2)

from tests.make_fixtures import make_inputs, make_model
from tests.parity import line, random_config

BLOCKS = r".*language_model.*"


def logits(model, inputs):
    return model(**inputs).logits[inputs["attention_mask"].bool()]


def learn(model, what):
    """Random values, as after training, where a name holds one of the words."""
    for name, parameter in model.named_parameters():
        if any(word in name for word in what):
            parameter.data = torch.randn_like(parameter) * 0.05


def their_settings(draw):
    """Some of the ways in which PEFT is told what to train."""
    layers = "|".join(draw.sample(LAYERS, 3))
    patterns = [r"layers\.0\.self_attn\.q_proj", "v_proj", r"^model\..*up_proj", r".*language_model.*\.1\..*", "proj", "rope"]
    some = lambda: sorted(draw.sample(patterns, draw.randint(0, 3)))  # as PEFT writes them, which loses any other order
    factors = dict(
        use_rslora=draw.random() < 0.5,
        rank_pattern={pattern: draw.choice([1, 3, 5]) for pattern in some()},
        alpha_pattern={pattern: draw.choice([2, 5, 0.5]) for pattern in some()},
    )
    return factors | draw.choice(
        [
            dict(target_modules="all-linear"),  # the vision tower's and the projector's too
            dict(target_modules=["q_proj", "v_proj"], modules_to_save=["multi_modal_projector"]),
            dict(target_modules=rf"{BLOCKS}\.({layers})", modules_to_save=["multi_modal_projector"]),
            dict(target_modules=rf"{BLOCKS}_proj"),
        ]
    )


@torch.no_grad()
def errors_of(seed, folder):
    """{way: relative error} of one random configuration, and a line that describes it."""
    draw, family = random.Random(seed), ("llava", "bakllava", "vip")[seed % 3]
    config = random_config(draw, family)
    rank, alpha = draw.choice([1, 2, 8]), draw.choice([1, 4, 16])
    inputs = make_inputs(config, [(1, 6), (2, 9)], seed)
    del inputs["labels"]
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    make_model(config, seed).save_pretrained(folder / "base")
    theirs = lambda name="base": make_model(config, seed).from_pretrained(folder / name, attn_implementation="eager").eval()
    our_inputs = {name: tensor for name, tensor in inputs.items() if name != "position_ids"}
    base, errors = logits(theirs(), inputs), {}

    ours = Llava.from_pretrained(folder / "base")
    layers = LAYERS if draw.random() < 0.5 else draw.sample(LAYERS, 2)
    add_adapter(ours, rank, alpha, layers=layers)
    learn(ours, ("lora_", "projector."))
    save_adapter(ours, folder / "ours", folder / "base", torch.float32)
    with_ours = logits(ours, our_inputs)
    errors["ours in peft"] = relative(with_ours, logits(peft.PeftModel.from_pretrained(theirs(), folder / "ours"), inputs))
    convert(folder / "base", folder / "merged", adapter=folder / "ours")
    errors["merged in transformers"] = relative(with_ours, logits(theirs("merged"), inputs))

    settings = their_settings(draw)
    model = peft.get_peft_model(theirs(), peft.LoraConfig(r=rank, lora_alpha=alpha, **settings)).eval()
    learn(model, ("lora_", "modules_to_save"))
    model.save_pretrained(folder / "theirs")
    ours = Llava.from_pretrained(folder / "base")
    load_adapter(ours, folder / "theirs")
    with_theirs = logits(model, inputs)
    errors["peft's in ours"] = relative(logits(ours, our_inputs), with_theirs)

    changes = min(relative(with_ours, base), relative(with_theirs, base))
    return errors, changes, f"{family} rank {rank} alpha {alpha} ours {' '.join(layers)}; peft's {settings}"


def main(count=12, first=0):
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")  # of transformers, about its own names
    worst, least = {}, torch.inf
    for seed in range(first, first + count):
        with tempfile.TemporaryDirectory() as folder:
            errors, changes, description = errors_of(seed, Path(folder))
        worst = {way: max(worst.get(way, 0), error) for way, error in errors.items()}
        least = min(least, changes)
        print(f"{seed:3} {description}\n    {line(errors)}; the adapters change the logits by {changes:.1e}")
    good = max(worst.values()) <= TOLERANCE and least > 1e-2
    print(f"\nworst of {count} with peft {peft.__version__} and transformers {transformers.__version__}:\n    {line(worst)}")
    print(f"{'passed' if good else 'FAILED'}: tolerance {TOLERANCE}, the adapters change the logits by {least:.1e} or more")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
