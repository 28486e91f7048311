"""Visual prompts: pixels against a committed sheet, where they may lie, the words, and what is no mark."""

import ast
import math
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

import marks
from marks import COLOURS, KINDS, Mark, draw_marks, parse_mark, random_mark, refer
from tests.make_marks import FILE, sheet

GROUND = (120, 130, 140)


def drawn(mark, size):
    """Which pixels of a plain picture a mark changes: (height, width) bool."""
    return (np.asarray(draw_marks(Image.new("RGB", size, GROUND), [mark])) != GROUND).any(-1)


def extent(changed):
    """Left, top, right, bottom of the changed pixels, the last ones included."""
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    return columns[0], rows[0], columns[-1], rows[-1]


def random_thing(random, size):
    """The outline of some thing on a picture of this size."""
    x, y = random.uniform(0, size[0]), random.uniform(0, size[1])
    radius = random.uniform(0.05, 0.3) * min(size)
    corner = lambda angle: (x + radius * random.uniform(0.5, 1) * math.cos(angle), y + radius * math.sin(angle))
    corners = [corner(k * math.tau / 7) for k in range(7)]
    return [(min(max(x, 0), size[0]), min(max(y, 0), size[1])) for x, y in corners]


# Pixels


def test_every_pixel_is_as_it_was():
    assert np.array_equal(np.asarray(Image.open(FILE)), np.asarray(sheet()))


@pytest.mark.parametrize("seed", range(40))
def test_a_rectangle_lies_on_its_box(seed):
    random = Random(seed)
    size = width, height = random.randint(20, 700), random.randint(20, 700)
    left, top = random.randrange(width - 2), random.randrange(height - 2)
    right, bottom = random.randint(left + 1, width - 1), random.randint(top + 1, height - 1)
    line = random.uniform(1, 8)
    changed = drawn(Mark("rectangle", (left, top, right, bottom), "lime", width=line, alpha=255), size)
    assert extent(changed) == (left, top, right, bottom)
    w = max(1, int(line * max(size) / 336))
    inner = changed[top + w : bottom + 1 - w, left + w : right + 1 - w]
    assert not inner.any()
    changed[top + w : bottom + 1 - w, left + w : right + 1 - w] = True
    assert changed[top : bottom + 1, left : right + 1].all()


def test_a_box_may_reach_the_far_edge():
    assert extent(drawn(Mark("rectangle", (0, 0, 60, 40)), (60, 40))) == (0, 0, 59, 39)
    assert extent(drawn(Mark("mask", (30, 20, 60, 40)), (60, 40))) == (30, 20, 59, 39)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_changes_out_of_reach(kind):
    for seed in range(60):
        random = Random(seed)
        size = random.randint(50, 500), random.randint(50, 500)
        mark = random_mark(random_thing(random, size), size, random, kind)
        scale, points = max(size) / 336, mark.points(size)
        reach = {
            "rectangle": 0,
            "ellipse": 0,
            "mask": 0,
            "point": (mark.width or 0) * scale * max(mark.aspect, 1 / mark.aspect),
            "arrow": max(mark.length * max(mark.head, 1 - mark.head), 6) * scale + (abs(mark.bent) + (mark.width or 0)) * scale,
            "mask contour": 2 * (mark.width or 0) * scale + 2,
        }.get(kind, (mark.width or 0) * scale)
        left, top, right, bottom = extent(drawn(mark, size))
        xs, ys = zip(*points)
        assert min(xs) - reach - 1.5 <= left and right <= max(xs) + reach + 1.5
        assert min(ys) - reach - 1.5 <= top and bottom <= max(ys) + reach + 1.5


@pytest.mark.parametrize("alpha", [1, 48, 128, 255])
def test_alpha_is_how_much_the_mark_hides(alpha):
    picture = draw_marks(Image.new("RGB", (50, 50), GROUND), [Mark("mask", (0, 0, 50, 50), "orange", alpha)])
    expected = [(g * (255 - alpha) + c * alpha) / 255 for g, c in zip(GROUND, COLOURS["orange"])]
    assert np.abs(np.asarray(picture) - expected).max() <= 1


def test_a_line_that_crosses_itself_is_no_denser():
    line = draw_marks(Image.new("RGB", (100, 100), GROUND), [Mark("scribble", (10, 10, 90, 90, 90, 10, 10, 90), width=9)])
    assert len(line.getcolors()) == 2
    twice = [Mark("mask", (0, 0, 60, 60)), Mark("mask", (40, 40, 99, 99), "blue")]
    assert len(draw_marks(Image.new("RGB", (100, 100), GROUND), twice).getcolors()) == 4  # but two marks are


@pytest.mark.parametrize("side, pixels", [(112, 1), (336, 3), (672, 6), (1000, 8)])
def test_a_line_grows_with_the_picture(side, pixels):
    mark = Mark("rectangle", (0.1, 0.1, 0.9, 0.9))
    assert drawn(mark, (side, side // 2))[side // 4, : side // 2].sum() == pixels


def test_default_widths_and_alpha_are_the_demos():
    assert drawn(Mark("point", (168, 100)), (336, 200)).sum(1).max() == 17  # a radius of 8
    red = np.asarray(draw_marks(Image.new("RGB", (336, 200)), [Mark("mask", (0, 0, 336, 200))]))[0, 0]
    assert red.tolist() == [128, 0, 0]


@pytest.mark.parametrize(
    "mark, line, pixels",  # a line of pixels across the mark, on a picture of 672
    [
        ("rectangle 100,100,500,500", (300, slice(0, 300)), 6),
        ("ellipse 100,100,500,500", (slice(0, 300), 300), 6),
        ("triangle 100,100,500,500", (slice(400, 672), 300), 6),
        ("scribble 100,300,500,300", (slice(0, 672), 300), 6),
        ("arrow 100,300 angle=0", (slice(0, 672), 150), 6),
        ("mask contour 100,100,500,500", (300, slice(0, 300)), 5),
        ("point 300,300", (300, slice(0, 672)), 33),
    ],
)
def test_default_widths(mark, line, pixels):
    assert abs(drawn(parse_mark(mark), (672, 672))[line].sum() - pixels) <= 1


def test_a_later_mark_lies_over_an_earlier_one():
    marks = [Mark("mask", (0, 0, 9, 9), colour, 255) for colour in ("red", "blue", "lime")]
    assert draw_marks(Image.new("RGB", (10, 10)), marks).getpixel((5, 5)) == COLOURS["lime"]


def test_an_arrows_head_is_filled_or_open():
    heads = [drawn(Mark("arrow", (100, 100), angle=0, length=80, head=0.5, width=2, filled=filled), (336, 336)) for filled in (True, False)]
    filled, opened = (head[60:141, 95:125] for head in heads)  # the barbs end at 120, 35 above and below
    assert opened.any(1).sum() > 60 and opened.sum() < filled.sum() / 3
    assert np.array_equal(
        drawn(Mark("arrow", (80, 90, 120, 110), angle=0), (336, 336)), drawn(Mark("arrow", (100, 100), angle=0), (336, 336))
    )
    small = drawn(Mark("arrow", (100, 100), angle=0, length=8, head=0.1), (336, 336))
    assert np.flatnonzero(small.any(1)).size >= 9  # a head of 6 at the least: its barbs reach 5 to either side


def test_fractions_are_parts_of_the_picture():
    for kind in KINDS:
        pixels, parts = Mark(kind, (50, 20, 150, 80)), Mark(kind, (0.25, 0.2, 0.75, 0.8))
        assert np.array_equal(drawn(pixels, (200, 100)), drawn(parts, (200, 100)))
    assert drawn(Mark("mask", (0, 0, 1, 1)), (200, 100)).all()


def test_an_arrow_touches_its_target_and_comes_from_where_it_is_said():
    for angle in range(0, 360, 15):
        changed = drawn(Mark("arrow", (168, 168), angle=angle, alpha=255), (336, 336))
        assert changed[167:170, 167:170].any()
        x, y = round(30 * math.cos(math.radians(angle))), round(30 * math.sin(math.radians(angle)))
        assert changed[167 + y : 170 + y, 167 + x : 170 + x].any() and not changed[167 - y : 170 - y, 167 - x : 170 - x].any()
    towards_the_middle = drawn(Mark("arrow", (300, 168)), (336, 336))
    assert extent(towards_the_middle)[2] <= 302 and 265 <= extent(towards_the_middle)[0] <= 269


@pytest.mark.parametrize("head, tail", [(0.2, 40), (0.35, 32.5), (0.5, 25)])
def test_an_arrows_tail_lies_at_its_length_without_its_head(head, tail):
    # The original's farthest pixels lie 32.4 and 25.0 from the tip with heads of 0.35 and 0.5.
    changed = drawn(Mark("arrow", (168, 168), angle=0, length=50, head=head, width=1, alpha=255), (336, 336))
    assert abs(np.flatnonzero(changed[168]).max() - 168 - tail) <= 1


def test_an_arrow_that_is_all_head_has_no_shaft_on_the_other_side():
    assert extent(drawn(Mark("arrow", (168, 168), angle=0, length=3, width=1), (336, 336)))[0] >= 167


def test_a_mask_of_several_polygons_is_all_of_them():
    whole = drawn(parse_mark("red mask 5,5 30,5 30,30; 25,5 50,5 25,40"), (60, 50))
    parts = [drawn(parse_mark(f"red mask {corners}"), (60, 50)) for corners in ("5,5 30,5 30,30", "25,5 50,5 25,40")]
    assert np.array_equal(whole, parts[0] | parts[1]) and (parts[0] & parts[1]).any()
    picture = draw_marks(Image.new("RGB", (60, 50), GROUND), [parse_mark("mask 5,5 30,5 30,30; 25,5 50,5 25,40")])
    assert len(picture.getcolors()) == 2  # where they overlap it is no denser
    contour = drawn(parse_mark("red mask contour 5,5,20,20; 30,30,50,45"), (60, 50))
    assert contour[5, 5:21].all() and contour[30, 30:51].all() and not contour[12, 12] and not contour[38, 40] and not contour[25, 25]
    fractions = drawn(parse_mark("mask 0.1,0.1,0.3,0.3; 0.5,0.5,0.9,0.9"), (60, 50))
    assert np.array_equal(fractions, drawn(parse_mark("mask 6,5,18,15; 30,25,54,45"), (60, 50)))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "F", "I;16"])
def test_any_mode_and_the_picture_itself_stays(mode):
    image = Image.new(mode, (40, 30))
    before = image.tobytes()
    marked = draw_marks(image, [Mark("point", (20, 15))])
    assert marked.mode == ("RGBA" if "A" in mode else "RGB") and marked.size == (40, 30)
    assert image.tobytes() == before and marked.getpixel((20, 15))[0] > 0


def test_what_was_transparent_stays_so():
    marked = draw_marks(Image.new("RGBA", (40, 30), (9, 9, 9, 0)), [Mark("rectangle", (5, 5, 30, 20), alpha=255)])
    assert marked.getpixel((0, 0))[3] == 0 and marked.getpixel((5, 5)) == (255, 0, 0, 255)
    assert draw_marks(Image.new("RGBA", (40, 30)), [Mark("mask", (5, 5, 30, 20))]).getpixel((9, 9)) == (255, 0, 0, 128)
    for mode, transparency in (("P", 0), ("L", 0), ("RGB", (0, 0, 0))):
        image = Image.new(mode, (40, 30))
        image.info["transparency"] = transparency
        assert draw_marks(image, [Mark("point", (20, 15))]).getpixel((0, 0))[3] == 0


# Words


@pytest.mark.parametrize(
    "kind, words",
    [
        ("rectangle", "within the red rectangle"),
        ("ellipse", "within the red ellipse"),
        ("triangle", "with the red triangle"),
        ("scribble", "with the red scribble"),
        ("mask", "with the red mask"),
        ("mask contour", "with the red mask contour"),
        ("point", "at the red point"),
        ("arrow", "pointed to by the red arrow"),
    ],
)
def test_words(kind, words):
    assert Mark(kind, (1, 2, 30, 40)).words == words
    assert Mark(kind, (1, 2, 30, 40), (1, 2, 3)).words == words.replace("red ", "")


def test_colours():
    assert COLOURS["lime"] == (0, 255, 0) and COLOURS["gold"] == (255, 215, 0) and len(COLOURS) == 9
    named, rgb = (drawn(Mark("point", (9, 9), colour), (20, 20)) for colour in ("fuchsia", (255, 0, 255)))
    assert np.array_equal(named, rgb)


@pytest.mark.parametrize(
    "text, mark",
    [
        ("red rectangle 40,30,120,110", Mark("rectangle", (40, 30, 120, 110))),
        ("rectangle 40 30 120 110", Mark("rectangle", (40, 30, 120, 110))),
        (" blue  mask contour 1,2, 30,4 5,60 ", Mark("mask contour", (1, 2, 30, 4, 5, 60), "blue")),
        ("#0a0B0c point .5,0.25", Mark("point", (0.5, 0.25), (10, 11, 12))),
        ("gold arrow 5,6 angle=-90 width=4 alpha=200", Mark("arrow", (5, 6), "gold", 200, 4, angle=-90)),
        ("alpha=99 lime scribble 1,2 3,4", Mark("scribble", (1, 2, 3, 4), "lime", 99)),
        ("mask 1,2 3,4 5,9;10,10,20,20 ; 30,1 31,2 40,9", Mark("mask", (1, 2, 3, 4, 5, 9), more=((10, 10, 20, 20), (30, 1, 31, 2, 40, 9)))),
    ],
)
def test_parse(text, mark):
    assert parse_mark(text) == mark


def test_a_question_refers_to_its_marks():
    one, two = Mark("point", (1, 2)), Mark("arrow", (1, 2), "blue")
    assert refer("What is {mark}?", [one]) == refer("What is {mark1}?", [one]) == "What is at the red point?"
    assert refer("{mark2}, {mark1} {} {Mark} {mark x}", [one, two]) == "pointed to by the blue arrow, at the red point {} {Mark} {mark x}"
    for question, drawn_marks, message in (
        ("{mark}", [], "there are 0 marks"),
        ("{mark}", [one, two], "there are 2 marks: {mark1}, {mark2}"),
        ("{mark0}", [one], "{mark0}: there is 1 mark"),
        ("{mark3}", [one, two], "{mark3}: there are 2 marks"),
    ):
        with pytest.raises(ValueError, match=message):
            refer(question, drawn_marks)


# Errors


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "no mark is called ''"),
        ("red", "no mark is called ''"),
        ("red blob 1,2", "no mark is called 'blob'; expected one of rectangle, ellipse"),
        ("pink rectangle 1,2,3,4", "colour 'pink' is unknown; expected one of red, lime"),
        ("#12345 point 1,2", "colour '#12345' is unknown"),
        ("#1234 point 1,2", "is unknown"),
        ("red rectangle 1,2,3", "has 3 coordinates; expected 4"),
        ("red rectangle 1,2,3,4,5,6", "has 6 coordinates; expected 4"),
        ("red point", "has 0 coordinates; expected 2 to 4"),
        ("red mask 1,2", "has 2 coordinates; expected 4 or more"),
        ("red rectangle 5,5,5,9", "the box .* is empty"),
        ("red arrow 9,9,5,5", "the box .* is empty"),
        ("red triangle 1,1 2,2 3,3", "lie on one line"),
        ("red mask 1,1 9,9 3,3 4,4", "lie on one line"),
        ("red scribble 3,3 3,3", "are one"),
        ("red point -3,4", "outside the picture"),
        ("red point inf,4", "no mark is called 'point inf'"),
        ("red point 1e999,4", "outside the picture"),
        ("red rectangle 1,2,x,4", "expected a colour, a kind and coordinates"),
        ("red point 1,2 size=3", "no option 'size'"),
        ("red point 1,2 width=thick", "could not convert"),
        ("red point 1,2 width=0", "width is 0.0; expected a number from 0.01 to 336"),
        ("red point 1,2 width=inf", "width is inf"),
        ("red arrow 1,2 width=1e308", "width is 1e"),
        ("red point 1,2 alpha=256", "alpha is 256; expected a whole number from 1 to 255"),
        ("red point 1,2 alpha=0", "alpha is 0"),
        ("red arrow 1,2 length=0", "length is 0.0"),
        ("red arrow 1,2 length=1e308", "length is 1e"),
        ("red arrow 1,2 head=0", "head is 0.0"),
        ("red arrow 1,2 angle=nan", "angle is nan"),
        ("red arrow 1,2 bent=inf", "bent is inf"),
        ("red arrow 1,2 filled=yes", "invalid literal"),
        ("red rectangle 5,5,9,5", "the box .* is empty"),
        ("red point 1,2 alpha=0.5", "invalid literal"),
        ("red point 1,2 aspect=-1", "aspect is -1.0"),
        ("red arrow 1,2 head=2", "head is 2.0; expected a number from 0.01 to 1"),
        ("red rectangle 1,2,3,4; 5,6,7,8", "the rectangle has 2 polygons; only a mask or a mask contour may have several"),
        ("red mask 1,2,30,4; 5", r"mask at \(5.0,\) has 1 coordinates; expected 4 or more"),
        ("red mask 1,2,30,40;", r"mask at \(\) has 0 coordinates"),
        ("red mask 1,2,30,40; 5,5,9,-9", "outside the picture"),
        ("red mask contour 1,2,30,40; 5,5 6,6 7,7", r"the corners \(5.0, .* of a mask contour lie on one line"),
    ],
)
def test_what_is_no_mark(text, message):
    with pytest.raises(ValueError, match=message):
        parse_mark(text)


@pytest.mark.parametrize("colour", [None, [255, 0, 0], (255, 0), (256, 0, 0), (-1, 0, 0), (0.5, 0, 0), (True, 0, 0)])
def test_what_is_no_colour(colour):
    with pytest.raises(ValueError, match="colour .* is unknown"):
        Mark("point", (1, 2), colour)


@pytest.mark.parametrize(
    "values",
    [
        dict(kind=["point"]), dict(kind=None), dict(coordinates=None), dict(coordinates=("a", 1)), dict(coordinates=(None, 1)),
        dict(coordinates=(10**400, 1)), dict(coordinates=(math.nan, 1)), dict(coordinates=5), dict(alpha=128.0), dict(alpha="128"),
        dict(alpha=None), dict(width="3"), dict(angle="x"), dict(length=None), dict(bent=None), dict(head=None), dict(aspect=None),
        *(dict(kind="mask", coordinates=(1, 2, 3, 4), more=more) for more in (5, (5,), None, [("a", 1, 2, 3)])),
    ],
)  # fmt: skip
def test_whatever_is_no_mark_is_a_value_error(values):
    with pytest.raises(ValueError):
        Mark(**(dict(kind="point", coordinates=(1, 2)) | values))


def test_coordinates_of_any_numbers():
    assert Mark("point", [1, 2]) == Mark("point", np.array([1, 2], np.uint8)) == Mark("point", (1.0, 2.0))
    assert len({Mark("point", [1, 2]), Mark("point", (1, 2))}) == 1
    assert Mark("mask", [1, 2, 3, 4], more=[[5, 6, 7, 8]]) == Mark("mask", (1, 2, 3, 4), more=((5, 6, 7, 8),))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("x, y", [(61, 10), (50, 41)])
def test_a_mark_outside_the_picture(kind, x, y):
    with pytest.raises(ValueError, match=f"the {kind} at {x},{y} lies outside the picture of 60×40 pixels"):
        draw_marks(Image.new("RGB", (60, 40)), [Mark(kind, (30, 2, x, y))])


def test_a_polygon_outside_the_picture():
    with pytest.raises(ValueError, match="the mask at 70,5 lies outside the picture of 60×40 pixels"):
        draw_marks(Image.new("RGB", (60, 40)), [parse_mark("mask 1,1,9,9; 50,5 70,5 50,9")])


@pytest.mark.parametrize("box", [(0.1, 0.2, 0.9, 1.2), (10, 20.2, 30, 20.7), (0.5, 0.5, 0.501, 0.9)])
def test_a_box_narrower_than_a_pixel(box):
    with pytest.raises(ValueError, match="narrower than a pixel"):
        draw_marks(Image.new("RGB", (60, 40)), [Mark("rectangle", box)])


# Random marks, for training


def test_random_marks_repeat_and_vary():
    thing = [(20, 20), (60, 25), (50, 70)]
    first, again = ([random_mark(thing, (336, 336), random) for _ in range(2000)] for random in (Random(1), Random(1)))
    assert first == again and len(set(first)) > 1900
    assert {mark.kind for mark in first} == {*KINDS} and {mark.colour for mark in first} == {*COLOURS}
    assert len({mark.filled for mark in first if mark.kind == "arrow"}) == 2


# The ranges of the paper's training, for a picture of 336.
@pytest.mark.parametrize(
    "kind, widths, alphas",
    [
        ("rectangle", (2, 8), (96, 255)),
        ("ellipse", (2, 8), (96, 255)),
        ("triangle", (2, 8), (96, 255)),
        ("point", (5, 20), (96, 255)),
        ("scribble", (2, 12), (96, 255)),
        ("arrow", (1, 6), (96, 255)),
        ("mask", None, (48, 128)),
        ("mask contour", (1, 2), (96, 255)),
    ],
)
def test_random_marks_have_the_widths_and_alphas_of_training(kind, widths, alphas):
    thing, random = [(20, 20), (60, 25), (50, 70)], Random(1)
    marks = [random_mark(thing, (336, 336), random, kind) for _ in range(2000)]
    assert (min(mark.alpha for mark in marks), max(mark.alpha for mark in marks)) == alphas
    if widths is None:
        assert {mark.width for mark in marks} == {None}
    else:
        assert {mark.width for mark in marks} == {*range(widths[0], widths[1] + 1)}
    larger = random_mark(thing, (1000, 600), random, kind)  # in whole pixels there
    assert larger.width is None or abs(larger.width * 1000 / 336 - round(larger.width * 1000 / 336)) < 1e-9


def test_random_marks_of_another_table_have_its_widths_and_alphas():
    bold = {name: kind._replace(widths=(6, 15), alphas=(200, 210)) for name, kind in KINDS.items()}
    random, thing = Random(1), [(20, 20), (60, 25), (50, 70)]
    marks = [random_mark(thing, (112, 112), random, "rectangle", kinds=bold) for _ in range(500)]
    assert {round(mark.width / 3) for mark in marks} == {2, 3, 4, 5} and {mark.alpha for mark in marks} == {*range(200, 211)}


def test_a_thing_in_the_very_corner():
    for seed in range(300):
        for kind in ("point", "arrow", "scribble", "rectangle"):
            mark = random_mark([(0, 0), (3, 0), (3, 3), (0, 3)], (112, 112), Random(seed), kind)
            assert max(max(point) for point in mark.points((112, 112))) <= 3


def test_a_thing_too_thin_for_a_point_in_it_at_the_edge():
    for seed in range(50):  # the points drawn around it miss it, and half of them the picture too
        mark = random_mark([(0, 10), (0.001, 10), (0.001, 90), (0, 90)], (112, 112), Random(seed), "point")
        assert draw_marks(Image.new("RGB", (112, 112)), [mark]).getcolors()[0][0] < 112 * 112


def test_a_random_mark_of_some_colour():
    thing = [(20, 20), (60, 25), (50, 70)]
    assert random_mark(thing, (112, 112), Random(1), "point", "gold").words == "at the gold point"


@pytest.mark.parametrize("kind", KINDS)
def test_random_marks_lie_on_the_thing(kind):
    for seed in range(200):
        random = Random(seed)
        size = random.randint(30, 400), random.randint(30, 400)
        thing = random_thing(random, size)
        mark = random_mark(thing, size, random, kind)
        (xs, ys), points = zip(*thing), mark.points(size)
        slack = {"ellipse": 0.25, "point": 0.5}.get(kind, 0)
        wide, high = slack * (max(xs) - min(xs)) + 1, slack * (max(ys) - min(ys)) + 1
        assert all(min(xs) - wide <= x <= max(xs) + wide and min(ys) - high <= y <= max(ys) + high for x, y in points)


def test_random_marks_on_a_thing_in_two_parts():
    """As in the original: a mask is both parts, a point or a scribble lies on one of them, a triangle may reach from one to the other."""
    left, right = [(20, 20), (60, 25), (50, 70)], [(200, 100), (260, 110), (220, 180)]
    on = lambda kind: [random_mark(left, (336, 336), Random(seed), kind, more=[right]) for seed in range(100)]
    for kind in ("mask", "mask contour"):
        assert all(mark.polygons((336, 336)) == [left, right] for mark in on(kind))
    assert {mark.coordinates for mark in on("rectangle")} == {(20, 20, 260, 180)}
    sides = lambda kind: {frozenset(x < 130 for x in mark.coordinates[::2]) for mark in on(kind)}
    assert sides("point") == sides("scribble") == {frozenset({True}), frozenset({False})}
    assert frozenset({True, False}) in sides("triangle")


def test_a_thing_thin_as_a_line_can_be_marked():
    for kind in KINDS:
        for seed in range(20):
            random_mark([(10, 10), (10.5, 10), (11, 30)], (112, 112), Random(seed), kind)


def test_stands_alone():
    tree = ast.parse(Path(marks.__file__).read_text(encoding="utf-8"))
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported <= {"math", "re", "dataclasses", "typing", "PIL"}
