"""The classic mistakes. Each is switched on, and the comparison with transformers must notice, at the stage named here.

So a reader learns what each detail is worth, and test_parity is known not to pass by accident.
"""

import pytest
import torch
import torch.nn.functional as F

import clip
import inputs
import llama
import llava
from llama import KVCache, RMSNorm
from llava import Llava
from tests.compare import TOLERANCE, load, one_id_per_image, relative, stage_errors


def first_wrong(errors):
    return next((stage for stage, error in errors.items() if not error <= TOLERANCE), None)


def exact_gelu_in_clip(monkeypatch, model):
    monkeypatch.setattr(clip, "quick_gelu", F.gelu)


def default_clip_layernorm_eps(monkeypatch, model):
    for block in model.vision_tower.layers:
        block.layer_norm1.eps = 1e-5


def last_clip_layer(monkeypatch, model):
    model.config.vision_layers = [-1]


def layers_counted_without_the_embeddings(monkeypatch, model):
    model.config.vision_layers = [k + 1 if k >= 0 else k for k in model.config.vision_layers]


def layers_sorted(monkeypatch, model):
    model.config.vision_layers = sorted(model.config.vision_layers)


def last_patch_dropped_for_cls(monkeypatch, model):
    def encode_images(self, pixel_values):
        states = self.vision_tower(pixel_values, self.config.vision_layers)
        return self.projector(torch.cat([state[:, :-1] for state in states], dim=-1))

    monkeypatch.setattr(Llava, "encode_images", encode_images)


def quick_gelu_in_the_projector(monkeypatch, model):
    monkeypatch.setattr(F, "gelu", clip.quick_gelu)


def tanh_gelu_in_the_projector(monkeypatch, model):
    gelu = F.gelu
    monkeypatch.setattr(F, "gelu", lambda x: gelu(x, approximate="tanh"))


def default_projector_layernorm_eps(monkeypatch, model):
    model.projector.projector_layernorm.eps = 1e-5


def no_projector_layernorm(monkeypatch, model):
    model.projector.projector_layernorm = torch.nn.Identity()


def features_in_the_wrong_order(monkeypatch, model):
    splice = llava.splice
    monkeypatch.setattr(llava, "splice", lambda embeds, is_image, features: splice(embeds, is_image, features.flip(0)))


def interleaved_rope(monkeypatch, model):
    def rotate(x, cos, sin):
        a, b = x[..., 0::2], x[..., 1::2]
        cos, sin = (t[..., t.shape[-1] // 2 :] for t in (cos, sin))
        return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)

    monkeypatch.setattr(llama, "rotate", rotate)


def default_rope_theta(monkeypatch, model):
    model.language_model.config.rope_theta = 10000.0


def default_rms_norm_eps(monkeypatch, model):
    for block in model.language_model.layers:
        block.input_layernorm.eps = 1e-6  # Llama's default; every LLaVA checkpoint has 1e-5


def key_value_heads_tiled(monkeypatch, model):
    # Query head h must read key/value head h // (H / K), not h % K.
    monkeypatch.setattr(torch.Tensor, "repeat_interleave", lambda x, n, dim: torch.cat([x] * n, dim))


def window_too_long(monkeypatch, model):
    model.language_model.config.sliding_window += 1


def window_too_short(monkeypatch, model):
    model.language_model.config.sliding_window -= 1


def no_window(monkeypatch, model):
    model.language_model.config.sliding_window = None


def padding_seen(monkeypatch, model):
    visible = llama.visible
    monkeypatch.setattr(llama, "visible", lambda real, slots, window: visible(torch.ones_like(real), slots, window))


def norm_left_out_at_the_end(monkeypatch, model):
    monkeypatch.setattr(model.language_model.norm, "forward", lambda x: x)


def labels_not_shifted(monkeypatch, model):
    forward = Llava.forward

    def unshifted(self, *args, labels=None, **options):
        labels = None if labels is None else labels.roll(1, 1)  # undoes the shift
        return forward(self, *args, labels=labels, **options)

    monkeypatch.setattr(Llava, "forward", unshifted)


def positions_that_ignore_padding(monkeypatch, model):
    # Only when decoding: RoPE sees differences of positions, so a row that is off by a constant all along is right.
    take = KVCache.take

    def slots_as_positions(cache, mask):
        slots, positions = take(cache, mask)
        return slots, slots.expand_as(positions) if mask.shape[1] == 1 else positions

    monkeypatch.setattr(KVCache, "take", slots_as_positions)


def padding_seen_when_decoding(monkeypatch, model):
    take = KVCache.take

    def forgetful(cache, mask):
        taken = take(cache, mask)
        cache.real[:, : cache.length] |= mask.shape[1] == 1
        return taken

    monkeypatch.setattr(KVCache, "take", forgetful)


@pytest.mark.parametrize(
    "family, mistake, stage",
    [
        ("llava", None, None),
        ("llava", exact_gelu_in_clip, "vision"),
        ("bakllava", default_clip_layernorm_eps, "vision"),
        ("llava", last_clip_layer, "features"),
        ("vip", layers_counted_without_the_embeddings, "features"),
        ("vip", layers_sorted, "features"),
        ("llava", last_patch_dropped_for_cls, "features"),
        ("llava", quick_gelu_in_the_projector, "features"),
        ("llava", tanh_gelu_in_the_projector, "features"),
        ("vip", default_projector_layernorm_eps, "features"),
        ("vip", no_projector_layernorm, "features"),
        ("llava", features_in_the_wrong_order, "embeddings"),
        ("llava", interleaved_rope, "attention"),
        ("bakllava", default_rope_theta, "attention"),
        ("llava", default_rms_norm_eps, "attention"),
        ("bakllava", key_value_heads_tiled, "attention"),
        ("bakllava", window_too_long, "attention"),
        ("bakllava", window_too_short, "attention"),
        ("bakllava", no_window, "attention"),
        ("llava", padding_seen, "attention"),
        ("llava", norm_left_out_at_the_end, "blocks"),
        ("llava", labels_not_shifted, "loss"),
        ("llava", positions_that_ignore_padding, "decoding"),
        ("llava", padding_seen_when_decoding, "decoding"),
    ],
)
def test_mistake_is_noticed(family, mistake, stage, monkeypatch):
    model, reference = load(family)
    if mistake is not None:
        mistake(monkeypatch, model)
    assert first_wrong(stage_errors(model, reference)) == stage


def test_padding_on_the_right_is_noticed(monkeypatch):
    model, reference = load("llava")
    short, padded = one_id_per_image(model, reference), inputs.left_padded
    assert first_wrong(stage_errors(model, reference, **short)) is None
    monkeypatch.setattr(inputs, "left_padded", lambda rows, padding: padded([row[::-1] for row in rows], padding).flip(1))
    assert first_wrong(stage_errors(model, reference, **short)) == "embeddings"


@pytest.mark.parametrize("family, keep", [("llava", True), ("bakllava", False)])
def test_cls_kept_or_dropped_wrongly_is_an_error(family, keep):
    model, reference = load(family)
    tokens = int((reference["input_ids"] == model.config.image_id).sum())
    model.config.keep_cls = keep  # one feature more, or one fewer, for each of the three pictures
    with pytest.raises(ValueError, match=f"{tokens} <image> tokens .* {tokens + 3 if keep else tokens - 3} features"):
        stage_errors(model, reference)


def test_rms_norm_without_its_float32_island():
    norm = RMSNorm(8, eps=1e-5)
    x = torch.linspace(-400, 400, 8)
    expected = norm(x)

    def naive(x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps) * norm.weight.to(x.dtype)

    assert relative(naive(x), expected) <= TOLERANCE  # in float32 there is nothing to see
    assert relative(norm.half()(x.half()), expected) < 1e-3
    assert naive(x.half()).eq(0).all()  # 400² is over float16's 65504: x / ∞


def test_rms_norm_without_its_float32_island_in_the_model(monkeypatch):
    # Published LLaVAs do have activations in the hundreds, at the first token.
    model, reference = load("llava", torch.float16)
    embeds = reference["hidden_states"][0] * 400
    before = model(inputs_embeds=embeds, attention_mask=reference["attention_mask"]).logits
    expected = load("llava")[0](inputs_embeds=embeds, attention_mask=reference["attention_mask"]).logits
    real = reference["attention_mask"].bool()

    def naive(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    monkeypatch.setattr(RMSNorm, "forward", naive)
    after = model(inputs_embeds=embeds, attention_mask=reference["attention_mask"]).logits
    assert relative(before[real], expected[real]) < 0.01 < relative(after[real], expected[real])
