"""Make tests/fixtures: three small random checkpoints, and every tensor that transformers computes from them.

pip install transformers==5.23.0
python -m tests.make_fixtures
"""

import random
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import GenerationConfig, LlavaConfig, LlavaForConditionalGeneration, VipLlavaConfig, VipLlavaForConditionalGeneration

FIXTURES = Path(__file__).parent / "fixtures"
VOCABULARY, IMAGE_ID, PAD_ID = 96, 94, 95
COMMON = dict(image_token_index=IMAGE_ID, pad_token_id=PAD_ID)
VISION = dict(
    model_type="clip_vision_model",
    hidden_size=12, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=8, patch_size=4,
)  # fmt: skip
TEXT = dict(
    vocab_size=VOCABULARY, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    rms_norm_eps=1e-5, max_position_embeddings=128, pad_token_id=PAD_ID,
)  # fmt: skip
CONFIGS = {
    "llava": LlavaConfig(vision_config=VISION, text_config=dict(TEXT, model_type="llama", num_attention_heads=3), **COMMON),
    # Grouped queries, a head_dim that is not hidden / heads, a window shorter than the prompts, the class token kept.
    "bakllava": LlavaConfig(
        vision_config=dict(VISION, layer_norm_eps=1e-3),
        text_config=dict(
            TEXT,
            model_type="mistral",
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=7,
            rope_parameters={"rope_theta": 1000.0, "rope_type": "default"},
        ),  # fmt: skip
        vision_feature_select_strategy="full",
        **COMMON,
    ),
    "vip": VipLlavaConfig(
        vision_config=dict(VISION, num_hidden_layers=12),
        text_config=dict(TEXT, model_type="llama", num_attention_heads=2),
        projector_layernorm_eps=1e-2,
        **COMMON,
    ),
}

ROWS = [(0, 6), (1, 7), (2, 8)]  # pictures and words of each row
SEEDS = {"llava": 29, "bakllava": 18, "vip": 9}  # chosen for clear decisions: see main


def make_model(config, seed):
    """A random model with attention written out; the noise moves norms away from 1 and biases from 0."""
    torch.manual_seed(seed)
    kind = VipLlavaForConditionalGeneration if config.model_type == "vipllava" else LlavaForConditionalGeneration
    model = kind(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.set_attn_implementation("eager")
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=PAD_ID)
    return model


def make_inputs(config, rows, seed):
    """A left-padded batch. rows: for each its numbers of pictures and of random ids that they stand between."""
    draw, vision = random.Random(seed), config.vision_config
    full = getattr(config, "vision_feature_select_strategy", "default") == "full"
    features = (vision.image_size // vision.patch_size) ** 2 + full
    batch = []
    for pictures, words in rows:
        row = [[1]] + [[draw.randrange(3, IMAGE_ID)] for _ in range(words)]
        for _ in range(pictures):
            row.insert(draw.randrange(1, len(row)), [IMAGE_ID] * features)
        batch.append(sum(row, []))
    T, N = max(map(len, batch)), sum(pictures for pictures, _ in rows)
    ids = torch.tensor([[PAD_ID] * (T - len(row)) + row for row in batch])
    labels = ids.masked_fill((ids == IMAGE_ID) | (ids == PAD_ID), -100)
    labels[:, : T - 4] = -100  # an answer of four tokens
    side = vision.image_size
    inputs = dict(input_ids=ids, attention_mask=(ids != PAD_ID).long(), labels=labels)
    if N:
        inputs["pixel_values"] = torch.randn(N, 3, side, side, generator=torch.Generator().manual_seed(seed))
    return inputs


def make_reference(model, rows, seed, steps=64, kept_steps=8):
    """The tensors of every stage, in the order of the computation, and what greedy decoding gives."""
    inputs = make_inputs(model.config, rows, seed)
    mask, pixels = inputs["attention_mask"], inputs.get("pixel_values")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(**inputs, position_ids=positions, output_hidden_states=True, output_attentions=True)
    greedy = dict(max_new_tokens=steps, do_sample=False, eos_token_id=None)
    prompt = {name: tensor for name, tensor in inputs.items() if name != "labels"}
    generated = model.generate(**prompt, **greedy, return_dict_in_generate=True, output_logits=True)
    # A prompt that starts shorter than any window here, and grows longer than it.
    text = inputs["input_ids"][:1, -3:]
    short = model.generate(text, attention_mask=torch.ones_like(text), **greedy, return_dict_in_generate=True, output_logits=True)
    reference = dict(
        hidden_states=torch.stack(out.hidden_states),  # (layers + 1, B, T, D)
        attentions=torch.stack(out.attentions),  # (layers, B, H, T, T)
        logits=out.logits,
        loss=out.loss,
        step_logits=torch.stack(generated.logits[:kept_steps], 1),  # (B, steps, vocabulary)
        tokens=generated.sequences[:, mask.shape[1] :],
        text_ids=text,
        text_tokens=short.sequences[:, text.shape[1] :],
    )
    if pixels is not None:
        tower = model.model.vision_tower(pixels, output_hidden_states=True)
        reference["vision"] = torch.stack(tower.hidden_states)  # (layers + 1, N, 1 + patches, V)
        D = model.config.text_config.hidden_size
        reference["image_features"] = out.image_hidden_states.reshape(len(pixels), -1, D)
    best = torch.cat(generated.logits + short.logits).topk(2).values
    margin = (best[..., 0] - best[..., 1]).min().item()
    return {name: t.clone(memory_format=torch.contiguous_format) for name, t in (inputs | reference).items()}, margin


def main():
    assert transformers.__version__ == "5.23.0", f"transformers is {transformers.__version__}; the fixtures need 5.23.0"
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for family, config in CONFIGS.items():
        seed = SEEDS[family]
        model = make_model(config, seed)
        reference, margin = make_reference(model, ROWS, seed)
        # A near tie between two tokens would be decided by rounding, differently on another machine.
        assert margin > 1e-3, f"{family}: the two likeliest tokens come within {margin:.1e}; take another seed"
        model.save_pretrained(FIXTURES / family)
        save_file(reference, FIXTURES / family / "reference.safetensors")
        print(f"{family}: {len(reference['tokens'].unique())} different tokens, margin {margin:.1e}")


if __name__ == "__main__":
    main()
