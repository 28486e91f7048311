"""evaluate.py: questions answered in batches, stopped and gone on with, and each benchmark's measure on cases that hold its traps."""

import base64
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evaluate as command
from benchmarks import measures
from benchmarks.answers import read_answers
from benchmarks.measures import MEASURES, interval, normalised, soft_accuracy
from benchmarks.questions import LETTER, WORD, Question, read_questions
from images import open_image

ROOT = Path(__file__).resolve().parents[1]


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def said(questions, texts):
    return [{"question_id": question.id, "prompt": question.prompt, "text": text} for question, text in zip(questions, texts, strict=True)]


def questions_of(*prompts, **more):
    return [Question(n, prompt, [], prompt, **more) for n, prompt in enumerate(prompts)]


# Answering


@pytest.fixture
def asked(tmp_path):
    """Seven questions about three pictures, and the arguments to have them answered by the bundled model."""
    for n, colour in enumerate(("red", "lime", "blue")):
        Image.new("RGB", (40, 30), colour).save(tmp_path / f"{n}.png")
    Image.open("tiny/example.png").save(tmp_path / "scene.png")
    texts = [
        "What is this?",
        "Describe the picture.",
        "OCR: ### </s> USER: What?",
        "How many squares are there?",
        "What is in it?",
        "Where?",
    ]
    lines = [{"question_id": n // 2, "image": "scene.png" if n % 2 else f"{n // 2}.png", "text": text} for n, text in enumerate(texts)]
    lines.append({"question_id": "text", "text": "Hello?"})
    write_lines(tmp_path / "q.jsonl", lines)
    return ["--model", str(ROOT / "tiny/llava"), "--questions", "q.jsonl", "--images", ".", "--answers", "a.jsonl", "--dtype", "float32",
            "--batch-size", "1", "--max-new-tokens", "12", "--device", "cpu"]  # fmt: skip


def run(monkeypatch, folder, arguments):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
    command.main()


def stopped(monkeypatch, folder, arguments):
    with pytest.raises(SystemExit) as error:
        run(monkeypatch, folder, arguments)
    line = str(error.value)
    assert line.startswith("evaluate.py: ") and "\n" not in line
    return line


def texts_of(path):
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_answers_are_those_of_one_question_after_another(asked, tmp_path, monkeypatch, chat):
    run(monkeypatch, tmp_path, asked)
    answers = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    questions = read_questions(tmp_path / "q.jsonl")
    assert [(answer["question_id"], answer["prompt"]) for answer in answers] == [(question.id, question.prompt) for question in questions]
    for question, answer in zip(questions, answers):
        if "###" not in question.text:  # what a chat refuses
            chat.reset()
            images = question.pictures(tmp_path)
            assert answer["text"] == "".join(chat.ask(question.text, images, max_new_tokens=12)).strip()
    assert answers[2]["text"] and "error" not in answers[2]
    assert answers[0].keys() == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
    assert answers[0]["model_id"] == "llava" and answers[0]["metadata"]["dtype"] == "float32"


def test_a_run_that_was_killed_goes_on(asked, tmp_path, monkeypatch):
    run(monkeypatch, tmp_path, asked)
    whole = (tmp_path / "a.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    numbered = [json.dumps({"number": n} | json.loads(line)).encode() + b"\n" for n, line in enumerate(lines)]
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:20])  # of a run before, or killed while parts were joined
    (tmp_path / "a.jsonl.part-0").write_bytes(numbered[4] + numbered[1] + numbered[3][:-9])
    (tmp_path / "a.jsonl.part-2").write_bytes(numbered[6])  # of more processes than go on
    asked_for = []
    answer_all = command.answer_all
    monkeypatch.setattr(command, "answer_all", lambda chat, left, *rest: asked_for.append([*left]) or answer_all(chat, left, *rest))
    run(monkeypatch, tmp_path, asked)
    assert asked_for == [[2, 3, 5]] and not list(tmp_path.glob("a.jsonl.*"))
    again = (tmp_path / "a.jsonl").read_bytes()
    assert again.startswith(b"".join(lines[:2])) and texts_of(tmp_path / "a.jsonl") == [json.loads(line)["text"] for line in lines]
    run(monkeypatch, tmp_path, asked)  # all answered: nothing is asked
    assert len(asked_for) == 1 and (tmp_path / "a.jsonl").read_bytes() == again


def test_a_killed_run_loses_no_more_than_a_batch(asked, tmp_path, monkeypatch):
    """Also where the first answer is long, and all others wait for it to be in order."""
    asked[asked.index("--batch-size") + 1], asked[asked.index("12")] = "2", "60"
    lines = [{"question_id": n, "image": "scene.png", "text": "How many squares are there?"} for n in range(9)]
    write_lines(tmp_path / "q.jsonl", [lines[0] | {"text": "Describe the picture."}, *lines[1:]])
    pictures, taken = Question.pictures, []

    def stop_at_the_eighth(question, folder):
        taken.append(question.id)
        if len(taken) == 8:
            raise KeyboardInterrupt
        return pictures(question, folder)

    with monkeypatch.context() as patch:
        patch.setattr(Question, "pictures", stop_at_the_eighth)
        assert "the same command goes on" in stopped(patch, tmp_path, asked)
    kept = [json.loads(line)["number"] for line in (tmp_path / "a.jsonl.part-0").read_text().splitlines()]
    assert kept == [1, 2, 3, 4, 5, 6]  # but for the first, which is under way, and the eighth
    run(monkeypatch, tmp_path, asked)
    assert [json.loads(line)["question_id"] for line in (tmp_path / "a.jsonl").read_text().splitlines()] == [*range(9)]


@pytest.mark.parametrize(
    "line, message",
    [
        ({"number": 7}, "question number 7 of 7: other questions"),
        ({}, "question number None of 7"),
        ({"number": 1}, "other questions"),
        ({"number": 0}, "is given with another checkpoint"),
    ],
)
def test_parts_of_another_run(asked, tmp_path, monkeypatch, line, message):
    part = write_lines(tmp_path / "a.jsonl.part-1", [{"question_id": 0, "prompt": "What is this?", "text": "A ball."} | line])
    kept = part.read_bytes()
    assert message in stopped(monkeypatch, tmp_path, asked) and part.read_bytes() == kept


def test_texts_that_hold_ends_of_lines(tmp_path):
    """Which JSON leaves as they are: a file ends its lines with newlines alone."""
    questions = questions_of("Who\u2028or\x85what?")
    content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in said(questions, ["I\u2028am."]))
    (tmp_path / "a.jsonl").write_text(content, encoding="utf-8")
    assert read_answers(tmp_path / "a.jsonl", questions)[0]["text"] == "I\u2028am."


def test_two_processes_share_the_questions(asked, tmp_path, monkeypatch):
    run(monkeypatch, tmp_path, asked)
    wanted = texts_of(tmp_path / "a.jsonl")
    lines = (tmp_path / "a.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_text(lines[0])  # one is answered already
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(ROOT / "evaluate.py")]
    done = subprocess.run(torchrun + asked, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert texts_of(tmp_path / "a.jsonl") == wanted
    assert not list(tmp_path.glob("a.jsonl.*"))


def test_a_damaged_picture_stops_no_other_question(asked, tmp_path, monkeypatch, capsys):
    (tmp_path / "1.png").write_bytes(b"no picture")
    assert "1 questions could not be asked" in stopped(monkeypatch, tmp_path, asked)
    answers = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [("error" in answer, bool(answer["text"])) for answer in answers].count((True, False)) == 1 and len(answers) == 7
    assert "not a picture" in answers[2]["error"] and "question 1 could not be asked" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["missing", "not JSON", "list", "no text", "other question", "other model", "other settings", "folder"])
def test_one_line_for_a_mistake_and_nothing_is_lost(asked, tmp_path, monkeypatch, wrong):
    lines = (tmp_path / "q.jsonl").read_text().splitlines(keepends=True)
    about = {"missing": "lacks 1 of the", "not JSON": "line 2, is not JSON", "list": "line 2", "no text": "question 2, lacks"}
    about |= {
        "other question": "other questions",
        "other model": "checkpoint",
        "other settings": "max_new_tokens",
        "folder": "no such folder",
    }
    answer = {"question_id": 0, "prompt": "What is this?", "text": "A ball.", "metadata": {"checkpoint": "0"}}
    kept = None
    if wrong == "missing":
        (tmp_path / "1.png").unlink()
    elif wrong in ("not JSON", "list", "no text"):
        lines[1] = {"not JSON": "{\n", "list": "[1]\n", "no text": '{"question_id": 1}\n'}[wrong]
        (tmp_path / "q.jsonl").write_text("".join(lines))
    elif wrong == "other question":
        kept = write_lines(tmp_path / "a.jsonl", [answer | {"question_id": 5}]).read_bytes()
    elif wrong == "other model":
        kept = write_lines(tmp_path / "a.jsonl", [answer]).read_bytes()
    elif wrong == "folder":
        asked[asked.index("a.jsonl")] = "nowhere/a.jsonl"
    else:
        run(monkeypatch, tmp_path, asked)
        kept = (tmp_path / "a.jsonl").read_bytes()
        asked[asked.index("12")] = "13"
    assert about[wrong] in stopped(monkeypatch, tmp_path, asked)
    if kept is not None:
        assert (tmp_path / "a.jsonl").read_bytes() == kept


# Files of questions


def test_marks_are_drawn_and_named(tmp_path):
    Image.new("RGB", (50, 50)).save(tmp_path / "p.png")
    record = {"question_id": 1, "image": "p.png", "text": "What is {mark}?", "marks": ["red rectangle 10,10,40,40"]}
    (question,) = read_questions(write_lines(tmp_path / "q.jsonl", [record]))
    assert question.text == question.prompt == "What is within the red rectangle?"
    assert question.pictures(tmp_path)[0].convert("RGB").getpixel((10, 25))[0] > 90


def test_vips_own_files(tmp_path):
    Image.new("RGB", (50, 50)).save(tmp_path / "p.png")
    boxes = [[1, 1, 9, 9], [11, 1, 19, 9], [21, 1, 29, 9], [31, 1, 39, 9]]
    records = [
        {"id": "v7w-7", "image": "p.png", "question": "Which is it?", "bboxes": boxes, "answer": boxes[2]},
        {"id": "pointQA_twice-3", "image": "p.png", "general_question": "How many are there?", "bboxes": boxes[:1], "answer": "2"},
    ]
    which, many = read_questions(write(tmp_path / "q.json", records))
    assert which.truth == "C" and len({mark.colour for mark in which.marks}) == 4
    lines = which.text.split("\n")
    assert (lines[0], lines[-1]) == ("Which is it?", LETTER)
    assert lines[3] == f"C. The object within the {which.marks[2].colour} rectangle"
    assert many.text == f"How many are there? The exemplary object is within the rectangle.\n{WORD}"
    assert (many.truth, many.marks[0].colour) == ("2", "red")
    assert which.pictures(tmp_path)[0].size == (50, 50)
    assert read_questions(tmp_path / "q.json")[0].text == which.text  # the colours are of the seed
    result = MEASURES["v7w"]([which, many], said([which, many], ["c", "3"]), None)
    assert list(result.rows) == [1, 0]


def test_mmbench(tmp_path):
    Image.new("RGB", (9, 9), "red").save(tmp_path / "p.png")
    picture = base64.b64encode((tmp_path / "p.png").read_bytes()).decode()
    rows = ["index question hint A B C D image".split(), ["241", "Which?", "nan", "one", "two", "", "", picture]]
    rows.append(["9", "Which?", "A hint.", "one", "two", "three", "four", picture])
    (tmp_path / "q.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))
    first, second = read_questions(tmp_path / "q.tsv", LETTER)
    assert first.id == 241 and first.text == f"Which?\nA. one\nB. two\n{LETTER}"
    assert second.text.startswith("A hint.\nWhich?\nA. one")
    assert first.pictures(None)[0].getpixel((0, 0)) == (255, 0, 0)


def test_an_answer_file_of_more_answers_than_questions(tmp_path):
    questions = questions_of("Who?")
    write_lines(tmp_path / "a.jsonl", said(questions, ["I."]) * 2)
    with pytest.raises(ValueError, match="2 answers to 1 questions"):
        read_answers(tmp_path / "a.jsonl", questions)


# Measures


def test_pope(tmp_path):
    """Pairs by order within a split, whatever the ids of the labels are; the first sentence alone is read."""
    splits = {"adversarial": "yyn", "popular": "ny", "random": "yn"}
    for split, labels in splits.items():
        label = [{"question_id": 1 + n, "label": "yes" if letter == "y" else "no"} for n, letter in enumerate(labels)]
        write_lines(tmp_path / f"coco_pope_{split}.json", label)
    order = ["random", "adversarial", "popular", "adversarial", "random", "popular", "adversarial"]
    questions = [Question(100 + n, "Is it?", [], "Is it?", category=split) for n, split in enumerate(order)]
    texts = ["Yes", "No, it is not.", "Nothing", "It is. No", "no", "Yes, no doubt", "There is not."]
    measured = MEASURES["pope"](questions, said(questions, texts), tmp_path)
    # adversarial: no, yes, no against yes, yes, no: P 1, R 1/2. popular: yes, no against no, yes: 0. random: all right.
    assert measured.result(measured.rows) == pytest.approx(100 * (2 / 3 + 0 + 1) / 3)
    assert measured.unreadable == 1  # "Nothing"
    with pytest.raises(ValueError, match="adversarial has 3 labels and 2 answers"):
        MEASURES["pope"](questions[:-1], said(questions[:-1], texts[:-1]), tmp_path)
    with pytest.raises(ValueError, match="splits"):
        MEASURES["pope"](questions[:1], said(questions[:1], texts[:1]), tmp_path)


@pytest.mark.parametrize(
    "answer, compared",
    [  # as the public script gives them
        ("The Yellow-Cab", "yellow cab"),
        ("yellow - cab", "yellow cab"),
        ("$1,000.50", "$1000.50"),
        ("Two dogs.", "2 dogs"),
        ("dont", "don't"),
        ("Mike's", "mike 's"),
        ("None", "0"),
        ("somebody'd", "somebodyd"),
        ("a.b 3.5", "ab 3.5"),
        ("10:30", "10:30"),
        ("what/if", "what if"),
    ],
)
def test_answers_are_normalised_as_the_server_does(answer, compared):
    assert normalised(answer) == compared


def test_soft_accuracy():
    truths = ["a"] * 2 + ["b"] * 3 + ["c"] * 5
    assert soft_accuracy("a", truths) == pytest.approx((8 * 2 / 3 + 2 * 1 / 3) / 10)
    assert soft_accuracy("b", truths) == pytest.approx((7 + 3 * 2 / 3) / 10)
    assert (soft_accuracy("c", truths), soft_accuracy("d", truths)) == (1, 0)


def test_textvqa(tmp_path):
    """The question is found inside the prompt, with OCR tokens or without, and belongs to its picture."""
    data = [{"image_id": "p", "question": "What IS it?", "answers": ["stop"] * 10}]
    data.append({"image_id": "q", "question": "What is it?", "answers": ["go"] * 10})
    annotations = write(tmp_path / "val.json", {"data": data})
    prompts = [
        f"What is it?\nReference OCR token: stop, ###\n{WORD}",
        f"Reference OCR token: a\nWhat is it?\n{WORD}",
        f"What is it?\n{WORD}",
        "OCR tokens: x. Question: What is it? Short answer:",
    ]
    questions = [Question(image, prompt, [], prompt) for image in "pq" for prompt in prompts]
    measured = MEASURES["textvqa"](questions, said(questions, ["Stop."] * 8), annotations)
    assert list(measured.rows) == [1] * 4 + [0] * 4
    other = [Question("p", "What is this?\nx", [], "What is this?\nx")]
    with pytest.raises(ValueError, match="no question 'what is this\\?'"):
        MEASURES["textvqa"](other, said(other, ["x"]), annotations)


def test_scienceqa(tmp_path):
    """Only questions with <image> in the prompt count; three ways to say a letter; a letter beyond the choices is none."""
    texts = ["B", "B. two", "The answer is B.", "b", "C", "The answer is A. The answer is B.", "", "B"]
    problems = {str(n): {"choices": ["one", "two"], "answer": 1} for n in range(9)}
    write(tmp_path / "problems.json", problems)
    write(tmp_path / "pid_splits.json", {"test": [str(n) for n in range(8)]})
    records = [{"id": str(n), "conversations": [{"from": "human", "value": "<image>\nWhich?"}]} for n in range(8)]
    for record in records[:7]:
        record["image"] = "p.png"
    questions = read_questions(write(tmp_path / "q.json", records), LETTER)
    assert questions[0].text == f"Which?\n{LETTER}" and questions[0].prompt == f"<image>\nWhich?\n{LETTER}"
    measured = MEASURES["scienceqa"](questions, said(questions, texts), tmp_path)
    assert list(measured.rows) == [1, 1, 1, 0, 0, 0, 0] and measured.unreadable == 4
    with pytest.raises(ValueError, match="1 questions of ScienceQA"):
        MEASURES["scienceqa"](questions[1:], said(questions[1:], texts[1:]), tmp_path)


def test_gqa_and_seed(tmp_path):
    questions = questions_of("a", "b", "c")
    gqa = write(tmp_path / "gqa.json", {str(n): {"answer": answer} for n, answer in enumerate(("yes", "left", "no"))})
    assert list(MEASURES["gqa"](questions, said(questions, ["Yes.", "on the left", "no.."]), gqa).rows) == [1, 0, 1]
    letters = write(tmp_path / "seed.json", {"questions": [{"question_id": str(n), "answer": "A"} for n in range(3)]})
    measured = MEASURES["seed"](questions, said(questions, ["A", "A.", "a"]), letters)
    assert list(measured.rows) == [1, 0, 0] and measured.unreadable == 2
    for name, path in (("gqa", gqa), ("seed", letters)):
        with pytest.raises(ValueError, match="3 questions, 2 were asked"):
            MEASURES[name](questions[:2], said(questions[:2], ["A", "A"]), path)


def test_mme(tmp_path):
    """Accuracy and accuracy of pairs, of each subtask; the texts lie in one of two places; only perception counts."""
    questions, texts = [], []
    for n, subtask in enumerate(measures.PERCEPTION):
        for picture in ("1", "2"):
            lines = "Is it red?  Please answer yes or no.\tYes\nIs it blue? Please answer yes or no.\tNo\n"
            folder = tmp_path / subtask / ("questions_answers_YN" if n % 2 else "")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{picture}.txt").write_text(lines)
            for colour in ("red", "blue"):
                prompt = f"Is it {colour}?\n{WORD}"
                questions.append(Question(f"{subtask}/{picture}.jpg", prompt, [], prompt))
                texts.append("Yes" if picture == "1" else "Perhaps yes" if colour == "red" else "No")
    questions.append(Question("code_reasoning/1.png", "x", [], "x"))
    measured = MEASURES["mme"](questions, said(questions, [*texts, "Yes"]), tmp_path)
    # picture 1: one of two; picture 2: "Perhaps yes" has no yes in four letters, and no "no": one of two.
    assert measured.result(measured.rows) == pytest.approx(10 * 50) and measured.unreadable == 10
    texts[2] = "yes, it is"
    measured = MEASURES["mme"](questions[:-1], said(questions[:-1], texts), tmp_path)
    assert measured.result(measured.rows) == pytest.approx(10 * 50 + 25 + 50)
    with pytest.raises(ValueError, match="OCR/2 has 1 answers"):
        MEASURES["mme"](questions[:-2], said(questions[:-2], texts[:-1]), tmp_path)


SAID = "Yes|No|yes.|No, it is not.|Not at all|NO|Eyes|Know|A no|Unknown|The answer is yes|Nope|ye s|I see no|Yes\u3000|oYes|noYes".split(
    "|"
)
# What MME's own script says of made-up answers, subtask by subtask: calculation.py of its eval_tool, as it is in zjunlp/Deco at fee8d75.
BY_MMES_SCRIPT = [71.428571, 78.571429, 71.428571, 78.571429, 42.857143, 21.428571, 64.285714, 35.714286, 35.714286, 42.857143]


def test_mme_as_its_own_script_has_it(tmp_path):
    """lmms-eval, which takes full stops away and reads "y" as a yes, would count other answers."""
    questions, texts = made_up_mme(tmp_path)
    measured = MEASURES["mme"](questions, said(questions, texts), tmp_path)
    scores = [measures.mme_score(measured.rows[measured.rows[:, 0] == n]) for n in range(len(measures.PERCEPTION))]
    assert scores == pytest.approx(BY_MMES_SCRIPT) and len({round(score) for score in scores}) > 5
    assert measured.result(measured.rows) == pytest.approx(sum(BY_MMES_SCRIPT))


def made_up_mme(folder):
    """Questions about seven pictures of each subtask, and answers of all kinds to them."""
    questions, texts = [], []
    for s, subtask in enumerate(measures.PERCEPTION):
        (folder / subtask).mkdir()
        for p in range(7):
            lines = [f"Is it {colour}? Please answer yes or no.\t{truth}\n" for colour, truth in (("red", "Yes"), ("blue", "No"))]
            (folder / subtask / f"{p}.txt").write_text("".join(lines))
            for q, colour in enumerate(("red", "blue")):
                prompt = f"Is it {colour}?\n{WORD}"
                questions.append(Question(f"{subtask}/{p}.jpg", prompt, [], prompt))
                texts.append(SAID[(s * s + 5 * p + (s + 1) * q) % len(SAID)])
    return questions, texts


def test_the_interval_holds_the_result():
    rows = np.array([1.0] * 60 + [0.0] * 40)
    low, high = interval(measures.Measured(rows, measures.mean_percent))
    assert 48 < low < 55 and 65 < high < 72  # 60 ± 1.96 · √(0.6 · 0.4 / 100)


def test_a_row_of_the_table(tmp_path, monkeypatch, capsys):
    questions = write_lines(tmp_path / "q.jsonl", [{"question_id": str(n), "image": "x", "text": "Who?"} for n in range(2)])
    settings = {"checkpoint": "0123", "dtype": "float16", "prompt": "USER: … ASSISTANT:"}
    answers = said(read_questions(questions), ["A", "B"])
    write_lines(tmp_path / "a.jsonl", [answer | {"metadata": settings} for answer in answers])
    write(tmp_path / "seed.json", {"questions": [{"question_id": n, "answer": "A"} for n in range(2)]})
    arguments = ["--score", "seed", "--questions", "q.jsonl", "--answers", "a.jsonl", "--annotations", "seed.json"]
    run(monkeypatch, tmp_path, arguments)
    row = capsys.readouterr().out.splitlines()[2]
    assert row.startswith("| seed | 50.0 | 0.0 … 100.0 | 58.6, 61.6 |") and "0123 | float16" in row
    write_lines(tmp_path / "a.jsonl", answers[:1])
    assert "holds 1 answers to 2 questions" in stopped(monkeypatch, tmp_path, arguments)
    assert "needs --annotations" in stopped(monkeypatch, tmp_path, arguments[:-2])


def test_submissions(tmp_path, monkeypatch):
    write_lines(tmp_path / "q.jsonl", [{"question_id": 3, "image": "p.jpg", "text": "Who?"}])
    write_lines(tmp_path / "a.jsonl", said(read_questions(tmp_path / "q.jsonl"), ["The Two"]))
    wanted = {"vqav2": [{"question_id": 3, "answer": "2"}], "vizwiz": [{"image": "p.jpg", "answer": "2"}], "mmvet": {"v1_3": "The Two"}}
    for name, content in wanted.items():
        run(monkeypatch, tmp_path, ["--submit", name, "--questions", "q.jsonl", "--answers", "a.jsonl", "--out", "up.json"])
        assert json.loads((tmp_path / "up.json").read_text()) == content


def test_pictures_are_opened_upright():
    assert open_image("tiny/example.png").size == Question(1, "", ["example.png"], "").pictures("tiny")[0].size


def test_the_adapter_of_the_page(monkeypatch, chat):
    """The adapter for lmms-eval in docs/evaluate.md, with stand-ins for lmms-eval's class and requests."""

    class Base:
        def __init__(self):
            self.task_dict = {"task": {"test": [{"picture": Image.open("tiny/example.png")}]}}

    module = types.ModuleType("lmms_eval.api.model")
    module.lmms = Base
    for name in ("lmms_eval", "lmms_eval.api"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "lmms_eval.api.model", module)
    code = (ROOT / "docs/evaluate.md").read_text(encoding="utf-8").split("```py\n")[1].split("```")[0]
    names = {}
    exec(code, names)
    model = names["LlavaPy"]("tiny/llava", device="cpu", batch_size="2")
    asked = [("<image>\nWhat is this?", 8), ("Describe it.", 8), ("What is this?", 4)]
    requests = [
        types.SimpleNamespace(args=(text, {"max_new_tokens": length}, lambda document: [document["picture"]], 0, "task", "test"))
        for text, length in asked
    ]
    answers = model.generate_until(requests)
    assert len(answers) == 3 and answers[0].startswith(answers[2]) and all(answers)
    assert len(code.splitlines()) <= 60
