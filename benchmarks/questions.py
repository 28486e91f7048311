"""The files of questions and answers that the original authors' evaluation reads and writes.

A question file is one of: lines of JSON {"question_id", "image", "text"}; a JSON list of conversations (ScienceQA); ViP-LLaVA's JSON
lists with boxes (Visual7W, PointQA); or MMBench's table, its pictures within. An answer file is lines of JSON, one for each question, in
the same order: {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}.
"""

import base64
import csv
import io
import json
import random
from dataclasses import dataclass, field
from pathlib import Path

from images import open_image
from marks import COLOURS, Mark, draw_marks, parse_mark, refer

LETTERS = "ABCDE"
LETTER = "Answer with the option's letter from the given choices directly."
WORD = "Answer the question using a single word or phrase."
NOTHING = ("", "nan", "none")  # what an empty cell of MMBench's table says


@dataclass
class Question:
    id: object  # a number or a text; TextVQA asks several with one id, so the place in the file is what counts
    text: str  # as the model reads it
    images: list  # names of files, or with MMBench the bytes of one
    prompt: str  # as it is written beside the answer: with "<image>" where ScienceQA counts by it
    marks: list = field(default_factory=list)
    truth: str | None = None  # the answer, if the file holds it
    category: str | None = None  # POPE's split
    row: dict | None = None  # of MMBench's table, which its submission repeats

    def pictures(self, folder):
        """The pictures, open, with the marks drawn on the first. Raises ValueError or OSError."""
        opened = []
        for image in self.images:
            opened.append(open_image(io.BytesIO(image) if isinstance(image, bytes) else Path(folder) / image))
        if self.marks:
            opened[0] = draw_marks(opened[0], self.marks)
        return opened


def read_lines(path, whole=False):
    """The objects of a file of JSON lines. whole: without a last line that has no end. Raises ValueError, naming the line."""
    content, found = Path(path).read_text(encoding="utf-8", errors="replace" if whole else "strict"), []
    lines = content.split("\n")  # not splitlines, which also splits within texts
    for n, line in enumerate(lines[:-1] if whole else lines, 1):
        if line.strip():
            try:
                found.append(json.loads(line))
            except ValueError:
                raise ValueError(f"{path}, line {n}, is not JSON: {line[:60]!r}") from None
            if not isinstance(found[-1], dict):
                raise ValueError(f"{path}, line {n}, holds a {type(found[-1]).__name__}; expected an object")
    return found


def read_json(path):
    """What a JSON file holds. Raises FileNotFoundError or ValueError, naming it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def read_questions(path, suffix=None, seed=0):
    """The Questions of a file. suffix: a line to put after each; seed: of the colours of Visual7W's marks.

    Raises FileNotFoundError, or ValueError naming the record that cannot be read.
    """
    path, questions = Path(path), []
    if path.suffix == ".tsv":
        records, read = read_table(path), from_table
    elif path.suffix == ".json":
        records, read = read_json(path), from_conversation
    else:
        records, read = read_lines(path), from_line
    if not isinstance(records, list) or not records:
        raise ValueError(f"{path} holds no list of questions")
    for n, record in enumerate(records, 1):
        try:
            question = read_vip(record, random.Random(f"{seed} {n}")) if "bboxes" in record else read(record)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"{path}, question {n}, lacks what a question has ({type(error).__name__}: {error})") from None
        except ValueError as error:
            raise ValueError(f"{path}, question {n}: {error}") from None
        if suffix:
            question.text, question.prompt = f"{question.text}\n{suffix}", f"{question.prompt}\n{suffix}"
        questions.append(question)
    return questions


def from_line(record):
    images = record.get("image") or []
    marks = [parse_mark(mark) for mark in record.get("marks", [])]
    text = refer(record["text"], marks) if marks else record["text"]
    if marks and not images:
        raise ValueError("it has marks, and no image to draw them on")
    images = [images] if isinstance(images, str) else list(images)
    return Question(record["question_id"], text, images, text, marks, record.get("answer"), record.get("category"))


def from_conversation(record):
    """ScienceQA's. Its measure knows by "<image>" in the prompt which questions have a picture."""
    text = record["conversations"][0]["value"].replace("<image>", "").strip()
    images = [record["image"]] if "image" in record else []
    return Question(record["id"], text, images, "<image>\n" * len(images) + text)


def read_vip(record, random):
    """ViP-LLaVA's questions about boxes: Visual7W asks which of four, PointQA about the one in the red rectangle."""
    boxes = record["bboxes"]
    if record["id"].startswith("v7w"):
        colours = random.sample(list(COLOURS), len(boxes))
        options = [f"{letter}. The object within the {colour} rectangle" for letter, colour in zip(LETTERS, colours)]
        text, truth = "\n".join([record["question"], *options, LETTER]), LETTERS[boxes.index(record["answer"])]
    else:
        colours, truth = ["red"] * len(boxes), record["answer"]
        text = f"{record['general_question']} The exemplary object is within the rectangle.\n{WORD}"
    marks = [Mark("rectangle", box, colour, alpha=128) for box, colour in zip(boxes, colours)]
    return Question(record["id"], text, [record["image"]], text, marks, truth)


def read_table(path):
    csv.field_size_limit(10**9)  # a cell holds a picture
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def from_table(row):
    lines = [row["question"]] if row["hint"].lower() in NOTHING else [row["hint"], row["question"]]
    for letter in LETTERS[:4]:
        if row[letter].lower() in NOTHING:
            break
        lines.append(f"{letter}. {row[letter]}")
    text = "\n".join(lines)
    return Question(int(row["index"]), text, [base64.b64decode(row["image"])], text, row=row)
