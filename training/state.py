"""What a training run is resumed from, and its result. All its processes save a state together, and it is whole whenever they are killed.

    OUT/training-state/run.json              what run it is: a run with other options or other data does not go on from it
    OUT/training-state/STEP/0-of-2.pt        of each process one file: its rows of each trained parameter and of AdamW's moments
    OUT/training-state/STEP/complete.json    written when all files are there

Each file says which rows it holds, so any number of processes can go on: each reads the rows that it needs from all the files.
"""

import hashlib
import json
import os
import pickle
import shutil
import sys

import torch

from training.lora import save_adapter
from training.parameters import trained_tensors
from weights.checkpoint import read_headers, read_json, save_checkpoint
from weights.original import PROJECTOR, save_projector


def describe_run(options, model, data, free):
    """What must be the same when a run goes on: the options that are not `free`, the model's folder and the data itself."""
    run = {name: str(value) for name, value in options.items() if name not in free}
    with open(data, "rb") as file:
        run["data"] = hashlib.file_digest(file, "sha256").hexdigest()
    run["model"] = str(model.resolve())
    return run


def last_step(folder):
    """The step whose state is whole, 0 if there is none."""
    return max((int(file.parent.name) for file in folder.glob("[0-9]*/complete.json")), default=0)


def agreed_step(folder, processes):
    """The last saved step, which all processes must see. Raises ValueError if one sees another."""
    here = last_step(folder)
    first = processes.first_says(here)
    if here != first:
        raise ValueError(f"{folder} holds step {here} here, step {first} for the first process; --out must be a folder that all see")
    return here


def begin(folder, run, step, rank):
    """Raise ValueError if the state in the folder is of another run; the first process writes down what run this is if there is none."""
    if not step:
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
        return
    try:
        before = read_json(folder / "run.json")
    except (ValueError, OSError):
        raise damaged(folder, "run.json") from None
    other = [name for name in run if before.get(name) != run[name]]
    if other:
        raise ValueError(f"{folder} is of a run with another {', '.join(other)}; remove it to start anew")
    print(f"going on from step {step}", file=sys.stderr)


def damaged(folder, what):
    return ValueError(f"{folder} is damaged ({what}); remove it to start anew")


def training_state(model, optimizer, scaler):
    """What a run goes on from, {name: tensor}: each trained parameter, what AdamW keeps of it, and the gradient scaler's state. The
    tensors are those that are in use, so that reading into them is to go on."""
    tensors = {"scaler": scaler.state}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kept = optimizer.state[parameter]
        if not kept:  # as AdamW itself begins
            kept["step"] = torch.zeros(())
            kept["exp_avg"] = torch.zeros_like(parameter)
            kept["exp_avg_sq"] = torch.zeros_like(parameter)
        tensors[name] = parameter.detach()
        for key, value in kept.items():
            tensors[f"{name}.{key}"] = value
    return tensors


def save_state(state, folder, step, processes):
    """Write the state after so many steps to folder/step, by all processes together, and remove older ones. Raises OSError in all
    processes if one cannot write."""
    target, error = folder / str(step), None
    rows = {name: processes.own_rows(tensor) for name, tensor in state.items()}
    try:
        target.mkdir(parents=True, exist_ok=True)
        torch.save(rows, target / f"{processes.rank}-of-{processes.size}.pt")
    except (OSError, RuntimeError) as reason:  # PyTorch's writer reports a full disk as a RuntimeError
        error = OSError(f"{target} cannot be written ({reason})")
    processes.raise_together(error)
    if processes.rank == 0:
        (target / "partial.json").write_text(json.dumps({"processes": processes.size}))
        os.replace(target / "partial.json", target / "complete.json")
        for old in folder.glob("[0-9]*"):
            if old.is_dir() and old != target:
                shutil.rmtree(old)


def load_state(state, folder, step, processes):
    """Read the state after so many steps into the tensors of `state`. Raises ValueError if a file is damaged or of another model."""
    source = folder / str(step)
    try:
        size = read_json(source / "complete.json")["processes"]
        files = [torch.load(source / f"{n}-of-{size}.pt", map_location="cpu", mmap=True, weights_only=True) for n in range(size)]
        for name, tensor in state.items():
            copy_rows(*processes.own_rows(tensor), [file[name] for file in files])
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, EOFError, pickle.UnpicklingError) as error:
        raise damaged(folder, f"step {step}: {type(error).__name__}") from None


@torch.no_grad()
def copy_rows(tensor, first, parts):
    """Fill a tensor, which is the rows from number `first` on of a larger one, from parts of that: [(rows, number of the first)].

    Raises ValueError if they do not hold all of it.
    """
    if tensor.ndim == 0:
        tensor.copy_(parts[0][0])
        return
    filled, last = 0, first + len(tensor)
    for rows, begin in parts:
        low, high = max(first, begin), min(last, begin + len(rows))
        if low < high:
            tensor[low - first : high - first] = rows[low - begin : high - begin]
            if low == first + filled:  # the next ones, not some that are there already
                filled += high - low
    if filled != len(tensor):
        raise ValueError(f"rows {first} to {last} are not whole")


def save_result(args, model, source, out, dtype, group):
    """Write the checkpoint, the projector alone, or the adapter. What was frozen is copied as it is stored."""
    trained = trained_tensors(model, dtype, group)
    if group.rank > 0:
        return
    if args.lora:
        save_adapter(model, out, args.model, dtype, trained)
    elif args.save_projector:
        out.mkdir(parents=True, exist_ok=True)
        save_projector(model.projector, out / PROJECTOR, {name.removeprefix("projector."): trained[name] for name in trained})
    else:
        stored = read_headers(source)
        frozen = {name: stored[name].read() for name, parameter in model.named_parameters() if not parameter.requires_grad}
        fields = None
        if args.pad != model.config.pads_pictures:  # whoever asks the result is to treat pictures alike
            fields = {"image_aspect_ratio": "pad" if args.pad else "square"}
        save_checkpoint(model, source, out, dtype, frozen | trained, fields)
