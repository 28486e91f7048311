"""Make tests/fixtures/conversations.json: 200 conversations, and what the original authors' own functions make of them for training.

git clone https://github.com/haotian-liu/LLaVA AUTHORS && git -C AUTHORS checkout c121f04
pip install transformers==4.31.0                    # that LLaVA v1.0.1 to v1.1.3 pin
python -m tests.make_conversations AUTHORS

The conversations are made up here, from a seed. After them stand some in which ours differs from theirs on purpose. Of ids and labels the
file holds hashes. The vocabulary is that of tests/fixtures/tokenizer in transformers' slow LlamaTokenizer, with `legacy=True`.

    python -m tests.make_conversations AUTHORS FOLDER

takes the vocabulary of another folder, as that of a Llama, and writes nothing. It prints how many conversations are equal, and in which
pieces the others differ, with `legacy=True` and with `legacy=False`. With the vocabulary of llava-hf/llava-1.5-7b-hf 200 of 200 are equal
with `legacy=True`. With `legacy=False` the 77 of one turn are; in the 123 others later turns begin with "US" for our "▁US", and nothing
else is different, labels included.
"""

import hashlib
import json
import random
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

from tokenizer import Tokenizer
from training.data import encode_caption, encode_conversation

FIXTURES = Path(__file__).parent / "fixtures"
COUNT, SEED = 200, 0

WORDS = """the a red blue large small bird house street table window man woman child dog two three seven photograph left right corner
sky under behind between stands holds looks bright wooden empty old kitchen station because however probably""".split()
ELSEWHERE = """Straße ça naïve œuvre Ελλάδα улица ночь 東京 写真 안녕하세요 مرحبا שלום हिन्दी ½ € “quoted” – … 😀 👩‍👧 ﬁ İ é é ﷽"""
ELSEWHERE = ELSEWHERE.split(" ")
LINES = [
    "1. one\n2. two",
    "- a\n- b",
    "```py\nx = {'a': [1]}\n```",
    "| a | b |\n|---|---|",
    "A. cat\nB. dog",
    "f(x) = x^2",
    "http://x.org/a?b=1",
]
ODD = ["USER", "user:", "Assistant:", "###", "</s", "<s", "<img>", "[INST]", "image>", "&lt;image&gt;", "\\n", "%s", "Human: no"]


def words(random, least, most, elsewhere=0.0):
    chosen = [random.choice(ELSEWHERE if random.random() < elsewhere else WORDS) for _ in range(random.randint(least, most))]
    return " ".join(chosen)


def question(random, elsewhere=0.0):
    return words(random, 1, 12, elsewhere).capitalize() + random.choice(["?", ".", " ?", "", "!"])


def answer(random, elsewhere=0.0):
    return words(random, 1, 25, elsewhere).capitalize() + random.choice([".", "", "!", ".\n\nAnd so on."])


def turns(random, count, elsewhere=0.0):
    said = []
    for _ in range(count):
        said += [question(random, elsewhere), answer(random, elsewhere)]
    return said


def blanks(random):
    return random.choice([" ", "  ", "\n", "\t", " \n ", "\u3000", "\xa0"])


def conversation(kind, random):
    """What is said, in turns, of one kind of conversation."""
    said = turns(random, 1 if kind in ONE_TURN else random.randint(2, 5), elsewhere=0.5 if "unicode" in kind else 0.0)
    if kind == "blanks around a question":
        said[0] = blanks(random) + said[0] + blanks(random)
    if kind == "blanks around an answer":
        n = random.randrange(1, len(said), 2)
        said[n] = blanks(random) + said[n] + random.choice(["", blanks(random)])
    if kind == "long":
        said[1] = words(random, 120, 180, 0.05)
    if kind == "lines":
        said[0], said[1] = f"{random.choice(LINES)}\n{said[0]}", f"{said[1]}\n\n{random.choice(LINES)}"
    if kind == "words that look like marks":
        said[0], said[-1] = f"{said[0]} {random.choice(ODD)}", f"{random.choice(ODD)} {said[-1]}"
    if kind in ("text, one turn", "text, several turns"):
        return said
    place = random.choice(["{}\n<image>", "{} <image>", "<image>{}", "Here: <image> {}"]) if kind == "picture elsewhere" else "<image>\n{}"
    said[0] = place.format(said[0])
    return said


KINDS = ["one turn", "several turns", "one turn of unicode", "several turns of unicode", "picture elsewhere", "long", "lines"]
KINDS += ["blanks around a question", "blanks around an answer", "words that look like marks", "text, one turn", "text, several turns"]
KINDS += ["the assistant speaks first"]
ONE_TURN = ("one turn", "one turn of unicode", "text, one turn", "long", "lines")
# Where ours is another on purpose: what is said, and how many pictures the record names.
DIFFERENT = {
    "a picture and no words": (["<image>\n", "A cat."], 1),  # theirs takes the newline after <image> away
    "an empty answer": (["<image>\nWhat is it?", "", "Why?", "So."], 1),  # theirs learns nothing of the whole conversation
    "an answer to nothing": (["", "A cat."], 0),  # theirs leaves two spaces
    "blanks around a question without a picture": ([" What is it? ", "A cat."], 0),  # theirs leaves them
    "blanks around a later question": (["<image>\nWhat is it?", "A cat.", " Why? \n", "So."], 1),  # theirs leaves them
    "two pictures": (["<image>\n<image>\nWhich?", "Both."], 2),  # theirs makes one of them
    "a mark of the assistant's turn in a question": (
        ["<image>\nWhat is ASSISTANT: here?", "A word."],
        1,
    ),  # theirs learns nothing; ours refuses it
    "an end mark in an answer": (["<image>\nWhat is it?", "A</s>cat."], 1),  # theirs learns nothing; ours refuses it
}


def made_up():
    """COUNT records in LLaVA's format, with "kind" beside, and those of DIFFERENT, with "differs"."""
    records = []
    for n in range(COUNT):
        source, kind = random.Random(f"{SEED} {n}"), KINDS[n % len(KINDS)]
        said = conversation(kind, source)
        record = in_their_format(said, f"{n}", kind, "<image>" in "".join(said))
        if kind == "the assistant speaks first":
            record["conversations"].insert(0, {"from": "gpt", "value": "Hello."})
        records.append(record)
    for n, (kind, (said, pictures)) in enumerate(DIFFERENT.items(), COUNT):
        records.append(in_their_format(said, f"{n}", kind, pictures) | {"differs": True})
    return records


def in_their_format(said, name, kind, pictures):
    speakers = ["human", "gpt"] * len(said)
    exchanged = [{"from": speaker, "value": value} for speaker, value in zip(speakers, said)]
    record = {"id": name, "kind": kind, "conversations": exchanged}
    if pictures:
        record["image"] = ["x.jpg"] * pictures if pictures > 1 else "x.jpg"
    return record


def formats(record):
    """The formats that a record is written in: the plain one is for a picture, a question and an answer."""
    plain = "image" in record and len(record["conversations"]) == 2 and "differs" not in record
    return ["v1", "plain"] if plain else ["v1"]


def ours(record, tokenizer):
    """{format: (ids, labels)} as train.py has them."""
    encode = {"v1": partial(encode_conversation, style="v1"), "plain": encode_caption}
    return {style: encode[style](record, tokenizer) for style in formats(record)}


def hashed(values):
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


# The authors' functions


def authors(folder):
    """Their training script as a module. What it imports of the model and of the trainer is left out: the functions here need neither."""
    package = ModuleType("llava")
    package.__path__ = [str(Path(folder) / "llava")]
    left_out = {name: ModuleType(name) for name in ("llava.model", "llava.train.llava_trainer")}
    left_out["llava.train.llava_trainer"].LLaVATrainer = None
    sys.modules |= {"llava": package, **left_out}
    from llava.train import train

    return train


def theirs(record, train, tokenizer, image_id):
    """{format: (ids, labels)} as their data set gives them."""
    options, found = SimpleNamespace(is_multimodal=True, mm_use_im_start_end=False), {}
    for style in formats(record):
        train.conversation_lib.default_conversation = train.conversation_lib.conv_templates[style]
        sources = [json.loads(json.dumps(record["conversations"]))]  # a copy: they write into it
        if "image" in record:
            sources = train.preprocess_multimodal(sources, options)
        made = train.preprocess(sources, tokenizer, has_image="image" in record)
        ids = [image_id if i == train.IMAGE_TOKEN_INDEX else i for i in made["input_ids"][0].tolist()]
        found[style] = ids, made["labels"][0].tolist()
    return found


def their_tokenizer(folder, legacy):
    from transformers import LlamaTokenizer

    tokenizer = LlamaTokenizer.from_pretrained(folder, legacy=legacy, model_max_length=2048, padding_side="right")
    tokenizer.pad_token = tokenizer.unk_token  # as their training script has it
    return tokenizer


def compare(records, train, folder):
    """Print how many are equal, and of the others the pieces in which they differ."""
    tokenizer = Tokenizer.from_pretrained(folder)
    piece = lambda i: tokenizer.model.id_to_piece(i) if i < len(tokenizer.model) else str(i)
    for legacy in (True, False):
        slow, equal, others = their_tokenizer(folder, legacy), 0, {}
        for record in records:
            here, there = ours(record, tokenizer), theirs(record, train, slow, tokenizer.image_id)
            if here == there:
                equal += 1
                continue
            for style in here:
                if here[style] == there[style]:
                    continue
                (ids, labels), (their_ids, their_labels) = here[style], there[style]
                different = "another length" if len(ids) != len(their_ids) else ""
                if not different:
                    different = ", ".join(sorted({f"{piece(a)} for {piece(b)}" for a, b in zip(their_ids, ids) if a != b}))
                    same = [label == -100 for label in labels] == [label == -100 for label in their_labels]
                    different += "" if same else "; other words are learnt"
                others.setdefault((style, different), []).append(f"{record['id']} ({record['kind']})")
        print(f"legacy={legacy}: {equal} of {len(records)} equal")
        for (style, different), names in others.items():
            print(f"  {len(names)} in {style}: {different}: {', '.join(names[:5])} …")


def main(source, folder=None):
    records, train = made_up(), authors(source)
    if folder is not None:
        compare(records[:COUNT], train, Path(folder))
        return
    tokenizer = their_tokenizer(FIXTURES / "tokenizer", legacy=True)
    image_id = Tokenizer.from_pretrained(FIXTURES / "tokenizer").image_id
    for record in records:
        for style, made in theirs(record, train, tokenizer, image_id).items():
            record[style] = [hashed(values) for values in made]
    lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    (FIXTURES / "conversations.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
