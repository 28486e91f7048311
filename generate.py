"""A prompt to words, one token at a time.

`greedy` is the whole idea in ten lines; `greedy_cached` is the same with a KV cache. The rest makes the loop of
`Llava.generate`: `sample` chooses a token, `steps` lets the device run ahead while the host reads the token before, and
`run_step` runs a decode step in the form that is fastest where it runs.

Shapes: B rows, T tokens of the prompt, D width.
"""

from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from llama import KVCache


@torch.no_grad()
def greedy(model, ids, pixel_values=None, max_new_tokens=64):
    """Generation as on the board: run the model on everything so far, take the likeliest next token, append it, again.

    ids: (1, T), with their `<image>`s; pixel_values as in Llava.forward. Yields each token as a number, the ending one
    included. A token costs as much as the whole sequence before it, the vision tower included.
    """
    for _ in range(max_new_tokens):
        logits = model(ids, pixel_values).logits  # (1, T, vocabulary)
        token = logits[:, -1].argmax(-1)  # (1,)
        yield int(token)
        if int(token) in model.config.eos_ids:
            return
        ids = torch.cat([ids, token[:, None]], dim=1)


@torch.no_grad()
def greedy_cached(model, ids, pixel_values=None, max_new_tokens=64):
    """The same with a KV cache: what was computed of earlier tokens does not change, so each pass is of the new ones alone."""
    room = model.config.features_per_image * int((ids == model.config.image_id).sum()) + ids.shape[1] + max_new_tokens
    cache = KVCache(model.config.text, 1, room, model.device, model.dtype)
    logits = model(ids, pixel_values, cache=cache).logits  # prefill: all tokens of the prompt in one pass
    for _ in range(max_new_tokens):
        token = logits[:, -1].argmax(-1)
        yield int(token)
        if int(token) in model.config.eos_ids:
            return
        logits = model(token[:, None], cache=cache).logits  # decode: one token, which sees the others in the cache


def check_options(max_new_tokens, temperature, top_k, top_p, seed):
    """Raises ValueError for options of generation that make no sense."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature}; expected 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; expected at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; expected more than 0 and at most 1")
    if seed is not None and not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}; expected 0 to 2^63 - 1")


def sample(logits, temperature, top_k, top_p, random):
    """One id for each row of logits (B, vocabulary): (B,). Temperature first, then top-k, then top-p, as in transformers.

    random: a torch.Generator, or None. Nothing is read back from the device.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)  # largest 0: a tiny temperature makes no inf − inf
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None:
        ordered, index = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        likelier = probabilities.cumsum(-1) - probabilities  # what all tokens before this one sum to
        likelier[:, 0] = -1  # the likeliest stays, however small top_p is
        logits = logits.scatter(-1, index, ordered.masked_fill(likelier >= top_p, -torch.inf))
    # With E exponential of rate 1, E / p is a clock of rate p, and of several such clocks i rings first with probability p_i:
    # the smallest E / p is the largest p / E. (torch.multinomial draws alike, but looks at p first, and the host would wait.)
    probabilities = logits.softmax(-1)
    return (probabilities / torch.empty_like(probabilities).exponential_(generator=random)).argmax(-1)


def cache_length(config, tokens):
    """The size of a cache for so many tokens: rounded up, so that few sizes occur. Each size is compiled or captured anew."""
    return min(tokens + -tokens % 256, config.text.max_position_embeddings)


@torch.no_grad()
def steps(model, x, mask, cache, count, choose, eos):
    """The loop: the last hidden state gives a token, whose embedding goes in again. Yields (B,) ids on the host, for each of
    at most `count` steps, until every row has ended.

    x: (B, T, D), the embedded prompt; mask: (B, T) bool or None; choose: (B, vocabulary) logits -> (B,) ids; eos: ids that
    end a row, as a tensor on the device. After the prompt nothing here waits for the device but the reading of a token,
    and on CUDA that is one step behind.
    """
    launched = launch(model, x, mask, cache, count, choose, eos)
    for token, alive in one_behind(launched) if x.is_cuda else launched:
        yield token.wait()
        if not alive.wait().any():
            return


def launch(model, x, mask, cache, count, choose, eos):
    """Start the steps one after the other; of each its tokens, and which rows go on, on their way to the host."""
    alive = torch.ones(len(x), dtype=torch.bool, device=x.device)
    if cache.graph is not None and cache.graph.source != captured_from(model):
        cache.graph = None  # it would replay another step, or these weights where they were before
    with prefilling(model):
        x = model.language_model(x, mask, cache=cache, last=True)  # (B, 1, D): only the last position needs logits
    logits = model.language_model.lm_head(x[:, -1])  # (B, vocabulary)
    if not logits.isfinite().all():
        raise ValueError(f"the logits are not finite: weights are damaged, or too large for {logits.dtype}; try another dtype")
    for left in reversed(range(count)):
        token = torch.where(alive, choose(logits), model.config.pad_id)  # (B,)
        alive = alive & ~torch.isin(token, eos)
        yield OnItsWay(token), OnItsWay(alive)
        if left:
            logits = run_step(model, token, alive, cache)


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


def run_step(model, token, alive, cache):
    """model.decode_step(token, alive, cache), in the form that is fastest where the cache lies."""
    if token.is_cuda:
        if cache.graph is None:
            cache.graph = Graph(model, token, alive, cache)
        return cache.graph(token, alive)
    if is_cpu_bfloat16(model):
        # PyTorch's own kernel for a matrix times a vector reads the matrix 1.3 to 1.8 times as fast as oneDNN's. From two rows on
        # it is the other way round.
        with WrittenAttention(), onednn(len(token) > 1):
            return model.decode_step(token, alive, cache)
    return model.decode_step(token, alive, cache)


def is_cpu_bfloat16(model):
    return model.device.type == "cpu" and model.dtype == torch.bfloat16


@contextmanager
def onednn(enabled):
    """Let PyTorch use oneDNN, or only what it has itself."""
    before, torch.backends.mkldnn.enabled = torch.backends.mkldnn.enabled, enabled
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


class WrittenAttention(TorchFunctionMode):
    """Attention of one token a row, on a CPU in bfloat16: written out, as two products, it is two to four times as fast as the
    fused kernel with its single query. In float32 it is not."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        q, k, v = args  # and a mask: a decode step always has one
        with onednn(q.shape[-2] > 1):  # more than one query where several share a head of k
            # As k qᵀ, not q kᵀ: of a transposed part of the cache oneDNN would make a copy first.
            scores = (k @ q.transpose(-1, -2)).transpose(-1, -2).float() * q.shape[-1] ** -0.5 + kwargs["attn_mask"]
        with onednn(True):
            return scores.softmax(-1).to(v.dtype) @ v


class WholeBlocks(TorchFunctionMode):
    """Linear layers with many rows, on a CPU in bfloat16: oneDNN cuts the rows into blocks, and with 577, which the vision tower
    has and which is a prime number, it multiplies a quarter more slowly than with 584. So to their number, rows of zeros are
    added up to a multiple of 8."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not F.linear:
            return function(*args, **(kwargs or {}))
        x, *weights = args
        rows = x.shape[:-1].numel()
        return function(F.pad(x.flatten(0, -2), (0, 0, 0, -rows % 8)), *weights)[:rows].unflatten(0, x.shape[:-1])


def prefilling(model):
    """To be used around what runs over a whole prompt: the same up to rounding, faster where there is a way."""
    return WholeBlocks() if is_cpu_bfloat16(model) else nullcontext()


def compiled(model):
    """The model's decode step through torch.compile: up to a minute at the second token for each size of cache, then faster.

    Fused kernels for what lies between the matrix products; on a CPU, what calls them is C++ too, and on CUDA the products of
    a single row are tuned (`coordinate_descent_tuning`), without which they go to a library that is made for many rows.
    """
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)  # a form for each size of cache; 8 by default
    options = {"cpp_wrapper": True} if model.device.type == "cpu" else {"coordinate_descent_tuning": True}
    return torch.compile(model.decode_step, fullgraph=True, dynamic=False, options=options)


def captured_from(model):
    """What a captured step depends on: the step itself, and where its weights lie."""
    tensors = [*model.language_model.parameters(), *model.language_model.buffers()]  # quantised weights are buffers
    return model.decode_step, [tensor.data_ptr() for tensor in tensors]


class Graph:
    """A decode step captured as a CUDA graph: the host launches all of its kernels as one.

    The graph reads and writes fixed addresses, so it belongs to one cache, and every turn and prompt in that cache replays it.
    """

    def __init__(self, model, token, alive, cache):
        self.source, self.token, self.alive = captured_from(model), token.clone(), alive.clone()
        length, real = cache.length.clone(), cache.real.clone()
        with torch.cuda.device(token.device):
            # A first run outside the graph, on a stream of its own: libraries set themselves up, torch.compile compiles.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                model.decode_step(self.token, self.alive, cache)
            torch.cuda.current_stream().wait_stream(stream)
            cache.length.copy_(length), cache.real.copy_(real)  # as if it had not been; its slot is written again
            self.graph = torch.cuda.CUDAGraph()
            # On this stream, which is on this device: without one PyTorch would take the stream of the process's first capture.
            with torch.cuda.graph(self.graph, stream=stream):  # recorded, not run
                self.logits = model.decode_step(self.token, self.alive, cache)

    def __call__(self, token, alive):
        self.token.copy_(token)
        self.alive.copy_(alive)
        self.graph.replay()
        return self.logits
