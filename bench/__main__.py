"""Ours beside transformers, measured in one run and in alternation, and both beside what the machine can do.

    python -m bench                                                         # the bundled model in float32
    python -m bench --shape 1b --dtype bfloat16 --json bench/cpu-1b.json    # also record the figures
    python -m bench --shape 1b --dtype bfloat16 --curves --json bench/cpu-1b-curves.json
    python -m bench --shape 1b --dtype bfloat16 --quantize int8 int4 "int4, compiled" --peers "torchao int8" "bitsandbytes int4"
    python -m bench --shape 1b --dtype float32 --stored bfloat16 --json bench/cpu-1b-float32.json
    python -m bench --shape 1b --dtype bfloat16 --quantize int8 int4 --peers "llama.cpp BF16" "llama.cpp Q8_0" "llama.cpp Q4_0" \\
        --llama-bench llama.cpp/build/bin/llama-bench
    python -m bench --shape 7b --dtype bfloat16 --load                      # loading alone, one library after the other

Each library runs in a process of its own and waits while another is timed. transformers is used as a newcomer would:
`from_pretrained`, a processor, `generate` with its default settings; on a GPU also with its static cache, which compiles.
Needs `pip install transformers==5.23.0`, and for --peers accelerate, torchao and bitsandbytes, or gguf and a llama.cpp.
"""

import argparse
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from bench import llama_cpp
from bench.limits import decode_bytes, matrix_throughput, prefill_operations, read_bandwidth
from bench.shapes import SHAPES, checkpoint_of
from bench.worker import LIBRARIES, PEERS, PICTURE, QUESTION, SECOND, prompt
from hardware.device import choose_device
from llava import Llava
from tokenizer import Tokenizer
from weights.config import LlavaConfig
from weights.load import outline
from weights.quantize import GROUPS

NEW_TOKENS, WORDS = 64, 64
SCHEMES = [*GROUPS, *(f"{scheme}, compiled" for scheme in GROUPS)]
SPEED = "decode, 1 row, tokens/s"
CONTEXTS, BATCHES = (64, 128, 256, 512, 1024, 2048, 4096), (1, 2, 4, 8, 16, 32)


class Worker:
    """A library at work in its own process."""

    def __init__(self, library, folder, device, dtype):
        command = [sys.executable, "-m", "bench.worker", library, str(folder), device, dtype]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.load, self.loaded = self._reply()

    def _reply(self):
        for line in self.process.stdout:
            if line.startswith('{"reply"'):
                return json.loads(line)["reply"]
        raise SystemExit(f"bench: a worker has ended with status {self.process.wait()}; what it said stands above")

    def __call__(self, do, **values):
        self.process.stdin.write(json.dumps({"do": do, **values}) + "\n")
        self.process.stdin.flush()
        return self._reply()

    def close(self):
        self.process.communicate()  # the end of its input ends it


def in_turn(runs, repeats, bar):
    """Each of the runs {name: function that gives numbers}, one after the other, again and again: {name: their medians}."""
    results = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            results[name].append(run())
            bar.update()
    return {name: [statistics.median(values) for values in zip(*results[name])] for name in runs}


def process_start(library, folder, device, dtype):
    """Seconds from the start of a process to the end of an answer of one token."""
    if library == "ours":
        command = [
            "sample.py",
            "--model",
            folder,
            "--image",
            PICTURE,
            "--device",
            device,
            "--dtype",
            dtype,
            "--max-new-tokens",
            "1",
            QUESTION,
        ]
    else:
        command = ["-m", "bench.newcomer", folder, PICTURE, device, dtype, QUESTION]
    start = time.perf_counter()
    subprocess.run([sys.executable, *map(str, command)], check=True, capture_output=True)
    return [time.perf_counter() - start]


def count_weights(config):
    """How many weights a decode step reads, those of vision tower and projector, and all of them."""
    with torch.device("meta"):
        model = Llava(config)
    count = lambda module: sum(parameter.numel() for parameter in module.parameters())
    text = count(model.language_model) - (0 if config.text.tie_word_embeddings else count(model.language_model.embed_tokens))
    return {"text": text, "vision": count(model.vision_tower), "projector": count(model.projector), "all": count(model)}


def bytes_saved(config, library, size, stored):
    """How many bytes less than in `size` bytes a weight a decode step of this library reads: in its scheme, or as they are stored."""
    scheme = next((word for word in library.split(", ") if word in GROUPS), None)
    if scheme is None and not library.startswith("ours"):
        return 0
    layers = outline(Llava, config).language_model.modules()
    plain = sum(layer.weight.numel() for layer in layers if isinstance(layer, torch.nn.Linear))
    if scheme is None:
        return plain * (size - stored)
    model = outline(Llava, config, scheme)
    return plain * size - sum(buffer.nbytes for buffer in model.buffers())


def measure(folder, device, dtype, repeats, schemes, peers, stored, others):
    """The figures {name: {library: value}}, of those that have a physical limit {name: limit}, and what the machine can do.

    stored: bytes of a weight in the checkpoint; others: {name: function (context) -> tokens a second}, of what is no worker.
    """
    config, name = LlavaConfig.from_pretrained(folder), str(dtype)[6:]
    tokenizer = Tokenizer.from_pretrained(folder)
    first = len(tokenizer.encode(prompt())) - 1 + config.features_per_image  # tokens of the first turn
    second = len(tokenizer.encode(SECOND)) + 12  # and the marks of the turns
    libraries = [*list(LIBRARIES)[: 4 if device.startswith("cuda") else 3], *(f"ours, {scheme}" for scheme in schemes), *peers]
    bar = tqdm(total=4 * repeats + 2 * len(libraries) * (repeats + 1), desc="measuring", unit="run")
    begin = in_turn({lib: lambda lib=lib: process_start(lib, folder, device, name) for lib in ("ours", "transformers")}, repeats, bar)
    workers = {lib: Worker(lib, folder, device, name) for lib in libraries}
    elsewhere = in_turn({name: lambda run=run: [run(first)] for name, run in others.items()}, repeats if others else 0, bar)
    one_row = generations(workers, 1, 0, repeats, bar)  # with a picture
    eight_rows = generations(workers, 8, WORDS, repeats, bar)  # of text alone
    turns = second_turns(workers, repeats, bar)
    figures = {
        "process start to first token, s": {lib: values[0] for lib, values in begin.items()},
        "load, s": {lib: worker.load for lib, worker in workers.items()},
        "first token, ms": {lib: 1e3 * values[0] for lib, values in one_row.items()},
        "second turn's first token, ms": {lib: 1e3 * values[1] for lib, values in turns.items()},
        SPEED: {lib: 1 / values[1] for lib, values in one_row.items()},
        "decode, 8 rows of text, tokens/s": {lib: 8 / values[1] for lib, values in eight_rows.items()},
        "peak memory, GB": {lib: worker("memory")[0] / 1e9 for lib, worker in workers.items()},
    }
    for worker in workers.values():
        worker.close()
    bar.close()
    limits, bandwidth, throughput = physical_limits(config, device, dtype, stored, first, second)
    speeds = reading_speeds(config, dtype, stored, first, {lib: values[1] for lib, values in one_row.items() if lib not in PEERS})
    figures[SPEED] |= {name: values[0] for name, values in elsewhere.items()}
    figures["decode, 1 row, GB/s"] = {lib: speed / 1e9 for lib, speed in speeds.items()}
    figures["of what the machine reads, %"] = {lib: 100 * speed / bandwidth for lib, speed in speeds.items()}
    return figures, limits, {"reads, GB/s": bandwidth / 1e9, "multiplies, TFLOP/s": throughput / 1e12}


def generations(workers, batch, length, repeats, bar):
    """{library: (seconds to the first token, seconds of each further one)}. length: of a prompt of text alone; 0: with the picture."""
    runs = {lib: partial(worker, "generate", batch=batch, length=length, tokens=NEW_TOKENS) for lib, worker in workers.items()}
    in_turn(runs, 1, bar)  # to warm up, and to compile
    return in_turn(runs, repeats, bar)


def second_turns(workers, repeats, bar):
    """{library: (seconds to the first token of the first turn, and of the second)}; transformers reads our first answer."""
    answer = workers["ours"]("turns")[2]
    runs = {
        "ours": lambda: workers["ours"]("turns")[:2],
        "transformers": lambda: workers["transformers"]("turns", answer=answer),
    }
    return in_turn(runs, repeats, bar)


def reading_speeds(config, dtype, stored, first, seconds):
    """{library: bytes that it reads in a second}. seconds: {library: those of a decode step after a prompt of `first` tokens}."""
    size = decode_bytes(config, count_weights(config), 1, first + NEW_TOKENS / 2, dtype)
    return {lib: (size - bytes_saved(config, lib, dtype.itemsize, stored)) / each for lib, each in seconds.items()}


def physical_limits(config, device, dtype, stored, first, second):
    """Of those figures that have one {name: limit}; and the bytes that the machine reads and the operations that it does in a second.

    first, second: tokens of the first turn and of the second.
    """
    weights, size = count_weights(config), dtype.itemsize
    bandwidth = read_bandwidth(torch.device(device), weights["text"] * stored)
    throughput = matrix_throughput(torch.device(device), dtype)
    saved = bytes_saved(config, "ours", size, stored)
    reading = lambda rows, prompt=first: (decode_bytes(config, weights, rows, prompt + NEW_TOKENS / 2, dtype) - saved) / bandwidth
    operations = lambda rows: 2 * weights["text"] * rows / throughput
    limits = {
        "first token, ms": 1e3 * prefill_operations(config, weights, 1, 0, first) / throughput,
        "second turn's first token, ms": 1e3 * max(prefill_operations(config, weights, 0, first, second) / throughput, reading(1)),
        SPEED: 1 / max(reading(1), operations(1)),
        "decode, 8 rows of text, tokens/s": 8 / max(reading(8, WORDS), operations(8)),
        "peak memory, GB": weights["all"] * size / 1e9,
    }
    return limits, bandwidth, throughput


def measure_loading(folder, device, dtype, repeats, schemes, peers):
    """Loading and a first word, for models of which only one fits the memory at a time. Mapped weights are read for the word."""
    columns = ("load, s", "peak memory while loading, GB", "first token of 64, s", "peak memory, GB")
    values = {lib: [] for lib in ("ours", "transformers", *(f"ours, {scheme}" for scheme in schemes), *peers)}
    with tqdm(total=len(values) * repeats, desc="loading", unit="run") as bar:
        for _ in range(repeats):
            for lib in values:
                worker = Worker(lib, folder, device, str(dtype)[6:])
                first, _ = worker("generate", batch=1, length=WORDS, tokens=1)
                values[lib].append((worker.load, worker.loaded / 1e9, first, worker("memory")[0] / 1e9))
                worker.close()
                bar.update()
    medians = {lib: [statistics.median(column) for column in zip(*rows)] for lib, rows in values.items()}
    figures = {name: {lib: row[k] for lib, row in medians.items()} for k, name in enumerate(columns)}
    return figures, {}, {}


def measure_curves(folder, device, dtype, repeats):
    """How the cost grows: {curve: {library: [(x, value), …]}}."""
    limit = LlavaConfig.from_pretrained(folder).text.max_position_embeddings
    workers = {lib: Worker(lib, folder, device, str(dtype)[6:]) for lib in ("ours", "transformers")}
    contexts = [n for n in CONTEXTS if n + 16 < limit]
    bar = tqdm(total=2 * (repeats + 1) * (len(contexts) + len(BATCHES)), desc="measuring", unit="run")
    curves = {name: {lib: [] for lib in workers} for name in ("prefill, s", "decode, ms a token", "throughput, tokens/s")}

    def generate(**values):
        runs = {lib: lambda worker=worker: worker("generate", tokens=16, **values) for lib, worker in workers.items()}
        in_turn(runs, 1, bar)
        return in_turn(runs, repeats, bar).items()

    for n in contexts:
        for lib, (first, each) in generate(batch=1, length=n):
            curves["prefill, s"][lib].append((n, first))
            curves["decode, ms a token"][lib].append((n, 1e3 * each))
    for batch in BATCHES:
        for lib, (_, each) in generate(batch=batch, length=64):
            curves["throughput, tokens/s"][lib].append((batch, batch / each))
    for worker in workers.values():
        worker.close()
    bar.close()
    return curves


def as_markdown(record):
    """The table of a record: ours beside transformers, and how much of the limit ours reaches; if there are quantised ones, those
    beside the plain, a row for each library."""
    figures, limits = record["figures"], record["limits"]
    libraries = list(dict.fromkeys(lib for values in figures.values() for lib in values))
    if set(libraries) <= set(list(LIBRARIES)[:4]):
        cells = [["", *libraries, "ours ÷ transformers", "limit", "reached"]]
        for name, values in figures.items():
            limit, own = limits.get(name), values["ours"]
            row = [f"{values[lib]:.3g}" if lib in values else "" for lib in libraries] + [f"{own / values['transformers']:.2f}"]
            reached = "" if limit is None else own / limit if name.endswith("/s") else limit / own
            cells.append([name, *row, "" if limit is None else f"{limit:.3g}", reached and f"{100 * reached:.0f} %"])
    else:
        decode = figures.get(SPEED, {})
        cells = [["", *figures, *(["times transformers'"] if decode else [])]]
        for lib in libraries:
            row = [f"{values[lib]:.3g}" if lib in values else "" for values in figures.values()]
            cells.append([lib, *row, *([f"{decode[lib] / decode['transformers']:.2f}"] if decode else [])])
    cells.insert(1, ["---"] * len(cells[0]))
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def processor_name():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [line.split(": ")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{len(names)} cores of {names[0]}" if names else platform.processor()


def cpu_kind():
    """What of the CPU decides which kernels run: the instructions that PyTorch uses, and whether numba is there."""
    numba = "with numba" if importlib.util.find_spec("numba") else "without numba"
    return f"{torch.backends.cpu.get_cpu_capability()} {numba}, {torch.get_num_threads()} threads"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="tiny", choices=("tiny", *SHAPES))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--stored", choices=("float32", "bfloat16", "float16"), help="the type of the checkpoint's weights [--dtype]")
    parser.add_argument("--quantize", nargs="+", default=[], choices=SCHEMES, help="ours in these schemes, too")
    parser.add_argument("--peers", nargs="+", default=[], choices=[*PEERS, *llama_cpp.PEERS], help="other libraries")
    parser.add_argument("--llama-bench", type=Path, metavar="PATH", help="the program of llama.cpp, for its --peers")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--load", action="store_true", help="loading alone")
    parser.add_argument("--curves", action="store_true", help="how the cost grows with context and batch")
    parser.add_argument("--json", type=Path, help="also write the record here")
    args = parser.parse_args()
    if importlib.util.find_spec("transformers") is None:
        sys.exit("bench: transformers is not installed, and this measures ours beside it: pip install transformers==5.23.0")

    peers = [name for name in args.peers if name in PEERS]
    others = [name for name in args.peers if name in llama_cpp.PEERS]
    if others and (args.llama_bench is None or args.shape == "tiny" or args.load or args.curves):
        sys.exit("bench: llama.cpp is measured decoding a shape of random weights: give --shape 1b and --llama-bench PATH")

    device, dtype = choose_device(args.device), getattr(torch, args.dtype)
    stored = getattr(torch, args.stored or args.dtype)
    folder = checkpoint_of(args.shape, stored)
    record = dict(shape=args.shape, dtype=args.dtype, device=device, machine=processor_name(), torch=torch.__version__)
    if device == "cpu":
        record["cpu"] = cpu_kind()
    if args.curves:
        record["curves"] = measure_curves(folder, device, dtype, args.repeats)
        for name, curve in record["curves"].items():
            print(name, *(f"  {lib}: " + ", ".join(f"{x}: {value:.3g}" for x, value in points) for lib, points in curve.items()), sep="\n")
    else:
        if args.load:
            results = measure_loading(folder, device, dtype, args.repeats, args.quantize, peers)
        else:
            runs = llama_cpp.runs(args.llama_bench, args.shape, others)
            results = measure(folder, device, dtype, args.repeats, args.quantize, peers, stored.itemsize, runs)
        record["figures"], record["limits"], record["measured limits"] = results
        limits = ", ".join(f"{name} {value:.3g}" for name, value in record["measured limits"].items())
        print(f"{args.shape} in {args.dtype} on {record['machine']}, {record.get('cpu', '')} {limits}", as_markdown(record), sep="\n")
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
