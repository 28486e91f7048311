"""Something new for the bundled model to learn by LoRA: the same questions about the same world, asked and answered in German.

    python -m tiny.german                       # writes tiny/german-data, in LLaVA's own format
    python -m tiny.german --grade ADAPTER       # what an adapter taught tiny/llava, and what it made it forget

What the English says is put into German by rule, sentence by sentence, so both languages are graded on the same held-out
questions about the same pictures.
"""

import argparse
import json
import re
from pathlib import Path
from random import Random

import torch
from tqdm import tqdm

from chat import Chat
from lora import load_adapter
from tiny.grade import as_markdown, commonest, right, table
from tiny.world import KINDS, NUMBERS, PLACES, conversation, draw, held_out_questions, llava_record, make_scene

MASCULINE = {"circle": "Kreis", "star": "Stern", "ring": "Ring"}
NEUTER = {"square": "Quadrat", "triangle": "Dreieck", "cross": "Kreuz", "thing": "Ding"}
NOUNS = MASCULINE | NEUTER
SINGULAR = {plural: kind for kind, plural in KINDS.items()} | {"things": "thing"}
ADJECTIVES = {
    "small": "klein", "large": "groß", "red": "rot", "orange": "orange", "yellow": "gelb", "green": "grün", "blue": "blau",
    "purple": "violett", "black": "schwarz",
}  # fmt: skip
WHERE = ("oben links", "oben", "oben rechts", "links", "in der Mitte", "rechts", "unten links", "unten", "unten rechts")
WHERE = dict(zip(PLACES, WHERE, strict=True))
ARTICLES = {  # and the ending of an adjective after them
    "a": (("ein", "er"), ("ein", "es")),
    "a, as an object": (("einen", "en"), ("ein", "es")),
    "the": (("der", "e"), ("das", "e")),
    "to the": (("dem", "en"), ("dem", "en")),
}
WORDS = {  # answers of one word
    "Yes": "Ja", "No": "Nein", "Nothing": "Nichts", "Left": "Links", "Right": "Rechts", "Above": "Darüber", "Below": "Darunter",
    **dict(zip(NUMBERS, ("Keine", "Eins", "Zwei", "Drei", "Vier", "Fünf"), strict=True)),
}  # fmt: skip


def thing(words, article):
    """ "large red star", "the" -> "der große rote Stern"."""
    *adjectives, noun = words.split()
    word, ending = ARTICLES[article][noun in NEUTER]
    return " ".join([word, *(ADJECTIVES[adjective].removesuffix("e") + ending for adjective in adjectives), NOUNS[noun]])


def things(words):
    """ "red things" -> "rote Dinge"."""
    *adjectives, noun = words.split()
    return " ".join([*(ADJECTIVES[adjective].removesuffix("e") + "e" for adjective in adjectives), NOUNS[SINGULAR[noun]] + "e"])


SENTENCES = (  # what an English question is like, and the German one, from the words that stood in the brackets
    (r"Describe the picture\.", lambda: "Beschreibe das Bild."),
    (r"What does the picture show\?", lambda: "Was zeigt das Bild?"),
    (r"What do you see\?", lambda: "Was siehst du?"),
    (r"How many things are there\?", lambda: "Wie viele Dinge gibt es?"),
    (r"How many shapes are in the picture\?", lambda: "Wie viele Formen sind im Bild?"),
    (r"Count the things\.", lambda: "Zähle die Dinge."),
    (r"How many (.+) are there\?", lambda a: f"Wie viele {things(a)} gibt es?"),
    (r"What colour is the (.+)\?", lambda a: f"Welche Farbe hat {thing(a, 'the')}?"),
    (r"Which colour does the (.+) have\?", lambda a: f"Von welcher Farbe ist {thing(a, 'the')}?"),
    (r"Is the (.+) small or large\?", lambda a: f"Ist {thing(a, 'the')} klein oder groß?"),
    (r"What is ((?:at|on|in) .+)\?", lambda where: f"Was ist {WHERE[where]}?"),
    (r"Which thing is (.+)\?", lambda where: f"Welches Ding ist {WHERE[where]}?"),
    (r"Where is the (.+)\?", lambda a: f"Wo ist {thing(a, 'the')}?"),
    (r"Is there an? (.+)\?", lambda a: f"Gibt es {thing(a, 'a, as an object')}?"),
    (r"Is the (.+) left or right of the (.+)\?", lambda a, b: f"Ist {thing(a, 'the')} links oder rechts von {thing(b, 'to the')}?"),
    (r"Is the (.+) above or below the (.+)\?", lambda a, b: f"Ist {thing(a, 'the')} über oder unter {thing(b, 'to the')}?"),
    (r"Are the (.+) and the (.+) both (.+)\?", lambda a, b, c: f"Sind {thing(a, 'the')} und {thing(b, 'the')} beide {ADJECTIVES[c]}?"),
)


def german_question(question):
    for pattern, sentence in SENTENCES:
        if found := re.fullmatch(pattern, question):
            return sentence(*found.groups())
    raise ValueError(f"no German for {question!r}")


def german_answer(answer):
    said = answer.removesuffix(".")
    said = said[0].lower() + said[1:]
    if said.capitalize() in WORDS:
        text = WORDS[said.capitalize()]
    elif said in ADJECTIVES:
        text = ADJECTIVES[said]
    elif said in WHERE:
        text = WHERE[said]
    else:  # "a large red star" or a whole description
        place = "|".join(sorted(PLACES, key=len, reverse=True))
        text = re.sub(place, lambda found: WHERE[found[0]], said)
        text = re.sub(rf"\ba ((?:\w+ )*?(?:{'|'.join(KINDS)}))\b", lambda found: thing(found[1], "a"), text).replace(" and ", " und ")
    return text[0].upper() + text[1:] + "."


def german(turns):
    return [(german_question(question), german_answer(answer)) for question, answer in turns]


def write(folder, count, seed):
    """Training data, like tiny.world's `instruct.json`; no scene is a held-out one."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records = []
    for n in tqdm(range(count), desc="drawing", unit="picture"):
        random = Random(f"{seed} German {n}")
        scene, name, file = make_scene(random), f"{n:06d}", f"images/{n:06d}.png"
        draw(scene, random).save(folder / file)
        records.append(llava_record(name, file, german(conversation(scene, random)[:5])))  # all would not fit the context
    (folder / "instruct.json").write_text(json.dumps(records))


def grade(model, adapter, count, seed):
    """Accuracy before and after, in both languages, on the same held-out questions: rows by kind of question."""
    kinds, images, questions, truths = zip(*held_out_questions(count, seed))
    languages = {"German": tuple(zip(*german(zip(questions, truths)))), "English": (questions, truths)}
    columns, chat = {}, Chat.from_pretrained(model, dtype=torch.float32)
    for when in ("before", "after"):
        if when == "after":
            load_adapter(chat.model, adapter)
        for language, (asked, expected) in languages.items():
            columns[f"{language} {when}"] = right(chat, images, asked, expected)
    columns["commonest answer"] = commonest(kinds, truths)
    return table(kinds, dict(sorted(columns.items(), key=lambda column: column[0].split()[0] != "German")))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("tiny/german-data"))
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
