"""Adapters: they begin as nothing, leave the base as it is, go to disk and back, and merge once."""

import json
import re
import sys
from collections import Counter
from pathlib import Path
from shutil import copytree

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file

from chat import Chat
from convert import convert
from convert import main as convert_command
from images import ImageProcessor, open_image
from llava import Llava
from tests.compare import FAMILIES, FIXTURES
from tests.test_quantize import run as quantise
from tests.test_sample import sample
from tests.test_train import TINY, encoded, killed_run, run
from tiny.mirror import held_out_questions as mirror_questions
from tiny.mirror import mirrored
from tiny.mirror import write as write_mirror
from tiny.world import QUESTIONS, Thing, describe, write
from tokenizer import Tokenizer
from training import state
from training.data import collate, encode_conversation
from training.lora import (
    CONFIG,
    LAYERS,
    WEIGHTS,
    LoRALinear,
    adapted,
    add_adapter,
    fingerprint,
    load_adapter,
    merge,
    rank_and_alpha,
    refuse_merged,
    save_adapter,
)
from weights.quantize import QuantizedLinear

BASE = FIXTURES / "llava"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write(folder, 12, seed=5)
    return folder


def model_of(family="llava"):
    return Llava.from_pretrained(FIXTURES / family, dtype=torch.float32)


def learn(model, seed=0):
    """As if the adapter and the projector had been trained."""
    random = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_" in name or name.startswith("projector."):
            parameter.data = torch.randn(parameter.shape, generator=random) * 0.2


@torch.no_grad()
def logits(model):
    config = model.config
    ids = torch.tensor([[1, config.image_id, 5, 6, 7], [1, 8, 9, config.image_id, 10]])
    side = config.vision.image_size
    return model(ids, torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))).logits


@pytest.fixture
def adapter(tmp_path):
    """The folder of an adapter for the fixture's LLaVA, and the logits of the model with it."""
    model = model_of()
    add_adapter(model, rank=2, alpha=6)
    learn(model)
    save_adapter(model, tmp_path / "adapter", BASE, torch.float32)
    return tmp_path / "adapter", logits(model)


def test_the_change_is_the_papers_formula():
    base, x = nn.Linear(5, 3), torch.randn(2, 4, 5)
    layer = LoRALinear(base, rank=2, alpha=6)
    nn.init.normal_(layer.lora_B.weight)
    W, b, A, B = base.weight, base.bias, layer.lora_A.weight, layer.lora_B.weight
    torch.testing.assert_close(layer(x), x @ (W + 6 / 2 * B @ A).T + b)


def test_dropout_is_for_training_and_leaves_the_base_what_it_sees():
    layer, x = LoRALinear(nn.Linear(50, 3), rank=2, alpha=2, dropout=0.5), torch.randn(4, 50)
    torch.testing.assert_close(layer.train()(x), layer.base(x))  # B is zero: only the base is heard
    nn.init.normal_(layer.lora_B.weight)
    assert not torch.equal(layer.train()(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_that_has_learnt_nothing_changes_nothing(family):
    model = model_of(family)
    before = logits(model)
    add_adapter(model, rank=4, alpha=8)
    assert len(adapted(model)) == len(LAYERS) * model.config.text.num_hidden_layers
    assert torch.equal(logits(model), before)


def test_only_the_layers_that_are_named():
    model = model_of()
    add_adapter(model, rank=4, alpha=8, layers=("q_proj", "v_proj"))
    assert {name.rpartition(".")[2] for name in adapted(model)} == {"q_proj", "v_proj"}
    assert all(name.startswith("language_model.") for name in adapted(model))  # the vision tower has a q_proj too


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_equals_unmerged(family):
    model = model_of(family)
    before = logits(model)
    add_adapter(model, rank=2, alpha=6)
    learn(model)
    unmerged = logits(model)
    assert (unmerged - before).abs().max() > 0.1
    merge(model)
    assert not adapted(model)
    assert (logits(model) - unmerged).abs().max() / unmerged.abs().max() < 1e-5
    with pytest.raises(ValueError, match="no adapter to merge"):
        merge(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_goes_to_disk_and_back(family, tmp_path):
    model = model_of(family)
    add_adapter(model, rank=2, alpha=6)
    learn(model)
    save_adapter(model, tmp_path, FIXTURES / family, torch.float32)
    again = model_of(family)
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert not any(parameter.requires_grad for parameter in again.parameters())


def test_it_is_written_in_pefts_names(adapter):
    folder, _ = adapter
    config, names = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS).keys()
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["modules_to_save"]) == ("LORA", 2, 6, ["multi_modal_projector"])
    layers = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in names if ".lora_" in name}
    assert layers == {*config["target_modules"]} and "model.language_model.layers.1.mlp.up_proj" in layers
    assert "base_model.model.model.multi_modal_projector.linear_1.bias" in names


def test_quantised_weights_take_an_adapter_but_no_merging(adapter):
    model = model_of()
    for block in model.language_model.layers:
        block.mlp.up_proj = QuantizedLinear.of(block.mlp.up_proj.weight, "int8")
    before = logits(model)
    load_adapter(model, adapter[0])
    assert not torch.equal(logits(model), before)
    assert (logits(model) - adapter[1]).abs().max() < 0.5
    with pytest.raises(ValueError, match="mlp.up_proj is a QuantizedLinear: on the coarse grid of quantised weights"):
        merge(model)
    assert len(adapted(model)) == 14  # refused before anything was changed


def test_a_merged_checkpoint_is_a_checkpoint_and_is_not_merged_again(adapter, tmp_path):
    folder, expected = adapter
    convert(BASE, tmp_path / "merged", adapter=folder)
    merged = Llava.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert (logits(merged) - expected).abs().max() / expected.abs().max() < 1e-5
    with pytest.raises(ValueError, match="is merged into .* already"):
        convert(tmp_path / "merged", tmp_path / "twice", adapter=folder)
    assert not (tmp_path / "twice").exists()
    refuse_merged(BASE, folder)
    with pytest.raises(ValueError, match="merged exists"):
        convert(BASE, tmp_path / "merged", adapter=folder)


def test_the_command_that_merges(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["convert.py", str(BASE), str(tmp_path / "merged"), "--adapter", str(adapter[0])])
    convert_command()
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    with pytest.raises(SystemExit, match="convert.py: .*merged exists"):
        convert_command()


@pytest.mark.parametrize("rank, alpha, dropout", [(0, 2, 0.0), (-1, 2, 0.0), (1.5, 2, 0.0), (2, 0, 0.0), (2, 2, 1.0)])
def test_numbers_that_make_no_adapter(rank, alpha, dropout):
    with pytest.raises(ValueError, match="LoRA has"):
        add_adapter(model_of(), rank, alpha, dropout)


def test_layers_that_are_none_and_a_second_adapter():
    model = model_of()
    with pytest.raises(ValueError, match="'fc1' is no linear layer"):
        add_adapter(model, 2, 4, layers=("q_proj", "fc1"))
    add_adapter(model, 2, 4)
    with pytest.raises(ValueError, match="has an adapter already"):
        add_adapter(model, 2, 4)


def change_config(folder, **fields):
    (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | fields))


def change_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


Q = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_"
SPOILT = {
    "no config": (lambda f: (f / CONFIG).unlink(), f"has no {CONFIG}"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"has no {WEIGHTS}"),
    "cut short": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), "is damaged or cut short"),
    "no JSON": (lambda f: (f / CONFIG).write_text("{"), "is not valid JSON"),
    "another kind": (lambda f: change_config(f, peft_type="IA3"), "has peft_type 'IA3'"),
    "a variant": (lambda f: change_config(f, use_dora=True), "has use_dora True"),
    "a rank for some": (lambda f: change_config(f, rank_pattern={"q_proj": 4}), r"does not fit in 4 tensors .* expected \(4, 24\)"),
    "a rank of 0": (lambda f: change_config(f, rank_pattern={"q_proj": 0}), "has rank_pattern"),
    "no pattern": (lambda f: change_config(f, alpha_pattern={"q_proj[": 1}), r"has 'q_proj\[' in alpha_pattern"),
    "rank 0": (lambda f: change_config(f, r=0), "has r 0"),
    "another rank": (lambda f: change_config(f, r=3), r"does not fit in 28 tensors .* is \(2, 40\), expected \(3, 40\)"),
    "half a layer": (lambda f: change_tensors(f, lambda t: t.pop(Q + "B.weight")), "q_proj.lora_B.weight is missing, expected"),
    "a layer more": (lambda f: change_tensors(f, lambda t: t.update({Q.replace("0", "7") + "A.weight": torch.ones(2)})), "expected none"),
    "another width": (lambda f: change_tensors(f, lambda t: t.update({Q + "A.weight": torch.ones(2, 9)})), r"\(2, 9\), expected \(2, 24\)"),
    "no adapter": (lambda f: change_tensors(f, lambda t: [t.pop(n) for n in [*t] if "lora" in n]), "holds no adapter"),
}  # fmt: skip


@pytest.mark.parametrize("spoil, message", SPOILT.values(), ids=SPOILT)
def test_an_adapter_that_does_not_fit_is_refused_and_the_model_left_alone(spoil, message, adapter):
    spoil(adapter[0])
    model = model_of()
    before = logits(model)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_adapter(model, adapter[0])
    assert not adapted(model) and torch.equal(logits(model), before)


NAME = "model.language_model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({}, (4, 6)),
        ({"rank_pattern": None, "alpha_pattern": {}}, (4, 6)),
        ({"use_rslora": True}, (4, 12)),
        ({"rank_pattern": {"q_proj": 9}, "use_rslora": True}, (9, 18)),
        ({"alpha_pattern": {"q_proj": 1}, "use_rslora": True}, (4, 2)),
        ({"rank_pattern": {"proj": 8, "k_proj": 8, "layers.0.self_attn.q_proj": 8, "q_pro": 8}}, (4, 6)),  # no pattern fits the whole
        ({"rank_pattern": {"self_attn.q_proj": 8, "q_proj": 7}}, (8, 6)),  # the first that fits
        ({"rank_pattern": {"^model.language_model.*q_proj": 8}, "alpha_pattern": {"^q_proj": 8}}, (8, 6)),
        ({"alpha_pattern": {r".*\.[12]\..*": 8}}, (4, 8)),
        ({"alpha_pattern": {"k_proj|q_proj": 8}}, (4, 8)),
    ],
)
def test_a_rank_and_an_alpha_for_each_layer(fields, expected):
    assert rank_and_alpha(NAME, {"r": 4, "lora_alpha": 6, **fields}) == expected


def test_an_adapter_with_patterns_computes_each_layers_own_factor(adapter):
    """The same tensors with another factor for one layer: as if its B had that much larger numbers."""
    folder, _ = adapter
    plain, changed = model_of(), model_of()
    load_adapter(plain, folder)
    layer = plain.language_model.layers[0].self_attn.q_proj
    layer.lora_B.weight.data *= 2.5 * 2**0.5
    plain.language_model.layers[1].mlp.up_proj.lora_B.weight.data *= 2**0.5
    change_config(folder, use_rslora=True, alpha_pattern={"layers.0.self_attn.q_proj": 15, "layers.1.mlp.up_proj": 6, ".*": 6 / 2**0.5})
    load_adapter(changed, folder)
    torch.testing.assert_close(logits(changed), logits(plain))
    merge(changed)
    torch.testing.assert_close(logits(changed), logits(plain))


def test_an_adapter_of_another_family_is_refused(adapter):
    with pytest.raises(ValueError, match="it is of another model"):
        load_adapter(model_of("vip"), adapter[0])


def test_training_leaves_the_base_as_it_is_to_the_last_bit(monkeypatch, data, tmp_path):
    """As it is stored, and as it is in memory when the run has ended."""
    seen, save = {}, state.save_adapter

    def look(model, *arguments):
        seen["model"] = model
        save(model, *arguments)

    monkeypatch.setattr(state, "save_adapter", look)
    stored = (Path(TINY) / "model.safetensors").read_bytes()
    run(monkeypatch, data, tmp_path / "out", "--lora", "4")
    assert (Path(TINY) / "model.safetensors").read_bytes() == stored
    before = dict(Llava.from_pretrained(TINY, dtype=torch.float32).named_parameters())
    after = {name.replace(".base.", "."): parameter for name, parameter in seen["model"].named_parameters() if ".lora_" not in name}
    assert before.keys() == after.keys()
    assert {n.split(".")[0] for n in before if not torch.equal(before[n], after[n])} == {"projector"}

    assert {file.name for file in (tmp_path / "out").iterdir()} == {CONFIG, WEIGHTS}
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}  # the type that the base came in
    assert all(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)  # every layer has learnt
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8, TINY)
    model = Llava.from_pretrained(TINY)
    load_adapter(model, tmp_path / "out")
    with pytest.raises(SystemExit, match="holds a finished result"):
        run(monkeypatch, data, tmp_path / "out", "--lora", "4")


def test_a_killed_run_resumes_and_ends_the_same(monkeypatch, data, tmp_path, capsys):
    run(monkeypatch, data, tmp_path / "whole", "--lora", "4")
    with killed_run(monkeypatch) as patch:
        run(patch, data, tmp_path / "killed", "--lora", "4", "--save-every", "1e-9")
    with pytest.raises(SystemExit, match="of a run with another lora"):
        run(monkeypatch, data, tmp_path / "killed", "--lora", "8")
    run(monkeypatch, data, tmp_path / "killed", "--lora", "4")
    assert "going on from step 1" in capsys.readouterr().err
    whole, killed = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


QLORA = ("--lora", "4", "--epochs", "3", "--lr", "4e-3")


@pytest.fixture(scope="module")
def on_int4(tmp_path_factory):
    """The model taught to say "Nothing." by an adapter on weights in 4 bits, and the folder of the data, with the adapter in out."""
    folder, seen, save = tmp_path_factory.mktemp("nothing"), [], state.save_adapter
    write(folder, 12, seed=5)
    data = re.sub(r'(?<="from": "gpt", "value": )"[^"]*"', '"Nothing."', (folder / "instruct.json").read_text())
    (folder / "instruct.json").write_text(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state, "save_adapter", lambda model, *arguments: seen.append(model) or save(model, *arguments))
        run(patch, folder, folder / "out", *QLORA, "--quantize", "int4")
    return seen[0], folder


def test_an_adapter_of_quantised_weights_learns_and_leaves_them_as_they_are(on_int4):
    trained, folder = on_int4
    fresh = Llava.from_pretrained(TINY, dtype=torch.float32, quantize="int4")
    before, after = dict(fresh.named_buffers()), {name.replace(".base.", "."): buffer for name, buffer in trained.named_buffers()}
    assert len(before) == 2 * 29 and before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(fresh.projector.linear_1.weight, trained.projector.linear_1.weight)

    tokenizer, processor, P = Tokenizer.from_pretrained(TINY), ImageProcessor.from_pretrained(TINY), fresh.config.features_per_image
    data = encoded(folder / "instruct.json", folder, folder / "state", max_length=512)
    ids, labels, pixels = collate([data[n] for n in range(12)], processor, tokenizer.image_id, tokenizer.pad_id, P, False)
    with torch.no_grad():
        losses = [model(ids, pixels, labels=labels).loss.item() for model in (fresh, trained)]
    assert losses[1] < losses[0] / 10, losses


def test_an_adapter_of_quantised_weights_is_used_as_it_was_trained(on_int4):
    trained, folder = on_int4
    chat = Chat.from_pretrained(TINY, dtype=torch.float32, quantize="int4")
    chat.model = trained
    for question in ("Where is the ring?", "Describe the picture."):
        chat.reset()
        answer = "".join(chat.ask(question, [open_image("tiny/example.png")]))
        status, said, error = sample("--image", "tiny/example.png", "--quantize", "int4", "--adapter", str(folder / "out"), question)
        assert (status, said) == (0, f"{answer}\n") and answer == "Nothing.", error
    load_adapter(Llava.from_pretrained(TINY), folder / "out")  # the plain model's too, so in PEFT's format


def test_a_checkpoint_that_is_quantised_already_trains_the_same_adapter(on_int4, monkeypatch, tmp_path):
    _, data = on_int4
    quantise([TINY, str(tmp_path / "int4"), "--quantize", "int4"])
    run(monkeypatch, data, tmp_path / "out", *QLORA, model=tmp_path / "int4")
    one, other = (load_file(folder / "out" / WEIGHTS) for folder in (data, tmp_path))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(SystemExit, match=r"int4 is quantised: train an adapter of it \(--stage 2 --lora 16\)"):
        run(monkeypatch, data, tmp_path / "full", model=tmp_path / "int4")
    with pytest.raises(SystemExit, match="int4 is quantised already, to int4"):
        run(monkeypatch, data, tmp_path / "twice", *QLORA, "--quantize", "int8", model=tmp_path / "int4")
    with pytest.raises(ValueError, match="is a QuantizedLinear: on the coarse grid"):
        convert(tmp_path / "int4", tmp_path / "merged", adapter=tmp_path / "out")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--quantize", "int4"], "--quantize is for --lora"),
        (["--lora", "4", "--quantize", "int4-128"], "int4-128 takes inputs in groups of 128"),
        (["--lora", "0"], "--lora: 0 is not above 0"),
        (["--lora", "4", "--stage", "1"], "--lora is for stage 2"),
        (["--lora-alpha", "4"], "--lora-alpha is for an adapter"),
    ],
)
def test_mistakes(options, message, monkeypatch, data, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, data, tmp_path, *options)
    assert message in f"{stop.value} {capsys.readouterr().err}"


def test_sample_takes_an_adapter(tmp_path):
    model = Llava.from_pretrained(TINY)
    add_adapter(model, rank=2, alpha=4)
    learn(model)
    save_adapter(model, tmp_path / "adapter", TINY, torch.float16)
    adapter = ("--adapter", str(tmp_path / "adapter"), "--max-new-tokens", "8")
    status, said, _ = sample(*adapter)
    assert status == 0 and said and not "A small black triangle at the top right, a large".startswith(said.strip())
    status, _, error = sample("--adapter", "no/such/adapter")
    assert status == 2 and "no/such/adapter: no such folder" in error
    merged = copytree(TINY, tmp_path / "merged")
    config = json.loads((merged / "config.json").read_text()) | {"merged_adapters": [fingerprint(tmp_path / "adapter")]}
    (merged / "config.json").write_text(json.dumps(config))
    status, _, error = sample("--model", str(merged), *adapter)
    assert status == 2 and "already" in error


def test_a_mirror_exchanges_left_and_right_and_nothing_else():
    star, ring, cross = Thing("large", "red", "star", 3), Thing("small", "blue", "ring", 5), Thing("small", "red", "cross", 7)
    other = mirrored([star, ring, cross])
    assert describe(other) == "A small blue ring on the left, a large red star on the right and a small red cross at the bottom."
    assert mirrored(other) == [star, ring, cross]
    assert [thing.cell for cell in range(9) for thing in mirrored([Thing("small", "red", "star", cell)])] == [2, 1, 0, 5, 4, 3, 8, 7, 6]


def test_what_is_asked_in_a_mirror_is_what_is_asked_without_one():
    """The same question, kind by kind; the answer is another where sides matter, and nowhere else."""
    asked = list(mirror_questions(400, seed=2))
    assert Counter(kind for kind, *_ in asked) == dict.fromkeys(QUESTIONS, 40)
    differ = {kind for kind, _, _, answer, other in asked if answer != other}
    assert differ == {"describe", "where is", "what is at", "which side"}


def test_mirror_data_fits_the_context(tmp_path):
    write_mirror(tmp_path, 12, seed=0)
    records = json.loads((tmp_path / "instruct.json").read_text())
    tokenizer = Tokenizer.from_pretrained(TINY)
    lengths = [len(encode_conversation(record, tokenizer, "llava")[0]) + 63 for record in records]
    assert len(records) == 12 and max(lengths) <= 512
