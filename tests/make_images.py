"""Make tests/fixtures/images.json, what transformers makes of many pictures: `python -m tests.make_images`

Needs transformers, and no torchvision beside it, which resizes otherwise. The pictures are computed from their mode and
size alone, so the file holds only a checksum and some values of each result.
"""

import hashlib
import json
import random
from pathlib import Path

import numpy as np
from PIL import Image

FILE = Path(__file__).parent / "fixtures" / "images.json"
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
SIZES = [(1, 1), (3, 200), (200, 3), (112, 112), (337, 336), (91, 133), (225, 112)]
# A "+" adds a transparency entry, as a file's colour key (+key) or palette (+alphas) would.
MODES = "1 L L+key LA P P+key P+alphas PA RGB RGB+key RGBA RGBX CMYK YCbCr LAB HSV I I;16 I;16B F".split()
BYTES = {"P": 1, "L": 1, "LA": 2, "PA": 2, "RGB": 3, "YCbCr": 3, "LAB": 3, "HSV": 3, "I;16": 2, "I;16B": 2}  # others: 4


def picture(mode, size):
    """A picture of random pixels, the same each time."""
    base, _, transparency = mode.partition("+")
    source, pixels = random.Random(f"{mode} {size}"), size[0] * size[1]
    if base in ("I", "F"):  # beyond 0 to 255 at both ends
        values = np.frombuffer(source.randbytes(2 * pixels), "<u2").reshape(size[1], size[0])
        image = Image.fromarray(values.astype(np.int32) - 1000 if base == "I" else values.astype(np.float32) / 200 - 40)
    elif base == "1":
        image = Image.frombytes("1", size, source.randbytes((size[0] + 7) // 8 * size[1]))
    else:
        image = Image.frombytes(base, size, source.randbytes(BYTES.get(base, 4) * pixels))
    if base in ("P", "PA"):
        image.putpalette(source.randbytes(768))
    if transparency:
        key = (9, 9, 9) if base == "RGB" else 9
        image.info["transparency"] = key if transparency == "key" else source.randbytes(256)
    return image


def summary(pixels):
    """pixels: (1, 3, S, S) float32. A checksum of all the bytes, and some values to read when it differs."""
    pixels = np.ascontiguousarray(pixels, "<f4")
    return [hashlib.sha256(pixels.tobytes()).hexdigest(), pixels[0, :, 0, :2].flatten().tolist()]


def cases():
    """{name: (picture, side, pad)}: every mode and size at 112 pixels, and some at 336 pixels or padded to a square."""
    table = [(mode, 112, False) for mode in MODES] + [("RGB", 336, False), ("LA", 336, False), ("RGB", 112, True)]
    return {
        f"{mode} {width}x{height} to {side}{' padded' * pad}": (picture(mode, (width, height)), side, pad)
        for mode, side, pad in table
        for width, height in SIZES
    }


def main():
    from transformers import CLIPImageProcessor, LlavaImageProcessor

    lines = []
    for name, (image, side, pad) in cases().items():
        square = {"height": side, "width": side}
        options = dict(size={"shortest_edge": side}, crop_size=square, image_mean=MEAN, image_std=STD)
        reference = LlavaImageProcessor(do_pad=True, **options) if pad else CLIPImageProcessor(**options)
        pixels = reference(image, return_tensors="np").pixel_values
        lines.append(f"{json.dumps(name)}: {json.dumps(summary(pixels))}")
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
