"""The page's model is PyTorch's, stage by stage, in a real browser; and the page does what it says."""

import base64
import json
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

from clip import ImageProcessor
from lessons.page import data_url, page, pictures, quote
from llava import Llava
from tests.browser import Browser
from tests.compare import FIXTURES, relative
from tiny.world import held_out_questions
from tokenizer import Tokenizer, expand_images

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
    const list = {pixels: [pixels], clip: vision.states, "clip's attention": vision.maps.flat(), features: [image_features],
      llama: hidden_states, attention: attentions.flat(), logits: [logits]};
    return Object.fromEntries(Object.entries(list).map(([name, matrices]) => [name, matrices.map(encoded)]));
  };
"""


@pytest.fixture(scope="module")
def browser():
    browser = Browser()
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def tab(browser, bundled, tmp_path_factory):
    """The browser with the bundled model's page in it."""
    file = tmp_path_factory.mktemp("page") / "page.html"
    file.write_text(page(bundled.model, bundled.tokenizer, bundled.processor, pictures("llava")), encoding="utf-8")
    browser.open(file)
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


def test_every_stage_is_pytorchs_and_so_is_every_word(tab, bundled):
    model, tokenizer = bundled.model, bundled.tokenizer
    worst = {}
    for kind, picture, question, _ in held_out_questions(50, "page, in the browser"):
        bundled.reset()
        ids = expand_images(tokenizer.encode(bundled.prompt(question, [picture])), model.config.image_id, 64)
        result = tab.run(
            STAGES + """
              const [url, question] = given, pixels = processor.call(pixels_of(await load_picture(url)));
              const ids = expand_images(tokenizer.encode(chat_prompt(question, data.style)), data.config.image_id, 64);
              const cache = new KVCache(data.config.text, 256), features = model.encode_images(pixels);
              const words = Array.from(model.generate(ids, features, cache), ({token}) => token);
              return {ids, stages: stages(ids, pixels), words, text: tokenizer.decode(words)};
            """,
            data_url(picture), question,
        )  # fmt: skip
        assert result["ids"] == ids, question
        pixels = bundled.processor([picture])
        found = errors(decoded(result["stages"]), reference(model, ids, pixels))
        worst = {name: max(found[name], worst.get(name, 0)) for name in found}
        words = [int(token) for token in model.generate(torch.tensor([ids]), pixels)]
        assert result["words"] == words and result["text"] == tokenizer.decode(words), (kind, question)
    assert worst["pixels"] == 0 and max(worst.values()) < TOLERANCE, worst
    print(worst)


@pytest.mark.parametrize("family", ["vip", "bakllava"])
def test_five_layers_a_layer_norm_shared_heads_and_a_window(browser, family, tmp_path):
    """On the tiny random models that the parity with transformers is tested on."""
    model, inputs = Llava.from_pretrained(FIXTURES / family, dtype=torch.float16).float(), load_file(FIXTURES / family / "reference.safetensors")
    file = tmp_path / "page.html"
    tokenizer = Tokenizer.from_pretrained(FIXTURES / "tokenizer")
    side = model.config.vision.image_size
    processor = ImageProcessor(side, side, (0.5,) * 3, (0.25,) * 3)
    file.write_text(page(model, tokenizer, processor, pictures(model.config.style)), encoding="utf-8")
    browser.open(file)
    pixels, image_id, P = inputs["pixel_values"][:1], model.config.image_id, model.config.features_per_image
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
    texts = ["", " ", "  two  spaces ", "Where is the ring?</s>USER: Which?"]
    texts += ["".join(random.choices(letters, k=random.randint(1, 40))) for _ in range(500)]
    texts += [question for *_, question, _ in held_out_questions(50, "page, in the browser")]
    lists = [random.choices(range(512), k=random.randint(1, 30)) for _ in range(500)]
    lists += [list(text.encode()) for text in ("naïve 漢字", "🙂🙂")]
    ids, said = tab.run("const [texts, lists] = given; return [texts.map(t => tokenizer.encode(t)), lists.map(l => tokenizer.decode(l))];", texts, lists)
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
