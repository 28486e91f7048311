"""What a training run is resumed from: saved by all its processes together, and whole whenever the run is killed."""

import shutil

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as distributed_checkpoint
from torch.distributed.checkpoint.api import CheckpointException


def training_state(model, optimizer):
    """What a run goes on from, {name: tensor}: each trained parameter and what AdamW keeps of it. The tensors are those that are
    in use, so that reading into them is to go on."""
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kept = optimizer.state[parameter]
            if not kept:  # as AdamW itself begins
                kept |= dict(step=torch.zeros(()), exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
            tensors |= {name: parameter.detach()} | {f"{name}.{key}": value for key, value in kept.items()}
    return tensors


def save_state(state, folder, step):
    """Write the state after so many steps to folder/step, by all processes together, and remove older ones. Whoever kills this
    at any moment leaves a whole one: `.metadata` is written when all else is there."""
    try:
        distributed_checkpoint.save(state, checkpoint_id=folder / str(step))
    except CheckpointException as error:  # what any process could not write, known to all
        reason = next(iter(error.failures.values()))[0]
        raise OSError(f"{folder / str(step)} cannot be written ({reason})") from None
    if dist.get_rank() == 0:
        for old in folder.iterdir():
            if old.is_dir() and old.name != str(step):
                shutil.rmtree(old)
