"""ViP-LLaVA's region data: the words in the ids and the marks in the pixels agree, and are the same whenever and by whom they are read."""

import json
import math
import pickle
import re
from collections import Counter
from functools import partial
from multiprocessing.reduction import ForkingPickler
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from hardware.processes import Alone
from images import ImageProcessor
from marks import COLOURS, KINDS
from tests.test_train import killed_run, run
from tokenizer import Tokenizer
from training import data as training_data
from training.data import Conversations, Encoder, collate, conversations, own_passes
from training.regions import mark_regions

VIP = "tiny/vip-llava"
TOKENIZER = Tokenizer.from_pretrained(VIP)
GROUND, SIZE = (120, 130, 140), (200, 150)
BOXES = [[20, 30, 80, 110], [90, 10, 150, 60], [100, 80, 190, 140], [30, 115, 70, 145]]
CORNERS = [[20, 30, 80, 30, 50, 110], [90, 10, 150, 10, 150, 60, 90, 60], [100, 80, 190, 140, 100, 140]]
PARTS = [[20, 30, 45, 30, 45, 110], [60, 40, 80, 40, 80, 110]]  # one thing, in two polygons
MEANT = re.compile(
    rf"(?:{'|'.join({kind.relation for kind in KINDS.values()})}) the (?:({'|'.join(COLOURS)}) )?({'|'.join(sorted(KINDS, key=len)[::-1])})"
)


def said(*values):
    return [{"from": ("human", "gpt")[n % 2], "value": value} for n, value in enumerate(values)]


ONE = {"id": "1", "conversations": said("<image>\nWhat is <bbox0>?", "A wren, <bbox0>."), "bboxes": BOXES[:1], "segmentations": [PARTS]}
AUTHORS = {  # a record of each of their data sets, as their own code reads them
    "refcocog-gpt4v": {"bboxes": BOXES[:1], "segmentations": [CORNERS[:1]], "conversations": said("What is <bbox>?", "A cup <bbox>.")},
    "refcocog": {"bboxes": BOXES[:1], "segmentations": [CORNERS[:1]], "answer": "a red cup"},
    "vg_rel-gpt4v": {"bboxes": BOXES[:2], "conversations": said("<image>\nWhat does the man <bbox0> do <bbox1>?", "He <bbox0> sits.")},
    "vg_rel": {"bboxes": BOXES[:2], "answer": "(man, sits on, bench)"},
    "flickr30k": {"bbox": [BOXES[:1], BOXES[1:3]], "grounding": "two men <bbox0> see some dogs <bbox1> ."},
    "v7w": {"bboxes": BOXES, "question": "Which is a cup?", "answer": BOXES[2]},
    "pointQA_twice": {"bboxes": BOXES[:1], "general_question": "How many of these cups are there?", "answer": "2"},
    "vcr": {
        "meta_dir": "./dataset/vcr1images/a.json",
        "class_names": ["man", "cup", "dog"],
        "question": ["What", "does", [2], "see", "?"],
        "answer_choices": [["A", "cup", "."], [[0, 2], "see", [1], "."], ["Nothing", "."], [[0], "sleeps", "."]],
        "answer_label": 1,
        "rationale_choices": [[[2], "looks", "down", "."], ["I", "do", "."], ["It", "is", "red", "."], [[1], "'s", "colour", "."]],
        "rationale_label": 0,
    },
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", SIZE, GROUND).save(tmp_path / "x.png")
    (tmp_path / "vcr1images").mkdir()
    points = [[[x, y] for x, y in zip(polygon[::2], polygon[1::2])] for polygon in CORNERS]
    scene = {"boxes": [[*box, 0.9] for box in BOXES[:3]], "segms": [[polygon] for polygon in points]}
    (tmp_path / "vcr1images" / "a.json").write_text(json.dumps(scene))
    return tmp_path


def read(folder, records, seed=0):
    """The Conversations of some records, each with the picture x.png."""
    (folder / "data.json").write_text(json.dumps([{"image": "x.png", **record} for record in records]))
    encode = partial(training_data.encode_conversation, tokenizer=TOKENIZER, style="vip")
    encoder = Encoder(encode, TOKENIZER.image_id, 900, 64, seed=seed)
    anew = folder / f"state {len([*folder.glob('state *')])}"  # what was encoded before is not read again
    return conversations(folder / "data.json", folder, encoder, {}, anew, Alone())


def examples(folder, records, seed=0):
    data = read(folder, records, seed)
    return [data[n] for n in range(len(data))]


def text(example):
    """What a record says, without the system sentence."""
    return TOKENIZER.decode(example[0]).partition("###")[2]


def called(example):
    """(colour or "", kind) of each mark that the text names, in order."""
    return MEANT.findall(text(example))


def changed(example):
    """Which pixels of the picture a mark has changed: (height, width) bool."""
    return (np.asarray(example[2][0]) != GROUND).any(-1)


def is_blend(pixel, colour):
    """Whether this is the ground with that colour over it, at an alpha of training."""
    blends = [[(g * (255 - alpha) + c * alpha) / 255 for g, c in zip(GROUND, COLOURS[colour])] for alpha in range(48, 256)]
    return np.abs(np.array(blends) - pixel).max(-1).min() <= 1


def filled(*polygons):
    """The pixels of these polygons."""
    image = Image.new("1", SIZE)
    for polygon in polygons:
        ImageDraw.Draw(image).polygon(polygon, fill=1)
    return np.asarray(image)


def test_the_words_in_the_ids_and_the_mark_in_the_pixels_agree(folder):
    seen, thing = Counter(), filled(*PARTS)
    for example in examples(folder, [ONE] * 200):
        (colour, kind), again = called(example)
        seen[kind, bool(colour)] += 1
        assert again == (colour, kind) and "<bbox" not in text(example)
        mark = changed(example)
        pixel = np.median(np.asarray(example[2][0])[mark], axis=0)
        assert not colour or is_blend(pixel, colour)
        rows, columns = np.flatnonzero(mark.any(1)), np.flatnonzero(mark.any(0))
        width, height = columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1
        if kind == "mask":
            assert np.array_equal(mark, thing)
        elif kind == "mask contour":
            assert not mark[50, 40] and not mark[60, 75] and mark[30, 30] and mark[100, 45] and mark[100, 80]
        elif kind == "rectangle":
            assert [columns[0], rows[0], columns[-1], rows[-1]] == BOXES[0] and not mark[60, 50]
        elif kind == "point":
            assert abs(mark.sum() / (math.pi / 4 * width * height) - 1) < 0.2
        elif kind == "ellipse":
            assert not mark[70, 50] and not mark[rows[0], columns[0]] and mark[rows[0], 50] and 60 <= width <= 92 and 80 <= height <= 122
    assert {kind for kind, _ in seen} == {*KINDS}
    assert 60 < sum(count for (_, named), count in seen.items() if named) < 140  # half of the colours have no name


ALL_OF_VCR = """Why?
A. The thing @ looks down.
B. I do.
C. It is red.
D. The thing @'s colour.
Answer with the option's letter from the given choices directly."""
LETTER = ALL_OF_VCR.splitlines()[-1]
THREE = "The thing @ and the thing @ see the thing @."
EXPECTED = {  # of each data set the kinds of marks, and the texts, with @ for the words of a mark
    "refcocog-gpt4v": (KINDS, ["What is @?###Assistant: A cup @.###"]),
    "refcocog": (KINDS, ["Describe the object @ in a short phrase.###Assistant: a red cup###"]),
    "vg_rel-gpt4v": (["rectangle", "ellipse"], ["What does the man @ do @?###Assistant: He @ sits.###"]),
    "vg_rel": (
        ["rectangle", "ellipse"],
        ["How is the object @ related to the object @? Give a short triplet: (subject, relationship, object)."
         "###Assistant: (man, sits on, bench)###"],
    ),
    "flickr30k": (
        ["rectangle", "ellipse", "arrow"],
        ["Describe the picture and what is marked in it.###Assistant: Two men see some dogs.###",
         "Describe the picture and what is marked in it. Say how each thing is marked.###Assistant: Two men @ see some dogs @.###"],
    ),
    "v7w": (
        ["rectangle"],
        [f"Which is a cup?\nA. The object @\nB. The object @\nC. The object @\nD. The object @\n{LETTER}###Assistant: C###"],
    ),
    "pointQA_twice": (
        ["rectangle"],
        ["How many of these cups are there? The exemplary object is @.\nAnswer the question using a single word or phrase."
         "###Assistant: 2###"],
    ),
    "vcr": (
        {*KINDS} - {"point"},
        [f"What does the thing @ see?{answer}###Human: {why}"
         for answer in (f"###Assistant: {THREE}", f"\nA. A cup.\nB. {THREE}\nC. Nothing.\nD. The thing @ sleeps.\n{LETTER}###Assistant: B")
         for why in ("Why?###Assistant: The thing @ looks down.###", f"{ALL_OF_VCR}###Assistant: A###")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", AUTHORS)
def test_the_authors_data_sets(name, folder):
    kinds, texts = Counter(), Counter()
    for example in examples(folder, [{**AUTHORS[name], "id": f"{name}-7"}] * 120):
        kinds.update(kind for _, kind in called(example))
        words = MEANT.sub("@", text(example).removeprefix("Human:  \n"))
        texts[re.sub("(object|man|cup|dog) @", "thing @", words) if name == "vcr" else words] += 1
        assert changed(example).any()
    assert {*kinds} == {*EXPECTED[name][0]} and {*texts} == {*EXPECTED[name][1]}


def test_each_region_has_its_own_words(folder):
    for example in examples(folder, [{**AUTHORS["v7w"], "id": "v7w-7"}] * 20):
        pixels = np.asarray(example[2][0])
        assert [is_blend(pixels[top, left], colour) for (left, top, *_), (colour, _) in zip(BOXES, called(example))] == [True] * 4
        assert len({*called(example)}) == 4
    for example in examples(folder, [{**AUTHORS["vg_rel-gpt4v"], "id": "vg_rel-gpt4v-1"}] * 100):
        first, second, again = called(example)
        assert first != second and first == again and (first[1] != second[1] or first[0] and second[0])
    for example in examples(folder, [{**AUTHORS["pointQA_twice"], "id": "pointQA_twice-7"}]):
        assert called(example) == [("", "rectangle")] and is_blend(np.asarray(example[2][0])[30, 20], "red")


def test_vcrs_things_have_their_own_boxes(folder):
    record, seen = {"image": "x.png", **AUTHORS["vcr"], "id": "vcr-1"}, set()
    for seed in range(200):
        marked, marks = mark_regions(record, folder, Random(seed))
        said = " ".join(turn["value"] for turn in marked["conversations"])
        for name, box in zip(("man", "cup", "dog"), BOXES):
            for mark in marks:
                if mark.kind == "rectangle" and re.search(f"{name} {mark.words}(?! contour)", said):
                    assert mark.coordinates == tuple(box)
                    seen.add(name)
    assert len(seen) == 3


def test_a_phrase_of_several_boxes_has_one_look(folder):
    record = {"image": "x.png", **AUTHORS["flickr30k"], "id": "flickr30k-1"}
    for seed in range(20):
        _, (first, *others) = mark_regions(record, folder, Random(seed))
        assert len(others) == 2 and others[0].words == others[1].words != first.words


def test_the_seed_decides(folder):
    first, again, other = (examples(folder, [ONE] * 8, seed) for seed in (1, 1, 2))
    assert all(same(a, b) for a, b in zip(first, again))
    assert sum(same(a, b) for a, b in zip(first, other)) < 2
    assert len({text(example) for example in first}) > 4  # each record has a mark of its own


def same(one, other):
    return one[:2] == other[:2] and [image.tobytes() for image in one[2]] == [image.tobytes() for image in other[2]]


def test_what_has_no_regions_stays_as_it_is(folder):
    """Boxes beside a text that names none are not looked at."""
    plain = {"id": "1", "conversations": said("<image>\nWhat is it?", "A wren."), "bboxes": BOXES}
    assert not changed(examples(folder, [plain])[0]).any()


def test_regions_that_cannot_be_read_are_left_out_and_counted(folder, capsys):
    (folder / "broken.png").write_bytes(b"no picture")
    bad = {
        "it refers to a region of its picture that has no box": [
            {**ONE, "conversations": said("<image>\nWhat is <bbox1>?", "A wren.")},
            {**ONE, "bboxes": [], "segmentations": []},
            {"id": "1", "conversations": said("<image>\nWhat is <bbox0>?", "A wren.")},
            {"id": "1", "conversations": said("<image>\nWhat is <mask0>?", "A wren.")},
        ],
        "a box of it is empty or reaches out of its picture": [
            {**ONE, "segmentations": None, "bboxes": [box]}
            for box in ([20, 30, 210, 110], [20, 30, 80, 160], [-9, 30, 80, 110], [50, 30, 50, 110], [0.1, 0.2, 0.5, 0.6])
        ],
        "its regions are not written as in ViP-LLaVA's data": [
            {**ONE, "bboxes": [[20, 30, 80]]}, {**ONE, "bboxes": [None]}, {**ONE, "bboxes": 5}, {**ONE, "segmentations": [PARTS, PARTS]},
            {**ONE, "segmentations": [{"counts": "x", "size": [9, 9]}]}, {**ONE, "image": []}, {"id": "v7w-1", "bboxes": BOXES},
            {**AUTHORS["v7w"], "id": "v7w-1", "answer": [1, 2, 3, 4]}, {**AUTHORS["vcr"], "id": "vcr-1", "meta_dir": "./dataset/none.json"},
        ],
        "its picture, on which marks are to be drawn, cannot be opened": [{**ONE, "image": "broken.png"}],
        "its picture is missing": [{**ONE, "image": "none.png"}],
    }  # fmt: skip
    data = read(folder, [*(record for records in bad.values() for record in records), *[ONE] * 30])
    table = capsys.readouterr().err
    assert len(data) == 30 and "20 of 50 records are left out" in table
    for reason, records in bad.items():
        assert f"{len(records):8}  {reason}\n" in table
    assert "the box is [20, 30, 210, 110]; expected left, top, right, bottom in pixels of its picture, 200×150" in table


def test_a_box_may_reach_over_the_edge_by_some_pixels(folder):
    for example in examples(folder, [{**ONE, "bboxes": [[-3, 30, 80, 153]], "segmentations": [None]}] * 40):
        assert changed(example).any()


def test_other_processes_see_the_same_pictures(folder):
    """Those that read pictures, and those that train."""
    data, processor = read(folder, [ONE] * 12), ImageProcessor.from_pretrained(VIP)
    ids = dict(image_id=TOKENIZER.image_id, pad_id=TOKENIZER.pad_id)
    together = partial(collate, processor=processor, **ids, features_per_image=64, pad=True)
    sent = pickle.loads(ForkingPickler.dumps(data))
    batches = [[3, 1], [7, 2], [11, 0]]
    whole = [*own_passes(data, batches, together, 0, Alone())]
    parts = [[*own_passes(sent, batches, together, 1, SimpleNamespace(rank=rank, size=2))] for rank in (0, 1)]
    for both, first, second in zip(whole, *parts):
        assert torch.equal(both.pixels, torch.cat([first.pixels, second.pixels])) and (both.pixels[0] != both.pixels[1]).any()
        for n, part in enumerate((first, second)):
            assert torch.equal(both.ids[n, : part.ids.shape[1]], part.ids[0])


def test_a_killed_run_sees_the_same_pictures_again(folder, monkeypatch):
    (folder / "instruct.json").write_text(json.dumps([{"image": "x.png", **ONE}] * 4))
    train = partial(run, data=folder, stage=1, model="tiny/llava")
    train(monkeypatch, out=folder / "whole")
    for name, seed in (("killed", "0"), ("other", "1")):
        with killed_run(monkeypatch) as patch:
            run(patch, folder, folder / name, "--save-every", "1e-9", "--seed", seed, stage=1, model="tiny/llava")
    first, other = (asked(folder / name, folder) for name in ("killed", "other"))
    assert first != other and [called(example) for example in examples(folder, [ONE] * 4)] == [MEANT.findall(words) for words in first]
    train(monkeypatch, out=folder / "killed")
    whole, killed = (load_file(folder / name / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


def asked(out, images):
    """What the records of a run say that is not finished."""
    (encoded,) = (out / "training-state").glob("encoded-*")
    data = Conversations(encoded, images)
    return [Tokenizer.from_pretrained("tiny/llava").decode(data[n][0]) for n in range(len(data))]
