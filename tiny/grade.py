"""How often is a model of the tiny world right? Exact match of its greedy answers to questions about held-out scenes.

    python -m tiny.grade                        # tiny/llava: 2,000 questions; prints the table
    python -m tiny.grade --model FOLDER         # another; a ViP-LLaVA is asked about marked things, in two tables

The other columns are controls. They show what can be had without looking, by the same questions put with noise in place
of the picture and by the share of the commonest answer; and for ViP-LLaVA what the marks give, by the same pictures
without them, and what its training gives, by the same marked pictures shown to a LLaVA that was trained without.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from chat import Chat
from tiny import marked, world
from tokenizer import chat_prompt


def padded(chat, questions):
    """The prompts of questions that are each alone in a conversation with a picture: ids and mask, padded on the left."""
    tokenizer = chat.tokenizer
    content = [[{"type": "image"}, {"type": "text", "text": question}] for question in questions]
    prompts = [tokenizer.encode(chat_prompt([{"role": "user", "content": c}], chat.model.config.style)) for c in content]
    width = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.pad_id] * (width - len(prompt)) + prompt for prompt in prompts])
    return ids, torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])


def right(chat, images, questions, truths, batch=50):
    """Whether each answer is the true one, to the letter."""
    asked = [(question, [image]) for question, image in zip(questions, images)]
    answers = tqdm(chat.answer(asked, batch_size=batch, max_new_tokens=128), desc="grading", unit="answer", total=len(asked))
    return [answer == truth for answer, truth in zip(answers, truths, strict=True)]


def commonest(kinds, truths):
    """Whether each true answer is the commonest one to its kind of question: what always giving that would get right."""
    answer = {kind: Counter(t for k, t in zip(kinds, truths) if k == kind).most_common(1)[0][0] for kind in kinds}
    return [answer[kind] == truth for kind, truth in zip(kinds, truths)]


def table(kinds, columns):
    """{kind: {"asked": how many, each column's name: the share that is right in it}}, and the same for "all" of them."""
    rows = {}
    for row in [*sorted(set(kinds)), "all"]:
        of_row = [row in (kind, "all") for kind in kinds]
        shares = {name: sum(r for r, here in zip(column, of_row) if here) / sum(of_row) for name, column in columns.items()}
        rows[row] = {"asked": sum(of_row)} | shares
    return rows


def grade(chat, count, seed):
    """A LLaVA's table: {"question": its rows by kind of question}."""
    kinds, images, questions, truths = zip(*world.held_out_questions(count, seed))
    random = np.random.default_rng(seed)
    noise = [Image.fromarray(random.integers(0, 256, (world.SIDE, world.SIDE, 3), dtype=np.uint8)) for _ in images]
    columns = {
        "right": right(chat, images, questions, truths),
        "with noise for the picture": right(chat, noise, questions, truths),
        "commonest answer": commonest(kinds, truths),
    }
    return {"question": table(kinds, columns)}


def grade_marks(chat, plain, count, seed):
    """A ViP-LLaVA's tables: {"question": its rows by kind of question, "mark": by kind of mark}. plain: a LLaVA's chat."""
    kinds, marks, images, unmarked, questions, truths = zip(*marked.held_out_questions(count, seed))
    columns = {
        "right": right(chat, images, questions, truths),
        "marks left off": right(chat, unmarked, questions, truths),
        "tiny/llava, same marks": right(plain, images, questions, truths),
        "commonest answer": commonest(kinds, truths),
    }
    return {"question": table(kinds, columns), "mark": table(marks, columns)}


def as_markdown(name, rows):
    lines = [[name, *rows["all"]], ["---"] * (1 + len(rows["all"]))]
    for kind, row in rows.items():
        lines.append([kind, *(f"{100 * share:.1f} %" if isinstance(share, float) else str(share) for share in row.values())])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny/llava")
    parser.add_argument("--count", type=int, default=2000, help="questions")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the tables here")
    args = parser.parse_args()

    load = lambda model: Chat.from_pretrained(model, dtype=torch.float32)
    chat = load(args.model)
    if chat.model.config.style == "vip":
        tables = grade_marks(chat, load("tiny/llava"), args.count, args.seed)
    else:
        tables = grade(chat, args.count, args.seed)
    print("\n\n".join(as_markdown(name, rows) for name, rows in tables.items()))
    if args.json:
        args.json.write_text(json.dumps(tables, indent=1) + "\n")


if __name__ == "__main__":
    main()
