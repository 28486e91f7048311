"""The tiny world keeps its promises, and the bundled checkpoint knows it."""

import json
from pathlib import Path
from random import Random

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from sentencepiece import SentencePieceProcessor

from chat import Chat
from tiny.grade import as_markdown, commonest, grade, grade_marks, table
from tiny.marked import held_out_questions as marked_questions
from tiny.world import (
    PLACES,
    QUESTIONS,
    Thing,
    conversation,
    describe,
    draw,
    example,
    held_out_questions,
    is_held_out,
    make_scene,
    names,
    write,
)
from weights.settings import settings, write_files


def test_training_and_held_out_scenes_never_meet():
    train = [make_scene(Random(n)) for n in range(2000)]
    held_out = [make_scene(Random(n), held_out=True) for n in range(2000)]
    assert not any(map(is_held_out, train)) and all(map(is_held_out, held_out))
    assert not {tuple(scene) for scene in train} & {tuple(scene) for scene in held_out}


def test_the_same_seed_gives_the_same_data(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name, 6, seed=3)
    a, b = (sorted(p for p in (tmp_path / name).rglob("*") if p.is_file()) for name in ("a", "b"))
    assert len(a) == 8 and [p.read_bytes() for p in a] == [p.read_bytes() for p in b]


def test_a_name_fits_one_thing_only():
    for n in range(300):
        scene = make_scene(Random(n))
        for thing in scene:
            for name in names(thing, scene):
                words = set(name.replace(" thing", "").split())
                assert [t for t in scene if words <= {t.size, t.colour, t.kind}] == [thing]


def test_things_lie_where_the_words_say():
    """Measured on the pixels: the centre of what differs from the ground is in the cell that is named."""
    for cell in range(9):
        for size in ("small", "large"):
            picture = draw([Thing(size, "black", "circle", cell)], Random(cell))
            pixels = torch.tensor(list(picture.convert("L").get_flattened_data())).reshape(112, 112)
            rows, columns = torch.nonzero(pixels < 128, as_tuple=True)
            assert (rows.float().mean() // (112 / 3), columns.float().mean() // (112 / 3)) == divmod(cell, 3), PLACES[cell]


SCENE = [Thing("large", "red", "star", 0), Thing("small", "red", "ring", 4), Thing("small", "blue", "star", 5)]


@pytest.mark.parametrize(
    "kind, answers",
    [
        ("describe", {"A large red star at the top left, a small red ring in the centre and a small blue star on the right."}),
        ("count all", {"Three."}),
        ("colour of", {"Red.", "Blue."}),
        ("where is", {"At the top left.", "In the centre.", "On the right."}),
        ("what is at", {"A large red star.", "A small red ring.", "A small blue star.", "Nothing."}),
    ],
)
def test_answers_fit_the_scene(kind, answers):
    assert {QUESTIONS[kind](SCENE, Random(n))[1] for n in range(200)} == answers


def test_relations_and_counts_are_true():
    turns = {QUESTIONS[kind](SCENE, Random(n)) for kind in ("which side", "count a kind", "both", "is there") for n in range(3000)}
    for expected in (
        ("Is the ring left or right of the large star?", "Right."),
        ("Is the blue thing above or below the large star?", "Below."),
        ("How many stars are there?", "Two."),
        ("How many red things are there?", "Two."),
        ("How many crosses are there?", "None."),
        ("Is there a blue star?", "Yes."),
        ("Is there a large ring?", "No."),
        ("Are the ring and the large star both red?", "Yes."),
        ("Are the ring and the blue star both small?", "Yes."),
    ):
        assert expected in turns, expected


def test_every_kind_of_question_is_asked_alike():
    kinds = [kind for kind, *_ in held_out_questions(200, seed=1)]
    assert {kinds.count(kind) for kind in QUESTIONS} == {20}


def test_more_questions_of_each_kind_repeat_none():
    for seed in range(50):
        scene = make_scene(Random(seed))
        few, many = (conversation(scene, Random(seed), each) for each in (1, 2))
        assert len(few) <= 10 and len(few) < len(many) == len(set(many)) <= 19
        assert sum(answer == describe(scene) for _, answer in many) == 1


@pytest.mark.parametrize("name", ["llava", "vip-llava"])
def test_a_bundled_checkpoint_is_small_and_16_bit(name, pytestconfig):
    folder = pytestconfig.rootpath / "tiny" / name
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 8e6
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}


def test_the_bundled_picture_is_a_held_out_scene_and_described_right():
    scene, picture = example()
    assert is_held_out(scene)
    with Image.open("tiny/example.png") as bundled:
        assert bundled.tobytes() == picture.tobytes()
    chat = Chat.from_pretrained("tiny/llava", dtype=torch.float32)
    assert "".join(chat.ask("Describe the picture.", [picture])) == describe(scene)


def test_grading_counts_what_is_right():
    kinds, truths = ["a", "a", "a", "b"], ["x", "y", "y", "x"]
    assert commonest(kinds, truths) == [False, True, True, True]
    rows = table(kinds, {"right": [True, False, False, True]})
    assert rows == {"a": {"asked": 3, "right": 1 / 3}, "b": {"asked": 1, "right": 1.0}, "all": {"asked": 4, "right": 0.5}}


def test_grading_leaves_out_what_was_not_asked():
    rows = table(["a", "a", "b"], {"another": [True, None, None]})
    assert [row["another"] for row in rows.values()] == [1.0, None, 1.0]
    assert as_markdown("kind", rows).splitlines()[2:] == ["| a | 2 | 100.0 % |", "| b | 1 | – |", "| all | 3 | 100.0 % |"]


def test_the_bundled_checkpoint_sees():
    """A sample of what `python -m tiny.grade` measures in full."""
    rows = grade(Chat.from_pretrained("tiny/llava", dtype=torch.float32), count=200, seed=2)["question"]
    assert rows["all"]["right"] >= 0.95
    assert rows["all"]["with noise for the picture"] <= 0.35


def test_the_bundled_vip_llava_reads_which_mark_is_meant():
    """A sample of what `python -m tiny.grade --model tiny/vip-llava` measures in full, and its controls."""
    tables = grade_marks(Chat.from_pretrained("tiny/vip-llava", dtype=torch.float32), count=160, seed=2)
    rows = tables["question"]["all"]
    assert rows["right"] >= 0.8 and rows["another mark: right"] >= 0.8
    assert rows["another mark: the same answer, wrongly"] <= 0.15 and rows["marks left off"] <= 0.4
    assert [*tables["marks"]] == ["1", "2", "3", "4", "all"] and tables["marks"]["1"]["another mark: right"] is None


def test_the_bundled_vip_llava_chats_about_a_mark_that_is_added(tmp_path):
    """Its format ends an answer at "###"; a second turn brings a marked picture into the conversation."""
    chat = Chat.from_pretrained("tiny/vip-llava", dtype=torch.float32)
    *_, image, plain, question, _ = next(iter(marked_questions(1, seed=5)))
    assert "#" not in "".join(chat.ask("Describe the picture and its marks.", [plain]))
    assert chat.prompt(question, [image]).count("###Human: ") == 2
    answer = "".join(chat.ask(question, [image]))
    chat.reset()
    assert answer.endswith(".") and "".join(chat.ask(question, [image])).endswith(".") and "#" not in answer


@pytest.mark.parametrize("folder", [Path("tiny/llava"), Path("tiny/vip-llava")])
def test_the_files_beside_the_weights_are_written_as_they_stand_here(folder, tmp_path):
    model = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    files = settings(json.loads((folder / "config.json").read_text()), model)
    write_files(tmp_path, files)
    assert len(files) == 6
    for name in {*files} - {"config.json"}:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name
