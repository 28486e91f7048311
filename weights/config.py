"""What a checkpoint's config.json says, what it leaves out, and where it is wrong.

Published files are sparse: what equals the default of Hugging Face's config class is left out, so the dataclasses have the
same defaults (`CLIPVisionConfig` and `LlamaConfig` stand beside the towers they shape). One table for each part of the file
says which values fit a field; `check` holds a part against its table.
"""

from dataclasses import dataclass, fields
from pathlib import Path

from clip import CLIPVisionConfig
from llama import LlamaConfig
from weights.checkpoint import read_json

# What published files leave out: LLaVA's vision tower, which of its layers ViP-LLaVA reads, in this order, and what a Mistral
# has where a Llama has something else.
VIT_L_14_336 = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336, patch_size=14)
VIP_LAYERS = [-2, -5, -8, -11, 6]  # states 23, 20, 17, 14 and 6 of the 25: fine lines are lost higher up
MISTRAL = dict(intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=131072, sliding_window=4096)


def _whole(*values):
    return all(type(value) is int for value in values)  # JSON's true is no number, though Python's is


def _whole_or_list(value):
    return _whole(*(value if isinstance(value, list) else [value]))


def optional(field):
    fits, expected = field
    return lambda value: value is None or fits(value), f"{expected}, or null"


def only(*values):
    return lambda value: value in values, " or ".join(map(repr, values)) + "; no other is supported"


# A field: (does a value fit, what was expected).
SIZE = (lambda value: _whole(value) and 0 < value <= 2**20, "a positive whole number up to 1,048,576")  # no model has more
REAL = (lambda value: type(value) in (int, float) and 0 < value <= 10**12, "a positive number up to 1,000,000,000,000")
FLAG = (lambda value: type(value) is bool, "true or false")
OBJECT = (lambda value: isinstance(value, dict | None), "an object or null")
TOKEN = (_whole, "a token id")
TOKENS = (_whole_or_list, "a token id or a list of them")
LAYERS = (lambda value: value != [] and _whole_or_list(value), "a layer or a list of them")

VISION = {
    "model_type": only("clip_vision_model"),
    **dict.fromkeys(("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), SIZE),
    **dict.fromkeys(("num_channels", "image_size", "patch_size"), SIZE),
    "layer_norm_eps": REAL,
    "hidden_act": only("quick_gelu"),
}
TEXT = {
    "model_type": (lambda value: value in ("llama", "mistral"), "a language model that is supported: 'llama' and 'mistral'"),
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), SIZE),
    "max_position_embeddings": SIZE,
    **dict.fromkeys(("num_key_value_heads", "head_dim", "sliding_window"), optional(SIZE)),
    **dict.fromkeys(("rms_norm_eps", "rope_theta"), REAL),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), OBJECT),
    "rope_type": only("default"),  # scaled RoPE is not part of these models
    "hidden_act": only("silu"),
    **dict.fromkeys(("attention_bias", "mlp_bias"), only(False)),
}
LLAVA = {
    "model_type": only("llava", "vipllava"),
    **dict.fromkeys(("vision_config", "text_config"), OBJECT),
    "projector_hidden_act": only("gelu"),
    "image_grid_pinpoints": only(None),
    "vision_feature_select_strategy": only("default", "full"),
    **dict.fromkeys(("vision_feature_layer", "vision_feature_layers"), LAYERS),
    **dict.fromkeys(("multimodal_projector_bias", "tie_word_embeddings"), FLAG),
    "projector_layernorm_eps": (lambda value: type(value) in (int, float) and 0 < value < 1, "a number between 0 and 1"),
    "image_token_index": (lambda value: _whole(value) and value >= 0, "a token id"),
    "eos_token_id": optional(TOKENS),
    "pad_token_id": optional(TOKEN),
    "quantization_config": (
        lambda value: (
            value is None or isinstance(value, dict) and value.get("quant_method") == "llava.py" and isinstance(value.get("scheme"), str)
        ),
        "none, or one that convert.py has written; take the checkpoint in 16 bits, and --quantize",
    ),
}


def check(part, values, table):
    """Raises ValueError for the first value that does not fit its field; fields that are not in the table are left aside."""
    for name, (fits, expected) in table.items():
        if name in values and not fits(values[name]):
            raise ValueError(f"{part} has {name} {values[name]!r}; expected {expected}")


def vision_config(raw):
    """A CLIPVisionConfig from the `vision_config` of a config.json. Raises ValueError, naming the field."""
    check("vision_config", raw, VISION)
    config = CLIPVisionConfig(**{f.name: raw[f.name] for f in fields(CLIPVisionConfig) if f.name in raw})
    if config.patch_size > config.image_size:
        raise ValueError(f"vision_config has patch_size {config.patch_size}, larger than its image_size {config.image_size}")
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(f"vision_config has hidden_size {config.hidden_size}, not a multiple of its {config.num_attention_heads} heads")
    return config


def text_config(raw):
    """A LlamaConfig from the `text_config` of a config.json. Raises ValueError, naming the field."""
    check("text_config", raw, TEXT)
    mistral = raw.get("model_type") == "mistral"
    # Newer files keep RoPE's settings in one object, older ones beside the other fields.
    rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    rope = {"rope_type": rope.get("rope_type", rope.get("type", "default"))} | {k: rope[k] for k in ("rope_theta",) if k in rope}
    check("text_config", rope, TEXT)
    values = (MISTRAL if mistral else {}) | raw | rope
    if not mistral:
        values["sliding_window"] = None  # files of Llamas may name one, but no Llama was trained with it, and transformers has none either
    config = LlamaConfig(**{f.name: values[f.name] for f in fields(LlamaConfig) if f.name in values})
    if config.num_attention_heads % config.num_key_value_heads:
        heads = f"{config.num_attention_heads} query heads cannot share {config.num_key_value_heads} key/value heads evenly"
        raise ValueError(f"text_config: {heads}; num_attention_heads must be a multiple of num_key_value_heads")
    if config.head_dim % 2:
        raise ValueError(f"text_config has head_dim {config.head_dim}; RoPE turns pairs of dimensions, so it must be even")
    return config


@dataclass
class LlavaConfig:
    """A checkpoint's config.json, its defaults filled in."""

    vision: CLIPVisionConfig
    text: LlamaConfig
    style: str  # the chat format: "llava", "bakllava" or "vip"
    vision_layers: list[int]  # which of the tower's hidden states the projector reads, concatenated in this order
    keep_cls: bool  # strategy "full": the class token is a feature too; "default": patches only
    projector_layernorm_eps: float | None  # None: no LayerNorm (LLaVA); ViP-LLaVA has one
    projector_bias: bool
    image_id: int
    pad_id: int
    eos_ids: tuple[int, ...]
    quantized: str | None = None  # the scheme (weights/quantize.py) that the weights are stored in; None: in 16 or 32 bits

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
        raw = {"model_type": None} | read_json(folder / "config.json")
        if "mm_vision_tower" in raw:
            raise ValueError(f"{folder} is in the original authors' layout; take the conversion, like llava-hf/llava-1.5-7b-hf")
        vip = raw["model_type"] == "vipllava"
        if vip:  # has no choice here
            raw |= {"vision_feature_select_strategy": "default", "multimodal_projector_bias": True}
        raw.setdefault("image_token_index", raw.get("image_token_id", 32000))
        check(f"{folder}: config.json", raw, LLAVA)
        raw_vision, raw_text = raw.get("vision_config"), raw.get("text_config") or {}
        tied = raw.get("tie_word_embeddings", False) or raw_text.get("tie_word_embeddings", False)
        check(f"{folder}: config.json", {"tie_word_embeddings": tied}, LLAVA)
        try:
            vision = vision_config(VIT_L_14_336 if raw_vision is None else raw_vision)
            text = text_config(raw_text | {"tie_word_embeddings": tied})
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None

        layers = raw.get("vision_feature_layer", VIP_LAYERS if vip else -2)
        layers = raw.get("vision_feature_layers", layers) if vip else layers  # published in both spellings
        layers, depth = layers if isinstance(layers, list) else [layers], vision.num_hidden_layers
        if bad := [k for k in layers if not -depth - 1 <= k <= depth]:
            raise ValueError(
                f"{folder}: vision_feature_layer is {layers}, but vision layer {bad[0]} does not exist: "
                f"the tower has hidden states 0 to {depth}, or -{depth + 1} to -1"
            )

        path = folder / "generation_config.json"
        said = [*([read_json(path)] if path.is_file() else []), raw, raw_text]

        def first(name, default):  # of what the files say; null if that is all they say
            values = [part[name] for part in said if name in part]
            return next((value for value in values if value is not None), None if values else default)

        tokens = {"eos_token_id": first("eos_token_id", 2), "pad_token_id": first("pad_token_id", None)}
        check(f"{folder}: config.json", tokens, LLAVA)
        eos, pad, image_id = *tokens.values(), raw["image_token_index"]
        eos_ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
        if pad is None or not 0 <= pad < text.vocab_size or pad == image_id:  # any other does: nothing looks at padding
            pad = eos_ids[0] if eos_ids else 0
        return cls(
            vision=vision,
            text=text,
            style="vip" if vip else "bakllava" if raw_text.get("model_type") == "mistral" else "llava",
            vision_layers=layers,
            keep_cls=raw.get("vision_feature_select_strategy", "default") == "full",
            projector_layernorm_eps=raw.get("projector_layernorm_eps", 1e-5) if vip else None,
            projector_bias=raw.get("multimodal_projector_bias", True),
            image_id=image_id,
            pad_id=pad,
            eos_ids=eos_ids,
            quantized=(raw.get("quantization_config") or {}).get("scheme"),
        )
