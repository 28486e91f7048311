"""What the tokenizer files of a checkpoint say: Llama's vocabulary, and the tokens that were added to it, found in a text.
Imports nothing of ours.

Published checkpoints have the vocabulary as a SentencePiece model, tokenizer.model. Checkpoints that transformers 5 saves have only a
tokenizer.json, with the same pieces and the merges that make them. `sentencepiece_model` makes the same SentencePiece model of it, so
that one tokenizer is enough.
"""

import json
import operator
import re
import struct
from dataclasses import dataclass
from pathlib import Path

from sentencepiece import SentencePieceProcessor

SPECIAL_LITERALS = ("<unk>", "<s>", "</s>", "<image>", "<pad>")
BLANKS = r"[^\S\x1c-\x1f]*"  # white space as Unicode has it; Python's also holds four control characters
LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class AddedToken:
    """A token beside the SentencePiece model's, under the names that tokenizer.json has for its properties."""

    content: str
    id: int
    special: bool = True  # left out when decoding
    normalized: bool = False  # looked for in the text as SentencePiece sees it, with "▁" for a space and one in front
    lstrip: bool = False  # the white space before it belongs to it
    rstrip: bool = False  # the white space after it belongs to it
    single_word: bool = False  # not found inside a word

    @property
    def text(self):
        """What is looked for in a text."""
        return normalize(self.content) if self.normalized else self.content


def normalize(text):
    """A text as SentencePiece sees it."""
    return "▁" + text.replace(" ", "▁")


class Finder:
    """Finds AddedTokens in a text; where several fit, the longest."""

    def __init__(self, tokens):
        self.ids = {token.text: token.id for token in tokens}
        parts = []
        for token in sorted(tokens, key=lambda token: -len(token.text)):
            parts.append(BLANKS * token.lstrip + "(" + re.escape(token.text) + ")" + BLANKS * token.rstrip)
        self.pattern = re.compile("|".join(parts))

    def __len__(self):
        return len(self.ids)

    def split(self, text):
        """A text as a list: ids where tokens stand, and the stretches of text between them."""
        parts, start = [], 0
        for match in self.pattern.finditer(text):
            parts += [text[start : match.start()], self.ids[match[match.lastindex]]]
            start = match.end()
        return [*parts, text[start:]]


def all_added(model, added):
    """AddedTokens, those of the SentencePiece model itself included: the unknown, the beginning and the end.

    Raises ValueError if one is missing that LLaVA needs, has the id of another, or is not read here as tokenizer.json means it.
    """
    own = (model.unk_id(), model.bos_id(), model.eos_id())
    if min(own) < 0:
        raise ValueError("the SentencePiece model lacks a token for the unknown, the beginning or the end; Llama's has all three")
    tokens = {model.id_to_piece(i): AddedToken(model.id_to_piece(i), i) for i in own}
    tokens.update({token.content: token for token in added})
    for token in tokens.values():
        if token.single_word or token.normalized and (token.lstrip or token.rstrip):
            which = "single_word" if token.single_word else "normalized with lstrip or rstrip"
            raise ValueError(f"the added token {token.content!r} is {which}, which is not supported here")
        if token.id < len(model) and model.id_to_piece(token.id) != token.content:
            piece = model.id_to_piece(token.id)
            raise ValueError(f"the added token {token.content!r} has id {token.id}, which is {piece!r} in the vocabulary")
    specials = {token.content: token.id for token in tokens.values() if token.special}
    missing = [literal for literal in ("<image>", "<pad>") if literal not in specials]
    if missing:
        raise ValueError(f"the tokenizer has no {' and no '.join(missing)} token; a LLaVA checkpoint adds both")
    if len({*specials.values()}) < len(specials):
        raise ValueError(f"two special tokens have one id: {specials}")
    return [*tokens.values()]


def read_vocabulary(folder):
    """A checkpoint's SentencePieceProcessor and its AddedTokens. Raises FileNotFoundError or ValueError, naming the file."""
    folder = Path(folder)
    added = _added_tokens(folder)
    path, fast = folder / "tokenizer.model", folder / "tokenizer.json"
    if path.is_file():
        try:
            return SentencePieceProcessor(model_file=str(path)), added
        except (RuntimeError, OSError):
            raise ValueError(f"{path} is not a SentencePiece model, or is damaged{_pointer(path)}") from None
    if not fast.is_file():
        raise FileNotFoundError(f"{folder} has no tokenizer.model (a SentencePiece model, as Llama has), nor a tokenizer.json")
    try:
        model = SentencePieceProcessor(model_proto=sentencepiece_model(_read(fast), {token.content for token in added}))
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise ValueError(f"{fast} is damaged, or not a tokenizer's: {error!r}") from None
    except ValueError as error:
        raise ValueError(f"{fast}: {error}") from None
    return model, added


def _read(path):
    """The object that a JSON file holds; a field that is null counts as left out."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_without_null)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not valid JSON{_pointer(path)}: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"it holds a {type(raw).__name__}; expected a JSON object")
    return raw


def _without_null(pairs):
    return {name: value for name, value in pairs if value is not None}


def _pointer(path):
    """What to add to an error about a file if it is a pointer, which `git clone` leaves in place of the file itself."""
    with open(path, "rb") as file:
        found = file.read(len(LFS_POINTER)) == LFS_POINTER
    return " (it is a Git LFS pointer: run `git lfs pull`)" if found else ""


def _added_tokens(folder):
    """The AddedTokens of tokenizer_config.json and added_tokens.json; of tokenizer.json where neither has any."""
    found = {}
    for name in ("tokenizer_config.json", "added_tokens.json", "tokenizer.json"):
        path = folder / name
        if not path.is_file() or found and name == "tokenizer.json":
            continue
        try:
            raw = _read(path)
            if name == "tokenizer_config.json":
                listed = [_token(entry, int(i)) for i, entry in raw.get("added_tokens_decoder", {}).items()]
            elif name == "tokenizer.json":
                listed = [_token(entry, entry["id"]) for entry in raw.get("added_tokens", [])]
            else:  # {literal: id}; a token that no other file describes is special if it is one of LLaVA's
                listed = [_token({"content": text, "special": text in SPECIAL_LITERALS}, i) for text, i in raw.items() if text not in found]
            found.update({token.content: token for token in listed})
        except ValueError as error:
            raise ValueError(f"{path} is damaged, or not a tokenizer's: {error}") from None
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged, or not a tokenizer's: {error!r}") from None
    return list(found.values())


def _token(entry, i):
    """An AddedToken from an object of a JSON file."""
    content = entry["content"]
    if not (isinstance(content, str) and content):
        raise ValueError(f"added token {i} is {content!r}, not a text")
    flags = {flag: entry[flag] for flag in ("special", "normalized", "lstrip", "rstrip", "single_word") if flag in entry}
    for flag, value in flags.items():
        if type(value) is not bool:
            raise ValueError(f"added token {content!r} has {flag} {value!r}; expected true or false")
    return AddedToken(content, operator.index(i), **flags)


# What tokenizer.json says around its vocabulary when it is a SentencePiece model of Llama's kind.
SPACES = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
LLAMA = {"type": "BPE", "byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>", "ignore_merges": False}


def sentencepiece_model(raw, added):
    """The SentencePiece model, serialised, that does the same as a tokenizer.json.

    raw: what the file holds; added: the literals of the added tokens. The earliest merge is the best, so a piece's score is minus the
    rank of the first merge that makes it. The fields' numbers are those of sentencepiece_model.proto. Raises ValueError for a
    tokenizer of another kind.
    """
    model = {"ignore_merges": False} | raw["model"]
    same_model = all(model.get(name) == value for name, value in LLAMA.items())
    affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    same_spaces = raw.get("normalizer", {}).get("normalizers") == SPACES and "pre_tokenizer" not in raw
    if not same_model or affixes or not same_spaces:
        before = raw.get("pre_tokenizer", {}).get("type")
        raise ValueError(
            f"it is a {model.get('type')} tokenizer (byte_fallback {model.get('byte_fallback')}, pre_tokenizer {before}) of another kind "
            "than Llama's SentencePiece BPE, which alone is read here; if the checkpoint has a tokenizer.model, copy it to this folder"
        )
    ranks = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    pieces = sorted(model["vocab"], key=model["vocab"].get)
    if [model["vocab"][piece] for piece in pieces] != list(range(len(pieces))):
        raise ValueError("the ids of its vocabulary are not 0, 1, 2 …")
    data = b""
    for piece in pieces:
        kind = 1
        if piece == "<unk>":
            kind = 2
        elif piece in added:
            kind = 3  # control: never found in a text
        elif re.fullmatch("<0x[0-9A-F]{2}>", piece):
            kind = 6
        data += _field(1, _field(1, piece.encode()) + _field(2, -float(ranks.get(piece, len(ranks) + 1))) + _field(3, kind))
    trainer = _field(3, 2) + _field(35, 1)  # BPE, byte fallback
    normalizer = _field(1, b"identity") + _field(3, 1) + _field(4, 0) + _field(5, 1)  # a space in front, further ones kept, as "▁"
    return data + _field(2, trainer) + _field(3, normalizer)


def _field(number, value):
    """A field of a protobuf message: its number and wire type, then a varint, a 32-bit float or bytes with their length."""
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    return _varint(number << 3) + _varint(value)


def _varint(value):
    """Seven bits to a byte, the lowest first; the eighth says that more follow."""
    data = bytearray()
    while value > 127:
        data.append(value & 127 | 128)
        value >>= 7
    return bytes([*data, value])
