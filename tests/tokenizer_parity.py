"""Our Tokenizer against transformers' on 20,000 random strings and 20,000 random id lists: as it reads the folder, and as it reads
tokenizer.json alone.

`python -m tests.tokenizer_parity [FOLDER]`: a checkpoint's folder, or the tests' small model. Needs transformers.
"""

import random
import shutil
import sys
import tempfile
from pathlib import Path

from transformers import AutoTokenizer

from tests.make_tokenizer import FOLDER, random_ids, random_text
from tokenizer import Tokenizer


def main(folder):
    theirs = AutoTokenizer.from_pretrained(folder)
    failed = compare(Tokenizer.from_pretrained(folder), theirs)
    with tempfile.TemporaryDirectory() as alone:
        shutil.copyfile(Path(folder) / "tokenizer.json", Path(alone) / "tokenizer.json")
        print("tokenizer.json alone")
        failed |= compare(Tokenizer.from_pretrained(alone), theirs)
    return int(failed)


def compare(ours, theirs):
    """Print what differs; whether anything does."""
    size, space, source = len(ours.model), ours.model.piece_to_id("▁"), random.Random(0)
    reference = lambda ids: theirs.decode(ids, skip_special_tokens=True)
    texts = [random_text(source) for _ in range(20000)]
    lists = [random_ids(source, size + 2, space) for _ in range(20000)]  # 2: <image> and <pad>; ids without a token are ours to show
    failed = False
    for what, inputs, our, their in (
        ("texts encoded", texts, ours.encode, lambda text: theirs(text).input_ids),
        ("their ids decoded", [ours.encode(text) for text in texts], ours.decode, reference),
        ("random ids decoded", lists, ours.decode, reference),
    ):
        mismatches = [(x, our(x), their(x)) for x in inputs if our(x) != their(x)]
        print(f"{what}: {len(inputs)}, {len(mismatches)} mismatches")
        for x, a, b in mismatches[:5]:
            print(f"  {x!r}\n    ours   {a!r}\n    theirs {b!r}")
        failed |= bool(mismatches)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else FOLDER))
