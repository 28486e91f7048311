"""The tiny world with visual prompts on it: one or two marked things among several, and questions that refer to the marks.

python -m tiny.marked           # writes tiny/marked-data: pictures, and conversations in LLaVA's own format
"""

import argparse
import json
import math
from itertools import permutations
from pathlib import Path
from random import Random

from tqdm import tqdm

from marks import COLOURS, KINDS, draw_marks, random_mark
from tiny.world import NUMBERS, PLACES, SIDE, ask_description, describe, llava_record, make_scene, paint, place, yes

AROUND = ("rectangle", "ellipse", "mask", "mask contour")


def marked_scene(random, count, kind=None, held_out=False):
    """A scene of two things or more, `count` of which are marked: (scene, its layout, [(thing, mark), …]).

    Two marked things have one colour in every second picture, and two marks always different ones, which stand out from
    the things they are on. What goes around a thing leaves it some room. kind: of the marks, if not any.
    """
    alike = random.random() < 0.5
    while True:
        scene = make_scene(random, held_out)
        chosen = [things for things in permutations(scene, count) if count == 1 or (things[0].colour == things[1].colour) == alike]
        if len(scene) > 1 and chosen:
            break
    layout = place(scene, random)
    return scene, layout, put_marks(random.choice(chosen), layout, random, kind)


def put_marks(things, layout, random, kind=None):
    """A mark of this kind, or of any, on each of the things: [(thing, mark), …]."""
    marked, places = [], {placed.thing: placed for placed in layout[1]}
    for thing in things:
        of_kind, used = kind or random.choice([*KINDS]), [mark.colour for _, mark in marked]
        colours = [colour for colour, rgb in COLOURS.items() if colour not in used and math.dist(rgb, places[thing].shade) > 120]
        outline = places[thing].outline(1.2 if of_kind in AROUND else 1.0)
        marked.append((thing, random_mark(outline, (SIDE, SIDE), random, of_kind, random.choice(colours))))
    return marked


def picture(layout, marked):
    return draw_marks(paint(*layout), [mark for _, mark in marked])


# Each takes a scene and its marked things, and gives (question, answer), or None where it cannot be asked.


def ask_marked_description(scene, marked, random):
    return "Describe the picture and its marks.", describe(scene, {thing: mark.words for thing, mark in marked})


def ask_what(scene, marked, random):
    (thing, mark), *_ = marked
    return random.choice((f"What is {mark.words}?", f"Which thing is {mark.words}?")), f"A {thing}."


def ask_colour(scene, marked, random):
    (thing, mark), *_ = marked
    return f"What colour is the thing {mark.words}?", f"{thing.colour.capitalize()}."


def ask_size(scene, marked, random):
    (thing, mark), *_ = marked
    return f"Is the thing {mark.words} small or large?", f"{thing.size.capitalize()}."


def ask_like(scene, marked, random):
    (thing, mark), *_ = marked
    return f"How many things have the shape of the thing {mark.words}?", NUMBERS[sum(t.kind == thing.kind for t in scene)] + "."


def ask_where(scene, marked, random):
    (thing, mark), *_ = marked
    return f"Where is the thing {mark.words}?", f"{PLACES[thing.cell].capitalize()}."


def ask_larger(scene, marked, random):
    (a, mark_a), (b, mark_b) = marked
    answer = "Neither." if a.size == b.size else f"The thing {(mark_a if a.size == 'large' else mark_b).words}."
    return f"Which is larger, the thing {mark_a.words} or the thing {mark_b.words}?", answer


def ask_same_colour(scene, marked, random):
    (a, mark_a), (b, mark_b) = marked
    return f"Are the thing {mark_a.words} and the thing {mark_b.words} the same colour?", yes(a.colour == b.colour)


def ask_left(scene, marked, random):
    (a, mark_a), (b, mark_b) = marked
    if a.cell % 3 != b.cell % 3:
        return f"Is the thing {mark_a.words} left of the thing {mark_b.words}?", yes(a.cell % 3 < b.cell % 3)


ABOUT_ONE = {"what is it": ask_what, "its colour": ask_colour, "its size": ask_size, "how many like it": ask_like, "where is it": ask_where}
ABOUT_TWO = {"which is larger": ask_larger, "same colour": ask_same_colour, "left of": ask_left}


def conversation(scene, marked, random):
    """Four questions about the marked things, then one of the two descriptions: last, or the answers could be read off it."""
    turns = [ask(scene, [one], random) for ask in ABOUT_ONE.values() for one in marked]
    if len(marked) == 2:
        turns += [ask(scene, random.sample(marked, 2), random) for ask in ABOUT_TWO.values()]
    turns = random.sample([turn for turn in turns if turn], 4)
    return [*turns, ask_description(scene, random) if random.random() < 0.5 else ask_marked_description(scene, marked, random)]


def write(folder, count, seed):
    """Training data, like tiny.world's: `align.json` for stage 1, `instruct.json` for stage 2."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    align, instruct = [], []
    for n in tqdm(range(count), desc="drawing", unit="picture"):
        random = Random(f"{seed} marked {n}")
        scene, layout, marked = marked_scene(random, 1 + n % 2)
        name, file = f"{n:06d}", f"images/{n:06d}.png"
        picture(layout, marked).save(folder / file)
        align.append(llava_record(name, file, [ask_marked_description(scene, marked, random)]))
        instruct.append(llava_record(name, file, conversation(scene, marked, random)))
    (folder / "align.json").write_text(json.dumps(align[: count // 8]))
    (folder / "instruct.json").write_text(json.dumps(instruct))


def held_out_questions(count, seed):
    """Questions about marked things in held-out scenes, the kinds of question and of mark in turn, one question a picture:
    (kind of question, kind of mark, marked picture, the same without marks, question, answer)."""
    kinds, n = [*ABOUT_ONE, *ABOUT_TWO], 0
    while count:
        random = Random(f"{seed} held out marked {n}")
        n += 1
        question_kind, mark_kind = kinds[count % len(kinds)], [*KINDS][count // len(kinds) % len(KINDS)]
        scene, layout, marked = marked_scene(random, 1 if question_kind in ABOUT_ONE else 2, mark_kind, held_out=True)
        if turn := (ABOUT_ONE | ABOUT_TWO)[question_kind](scene, marked, random):
            count -= 1
            yield question_kind, mark_kind, picture(layout, marked), paint(*layout), *turn


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("tiny/marked-data"))
    parser.add_argument("--count", type=int, default=64000, help="pictures to draw")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write(args.out, args.count, args.seed)
