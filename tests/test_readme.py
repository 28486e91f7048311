"""The README is true: its file table, its quoted outputs, its files and its accuracy table."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from safetensors.torch import load_file

from bench.__main__ import as_markdown as speed_table
from bench.memory import training_memory
from bench.shapes import write_configs
from tiny.grade import as_markdown
from tiny.world import QUESTIONS, example, make_scene
from weights.config import LlavaConfig

README = Path("README.md").read_text(encoding="utf-8")
FILES = re.findall(r"^\| `([\w/]+\.py)` \| .+ \|$", README, re.M)
OUTPUTS = [
    (command, output)
    for block in re.findall(r"^```console\n(.*?)^```", README, re.M | re.S)
    for command, output in re.findall(r"^\$ python (.+)\n((?:(?!\$ ).*\n)+)", block, re.M)
]


def test_there_is_something_to_check():
    assert len(FILES) >= 9 and len(OUTPUTS) >= 3


def test_every_file_is_in_the_table():
    assert {file for file in FILES if "/" not in file} == {path.name for path in Path(".").glob("*.py")}
    assert all(Path(file).is_file() for file in FILES)


@pytest.mark.parametrize("command, output", OUTPUTS)
def test_quoted_outputs(command, output):
    done = subprocess.run([sys.executable, *shlex.split(command)], capture_output=True, text=True, timeout=120)
    assert done.stdout == output


def test_python_runs(tmp_path, monkeypatch, pytestconfig):
    (tmp_path / "tiny").symlink_to(pytestconfig.rootpath / "tiny")
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in re.findall(r"^```python\n(.*?)^```", README, re.M | re.S):
        exec(code, names)
    assert names["to_picture"].shape[1:] == (8, 8) and names["to_picture"].sum() > 0
    base, whole = (load_file(folder / "model.safetensors") for folder in (tmp_path / "base", pytestconfig.rootpath / "tiny" / "llava"))
    assert {name for name in whole if not base[name].equal(whole[name])} == {name for name in whole if "projector" in name}


def test_question_examples_are_questions_of_the_world():
    examples = re.findall(r'"([^"]+)"', re.search(r"of which these are examples: (.*?)\n\n", README, re.S)[1].replace("\n", " "))
    asked = set()
    for n in range(4000):
        random = Random(n)
        for kind, ask in QUESTIONS.items():
            if turn := ask(example()[0] if n % 2 else make_scene(random), random):
                asked.add((kind, turn[0]))
    kinds = [kind for example in examples for kind, question in asked if question == example]
    assert sorted(kinds) == sorted(QUESTIONS)


def test_linked_files_exist(pytestconfig):
    links = re.findall(r"\]\((?!http|#)([^)]+)\)", README)
    assert links and all((pytestconfig.rootpath / link).exists() for link in links)


def test_the_reading_guide_names_what_is_there():
    named = 0
    for row in re.findall(r"^\| .* \| (.*) \|$", Path("lessons/reading.md").read_text(encoding="utf-8"), re.M):
        for file, names in re.findall(r"`([\w/]+\.py)`((?:[^`]*`(?![\w/]+\.py)[^`]+`)*)", row):
            code = Path(file).read_text(encoding="utf-8")
            for name in re.findall(r"`([^`]+)`", names):
                if not name.startswith("torch."):
                    for part in name.split("."):
                        assert re.search(rf"^ *(def|class) {part}\b", code, re.M), (file, name)
                    named += 1
    assert named > 35


def test_requirements_are_the_packages_that_the_readme_names():
    names = {line.split("==")[0] for line in Path("requirements.txt").read_text().split()}
    named = set(re.search(r"`pip install ([\w ]+)` is all that is missing", README)[1].split())
    assert names == named | {"torch", "pytest", "pytest-xdist"}


def test_accuracy_tables_are_the_recorded_ones():
    for file in ("tiny/accuracy.json", "tiny/vip-accuracy.json"):
        for name, rows in json.loads(Path(file).read_text()).items():
            assert as_markdown(name, rows) in README


@pytest.mark.parametrize("record", sorted(Path("bench").glob("cpu-*.json")), ids=str)
def test_speed_tables_are_the_recorded_ones(record):
    record = json.loads(record.read_text())
    if "figures" in record:
        assert speed_table(record) in README


def test_the_memory_of_training_is_what_its_table_says(tmp_path):
    write_configs("7b", tmp_path)
    held, _, peak = training_memory(LlavaConfig.from_pretrained(tmp_path), stage=2, checkpointed=True, rows=8, tokens=640)
    wanted = ("| peak in GB", "| 7B, stage 2, ch")
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in README.splitlines() if row.startswith(wanted)]
    columns = dict(zip(*rows, strict=True))
    assert (columns["held"], columns["8 × 640"]) == (f"{held / 1e9:.0f}", f"{peak / 1e9:.0f}")
