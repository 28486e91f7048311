"""Files of answers: a line of JSON for each question, in the order of the questions.

Answers end in another order than they were asked in. So while a run goes on, each of its processes writes its own into a part beside the
file, each as soon as it is there and with the number of its question. When all are there, they are put in order into the file. A run that
was stopped goes on from its parts, in any number of processes.
"""

import glob
import json
import os

from benchmarks.questions import read_lines


def read_answers(path, questions, settings=None):
    """The answers to the first questions, as far as they have been given: a file's lines, but for one that a killed run left half.

    Raises ValueError for an answer to another question, or given with other settings.
    """
    answers = read_lines(path, whole=True) if path.is_file() else []
    if len(answers) > len(questions):
        raise ValueError(f"{path} holds {len(answers)} answers to {len(questions)} questions")
    for n, (answer, question) in enumerate(zip(answers, questions), 1):
        check(answer, question, settings, f"{path}, line {n},")
    return answers


def check(answer, question, settings, where):
    """Raises ValueError for an answer to another question, or by another model, or given in another way."""
    if (answer.get("question_id"), answer.get("prompt", question.prompt)) != (question.id, question.prompt):
        raise ValueError(f"{where} answers question {answer.get('question_id')!r}; {question.id!r} is expected there: other questions")
    if not isinstance(answer.get("text"), str):
        raise ValueError(f"{where} has no text")
    before = answer.get("metadata") or {}
    if other := [name for name in settings or {} if before.get(name) != settings[name]]:
        raise ValueError(f"{where} is given with another {', '.join(other)}; name another file for --answers")


def open_for_lines(path):
    """A file to append lines to, without a line that a killed run left half."""
    file = open(path, "a+", encoding="utf-8")
    content = path.read_bytes()
    os.truncate(path, content.rfind(b"\n") + 1)
    return file


# Parts


def part_path(path, rank):
    """Where process `rank` keeps its answers until all are there."""
    return path.with_name(f"{path.name}.part-{rank}")


def parts(path):
    return sorted(path.parent.glob(f"{glob.escape(path.name)}.part-*"))


def read_parts(path, questions, settings):
    """{number of a question: its answer}: what a run that was stopped has got. Raises ValueError as read_answers does."""
    found = {}
    for part in parts(path):
        for n, answer in enumerate(read_lines(part, whole=True), 1):
            number, where = answer.pop("number", None), f"{part}, line {n},"
            if not isinstance(number, int) or not 0 <= number < len(questions):
                raise ValueError(f"{where} answers question number {number} of {len(questions)}: other questions")
            check(answer, questions[number], settings, where)
            found[number] = answer
    return found


def join_parts(path, questions, settings, done):
    """Append what the parts hold to the file, in the order of the questions, after the first `done`, and remove the parts."""
    answers = read_parts(path, questions, settings)
    with open_for_lines(path) as file:
        for number in range(done, len(questions)):
            file.write(json.dumps(answers[number], ensure_ascii=False) + "\n")
    for part in parts(path):
        part.unlink()
