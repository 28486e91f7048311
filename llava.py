"""LLaVA: a language model that sees (Liu et al. 2023, https://arxiv.org/abs/2304.08485 and https://arxiv.org/abs/2310.03744).

A CLIP vision transformer turns a picture into patch features; a small MLP, the projector, maps each into the space of
the language model's word embeddings; there they take the place of the `<image>` token. From then on a picture is 576
more words to the language model. ViP-LLaVA (Cai et al. 2024, https://arxiv.org/abs/2312.00784) reads five of CLIP's
layers instead of one, concatenated and normalised; BakLLaVA has a Mistral as its language model; and each has its own
chat format. That is all the difference.

Shapes: B batch, T tokens, N pictures, P features of a picture, D width of the language model, H its heads, S slots that
can be attended to, V width of the vision tower, L layers of it that are read.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from checkpoint import checkpoint_folder, fill, read_headers
from clip import CLIPVision
from config import LlavaConfig
from generate import check_options, sample, steps
from llama import KVCache, Llama
from tokenizer import expand_images

IGNORED = -100  # a label that the loss leaves out


class Projector(nn.Module):
    """From the vision tower's space to the language model's: (N, P, L·V) -> (N, P, D). An MLP of two layers (LLaVA-1.5,
    section 3.3); ViP-LLaVA normalises its input, because the layers it concatenates differ in scale (section 3.1)."""

    def __init__(self, config):
        super().__init__()
        width, eps = config.vision.hidden_size * len(config.vision_layers), config.projector_layernorm_eps
        self.projector_layernorm = nn.Identity() if eps is None else nn.LayerNorm(width, eps=eps)
        self.linear_1 = nn.Linear(width, config.text.hidden_size, bias=config.projector_bias)
        self.linear_2 = nn.Linear(config.text.hidden_size, config.text.hidden_size, bias=config.projector_bias)

    def forward(self, x):
        return self.linear_2(F.gelu(self.linear_1(self.projector_layernorm(x))))  # the exact GELU, by the error function


def splice(embeds, is_image, features):
    """Put picture features in the place of the `<image>` tokens' embeddings, in order, row by row of the batch.

    embeds: (B, T, D); is_image: (B, T) bool; features: (N, P, D) with N · P True positions. Returns (B, T, D).
    """
    return embeds.masked_scatter(is_image[..., None], features.to(embeds))


@dataclass
class LlavaOutput:
    """What a forward pass gives. T counts the tokens after `<image>` has been expanded."""

    logits: torch.Tensor  # (B, T, vocabulary)
    loss: torch.Tensor | None  # mean cross-entropy of the next token where labels are not −100; None without labels
    image_features: torch.Tensor | None  # (N, P, D), as spliced
    hidden_states: list[torch.Tensor] | None  # (B, T, D): the spliced embeddings, then after each block, the last normalised
    attentions: list[torch.Tensor] | None  # (B, H, T, S) for each block


class Llava(nn.Module):
    """The whole model. Make one with `Llava.from_pretrained`; its forward pass is `embed`, then the language model."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vision_tower = CLIPVision(config.vision)
        self.projector = Projector(config)
        self.language_model = Llama(config.text)

    def encode_images(self, pixel_values):
        """Pictures (N, 3, side, side) -> features (N, P, D) in the space of the word embeddings.

        Layer −2, not the last: CLIP's loss reads the class token alone, so what its last block makes of a patch was never
        trained, and one block lower the patches are what that token gathers from (compared in LLaVA, section 4.1).
        """
        states = self.vision_tower(pixel_values, self.config.vision_layers)  # L × (N, 1 + patches, V)
        states = [state if self.config.keep_cls else state[:, 1:] for state in states]
        return self.projector(torch.cat(states, dim=-1))  # (N, P, D)

    def embed(self, input_ids, pixel_values=None):
        """What the language model reads: word embeddings, with picture features where the `<image>` tokens stand.

        input_ids: (B, T), with as many `<image>` ids as there are features; pixel_values: (N, 3, side, side), or None.
        Returns (B, T, D) and the features (N, P, D), or None.
        """
        embeds = self.language_model.embed(input_ids)  # (B, T, D)
        if pixel_values is None:
            return embeds, None
        features = self.encode_images(pixel_values)  # (N, P, D)
        return splice(embeds, input_ids == self.config.image_id, features), features

    def forward(
        self, input_ids=None, pixel_values=None, attention_mask=None, positions=None, inputs_embeds=None, labels=None, cache=None,
        output_hidden_states=False, output_attentions=False,
    ):  # fmt: skip
        """Pixels and ids to logits.

        input_ids: (B, T), with one `<image>` id per picture (expanded here, mask and labels along with it) or with
            as many as there are features; or inputs_embeds: (B, T, D), spliced already.
        pixel_values: (N, 3, side, side), the pictures in the order of their `<image>` tokens, row by row.
        attention_mask: (B, T), 1 for the new tokens that are real, 0 for padding, which stands on the left where a row is
            to go on (in training none is, and either side will do).
        positions: (B, T); by default they count the real tokens, those in the cache included.
        labels: (B, T) ids, −100 where there is nothing to learn.
        cache: a KVCache with room for T more tokens; they are added to it and see what it holds.
        Raises ValueError where counts or shapes do not fit.
        """
        ids, embeds, mask, labels, positions = self._check(
            input_ids, pixel_values, attention_mask, positions, inputs_embeds, labels, cache
        )  # fmt: skip
        features, states, maps = None, [] if output_hidden_states else None, [] if output_attentions else None

        if embeds is None:
            embeds, features = self.embed(ids, pixel_values)  # (B, T, D): CLIP, projector, splice
        x = self.language_model(embeds, mask, positions, cache, states, maps)  # (B, T, D)
        logits = self.language_model.lm_head(x)  # (B, T, vocabulary)
        loss = None if labels is None else next_token_loss(logits, labels)
        return LlavaOutput(logits, loss, features, states, maps)

    def decode_step(self, token, alive, cache):
        """One more token of each row in, the logits of the next one out: (B,) -> (B, vocabulary).

        alive: (B,) bool; what a row holds after its end is padding. All shapes are fixed, the cache is written in place,
        and no value is read back from the device, so that the step can be captured or compiled as it stands.
        """
        x = self.language_model.embed(token[:, None])  # (B, 1, D)
        x = self.language_model(x, alive[:, None], cache=cache)
        return self.language_model.lm_head(x[:, -1])

    def generate(
        self, input_ids, pixel_values=None, attention_mask=None, max_new_tokens=512, temperature=0.0, top_k=None, top_p=None,
        seed=None, eos_ids=None, cache=None,
    ):  # fmt: skip
        """Continue each row of a batch: an iterator of (B,) ids, one for each step.

        input_ids, pixel_values, attention_mask: as in forward.
        temperature 0 takes the likeliest token; above 0 it divides the logits and a token is drawn, from the top_k
            likeliest and from the fewest whose probabilities reach top_p, if given. seed makes the draws repeatable.
        eos_ids: ids that end a row, the ended row then yields pad_id; None: the checkpoint's; (): none.
        cache: continue what it holds. By default one is made, of just the length needed.
        Ends after max_new_tokens, when every row has ended, or where the context or the cache is full.
        Raises ValueError at once, not at the first step.
        """
        check_options(max_new_tokens, temperature, top_k, top_p, seed)
        eos = torch.tensor(self.config.eos_ids if eos_ids is None else list(eos_ids), dtype=torch.long, device=self.device)
        random = None if seed is None else torch.Generator(self.device).manual_seed(seed)
        ids, _, mask, _, _ = self._check(input_ids, pixel_values, attention_mask, cache=cache)
        B, T = ids.shape
        room = self._room(cache) - T
        if room < 1:
            raise ValueError(f"a prompt of {T} tokens leaves no room for an answer; shorten it or use a longer cache")
        if mask is not None and not mask[:, -1].all():
            raise ValueError("attention_mask ends in padding; a batch is padded on the left, so that every row ends in its last token")
        count = min(max_new_tokens, room)
        if cache is None:
            cache = KVCache(self.config.text, B, T + count, self.device, self.dtype)
        with torch.no_grad():
            x, _ = self.embed(ids, pixel_values)
        return steps(self, x, mask, cache, count, lambda logits: sample(logits, temperature, top_k, top_p, random), eos)

    @property
    def device(self):
        return self.language_model.norm.weight.device

    @property
    def dtype(self):
        return self.language_model.norm.weight.dtype

    def _check(self, ids, pixels, mask, positions=None, embeds=None, labels=None, cache=None):
        """What goes into a forward pass, checked and on the model's device, each `<image>` expanded: ids or embeds, mask,
        labels, positions. Raises ValueError for whatever does not fit."""
        vocabulary, P = self.config.text.vocab_size, self.config.features_per_image
        if (ids is None) == (embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of the two")
        if labels is not None:
            _check_ids("labels", labels[labels != IGNORED], vocabulary)
        if embeds is not None:
            if pixels is not None:
                raise ValueError("inputs_embeds hold their pictures already; give pixel_values with input_ids only")
            if embeds.ndim != 3 or embeds.shape[-1] != self.config.text.hidden_size:
                raise ValueError(f"inputs_embeds are {tuple(embeds.shape)}; expected (B, T, {self.config.text.hidden_size})")
            shape, embeds = embeds.shape[:2], embeds.to(self.device, self.dtype)
        else:
            if ids.ndim != 2 or not ids.numel():
                raise ValueError(f"input_ids are {tuple(ids.shape)}; expected (B, T), with at least one token")
            _check_shapes(ids.shape, attention_mask=mask, labels=labels)
            _check_ids("input_ids", ids, vocabulary)
            tokens, pictures = int((ids == self.config.image_id).sum()), 0 if pixels is None else len(pixels)
            if tokens not in (pictures, pictures * P):
                raise ValueError(
                    f"the prompt has {tokens} <image> tokens for {pictures} pictures; "
                    f"expected one each ({pictures}), or one for each of their {pictures} × {P} = {pictures * P} features"
                )
            if tokens < pictures * P:
                ids, mask, labels = self._expand(ids, mask, labels)
            shape, ids = ids.shape, ids.to(self.device)
        _check_shapes(shape, attention_mask=mask, labels=labels, positions=positions)
        if cache is not None and (cache.batch_size, cache.dtype) != (shape[0], self.dtype):
            here = f"the batch has {shape[0]} rows and the model is in {self.dtype}"
            raise ValueError(f"the cache is for {cache.batch_size} rows in {cache.dtype}; {here}")
        if shape[1] > self._room(cache):
            full = cache is not None and cache.max_length < self.config.text.max_position_embeddings
            limit = (
                f"the cache's max_length of {cache.max_length}"
                if full
                else f"the model's max_position_embeddings of {self.config.text.max_position_embeddings}"
            )
            before = f" after {int(cache.length)} in the cache" if cache is not None and cache.length else ""
            raise ValueError(f"{shape[1]} tokens{before} do not fit {limit}; shorten the prompt, use fewer pictures or start a new chat")
        mask = None if mask is None else mask.to(self.device, torch.bool)
        labels, positions = (None if rows is None else rows.to(self.device, torch.long) for rows in (labels, positions))
        return ids, embeds, mask, labels, positions

    def _expand(self, ids, mask, labels):
        """Each `<image>` id (B, T) as many times as it has features, mask and labels with it, the rows padded on the left again.

        Where a row with a picture had been the shorter one, its old padding has become needless: what is padding in all rows
        is left away.
        """
        given, P = ids.tolist(), self.config.features_per_image
        mask = torch.ones_like(ids) if mask is None else mask
        width = max(len(expand_images(row, self.config.image_id, P)) for row in given)

        def stretch(values, padding):
            rows = (torch.tensor(expand_images(row, self.config.image_id, P, of_row)) for row, of_row in zip(given, values.tolist()))
            return torch.stack([F.pad(row, (width - len(row), 0), value=padding) for row in rows])

        mask = stretch(mask, 0)
        start = int(mask.any(0).int().argmax())
        ids, labels = stretch(ids, self.config.pad_id), None if labels is None else stretch(labels, IGNORED)
        return ids[:, start:], mask[:, start:], None if labels is None else labels[:, start:]

    def _room(self, cache):
        """How many tokens fit the context, or what is left of the cache."""
        limit = self.config.text.max_position_embeddings
        return limit if cache is None else min(limit, cache.max_length) - int(cache.length)

    @classmethod
    def from_pretrained(cls, folder_or_hub_name, device="cpu", dtype=None):
        """Load a Hugging Face checkpoint: a folder, or a name on the hub (needs `huggingface_hub`).

        dtype None keeps the stored type. Raises FileNotFoundError or ValueError, before any weight is read, for whatever
        is missing, unexpected, of a wrong shape or damaged.
        """
        folder = checkpoint_folder(folder_or_hub_name)
        config, stored = LlavaConfig.from_pretrained(folder), read_headers(folder)
        config = config.as_stored(stored)
        if config.text.tie_word_embeddings:
            stored.pop("language_model.lm_head.weight", None)
        with torch.device("meta"):  # shapes without memory; each weight is then read straight to where it stays
            model = cls(config)
        fill(model, stored, device, dtype)
        if config.text.tie_word_embeddings:
            model.language_model.lm_head.weight = model.language_model.embed_tokens.weight
        return model.eval()


def next_token_loss(logits, labels):
    """The mean cross-entropy of each next token (LLaVA, equation 3): the logits at t (B, T, vocabulary) predict the label at
    t + 1 (B, T), where that is not −100."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED)


def _check_shapes(shape, **values):
    for name, value in values.items():
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} is {tuple(value.shape)}; expected {tuple(shape)}, one for each new token")


def _check_ids(name, ids, vocabulary):
    if ids.numel() and not 0 <= ids.min() <= ids.max() < vocabulary:
        raise ValueError(f"{name} run from {ids.min()} to {ids.max()}; the vocabulary has {vocabulary} rows")
