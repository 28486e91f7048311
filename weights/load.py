"""From files to a model. The config is read and held against the weights (`as_stored`); a model without memory is made (`outline`);
each weight is read straight to where it stays (`checkpoint.fill`); what is faster on the device takes its place (`suit`).

`load` is the body of `Llava.from_pretrained`. It is handed the class, because `llava.py` imports this file.
"""

from dataclasses import replace
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from hardware import cpu, gpu
from hardware.device import SMALL, is_amd
from llama import RMSNorm, attention
from weights.checkpoint import checkpoint_folder, fill, read_headers
from weights.config import VIP_LAYERS, LlavaConfig
from weights.memory import weight_bytes
from weights.quantize import FILE, QuantizedLinear, put_quantized, quantizers


def load(cls, folder_or_hub_name, device, dtype, quantize, mapped):
    """A model of the class `cls` with the weights of a checkpoint. Arguments and errors as in `Llava.from_pretrained`."""
    folder = checkpoint_folder(folder_or_hub_name)
    config = LlavaConfig.from_pretrained(folder)
    if quantize and config.quantized:
        raise ValueError(f"{folder} is quantised already, to {config.quantized}; load it as it is, or quantise the original")
    stored = read_headers(folder, FILE) if config.quantized else read_headers(folder)
    config = as_stored(config, stored)
    tied = config.text.tie_word_embeddings
    if tied:
        stored.pop("language_model.lm_head.weight", None)
    model = outline(cls, config, config.quantized)
    makers = quantizers(model, quantize) if quantize else {}
    keep = stay_in_16_bits(model, stored, device, dtype)
    copy = not mapped and torch.device(device).type == "cpu"  # otherwise a CPU's weights stay in their files
    fill(model, stored, device, dtype, makers, copy=copy, keep=keep)
    if tied:
        tie_head(model.language_model, makers.get("language_model.lm_head.weight"))
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear):
            layer.settle()
    suit(model)
    return model.eval()


def as_stored(config, stored):
    """The LlavaConfig, corrected by the weights themselves where config.json is stale. stored: {our name: Stored}.

    Raises ValueError if `<image>` has no row in the vocabulary (the defaults alone, without a checkpoint, are such).
    """
    if config.image_id >= config.text.vocab_size:
        raise ValueError(f"image_token_index is {config.image_id}; the vocabulary has {config.text.vocab_size} rows")
    # ViP-7B's published config says `vision_feature_layer: -2`, but its projector has the width of five layers.
    projector = stored.get("projector.linear_1.weight")
    five = projector is not None and projector.shape[-1:] == (len(VIP_LAYERS) * config.vision.hidden_size,)
    if config.projector_layernorm_eps is not None and len(config.vision_layers) == 1 and five:
        config = replace(config, vision_layers=list(VIP_LAYERS))
    # A tied checkpoint may store its head too; it is tied only if the two are equal, as in transformers.
    head, embeddings = (stored.get(f"language_model.{name}.weight") for name in ("lm_head", "embed_tokens"))
    if config.text.tie_word_embeddings and head and embeddings:
        tied = (head.shape, head.kind) == (embeddings.shape, embeddings.kind) and torch.equal(head.read(), embeddings.read())
        config = replace(config, text=replace(config.text, tie_word_embeddings=tied))
    return config


def outline(cls, config, scheme=None):
    """A model without memory: its parameters have a shape and a type. scheme: with quantised layers, to be filled."""
    with torch.device("meta"):
        model = cls(config)
        if scheme is not None:
            put_quantized(model, scheme)
    return model


def tie_head(language_model, quantizer=None):
    """Let the output head share the embeddings' matrix, or have a quantised copy of it."""
    embeddings = language_model.embed_tokens.weight
    if quantizer is None:
        language_model.lm_head.weight = embeddings
    else:
        language_model.lm_head = quantizer(embeddings)


def loaded_bytes(cls, folder, config, device, dtype, scheme=None):
    """What the weights of the checkpoint in a folder will take on the device."""
    model = outline(cls, config, scheme)
    weights = weight_bytes(model, dtype)
    if dtype == torch.float32 and not config.quantized and has_kernels(model, device):
        for name in stay_in_16_bits(model, read_headers(folder), device, dtype):
            weights -= 2 * model.get_parameter(name).numel()  # of 4 bytes 2 are stored
    return weights


def stay_in_16_bits(model, stored, device, dtype):
    """Names of the linear layers' weights that stay in the 16 bits in which they are stored, though the model computes in float32: on
    a CPU with kernels that make float32 of them as they read them. The numbers are the same, in half the bytes."""
    if dtype != torch.float32 or not has_kernels(model, device):
        return set()
    names = {f"{name}.weight" for name, layer in model.named_modules() if type(layer) is nn.Linear}
    return {name for name in names if name in stored and stored[name].kind in ("F16", "BF16")}


def has_kernels(model, device):
    """Whether the CPU's kernels for one row are there, and the model is large enough to gain by them."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return torch.device(device).type == "cpu" and parameters >= SMALL and cpu.has_kernels()


# What is faster on a device, in the places of the plain forms. What each of them is for stands in hardware/cpu.py and hardware/gpu.py.


def suit(model):
    """Put what is faster on the model's device in the places of the plain forms, once, so that no layer asks at each step."""
    device, dtype, blocks = model.device, model.dtype, model.language_model.layers
    if device.type == "cpu":
        suit_cpu(model, has_kernels(model, device))
    else:
        for name, layer in list(model.named_modules()):
            if isinstance(layer, RMSNorm):
                model.set_submodule(name, gpu.fused_norm(layer))
    if device.type == "cuda":
        gpu.without_cudnn_attention()
        if gpu.shares_heads_slowly(device, dtype):
            for block in blocks:
                block.self_attn.attend = own_heads


def suit_cpu(model, kernels):
    """Layers and attention for a CPU. kernels: with numba's; otherwise with what PyTorch has for bfloat16."""
    if kernels:
        one_row, attend = cpu.row_times_16_bits, cpu.attention_of_one
    elif is_amd():
        one_row, attend = cpu.row_by_pytorch, cpu.attention_in_two_products
    else:
        one_row, attend = F.linear, None
    kinds = (torch.bfloat16, torch.float16) if kernels else (torch.bfloat16,)
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and layer.weight.dtype in kinds:
            model.set_submodule(name, cpu.SixteenBitLinear(layer, one_row))
        if kernels and isinstance(layer, QuantizedLinear):
            layer.one_row = one_quantized_row(layer.weight)
    if attend is not None and (kernels or model.dtype == torch.bfloat16):
        for block in model.language_model.layers:
            block.self_attn.attend = partial(one_query_apart, attend)


def one_quantized_row(weight):
    """The CPU's product of one row with a packed weight, or None where its kernel wants other packing."""
    if weight.dtype == torch.int8:
        return cpu.row_times_8_bits
    return cpu.row_times_4_bits if weight.shape[2] % 16 == 0 else None


def one_query_apart(attend, q, k, v, mask):
    """`attention`, where a single query a row goes to a form of its own."""
    return attend(q, k, v, mask) if q.shape[2] == 1 and mask is not None else attention(q, k, v, mask)


def own_heads(q, k, v, mask):
    """`attention`, where without a mask each query head gets a key/value head of its own."""
    if mask is None:
        groups = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
    return attention(q, k, v, mask)
