"""What went on in the model for each word of an answer: a page in one file, without anything from elsewhere.

`python -m lessons.explain` writes it, and the demo shows it of any answer. It shows three things, and they differ: attention, which is
what a layer read (a mean over its heads, or one head), occlusion, which is how much less likely the word becomes when a part of the
picture is greyed, and the logit lens, which is the word that each patch would predict if the model ended after some block.
Attention is not explanation: what was read need not have mattered (lessons.pointing counts).
"""

import base64
import io
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import questions

THUMBNAIL = 12  # cells at most along a side of what is kept of a single head: a 7B has 1,024 heads
TOKENS = 4096  # of a batch of greyed pictures: more takes memory and no less time


def spelling(tokenizer, token):
    """A token as it stands in text: "▁" is a space, and a byte is its character, if it is one by itself."""
    if token >= len(tokenizer.model):
        return next(literal for literal, i in tokenizer.specials.items() if i == token)
    piece = tokenizer.model.id_to_piece(token)
    byte = int(piece[1:-1], 16) if tokenizer.model.is_byte(token) else 128
    return chr(byte) if byte < 128 else piece.replace("▁", " ")


def answer_ids(chat, question, images, **options):
    """Ask, and give the ids of the prompt (each <image> expanded) and of the answer, its end included if it came."""
    prompt, pixels = whole_prompt(chat, question, images)
    answer = []
    for token in chat.model.generate(torch.tensor([prompt]), pixels, **options):
        answer.append(int(token))
        if chat.has_ended(answer):  # ViP's end mark is plain text, at which `generate` does not stop
            break
    return prompt, answer


def whole_prompt(chat, question, images):
    """The ids of the conversation with one more question, each <image> expanded, and the pixels of all its pictures, or None."""
    prompt = chat.encode(chat.prompt(question, images))
    pictures = [*chat.images, *images]
    return prompt, chat.processor(pictures, pad=chat.pad) if pictures else None


@torch.no_grad()
def attention_maps(chat, prompt, answer, pixels):
    """What each token of the answer looked at when it was chosen: (layers, heads, answer, positions)."""
    ids = torch.tensor([prompt + answer])
    maps = chat.model(ids, pixels, output_attentions=True).attentions
    rows = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)  # a token is chosen at the position before its own
    return torch.stack([layer[0, :, rows].float().cpu() for layer in maps])


@torch.no_grad()
def lens(chat, prompt, pixels, patches):
    """The logit lens: the likeliest next token at each patch if the model ended after each block, and its probability.

    patches: the slice of the prompt that they stand in. Returns two tensors (layers, patches).
    """
    model = chat.model
    states = model(torch.tensor([prompt]), pixels, output_hidden_states=True).hidden_states
    states = [*map(model.language_model.norm, states[1:-1]), states[-1]]  # the last one is normalised already
    best = [model.language_model.lm_head(state[0, patches]).float().softmax(-1).max(-1) for state in states]
    return torch.stack([one.indices for one in best]).cpu(), torch.stack([one.values for one in best]).cpu()


def log_probabilities(chat, prompt, answer, pixels, rows=1):
    """Of each token of the answer, given the prompt, the pictures and the tokens before it: (rows, answer).

    pixels: the pictures of each row, one row after the other; or None. All rows have the same prompt and answer.
    """
    return torch.stack(questions.log_probabilities(chat.model, [prompt] * rows, [answer] * rows, pixels))


def occlusion_maps(chat, prompt, answer, pixels, cells):
    """By how much each token's log-probability falls when a cell of the first picture and those around it are greyed:
    (answer, cells, cells). One cell alone is seldom missed."""
    whole = log_probabilities(chat, prompt, answer, pixels)
    rows = max(1, TOKENS // len(prompt + answer))
    falls = []
    for first in tqdm(range(0, cells * cells, rows), desc="greying", unit="batch"):
        some = [greyed(pixels, *divmod(n, cells), cells) for n in range(first, min(first + rows, cells * cells))]
        falls.append(whole - log_probabilities(chat, prompt, answer, torch.cat(some), len(some)))
    return torch.cat(falls).T.unflatten(1, (cells, cells))


def greyed(pixels, row, column, cells):
    """Pictures (N, 3, side, side), in the first of which a cell (counted from 0) and those around it are grey."""
    side = pixels.shape[-1]
    edge = lambda k: round(side * min(max(k, 0), cells) / cells)
    pixels = pixels.clone()
    pixels[0, :, edge(row - 1) : edge(row + 2), edge(column - 1) : edge(column + 2)] = 0  # the mean of CLIP's pictures
    return pixels


def as_seen(processor, pixels):
    """The first picture as the model sees it, a PIL image: cropped and resized, its normalisation undone."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    values = ((pixels[0] * std + mean).clamp(0, 1) * 255).round().byte()
    return Image.fromarray(values.permute(1, 2, 0).numpy())


def packed(values, dim):
    """Weights as bytes, each a part of the largest one along the dimensions dim: {"scale", "bytes"}."""
    scale = values.amax(dim, keepdim=True).clamp(min=1e-9)
    return {"scale": scale.flatten().tolist(), "bytes": encoded((values / scale * 255).round().byte().numpy().tobytes())}


def encoded(data):
    return base64.b64encode(data).decode()


def of_picture(chat, prompt, answer, pixels, maps, cells):
    """What the page holds of the picture and its patches. maps: (layers, heads, answer, positions)."""
    config, tokenizer = chat.model.config, chat.tokenizer
    grid = config.vision.image_size // config.vision.patch_size
    first = prompt.index(config.image_id) + config.keep_cls
    patches = slice(first, first + grid**2)
    seen = io.BytesIO()
    as_seen(chat.processor, pixels).save(seen, "PNG")
    side = min(grid, THUMBNAIL)
    small = F.adaptive_avg_pool2d(maps[..., patches].unflatten(-1, (grid, grid)).flatten(0, 2), side)
    tokens, probabilities = lens(chat, prompt, pixels, patches)
    spelt = {token: spelling(tokenizer, token).strip() or "␣" for token in tokens.unique().tolist()}
    return {
        "picture": f"data:image/png;base64,{encoded(seen.getvalue())}",
        "first": first,
        "grid": grid,
        "thumbnail": side,
        "heads": packed(small, (1, 2)),
        "on_picture": maps[..., patches].sum(-1).round(decimals=3).tolist(),
        "on_first": maps[..., 0].round(decimals=3).tolist(),
        "lens": [[spelt[token] for token in of_layer] for of_layer in tokens.tolist()],
        "lens_probability": probabilities.double().round(decimals=3).tolist(),
        "cells": cells,
        "occlusion": occlusion_maps(chat, prompt, answer, pixels, cells).flatten(1).tolist(),
    }


def page(chat, question, images, cells, answer=None, **options):
    """The page's HTML. cells: into how many rows and columns the (first) picture is cut to be greyed.

    answer: the ids of the answer to look at; None: ask for one, with these options. The question may follow others in `chat`.
    """
    config, tokenizer = chat.model.config, chat.tokenizer
    if answer is None:
        _, answer = answer_ids(chat, question, images, **options)
    prompt, pixels = whole_prompt(chat, question, images)
    maps = attention_maps(chat, prompt, answer, pixels)  # (layers, heads, answer, positions)
    words, position = [], 0
    for token in prompt:
        if token != config.image_id:
            words.append((spelling(tokenizer, token), position))
        elif not words or words[-1][1] is not None:
            words.append((" [picture] ", None))
        position += 1
    data = {
        "prompt": words,
        "length": len(prompt),
        "positions": maps.shape[-1],
        "answer": ["(end)" if token in config.eos_ids else spelling(tokenizer, token) for token in answer],
        "probability": log_probabilities(chat, prompt, answer, pixels)[0].exp().tolist(),
        "attention": [packed(layer, -1) for layer in maps.mean(1)],
        "of_picture": None if pixels is None else of_picture(chat, prompt, answer, pixels, maps, cells),
    }
    template = (Path(__file__).parent / "explanation.html").read_text(encoding="utf-8")
    return template.replace("DATA", json.dumps(data).replace("<", "\\u003c"))  # no text can end the script element


@torch.no_grad()
def weighed(chat, question, images, answer, count=5):
    """The exact prompt of a question, its ids, and for each token of its answer (ids) the probability and the likeliest others:
    {"prompt", "ids", "words": [{"word", "probability", "others": [[word, probability], …]}]}. At temperature 1, without a penalty."""
    prompt, pixels = whole_prompt(chat, question, images)
    logits = chat.model(torch.tensor([prompt + answer]), pixels).logits[0, len(prompt) - 1 : -1]  # (answer, vocabulary)
    probabilities = logits.float().softmax(-1).cpu()
    words = []
    for token, row in zip(answer, probabilities):
        best = [other for other in row.topk(count + 1).indices.tolist() if other != token][:count]
        others = [[spelling(chat.tokenizer, other), float(row[other])] for other in best]
        words.append({"word": spelling(chat.tokenizer, token), "probability": float(row[token]), "others": others})
    text = chat.prompt(question, images)
    return {"prompt": text, "ids": chat.tokenizer.encode(text), "words": words}
