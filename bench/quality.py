"""What quantised weights cost in quality: python -m bench.quality

The bundled model is asked held-out questions. Of each scheme, on each part of the model alone and on the language model as
--quantize does it: the divergence of the next word's distribution from that of the plain model, along its own answers (KL, in
bits a token); the share of those tokens that would be others; and for the language model the share of right answers. Then the
relative error of each scheme on random layers of a 7B's shapes, beside theory.
"""

import argparse
import math
import re
import sys

import torch
import torch.nn as nn

from chat import Chat
from tiny import marked, world
from tiny.grade import padded, right
from weights.quantize import GROUPS, QuantizedLinear, dequantize, plan

PARTS = {
    "vision tower": re.compile(r"vision_tower\..*"),
    "projector": re.compile(r"projector\..*"),
    "attention": re.compile(r"language_model\..*self_attn.*"),
    "MLP": re.compile(r"language_model\..*mlp.*"),
    "head": re.compile(r"language_model\.lm_head"),
}
SHAPES = {"q_proj": (4096, 4096), "up_proj": (11008, 4096), "down_proj": (4096, 11008)}  # of a 7B
BATCH, FEWER = 50, 100  # questions at once; questions along whose answers the divergence is taken


def expected_error(scheme, inputs):
    """‖Ŵ − W‖ / ‖W‖ of normal weights in theory: a step over √12, the step from the expected largest weight or range.

    E max |w| of n = ∫ 1 − (2Φ(t) − 1)ⁿ dt over t > 0, and E (max − min) of n = ∫ 1 − Φ(t)ⁿ − (1 − Φ(t))ⁿ dt.
    """
    t = torch.linspace(-10, 10, 20001, dtype=torch.float64)
    below, n = torch.special.ndtr(t), GROUPS[scheme] or inputs
    if scheme == "int8":
        step = torch.trapezoid((1 - (2 * below - 1).clamp(min=0) ** n) * (t > 0), t) / 127
    else:
        step = torch.trapezoid(1 - below**n - (1 - below) ** n, t) / 15
    return float(step) / 12**0.5


def quantise(model, part, scheme):
    """Quantise the linear layers of one part of a plain model. False if the scheme does not fit them."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and PARTS[part].fullmatch(name):
            if layer.in_features % (GROUPS[scheme] or 1):
                return False
            model.set_submodule(name, QuantizedLinear.of(layer.weight, scheme, layer.bias))
    return True


def held_out(chat, count, seed):
    """Pictures, questions and true answers; for a ViP-LLaVA about what is marked."""
    if chat.model.config.style == "vip":
        *_, images, _, questions, truths = zip(*marked.held_out_questions(count, seed))
    else:
        _, images, questions, truths = zip(*world.held_out_questions(count, seed))
    return images, questions, truths


@torch.no_grad()
def own_answers(chat, count, seed=1):
    """A plain model's greedy answers to held-out questions: batches of (inputs of a forward pass, steps of the answers, which of
    them are real, the log-probabilities of the words there)."""
    images, questions, _ = held_out(chat, count, seed)
    batches = []
    for start in range(0, count, BATCH):
        ids, mask = padded(chat, questions[start : start + BATCH])
        pixels = chat.processor(images[start : start + BATCH])
        answers = torch.stack(list(chat.model.generate(ids, pixels, mask, 64)), 1)  # (B, steps)
        real = answers != chat.model.config.pad_id
        inputs = torch.cat([ids, answers], 1), pixels, torch.cat([mask, real.long()], 1)
        batches.append((inputs, answers.shape[1], real, words(chat, inputs, answers.shape[1], real)))
    return batches


@torch.no_grad()
def words(chat, inputs, steps, real):
    """log p of each word in the place of each real token of the answers: (tokens, vocabulary)."""
    return chat.model(*inputs).logits[:, -steps - 1 : -1].float().log_softmax(-1)[real]


def divergence(batches, chat):
    """Along a plain model's answers, the mean over their tokens: KL in bits, and the share whose likeliest word is another."""
    bits = flips = tokens = 0
    for inputs, steps, real, p in batches:
        q = words(chat, inputs, steps, real)
        bits += float((p.exp() * (p - q)).sum()) / math.log(2)
        flips += int((p.argmax(-1) != q.argmax(-1)).sum())
        tokens += len(p)
    return bits / tokens, flips / tokens


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny/llava", help="a checkpoint of the tiny world")
    parser.add_argument("--count", type=int, default=500, help="questions")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    args = parser.parse_args()
    load = lambda scheme=None: Chat.from_pretrained(args.model, dtype=getattr(torch, args.dtype), quantize=scheme)
    try:
        plain = load()
    except (ValueError, OSError) as error:
        sys.exit(f"bench.quality: {error}")
    if plain.model.config.quantized:
        sys.exit(f"bench.quality: {args.model} is quantised already; give the checkpoint that it was made from")
    images, questions, truths = held_out(plain, args.count, args.seed)
    accuracy = lambda chat: f"{100 * sum(right(chat, images, questions, truths)) / args.count:.1f} %"

    print("| part | scheme | KL, bits a token | other tokens | right |\n|---|---|---|---|---|")
    batches = own_answers(plain, min(args.count, FEWER), args.seed)
    print(f"| | none | 0 | 0 | {accuracy(plain)} |", flush=True)
    for scheme in GROUPS:
        for part in [*PARTS, "language model"]:
            if part not in PARTS:
                try:
                    plan(plain.model, scheme)
                except ValueError:
                    continue
                chat = load(scheme)
            else:
                chat = load()
                if not quantise(chat.model, part, scheme):
                    continue
            bits, flips = divergence(batches, chat)
            print(f"| {part} | {scheme} | {bits:.2g} | {100 * flips:.2f} % | {'' if part in PARTS else accuracy(chat)} |", flush=True)

    print("\n| layer | " + " | ".join(f"{scheme}: error | theory" for scheme in GROUPS) + " |\n" + "|---" * (1 + 2 * len(GROUPS)) + "|")
    for name, shape in SHAPES.items():
        weight, cells = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02, []
        for scheme in GROUPS:
            layer = QuantizedLinear.of(weight, scheme)
            error = (dequantize(layer.weight, layer.scales, torch.float32) - weight).norm() / weight.norm()
            cells += [f"{100 * error:.2f} %", f"{100 * expected_error(scheme, shape[1]):.2f} %"]
        print(f"| {name} {shape[0]} × {shape[1]} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
