"""What a checkpoint's config.json says, what it leaves out, and where it is wrong.

Published files are sparse: what equals the default of Hugging Face's config class is left out, so the dataclasses have the
same defaults (`CLIPVisionConfig` and `LlamaConfig` stand beside the towers they shape). Beyond that:

| published files                                                | are read as                                              |
|----------------------------------------------------------------|----------------------------------------------------------|
| a field that is null                                           | left out; but a Mistral whose window is null has none    |
| no vision_config at all                                        | the tower of LLaVA-1.5, VIT_L_14_336                     |
| a Mistral's text_config                                        | with a Mistral's defaults, MISTRAL                       |
| a Llama's with a sliding_window                                | without it: no Llama was trained with one                |
| image_token_index, in newer files image_token_id               | image_id                                                 |
| rope_theta beside the other fields, or in an object of RoPE's  | rope_theta                                               |
| ViP-LLaVA's vision_feature_layer or vision_feature_layers      | vision_layers; where a file has both, the plural's       |
| ViP-7B's vision_feature_layer: -2                              | VIP_LAYERS, as the width of its projector says           |
| ViP-LLaVA's vision_feature_select_strategy                     | "default": it has no choice                              |
| tie_word_embeddings, in text_config or outside                 | tied if one says so and no other head is stored          |
| pad_token_id -1, as in the first Llama's                       | none: any other token does                               |
| eos_token_id in generation_config.json too                     | generation_config.json's                                 |

`weights.load.as_stored` does the two for which the weights are needed. This file has the defaults, then how each part of a config.json is
read, then which values fit a field.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

from clip import CLIPVisionConfig
from llama import LlamaConfig
from weights.checkpoint import read_json

# What published files leave out.
VIT_L_14_336 = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336, patch_size=14)
VIP_LAYERS = [-2, -5, -8, -11, 6]  # in this order: states 23, 20, 17, 14 and 6 of the 25; fine lines are lost higher up
LLAVA_LAYER = -2  # the last state but one
MISTRAL = dict(intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=131072, sliding_window=4096)
IMAGE_ID, EOS_ID = 32000, 2


@dataclass
class LlavaConfig:
    """A checkpoint's config.json, its defaults filled in."""

    vision: CLIPVisionConfig
    text: LlamaConfig
    style: str  # the chat format: a key of tokenizer.STYLES
    vision_layers: list[int]  # which of the tower's hidden states the projector reads, concatenated in this order
    keep_cls: bool  # strategy "full": the class token is a feature too; "default": patches only
    projector_layernorm_eps: float | None  # None: no LayerNorm (LLaVA); ViP-LLaVA has one
    projector_bias: bool
    image_id: int
    pad_id: int
    eos_ids: tuple[int, ...]
    quantized: str | None = None  # the scheme (weights/quantize.py) that the weights are stored in; None: in 16 or 32 bits
    pads_pictures: bool = False  # whether it was trained on pictures padded to a square, not cropped

    @property
    def features_per_image(self):
        """How many tokens of the language model a picture takes: 24 × 24 = 576 for LLaVA-1.5."""
        return self.vision.num_patches + self.keep_cls

    @classmethod
    def from_pretrained(cls, folder):
        """Read config.json, and generation_config.json for the tokens that end an answer.

        Raises FileNotFoundError or ValueError for what is missing, not a LLaVA or not supported.
        """
        folder = Path(folder)
        raw, generation = read_json(folder / "config.json"), {}
        if "mm_vision_tower" in raw:
            what_to_do = f"convert it first (python convert.py {folder} OUT), or take a conversion like llava-hf/llava-1.5-7b-hf"
            raise ValueError(f"{folder} is in the original authors' layout; {what_to_do}")
        path = folder / "generation_config.json"
        if path.exists() or path.is_symlink():  # a link that leads nowhere is an error, not an absent file
            generation = read_json(path)
        try:
            return llava_config(raw, generation)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None


def llava_config(raw, generation):
    """A LlavaConfig from what config.json and generation_config.json hold. Raises ValueError, naming the field."""
    raw = {"model_type": None, "image_token_index": raw.get("image_token_id", IMAGE_ID), **raw}  # without a model_type it is refused
    vip = raw["model_type"] == "vipllava"
    if vip:
        raw |= {"vision_feature_select_strategy": "default", "multimodal_projector_bias": True}
    check("config.json", raw, LLAVA)
    raw_text = raw.get("text_config", {})
    tied = raw.get("tie_word_embeddings", False) or raw_text.get("tie_word_embeddings", False)
    vision = vision_config(raw.get("vision_config", VIT_L_14_336))
    text = text_config(raw_text | {"tie_word_embeddings": tied})
    eos_ids, pad_id = ending_and_padding(raw_text | raw | generation, raw["image_token_index"], text.vocab_size)
    return LlavaConfig(
        vision=vision,
        text=text,
        style=chat_style(raw, vip, raw_text),
        vision_layers=vision_layers(raw, vip, vision.num_hidden_layers),
        keep_cls=raw.get("vision_feature_select_strategy", "default") == "full",
        projector_layernorm_eps=raw.get("projector_layernorm_eps", 1e-5) if vip else None,
        projector_bias=raw.get("multimodal_projector_bias", True),
        image_id=raw["image_token_index"],
        pad_id=pad_id,
        eos_ids=eos_ids,
        quantized=raw.get("quantization_config", {}).get("scheme"),
        pads_pictures=raw.get("image_aspect_ratio") == "pad",
    )


def vision_config(raw):
    """A CLIPVisionConfig from the `vision_config` of a config.json. Raises ValueError, naming the field."""
    check("vision_config", raw, VISION)
    config = CLIPVisionConfig(**known(raw, CLIPVisionConfig))
    if config.patch_size > config.image_size:
        raise ValueError(f"vision_config has patch_size {config.patch_size}, larger than its image_size {config.image_size}")
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(f"vision_config has hidden_size {config.hidden_size}, not a multiple of its {config.num_attention_heads} heads")
    return config


def text_config(raw):
    """A LlamaConfig from the `text_config` of a config.json. Raises ValueError, naming the field."""
    check("text_config", raw, TEXT)
    rope = rope_settings(raw)
    check("text_config", rope, TEXT)
    if raw.get("model_type") == "mistral":
        values = MISTRAL | raw | rope
    else:
        values = raw | rope | {"sliding_window": None}  # as in transformers
    config = LlamaConfig(**known(values, LlamaConfig))
    if config.num_attention_heads % config.num_key_value_heads:
        heads = f"{config.num_attention_heads} query heads cannot share {config.num_key_value_heads} key/value heads evenly"
        raise ValueError(f"text_config: {heads}; num_attention_heads must be a multiple of num_key_value_heads")
    if config.head_dim % 2:
        raise ValueError(f"text_config has head_dim {config.head_dim}; RoPE turns pairs of dimensions, so it must be even")
    return config


def rope_settings(raw):
    """rope_type, and rope_theta if it is in an object of RoPE's settings, as newer files have it."""
    said = {}
    for name in ("rope_scaling", "rope_parameters"):
        said.update(raw.get(name, {}))
    settings = {"rope_type": said.get("rope_type", said.get("type", "default"))}
    if "rope_theta" in said:
        settings["rope_theta"] = said["rope_theta"]
    return settings


def known(raw, config_class):
    """Those fields of a raw config that a config class has."""
    return {field.name: raw[field.name] for field in fields(config_class) if field.name in raw}


def vision_layers(raw, vip, depth):
    """The hidden states that the projector reads, as a list. Raises ValueError for one that a tower of this depth has not."""
    if vip:
        layers = raw.get("vision_feature_layers", raw.get("vision_feature_layer", VIP_LAYERS))
    else:
        layers = raw.get("vision_feature_layer", LLAVA_LAYER)
    layers = list(layers) if isinstance(layers, list) else [layers]
    for layer in layers:
        if not -depth - 1 <= layer <= depth:
            states = f"the tower has hidden states 0 to {depth}, or -{depth + 1} to -1"
            raise ValueError(f"vision_feature_layer is {layers}, but vision layer {layer} does not exist: {states}")
    return layers


def ending_and_padding(said, image_id, vocab_size):
    """The ids that end an answer, and the id that fills up a batch: what the files say, put together."""
    eos = said.get("eos_token_id", EOS_ID)
    check("config.json", said, {"eos_token_id": TOKENS, "pad_token_id": TOKEN})
    eos_ids = tuple(eos) if isinstance(eos, list) else (eos,)
    pad = said.get("pad_token_id", -1)
    if not 0 <= pad < vocab_size or pad == image_id:  # any other does: nothing looks at padding
        pad = eos_ids[0] if eos_ids else 0
    return eos_ids, pad


def chat_style(raw, vip, raw_text):
    """The chat format. convert.py writes down which one a checkpoint was trained with; otherwise the family tells."""
    if vip:
        style = "vip"
    elif raw_text.get("model_type") == "mistral":
        style = "bakllava"
    else:
        style = "llava"
    return raw.get("chat_style", style)


# Which values fit a field. First what a field is and how fields are checked, then one table for each part of config.json.


class Field(NamedTuple):
    fits: object  # a function of the value: does it fit?
    expected: str  # what fits, in words


def is_whole(value):
    return type(value) is int  # JSON's true is no number, though Python's is


def is_whole_or_list(value):
    return is_whole(value) or isinstance(value, list) and all(is_whole(item) for item in value)


def is_number(value):
    return type(value) in (int, float)


def is_ours(value):
    return isinstance(value, dict) and value.get("quant_method") == "llava.py" and isinstance(value.get("scheme"), str)


def optional(field):
    return Field(lambda value: value is None or field.fits(value), f"{field.expected}, or null")


def only(*values):
    return Field(lambda value: value in values, " or ".join(map(repr, values)) + "; no other is supported")


def check(part, values, table):
    """Raises ValueError for the first value that does not fit its field; fields that are not in the table are left aside."""
    for name, (fits, expected) in table.items():
        if name in values and not fits(values[name]):
            raise ValueError(f"{part} has {name} {values[name]!r}; expected {expected}")


SIZE = Field(lambda value: is_whole(value) and 0 < value <= 2**20, "a positive whole number up to 1,048,576")  # no model has more
REAL = Field(lambda value: is_number(value) and 0 < value <= 10**12, "a positive number up to 1,000,000,000,000")
FLAG = Field(lambda value: type(value) is bool, "true or false")
OBJECT = Field(lambda value: isinstance(value, dict), "an object")
TOKEN = Field(is_whole, "a token id")
TOKENS = Field(is_whole_or_list, "a token id or a list of them")
LAYERS = Field(lambda value: value != [] and is_whole_or_list(value), "a layer or a list of them")

VISION = {
    "model_type": only("clip_vision_model"),
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_hidden_layers": SIZE,
    "num_attention_heads": SIZE,
    "num_channels": SIZE,
    "image_size": SIZE,
    "patch_size": SIZE,
    "layer_norm_eps": REAL,
    "hidden_act": only("quick_gelu"),
}
TEXT = {
    "model_type": Field(lambda value: value in ("llama", "mistral"), "a language model that is supported: 'llama' and 'mistral'"),
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_hidden_layers": SIZE,
    "num_attention_heads": SIZE,
    "max_position_embeddings": SIZE,
    "num_key_value_heads": optional(SIZE),
    "head_dim": optional(SIZE),
    "sliding_window": optional(SIZE),
    "rms_norm_eps": REAL,
    "rope_theta": REAL,
    "rope_scaling": OBJECT,
    "rope_parameters": OBJECT,
    "rope_type": only("default"),  # scaled RoPE is not part of these models
    "hidden_act": only("silu"),
    "attention_bias": only(False),
    "mlp_bias": only(False),
    "tie_word_embeddings": FLAG,
}
LLAVA = {
    "model_type": only("llava", "vipllava"),
    "vision_config": OBJECT,
    "text_config": OBJECT,
    "projector_hidden_act": only("gelu"),
    "image_grid_pinpoints": only(None),
    "vision_feature_select_strategy": only("default", "full"),
    "vision_feature_layer": LAYERS,
    "vision_feature_layers": LAYERS,
    "multimodal_projector_bias": FLAG,
    "tie_word_embeddings": FLAG,
    "projector_layernorm_eps": Field(lambda value: is_number(value) and 0 < value < 1, "a number between 0 and 1"),
    "image_token_index": Field(lambda value: is_whole(value) and value >= 0, "a token id"),
    "chat_style": only("llava", "bakllava", "vip", "v1"),  # the keys of tokenizer.STYLES
    "quantization_config": Field(is_ours, "none, or one that convert.py has written; take the checkpoint in 16 bits, and --quantize"),
}
