"""Questions at a terminal: one, or a chat with commands. What sample.py does once its model is loaded.

Answers go to standard output, everything else to standard error.
"""

import io
import os
import sys
import time
from contextlib import closing
from pathlib import Path

import torch
from PIL import Image

from hardware.processes import are_several
from images import open_image
from marks import draw_marks, parse_mark, refer

SUFFIXES = (".avif", ".bmp", ".gif", ".heic", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
HELP = """A line is a question, or one of
  /image FILE     bring another picture; the next question is about it, too
  /mark MARK      draw a mark on the last picture, as in /mark red rectangle 40,30,120,110; {mark} in a question stands for it
  /reset          begin a new conversation, without pictures
  /help           this list
Ctrl-C ends an answer, and at the prompt the chat, as Ctrl-D does."""


# Standard input and output


def open_streams():
    """Make the standard streams usable: closed ones are opened, and a character that a terminal cannot show becomes "?"."""
    for stream, way in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, stream) is None:  # closed by whoever started us
            setattr(sys, stream, open(os.devnull, way))
    sys.stdout.reconfigure(errors="replace")


class Heard:
    """Standard input of several processes: what the first one reads, all of them get."""

    def __init__(self, processes, stdin):
        self.heard, self.stdin = processes.heard, stdin

    def readline(self):
        return self.heard(self.stdin.readline)

    def read(self):
        return self.heard(self.stdin.read)


def hear_together(processes):
    """Give all processes what the first one reads, and one seed: without --seed too they draw the same tokens."""
    sys.stdin = Heard(processes, sys.stdin)
    torch.manual_seed(int(processes.heard(lambda: str(torch.seed()))))


# A question and its pictures


def names_a_picture(text):
    """Whether a word of the command line is the name of a picture or another file, and so not a question."""
    if text.startswith(("http://", "https://", "file://")) or os.path.isfile(text):
        return True
    return text.lower().endswith(SUFFIXES) and not any(character.isspace() for character in text)


def meant(text):
    """A question as it was meant: without the byte order mark and the line ends of a text from Windows."""
    if text.startswith(("\udcff\udcfe", "\udcfe\udcff")):  # a byte order mark of UTF-16, which is not UTF-8
        text = text.encode("utf-8", "surrogateescape").decode("utf-16")
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").strip()


def read_question(question):
    """The text of the command line's question; "-" is read from standard input. Raises ValueError for what is no question."""
    if question == "-":
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # `meant` reads UTF-16; other bytes the tokenizer refuses
        question = sys.stdin.read()
    question = meant(question)
    if not question:
        raise ValueError("the question is empty")
    check_question(question)
    return question


def check_question(question):
    if names_a_picture(question):
        raise ValueError(f"{question!r} is the name of a file, not a question; a picture is given by --image (/image in a chat)")


def open_picture(name, args):
    """A picture by its name on the command line; "-" is standard input."""
    source = io.BytesIO(sys.stdin.buffer.read()) if name == "-" else name
    return open_image(source, args.scale_grey)


def mark(images, marks, file):
    """The pictures with the marks on them, also saved if `file` is given. Raises ValueError unless there is just one picture."""
    if len(images) != 1:
        raise ValueError(f"a mark is for one picture, and there are {len(images)}")
    marked = draw_marks(images[0], marks)
    if file is not None:
        encoded = io.BytesIO()  # first in memory: what cannot be written leaves the file as it was
        try:
            marked.save(encoded, Image.registered_extensions()[Path(file).suffix.lower()])
        except Exception as error:  # each of Pillow's writers fails in its own way
            raise ValueError(f"--save-marked {file!r}: cannot be written ({error!r}); try a name that ends in .png") from None
        Path(file).write_bytes(encoded.getvalue())
    return [marked]


# An answer


def answer(chat, args, question, images):
    """Print one answer as it comes, then how long it took, and whether a limit ended it."""
    if args.show_prompt:
        prompt = chat.prompt(question, images)
        print(f"{prompt!r}\n{chat.tokenizer.encode(prompt)}", file=sys.stderr)
    start, first = time.perf_counter(), None
    pieces = chat.ask(
        question, images, args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed, args.repetition_penalty
    )  # fmt: skip
    with closing(pieces):  # an interrupted answer enters the conversation, too
        for piece in pieces:
            first = first or time.perf_counter() - start
            print(piece, end="", flush=True)
    print(flush=True)
    if first is not None:
        print(f"first word after {first:.2f} s, whole answer {time.perf_counter() - start:.2f} s", file=sys.stderr)
    if chat.cut_off == "max_new_tokens":
        print(f"cut off after {chat.tokens} tokens by --max-new-tokens", file=sys.stderr)
    elif chat.cut_off == "context":
        print(f"cut off after {chat.tokens} tokens: the context is full" + "; /reset begins anew" * args.chat, file=sys.stderr)


# A chat


class Conversation:
    """A chat at the terminal: what its lines do."""

    def __init__(self, chat, args, images, marks):
        self.chat, self.args = chat, args
        self.images = images  # what the next question brings into the conversation
        self.picture = images  # what "/mark" draws on: the last picture
        self.marks = marks  # on it

    def hear(self, line):
        """Do what a line says. Raises ValueError or OSError for what cannot be done; the conversation is then unchanged."""
        if not line.startswith("/"):
            check_question(line)
            self.ask(refer(line, self.marks))
            return
        command, *rest = line.split(None, 1)
        if command == "/image":
            if not rest:
                raise ValueError('"/image" needs a file, as in "/image photo.jpg"')
            name = rest[0].strip("'\"")  # which a file that is dropped into a terminal brings along
            self.picture, self.marks = [open_image(name, self.args.scale_grey)], []
            self.images = [*self.images, *self.picture]
        elif command == "/mark":
            added = parse_mark("".join(rest))
            self.picture = mark(self.picture, [added], self.args.save_marked)
            self.images = self.images[:-1] + self.picture  # in the place of the unmarked one, unless that has been asked about
            self.marks = [*self.marks, added]
        elif command == "/reset":
            self.chat.reset()
            self.images, self.picture, self.marks = [], [], []
        elif command == "/help":
            print(HELP, file=sys.stderr)
        else:
            raise ValueError(f'{command!r} is no command; there are "/image FILE", "/mark red point 40,30", "/reset" and "/help"')

    def ask(self, question):
        turns = len(self.chat.messages)
        try:
            answer(self.chat, self.args, question, self.images)
        except KeyboardInterrupt:
            print(flush=True)
            print("stopped", file=sys.stderr)
        if len(self.chat.messages) > turns:
            self.images = []  # they belong to the conversation now


def converse(chat, args, images, marks):
    """Do line after line until the input ends, or Ctrl-C comes between answers. A line that cannot be done is reported, and the chat
    goes on. Returns the exit status: 2 if there was such a line, otherwise 0."""
    conversation, status, line = Conversation(chat, args, images, marks), 0, args.question
    while True:
        try:
            if line is None:
                print("> ", end="", file=sys.stderr, flush=True)
                line = meant(input())
            if line:
                conversation.hear(line)
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return status
        except BrokenPipeError:  # whoever read the answers has seen enough
            raise
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            if are_several() and not isinstance(error, ValueError):
                raise  # it happened in this process alone, and the others wait for it
            hint = error if isinstance(error, ValueError | OSError) else f"{advice(error)}; or ask something shorter"
            print(f"sample.py: {hint}", file=sys.stderr)
            status = 2
        line = None


def advice(error):
    """What to do about an error of PyTorch's that is due to the machine: no memory, no compiler. Any other error is raised again."""
    text = str(error)
    if "C++ compiler" in text or "C compiler" in text:  # the CPU's compiler, and Triton's for a GPU
        return "--compile needs a C++ compiler (g++, clang++), on a GPU a C compiler (gcc), and there is none; leave it out"
    # A GPU's torch.OutOfMemoryError and the CPU allocator's are RuntimeErrors; cuBLAS has words of its own.
    if isinstance(error, MemoryError) or "memory" in text or "ALLOC_FAILED" in text:
        return "the device ran out of memory; use a 16-bit --dtype, fewer pictures or --device cpu"
    raise error
