"""Many prompts, several at once (continuous batching): each row of a batch answers one, and takes the next when its answer ends.

    for n, ids in generate_many(model, prompts, rows=8, …):        # number and answer of each prompt, as the answers end

A decode step takes hardly longer for eight rows than for one, because it must read all weights in either case. The prefill of a prompt
is limited by arithmetic, and many prompts at once would not make it faster, so each is run alone, without padding. A prompt often
begins like the one before it, as questions about one picture do; then only the rest is computed.

Shapes: B rows, T tokens of a prompt, S slots of the cache.
"""

from functools import partial
from typing import NamedTuple

import torch

from generate import Repetition, cache_length, sample
from hardware.step import fastest
from llama import KVCache

SLACK = 64  # slots beyond the longest row: how many steps go by before all rows are moved to the left again


class Prompt(NamedTuple):
    ids: list[int]  # each `<image>` as many times as it has features
    pixels: torch.Tensor | None  # (N, 3, side, side), its pictures


class Answer(NamedTuple):
    """An answer under way in a row."""

    n: int  # which prompt it answers
    ids: list[int]
    limit: int  # how many ids it may have


@torch.no_grad()
def generate_many(
    model, prompts, rows, ends, max_new_tokens=512, temperature=0.0, top_k=None, top_p=None, seed=None, repetition_penalty=1.0
):  # fmt: skip
    """Continue many prompts, at most `rows` at once: yields (n, ids), a prompt's number and its answer, as the answers end.

    prompts: an iterable of Prompts, numbered from 0; one is taken when a row is free. In the place of a Prompt may stand the ValueError
        that says why there is none: it is given back as the answer.
    ends: a function that says of the ids of an answer whether it ends with the last of them.

    Options as in `Llava.generate`. With a seed, all draws together are repeatable.
    """
    random = None if seed is None else torch.Generator(model.device).manual_seed(seed)
    choose = partial(sample, temperature=temperature, top_k=top_k, top_p=top_p, random=random)
    batch = Batch(model, rows, choose, repetition_penalty)
    waiting, under_way = enumerate(prompts), {}  # row -> Answer

    while True:
        for row in range(rows):
            if row in under_way:
                continue
            for n, prompt in waiting:  # until one goes on: the first token of an answer may be its last
                if isinstance(prompt, ValueError):
                    yield n, prompt
                    continue
                limit = min(max_new_tokens, model.config.text.max_position_embeddings - len(prompt.ids))
                answer = Answer(n, [batch.begin(row, prompt, limit)], limit)
                if len(answer.ids) < limit and not ends(answer.ids):
                    under_way[row] = answer
                    break
                batch.end(row)
                yield n, answer.ids
        if not under_way:
            return
        tokens = batch.step()
        for row, answer in list(under_way.items()):
            answer.ids.append(tokens[row])
            if len(answer.ids) == answer.limit or ends(answer.ids):
                batch.end(row)
                del under_way[row]
                yield answer.n, answer.ids


class Batch:
    """B rows of one KV cache, each with a prompt and its answer so far.

        slot   0 1 2 3 4 5 6 7                      all rows write their next token into the same slot, here 7
        row 0  · · a a a a a                        a prompt that a row takes ends just before that slot
        row 1  b b b b b b b                        a row's positions count its own tokens, not the slots
        row 2  · · · · · c c

    When enough slots on the left belong to no row any more, all rows are moved to the left.
    """

    def __init__(self, model, rows, choose, penalty):
        """choose: (B, vocabulary) logits -> (B,) ids; penalty: the repetition penalty."""
        self.model, self.choose, self.penalty = model, choose, penalty
        self.cache = None  # (B, S), made for the first prompt
        self.prefilled = None  # a cache of one row, for the prefill of each prompt
        self.prompt = Prompt([], None)  # the prompt that it holds
        self.length = 0  # slots taken: cache.length, known without asking the device
        self.starts = {}  # row -> the first slot of its prompt, for the rows under way
        self.token = torch.zeros(rows, dtype=torch.long, device=model.device)  # the last token of each row
        self.alive = torch.zeros(rows, dtype=torch.bool, device=model.device)  # which rows have an answer under way
        self.repetition = None
        if penalty != 1:
            nothing = torch.zeros(rows, 0, dtype=torch.long, device=model.device)
            self.repetition = Repetition(nothing, model.config.text.vocab_size, penalty)

    def begin(self, row, prompt, limit):
        """Give a free row to a prompt whose answer may have `limit` tokens. Returns the first of them."""
        logits = self.logits_after(prompt)  # (1, vocabulary)
        self.make_room(len(prompt.ids), limit)
        self.copy_prompt(row, len(prompt.ids))
        if self.repetition is not None:
            ids = torch.tensor([prompt.ids], device=self.model.device)
            of_row = Repetition(ids, logits.shape[-1], self.penalty)
            logits = of_row.penalise(logits)
        token = self.choose(logits)
        if self.repetition is not None:
            of_row.add(token)
            self.repetition.said[row] = of_row.said[0]
        self.token[row : row + 1] = token
        self.alive[row] = True
        return int(token)

    def end(self, row):
        """Set a row free. It is computed along with the others, to no use, until it takes another prompt."""
        self.alive[row] = False
        del self.starts[row]

    def step(self):
        """One more token of each row: a list of B ids. That of a free row means nothing."""
        least = min(self.starts.values())
        if least >= SLACK:
            self.move(-least)
        logits = self.decode(self.token, self.alive)
        self.length += 1
        finite = logits.sum(-1, dtype=torch.float32).isfinite() | ~self.alive
        if self.repetition is not None:
            logits = self.repetition.penalise(logits)
        self.token = self.choose(logits)
        if self.repetition is not None:
            self.repetition.add(self.token)
        tokens, finite = torch.stack([self.token, finite.long()]).tolist()  # the one time that the host waits for the device
        if not all(finite):
            check_finite(False, self.model)
        return tokens

    def logits_after(self, prompt):
        """Prefill: the logits of the first token of an answer (1, vocabulary). `prefilled` then holds the prompt."""
        model, kept = self.model, 0
        if same_pictures(prompt.pixels, self.prompt.pixels):
            kept = min(common_prefix(prompt.ids, self.prompt.ids), len(prompt.ids) - 1)
        if model.config.image_id in prompt.ids[kept:]:  # all pictures are in the cache, or all are encoded
            kept = 0
        if self.prefilled is None or self.prefilled.max_length < len(prompt.ids):
            self.prefilled = KVCache(model.config.text, 1, cache_length(model.config, len(prompt.ids)), model.device, model.dtype)
            kept = 0
        self.prefilled.truncate(kept)
        ids = torch.tensor([prompt.ids[kept:]], device=model.device)
        x, _ = model.embed(ids, None if kept else prompt.pixels)  # (1, T, D)
        x = model.language_model(x, cache=self.prefilled, last=True)
        self.prompt = prompt
        logits = model.language_model.lm_head(x[:, -1])
        check_finite(bool(logits.isfinite().all()), model)
        return logits

    def make_room(self, T, limit):
        """A cache in which T tokens of a prompt fit before the next slot, and `limit` tokens of an answer after it."""
        slots = -(-(T + limit + SLACK) // 256) * 256  # a multiple of 256, so that few sizes occur
        if self.cache is None:
            self.cache = KVCache(self.model.config.text, len(self.token), slots, self.model.device, self.model.dtype)
        elif slots > self.cache.max_length:
            self.cache.grow(slots)
        if T > self.length:
            self.move(T - self.length)
        self.decode = fastest(self.model.decode_step, self.model.language_model, self.cache)

    def copy_prompt(self, row, T):
        """Copy the T tokens of `prefilled` into a row, just before the next slot."""
        start, end = self.length - T, self.length
        for layer, prefilled in zip(self.cache.layers, self.prefilled.layers):
            layer.keys[row, :, start:end] = prefilled.keys[0, :, :T]
            layer.values[row, :, start:end] = prefilled.values[0, :, :T]
        self.cache.real[row] = False
        self.cache.real[row, start:end] = True
        self.starts[row] = start

    def move(self, by):
        """Move the tokens of all rows by so many slots to the right; to the left if it is less than 0."""
        first, end = max(0, -by), self.length
        for layer in self.cache.layers:
            for tensor in (layer.keys, layer.values):
                tensor[:, :, first + by : end + by] = tensor[:, :, first:end].clone()
        real = self.cache.real[:, first:end].clone()
        self.cache.real.fill_(False)
        self.cache.real[:, first + by : end + by] = real
        self.cache.length += by
        self.length += by
        self.starts = {row: start + by for row, start in self.starts.items()}


def common_prefix(a, b):
    """How many items two lists have in common at the beginning."""
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


def same_pictures(a, b):
    """Whether two prompts show the same pictures. a, b: their pixels, or None."""
    if a is None or b is None:
        return a is b
    return torch.equal(a, b)


def check_finite(finite, model):
    if not finite:
        raise ValueError(f"the logits are not finite: weights are damaged, or too large for {model.dtype}; try another dtype")
