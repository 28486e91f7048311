"""A prompt to words, one token at a time.

`greedy` is the whole idea in ten lines; `greedy_cached` is the same with a KV cache. `generate` is what `Llava.generate` does: it
also draws tokens at random (`sample`), continues several rows at once, and starts a step before the token of the last one is read.

Shapes: B rows, T tokens of the prompt, D width.
"""

import math
from functools import partial

import torch

from hardware.step import OnItsWay, fastest, run_ahead
from inputs import check_options, mask_of_padding, prepare, room
from llama import KVCache


@torch.no_grad()
def greedy(model, ids, pixel_values=None, max_new_tokens=64):
    """Run the model on everything so far, take the likeliest next token, append it, and again.

    ids: (1, T), with their `<image>`s; pixel_values as in Llava.forward. Yields each token as a number, the ending one
    included. Each token costs a pass over the whole sequence before it, and one of the vision tower.
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
    """The same with a KV cache. The keys and values of earlier tokens do not change, so each pass computes the new tokens only."""
    pictures = int((ids == model.config.image_id).sum())
    length = ids.shape[1] + pictures * model.config.features_per_image + max_new_tokens
    cache = KVCache(model.config.text, 1, length, model.device, model.dtype)
    logits = model(ids, pixel_values, cache=cache).logits  # prefill: all tokens of the prompt in one pass
    for _ in range(max_new_tokens):
        token = logits[:, -1].argmax(-1)
        yield int(token)
        if int(token) in model.config.eos_ids:
            return
        logits = model(token[:, None], cache=cache).logits  # decode: one token, which sees the others in the cache


def sample(logits, temperature, top_k, top_p, random):
    """The next token of each row: logits (B, vocabulary) to ids (B,). Temperature, then top-k, then top-p, as in transformers.

    random: a torch.Generator, or None. No value is read back from the device, so the host does not wait for it.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float()
    logits = logits - logits.amax(-1, keepdim=True)  # the largest is 0, so a tiny temperature makes no inf − inf
    logits = logits / max(temperature, 1e-30)
    if top_k is not None:
        kth_largest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth_largest, -torch.inf)
    if top_p is not None:
        ordered, index = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        likelier = probabilities.cumsum(-1) - probabilities  # the sum over all tokens before this one
        likelier[:, 0] = -1  # the likeliest stays, however small top_p is
        ordered = ordered.masked_fill(likelier >= top_p, -torch.inf)
        logits = logits.scatter(-1, index, ordered)
    # Draw with the probabilities p. Let each token wait for a time E / p, E drawn from the exponential distribution: token i then comes
    # first with probability p_i, and the smallest E / p is the largest p / E. (torch.multinomial makes the host wait for a check of p.)
    probabilities = logits.softmax(-1)
    exponential = torch.empty_like(probabilities).exponential_(generator=random)
    return (probabilities / exponential).argmax(-1)


class Repetition:
    """The repetition penalty (Keskar et al. 2019, https://arxiv.org/abs/1909.05858, section 4.1): ids that a row holds become less likely.

    For each id in the row's prompt or answer, a positive logit is divided by the penalty and a negative one multiplied, so both become
    smaller. As in transformers, this comes before the temperature, an id counts once, and `<image>` and `<pad>` are ids like others.
    No value is read back from the device.
    """

    def __init__(self, ids, vocabulary, penalty):
        """ids: (B, T), what the rows hold so far."""
        self.penalty = penalty
        self.said = torch.zeros(len(ids), vocabulary, dtype=torch.bool, device=ids.device)  # (B, vocabulary)
        self.said.scatter_(1, ids, True)

    def add(self, token):
        """token: (B,), the next id of each row."""
        self.said.scatter_(1, token[:, None], True)

    def penalise(self, logits):
        """Logits (B, vocabulary), of any type, to the same in float32."""
        logits = logits.float()
        less_likely = torch.where(logits < 0, logits * self.penalty, logits / self.penalty)
        return torch.where(self.said, less_likely, logits)


def generate(
    model, input_ids, pixel_values=None, attention_mask=None, max_new_tokens=512, temperature=0.0, top_k=None, top_p=None,
    seed=None, eos_ids=None, cache=None, repetition_penalty=1.0, cached_ids=None,
):  # fmt: skip
    """Continue each row of a batch: an iterator of (B,) ids, one for each step. Arguments and errors as in `Llava.generate`."""
    check_options(max_new_tokens, temperature, top_k, top_p, seed, repetition_penalty)
    random = None if seed is None else torch.Generator(model.device).manual_seed(seed)
    choose = partial(sample, temperature=temperature, top_k=top_k, top_p=top_p, random=random)
    eos = torch.tensor(model.config.eos_ids if eos_ids is None else list(eos_ids), dtype=torch.long, device=model.device)

    if attention_mask is None:
        attention_mask = mask_of_padding(input_ids, model.config)
    inputs = prepare(model.config, model.device, model.dtype, input_ids, pixel_values, attention_mask, cache=cache)
    B, T = inputs.ids.shape
    left = room(model.config, cache) - T
    if left < 1:
        raise ValueError(f"a prompt of {T} tokens leaves no room for an answer; shorten it or use a longer cache")
    if inputs.mask is not None and not inputs.mask[:, -1].all():
        raise ValueError("attention_mask ends in padding; a batch is padded on the left, so that every row ends in its last token")
    count = min(max_new_tokens, left)
    if cache is None:
        cache = KVCache(model.config.text, B, cache_length(model.config, T + count), model.device, model.dtype)
    repetition = None
    if repetition_penalty != 1:
        said = inputs.ids if cached_ids is None else torch.cat([cached_ids.to(inputs.ids), inputs.ids], dim=1)
        repetition = Repetition(said, model.config.text.vocab_size, repetition_penalty)
    with torch.no_grad():
        x, _ = model.embed(inputs.ids, pixel_values)  # (B, T, D)
    return tokens(model, x, inputs.mask, cache, count, choose, eos, repetition)


@torch.no_grad()
def tokens(model, x, mask, cache, count, choose, eos, repetition=None):
    """Read the steps: yields the ids (B,) of each, on the host, until every row has ended or `count` steps are done.

    x: (B, T, D), the embedded prompt; mask: (B, T) bool or None; choose: (B, vocabulary) logits -> (B,) ids; eos: ids that
    end a row, as a tensor on the device; repetition: a Repetition, or None. Only here does the host wait for the device; on a GPU
    the next step is under way by then (`run_ahead`).
    """
    steps = launch(model, x, mask, cache, count, choose, eos, repetition)
    for token, alive, totals in run_ahead(steps, x.device):
        if not all(map(math.isfinite, totals.wait().tolist())):
            raise ValueError(f"the logits are not finite: weights are damaged, or too large for {model.dtype}; try another dtype")
        yield token.wait()
        if not alive.wait().any():
            return


def launch(model, x, mask, cache, count, choose, eos, repetition=None):
    """Start the steps, one after the other. Yields three tensors (B,) of each, on their way to the host: the tokens, which rows go on,
    and the sums of the logits. One infinity or NaN among the logits makes their sum infinite or NaN."""
    x = model.language_model(x, mask, cache=cache, last=True)  # prefill: (B, 1, D), as only the last position needs logits
    logits = model.language_model.lm_head(x[:, -1])  # (B, vocabulary)
    step = fastest(model.decode_step, model.language_model, cache)
    alive = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for left in reversed(range(count)):
        totals = torch.where(alive, logits.sum(-1, dtype=torch.float32), 0.0)
        if repetition is not None:
            logits = repetition.penalise(logits)
        token = torch.where(alive, choose(logits), model.config.pad_id)
        if repetition is not None:
            repetition.add(token)
        alive = alive & ~torch.isin(token, eos)
        yield OnItsWay(token), OnItsWay(alive), OnItsWay(totals)
        if left:
            logits = step(token, alive)  # decode: one token of each row


def cache_length(config, tokens):
    """The size of a cache for so many tokens: a multiple of 256, so that few sizes occur. Each size is compiled or captured anew."""
    rounded_up = -(-tokens // 256) * 256
    return min(rounded_up, config.text.max_position_embeddings)
