"""The tiny world with marks on it: they are on what they are said to be on, and the answers are true."""

import json
import math
from collections import Counter
from random import Random

import numpy as np
import pytest

from inputs import IGNORED
from marks import COLOURS, KINDS
from tiny.marked import ABOUT_ONE, ABOUT_TWO, conversation, held_out_questions, marked_scene, picture, write
from tiny.refer import NAME_BLOCK, questions, where_to_look
from tiny.world import COLOURS as SHADES
from tiny.world import PLACES, is_held_out, llava_record, paint
from tokenizer import Tokenizer
from training.data import encode_conversation


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2])
def test_marks_are_on_their_things(kind, count):
    for seed in range(30):
        scene, layout, marked = marked_scene(Random(seed), count, kind)
        assert len(scene) > 1 and len(marked) == count and marked[0][1].kind == kind
        assert len({mark.words for _, mark in marked}) == len({thing.cell for thing, _ in marked}) == count
        for thing, mark in marked:
            changed = (np.asarray(picture(layout, [(thing, mark)])) != np.asarray(paint(*layout))).any(-1)
            (placed,) = [placed for placed in layout[1] if placed.thing == thing]
            rows, columns = np.nonzero(changed)
            near = np.hypot(columns - placed.x, rows - placed.y) < 2.2 * placed.radius
            assert near.any() and (near.mean() > 0.5 or mark.kind == "arrow")
            assert math.dist(COLOURS[mark.colour], SHADES[thing.colour]) > 90


def test_half_of_the_pairs_have_one_colour():
    pairs = [[thing.colour for thing, _ in marked_scene(Random(seed), 2)[2]] for seed in range(400)]
    assert 150 < sum(a == b for a, b in pairs) < 250


def test_training_and_held_out_never_meet():
    for seed in range(200):
        assert not is_held_out(marked_scene(Random(seed), 2)[0])
        assert is_held_out(marked_scene(Random(seed), 1, held_out=True)[0])


NAMES = ("{kind}", "{colour} {kind}", "{size} {kind}", "{colour} thing", "{size} {colour} {kind}")  # of a thing in a question


def test_every_turn_is_true():
    """Worked out again from the words: of a question, which marks it names, and what is true of the things they are on."""
    seen = Counter()
    for seed in range(400):
        scene, _, marked = marked_scene(Random(seed), 1 + seed % 4)
        things, called = {mark.words: thing for thing, mark in marked}, {mark.name: thing for thing, mark in marked}
        for question, answer in conversation(scene, marked, Random(seed)):
            begin = " ".join(question.split()[:2])
            seen[begin] += 1
            named = sorted((words for words in things if words in question), key=question.index)
            if begin == "Which mark":
                ways = {thing: [way.format(**vars(thing)) for way in NAMES] for thing in scene}
                (thing,) = [t for t in scene if question.removeprefix("Which mark does the ").removesuffix(" have?") in ways[t]]
                mark = next((mark for other, mark in marked if other == thing), None)
                assert answer == (f"{'An' if mark.name[0] in 'ao' else 'A'} {mark.name}." if mark else "None."), question
                continue
            if begin == "Where is" and not named:
                thing = called[question.removeprefix("Where is the ").removesuffix("?")]
                assert answer == f"{PLACES[thing.cell].capitalize()}."
                continue
            if not named:
                assert begin == "Describe the" and all(str(thing) in answer.lower() for thing in scene)
                assert all(words in answer for words in things)
                continue
            thing = things[named[0]]
            right = {
                "What is": f"A {thing}.",
                "Which thing": f"A {thing}.",
                "What colour": f"{thing.colour.capitalize()}.",
                "Is the thing": f"{thing.size.capitalize()}.",
                "How many": f"{thing.kind.capitalize()}: {('one', 'two', 'three', 'four')[[t.kind for t in scene].count(thing.kind) - 1]}.",
                "Where is": f"{PLACES[thing.cell].capitalize()}.",
            }
            if len(named) == 2:
                other = things[named[1]]
                sizes, colours = f"{thing.size} and {other.size}".capitalize(), f"{thing.colour} and {other.colour}".capitalize()
                left = "yes" if thing.cell % 3 < other.cell % 3 else "no"
                larger = {"Large and small": "the first", "Small and large": "the second"}.get(sizes, "neither")
                right = {
                    "Which is larger": f"{sizes}: {larger}.",
                    "Are the thing": f"{colours}: yes." if thing.colour == other.colour else f"{colours}: no.",
                    "Is the thing": f"{PLACES[thing.cell]} and {PLACES[other.cell]}: {left}.".capitalize(),
                }
                assert "left of" not in question or thing.cell % 3 != other.cell % 3
            assert [answer] == [value for begin, value in right.items() if question.startswith(begin)], question
    assert len(seen) == 10 and min(seen.values()) > 30, seen


def test_every_kind_of_question_and_of_mark_is_asked_alike():
    asked = list(held_out_questions(256, seed=1))
    pairs = Counter((question, mark) for question, mark, *_ in asked)
    assert {*pairs} == {(question, mark) for question in (*ABOUT_ONE, *ABOUT_TWO) for mark in KINDS} and {*pairs.values()} == {4}
    assert len({question for *_, question, _ in asked}) > 120
    assert all(np.any(np.asarray(marked) != np.asarray(plain)) for *_, marked, plain, _, _ in asked)


def test_whatever_is_asked_about_there_may_be_other_marks():
    """The same question about another mark of the picture differs from it in the mark's words alone."""
    numbers = Counter()
    for kind, mark_kind, number, exchanged, _, _, question, answer in held_out_questions(256, seed=2):
        numbers[kind, number] += 1
        assert (exchanged is None) == (number == 1) and mark_kind in question
        if exchanged:
            assert exchanged[0] != question
            assert (kind == "what is it") or exchanged[0].split()[:2] == question.split()[:2]
            if kind == "same colour" and number == 2:  # of two marks the second is then asked about first
                assert exchanged[1].endswith(answer.split(": ")[1])
    assert {*numbers} == {(kind, n) for kind in ABOUT_ONE for n in (1, 2, 3, 4)} | {(kind, n) for kind in ABOUT_TWO for n in (2, 3, 4)}


def test_the_same_seed_gives_the_same_data(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name, 8, seed=3)
    a, b = (sorted(p for p in (tmp_path / name).rglob("*") if p.is_file()) for name in ("a", "b"))
    assert len(a) == 28 and [p.read_bytes() for p in a] == [p.read_bytes() for p in b]
    with_marks, without = (json.loads((tmp_path / "a" / name).read_text()) for name in ("held-out.json", "unmarked.json"))
    assert [record["conversations"] for record in with_marks] == [record["conversations"] for record in without]
    for one, other in zip(with_marks, without):
        assert (tmp_path / "a" / one["image"]).read_bytes() != (tmp_path / "a" / other["image"]).read_bytes()
    records = json.loads((tmp_path / "a" / "instruct.json").read_text())
    assert all(record["conversations"][0]["value"].startswith("<image>\n") for record in records)


def test_names_look_at_what_they_name_and_answers_at_names():
    tokenizer, features = Tokenizer.from_pretrained("tiny/vip-llava"), 64
    seen = Counter()
    for seed in range(100):
        scene, _, marked = marked_scene(Random(seed), 1 + seed % 4)
        turns = questions(scene, marked, Random(seed))
        ids, labels = encode_conversation(llava_record("", "", turns), tokenizer, "vip")
        image, cells = ids.index(tokenizer.image_id), {mark.colour: thing.cell for thing, mark in marked}
        kinds = [thing.kind for thing in scene]
        cells |= {thing.kind: thing.cell for thing in scene if kinds.count(thing.kind) == 1}
        text = lambda first, last, ids=ids: tokenizer.decode(ids[first - features + 1 : last - features + 2])
        for block, word, places in where_to_look(ids, labels, turns, scene, marked, tokenizer, features):
            if block == NAME_BLOCK:
                (name,) = [name for name in cells if text(word - 4, word).endswith(name)]
                seen["kind" if name in kinds else "colour"] += 1
                rows, columns = zip(*[divmod(place - image, 8) for place in places])
                middle = (min(rows) + max(rows) + 1) / 2, (min(columns) + max(columns) + 1) / 2
                assert tuple(int(3 * at / 8) for at in middle) == divmod(cells[name], 3)
            else:
                seen["answer"] += 1
                assert labels[word - features + 2] != IGNORED and 1 <= len(places) <= 2
                assert all(any(text(place - 4, place).endswith(name) for name in cells) for place in places)
    assert seen["colour"] > 300 and seen["kind"] > 5 and seen["answer"] > 1000
