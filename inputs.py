"""What goes into a forward pass: ids or embeddings, mask, labels and positions, checked, with each `<image>` expanded.
And the checks of what a caller may ask for: pictures, options of generation, a prompt's length.

Shapes: B batch, T tokens, P features of a picture, D width of the language model.
"""

import math
from typing import NamedTuple

import torch
from PIL import Image

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
    """The arguments of `Llava.forward`, checked, as an Inputs. Raises ValueError, with the two values that do not fit each other."""
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
    """How many more tokens fit: into the context, and into the cache if there is one."""
    most = config.text.max_position_embeddings
    if cache is None:
        return most
    return min(most, cache.max_length) - int(cache.length)


def _check_room(B, T, dtype, config, cache):
    if cache is not None and (cache.batch_size, cache.dtype) != (B, dtype):
        here = f"the batch has {B} rows and the model is in {dtype}"
        raise ValueError(f"the cache is for {cache.batch_size} rows in {cache.dtype}; {here}")
    if T <= room(config, cache):
        return
    limit, what, before = config.text.max_position_embeddings, "the model's max_position_embeddings", ""
    if cache is not None and cache.max_length < limit:
        limit, what = cache.max_length, "the cache's max_length"
    if cache is not None and cache.length:
        before = f" after {int(cache.length)} in the cache"
    raise ValueError(f"{T} tokens{before} do not fit {what} of {limit}; shorten the prompt, use fewer pictures or start a new chat")


def _expanded(ids, pixels, mask, labels, config):
    """Checked ids (B, T) with as many `<image>` ids as there are features, and the mask and labels that belong to them."""
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
    if tokens == pictures * P:
        return ids, mask, labels

    mask = _expand(torch.ones_like(ids) if mask is None else mask, ids, 0, config)
    # A short row with a picture may now be the longest. Columns at the start that are padding in all rows are left out.
    start = int(mask.any(0).int().argmax())
    if labels is not None:
        labels = _expand(labels, ids, IGNORED, config)[:, start:]
    ids = _expand(ids, ids, config.pad_id, config)[:, start:]
    return ids, mask[:, start:], labels


def _expand(values, ids, padding, config):
    """Values (B, T), one for each of the ids (B, T): the value of an `<image>` is repeated for each of its features."""
    rows = []
    for row, of_row in zip(ids.tolist(), values.tolist()):
        rows.append(expand_images(row, config.image_id, config.features_per_image, of_row))
    return left_padded(rows, padding)


def left_padded(rows, padding):
    """Lists of different lengths as one tensor (B, T), T the longest, padded on the left."""
    width = max(map(len, rows))
    return torch.tensor([[padding] * (width - len(row)) + row for row in rows])


def _check_shapes(shape, **values):
    for name, value in values.items():
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} is {tuple(value.shape)}; expected {tuple(shape)}, one for each new token")


def _check_ids(name, ids, vocabulary):
    if ids.numel() and not 0 <= ids.min() <= ids.max() < vocabulary:
        raise ValueError(f"{name} run from {ids.min()} to {ids.max()}; the vocabulary has {vocabulary} rows")


def mask_of_padding(ids, config):
    """The attention mask of padded ids (B, T) that came without one. As in transformers, `<pad>` is never a word.

    None where there is no padding, or where a checkpoint pads with the token that ends an answer.
    """
    padding = ids == config.pad_id
    if config.pad_id in config.eos_ids or not padding.any():
        return None
    return ~padding


# What a caller may ask for


def check_pictures(images):
    if not isinstance(images, list | tuple) or not all(isinstance(image, Image.Image) for image in images):
        raise ValueError(f"images are {type(images).__name__}; expected a list of PIL pictures (images.open_image opens a file)")


def check_options(max_new_tokens, temperature, top_k, top_p, seed, repetition_penalty=1.0):
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
    if not 0 < repetition_penalty < math.inf:
        raise ValueError(f"repetition_penalty is {repetition_penalty}; expected more than 0: 1 changes nothing, 1.2 repeats less")


def check_room_for_answer(ids, config):
    """Raises ValueError where no token of an answer fits after the ids of a prompt."""
    limit = config.text.max_position_embeddings
    if len(ids) >= limit:
        raise ValueError(
            f"the context is full: with this question it has {len(ids)} tokens, and with max_position_embeddings of {limit} "
            'no answer fits; ask something shorter, show fewer pictures, or begin a new conversation ("/reset" in a chat)'
        )
