"""ViP-LLaVA's visual prompts: marks drawn on a picture, and the words by which a question refers to them (Cai et al. 2024,
https://arxiv.org/abs/2312.00784, section 3.1).

    mark = Mark("rectangle", (40, 30, 120, 110), "red")
    image = draw_marks(image, [mark])
    question = f"What is {mark.words}?"        # What is within the red rectangle?

The model has no input for regions. It sees a mark as it sees everything else: the mark is in the pixels. Imports nothing
of ours.
"""

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image, ImageDraw

COLOURS = {
    "red": (255, 0, 0),
    "lime": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "fuchsia": (255, 0, 255),
    "aqua": (0, 255, 255),
    "orange": (255, 165, 0),
    "purple": (128, 0, 128),
    "gold": (255, 215, 0),
}


class Kind(NamedTuple):
    relation: str  # what stands before "the red rectangle" in a question
    points: tuple[int, int]  # the fewest and the most that say where it is; two points may always be the corners of a box
    width: float  # of its line, or the radius of a point, in pixels of a picture of 336
    widths: tuple[int, int]  # the range of widths in training
    alphas: tuple[int, int] = (96, 255)  # the range of alphas in training


MANY = 10_000
KINDS = {
    "rectangle": Kind("within", (2, 2), 3, (2, 8)),
    "ellipse": Kind("within", (2, 2), 3, (2, 8)),
    "triangle": Kind("with", (2, 3), 3, (2, 8)),
    "point": Kind("at", (1, 2), 8, (5, 20)),
    "scribble": Kind("with", (2, MANY), 3, (2, 12)),
    "arrow": Kind("pointed to by", (1, 2), 3, (1, 6)),
    "mask": Kind("with", (2, MANY), 0, (0, 0), (48, 128)),
    "mask contour": Kind("with", (2, MANY), 1, (1, 2)),
}
SIDE = 336  # widths and lengths are given for a picture whose longer side is this, and scaled with it
LIMITS = (  # of a mark's numbers, from–to: beyond them nothing can be recognised, and drawing takes its time
    ("alpha", 1, 255), ("width", 0.01, SIDE), ("aspect", 0.1, 10), ("angle", -360, 360), ("length", 1, 2 * SIDE),
    ("head", 0.01, 1), ("bent", -SIDE, SIDE),
)  # fmt: skip


@dataclass(frozen=True)
class Mark:
    """One visual prompt.

    kind: "rectangle", "ellipse", "triangle", "point", "scribble", "arrow", "mask" or "mask contour".
    coordinates: x, y, x, y, … in pixels from the top left, or in parts of the picture if all of them lie in 0–1.
        rectangle, ellipse: a box, by its top left and its bottom right. triangle: three corners. point, arrow: the place
        it is at or points to. mask, mask contour: the corners of a polygon. scribble: the points a line goes through.
        A box stands for its middle (point, arrow), for the triangle in it or for its outline (mask, mask contour).
    more: the other polygons of a mask or a mask contour that has several, each written as coordinates is.
    colour: a name in COLOURS, or (red, green, blue), each 0–255.
    alpha: 1 (hardly to be seen) to 255 (hides what is below).
    width: of the line, or the radius of a point; of a mask nothing. None: the kind's own.

    Widths and lengths are in pixels of a picture whose longer side is 336 and grow with the picture. What the original
    draws at random has a parameter here: `aspect` of a point, wider (above 1) or higher (below); and of an arrow the
    `angle` at which its tail lies, in degrees clockwise from the right (None: towards the picture's middle), its
    `length`, the part of it that is `head`, whether that is `filled`, and how far its shaft is `bent` sideways. Shaft and
    head both begin at the tip, and together they are as long as `length`: the tail lies at length · (1 − head). A kind
    leaves aside what is another's. Raises ValueError for whatever is not a mark.
    """

    kind: str
    coordinates: tuple[float, ...]
    colour: str | tuple[int, int, int] = "red"
    alpha: int = 128
    width: float | None = None
    aspect: float = 1.0
    angle: float | None = None
    length: float = 50.0
    head: float = 0.35
    filled: bool = True
    bent: float = 0.0
    more: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self):
        if self.kind not in [*KINDS]:  # a list, in which anything may be looked for, even what cannot be hashed
            raise ValueError(f"no mark is called {self.kind!r}; expected one of {', '.join(KINDS)}")
        if not (self.colour in [*COLOURS] or _is_rgb(self.colour)):
            expected = f"one of {', '.join(COLOURS)}, or (red, green, blue), each 0 to 255 (#rrggbb in a line of text)"
            raise ValueError(f"colour {self.colour!r} is unknown; expected {expected}")
        self._check_numbers()
        try:
            object.__setattr__(self, "coordinates", tuple(map(float, self.coordinates)))
            object.__setattr__(self, "more", tuple(tuple(map(float, polygon)) for polygon in self.more))
        except (TypeError, ValueError, OverflowError) as error:
            given = f"{self.coordinates!r} and {self.more!r}" if self.more else repr(self.coordinates)
            raise ValueError(f"coordinates are {given}; expected numbers ({error})") from None
        if self.more and self.kind not in ("mask", "mask contour"):
            raise ValueError(f"the {self.kind} has {1 + len(self.more)} polygons; only a mask or a mask contour may have several")
        for coordinates in (self.coordinates, *self.more):
            self._check_count(coordinates)
            self._check_form(coordinates)

    def _check_numbers(self):
        for name, low, high in LIMITS:
            value = getattr(self, name)
            if value is None and name in ("width", "angle"):
                continue
            kinds, expected = int | float, "a number"
            if name == "alpha":
                kinds, expected = int, "a whole number"
            if not isinstance(value, kinds) or not low <= value <= high:
                raise ValueError(f"{name} is {value!r}; expected {expected} from {low} to {high}")

    def _check_count(self, coordinates):
        """As many coordinates as the kind has, none of them left of the picture or above it."""
        fewest, most = KINDS[self.kind].points
        n = len(coordinates)
        if n % 2 or not fewest <= n // 2 <= most:
            counts = f"{2 * fewest} to {2 * most}"
            if most == fewest:
                counts = f"{2 * fewest}"
            elif most == MANY:
                counts = f"{2 * fewest} or more"
            raise ValueError(f"{self.kind} at {coordinates} has {n} coordinates; expected {counts}, in pairs of x, y")
        if not all(math.isfinite(value) and value >= 0 for value in coordinates):
            raise ValueError(f"{self.kind} at {coordinates} lies outside the picture: expected numbers from 0 up")

    def _check_form(self, coordinates):
        """A box and a polygon have an area, a scribble has a length."""
        corners = _pairs(coordinates)
        if self._is_box(corners) and not (corners[0][0] < corners[1][0] and corners[0][1] < corners[1][1]):
            raise ValueError(f"the box {coordinates} is empty; expected left, top, right, bottom, with left < right and top < bottom")
        if len(corners) > 2 and self.kind != "scribble" and _on_one_line(corners):
            raise ValueError(f"the corners {coordinates} of a {self.kind} lie on one line; expected an area")
        if self.kind == "scribble" and len(set(corners)) == 1:
            raise ValueError(f"all points of the scribble {coordinates} are one; expected a line")

    def _is_box(self, points):
        return len(points) == 2 and self.kind != "scribble"

    @property
    def name(self):
        """What the mark is called: "red rectangle", or "point" of a colour without name."""
        return f"{self.colour} {self.kind}" if isinstance(self.colour, str) else self.kind

    @property
    def words(self):
        """How a question refers to what is marked: "within the red rectangle"."""
        return f"{KINDS[self.kind].relation} the {self.name}"

    def points(self, size):
        """[(x, y), …] in pixels of a picture of this (width, height). Raises ValueError if one lies outside of it."""
        return self.polygons(size)[0]

    def polygons(self, size):
        """The points of `coordinates` and of each polygon of `more`. Raises ValueError as `points` does."""
        width, height = size
        written = (self.coordinates, *self.more)
        polygons = [_pairs(coordinates) for coordinates in written]
        if max(value for points in polygons for point in points for value in point) <= 1:
            polygons = [[(x * width, y * height) for x, y in points] for points in polygons]
        for coordinates, points in zip(written, polygons):
            self._check_place(coordinates, points, size)
        return [[(min(x, width - 1), min(y, height - 1)) for x, y in points] for points in polygons]  # the far edge is the last pixel

    def _check_place(self, coordinates, points, size):
        """The points in pixels lie in the picture, and a box can be seen."""
        width, height = size
        if outside := [(x, y) for x, y in points if x > width or y > height]:
            raise ValueError(f"the {self.kind} at {outside[0][0]:g},{outside[0][1]:g} lies outside the picture of {width}×{height} pixels")
        if self._is_box(points) and min(points[1][0] - points[0][0], points[1][1] - points[0][1]) < 1:
            raise ValueError(f"the box {coordinates} is narrower than a pixel; if not all numbers are 0 to 1, they are pixels")


def _pairs(numbers):
    return [*zip(numbers[::2], numbers[1::2])]


def _is_rgb(colour):
    return isinstance(colour, tuple) and len(colour) == 3 and all(type(c) is int and 0 <= c <= 255 for c in colour)


def _on_one_line(points):
    (x0, y0), (x1, y1) = points[0], max(points, key=lambda point: math.dist(point, points[0]))
    return all((x - x0) * (y1 - y0) == (y - y0) * (x1 - x0) for x, y in points)


def draw_marks(image, marks):
    """The picture with the marks on it, at its own resolution; a later mark lies over an earlier one.

    image: a PIL image of any mode; marks: a list of Mark. Returns RGB, or RGBA if the picture is partly transparent.
    Raises ValueError for a mark that lies outside the picture.
    """
    transparent = "A" in image.getbands() or isinstance(image.info.get("transparency"), int | bytes | tuple)
    picture = image.convert("RGBA") if transparent else image.convert("RGB").convert("RGBA")
    for mark in marks:
        layer = Image.new("RGBA", picture.size)  # of its own: where a line crosses itself it is no denser
        _draw(ImageDraw.Draw(layer), mark, picture.size)
        picture = Image.alpha_composite(picture, layer)
    return picture if transparent else picture.convert("RGB")


def _draw(pen, mark, size):
    points, scale = mark.points(size), max(size) / SIDE
    rgb = COLOURS[mark.colour] if isinstance(mark.colour, str) else mark.colour
    ink = (*rgb, mark.alpha)
    width = max(1, int((mark.width or KINDS[mark.kind].width) * scale + 1e-6))  # n / scale · scale may be just below n
    is_box = mark._is_box(points)
    if is_box:
        (left, top), (right, bottom) = points
        middle = ((left + right) / 2, (top + bottom) / 2)

    if mark.kind in ("rectangle", "ellipse"):
        width = min(width, (int(min(right - left, bottom - top)) + 2) // 2)  # half the box: PIL would spill over its edge
        (pen.rectangle if mark.kind == "rectangle" else pen.ellipse)(points, outline=ink, width=width)
    elif mark.kind == "triangle":
        _closed_line(pen, [(middle[0], top), (right, bottom), (left, bottom)] if is_box else points, ink, width)
    elif mark.kind == "point":
        x, y = middle if is_box else points[0]
        pen.ellipse([x - width * mark.aspect, y - width / mark.aspect, x + width * mark.aspect, y + width / mark.aspect], fill=ink)
    elif mark.kind == "scribble":
        pen.line(points, fill=ink, width=width, joint="curve")
    elif mark.kind == "arrow":
        _arrow(pen, mark, middle if is_box else points[0], size, ink, width)
    elif mark.kind == "mask":
        for polygon in mark.polygons(size):
            pen.polygon(_corners(polygon), fill=ink)
    else:  # a mask contour: the original draws its polygons again, moved by up to `width` pixels to every side
        for polygon in mark.polygons(size):
            _closed_line(pen, _corners(polygon), ink, 2 * width + 1)


def _corners(polygon):
    """All corners of a polygon, which may be a box given by two."""
    if len(polygon) > 2:
        return polygon
    (left, top), (right, bottom) = polygon
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _closed_line(pen, corners, ink, width):
    pen.line([*corners, *corners[:2]], fill=ink, width=width, joint="curve")  # the second again, to round the first


def _arrow(pen, mark, tip, size, ink, width):
    """An arrow whose tip is at the target, its head open by 60° to either side of the shaft."""
    scale = max(size) / SIDE
    x, y = tip
    angle = math.atan2(size[1] / 2 - y, size[0] / 2 - x) if mark.angle is None else math.radians(mark.angle)
    length = mark.length * scale
    head = max(mark.head * length, 6 * scale)
    shaft = max(length - head, 0)
    at = lambda distance, turn=0.0: (x + distance * math.cos(angle + turn), y + distance * math.sin(angle + turn))
    bend = math.hypot(shaft / 2, mark.bent * scale), math.atan2(mark.bent * scale, shaft / 2)
    pen.line([tip, at(*bend), at(shaft)], fill=ink, width=width, joint="curve")
    barbs = [at(head, math.pi / 3), tip, at(head, -math.pi / 3)]
    if mark.filled:
        pen.polygon(barbs, fill=ink)
    else:
        pen.line(barbs, fill=ink, width=width, joint="curve")


def random_mark(where, size, random, kind=None, colour=None, kinds=KINDS, more=()):
    """A mark on a thing, as different as the ones in training (in kind, colour, alpha, width, place and form).

    where: the outline of the thing, [(x, y), …] in pixels; size: the (width, height) of the picture; random: a
    random.Random, whose state decides everything. kind, colour: to have these and vary the rest. kinds: a table like
    KINDS, for other ranges of width and alpha. more: further outlines of a thing that lies in several parts.
    """
    kind = kind or random.choice([*kinds])
    colour = colour or random.choice([*COLOURS])
    outlines = [[_inside(point, size) for point in outline] for outline in (where, *more)]
    polygons, form = _random_form(kind, outlines, size, random)
    if max(value for points in polygons for point in points for value in point) <= 1:
        # So close to the corner, pixels would be read as parts of the picture.
        polygons = [[(x / size[0], y / size[1]) for x, y in points] for points in polygons]
    scale = max(size) / SIDE
    low, high = (int(width * scale + 1e-6) for width in kinds[kind].widths)  # whole pixels of this picture
    alpha = random.randint(*kinds[kind].alphas)
    width = None
    if KINDS[kind].width:
        width = max(1, random.randint(low, high)) / scale
    first, *others = [tuple(value for point in points for value in point) for points in polygons]
    return Mark(kind, first, colour, alpha=alpha, width=width, more=others, **form)


def _random_form(kind, outlines, size, random):
    """The points of a random mark of a kind, [[(x, y), …]], and its other parameters {name: value}.

    outlines: of the parts of a thing, inside the picture. A point and a scribble lie on one of them, as in the original.
    """
    if kind in ("point", "scribble") and len(outlines) > 1:
        outlines = [random.choice(outlines)]
    (left, right), (top, bottom) = _extent(outlines)
    x, y, width, height = (left + right) / 2, (top + bottom) / 2, right - left, bottom - top
    if kind == "rectangle":
        return [[(left, top), (right, bottom)]], {}
    if kind == "ellipse":
        ratio = random.uniform(1, 1.5) / 2
        corners = (x - ratio * width, y - ratio * height), (x + ratio * width, y + ratio * height)
        return [[_inside(corner, size) for corner in corners]], {}
    if kind == "triangle":
        for _ in range(100):
            points = [_point_in(outlines, random) for _ in range(3)]
            if _widest_angle(points) <= 150:
                break
        return [points], {}
    if kind == "point":
        near_the_middle = lambda: (random.gauss(x, (width / 8) ** 0.5), random.gauss(y, (height / 8) ** 0.5))
        points = [_inside(_point_in(outlines, random, near_the_middle), size)]
        return [points], {"aspect": random.choice((1.0, random.uniform(0.5, 2)))}
    if kind == "scribble":
        return [_bezier([_point_in(outlines, random) for _ in range(4)])], {}
    if kind == "arrow":
        points = [(x + random.uniform(-0.25, 0.25) * width, y + random.uniform(-0.25, 0.25) * height)]
        form = {"angle": random.uniform(0, 360), "head": random.uniform(0.2, 0.5)}
        shortest = max(1, 0.8 * min(width, height) * SIDE / max(size))
        form["length"] = random.uniform(*sorted((shortest, 50)))
        form["bent"] = random.choice((0, random.uniform(-5, 5)))
        form["filled"] = random.random() < 0.5
        return [points], form
    return outlines, {}


def _extent(outlines):
    """(left, right), (top, bottom) of all outlines."""
    xs, ys = zip(*[point for outline in outlines for point in outline])
    return (min(xs), max(xs)), (min(ys), max(ys))


def _inside(point, size):
    """The point of a picture of this (width, height) that is nearest to a point."""
    return min(max(point[0], 0), size[0]), min(max(point[1], 0), size[1])


def _point_in(polygons, random, draw=None):
    """A point drawn until it lies in a polygon, or given up on after fifty: of very thin ones, any near them will do."""
    across, down = _extent(polygons)
    for _ in range(50):
        x, y = (random.uniform(*across), random.uniform(*down)) if draw is None else draw()
        if any(_lies_in(polygon, x, y) for polygon in polygons):
            break
    return x, y


def _lies_in(polygon, x, y):
    crossings = 0  # of a ray to the right with the sides: an odd number from inside
    for (x0, y0), (x1, y1) in zip(polygon, polygon[1:] + polygon[:1]):
        crossings += (y0 > y) != (y1 > y) and x < x0 + (x1 - x0) * (y - y0) / (y1 - y0)
    return crossings % 2 == 1


def _widest_angle(corners):
    """The largest angle of a triangle, in degrees, from the lengths of its sides."""
    a, b, c = sorted(math.dist(corners[i], corners[i - 1]) for i in range(3))
    return math.degrees(math.acos(min(1, max(-1, (a * a + b * b - c * c) / (2 * a * b))))) if a else 180.0


def _bezier(control, steps=32):
    """Points along the cubic Bézier curve with these four control points."""
    points = []
    for k in range(steps + 1):
        t = k / steps
        weights = (1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3
        points.append(tuple(sum(w * p[axis] for w, p in zip(weights, control)) for axis in (0, 1)))
    return points


def parse_mark(text):
    """A Mark from one line: [colour] kind coordinates [option=value …].

    "red rectangle 40,30,120,110", "#20c0ff mask contour 10,10 60,12 40,50", "blue arrow 0.5,0.4 angle=90 filled=0". The
    colour is a name or #rrggbb. A mask may have several polygons: "red mask 10,10 60,12 40,50; 70,10 90,10 80,40".
    Raises ValueError, saying what was expected.
    """
    words = text.replace(",", " ").replace(";", " ; ").split()
    options = dict(word.split("=", 1) for word in words if "=" in word)
    plain = [word for word in words if "=" not in word]
    numbers = [word for word in plain if word[0] in "0123456789.+-;"]
    names = plain[: len(plain) - len(numbers)]
    expected = 'expected a colour, a kind and coordinates, like "red rectangle 40,30,120,110"'
    if plain != names + numbers:
        raise ValueError(f"mark {text!r}: {expected}")
    colour = "red"
    if " ".join(names) not in KINDS:  # a colour stands before the kind
        colour = names.pop(0) if names else ""
    if colour.startswith("#"):
        try:
            colour = tuple(bytes.fromhex(colour[1:]))
        except ValueError:
            pass  # Mark will name it
    known = [name for name, *_ in LIMITS] + ["filled"]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ValueError(f"mark {text!r}: no option {unknown[0]!r}; expected one of {', '.join(known)}")
    try:
        values = {}
        for name, value in options.items():
            values[name] = int(value) if name in ("alpha", "filled") else float(value)
        first, *more = [tuple(map(float, polygon.split())) for polygon in " ".join(numbers).split(";")]
    except ValueError as error:
        raise ValueError(f"mark {text!r}: {error}; {expected}") from None
    return Mark(" ".join(names), first, colour, more=more, **values)


def refer(question, marks):
    """A question with the words for a mark in the place of {mark}, or of {mark1}, {mark2} … if there are several.

    Raises ValueError where it is not clear which mark, or there is none.
    """

    def words(found):
        number = int(found[1] or 1)
        unclear = found[1] == "" and len(marks) > 1
        if unclear or not 1 <= number <= len(marks):
            there = f"are {len(marks)} marks"
            if len(marks) == 1:
                there = "is 1 mark"
            elif len(marks) > 1:
                there += ": {mark1}, {mark2} …"
            raise ValueError(f"{found[0]}: there {there}")
        return marks[number - 1].words

    return re.sub(r"\{mark(\d{0,3})\}", words, question)
