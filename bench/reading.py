"""How long train.py takes to read many conversations, and the memory that it takes: made-up ones, as long as those of LLaVA's
instruction mix (some 390 tokens, in five exchanges).

    python -m bench.reading                              # 100,000 of them, with tiny/llava's tokenizer
    python -m bench.reading --tokenizer DIR --count 10000
"""

import argparse
import json
import os
import random
import tempfile
import time
from functools import partial
from pathlib import Path

from bench.parallel import peak
from hardware.processes import Alone
from tokenizer import Tokenizer
from training.data import Encoder, conversations, encode_conversation

WORDS = "the picture shows a man in front of an old house with two dogs beside him while children play on the green grass".split()


def write(path, count, words=25, exchanges=5):
    """A data file of `count` conversations: questions of a third and answers of twice as many words as `words`."""
    draw = random.Random(0)
    say = lambda length: " ".join(draw.choices(WORDS, k=length)).capitalize() + "."
    with open(path, "w") as file:
        for n in range(count):
            turns = []
            for _ in range(exchanges):
                turns += [{"from": "human", "value": say(words // 3)}, {"from": "gpt", "value": say(words * 2)}]
            turns[0]["value"] = "<image>\n" + turns[0]["value"]
            file.write("[,"[n > 0] + json.dumps({"id": n, "image": "a.png", "conversations": turns}) + "\n")
        file.write("]")


def processor_time():
    """Seconds that processors have worked for this process and for those that it has started, once they have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--tokenizer", default="tiny/llava", help="folder of a checkpoint")
    args = parser.parse_args()
    tokenizer = Tokenizer.from_pretrained(args.tokenizer)
    encoder = Encoder(partial(encode_conversation, tokenizer=tokenizer, style="llava"), tokenizer.image_id, 2048, 576)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write(folder / "data.json", args.count)
        (folder / "a.png").symlink_to(Path("tiny/example.png").absolute())
        before, start, worked = peak(), time.perf_counter(), processor_time()
        data = conversations(folder / "data.json", folder, encoder, {}, folder / "state", Alone())
        seconds, worked, tokens = time.perf_counter() - start, processor_time() - worked, len(data.tokens)
        size = (folder / "data.json").stat().st_size
        print(f"{args.count:,} conversations, {size / 1e6:.0f} MB of JSON, {tokens / args.count:.0f} tokens each")
        print(f"{seconds:.0f} s, in which {os.cpu_count()} processors worked {worked:.0f} s")
        print(f"at most {peak() / 1e6:.0f} MB of memory, {before / 1e6:.0f} MB of them before; {8 * tokens / 1e6:.0f} MB on disk")


if __name__ == "__main__":
    main()
