"""Who visits the page of demo.py: the turns at the model's device, and each visitor's conversation and pictures."""

import io
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from chat import Chat
from converse import advice
from marks import draw_marks, parse_mark

SHOWN = 1600  # the longer side of a picture that goes to the page, in pixels
IDLE = 3600  # seconds without a sign after which a visitor is forgotten
OPTIONS = {"max_new_tokens": int, "temperature": float, "top_k": int, "top_p": float, "repetition_penalty": float, "seed": int}
CUT_OFF = {None: "", "max_new_tokens": "cut off at the longest answer", "context": "cut off: the context is full; begin anew"}


class Device:
    """The model's device. One has it at a time; the others wait in the order in which they came."""

    def __init__(self):
        self.waiting, self.moved = [], threading.Condition()
        self.thread = ThreadPoolExecutor(1)  # what is compiled may only be run by the thread that compiled it

    @contextmanager
    def turn(self, tell, stopped):
        """Wait for a turn. tell({"place": n}) says how many are before; `stopped`, an event, ends the waiting. Yields how to run on it."""
        ticket = object()
        with self.moved:
            self.waiting.append(ticket)
            while self.waiting[0] is not ticket and not stopped.is_set():
                tell({"place": self.waiting.index(ticket)})
                self.moved.wait(1)
        try:
            if stopped.is_set():
                raise ValueError("stopped before the first word")
            yield lambda function, *given: self.thread.submit(function, *given).result()
        finally:
            with self.moved:
                self.waiting.remove(ticket)
                self.moved.notify_all()


class Visitor:
    """One visitor's conversation and pictures."""

    def __init__(self, chat):
        self.chat = fork(chat)
        self.pictures = []  # PIL images
        self.turns = []  # as the page shows them: {"question", "pictures", "answer", and what is known of it}
        self.asked = []  # of each turn what explanation.py needs: the Chat before it, question, pictures, the answer's ids
        self.answering, self.stopped = threading.Lock(), threading.Event()
        self.until = time.monotonic() + IDLE

    def marked(self, picture):
        """A picture that the page names, {"number", "marks": [texts]}, with its marks, and these. Raises ValueError for what cannot be."""
        number, marks = picture["number"], [parse_mark(text) for text in picture["marks"]]
        if number not in range(len(self.pictures)):
            raise ValueError(f"there is no picture {number} any more; add it again")
        return draw_marks(self.pictures[number], marks), marks

    def ask(self, wish, tell):
        """Answer the page's question, and tell it of each piece."""
        chat, said, first = self.chat, [], 0.0
        images = [self.marked(picture)[0] for picture in wish["pictures"]]
        if wish["again"] and self.turns:
            chat.undo()
            del self.turns[-1], self.asked[-1]
        if chat.pad != wish["pad"]:
            chat.forget_cache()  # the features in it are of pictures that were cut otherwise
        chat.system, chat.pad = wish.get("system"), wish["pad"]
        before, start = fork(chat), time.perf_counter()
        pieces = chat.ask(wish["question"], images, **options(wish))
        for piece in pieces:
            first = first or time.perf_counter() - start
            said.append(piece)
            tell({"piece": piece})
            if self.stopped.is_set():
                break
        pieces.close()
        done = {"first": first, "seconds": time.perf_counter() - start, "tokens": chat.tokens, "kept": chat.kept}
        done["why"] = "stopped" if self.stopped.is_set() else CUT_OFF[chat.cut_off]
        self.turns.append({"question": wish["question"], "pictures": wish["pictures"], "answer": "".join(said), **done})
        self.asked.append((before, wish["question"], images, chat.answer_ids))
        tell({"done": done})


def fork(chat):
    """A Chat where this one is, without its cache."""
    other = Chat(chat.model, chat.tokenizer, chat.processor)
    other.style, other.system, other.pad = chat.style, chat.system, chat.pad
    other.messages, other.images = list(chat.messages), list(chat.images)
    return other


def options(wish):
    """The options of an answer that the page sets. Raises ValueError for what is no number of its kind."""
    chosen = {name: wish[name] for name in OPTIONS if name in wish}
    for name, value in chosen.items():
        if type(value) is not int and OPTIONS[name] is int:
            raise ValueError(f"{name} is {value}; expected a whole number")
    return chosen


def as_png(picture):
    """The bytes of a picture for the page, made smaller if it is large."""
    encoded = io.BytesIO()
    if max(picture.size) > SHOWN:
        picture.thumbnail((SHOWN, SHOWN))
    picture.save(encoded, "PNG", compress_level=1)
    return encoded.getvalue()


def reason(error):
    """An error in words for the page. What is not the visitor's mistake goes to the terminal, too."""
    if isinstance(error, KeyError | TypeError):
        return f"the server does not understand the page ({error!r}); load it again"
    if isinstance(error, ValueError | OSError):
        return str(error)
    try:
        return advice(error)
    except Exception:
        traceback.print_exception(error)
        return "the model failed; the terminal in which demo.py runs says more"
