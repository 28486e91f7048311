"""The records of a data file, one after the other, and the reasons why some of them cannot be used."""

import codecs
import json
import re
import sys
from collections import Counter

BLOCK = 1 << 22  # characters that are read at a time
SPACE = re.compile(r"[ \t\r\n]*")
DECODER = json.JSONDecoder()


def read_records(path):
    """The values of a JSON list, or of JSON lines, one by one: a file of gigabytes is never in memory as a whole.

    A byte order mark is no part of the text. Raises ValueError, naming the file and the record, for what is no JSON.
    """
    with open(path, "rb") as file:
        encoding = encoding_of(file.read(4))
    count = 0
    with open(path, encoding=encoding) as file:
        try:
            for value in values(Text(file)):
                count += 1
                yield value
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are kinds of ValueError
            raise ValueError(f"{path} is not valid JSON after {count} records: {getattr(error, 'msg', error)}") from None


def encoding_of(start):
    """What a file that starts with these bytes is written in: UTF-16 if its byte order mark says so, else UTF-8 with or without one."""
    return "utf-16" if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def values(text):
    """The JSON values in a Text."""
    if text.next() != "[":  # JSON lines: values with nothing but space between them
        while text.next():
            yield text.value()
        return
    text.skip()
    if text.next() != "]":
        yield text.value()
        while text.next() == ",":
            text.skip()
            yield text.value()
    if text.next() != "]":
        raise ValueError(f"found {text.next() or 'the end of the file'!r} where a comma or the list's end was expected")
    text.skip()
    if text.next():
        raise ValueError(f"found {text.next()!r} after the list's end")


class Text:
    """A text that is read block by block, and a place in it."""

    def __init__(self, file):
        self.file, self.block, self.at, self.ended = file, "", 0, False

    def more(self):
        """Read another block, and forget what is behind."""
        read = self.file.read(max(BLOCK, len(self.block) - self.at))  # a long value takes few blocks, as each doubles
        self.ended = not read
        self.block, self.at = self.block[self.at :] + read, 0

    def next(self):
        """The next character that is not space, "" at the end."""
        while True:
            self.at = SPACE.match(self.block, self.at).end()
            if self.at < len(self.block):
                return self.block[self.at]
            if self.ended:
                return ""
            self.more()

    def skip(self):
        self.at += 1

    def value(self):
        """The JSON value that begins here."""
        self.next()
        while True:
            try:
                value, end = DECODER.raw_decode(self.block, self.at)
                if end < len(self.block) or self.ended:
                    self.at = end
                    return value
            except json.JSONDecodeError:
                if self.ended:
                    raise
            self.more()  # the end of the block has cut the value, or may have


class Unusable(ValueError):
    """A record that cannot be trained on: `kind` says why for all that are like it, the message what is wrong with this one."""

    def __init__(self, kind, message):
        super().__init__(kind, message)  # both: it comes from other processes
        self.kind = kind

    def __str__(self):
        return self.args[1]


NO_CONVERSATION = 'no conversation: expected "conversations", a list of {"from": …, "value": …}'
NO_TURNS = "the speakers are not human and gpt in turn"
REFUSED = "its text holds what the chat format or the tokenizer refuses"
NO_BOX = "it refers to a region of its picture that has no box"
OUTSIDE = "a box of it is empty or reaches out of its picture"
BAD_REGIONS = "its regions are not written as in ViP-LLaVA's data"
NO_NAMES = "its pictures are not the names of files"
MISSING = "its picture is missing"
BROKEN = "its picture, on which marks are to be drawn, cannot be opened"


def pictures_of(record):
    """The names of a record's pictures. None, "" and NaN, which tables write where there is nothing, are no picture."""
    image = record.get("image", record.get("images"))
    names = image if isinstance(image, list) else [image]
    names = [name for name in names if name not in (None, "") and name == name]  # NaN is unequal to itself
    if not all(isinstance(name, str) for name in names):
        raise Unusable(NO_NAMES, f"{image!r}; expected a name, or a list of them")
    return names


def has_pictures(record):
    """Whether a record names pictures, in whatever form."""
    try:
        return isinstance(record, dict) and bool(pictures_of(record))
    except Unusable:
        return False


def name_of(record):
    """A record's own name, "" if it has none."""
    name = record.get("id") if isinstance(record, dict) else None
    return f" ({name})" if isinstance(name, str | int) else ""


class LeftOut:
    """Counts the records of a file that cannot be used, by kind, with the first example of each."""

    def __init__(self, path, images):
        self.path, self.images = path, images
        self.records = self.with_pictures = 0
        self.counts, self.examples = Counter(), {}

    def count(self, with_pictures):
        """One record more, usable or not."""
        self.records += 1
        self.with_pictures += with_pictures

    def add(self, name, reason):
        self.counts[reason.kind] += 1
        self.examples.setdefault(reason.kind, f"record {self.records}{name}: {reason}")

    def report(self):
        """Print the table. Raises ValueError where so much is left out that what is left is not what was meant."""
        count = self.counts.total()
        if count:
            lines = [f"{self.path}: {count} of {self.records} records are left out"]
            for kind, number in self.counts.most_common():
                lines += [f"{number:8}  {kind}", f"{'':8}  first: {self.examples[kind]}"]
            print("\n".join(lines), file=sys.stderr)
        missing = self.counts[MISSING]
        if missing > self.with_pictures / 10:
            raise ValueError(f"{missing} of the {self.with_pictures} records with pictures find none in {self.images}; see --images")
        if count == self.records:
            raise ValueError(f"{self.path} holds no conversation to train on")
        if count > self.records / 2:
            raise ValueError(f"{count} of the {self.records} records of {self.path} cannot be used; the table above says why")
