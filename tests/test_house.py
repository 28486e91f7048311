"""The rooms and the arrows between them: what a file imports of ours, and what it must not."""

import ast
from pathlib import Path

import pytest

ALONE = ("images", "tokenizer", "clip", "llama", "checkpoint", "device", "marks", "quantize")
MAY = {name: set() for name in ALONE} | {
    "config": {"clip", "llama", "checkpoint", "quantize"},
    "generate": {"llama"},
    "inputs": {"tokenizer"},
    "llava": {"clip", "llama", "config", "checkpoint", "generate", "quantize", "inputs"},
    "lora": {"llava", "checkpoint", "config"},
    "chat": {"llava", "images", "tokenizer", "llama", "checkpoint", "generate"},
    "parallel": {"device"},
    "memory": {"device", "llava", "quantize"},
}
ABOVE = {"sample", "train", "lessons", "bench", "tiny"}  # nothing that the model is made of imports these
OURS = {path.stem for path in Path(".").glob("*.py")} | ABOVE | {"tests"}
OPTIONAL = {"transformers", "peft", "huggingface_hub", "matplotlib", "torchvision", "accelerate"}


def imports(path, nested=True):
    """The first parts of the names of all modules that a file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if nested else tree.body
    names = [
        [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
        for node in nodes
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    return {name.split(".")[0] for group in names for name in group}


def test_every_room_has_its_arrows():
    assert OURS - ABOVE - {"tests"} == {*MAY}, "a new file: say here what it may import"


@pytest.mark.parametrize("room", MAY)
def test_imports_run_one_way(room):
    command = room == "quantize"  # its main() is a room above
    assert imports(Path(f"{room}.py"), nested=not command) & OURS <= MAY[room]


@pytest.mark.parametrize(
    "path", [path for path in Path(".").glob("*.py")] + [*Path("tiny").glob("*.py"), *Path("lessons").glob("*.py")], ids=str
)
def test_optional_packages_are_imported_where_they_are_used(path):
    assert not imports(path, nested=False) & (OPTIONAL | {"tests"})
