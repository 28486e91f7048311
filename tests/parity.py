"""Compare with transformers, live, over random configurations: python -m tests.parity [how many] [first seed]

Prints the relative error of every stage for each, and whether 64 greedy tokens agree. Exit status 1 if they do not or
an error is over 1e-5, and 2 without transformers.
"""

import random
import sys
import tempfile

import torch

from llava import Llava
from tests.compare import TOLERANCE, greedy_tokens, one_id_per_image, stage_errors

try:
    import transformers
except ImportError:
    print("tests.parity compares with transformers, which is not installed: pip install transformers", file=sys.stderr)
    sys.exit(2)

from tests.make_fixtures import IMAGE_ID, PAD_ID, VOCABULARY, make_model, make_reference

LAYERS = [-2, -1, 1, 3, -4, [-2], [0, 2], [-1, -3], [4, 1, -2]]  # a bare 0 fails in transformers 5.23


def random_config(draw, family):
    vision = dict(
        model_type="clip_vision_model",
        hidden_size=draw.choice([16, 24]),
        intermediate_size=draw.choice([24, 48]),
        num_hidden_layers=12 if family == "vip" else draw.choice([4, 5]),
        num_attention_heads=draw.choice([2, 4]),
        image_size=draw.choice([12, 14]),  # 14 is no multiple of the patch: the rest is ignored
        patch_size=4,
        layer_norm_eps=draw.choice([1e-5, 1e-3]),
    )
    text = dict(
        model_type="mistral" if family == "bakllava" else "llama",
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=draw.choice([64, 80]),
        num_hidden_layers=draw.choice([2, 3]),
        num_attention_heads=4,
        num_key_value_heads=draw.choice([1, 2, 4]),
        head_dim=draw.choice([8, 12, 32]),
        rms_norm_eps=draw.choice([1e-6, 1e-5]),
        rope_parameters={"rope_theta": draw.choice([1e3, 1e4, 5e5]), "rope_type": "default"},
        max_position_embeddings=256,
        pad_token_id=PAD_ID,
    )
    if family == "bakllava":
        text["sliding_window"] = draw.choice([None, 5, 16, 40])
    tied = draw.random() < 0.3
    common = dict(vision_config=vision, text_config=text, image_token_index=IMAGE_ID, tie_word_embeddings=tied)
    if family == "vip":
        layers = draw.choice([[-2, -5, -8, -11, 6], [-2, -5, -8, -11, 6], [-1, 3], [12, 0, -3]])
        return transformers.VipLlavaConfig(**common, vision_feature_layer=layers, projector_layernorm_eps=draw.choice([1e-5, 1e-2]))
    return transformers.LlavaConfig(
        **common,
        vision_feature_layer=draw.choice(LAYERS),
        vision_feature_select_strategy=draw.choice(["default", "full"]),
        multimodal_projector_bias=draw.random() < 0.7,
    )


def describe(family, config, rows):
    text, bias = config.text_config, getattr(config, "multimodal_projector_bias", True)
    window = getattr(text, "sliding_window", None)
    strategy = getattr(config, "vision_feature_select_strategy", "default")
    return (
        f"{family} layers {config.vision_feature_layer} {strategy} bias {bias} kv {text.num_key_value_heads}/4 "
        f"head {text.head_dim} theta {text.rope_parameters['rope_theta']:g} window {window} "
        f"tied {config.tie_word_embeddings} pictures {[pictures for pictures, _ in rows]}"
    )


@torch.no_grad()
def main(count=24, first=0):
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    worst, different = {}, 0
    for seed in range(first, first + count):
        draw, family = random.Random(seed), ("llava", "bakllava", "vip")[seed % 3]
        config = random_config(draw, family)
        rows = [(draw.randrange(3), draw.randrange(5, 12)) for _ in range(draw.choice([1, 3, 4]))]
        theirs = make_model(config, seed)
        reference, _ = make_reference(theirs, rows, seed)
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder)
            ours = Llava.from_pretrained(folder)
            errors = stage_errors(ours, reference)
            short = one_id_per_image(ours, reference)
            del short["labels"]
            same = all(torch.equal(greedy_tokens(ours, reference, **ids), reference["tokens"]) for ids in ({}, short))
        different += not same
        for stage, error in errors.items():
            worst[stage] = max(worst.get(stage, 0), error)
        print(f"{seed:3} {describe(family, config, rows)}")
        print(f"    {line(errors)}; 64 tokens {'agree' if same else 'DIFFER'}")
    good = not different and max(worst.values()) <= TOLERANCE
    print(f"\nworst of {count} with transformers {transformers.__version__}:\n    {line(worst)}")
    print(f"{'passed' if good else 'FAILED'}: tolerance {TOLERANCE}, tokens differ in {different}")
    return 0 if good else 1


def line(errors):
    return ", ".join(f"{stage} {error:.1e}" for stage, error in errors.items())


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
