"""The decode step in the form that is fastest on its device, and its results on their way to the host.

A decode step is a function (token, alive, cache) -> logits of fixed shapes, which writes the cache in place and reads nothing
back. That makes three things possible:

| slow without it                                                       | here                                  | when                   |
|-----------------------------------------------------------------------|---------------------------------------|------------------------|
| the host launches a step's hundreds of kernels one by one             | `Graph` records them, replayed as one | CUDA, at token 2       |
| the device waits while the host looks at a token                      | `run_ahead`: it has the next to do    | CUDA                   |
| each small operation between the products reads and writes its result | `compiled` joins them                 | `--compile`, anywhere  |

What they win, where it was measured, stands in docs/speed.md.
"""

import sys
from functools import partial
from weakref import WeakKeyDictionary

import torch

_graphs = WeakKeyDictionary()  # the captured step of each cache; it goes when the cache goes


def fastest(step, model, cache):
    """The decode step as (token, alive) -> logits for a run of steps in this cache. model: the module whose weights the step reads."""
    if cache.length.device.type == "cuda":
        return captured(step, model, cache)
    return partial(step, cache=cache)


def compiled(step, device):
    """The decode step through torch.compile: up to a minute at the second token for each size of cache, then faster.

    Fused kernels for what lies between the matrix products; on a CPU, what calls them is C++ too, and on CUDA the products of
    a single row are tuned (`coordinate_descent_tuning`), without which they go to a library that is made for many rows.
    """
    # A form for each size of cache; 8 by default. Newer PyTorch calls it recompile_limit, and knows both names.
    torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
    options = {"cpp_wrapper": True} if torch.device(device).type == "cpu" else {"coordinate_descent_tuning": True}
    return torch.compile(step, fullgraph=True, dynamic=False, options=options)


def captured(step, model, cache):
    """The step's graph for this cache: the one there is, unless the step is another or a tensor has moved; else a new one."""
    tensors = [*model.parameters(), *model.buffers(), cache.real, cache.length, *cache.rope]  # quantised weights are buffers
    tensors += [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    source = step, [tensor.data_ptr() for tensor in tensors]
    if cache not in _graphs or _graphs[cache].source != source:
        _graphs[cache] = Graph(source)
    return partial(_graphs[cache], cache=cache)


class Graph:
    """A decode step captured as a CUDA graph: the host launches all of its kernels as one.

    The graph reads and writes fixed addresses, so it belongs to one cache, and every turn and prompt in that cache replays it.
    It is captured at the first step. Where that fails, for whatever reason, the steps run one by one as they are.
    """

    def __init__(self, source):
        self.source, self.graph, self.failed = source, None, False

    def __call__(self, token, alive, cache):
        if self.graph is None and not self.failed:
            length, real = cache.length.clone(), cache.real.clone()
            try:
                self.capture(token, alive, cache)
            except RuntimeError as error:  # CUDA's errors are RuntimeErrors
                self.failed = True
                reason = str(error).strip().partition("\n")[0]
                print(f"the decode step could not be captured as a CUDA graph ({reason}); it runs without one, slower", file=sys.stderr)
            cache.length.copy_(length)  # capturing ran the step: take back the slot that it took
            cache.real.copy_(real)
        if self.failed:
            step, _ = self.source
            return step(token, alive, cache)
        self.token.copy_(token)
        self.alive.copy_(alive)
        self.graph.replay()
        return self.logits

    def capture(self, token, alive, cache):
        step, _ = self.source
        self.token, self.alive = token.clone(), alive.clone()
        with torch.cuda.device(token.device):
            # A first run outside the graph, on a stream of its own: libraries set themselves up, torch.compile compiles.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step(self.token, self.alive, cache)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # On this stream, which is on this device: without one PyTorch would take the stream of the process's first capture.
            with torch.cuda.graph(graph, stream=stream):  # recorded, not run
                self.logits = step(self.token, self.alive, cache)
        self.graph = graph


# From the device to the host.


class OnItsWay:
    """A tensor that is being copied to the host while the device goes on."""

    def __init__(self, tensor):
        self.host, self.event = tensor.to("cpu", non_blocking=tensor.is_cuda), None
        if tensor.is_cuda:
            self.event = torch.cuda.current_stream(tensor.device).record_event()

    def wait(self):
        if self.event is not None:
            self.event.synchronize()
        return self.host


def run_ahead(items, device):
    """The same items; on a GPU each is handed over when the device has been given the next one to work on."""
    return one_behind(items) if device.type == "cuda" else items


def one_behind(items):
    """The same items: the first at once, each further one only when the next has been asked for. So the device is at work on
    the next token while the host looks at this one, and the first word does not wait for a graph to be captured."""
    items = iter(items)
    yield next(items)
    previous = next(items, None)
    for item in items:
        yield previous
        previous = item
    if previous is not None:
        yield previous
