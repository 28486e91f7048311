"""A page in the browser for any checkpoint: drop in a picture, mark something on it, ask.

    python demo.py                                                # the bundled ViP-LLaVA and its world of shapes
    python demo.py --model llava-hf/llava-1.5-7b-hf               # sample.py's options for loading
    python demo.py --model … --host 0.0.0.0 --auth me:secret      # for others, too

The page needs `pip install -r demo-requirements.txt`. Each visitor has a conversation of their own. All share the model, which gives
one answer at a time. Pictures stay in memory, for as long as their visitor does.
"""

import asyncio
import base64
import io
import json
import secrets
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import sample
from chat import Chat
from images import open_image
from marks import COLOURS, draw_marks, parse_mark

HERE = Path(__file__).parent
BUNDLED = HERE / "tiny" / "vip-llava"
LOCAL = ("127.0.0.1", "localhost")
DRAWN = ("rectangle", "ellipse", "arrow", "point", "scribble", "mask", "triangle")  # the kinds of mark that the page has a tool for
MOST_BYTES, MOST_PICTURES = 40 * 10**6, 32  # of an uploaded picture; of a visitor
GONE, IDLE = 20, 3600  # seconds until a visitor is forgotten: after the tab was closed (a reload is back sooner), and without a sign
OPTIONS = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed")  # of an answer: sample.py's


class Line:
    """Those who want the device. The first has it, the others wait in the order in which they came."""

    def __init__(self):
        self.waiting, self.moved = [], threading.Condition()

    @contextmanager
    def turn(self, tell=print, stopped=None):
        """Wait for a turn, and have it. tell({"place": n}) says how many are before; `stopped`, an event, ends the waiting."""
        ticket = object()
        with self.moved:
            self.waiting.append(ticket)
            while self.waiting[0] is not ticket and not (stopped and stopped.is_set()):
                tell({"place": self.waiting.index(ticket)})
                self.moved.wait(1)
        try:
            yield
        finally:
            with self.moved:
                self.waiting.remove(ticket)
                self.moved.notify_all()


class Visitor:
    """One visitor's conversation and pictures."""

    def __init__(self, chat):
        self.chat = Chat(chat.model, chat.tokenizer, chat.processor)
        self.pictures = []  # PIL images
        self.turns = []  # as the page shows them: {"question", "pictures", "answer"}
        self.answering, self.stopped = threading.Lock(), threading.Event()
        self.until = time.monotonic() + IDLE

    def marked(self, picture):
        """A picture that the page names, {"number", "marks": [texts]}, with its marks. Raises ValueError for what cannot be drawn."""
        number, marks = picture["number"], [parse_mark(text) for text in picture["marks"]]
        if number not in range(len(self.pictures)):
            raise ValueError(f"there is no picture {number} any more; add it again")
        return draw_marks(self.pictures[number], marks), marks

    def ask(self, wish, tell):
        """Answer the page's question, and tell it of each piece."""
        chat, said, first = self.chat, [], 0.0
        if wish["again"]:
            chat.undo()
            del self.turns[-1:]
        chat.system, chat.pad = wish.get("system"), wish["pad"]
        images = [self.marked(picture)[0] for picture in wish["pictures"]]
        start = time.perf_counter()
        pieces = chat.ask(wish["question"], images, **{name: wish[name] for name in OPTIONS if name in wish})
        for piece in pieces:
            first = first or time.perf_counter() - start
            said.append(piece)
            tell({"piece": piece})
            if self.stopped.is_set():
                break
        pieces.close()
        self.turns.append({"question": wish["question"], "pictures": wish["pictures"], "answer": "".join(said)})
        why = {None: "", "max_new_tokens": "cut off at the longest answer", "context": "cut off: the context is full"}[chat.cut_off]
        seconds = time.perf_counter() - start
        tell({"done": {"first": first, "seconds": seconds, "tokens": chat.count, "kept": chat.kept, "why": why}})


class Demo:
    """The visitors and what the page may ask for; each method answers one request."""

    def __init__(self, chat, name, bundled):
        self.chat, self.line, self.visitors = chat, Line(), {}
        fine = chat.model.config.vision.image_size > 200  # or a mark must be as bold as in the tiny world
        config = {
            "model": name, "kinds": DRAWN, "colours": [*COLOURS], "knows_marks": chat.model.config.style == "vip", "most_bytes": MOST_BYTES,
            "width": 3 if fine else 9, "alpha": 128 if fine else 220, "example": "example.png" if bundled else None,
        }  # fmt: skip
        self.page = (HERE / "demo.html").read_text(encoding="utf-8").replace("/*CONFIG*/{}", json.dumps(config).replace("<", "\\u003c"))

    def visitor(self, request):
        """The one who asks. Raises LookupError for a visitor who is unknown or forgotten."""
        now = time.monotonic()
        self.visitors = {key: one for key, one in self.visitors.items() if one.until > now or one.answering.locked()}
        visitor = self.visitors[request.query_params.get("visitor")]
        visitor.until = now + IDLE
        return visitor

    async def home(self, request):
        return HTMLResponse(self.page)

    async def example(self, request):
        return FileResponse(HERE / "tiny" / "example.png")

    async def state(self, request):
        """A visitor comes, or comes back."""
        try:
            key, visitor = request.query_params.get("visitor"), self.visitor(request)
        except LookupError:
            key, visitor = secrets.token_urlsafe(16), Visitor(self.chat)
            self.visitors[key] = visitor
        pictures = [{"number": n, "width": picture.width, "height": picture.height} for n, picture in enumerate(visitor.pictures)]
        return JSONResponse({"visitor": key, "pictures": pictures, "turns": visitor.turns})

    async def leave(self, request):
        visitor = self.visitor(request)
        visitor.stopped.set()
        visitor.until = time.monotonic() + GONE
        return JSONResponse({})

    async def stop(self, request):
        self.visitor(request).stopped.set()
        return JSONResponse({})

    async def new(self, request):
        visitor = self.visitor(request)
        if visitor.answering.locked():
            raise ValueError("an answer is being given; stop it first")
        visitor.chat.reset()
        visitor.pictures, visitor.turns = [], []
        return JSONResponse({})

    async def add(self, request):
        """A picture comes as the request's body. It never touches the disk."""
        visitor, data = self.visitor(request), bytearray()
        async for part in request.stream():
            data += part
            if len(data) > MOST_BYTES:
                raise ValueError(f"the file is too large; at most {MOST_BYTES / 1e6:.0f} MB are taken")
        if len(visitor.pictures) == MOST_PICTURES:
            raise ValueError(f"you have {MOST_PICTURES} pictures already; begin anew")
        picture = await asyncio.to_thread(open_image, io.BytesIO(data))
        visitor.pictures.append(picture)
        return JSONResponse({"number": len(visitor.pictures) - 1, "width": picture.width, "height": picture.height})

    async def picture(self, request):
        visitor, number = self.visitor(request), request.path_params["number"]
        small = visitor.marked({"number": number, "marks": []})[0]
        small.thumbnail((1600, 1600))
        return Response(await asyncio.to_thread(as_png, small), media_type="image/png")

    async def marked(self, request):
        """What the model gets, to the pixel, and the words for its marks."""
        drawn, marks = self.visitor(request).marked(await request.json())
        data = await asyncio.to_thread(as_png, drawn)
        return JSONResponse({"picture": f"data:image/png;base64,{base64.b64encode(data).decode()}", "words": [mark.words for mark in marks]})

    async def ask(self, request):
        """The answer as lines of JSON, each as soon as there is something to say. The device is free again soon after the page has gone."""
        visitor, wish = self.visitor(request), await request.json()
        if not visitor.answering.acquire(blocking=False):
            raise ValueError("an answer is being given already, perhaps in another tab")
        visitor.stopped.clear()
        said, loop = asyncio.Queue(), asyncio.get_running_loop()
        tell = lambda line: loop.call_soon_threadsafe(said.put_nowait, line)
        threading.Thread(target=self.answer, args=(visitor, wish, tell), daemon=True).start()

        async def lines():
            try:
                while (line := await said.get()) is not None:
                    yield json.dumps(line) + "\n"
            finally:
                visitor.stopped.set()

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    def answer(self, visitor, wish, tell):
        """In a thread of its own: wait for the device, then answer."""
        try:
            with self.line.turn(tell, visitor.stopped):
                visitor.ask(wish, tell)
        except (ValueError, OSError) as error:
            tell({"error": str(error)})
        except (RuntimeError, MemoryError) as error:
            for one in self.visitors.values():  # most of the memory is in their caches; each reads its conversation anew next time
                one.chat.forget_cache()
            tell({"error": reason(error)})
        finally:
            visitor.answering.release()
            tell(None)
