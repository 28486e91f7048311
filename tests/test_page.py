"""The page's model is PyTorch's, stage by stage, in a real browser; and the page does what it says."""

import base64
import io
import re
import subprocess
import sys
from dataclasses import asdict
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
from lessons.page import MOST, TOURS, data_url, main, page, pictures, quote, thing_of
from llava import Llava
from marks import KINDS, Mark, draw_marks
from tests.browser import Browser
from tests.compare import FIXTURES, relative
from tiny.marked import BOLD, marked_scene
from tiny.marked import held_out_questions as marked_questions
from tiny.world import describe, example, held_out_questions, make_scene
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
    tab.run("tour(-1); restore(); set_sliders(0, 1); await show_example(0);")
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
        for (const [name, value] of choices) document.querySelector(`#tools [name=${name}]`).value = value;
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
    assert changed.startswith("The answer becomes") and "would practically never be given now" in changed
    row, column = map(int, re.search(r"after the last that is read the one at row (\d), column (\d)", similar).groups())
    assert picture[14 * row - 7, 14 * column - 7][0] > 180  # another patch of the red square


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
    assert answer == "A small purple triangle." and changed.startswith("The answer becomes")
    row, column = map(int, re.search(r"\(1\) row (\d), column (\d)", attention).groups())
    assert row >= 6 and column <= 3  # the head looks at the marked triangle at the bottom left, and not at the other one


def test_the_page_of_a_vip_llava_draws_marks(browser, vip, vip_file):
    browser.log()
    browser.open(vip_file)
    found = browser.run("""
      await ready;
      await show_example(3);
      $("drawing").open = true;
      state.scene = {...state.scene, marks: []};
      const thing = state.scene.things[0], before = painted({...state.scene, marks: []}), questions = {};
      const choose = (name, value) => { document.querySelector(`#tools [name=${name}]`).value = value; };
      for (const mark of Object.keys(MARKS.kinds)) {
        choose("mark", mark);
        choose("ink", "aqua");
        put(thing.cell);
        questions[mark] = [$("question").value, state.scene.marks.at(-1).kind, $("about-picture").textContent];
        put(thing.cell);  // and away again
        if (state.scene.marks.some(mark => mark.cell === thing.cell)) throw new Error(`the ${mark} stays`);
      }
      while ($("main").getAttribute("aria-busy") === "true") await frame();
      return [questions, state.prompt, state.question];
    """)
    assert {*found[0]} == {*KINDS} and browser.run("return document.title;") == "A whole ViP-LLaVA in one page"
    assert browser.log() == []
    for kind, (question, drawn, about) in found[0].items():
        words = Mark(kind, (10, 10, 30, 30), "aqua").words
        assert drawn == kind and question == f"What is {words}?" and words in about
    prompt = chat_prompt([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": found[2]}]}], "vip")
    assert found[1] == expand_images(vip.tokenizer.encode(prompt), vip.model.config.image_id, 64)


def marked_things(count):
    """Things with marks of training, the kinds in turn: [(layout, thing, mark)]."""
    for n in range(count):
        random = Random(f"marks on the page {n}")
        _, layout, ((thing, mark),) = marked_scene(random, 1, [*KINDS][n % len(KINDS)])
        yield layout, thing, mark


@pytest.fixture
def vip_tab(browser, vip_file):
    if browser.file != vip_file:
        browser.open(vip_file)
        browser.run("await ready;")
    return browser


def test_a_mark_is_drawn_where_pillow_draws_it_and_in_its_colour(vip_tab):
    overlaps = {kind: [] for kind in KINDS}
    for _, thing, mark in marked_things(80):
        image = Image.new("RGB", (112, 112), (236, 240, 244))
        theirs = np.asarray(draw_marks(image, [mark])).astype(int)
        ours = vip_tab.run(
            "const canvas = painted({ground: [236, 240, 244], things: [], marks: [given[0]]}); return [...pixels_of(canvas).data];",
            asdict(mark) | {"cell": thing.cell},
        )
        ours = np.array(ours).reshape(112, 112, 4)[..., :3]
        a, b = (abs(picture - np.asarray(image)).sum(-1) > 30 for picture in (ours, theirs))
        overlaps[mark.kind].append((a & b).sum() / (a | b).sum())
        assert abs(ours - theirs)[a & b].mean() < 3  # the colour and the alpha, rounding apart
    means = {kind: np.mean(values) for kind, values in overlaps.items()}
    assert all(mean > (0.65 if kind in ("triangle", "scribble", "arrow") else 0.88) for kind, mean in means.items()), means


def test_a_mark_is_as_in_training(vip_tab):
    found = [*marked_things(64)]
    things = [thing_of(placed) for layout, thing, _ in found for placed in layout[1] if placed.thing == thing]
    allowed = vip_tab.run(
        "return given[0].map((thing, n) => never_learnt(thing, [], given[1][n].kind, given[1][n].colour));",
        things, [asdict(mark) for *_, mark in found],
    )  # fmt: skip
    assert {*allowed} == {""}  # what training has shown is not refused
    kinds = [kind for kind in KINDS for _ in things]
    drawn = vip_tab.run(
        "return given[0].flatMap(kind => given[1].map(thing => [random_mark(thing, kind, 'aqua'), outline(thing)]));",
        [*KINDS], things,
    )  # fmt: skip
    for kind, (mark, corners) in zip(kinds, drawn, strict=True):
        form, points = BOLD[kind], np.array(mark["coordinates"]).reshape(-1, 2)
        corners = np.array(corners)
        size = np.ptp(corners, axis=0).max()
        assert form.alphas[0] <= mark["alpha"] <= form.alphas[1]
        assert kind == "mask" or max(3, form.widths[0] - 1) <= mark["width"] <= form.widths[1]
        assert len(points) in {"rectangle": [2], "ellipse": [2], "triangle": [3], "scribble": [33], "point": [1], "arrow": [1]}.get(
            kind, range(3, 37)
        )
        assert (abs(points - corners.mean(0)) <= 0.95 * size + 2).all(), kind  # on its thing, or around it
        Mark(kind, mark["coordinates"], "aqua", mark["alpha"], mark["width"] if kind != "mask" else None)  # it is one
    ours = {kind: [m["width"] for k, (m, _) in zip(kinds, drawn) if k == kind] for kind in KINDS}
    assert all(len({*widths}) >= 2 for kind, widths in ours.items() if kind != "mask")  # widths are drawn, not fixed


def test_what_was_never_learnt_cannot_be_drawn_and_the_reason_is_said(vip_tab):
    said = vip_tab.run("""
      $("drawing").open = true;
      $("empty").click();
      await frame();
      const pick = (name, value) => { document.querySelector(`#tools [name=${name}]`).value = value; };
      const tool = name => document.querySelector(`#tools [name=tool][value=${name}]`).click();
      const at = cell => { $("canvas").children[cell].click(); return [$("refused").textContent, state.scene.marks.length]; };
      tool("thing");
      for (const [colour, cell] of [["red", 0], ["blue", 2]]) { pick("colour", colour); pick("kind", "circle"); at(cell); }
      tool("mark");
      pick("mark", "rectangle");
      pick("ink", "red");
      const found = [at(0), at(4), at(2)];
      pick("mark", "point");
      found.push(at(2));  // another kind in the place of the first
      tool("thing");
      pick("colour", "green");
      at(6);
      tool("mark");
      found.push(at(6), $("canvas").children[6].getAttribute("aria-label"), $("spoken").textContent);
      return found;
    """)
    assert said[0][0].startswith("In training no mark has nearly the colour of its thing: red on red") and said[0][1] == 0
    assert said[1][0].startswith("A mark is put on a thing") and said[1][1] == 0
    assert said[2] == ["", 1] and said[3] == ["", 1]
    assert said[4][0].startswith("There is a red mark already") and said[4][1] == 1
    assert said[4][0] in said[5] and said[6] == said[4][0]


def test_marks_that_are_drawn_on_the_page_are_understood(vip_tab):
    """One mark in each picture, of every kind; at least three of four are right: in training, too, some are hard."""
    asked = """
      const random = () => { seed = seed * 16807 % 2147483647; return seed / 2147483647; };  // Lehmer's
      let seed = 7 + given[0].length;
      return [0, 1, 2, 3].map(n => {
        const {things, ground} = data.examples[(2 * n + 1) % data.examples.length], thing = things[n % things.length];
        const inks = Object.keys(MARKS.colours).filter(ink => !never_learnt(thing, [], given[0], ink));
        const mark = random_mark(thing, given[0], inks[Math.floor(random() * inks.length)], random);
        const pixels = processor.call(pixels_of(painted({ground, things, marks: [mark]}))), question = `What is ${words_of(mark)}?`;
        const ids = expand_images(tokenizer.encode(chat_prompt(question, data.style)), config.image_id, config.features_per_image);
        const words = [], cache = new KVCache(config.text, ids.length + 24);
        for (const {token} of model.generate(ids, model.encode_images(pixels), cache)) {
          words.push(token);
          if (has_end(words)) break;
        }
        return [text_of(words) === `A ${shown_thing(thing)}.`, question, text_of(words), shown_thing(thing)];
      });
    """
    found = [row for kind in KINDS for row in vip_tab.run(asked, kind)]
    assert sum(row[0] for row in found) >= 0.75 * len(found), found


def test_a_vip_llavas_page_speaks_of_marks_from_the_start(vip_tab, vip_file, file):
    lead, suggestions, questions, marks = vip_tab.run("""
      await show_example(1);
      const lead = [...document.querySelectorAll("header .lead")].map(p => p.textContent).join(" ");
      const said = [...$("suggestions").children].map(button => button.textContent);
      return [lead, said, data.examples.map(one => one.question), data.examples.map(one => one.marks)];
    """)
    assert {len(of_picture) for of_picture in marks} == {1, 2, 3, 4} and {first["kind"] for first, *_ in marks} == {*KINDS}
    words = [Mark(mark["kind"], mark["coordinates"], mark["colour"], mark["alpha"]) for mark, *_ in marks]
    assert all(mark.words in question for mark, question in zip(words, questions))
    assert "marks" in lead and sum(f"{marks[1][-1]['colour']} {marks[1][-1]['kind']}" in text for text in suggestions) >= 3
    word = vip_tab.run("await tour(0); const word = label(state.answer[state.word].token); tour(-1); return word;")
    assert word in ("triangle", "small", "purple")  # a word, and no piece of one


# What a student, a teacher and a blind reader need


def size_of_window(tab, width, height):
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    tab.command("POST", "/goog/cdp/execute", cmd="Emulation.setDeviceMetricsOverride", params=metrics)


@pytest.fixture
def window(tab, asked):
    """The page, and a function that gives its window a size."""
    yield lambda width, height: size_of_window(tab, width, height)
    tab.command("POST", "/goog/cdp/execute", cmd="Emulation.clearDeviceMetricsOverride", params={})


def keys(tab, *names):
    codes = {"tab": "\ue004", "escape": "\ue00c", "enter": "\ue007", "right": "\ue014", "down": "\ue015"}
    pressed = [{"type": kind, "value": codes[name]} for name in names for kind in ("keyDown", "keyUp")]
    tab.command("POST", "/actions", actions=[{"type": "key", "id": "keys", "actions": pressed}])


def screenshot(tab, element):
    """The pixels of an element, as it is seen."""
    left, top, width, height = tab.run(f"{element}.scrollIntoView({{block: 'center'}}); const b = {element}.getBoundingClientRect();"
                                       "return [b.left + scrollX, b.top + scrollY, b.width, b.height];")  # fmt: skip
    clip = {"x": left, "y": top, "width": width, "height": height, "scale": 1}
    taken = tab.command("POST", "/goog/cdp/execute", cmd="Page.captureScreenshot", params={"format": "png", "clip": clip})
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(taken["data"]))).convert("RGB")).astype(int)


BARS = """
  const rows = [...$("alternatives").children];
  const shares = rows.map(row => [...row.querySelectorAll(".bar")].map(bar => Number(bar.style.getPropertyValue("--p"))));
"""


def test_the_bars_show_what_a_word_is_drawn_with_and_draw_again_stands_beside_them(tab, window):
    window(1280, 800)
    plain, disabled, how = tab.run(BARS + "return [shares, [$('top-p').disabled, $('again').disabled], $('drawn-how').textContent];")
    assert all(len(row) == 1 for row in plain) and disabled == [True, True] and "top-p changes nothing" in how
    shown, expected, tall, runs = tab.run("""
      set_sliders(1.7, 0.6);
    """ + BARS + """
      const {logits} = state.answer[state.word], p = softmax(logits), drawn = distribution(logits, 1.7, 0.6);
      const [button, last] = [$("again"), rows.at(-1)].map(e => e.getBoundingClientRect()), before = run;
      $("again").click();
      while ($("main").getAttribute("aria-busy") === "true") await frame();
      return [shares, top_ids(p, 10).map(id => [p[id], drawn[id]]), last.bottom - button.top, run - before];
    """)  # fmt: skip
    assert np.allclose(shown, expected, atol=1e-6) and runs == 1
    assert any(drawn == 0 < p for p, drawn in expected) and expected[0][1] > expected[0][0] * 0.99
    assert 0 < tall < 500  # both are seen at once


def test_the_things_of_an_example_are_known_when_one_draws_on_it(tab, asked):
    first, words, said, away, ground, taken = tab.run("""
      $("drawing").open = true;
      await frame();
      const pick = values => Object.entries(values).forEach(([name, value]) => {
        document.querySelector(`#tools [name=${name}]`).value = value;
      });
      const about = () => $("about-picture").textContent;
      pick({size: "large", colour: "red", kind: "circle"});
      $("canvas").children[3].click();  // where the square was
      const first = about();
      $("question").value = "Describe the picture.";
      ask();
      while ($("main").getAttribute("aria-busy") === "true") await frame();
      const words = in_words(state.scene), said = text();
      pick({size: "large", colour: "green", kind: "ring"});
      $("canvas").children[7].click();  // the example's own ring: pressed, it goes
      const pixels = pixels_of(state.picture).data, at = 4 * (93 * 112 + 44), ground = data.examples[0].ground;
      return [first, words, said, about(), ground, [...pixels.slice(at, at + 3)]];
    """)
    assert first == "Your own scene: A small black triangle at the top right, a large red circle on the left, " + (
        "a large green ring at the bottom and a small yellow star at the bottom right."
    )
    assert said == words and first.endswith(words)
    assert "ring" not in away and taken == ground


@pytest.mark.parametrize("width, height", [(1280, 800), (390, 844)])
def test_the_switches_stay_where_they_are(tab, window, width, height):
    window(width, height)
    before, after, result, text_now = tab.run("""
      const button = $("llama-switches").querySelector('[data-part="llama 0 1"]'), top = () => button.getBoundingClientRect().top;
      button.scrollIntoView({block: "center"});
      const before = [top(), scrollY];
      button.click();
      while (/computing/.test($("changed").textContent)) await frame();
      await frame();
      const box = document.querySelector(".result").getBoundingClientRect();
      return [before, [top(), scrollY], [box.top, box.bottom], $("changed").textContent];
    """)
    assert before == after and 0 <= result[0] < result[1] < height / 2 and "Nothing." in text_now  # the result is in view


def test_a_broken_models_gibberish_is_short(tab, asked):
    changed, spoken, tokens = tab.run("""
      for (const part of ["llama 0", "llama 1", "llama 2"]) $("llama-switches").querySelector(`[data-part="${part}"]`).click();
      while (/computing/.test($("changed").textContent)) await frame();
      const quoted = /“(.*) …”/s.exec($("changed").textContent)?.[1] ?? "";
      return [$("changed").textContent, $("spoken").textContent, tokenizer.encode(quoted).length];
    """)
    assert spoken == changed and "practically never" in changed
    assert 0 < tokens <= 60  # 20 tokens; their text, encoded again, may be some more


def test_the_tour_goes_by_keyboard(tab, window):
    window(1280, 800)
    tab.run("$('drawing').open = false; scrollTo(0, 0); $('start-tour').focus();")
    keys(tab, "enter")
    tab.run("while ($('main').getAttribute('aria-busy') === 'true' || $('tour').hidden) await frame(); await frame();")
    inside = tab.run("return [document.activeElement.id, $('tour').closest('section').id, $('tour').getAttribute('aria-label')];")
    assert inside[:2] == ["tour", "ask"] and "1 of 7" in inside[2] and "Look for" in inside[2]
    count, reached = 0, False
    while count < 20 and not reached:
        keys(tab, "tab")
        count, reached = count + 1, tab.run("return $('alternatives').contains(document.activeElement);")
    assert count <= 10, "too far from the panel to the list that it speaks of"
    keys(tab, "down")
    assert tab.run("return [...$('alternatives').querySelectorAll('button')].indexOf(document.activeElement);") == 1
    keys(tab, "escape")  # outside of the panel
    assert tab.run("return [$('tour').hidden, step];") == [True, -1]


def test_done_leaves_one_where_one_is(tab, window):
    window(1280, 800)
    before, after, focused = tab.run("""
      await tour(6);
      for (let before = -1; before !== scrollY;) { before = scrollY; await new Promise(done => setTimeout(done, 300)); }
      const top = () => $("ablate").getBoundingClientRect().top, before = top();
      $("next").click();
      await new Promise(done => setTimeout(done, 500));
      return [before, top(), $("ablate").contains(document.activeElement)];
    """)
    assert before == pytest.approx(after, abs=1) and abs(after) < 300 and focused


def test_groups_of_buttons_are_one_tab_stop_each(tab, asked):
    stops = tab.run("""
      const all = [...document.querySelectorAll("a[href], button, input, select, summary, [tabindex='0']")];
      return all.filter(e => e.tabIndex >= 0 && !e.disabled && e.checkVisibility()).map(e => e.id || e.textContent || e.outerHTML);
    """)
    assert len(stops) < 40, stops
    tab.run("$('llama-switches').firstChild.focus();")
    keys(tab, "right", "right", "enter")
    tab.run("while (/computing/.test($('changed').textContent)) await frame();")
    assert tab.run("return [...off.heads];") == ["llama 0 1"]


def test_in_forced_colours_bars_and_what_is_chosen_can_be_told_apart(tab, asked):
    features = [{"name": "forced-colors", "value": "active"}]
    tab.command("POST", "/goog/cdp/execute", cmd="Emulation.setEmulatedMedia", params={"features": features})
    try:
        full = screenshot(tab, "$('alternatives').querySelectorAll('.bar')[0]")
        empty = screenshot(tab, "$('alternatives').querySelectorAll('.bar')[9]")
        assert abs(full[5, :-4].mean(0) - empty[5, 8:].mean(0)).sum() > 200  # filled and not
        chosen, other = (screenshot(tab, f"$('alternatives').querySelectorAll('button')[{n}]")[3, 3:-3].mean(0) for n in (0, 1))
        assert abs(chosen - other).sum() > 100
        tab.run("grey[9].click();")
        on, off = (screenshot(tab, f"grey[{n}]")[4:-4, 4:-4].mean((0, 1)) for n in (9, 10))
        assert abs(on - off).sum() > 100
    finally:
        tab.command("POST", "/goog/cdp/execute", cmd="Emulation.setEmulatedMedia", params={"features": []})


def test_a_picture_is_named_by_what_it_shows(tab, asked):
    words = describe(example()[0])
    canvas, mini, grey, thumbs, own = tab.run("""
      const name = id => $(id).getAttribute("aria-label"), named = ["canvas", "mini", "grey"].map(name);
      const thumbs = [...$("examples").children].map(button => button.getAttribute("aria-label"));
      for (const [name, value] of [["size", "large"], ["colour", "red"], ["kind", "star"]]) {
        document.querySelector(`#tools [name=${name}]`).value = value;
      }
      put(0);
      return [...named, thumbs, name("canvas")];
    """)
    assert words in canvas and words in mini and words in grey and thumbs[0] == f"picture 1: {words}"
    assert len({*thumbs}) == len(thumbs) and all("at the" in name or "in the" in name or "on the" in name for name in thumbs)
    assert own.startswith("The picture: A large red star at the top left, a small black triangle at the top right")


def test_what_the_page_calls_a_scene_is_what_the_world_calls_it(tab):
    scenes = [make_scene(Random(f"described {n}")) for n in range(50)]
    said = tab.run("return given[0].map(things => describe(things));", [[asdict(thing) for thing in scene] for scene in scenes])
    assert said == [describe(scene) for scene in scenes]


def test_the_lens_has_its_words_as_text(tab, asked):
    rows = tab.run("return [...$('lens').children].map(row => [row.role, ...[...row.children].map(e => [e.role, e.textContent])]);")
    assert len(rows) == 8 and all(row[0] == "row" and len(row) == 9 for row in rows) and tab.run("return $('lens').role;") == "table"
    assert all(role == "cell" and text for row in rows for role, text in row[1:])


def test_one_live_region_speaks(tab, asked):
    live = tab.run("return [...document.querySelectorAll('[aria-live], [role=status], [role=alert], [role=log]')].map(e => e.id);")
    assert live == ["spoken"]
    ask(tab, "Where is the ring?")
    assert tab.run("return $('spoken').textContent;").startswith("“At the bottom.”")
    tab.run("$('question').value = 'What is <image>?'; $('form').requestSubmit(); await frame();")
    assert tab.run("return $('spoken').textContent;").startswith("the question contains")


@pytest.mark.parametrize("style", ["llava", "vip"])
def test_the_tours_patch_lies_on_what_the_question_is_about(style):
    first, tour = pictures(style)[0], TOURS[style]
    cells = [mark["cell"] for mark in first["marks"]] or [3]  # 3 is "on the left", which the question of the plain tour asks for
    (thing,) = [thing for thing in first["things"] if thing["cell"] in cells]
    row, column = divmod(tour["patch"], 8)
    assert abs(14 * column + 7 - thing["x"]) < 14 and abs(14 * row + 7 - thing["y"]) < 14
    assert style == "llava" or first["question"] == tour["question"]


# What would be confusing


def test_signs_and_pieces_are_explained_beside_them(tab, asked):
    signs, said, pieces = tab.run("""
      state.answer = tokenizer.encode("Green.").slice(1).map((token, n) => ({...state.answer[n], token}));  // with another's logits
      show_notes();
      const said = state.answer.map((_, n) => speaking_of(n)), ids = ["reen", "▁red"].map(piece => tokenizer.ids.get(piece));
      return [$("signs").textContent, said, pieces_among(ids)];
    """)
    assert "A double line marks words" in signs and "less than 90 % sure" in signs and "␣ is a space" in signs
    assert said == ["“␣”", "“G”, a piece of “Green”", "“reen”, a piece of “Green”", "“.”"]
    assert pieces == "Pieces of words: “reen” of “green”."
    words = tab.run("return [0, 3, 20, -0.05, -3].map(now_likely);")
    assert words == [
        "is about as likely as before", "is 20 times less likely than before", "would practically never be given now",
        "is about as likely as before", "is 20 times more likely than before",
    ]  # fmt: skip


def test_outside_its_world_the_page_says_not_to_trust_the_answer(tab, asked):
    noted = "return $('outside').textContent;"
    ask(tab, "Where is the ring?")
    assert tab.run(noted) == ""
    ask(tab, "where is the RING?")
    assert "“where”, “RING”" in tab.run(noted) and "do not trust it" in tab.run(noted)
    photo = Image.fromarray(np.random.default_rng(1).integers(0, 256, (60, 90, 3), dtype=np.uint8))
    noted, about, named = tab.run(
        """
          const bytes = Uint8Array.from(atob(given[0].split(",")[1]), c => c.charCodeAt(0));
          $("question").value = "What do you see?";
          await open_file(new File([bytes], "photo.png", {type: "image/png"}));
          while ($("main").getAttribute("aria-busy") === "true") await frame();
          const noted = $("outside").textContent;
          put(4);
          return [noted, $("about-picture").textContent, $("canvas").getAttribute("aria-label")];
        """,
        data_url(photo),
    )  # fmt: skip
    assert noted.startswith("This is no drawn scene")
    assert about.startswith("Your own scene: photo.png, and on top of it: A ") and "photo.png" in named


# On a laptop, a telephone and a projector


def test_on_a_laptop_the_tour_covers_nothing_that_it_speaks_of(tab, window):
    window(1280, 800)
    for step, shown in ((0, "$('alternatives').lastElementChild"), (6, "$('compared')"), (4, "$('attention')")):
        bottom, panel, top = tab.run(f"""
          await tour({step});
          await new Promise(done => setTimeout(done, 1000));
          const box = {shown}.getBoundingClientRect();
          return [box.bottom, $("tour").getBoundingClientRect().top, box.top];
        """)
        assert 0 <= top < bottom <= panel + 1, (step, top, bottom, panel)


def test_on_a_telephone_the_picture_stays_with_the_answer(tab, window):
    window(390, 844)
    mini, bars, panel = tab.run("""
      await tour(0);
      await new Promise(done => setTimeout(done, 1000));
      const panel = $("tour").getBoundingClientRect().top;
      return [$("mini").getBoundingClientRect().bottom, $("alternatives").children[4].getBoundingClientRect().bottom, panel];
    """)
    assert 0 < mini < bars < panel
    chosen, titles, clipped = tab.run("""
      await tour(5);
      await new Promise(done => setTimeout(done, 1000));
      const column = $("stream").querySelector("th.chosen").getBoundingClientRect();
      const box = $("stream").parentElement.getBoundingClientRect();
      return [column.left, $("stream").querySelector("td").getBoundingClientRect().right, column.right > box.right];
    """)
    assert chosen >= titles - 1 and not clipped
    size_of_window(tab, 390, 844)
    tall = tab.run("return document.querySelector('.result').getBoundingClientRect().height;")
    assert tall < 240


def test_on_a_projector_everything_is_larger(tab, window):
    sizes = {}
    for width, height in ((1280, 800), (1920, 1080)):
        window(width, height)
        sizes[width] = tab.run("""
          await frame();
          const note = parseFloat(getComputedStyle($("about-picture")).fontSize);
          return [document.querySelector("main").offsetWidth, note, $("heads").querySelector("canvas").offsetWidth];
        """)
    assert all(large > 1.25 * small for large, small in zip(sizes[1920], sizes[1280])), sizes


def test_tools_and_picture_are_seen_together(browser, vip_tab):
    size_of_window(browser, 1280, 800)
    try:
        height = browser.run("""
          $("drawing").open = true;
          await frame();
          return $("tools").getBoundingClientRect().bottom - $("canvas").getBoundingClientRect().top;
        """)
        assert height < 760
    finally:
        browser.command("POST", "/goog/cdp/execute", cmd="Emulation.clearDeviceMetricsOverride", params={})


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
