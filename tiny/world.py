"""The tiny world: up to five coloured shapes on a pale ground, and questions about them that have one right answer.

    python -m tiny.world            # writes tiny/data: pictures, and conversations in LLaVA's own format

A scene is drawn from a seed. What it shows decides whether it is a training or a held-out scene, so none is ever both.
"""

import argparse
import hashlib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw
from tqdm import tqdm

SIDE = 112  # of a picture, in pixels
COLOURS = {
    "red": (215, 40, 40),
    "orange": (245, 145, 30),
    "yellow": (250, 220, 50),
    "green": (50, 160, 70),
    "blue": (50, 90, 220),
    "purple": (140, 60, 170),
    "black": (30, 30, 30),
}
KINDS = {"circle": "circles", "square": "squares", "triangle": "triangles", "star": "stars", "cross": "crosses", "ring": "rings"}
SIZES = {"small": (8.0, 9.5), "large": (14.0, 16.0)}  # radius in pixels, from–to
PLACES = (  # the cells of a 3 × 3 grid, row by row
    "at the top left", "at the top", "at the top right",
    "on the left", "in the centre", "on the right",
    "at the bottom left", "at the bottom", "at the bottom right",
)  # fmt: skip
NUMBERS = ("None", "One", "Two", "Three", "Four", "Five")


@dataclass(frozen=True)
class Thing:
    size: str
    colour: str
    kind: str
    cell: int  # index into PLACES

    def __str__(self):
        return f"{self.size} {self.colour} {self.kind}"

    def changed(self, random):
        """The same thing with another size, colour or kind."""
        field, values = random.choice((("size", SIZES), ("colour", COLOURS), ("kind", KINDS)))
        return replace(self, **{field: random.choice([value for value in values if value != getattr(self, field)])})


# ---------------------------------------------------------------------------------------------------------- scenes


def make_scene(random, held_out=False, most=5):
    """One to five things in different cells, in reading order: a training scene, or a held-out one."""
    while True:
        cells = sorted(random.sample(range(9), random.randint(1, most)))
        scene = [Thing(random.choice([*SIZES]), random.choice([*COLOURS]), random.choice([*KINDS]), cell) for cell in cells]
        if is_held_out(scene) == held_out:
            return scene


def is_held_out(scene):
    """One scene in ten, by a hash of what it shows."""
    return hashlib.sha256(repr(scene).encode()).digest()[0] < 26


@dataclass(frozen=True)
class Placed:
    """A thing as it lies on a picture, in pixels and degrees."""

    thing: Thing
    radius: float
    x: float
    y: float
    shade: tuple[int, int, int]
    tilt: float

    def outline(self, scale=1.0):
        """The corners of its shape, or of a larger or smaller one around the same middle; a circle and a ring have many."""
        return [(self.x + x, self.y + y) for x, y in corners(self.thing.kind, self.radius * scale, self.tilt)]


def place(scene, random):
    """Where in its cell each thing lies, its exact size, tilt and shade, and the colour of the ground, drawn at random."""
    ground, placed = tuple(random.randint(215, 255) for _ in range(3)), []
    for thing in scene:
        radius = random.uniform(*SIZES[thing.size])
        room = min(4, max(0, SIDE / 6 - radius * 1.2))  # how far from its cell's middle it may lie
        x, y = (SIDE / 6 * (2 * i + 1) + random.uniform(-room, room) for i in (thing.cell % 3, thing.cell // 3))
        shade = tuple(min(255, max(0, c + random.randint(-15, 15))) for c in COLOURS[thing.colour])
        placed.append(Placed(thing, radius, x, y, shade, random.uniform(-8, 8)))
    return ground, placed


def paint(ground, placed):
    """The picture of things that have their places."""
    image = Image.new("RGB", (SIDE, SIDE), ground)
    fine = 4  # shapes are drawn this many times larger, then reduced: smooth edges
    for p in placed:
        box = 2 * math.ceil(p.radius * 1.3)
        left, top = round(p.x) - box // 2, round(p.y) - box // 2
        cx, cy = (p.x - left) * fine, (p.y - top) * fine
        mask = Image.new("L", (box * fine, box * fine))
        pen = ImageDraw.Draw(mask)
        if p.thing.kind in ("circle", "ring"):
            pen.circle((cx, cy), p.radius * fine, fill=255)
            if p.thing.kind == "ring":
                pen.circle((cx, cy), p.radius * fine * 0.55, fill=0)
        else:
            pen.polygon([(cx + x, cy + y) for x, y in corners(p.thing.kind, p.radius * fine, p.tilt)], fill=255)
        image.paste(p.shade, (left, top), mask.resize((box, box), Image.Resampling.BOX))
    return image


def draw(scene, random):
    """A picture of the scene, one of many."""
    return paint(*place(scene, random))


def corners(kind, radius, tilt):
    """The corners of a shape around (0, 0), turned by `tilt` degrees."""
    if kind == "cross":
        arm = radius * 0.36
        quarter = [(radius, -arm), (radius, arm), (arm, arm)]
        return [_turn(*_turn(x, y, 90 * turn), tilt) for turn in range(4) for x, y in quarter]
    angles, radii = {
        "square": ([45, 135, 225, 315], [radius * 1.25]),
        "triangle": ([-90, 30, 150], [radius * 1.2]),
        "star": ([36 * k - 90 for k in range(10)], [radius * 1.2, radius * 0.5]),
    }.get(kind, ([10 * k for k in range(36)], [radius]))
    return [_turn(*_turn(radii[k % len(radii)], 0, angle), tilt) for k, angle in enumerate(angles)]


def _turn(x, y, degrees):
    a = math.radians(degrees)
    return x * math.cos(a) - y * math.sin(a), x * math.sin(a) + y * math.cos(a)


# ---------------------------------------------------------------------------------------------------------- words


def describe(scene, notes=None):
    """Like "A large red circle at the top left and a small blue star in the centre." notes: {thing: what to add to its place}."""
    phrases = [" ".join(["a", str(thing), PLACES[thing.cell], *(notes or {}).get(thing, "").split()]) for thing in scene]
    text = " and ".join(filter(None, [", ".join(phrases[:-1]), phrases[-1]]))
    return text[0].upper() + text[1:] + "."


def names(thing, scene, without=()):
    """Ways to name a thing that fit no other in the scene, none of them using what is in `without`."""
    ways = (("kind",), ("colour", "kind"), ("size", "kind"), ("colour",), ("size", "colour", "kind"))
    found = []
    for way in ways:
        key = lambda t, way=way: [getattr(t, field) for field in way]
        if not set(way) & set(without) and sum(key(t) == key(thing) for t in scene) == 1:
            found.append(" ".join(key(thing)) + ("" if "kind" in way else " thing"))
    return found


def pick(scene, random, count=1, without=()):
    """Some things with an unambiguous name: [(thing, name), …], or None if the scene has not enough of them."""
    named = [(thing, names(thing, scene, without)) for thing in random.sample(scene, len(scene))]
    named = [(thing, random.choice(ways)) for thing, ways in named if ways]
    return named[:count] if len(named) >= count else None


def yes(truth):
    return "Yes." if truth else "No."


def ask_description(scene, random):
    return random.choice(("Describe the picture.", "What does the picture show?", "What do you see?")), describe(scene)


def ask_count(scene, random):
    question = random.choice(("How many things are there?", "How many shapes are in the picture?", "Count the things."))
    return question, NUMBERS[len(scene)] + "."


def ask_count_of(scene, random):
    field, values = random.choice((("kind", KINDS), ("colour", COLOURS), ("size", SIZES)))
    count = lambda value: sum(getattr(thing, field) == value for thing in scene)
    # Mostly something that is there, rather several of it: otherwise "None" or "One" would nearly always be right.
    if random.random() < 0.8:
        value = max((getattr(random.choice(scene), field) for _ in range(3)), key=count)
    else:
        value = random.choice([*values])
    what = KINDS[value] if field == "kind" else f"{value} things"
    return f"How many {what} are there?", NUMBERS[count(value)] + "."


def ask_colour(scene, random):
    if found := pick(scene, random, without=("colour",)):
        thing, name = found[0]
        return random.choice((f"What colour is the {name}?", f"Which colour does the {name} have?")), f"{thing.colour.capitalize()}."


def ask_size(scene, random):
    if found := pick(scene, random, without=("size",)):
        thing, name = found[0]
        return f"Is the {name} small or large?", f"{thing.size.capitalize()}."


def ask_what(scene, random):
    taken = {thing.cell: thing for thing in scene}
    cell = random.choice([*taken]) if random.random() < 0.75 else random.randrange(9)
    question = random.choice((f"What is {PLACES[cell]}?", f"Which thing is {PLACES[cell]}?"))
    return question, f"A {taken[cell]}." if cell in taken else "Nothing."


def ask_where(scene, random):
    if found := pick(scene, random):
        thing, name = found[0]
        return f"Where is the {name}?", f"{PLACES[thing.cell].capitalize()}."


def ask_exists(scene, random):
    way = random.choice((("colour", "kind"), ("size", "kind"), ("size", "colour", "kind"), ("kind",)))
    key = lambda thing: [getattr(thing, field) for field in way]
    there = [key(thing) for thing in scene]
    asked = random.choice(there)
    if random.random() < 0.5:  # something that is nearly there
        nearly = [key(random.choice(scene).changed(random)) for _ in range(8)]
        asked = next((words for words in nearly if words not in there), asked)
    what = " ".join(asked)
    return f"Is there {'an' if what[0] == 'o' else 'a'} {what}?", yes(asked in there)


def ask_side(scene, random):
    if found := pick(scene, random, count=2):
        (a, name_a), (b, name_b) = found
        (row_a, column_a), (row_b, column_b) = divmod(a.cell, 3), divmod(b.cell, 3)
        choices = []
        if column_a != column_b:
            choices.append(("left or right of", "Left." if column_a < column_b else "Right."))
        if row_a != row_b:
            choices.append(("above or below", "Above." if row_a < row_b else "Below."))
        relation, answer = random.choice(choices)
        return f"Is the {name_a} {relation} the {name_b}?", answer


def ask_both(scene, random):
    field, values = random.choice((("colour", COLOURS), ("size", SIZES)))
    pairs = [pick(scene, random, count=2, without=(field,)) for _ in range(4)]
    if pairs := [pair for pair in pairs if pair]:
        same = [pair for pair in pairs if getattr(pair[0][0], field) == getattr(pair[1][0], field)]
        (a, name_a), (b, name_b) = random.choice(same or pairs)
        value = getattr(random.choice((a, b)), field)
        truth = getattr(a, field) == getattr(b, field) == value
        return f"Are the {name_a} and the {name_b} both {value}?", yes(truth)


QUESTIONS = {
    "describe": ask_description,
    "count all": ask_count,
    "count a kind": ask_count_of,
    "colour of": ask_colour,
    "size of": ask_size,
    "what is at": ask_what,
    "where is": ask_where,
    "is there": ask_exists,
    "which side": ask_side,
    "both": ask_both,
}


# ---------------------------------------------------------------------------------------------------------- data


def conversation(scene, random, each=1):
    """Questions of each kind that the scene allows, in random order: [(question, answer), …].

    each: how many of a kind, some of which may be the same and are then asked once; a description is asked for once.
    """
    turns = [ask(scene, random) for kind, ask in QUESTIONS.items() for _ in range(1 if kind == "describe" else each)]
    turns = [turn for turn in dict.fromkeys(turns) if turn]
    random.shuffle(turns)
    return turns


def llava_record(name, image, turns):
    """A conversation in the format of LLaVA's training data."""
    said = []
    for n, (question, answer) in enumerate(turns):
        said.append({"from": "human", "value": ("" if n else "<image>\n") + question})
        said.append({"from": "gpt", "value": answer})
    return {"id": name, "image": image, "conversations": said}


def write(folder, count, seed, each=1):
    """Training data: pictures, `align.json` for stage 1 (one description a picture), `instruct.json` for stage 2 (many
    turns a picture)."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    align, instruct = [], []
    for n in tqdm(range(count), desc="drawing", unit="picture"):
        random = Random(f"{seed} train {n}")
        scene, name, file = make_scene(random), f"{n:06d}", f"images/{n:06d}.png"
        draw(scene, random).save(folder / file)
        align.append(llava_record(name, file, [ask_description(scene, random)]))
        instruct.append(llava_record(name, file, conversation(scene, random, each)))
    (folder / "align.json").write_text(json.dumps(align[: count // 8]))  # enough for a projector
    (folder / "instruct.json").write_text(json.dumps(instruct))


def held_out_questions(count, seed, ask=QUESTIONS):
    """Questions about held-out scenes, the kinds in turn, one question a picture: (kind, image, question, answer)."""
    kinds, n = list(ask), 0
    while count:
        random = Random(f"{seed} held out {n}")
        n += 1
        scene = make_scene(random, held_out=True)
        image = draw(scene, random)
        kind = kinds[count % len(kinds)]
        if turn := ask[kind](scene, random):
            count -= 1
            yield kind, image, *turn


def example():
    """The scene of the bundled picture, a held-out one, and the picture."""
    random = Random("example 99")
    scene = make_scene(random, held_out=True)
    return scene, draw(scene, random)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("tiny/data"))
    parser.add_argument("--count", type=int, default=64000, help="pictures to draw")
    parser.add_argument("--each", type=int, default=1, help="questions of each kind")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write(args.out, args.count, args.seed, args.each)
    example()[1].save(Path(__file__).parent / "example.png")
