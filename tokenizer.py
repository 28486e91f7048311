"""Text to token ids and back, the chat formats, and the expansion of `<image>`.

The vocabulary is a SentencePiece BPE model (Kudo & Richardson 2018, https://arxiv.org/abs/1808.06226) with byte fallback,
Llama's, to which LLaVA adds two special tokens: `<image>`, whose place the picture takes, and `<pad>`.
"""

from dataclasses import dataclass

from vocabulary import SPECIAL_LITERALS, Finder, all_added, normalize, read_vocabulary


class Tokenizer:
    """encode(text) -> ids, decode(ids) -> text; attributes bos_id, eos_id, pad_id, image_id and specials (literal -> id)."""

    def __init__(self, model, added):
        """model: a SentencePieceProcessor; added: a list of AddedTokens. Raises ValueError if they do not fit each other."""
        self.model = model
        self.bos_id, self.eos_id = model.bos_id(), model.eos_id()
        tokens = all_added(model, added)
        self.specials = {token.content: token.id for token in tokens if token.special}
        self.image_id, self.pad_id = self.specials["<image>"], self.specials["<pad>"]
        self._special_ids = set(self.specials.values())
        self._texts = {token.id: token.text for token in tokens}
        self._in_text = Finder([token for token in tokens if not token.normalized])
        self._in_normalized = Finder([token for token in tokens if token.normalized])

    @classmethod
    def from_pretrained(cls, folder):
        """Read tokenizer.model, or where there is none the same vocabulary from tokenizer.json; and the added tokens.

        Raises FileNotFoundError or ValueError, naming the file.
        """
        return cls(*read_vocabulary(folder))

    def encode(self, text):
        """Ids of a text, BOS first. An added token's literal in the text becomes its one id, `<image>` included.

        Each stretch of text between special tokens is encoded as if it stood alone, with SentencePiece's leading space:
        the newline after `<image>` becomes "▁", "\\n". That is what the checkpoints were trained on.
        Raises ValueError for half a character (a lone surrogate), which no UTF-8 text holds.
        """
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"the text {text!r} is not valid Unicode: it holds half a surrogate pair")
        ids = [self.bos_id]
        for part in self._in_text.split(text):
            ids += [part] if isinstance(part, int) else self._encode_stretch(part)
        return ids

    def _encode_stretch(self, text):
        """Ids of a text between added tokens. Some are looked for only here, in the text as SentencePiece sees it."""
        if not text or not self._in_normalized:
            return self.model.encode(text)
        ids = []
        for part in self._in_normalized.split(normalize(text)):
            ids += [part] if isinstance(part, int) else self.encode_more(part)
        return ids

    def encode_more(self, text):
        """Ids of a text that goes on in the middle of another: no BOS, and no leading space of SentencePiece's."""
        return self.model.encode("\n" + text)[len(self.model.encode("\n")) :]  # a newline joins with nothing

    def decode(self, ids):
        """The text of some ids, without special tokens and without the leading space.

        Bytes that are not UTF-8 become "�"; an id that no token has is written out, as "<|id 32050|>".
        """
        return "".join(self.stream(ids))

    def stream(self, ids):
        """decode, piece by piece: yields text as soon as it is certain, so never half a character."""
        first = True
        for text in self._spelt(ids):
            if first:
                text, first = text.removeprefix(" "), False
            if text:
                yield text

    def _spelt(self, ids):
        """The texts of ids. A character outside the vocabulary is spelt in byte tokens: their text comes when the run of bytes ends."""
        run = bytearray()
        for i in ids:
            if i in self._special_ids:
                continue
            if i < len(self.model) and self.model.is_byte(i):
                run.append(int(self.model.id_to_piece(i)[1:-1], 16))  # "<0x0A>"
                continue
            yield _text_of_bytes(run) + self._text(i)
            run.clear()
        if run:
            yield _text_of_bytes(run)

    def _text(self, i):
        if i in self._texts:
            return self._texts[i].replace("▁", " ")
        if i < len(self.model):
            return self.model.id_to_piece(i).replace("▁", " ")
        return f"<|id {i}|>"


def _text_of_bytes(run):
    """The text of a run of bytes; one wrong byte makes all of them "�"."""
    try:
        return run.decode()
    except UnicodeDecodeError:
        return "�" * len(run)


def stop_at(pieces, stop):
    """Pass text on up to a stop string, which may be split over pieces: what could be its beginning is held back."""
    held = ""
    for piece in pieces:
        text, found, _ = (held + piece).partition(stop)
        held = "" if found else _beginning(stop, text)
        if len(held) < len(text):
            yield text[: len(text) - len(held)]
        if found:
            return
    if held:
        yield held


def _beginning(stop, text):
    """The most of `stop`'s beginning that a text ends with."""
    for n in range(len(stop) - 1, 0, -1):
        if text.endswith(stop[:n]):
            return stop[:n]
    return ""


def without_literals(text):
    """A text without the literals of special tokens. Spelt out by a model, they would be read as the tokens next time."""
    before = None
    while text != before:  # again, as what is left may make up another: "<im<pad>age>"
        before = text
        for literal in SPECIAL_LITERALS:
            text = text.replace(literal, "")
    return text


def expand_images(ids, image_id, count, values=None):
    """Repeat each `<image>` id `count` times, once for each feature that takes its place.

    values: a list that belongs to the ids one by one (a mask, labels); its items are repeated in the same places and returned instead.
    """
    if values is None:
        values = ids
    expanded = []
    for i, value in zip(ids, values):
        expanded += [value] * (count if i == image_id else 1)
    return expanded


SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)


@dataclass(frozen=True)
class Style:
    """What stands around the turns. A conversation is `system` + `separator` + `begin`, then for each exchange
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
    "vip": Style(user="Human: ", assistant="###Assistant:", end="###", turns=("###",), system=SYSTEM, separator="", begin="###"),
    # What LLaVA-1.5 and ViP-LLaVA were trained with by their authors.
    "v1": Style(user="USER: ", assistant=" ASSISTANT:", end="</s>", turns=("USER:", "ASSISTANT:"), system=SYSTEM.replace("human", "user")),
}


def chat_prompt(messages, style):
    """The prompt text of a conversation, up to where the assistant speaks next (or to the end of its last answer).

    messages: [{"role": "user", "content": …}, {"role": "assistant", "content": …}, …]. A {"role": "system"} may come before them; it
        replaces the style's own system sentence. Content is a text, or a list of parts {"type": "image"} and
        {"type": "text", "text": …}. In the prompt a turn's pictures come before its text, as in training.
    style: a name in STYLES.

    What a user types must reach the model as text, but the tokenizer cannot spell a special token's literal ("<image>", "</s>") as
    text. So such a literal is a ValueError. In the user's or the system's words, so is what starts a turn ("ASSISTANT:", "###").
    A message out of turn is a ValueError too.
    """
    if style not in STYLES:
        raise ValueError(f"chat style is {style!r}; expected one of {', '.join(STYLES)}")
    form, turns = STYLES[style], list(messages)
    system = form.system
    if turns and turns[0]["role"] == "system":
        system, _ = _content(turns.pop(0), style)
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
