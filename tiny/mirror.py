"""Something new for the bundled model to learn by LoRA: to say of a picture what a mirror would show.

    python -m tiny.mirror                       # writes tiny/mirror-data, in LLaVA's own format
    python -m tiny.mirror --grade ADAPTER       # what an adapter taught tiny/llava, and what it made it forget

"Where is the ring? In a mirror." is "On the right." if it is on the left. All words are known to the model, but not that they can
be meant so; the picture is the one that it sees, not a mirrored one.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from random import Random

import torch
from tqdm import tqdm

from chat import Chat
from tiny.grade import as_markdown, commonest, right, table
from tiny.world import QUESTIONS, conversation, draw, llava_record, make_scene
from training.lora import load_adapter

ASK = " In a mirror."


def mirrored(scene):
    """The scene with left and right exchanged, in the order of its cells."""
    return sorted((replace(thing, cell=thing.cell + 2 - 2 * (thing.cell % 3)) for thing in scene), key=lambda thing: thing.cell)


def write(folder, count, seed):
    """Training data, like tiny.world's `instruct.json`; no scene is a held-out one. Two of five questions are plain ones, so that
    it is not forgotten how those are meant."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records = []
    for n in tqdm(range(count), desc="drawing", unit="picture"):
        random = Random(f"{seed} mirror {n}")
        scene, name, file = make_scene(random), f"{n:06d}", f"images/{n:06d}.png"
        draw(scene, random).save(folder / file)
        turns = [(question + ASK, answer) for question, answer in conversation(mirrored(scene), random)[:3]]
        turns += conversation(scene, random)[:2]
        records.append(llava_record(name, file, random.sample(turns, len(turns))))
    (folder / "instruct.json").write_text(json.dumps(records))


def held_out_questions(count, seed):
    """Questions about held-out scenes, each kind in turn: (kind, picture, question, answer, answer in a mirror)."""
    kinds, n = [*QUESTIONS], 0
    while count:
        random = Random(f"{seed} held out mirror {n}")
        n += 1
        kind, scene, again = kinds[count % len(kinds)], make_scene(random, held_out=True), random.getrandbits(32)
        # The same draws for both, so that the question is the same wherever it may be asked in the mirror too.
        plain, other = (QUESTIONS[kind](of, Random(again)) for of in (scene, mirrored(scene)))
        if plain and other and plain[0] == other[0]:
            count -= 1
            yield kind, draw(scene, random), *plain, other[1]


def grade(model, adapter, count, seed):
    """Accuracy before and after, plain and in a mirror, on the same held-out questions: rows by kind of question."""
    kinds, images, questions, truths, in_mirror = zip(*held_out_questions(count, seed))
    asked = {"plain": (questions, truths), "in a mirror": ([question + ASK for question in questions], in_mirror)}
    columns, chat = {}, Chat.from_pretrained(model, dtype=torch.float32)
    for when in ("before", "after"):
        if when == "after":
            load_adapter(chat.model, adapter)
        for how, (ask, expected) in asked.items():
            columns[f"{how}, {when}"] = right(chat, images, ask, expected)
    columns["the same in a mirror"] = [truth == other for truth, other in zip(truths, in_mirror)]
    columns["commonest answer"] = commonest(kinds, in_mirror)
    order = ("in a mirror, before", "in a mirror, after", "plain, before", "plain, after", "the same in a mirror", "commonest answer")
    return table(kinds, {name: columns[name] for name in order})


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("tiny/mirror-data"))
    parser.add_argument("--count", type=int, help="pictures to draw [4,000], or questions to grade [2,000]")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--grade", metavar="ADAPTER", help="grade tiny/llava without and with this adapter")
    args = parser.parse_args()
    if args.grade is None:
        write(args.out, args.count or 4000, args.seed)
    else:
        print(as_markdown("question", grade("tiny/llava", args.grade, args.count or 2000, args.seed)))


if __name__ == "__main__":
    main()
