"""What a benchmark's server or judge takes, made of the answers: for those whose true answers are kept secret, or that GPT-4 judges."""

import json

from benchmarks.measures import normalised


def write_json(content, out):
    out.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def vqav2(questions, answers, out):
    """For the server. It wants an answer to every question of the test set: give llava_vqav2_mscoco_test2015.jsonl as the questions."""
    write_json([{"question_id": q.id, "answer": normalised(a["text"])} for q, a in zip(questions, answers)], out)


def vizwiz(questions, answers, out):
    write_json([{"image": q.images[0], "answer": normalised(a["text"])} for q, a in zip(questions, answers)], out)


def by_number(questions, answers, out):
    """MM-Vet's and ViP-Bench's."""
    write_json({f"v1_{q.id}": a["text"] for q, a in zip(questions, answers)}, out)


def lines(questions, answers, out):
    """LLaVA-Bench in the Wild: the lines of the answers, for its judge."""
    out.write_text("".join(json.dumps(a, ensure_ascii=False) + "\n" for a in answers), encoding="utf-8")


def mmbench(questions, answers, out):
    """A table, which the server wants as an .xlsx. Raises ImportError's words as a ValueError where openpyxl is missing."""
    try:
        from openpyxl import Workbook
    except ImportError:
        raise ValueError("MMBench's server takes an .xlsx; to write one, pip install openpyxl") from None
    book = Workbook()
    book.active.append(["index", "question", "A", "B", "C", "D", "prediction"])
    for question, answer in zip(questions, answers):
        row = question.row
        book.active.append([question.id, row["question"], *(row[letter] for letter in "ABCD"), answer["text"]])
    book.save(out)


SUBMISSIONS = {
    "vqav2": vqav2,
    "vizwiz": vizwiz,
    "mmbench": mmbench,
    "mmvet": by_number,
    "vipbench": by_number,
    "llavaw": lines,
}
