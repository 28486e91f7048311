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

import math
import shutil
import sys
import time
from itertools import islice

import torch

from hardware.processes import Interrupts, processes
from inputs import IGNORED
from training.data import make_batches, own_passes, read_data
from training.options import argument_parser, check
from training.parameters import GradientScaler, load_model, make_trainable
from training.report import Report
from training.state import agreed_step, begin, describe_run, load_state, save_result, save_state, training_state
from weights.checkpoint import checkpoint_folder

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


def main():
    parser = argument_parser(__doc__.split("\n")[0])
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
