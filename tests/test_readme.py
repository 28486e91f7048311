"""The pages are true: README.md and docs/. Commands and their options, quoted outputs, files, functions, links, line counts and tables.

python -m tests.test_readme      # writes the line counts of the README anew
"""

import ast
import contextlib
import io
import json
import re
import runpy
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from pkgutil import resolve_name
from random import Random

import pytest
from safetensors.torch import load_file

from bench.__main__ import as_markdown as speed_table
from bench.memory import training_memory
from bench.shapes import write_configs
from tiny.grade import as_markdown
from tiny.world import QUESTIONS, example, make_scene
from tokenizer import Tokenizer
from training.data import encode_conversation
from weights.config import LlavaConfig

ROOT = Path(__file__).parent.parent
PAGES = {path: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]}
README = PAGES[ROOT / "README.md"]
ALL = "\n".join(PAGES.values())
ROOMS = [path.name for path in ROOT.iterdir() if path.is_dir() and [*path.glob("*.py"), *path.glob("*.md")] and path.name[0] != "."]
NAMED = [
    (page, span)
    for page, text in PAGES.items()
    for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"```.*?```", "", text, flags=re.S))
]
BLOCKS = [(page, kind, block) for page, text in PAGES.items() for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)]
ENDINGS = (
    ".py",
    ".md",
    ".json",
    ".jsonl",
    ".js",
    ".html",
    ".png",
    ".ipynb",
    ".sh",
    ".model",
    ".safetensors",
    ".zip",
    ".tsv",
)  # a file, not a function
OUTPUTS = [
    (command, output)
    for _, kind, block in BLOCKS
    if kind == "console"
    for command, output in re.findall(r"^\$ python (.+)\n((?:(?!\$ ).*\n)+)", block, re.M)
]


def name(value):
    return value.stem if isinstance(value, Path) else None


def test_there_is_something_to_check():
    assert len(PAGES) >= 11 and len(OUTPUTS) >= 6 and len(NAMED) > 300 and len(COMMANDS) > 50


# Numbers of lines


def with_line_counts(text):
    """The README with the true number of lines of each file in the table of the reading order."""
    row = re.compile(r"^(\| \d+ \| `(\w+\.py)` \| )\d+( \|)", re.M)
    return row.sub(lambda found: f"{found[1]}{len((ROOT / found[2]).read_text(encoding='utf-8').splitlines())}{found[3]}", text)


def test_line_counts():
    for said, true in zip(README.splitlines(), with_line_counts(README).splitlines()):
        assert said == true, "python -m tests.test_readme writes the right number"
    assert len(README.splitlines()) <= 170


# Files, functions, links


def test_every_file_and_room_is_in_the_readme():
    spans = {span for page, span in NAMED if page.name == "README.md"}
    assert {path.name for path in ROOT.glob("*.py")} <= spans
    assert {f"{room}/" for room in ROOMS} <= spans


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_exist(page):
    for span in [span for where, span in NAMED if where == page]:
        of_ours = span.split("/")[0] in ROOMS and "/" in span or re.fullmatch(r"[\w/-]+\.(py|md|ipynb|sh)", span)
        if of_ours and " " not in span:
            assert list(ROOT.glob(span.rstrip("/"))), span


@cache
def names_of_classes():
    """{class: the names in its body}, of all classes of ours."""
    classes = {}
    for path in [*ROOT.glob("*.py"), *(path for room in ROOMS for path in ROOT.glob(f"{room}/*.py"))]:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                functions = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
                fields = {item.target.id for item in node.body if isinstance(item, ast.AnnAssign)}
                classes.setdefault(node.name, set()).update(functions | fields)
    return classes


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_functions_exist(page):
    classes = names_of_classes()
    spans = [span for where, span in NAMED if where == page]
    spans += re.findall(
        r"\b(?:images|clip|tokenizer|llava|llama|Llama)\.\w+", "".join(b for where, _, b in BLOCKS if where == page and "│" in b)
    )
    for span in spans:
        if re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", span) and not span.endswith(ENDINGS):
            first, *rest = span.split(".")
            if first in classes:
                assert rest[0] in classes[first], span
            else:
                resolve_name(span)  # an ImportError or AttributeError says what there is not


def anchors(text):
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!http)([^)\s]+)\)", PAGES[page])
    assert links or page.stem == "glossary"
    for link in links:
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name == "docs"], ids=name)
def test_a_page_begins_with_its_command_and_is_in_the_readme(page):
    assert re.match(r"# .+\n\n```(console)?\n(\$ )?(python|make|torchrun|pip) ", PAGES[page])
    assert f"(docs/{page.name})" in README


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem != "untested"], ids=name)
def test_what_was_never_tested_is_on_one_page(page):
    for paragraph in re.split(r"\n\n|\n(?=\| )", PAGES[page]):
        words = " ".join(paragraph.replace("[", "").split())
        if re.search(r"(?i)\b(not|never)( yet| been)* (tested|tried|run|measured)\b", words):
            assert "untested.md" in paragraph, words


def test_the_reading_guide_names_what_is_there():
    named = 0
    for row in re.findall(r"^\| .* \| (.*) \|$", Path("lessons/reading.md").read_text(encoding="utf-8"), re.M):
        for file, names in re.findall(r"`([\w/]+\.py)`((?:[^`]*`(?![\w/]+\.py)[^`]+`)*)", row):
            code = Path(file).read_text(encoding="utf-8")
            for of_file in re.findall(r"`([^`]+)`", names):
                if not of_file.startswith("torch."):
                    for part in of_file.split("."):
                        assert re.search(rf"^ *(def|class) {part}\b", code, re.M), (file, of_file)
                    named += 1
    assert named > 35


# Commands


def commands():
    """[(page, words)] of every command line that a page shows, in a block or within a sentence."""
    found = []
    for page, kind, block in BLOCKS:
        if kind in ("", "console"):
            found += [(page, line.removeprefix("$ ")) for line in block.replace("\\\n", " ").splitlines()]
    found += NAMED
    lines = [(page, line) for page, line in found if re.match(r"(python|make|torchrun|pytest|sh) ", line)]
    return [(page, shlex.split(line, comments=True)) for page, line in lines]


COMMANDS = commands()


@cache
def help_of(command):
    """What `python COMMAND --help` prints; command: "sample.py" or "-m bench"."""
    module = ROOT / command.removeprefix("-m ").replace(".", "/")
    script = next(path for path in (ROOT / command, module.with_suffix(".py"), module / "__main__.py") if path.is_file())
    printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    argv, sys.argv = sys.argv, [command, "--help"]
    try:
        with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
            runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv = argv
    printed.flush()
    return printed.buffer.getvalue().decode()


def check_options(command, words):
    options = [word.partition("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word)]
    for option in options:
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", help_of(command)), f"{command} has no {option}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_exist(page):
    targets = set(re.findall(r"^([\w-]+):", Path("Makefile").read_text(), re.M))
    for program, *words in [words for where, words in COMMANDS if where == page]:
        if program == "make":
            assert {word for word in words if "=" not in word} <= targets, words
        elif program in ("pytest", "sh"):
            assert Path(words[-1]).exists(), words
        elif program == "torchrun":
            script = next(word for word in words if word.endswith(".py"))
            check_options(script, words[words.index(script) + 1 :])
        elif words[0] != "-m":
            assert Path(words[0]).is_file(), words
            check_options(words[0], words[1:])
        elif words[1] != "pytest":
            module = Path(words[1].replace(".", "/"))
            assert module.with_suffix(".py").is_file() or (module / "__main__.py").is_file(), words
            check_options(f"-m {words[1]}", words[2:])


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_options_that_are_spoken_of_exist(page):
    spoken = [word for where, span in NAMED if where == page and span.startswith("--") for word in span.split() if word.startswith("--")]
    helps = (
        "".join(map(help_of, ("sample.py", "train.py", "evaluate.py", "convert.py", "-m bench", "-m lessons.page"))) + " --nproc-per-node "
    )
    for option in spoken:
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", helps), option


@pytest.mark.parametrize("command, output", OUTPUTS)
def test_quoted_outputs(command, output):
    done = subprocess.run([sys.executable, *shlex.split(command)], capture_output=True, text=True, timeout=120)
    assert done.stdout == output


@pytest.mark.parametrize("page", dict.fromkeys(page for page, kind, _ in BLOCKS if kind == "python"), ids=name)
def test_python_runs(page, tmp_path, monkeypatch):
    (tmp_path / "tiny").symlink_to(ROOT / "tiny")
    monkeypatch.chdir(tmp_path)
    names = {}
    for _, code in [(kind, block) for where, kind, block in BLOCKS if where == page and kind == "python"]:
        exec(code, names)
    if page.stem == "README":
        assert names["to_picture"].shape[1:] == (8, 8) and names["to_picture"].sum() > 0
    if page.stem == "vip":
        assert names["question"] == "What is pointed to by the red arrow?"
    if page.stem == "finetune":
        base, whole = (load_file(folder / "model.safetensors") for folder in (tmp_path / "base", ROOT / "tiny" / "llava"))
        assert {name for name in whole if not base[name].equal(whole[name])} == {name for name in whole if "projector" in name}


def test_requirements_are_the_packages_that_the_readme_names():
    names = {line.split("==")[0] for line in Path("requirements.txt").read_text().split()}
    named = set(re.search(r"`pip install ([\w ]+)` is all that is missing", README)[1].split())
    assert names == named | {"torch", "pytest", "pytest-xdist"}


def test_conversations_are_in_the_format_that_is_trained():
    tokenizer = Tokenizer.from_pretrained("tiny/llava")
    records = [record for _, kind, block in BLOCKS if kind == "json" for record in json.loads(block)]
    assert records and all(encode_conversation(record, tokenizer, "llava")[0].count(tokenizer.image_id) == 1 for record in records)


def test_question_examples_are_questions_of_the_world():
    examples = re.findall(r'"([^"]+)"', re.search(r"which these are examples: (.*?)\n\n", ALL, re.S)[1].replace("\n", " "))
    scene, kinds, n = example()[0], set(), 0
    while len(kinds) < len(examples) and n < 4000:
        random = Random(n)
        for kind, ask in QUESTIONS.items():
            turn = ask(scene if n % 2 else make_scene(random), random)
            if turn and turn[0] in examples:
                kinds.add((kind, turn[0]))
        n += 1
    assert sorted(kind for kind, _ in kinds) == sorted(QUESTIONS)


# Tables


@pytest.mark.parametrize("file", ["tiny/accuracy.json", "tiny/vip-accuracy.json"])
def test_accuracy_tables_are_the_recorded_ones(file):
    for kind, rows in json.loads(Path(file).read_text()).items():
        assert ALL.count(as_markdown(kind, rows)) == 1


@pytest.mark.parametrize("record", sorted(Path("bench").glob("cpu-*.json")), ids=str)
def test_speed_tables_are_the_recorded_ones(record):
    record = json.loads(record.read_text())
    if "figures" in record:
        assert ALL.count(speed_table(record)) == 1


def test_the_pointing_table_is_the_recorded_one():
    record = json.loads(Path("lessons/pointing.json").read_text())
    trained, shuffled = (record[kind]["shares"] for kind in ("trained", "shuffled"))
    for way, (hits, _) in trained.items():
        assert ALL.count(f"| {way} | {100 * hits:.1f} % | {100 * shuffled[way][0]:.1f} % |") == 1


def test_the_memory_of_training_is_what_its_table_says(tmp_path):
    write_configs("7b", tmp_path)
    held, _, peak = training_memory(LlavaConfig.from_pretrained(tmp_path), stage=2, checkpointed=True, rows=8, tokens=640)
    wanted = ("| peak in GB", "| 7B, stage 2, ch")
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in ALL.splitlines() if row.startswith(wanted)]
    columns = dict(zip(*rows, strict=True))
    assert (columns["held"], columns["8 × 640"]) == (f"{held / 1e9:.0f}", f"{peak / 1e9:.0f}")


def test_the_recipe_fits_the_card_that_stands_beside_it():
    recipe = next(words for page, words in COMMANDS if page.stem == "finetune" and "--quantize" in words)
    rows = re.findall(
        r"^\| (\d+) GB \| \d+ bits \| `(.+)` \| (\d) × .+\n\| \| \| \| \3 × 2,048 \| ([\d.]+) GB \|", PAGES[ROOT / "docs/finetune.md"], re.M
    )
    assert [card for card, *_ in rows] == ["12", "24"]
    for card, options, batch, peak in rows:
        assert f"--batch-size {batch}" in options and float(peak) < 0.9 * int(card)
    assert rows[0][1] in " ".join([*recipe[recipe.index("--quantize") :][:2], *recipe[recipe.index("--batch-size") :][:4]])


if __name__ == "__main__":
    (ROOT / "README.md").write_text(with_line_counts(README), encoding="utf-8")
