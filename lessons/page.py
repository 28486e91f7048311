"""A page that runs a whole model in the browser: ask, look at every stage from pixels to words, switch parts off.

    python -m lessons.page                                   # page.html, with the bundled tiny/llava in it
    python -m lessons.page --model FOLDER -o marked.html     # with another small checkpoint

The page is one file that asks the network for nothing: weights, vocabulary and pictures are in it. Its model is
lessons/page/model.js, which says in plain JavaScript what the Python files say, function by function; scene.js does so for the
drawn world and its marks.
"""

import argparse
import base64
import io
import json
import re
from dataclasses import asdict
from pathlib import Path
from random import Random

import torch
from safetensors.torch import save

import marks
from images import ImageProcessor
from llava import Llava
from sample import fail
from tiny import marked, world
from tokenizer import SPECIAL_LITERALS, STYLES, Tokenizer
from weights.checkpoint import checkpoint_folder
from weights.config import LlavaConfig

HERE = Path(__file__).parent
MOST = 12_000_000  # bytes of the page: more is no page that one sends to a friend
PICTURES = 9
SUGGESTIONS = (
    "What do you see?", "How many things are there?", "What colour is the square?", "Where is the ring?", "Is the star small or large?",
    "What is at the top?", "Is there a red circle?", "Is the ring left or right of the square?",
)  # fmt: skip
ABOUT_A_MARK = (  # {words} says which: "within the red rectangle"; {name} is the mark itself: "red rectangle"
    "What is {words}?", "What colour is the thing {words}?", "Is the thing {words} small or large?", "Where is the thing {words}?",
    "Where is the {name}?", "Describe the picture and its marks.",
)  # fmt: skip

# What the tour is set up with: a question about the first picture, and the patch, the word and the head that are looked at
# (counted from 0), and the part of the language model that is switched off in the end ("llama", block, head).
TOURS = {
    "llava": {"question": "What is on the left?", "patch": 33, "word": 2, "head": [3, 0], "off": "llama 0 1"},
    "vip": {"question": "Which thing is within the aqua ellipse?", "patch": 49, "word": 3, "head": [0, 0], "off": "llama 0 0"},
}


def encoded(data):
    return base64.b64encode(data).decode()


def weights(model):
    """The model's tensors as one safetensors file in float16, under our names."""
    return save({name: tensor.to(torch.float16).clone() for name, tensor in model.state_dict().items()})


def vocabulary(tokenizer):
    """The SentencePiece model as a table: [text, score, kind] of each piece."""
    model = tokenizer.model
    return {
        "pieces": [(model.id_to_piece(i), model.get_score(i), kind_of_piece(model, i)) for i in range(len(model))],
        "specials": tokenizer.specials,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "image_id": tokenizer.image_id,
    }


def kind_of_piece(model, i):
    if model.is_byte(i):
        return "byte"
    return "special" if model.is_control(i) or model.is_unknown(i) else "normal"


def pictures(style):
    """Held-out pictures, each with a question, its answer and what it shows; for ViP-LLaVA marked ones."""
    return marked_pictures() if style == "vip" else plain_pictures()


def plain_pictures():
    """The bundled picture, and one picture for each of eight kinds of question."""
    random = Random("example 99")  # as in world.example
    scene = world.make_scene(random, held_out=True)
    found = [example(world.place(scene, random), [], "Describe the picture.", world.describe(scene))]
    kinds, n = [*world.QUESTIONS.values()][1:PICTURES], 0
    while kinds:
        random = Random(f"page held out {n}")
        scene = world.make_scene(random, held_out=True)
        layout = world.place(scene, random)
        if turn := kinds[-1](scene, random):
            found.append(example(layout, [], *turn))
            kinds.pop()
        n += 1
    return found


def marked_pictures():
    """Marked pictures, of which each asks about a mark of another kind, an ellipse first. The first has one mark, the others up to four."""
    kinds = ["ellipse", *(kind for kind in marks.KINDS if kind != "ellipse")]
    found, questions = [], [*marked.ABOUT_ONE.values()]
    for n, kind in enumerate(kinds):
        random = Random(f"page one mark {n}")
        count = 1 if n == 0 else 2 + n % 3
        scene, layout, pairs = marked.marked_scene(random, count, kind, held_out=True)
        ask = questions[n % len(questions)]
        found.append(example(layout, pairs, *ask(scene, pairs[:1], random)))
    return found


def example(layout, pairs, question, answer):
    """What the page holds of a picture. layout: from world.place; pairs: [(thing, its mark), …]."""
    ground, placed = layout
    return {
        "picture": data_url(marked.picture(layout, pairs)),
        "question": question,
        "answer": answer,
        "ground": ground,
        "things": [thing_of(one) for one in placed],
        "marks": [asdict(mark) | {"cell": thing.cell} for thing, mark in pairs],
    }


def thing_of(placed):
    """A thing and where it lies, in one table as scene.js has it."""
    where = {"radius": placed.radius, "x": placed.x, "y": placed.y, "shade": placed.shade, "tilt": placed.tilt}
    return asdict(placed.thing) | where


def known_words(style):
    """The words that the questions in training are made of, as they are written there."""
    words = set()
    for n in range(400):
        random = Random(f"page words {n}")
        if style == "vip":
            scene, _, pairs = marked.marked_scene(random, 1 + n % 4)
            turns = marked.conversation(scene, pairs, random)
        else:
            turns = world.conversation(world.make_scene(random), random)
        turns.append(world.ask_description(world.make_scene(random), random))  # stage 1 asks for this in both
        words.update(word for question, _ in turns for word in re.findall(r"\w+", question))
    return sorted(words)


def small_world(style):
    """What can be drawn on a picture, and which words can be asked with."""
    return {
        "side": world.SIDE,
        "colours": world.COLOURS,
        "kinds": [*world.KINDS],
        "sizes": world.SIZES,
        "places": world.PLACES,
        "words": known_words(style),
        "marks": marks_of_training() if style == "vip" else None,
    }


def marks_of_training():
    """The marks as tiny.marked.put_marks puts them: widths are for a picture of 336 pixels."""
    kinds = {}
    for kind, form in marked.BOLD.items():
        around = kind in marked.AROUND  # is drawn around its thing, with some room
        kinds[kind] = {"relation": form.relation, "width": form.width, "widths": form.widths, "alphas": form.alphas, "around": around}
    return {"kinds": kinds, "colours": marks.COLOURS, "apart": 120, "most": 4}  # apart: of a mark's colour from its thing's


def data_url(image):
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{encoded(file.getvalue())}"


def quote(template):
    """Each {{file: text}} in the template becomes the line of that Python file which holds the text, with its number.

    Raises ValueError if it is not in the file, so that the page never quotes what is no longer so.
    """
    before, *parts = template.split("{{")
    for part in parts:
        (place, rest), root = part.split("}}", 1), HERE.parent
        file, text = place.split(": ", 1)
        lines = (root / file).read_text(encoding="utf-8").splitlines()
        number = next((n for n, line in enumerate(lines, 1) if text in line), None)
        if number is None:
            raise ValueError(f"{file} has no line with {text!r}, which the page wants to quote")
        line = lines[number - 1].strip().replace("&", "&amp;").replace("<", "&lt;")
        before += f'<span class="place">{file}:{number}</span> {line}' + rest
    return before


def page(model, tokenizer, processor, examples):
    """The HTML of the page, a str. Raises ValueError if it would be larger than 12 MB."""
    config = model.config
    data = {
        "config": asdict(config) | {"features_per_image": config.features_per_image},
        "style": asdict(STYLES[config.style]) | {"specials": SPECIAL_LITERALS},
        "tokenizer": vocabulary(tokenizer),
        "processor": asdict(processor),
        "examples": examples,
        "suggestions": ABOUT_A_MARK if config.style == "vip" else SUGGESTIONS,
        "tour": TOURS["vip" if config.style == "vip" else "llava"],
        "world": small_world(config.style),
    }
    text = quote((HERE / "page" / "page.html").read_text(encoding="utf-8"))
    for name in ("model.js", "scene.js", "page.js"):
        script = (HERE / "page" / name).read_text(encoding="utf-8")
        text = text.replace(f'<script src="{name}"></script>', f"<script>\n{script}</script>")
    text = text.replace("DATA", json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"))
    text = text.replace("WEIGHTS", encoded(weights(model)))
    if len(text.encode()) > MOST:
        raise ValueError(f"the page would have {len(text.encode()):,} bytes; expected at most {MOST:,}: it is for small models")
    return text


def main():
    parser = argparse.ArgumentParser(
        prog="python -m lessons.page", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = fail
    parser.add_argument("--model", default=HERE.parent / "tiny" / "llava", help="checkpoint folder [the bundled tiny/llava]")
    parser.add_argument("-o", "--out", type=Path, default=Path("page.html"), help="the page [page.html]")
    args = parser.parse_args()
    try:
        folder = checkpoint_folder(args.model)
        config = LlavaConfig.from_pretrained(folder)
        if config.quantized:
            raise ValueError(f"{folder} is quantised, to {config.quantized}; the page holds 16-bit weights: give what it was made from")
        with torch.device("meta"):
            parameters = sum(p.numel() for p in Llava(config).parameters())
        if 2 * parameters * 4 / 3 > MOST:  # before anything is read
            raise ValueError(f"{folder} has {parameters:,} parameters; a page of at most {MOST:,} bytes holds {MOST * 3 // 8:,}")
        model, tokenizer, processor = (cls.from_pretrained(folder) for cls in (Llava, Tokenizer, ImageProcessor))
        args.out.write_text(page(model, tokenizer, processor, pictures(model.config.style)), encoding="utf-8")
    except (ValueError, OSError) as error:
        fail(error)
    print(args.out)


if __name__ == "__main__":
    main()
