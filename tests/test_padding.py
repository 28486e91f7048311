"""Pictures are padded or cropped as the checkpoint was trained, unless somebody says otherwise: in Chat, in the commands, in training."""

import json
import sys
from shutil import copytree

import pytest

import evaluate
import sample
import train
from chat import Chat
from demo import Demo
from images import ImageProcessor
from tiny.world import write

PAD = {"image_aspect_ratio": "pad"}
OPTIONS = [((), None), (("--pad",), True), (("--no-pad",), False)]


@pytest.fixture(params=[PAD, {"image_aspect_ratio": "square"}, {}], ids=str)
def folder(request, tmp_path):
    """The bundled model, with something about padding in its config.json, or nothing."""
    copytree("tiny/llava", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | request.param))
    return tmp_path / "model"


def says(folder):
    return json.loads((folder / "config.json").read_text()).get("image_aspect_ratio") == "pad"


def test_a_chat(folder):
    assert Chat.from_pretrained(folder).pad is says(folder)


@pytest.mark.parametrize("options, wanted", OPTIONS)
def test_the_commands(folder, options, wanted):
    wanted = says(folder) if wanted is None else wanted
    args = sample.argument_parser("", "").parse_args(["--model", str(folder), "--device", "cpu", *options])
    assert sample.load(args, 0).pad is wanted
    files = ["--questions", "q.jsonl", "--answers", "a.jsonl"]
    args = evaluate.argument_parser().parse_args(["--model", str(folder), "--device", "cpu", *files, *options])
    assert evaluate.load(args).pad is wanted


def test_the_page(folder):
    chat = Chat.from_pretrained(folder)
    page = Demo(chat, "a model")._page
    assert f'"pad": {"true" if says(folder) else "false"}' in page and "elements.pad.checked = CONFIG.pad" in page


@pytest.mark.parametrize("options, wanted", OPTIONS)
def test_training(folder, options, wanted, tmp_path, monkeypatch):
    """Pads as the checkpoint says, and its result says what was done."""
    wanted, padded = says(folder) if wanted is None else wanted, set()
    process = ImageProcessor.__call__
    write(tmp_path, 2, seed=5)
    monkeypatch.setattr(ImageProcessor, "__call__", lambda self, images, pad: padded.add(pad) or process(self, images, pad=pad))
    command = f"train.py --stage 1 --model {folder} --data {tmp_path}/instruct.json --images {tmp_path} --out {tmp_path}/out --device cpu"
    monkeypatch.setattr(sys, "argv", [*command.split(), *options])
    train.main()
    assert padded == {wanted} and Chat.from_pretrained(tmp_path / "out").pad is wanted
