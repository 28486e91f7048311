"""How often is tiny/llava right? Exact match of its greedy answers to questions about held-out scenes.

    python -m tiny.grade                        # 2,000 questions; prints the table

Two columns show what can be had without looking: the same questions put with noise in place of the picture, and the
share of the commonest answer to each kind of question.
"""

import argparse
import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from llava import Chat
from tiny.world import SIDE, held_out_questions
from tokenizer import chat_prompt


def answers(chat, questions, images, max_new_tokens=128):
    """Greedy answers to a batch of questions, each about its own picture and each alone in its conversation."""
    content = [[{"type": "image"}, {"type": "text", "text": question}] for question in questions]
    prompts = [chat.tokenizer.encode(chat_prompt([{"role": "user", "content": c}], chat.model.config.style)) for c in content]
    width = max(map(len, prompts))
    ids = torch.tensor([[chat.tokenizer.pad_id] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    steps = chat.model.generate(ids, chat.processor(images), mask, max_new_tokens)
    return [chat.tokenizer.decode(row) for row in torch.stack(list(steps), dim=1).tolist()]


def grade(chat, count, seed, batch=50):
    """{kind: (questions, right, right with noise for the picture, share of the commonest answer)}"""
    asked = list(held_out_questions(count, seed))
    random = np.random.default_rng(seed)
    tally, right, right_blind = defaultdict(Counter), Counter(), Counter()
    for start in tqdm(range(0, count, batch), desc="grading", unit="batch"):
        kinds, images, questions, truths = zip(*asked[start : start + batch])
        noise = [Image.fromarray(random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)) for _ in images]
        for kind, truth, seen, blind in zip(
            kinds, truths, answers(chat, questions, images), answers(chat, questions, noise), strict=True
        ):
            tally[kind][truth] += 1
            right[kind] += seen == truth
            right_blind[kind] += blind == truth
    return {
        kind: (counts.total(), right[kind] / counts.total(), right_blind[kind] / counts.total(), max(counts.values()) / counts.total())
        for kind, counts in tally.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny/llava")
    parser.add_argument("--count", type=int, default=2000, help="questions")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the table here")
    args = parser.parse_args()

    table = grade(Chat.from_pretrained(args.model, dtype=torch.float32), args.count, args.seed)
    total = sum(row[0] for row in table.values())
    overall = [sum(row[0] * row[k] for row in table.values()) / total for k in (1, 2, 3)]
    rows = sorted(table.items()) + [("all", (total, *overall))]
    print("| question | asked | right | with noise for the picture | commonest answer |")
    print("|---|---|---|---|---|")
    for kind, (n, *shares) in rows:
        print(f"| {kind} | {n} | " + " | ".join(f"{100 * share:.1f} %" for share in shares) + " |")
    if args.json:
        args.json.write_text(json.dumps(dict(rows), indent=1) + "\n")


if __name__ == "__main__":
    main()
