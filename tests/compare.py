"""The comparison with transformers that the tests of parity, the traps and the live comparison share."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from llama import KVCache
from llava import Llava

FIXTURES = Path(__file__).parent / "fixtures"
FAMILIES = ("llava", "bakllava", "vip")
TOLERANCE = 1e-5


def load(family, dtype=None):
    """A family's tiny model and the tensors transformers computed from it (made by make_fixtures.py)."""
    return Llava.from_pretrained(FIXTURES / family, dtype=dtype), load_file(FIXTURES / family / "reference.safetensors")


def relative(ours, theirs):
    """The largest difference, as a part of the largest value; infinite where the shapes differ, and for a NaN."""
    if ours.shape != theirs.shape:
        return torch.inf
    return ((ours.float() - theirs).abs().nan_to_num(nan=torch.inf).max() / theirs.abs().max()).item()


def stage_errors(model, reference, **inputs):
    """{stage: relative error}, in the order of the computation, so that the first large one names the culprit.

    inputs: other spellings of the reference's own inputs, which should give the same. Padding is not compared.
    """
    inputs = {name: reference.get(name) for name in ("input_ids", "pixel_values", "attention_mask", "labels")} | inputs
    real = reference["attention_mask"].bool()
    errors = {}
    with torch.no_grad():
        fused = model(**inputs, output_hidden_states=True)
        naive = model(**inputs, output_attentions=True)  # another attention, so its logits are compared too
        if inputs["pixel_values"] is not None:
            layers = list(range(model.config.vision.num_hidden_layers + 1))
            vision = model.vision_tower(inputs["pixel_values"], layers)
            errors["vision"] = max(map(relative, vision, reference["vision"]))
            errors["features"] = relative(fused.image_features, reference["image_features"])
        states = [relative(a[real], b[real]) for a, b in zip(fused.hidden_states, reference["hidden_states"])]
        errors["embeddings"] = states[0]
        maps = zip(naive.attentions, reference["attentions"])  # (B, H, T, S) each
        errors["attention"] = max(relative(a.transpose(1, 2)[real], b.transpose(1, 2)[real]) for a, b in maps)
        errors["blocks"] = max(states[1:])
        errors["logits"] = max(relative(out.logits[real], reference["logits"][real]) for out in (fused, naive))
        errors["loss"] = relative(fused.loss, reference["loss"])
        errors["decoding"] = relative(decode(model, reference, inputs), reference["step_logits"])
    return errors


def decode(model, reference, inputs):
    """The logits of the first steps of decoding through the cache, fed with the reference's tokens."""
    steps, prompt = reference["step_logits"].shape[1], {name: inputs[name] for name in inputs if name != "labels"}
    (B, T), tokens = reference["input_ids"].shape, reference["tokens"]
    cache = KVCache(model.config.text, B, T + steps, dtype=model.dtype)
    logits = [model(**prompt, cache=cache).logits[:, -1]]
    for step in range(steps - 1):
        embeds = model.language_model.embed(tokens[:, step : step + 1])  # not as ids: an <image> here is a mere word
        logits.append(model(inputs_embeds=embeds, cache=cache).logits[:, -1])
    return torch.stack(logits, 1)


def greedy_tokens(model, reference, **inputs):
    inputs = {name: reference.get(name) for name in ("input_ids", "pixel_values", "attention_mask")} | inputs
    return torch.stack(list(model.generate(**inputs, max_new_tokens=reference["tokens"].shape[1], eos_ids=())), 1)


def one_id_per_image(model, reference):
    """The reference's ids, mask and labels with one `<image>` id for each picture, padded on the left again."""
    image_id, P = model.config.image_id, model.config.features_per_image
    image = reference["input_ids"] == image_id
    keep = reference["attention_mask"].bool() & (~image | (image.cumsum(1) % P == 1))
    T = int(keep.sum(1).max())
    short = {}
    for name, fill in (("input_ids", model.config.pad_id), ("attention_mask", 0), ("labels", -100)):
        rows = [row[kept] for row, kept in zip(reference[name], keep)]
        short[name] = torch.stack([torch.cat([row.new_full((T - len(row),), fill), row]) for row in rows])
    return short
