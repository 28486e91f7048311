"""What goes into a forward pass: ids or embeddings, mask, labels and positions, checked; each `<image>` expanded.

Shapes: B batch, T tokens, P features of a picture, D width of the language model.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from tokenizer import expand_images

IGNORED = -100  # a label that the loss leaves out


class Inputs(NamedTuple):
    """Fit for the model: on its device, with as many `<image>` ids as there are features."""

    ids: torch.Tensor | None  # (B, T); None where embeddings are given
    embeds: torch.Tensor | None  # (B, T, D)
    mask: torch.Tensor | None  # (B, T) bool
    positions: torch.Tensor | None  # (B, T)
    labels: torch.Tensor | None  # (B, T)


def prepare(config, device, dtype, ids, pixels, mask, positions=None, embeds=None, labels=None, cache=None):
    """The inputs of `Llava.forward` as an Inputs. Raises ValueError for whatever does not fit, with both of the values that disagree."""
    if (ids is None) == (embeds is None):
        raise ValueError("give input_ids or inputs_embeds, one of the two")
    if labels is not None:
        _check_ids("labels", labels[labels != IGNORED], config.text.vocab_size)
    if ids is not None:
        ids, mask, labels = _expanded(ids, pixels, mask, labels, config)
        ids, shape = ids.to(device), ids.shape
    else:
        if pixels is not None:
            raise ValueError("inputs_embeds hold their pictures already; give pixel_values with input_ids only")
        if embeds.ndim != 3 or embeds.shape[-1] != config.text.hidden_size:
            raise ValueError(f"inputs_embeds are {tuple(embeds.shape)}; expected (B, T, {config.text.hidden_size})")
        embeds, shape = embeds.to(device, dtype), embeds.shape[:2]
    _check_shapes(shape, attention_mask=mask, labels=labels, positions=positions)
    _check_room(*shape, dtype, config, cache)
    if mask is not None:
        mask = mask.to(device, torch.bool)
    if positions is not None:
        positions = positions.to(device, torch.long)
    if labels is not None:
        labels = labels.to(device, torch.long)
    return Inputs(ids, embeds, mask, positions, labels)


def room(config, cache):
    """How many tokens fit the context, or what is left of the cache."""
    most = config.text.max_position_embeddings
    return most if cache is None else min(most, cache.max_length) - int(cache.length)


def _check_room(B, T, dtype, config, cache):
    if cache is not None and (cache.batch_size, cache.dtype) != (B, dtype):
        here = f"the batch has {B} rows and the model is in {dtype}"
        raise ValueError(f"the cache is for {cache.batch_size} rows in {cache.dtype}; {here}")
    if T > room(config, cache):
        limit, what = config.text.max_position_embeddings, "the model's max_position_embeddings"
        if cache is not None and cache.max_length < limit:
            limit, what = cache.max_length, "the cache's max_length"
        before = f" after {int(cache.length)} in the cache" if cache is not None and cache.length else ""
        raise ValueError(f"{T} tokens{before} do not fit {what} of {limit}; shorten the prompt, use fewer pictures or start a new chat")


def _expanded(ids, pixels, mask, labels, config):
    """Checked ids (B, T) with as many `<image>` ids as there are features, mask and labels along with them."""
    if ids.ndim != 2 or not ids.numel():
        raise ValueError(f"input_ids are {tuple(ids.shape)}; expected (B, T), with at least one token")
    _check_shapes(ids.shape, attention_mask=mask, labels=labels)
    _check_ids("input_ids", ids, config.text.vocab_size)
    tokens, P = int((ids == config.image_id).sum()), config.features_per_image
    pictures = 0 if pixels is None else len(pixels)
    if tokens not in (pictures, pictures * P):
        raise ValueError(
            f"the prompt has {tokens} <image> tokens for {pictures} pictures; "
            f"expected one each ({pictures}), or one for each of their {pictures} × {P} = {pictures * P} features"
        )
    return _expand(ids, mask, labels, config) if tokens < pictures * P else (ids, mask, labels)


def _expand(ids, mask, labels, config):
    """Each `<image>` id (B, T) as many times as it has features, mask and labels with it, the rows padded on the left again.

    A short row with a picture may now be the longest, and its old padding is needless: columns that are padding in all rows
    are removed.
    """
    given, image_id, P = ids.tolist(), config.image_id, config.features_per_image
    width = max(len(expand_images(row, image_id, P)) for row in given)

    def stretch(values, padding):
        rows = (torch.tensor(expand_images(row, image_id, P, of_row)) for row, of_row in zip(given, values.tolist()))
        return torch.stack([F.pad(row, (width - len(row), 0), value=padding) for row in rows])

    mask = stretch(torch.ones_like(ids) if mask is None else mask, 0)
    start = int(mask.any(0).int().argmax())
    ids, labels = stretch(ids, config.pad_id), None if labels is None else stretch(labels, IGNORED)
    return ids[:, start:], mask[:, start:], None if labels is None else labels[:, start:]


def _check_shapes(shape, **values):
    for name, value in values.items():
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} is {tuple(value.shape)}; expected {tuple(shape)}, one for each new token")


def _check_ids(name, ids, vocabulary):
    if ids.numel() and not 0 <= ids.min() <= ids.max() < vocabulary:
        raise ValueError(f"{name} run from {ids.min()} to {ids.max()}; the vocabulary has {vocabulary} rows")
