"""A page in the browser for any checkpoint: drop in a picture, mark something on it, ask.

    python demo.py                                                # the bundled ViP-LLaVA and its world of shapes
    python demo.py --model llava-hf/llava-1.5-7b-hf               # sample.py's options for loading
    python demo.py --model … --host 0.0.0.0 --auth me:secret      # for others, too

The page needs `pip install -r demo-requirements.txt`. Each visitor has a conversation of their own. All share the model, which gives
one answer at a time. Pictures stay in memory, for as long as their visitor does.
"""

import argparse
import asyncio
import base64
import io
import json
import secrets
import socket
import sys
import threading
import time
from pathlib import Path

from converse import advice
from explanation import page, weighed
from images import open_image
from loading import add_loading_options, load
from marks import COLOURS
from sample import fail
from visitors import IDLE, Device, Visitor, as_png, fork, reason

HERE = Path(__file__).parent
BUNDLED = HERE / "tiny" / "vip-llava"
LOCAL = ("127.0.0.1", "localhost")
DRAWN = ("rectangle", "ellipse", "arrow", "point", "scribble", "mask", "triangle")  # the kinds of mark that the page has a tool for
MOST_BYTES, MOST_PICTURES, MOST_PIXELS = 40 * 10**6, 32, 250 * 10**6  # of an uploaded file; of a visitor, all pictures together
MOST_VISITORS = 200  # at once
CELLS = 8  # rows and columns in which explanation.py greys a picture
GONE = 20  # seconds until a visitor is forgotten whose tab was closed; a reload is back sooner


class Unknown(Exception):
    """A visitor who is not known, or not any more."""


class Demo:
    """The visitors, and what the page may ask for. A method answers a request: text is HTML, bytes are a PNG, a dict is JSON."""

    def __init__(self, chat, name, example=None, scale_grey=False):
        self.chat, self.scale_grey, self.device, self.visitors = chat, scale_grey, Device(), {}
        fine = chat.model.config.vision.image_size > 200  # or a mark must be as bold as in the tiny world
        config = {
            "model": name, "kinds": DRAWN, "colours": [*COLOURS], "knows_marks": chat.style == "vip", "most_bytes": MOST_BYTES,
            "pad": chat.pad, "width": 3 if fine else 9, "alpha": 128 if fine else 220, "example": example is not None,
        }  # fmt: skip
        self._page = (HERE / "demo.html").read_text(encoding="utf-8").replace("/*CONFIG*/{}", json.dumps(config).replace("<", "\\u003c"))
        self._example = example

    def _forget(self):
        now = time.monotonic()
        self.visitors = {key: one for key, one in self.visitors.items() if one.until > now or one.answering.locked()}

    def _visitor(self, request):
        """The one who asks. Raises Unknown."""
        self._forget()
        visitor = self.visitors.get(request.query_params.get("visitor"))
        if visitor is None:
            raise Unknown
        visitor.until = time.monotonic() + IDLE
        return visitor

    async def home(self, request):
        return self._page

    async def example(self, request):
        return self._example.read_bytes()

    async def state(self, request):
        """A visitor comes, or comes back."""
        try:
            key, visitor = request.query_params.get("visitor"), self._visitor(request)
        except Unknown:
            if len(self.visitors) >= MOST_VISITORS:
                raise ValueError(f"{MOST_VISITORS} visitors are here already; try again later") from None
            key, visitor = secrets.token_urlsafe(16), Visitor(self.chat)
            self.visitors[key] = visitor
        for _ in range(20):  # an answer that a reload has just stopped ends within a word
            if visitor.answering.locked():
                await asyncio.sleep(0.1)
        pictures = [{"number": n, "width": picture.width, "height": picture.height} for n, picture in enumerate(visitor.pictures)]
        return {"visitor": key, "pictures": pictures, "turns": visitor.turns}

    async def here(self, request):
        self._visitor(request)
        return {}

    async def leave(self, request):
        visitor = self._visitor(request)
        visitor.stopped.set()
        visitor.until = time.monotonic() + GONE
        asyncio.get_running_loop().call_later(GONE + 1, self._forget)
        return {}

    async def stop(self, request):
        self._visitor(request).stopped.set()
        return {}

    async def new(self, request):
        visitor = self._visitor(request)
        if visitor.answering.locked():
            raise ValueError("an answer is being given; stop it first")
        visitor.chat = fork(self.chat)
        visitor.pictures, visitor.turns, visitor.asked = [], [], []
        return {}

    async def add(self, request):
        """A picture comes as the request's body. It never touches the disk."""
        visitor, data = self._visitor(request), bytearray()
        async for part in request.stream():
            data += part
            if len(data) > MOST_BYTES:
                raise ValueError(f"this file is too large; at most {MOST_BYTES / 1e6:.0f} MB are taken")
        picture = await asyncio.to_thread(open_image, io.BytesIO(data), self.scale_grey)
        pixels = sum(one.width * one.height for one in [*visitor.pictures, picture])
        if len(visitor.pictures) == MOST_PICTURES or pixels > MOST_PIXELS:
            raise ValueError(f"your pictures are more than {MOST_PICTURES}, or than {MOST_PIXELS / 1e6:.0f} million pixels; begin anew")
        visitor.pictures.append(picture)
        return {"number": len(visitor.pictures) - 1, "width": picture.width, "height": picture.height}

    async def picture(self, request):
        drawn, _ = self._visitor(request).marked({"number": request.path_params["number"], "marks": []})
        return await asyncio.to_thread(as_png, drawn)

    async def marked(self, request):
        """What the model gets, to the pixel (a large picture is made smaller for the page), and the words for its marks."""
        drawn, marks = self._visitor(request).marked(await request.json())
        data = base64.b64encode(await asyncio.to_thread(as_png, drawn)).decode()
        return {"picture": f"data:image/png;base64,{data}", "words": [mark.words for mark in marks]}

    async def ask(self, request):
        """The answer as lines of JSON, each as soon as there is something to say. The device is free again soon after the page has gone."""
        visitor, wish = self._visitor(request), await request.json()
        if not visitor.answering.acquire(blocking=False):
            raise ValueError("an answer is being given already, perhaps in another tab")
        visitor.stopped.clear()
        said, loop = asyncio.Queue(), asyncio.get_running_loop()
        tell = lambda line: loop.call_soon_threadsafe(said.put_nowait, line)
        threading.Thread(target=self._answer, args=(visitor, wish, tell), daemon=True).start()

        async def lines():
            try:
                while (line := await said.get()) is not None:
                    yield json.dumps(line) + "\n"
            finally:
                visitor.stopped.set()

        return lines()

    def _answer(self, visitor, wish, tell):
        """In a thread of its own: wait for the device, then answer."""
        try:
            with self.device.turn(tell, visitor.stopped) as run:
                try:
                    run(visitor.ask, wish, tell)
                except (RuntimeError, MemoryError):  # most of the memory is in the caches; each conversation is read anew next time
                    for one in [*self.visitors.values()]:
                        one.chat.forget_cache()
                    raise
        except Exception as error:
            tell({"error": reason(error)})
        finally:
            visitor.answering.release()
            tell(None)

    async def see(self, request):
        return await self._look(request, weighed)

    async def explain(self, request):
        return await self._look(request, lambda chat, question, images, answer: page(chat, question, images, CELLS, answer))

    async def _look(self, request, look):
        """What look(…) makes of a turn, as soon as the device is free."""
        visitor, number = self._visitor(request), int(request.query_params["turn"])
        if number not in range(len(visitor.asked)):
            raise ValueError(f"there is no answer {number} any more")

        def wait_and_look():
            with self.device.turn(lambda line: None, threading.Event()) as run:
                return run(look, *visitor.asked[number])

        return await asyncio.to_thread(wait_and_look)


GET = {"/": "home", "/example.png": "example", "/pictures/{number:int}": "picture", "/see": "see", "/explain": "explain"}
POST = {"/pictures": "add"} | {f"/{name}": name for name in ("state", "here", "leave", "stop", "new", "marked", "ask")}


def application(demo, auth=None):
    """The web application. auth: "user:password" that it asks for; None: nothing, and only addresses of this machine."""
    from starlette.applications import Starlette
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

    expected = auth and f"Basic {base64.b64encode(auth.encode()).decode()}".encode()

    def endpoint(method):
        async def answer(request):
            given = request.headers.get("authorization", "").encode()
            if auth and not secrets.compare_digest(given, expected):
                return Response("name and password, please", 401, {"WWW-Authenticate": 'Basic realm="demo.py", charset="UTF-8"'})
            try:
                said = await method(request)
            except Unknown:
                return JSONResponse({"error": "the server has forgotten this conversation", "unknown": True}, 404)
            except Exception as error:
                return JSONResponse({"error": reason(error)}, 400)
            if isinstance(said, str):
                return HTMLResponse(said)
            if isinstance(said, bytes):
                return Response(said, media_type="image/png")
            if isinstance(said, dict):
                return JSONResponse(said)
            return StreamingResponse(said, media_type="application/x-ndjson")

        return answer

    routes = [Route(path, endpoint(getattr(demo, name))) for path, name in GET.items()]
    routes += [Route(path, endpoint(getattr(demo, name)), methods=["POST"]) for path, name in POST.items()]
    app = Starlette(routes=routes)
    if not auth:  # a page from elsewhere cannot reach it under a name of its own
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=LOCAL)
    return app


def read_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at [127.0.0.1: for this machine only]")
    parser.add_argument("--port", type=int, default=7860, help="[7860]")
    parser.add_argument("--auth", metavar="USER:PASSWORD", help="ask visitors for these; needed where others can reach the page")
    add_loading_options(parser, "tiny/vip-llava")
    parser.set_defaults(question=None, chat=True, max_new_tokens=512, system=None, pad=None)  # what the page settles
    return parser.parse_args()


def open_port(args):
    """A socket that listens where it should. Raises ValueError where that is open to all, or taken."""
    if args.auth is None and args.host not in LOCAL:
        raise ValueError(f"--host {args.host} lets others in; say who by --auth user:password")
    if args.auth is not None and not all(args.auth.partition(":")):
        raise ValueError("--auth needs a name, a colon and a password, as in --auth me:secret")
    if not 0 <= args.port < 2**16:
        raise ValueError(f"--port is {args.port}; expected 0 (any that is free) to 65535")
    try:
        return socket.create_server((args.host, args.port))
    except OSError as error:
        raise ValueError(f"cannot listen at {args.host}:{args.port} ({error}); try another --port") from None


def serve(args):
    """Load the model and answer requests until Ctrl-C. Raises ValueError or OSError for what the user can mend."""
    try:
        import starlette  # noqa: F401  (application needs it; to be told before the model is loaded)
        import uvicorn
    except ImportError:
        raise ValueError("the page needs two packages: pip install -r demo-requirements.txt") from None
    name, example = args.model, None
    if args.model is None:
        args.model, name, example = str(BUNDLED), "tiny/vip-llava, which knows drawn shapes only", HERE / "tiny" / "example.png"
    with open_port(args) as listening:
        demo = Demo(load(args, pictures=1), name, example, args.scale_grey)
        print(f"http://{args.host}:{listening.getsockname()[1]}/", flush=True)
        config = uvicorn.Config(application(demo, args.auth), log_level="warning", access_log=False, timeout_graceful_shutdown=1)
        uvicorn.Server(config).run([listening])


def main():
    try:
        serve(read_arguments())
    except (ValueError, OSError) as error:
        fail(error)
    except (RuntimeError, MemoryError) as error:
        fail(advice(error))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
