"""Regions of a picture: marks on it, and words for them in the text (ViP-LLaVA, Cai et al. 2024, section 3.1).

    {"id": "1", "image": "1.jpg", "bboxes": [[40, 30, 120, 110]], "segmentations": [[[40, 30, 120, 40, 90, 110]]],
     "conversations": [{"from": "human", "value": "<image>\\nWhat is <bbox0>?"}, {"from": "gpt", "value": "A wren."}]}

`<bbox0>` becomes the words for the mark that is drawn on the first box, like "within the red rectangle". Kind, colour and form of the
mark are random, in the ranges of the authors' training. With an outline in "segmentations", the marks follow it. `training/vip.py` reads
the authors' own data sets.
"""

import re

from images import size_of
from marks import COLOURS, KINDS, Mark, random_mark
from training.records import BAD_REGIONS, BROKEN, NO_BOX, OUTSIDE, Unusable, pictures_of
from training.vip import POINTQA, READERS, SHOWN, dataset_of

PLACE = re.compile(r"<bbox(\d*)>")  # without a number it is the first
OVER = 0.02  # of the picture's longer side: by so much a box may reach over the edge, as annotations do


def has_regions(record):
    """Whether a record refers to regions of its picture: by <bbox0>, or because it is one of the authors' that do."""
    if dataset_of(record) and ("bboxes" in record or "conversations" not in record):
        return True
    return any(PLACE.search(str(turn.get("value"))) for turn in record["conversations"])


def mark_regions(record, images, random):
    """The record with words in the place of its regions, and the marks to be drawn on its picture.

    images: the folder that its picture is in; random: a random.Random, whose state decides everything. Raises Unusable.
    """
    dataset, names = dataset_of(record), pictures_of(record)
    kinds = SHOWN.get(dataset, KINDS)
    if len(names) != 1:
        raise Unusable(BAD_REGIONS, f"it has {len(names)} pictures; expected one")
    try:
        size = size_of(images / names[0])
    except (ValueError, OSError) as error:
        raise Unusable(BROKEN, str(error)) from None
    read = read_conversation if "conversations" in record else READERS[dataset]
    marks, words = [], []
    try:
        turns, regions = read(record, images, random)
        looks = choose_looks(len(regions), kinds, random)
        if dataset == POINTQA:
            looks = [("rectangle", COLOURS["red"])]  # without a name: the question says "within the rectangle"
        for things, (kind, colour) in zip(regions, looks):
            of_region = [mark_thing(box, outline, kind, colour, size, kinds, random) for box, outline in things]
            marks += of_region
            words.append(of_region[0].words)
        turns = [{**turn, "value": put_words(turn["value"], words)} for turn in turns]
    except Unusable:
        raise
    except (KeyError, TypeError, IndexError, AttributeError, ValueError, OSError) as error:
        raise Unusable(BAD_REGIONS, f"{type(error).__name__}: {error}") from None
    return {**record, "conversations": turns}, marks


def read_conversation(record, images, random):
    """The turns, and of each region the things in it, here one: its box, and the polygons of its outline or None.

    That of RefCOCOg's by GPT-4V has no <image>; its picture stands before the first question.
    """
    turns = record["conversations"]
    if not any("<image>" in turn["value"] for turn in turns):
        turns = [{**turns[0], "value": f"<image>\n{turns[0]['value']}"}, *turns[1:]]
    boxes = record.get("bboxes", [])
    outlines = record.get("segmentations") or [None] * len(boxes)
    if len(outlines) != len(boxes):
        raise Unusable(BAD_REGIONS, f"it has {len(boxes)} boxes and {len(outlines)} segmentations")
    return turns, [[thing] for thing in zip(boxes, outlines)]


def choose_looks(count, kinds, random):
    """(kind, colour) of the mark on each region. Words must tell them apart: where a kind comes twice, its colours differ and have
    names, as far as there are names. Of other marks half have any colour, which no word tells: "within the rectangle"."""
    looks, chosen = [], random.choices([*kinds], k=count)
    for kind in chosen:
        names = [colour for colour in COLOURS if (kind, colour) not in looks]
        if names and (chosen.count(kind) > 1 or random.random() < 0.5):
            looks.append((kind, random.choice(names)))
        else:
            looks.append((kind, tuple(random.randint(0, 255) for _ in range(3))))
    return looks


def mark_thing(box, outline, kind, colour, size, kinds, random):
    """A random mark on one thing: by its outline, or by its box if it has none or the mark is one that the authors put on boxes."""
    left, top, right, bottom = inside(box, size)
    if not isinstance(outline, list | None):
        raise Unusable(BAD_REGIONS, f"a segmentation is a {type(outline).__name__}; expected polygons: [[x, y, x, y, …], …]")
    polygons = [[*zip(polygon[::2], polygon[1::2])] for polygon in outline or () if len(polygon) >= 6]
    if not polygons or kind in ("rectangle", "arrow"):
        polygons = [[(left, top), (right, top), (right, bottom), (left, bottom)]]
    first, *more = polygons
    return random_mark(first, size, random, kind, colour, kinds, more)


def inside(box, size):
    """A box as far as it lies in a picture of this (width, height). Raises Unusable if it reaches out of it, or has no area."""
    (left, top, right, bottom), (width, height), over = map(float, box), size, OVER * max(size)
    fits = -over <= left and -over <= top and right <= width + over and bottom <= height + over
    left, top, right, bottom = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
    if not (fits and right - left >= 1 and bottom - top >= 1):
        expected = f"expected left, top, right, bottom in pixels of its picture, {width}×{height}"
        raise Unusable(OUTSIDE, f"the box is {[*box]}; {expected}")
    return left, top, right, bottom


def put_words(text, words):
    """A text with the words for a region in the place of each <bbox0>."""

    def of(found):
        number = int(found[1] or 0)
        if number >= len(words):
            raise Unusable(NO_BOX, f"it has {found[0]}, and {len(words)} boxes, counted from 0")
        return words[number]

    return PLACE.sub(of, text)


def mark_from(values):
    """A mark again from what JSON has kept of it, with lists for tuples."""
    colour = values["colour"]
    return Mark(**values | {"colour": colour if isinstance(colour, str) else tuple(colour)})
