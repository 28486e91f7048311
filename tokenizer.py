"""Text to token ids and back, the chat formats, and the expansion of `<image>`.

The vocabulary is a SentencePiece BPE model (Kudo & Richardson 2018, https://arxiv.org/abs/1808.06226) with byte fallback,
Llama's, to which LLaVA adds two special tokens: `<image>`, whose place the picture takes, and `<pad>`.
"""

import json
import operator
import re
from itertools import chain
from pathlib import Path

from sentencepiece import SentencePieceProcessor


class Tokenizer:
    """encode(text) -> ids, decode(ids) -> text; attributes bos_id, eos_id, pad_id, image_id and specials (literal -> id)."""

    def __init__(self, model, added):
        """model: a SentencePieceProcessor; added: {literal: id} of the special tokens beyond its vocabulary."""
        self.model = model
        self.bos_id, self.eos_id = model.bos_id(), model.eos_id()
        if min(model.unk_id(), self.bos_id, self.eos_id) < 0:
            raise ValueError("the SentencePiece model lacks a token for the unknown, the beginning or the end; Llama's has all three")
        self.specials = {model.id_to_piece(i): i for i in (model.unk_id(), self.bos_id, self.eos_id)} | added
        missing = [literal for literal in ("<image>", "<pad>") if literal not in self.specials]
        if missing:
            raise ValueError(f"the tokenizer has no {' and no '.join(missing)} token; a LLaVA checkpoint adds both")
        self.image_id, self.pad_id = self.specials["<image>"], self.specials["<pad>"]
        self._special_ids = set(self.specials.values())
        if len(self._special_ids) < len(self.specials):
            raise ValueError(f"two special tokens have one id: {self.specials}")
        self._literals = re.compile("(" + "|".join(map(re.escape, self.specials)) + ")")

    @classmethod
    def from_pretrained(cls, folder):
        """Read tokenizer.model, and the added tokens of tokenizer_config.json or added_tokens.json.

        Raises FileNotFoundError or ValueError, naming the file.
        """
        folder = Path(folder)
        if not (folder / "tokenizer.model").is_file():
            raise FileNotFoundError(f"{folder} has no tokenizer.model (the SentencePiece model of Llama's vocabulary)")
        try:
            model = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        except (RuntimeError, OSError):
            raise ValueError(f"{folder / 'tokenizer.model'} is not a SentencePiece model, or is damaged") from None
        added = {}
        for name in ("tokenizer_config.json", "added_tokens.json"):
            if (folder / name).is_file():
                try:
                    raw = json.loads((folder / name).read_text(encoding="utf-8"))
                    if name == "tokenizer_config.json":
                        raw = {token["content"]: int(i) for i, token in raw.get("added_tokens_decoder", {}).items()}
                    for literal, i in raw.items():
                        if not (isinstance(literal, str) and literal):
                            raise ValueError(f"added token {i} is {literal!r}, not a text")
                        added[literal] = operator.index(i)
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                    raise ValueError(f"{folder / name} is damaged, or not a tokenizer's: {error!r}") from None
        return cls(model, added)

    def encode_more(self, text):
        """Ids of a text that goes on in the middle of another: no BOS, and no leading space of SentencePiece's."""
        return self.model.encode("\n" + text)[len(self.model.encode("\n")) :]  # a newline joins with nothing

    def encode(self, text):
        """Ids of a text, BOS first. A special token's literal in the text becomes its one id, `<image>` included.

        Each stretch of text between special tokens is encoded as if it stood alone, with SentencePiece's leading space:
        the newline after `<image>` becomes "▁", "\\n". That is what the checkpoints were trained on.
        Raises ValueError for half a character (a lone surrogate), which no UTF-8 text holds.
        """
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"the text {text!r} is not valid Unicode: it holds half a surrogate pair")
        ids = [self.bos_id]
        for part in filter(None, self._literals.split(text)):
            ids += [self.specials[part]] if part in self.specials else self.model.encode(part)
        return ids

    def decode(self, ids):
        """The text of some ids, special tokens left out, without the leading space. Bytes that are not UTF-8 become "�"."""
        return "".join(self.stream(ids))

    def stream(self, ids):
        """decode, piece by piece: yields text as soon as it is certain, so never half a character.

        A character outside the vocabulary is spelt in byte tokens; their text is held until the run of bytes has ended.
        """
        run, space = bytearray(), " "  # bytes not yet yielded; the leading space, still to be taken off
        for i in chain(ids, [None]):  # None ends the last run
            if i is not None and (i in self._special_ids or i >= len(self.model)):
                continue
            piece = "" if i is None else self.model.id_to_piece(i)
            if i is not None and self.model.is_byte(i):
                run.append(int(piece[1:-1], 16))  # "<0x0A>"
                continue
            text = piece.replace("▁", " ")
            if run:
                try:
                    text = run.decode() + text
                except UnicodeDecodeError:
                    text = "�" * len(run) + text
                run.clear()
            if text:
                if text.removeprefix(space):
                    yield text.removeprefix(space)
                space = ""


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

# What stands around the turns. A conversation is the system sentence with its separator, `begin`, then for each exchange
# `user` + question + `assistant` + " " + answer + `end`. The model writes `end` itself when it has finished.
STYLES = {
    "llava": dict(system="", separator=" ", begin="", user="USER: ", assistant=" ASSISTANT:", end="</s>"),
    "bakllava": dict(system="", separator=" ", begin="", user="USER: ", assistant="\nASSISTANT:", end="</s>"),
    "vip": dict(system=SYSTEM, separator="", begin="###", user="Human: ", assistant="###Assistant:", end="###"),
}
SPECIAL_LITERALS = ("<unk>", "<s>", "</s>", "<image>", "<pad>")
TURN_LITERALS = {"llava": ("USER:", "ASSISTANT:"), "bakllava": ("USER:", "ASSISTANT:"), "vip": ("###",)}


def chat_prompt(messages, style):
    """The prompt text of a conversation, up to where the assistant speaks next (or to the end of its last answer).

    messages: [{"role": "user", "content": …}, {"role": "assistant", "content": …}, …], before them at most one
        {"role": "system"}, which replaces the style's own system sentence. Content is a text, or a list of parts
        {"type": "image"} and {"type": "text", "text": …}; a turn's pictures stand before its text, as in training.
    style: "llava", "bakllava" or "vip".

    What a user types is text and nothing else. So a text that holds a special token's literal ("<image>", "</s>") or, in
    a user's or the system's words, a mark that starts a turn ("ASSISTANT:", "###") is a ValueError: the tokenizer has no
    way to spell such a literal as plain text. A message out of turn is a ValueError too.
    """
    if style not in STYLES:
        raise ValueError(f"chat style is {style!r}; expected one of {', '.join(STYLES)}")
    form, turns = STYLES[style], list(messages)
    system = _content(turns.pop(0), style)[0] if turns and turns[0]["role"] == "system" else form["system"]
    prompt = (system + form["separator"] if system else "") + form["begin"]
    for n, message in enumerate(turns):
        role = ("user", "assistant")[n % 2]
        if message["role"] != role:
            raise ValueError(f"message {n + 1} has role {message['role']!r}; user and assistant alternate, so expected {role!r}")
        text, images = _content(message, style)
        if role == "user":
            prompt += form["user"] + "<image>\n" * images + text + form["assistant"]
        else:
            prompt += " " + text + form["end"]
    return prompt


def _content(message, style):
    """A message's text and its number of pictures."""
    parts = message["content"]
    if isinstance(parts, str):
        parts = [{"type": "text", "text": parts}]
    if unknown := [part["type"] for part in parts if part["type"] not in ("text", "image")]:
        raise ValueError(f"a message has a part of type {unknown[0]!r}; expected 'text' or 'image'")
    text = "".join(part["text"] for part in parts if part["type"] == "text")
    forbidden = SPECIAL_LITERALS + (TURN_LITERALS[style] if message["role"] != "assistant" else ())
    for literal in forbidden:
        if literal in text:
            hint = "pictures are given beside the text, not in it" if literal == "<image>" else "write it another way"
            raise ValueError(f"the {message['role']}'s text contains {literal!r}, which the model would not read as text; {hint}")
    images = sum(part["type"] == "image" for part in parts)
    if images and message["role"] != "user":
        raise ValueError(f"the {message['role']}'s message has a picture; only a user's may")
    return text, images
