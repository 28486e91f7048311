"""Pictures: a file, an upright RGB picture, pixel values. Imports nothing of ours.

The vision tower takes squares of one size, whose colours are normalised as they were when it was trained. The short side is
resized first and the centre cropped afterwards: so a picture keeps its proportions, and of a long one the ends are lost.
(Cropping first would show the tower a part at full sharpness and lose far more.)
"""

import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError


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
    """Pictures to pixel values, to the bit as `transformers` computes them for the published checkpoints."""

    size: int  # the short side after resizing, in pixels
    crop_size: int  # the side of the centre square that is kept, in pixels
    image_mean: tuple[float, ...]  # per colour, on a scale of 0 to 1
    image_std: tuple[float, ...]

    def __call__(self, images, pad=False):
        """PIL images of any mode and size -> (N, 3, crop_size, crop_size) float32.

        pad=True first pads to a square with the mean colour, as the original LLaVA code does, in training too: nothing is
        cropped away, but the published Hugging Face checkpoints are not run that way. Raises ValueError for a picture that is empty, or so
        elongated that it would fill the memory.
        """
        images = [to_rgb(image) for image in images]
        if not images:
            raise ValueError("no pictures to preprocess")
        for image in images:
            short, long = sorted(image.size)
            if not short:
                raise ValueError(f"a picture of {image.width}×{image.height} pixels is empty")
            pixels = long * long if pad else self.size * self.size * long // short
            if pixels > 2 * (Image.MAX_IMAGE_PIXELS or math.inf):
                raise ValueError(f"a picture of {image.width}×{image.height} pixels is too elongated to be resized; crop it first")
        if pad:
            background = tuple(int(255 * m) for m in self.image_mean)
            images = [pad_to_square(image, background) for image in images]
        pixels = np.stack([self._resize_and_crop(image) for image in images])  # (N, side, side, 3) uint8
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

    @classmethod
    def from_pretrained(cls, folder):
        """Read the `image_processor` part of processor_config.json or, in older checkpoints, preprocessor_config.json.

        Raises FileNotFoundError, or ValueError for what is damaged or asks for other steps than the ones above.
        """
        folder = Path(folder)
        for name, key in (("processor_config.json", "image_processor"), ("preprocessor_config.json", None)):
            path = folder / name
            if not path.is_file():
                continue
            try:
                raw = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_null)
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
            parts = "no preprocessor_config.json, nor a processor_config.json with an image_processor"
            raise FileNotFoundError(f"{folder} has {parts}: it must hold a whole Hugging Face checkpoint")
        if missing := [name for name in ("size", "crop_size", "image_mean", "image_std") if name not in raw]:
            raise ValueError(f"{path} lacks {', '.join(missing)}")
        size, crop = raw["size"], raw["crop_size"]
        size = size.get("shortest_edge") if isinstance(size, dict) else size
        crop = crop.get("height") if isinstance(crop, dict) and crop.get("height") == crop.get("width") else crop
        values = raw | {"size": size, "crop_size": crop}
        for name, (fits, expected) in FIELDS.items():
            if name in raw and not fits(values[name]):
                raise ValueError(f"{path}: {name} is {raw[name]!r}; expected {expected}")
        if crop > size:
            raise ValueError(f"{path}: crop_size {crop} is larger than the resized short side {size}")
        return cls(size, crop, tuple(raw["image_mean"]), tuple(raw["image_std"]))


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


def _without_null(pairs):
    """A JSON object, in which a field that is null counts as left out."""
    return {name: value for name, value in pairs if value is not None}


def _positive(value):
    return type(value) is int and value > 0  # JSON's true is no number, though Python's is


def _three(value):
    return isinstance(value, list) and len(value) == 3 and all(type(v) in (int, float) for v in value)


# What preprocessor_config.json may say: (does the value fit, what was expected). What it leaves out is as in every LLaVA.
ALWAYS = (lambda value: value is True, "true, as in every LLaVA")
FIELDS = {
    "size": (_positive, "a positive whole number, or one as shortest_edge"),
    "crop_size": (_positive, "a positive whole number, or one as height and width, equal"),
    "image_mean": (_three, "three numbers, one for each colour"),
    "image_std": (lambda value: _three(value) and min(value) > 0, "three numbers above 0, one for each colour"),
    "resample": (lambda value: value == Image.Resampling.BICUBIC, "3 (bicubic), as in every LLaVA"),
    "rescale_factor": (lambda value: value in (1 / 255, 0.00392156862745098), "1/255"),
    "do_pad": (lambda value: value is False, "false, as in every LLaVA"),
    **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"), ALWAYS),
}
