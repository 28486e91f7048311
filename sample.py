"""Ask a picture a question.

    python sample.py                                              # the bundled picture, question and model
    python sample.py --image photo.jpg "What is in this picture?" --model llava-hf/llava-1.5-7b-hf
    python sample.py --image photo.jpg --model … --chat           # several turns; Ctrl-D or Ctrl-C leaves
    python sample.py --image photo.jpg --model llava-hf/vip-llava-7b-hf --mark "red rectangle 40,30,120,110" "What is {mark}?"

The answer, and nothing else, goes to standard output; what is loaded, timings and errors go to standard error.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from chat import Chat
from converse import advice, answer, converse, mark, names_a_picture, open_picture, read_question
from hardware.device import WORKSPACE, choose_device, choose_dtype, free_memory
from hardware.processes import are_several
from hardware.step import compiled
from llava import Llava
from marks import parse_mark, refer
from tokenizer import STYLES
from training.lora import load_adapter, refuse_merged
from weights.checkpoint import checkpoint_folder
from weights.config import LlavaConfig
from weights.load import loaded_bytes, outline, suit
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
    add = parser.add_argument
    add("question", nargs="?", metavar="QUESTION", help=f'the question; "-" reads it from standard input ["{QUESTION}"]')
    add(
        "--image", action="append", nargs="+", default=[], metavar="FILE",
        help="pictures: files, http(s):// addresses, or - for standard input [the bundled one, if the model is too or nothing is asked]",
    )  # fmt: skip
    add(
        "--mark", action="append", default=[], metavar="MARK",
        help='draw "[colour] kind x,y,…" on the picture; {mark} in the question becomes the words for it; '
        "may be repeated, then {mark1}, {mark2} …",
    )  # fmt: skip
    add("--save-marked", metavar="FILE", help="also save the marked picture")
    add("--chat", action="store_true", help='go on asking: one question a line; "/help" lists what else there is')
    add("--max-new-tokens", type=int, default=512, metavar="N", help="length of an answer at the most [512]")
    add("--temperature", type=float, default=0.0, metavar="T", help="0: the likeliest word each time; higher: more varied [0]")
    add("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens only (at a temperature above 0)")
    add("--top-p", type=float, metavar="P", help="draw from the likeliest tokens that together have probability P (likewise)")
    add("--repetition-penalty", type=float, default=1.0, metavar="P", help="above 1: repeat less; 1.2 is much already [1]")
    add("--seed", type=int, help="makes the draws repeatable")
    add("--system", metavar="TEXT", help="a system sentence in place of the format's own")
    add("--pad", action=argparse.BooleanOptionalAction, help="pad pictures to a square, or crop them [as config.json says; else crop]")
    add("--show-prompt", action="store_true", help="also print the exact prompt and its ids to standard error")
    add_loading_options(parser, "tiny/llava")
    return parser


def add_loading_options(parser, bundled):
    """The arguments that say which model `load` loads, and how: demo.py's, too. bundled: the name of the one that needs no --model."""
    add = parser.add_argument_group("the model").add_argument
    add("--model", help=f"checkpoint folder, or name on the Hugging Face hub [the bundled {bundled}]")
    add("--adapter", metavar="DIR", help="what train.py --lora made for this model, or PEFT")
    add("--style", choices=STYLES, help="the chat format [the model's own]")
    add("--device", default="auto", help="cuda (or cuda:1 …), mps or cpu [the first of them that is there]")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="[what is fast on the device]")
    add("--quantize", choices=GROUPS, help="the language model's weights in 8 or 4 bits, made while loading [as stored]")
    add("--compile", action="store_true", help="compile the decode step first: up to about a minute, then more tokens a second")
    add("--scale-grey", action="store_true", help="make 8 bits of greyscale pictures that have more, by the range of their values")


def fail(message):
    """A user's mistake: one line on standard error, exit status 2."""
    print(f"{Path(sys.argv[0]).name}: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


# The question and its pictures


def split_words(groups, question):
    """The names of the pictures and the question, from the words after each --image and the one that stands elsewhere.

    The first word after --image is always a picture. The last may be the question, as in `--image photo.jpg "What is this?"`.
    """
    names = []
    for first, *others in groups:
        if others and question is None and not names_a_picture(others[-1]):
            question = others.pop()
        names += [first, *others]
    return names, question


def read_arguments(args, processes):
    """Settle the question and open the pictures: (pictures, marks). The question, with the words for its marks, is args.question."""
    names, question = split_words(args.image, args.question)
    if "-" in names and (names.count("-") > 1 or question == "-" or args.chat or processes is not None):
        raise ValueError("--image - reads one picture from standard input: no second, no question and no chat, and for one process")
    nothing_asked = question is None and not args.chat
    if nothing_asked:
        question = QUESTION
    args.question = None if question is None else read_question(question)
    if not names and (nothing_asked or args.model is None):
        names = [BUNDLED_PICTURE]
    images = [open_picture(name, args) for name in names]
    marks = [parse_mark(text) for text in args.mark]
    if not images:
        print("no --image is given: the model answers from the text alone", file=sys.stderr)
    if marks:
        images = mark(images, marks, args.save_marked)
    elif args.save_marked is not None and not args.chat:
        raise ValueError("--save-marked: there is no --mark")
    if args.question is not None:
        args.question = refer(args.question, marks)
    return images, marks


# The model


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

    shares = 1 if processes is None else processes.size
    if processes is None:
        weights = loaded_bytes(Llava, folder, config, device, dtype, scheme)
    else:  # a share of each weight, in dtype
        weights = weight_bytes(outline(Llava, config), dtype)
    cache = announce(args, config, parameters, device, dtype, scheme, weights, pictures, shares)
    check_memory(config, device, dtype, scheme, weights, cache, shares)
    if processes is None:
        chat = Chat.from_pretrained(folder, device, dtype, args.quantize, mapped=not worth_copying(weights))
    else:
        from weights.shares import split  # here for the same reason as Processes below

        chat = Chat.from_pretrained(folder)
        split(chat.model, processes.mesh(device), device, dtype)
        suit(chat.model)
    if args.adapter is not None:
        load_adapter(chat.model, args.adapter)
        refuse_merged(folder, args.adapter)
    chat.style, chat.system = args.style or chat.style, args.system
    if args.pad is not None:
        chat.pad = args.pad
    tell_of_template(folder, chat.style)
    if args.compile:
        chat.model.decode_step = compiled(chat.model.decode_step, device)
    return chat


def tell_of_template(folder, style):
    """One line if the checkpoint brings a chat template of another format than the style's: templates are not run here."""
    path = folder / "chat_template.jinja"
    if path.is_file() and STYLES[style].assistant.strip() not in path.read_text(encoding="utf-8", errors="replace"):
        print(f"{path} is another format than {style!r}; it is not used: --style takes one of {', '.join(STYLES)}", file=sys.stderr)


def announce(args, config, parameters, device, dtype, scheme, weights, pictures, shares):
    """Say in one line what the model will take. Returns the bytes of the KV cache for the first question."""
    most = config.text.max_position_embeddings
    tokens = min(most, pictures * config.features_per_image + len(args.question or "") + args.max_new_tokens)
    cache = cache_bytes(config, dtype, tokens)
    line = f"{args.model or 'tiny/llava, which knows drawn shapes only'}: {parameters / 1e6:,.1f} M parameters on {device}"
    line += f" in {scheme or str(dtype)[6:]}, {size(weights)} of weights and {size(cache)} of cache for {tokens} tokens"
    if args.chat:
        line += f", {size(cache_bytes(config, dtype, most))} for {most} at the end of a chat"
    if shares > 1:
        line += f", shared by {shares} processes"
    print(line, file=sys.stderr)
    return cache


def check_memory(config, device, dtype, scheme, weights, cache, shares):
    """Raises ValueError, with what would help, where weights and cache, shared by so many processes, do not fit what is free."""
    free, held = free_memory(device), 1 / shares
    if device == "cpu":
        held = 1  # what is free is free for all processes together
    needed = (weights + cache) * held
    if device.startswith("cuda"):
        needed += WORKSPACE
    if free is None or needed <= free:
        return
    if weights * held < free:
        hint = "use a smaller --max-new-tokens"
    elif shares > 1 and device != "cpu":
        hint = "use more processes, on more GPUs"
    else:
        hint = smaller(config, dtype, scheme, free) if shares == 1 else None
        if hint is None:
            hint = "use a smaller model" + " or --device cpu" * (device != "cpu")
    raise ValueError(f"{device} has {size(free)} free, {size(needed)} are needed; {hint}")


def smaller(config, dtype, scheme, free):
    """The options with which the weights would fit, the least change first; None if there are none."""
    dtypes = {"": dtype}
    if dtype == torch.float32:
        dtypes["--dtype bfloat16"] = torch.bfloat16
    schemes = {"": scheme}
    if scheme is None:
        schemes |= {"--quantize int8": "int8", "--quantize int4": "int4"}
    for s, name in schemes.items():
        for d, other in dtypes.items():
            try:
                fits = weight_bytes(outline(Llava, config, name), other) < free
            except ValueError:  # its layers cannot have this scheme
                continue
            if fits:
                return "use " + " ".join(option for option in (d, s) if option)
    return None


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


# The command


def open_streams():
    """Standard streams that may be written to and read from, whoever started us."""
    for stream, way in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, stream) is None:  # closed
            setattr(sys, stream, open(os.devnull, way))
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows "?"


def started_processes(parser):
    """This process among several that torchrun started, as a Processes; None if it is alone."""
    if not are_several():
        return None
    from hardware.parallel import Processes  # here, because it takes longer to import than all else

    processes = Processes()
    processes.silence_others()
    hear_together(processes)
    parser.error = processes.fail
    return processes


def run(parser, use):
    """Read the arguments, open the pictures, load the model and call use(chat, args, images, marks); every mistake of the
    user's is one line and exit status 2."""
    open_streams()
    processes = started_processes(parser)
    args = parser.parse_args()
    try:
        images, marks = read_arguments(args, processes)
        use(load(args, len(images), processes), args, images, marks)
        if processes is not None:
            dist.destroy_process_group()
    except BrokenPipeError:  # whoever read the answer has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be written
        sys.exit(0)
    except (ValueError, OSError) as error:
        parser.error(error)
    except (RuntimeError, MemoryError) as error:
        parser.error(advice(error) if processes is None else error)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)


def main():
    run(argument_parser("python sample.py", __doc__), ask)


if __name__ == "__main__":
    main()
