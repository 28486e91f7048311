"""The rooms and the arrows between them: what a file imports of ours, and what it must not."""

import ast
from pathlib import Path

import pytest

# Of each room the rooms that it may import. A folder is one room; within it imports are free, but never in a circle.
ALONE = ("opening", "marks", "vocabulary", "clip", "llama", "hardware")
MAY = {room: set() for room in ALONE}
MAY["images"] = {"opening"}
MAY["tokenizer"] = {"vocabulary"}
MAY["inputs"] = {"tokenizer"}
MAY["weights"] = {"clip", "llama", "hardware"}
MAY["generate"] = {"llama", "inputs", "hardware"}
MAY["llava"] = {"clip", "llama", "inputs", "generate", "weights"}
MAY["batch"] = {"llama", "generate", "hardware"}
MAY["questions"] = {"batch", "inputs", "tokenizer"}
BOOK = {*MAY}
MAY["chat"] = MAY["training"] = BOOK
MAY["converse"] = BOOK | {"chat"}
MAY["loading"] = BOOK | {"chat", "training"}
MAY["benchmarks"] = {"images", "marks"}
COMMANDS = ("sample", "train", "convert", "evaluate")
for command in COMMANDS:
    MAY[command] = BOOK | {"chat", "training"}
MAY["sample"] |= {"converse", "loading"}
MAY["evaluate"] |= {"benchmarks", "loading"}
MAY["visitors"] = BOOK | {"chat", "converse"}
MAY["explanation"] = BOOK
MAY["demo"] = BOOK | {"converse", "explanation", "loading", "sample", "visitors"}
ROOMS = {*MAY}
MAY["tiny"] = ROOMS
MAY["lessons"] = MAY["bench"] = ROOMS | {"tiny"}
OPTIONAL = {"transformers", "peft", "huggingface_hub", "matplotlib", "torchvision", "accelerate", "openpyxl", "numba"}
OPTIONAL |= {"starlette", "uvicorn"}

FILES = [path for path in Path(".").glob("*.py")] + [path for room in MAY for path in Path(room).rglob("*.py")]
MODULES = {".".join(path.with_suffix("").parts): path for path in FILES}


def imports(path, nested=True):
    """The full names of all modules that a file imports; of `from a import b` both a and a.b."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree) if nested else tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_room_has_its_arrows():
    rooms = {path.parts[0].removesuffix(".py") for path in FILES}
    folders = {path.parts[0] for path in Path(".").glob("*/*.py")} - {"tests"}
    assert rooms == {*MAY} and folders <= rooms, "a new room: say here what it may import"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_run_one_way(path):
    room = path.parts[0].removesuffix(".py")
    imported = {name.split(".")[0] for name in imports(path)} & {*MAY, "tests"}
    assert imported - {room} <= MAY[room]


def test_no_circle():
    arrows = {name: imports(path) & {*MODULES} - {name} for name, path in MODULES.items()}
    while leaves := {name for name, targets in arrows.items() if not targets}:
        arrows = {name: targets - leaves for name, targets in arrows.items() if name not in leaves}
    assert not arrows


@pytest.mark.parametrize("path", [path for path in FILES if path.parts[0] != "bench" and path.stem != "kernels"], ids=str)
def test_optional_packages_are_imported_where_they_are_used(path):
    assert not {name.split(".")[0] for name in imports(path, nested=False)} & (OPTIONAL | {"tests"})
