"""LLaVA's two training stages (Liu et al. 2023, section 4.2), on data in LLaVA's own format.

    python train.py --stage 1 --model DIR --data align.json    --images FOLDER --out DIR     # projector alone
    python train.py --stage 2 --model DIR --data instruct.json --images FOLDER --out DIR     # projector and language model
    python train.py --stage 2 --lora 16 …                                                    # projector and an adapter
    python train.py --stage 2 --lora 16 --quantize int4 …                                    # of a base in 4 bits (QLoRA)

The vision tower stays frozen. Only what the assistant says is learnt, with the end mark after it. The data is a JSON list
of {"image": file, "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": …}, …]};
a record without "image" is text alone, and one with "bboxes" may refer to regions (training/regions.py). The result is a checkpoint
folder like the one started from, an adapter (training/lora.py), or with --save-projector the projector alone, from which stage 2 goes
on with --projector. The loss of every step goes to OUT.losses.jsonl, beside the result.

A run that was stopped by Ctrl-C, or killed, goes on where its last state was saved when the same command is given again. One that
has finished is not begun anew. On several GPUs, each process with its share of every batch and of what is trained:

    torchrun --nproc-per-node 8 train.py …      # any number, another one too when a run goes on
"""

import argparse
import math
import shutil
import sys
import time
from itertools import islice
from pathlib import Path

import torch

from hardware.processes import Interrupts, processes
from inputs import IGNORED
from tokenizer import STYLES
from training.data import make_batches, own_passes, read_data
from training.lora import WEIGHTS
from training.parameters import GradientScaler, load_model, make_trainable
from training.report import Report
from training.state import agreed_step, begin, describe_run, load_state, save_result, save_state, training_state
from weights.checkpoint import checkpoint_folder
from weights.original import PROJECTOR
from weights.quantize import GROUPS

LARGE = 100e6  # parameters of a model above which activations are checkpointed by default
# Options with which a run may go on that it did not begin with.
FREE = ("model", "out", "device", "workers", "save_every", "held_out", "checkpoint_activations", "checkpoint_every", "save_projector")


def train(args, group):
    """group: the processes that train together, or Alone."""
    check(args, group.size)
    torch.manual_seed(args.seed)
    args.device = group.device(args.device)
    source, states, dtype = checkpoint_folder(args.model), args.out / "training-state", getattr(torch, args.dtype)
    model = load_model(args, source, group)
    stored = model.dtype  # the result is stored in the type that the checkpoint came in
    if args.pad is None:
        args.pad = model.config.pads_pictures
    parameters, optimizer, autocast = make_trainable(model, args.stage, dtype, checkpoints_activations(args, model), args.device, group)
    scaler = GradientScaler(dtype)

    run, step = describe_run(vars(args), source, args.data, FREE), agreed_step(states, group)
    begin(states, run, step, group.rank)
    data, held_out, together = read_data(args, source, model.config, run, states, group)
    batches = make_batches(data.lengths, args.batch_size, args.epochs, args.seed)
    steps = math.ceil(len(batches) / args.accumulate)
    if step:
        load_state(training_state(model, optimizer, scaler), states, step, group)
    passes = own_passes(data, batches[step * args.accumulate :], together, args.workers, group)
    saved_at = time.monotonic()

    with Interrupts(group.size) as interrupts, Report(args.out, args.stage, step, steps, group.rank) as report:
        while step < steps:
            rate = set_learning_rates(optimizer, args, step, steps)
            own = list(islice(passes, args.accumulate))
            torch.manual_seed(args.seed + step * group.size + group.rank)  # for dropout: a run that goes on draws as if it had not stopped
            loss = forward_backward(model, own, autocast, scaler.scale, group)
            if not math.isfinite(loss):
                raise ValueError(f"the loss is {loss} at step {step}; a lower --lr may help")
            update(parameters, optimizer, scaler, group)
            step += 1
            report.step(step, loss, rate)
            save_due = time.monotonic() - saved_at > 60 * args.save_every
            evaluate, save, stop = group.anyone([report.due() or step == steps, save_due, interrupts.asked])
            if evaluate and held_out:
                report.held_out(step, {path.name: held_out_loss(model, loader, autocast, group) for path, loader in held_out.items()})
            if (save or stop) and step < steps:
                save_state(training_state(model, optimizer, scaler), states, step, group)
                saved_at = time.monotonic()
            if args.checkpoint_every and step % args.checkpoint_every == 0:
                save_result(args, model, source, args.out / f"checkpoint-{step}", stored, group)
            if stop and step < steps:
                raise KeyboardInterrupt(f"stopped after step {step} of {steps}; the same command goes on from there")

        save_result(args, model, source, args.out, stored, group)
        if group.rank == 0:
            shutil.rmtree(states)
    data.say_what_was_replaced(group)
    print(f"saved {args.out}", file=sys.stderr)


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up over a share of the steps, then half a cosine down to 0."""
    warm = max(1, round(warmup * steps))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def peak(args):
    """The learning rate after the warm-up: LLaVA-1.5's own, if none is given."""
    if args.lr:
        return args.lr
    if args.stage == 1:
        return 1e-3
    return 2e-4 if args.lora else 2e-5


def checkpoints_activations(args, model):
    """Whether activations are computed again on the way back: as the option says, or if the model is large."""
    if args.checkpoint_activations is not None:
        return args.checkpoint_activations
    return sum(parameter.numel() for parameter in model.parameters()) > LARGE


def set_learning_rates(optimizer, args, step, steps):
    """For the next step, of the projector and of the rest. Returns the one of what the stage is named for, to be reported."""
    rate = learning_rate(step, steps, peak(args), args.warmup)
    projector, *rest = optimizer.param_groups  # as make_optimizer has put them
    projector["lr"] = learning_rate(step, steps, args.projector_lr, args.warmup) if args.projector_lr else rate
    for settings in rest:
        settings["lr"] = rate
    return rate


def forward_backward(model, passes, autocast, scale, group):
    """The gradients of one step, multiplied by `scale`. Returns the loss: the mean over all words of all passes and processes."""
    words, total = group.total(sum(part.words for part in passes)), 0.0
    for n, part in enumerate(passes):
        with autocast:
            loss = model(part.ids, part.pixels, labels=part.labels).loss * part.words / words  # each word counts the same
        total += loss.item()
        group.exchange_gradients(model, n + 1 == len(passes))
        if group.size > 1 and part.pixels is None and part.with_pictures:
            loss = with_projector(loss, model)
        (loss * group.size * scale).backward()  # of the processes' gradients the mean is taken
    return group.total(total)


def with_projector(loss, model):
    """The same loss, with gradients for the projector, all 0. A pass without pictures has none, but the processes exchange
    gradients parameter by parameter: if one of them has some, all must."""
    return loss + 0 * sum(parameter.sum() for parameter in model.projector.parameters())


def update(parameters, optimizer, scaler, group):
    """One step of the optimiser, unless float16's gradients have overflowed."""
    scaler.unscale(parameters)
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    if scaler.fits(group.whole(norm)):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def held_out_loss(model, loader, autocast, group):
    """The mean loss of the assistant's words in all batches of a loader."""
    total, words, training = 0, 0, model.training
    model.eval()  # without dropout
    with autocast:
        for ids, labels, pixels in loader:
            learnt = (labels[:, 1:] != IGNORED).sum().item()
            total += model(ids, pixels, labels=labels).loss.item() * learnt  # the loss is a mean over the learnt words
            words += learnt
    model.train(training)
    group.reshard(model)
    return total / words


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


def positive(kind):
    """A type for argparse: numbers above 0."""

    def number(text):
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    return number


def argument_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
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


def main():
    parser = argument_parser()
    with processes() as group:
        group.silence_others()
        if group.size > 1:
            parser.error = group.fail
        args = parser.parse_args()
        try:
            train(args, group)
        except KeyboardInterrupt as stop:
            print(f"\ntrain.py: {str(stop) or 'stopped; nothing new is saved'}", file=sys.stderr)
            sys.exit(130)
        except (ValueError, OSError, RuntimeError) as error:
            if group.size > 1:
                group.fail(error)
            if isinstance(error, RuntimeError):
                raise
            sys.exit(f"train.py: {error}")


if __name__ == "__main__":
    main()
