"""Training: what is learnt, what stays frozen, and that a killed run ends as if it had not been killed."""

import codecs
import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from shutil import copytree

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import convert
import train
from hardware.processes import Alone, Interrupts
from images import ImageProcessor
from inputs import IGNORED
from lessons import curve
from llava import Llava
from tiny.world import write
from tokenizer import Tokenizer, chat_prompt
from training import data as training_data
from training import records as training_records
from training.data import Encoder, collate, conversations, make_batches
from training.lora import adapted, add_adapter
from training.parameters import GradientScaler
from training.report import losses_file
from training.state import copy_rows
from weights.checkpoint import save_checkpoint

TINY = "tiny/llava"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write(folder, 12, seed=5)
    return folder


def run(monkeypatch, data, out, *options, stage=2, model=TINY):
    command = f"train.py --stage {stage} --model {model} --data {data}/instruct.json --images {data} --out {out} --batch-size 2"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--lr", "1e-3", *options])
    train.main()


def record(*values):
    speakers = ["human", "gpt"] * len(values)
    return {"id": "x", "image": "x.png", "conversations": [{"from": s, "value": v} for s, v in zip(speakers, values)]}


def encoded(path, images, folder, max_length=200, with_picture=False):
    """The Conversations of a data file for tiny/llava."""
    tokenizer = Tokenizer.from_pretrained(TINY)
    encode = lambda record: training_data.encode_conversation(record, tokenizer, "llava")
    return conversations(path, images, Encoder(encode, tokenizer.image_id, max_length, 64, with_picture), {}, folder, Alone())


@contextmanager
def killed_run(monkeypatch, after=1):
    """train.py, killed when it has saved the state after so many steps."""

    class Killed(Exception):
        pass

    def save_then_die(state, folder, step, group, save=train.save_state):
        save(state, folder, step, group)
        if step == after:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "save_state", save_then_die)
        yield patch


def test_labels_are_the_assistants_words_and_the_end_mark():
    tokenizer = Tokenizer.from_pretrained(TINY)
    said = ("<image>\nWhere is the star?", "At the top.", "What colour is it?", "Red.")
    ids, labels = training_data.encode_conversation(record(*said), tokenizer, "llava")
    assert tokenizer.decode([i for i in labels if i != IGNORED]) == "At the top. Red."
    assert [i for i in labels if i == tokenizer.eos_id] == [tokenizer.eos_id] * 2
    assert all(label in (IGNORED, i) for i, label in zip(ids, labels, strict=True))
    assert labels[ids.index(tokenizer.image_id)] == IGNORED


@pytest.mark.parametrize("style", ["llava", "bakllava", "vip"])
def test_a_conversation_is_encoded_as_it_will_be_read(style):
    tokenizer = Tokenizer.from_pretrained(TINY)
    said = ("<image>\nWhere is the star?", "At the top.", "What colour is it?", "Red.")
    parts = [{"type": "image"}, {"type": "text", "text": "Where is the star?"}]
    messages = [{"role": "user", "content": parts}] + [
        {"role": role, "content": text} for role, text in zip(("assistant", "user", "assistant"), said[1:])
    ]
    ids, _ = training_data.encode_conversation(record(*said), tokenizer, style)
    assert ids == tokenizer.encode(chat_prompt(messages, style))


@pytest.mark.parametrize(
    "bad",
    [record(), record("<image>\nHi"), record("<image>\nHi</s>", "Yes."), {"id": "x", "conversations": [{"from": "gpt", "value": "Hi"}]}],
)
def test_a_record_that_is_no_conversation_is_an_error(bad):
    with pytest.raises(ValueError):
        training_data.encode_conversation(bad, Tokenizer.from_pretrained(TINY), "llava")


def test_records_that_cannot_be_used_are_left_out_and_counted_by_kind(tmp_path, capsys):
    Image.new("RGB", (9, 9)).save(tmp_path / "x.png")
    good, without_answer = record("<image>\nHi", "Yes."), record("<image>\nHi" + " there" * 200, "Yes.")
    no_picture = {**record("Hi", "Yes."), "id": "lost"}
    cut = {**record("Tell me.", "At the top. " * 80, "<image>\nWhere?", "Left."), "id": "before its picture"}
    mark = record("<image>\nHi</s>", "Yes.")
    damaged = [cut, {}, 3, {"conversations": [{"from": "human"}]}, {"conversations": None}, {**good, "image": [3]}, mark]
    (tmp_path / "data.json").write_text(json.dumps([good, without_answer, no_picture, *damaged] + [good] * 9))
    data = encoded(tmp_path / "data.json", tmp_path, tmp_path / "state")
    assert len(data) == 10
    said = capsys.readouterr().err
    assert "9 of 19 records are left out" in said
    counts = {line[10:].strip(): int(line[:8]) for line in said.splitlines()[1:] if line[:8].strip()}
    assert list(counts.values()) == [3, 2, 1, 1, 1, 1] and next(iter(counts)).startswith("no conversation")
    assert "first: record 3 (lost): 0 <image> for 1 pictures" in said and "first: record 10 (x): the user's text contains '</s>'" in said


@pytest.mark.parametrize(
    "content, message",
    [("[{", "data.json is not valid JSON"), ("{}", "no conversation"), ("[]", "no conversation"), ("", "no conversation"),
     ('[{"a": 1} {"b": 2}]', "after 1 records: found '{' where a comma"), ("[1] 2", "after the list's end"),
     ("[" * 100_000, "is not valid JSON")],
)  # fmt: skip
def test_a_data_file_that_is_none(content, message, tmp_path):
    (tmp_path / "data.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        encoded(tmp_path / "data.json", tmp_path, tmp_path / "state")
    assert not [*(tmp_path / "state").glob("encoded-*[!l]")]  # none but one that is .partial


AS_FILES = {
    "a list": lambda records: json.dumps(records).encode(),
    "indented": lambda records: json.dumps(records, indent=4).encode(),
    "with a byte order mark": lambda records: codecs.BOM_UTF8 + json.dumps(records).encode(),
    "in UTF-16": lambda records: json.dumps(records, ensure_ascii=False).encode("utf-16"),
    "JSON lines": lambda records: b"\n".join(json.dumps(record).encode() for record in records),
    "JSON lines from Windows": lambda records: b"".join(json.dumps(record).encode() + b"\r\n\r\n" for record in records),
}


@pytest.mark.parametrize("block", [1, 7, 1 << 22])
@pytest.mark.parametrize("as_file", AS_FILES.values(), ids=AS_FILES)
def test_ways_to_write_a_data_file(as_file, block, tmp_path, monkeypatch):
    records = [
        {**record("<image>\nHi", "Oui, ça “va” – 12.5 €."), "n": 12, "list": [[], {}, None, -1.5e3]},
        {},
        record("Hi", "\\"),
        7,
        "[",
        12,
    ]
    monkeypatch.setattr(training_records, "BLOCK", block)
    (tmp_path / "data.json").write_bytes(as_file(records))
    assert [*training_records.read_records(tmp_path / "data.json")] == records


@pytest.mark.parametrize(
    "image, names",
    [(None, []), ("", []), (math.nan, []), ([], []), ([None], []), ("a.png", ["a.png"]), (["a.png"], ["a.png"]),
     (["b.png", "a.png"], ["b.png", "a.png"])],
)  # fmt: skip
def test_ways_to_name_pictures(image, names, tmp_path):
    """As tables write them, too: there, what is nothing is null, "" or NaN."""
    for name, width in (("a.png", 5), ("b.png", 9)):
        Image.new("RGB", (width, width)).save(tmp_path / name)
    said = record("<image>\n" * len(names) + "How many?", "Four.")
    (tmp_path / "data.json").write_text(json.dumps([{**said, "image": image}]))
    ids, labels, pictures = encoded(tmp_path / "data.json", tmp_path, tmp_path / "state", max_length=400)[0]
    assert [picture.width for picture in pictures] == [{"a.png": 5, "b.png": 9}[name] for name in names]
    assert ids.count(Tokenizer.from_pretrained(TINY).image_id) == len(names)


def test_a_record_without_the_field_has_no_picture(tmp_path):
    said = {"conversations": record("How many?", "Four.")["conversations"]}
    (tmp_path / "data.json").write_text(json.dumps([said]))
    assert encoded(tmp_path / "data.json", tmp_path, tmp_path / "state")[0][2] == []


def test_a_first_turn_of_the_assistants_is_skipped():
    tokenizer, said = Tokenizer.from_pretrained(TINY), record("<image>\nHow many?", "Four.")
    greeted = {**said, "conversations": [{"from": "gpt", "value": "Hello."}, *said["conversations"]]}
    assert training_data.encode_conversation(greeted, tokenizer, "llava") == training_data.encode_conversation(said, tokenizer, "llava")


def test_pictures_of_several_are_as_in_inference(tmp_path):
    """The ids that `Chat` would ask with, and the features of both pictures in the length."""
    tokenizer = Tokenizer.from_pretrained(TINY)
    ids, _ = training_data.encode_conversation(record("<image>\n<image>\nWhere?", "Left."), tokenizer, "llava")
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Where?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "Left."}]
    assert ids == tokenizer.encode(chat_prompt(messages, "llava"))
    Image.new("RGB", (5, 5)).save(tmp_path / "a.png")
    (tmp_path / "data.json").write_text(json.dumps([{**record("<image>\n<image>\nWhere?", "Left."), "image": ["a.png", "a.png"]}]))
    assert encoded(tmp_path / "data.json", tmp_path, tmp_path / "state").lengths.tolist() == [len(ids) + 2 * 63]


def test_what_is_encoded_is_read_again_unless_something_has_changed(tmp_path):
    path, tokenizer = tmp_path / "data.json", Tokenizer.from_pretrained(TINY)
    path.write_text(json.dumps([{**record("Hi", "Yes."), "image": None}]))
    asked = []

    def read(made_from=0):
        encode = lambda record: asked.append(record) or training_data.encode_conversation(record, tokenizer, "llava")
        return conversations(path, tmp_path, Encoder(encode, tokenizer.image_id, 200, 64), made_from, tmp_path / "state", Alone())[0]

    assert read() == read() and len(asked) == 1
    read(made_from=1)
    assert len(asked) == 2
    path.write_text(json.dumps([{**record("Hi", "No."), "image": None}]))
    assert read()[0] != read(made_from=1) and len(asked) == 4


def test_conversations_go_to_other_processes_as_a_folder(data, tmp_path):
    """To those that read pictures: not as a copy of what is in it."""
    rows = encoded(data / "instruct.json", data, tmp_path, max_length=512)
    sent = ForkingPickler.dumps(rows)
    again = pickle.loads(sent)
    assert len(sent) < 2000 and len(again) == len(rows) and again[3][:2] == rows[3][:2]
    again.replaced[2] = True
    assert rows.replaced.tolist() == [False, False, True] + [False] * 9  # shared


def test_padding_on_the_right_changes_no_loss():
    tokenizer, processor = Tokenizer.from_pretrained(TINY), ImageProcessor.from_pretrained(TINY)
    model = Llava.from_pretrained(TINY, dtype=torch.float32)
    short = (*training_data.encode_conversation(record("How many?", "Two."), tokenizer, "llava"), None)
    long = (*training_data.encode_conversation(record("How many are there?", "A large red star at the top."), tokenizer, "llava"), None)

    def loss(*examples):
        ids, labels, _ = collate(examples, processor, tokenizer.image_id, tokenizer.pad_id, 64, pad=False)
        return model(ids, labels=labels).loss * (labels[:, 1:] != IGNORED).sum()

    torch.testing.assert_close(loss(short, long), loss(short) + loss(long), rtol=1e-5, atol=0)


def test_each_example_is_seen_once_an_epoch_and_near_its_like():
    lengths = [7 * n % 50 for n in range(100)]
    batches = make_batches(lengths, 4, epochs=3, seed=0)
    assert sorted(i for batch in batches for i in batch) == sorted([*range(100)] * 3)
    assert batches[:25] != batches[25:50]
    spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in batches]
    assert sum(spread) / len(spread) < 10


def test_learning_rate_warms_up_and_falls_to_nothing():
    rates = [train.learning_rate(step, 100, 1.0, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] < 1e-3


@pytest.mark.parametrize("stage, trained", [(1, ("multi_modal_projector.",)), (2, ("multi_modal_projector.", "language_model."))])
def test_a_stage_trains_its_modules_and_no_other(monkeypatch, data, tmp_path, stage, trained):
    run(monkeypatch, data, tmp_path, stage=stage)
    before, after = load_file(f"{TINY}/model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith(trained) for name in changed)
    assert {name.split(".")[0] + "." for name in changed} == set(trained)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # the type it came in
    Llava.from_pretrained(tmp_path)


def forward_pass(model, autocast, ids, pixels):
    """The loss of a forward pass, and how many bytes it saves for its backward pass, the model's own weights not counted."""
    weights, saved = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with autocast, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(ids, pixels, labels=ids).loss
    return loss, sum(saved.values())


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointed_activations_are_fewer_and_change_nothing(stage, dtype):
    results, sizes = [], []
    for checkpointed in (False, True):
        model = Llava.from_pretrained(TINY)
        parameters, _, autocast = train.make_trainable(model, stage, dtype, checkpointed)
        ids, pixels = torch.tensor([[model.config.image_id, *range(5, 40)]] * 2), torch.ones(2, 3, 112, 112)
        loss, size = forward_pass(model, autocast, ids, pixels)
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in parameters)])
        sizes.append(size)
    assert all(torch.equal(with_all, recomputed) and with_all.isfinite().all() for with_all, recomputed in zip(*results, strict=True))
    assert sizes[1] < sizes[0] / 3


@pytest.mark.parametrize("options, expected", [([], False), (["--checkpoint-activations"], True), (["--no-checkpoint-activations"], False)])
@pytest.mark.parametrize("large", [False, True])
def test_activations_are_checkpointed_when_asked_for_or_the_model_is_large(options, expected, large, monkeypatch, data, tmp_path):
    class Asked(Exception):
        pass

    def make_trainable(model, stage, dtype, checkpoint_activations, *processes):
        assert checkpoint_activations == (expected or large and not options)
        raise Asked

    monkeypatch.setattr(train, "make_trainable", make_trainable)
    if large:
        monkeypatch.setattr(train, "LARGE", 3e6)  # the bundled model has 3.1 million
    with pytest.raises(Asked):
        run(monkeypatch, data, tmp_path / "out", *options)


def test_held_out_losses_are_reported_and_change_nothing(monkeypatch, data, tmp_path, capsys):
    """The mean over the assistant's words, whatever the batches: worked out here in a single one."""
    held_out = tmp_path / "held-out.json"
    held_out.write_text(json.dumps(json.loads((data / "instruct.json").read_text())[:5]))
    run(monkeypatch, data, tmp_path / "plain", "--batch-size", "2")
    capsys.readouterr()
    run(monkeypatch, data, tmp_path / "watched", "--batch-size", "2", "--held-out", str(held_out))
    (reported,) = re.findall(r"step \d+: held-out loss ([\d.]+) \(held-out.json\)", capsys.readouterr().err)
    plain, watched = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "watched"))
    assert all(plain[name].equal(watched[name]) for name in plain)

    model, tokenizer = Llava.from_pretrained(tmp_path / "plain", dtype=torch.float32), Tokenizer.from_pretrained(TINY)
    examples = encoded(held_out, data, tmp_path / "state", max_length=512)
    examples = [examples[n] for n in range(len(examples))]
    ids, labels, pixels = collate(examples, ImageProcessor.from_pretrained(TINY), tokenizer.image_id, tokenizer.pad_id, 64, False)
    with torch.no_grad():
        expected = model(ids, pixels, labels=labels).loss.item()
    assert abs(float(reported) - expected) < 2e-3  # the saved weights are rounded to 16 bits


def test_accumulated_batches_equal_one_large_batch(monkeypatch, data, tmp_path):
    """On records that are all alike, so that every batch is: then the steps must be the same."""
    alike = json.loads((data / "instruct.json").read_text())[:1] * 12
    (tmp_path / "instruct.json").write_text(json.dumps(alike))
    (tmp_path / "images").symlink_to(data / "images")
    run(monkeypatch, tmp_path, tmp_path / "large", "--batch-size", "4")
    run(monkeypatch, tmp_path, tmp_path / "small", "--batch-size", "2", "--accumulate", "2")
    large, small = (load_file(tmp_path / name / "model.safetensors") for name in ("large", "small"))
    for name in large:
        torch.testing.assert_close(small[name], large[name], rtol=1e-2, atol=1e-4)


def test_a_killed_run_resumes_and_ends_the_same(monkeypatch, data, tmp_path, capsys):
    run(monkeypatch, data, tmp_path / "whole")
    with killed_run(monkeypatch, after=3) as patch:
        run(patch, data, tmp_path / "killed", "--save-every", "1e-9")
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    half = tmp_path / "killed" / "training-state" / "4"  # as a kill while saving leaves it
    half.mkdir()
    (half / "0-of-1.pt").write_bytes(b"half a file")
    run(monkeypatch, data, tmp_path / "killed")
    assert "going on from step 3" in capsys.readouterr().err
    whole, killed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    assert not (tmp_path / "killed" / "training-state").exists()


def test_a_finished_run_is_not_begun_anew(monkeypatch, data, tmp_path):
    run(monkeypatch, data, tmp_path, stage=1)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit, match="holds a finished result"):
        run(monkeypatch, data, tmp_path, stage=1)
    assert (tmp_path / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "options, message",
    [
        (["--lr", "2e-3"], "of a run with another lr"),
        (["--stage", "1", "--pad"], "of a run with another stage, pad"),
        (["--data", "DATA"], "of a run with another data"),
        (["--model", "tests/fixtures/llava"], "of a run with another model"),
    ],
)
def test_the_state_of_another_run_is_refused(options, message, monkeypatch, data, tmp_path):
    with killed_run(monkeypatch) as patch:
        run(patch, data, tmp_path / "out", "--save-every", "1e-9")
    (tmp_path / "data.json").write_text(json.dumps(json.loads((data / "instruct.json").read_text())[::-1]))
    options = [str(tmp_path / "data.json") if option == "DATA" else option for option in options]
    if "--model" in options:
        monkeypatch.setattr(train, "checkpoint_folder", lambda name: Path(copytree(TINY, tmp_path / "copy")))
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, data, tmp_path / "out", *options)


def test_a_damaged_state_is_refused(monkeypatch, data, tmp_path):
    with killed_run(monkeypatch) as patch:
        run(patch, data, tmp_path, "--save-every", "1e-9")
    for file in ("1/0-of-1.pt", "1/complete.json", "run.json"):  # one after the other: the last is read first
        for content in (b"", b"garbage", json.dumps([]).encode(), (tmp_path / "training-state" / file).read_bytes()[:-99]):
            (tmp_path / "training-state" / file).write_bytes(content)
            with pytest.raises(SystemExit, match="is damaged"):
                run(monkeypatch, data, tmp_path)


def test_a_process_that_is_lost_damages_no_state(monkeypatch, data, tmp_path):
    def lost(*_):
        raise RuntimeError("Connection closed by peer")

    with killed_run(monkeypatch) as patch:
        run(patch, data, tmp_path, "--save-every", "1e-9")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="Connection closed"):
        patch.setattr(Alone, "first_says", lost)
        run(patch, data, tmp_path)
    run(monkeypatch, data, tmp_path)


@pytest.mark.parametrize("cuts", [[7], [3, 4], [4, 3, 0], [1, 1, 1, 1, 1, 1, 1]])
@pytest.mark.parametrize("first, rows", [(0, 7), (0, 4), (4, 3), (2, 3), (7, 0)])
def test_rows_are_put_together_from_any_number_of_parts(cuts, first, rows):
    whole, mine = torch.arange(14.0).reshape(7, 2), torch.zeros(rows, 2)
    parts = [(part, sum(cuts[:n])) for n, part in enumerate(whole.split(cuts))]
    copy_rows(mine, first, parts)
    assert torch.equal(mine, whole[first : first + rows])
    copy_rows(mine, first, [(whole, 0)] * 2)  # as each of two processes holds what is not cut
    if rows:
        with pytest.raises(ValueError, match="not whole"):
            copy_rows(mine, first, parts[:0])


def test_a_state_that_cannot_be_written_is_one_line(monkeypatch, data, tmp_path):
    (tmp_path / "training-state").mkdir()
    (tmp_path / "training-state" / "1").touch()  # where a folder should be
    with pytest.raises(SystemExit, match="train.py: .*training-state/1 cannot be written"):
        run(monkeypatch, data, tmp_path, "--save-every", "1e-9")


def test_processes_that_see_different_states_are_refused(monkeypatch, data, tmp_path):
    monkeypatch.setattr(Alone, "first_says", lambda *_: 3)  # what the first process has found
    with pytest.raises(SystemExit, match="holds step 0 here, step 3 for the first process"):
        run(monkeypatch, data, tmp_path)


@pytest.mark.parametrize("stage", [1, 2])
def test_computing_in_bfloat16_leaves_what_is_not_trained_as_it_is_stored(monkeypatch, data, tmp_path, stage):
    run(monkeypatch, data, tmp_path, "--dtype", "bfloat16", "--lr", "1e-30", stage=stage)  # and what is trained, but for rounding
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (TINY, tmp_path))
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_text_and_pictures_in_one_batch(monkeypatch, tmp_path):
    (tmp_path / "images").mkdir()
    write(tmp_path, 2, seed=5)
    records = json.loads((tmp_path / "instruct.json").read_text())
    text = {"conversations": [{"from": "human", "value": "What? " * 150}, {"from": "gpt", "value": "Red. " * 20}]}
    long = training_data.encode_conversation(text, Tokenizer.from_pretrained(TINY), "llava")[0]
    assert 300 < len(long) <= 512 < len(long) + 220  # with the features of a picture as padding it would not fit
    (tmp_path / "instruct.json").write_text(json.dumps([*records, text, text]))
    run(monkeypatch, tmp_path, tmp_path / "out", "--batch-size", "4")


def test_stage_1_leaves_out_text_alone(monkeypatch, tmp_path, capsys):
    write(tmp_path, 2, seed=5)
    records = json.loads((tmp_path / "instruct.json").read_text())
    text = {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Red."}]}
    (tmp_path / "instruct.json").write_text(json.dumps([text, text, *records]))
    run(monkeypatch, tmp_path, tmp_path / "out", stage=1)
    assert "2 of 4 records are left out\n       2  it has no picture for the projector" in capsys.readouterr().err


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_broken_picture_is_replaced_by_another_record(workers, monkeypatch, tmp_path, capfd):
    write(tmp_path, 4, seed=5)
    (tmp_path / "images" / "000003.png").write_bytes(b"broken")
    run(monkeypatch, tmp_path, tmp_path / "out", "--epochs", "2", "--workers", workers)
    said = capfd.readouterr().err
    assert "000003.png is not a picture" in said and "1 of 4 records had pictures that could not be opened" in said
    for n in range(3):
        (tmp_path / "images" / f"00000{n}.png").write_bytes(b"broken, too")
    with pytest.raises(SystemExit, match="4 of 4 pictures that were tried cannot be opened: .*000000.png is not a picture"):
        run(monkeypatch, tmp_path, tmp_path / "none")


def test_pictures_that_are_not_there_are_left_out_and_too_many_stop_the_run(monkeypatch, tmp_path, capsys):
    write(tmp_path, 20, seed=5)
    records = json.loads((tmp_path / "instruct.json").read_text())
    text = {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Red."}]}
    (tmp_path / "instruct.json").write_text(json.dumps([*records, *[text] * 80]))  # a tenth is of those with pictures
    for n in range(2):
        (tmp_path / "images" / f"00000{n}.png").unlink()
    run(monkeypatch, tmp_path, tmp_path / "out", "--batch-size", "50")
    assert "2 of 100 records are left out\n       2  its picture is missing\n" in capsys.readouterr().err
    (tmp_path / "images" / "000002.png").unlink()
    with pytest.raises(SystemExit, match=f"3 of the 20 records with pictures find none in {tmp_path}; see --images"):
        run(monkeypatch, tmp_path, tmp_path / "none")
    with pytest.raises(SystemExit, match=f"20 of the 20 records with pictures find none in {tmp_path}/images; see --images"):
        run(monkeypatch, tmp_path, tmp_path / "none", "--images", str(tmp_path / "images"))
    assert not (tmp_path / "none" / "model.safetensors").exists()


def test_more_than_half_left_out_stops_the_run(monkeypatch, data, tmp_path, capsys):
    records = json.loads((data / "instruct.json").read_text())
    for wrong, stops in ((12, False), (13, True)):
        (tmp_path / "data.json").write_text(json.dumps(records + [{"messages": []}] * wrong))
        try:
            run(monkeypatch, data, tmp_path / str(wrong), "--batch-size", "6", "--data", str(tmp_path / "data.json"))
            assert not stops
        except SystemExit as error:
            assert stops and "13 of the 25 records of" in str(error)
        assert f"{wrong}  no conversation: expected" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--batch-size", "0"], "--batch-size: 0 is not above 0"),
        (["--lr", "nan"], "--lr: nan is not above 0"),
        (["--epochs", "two"], "--epochs"),
        (["--device", "abacus"], "--device abacus"),
        (["--data", "tests"], "tests"),
        (["--model", "no/such/model"], "no/such/model: no such folder"),
        (["--lr", "1e30"], "the loss is nan at step"),
        (["--max-length", "40"], "no conversation to train on"),  # less than the features of a picture
    ],
)
def test_mistakes(options, message, monkeypatch, data, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, data, tmp_path / "out", *options)
    assert message in f"{stop.value} {capsys.readouterr().err}"
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_saving_beside_the_source_by_another_name(tmp_path):
    source = Path(copytree(TINY, tmp_path / "source"))
    (tmp_path / "link").symlink_to(source)
    save_checkpoint(Llava.from_pretrained(source), source, tmp_path / "link", torch.float32)
    assert Llava.from_pretrained(source).dtype == torch.float32


def test_float16_scales_its_gradients_and_a_step_that_overflows_is_left_out():
    """On a model whose gradients are known: those of float32, scaled back, and nothing changed where they are too large."""
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer, scaler = torch.optim.SGD([weight], lr=0.5), GradientScaler(torch.float16)
    scaler.state[0] = 2.0**15

    def step(factor):
        (weight * factor * scaler.scale).sum().backward()
        train.update([weight], optimizer, scaler, Alone())

    step(0.25)
    assert weight.tolist() == [0.875, 1.875] and scaler.state.tolist() == [2.0**15, 1]
    step(math.inf)
    assert weight.tolist() == [0.875, 1.875] and scaler.state.tolist() == [2.0**14, 0]
    scaler.state[1] = scaler.PATIENCE - 1
    step(0.25)
    assert weight.tolist() == [0.75, 1.75] and scaler.state.tolist() == [2.0**15, 0]
    for dtype in (torch.float32, torch.bfloat16):
        assert GradientScaler(dtype).scale == 1 and GradientScaler(dtype).fits(torch.tensor(math.inf))


@pytest.mark.parametrize("options", [(), ("--lora", "4"), ("--stage", "1")])
def test_training_in_float16(options, monkeypatch, data, tmp_path):
    """Near float32's losses, killed and resumed bit by bit; the scale, which has changed by then, goes on too."""
    monkeypatch.setattr(GradientScaler, "PATIENCE", 2)
    run(monkeypatch, data, tmp_path / "float32", *options)
    run(monkeypatch, data, tmp_path / "whole", "--dtype", "float16", *options)
    with killed_run(monkeypatch, after=3) as patch:
        run(patch, data, tmp_path / "killed", "--dtype", "float16", "--save-every", "1e-9", *options)
    run(monkeypatch, data, tmp_path / "killed", "--dtype", "float16", *options)
    losses = {name: [line["loss"] for line in lines_of(tmp_path / name)] for name in ("float32", "whole", "killed")}
    assert losses["killed"] == losses["whole"] != losses["float32"]
    assert losses["whole"] == pytest.approx(losses["float32"], abs=0.02)
    whole, killed = (load_file(next((tmp_path / name).glob("*.safetensors"))) for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


def lines_of(out):
    return [json.loads(line) for line in losses_file(out).read_text().splitlines()]


def test_a_line_for_every_step(monkeypatch, data, tmp_path):
    """Also of a run that was killed: each step once."""
    with killed_run(monkeypatch, after=3) as patch:
        run(patch, data, tmp_path / "out", "--save-every", "1e-9")
    with open(losses_file(tmp_path / "out"), "a") as file:
        file.write('{"step": 4, "loss": 9, "lr": 0}\n{"step": 5, "lo')  # what a step that was not saved, and a kill, leave
    run(monkeypatch, data, tmp_path / "out", "--held-out", f"{data}/instruct.json")
    *steps, held_out = lines_of(tmp_path / "out")
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6] and all(0 <= line["loss"] < 1 for line in steps)
    assert [line["lr"] for line in steps] == [train.learning_rate(step, 6, 1e-3, 0.03) for step in range(6)]
    assert held_out.keys() == {"step", "held_out"} and held_out["held_out"].keys() == {"instruct.json"}


def many(folder, count=400):
    """Conversations enough for a run to be interrupted."""
    write(folder, 4, seed=5)
    records = json.loads((folder / "instruct.json").read_text())
    (folder / "instruct.json").write_text(json.dumps(records * (count // 4)))
    return f"train.py --stage 2 --model {TINY} --data {folder}/instruct.json --images {folder} --out {folder}/out --batch-size 2".split()


def interrupted(command):
    """(exit status, standard error) of a command that gets SIGINT, as by Ctrl-C, when it has done two steps."""
    out = Path(command[command.index("--out") + 1])
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True
    ) as process:
        while not (losses_file(out).exists() and losses_file(out).read_text().count("\n") >= 2):
            time.sleep(0.05)
            assert process.poll() is None, process.stderr.read()
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them, those that read pictures too
        said = process.communicate(timeout=60)[1]
    return process.returncode, said


@pytest.mark.parametrize("options", [(), ("--workers", "1"), ("--lora", "2", "--dtype", "float16")])
def test_ctrl_c_saves_the_step_under_way_and_the_same_command_goes_on(options, monkeypatch, tmp_path, capsys):
    command = [*many(tmp_path), *options]
    status, said = interrupted([sys.executable, *command])
    (line,) = re.findall(r"^train\.py: stopped after step (\d+) of 200; the same command goes on from there$", said, re.MULTILINE)
    assert status == 130 and "Traceback" not in said
    assert [state.name for state in (tmp_path / "out" / "training-state").glob("[0-9]*")] == [line]

    class Begun(Exception):
        pass

    def begin(*arguments):
        raise Begun

    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(train, "forward_backward", begin)
    with pytest.raises(Begun):
        train.main()
    assert f"going on from step {line}" in capsys.readouterr().err


def test_ctrl_c_before_the_first_step_is_one_line(monkeypatch, data, tmp_path, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "load_model", interrupt)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, data, tmp_path)
    assert stop.value.code == 130 and capsys.readouterr().err == "\ntrain.py: stopped; nothing new is saved\n"


def test_a_second_ctrl_c_ends_a_single_process_at_once():
    with pytest.raises(KeyboardInterrupt), Interrupts(1) as one:
        one.ask()
        one.ask()
    with Interrupts(2) as several:  # each hears it from the terminal and from torchrun
        several.ask()
        several.ask()
        assert several.asked


WITHOUT_DISTRIBUTED = """
import importlib.abc, sys
class Without(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch.distributed":
            import torch._C
            for attribute in ("_c10d_init", "_rpc_init", "_dist_autograd_init", "_faulty_agent_init"):
                if hasattr(torch._C, attribute):
                    delattr(torch._C, attribute)
        if name.startswith("torch._C._distributed"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Without())
"""


def test_a_pytorch_without_torch_distributed_answers_and_trains(data, tmp_path):
    """As AMD's for Windows is built. What such a build lacks is taken away; a run is stopped, and goes on."""
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_DISTRIBUTED)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}

    def ask(*command):
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert ask("-c", "import torch; print(torch.distributed.is_available())") == "False\n"
    assert ask("sample.py", "How many things are there?") == "Four.\n"
    command = f"train.py --stage 2 --model {TINY} --data {data}/instruct.json --images {data} --out {tmp_path}/out --batch-size 2".split()
    ask(*command, "--save-every", "1e-9", "--lora", "2", "--dtype", "bfloat16")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_many_conversations_are_encoded_by_several_processes_as_by_one(tmp_path, monkeypatch, capsys):
    """In their order, and what is left out is counted."""
    records = [{**record(f"How many? {n}", "Four."), "image": None} for n in range(40)]
    records[7], records[21] = {"conversations": 3}, {**records[21], "conversations": []}
    (tmp_path / "data.json").write_text(json.dumps(records))
    one = encoded(tmp_path / "data.json", tmp_path, tmp_path / "one")
    first = capsys.readouterr().err
    monkeypatch.setattr(training_data, "BLOCK", 3)
    tokenizer = Tokenizer.from_pretrained(TINY)
    encoder = Encoder(partial(training_data.encode_conversation, tokenizer=tokenizer, style="llava"), tokenizer.image_id, 200, 64)
    several = conversations(tmp_path / "data.json", tmp_path, encoder, {}, tmp_path / "several", Alone())
    assert len(one) == len(several) == 38 and all(one[n] == several[n] for n in range(38))
    assert capsys.readouterr().err == first and "record 8: " in first and "record 22 (x): " in first


def test_the_plain_format_is_picture_caption_and_newline():
    """As LLaVA's first stage: no question, no end mark; caption and newline are learnt."""
    tokenizer, said = Tokenizer.from_pretrained(TINY), record("<image>\nDescribe the picture.", "A large red star.")
    ids, labels = training_data.encode_caption(said, tokenizer)
    caption = tokenizer.encode("A large red star.\n")[1:]
    assert tokenizer.model.id_to_piece(caption[-1]) == "<0x0A>" and tokenizer.model.id_to_piece(caption[0]).startswith("▁")
    assert ids == [tokenizer.bos_id, tokenizer.image_id, *caption]
    assert labels == [IGNORED, IGNORED, *caption]
    for bad in (record("<image>\nA?", "B.", "C?", "D."), record("<image>\nWhat?", "A </s>.")):
        with pytest.raises(ValueError):
            training_data.encode_caption(bad, tokenizer)


def test_a_system_sentence_of_ones_own():
    tokenizer, said = Tokenizer.from_pretrained(TINY), record("How many?", "Two.")
    ids, labels = training_data.encode_conversation(said, tokenizer, "bakllava", "Be short.")
    assert ids == tokenizer.encode("Be short. USER: How many?\nASSISTANT: Two.</s>")
    assert [label for label in labels if label != IGNORED] == tokenizer.encode("Two.</s>")[1:]


def test_the_format_is_an_option(monkeypatch, data, tmp_path):
    """What the run has encoded is what its options say."""
    tokenizer, described = Tokenizer.from_pretrained(TINY), tmp_path / "align.json"
    described.write_text(json.dumps(json.loads((data / "align.json").read_text()) * 4))
    for name, options, begins in (
        ("style", ("--style", "bakllava", "--system", "Be short."), "Be short. USER: "),
        ("plain", ("--stage", "1", "--format", "plain", "--data", str(described)), ""),
    ):
        with killed_run(monkeypatch) as patch:
            run(patch, data, tmp_path / name, "--save-every", "1e-9", *options)
        (folder,) = (tmp_path / name / "training-state").glob("encoded-*")
        ids, _, _ = training_data.Conversations(folder, data)[0]
        text = tokenizer.decode(ids)
        assert text.startswith(begins) and ("\nASSISTANT: " in text) == (name == "style") and text.endswith("\n") == (name == "plain")


def test_a_learning_rate_of_the_projectors_own(monkeypatch, data, tmp_path):
    """One so small that it stays, while the rest learns."""
    run(monkeypatch, data, tmp_path / "out", "--projector-lr", "1e-30")
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (TINY, tmp_path / "out"))
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"language_model"}


def test_dropout_is_drawn_in_training_alone_and_again_when_a_run_goes_on(monkeypatch, data, tmp_path):
    def losses(name):
        return [line.get("loss") or line["held_out"] for line in lines_of(tmp_path / name)]

    options = ("--lora", "4", "--lora-dropout", "0.5", "--lr", "5e-2")
    run(monkeypatch, data, tmp_path / "plain", "--lora", "4", "--lr", "5e-2", "--held-out", f"{data}/instruct.json")
    run(monkeypatch, data, tmp_path / "dropped", *options, "--held-out", f"{data}/instruct.json")
    with killed_run(monkeypatch, after=3) as patch:
        run(patch, data, tmp_path / "killed", "--save-every", "1e-9", *options)
    run(monkeypatch, data, tmp_path / "killed", *options, "--held-out", f"{data}/instruct.json")
    assert losses("killed") == losses("dropped")
    assert losses("dropped")[0] == losses("plain")[0] and losses("dropped")[1:] != losses("plain")[1:]  # B begins as 0
    assert json.loads((tmp_path / "dropped" / "adapter_config.json").read_text())["lora_dropout"] == 0.5

    model = Llava.from_pretrained(TINY, dtype=torch.float32)
    add_adapter(model, 4, 8, dropout=0.5)
    for layer in adapted(model).values():
        torch.nn.init.normal_(layer.lora_B.weight)
    rows = encoded(data / "instruct.json", data, tmp_path / "state", max_length=512)
    tokenizer, processor = Tokenizer.from_pretrained(TINY), ImageProcessor.from_pretrained(TINY)
    batches = [collate([rows[n]], processor, tokenizer.image_id, tokenizer.pad_id, 64, False) for n in range(3)]
    model.train()
    assert len({train.held_out_loss(model, batches, nullcontext(), Alone()) for _ in range(3)}) == 1 and model.training


@pytest.mark.parametrize("options, name", [((), "model.safetensors"), (("--lora", "4"), "adapter_model.safetensors")])
def test_a_checkpoint_every_so_many_steps(options, name, monkeypatch, data, tmp_path):
    """Each whole; the one of the last step is the result; and they change nothing."""
    run(monkeypatch, data, tmp_path / "plain", *options)
    run(monkeypatch, data, tmp_path / "out", "--checkpoint-every", "3", *options)
    assert {file.name for file in (tmp_path / "out").glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}
    plain, out, third, sixth = (load_file(tmp_path / folder / name) for folder in ("plain", "out", "out/checkpoint-3", "out/checkpoint-6"))
    assert all(torch.equal(plain[n], out[n]) and torch.equal(out[n], sixth[n]) for n in plain)
    assert any(not torch.equal(out[n], third[n]) for n in plain)
    if not options:
        Llava.from_pretrained(tmp_path / "out" / "checkpoint-3")


def test_the_projector_alone(monkeypatch, data, tmp_path):
    """Stage 1 writes nothing else, also where it was killed in between; stage 2 goes on from it as from the whole checkpoint; and
    convert.py puts it into the base, which gives that checkpoint."""
    run(monkeypatch, data, tmp_path / "whole", stage=1)
    with killed_run(monkeypatch, after=3) as patch:
        run(patch, data, tmp_path / "alone", "--save-projector", "--save-every", "1e-9", stage=1)
    run(monkeypatch, data, tmp_path / "alone", "--save-projector", "--checkpoint-every", "5", stage=1)
    assert {path.name for path in (tmp_path / "alone").iterdir()} == {"mm_projector.bin", "checkpoint-5"}
    assert [path.name for path in (tmp_path / "alone" / "checkpoint-5").iterdir()] == ["mm_projector.bin"]
    with pytest.raises(SystemExit, match="holds a finished result"):
        run(monkeypatch, data, tmp_path / "alone", "--save-projector", stage=1)

    with torch.no_grad():
        convert.convert(tmp_path / "alone", tmp_path / "joined", base=TINY)
    whole, joined = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "joined"))
    assert whole.keys() == joined.keys() and all(torch.equal(whole[name], joined[name]) for name in whole)

    run(monkeypatch, data, tmp_path / "from-whole", model=tmp_path / "whole")
    run(monkeypatch, data, tmp_path / "from-folder", "--projector", str(tmp_path / "alone"))
    run(monkeypatch, data, tmp_path / "from-file", "--projector", str(tmp_path / "alone" / "mm_projector.bin"))
    wanted, *found = (load_file(tmp_path / name / "model.safetensors") for name in ("from-whole", "from-folder", "from-file"))
    assert all(torch.equal(wanted[name], tensors[name]) for tensors in found for name in wanted)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ("width", r"mm_projector.bin is the projector of another model: linear_1.weight is \(192, 20\) in it, and \(192, 128\) in this"),
        ("vip", r"projector_layernorm.weight is \(5,\) in it, and absent in this one"),
        ("lacks", r"linear_2.bias is absent in it, and \(192,\) in this one"),
        ("other", "holds lm_head.weight; expected a projector"),
        ("text", "mm_projector.bin holds more than weights|mm_projector.bin is damaged"),
        ("nothing", "No such file.*mm_projector.bin"),
    ],
)
def test_a_projector_that_does_not_fit(wrong, message, monkeypatch, data, tmp_path):
    shapes = {"0.weight": (192, 128), "0.bias": (192,), "2.weight": (192, 192), "2.bias": (192,)}
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    if wrong == "width":
        tensors["0.weight"] = torch.zeros(192, 20)
    elif wrong == "vip":
        tensors["clip_layernorm.weight"] = torch.zeros(5)
    elif wrong == "lacks":
        del tensors["2.bias"]
    tensors = {f"model.mm_projector.{name}": tensor for name, tensor in tensors.items()}
    if wrong == "other":
        tensors["lm_head.weight"] = torch.zeros(5)
    if wrong != "nothing":
        torch.save(tensors, tmp_path / "mm_projector.bin")
    if wrong == "text":
        (tmp_path / "mm_projector.bin").write_bytes(b"none")
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, data, tmp_path / "out", "--projector", str(tmp_path))
    assert not (tmp_path / "out" / "training-state").exists()


def test_a_projector_that_the_authors_do_not_have_is_refused_before_anything_is_learnt(monkeypatch, data, tmp_path):
    def with_another(*args, load=Llava.from_pretrained, **options):
        model = load(*args, **options)
        model.projector.linear_3 = torch.nn.Linear(2, 2)
        return model

    monkeypatch.setattr(Llava, "from_pretrained", with_another)
    with pytest.raises(SystemExit, match="mm_projector.bin has no place for a projector's linear_3.weight"):
        run(monkeypatch, data, tmp_path / "out", "--save-projector", stage=1)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--save-projector"], "--save-projector is for stage 1"),
        (["--format", "plain"], "--format plain is for stage 1"),
        (["--stage", "1", "--format", "plain", "--style", "vip"], "the plain format has neither"),
        (["--stage", "1", "--projector-lr", "1"], "--projector-lr is for stage 2"),
        (["--lora-dropout", "0.1"], "--lora-dropout is for an adapter"),
        (["--lora", "4", "--lora-dropout", "1"], "LoRA has lora_dropout 1.0"),
    ],
)
def test_options_that_contradict_each_other(options, message, monkeypatch, data, tmp_path):
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, data, tmp_path / "out", *options)


def test_the_curve_of_a_run(monkeypatch, data, tmp_path, capsys):
    """As a picture, and the held-out losses in it; without matplotlib one line says what to install."""
    file = tmp_path / "out.losses.jsonl"
    lines = [{"step": step, "loss": 1 / step, "lr": 1e-3} for step in range(1, 200)]
    file.write_text("\n".join(json.dumps(line) for line in [*lines, {"step": 199, "held_out": {"a.json": 0.5}}]))
    steps, losses, held_out = curve.read(file)
    assert steps == [*range(1, 200)] and losses[0] == 1 and held_out == {"a.json": [(199, 0.5)]}
    assert curve.smooth([1.0] * 50) == pytest.approx([1.0] * 50) and curve.smooth([0.0] * 9 + [1.0])[-1] < 0.2
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        patch.setattr(sys, "argv", ["curve", str(file)])
        with pytest.raises(SystemExit, match="pip install matplotlib"):
            curve.main()
    if find_spec("matplotlib"):
        monkeypatch.setattr(sys, "argv", ["curve", str(file), "--out", str(tmp_path / "curve.png")])
        curve.main()
        assert Image.open(tmp_path / "curve.png").width > 500
    for content in ("", "[]", "no JSON"):
        file.write_text(content)
        with pytest.raises(ValueError, match="out.losses.jsonl"):
            curve.read(file)
