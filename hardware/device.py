"""Where to compute: the device, the number type that is fast on it, and the memory that it has left. Imports nothing of ours."""

from functools import cache
from pathlib import Path

import torch

SMALL = 100e6  # parameters: below this 16 bits save nothing that one would notice
WORKSPACE = 1e9  # bytes that a GPU should have left for its libraries and for what a pass computes on the way (an estimate)


def choose_device(name):
    """The device that a --device option means: "auto" is the first of cuda, mps and cpu that is there.

    Raises ValueError for one that is not.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cuda", "mps", "cpu") or not (index.isdecimal() or name == kind):
        raise ValueError(f"--device {name}: expected cuda, cuda:1 …, mps or cpu")
    there = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}[kind]
    if int(index or 0) >= there:
        why = f"; this PyTorch ({torch.__version__}) is built without CUDA" if kind == "cuda" and torch.version.cuda is None else ""
        raise ValueError(f"--device {name}: PyTorch sees {there} such devices here{why}")
    return name


def choose_dtype(device, parameters):
    """The type that is fast to compute in: 16 bits for a large model, bfloat16 where the hardware multiplies it, never float16 on a CPU."""
    if parameters < SMALL:
        return torch.float32
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if kind == "mps":
        return torch.float16
    return torch.bfloat16 if multiplies_bfloat16() else torch.float32


@cache
def multiplies_bfloat16():
    """Whether this CPU has instructions for products of bfloat16, and PyTorch uses them."""
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & cpu_words()) and torch.backends.cpu.get_cpu_capability() != "AVX2"


def is_amd():
    """Whether this is an AMD CPU: on those PyTorch's libraries are slow with one row or one query in bfloat16."""
    return "AuthenticAMD" in cpu_words()


@cache
def cpu_words():
    """The words by which Linux describes the CPU; none on another system: such a CPU gets float32."""
    info = Path("/proc/cpuinfo")
    return set(info.read_text().split()) if info.exists() else set()


def free_memory(device):
    """Bytes that the device can still give, or None where the system does not say."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if kind == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else ()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)
