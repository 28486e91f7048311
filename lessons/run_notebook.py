"""Run the walkthrough from top to bottom and compare what it gives with the outputs that are stored in it.

    python -m lessons.run_notebook            # needs lessons/requirements.txt
    python -m lessons.run_notebook --write    # store the new outputs instead

Words must be equal and numbers nearly so; of a figure it is only asked that there is one. A cell's metadata may hold a `tolerance`:
how far its numbers may be off, as a part of the larger one. From 2 on anything goes: that is for what takes time.
"""

import argparse
import re
import sys
import time
from pathlib import Path

NOTEBOOK = Path(__file__).parent / "walkthrough.ipynb"
TOLERANCE, SMALL = 0.02, 0.005  # of numbers: relative, and absolute
NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?(?![\w])")
OPTIONAL = "lessons.run_notebook needs what lessons/requirements.txt lists: pip install -r lessons/requirements.txt"


def output_of(cell):
    """A cell's text, streams and results together, and how many figures it shows."""
    texts, figures = [], 0
    for output in cell["outputs"]:
        data = output.get("data", {})
        figures += "image/png" in data
        text = output.get("text", "" if "image/png" in data else data.get("text/plain", ""))
        texts.append(text if isinstance(text, str) else "".join(text))
    return "".join(texts), figures


def close(stored, new, tolerance):
    """Whether two texts have the same words, and numbers that are close."""
    if NUMBER.sub("#", stored).split() != NUMBER.sub("#", new).split():
        return False
    pairs = zip(map(float, NUMBER.findall(stored)), map(float, NUMBER.findall(new)), strict=True)
    return all(abs(a - b) <= max(SMALL, tolerance * max(abs(a), abs(b))) for a, b in pairs)


def differences(stored, new):
    """Where two runs of one notebook differ: a text for each such cell. stored, new: its cells."""
    found = []
    for n, (before, after) in enumerate(zip(stored, new, strict=True), 1):
        if before["cell_type"] != "code":
            continue
        (text, figures), (new_text, new_figures) = output_of(before), output_of(after)
        if not close(text, new_text, before["metadata"].get("tolerance", TOLERANCE)):
            found.append(f"cell {n} is stored with\n{text}\nand now gives\n{new_text}")
        if figures != new_figures:
            found.append(f"cell {n} is stored with {figures} figures and now gives {new_figures}")
    return found


def run(notebook):
    """Execute a notebook's cells in place, in a kernel that starts in this folder, as Jupyter starts one."""
    from nbclient import NotebookClient

    NotebookClient(notebook, timeout=None, startup_timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()


def bare(notebook):
    """Leave away what tells of the machine and the moment: when a cell ran, and on which Python."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    notebook.metadata = {name: notebook.metadata[name] for name in ("kernelspec",)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="store the new outputs")
    args = parser.parse_args()
    try:
        import nbformat
        from nbclient.exceptions import CellExecutionError
    except ImportError:
        sys.exit(OPTIONAL)
    stored, new = (nbformat.read(NOTEBOOK, as_version=4) for _ in range(2))
    start = time.perf_counter()
    try:
        run(new)
    except CellExecutionError as error:
        sys.exit(f"a cell of {NOTEBOOK.name} fails:\n{error}")
    print(f"{NOTEBOOK.name} ran in {time.perf_counter() - start:.0f} s")
    if args.write:
        bare(new)
        nbformat.write(new, NOTEBOOK)
    elif found := differences(stored.cells, new.cells):
        sys.exit("\n\n".join(found) + "\n\nIf that is right, store it: python -m lessons.run_notebook --write")
    else:
        print("every output is the stored one")


if __name__ == "__main__":
    main()
