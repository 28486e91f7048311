"""A page that runs a whole model in the browser: ask, look at every stage from pixels to words, switch parts off.

    python -m lessons.page                                   # page.html, with the bundled tiny/llava in it
    python -m lessons.page --model FOLDER -o marked.html     # with another small checkpoint

The page is one file that asks the network for nothing: weights, vocabulary and pictures are in it. Its model is
lessons/page/model.js, which says in plain JavaScript what the Python files say, function by function.
"""

import argparse
import base64
import io
import json
from dataclasses import asdict
from pathlib import Path

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
    ("What do you see?", "How many things are there?", "What colour is the square?", "Where is the ring?", "Is the star small or large?",
     "What is at the top?", "Is there a red circle?", "Is the ring left or right of the square?"),
    ("Describe the picture and its marks.", "What do you see?"),
)  # fmt: skip


# What the tour is set up with: a question about the first picture, and the patch, the word and the head that are looked at
# (counted from 0), and the part of the language model that is switched off in the end ("llama", block, head).
TOURS = {
    "llava": {"question": "What is on the left?", "patch": 52, "word": 2, "head": [3, 0], "off": "llama 0 1"},
    "vip": {"question": "Which thing is within the aqua ellipse?", "patch": 12, "word": 2, "head": [3, 1], "off": "llama 1 3"},
}


def encoded(data):
    return base64.b64encode(data).decode()


def weights(model):
    """The model's tensors as one safetensors file in float16, under our names."""
    return save({name: tensor.to(torch.float16).clone() for name, tensor in model.state_dict().items()})


def vocabulary(tokenizer):
    """The SentencePiece model as a table: [text, score, kind] of each piece."""
    model = tokenizer.model
    kind = lambda i: "byte" if model.is_byte(i) else "special" if model.is_control(i) or model.is_unknown(i) else "normal"
    return {
        "pieces": [(model.id_to_piece(i), model.get_score(i), kind(i)) for i in range(len(model))],
        "specials": tokenizer.specials,
        **{name: getattr(tokenizer, name) for name in ("bos_id", "eos_id", "image_id")},
    }


def pictures(style):
    """Held-out pictures with a question and its answer each, the bundled picture first; for ViP-LLaVA marked ones."""
    if style == "vip":
        found = [(image, question, answer) for *_, image, _, question, answer in marked.held_out_questions(PICTURES, "page")]
    else:
        scene, image = world.example()
        found = [(image, "Describe the picture.", world.describe(scene))]
        found += [rest for _, *rest in world.held_out_questions(PICTURES - 1, "page")]
    return [{"picture": data_url(image), "question": question, "answer": answer} for image, question, answer in found]


def marks_of(style):
    """For ViP-LLaVA, the marks that can be drawn on a picture: the words for each kind, its width in pixels, the colours."""
    if style != "vip":
        return None
    scale = world.SIDE / marks.SIDE
    widths = {kind: max(1, scale * sum(form.widths) / 2) for kind, form in marked.BOLD.items()}  # the middle of training's
    return {"relations": {kind: form.relation for kind, form in marks.KINDS.items()}, "widths": widths, "colours": marks.COLOURS}


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
        "suggestions": SUGGESTIONS[config.style == "vip"],
        "tour": TOURS["vip" if config.style == "vip" else "llava"],
        "marks": marks_of(config.style),
        "world": {"colours": world.COLOURS, "kinds": [*world.KINDS], "sizes": world.SIZES, "places": world.PLACES},
    }
    text = quote((HERE / "page" / "page.html").read_text(encoding="utf-8"))
    for name in ("model.js", "page.js"):
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
