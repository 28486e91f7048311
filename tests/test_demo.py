"""The page for any checkpoint: what the server answers, and the page in a real browser."""

import base64
import contextlib
import io
import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image

import demo
import visitors
from chat import Chat
from images import open_image
from marks import draw_marks, parse_mark

if find_spec("starlette") is None or find_spec("uvicorn") is None:
    MISSING = "demo.py's tests need: pip install -r demo-requirements.txt"
    if os.environ.get("CI") == "true":  # where changes are accepted it must not go unnoticed
        pytest.fail(MISSING, pytrace=False)
    pytest.skip(MISSING, allow_module_level=True)

EXAMPLE = Path("tiny/example.png")
BOX = "red rectangle 78,3 108,33 alpha=220 width=9"  # around the black triangle
WISH = {"question": "What is there?", "pictures": [], "again": False, "pad": False}
HEADERS = {"Content-Type": "text/plain"}


@pytest.fixture(scope="module")
def vip():
    return Chat.from_pretrained("tiny/vip-llava", dtype=torch.float32)


@contextlib.contextmanager
def serving(page, auth=None):
    """The address of a server of this page, in a thread."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(demo.application(page, auth), port=0, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def page(vip):
    return demo.Demo(vip, "tiny/vip-llava", EXAMPLE)


@pytest.fixture(scope="module")
def address(page):
    with serving(page) as address:
        yield address


@pytest.fixture
def slow(vip):
    """A model that takes its time, so that something can happen within an answer."""
    hook = vip.model.language_model.register_forward_hook(lambda *_: time.sleep(0.15))
    yield
    hook.remove()


def fetched(address, body=None, headers=HEADERS):
    """The status and the body of an answer."""
    method = "GET" if body is None else "POST"
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    try:
        with urllib.request.urlopen(urllib.request.Request(address, data, headers, method=method), timeout=60) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


class Someone:
    """A visitor without a browser."""

    def __init__(self, address):
        self.address = address
        self.key = json.loads(fetched(address + "state", b"")[1])["visitor"]

    def post(self, path, body=b""):
        return json.loads(fetched(f"{self.address}{path}?visitor={self.key}", body)[1])

    def get(self, path, **query):
        rest = "".join(f"&{name}={value}" for name, value in query.items())
        return fetched(f"{self.address}{path}?visitor={self.key}{rest}")

    def lines(self, **wish):
        """What is told of an answer, line by line, as it comes."""
        request = urllib.request.Request(f"{self.address}ask?visitor={self.key}", json.dumps(WISH | wish).encode(), HEADERS)
        with urllib.request.urlopen(request, timeout=60) as reply:
            yield from map(json.loads, reply)

    def ask(self, question, **wish):
        """The answer, and what is known of it."""
        told = list(self.lines(question=question, **wish))
        return "".join(line.get("piece", "") for line in told), told[-1]


# The server


def test_a_conversation(address, vip):
    someone = Someone(address)
    assert someone.post("pictures", EXAMPLE.read_bytes()) == {"number": 0, "width": 112, "height": 112}
    marked = [{"number": 0, "marks": [BOX]}]
    answer, told = someone.ask("What is within the red rectangle?", pictures=marked)
    own = visitors.fork(vip)
    picture = draw_marks(open_image(EXAMPLE), [parse_mark(BOX)])
    assert answer == "".join(own.ask("What is within the red rectangle?", [picture])) and "triangle" in answer
    assert told["done"]["kept"] == 0 and told["done"]["tokens"] == own.tokens and told["done"]["why"] == ""
    second, told = someone.ask("How many things are there?")
    assert second == "".join(own.ask("How many things are there?")) and told["done"]["kept"] > 64  # the picture is not read again
    assert [turn["answer"] for turn in someone.post("state")["turns"]] == [answer, second]


def test_what_is_asked_again_takes_the_place_of_the_last(address, vip):
    someone = Someone(address)
    someone.post("pictures", EXAMPLE.read_bytes())
    shown = [{"number": 0, "marks": []}]
    someone.ask("How many things are there?", pictures=shown)
    answer, _ = someone.ask("Is there a ring?", pictures=shown, again=True)
    assert answer == "".join(visitors.fork(vip).ask("Is there a ring?", [open_image(EXAMPLE)]))
    assert [turn["question"] for turn in someone.post("state")["turns"]] == ["Is there a ring?"]


def test_the_prompt_and_the_probabilities(address, vip):
    someone = Someone(address)
    someone.post("pictures", EXAMPLE.read_bytes())
    someone.ask("How many things are there?", pictures=[{"number": 0, "marks": []}])
    answer, told = someone.ask("Where is the square?")
    seen = json.loads(someone.get("see", turn=1)[1])
    own = visitors.fork(vip)
    list(own.ask("How many things are there?", [open_image(EXAMPLE)]))
    assert seen["prompt"] == own.prompt("Where is the square?") and seen["ids"] == vip.tokenizer.encode(seen["prompt"])
    assert answer in "".join(one["word"] for one in seen["words"]) and len(seen["words"]) == told["done"]["tokens"]
    assert all(one["probability"] > max(part for _, part in one["others"]) for one in seen["words"])  # it was greedy
    status, text = someone.get("explain", turn=1)
    assert status == 200 and b'<script id="data"' in text
    assert b"there is no answer 2" in someone.get("see", turn=2)[1]


@pytest.mark.parametrize(
    "data, words",
    [
        (b"no picture", "this file is not a picture"),
        (b"", "this file is not a picture"),
        (EXAMPLE.read_bytes()[:300], "damaged"),
        (b"\0" * (demo.MOST_BYTES + 1), "too large; at most 40 MB"),
    ],
)
def test_what_is_no_picture(address, data, words):
    assert words in Someone(address).post("pictures", data)["error"]


def test_a_picture_of_300_megapixels(address):
    encoded = io.BytesIO()
    Image.new("1", (20_000, 15_000)).save(encoded, "PNG")
    assert "20000×15000 are more than" in Someone(address).post("pictures", encoded.getvalue())["error"]


def test_too_many_pictures(address, monkeypatch):
    monkeypatch.setattr(demo, "MOST_PICTURES", 1)
    someone = Someone(address)
    someone.post("pictures", EXAMPLE.read_bytes())
    assert "begin anew" in someone.post("pictures", EXAMPLE.read_bytes())["error"]


@pytest.mark.parametrize(
    "wish, words",
    [
        ({"temperature": -1}, "temperature is -1; expected 0"),
        ({"top_k": 1.5}, "top_k is 1.5; expected a whole number"),
        ({"temperature": "hot"}, "load it again"),
        ({"question": "word " * 600}, "the context is full"),
        ({"question": "What is <image>?"}, "<image>"),
        ({"pictures": [{"number": 7, "marks": []}]}, "there is no picture 7"),
        ({"pictures": [{"number": 0, "marks": ["red box 1,1"]}]}, "no mark is called 'box'"),
        ({"pictures": None}, "load it again"),
    ],
)
def test_what_cannot_be_asked(address, wish, words):
    """One message, and the conversation is as it was."""
    someone = Someone(address)
    someone.post("pictures", EXAMPLE.read_bytes())
    (told,) = [line for line in someone.lines(**wish) if "place" not in line]
    assert words in told["error"] and "Traceback" not in told["error"]
    assert someone.post("state")["turns"] == []
    assert someone.ask("How many things are there?", pictures=[{"number": 0, "marks": []}])[0] == "Four."


def test_a_context_that_becomes_full(address):
    someone = Someone(address)
    _, told = someone.ask("word " * 455, max_new_tokens=512)
    if told.get("done"):
        assert told["done"]["why"] in ("", "cut off: the context is full; begin anew")
    assert someone.post("new") == {} and someone.post("state")["turns"] == []


def test_memory_that_runs_out(address, page, vip, monkeypatch):
    """The question is not lost for the visitor, and the memory is given back."""
    first, second = Someone(address), Someone(address)
    second.ask("Is there a star?")
    caches = [page.visitors[key].chat._cache for key in (first.key, second.key)]
    assert caches[0] is None and caches[1] is not None

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    hook = vip.model.language_model.register_forward_pre_hook(full)
    told = list(first.lines())
    hook.remove()
    assert "the device ran out of memory" in told[-1]["error"]
    assert page.visitors[second.key].chat._cache is None
    assert second.ask("Is there a ring?")[1]["done"]["kept"] == 0


def test_an_error_of_ours_is_no_traceback_for_the_page(address, vip, capsys):
    def broken(*_):
        raise RuntimeError("a secret of the server")

    hook = vip.model.language_model.register_forward_pre_hook(broken)
    told = list(Someone(address).lines())
    hook.remove()
    assert told[-1] == {"error": "the model failed; the terminal in which demo.py runs says more"}
    assert "a secret of the server" in capsys.readouterr().err


def test_an_unknown_visitor(address):
    status, body = fetched(address + "ask?visitor=nobody", WISH)
    assert status == 404 and json.loads(body)["unknown"]


def test_pictures_are_for_their_visitor(address):
    first, second = Someone(address), Someone(address)
    first.post("pictures", EXAMPLE.read_bytes())
    assert first.get("pictures/0")[0] == 200
    assert second.get("pictures/0")[0] == 400 and fetched(address + "pictures/0")[0] == 404


def test_twenty_at_once(address, slow):
    """One answer at a time; the others hear how many are before them; each gets their own answer."""
    everyone, told = [Someone(address) for _ in range(20)], {}

    def go(n):
        told[n] = list(everyone[n].lines(max_new_tokens=1))

    threads = [threading.Thread(target=go, args=[n]) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(lines[-1].get("done") for lines in told.values())
    places = [[line["place"] for line in lines if "place" in line] for lines in told.values()]
    assert max(map(max, filter(None, places))) >= 15
    assert all(seen == sorted(seen, reverse=True) for seen in places)


def test_who_leaves_frees_the_device(address, page, slow):
    first, second = Someone(address), Someone(address)
    answer = first.lines(question="Describe the picture.", max_new_tokens=200)
    next(line for line in answer if "piece" in line)
    answer.close()  # the connection is closed, as with a tab
    start = time.monotonic()
    assert second.ask("Is there a star?", max_new_tokens=1)[1]["done"]
    assert time.monotonic() - start < 5
    assert not page.device.waiting


def test_a_visitor_who_has_left_is_forgotten(address, page, monkeypatch):
    monkeypatch.setattr(demo, "GONE", 0.1)
    someone = Someone(address)
    someone.post("leave")
    assert someone.post("here") == {} if someone.key in page.visitors else True
    someone.post("leave")
    time.sleep(1.5)
    assert someone.key not in page.visitors


def test_others_need_a_password(page):
    with serving(page, "me:sécret") as address:
        for given in ({}, {"Authorization": "Basic bWU6bm8="}):
            assert fetched(address, headers=given)[0] == fetched(address + "state", b"", given)[0] == 401
        word = base64.b64encode("me:sécret".encode()).decode()
        assert fetched(address, headers={"Authorization": f"Basic {word}"})[0] == 200


def test_only_local_names_without_a_password(address):
    assert fetched(address, headers={"Host": "evil.example"})[0] == 400
    assert fetched(address, headers={"Host": "localhost:7860"})[0] == 200


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 lets others in; say who by --auth"),
        (["--auth", "me"], "--auth needs a name, a colon and a password"),
        (["--port", "99999"], "cannot listen at 127.0.0.1:99999"),
        (["--model", "nowhere", "--port", "0"], "nowhere"),
    ],
)
def test_a_mistake_is_one_line(arguments, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        demo.main()
    said = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(said) == 1 and words in said[0]


def test_without_its_packages(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    with pytest.raises(SystemExit):
        demo.main()
    assert capsys.readouterr().err == "demo.py: the page needs two packages: pip install -r demo-requirements.txt\n"


def test_the_command_serves_the_page():
    running = subprocess.Popen([sys.executable, "demo.py", "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        address = running.stdout.readline().strip()
        assert b"Ask a picture" in fetched(address)[1]
    finally:
        running.terminate()
        running.communicate(timeout=30)
