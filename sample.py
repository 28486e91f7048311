"""Ask a picture a question.

    python sample.py                                              # the bundled picture, question and model
    python sample.py --image photo.jpg "What is in this picture?" --model llava-hf/llava-1.5-7b-hf
    python sample.py --image photo.jpg --model … --chat           # several turns; Ctrl-D or Ctrl-C leaves
    python sample.py --image photo.jpg --model llava-hf/vip-llava-7b-hf --mark "red rectangle 40,30,120,110" "What is {mark}?"

The answer, and nothing else, goes to standard output; what is loaded, timings and errors go to standard error.
"""

import argparse
import io
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image

from chat import Chat
from hardware.device import WORKSPACE, choose_device, choose_dtype, free_memory
from hardware.processes import are_several
from hardware.step import compiled
from images import open_image
from llava import Llava
from marks import draw_marks, parse_mark, refer
from training.lora import load_adapter, refuse_merged
from weights.checkpoint import checkpoint_folder
from weights.config import LlavaConfig
from weights.load import outline, suit
from weights.memory import cache_bytes, size, weight_bytes, worth_copying
from weights.quantize import GROUPS

HERE = Path(__file__).parent
BUNDLED_MODEL, BUNDLED_PICTURE = HERE / "tiny" / "llava", HERE / "tiny" / "example.png"
QUESTION = "Describe the picture."


def argument_parser(command, description):
    """The arguments, also those of the lessons that look at the answering of a question."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, usage=f"{command} [options] [QUESTION]"
    )
    parser.error = fail  # one line, without the usage
    parser.add_argument("question", nargs="?", metavar="QUESTION", help=f'the question; "-" reads it from standard input ["{QUESTION}"]')
    parser.add_argument("--model", help="checkpoint folder, or name on the Hugging Face hub [the bundled tiny/llava]")
    parser.add_argument("--adapter", metavar="DIR", help="what train.py --lora made for this model, or PEFT")
    parser.add_argument(
        "--image",
        action="append",
        metavar="FILE",
        help="a picture; may be repeated [the bundled one, if the model is too or nothing is asked]",
    )
    parser.add_argument(
        "--mark", action="append", default=[], metavar="MARK",
        help='draw "[colour] kind x,y,…" on the picture; {mark} in the question becomes the words for it; '
        "may be repeated, then {mark1}, {mark2} …",
    )  # fmt: skip
    parser.add_argument("--save-marked", metavar="FILE", help="also save the marked picture")
    parser.add_argument("--chat", action="store_true", help='go on asking: one question a line; "/mark MARK" adds a mark')
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="length of an answer at the most [512]")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0: the likeliest word each time; higher: more varied [0]"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens only (at a temperature above 0)")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="draw from the likeliest tokens that together have probability P (likewise)"
    )
    parser.add_argument("--seed", type=int, help="makes the draws repeatable")
    parser.add_argument("--system", metavar="TEXT", help="a system sentence in place of the model's own")
    parser.add_argument("--device", default="auto", help="cuda (or cuda:1 …), mps or cpu [the first of them that is there]")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="[what is fast on the device]")
    parser.add_argument("--quantize", choices=GROUPS, help="the language model's weights in 8 or 4 bits, made while loading [as stored]")
    parser.add_argument(
        "--compile", action="store_true", help="compile the decode step first: up to about a minute, then more tokens a second"
    )
    parser.add_argument("--pad", action="store_true", help="pad pictures to a square instead of cropping them")
    parser.add_argument("--show-prompt", action="store_true", help="also print the exact prompt and its ids to standard error")
    return parser


def fail(message):
    """A user's mistake: one line on standard error, exit status 2."""
    print(f"{Path(sys.argv[0]).name}: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


def advice(error):
    """What to do about an error of PyTorch's that comes from what this machine has or lacks; any other is raised again."""
    text = str(error)
    if "C++ compiler" in text or "C compiler" in text:  # the CPU's compiler, and Triton's for a GPU
        return "--compile needs a C++ compiler (g++, clang++), on a GPU a C compiler (gcc), and there is none; leave it out"
    # A GPU's torch.OutOfMemoryError and the CPU allocator's are RuntimeErrors; cuBLAS has words of its own.
    if isinstance(error, MemoryError) or "memory" in text or "ALLOC_FAILED" in text:
        return "the device ran out of memory; use a 16-bit --dtype, fewer pictures or --device cpu"
    raise error


def load(args, pictures, processes=None):
    """The chat, after one line that says what it will take, and an error if the device has not got it."""
    folder = checkpoint_folder(BUNDLED_MODEL if args.model is None else args.model)
    config = LlavaConfig.from_pretrained(folder)
    parameters = sum(parameter.numel() for parameter in outline(Llava, config).parameters())
    device = choose_device(args.device) if processes is None else processes.device(args.device)
    dtype = choose_dtype(device, parameters) if args.dtype == "auto" else getattr(torch, args.dtype)

    scheme = args.quantize or config.quantized
    if processes is not None and (args.compile or args.adapter is not None or scheme is not None):
        raise ValueError("--compile, --adapter and quantised weights are for one process; convert.py makes a checkpoint for several")
    weights = weight_bytes(outline(Llava, config, scheme), dtype)
    shares = 1 if processes is None else processes.size
    most = config.text.max_position_embeddings
    tokens = min(most, pictures * config.features_per_image + len(args.question or "") + args.max_new_tokens)
    cache = cache_bytes(config, dtype, tokens)
    shared = "" if processes is None else f", shared by {shares} processes"
    caches = (
        f"{size(cache)} of cache for {tokens} tokens"
        + f", {size(cache_bytes(config, dtype, most))} for {most} at the end of a chat" * args.chat
        + shared
    )
    print(
        f"{args.model or 'tiny/llava, which knows drawn shapes only'}: {parameters / 1e6:,.1f} M parameters "
        f"on {device} in {scheme or str(dtype)[6:]}, {size(weights)} of weights and {caches}",
        file=sys.stderr,
    )
    free, held = free_memory(device), 1 if device == "cpu" else 1 / shares  # what is free on a CPU is free for all of them
    needed = (weights + cache) * held + (WORKSPACE if device.startswith("cuda") else 0)
    if free is not None and needed > free:
        if weights * held < free:
            hint = "use a smaller --max-new-tokens"
        else:
            hint = smaller(config, dtype, scheme, free) if processes is None else "use more processes, on more GPUs" * (device != "cpu")
            hint = hint or "use a smaller model" + " or --device cpu" * (device != "cpu")
        raise ValueError(f"{device} has {size(free)} free, {size(needed)} are needed; {hint}")
    if processes is None:
        chat = Chat.from_pretrained(folder, device, dtype, args.quantize, mapped=not worth_copying(parameters * dtype.itemsize))
    else:
        from weights.shares import split  # here for the same reason as Processes below

        chat = Chat.from_pretrained(folder)
        split(chat.model, processes.mesh(device), device, dtype)
        suit(chat.model)
    if args.adapter is not None:
        load_adapter(chat.model, args.adapter)
        refuse_merged(folder, args.adapter)
    chat.system, chat.pad = args.system, args.pad
    if args.compile:
        chat.model.decode_step = compiled(chat.model.decode_step, device)
    return chat


def smaller(config, dtype, scheme, free):
    """The options with which the weights would fit, the least change first; None if there are none."""
    dtypes = {"": dtype} | ({"--dtype bfloat16": torch.bfloat16} if dtype == torch.float32 else {})
    schemes = {"": scheme} | ({"--quantize int8": "int8", "--quantize int4": "int4"} if scheme is None else {})
    for s, name in schemes.items():
        for d, other in dtypes.items():
            try:
                fits = weight_bytes(outline(Llava, config, name), other) < free
            except ValueError:  # its layers cannot have this scheme
                continue
            if fits:
                return "use " + " ".join(option for option in (d, s) if option)
    return None


def answer(chat, args, question, images):
    """Print one answer as it comes, then how long it took."""
    if args.show_prompt:
        prompt = chat.prompt(question, images)
        print(f"{prompt!r}\n{chat.tokenizer.encode(prompt)}", file=sys.stderr)
    start, first = time.perf_counter(), None
    for piece in chat.ask(question, images, args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed):
        first = first or time.perf_counter() - start
        print(piece, end="", flush=True)
    print(flush=True)
    if first is not None:
        print(f"first word after {first:.2f} s, whole answer {time.perf_counter() - start:.2f} s", file=sys.stderr)


def mark(images, marks, file):
    """The pictures with the marks on them, also saved if `file` is given. Raises ValueError unless there is just one picture."""
    if len(images) != 1:
        raise ValueError(f"a mark is for one picture, and there are {len(images)}")
    marked = draw_marks(images[0], marks)
    if file is not None:
        encoded = io.BytesIO()  # first in memory: what cannot be written leaves the file as it was
        try:
            marked.save(encoded, Image.registered_extensions()[Path(file).suffix.lower()])
        except Exception as error:  # each of Pillow's writers fails in its own way
            raise ValueError(f"--save-marked {file!r}: cannot be written ({error!r}); try a name that ends in .png") from None
        Path(file).write_bytes(encoded.getvalue())
    return [marked]


def converse(chat, args, images, marks):
    """Question after question until the input ends. A question that cannot be asked is reported, and the chat goes on.

    "/mark" makes a new picture of the last one, and the next question brings it into the conversation.
    """
    status, question, picture = 0, args.question, images
    while True:
        if question is None:
            print("> ", end="", file=sys.stderr, flush=True)
            try:
                question = input().strip()
            except EOFError:
                print(file=sys.stderr)
                return status
        if question:
            try:
                if question.startswith("/"):
                    command, *rest = question.split(None, 1)
                    if command != "/mark":
                        raise ValueError(f'{command!r} is no command; there is "/mark red rectangle 40,30,120,110"')
                    added = parse_mark("".join(rest))
                    images = picture = mark(picture, [added], args.save_marked)
                    marks = [*marks, added]
                else:
                    answer(chat, args, refer(question, marks), images)
                    images = []  # they belong to the conversation now
            except (ValueError, OSError, RuntimeError, MemoryError) as error:
                if are_several() and not isinstance(error, ValueError):
                    raise  # it is this process's own, and the others wait for it
                hint = error if isinstance(error, ValueError | OSError) else f"{advice(error)}; or ask something shorter"
                print(f"sample.py: {hint}", file=sys.stderr)
                status = 2
        question = None


def ask(chat, args, images, marks):
    if not args.chat:
        answer(chat, args, args.question, images)
    elif status := converse(chat, args, images, marks):
        sys.exit(status)


class Heard:
    """Standard input of several processes: what the first one reads, all of them get."""

    def __init__(self, processes, stdin):
        self.heard, self.stdin = processes.heard, stdin

    def readline(self):
        return self.heard(self.stdin.readline)

    def read(self):
        return self.heard(self.stdin.read)


def hear_together(processes):
    """Give all processes what the first one reads, and a seed: without --seed too they draw the same tokens."""
    sys.stdin = Heard(processes, sys.stdin)
    torch.manual_seed(int(processes.heard(lambda: str(torch.seed()))))


def run(parser, use):
    """Read the arguments, open the pictures, load the model and call use(chat, args, images, marks); every mistake of the
    user's is one line and exit status 2."""
    for stream, way in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, stream) is None:  # closed by whoever started us
            setattr(sys, stream, open(os.devnull, way))
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows "?"
    processes = None
    if are_several():
        from hardware.parallel import Processes  # here, because it takes longer to import than all else

        processes = Processes()
        processes.silence_others()
        hear_together(processes)
        parser.error = processes.fail
    args = parser.parse_args()
    try:
        if args.question == "-":
            args.question = sys.stdin.read().strip()
        nothing_asked = args.question is None and not args.chat
        if nothing_asked:
            args.question = QUESTION
        if args.question == "":
            raise ValueError("the question is empty")
        files = args.image or ([BUNDLED_PICTURE] if nothing_asked or args.model is None else [])  # else text alone
        images, marks = [open_image(file) for file in files], [parse_mark(text) for text in args.mark]
        if not images:
            print("no --image is given: the model answers from the text alone", file=sys.stderr)
        if marks:
            images = mark(images, marks, args.save_marked)
        elif args.save_marked is not None and not args.chat:
            raise ValueError("--save-marked: there is no --mark")
        if args.question:
            args.question = refer(args.question, marks)
        use(load(args, len(images), processes), args, images, marks)
        if processes is not None:
            dist.destroy_process_group()
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # whoever read the answer has seen enough
            sys.stderr.close()
            sys.exit(0)
        parser.error(error)
    except (RuntimeError, MemoryError) as error:
        parser.error(advice(error) if processes is None else error)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(0 if args.chat else 130)


def main():
    run(argument_parser("python sample.py", __doc__), ask)


if __name__ == "__main__":
    main()
