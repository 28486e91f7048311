"""The options of train.py, and which of them contradict each other."""

import argparse
import math
from pathlib import Path

from tokenizer import STYLES
from training.lora import WEIGHTS
from weights.original import PROJECTOR
from weights.quantize import GROUPS


def positive(kind):
    """A type for argparse: numbers above 0."""

    def number(text):
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    return number


def argument_parser(description):
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--stage", type=int, choices=(1, 2), required=True, help="1: train the projector; 2: also the language model")
    parser.add_argument("--model", required=True, help="checkpoint to start from: a folder or a name on the hub")
    parser.add_argument("--data", type=Path, required=True, help="JSON list of conversations, or JSON lines")
    parser.add_argument("--images", type=Path, required=True, help="folder that the records' image files are in")
    parser.add_argument("--out", type=Path, required=True, help="folder for the result, and for the state to resume from")
    parser.add_argument("--projector", type=Path, metavar="PATH", help="begin with this projector, an mm_projector.bin or its folder")
    parser.add_argument("--save-projector", action="store_true", help="in stage 1, write the projector alone: OUT/mm_projector.bin")
    parser.add_argument(
        "--lora", type=positive(int), metavar="RANK", help="in stage 2, leave the language model and train an adapter of it"
    )
    parser.add_argument("--lora-alpha", type=positive(float), help="the adapter's weight is this by its rank [twice the rank]")
    parser.add_argument("--lora-dropout", type=float, default=0.0, metavar="P", help="share of an adapter's inputs that it does not see")
    parser.add_argument(
        "--quantize", choices=GROUPS, help="with --lora, hold the language model in 8 or 4 bits; a quantised --model is so already"
    )
    parser.add_argument("--epochs", type=positive(int), default=1)
    parser.add_argument("--batch-size", type=positive(int), default=16, help="conversations in one forward pass")
    parser.add_argument("--accumulate", type=positive(int), default=1, help="forward passes for one step of the optimiser")
    parser.add_argument(
        "--lr", type=positive(float), help="peak learning rate [LLaVA-1.5: 1e-3 in stage 1, 2e-5 in stage 2, 2e-4 with --lora]"
    )
    parser.add_argument("--projector-lr", type=positive(float), help="of the projector in stage 2 [as the rest]; LLaVA: 2e-5 with --lora")
    parser.add_argument(
        "--format",
        choices=("chat", "plain"),
        default="chat",
        help="plain, as LLaVA has it in stage 1: picture, caption, newline",
    )
    parser.add_argument("--style", choices=STYLES, help="the chat format [the checkpoint's own]")
    parser.add_argument("--system", metavar="TEXT", help="a system sentence in place of the format's own")
    parser.add_argument("--warmup", type=float, default=0.03, help="share of the steps")
    parser.add_argument("--max-length", type=positive(int), default=2048, help="tokens of a conversation, features of its picture included")
    parser.add_argument(
        "--pad", action=argparse.BooleanOptionalAction, help="pad pictures to a square, or crop them [as config.json says; else crop]"
    )
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu; auto: the first of them that is there")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the computation; what is trained is float32"
    )
    parser.add_argument(
        "--checkpoint-activations",
        action=argparse.BooleanOptionalAction,
        help="keep only the input of each block of the language model and compute the rest again on the way back: much less memory "
        "for one more forward pass of time [on above 100 million parameters]",
    )
    parser.add_argument("--workers", type=int, default=0, help="processes that read pictures")
    parser.add_argument(
        "--held-out", type=Path, action="append", default=[], metavar="DATA",
        help="conversations whose loss is reported every two minutes; may be repeated",
    )  # fmt: skip
    parser.add_argument("--save-every", type=positive(float), default=5, help="minutes between saved states")
    parser.add_argument("--checkpoint-every", type=positive(int), metavar="N", help="also write OUT/checkpoint-N every N steps")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def check(args, size):
    """Raises ValueError for options that contradict each other, and for a run that has ended."""
    if any((args.out / name).is_file() for name in ("model.safetensors", PROJECTOR, WEIGHTS)):
        raise ValueError(f"{args.out} holds a finished result; remove it, or give another --out")
    if args.lora and args.stage == 1:
        raise ValueError("--lora is for stage 2; stage 1 trains the projector alone")
    if args.lora_alpha and not args.lora:
        raise ValueError("--lora-alpha is for an adapter; give its rank by --lora")
    if args.lora_dropout and not args.lora:
        raise ValueError("--lora-dropout is for an adapter; give its rank by --lora")
    if args.projector_lr and args.stage == 1:
        raise ValueError("--projector-lr is for stage 2; stage 1 trains the projector alone, with --lr")
    if args.save_projector and args.stage == 2:
        raise ValueError("--save-projector is for stage 1; stage 2 trains more than the projector")
    if args.format == "plain" and args.stage == 2:
        raise ValueError("--format plain is for stage 1: it has no questions")
    if args.format == "plain" and (args.style or args.system is not None):
        raise ValueError("--style and --system are for --format chat; the plain format has neither")
    if args.quantize and not args.lora:
        raise ValueError("--quantize is for --lora: 8- and 4-bit weights cannot be trained, only an adapter beside them")
    if args.batch_size < size:
        raise ValueError(f"--batch-size is {args.batch_size}, to be shared by {size} processes; give at least {size}")
