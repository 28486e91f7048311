"""Make tests/fixtures/tokenizer: a small SentencePiece model with Llama's settings. `python -m tests.make_tokenizer`

Where transformers is installed it also writes golden.json: what its tokenizer makes of random strings and ids, against
which test_tokenizer.py holds ours without needing transformers.
"""

import io
import json
import random
from pathlib import Path

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

FOLDER = Path(__file__).parent / "fixtures" / "tokenizer"
TEXT = """
USER: What is in this picture? ASSISTANT: There is a small red boat on the lake, and two people are in it.
USER: How many windows does the house have? ASSISTANT: The house has 12 windows, 3 of which are open.
###Human: Describe what you see.###Assistant: I see a street after rain. A man with an umbrella is crossing it.
###Human: What colour is the umbrella?###Assistant: The umbrella is yellow; it is the brightest thing in the picture.
A chat between a curious human and a patient assistant. The assistant answers what the human asks, and no more.
What is shown within the red rectangle? What is shown at the green point? What does the arrow point to?
There is a white cup on the shelf above the sink. There is a picture of a mountain on the wall behind the shelf.
The woman on the left is reading a newspaper; the child on the right is drawing a horse with a long tail.
It was 7:45 in the morning, the train was late, and everybody on the platform was looking the same way.
Is the door open or closed? The door is closed, but the window beside it is open. Can you read the sign? It says STOP.
    if the_picture is None:
        return "nothing to see"
A café in Zürich, a piñata, a crème brûlée, a smörgåsbord: 5 € each, “nothing more” – or so it says…
Привет, мир! Где моя кошка? На столе. これは猫です。那是一只猫。
"""
SPECIALS = ("<unk>", "<s>", "</s>", "<image>", "<pad>")


def train(text, size):
    """A serialized SentencePiece model with the settings that Llama's own has in its trainer and normalizer specs."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(text.strip("\n").split("\n")),  # a newline is never in the vocabulary, always a byte
        model_writer=model,
        model_type="bpe",
        vocab_size=size,
        character_coverage=0.995,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def tokenizer_json(model):
    """The same model as the file that transformers reads, which the published checkpoints have beside tokenizer.model.

    Without it transformers converts tokenizer.model by newer rules, which put no space before the first word.
    """
    pieces = [model.id_to_piece(i) for i in range(len(model))]
    ids = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for piece in sorted(pieces[3:], key=lambda piece: -model.get_score(ids[piece])):  # likeliest first
        pairs = [(piece[:n], piece[n:]) for n in range(1, len(piece))]
        pairs = [pair for pair in pairs if pair[0] in ids and pair[1] in ids]
        merges += [[a, b] for a, b in sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))]
    numbered = {"<unk>": 0, "<s>": 1, "</s>": 2, "<image>": len(model), "<pad>": len(model) + 1}
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    bos = [{"SpecialToken": {"id": "<s>", "type_id": kind}} for kind in (0, 1)]
    text = [{"Sequence": {"id": name, "type_id": kind}} for kind, name in enumerate("AB")]
    space_mark = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    mark_space = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    bpe = {"type": "BPE", "dropout": None, "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    affixes = {"continuing_subword_prefix": None, "end_of_word_suffix": None, "ignore_merges": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": literal} | flags for literal, i in numbered.items()],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, space_mark]},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos[0], text[0]],
            "pair": [bos[0], text[0], bos[1], text[1]],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": [mark_space, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]},
        "model": bpe | affixes | {"vocab": ids, "merges": merges},
    }


TRICKY = (
    " |  |   |\n|\n\n|\t|\r\n|a|Hello| world|###|##|#|▁|é|e\u0301|\u00a0|\u3000|\u200b|\ufeff|👩‍👩‍👧|🇳🇵|中文|猫"
    "|кошка|<|>|</|<s|<image|USER:| ASSISTANT:|\x00|\x7f|ﬁ|½|İ|ß|<0x0A>|�"
).split("|")


def random_text(random):
    """A string of the awkward kind: special literals, odd white space, ASCII noise and any Unicode character."""
    parts = []
    for _ in range(random.randint(0, 12)):
        kind = random.random()
        if kind < 0.25:
            parts.append(random.choice(SPECIALS))
        elif kind < 0.55:
            parts.append(random.choice(TRICKY))
        elif kind < 0.8:
            parts.append("".join(chr(random.randint(32, 126)) for _ in range(random.randint(1, 8))))
        else:
            codes = [random.randint(1, 0x10FFFF) for _ in range(random.randint(1, 4))]
            parts.append("".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000))
    return "".join(parts)


def random_ids(random, size, space):
    """Ids of the awkward kind: byte tokens that are not UTF-8, specials and lone spaces (space: the id of "▁")."""
    ranges = ((0, size - 1), (3, 258), (0, 2), (space, space), (225, 258))  # 225 … 258: bytes 0xDE … 0xFF
    return [random.randint(*random.choice(ranges)) for _ in range(random.randint(0, 12))]


def write_json(name, content, **options):
    (FOLDER / name).write_text(json.dumps(content, **options) + "\n", encoding="utf-8")


def main():
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "tokenizer.model").write_bytes(train(TEXT, 512))
    model = SentencePieceProcessor(model_file=str(FOLDER / "tokenizer.model"))
    fast = tokenizer_json(model)
    write_json("tokenizer.json", fast, ensure_ascii=False, separators=(",", ":"))
    write_json("added_tokens.json", {"<image>": len(model), "<pad>": len(model) + 1})
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # takes tokenizer.json as it stands
        "added_tokens_decoder": {token.pop("id"): token for token in map(dict, fast["added_tokens"])},
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "clean_up_tokenization_spaces": False,
    }
    write_json("tokenizer_config.json", config, indent=1)
    try:
        from transformers import AutoTokenizer
    except ImportError:
        print("transformers is not installed: golden.json stays as it is")
        return
    reference, source = AutoTokenizer.from_pretrained(FOLDER), random.Random(0)
    texts = [random_text(source) for _ in range(250)]
    lists = [random_ids(source, len(model) + 10, model.piece_to_id("▁")) for _ in range(250)]
    golden = {
        "encode": [[text, reference(text).input_ids] for text in texts],
        "decode": [[ids, reference.decode(ids, skip_special_tokens=True)] for ids in lists],
    }
    write_json("golden.json", golden, separators=(",", ":"))


if __name__ == "__main__":
    main()
