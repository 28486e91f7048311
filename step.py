"""How a decode step is run fast. What it computes is `llava.Llava.decode_step`, one function of fixed shapes.

At one token a step, a GPU has finished each kernel before the host has launched the next one; a CPU waits for memory.
"""

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


def run_step(step, token, alive, cache):
    """step(token, alive, cache), in the form that is fastest where the cache lies."""
    if token.is_cuda:
        if cache.graph is None:
            cache.graph = Graph(step, token, alive, cache)
        return cache.graph(token, alive)
    if token.device.type == "cpu" and cache.dtype == torch.bfloat16:
        with FastBfloat16(rows=len(token)):
            return step(token, alive, cache)
    return step(token, alive, cache)


class FastBfloat16(TorchFunctionMode):
    """Two functions of PyTorch's that have a faster form on a CPU, for one token a row in bfloat16. In float32 they have not."""

    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear and self.rows == 1:
            # PyTorch's own kernel for a row times a matrix reads the matrix 1.3 to 1.8 times as fast as oneDNN's. From two
            # rows on it is the other way round.
            enabled, torch.backends.mkldnn.enabled = torch.backends.mkldnn.enabled, False
            try:
                return function(*args)
            finally:
                torch.backends.mkldnn.enabled = enabled
        if function is F.scaled_dot_product_attention:
            # Written out it is a product of oneDNN's, two to four times as fast as the fused kernel with its single query.
            q, k, v = args
            scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
            return scores.masked_fill(~kwargs["attn_mask"], -torch.inf).softmax(-1).to(v.dtype) @ v
        return function(*args, **(kwargs or {}))


def compiled(model):
    """The model's decode step through torch.compile: seconds to a minute at the first token of each size of cache, then faster.

    Fused kernels for what lies between the matrix products; on a CPU, what calls them is C++ too.
    """
    options = {"cpp_wrapper": True} if model.device.type == "cpu" else {}
    return torch.compile(model.decode_step, fullgraph=True, dynamic=False, options=options)


class Graph:
    """A decode step captured as a CUDA graph: the host launches all of its kernels as one.

    The graph reads and writes fixed addresses, so it belongs to one cache, and every turn and prompt in that cache replays it.
    """

    def __init__(self, step, token, alive, cache):
        self.token, self.alive = token.clone(), alive.clone()
        length, real = cache.length.clone(), cache.real.clone()
        with torch.cuda.device(token.device):
            # A first run outside the graph, on a stream of its own: libraries set themselves up, torch.compile compiles.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step(self.token, self.alive, cache)
            torch.cuda.current_stream().wait_stream(stream)
            cache.length.copy_(length), cache.real.copy_(real)  # as if it had not been; its slot is written again
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):  # recorded, not run
                self.logits = step(self.token, self.alive, cache)

    def __call__(self, token, alive):
        self.token.copy_(token)
        self.alive.copy_(alive)
        self.graph.replay()
        return self.logits
