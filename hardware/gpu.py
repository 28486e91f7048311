"""What a GPU does faster than the plain forms in llama.py. `weights.load.suit` puts it into a model once, when it is loaded."""

import torch
import torch.nn as nn


def fused_norm(norm):
    """An RMSNorm in one kernel instead of eight, with the weight of `norm`; the same up to rounding."""
    fused = nn.RMSNorm(norm.weight.shape, eps=norm.eps, device="meta")
    fused.weight = norm.weight
    return fused


def shares_heads_slowly(device, dtype):
    """Whether query heads that share a key/value head take a slow kernel: flash attention, which does it fast, needs 16 bits and
    compute capability 8."""
    return dtype == torch.float32 or torch.cuda.get_device_capability(device) < (8, 0)


def without_cudnn_attention():
    """cuDNN's attention, PyTorch's first choice on Hopper, would plan anew for each length of prompt and cache."""
    torch.backends.cuda.enable_cudnn_sdp(False)
