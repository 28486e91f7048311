"""The page's model is PyTorch's, stage by stage, in a real browser; and the page does what it says."""

import base64
import re
import subprocess
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import llama
from chat import Chat
from generate import sample
from images import ImageProcessor
from lessons.page import MOST, data_url, main, page, pictures, quote
from llava import Llava
from marks import KINDS, Mark
from tests.browser import Browser
from tests.compare import FIXTURES, relative
from tiny.marked import held_out_questions as marked_questions
from tiny.world import example, held_out_questions
from tokenizer import Tokenizer, chat_prompt, expand_images

TOLERANCE = 1e-4  # of a stage's largest value
# Every stage of a forward pass in one go, each as [rows, columns, base64 of its float32 numbers].
STAGES = """
  const encoded = ({rows, columns, data}) => {
    let text = "";
    const bytes = new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
    for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode(...bytes.subarray(i, i + 8192));
    return [rows, columns, btoa(text)];
  };
  const stages = (ids, pixels) => {
    const {logits, image_features, vision, hidden_states, attentions} = model.forward(ids, pixels);
    const list = {pixels: [pixels], clip: vision.states, features: [image_features], llama: hidden_states,
      attention: attentions.flat(), logits: [logits]};
    return Object.fromEntries(Object.entries(list).map(([name, matrices]) => [name, matrices.map(encoded)]));
  };
"""


@pytest.fixture(scope="module")
def browser():
    browser = Browser()
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def file(bundled, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "page.html"
    file.write_text(page(bundled.model, bundled.tokenizer, bundled.processor, pictures("llava")), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def vip():
    return Chat.from_pretrained("tiny/vip-llava", dtype=torch.float32)


@pytest.fixture(scope="module")
def vip_file(vip, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "vip.html"
    file.write_text(page(vip.model, vip.tokenizer, vip.processor, pictures("vip")), encoding="utf-8")
    return file


@pytest.fixture
def tab(browser, file):
    """The browser with the bundled model's page in it."""
    if browser.file != file:
        browser.open(file)
        browser.run("await ready;")
    return browser


def decoded(stages):
    tensor = lambda rows, columns, text: torch.from_numpy(np.frombuffer(base64.b64decode(text), np.float32).reshape(rows, columns).copy())
    return {name: [tensor(*matrix) for matrix in matrices] for name, matrices in stages.items()}


@torch.no_grad()
def reference(model, ids, pixels):
    """The same stages from PyTorch, as lists of matrices."""
    naive = model(torch.tensor([ids]), pixels, output_attentions=True, output_hidden_states=True)
    depth = max(k % (model.config.vision.num_hidden_layers + 1) for k in model.config.vision_layers)
    return {
        "pixels": [pixels[0].flatten(1)],
        "clip": [state[0] for state in model.vision_tower(pixels, list(range(depth + 1)))],
        "features": [naive.image_features[0]],
        "llama": [state[0] for state in naive.hidden_states],
        "attention": [head for layer in naive.attentions for head in layer[0]],
        "logits": [naive.logits[0]],
    }


def errors(ours, theirs):
    """The largest error of each stage, as a part of the stage's largest value."""
    return {name: max(relative(a, b) for a, b in zip(ours[name], matrices, strict=True)) for name, matrices in theirs.items()}


# The model


def compare(tab, chat, asked):
    """Ask the page what is asked, (picture, question) each: the largest errors. Ids, words and texts must be the same."""
    model, tokenizer, worst, most = chat.model, chat.tokenizer, {}, 64
    for picture, question in asked:
        chat.reset()
        ids = expand_images(tokenizer.encode(chat.prompt(question, [picture])), model.config.image_id, 64)
        result = tab.run(
            STAGES + """
              const [url, question, most] = given, pixels = processor.call(pixels_of(await load_picture(url)));
              const ids = expand_images(tokenizer.encode(chat_prompt(question, data.style)), data.config.image_id, 64);
              const cache = new KVCache(data.config.text, 256), features = model.encode_images(pixels), words = [];
              for (const {token} of model.generate(ids, features, cache)) if (words.push(token) === most) break;
              return {ids, stages: stages(ids, pixels), words, text: tokenizer.decode(words)};
            """,
            data_url(picture), question, most,
        )  # fmt: skip
        assert result["ids"] == ids, question
        pixels = chat.processor([picture])
        found = errors(decoded(result["stages"]), reference(model, ids, pixels))
        worst = {name: max(found[name], worst.get(name, 0)) for name in found}
        words = [int(token) for token in model.generate(torch.tensor([ids]), pixels, max_new_tokens=most)]
        assert result["words"] == words and result["text"] == tokenizer.decode(words), question
    return worst


def test_every_stage_is_pytorchs_and_so_is_every_word(tab, bundled):
    worst = compare(tab, bundled, [asked[1:3] for asked in held_out_questions(50, "page, in the browser")])
    assert worst["pixels"] == 0 and max(worst.values()) < TOLERANCE, worst
    print(worst)


def test_a_vip_llavas_stages_and_words_are_pytorchs_too(browser, vip, vip_file):
    browser.open(vip_file)
    browser.run("await ready;")
    worst = compare(browser, vip, [(image, question) for *_, image, _, question, _ in marked_questions(8, "page, in the browser")])
    assert worst["pixels"] == 0 and max(worst.values()) < TOLERANCE, worst


@pytest.mark.parametrize("family", ["vip", "bakllava"])
def test_five_layers_a_layer_norm_shared_heads_and_a_window(browser, family, tmp_path):
    """On the tiny random models that the parity with transformers is tested on."""
    model = Llava.from_pretrained(FIXTURES / family, dtype=torch.float16).float()
    file = tmp_path / "page.html"
    tokenizer = Tokenizer.from_pretrained(FIXTURES / "tokenizer")
    side = model.config.vision.image_size
    processor = ImageProcessor(side, side, (0.5,) * 3, (0.25,) * 3)
    file.write_text(page(model, tokenizer, processor, pictures(model.config.style)), encoding="utf-8")
    browser.open(file)
    pixels = load_file(FIXTURES / family / "reference.safetensors")["pixel_values"][:1]
    image_id, P = model.config.image_id, model.config.features_per_image
    ids = [1, 5, 9] + [image_id] * P + [7, 21, 3, 44, 60, 2, 17, 8]
    result = browser.run(
        STAGES + "const [ids, rows] = given; return stages(ids, new Matrix(3, rows[0].length, Float32Array.from(rows.flat())));",
        ids, pixels[0].flatten(1).tolist(),
    )  # fmt: skip
    found = errors(decoded(result), reference(model, ids, pixels))
    assert max(found.values()) < TOLERANCE, found


def test_ids_and_texts_are_the_tokenizers(tab, bundled):
    random = Random(22)
    letters = "abcdeghilnorstuy    ABDHINSTUW?.,:\n\t123éß▁漢🙂\u0301" + "".join(map(chr, range(32, 127)))
    texts = ["", " ", "  two  spaces ", "constructor", "Where is the ring?</s>USER: Which?"]
    texts += ["".join(random.choices(letters, k=random.randint(1, 40))) for _ in range(500)]
    texts += [question for *_, question, _ in held_out_questions(50, "page, in the browser")]
    lists = [random.choices(range(512), k=random.randint(1, 30)) for _ in range(500)]
    lists += [list(text.encode()) for text in ("naïve 漢字", "🙂🙂")]
    ids, said = tab.run("return [given[0].map(text => tokenizer.encode(text)), given[1].map(ids => tokenizer.decode(ids))];", texts, lists)
    assert ids == [bundled.tokenizer.encode(text) for text in texts]
    assert said == [bundled.tokenizer.decode(ids) for ids in lists]


@pytest.mark.parametrize("size", [(112, 112), (113, 112), (400, 300), (60, 90), (112, 301), (1000, 40)])
def test_a_picture_of_any_size_is_resized_as_pillow_does_to_the_bit(tab, bundled, size):
    picture = Image.fromarray(np.random.default_rng(22).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    result = tab.run(STAGES + "return encoded(processor.call(pixels_of(await load_picture(given[0]))));", data_url(picture))
    assert torch.equal(decoded({"pixels": [result]})["pixels"][0], bundled.processor([picture])[0].flatten(1))


@pytest.mark.parametrize("question, literal", [("What is <image>?", "<image>"), ("Hello USER: you", "USER:"), ("</s>", "</s>")])
def test_a_literal_in_the_question_is_refused_in_both(tab, bundled, question, literal):
    with pytest.raises(ValueError, match=f"contains '{literal}', which the model would not read as text"):
        bundled.prompt(question)
    with pytest.raises(RuntimeError, match=f'contains "{literal}", which the model would not read as text'):
        tab.run("return chat_prompt(given[0], data.style);", question)


# What one can do with it


def ask(tab, question):
    """Ask on the page as a user does; what is shown: the answer's tokens, the sentence below them and the answer itself."""
    return tab.run(
        """
          $("question").value = given[0];
          $("form").requestSubmit();
          while ($("main").getAttribute("aria-busy") === "true") await frame();
          return [state.answer.map(({token}) => token), [...$("answer").querySelectorAll("button")].map(b => b.textContent), text()];
        """,
        question,
    )  # fmt: skip


@pytest.fixture
def asked(tab, bundled):
    """A page on which a question about the bundled picture has been answered, and the same in Python."""
    question, picture = "What is on the left?", example()[1]
    tab.run("tour(-1); restore(); $('temperature').value = 0; $('top-p').value = 1; await show_example(0);")
    tokens, shown, said = ask(tab, question)
    bundled.reset()
    ids = expand_images(bundled.tokenizer.encode(bundled.prompt(question, [picture])), bundled.model.config.image_id, 64)
    assert said == "".join(bundled.ask(question, [picture])) == "A large red square."
    assert " ".join(shown) == "A large red square . (end)"
    return ids, tokens, bundled.processor([picture])


def test_the_alternatives_are_pytorchs_and_the_answer_goes_on_from_the_one_that_is_chosen(tab, asked, bundled):
    ids, tokens, pixels = asked
    with torch.no_grad():
        expected = bundled.model(torch.tensor([ids + tokens[:2]]), pixels).logits[0, -1].softmax(-1)
    rows = tab.run("""
      choose_word(2);
      const rows = [...$("alternatives").children];
      return rows.map(row => [row.querySelector("button").textContent, Number(row.querySelector(".bar").style.getPropertyValue("--p"))]);
    """)
    best = expected.topk(10)
    assert [word for word, _ in rows] == [bundled.tokenizer.model.id_to_piece(int(i)).replace("▁", "") or "␣" for i in best.indices]
    assert torch.allclose(torch.tensor([p for _, p in rows]), best.values, rtol=1e-3, atol=1e-7)

    chosen = int(best.indices[1])
    rest = bundled.model.generate(torch.tensor([ids + tokens[:2] + [chosen]]), pixels)
    said, logits, focused = tab.run("""
      $("alternatives").children[1].querySelector("button").focus();
      document.activeElement.click();
      while ($("main").getAttribute("aria-busy") === "true") await frame();
      const tokens = state.answer.map(({token}) => token), focused = document.activeElement.closest("#alternatives") !== null;
      return [tokens, Array.from(state.answer[3].logits), focused];
    """)
    with torch.no_grad():
        expected = bundled.model(torch.tensor([ids + tokens[:2] + [chosen]]), pixels).logits[0, -1]
    assert relative(torch.tensor(logits), expected) < TOLERANCE  # the cache holds what was chosen, and nothing of what was there before
    assert focused  # a list that is drawn anew would otherwise send whoever uses a keyboard back to the top
    assert said == tokens[:2] + [chosen] + [int(token) for token in rest] != tokens


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.9), (2.0, 0.5), (1.3, 0.05)])
def test_a_word_is_drawn_with_pytorchs_probabilities(tab, monkeypatch, temperature, top_p):
    logits = torch.randn(1, 512, generator=torch.Generator().manual_seed(22)) * 3
    drawn = []
    monkeypatch.setattr(torch, "empty_like", lambda p: drawn.append(p) or torch.ones_like(p))  # where the draw is made
    sample(logits, temperature, None, None if top_p == 1 else top_p, None)
    p = tab.run("return Array.from(distribution(Float32Array.from(given[0]), given[1], given[2]));", logits[0].tolist(), temperature, top_p)
    p = torch.tensor(p, dtype=torch.float64)
    assert torch.allclose(p.float(), drawn[0][0], rtol=1e-4, atol=1e-8) and (p > 0).equal(drawn[0][0] > 0)
    draws = tab.run(
        "return [0, 0.25, 0.5, 0.75, 0.999999].map(r => sample(Float32Array.from(given[0]), given[1], given[2], () => r));",
        logits[0].tolist(), temperature, top_p,
    )  # fmt: skip
    assert draws == [int((p.cumsum(-1) > r).nonzero()[0]) for r in (0, 0.25, 0.5, 0.75, 0.999999)]


def without_head(attention, head, width, out):
    """A hook that takes one head out of an attention, before its output projection."""

    def zero(module, inputs):
        x = inputs[0].clone()
        x[..., head * width : (head + 1) * width] = 0
        return (x,)

    return getattr(attention, out).register_forward_pre_hook(zero)


ABLATIONS = {
    "a head of the Llama": "off.heads.add('llama 1 4')",
    "a block of the Llama": "off.blocks.add('llama 2')",
    "the last block of the Llama": "off.blocks.add('llama 3')",
    "a head of CLIP": "off.heads.add('clip 2 1')",
    "a block of CLIP": "off.blocks.add('clip 1')",
    "CLIP's last layer": "off.layers = [-1]",
    "grey patches": "off.grey = new Set([25, 33])",
    "blind words": "off.blind = new Set([75, 78, 80])",
}


@pytest.mark.parametrize("what", ABLATIONS)
def test_what_is_switched_off_is_off_as_it_would_be_in_pytorch(tab, asked, bundled, monkeypatch, what):
    ids, tokens, pixels = asked
    model, clip, blocks = bundled.model, bundled.model.vision_tower.layers, bundled.model.language_model.layers
    hook = None
    if what == "a head of the Llama":
        hook = without_head(blocks[1].self_attn, 4, 32, "o_proj")
    elif what == "a block of the Llama":
        monkeypatch.setattr(blocks[2], "forward", lambda x, *_, **__: x)
    elif what == "the last block of the Llama":
        monkeypatch.setattr(blocks[3], "forward", lambda x, *_, **__: x)
    elif what == "a head of CLIP":
        hook = without_head(clip[2].self_attn, 1, 32, "out_proj")
    elif what == "a block of CLIP":
        monkeypatch.setattr(clip[1], "forward", lambda x: x)
    elif what == "CLIP's last layer":
        monkeypatch.setattr(model.config, "vision_layers", [-1])
    elif what == "grey patches":
        pixels = pixels.clone()
        pixels[0, :, 42:70, 14:28] = 0  # rows 4 and 5 of patches, column 2
    else:
        seen = llama.visible

        def visible(*arguments):
            mask = seen(*arguments).clone()
            mask[:, :, [75, 78, 80], 4:68] = False
            return mask

        monkeypatch.setattr(llama, "visible", visible)
    try:
        with torch.no_grad():
            plain = tab.run(STAGES + "return encoded(state.trace.logits);")
            expected = model(torch.tensor([ids + tokens[:-1]]), pixels, output_attentions=True).logits[0]
    finally:
        if hook:
            hook.remove()
    result = tab.run(
        STAGES + f"""
          {ABLATIONS[what]};
          await compare();
          const {{logits}} = model.forward([...state.prompt, ...given[0].slice(0, -1)], greyed(), ablation());
          return [encoded(logits), $("changed").textContent];
        """,
        tokens,
    )  # fmt: skip
    (ours,) = decoded({"logits": [result[0]]})["logits"]
    (before,) = decoded({"logits": [plain]})["logits"]
    assert relative(ours, expected) < TOLERANCE and relative(before, expected) > 10 * TOLERANCE
    assert result[1].startswith("The answer ")


def test_a_scene_that_is_drawn_is_described(tab):
    tab.run("""
      restore();
      $("drawing").open = true;
      $("empty").click();
      await frame();
      const put = (kind, colour, size, cell) => {
        const choices = Object.entries({kind, colour, size});
        for (const [name, value] of choices) document.querySelector(`#tools [name=${name}][value=${value}]`).checked = true;
        $("canvas").children[cell].click();
      };
      put("star", "purple", "large", 0);
      put("circle", "red", "small", 2);
      put("circle", "red", "small", 2);  // and away again
      put("cross", "green", "small", 4);
      put("ring", "orange", "large", 8);
    """)
    _, _, said = ask(tab, "Describe the picture.")
    assert said == "A large purple star at the top left, a small green cross in the centre and a large orange ring at the bottom right."


def test_arrow_keys_and_enter_do_what_a_mouse_does(tab, asked):
    keys = {"right": "\ue014", "down": "\ue015", "enter": "\ue007"}
    tab.run("$('tiles').children[0].focus();")
    pressed = [{"type": kind, "value": keys[key]} for key in ("right", "down", "down", "enter") for kind in ("keyDown", "keyUp")]
    tab.command("POST", "/actions", actions=[{"type": "key", "id": "keys", "actions": pressed}])
    assert tab.run("return [state.patch, $('tiles').children[17].getAttribute('aria-pressed')];") == [17, "true"]
    assert tab.run("return document.querySelectorAll('#tiles [tabindex=\"0\"]').length;") == 1  # the Tab key finds one of them


def test_a_question_that_cannot_be_asked_is_one_clear_sentence(tab, asked):
    said = tab.run("$('question').value = 'What is <image>?'; $('form').requestSubmit(); await frame(); return $('error').textContent;")
    assert said.startswith('the question contains "<image>"')
    assert ask(tab, "Where is the ring?")[2] == "At the bottom." and tab.run("return $('error').textContent;") == ""


def test_the_tour_has_seven_steps_and_each_shows_what_it_speaks_of(tab, asked):
    steps = tab.run("""
      const shown = [];
      for (let n = 0; n < $("steps").children.length; n++) {
        await tour(n);
        await new Promise(done => setTimeout(done, 100));
        const open = [...$("steps").children].filter(step => !step.hidden).map(step => step.querySelector("h3").textContent);
        shown.push([open, $("tour").hidden, document.querySelectorAll(".now").length, text()]);
      }
      while (/computing/.test($("changed").textContent)) await frame();
      const seen = ["attention-says", "changed", "similar-says"].map(id => $(id).textContent);
      $("next").click();
      return [shown, [label(state.answer[state.word].token), ...seen], $("tour").hidden];
    """)
    shown, (word, attention, changed, similar), hidden = steps
    assert [title[0].split(":")[0] for title, *_ in shown] == [f"{n} of 7" for n in range(1, 8)] and hidden
    assert all(len(step[0]) == 1 and step[1:] == [False, 1, "A large red square."] for step in shown)
    picture = np.asarray(example()[1])
    row, column = map(int, re.search(r"\(1\) row (\d), column (\d)", attention).groups())
    middle = picture[14 * row - 7, 14 * column - 7]
    assert word == "red" and middle[0] > 180 > 80 > max(middle[1:])  # the head looks at red, for "red"
    assert changed.startswith("The answer becomes") and "less likely" in changed
    assert similar.endswith("after the last that is read the one at row 7, column 4.")  # the ring's other half


def test_the_tour_of_a_vip_llava_speaks_of_its_mark(browser, vip_file):
    browser.open(vip_file)
    answer, attention, changed = browser.run("""
      await ready;
      const said = [];
      for (let n = 0; n < $("steps").children.length; n++) {
        await tour(n);
        await new Promise(done => setTimeout(done, 100));
        said.push(text());
      }
      while (/computing/.test($("changed").textContent)) await frame();
      return [said[0], $("attention-says").textContent, $("changed").textContent];
    """)
    assert answer == "A large black triangle." and changed.startswith("The answer becomes")
    row, column = map(int, re.search(r"\(1\) row (\d), column (\d)", attention).groups())
    assert row in (1, 2) and column in (4, 5)  # the head looks at the triangle, and not at the star, which is black too


def test_the_page_of_a_vip_llava_draws_marks(browser, vip, vip_file):
    browser.log()
    browser.open(vip_file)
    marks = browser.run("""
      await ready;
      await show_example(3);
      $("drawing").open = true;
      await frame();
      const before = state.pixels.data.slice(), changed = {};
      for (const mark of Object.keys(data.marks.relations)) {
        document.querySelector(`#tools [name=mark][value="${mark}"]`).checked = true;
        $("canvas").children[4].click();
        const cells = Array(9).fill(0), cell = i => Math.floor(i % (112 * 112) / 112 * 3 / 112) * 3 + Math.floor(i % 112 * 3 / 112);
        state.pixels.data.forEach((value, i) => { if (value !== before[i]) cells[cell(i)]++; });
        changed[mark] = [cells, $("question").value];
        $("canvas").children[4].click();  // and away again
        if (state.pixels.data.some((value, i) => value !== before[i])) throw new Error(`the ${mark} stays`);
      }
      while ($("main").getAttribute("aria-busy") === "true") await frame();
      return [changed, state.prompt, state.question];
    """)
    assert {*marks[0]} == {*KINDS} and browser.run("return document.title;") == "A whole ViP-LLaVA in one page"
    assert browser.log() == []
    for kind, (cells, question) in marks[0].items():
        assert cells[4] > 40 and cells[4] > sum(cells) * (0.5 if kind == "arrow" else 0.9), (kind, cells)  # an arrow's tail is elsewhere
        assert question == f"What is {Mark(kind, (10, 10, 30, 30)).words}?"
    prompt = chat_prompt([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": marks[2]}]}], "vip")
    assert marks[1] == expand_images(vip.tokenizer.encode(prompt), vip.model.config.image_id, 64)


# One file


def test_it_is_one_file_that_asks_the_network_for_nothing(tab, file):
    html = file.read_text(encoding="utf-8")
    assert file.stat().st_size <= MOST and "default-src 'none'" in html
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#|data:)|url\(\s*["']?(?!\$)[\w/]|@import|import\(|fetch\(|XMLHttp|WebSocket""", html)
    assert tab.run("return performance.getEntriesByType('resource').map(e => e.name).filter(name => !name.startsWith('data:'));") == []
    refused = tab.run("try { await fetch('http://127.0.0.1:9/'); return 'sent'; } catch (error) { return error.name; }")
    assert refused == "TypeError" and "Content Security Policy" in " ".join(tab.log())


def test_nothing_is_written_to_the_console(browser, file):
    browser.log()
    browser.open(file)
    browser.run("await ready;")
    assert browser.log() == []


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_it_fits_the_screen(tab, asked, width):
    metrics = {"width": width, "height": 740, "deviceScaleFactor": 1, "mobile": width < 500}
    tab.command("POST", "/goog/cdp/execute", cmd="Emulation.setDeviceMetricsOverride", params=metrics)
    try:
        tab.run("$('drawing').open = true; await frame();")
        wide = tab.run(
            """
              const all = [...document.querySelectorAll("body *")].filter(e => !e.closest(".scroll, .skip"));
              return all.filter(e => e.getBoundingClientRect().right > given[0] + 0.5).map(e => e.id || e.tagName);
            """,
            width,
        )  # fmt: skip
        assert wide == [] and tab.run("return document.documentElement.scrollWidth;") <= width
    finally:
        tab.command("POST", "/goog/cdp/execute", cmd="Emulation.clearDeviceMetricsOverride", params={})


def test_whatever_can_be_pressed_or_looked_at_has_a_name(tab, asked):
    nameless = tab.run("""
      const labels = e => [...e.labels ?? []].map(label => label.textContent).join("").trim();
      const name = e => e.getAttribute("aria-label") || labels(e) || e.textContent.trim();
      const all = [...document.querySelectorAll("button, input, canvas:not([aria-hidden=true]), [role=img], [role=group], summary")];
      return [all.length, all.filter(e => !name(e)).map(e => e.outerHTML.slice(0, 100))];
    """)
    assert nameless[0] > 300 and nameless[1] == []
    ids = re.findall(r'\sid="([^"]+)"', Path("lessons/page/page.html").read_text(encoding="utf-8"))
    assert len(ids) == len(set(ids))


# The command


def test_the_page_quotes_the_python_as_it_is():
    html = quote("<pre>{{llava.py: return self.linear_2(}}</pre>")
    number = int(re.search(r'<span class="place">llava.py:(\d+)</span> return self.linear_2', html)[1])
    assert "return self.linear_2(" in Path("llava.py").read_text(encoding="utf-8").splitlines()[number - 1] and html.endswith("</pre>")
    with pytest.raises(ValueError, match="llava.py has no line with 'never there'"):
        quote("{{llava.py: never there}}")


def test_the_command(tmp_path):
    done = subprocess.run([sys.executable, "-m", "lessons.page", "-o", tmp_path / "p.html"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == f"{tmp_path / 'p.html'}\n" and (tmp_path / "p.html").stat().st_size <= MOST


LARGE = '{"model_type": "llava", "text_config": {"vocab_size": 32064}}'


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--model", "nowhere"], "nowhere: no such folder"),
        (["--model", "large"], "parameters; a page of at most 12,000,000 bytes holds"),  # found out before any weight is read
        (["-o", "no/such/folder/p.html"], "no/such/folder"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, monkeypatch, capsys, arguments, words):
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "config.json").write_text(LARGE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["page.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        main()
    said = capsys.readouterr().err
    assert said.startswith("page.py: ") and words in said and said.count("\n") == 1


@pytest.mark.parametrize("ci, outcome", [("true", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_a_missing_browser_is_never_passed_over_where_changes_are_accepted(monkeypatch, ci, outcome):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome, match="apt-get install chromium chromium-driver"):
        Browser()
