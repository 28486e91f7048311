"""From a command's options to a Chat: which checkpoint, on which device, in which type, and whether it fits. For sample.py and demo.py."""

import sys
from pathlib import Path

import torch

from chat import Chat
from hardware.device import WORKSPACE, choose_device, choose_dtype, free_memory
from hardware.step import compiled
from llava import Llava
from tokenizer import STYLES
from training.lora import load_adapter, refuse_merged
from weights.checkpoint import checkpoint_folder
from weights.config import LlavaConfig
from weights.load import loaded_bytes, outline, suit
from weights.memory import cache_bytes, size, weight_bytes, worth_copying
from weights.quantize import GROUPS

BUNDLED_MODEL = Path(__file__).parent / "tiny" / "llava"


def add_loading_options(parser, bundled):
    """The options that `load` reads. bundled: the name of the model that needs no --model."""
    add = parser.add_argument_group("the model").add_argument
    add("--model", help=f"checkpoint folder, or name on the Hugging Face hub [the bundled {bundled}]")
    add("--adapter", metavar="DIR", help="what train.py --lora made for this model, or PEFT")
    add("--style", choices=STYLES, help="the chat format [the model's own]")
    add("--device", default="auto", help="cuda (or cuda:1 …), mps or cpu [the first of them that is there]")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="[what is fast on the device]")
    add("--quantize", choices=GROUPS, help="the language model's weights in 8 or 4 bits, made while loading [as stored]")
    add("--compile", action="store_true", help="compile the decode step first: up to about a minute, then more tokens a second")
    add("--scale-grey", action="store_true", help="make 8 bits of greyscale pictures that have more, by the range of their values")


def load(args, pictures, processes=None):
    """The chat that the options describe, after one line on standard error that says what it takes.

    pictures: how many the first question has; processes: a hardware.parallel.Processes that share the model, or None.
    Raises ValueError for options that do not go together, and if the device has too little memory.
    """
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
    else:
        weights = weight_bytes(outline(Llava, config), dtype)
    tokens = tokens_at_first(args, config, pictures)
    announce(args, config, parameters, device, dtype, scheme, weights, tokens, shares)
    check_memory(config, device, dtype, scheme, weights, cache_bytes(config, dtype, tokens), shares)
    if processes is None:
        chat = Chat.from_pretrained(folder, device, dtype, args.quantize, mapped=not worth_copying(weights))
    else:
        chat = load_share(folder, device, dtype, processes)
    apply_options(chat, folder, args)
    tell_of_template(folder, chat.style)
    if args.compile:
        chat.model.decode_step = compiled(chat.model.decode_step, device)
    return chat


def apply_options(chat, folder, args):
    """Give a chat from the folder the adapter, the chat format and the padding that the options ask for. Raises ValueError."""
    if args.adapter is not None:
        load_adapter(chat.model, args.adapter)
        refuse_merged(folder, args.adapter)
    chat.style, chat.system = args.style or chat.style, args.system
    if args.pad is not None:
        chat.pad = args.pad


def load_share(folder, device, dtype, processes):
    """A chat whose model is this process's share of the weights."""
    from weights.shares import split  # here, because what it imports of PyTorch takes longer to import than all else

    chat = Chat.from_pretrained(folder)
    split(chat.model, processes.mesh(device), device, dtype)
    suit(chat.model)
    return chat


def tell_of_template(folder, style):
    """One line if the checkpoint has a chat template of another format than the style's. Templates are not run here."""
    path = folder / "chat_template.jinja"
    if path.is_file() and STYLES[style].assistant.strip() not in path.read_text(encoding="utf-8", errors="replace"):
        print(f"{path} is another format than {style!r}; it is not used: --style takes one of {', '.join(STYLES)}", file=sys.stderr)


# Memory


def tokens_at_first(args, config, pictures):
    """How many tokens the first question and its answer have at the most. A character of the question counts as a token."""
    tokens = pictures * config.features_per_image + len(args.question or "") + args.max_new_tokens
    return min(tokens, config.text.max_position_embeddings)


def announce(args, config, parameters, device, dtype, scheme, weights, tokens, shares):
    """One line that says what the model takes. weights: bytes; tokens: for which there is a cache at first."""
    most = config.text.max_position_embeddings
    line = f"{args.model or 'tiny/llava, which knows drawn shapes only'}: {parameters / 1e6:,.1f} M parameters on {device}"
    line += f" in {scheme or str(dtype)[6:]}, {size(weights)} of weights"
    line += f" and {size(cache_bytes(config, dtype, tokens))} of cache for {tokens} tokens"
    if args.chat:
        line += f", {size(cache_bytes(config, dtype, most))} for {most} at the end of a chat"
    if shares > 1:
        line += f", shared by {shares} processes"
    print(line, file=sys.stderr)


def check_memory(config, device, dtype, scheme, weights, cache, shares):
    """Raises ValueError, with what would help, where weights and cache (bytes) do not fit what is free on the device.

    shares: how many processes hold them together. On a CPU they hold all of it in the same memory; a GPU holds one share.
    """
    free = free_memory(device)
    if device != "cpu":
        weights, cache = weights / shares, cache / shares
    needed = weights + cache
    if device.startswith("cuda"):
        needed += WORKSPACE
    if free is None or needed <= free:
        return
    if weights < free:
        hint = "use a smaller --max-new-tokens"
    elif shares > 1 and device != "cpu":
        hint = "use more processes, on more GPUs"
    else:
        options = smaller(config, dtype, scheme, free) if shares == 1 else None
        hint = f"use {options or 'a smaller model'}"
        if options is None and device != "cpu":
            hint += " or --device cpu"
    raise ValueError(f"{device} has {size(free)} free, {size(needed)} are needed; {hint}")


def smaller(config, dtype, scheme, free):
    """The options with which the weights would fit into so many bytes, the least change first; None if there are none."""
    dtypes, schemes = {"": dtype}, {"": scheme}
    if dtype == torch.float32:
        dtypes["--dtype bfloat16"] = torch.bfloat16
    if scheme is None:
        schemes |= {"--quantize int8": "int8", "--quantize int4": "int4"}
    for scheme_option, other_scheme in schemes.items():
        for dtype_option, other_dtype in dtypes.items():
            try:
                weights = weight_bytes(outline(Llava, config, other_scheme), other_dtype)
            except ValueError:  # its layers cannot have this scheme
                continue
            if weights < free:
                return f"{dtype_option} {scheme_option}".strip()
    return None
