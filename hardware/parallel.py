"""One model on several GPUs: tensor parallelism (Megatron-LM, Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053, section 3).

    torchrun --nproc-per-node 2 sample.py --model llava-hf/llava-1.5-13b-hf --image photo.jpg

One process for each GPU, and every process goes through the whole forward pass, with its share of each large matrix. Of two
matrices in a row, y = B f(A x), the first is cut by its output and the second by its input: a process computes its part of
A x, applies f to it, and multiplies with the columns of B that this part meets. What it gets has the shape of y already and
is a term of it; the sum over the processes is the only communication, one all-reduce for an attention and one for an MLP. So
a process has whole heads of its own, and the KV cache holds those alone. How tensors are cut and put together again is
PyTorch's part (`DTensor`); the model knows nothing of it.
"""

import os
import signal
import sys
import traceback
import warnings
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from hardware.device import choose_device

# By output (nn.Linear's weight is (out, in), so these are its rows) or by input; linear maps alone, all else is everywhere.
PLAN = {
    "vision_tower.layers.*.self_attn.[qkv]_proj": ColwiseParallel(),
    "vision_tower.layers.*.self_attn.out_proj": RowwiseParallel(),
    "vision_tower.layers.*.mlp.fc1": ColwiseParallel(),
    "vision_tower.layers.*.mlp.fc2": RowwiseParallel(),
    "projector.linear_1": ColwiseParallel(),
    "projector.linear_2": RowwiseParallel(),
    "language_model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),  # by words: 0 for a word of another process
    "language_model.layers.*.self_attn.[qkv]_proj": ColwiseParallel(),
    "language_model.layers.*.self_attn.o_proj": RowwiseParallel(),
    "language_model.layers.*.mlp.gate_proj": ColwiseParallel(),
    "language_model.layers.*.mlp.up_proj": ColwiseParallel(),
    "language_model.layers.*.mlp.down_proj": RowwiseParallel(),
    "language_model.lm_head": ColwiseParallel(output_layouts=Replicate()),  # by words, and then all of them for everyone
}
PATIENCE = timedelta(minutes=10)  # for a process that has not come to a collective operation: one may read its files more slowly


def check_size(config, size):
    """Raises ValueError, saying what works, unless `size` processes can share the heads and the MLPs of a LlavaConfig evenly."""
    vision, text = config.vision, config.text
    parts = {
        "key/value heads": text.num_key_value_heads,
        "heads of the vision tower": vision.num_attention_heads,
        "units of an MLP": text.intermediate_size,
        "units of the vision tower's": vision.intermediate_size,
        "units of the projector": text.hidden_size,
    }
    if any(count % size for count in parts.values()):
        fit = [n for n in range(1, text.num_key_value_heads + 1) if not any(count % n for count in parts.values())]
        what = next(f"{count} {name}" for name, count in parts.items() if count % size)
        raise ValueError(f"{size} processes cannot share {what} evenly; --nproc-per-node {' or '.join(map(str, fit))} works for this model")


def split(model, mesh, device, dtype):
    """Leave each process of a one-dimensional DeviceMesh its share of the model, on its device and in dtype.

    model: a Llava on the CPU as `from_pretrained` gives it in the stored type, mapped: of its files this then reads no more
    than the share, one tensor after the other. The config's `num_key_value_heads` becomes that of the share, and with it the
    KV cache's. Raises ValueError if the heads cannot be shared evenly.
    """
    check_size(model.config, mesh.size())
    whole = {name: parameter.detach() for name, parameter in model.named_parameters()}
    model.to("meta")
    parallelize_module(model, mesh, PLAN)
    for name in list(whole):
        module, _, leaf = name.rpartition(".")
        share = own_share(whole.pop(name), model.get_parameter(name), device, dtype)
        setattr(model.get_submodule(module), leaf, nn.Parameter(share, requires_grad=False))
    text = model.config.text
    if text.tie_word_embeddings:
        model.language_model.lm_head.weight = model.language_model.embed_tokens.weight
    for block in model.vision_tower.layers:
        block.self_attn.num_heads //= mesh.size()
    model.config = replace(model.config, text=replace(text, num_key_value_heads=text.num_key_value_heads // mesh.size()))


def own_share(tensor, parameter, device, dtype):
    """Of a tensor this process's part, as the DTensor `parameter` without memory wants it; all of it for any other parameter."""
    if not isinstance(parameter, DTensor):
        return tensor.to(device, dtype, copy=True)  # also where nothing changes, so that no file stays mapped
    mesh, (placement,) = parameter.device_mesh, parameter.placements
    if placement.is_shard():
        tensor = tensor.chunk(mesh.size(), placement.dim)[mesh.get_local_rank()]
    tensor = tensor.to(device, dtype, copy=True, memory_format=torch.contiguous_format)
    return DTensor.from_local(tensor, mesh, [placement], shape=parameter.shape, stride=parameter.stride())


def shard(module, frozen, mesh, dtype):
    """Leave each process its share of what is trained in a module: FSDP2, after ZeRO (Rajbhandari et al. 2019,
    https://arxiv.org/abs/1910.02054). A parameter, its gradient and AdamW's moments are each cut into as many parts as there are
    processes. A part is float32; the whole module is put together in dtype for as long as it computes, from all of them.

    frozen: the parameters that every process keeps whole. The module's own call is what puts it together, no other method is.
    """
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")  # nobody writes into what a pass returns
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=frozen)


def gather(model, dtype):
    """Put what `shard` has cut together again, in dtype on the CPU, in the first process; to the others it is lost."""
    for name, parameter in list(model.named_parameters()):
        if isinstance(parameter, DTensor):
            module, _, leaf = name.rpartition(".")
            whole = parameter.detach().full_tensor()
            if dist.get_rank() == 0:
                setattr(model.get_submodule(module), leaf, nn.Parameter(whole.to("cpu", dtype), requires_grad=False))
    if model.config.text.tie_word_embeddings:
        model.language_model.lm_head.weight = model.language_model.embed_tokens.weight


class Processes:
    """This process among those that torchrun started, or alone. The first one speaks and the others keep silent, so that a
    command line need not know that it is one of several."""

    def __init__(self):
        if dist.is_torchelastic_launched():
            torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGKILL)  # nobody goes on alone when torchrun itself is killed
            self.store, self.rank, self.size = next(dist.rendezvous("env://", timeout=PATIENCE))
        else:
            self.store, self.rank, self.size = dist.HashStore(), 0, 1
        dist.init_process_group(store=self.store, rank=self.rank, world_size=self.size, timeout=PATIENCE)
        self.stdin, self.stderr = sys.stdin, sys.stderr
        if self.size > 1:  # Ctrl-C ends a process at once: Python hears of it only when the others have come
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self.rank:
            sys.stdout = sys.stderr = open(os.devnull, "w", errors="replace")
            sys.excepthook = partial(traceback.print_exception, file=self.stderr)

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        if error is None or self.size == 1:  # otherwise it could wait for processes that are gone
            dist.destroy_process_group()

    def hear_together(self):
        """Give all processes what the first one reads, and a seed: without --seed too they draw the same tokens."""
        self.questions, sys.stdin = 0, self
        torch.manual_seed(int(self.heard(lambda: str(torch.seed()))))

    def device(self, name):
        """This process's own of the devices that a --device option means. Raises ValueError if they are too few."""
        if self.size == 1:
            return choose_device(name)
        kind, here, there = choose_device(name), int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if kind == "cpu":
            return kind
        if kind != "cuda":
            raise ValueError(f"--device {kind} is one device, for {here} processes; use --device cuda or cpu")
        if there < here:
            raise ValueError(f"{here} processes want a GPU each, and PyTorch sees {there}; use --nproc-per-node {there}")
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
        return device

    def split(self, model, device, dtype):
        split(model, init_device_mesh(device.partition(":")[0], (self.size,)), device, dtype)

    def heard(self, ask):
        """What the function `ask` returns in the first process, a string, in all of them."""
        self.questions += 1
        key = f"answer {self.questions}"
        if self.rank == 0:
            self.store.set(key, ask())
        else:
            self.store.wait([key], timedelta(days=365))  # for somebody who thinks before the next question
        return self.store.get(key).decode()

    def readline(self):
        return self.heard(self.stdin.readline)

    def read(self):
        return self.heard(self.stdin.read)

    def fail(self, error):
        """End with a line that says why, if this process is the first to fail: the others only fail for want of it. They wait
        until it has spoken, as torchrun ends all when one has ended."""
        if isinstance(error, RuntimeError | MemoryError):
            error = f"process {self.rank} of {self.size} cannot go on: {str(error).partition('. ')[0] or 'out of memory'}"
        try:
            if self.store.add("failed", 1) == 1:
                print(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}", file=self.stderr, flush=True)
                self.store.set("told", "")
            else:
                self.store.wait(["told"], timedelta(seconds=10))
        except dist.DistError:  # the process that kept the store is gone, and has told
            pass
        sys.exit(2)
