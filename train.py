"""LLaVA's two training stages (Liu et al. 2023, section 4.2), on data in LLaVA's own format.

    python train.py --stage 1 --model DIR --data align.json    --images FOLDER --out DIR     # projector alone
    python train.py --stage 2 --model DIR --data instruct.json --images FOLDER --out DIR     # projector and language model
    python train.py --stage 2 --lora 16 …                                                    # projector and an adapter
    python train.py --stage 2 --lora 16 --quantize int4 …                                    # of a base in 4 bits (QLoRA)

The vision tower stays frozen. Only what the assistant says is learnt, with the end mark after it. The data is a JSON list
of {"image": file, "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": …}, …]};
a record without "image" is text alone. The result is a checkpoint folder like the one started from, or an adapter (training/lora.py).

A run that was killed goes on where its last state was saved when the same command is given again; one that has finished
is not begun anew. On several GPUs, each process with its share of every batch and of what is trained (hardware/parallel.py):

    torchrun --nproc-per-node 8 train.py …      # any number, another one too when a run goes on
"""

import argparse
import hashlib
import json
import math
import shutil
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as distributed_checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from tqdm import tqdm

from hardware.parallel import Processes, gather, shard
from images import ImageProcessor
from inputs import IGNORED
from llava import Llava
from tokenizer import Tokenizer
from training.data import Conversations, collate, make_batches
from training.lora import WEIGHTS, adapted, add_adapter, save_adapter
from training.state import save_state, training_state
from weights.checkpoint import checkpoint_folder, read_headers, save_checkpoint
from weights.quantize import GROUPS

LARGE = 100e6  # parameters of a model above which activations are checkpointed by default


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up over a share of the steps, then half a cosine down to 0."""
    warm = max(1, round(warmup * steps))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def make_trainable(model, stage, dtype, checkpoint_activations, device=None, mesh=None):
    """Give what the stage trains float32 and gradients, and the rest dtype. Returns the trained parameters, their optimiser
    and the context in which a forward pass computes in dtype.

    checkpoint_activations: the backward pass finds each block's input only, and runs the block again for all else
    (Chen et al. 2016, https://arxiv.org/abs/1604.06174).
    mesh: the processes that share what is trained; the model, until then on the CPU, goes to `device`. None: there is one.
    """
    adapter = [part for layer in adapted(model).values() for part in (layer.lora_A, layer.lora_B)]
    learners = [model.projector, *(adapter or [model.language_model])] if stage == 2 else [model.projector]
    for module in learners:
        module.requires_grad_(True)
    frozen = {parameter for parameter in model.parameters() if not parameter.requires_grad}
    done = set()
    for module in (*model.language_model.layers, model):  # block by block: whole in float32 each is large
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad and parameter not in done]
        for parameter in trained:  # float32: in 16 bits a step of the optimiser would round to nothing
            parameter.data = parameter.data.float().clone()
        if mesh is not None and trained:
            # The embeddings stay float32: what is added to them block after block takes their type.
            shard(module, frozen, mesh, torch.float32 if module is model else dtype)
        done |= {parameter for parameter in module.parameters() if parameter.requires_grad}
    for parameter in frozen:
        parameter.data = parameter.data.to(device, dtype)
    if checkpoint_activations:
        for block in model.language_model.layers:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # One tensor after the other: all at once, as is usual on a GPU, would take 4 more bytes a parameter for a moment.
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, foreach=False)
    if dtype == torch.float32:
        return parameters, optimizer, nullcontext()
    # A pass uses each weight once: to keep its 16-bit copy for another use would only take memory.
    return parameters, optimizer, torch.autocast(model.device.type, dtype, cache_enabled=False)


@torch.no_grad()
def held_out_loss(model, loader):
    """The mean loss of the assistant's words in all batches of a loader."""
    total = words = 0
    for ids, labels, pixels in loader:
        learnt = (labels[:, 1:] != IGNORED).sum().item()
        total, words = total + model(ids, pixels, labels=labels).loss.item() * learnt, words + learnt
    return total / words


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--stage", type=int, choices=(1, 2), required=True, help="1: train the projector; 2: also the language model")
    parser.add_argument("--model", required=True, help="checkpoint to start from: a folder or a name on the hub")
    parser.add_argument("--data", type=Path, required=True, help="JSON list of conversations")
    parser.add_argument("--images", type=Path, required=True, help="folder that the records' image files are in")
    parser.add_argument("--out", type=Path, required=True, help="folder for the result, and for the state to resume from")
    parser.add_argument(
        "--lora", type=positive(int), metavar="RANK", help="in stage 2, leave the language model and train an adapter of it"
    )
    parser.add_argument("--lora-alpha", type=positive(float), help="the adapter's weight is this by its rank [twice the rank]")
    parser.add_argument(
        "--quantize", choices=GROUPS, help="with --lora, hold the language model in 8 or 4 bits; a quantised --model is so already"
    )
    parser.add_argument("--epochs", type=positive(int), default=1)
    parser.add_argument("--batch-size", type=positive(int), default=16, help="conversations in one forward pass")
    parser.add_argument("--accumulate", type=positive(int), default=1, help="forward passes for one step of the optimiser")
    parser.add_argument(
        "--lr", type=positive(float), help="peak learning rate [LLaVA-1.5: 1e-3 in stage 1, 2e-5 in stage 2, 2e-4 with --lora]"
    )
    parser.add_argument("--warmup", type=float, default=0.03, help="share of the steps")
    parser.add_argument("--max-length", type=positive(int), default=2048, help="tokens of a conversation, features of its picture included")
    parser.add_argument("--pad", action="store_true", help="pad pictures to a square, as the original does")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu; auto: the first of them that is there")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="of the computation; what is trained is float32"
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
    parser.add_argument("--seed", type=int, default=0)
    with Processes() as processes:
        if processes.size > 1:
            parser.error = processes.fail
        args = parser.parse_args()
        try:
            train(args, processes)
        except (ValueError, OSError, RuntimeError) as error:
            if processes.size > 1:
                processes.fail(error)
            if isinstance(error, RuntimeError):
                raise
            sys.exit(f"train.py: {error}")


def positive(kind):
    """A type for argparse: numbers above 0."""

    def number(text):
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    return number


def train(args, processes):
    torch.manual_seed(args.seed)
    args.device, rank, size = processes.device(args.device), processes.rank, processes.size
    source, dtype = checkpoint_folder(args.model), getattr(torch, args.dtype)
    if any((args.out / name).is_file() for name in ("model.safetensors", WEIGHTS)):
        raise ValueError(f"{args.out} holds a finished checkpoint; remove it, or give another --out")
    if args.lora and args.stage == 1:
        raise ValueError("--lora is for stage 2; stage 1 trains the projector alone")
    if args.lora_alpha and not args.lora:
        raise ValueError("--lora-alpha is for an adapter; give its rank by --lora")
    if args.quantize and not args.lora:
        raise ValueError("--quantize is for --lora: 8- and 4-bit weights cannot be trained, only an adapter beside them")
    if args.batch_size < size:
        raise ValueError(f"--batch-size is {args.batch_size}, to be shared by {size} processes; give at least {size}")
    tokenizer, processor = Tokenizer.from_pretrained(source), ImageProcessor.from_pretrained(source)
    model = Llava.from_pretrained(source, args.device if size == 1 else "cpu", quantize=args.quantize)
    if model.config.quantized and not args.lora:
        raise ValueError(f"{source} is quantised: train an adapter of it (--stage 2 --lora 16), or the checkpoint it was made from")
    config, stored = model.config, model.dtype  # the result is stored in the type that the checkpoint came in
    length, P = min(args.max_length, config.text.max_position_embeddings), config.features_per_image
    data, *held_out = (
        Conversations(path, args.images, tokenizer, config.style, length, P, with_picture=args.stage == 1)
        for path in (args.data, *args.held_out)
    )
    checkpointed = args.checkpoint_activations
    if checkpointed is None:
        checkpointed = sum(parameter.numel() for parameter in model.parameters()) > LARGE
    if args.lora:
        add_adapter(model, args.lora, args.lora_alpha or 2 * args.lora)
    mesh = None if size == 1 else init_device_mesh(args.device.partition(":")[0], (size,))
    parameters, optimizer, autocast = make_trainable(model, args.stage, dtype, checkpointed, args.device, mesh)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}

    batches = make_batches(data.lengths, args.batch_size, args.epochs, args.seed)
    steps, peak = math.ceil(len(batches) / args.accumulate), args.lr or (1e-3 if args.stage == 1 else 2e-4 if args.lora else 2e-5)
    folder = args.out / "training-state"
    # A run may go on with others of these.
    free = ("model", "out", "device", "workers", "save_every", "held_out", "checkpoint_activations")
    run = {name: str(value) for name, value in vars(args).items() if name not in free}
    run |= {"model": str(source.resolve()), "data": hashlib.sha256(args.data.read_bytes()).hexdigest()}
    step = max((int(file.parent.name) for file in folder.glob("[0-9]*/.metadata")), default=0)
    dist.broadcast(first := torch.tensor(step), src=0)
    if step != first:
        raise ValueError(f"{folder} holds step {step} here, step {first} for the first process; --out must be a folder that all see")
    if step:
        try:
            before = json.loads((folder / "run.json").read_text(encoding="utf-8"))
            other = [name for name in run if before.get(name) != run[name]]
            if not other:
                distributed_checkpoint.load(training_state(model, optimizer), checkpoint_id=folder / str(step))
        except (ValueError, OSError, AttributeError, CheckpointException) as error:  # a RuntimeError: another process is gone
            raise ValueError(f"{folder} is damaged ({type(error).__name__}); remove it to start anew") from None
        if other:
            raise ValueError(f"{folder} is of a run with another {', '.join(other)}; remove it to start anew")
        print(f"going on from step {step} of {steps}", file=sys.stderr)
    elif rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")

    together = lambda examples: collate(examples, processor, tokenizer.image_id, tokenizer.pad_id, P, args.pad)
    # A process that has no share in a batch goes through another's, for nothing: all must meet in each pass.
    shares = [batch[rank::size] or batch[:1] for batch in batches[step * args.accumulate :]]
    loader = iter(DataLoader(data, batch_sampler=shares, collate_fn=together, num_workers=args.workers))
    held_out = [DataLoader(conversations, args.batch_size, collate_fn=together) for conversations in held_out]
    saved_at = reported_at = time.monotonic()
    progress = tqdm(total=steps, initial=step, unit="step", desc=f"stage {args.stage}")
    while step < steps:
        for settings in optimizer.param_groups:
            settings["lr"] = learning_rate(step, steps, peak, args.warmup)
        group = batches[step * args.accumulate : (step + 1) * args.accumulate]
        passes, total = [next(loader) for _ in group], torch.zeros((), dtype=torch.float64)
        learnt = [(labels[:, 1:] != IGNORED).sum().item() * (rank < len(batch)) for batch, (_, labels, _) in zip(group, passes)]
        dist.all_reduce(words := torch.tensor(sum(learnt)))
        for n, (ids, labels, pixels) in enumerate(passes):
            with autocast:
                loss = model(ids, pixels, labels=labels).loss * learnt[n] / words.item()  # each word counts the same
            total += loss.item()
            if mesh is not None:
                model.set_requires_gradient_sync(n + 1 == len(passes))  # gradients are exchanged once a step
                if pixels is None and any(data.examples[i][2] for i in group[n]):  # and of the projector by all or by none
                    loss = loss + 0 * sum(parameter.sum() for parameter in model.projector.parameters())
            (loss * size).backward()  # of the processes' gradients the mean is taken
        dist.all_reduce(total)
        if not total.isfinite():
            raise ValueError(f"the loss is {total.item()} at step {step}; a lower --lr may help")
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        progress.set_postfix(loss=f"{total.item():.3f}", refresh=False)
        progress.update()
        now = time.monotonic()  # of the first process: it decides for all
        dist.broadcast(due := torch.tensor([now - reported_at > 120 or step == steps, now - saved_at > 60 * args.save_every]).int(), src=0)
        report, save = due.tolist()
        if held_out and report:
            with autocast:
                losses = [f"{held_out_loss(model, batches):.4f} ({path.name})" for path, batches in zip(args.held_out, held_out)]
            progress.write(f"step {step}: held-out loss {', '.join(losses)}", file=sys.stderr)
            reported_at = time.monotonic()
            if mesh is not None:
                model.reshard()  # after a backward pass it comes by itself
        if save and step < steps:
            save_state(training_state(model, optimizer), folder, step)
            saved_at = time.monotonic()
    progress.close()
    gather(model, stored)
    if rank == 0:
        if args.lora:
            save_adapter(model, args.out, args.model, stored)
        else:
            unchanged = {name: tensor for name, tensor in read_headers(source).items() if name in frozen}
            save_checkpoint(model, source, args.out, stored, unchanged)
        shutil.rmtree(folder)
    print(f"saved {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
