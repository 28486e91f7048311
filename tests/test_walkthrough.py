"""The notebook is whole and says what is so. Whether it runs, and gives what is stored in it, is `make notebook`'s to say."""

import json
import re
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from lessons.exercises.__main__ import EXERCISES
from lessons.figures import (
    words_of_bars,
    words_of_lines,
    words_of_pages,
    words_of_panels,
    words_of_slots,
    words_of_strip,
)
from lessons.pointing import RECORD, WAYS, games, occlusion, pointed, shares, shuffle
from lessons.run_notebook import NOTEBOOK, close, differences, main, output_of

CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
TEXT = "\n\n".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")


def test_a_paragraph_before_each_cell_and_no_cell_longer_than_twenty_lines():
    for before, cell in zip(CELLS, CELLS[1:]):
        assert cell["cell_type"] == "markdown" or before["cell_type"] == "markdown", "".join(cell["source"])
    for cell in CODE:
        assert len("".join(cell["source"]).splitlines()) <= 20, "".join(cell["source"])


def test_it_is_stored_as_it_ran_from_top_to_bottom():
    assert [cell["execution_count"] for cell in CODE] == [*range(1, len(CODE) + 1)]
    assert not any(output["output_type"] == "error" or output.get("name") == "stderr" for cell in CODE for output in cell["outputs"])
    assert sum(output_of(cell)[1] for cell in CODE) >= 18
    assert NOTEBOOK.stat().st_size < 2.5e6


def test_each_figure_has_its_words_for_those_who_cannot_see_it():
    shown = [output for cell in CODE for output in cell["outputs"] if "image/png" in output.get("data", {})]
    words = [output["metadata"].get("image/png", {}).get("alt", "") for output in shown]
    assert len(words) >= 18 and all(len(text) > 60 for text in words), words
    calls = re.compile(r'(?m)^(?:panels|bars|lines|slots|strip).*"([^"]{15,})"')
    titles = [title for cell in CODE for title in calls.findall("".join(cell["source"]))]
    assert len(titles) >= 8 and all(any(title in text for text in words) for title in titles), titles
    assert all("".join(output["data"]["text/plain"]) == text for output, text in zip(shown, words))


def test_figures_in_words():
    heat = torch.tensor([[0.0, 1.0], [0.0, 0.5]])
    assert words_of_panels([heat, object()], ["heat", "a\npicture"]) == "heat, brightest in row 1, column 2; a picture"
    assert words_of_pages([[["a", "b"], ["c", "d"]]], ["page"]) == "page: row 1: a b; row 2: c d"
    legend = {"blue": "word", "red": "patch"}
    said = words_of_strip(["blue", "blue", "red"], ["Is", "it", ""], [0, 1, 9], legend)
    assert said == "positions 0 to 1, word: Is it; positions 9 to 9, patch"
    assert words_of_slots([("prefill", [["pad", ("Is", 0), None]])]) == "prefill, row 1: pad, Is at 0, free"
    assert words_of_bars({"chart": {"red": 0.75, "blue": 0.25}}) == "chart: red 75 %, blue 25 %"
    assert words_of_lines({"loss": [4.0, 1.0, 2.0]}) == "loss: from 4 to 2 in 3 points, lowest 1, highest 4"


def test_the_teachers_table_names_sections_and_the_text_counts_from_1():
    assert "| sections |" in TEXT.split("### For the teacher")[1][:40] and "| cells |" not in TEXT
    assert not re.search(r"row 0|column 0", TEXT)


def test_it_holds_no_private_name_and_no_path_of_a_machine():
    assert not [name for cell in CODE for name in re.findall(r"\b_\w+|\w+\._\w+", "".join(cell["source"]))]
    assert not [path for cell in CODE for path in re.findall(r"(?<![\w.])/(?:home|root|tmp|usr|work)\b\S*", output_of(cell)[0])]


def test_the_tests_and_mistakes_that_it_names_are_there():
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`(?: \(`(\w+)`\))?", TEXT)
    assert len(named) == 7
    for file, test, mistake in named:
        source = Path(file).read_text(encoding="utf-8")
        assert f"def {test}(" in source and (not mistake or f"def {mistake}(" in source), (file, test, mistake)


def test_the_teachers_page_names_every_exercise_and_no_section_that_is_not_there():
    page, sections = TEXT.split("\n## 0.")[0], {int(n) for n in re.findall(r"^## (\d+)\.", TEXT, re.M)}
    table = [line.strip("|").split("|") for line in page.splitlines() if re.match(r"\| \d", line)]
    assert sections == {*range(max(sections) + 1)}
    exercises = [int(n) for _, left, _, _, right in table for n in re.findall(r"\d+", left + right)]
    assert sorted(exercises) == [*EXERCISES]
    assert {int(n) for left, _, _, right, _ in table for n in re.findall(r"\d+", left + right)} <= sections


# Its comparison with what is stored


@pytest.mark.parametrize(
    "stored, new, tolerance, same",
    [
        ("loss 0.50, 3 right", "loss 0.503, 3 right", 0.02, True),
        ("loss 0.50, 3 right", "loss 0.60, 3 right", 0.02, False),
        ("loss 0.50, 3 right", "loss 0.60, 3 right", 0.5, True),
        ("24 of 24 right", "22 of 24 right", 0.02, False),
        ("At the bottom.", "At the top.", 5, False),
        ("in 12 ms", "in 900 ms", 2, True),
        ("a  b\n", "a b", 0.02, True),
        ("one 1", "one 1 2", 5, False),
        ("loss 0.0001", "loss 0.0012", 0.02, True),  # both are nothing
    ],
)
def test_words_are_equal_and_numbers_are_close(stored, new, tolerance, same):
    assert close(stored, new, tolerance) == same


def test_a_changed_cell_is_found():
    def cell(text, figures=0, **metadata):
        outputs = [{"output_type": "stream", "text": [text]}]
        outputs += [{"output_type": "display_data", "data": {"image/png": "…", "text/plain": "<Figure size 3x4>"}}] * figures
        return {"cell_type": "code", "metadata": metadata, "outputs": outputs}

    assert output_of(cell("2 words", 1)) == ("2 words", 1)
    assert not differences([cell("a 1", 1), {"cell_type": "markdown"}], [cell("a 1.001", 1), {"cell_type": "markdown"}])
    (found,) = differences([cell("a 1"), cell("b")], [cell("a 1"), cell("c")])
    assert "cell 2 is stored with\nb\nand now gives\nc" == found
    assert differences([cell("a", 2)], [cell("a", 1)]) == ["cell 1 is stored with 2 figures and now gives 1"]
    assert not differences([cell("a 1", tolerance=0.5)], [cell("a 1.4")])


def test_without_jupyter_it_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "nbformat", None)
    monkeypatch.setattr(sys, "argv", ["run_notebook.py"])
    with pytest.raises(SystemExit, match="lessons/requirements.txt"):
        main()


# The pointing game


def test_boxes_are_where_the_things_are():
    for picture, question, _, boxes in games(8, 3, 8):
        assert question.startswith("What colour is the ") and len(boxes) > 1 and boxes.any(1).all()
        assert not (boxes.int().sum(0) > 1).any()  # things lie apart
        ground = picture.getpixel((0, 0))
        for patch in range(64):
            box = tuple(14 * n for n in (patch % 8, patch // 8, patch % 8 + 1, patch // 8 + 1))
            empty = {pixel for _, pixel in picture.crop(box).getcolors()} == {ground}
            assert not (empty and boxes[:, patch].any())


def test_the_record_is_that_of_its_patches_and_of_the_model(chat):
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    boxes = [box for *_, box in games(record["count"], 0, 8)]
    for name in ("trained", "shuffled"):
        assert [*record[name]["patches"]] == [*WAYS]
        for way, pair in shares(record[name]["patches"], boxes).items():
            assert pair == pytest.approx(record[name]["shares"][way]), (name, way)
    patches, _ = pointed(chat, 10, occlude=False)
    for way, chosen in patches.items():
        assert chosen == record["trained"]["patches"][way][:10]


def test_what_was_learnt_points_and_what_was_shuffled_does_not():
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    trained, shuffled = record["trained"]["shares"], record["shuffled"]["shares"]
    chance = trained["a thing at random"][0]
    for way in ("attention", "best head", "occlusion"):
        of_things = {name: asked / (asked + other) for name, (asked, other) in (("trained", trained[way]), ("shuffled", shuffled[way]))}
        assert of_things["trained"] > 0.9 and abs(of_things["shuffled"] - chance) < 0.1


def test_a_greyed_patch_is_greyed(chat):
    (picture, question, colour, boxes), *_ = games(1, 0, 8)
    pixels, ids = chat.processor([picture]), torch.tensor([chat.tokenizer.encode(chat.prompt(question, [picture]))])
    answer = chat.tokenizer.encode(colour.capitalize())[1:]
    falls = occlusion(chat, ids, pixels, answer)
    greyed = pixels.clone()
    greyed[0, :, 0:28, 0:28] = 0  # the first patch's neighbours above and to the left are outside
    with torch.no_grad():
        whole, part = (
            chat.model(torch.cat([ids, torch.tensor([answer])], 1), seen)
            .logits[0, -len(answer) - 1 : -1]
            .log_softmax(-1)[range(len(answer)), answer]
            for seen in (pixels, greyed)
        )
    assert falls[0] == pytest.approx(float(whole.sum() - part.sum()), abs=1e-4)


def test_shuffled_weights_are_the_same_numbers(chat):
    model = deepcopy(chat.model)
    shuffle(model)
    for before, after in zip(chat.model.parameters(), model.parameters()):
        assert torch.equal(before.flatten().sort().values, after.flatten().sort().values)
    weight = chat.model.language_model.lm_head.weight
    assert (model.language_model.lm_head.weight == weight).float().mean() < 0.1
