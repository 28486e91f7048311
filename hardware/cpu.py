"""What a CPU does faster in bfloat16 than PyTorch's first choice. `weights.load.suit` puts it into a model once, when it is loaded.

PyTorch hands 16-bit products on a CPU to the library oneDNN. It is the right choice for many rows and the wrong one for few.
"""

from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F

MANY = 8  # rows above which they are worth filling up


@contextmanager
def onednn(enabled):
    """Let PyTorch use oneDNN, or only what it has itself."""
    before, torch.backends.mkldnn.enabled = torch.backends.mkldnn.enabled, enabled
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


class PaddedLinear(nn.Linear):
    """A linear layer that fills many rows up with zeros to a multiple of 8.

    oneDNN cuts the rows into blocks. The vision tower has 577 of them, a prime number: it multiplies those a quarter more slowly than
    584.
    """

    def __init__(self, linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x):
        rows = x.shape[:-1].numel()
        if rows <= MANY or rows % 8 == 0:
            return F.linear(x, self.weight, self.bias)
        filled = F.pad(x.flatten(0, -2), (0, 0, 0, -rows % 8))
        return F.linear(filled, self.weight, self.bias)[:rows].unflatten(0, x.shape[:-1])


def attention_of_one(q, k, v, mask):
    """Attention of one token a row, written out as two products: two to four times as fast as the fused kernel with one query.

    q: (B, H, 1, E); k, v: (B, K, S, E); mask: (B, 1, 1, S), added to the scores. Returns (B, H, 1, E).
    """
    queries = q.view(*k.shape[:2], -1, q.shape[-1])  # (B, K, H / K, E): the query heads that share a head of k
    with onednn(queries.shape[2] > 1):
        # As k qᵀ, not q kᵀ: of a transposed part of the cache oneDNN would make a copy first.
        scores = (k @ queries.transpose(-1, -2)).transpose(-1, -2)
    scores = scores.float() * q.shape[-1] ** -0.5 + mask  # (B, K, H / K, S)
    with onednn(True):
        return (scores.softmax(-1).to(v.dtype) @ v).view(q.shape)
