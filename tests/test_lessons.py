"""The lessons show what the model does, and the exercises are the model's own functions."""

import base64
import inspect
import json
import re
import subprocess
import sys
from importlib import import_module

import pytest
import torch

from images import open_image
from lessons.exercises.__main__ import EXERCISES, place_of
from lessons.explain import as_seen, page
from lessons.trace import splice_map, trace
from tokenizer import STYLES, expand_images

PICTURE = "tiny/example.png"


# The trace


def test_the_trace_goes_from_the_picture_to_the_first_word(chat):
    rows = {name: (shape, kind) for name, shape, kind, _, _ in trace(chat, "How many things are there?", [open_image(PICTURE)])}
    assert rows["pixels"] == ("(1, 3, 112, 112)", "float32") and rows["patches"][0] == "(1, 64, 128)"
    assert rows["CLIP states 4"][0] == "(1, 65, 128)" and "CLIP states 5" not in rows  # layer −2 is read, the last not run
    assert rows["image features"][0] == "(1, 64, 192)" and rows["logits"][0] == "(1, 512)"
    first = next(chat.ask("How many things are there?", [open_image(PICTURE)]))
    assert list(rows)[-1] == "first token" and int(rows["first token"][0]) == chat.tokenizer.encode("ASSISTANT: " + first)[-1]
    assert not chat.model.language_model._forward_hooks and not chat.model.vision_tower.layers[0]._forward_hooks


def test_the_splice_map_covers_every_position_once(chat):
    picture = open_image(PICTURE)
    rows = splice_map(chat, "Which?", [picture, picture])
    ids = expand_images(chat.tokenizer.encode(chat.prompt("Which?", [picture, picture])), chat.model.config.image_id, 64)
    assert [position for first, last, _ in rows for position in range(first, last + 1)] == list(range(len(ids)))
    for first, _, text in rows:
        assert text.startswith("picture") == (ids[first] == chat.model.config.image_id), (first, text)
    assert sum("patches of row" in text for *_, text in rows) == 16 and rows[0][2] == "1 '<s>'"


@pytest.mark.parametrize("arguments, words", [(["Hi."], "first token"), (["--model", "tiny/llava", "Hi."], "first token")])
def test_the_trace_as_a_command(arguments, words):
    done = subprocess.run([sys.executable, "-m", "lessons.trace", *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and words in done.stdout and "Traceback" not in done.stderr


@pytest.mark.parametrize("lesson", ["trace", "explain"])
def test_a_mistake_is_one_line(lesson, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", f"lessons.{lesson}", "--image", tmp_path / "no.png"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and done.stderr.startswith(f"{lesson}.py: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "lesson, arguments, words",
    [
        ("trace", ["--chat"], "--chat"),
        ("explain", ["--chat"], "--chat"),
        ("explain", ["--cells", "0"], "--cells is 0; expected at least 1"),
    ],
)
def test_what_a_lesson_cannot_show_is_refused(lesson, arguments, words):
    done = subprocess.run([sys.executable, "-m", f"lessons.{lesson}", *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and words in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


# The page


def data_of(text):
    (found,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)
    return json.loads(found)


def test_the_page_holds_what_the_model_read_and_what_mattered(chat):
    question, picture = "Where is the ring?", open_image(PICTURE)
    text = page(chat, question, [picture], cells=4, max_new_tokens=20)
    data = data_of(text)
    answer = "".join(chat.ask(question, [picture], max_new_tokens=20))
    assert "".join(data["answer"]).strip() == answer + "(end)"
    layers, count, width = chat.model.config.text.num_hidden_layers, len(data["answer"]), data["positions"]
    assert len(data["attention"]) == layers and width == data["length"] + count
    for layer in data["attention"]:
        weights = torch.tensor(list(base64.b64decode(layer["bytes"]))).view(count, width) / 255 * torch.tensor(layer["scale"])[:, None]
        assert (weights.sum(1) - 1).abs().max() < 0.1  # in steps of 1/255 of the largest
        assert weights[0, data["length"] :].sum() == 0  # nothing of the answer was there for its first word
    assert all(0.5 < p <= 1 for p in data["probability"])
    falls = torch.tensor(data["occlusion"])
    assert falls.shape == (count, 16) and falls.max() > 0.1


def test_the_page_is_one_file_and_its_data_cannot_end_it(chat):
    text = page(chat, "Is there a </script> <b>ring</b>?", [], cells=2, max_new_tokens=4)
    assert text.count("</script>") == 2 and not re.search(r"(src|href)\s*=\s*[\"']?http", text)
    assert "".join(word for word, _ in data_of(text)["prompt"]).endswith("<b>ring</b>? ASSISTANT:")


def test_the_page_ends_where_the_answer_ends(chat, monkeypatch):
    monkeypatch.setitem(STYLES["llava"], "end", "bottom")  # plain text, as ViP's "###" is
    data = data_of(page(chat, "Where is the ring?", [open_image(PICTURE)], cells=1, max_new_tokens=20))
    assert "".join(data["answer"]).strip() == "At the bottom"


def test_the_picture_of_the_page_is_the_one_that_the_model_sees(chat):
    picture = open_image(PICTURE)
    assert as_seen(chat.processor, chat.processor([picture])).tobytes() == picture.convert("RGB").tobytes()  # 112×112 stays as it is


# The exercises


@pytest.mark.parametrize("number", EXERCISES)
def test_a_stub_and_its_solution_have_the_shape_of_the_real_function(number):
    file, places, _ = EXERCISES[number]
    for name, place in places.items():
        owner, attribute = place_of(place)
        for folder in ("", "solutions."):
            written = getattr(import_module(f"lessons.exercises.{folder}{file}"), name)
            assert list(inspect.signature(written).parameters) == list(inspect.signature(getattr(owner, attribute)).parameters)
        stub = getattr(import_module(f"lessons.exercises.{file}"), name)
        with pytest.raises(NotImplementedError, match=f"exercise {number}"):
            stub(*[None] * len(inspect.signature(stub).parameters))


@pytest.mark.parametrize("number", EXERCISES)
def test_a_solution_passes(number):
    done = subprocess.run(
        [sys.executable, "-m", "lessons.exercises", str(number), "--solution"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stdout.endswith(f"Exercise {number}: right.\n"), done.stdout


def test_a_stub_does_not_pass():
    done = subprocess.run([sys.executable, "-m", "lessons.exercises", "1"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stdout.endswith("Exercise 1: not yet; what failed stands above.\n")
