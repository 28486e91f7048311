"""Text to token ids and back, the chat formats, and the expansion of `<image>`.

The vocabulary is a SentencePiece BPE model (Kudo & Richardson 2018, https://arxiv.org/abs/1808.06226) with byte fallback,
Llama's, to which LLaVA adds two special tokens: `<image>`, whose place the picture takes, and `<pad>`.
"""

import json
import operator
import re
import struct
from dataclasses import dataclass
from pathlib import Path

from sentencepiece import SentencePieceProcessor

BLANKS = r"[^\S\x1c-\x1f]*"  # white space as Unicode has it; Python's also holds four control characters
LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class AddedToken:
    """A token beside the SentencePiece model's, under the names that tokenizer.json has for its properties."""

    content: str
    id: int
    special: bool = True  # left out when decoding
    normalized: bool = False  # looked for in the text as SentencePiece sees it, with "▁" for a space and one in front
    lstrip: bool = False  # takes the white space before it along
    rstrip: bool = False  # and that behind it
    single_word: bool = False


class Tokenizer:
    """encode(text) -> ids, decode(ids) -> text; attributes bos_id, eos_id, pad_id, image_id and specials (literal -> id)."""

    def __init__(self, model, added):
        """model: a SentencePieceProcessor; added: AddedTokens, the special ones of the model itself or not among them."""
        self.model = model
        self.bos_id, self.eos_id = model.bos_id(), model.eos_id()
        own = (model.unk_id(), self.bos_id, self.eos_id)
        if min(own) < 0:
            raise ValueError("the SentencePiece model lacks a token for the unknown, the beginning or the end; Llama's has all three")
        tokens = {model.id_to_piece(i): AddedToken(model.id_to_piece(i), i) for i in own}
        tokens.update({token.content: token for token in added})
        for token in tokens.values():
            self._check(token)
        self.specials = {token.content: token.id for token in tokens.values() if token.special}
        missing = [literal for literal in ("<image>", "<pad>") if literal not in self.specials]
        if missing:
            raise ValueError(f"the tokenizer has no {' and no '.join(missing)} token; a LLaVA checkpoint adds both")
        self.image_id, self.pad_id = self.specials["<image>"], self.specials["<pad>"]
        self._special_ids = set(self.specials.values())
        if len(self._special_ids) < len(self.specials):
            raise ValueError(f"two special tokens have one id: {self.specials}")
        self._raw = [token for token in tokens.values() if not token.normalized]
        self._normalized = [token for token in tokens.values() if token.normalized]
        self._texts = {token.id: token.content for token in self._raw}
        self._texts.update({token.id: _normalize(token.content) for token in self._normalized})
        self._raw_pattern = _pattern((token.content, token.lstrip, token.rstrip) for token in self._raw)
        self._normalized_pattern = _pattern((self._texts[token.id], False, False) for token in self._normalized)
        self._raw_ids = {token.content: token.id for token in self._raw}
        self._normalized_ids = {self._texts[token.id]: token.id for token in self._normalized}

    def _check(self, token):
        """Raises ValueError for an added token that is not read as tokenizer.json means it, or is not the model's."""
        if token.single_word or token.normalized and (token.lstrip or token.rstrip):
            which = "single_word" if token.single_word else "normalized with lstrip or rstrip"
            raise ValueError(f"the added token {token.content!r} is {which}, which is not supported here")
        if token.id < len(self.model) and self.model.id_to_piece(token.id) != token.content:
            piece = self.model.id_to_piece(token.id)
            raise ValueError(f"the added token {token.content!r} has id {token.id}, which is {piece!r} in the vocabulary")

    @classmethod
    def from_pretrained(cls, folder):
        """Read tokenizer.model, or where there is none the same vocabulary from tokenizer.json; and the added tokens.

        Raises FileNotFoundError or ValueError, naming the file.
        """
        folder = Path(folder)
        added = _added_tokens(folder)
        path, fast = folder / "tokenizer.model", folder / "tokenizer.json"
        if path.is_file():
            try:
                return cls(SentencePieceProcessor(model_file=str(path)), added)
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
        return cls(model, added)

    def encode_more(self, text):
        """Ids of a text that goes on in the middle of another: no BOS, and no leading space of SentencePiece's."""
        return self.model.encode("\n" + text)[len(self.model.encode("\n")) :]  # a newline joins with nothing

    def encode(self, text):
        """Ids of a text, BOS first. An added token's literal in the text becomes its one id, `<image>` included.

        Each stretch of text between special tokens is encoded as if it stood alone, with SentencePiece's leading space:
        the newline after `<image>` becomes "▁", "\\n". That is what the checkpoints were trained on.
        Raises ValueError for half a character (a lone surrogate), which no UTF-8 text holds.
        """
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"the text {text!r} is not valid Unicode: it holds half a surrogate pair")
        ids, start = [self.bos_id], 0
        for match in self._raw_pattern.finditer(text):
            ids += self._encode_stretch(text[start : match.start()])
            ids.append(self._raw_ids[match[match.lastindex]])
            start = match.end()
        return ids + self._encode_stretch(text[start:])

    def _encode_stretch(self, text):
        """Ids of a text between tokens that are found in it as it stands: of those that SentencePiece's form of it holds, too."""
        if not text or not self._normalized:
            return self.model.encode(text)
        ids, start, text = [], 0, _normalize(text)
        for match in self._normalized_pattern.finditer(text):
            ids += self.encode_more(text[start : match.start()]) + [self._normalized_ids[match[0]]]
            start = match.end()
        return ids + self.encode_more(text[start:])

    def decode(self, ids):
        """The text of some ids, special tokens left out, without the leading space. Bytes that are not UTF-8 become "�"; an id
        that no token has is written out, as "<|id 32050|>"."""
        return "".join(self.stream(ids))

    def stream(self, ids):
        """decode, piece by piece: yields text as soon as it is certain, so never half a character."""
        space = " "  # the leading one, still to be taken off
        for text in self._spelt(ids):
            text, space = text.removeprefix(space), ""
            if text:
                yield text

    def _spelt(self, ids):
        """The texts of ids, of which none is empty. A character outside the vocabulary is spelt in byte tokens; their text is held
        until the run of bytes has ended."""
        run = bytearray()
        for i in ids:
            if i in self._special_ids:
                continue
            if i < len(self.model) and self.model.is_byte(i):
                run.append(int(self.model.id_to_piece(i)[1:-1], 16))  # "<0x0A>"
                continue
            yield _text_of(run) + self._text(i)
            run.clear()
        if run:
            yield _text_of(run)

    def _text(self, i):
        if i in self._texts:
            return self._texts[i].replace("▁", " ")
        return self.model.id_to_piece(i).replace("▁", " ") if i < len(self.model) else f"<|id {i}|>"


def _text_of(run):
    """The text of a run of bytes; one wrong byte makes all of them "�"."""
    try:
        return run.decode()
    except UnicodeDecodeError:
        return "�" * len(run)


def _normalize(text):
    """A text as SentencePiece sees it."""
    return "▁" + text.replace(" ", "▁")


def _pattern(tokens):
    """Finds any of some (literal, lstrip, rstrip), where several fit the longest; its group is the literal."""
    parts = []
    for literal, lstrip, rstrip in sorted(tokens, key=lambda token: -len(token[0])):
        parts.append(BLANKS * lstrip + "(" + re.escape(literal) + ")" + BLANKS * rstrip)
    return re.compile("|".join(parts))


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
    """What to add to an error about a file that `git clone` left to Git LFS to fetch."""
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
            else:  # ids alone: what no other file describes is special if it is LLaVA's
                listed = [_token({"content": text, "special": text in SPECIAL_LITERALS}, i) for text, i in raw.items() if text not in found]
            found.update({token.content: token for token in listed})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged, or not a tokenizer's: {error!r}") from None
    return list(found.values())


def _token(entry, i):
    """An AddedToken from an object of a JSON file."""
    content = entry["content"]
    if not (isinstance(content, str) and content):
        raise ValueError(f"added token {i} is {content!r}, not a text")
    flags = {flag: entry[flag] for flag in ("special", "normalized", "lstrip", "rstrip", "single_word") if flag in entry}
    return AddedToken(content, operator.index(i), **flags)


# What tokenizer.json says around its vocabulary when it is a SentencePiece model of Llama's kind.
SPACES = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
LLAMA = {"type": "BPE", "byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>", "ignore_merges": False}


def sentencepiece_model(raw, added):
    """The SentencePiece model, serialised, that does the same as a tokenizer.json, which is what transformers 5 saves alone.

    raw: what the file holds; added: the literals of the added tokens. A piece's score is minus the rank of the first merge that makes
    it. The fields' numbers are those of sentencepiece_model.proto. Raises ValueError for a tokenizer of another kind.
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


def stop_at(pieces, stop):
    """Pass text through up to a stop string, even one split over pieces: what could be its beginning is held back."""
    held = ""
    for piece in pieces:
        held += piece
        if stop in held:
            if held.index(stop):
                yield held[: held.index(stop)]
            return
        safe = next(n for n in range(len(held) + 1) if stop.startswith(held[n:]))  # the rest may yet become the stop
        if safe:
            yield held[:safe]
        held = held[safe:]
    if held:
        yield held


def expand_images(ids, image_id, count, values=None):
    """Repeat each `<image>` id `count` times, once for each feature that the picture will put in its place.

    values: what belongs to the ids one by one (a mask, labels): repeated in the same places, and returned in their stead.
    """
    return [value for i, value in zip(ids, ids if values is None else values) for _ in range(count if i == image_id else 1)]


SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)

SPECIAL_LITERALS = ("<unk>", "<s>", "</s>", "<image>", "<pad>")


@dataclass(frozen=True)
class Style:
    """What stands around the turns. A conversation is the system sentence with its separator, `begin`, then for each exchange
    `user` + question + `assistant` + " " + answer + `end`. The model writes `end` itself when it has finished."""

    user: str
    assistant: str
    end: str
    turns: tuple[str, ...]  # what starts a turn, and may stand in no question
    system: str = ""
    separator: str = " "
    begin: str = ""

    def forbidden(self, role):
        """The literals that a message of this role may not hold: the model would not read them as text."""
        return SPECIAL_LITERALS if role == "assistant" else SPECIAL_LITERALS + self.turns


STYLES = {
    "llava": Style(user="USER: ", assistant=" ASSISTANT:", end="</s>", turns=("USER:", "ASSISTANT:")),
    "bakllava": Style(user="USER: ", assistant="\nASSISTANT:", end="</s>", turns=("USER:", "ASSISTANT:")),
    "vip": Style("Human: ", "###Assistant:", "###", turns=("###",), system=SYSTEM, separator="", begin="###"),
    # What LLaVA-1.5 and ViP-LLaVA were trained with by their authors.
    "v1": Style("USER: ", " ASSISTANT:", "</s>", turns=("USER:", "ASSISTANT:"), system=SYSTEM.replace("human", "user")),
}


def chat_prompt(messages, style):
    """The prompt text of a conversation, up to where the assistant speaks next (or to the end of its last answer).

    messages: [{"role": "user", "content": …}, {"role": "assistant", "content": …}, …], before them at most one
        {"role": "system"}, which replaces the style's own system sentence. Content is a text, or a list of parts
        {"type": "image"} and {"type": "text", "text": …}; a turn's pictures stand before its text, as in training.
    style: "llava", "bakllava", "vip" or "v1".

    What a user types is text and nothing else. So a text that holds a special token's literal ("<image>", "</s>") or, in
    a user's or the system's words, a mark that starts a turn ("ASSISTANT:", "###") is a ValueError: the tokenizer has no
    way to spell such a literal as plain text. A message out of turn is a ValueError too.
    """
    if style not in STYLES:
        raise ValueError(f"chat style is {style!r}; expected one of {', '.join(STYLES)}")
    form, turns = STYLES[style], list(messages)
    system = _content(turns.pop(0), style)[0] if turns and turns[0]["role"] == "system" else form.system
    prompt = (system + form.separator if system else "") + form.begin
    for n, message in enumerate(turns):
        role = ("user", "assistant")[n % 2]
        if message["role"] != role:
            raise ValueError(f"message {n + 1} has role {message['role']!r}; user and assistant alternate, so expected {role!r}")
        text, images = _content(message, style)
        if role == "user":
            prompt += form.user + "<image>\n" * images + text + form.assistant
        else:
            prompt += " " + text + form.end
    return prompt


def _content(message, style):
    """A message's text and its number of pictures."""
    parts = message["content"]
    if isinstance(parts, str):
        parts = [{"type": "text", "text": parts}]
    if unknown := [part["type"] for part in parts if part["type"] not in ("text", "image")]:
        raise ValueError(f"a message has a part of type {unknown[0]!r}; expected 'text' or 'image'")
    text = "".join(part["text"] for part in parts if part["type"] == "text")
    for literal in STYLES[style].forbidden(message["role"]):
        if literal in text:
            hint = "pictures are given beside the text, not in it" if literal == "<image>" else "write it another way"
            raise ValueError(f"the {message['role']}'s text contains {literal!r}, which the model would not read as text; {hint}")
    images = sum(part["type"] == "image" for part in parts)
    if images and message["role"] != "user":
        raise ValueError(f"the {message['role']}'s message has a picture; only a user's may")
    return text, images
