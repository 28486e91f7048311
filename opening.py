"""How a picture is opened: from a file or an address, of any format, size and depth. Imports nothing of ours.

`images.open_image` puts these together. Each error names the picture and says what to do.
"""

import http.client
import io
import os
import sys
import threading
import time
import urllib.error
import urllib.request
import warnings
from contextlib import contextmanager

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

MOST_PIXELS = 2.5  # times Image.MAX_IMAGE_PIXELS, so 224 million: phones take 200 million. Pillow itself refuses more than 2 times as many
MOST_BYTES, PATIENCE = 100_000_000, 20  # of a picture from an address: its largest size, and the seconds it may take
HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")  # "brands" in the head of such a file
GREYS = (255, 1023, 4095, 16383, 65535, 2**24 - 1, 2**32 - 1)  # white in 8, 10, 12, 14, 16, 24 and 32 bits
LYING = (5, 6, 7, 8)  # orientations by EXIF in which width and height are exchanged
_pillows_limit = threading.Lock()
_told = set()  # kinds of pictures of which it has been said how the model sees them


class Refused(ValueError):
    """An error whose message is for the user as it stands; errors of libraries are put into words first."""


def read_bytes(source):
    """A source of `images.open_image` as an open file."""
    if not isinstance(source, str | os.PathLike):
        return source
    name = str(source)
    if name.startswith(("http://", "https://")):
        return io.BytesIO(fetch(name))
    path = name
    if name.startswith("file://"):
        path = urllib.request.url2pathname(name.removeprefix("file://").removeprefix("localhost"))
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
        request = urllib.request.Request(address, headers={"User-Agent": "llava.py"})  # some servers refuse urllib's own name
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
    """All bytes of a server's answer. Raises TimeoutError if they are not here by the time `end`."""
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
    if answer.length:  # bytes that the server announced and did not send
        raise Refused(f"{address}: the connection ended {answer.length} bytes before the picture did; try again")
    return bytes(data)


def decode(file, name):
    """The upright picture in an open file. Raises ValueError, which names the picture."""
    with called(name), identify(file, name) as image:
        image.load()
        return ImageOps.exif_transpose(image)


def upright_size(file, name):
    """The (width, height) of the upright picture in an open file, mostly from its head alone. Raises ValueError as `decode` does."""
    with called(name), identify(file, name) as image:
        if image.getexif().get(ExifTags.Base.Orientation) in LYING:
            image.load()  # some formats turn upright by themselves when they load
            return ImageOps.exif_transpose(image).size
        return image.size


@contextmanager
def called(name):
    """Pillow's errors within become ValueErrors that name the picture."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about damaged metadata, and about large pictures, which are allowed here
            yield
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
    """Image.open, with HEIC if pillow_heif is installed, and with a higher limit of pixels than Pillow's."""
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


def is_heic(file):
    head = file.read(64)
    file.seek(0)
    return head[4:8] == b"ftyp" and head[8:12] in HEIC and b"avif" not in head  # Pillow reads AVIF, which may call itself "mif1"


def is_deep_grey(image):
    """Whether a picture is greyscale of 16 or 32 bits, or of real numbers."""
    return image.mode == "F" or image.mode.startswith("I")


def scaled_grey(image):
    """A picture of deep greyscale in 8 bits: 0 becomes black, and the largest value of its number of bits becomes white.

    That number is the smallest of 8, 10, 12, 14, 16, 24 and 32, which cameras and scanners have, that its values fit into: so a 12-bit
    picture in a 16-bit file is seen to be one. Real numbers may also lie between 0 and 1. If some values are below 0, the smallest
    becomes black and the largest white. Infinity and NaN become black.
    """
    values = np.nan_to_num(np.asarray(image, np.float64), posinf=0, neginf=0)
    black, white = min(values.min(), 0.0), values.max()
    if black == 0:
        levels = (1, *GREYS) if image.mode == "F" else GREYS
        white = min([level for level in levels if level >= white], default=white)
    scaled = (values - black) * (255 / max(white - black, 1e-300))
    return Image.fromarray((scaled + 0.5).astype(np.uint8))


def tell_of_deep_grey(name, mode):
    """One line on standard error, when the first picture of a mode comes."""
    if mode not in _told:
        _told.add(mode)
        advice = "values above 255 are white, so it may be all white or all black; scale_grey=True (--scale-grey) scales it to 8 bits"
        print(f"{name}: greyscale of more than 8 bits: {advice}", file=sys.stderr)
