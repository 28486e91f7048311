"""Pictures: a file or an address, an upright RGB picture, pixel values. Imports nothing of ours.

The vision tower takes squares of one size, whose colours are normalised as they were when it was trained. The short side is
resized first and the centre cropped afterwards: so a picture keeps its proportions, and of a long one the ends are lost.
(Cropping first would show the tower a part at full sharpness and lose far more.)
"""

import http.client
import io
import json
import math
import os
import sys
import threading
import time
import urllib.error
import urllib.request
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

MOST_PIXELS = 2.5  # times Image.MAX_IMAGE_PIXELS: 224 million, as telephones take 200 million. Pillow itself refuses above 2 times
MOST_BYTES, PATIENCE = 100_000_000, 20  # of a picture from an address: its size at most, and seconds until it must be here
HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")  # "brands" in the head of such a file
GREYS = (255, 1023, 4095, 16383, 65535, 2**24 - 1, 2**32 - 1)  # white in 8, 10, 12, 14, 16, 24 and 32 bits
_pillows_limit = threading.Lock()
_told = set()  # kinds of pictures of which it has been said how the model sees them


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
        cropped away, but the published Hugging Face checkpoints are not run that way. Raises ValueError for a picture that is empty,
        or so elongated that it would fill the memory.
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
        # A byte has 256 values, so scaling and normalising is a table look-up. The product is in float64 and the rest
        # in float32, in this order: that makes it equal to transformers to the last bit.
        levels = (np.arange(256, dtype=np.float64) * 0.00392156862745098).astype(np.float32)[:, None]
        table = (levels - np.array(self.image_mean, np.float32)) / np.array(self.image_std, np.float32)  # (256, 3)
        return torch.from_numpy(table[pixels, [0, 1, 2]]).permute(0, 3, 1, 2).contiguous()

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
        path, raw = processor_config(Path(folder))
        missing = [name for name in ("size", "crop_size", "image_mean", "image_std") if name not in raw]
        if missing:
            raise ValueError(f"{path} lacks {', '.join(missing)}")
        values = dict(raw)
        if isinstance(raw["size"], dict):
            values["size"] = raw["size"].get("shortest_edge")
        if isinstance(raw["crop_size"], dict) and raw["crop_size"].get("height") == raw["crop_size"].get("width"):
            values["crop_size"] = raw["crop_size"].get("height")
        for name, (fits, expected) in FIELDS.items():
            if name in raw and not fits(values[name]):
                raise ValueError(f"{path}: {name} is {raw[name]!r}; expected {expected}")
        size, crop_size = values["size"], values["crop_size"]
        if crop_size > size:
            raise ValueError(f"{path}: crop_size {crop_size} is larger than the resized short side {size}")
        return cls(size, crop_size, tuple(raw["image_mean"]), tuple(raw["image_std"]))


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


def processor_config(folder):
    """The file with a checkpoint's image settings, and what it says. Fields that are null are left out, as if they were not there."""
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
    return path, {name: value for name, value in raw.items() if value is not None}


def json_object(path):
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are kinds of ValueError
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds a {type(raw).__name__}; expected a JSON object")
    return raw


def _positive(value):
    return type(value) is int and value > 0  # JSON's true is no number, though Python's is


def _three(value):
    return isinstance(value, list) and len(value) == 3 and all(type(v) in (int, float) for v in value)


def _three_above_0(value):
    return _three(value) and min(value) > 0


def _true(value):
    return value is True


def _false(value):
    return value is False


def _bicubic(value):
    return value == Image.Resampling.BICUBIC


def _a_255th(value):
    return value in (1 / 255, 0.00392156862745098)


# What preprocessor_config.json may say: (does the value fit, what was expected). What it leaves out is as in every LLaVA.
FIELDS = {
    "size": (_positive, "a positive whole number, or one as shortest_edge"),
    "crop_size": (_positive, "a positive whole number, or one as height and width, equal"),
    "image_mean": (_three, "three numbers, one for each colour"),
    "image_std": (_three_above_0, "three numbers above 0, one for each colour"),
    "resample": (_bicubic, "3 (bicubic), as in every LLaVA"),
    "rescale_factor": (_a_255th, "1/255"),
    "do_pad": (_false, "false, as in every LLaVA"),
}
for _step in ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"):
    FIELDS[_step] = (_true, "true, as in every LLaVA")


# Files and addresses


def open_image(source, scale_grey=False):
    """A picture, turned upright as its EXIF says, fully decoded. An animation gives its first frame.

    source: a file's name, a file://, http:// or https:// address, or a file that is open for reading bytes.
    scale_grey: make 8 bits of greyscale that has more (see `scaled_grey`). Without it such a picture is as transformers has it: values
        above 255 are white. This is said on standard error, once for each kind of picture.
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


def read_bytes(source):
    """A source of `open_image` as an open file."""
    if not isinstance(source, str | os.PathLike):
        return source
    name = str(source)
    if name.startswith(("http://", "https://")):
        return io.BytesIO(fetch(name))
    path = urllib.request.url2pathname(name.removeprefix("file://").removeprefix("localhost")) if name.startswith("file://") else name
    try:
        return open(path, "rb")
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: no such picture") from None
    except IsADirectoryError:
        raise ValueError(f"{name} is a folder, not a picture") from None
    except PermissionError:
        raise ValueError(f"{name}: permission denied; you may not read this picture") from None
    except OSError as error:  # a loop of links, a name too long, a disk that fails
        raise ValueError(f"{name} cannot be opened: {error.strerror}") from None
    except ValueError as error:  # a name with a null character
        raise ValueError(f"{name!r} cannot be opened: {error}") from None


def fetch(address):
    """The bytes at an http:// or https:// address. Raises ValueError."""
    late = Refused(f"{address} took longer than {PATIENCE} seconds; fetch it yourself and name the file")
    try:
        request = urllib.request.Request(address, headers={"User-Agent": "llava.py"})  # some servers refuse who does not say who they are
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return received(answer, address, time.monotonic() + PATIENCE)
    except Refused:
        raise
    except TimeoutError:
        raise late from None
    except urllib.error.HTTPError as error:
        error.close()
        raise Refused(f"{address}: the server says {error.code} {error.reason}") from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise late from None
        raise Refused(f"{address} cannot be reached: {getattr(error.reason, 'strerror', None) or error.reason}") from None
    except (http.client.HTTPException, OSError, ValueError) as error:
        raise Refused(f"{address} cannot be fetched: {error or type(error).__name__}") from None


def received(answer, address, end):
    """All bytes of a server's answer, which must be here by the time `end`."""
    data = bytearray()
    while True:
        part = answer.read1(1 << 20)
        data += part
        if len(data) > MOST_BYTES:
            raise Refused(f"{address} has more than {MOST_BYTES / 1e6:g} MB; fetch it yourself and name the file")
        if time.monotonic() > end:
            raise TimeoutError
        if not part:
            break
    if answer.length:  # what the server announced and did not send
        raise Refused(f"{address}: the connection ended {answer.length} bytes before the picture did; try again")
    return bytes(data)


def decode(file, name):
    """The upright picture in an open file. Raises ValueError, which calls the picture by its name."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata, and of a large picture, which is allowed
            with identify(file, name) as image:
                image.load()
                return ImageOps.exif_transpose(image)
    except UnidentifiedImageError:
        raise ValueError(f"{name} is not a picture in a format that Pillow reads") from None
    except Refused:
        raise
    except Image.DecompressionBombError as error:
        raise Refused(f"{name} is too large a picture: {error}") from None
    except Exception as error:  # Pillow's decoders report broken files with almost any type
        if "Ghostscript" in str(error):
            raise ValueError(f"{name} is an EPS picture, which Pillow reads by Ghostscript; install that (gs), or save as PNG") from None
        if "cannot find loader" in str(error) or "not available" in str(error):
            raise ValueError(f"{name} is of a kind that Pillow cannot read here ({error}); save it as PNG or JPEG") from None
        raise ValueError(f"{name} is a damaged picture: {error}") from None


def identify(file, name):
    """Image.open, with HEIC if pillow_heif is there, and with a limit of pixels above Pillow's."""
    if not file.seekable():
        file = io.BytesIO(file.read())
    if is_heic(file):
        try:
            import pillow_heif
        except ImportError:
            raise Refused(f"{name} is a HEIC picture; to read it, pip install pillow-heif, or save it as JPEG") from None
        pillow_heif.register_heif_opener()
    with _pillows_limit:  # the limit is a variable of Pillow's, which all threads share
        most = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            image = Image.open(file)
        finally:
            Image.MAX_IMAGE_PIXELS = most
    if most is not None and image.width * image.height > MOST_PIXELS * most:
        limit = f"{MOST_PIXELS * most / 1e6:,.0f} million pixels"
        raise Refused(f"{name} is too large a picture: {image.width}×{image.height} are more than {limit}; make it smaller first")
    return image


class Refused(ValueError):
    """What is wrong with a picture, in words that need no others."""


def is_heic(file):
    head = file.read(64)
    file.seek(0)
    return head[4:8] == b"ftyp" and head[8:12] in HEIC and b"avif" not in head  # Pillow reads AVIF, which may call itself "mif1"


def is_deep_grey(image):
    """Whether a picture is greyscale of 16 or 32 bits, or of real numbers."""
    return image.mode == "F" or image.mode.startswith("I")


def scaled_grey(image):
    """A picture of deep greyscale in 8 bits: black is 0, and white is the largest value of as many bits as its values need.

    Those are 8, 10, 12, 14, 16, 24 or 32, as cameras and scanners have them, or 0 to 1 for real numbers: so the range of a 12-bit picture
    in a 16-bit file is found. Where values are below 0, the least is black and the largest white. What is no number is black.
    """
    values = np.nan_to_num(np.asarray(image, np.float64), posinf=0, neginf=0)
    black, most = min(values.min(), 0.0), values.max()
    whites = (1, *GREYS, most) if image.mode == "F" else (*GREYS, most)
    white = most if black < 0 else next(level for level in whites if most <= level)
    scaled = (values - black) * (255 / max(white - black, 1e-300))
    return Image.fromarray((scaled + 0.5).astype(np.uint8))


def tell_of_deep_grey(name, mode):
    """One line on standard error, when the first picture of a mode comes."""
    if mode not in _told:
        _told.add(mode)
        advice = "values above 255 are white, so it may be all white or all black; scale_grey=True (--scale-grey) scales it to 8 bits"
        print(f"{name}: greyscale of more than 8 bits: {advice}", file=sys.stderr)
