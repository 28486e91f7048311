"""Each benchmark's own measure, on its own annotation files.

A measure takes the questions, the answers to them, and where the annotations are. It gives a Measured: one row of numbers for each
question (or picture), and how they make the result, so that the same function makes the result of any sample of the rows.
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.questions import LETTERS, WORD, read_json, read_lines


class Measured(NamedTuple):
    rows: np.ndarray  # (N, …), of N questions, or of N pictures where a picture's questions count together
    result: object  # a function of such rows: the number in the paper's table
    unreadable: int = 0  # answers that are none of those that were asked for


def mean_percent(rows):
    return 100 * rows.mean()


def interval(measured, draws=1000, seed=0):
    """Between which numbers the result lies in 95 % of samples of as many rows, drawn with replacement (the bootstrap)."""
    random, n = np.random.default_rng(seed), len(measured.rows)
    results = [measured.result(measured.rows[random.integers(0, n, n)]) for _ in range(draws)]
    return np.percentile(results, [2.5, 97.5])


# POPE


def says_no(text):
    """Its first sentence, without commas, has the word "No", "no" or "not"; whatever else it says is a yes."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return any(word in words for word in ("No", "not", "no"))


def f1(rows):
    """The mean over the splits, in per cent. rows: (split, says yes, is yes)."""
    scores = []
    for split in np.unique(rows[:, 0]):
        said, true = rows[rows[:, 0] == split, 1:].T
        found = (said * true).sum()
        scores.append(200 * found / max(said.sum() + true.sum(), 1))  # 2PR / (P + R)
    return float(np.mean(scores))


def pope(questions, answers, annotations):
    """annotations: a folder with coco_pope_random.json, coco_pope_popular.json and coco_pope_adversarial.json.

    The n-th answer of a split belongs to the n-th label of its file: the files have other ids than the questions.
    """
    rows, unreadable = [], 0
    splits = sorted({str(question.category) for question in questions})
    there = sorted(path.stem.removeprefix("coco_pope_") for path in Path(annotations).glob("coco_pope_*.json"))
    if splits != there:
        raise ValueError(f"{annotations} has labels of POPE's splits {there}; the questions are of {splits}")
    for number, split in enumerate(splits):
        labels = [line["label"] for line in read_lines(Path(annotations) / f"coco_pope_{split}.json")]
        said = [answer["text"] for question, answer in zip(questions, answers) if question.category == split]
        if len(said) != len(labels):
            raise ValueError(f"POPE's split {split} has {len(labels)} labels and {len(said)} answers")
        for text, label in zip(said, labels):
            rows.append((number, not says_no(text), label != "no"))
            unreadable += re.search(r"\b(yes|no|not)\b", text, re.IGNORECASE) is None
    return Measured(np.array(rows, float), f1, unreadable)


# TextVQA

# The words whose apostrophe the measure puts back, wherever one is missing. "somebody'd" it takes away.
APOSTROPHES = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
CONTRACTIONS = {word[:n] + word[n + 1 :]: word for word in APOSTROPHES for n in range(len(word)) if word[n] == "'"}
CONTRACTIONS["somebody'd"] = "somebodyd"
NUMBERS = {word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine ten".split())} | {"none": "0"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


def normalised(answer):
    """An answer as VQA's server compares it: lower case, no articles, digits for numbers, without most punctuation."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    found, between_digits = text, re.search(r"(?<=\d),+(?=\d)", text) is not None
    for mark in PUNCTUATION:
        at_a_word = f"{mark} " in found or f" {mark}" in found
        text = text.replace(mark, "" if at_a_word or between_digits else " ")
    text = re.sub(r"\.(?!\d)", "", text, count=32)  # 32, because the server's script passes a flag where the count belongs
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def soft_accuracy(said, truths):
    """min(n / 3, 1), n of the truths being what was said, each of ten left out once."""
    matches = sum(truth == said for truth in truths)
    return sum(min(1, (matches - (truth == said)) / 3) for truth in truths) / len(truths) if matches else 0.0


def textvqa_question(prompt):
    """The question in a prompt, which may have a line of OCR tokens before or after it."""
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        found = re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL)
        return found[1].lower() if found else None
    if len(lines) == 3 and lines[0].startswith("Reference OCR token:"):
        return lines[1].lower()
    return lines[0].lower() if len(lines) == 2 or len(lines) == 3 and "Reference OCR token: " in prompt else None


def textvqa(questions, answers, annotations):
    """annotations: TextVQA_0.5.1_val.json. A question is found by its picture and its own words."""
    truths = {(one["image_id"], one["question"].lower()): one["answers"] for one in read_json(annotations)["data"]}
    scores = []
    for question, answer in zip(questions, answers):
        key = (question.id, textvqa_question(question.prompt))
        if key not in truths:
            raise ValueError(f"TextVQA's annotations have no question {key[1]!r} about the picture {key[0]!r}")
        scores.append(soft_accuracy(normalised(answer["text"]), [normalised(truth) for truth in truths[key]]))
    return Measured(np.array(scores), mean_percent)


# A letter, a word


def scienceqa(questions, answers, annotations):
    """annotations: a folder with problems.json and pid_splits.json. Counted are the questions of the test split with a picture, which
    have "<image>" in their prompt."""
    problems, wanted = read_json(Path(annotations) / "problems.json"), set(read_json(Path(annotations) / "pid_splits.json")["test"])
    if missing := wanted - {question.id for question in questions}:
        raise ValueError(f"{len(missing)} questions of ScienceQA's test split have no answer, {min(missing)!r} first")
    right, unreadable = [], 0
    for question, answer in zip(questions, answers):
        if question.id in wanted and "<image>" in question.prompt:
            letter, problem = chosen_letter(answer["text"]), problems[question.id]
            number = LETTERS.find(letter) if letter else -1
            unreadable += not 0 <= number < len(problem["choices"])
            right.append(number == problem["answer"])
    return Measured(np.array(right, float), mean_percent, unreadable)


def chosen_letter(text):
    """The letter of an answer: "B", "B. …" or, once, "The answer is B."; None if there is none."""
    if text in LETTERS and len(text) == 1:
        return text
    if text[:1] in LETTERS and text[1:3] == ". " and len(text) >= 3:
        return text[0]
    found = re.findall(r"The answer is ([A-Z]).", text)
    return found[0] if len(found) == 1 and found[0] in LETTERS else None


def gqa(questions, answers, annotations):
    """annotations: testdev_balanced_questions.json."""
    truths = {str(key): value["answer"] for key, value in read_json(annotations).items()}
    if len(truths) != len(questions):
        raise ValueError(f"GQA's annotations have {len(truths)} questions, {len(questions)} were asked")
    right = [answer["text"].rstrip(".").lower() == known(truths, str(question.id)) for question, answer in zip(questions, answers)]
    return Measured(np.array(right, float), mean_percent)


def seed(questions, answers, annotations):
    """annotations: SEED-Bench.json. The letter alone counts, as it stands."""
    truths = {str(one["question_id"]): one["answer"] for one in read_json(annotations)["questions"]}
    if len(truths) != len(questions):
        raise ValueError(f"SEED-Bench's annotations have {len(truths)} questions, {len(questions)} were asked")
    right = [answer["text"] == known(truths, str(question.id)) for question, answer in zip(questions, answers)]
    return Measured(np.array(right, float), mean_percent, sum(answer["text"] not in ("A", "B", "C", "D") for answer in answers))


def known(truths, key):
    if key not in truths:
        raise ValueError(f"the annotations have no question {key!r}")
    return truths[key]


def exact(questions, answers, annotations=None):
    """Visual7W and PointQA: the file of questions holds the true answers."""
    if missing := [question.id for question in questions if question.truth is None]:
        raise ValueError(f"{len(missing)} questions have no true answer beside them, {missing[0]!r} first; give ViP-LLaVA's own file")
    right = [answer["text"].lower() == question.truth.lower() for question, answer in zip(questions, answers)]
    return Measured(np.array(right, float), mean_percent)


# MME

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")


def mme_answer(text):
    """ "yes", "no", or None: read in the first four letters."""
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else None


def mme_score(rows):
    """Of each subtask 100 · (accuracy + accuracy of pictures whose two questions are both right), summed. rows: (subtask, right, right)."""
    total = 0.0
    for subtask in np.unique(rows[:, 0]):
        right = rows[rows[:, 0] == subtask, 1:]
        total += 100 * (right.mean() + right.all(1).mean())
    return float(total)


def mme(questions, answers, annotations):
    """annotations: MME_Benchmark_release_version. Its texts lie beside the pictures or in questions_answers_YN: a question and its answer
    a line. Counted are the ten subtasks of perception."""
    pictures, unreadable = {}, 0
    for question, answer in zip(questions, answers):
        subtask, name = str(question.id).split("/")[0], str(question.id).split("/")[-1].rpartition(".")[0]
        if subtask not in PERCEPTION:
            continue
        truth, said = mme_truth(Path(annotations) / subtask, name, question.prompt), mme_answer(answer["text"])
        unreadable += said is None
        pictures.setdefault((subtask, name), []).append(said == truth)
    for (subtask, name), right in pictures.items():
        if len(right) != 2:
            raise ValueError(f"MME has two questions about each picture; {subtask}/{name} has {len(right)} answers")
    if missing := [subtask for subtask in PERCEPTION if subtask not in {key[0] for key in pictures}]:
        raise ValueError(f"MME's subtask {missing[0]!r} has no answers")
    rows = [(PERCEPTION.index(subtask), *right) for (subtask, _), right in pictures.items()]
    return Measured(np.array(rows, float), mme_score, unreadable)


def mme_truth(folder, name, prompt):
    """The answer in the text file of a picture, to the line that asks what the prompt does."""
    asked = " ".join(prompt.replace(WORD, "").split())
    asked = asked.removesuffix("Please answer yes or no.").strip()
    path = folder / "questions_answers_YN" / f"{name}.txt"
    path = path if path.is_file() else folder / f"{name}.txt"
    for line in path.read_text(encoding="utf-8").splitlines():
        question, _, truth = line.partition("\t")
        if " ".join(question.split()).removesuffix("Please answer yes or no.").strip() == asked:
            return truth.strip().lower()
    raise ValueError(f"{path} has no question {asked!r}")


MEASURES = {
    "pope": pope,
    "textvqa": textvqa,
    "scienceqa": scienceqa,
    "gqa": gqa,
    "mme": mme,
    "seed": seed,
    "v7w": exact,
    "pointqa": exact,
}
# What the papers say: LLaVA-1.5 7B, 13B (Liu et al. 2023, https://arxiv.org/abs/2310.03744), ViP-LLaVA 7B, 13B (Cai et al. 2024,
# https://arxiv.org/abs/2312.00784); ViP's SEED is of its pictures alone.
PUBLISHED = {
    "pope": (85.9, 85.9, 87.1, 87.4),
    "textvqa": (58.2, 61.3, 57.8, 59.6),
    "scienceqa": (66.8, 71.6, 69.5, 70.0),
    "gqa": (62.0, 63.3, 62.2, 62.9),
    "mme": (1510.7, 1531.3, 1453.5, 1564.0),
    "seed": (58.6, 61.6, 69.0, 70.7),
    "v7w": (None, None, 86.6, 87.9),
    "pointqa": (None, None, 71.3, 71.8),
}
