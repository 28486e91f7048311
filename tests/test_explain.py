"""The page of lessons.explain in a real browser: by keyboard, by pointing, on a telephone."""

import re

import pytest
import torch

import explanation
from explanation import answer_ids, greyed, occlusion_maps, page
from images import open_image
from tests.browser import Browser

KEYS = {"left": "\ue012", "up": "\ue013", "right": "\ue014", "down": "\ue015", "tab": "\ue004"}


@pytest.fixture(scope="module")
def files(bundled, tmp_path_factory):
    """The page of a question with a picture, and of one without."""
    folder, picture = tmp_path_factory.mktemp("explain"), open_image("tiny/example.png")
    for name, question, images in (("picture", "Where is the ring?", [picture]), ("text", "Is there a ring?", [])):
        bundled.reset()
        (folder / f"{name}.html").write_text(page(bundled, question, images, cells=4, max_new_tokens=20), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def browser():
    browser = Browser()
    yield browser
    browser.close()


@pytest.fixture
def tab(browser, files):
    browser.open(files / "picture.html")
    browser.run("await picture.decode(); show();")
    return browser


def press(tab, *names):
    pressed = [{"type": kind, "value": KEYS[name]} for name in names for kind in ("keyDown", "keyUp")]
    tab.command("POST", "/actions", actions=[{"type": "key", "id": "keys", "actions": pressed}])


CHOSEN = "return [...byId('answer').children].filter(b => b.getAttribute('aria-pressed') === 'true').map(b => b.textContent);"
SAID = "return byId('said').textContent;"


def test_it_opens_with_the_word_that_the_picture_mattered_to_most(tab):
    words, mattered = tab.run("return [data.answer, seen.occlusion.map(falls => Math.max(...falls))];")
    assert "".join(words) == "At the bottom.(end)" or "".join(words) == " At the bottom.(end)"
    best = max((fall, word) for word, fall in zip(words, mattered) if word.strip().isalpha())[1]
    assert tab.run(CHOSEN) == [best.strip()] and max(mattered) > 0.1
    assert re.search(r"\d+ % of the attention is on the picture, most of it on row \d, column \d \(\d+ %\)", tab.run(SAID))


def test_the_address_may_name_a_word(browser, files):
    browser.visit("about:blank")  # or only the anchor would change, and the page not be loaded
    browser.visit((files / "picture.html").as_uri() + "#1")
    browser.run("await picture.decode(); show();")
    assert browser.run(CHOSEN) == [browser.run("return data.answer[1].trim();")]
    browser.visit("about:blank")


def test_arrow_keys_choose_a_word(tab):
    words = tab.run("return [...byId('answer').children].map(b => b.textContent);")
    tab.run("byId('answer').children[0].focus();")
    press(tab, "right")
    assert tab.run("return chosen;") == 1 and tab.run(CHOSEN) == [words[1]] and tab.run(SAID).startswith(f"“{words[1]}”")
    press(tab, "left", "left")  # there is none before the first
    assert tab.run("return chosen;") == 0 and tab.run("return document.activeElement === byId('answer').children[0];")


def test_arrow_keys_on_the_picture_choose_a_patch_for_the_logit_lens(tab):
    drawn = "return canvas.toDataURL();"
    before = tab.run(drawn)
    tab.run("byId('picture').focus();")
    press(tab, "down", "right", "right", "up", "up")  # up twice: the first row is the edge
    words, shares = tab.run("return [seen.lens[layer()][patch], seen.lens_probability[layer()][patch]];")
    assert tab.run("return [kind(), patch];") == ["lens", 2]
    assert tab.run(SAID).startswith("After block 4 the patch at row 1, column 3 would predict “" + words) and 0 < shares <= 1
    assert tab.run("return [byId('head').disabled, byId('layer').disabled];") == [True, False] and tab.run(drawn) != before


def test_everything_is_reached_by_the_tab_key(tab):
    tab.run("byId('picture').focus();")
    reached = []
    for _ in range(6):
        reached.append(tab.run("const e = document.activeElement; return e.id || e.value || e.parentElement.id;"))
        press(tab, "tab")
    assert reached == ["picture", "attention", "layer", "head", "sink", "answer"]


def test_a_head_is_chosen_by_pointing_or_by_its_number(tab):
    tab.run("""
      const box = byId("heads").getBoundingClientRect();
      const [clientX, clientY] = [box.left + box.width * 3.5 / 6, box.top + box.height * 1.5 / 4];
      byId("heads").dispatchEvent(new MouseEvent("click", {clientX, clientY}));
    """)
    assert tab.run("return [layer(), head(), kind()];") == [1, 3, "attention"]
    share, first = tab.run("return [seen.on_picture[1][3][chosen], seen.on_first[1][3][chosen]];")
    assert f"of head 4 in layer 2 {round(100 * share)} % of the attention is on the picture" in tab.run(SAID)
    tab.run("byId('head').value = 5; byId('head').dispatchEvent(new Event('change'));")
    assert "of head 6 in layer 2" in tab.run(SAID)


def test_without_the_first_token_the_rest_is_scaled_to_one(tab):
    layer, head = tab.run("""
      const firsts = seen.on_first.flatMap((heads, l) => heads.map((tokens, h) => [tokens[chosen], l, h]));
      const [[, l, h]] = firsts.sort((a, b) => b[0] - a[0]);
      byId("layer").value = l;
      return [l, h];
    """)
    with_it, without = (torch.tensor(tab.run(f"byId('sink').checked = {on}; return attention();")) for on in ("false", "true"))
    assert without[0] == 0 < 0.01 < with_it[0] and without.sum() == pytest.approx(1, abs=0.1)  # in steps of 1/255 of the largest
    assert torch.allclose(without[1:], with_it[1:] / (1 - with_it[0]), atol=1e-6)
    said = tab.run("byId('head').value = given[0]; show(); return byId('said').textContent;", head)
    share, first = tab.run("return [seen.on_picture, seen.on_first].map(of => of[given[0]][given[1]][chosen]);", layer, head)
    assert f"{round(100 * share / (1 - first))} % of the attention is on the picture, the first token left out" in said


def test_occlusion_in_batches_is_occlusion_one_by_one(bundled, monkeypatch):
    picture = open_image("tiny/example.png")
    bundled.reset()
    prompt, answer = answer_ids(bundled, "Where is the ring?", [picture], max_new_tokens=20)
    pixels = bundled.processor([picture, picture])  # what is not asked about is not greyed
    prompt = [token for token in prompt for _ in range(2 if token == bundled.model.config.image_id else 1)]
    embed, rows = bundled.model.embed, []
    monkeypatch.setattr(bundled.model, "embed", lambda ids, *more: rows.append(len(ids)) or embed(ids, *more))
    together = occlusion_maps(bundled, prompt, answer, pixels, 4)
    assert rows == [1, 16]
    monkeypatch.setattr(explanation, "TOKENS", 1)
    assert torch.allclose(together, occlusion_maps(bundled, prompt, answer, pixels, 4), atol=1e-4) and together.max() > 0.1
    assert rows == [1, 16] + [1] * 17
    seen = greyed(pixels, 0, 3, 4)
    assert (seen[0, :, :56, 56:] == 0).all() and torch.equal(seen[1], pixels[1])
    assert torch.equal(seen[0, :, 56:], pixels[0, :, 56:]) and torch.equal(seen[0, :, :, :56], pixels[0, :, :, :56])


def test_the_small_numbers_are_explained_where_they_stand(tab):
    hidden = "return byId('numbers').hidden;"
    assert not tab.run(hidden) and "percent" in tab.run("return byId('numbers').textContent;")
    assert tab.run("return document.querySelectorAll('[data-share]').length;") > 0
    said = tab.run("""
      const said = [];
      for (chosen = 0; chosen < answers; chosen++) {
        for (const option of byId("layer").options) { byId("layer").value = option.value; show(); said.push(byId("said").textContent); }
      }
      chosen = 0;
      return said.map(text => text.split("Of the words")[1]).join();
    """)
    assert re.search(r"the space at position \d+ \d+ %", said) and "␣" not in said  # a space is named, and which one
    tab.run("document.querySelector('[value=occlusion]').click();")
    assert tab.run(hidden)


def test_occlusion_says_what_the_probability_falls_to(tab):
    tab.run("document.querySelector('[value=occlusion]').click();")
    assert re.search(r"has a probability of [\d.]+ %. With a cell \(of 4 × 4\) .* it falls to [\d.e-]+ % at row", tab.run(SAID))


def test_without_a_picture_there_are_words_alone(browser, files):
    browser.open(files / "text.html")
    assert browser.run("return document.querySelector('figure').offsetParent === null;")
    assert re.match(r"“.+”: Of the words: “", browser.run(SAID)) and len(browser.run(CHOSEN)) == 1
    assert browser.run("return [...document.querySelectorAll('input, select')].filter(e => !e.disabled).map(e => e.id || e.value);") == [
        "attention",
        "layer",
        "sink",
    ]


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("kind", ["attention", "occlusion", "lens"])
def test_it_fits_the_screen(tab, width, kind):
    metrics = {"width": width, "height": 740, "deviceScaleFactor": 1, "mobile": width < 500}
    tab.command("POST", "/goog/cdp/execute", cmd="Emulation.setDeviceMetricsOverride", params=metrics)
    try:
        tab.run(f"document.querySelector('[value={kind}]').click();")
        wide = (
            "return [...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > given[0] + 0.5).map(e => e.id);"
        )
        assert tab.run(wide, width) == [] and tab.run("return document.documentElement.scrollWidth;") <= width
    finally:
        tab.command("POST", "/goog/cdp/execute", cmd="Emulation.clearDeviceMetricsOverride", params={})


def test_it_asks_for_nothing_and_complains_of_nothing(tab):
    assert tab.run("return performance.getEntriesByType('resource').map(e => e.name).filter(name => !name.startsWith('data:'));") == []
    assert [line for line in tab.log() if "favicon" not in line] == []
