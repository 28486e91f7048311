"""Many questions in one run: one by one (`Chat.ask`) and in batches (`Chat.answer`), 64 of them about tiny/llava's held-out scenes.

    python -m bench.questions

The answers must be the same. Times are of the processor, the smallest of three, taken in turn on one thread.
"""

import time

import torch

from chat import Chat
from tiny.world import held_out_questions

ROWS = (8, 16)  # of a batch


def mixes():
    """{what is asked: 64 questions (text, [picture])}. A description is the longest answer, a held-out question's mostly one word."""
    _, images, questions, _ = zip(*held_out_questions(64, 5))
    describe = "Describe the picture."
    return {
        "all describe": [(describe, [image]) for image in images],
        "every second one describes": [(describe if n % 2 else questions[n], [image]) for n, image in enumerate(images)],
        "short answers": [(question, [image]) for question, image in zip(questions, images)],
        "short answers, four to a picture": [(question, [images[n // 4]]) for n, question in enumerate(questions)],
        "short answers, one picture": [(question, [images[0]]) for question in questions],
    }


def one_by_one(chat, asked):
    answers = []
    for question, images in asked:
        chat.reset()
        answers.append("".join(chat.ask(question, images)))
    return answers


def seconds(run):
    """What a function returns, and how long the processor worked on it."""
    start = time.process_time()
    result = run()
    return result, time.process_time() - start


def main():
    torch.set_num_threads(1)
    chat = Chat.from_pretrained("tiny/llava", dtype=torch.float32)
    print("| 64 questions | one by one, s | " + " | ".join(f"{rows} rows, s | times faster" for rows in ROWS) + " |")
    print("|---|---|" + "---|---|" * len(ROWS))
    for name, asked in mixes().items():
        alone, batched = [], {rows: [] for rows in ROWS}
        for _ in range(3):
            expected, took = seconds(lambda asked=asked: one_by_one(chat, asked))
            alone.append(took)
            for rows in ROWS:
                answers, took = seconds(lambda asked=asked, rows=rows: list(chat.answer(asked, batch_size=rows)))
                batched[rows].append(took)
                if answers != expected:
                    raise SystemExit(f"bench.questions: {name}: the answers in batches of {rows} are others than one by one")
        cells = [f"{min(took):.2f} | {min(alone) / min(took):.2f}" for took in batched.values()]
        print(f"| {name} | {min(alone):.2f} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
