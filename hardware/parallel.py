"""Several processes, one for each GPU, as torchrun starts them:

    torchrun --nproc-per-node 2 sample.py --model llava-hf/llava-1.5-13b-hf --image photo.jpg
    torchrun --nproc-per-node 8 train.py …

Two ways to share a model are here, and neither knows what the model is.

`cut`, for answering, is tensor parallelism (Megatron-LM, Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053, section 3). Every
process goes through the whole forward pass with its share of each large matrix. Of two matrices in a row, y = B f(A x), the first
is cut by its output and the second by its input: a process computes its part of A x, applies f to it, and multiplies with the
columns of B that this part meets. The result has the shape of y and is a term of it. The sum over the processes is the only
communication: one all-reduce for an attention and one for an MLP.

`Processes.shard`, for training, is FSDP2, after ZeRO (Rajbhandari et al. 2019, https://arxiv.org/abs/1910.02054). Each process has
conversations of its own. Of each trained parameter, its gradient and AdamW's moments it holds a share of the rows.

How tensors are cut and put together again is PyTorch's part (`DTensor`).
"""

import os
import signal
import sys
import traceback
import warnings
from datetime import timedelta
from functools import partial
from inspect import signature
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

from hardware.device import choose_device

PATIENCE = timedelta(minutes=10)  # for a process that has not come to a collective operation: one may read its files more slowly
A_YEAR = timedelta(days=365)  # where a process waits for a person, or for the first one's long work


def cut(model, plan, mesh, device, dtype):
    """Leave each process of a one-dimensional DeviceMesh its share of a model, on its device and in dtype.

    model: on the CPU in the stored type, mapped: of its files this then reads no more than the share, one tensor after the other.
    plan: {name of layers: ColwiseParallel() or RowwiseParallel()}; all other parameters are whole in every process.
    """
    whole = {name: parameter.detach() for name, parameter in model.named_parameters()}
    model.to("meta")
    parallelize_module(model, mesh, plan)
    for name in list(whole):
        module, _, leaf = name.rpartition(".")
        share = own_share(whole.pop(name), model.get_parameter(name), device, dtype)
        setattr(model.get_submodule(module), leaf, nn.Parameter(share, requires_grad=False))


def own_share(tensor, parameter, device, dtype):
    """Of a tensor this process's part, as the DTensor `parameter` without memory wants it; all of it for any other parameter."""
    if not isinstance(parameter, DTensor):
        return tensor.to(device, dtype, copy=True)  # also where nothing changes, so that no file stays mapped
    mesh, (placement,) = parameter.device_mesh, parameter.placements
    if placement.is_shard():
        tensor = tensor.chunk(mesh.size(), placement.dim)[mesh.get_local_rank()]
    tensor = tensor.to(device, dtype, copy=True, memory_format=torch.contiguous_format)
    return DTensor.from_local(tensor, mesh, [placement], shape=parameter.shape, stride=parameter.stride())


class Processes:
    """This process among those that torchrun started. `hardware.processes.Alone` answers the same calls for a single one."""

    def __init__(self):
        torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGKILL)  # nobody goes on alone when torchrun itself is killed
        self.store, self.rank, self.size = next(dist.rendezvous("env://", timeout=PATIENCE))
        dist.init_process_group(store=self.store, rank=self.rank, world_size=self.size, timeout=PATIENCE)
        self.asked = 0  # how often all have waited for the first
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a process at once: Python hears of it only when the others have come
        self.stderr = sys.stderr

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        if error is None:  # otherwise it could wait for processes that are gone
            dist.destroy_process_group()

    def silence_others(self):
        """Let the first process alone speak, so that a command need not know that it is one of several. A traceback is always shown."""
        if self.rank:
            sys.stdout = sys.stderr = open(os.devnull, "w", errors="replace")
            sys.excepthook = partial(traceback.print_exception, file=self.stderr)

    def device(self, name):
        """This process's own of the devices that a --device option means. Raises ValueError if they are too few."""
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

    # What the processes tell each other.

    def first_says(self, number):
        """The first process's number, in all of them."""
        number = torch.tensor(number)
        dist.broadcast(number, src=0)
        return number.item()

    def total(self, number):
        """The sum of the processes' numbers: whole numbers exactly, others in float64."""
        number = torch.tensor(number, dtype=torch.int64 if isinstance(number, int) else torch.float64)
        dist.all_reduce(number)
        return number.item()

    def anyone(self, flags):
        """For each of some flags, whether it is set in any process."""
        flags = torch.tensor(flags).int()
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return [flag > 0 for flag in flags.tolist()]

    def heard(self, ask):
        """What the function `ask` returns in the first process, a string, in all of them."""
        self.asked += 1
        key = f"answer {self.asked}"
        if self.rank == 0:
            self.store.set(key, ask())
        else:
            self.store.wait([key], A_YEAR)  # for somebody who thinks before the next question
        return self.store.get(key).decode()

    def first_makes(self, make):
        """Call make() in the first process; the others wait until it is done, however long that takes."""

        def made():
            make()
            return ""

        self.heard(made)

    def raise_together(self, error):
        """Raise an OSError in all processes if one of them has an error. None: this one has not."""
        if error is not None:
            self.store.set("why", str(error))
        (failed,) = self.anyone([error is not None])
        if failed:
            raise OSError(self.store.get("why").decode())

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

    # How they share a model.

    def mesh(self, device):
        """All processes, in a row."""
        return init_device_mesh(device.partition(":")[0], (self.size,))

    def shard(self, module, frozen, device, dtype):
        """Leave each process its share of what is trained in a module: of each parameter, its gradient and AdamW's moments as many
        rows as the others have. A share is float32. The whole module is put together in dtype for as long as it computes.

        frozen: the parameters that every process keeps whole. The module's own call is what puts it together, no other method is.
        """
        if "ignored_params" not in signature(fully_shard).parameters:
            raise ValueError(f"training in several processes needs PyTorch 2.7 or newer; this is {torch.__version__}")
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")  # nobody writes into what a pass returns
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        fully_shard(module, mesh=self.mesh(device), mp_policy=policy, ignored_params=frozen)

    def exchange_gradients(self, model, now):
        """Whether the next backward pass exchanges gradients: once a step is enough, after its last forward pass."""
        model.set_requires_gradient_sync(now)

    def reshard(self, model):
        """Take apart what a forward pass has put together. After a backward pass this happens by itself."""
        model.reshard()

    def own_rows(self, tensor):
        """This process's rows of a tensor that `shard` has cut, and the number of the first of them. Any other tensor is whole."""
        if not isinstance(tensor, DTensor):
            return tensor, 0
        rows = -(-tensor.shape[0] // self.size)  # as torch.chunk deals them out
        return tensor.to_local(), min(self.rank * rows, tensor.shape[0])

    def whole(self, parameter):
        """A parameter put together from the shares of all processes, which must all ask for it."""
        parameter = parameter.detach()
        return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
