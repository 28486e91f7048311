"""The lessons show what the model does, and the exercises are the model's own functions."""

import base64
import inspect
import json
import re
import subprocess
import sys
from dataclasses import replace
from importlib import import_module

import pytest
import torch

import explanation
from chat import Chat
from explanation import as_seen, page, spelling
from images import open_image
from lessons.exercises import HINTS, check, hint
from lessons.exercises.__main__ import EXERCISES, NUMBA, place_of
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
    patches = [text for *_, text in rows if "patches of row" in text]
    assert patches[0] == "picture 1, patches of row 1, columns 1 to 8" and patches[7] == "picture 1, patches of row 8, columns 1 to 8"
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
    falls = torch.tensor(data["of_picture"]["occlusion"])
    assert falls.shape == (count, 16) and falls.max() > 0.1


@torch.no_grad()
def test_the_page_holds_every_head_and_the_logit_lens(chat, monkeypatch):
    question, picture, model = "Where is the ring?", open_image(PICTURE), chat.model
    monkeypatch.setattr(explanation, "THUMBNAIL", 4)  # as in a picture of many patches: each cell is the mean of 2 × 2
    seen = data_of(page(chat, question, [picture], cells=1, max_new_tokens=20))["of_picture"]
    prompt, answer = explanation.answer_ids(chat, question, [picture])
    out = model(torch.tensor([prompt + answer]), chat.processor([picture]), output_hidden_states=True, output_attentions=True)
    maps = torch.stack(out.attentions)[:, 0, :, len(prompt) - 1 : -1]  # (layers, heads, answer, positions)
    patches = maps[..., seen["first"] : seen["first"] + 64].unflatten(-1, (4, 2, 4, 2)).mean((-3, -1)).flatten(0, 2)
    found = torch.tensor(list(base64.b64decode(seen["heads"]["bytes"]))).view(-1, 4, 4) / 255
    assert (found * torch.tensor(seen["heads"]["scale"])[:, None, None] - patches).abs().max() < 0.002
    assert torch.allclose(torch.tensor(seen["on_first"]), maps[..., 0], atol=6e-4)
    assert torch.allclose(torch.tensor(seen["on_picture"]), maps[..., seen["first"] : seen["first"] + 64].sum(-1), atol=6e-4)
    assert [len(words) for words in seen["lens"]] == [64] * 4
    for words, states in ((seen["lens"][1], model.language_model.norm(out.hidden_states[2])), (seen["lens"][3], out.hidden_states[4])):
        tokens = model.language_model.lm_head(states[0, seen["first"] : seen["first"] + 64]).argmax(-1)
        assert words == [spelling(chat.tokenizer, int(token)).strip() or "␣" for token in tokens]
    assert max(map(max, seen["lens_probability"])) <= 1


def test_the_page_is_one_file_and_its_data_cannot_end_it(chat):
    text = page(chat, "Is there a </script> <b>ring</b>?", [], cells=2, max_new_tokens=4)
    assert text.count("</script>") == 2 and not re.search(r"(src|href)\s*=\s*[\"']?http", text)
    assert "".join(word for word, _ in data_of(text)["prompt"]).endswith("<b>ring</b>? ASSISTANT:")


def test_the_page_of_a_later_turn_holds_the_conversation(chat):
    """The answer that was given is looked at, after the turns before it and with the pictures of all of them."""
    list(chat.ask("How many things are there?", [open_image("tiny/example.png")]))
    asked = Chat(chat.model, chat.tokenizer, chat.processor)
    asked.messages, asked.images = list(chat.messages), list(chat.images)
    list(chat.ask("Where is the ring?"))
    data = data_of(explanation.page(asked, "Where is the ring?", [], cells=2, answer=chat.answer_ids))
    assert "How many" in "".join(word for word, _ in data["prompt"]) and data["of_picture"]
    assert len(data["answer"]) == chat.tokens and min(data["probability"]) > 0.3


def test_the_page_ends_where_the_answer_ends(chat, monkeypatch):
    monkeypatch.setitem(STYLES, "llava", replace(STYLES["llava"], end="bottom"))  # plain text, as ViP's "###" is
    data = data_of(page(chat, "Where is the ring?", [open_image(PICTURE)], cells=1, max_new_tokens=20))
    assert "".join(data["answer"]).strip() == "At the bottom"


def test_the_picture_of_the_page_is_the_one_that_the_model_sees(chat):
    picture = open_image(PICTURE)
    assert as_seen(chat.processor, chat.processor([picture])).tobytes() == picture.convert("RGB").tobytes()  # 112×112 stays as it is


# The exercises


@pytest.mark.parametrize("number", EXERCISES)
def test_a_stub_and_its_solution_have_the_shape_of_the_real_function(number):
    if number in NUMBA:
        pytest.importorskip("numba")
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
    if number in NUMBA:
        pytest.importorskip("numba")
    done = subprocess.run(
        [sys.executable, "-m", "lessons.exercises", str(number), "--solution"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stdout.endswith(f"Exercise {number}: right.\n"), done.stdout


def test_a_stub_does_not_pass():
    done = subprocess.run([sys.executable, "-m", "lessons.exercises", "1"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stdout.endswith("Exercise 1: not yet; what failed stands above.\n")


def test_an_exercise_that_needs_numba_says_so():
    run = "runpy.run_module('lessons.exercises', run_name='__main__')"
    code = f"import sys, runpy; sys.modules['numba'] = None; sys.argv = ['', '13']; {run}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr == "Exercise 13 needs numba: pip install numba\n"


def test_every_exercise_has_hints(capsys):
    assert [*HINTS] == [*EXERCISES] and all(len(hints) > 1 for hints in HINTS.values())
    hint(9, 2)
    assert capsys.readouterr().out == f"Exercise 9, hint 2 of {len(HINTS[9])}: {HINTS[9][1]}\n"
    with pytest.raises(ValueError, match="there is no exercise 14; expected 1 to 13"):
        hint(14)
    with pytest.raises(ValueError, match=f"exercise 9 has hints 1 to {len(HINTS[9])}, not 0"):
        hint(9, 0)


@pytest.mark.parametrize("which, status, words", [("1", 0, "Exercise 2, hint 1 of"), ("7", 2, "exercise 2 has hints 1 to")])
def test_a_hint_on_request(which, status, words):
    done = subprocess.run([sys.executable, "-m", "lessons.exercises", "2", "--hint", which], capture_output=True, text=True, timeout=120)
    assert done.returncode == status and words in done.stdout + done.stderr and "Traceback" not in done.stderr


def test_a_check_from_a_notebook(capsys):
    check(2)
    assert "exercise 2: write the projector" in (said := capsys.readouterr().out) and said.endswith("what failed stands above.\n")
    check(2, solution=True)
    assert capsys.readouterr().out == "Exercise 2: right.\n"
