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

import torch.distributed as dist

from converse import advice, answer, converse, hear_together, mark, names_a_picture, open_picture, open_streams, read_question
from hardware.processes import are_several
from loading import add_loading_options, load
from marks import parse_mark, refer

BUNDLED_PICTURE = Path(__file__).parent / "tiny" / "example.png"
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


def fail(message):
    """A user's mistake: one line on standard error, exit status 2."""
    print(f"{Path(sys.argv[0]).name}: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


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
    """Read the question and open the pictures: (pictures, marks). The question, with the words for its marks, is then args.question."""
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
    """Read the arguments, open the pictures, load the model and call use(chat, args, images, marks). Every mistake of the user's is
    one line and exit status 2."""
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


def ask(chat, args, images, marks):
    """Answer the question, or hold a chat that begins with it."""
    if not args.chat:
        answer(chat, args, args.question, images)
    elif status := converse(chat, args, images, marks):
        sys.exit(status)


def main():
    run(argument_parser("python sample.py", __doc__), ask)


if __name__ == "__main__":
    main()
