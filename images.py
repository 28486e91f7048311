"""Pictures: a file or an address (`opening.py`), an upright RGB picture, pixel values.

The vision tower takes squares of one size, with colours normalised as they were when it was trained. A picture is resized by its
short side, then the centre is cropped: it keeps its proportions, and a long picture loses its ends. (Cropping first would keep
full sharpness and lose far more of the picture.)
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from opening import MOST_PIXELS, decode, is_deep_grey, read_bytes, scaled_grey, tell_of_deep_grey, upright_size


def open_image(source, scale_grey=False):
    """A picture, turned upright as its EXIF says, fully decoded. An animation gives its first frame.

    source: a file's name, a file://, http:// or https:// address, or a file that is open for reading bytes.
    scale_grey: scale greyscale of more than 8 bits to 8 (see `opening.scaled_grey`). Without it values above 255 are white, as in
        transformers, and a line on standard error says so, once for each kind of picture.
    Raises FileNotFoundError, or ValueError for what cannot be read, is no picture, is cut short, or is too large to decode safely.
    """
    with read_bytes(source) as file:
        name = source if isinstance(source, str | os.PathLike) else "this file"
        image = decode(file, name)
    if is_deep_grey(image):
        if scale_grey:
            return scaled_grey(image)
        tell_of_deep_grey(name, image.mode)
    return image


def size_of(source):
    """The (width, height) that a picture will have when it is open. Raises errors as `open_image` does."""
    with read_bytes(source) as file:
        return upright_size(file, source if isinstance(source, str | os.PathLike) else "this file")


@dataclass
class ImageProcessor:
    """Pictures to pixel values, to the bit as `transformers` computes them for the published checkpoints."""

    size: int  # the short side after resizing, in pixels
    crop_size: int  # the side of the centre square that is kept, in pixels
    image_mean: tuple[float, ...]  # per colour, on a scale of 0 to 1
    image_std: tuple[float, ...]

    def __call__(self, images, pad=False):
        """PIL images of any mode and size -> (N, 3, crop_size, crop_size) float32.

        pad=True first pads to a square with the mean colour, so that nothing is cropped away. The original LLaVA code does this, in
        training too; the published Hugging Face checkpoints are run without it. Raises ValueError for a picture that is empty, or so
        elongated that it would fill the memory.
        """
        images = [to_rgb(image) for image in images]
        if not images:
            raise ValueError("no pictures to preprocess")
        for image in images:
            self._check_size(image, pad)
        if pad:
            background = tuple(int(255 * m) for m in self.image_mean)
            images = [pad_to_square(image, background) for image in images]
        pixels = np.stack([self._resize_and_crop(image) for image in images])  # (N, side, side, 3) uint8
        # A byte has 256 values, so scaling and normalising are a table look-up. The product is in float64, the rest in float32: this
        # makes it equal to transformers to the last bit.
        levels = (np.arange(256, dtype=np.float64) * 0.00392156862745098).astype(np.float32)[:, None]
        table = (levels - np.array(self.image_mean, np.float32)) / np.array(self.image_std, np.float32)  # (256, 3)
        values = table[pixels, [0, 1, 2]]  # (N, side, side, 3): for each byte its row of the table, for each colour its column
        return torch.from_numpy(values).permute(0, 3, 1, 2).contiguous()

    def _check_size(self, image, pad):
        """Raises ValueError for a picture without pixels, or whose resized or padded form would have far too many."""
        short, long = sorted(image.size)
        if not short:
            raise ValueError(f"a picture of {image.width}×{image.height} pixels is empty")
        pixels = long * long if pad else self.size * self.size * long // short
        most = MOST_PIXELS * (Image.MAX_IMAGE_PIXELS or math.inf)
        if pixels > max(most, 2 * short * long):  # what is opened may be resized; a square is at most twice a picture of 2:1
            raise ValueError(f"a picture of {image.width}×{image.height} pixels is too elongated to be resized; crop it first")

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
        return cls(*read_settings(Path(folder)))


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


# A checkpoint's settings


STEPS = {  # as in every LLaVA; a file may say so, or leave it out
    "do_resize": True,
    "do_center_crop": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "do_pad": False,
    "resample": 3,  # bicubic
    "rescale_factor": 1 / 255,
}


def read_settings(folder):
    """The fields of an ImageProcessor: size, crop_size, image_mean, image_std."""
    path, raw = processor_config(folder)
    missing = [name for name in ("size", "crop_size", "image_mean", "image_std") if name not in raw]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    for name, expected in STEPS.items():
        if name in raw and (raw[name] != expected or type(raw[name]) is not type(expected)):  # in Python 1 == True
            raise ValueError(f"{path}: {name} is {raw[name]!r}; expected {json.dumps(expected)}, as in every LLaVA")
    size, crop_size, mean, std = raw["size"], raw["crop_size"], raw["image_mean"], raw["image_std"]
    if isinstance(size, dict):
        size = size.get("shortest_edge")
    if isinstance(crop_size, dict) and crop_size.get("height") == crop_size.get("width"):
        crop_size = crop_size.get("height")
    if type(size) is not int or size < 1:
        raise ValueError(f"{path}: size is {raw['size']!r}; expected a positive whole number, or one as shortest_edge")
    if type(crop_size) is not int or crop_size < 1:
        raise ValueError(f"{path}: crop_size is {raw['crop_size']!r}; expected a positive whole number, or one as height and width, equal")
    if crop_size > size:
        raise ValueError(f"{path}: crop_size {crop_size} is larger than the resized short side {size}")
    if not are_three_numbers(mean):
        raise ValueError(f"{path}: image_mean is {mean!r}; expected three numbers, one for each colour")
    if not are_three_numbers(std) or min(std) <= 0:
        raise ValueError(f"{path}: image_std is {std!r}; expected three numbers above 0, one for each colour")
    return size, crop_size, tuple(mean), tuple(std)


def are_three_numbers(value):
    return isinstance(value, list) and len(value) == 3 and all(type(number) in (int, float) for number in value)


def processor_config(folder):
    """The file with a checkpoint's image settings, and what it says."""
    path = folder / "processor_config.json"
    raw = json_object(path).get("image_processor") if path.is_file() else None
    if raw is None:
        path = folder / "preprocessor_config.json"
        if not path.is_file():
            parts = "no preprocessor_config.json, nor a processor_config.json with an image_processor"
            raise FileNotFoundError(f"{folder} has {parts}: it must hold a whole Hugging Face checkpoint")
        raw = json_object(path)
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds a {type(raw).__name__} for image_processor; expected a JSON object")
    return path, raw


def json_object(path):
    try:
        raw = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_null)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are kinds of ValueError
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds a {type(raw).__name__}; expected a JSON object")
    return raw


def _without_null(pairs):
    """A JSON object, in which a field that is null counts as left out."""
    return {name: value for name, value in pairs if value is not None}
