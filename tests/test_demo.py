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

import numpy as np
import pytest
import torch
from PIL import Image

import demo
import visitors
from chat import Chat
from images import open_image
from marks import draw_marks, parse_mark
from tests.browser import Browser

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
        with urllib.request.urlopen(urllib.request.Request(address, data, headers, method=method), timeout=120) as reply:
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
        with urllib.request.urlopen(request, timeout=120) as reply:
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


def test_the_prompt_and_the_probabilities(address, vip, monkeypatch):
    monkeypatch.setattr(demo, "CELLS", 2)
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
def test_what_cannot_be_asked(address, vip, wish, words):
    """One message, and the conversation is as it was."""
    someone = Someone(address)
    someone.post("pictures", EXAMPLE.read_bytes())
    (told,) = [line for line in someone.lines(**wish) if "place" not in line]
    assert words in told["error"] and "Traceback" not in told["error"]
    assert someone.post("state")["turns"] == []
    answer, _ = someone.ask("What is on the left?", pictures=[{"number": 0, "marks": []}])
    assert answer == "".join(visitors.fork(vip).ask("What is on the left?", [open_image(EXAMPLE)]))


def test_a_context_that_becomes_full(address):
    someone = Someone(address)
    while (told := someone.ask("Describe the picture, all of it, please.")[1]).get("done"):
        pass
    assert "the context is full" in told["error"]
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
    assert second.ask("Is there a star?", max_new_tokens=1)[1]["done"]
    assert page.visitors[first.key].turns[-1]["why"] == "stopped" and not page.device.waiting


def test_a_visitor_who_has_left_is_forgotten(address, page, monkeypatch):
    monkeypatch.setattr(demo, "GONE", 0.1)
    someone = Someone(address)
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
        (["--port", "99999"], "--port is 99999; expected 0"),
        (["--model", "nowhere", "--port", "0"], "nowhere"),
    ],
)
def test_a_mistake_is_one_line(arguments, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        demo.main()
    said = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(said) == 1 and words in said[0]


def test_a_port_that_is_taken(address, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--port", address.split(":")[-1].strip("/")])
    with pytest.raises(SystemExit):
        demo.main()
    assert "try another --port" in capsys.readouterr().err


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


# The page


@pytest.fixture(scope="module")
def browser():
    browser = Browser()
    yield browser
    browser.close()


WAIT = """
  const until = async condition => { while (!condition()) await new Promise(done => setTimeout(done, 20)); };
  const idle = () => until(() => !$("ask").disabled);
  const texts = selector => [...document.querySelectorAll(selector)].map(node => node.textContent);
"""
READY = "await until(() => pictures.length && pictures[0].image.complete && pictures[0].image.naturalWidth && !$('point').hidden);"
ASK = "$('question').value = given[0]; $('form').requestSubmit(); await idle(); return texts('.said').at(-1);"


class Tab:
    """The page in the browser, as a new visitor sees it."""

    def __init__(self, browser, address):
        self.browser = browser
        self.handle = browser.command("POST", "/window/new", type="tab")["handle"]
        self.front()
        browser.visit(address)
        self.run(READY)

    def front(self):
        self.browser.command("POST", "/window", handle=self.handle)

    def run(self, script, *given):
        return self.browser.run(WAIT + script, *given)

    def ask(self, question):
        return self.run(ASK, question)

    def errors(self):
        return self.run("return texts('.error');")

    def drag(self, *corners):
        """Draw with the mouse from point to point, in pixels of the picture."""
        places = self.run(
            "canvas.scrollIntoView(); const box = canvas.getBoundingClientRect(), part = n => box.width / (n - 1);"
            "return given[0].map(([x, y]) => [box.left + x * part(canvas.width), box.top + y * part(canvas.height)]);",
            corners,
        )
        moves = [{"type": "pointerMove", "x": round(x), "y": round(y), "duration": 50} for x, y in places]
        actions = [moves[0], {"type": "pointerDown", "button": 0}, *moves[1:], {"type": "pointerUp", "button": 0}]
        self.browser.command("POST", "/actions", actions=[{"type": "pointer", "id": "mouse", "actions": actions}])

    def press(self, *keys):
        pressed = [{"type": kind, "value": KEYS.get(key, key)} for key in keys for kind in ("keyDown", "keyUp")]
        self.browser.command("POST", "/actions", actions=[{"type": "key", "id": "keys", "actions": pressed}])


KEYS = {"left": "\ue012", "up": "\ue013", "right": "\ue014", "down": "\ue015", "tab": "\ue004", "enter": "\ue007", "space": " "}


@pytest.fixture
def tab(browser, address):
    return Tab(browser, address)


def conversation_of(page, tab):
    return page.visitors[tab.run("return visitor;")].chat


def test_upload_ask_and_ask_again(tab, vip):
    """The bundled picture is there; another is chosen; a second question needs no picture again."""
    element = tab.browser.command("POST", "/element", using="css selector", value="#file")
    tab.browser.command("POST", f"/element/{next(iter(element.values()))}/value", text=str(EXAMPLE.resolve()))
    tab.run("await until(() => pictures.length === 2);")
    own = visitors.fork(vip)
    picture = open_image(EXAMPLE)
    assert tab.ask("How many things are there?") == "".join(own.ask("How many things are there?", [picture, picture]))
    assert tab.ask("Is there a star?") == "".join(own.ask("Is there a star?"))
    assert "tokens of the conversation were kept" in tab.run("return texts('.about').join(' ');") and tab.errors() == []
    tab.run("document.querySelectorAll('.turn button')[1].click(); await until(() => document.querySelector('.inside table'));")
    words = tab.run("return texts('.inside td').join(' ');")
    assert all(own.tokenizer.decode([token]).strip() in words for token in own.answer_ids[:-1])
    assert "Is there a star?" in tab.run("return texts('.inside pre')[0];")
    assert tab.browser.log() == []


def test_a_box_drawn_with_the_mouse(tab, page):
    """The model gets what draw_marks draws, to the pixel; the chip's words are in the question; the answer is about the box."""
    tab.drag((78, 3), (108, 33))
    tab.run("await until(() => document.querySelector('.chip'));")
    tab.run("$('question').value = 'What is '; $('question').selectionStart = 8; document.querySelector('.chip button').click();")
    assert tab.run("return $('question').value;") == "What is within the red rectangle"
    (mark,) = tab.run("return pictures[0].marks;")
    answer = tab.run("$('question').value += '?'; $('form').requestSubmit(); await idle(); return texts('.said').at(-1);")
    chat = conversation_of(page, tab)
    drawn = draw_marks(open_image(EXAMPLE), [parse_mark(mark)])
    assert np.array_equal(np.asarray(chat.images[0]), np.asarray(drawn))
    shown = tab.run("return seen.src;")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(shown.partition(",")[2])))), np.asarray(drawn))
    assert "within the red rectangle" in chat.prompt("") and "triangle" in answer and "black" in answer, answer


def test_a_model_without_marks_is_said_to_be_one(browser, bundled):
    with serving(demo.Demo(bundled, "tiny/llava", EXAMPLE)) as address:
        tab = Tab(browser, address)
        assert tab.run("return $('untrained').hidden;")
        tab.drag((78, 3), (108, 33))
        tab.run("await until(() => document.querySelector('.chip') && !$('untrained').hidden);")


@pytest.mark.parametrize("kind", demo.DRAWN)
def test_every_tool_draws_its_mark(tab, kind):
    tab.run("document.querySelector(`[name=kind][value=${given[0]}]`).click();", kind)
    tab.drag((20, 20), (60, 20), (60, 70), (25, 60))
    (mark,) = tab.run("await until(() => document.querySelector('.chip')); return current.marks;")
    assert parse_mark(mark).kind == kind and tab.errors() == []


def test_an_answer_is_stopped_and_asked_again(tab, slow):
    tab.run("$('question').value = 'Describe the picture.'; $('form').requestSubmit(); await until(() => texts('.said').at(-1));")
    tab.run("$('stop').click(); await idle();")
    assert "stopped" in tab.run("return texts('.about').join(' ');")
    assert tab.run("$('edit').click(); return $('question').value;") == "Describe the picture."
    assert tab.ask("Is there a star?") and tab.run("return texts('.asked');") == ["Is there a star?"]


def test_two_visitors_side_by_side(browser, address):
    first, second = Tab(browser, address), Tab(browser, address)
    second.ask("Is there a star?")
    first.front()
    assert first.run("return texts('.asked');") == []
    first.ask("How many things are there?")
    assert first.run("return texts('.asked');") == ["How many things are there?"]
    second.front()
    assert second.run("return (await post('state')).turns.map(turn => turn.question);") == ["Is there a star?"]


def test_a_closed_tab_frees_the_device(browser, address, page, slow):
    other, leaving = Tab(browser, address), Tab(browser, address)
    leaving.run("$('question').value = 'Describe the picture.'; $('form').requestSubmit(); await until(() => texts('.said').at(-1));")
    left = page.visitors[leaving.run("return visitor;")]
    browser.command("DELETE", "/window")
    assert left.answering.acquire(timeout=20) and left.turns[-1]["why"] == "stopped"
    other.front()
    assert other.ask("Is there a star?")


def test_a_reload_brings_the_conversation_back(tab):
    tab.drag((78, 3), (108, 33))
    tab.run("await until(() => document.querySelector('.chip'));")
    answer = tab.ask("What is within the red rectangle?")
    tab.browser.command("POST", "/refresh")
    tab.run(READY + "await until(() => document.querySelector('.chip'));")
    assert tab.run("return texts('.said');") == [answer] and tab.run("return unseen().length;") == 0
    tab.run("sessionStorage.visitor = 'nobody';")
    tab.browser.command("POST", "/refresh")
    tab.run(READY)
    (said,) = tab.errors()
    assert "begins anew" in said


def test_what_goes_wrong_is_one_message(tab):
    tab.run("await add([new File(['no picture'], 'notes.txt')]);")
    tab.run("document.querySelector('[name=temperature]').value = -1;")
    tab.ask("Is there a star?")
    said = tab.errors()
    assert len(said) == 1 and "temperature is -1" in said[0] and tab.run("return $('question').value;") == "Is there a star?"


def test_a_picture_is_named_when_it_is_refused(tab):
    tab.run("await add([new File(['no picture'], 'notes.txt')]);")
    assert tab.errors() == ["notes.txt is not a picture in a format that Pillow reads"]


def test_by_keyboard_alone(tab):
    """Tab to the picture, move the cross, set two corners; Tab to the chip, press it; write, Enter."""
    tab.run("document.querySelector('#thumbnails button').focus();")
    tab.press("tab")
    assert tab.run("return document.activeElement.id;") == "canvas"
    tab.press("right", "right", "enter", "down", "down", "down", "right", "right", "right", "enter")
    tab.run("await until(() => document.querySelector('.chip'));")
    for _ in range(20):
        if tab.run("return document.activeElement.closest('.chip') !== null;"):
            break
        tab.press("tab")
    tab.press("enter")
    assert tab.run("return document.activeElement.id;") == "question"
    tab.press(*"?", "enter")
    tab.run("await until(() => texts('.said').at(-1)); await idle();")
    assert tab.run("return texts('.asked');") == ["within the red rectangle?"] and tab.errors() == []


def test_a_narrow_window(tab):
    """390 pixels wide nothing is cut off at the side."""
    emulate = {"cmd": "Emulation.setDeviceMetricsOverride", "params": {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}}
    tab.browser.command("POST", "/goog/cdp/execute", **emulate)
    tab.ask("Describe the picture.")
    tab.run("document.querySelector('.turn button').click(); await until(() => document.querySelector('.inside table'));")
    wide = tab.run("return [innerWidth, document.documentElement.scrollWidth];")
    tab.browser.command("POST", "/goog/cdp/execute", cmd="Emulation.clearDeviceMetricsOverride", params={})
    assert wide == [390, 390]
