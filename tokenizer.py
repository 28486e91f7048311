"""Text to token ids and back, the chat formats, and the expansion of `<image>`.

The vocabulary is a SentencePiece BPE model (Kudo & Richardson 2018, https://arxiv.org/abs/1808.06226) with byte fallback,
Llama's, to which LLaVA adds two special tokens: `<image>`, whose place the picture takes, and `<pad>`.
"""

import re
from dataclasses import dataclass

from vocabulary import SPECIAL_LITERALS, AddedToken, read_vocabulary

BLANKS = r"[^\S\x1c-\x1f]*"  # white space as Unicode has it; Python's also holds four control characters


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
        return cls(*read_vocabulary(folder))

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
    expanded = []
    for i, value in zip(ids, ids if values is None else values):
        expanded += [value] * (count if i == image_id else 1)
    return expanded


SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)


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
