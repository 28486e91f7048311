"""The tiny world with visual prompts on it: one to four marked things among several, and questions that refer to the marks.

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
from tiny.world import NUMBERS, PLACES, SIDE, ask_description, describe, llava_record, make_scene, names, paint, place, yes

MOST_MARKS = 4  # in a picture
AROUND = ("rectangle", "ellipse", "mask", "mask contour")
# As bold against a patch of 14 pixels as the paper's marks are: of 112 pixels a line of the paper's share would be 1 wide.
# Widths are for a picture of 336, so 6 to 15 is 2 to 5 here.
BOLD = {
    name: kind._replace(
        widths={"arrow": (6, 12), "point": (9, 18), "mask": (0, 0), "mask contour": (3, 6)}.get(name, (6, 15)),
        alphas=(96, 144) if name == "mask" else (176, 255),
    )
    for name, kind in KINDS.items()
}


def marked_scene(random, count, kind=None, held_out=False):
    """A scene of two things or more, `count` of which are marked: (scene, its layout, [(thing, mark), …]).

    The first two marked things have one colour in every second picture, and marks always different ones, which stand out
    from the things they are on. What goes around a thing leaves it some room. kind: of the first mark, if not any.
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
    """A mark on each of the things, the first of this kind: [(thing, mark), …]."""
    marked, places = [], {placed.thing: placed for placed in layout[1]}
    for thing in things:
        of_kind, used = random.choice([*KINDS]) if marked or not kind else kind, [mark.colour for _, mark in marked]
        colours = [colour for colour, rgb in COLOURS.items() if colour not in used and math.dist(rgb, places[thing].shade) > 120]
        outline = places[thing].outline(1.2 if of_kind in AROUND else 1.0)
        marked.append((thing, random_mark(outline, (SIDE, SIDE), random, of_kind, random.choice(colours), BOLD)))
    return marked


def picture(layout, marked):
    return draw_marks(paint(*layout), [mark for _, mark in marked])


# Each takes a scene and its marked things, and gives (question, answer), or None where it cannot be asked. What takes several
# steps (what is marked? how many are like it?) is answered step by step, "Ring: two.", so that the model reads the first off its
# own words when it takes the second (Wei et al. 2022, https://arxiv.org/abs/2201.11903). In one word, "Two.", four blocks
# had not learnt it after 1,750 steps of stage 2: they were as often right with the marks left off.


def ask_marked_description(scene, marked, random):
    return "Describe the picture and its marks.", describe(scene, {thing: mark.words for thing, mark in marked})


def ask_which_mark(scene, marked, random):
    """From a thing, marked or not, to its mark: one step, where from a mark to what its thing looks like are two."""
    marks, named = dict(marked), [(thing, name) for thing in scene for name in names(thing, scene)[:2]]
    if named:
        thing, name = random.choice([pair for pair in named if pair[0] in marks] or named if random.random() < 0.8 else named)
        mark = marks.get(thing)
        article = "an" if mark and mark.colour[0] in "aeio" else "a"
        return f"Which mark does the {name} have?", f"{article.capitalize()} {mark.name}." if mark else "None."


def ask_where_mark(scene, marked, random):
    (thing, mark), *_ = marked
    return f"Where is the {mark.name}?", f"{PLACES[thing.cell].capitalize()}."


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
    count = NUMBERS[sum(t.kind == thing.kind for t in scene)].lower()
    return f"How many things have the shape of the thing {mark.words}?", f"{thing.kind.capitalize()}: {count}."


def ask_where(scene, marked, random):
    (thing, mark), *_ = marked
    return f"Where is the thing {mark.words}?", f"{PLACES[thing.cell].capitalize()}."


def ask_larger(scene, marked, random):
    (a, mark_a), (b, mark_b) = marked
    larger = "neither" if a.size == b.size else "the first" if a.size == "large" else "the second"
    return f"Which is larger, the thing {mark_a.words} or the thing {mark_b.words}?", f"{a.size.capitalize()} and {b.size}: {larger}."


def ask_same_colour(scene, marked, random):
    (a, mark_a), (b, mark_b) = marked
    same = yes(a.colour == b.colour).lower()
    return f"Are the thing {mark_a.words} and the thing {mark_b.words} the same colour?", f"{a.colour.capitalize()} and {b.colour}: {same}"


def ask_left(scene, marked, random):
    (a, mark_a), (b, mark_b) = marked
    if a.cell % 3 != b.cell % 3:
        answer = f"{PLACES[a.cell].capitalize()} and {PLACES[b.cell]}: {yes(a.cell % 3 < b.cell % 3).lower()}"
        return f"Is the thing {mark_a.words} left of the thing {mark_b.words}?", answer


ABOUT_ONE = {"what is it": ask_what, "its colour": ask_colour, "its size": ask_size, "how many like it": ask_like, "where is it": ask_where}
ABOUT_TWO = {"which is larger": ask_larger, "same colour": ask_same_colour, "left of": ask_left}


def conversation(scene, marked, random):
    """What can be asked about the marked things, up to eight questions in random order; in one of five conversations the
    description with the marks alone, from which the answers to all questions could be read off."""
    if random.random() < 0.2:
        return [ask_marked_description(scene, marked, random)]
    turns = [ask(scene, [one], random) for ask in (*ABOUT_ONE.values(), ask_where_mark) for one in marked]
    turns += [ask_which_mark(scene, marked, random) for _ in marked]
    if len(marked) > 1:
        turns += [ask(scene, random.sample(marked, 2), random) for ask in ABOUT_TWO.values() for _ in range(2)]
    turns = [*dict.fromkeys(turn for turn in turns if turn)]
    return random.sample(turns, min(8, len(turns)))


def write(folder, count, seed):
    """Training data, like tiny.world's: `align.json` for stage 1, `instruct.json` for stage 2; and `held-out.json` and
    `unmarked.json`, the same conversations about held-out scenes, with the marks in the pictures and without.

    One to four things are marked: among several marks a model must find the one that is asked about.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    align, instruct, held_out, unmarked = [], [], [], []
    for n in tqdm(range(count), desc="drawing", unit="picture"):
        random = Random(f"{seed} marked {n}")
        scene, layout, marked = marked_scene(random, 1 + n % MOST_MARKS)
        name, file = f"{n:06d}", f"images/{n:06d}.png"
        picture(layout, marked).save(folder / file)
        align.append(llava_record(name, file, [ask_description(scene, random), ask_marked_description(scene, marked, random)]))
        instruct.append(llava_record(name, file, conversation(scene, marked, random)))
    for n in range(min(count, 256)):
        random = Random(f"{seed} held out {n}")
        scene, layout, marked = marked_scene(random, 1 + n % 2, held_out=True)
        turns = conversation(scene, marked, random)
        for records, name, image in ((held_out, f"h{n:05d}", picture(layout, marked)), (unmarked, f"u{n:05d}", paint(*layout))):
            image.save(folder / f"images/{name}.png")
            records.append(llava_record(name, f"images/{name}.png", turns))
    for name, records in (("align", align[: count // 4]), ("instruct", instruct), ("held-out", held_out), ("unmarked", unmarked)):
        (folder / f"{name}.json").write_text(json.dumps(records))


def held_out_questions(count, seed):
    """Questions about marked things in held-out scenes, the kinds of question and of mark in turn, one question a picture.

    One to four things are marked, whatever is asked about: only who reads which mark is meant can answer. Each is a tuple:
    (kind of question, kind of mark, number of marks, (question, answer) with another mark of the picture in the place of the
    first, marked picture, the same without marks, question, answer). Where there is no other mark, None is in its place.
    """
    kinds, n = [*ABOUT_ONE, *ABOUT_TWO], 0
    while count:
        random = Random(f"{seed} held out marked {n}")
        n += 1
        question_kind, mark_kind = kinds[count % len(kinds)], [*KINDS][count // len(kinds) % len(KINDS)]
        about = 1 if question_kind in ABOUT_ONE else 2
        numbers = range(about, MOST_MARKS + 1)
        number = numbers[count // len(kinds) // len(KINDS) % len(numbers)]
        scene, layout, marked = marked_scene(random, number, mark_kind, held_out=True)
        ask = (ABOUT_ONE | ABOUT_TWO)[question_kind]
        turn = ask(scene, marked[:about], random)
        exchanged = ask(scene, (marked[1:] + marked[:1])[:about], random)  # of two marks the second and the first
        if turn and exchanged:
            count -= 1
            yield question_kind, mark_kind, number, exchanged if number > 1 else None, picture(layout, marked), paint(*layout), *turn


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("tiny/marked-data"))
    parser.add_argument("--count", type=int, default=40000, help="pictures to draw")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write(args.out, args.count, args.seed)
