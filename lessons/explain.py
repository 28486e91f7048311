"""A page that shows, for each word of an answer, where in the picture the model looked and which words it weighed.

    python -m lessons.explain -o explained.html                      # the bundled picture, question and model
    python -m lessons.explain --image photo.jpg --model … "What is this?" -o explained.html

The arguments are sample.py's. The page is one file without anything from elsewhere. It shows two things, and they differ:
attention, which is what a layer read (a mean over its heads), and occlusion, which is how much less likely the word becomes
when a part of the picture is greyed. Attention is not explanation: what was read need not have mattered.
"""

import base64
import io
import json
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

import sample
from lessons.trace import spelling
from tokenizer import STYLES, expand_images


def answer_ids(chat, question, images, **options):
    """Ask, and give the ids of the prompt (each <image> expanded) and of the answer, its end included if it came."""
    config = chat.model.config
    prompt = expand_images(chat.tokenizer.encode(chat.prompt(question, images)), config.image_id, config.features_per_image)
    pixels = chat.processor(images, pad=chat.pad) if images else None
    answer, end = [], STYLES[config.style]["end"]
    for token in chat.model.generate(torch.tensor([prompt]), pixels, **options):
        answer.append(int(token))
        if end in chat.tokenizer.decode(answer):  # ViP's "###" is plain text
            break
    return prompt, answer


@torch.no_grad()
def attention_maps(chat, prompt, answer, pixels):
    """What each token of the answer looked at when it was chosen: (layers, answer, positions), means over the heads."""
    ids = torch.tensor([prompt + answer])
    maps = chat.model(ids, pixels, output_attentions=True).attentions
    rows = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)  # a token is chosen at the position before its own
    return torch.stack([layer[0, :, rows].float().mean(0).cpu() for layer in maps])


@torch.no_grad()
def log_probabilities(chat, prompt, answer, pixels):
    """Of each token of the answer, given the prompt, the picture and the tokens before it: (answer,)."""
    logits = chat.model(torch.tensor([prompt + answer]), pixels).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(-1)[range(len(answer)), answer].cpu()


def occlusion_maps(chat, prompt, answer, pixels, cells):
    """By how much each token's log-probability falls when a cell of the first picture and those around it are greyed:
    (answer, cells, cells). One cell alone is seldom missed."""
    side = pixels.shape[-1]
    edge = lambda k: round(side * min(max(k, 0), cells) / cells)
    whole = log_probabilities(chat, prompt, answer, pixels)
    falls = torch.zeros(len(answer), cells, cells)
    for n in tqdm(range(cells * cells), desc="greying", unit="cell"):
        row, column = divmod(n, cells)
        greyed = pixels.clone()
        greyed[0, :, edge(row - 1) : edge(row + 2), edge(column - 1) : edge(column + 2)] = 0  # the mean of CLIP's pictures
        falls[:, row, column] = whole - log_probabilities(chat, prompt, answer, greyed)
    return falls


def as_seen(processor, pixels):
    """The first picture as the model sees it, a PIL image: cropped and resized, its normalisation undone."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    values = ((pixels[0] * std + mean).clamp(0, 1) * 255).round().byte()
    return Image.fromarray(values.permute(1, 2, 0).numpy())


def page(chat, question, images, cells, **options):
    """The page's HTML. cells: into how many rows and columns the picture is cut to be greyed."""
    config, tokenizer = chat.model.config, chat.tokenizer
    prompt, answer = answer_ids(chat, question, images, **options)
    pixels = chat.processor(images, pad=chat.pad) if images else None
    maps = attention_maps(chat, prompt, answer, pixels)  # (layers, answer, positions)
    scale = maps.amax(-1).clamp(min=1e-9)
    quantised = (maps / scale[..., None] * 255).round().byte()
    encoded = lambda data: base64.b64encode(data).decode()
    picture, first = None, 0
    if images:
        seen = io.BytesIO()
        as_seen(chat.processor, pixels).save(seen, "PNG")
        picture, first = f"data:image/png;base64,{encoded(seen.getvalue())}", prompt.index(config.image_id) + config.keep_cls
    words, position = [], 0
    for token in prompt:
        if token != config.image_id:
            words.append((spelling(tokenizer, token), position))
        elif not words or words[-1][1] is not None:
            words.append((" [picture] ", None))
        position += 1
    data = {
        "side": 448,
        "picture": picture,
        "first": first,
        "grid": config.vision.image_size // config.vision.patch_size if images else 0,
        "prompt": words,
        "length": len(prompt),
        "positions": maps.shape[-1],
        "answer": ["(end)" if token in config.eos_ids else spelling(tokenizer, token) for token in answer],
        "probability": log_probabilities(chat, prompt, answer, pixels).exp().tolist(),
        "attention": [{"scale": s.tolist(), "bytes": encoded(q.numpy().tobytes())} for s, q in zip(scale, quantised)],
        "cells": cells,
        "occlusion": occlusion_maps(chat, prompt, answer, pixels, cells).flatten(1).tolist() if images else [[] for _ in answer],
    }
    template = (Path(__file__).parent / "explain.html").read_text(encoding="utf-8")
    return template.replace("DATA", json.dumps(data).replace("<", "\\u003c"))  # no text can end the script element


def main():
    parser = sample.argument_parser("python -m lessons.explain", __doc__)
    parser.add_argument("-o", "--out", type=Path, default=Path("explained.html"), help="the page [explained.html]")
    parser.add_argument("--cells", type=int, default=8, metavar="N", help="grey the picture in N × N cells, one pass each [8]")

    def write(chat, args, images, marks):
        if args.chat:
            raise ValueError("--chat: the page is of one question")
        if args.cells < 1:
            raise ValueError(f"--cells is {args.cells}; expected at least 1")
        options = dict(max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed)
        args.out.write_text(page(chat, args.question, images, args.cells, **options), encoding="utf-8")
        print(args.out)

    sample.run(parser, write)


if __name__ == "__main__":
    main()
