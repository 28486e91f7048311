"""The same numbers as transformers, stage by stage, from tensors that tests/make_fixtures.py recorded."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from llama import KVCache
from llava import Llava
from tests.compare import FAMILIES, FIXTURES, TOLERANCE, greedy_tokens, load, one_id_per_image, relative, stage_errors
from weights.config import VIP_LAYERS, LlavaConfig, text_config, vision_config


def within(errors, tolerance=TOLERANCE):
    large = {stage: error for stage, error in errors.items() if not error <= tolerance}
    assert not large, f"over {tolerance}: {large}"


def prompt(reference):
    return {name: reference[name] for name in ("input_ids", "pixel_values", "attention_mask")}


def row_alone(model, reference, row):
    """One row of the batch without its padding, and its own pictures."""
    ids, mask = reference["input_ids"], reference["attention_mask"].bool()
    images = (ids == model.config.image_id).sum(1) // model.config.features_per_image
    first = int(images[:row].sum())
    pixels = reference["pixel_values"][first : first + int(images[row])]
    return ids[row : row + 1, mask[row]], pixels if len(pixels) else None


# The whole model


@pytest.mark.parametrize("family", FAMILIES)
def test_every_stage(family):
    within(stage_errors(*load(family)))


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens(family):
    model, reference = load(family)
    assert torch.equal(greedy_tokens(model, reference), reference["tokens"])


@pytest.mark.parametrize("family", FAMILIES)
def test_one_image_id_for_each_picture(family):
    model, reference = load(family)
    short = one_id_per_image(model, reference)
    assert (short["input_ids"] == model.config.image_id).sum() == len(reference["pixel_values"])
    within(stage_errors(model, reference, **short))
    del short["labels"]
    assert torch.equal(greedy_tokens(model, reference, **short), reference["tokens"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("row", [0, 1, 2])
def test_padded_row_equals_the_row_alone(family, row):
    model, reference = load(family)
    ids, pixels = row_alone(model, reference, row)
    logits = reference["logits"][row : row + 1, -ids.shape[1] :]
    assert (pixels is None) == (row == 0)  # row 0 is text alone
    for mask in (None, torch.ones_like(ids)):
        assert relative(model(ids, pixels, mask).logits, logits) <= TOLERANCE
    alone = torch.cat(list(model.generate(ids, pixels, max_new_tokens=64, eos_ids=())))
    assert torch.equal(alone, reference["tokens"][row])


def test_expansion_leaves_no_column_of_padding_alone():
    model, reference = load("llava")
    image, P = model.config.image_id, model.config.features_per_image
    ids, mask = torch.tensor([[0, 0, 1, image, 7], [1, 5, 6, 7, 8]]), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    pixels, labels = reference["pixel_values"][:1], torch.where(mask.bool(), 9, -100)
    out = model(ids, pixels, mask, labels=labels)
    assert out.logits.shape[1] == 2 + P  # as long as the row with the picture; its own padding would have made it 4 + P
    assert relative(out.logits[:1], model(ids[:1, 2:], pixels).logits) <= TOLERANCE
    assert relative(out.logits[1:, -5:], model(ids[1:]).logits) <= TOLERANCE
    labels = torch.full((2, 2 + P), 9).masked_fill(torch.arange(2 + P) < torch.tensor([[0], [P - 3]]), -100)
    assert relative(out.loss, F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())) <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_in_place_of_ids(family):
    model, reference = load(family)
    real = reference["attention_mask"].bool()
    embeds = reference["hidden_states"][0]
    logits = model(inputs_embeds=embeds, attention_mask=reference["attention_mask"]).logits
    assert relative(logits[real], reference["logits"][real]) <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_given_positions(family):
    model, reference = load(family)
    real, expected = reference["attention_mask"].bool(), reference["logits"]
    positions = (reference["attention_mask"].cumsum(1) - 1).clamp(min=0)
    logits = lambda positions: model(**prompt(reference), positions=positions).logits[real]
    assert relative(logits(positions), expected[real]) <= TOLERANCE
    assert relative(logits(positions + 9), expected[real]) <= TOLERANCE  # RoPE sees only differences
    assert relative(logits(positions * 2), expected[real]) > 1e-2


# The cache


@pytest.mark.parametrize("family", FAMILIES)
def test_cache_changes_nothing_at_any_step(family):
    model, reference = load(family)
    inputs = prompt(reference)
    embeds = model(**inputs, output_hidden_states=True).hidden_states[0]
    mask, steps = inputs["attention_mask"], 24
    cache = KVCache(model.config.text, len(mask), mask.shape[1] + steps)
    cached = model(**inputs, cache=cache).logits[:, -1]
    for step in range(steps):
        whole = model(inputs_embeds=embeds, attention_mask=mask).logits[:, -1]
        assert relative(cached, whole) <= TOLERANCE, step
        new = model.language_model.embed(reference["tokens"][:, step : step + 1])
        embeds, mask = torch.cat([embeds, new], 1), torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        cached = model(inputs_embeds=new, cache=cache).logits[:, -1]


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_in_two_pieces(family):
    model, reference = load(family)
    embeds, mask = reference["hidden_states"][0], reference["attention_mask"]
    real, (B, T) = mask.bool(), mask.shape
    for cut in range(1, T):  # the early cuts leave a first piece that is all padding for some rows
        cache = KVCache(model.config.text, B, T)
        pieces = (slice(0, cut), slice(cut, T))
        logits = [model(inputs_embeds=embeds[:, p], attention_mask=mask[:, p], cache=cache).logits for p in pieces]
        assert relative(torch.cat(logits, 1)[real], reference["logits"][real]) <= TOLERANCE, cut


@pytest.mark.parametrize("family", FAMILIES)
def test_second_picture_in_the_second_piece(family):
    model, reference = load(family)
    ids, pixels = row_alone(model, reference, 2)
    first = (ids == model.config.image_id).nonzero()[0, 1]
    cut = int(first) + model.config.features_per_image
    cache = KVCache(model.config.text, 1, ids.shape[1])
    pieces = (ids[:, :cut], pixels[:1]), (ids[:, cut:], pixels[1:])
    logits = [model(*piece, cache=cache).logits for piece in pieces]
    assert relative(torch.cat(logits, 1)[0], reference["logits"][2]) <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_from_inside_the_window_past_it(family):
    model, reference = load(family)
    tokens = torch.cat(list(model.generate(reference["text_ids"], max_new_tokens=64, eos_ids=())))
    assert torch.equal(tokens, reference["text_tokens"][0])


# Other types


# Measured on a CPU: at most 0.042 and 0.0046, in any family and stage.
@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 0.08), (torch.float16, 0.01)])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision(family, dtype, bound):
    model, reference = load(family, dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model(**prompt(reference)).logits.dtype == dtype
    within(stage_errors(model, reference), bound)
    assert greedy_tokens(model, reference).shape == reference["tokens"].shape


# The files


def rewritten(family, folder, rename=lambda name: name, change=lambda config: None):
    """A copy of a fixture with its tensors renamed and its config changed."""
    config = json.loads((FIXTURES / family / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(FIXTURES / family / "model.safetensors")
    save_file({rename(name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def published(name):
    return name.replace("vision_tower.", "vision_tower.vision_model.")


def new_layout(name):
    if name == "language_model.lm_head.weight":
        return "lm_head.weight"
    return "model." + name.replace("language_model.model.", "language_model.")


def layout_of_4_52(name):
    return new_layout(published(name))


@pytest.mark.parametrize("rename", [published, new_layout, layout_of_4_52])
@pytest.mark.parametrize("family", FAMILIES)
def test_weight_names(family, rename, tmp_path):
    original = dict(load(family)[0].named_parameters())  # the fixture has the fourth layout, save_pretrained's
    renamed = dict(Llava.from_pretrained(rewritten(family, tmp_path, rename)).named_parameters())
    assert original.keys() == renamed.keys()
    assert all(torch.equal(original[name], renamed[name]) for name in original)


def test_shards(tmp_path):
    model, reference = load("llava")
    tensors = load_file(FIXTURES / "llava" / "model.safetensors")
    rewritten("llava", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    weight_map = {name: f"model-{i % 3 + 1:05}-of-00003.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    within(stage_errors(Llava.from_pretrained(tmp_path), reference))


@pytest.mark.parametrize("place", ["top", "text_config"])
def test_tied_head(place, tmp_path):
    def tie(config):
        (config if place == "top" else config["text_config"])["tie_word_embeddings"] = True

    rewritten("llava", tmp_path, change=tie)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["language_model.lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    model, reference = Llava.from_pretrained(tmp_path), load("llava")[1]
    real = reference["attention_mask"].bool()
    expected = reference["hidden_states"][-1] @ tensors["language_model.model.embed_tokens.weight"].T
    assert relative(model(**prompt(reference)).logits[real], expected[real]) <= TOLERANCE
    assert model.language_model.lm_head.weight is model.language_model.embed_tokens.weight


# config.json


@pytest.mark.parametrize(
    "fields",
    [
        {"vision_feature_layers": VIP_LAYERS},
        {"vision_feature_layers": VIP_LAYERS, "vision_feature_layer": -2},  # the plural wins
        {"vision_feature_layer": -2},  # stale, as published with ViP-7B: the projector is five layers wide
        {},
    ],
)
def test_spellings_of_the_vip_layers(fields, tmp_path):
    def change(config):
        del config["vision_feature_layer"]
        config.update(fields)

    model = Llava.from_pretrained(rewritten("vip", tmp_path, change=change))
    assert model.config.vision_layers == [-2, -5, -8, -11, 6]
    within(stage_errors(model, load("vip")[1]))


# The defaults of Hugging Face's config classes, which a published config.json leaves out.
LLAMA = dict(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=32, head_dim=128, max_position_embeddings=2048, rms_norm_eps=1e-6, rope_theta=10000.0,
    sliding_window=None, tie_word_embeddings=False,
)  # fmt: skip
MISTRAL = dict(intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=131072, sliding_window=4096)
CLIP = dict(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, num_channels=3,
    image_size=224, patch_size=32, layer_norm_eps=1e-5, hidden_act="quick_gelu",
)  # fmt: skip
VIT_L = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
VIT_L = CLIP | VIT_L | dict(image_size=336, patch_size=14)
TEXT_7B = dict(max_position_embeddings=4096, rms_norm_eps=1e-5, vocab_size=32064)  # all that the 7B's text_config says


@pytest.mark.parametrize(
    "raw, expected",
    [
        ({}, {}),
        ({"model_type": "llama"} | TEXT_7B, TEXT_7B),
        ({"num_attention_heads": 16}, {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256}),
        ({"num_key_value_heads": None, "head_dim": None}, {}),
        ({"head_dim": 64, "num_key_value_heads": 4}, {"head_dim": 64, "num_key_value_heads": 4}),
        ({"sliding_window": 7}, {}),  # Llama has no window
        ({"model_type": "mistral"}, MISTRAL),
        ({"model_type": "mistral", "sliding_window": None}, MISTRAL | {"sliding_window": None}),
        ({"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}, {"rope_theta": 5.0}),
        ({"rope_theta": 5.0}, {"rope_theta": 5.0}),
    ],
)
def test_text_config_left_out_fields(raw, expected):
    assert vars(text_config(raw)) == LLAMA | expected


def config_of(folder, raw, generation=None):
    (folder / "config.json").write_text(json.dumps(raw))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return LlavaConfig.from_pretrained(folder)


def test_vision_config_left_out_fields(tmp_path):
    assert vars(config_of(tmp_path, {"model_type": "llava", "vision_config": {}}).vision) == CLIP
    sparse = {"model_type": "clip_vision_model", "hidden_size": 1152, "projection_dim": 768}
    assert vars(vision_config(sparse)) == CLIP | {"hidden_size": 1152}


def test_published_config_of_the_7b(tmp_path):
    config = config_of(
        tmp_path,
        {"model_type": "llava", "image_token_index": 32000, "pad_token_id": 32001, "text_config": TEXT_7B},
        {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 32001},
    )
    assert (vars(config.vision), vars(config.text)) == (VIT_L, LLAMA | TEXT_7B)
    assert (config.style, config.vision_layers, config.keep_cls) == ("llava", [-2], False)
    assert (config.projector_layernorm_eps, config.projector_bias, config.features_per_image) == (None, True, 576)
    assert (config.image_id, config.pad_id, config.eos_ids) == (32000, 32001, (2,))


def test_config_that_says_nothing(tmp_path):
    llava, vip = (config_of(tmp_path, {"model_type": kind}) for kind in ("llava", "vipllava"))
    assert vars(llava.vision) == vars(vip.vision) == VIT_L
    assert vars(llava.text) == vars(vip.text) == LLAMA
    assert (llava.style, llava.vision_layers, llava.projector_layernorm_eps) == ("llava", [-2], None)
    assert (vip.style, vip.vision_layers, vip.projector_layernorm_eps) == ("vip", [-2, -5, -8, -11, 6], 1e-5)
    assert (llava.image_id, llava.pad_id, llava.eos_ids) == (32000, 2, (2,))


def test_which_spelling_wins(tmp_path):
    raw = {"model_type": "vipllava", "vision_feature_layers": [1, 2], "vision_feature_layer": [3, 4]}
    assert config_of(tmp_path, raw).vision_layers == [1, 2]
    raw["text_config"] = {"eos_token_id": 3, "pad_token_id": 0}
    assert (config_of(tmp_path, raw).eos_ids, config_of(tmp_path, raw).pad_id) == ((3,), 0)
    raw["eos_token_id"] = 4
    assert config_of(tmp_path, raw).eos_ids == (4,)
    assert config_of(tmp_path, raw, {"eos_token_id": 5}).eos_ids == (5,)


@pytest.mark.parametrize("model_type, style", [("llama", "llava"), ("mistral", "bakllava")])
def test_strategy_full_and_style(model_type, style, tmp_path):
    raw = {"model_type": "llava", "text_config": {"model_type": model_type}}
    raw |= {"vision_feature_select_strategy": "full", "vision_feature_layer": [3, -1]}
    config = config_of(tmp_path, raw, {"eos_token_id": [2, 5]})
    assert (config.style, config.keep_cls, config.features_per_image) == (style, True, 577)
    assert (config.vision_layers, config.eos_ids, config.pad_id) == ([3, -1], (2, 5), 2)
