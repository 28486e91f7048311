"""CLIP's vision transformer (Radford et al. 2021, https://arxiv.org/abs/2103.00020, section 2.4) and its preprocessing.

A picture becomes a sequence: cut it into 14×14-pixel patches, map each patch linearly to a vector, put a learned
class vector in front, add a learned position to each, and run a transformer over them in which every patch attends to
every other. LLaVA reads the patches' hidden states one block below the top, ViP-LLaVA at five heights, neither the
pooled output.

Shapes: N pictures, C colours, S side in pixels, P patches, D width, H heads, E = D / H width of a head.
"""

import json
import math
import warnings
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError


@dataclass
class CLIPVisionConfig:
    """The tower's shape. Names and defaults are Hugging Face's: a published config leaves out what equals its default."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"

    def __post_init__(self):
        for f in fields(self):
            value, most = getattr(self, f.name), 2**20  # no model has more, and a product of three such sizes fits 64 bits
            if f.name != "hidden_act" and not (type(value) in (int, f.type) and 0 < value <= most):
                raise ValueError(f"vision_config has {f.name} {value!r}; expected a positive {f.type.__name__} up to {most:,}")
        if self.patch_size > self.image_size:
            raise ValueError(f"vision_config has patch_size {self.patch_size}, larger than its image_size {self.image_size}")
        if self.hidden_act != "quick_gelu":
            raise ValueError(f"vision hidden_act is {self.hidden_act!r}; CLIP's vision tower uses 'quick_gelu'")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"vision hidden_size {self.hidden_size} is not a multiple of its {self.num_attention_heads} heads")

    @classmethod
    def from_dict(cls, raw):
        """From the `vision_config` of a config.json; fields that do not shape the forward pass are left aside."""
        return cls(**{f.name: raw[f.name] for f in fields(cls) if f.name in raw})

    @property
    def num_patches(self):
        return (self.image_size // self.patch_size) ** 2


def quick_gelu(x):
    """x · sigmoid(1.702 x), the approximation of GELU that CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Multi-head self-attention, every position to every position. (N, P+1, D) -> (N, P+1, D)"""

    def __init__(self, config):
        super().__init__()
        D = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.q_proj, self.k_proj = nn.Linear(D, D), nn.Linear(D, D)
        self.v_proj, self.out_proj = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x):
        q, k, v = (
            proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (N, H, P+1, E)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(q, k, v)  # softmax(q kᵀ / √E) v
        return self.out_proj(out.transpose(1, 2).flatten(-2))  # (N, P+1, D)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.fc2(quick_gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm: each half reads a normalised copy and adds its result to the stream, which itself is never normalised."""

    def __init__(self, config):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        x = x + self.mlp(self.layer_norm2(x))
        return x


class CLIPVision(nn.Module):
    """The vision transformer. Call it as `tower(pixel_values, layers)`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        D = config.hidden_size
        self.class_embedding = nn.Parameter(torch.empty(D))
        # A convolution whose stride is its kernel size is one linear map, applied to each patch.
        self.patch_embedding = nn.Conv2d(config.num_channels, D, config.patch_size, config.patch_size, bias=False)
        # Empty, to be filled: nn.Embedding's own filling imports PyTorch's compiler first when it is on the meta device.
        self.position_embedding = nn.Embedding.from_pretrained(torch.empty(config.num_patches + 1, D), freeze=False)
        self.pre_layrnorm = nn.LayerNorm(D, eps=config.layer_norm_eps)  # the checkpoints' own spelling
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        # Normalises the class token for CLIP's contrastive loss. It is part of every checkpoint; LLaVA never applies it.
        self.post_layernorm = nn.LayerNorm(D, eps=config.layer_norm_eps)

    def forward(self, pixel_values, layers):
        """Hidden states of the layers asked for, in the order asked.

        pixel_values: (N, C, S, S), preprocessed.
        layers: indices into the tower's hidden states, of which there are num_hidden_layers + 1: 0 is the embedded
            patches, k the output of the k-th block, and negative numbers count from the end (−1 is the last block).
        Returns a list of (N, P+1, D); position 0 is the class token. No block above the highest one asked for is run.
        Raises ValueError for pictures of another shape and for a layer that does not exist.
        """
        config, depth = self.config, len(self.layers)
        expected = (config.num_channels, config.image_size, config.image_size)
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != expected:
            raise ValueError(f"pixel_values are {tuple(pixel_values.shape)}; this tower takes (N, {', '.join(map(str, expected))})")
        if bad := [k for k in layers if not -depth - 1 <= k <= depth]:
            raise ValueError(f"vision layer {bad[0]} does not exist: the tower has hidden states 0 to {depth}, or -{depth + 1} to -1")
        wanted = [k % (depth + 1) for k in layers]

        x = self.patch_embedding(pixel_values.to(self.patch_embedding.weight)).flatten(2).transpose(1, 2)  # (N, P, D)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)  # (N, P+1, D)
        x = self.pre_layrnorm(x + self.position_embedding.weight)
        states = [x]
        for block in self.layers[: max(wanted)]:
            x = block(x)
            states.append(x if len(states) in wanted else None)  # the others are freed as soon as they are used
        return [states[k] for k in wanted]


def open_image(path):
    """The picture in a file, turned upright as its EXIF says, fully decoded.

    Raises FileNotFoundError, or ValueError for what is not a picture, is cut short, or is too large to decode safely.
    An animation gives its first frame.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata, and of a large picture, which is allowed
            with Image.open(path) as image:
                image.load()
                return ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such picture") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder, not a picture") from None
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not a picture in a format that Pillow reads") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} is too large a picture: {error}") from None
    except Exception as error:  # Pillow's decoders report broken files with almost any type
        raise ValueError(f"{path} is a damaged picture: {error}") from None


@dataclass
class ImageProcessor:
    """Pictures to pixel values exactly as the checkpoints were trained and as `transformers` computes them."""

    size: int  # the short side after resizing, in pixels
    crop_size: int  # the side of the centre square that is kept, in pixels
    image_mean: tuple[float, ...]  # per colour, on a scale of 0 to 1
    image_std: tuple[float, ...]

    @classmethod
    def from_pretrained(cls, folder):
        """Read the `image_processor` part of processor_config.json or, in older checkpoints, preprocessor_config.json."""
        folder = Path(folder)
        for name, key in (("processor_config.json", "image_processor"), ("preprocessor_config.json", None)):
            path = folder / name
            if not path.is_file():
                continue
            try:
                raw = json.loads(path.read_text(encoding="utf-8"))
            except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are kinds of ValueError
                raise ValueError(f"{path} is not valid JSON: {error}") from None
            if isinstance(raw, dict) and key is not None:
                if key not in raw:
                    continue
                raw = raw[key]
            if not isinstance(raw, dict):
                raise ValueError(f"{path} holds a {type(raw).__name__}{f' for {key}' * (key is not None)}; expected a JSON object")
            break
        else:
            raise FileNotFoundError(f"{folder} has no preprocessor_config.json: it must hold a whole Hugging Face checkpoint")
        fixed = dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"), True)
        for name, only in (fixed | {"do_pad": False, "resample": 3}).items():
            if raw.get(name, only) != only:
                raise ValueError(f"{path}: {name} is {raw[name]!r}; only {only!r} is supported, as in every LLaVA")
        if raw.get("rescale_factor", 1 / 255) not in (1 / 255, 0.00392156862745098):
            raise ValueError(f"{path}: rescale_factor is {raw['rescale_factor']!r}; only 1/255 is supported")
        if missing := [name for name in ("size", "crop_size", "image_mean", "image_std") if name not in raw]:
            raise ValueError(f"{path} lacks {', '.join(missing)}")
        size, crop, mean, std = raw["size"], raw["crop_size"], raw["image_mean"], raw["image_std"]
        if isinstance(size, dict):
            size = size.get("shortest_edge")
        if isinstance(crop, dict):
            crop = crop.get("height") if crop.get("height") == crop.get("width") else None
        for name, value, form in (("size", size, "shortest_edge"), ("crop_size", crop, "height and width, equal")):
            if type(value) is not int or value < 1:
                raise ValueError(f"{path}: {name} is {raw[name]!r}; expected a positive whole number, or one as {form}")
        for name, value in (("image_mean", mean), ("image_std", std)):
            numbers = isinstance(value, list) and all(type(v) in (int, float) for v in value)
            if not numbers or len(value) != 3 or name == "image_std" and min(value) <= 0:
                raise ValueError(f"{path}: {name} is {value!r}; expected three numbers, one for each colour")
        if crop > size:
            raise ValueError(f"{path}: crop_size {crop} is larger than the resized short side {size}")
        return cls(size, crop, tuple(mean), tuple(std))

    def __call__(self, images, pad=False):
        """PIL images of any mode and size -> (N, 3, crop_size, crop_size) float32.

        The short side is resized to `size` and the centre square kept, so the ends of a long picture are lost.
        pad=True first pads to a square with the mean colour instead, as the original LLaVA code does: nothing is lost,
        but the published Hugging Face checkpoints are not run that way.
        """
        images = [to_rgb(image) for image in images]
        if not images:
            raise ValueError("no pictures to preprocess")
        for image in images:
            short, long = sorted(image.size)
            pixels = long * long if pad else self.size * self.size * long // max(short, 1)
            if not short:
                raise ValueError(f"a picture of {image.width}×{image.height} pixels is empty")
            if pixels > 2 * (Image.MAX_IMAGE_PIXELS or math.inf):
                raise ValueError(f"a picture of {image.width}×{image.height} pixels is too elongated to be resized; crop it first")
        if pad:
            background = tuple(int(255 * m) for m in self.image_mean)
            images = [pad_to_square(image, background) for image in images]
        pixels = np.stack([self._resize_and_crop(image) for image in images])  # (N, S, S, 3) uint8
        # A byte has 256 values, so scaling and normalising is a table look-up. The product is in float64 and the rest
        # in float32, in this order: that makes it equal to transformers to the last bit.
        levels = (np.arange(256, dtype=np.float64) * 0.00392156862745098).astype(np.float32)[:, None]
        table = (levels - np.array(self.image_mean, np.float32)) / np.array(self.image_std, np.float32)  # (256, 3)
        return torch.from_numpy(table[pixels, [0, 1, 2]]).permute(0, 3, 1, 2).contiguous()

    def _resize_and_crop(self, image):
        short, long = sorted(image.size)
        length = int(self.size * long / short)
        width, height = (self.size, length) if image.width <= image.height else (length, self.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - self.crop_size) // 2, (height - self.crop_size) // 2
        return np.asarray(image.crop((left, top, left + self.crop_size, top + self.crop_size)))


def to_rgb(image):
    """Transparent pictures are laid on white (their hidden colours are arbitrary); every other mode is converted."""
    if "A" in image.getbands() or isinstance(image.info.get("transparency"), int | bytes | tuple):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255)), image)
    return image.convert("RGB")


def pad_to_square(image, background):
    """Centre a picture on a square of the background colour."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), background)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
