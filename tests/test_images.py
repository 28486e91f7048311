"""Image preprocessing against golden results of transformers, and files that are not quite pictures."""

import contextlib
import gc
import io
import json
import os
import sys
import threading
import time
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

import opening
from images import ImageProcessor, open_image, size_of
from tests.make_images import FILE, MEAN, MODES, SIZES, STD, cases, picture, summary

GOLDEN = json.loads(FILE.read_text())
CASES = cases()
CONFIG = {
    "crop_size": {"height": 112, "width": 112},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": MEAN,
    "image_processor_type": "CLIPImageProcessor",
    "image_std": STD,
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 112},
}


def processor(side, crop=None):
    return ImageProcessor(side, crop or side, tuple(MEAN), tuple(STD))


def by_hand(image, side, resample=Image.Resampling.BICUBIC, background="white", shift=0):
    """The same preprocessing written another way; other arguments than the defaults are the usual mistakes."""
    if "A" in image.getbands():
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image.convert("RGBA"))
    scale = side / min(image.size)
    image = image.convert("RGB").resize([int(length * scale + 1e-9) for length in image.size], resample)
    x, y = (image.width - side) // 2, (image.height - side) // 2
    x, y = (x + shift, y) if image.width > image.height else (x, y + shift)
    pixels = np.asarray(image)[y : y + side, x : x + side] * np.float32(1 / 255)
    return torch.from_numpy((pixels - np.float32(MEAN)) / np.float32(STD)).permute(2, 0, 1)[None]


# Pixels


@pytest.mark.parametrize("name", CASES)
def test_pixels_equal_transformers_to_the_last_bit(name):
    image, side, pad = CASES[name]
    pixels = processor(side)([image], pad=pad)
    assert pixels.shape == (1, 3, side, side) and pixels.dtype == torch.float32 and pixels.is_contiguous()
    assert summary(pixels.numpy()) == GOLDEN[name]


def test_the_golden_file_is_whole():
    assert len(CASES) == (len(MODES) + 3) * len(SIZES) and GOLDEN.keys() == CASES.keys()


def test_a_batch_is_its_pictures():
    images = [picture("RGB", (91, 133)), picture("P+key", (200, 3)), picture("I;16", (337, 336))]
    batch = processor(56)(images)
    assert batch.shape == (3, 3, 56, 56)
    assert torch.equal(batch, torch.cat([processor(56)([image]) for image in images]))


def test_pictures_are_left_as_they_were():
    image = picture("RGBA", (91, 133))
    before = image.copy()
    processor(56)([image], pad=True)
    assert image == before


@pytest.mark.parametrize("size", [(91, 133), (200, 56), (57, 112)])
def test_usual_mistakes_give_other_pixels(size):
    image = picture("RGBA", size)
    image = image.resize((size[0] * 2, size[1] * 2), Image.Resampling.BICUBIC)  # no mere noise
    ours = processor(56)([image])
    assert torch.allclose(ours, by_hand(image, 56), atol=1e-5)
    assert not torch.allclose(ours, by_hand(image, 56, resample=Image.Resampling.BILINEAR), atol=0.01)
    assert not torch.allclose(ours, by_hand(image, 56, background="black"), atol=0.01)
    assert not torch.allclose(ours, by_hand(image, 56, background=(0, 0, 0, 0)), atol=0.01)  # alpha dropped
    assert not torch.allclose(ours, by_hand(image, 56, shift=1), atol=0.01)
    assert not torch.allclose(ours, processor(56)([image], pad=True), atol=0.01)


@pytest.mark.parametrize("size", [(91, 134), (134, 91), (3, 200), (112, 112)])
def test_pad_is_a_square_of_the_mean_colour(size):
    image = picture("RGB", size)
    side, (width, height) = max(size), size
    square = np.empty((side, side, 3), np.uint8)
    square[:] = 122, 116, 104
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = np.asarray(image)
    assert torch.equal(processor(112)([image], pad=True), processor(112)([Image.fromarray(square)]))


def test_pad_by_hand():
    image = Image.fromarray(np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]], np.uint8))  # 4 × 1
    pixels = processor(4)([image], pad=True)[0].permute(1, 2, 0)
    red, green, blue = ((pixels * torch.tensor(STD) + torch.tensor(MEAN)) * 255).round().int().permute(2, 0, 1).tolist()
    assert red == [[122] * 4, [255, 0, 0, 255], [122] * 4, [122] * 4]  # (4 − 1) // 2 = 1 row above
    assert green == [[116] * 4, [0, 255, 0, 255], [116] * 4, [116] * 4]
    assert blue == [[104] * 4, [0, 0, 255, 255], [104] * 4, [104] * 4]


def test_crop_may_be_smaller_than_the_resized_picture():
    image = picture("RGB", (91, 133))
    assert torch.equal(processor(64, 56)([image]), processor(64)([image])[..., 4:60, 4:60])


# Shapes at the edge


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1)])
def test_long_pictures(size):
    image = picture("RGB", size)
    assert torch.allclose(processor(14)([image]), by_hand(image, 14), atol=1e-5)


def test_too_elongated():
    with pytest.raises(ValueError, match="1×100000 pixels is too elongated"):
        processor(336)([Image.new("RGB", (1, 100000))])


def test_too_elongated_to_pad(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**5)  # the square would have ten times the pixels allowed
    with pytest.raises(ValueError, match="1×1000 pixels is too elongated"):
        processor(14)([Image.new("RGB", (1, 1000))], pad=True)


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("pad", [False, True])
def test_a_picture_without_pixels(size, pad):
    with pytest.raises(ValueError, match=f"{size[0]}×{size[1]}"):
        processor(14)([Image.new("RGB", size)], pad=pad)


def test_no_pictures():
    with pytest.raises(ValueError, match="no pictures"):
        processor(14)([])


def test_pillows_limit_may_be_lifted(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert processor(14)([picture("RGB", (3, 200))]).shape == (1, 3, 14, 14)


# Files


STORED_AS = {  # what turns an upright picture into the one stored with this EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    upright, exif = picture("RGB", (5, 3)), Image.Exif()
    exif[0x0112] = orientation
    stored = upright.transpose(STORED_AS[orientation]) if orientation > 1 else upright
    stored.save(tmp_path / "picture.png", exif=exif)
    assert np.array_equal(np.asarray(open_image(tmp_path / "picture.png")), np.asarray(upright))
    for name in ("picture.png", "picture.jpg", "picture.tiff"):
        stored.save(tmp_path / name, exif=exif)
        assert size_of(tmp_path / name) == open_image(tmp_path / name).size == (5, 3)


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "animation.gif", save_all=True, append_images=frames[1:])
    image = open_image(str(tmp_path / "animation.gif"))
    assert np.array_equal(np.asarray(image.convert("RGB")), np.asarray(frames[0]))


def broken_files(folder):
    """Files of which none is a picture: {name: what its error must say}."""
    noise, cut = picture("RGB", (40, 30)), ("cut.png", "cut.jpg", "cut.webp", "cut.tiff", "cut.bmp", "cut.gif")
    for name in cut:
        noise.save(folder / name)
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
    (folder / "header.tiff").write_bytes(b"II*\x00\x08\x00\x00\x00\x05")
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("not a picture")
    (folder / "folder.png").mkdir()
    others = dict.fromkeys(("header.tiff", "empty.png", "text.jpg"), "not a picture")
    return dict.fromkeys(cut, "damaged") | others | {"folder.png": "is a folder"}


def test_broken_files(tmp_path):
    for name, says in broken_files(tmp_path).items():
        with pytest.raises(ValueError) as error:
            open_image(tmp_path / name)
        message = str(error.value)
        assert f"{name} is" in message and says in message and "\n" not in message and "Errno" not in message


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.png: no such picture"):
        open_image(tmp_path / "none.png")


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, SyntaxError, OSError, IndexError, KeyError])
def test_whatever_a_decoder_raises_is_one_error(tmp_path, monkeypatch, error):
    picture("RGB", (5, 3)).save(tmp_path / "picture.png")

    def fail(image):
        raise error("odd")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    with pytest.raises(ValueError, match="picture.png.*damaged"):
        open_image(tmp_path / "picture.png")


@pytest.mark.skipif(os.name != "posix", reason="links and rights of POSIX")
def test_what_the_system_refuses(tmp_path):
    loop, locked = tmp_path / "loop.png", tmp_path / "locked.png"
    loop.symlink_to(loop)
    picture("RGB", (5, 3)).save(locked)
    names = {loop: "cannot be opened", tmp_path / ("x" * 300 + ".png"): "cannot be opened", locked / "x.png": "cannot be opened"}
    for name, words in names.items():
        with pytest.raises(ValueError, match=words) as error:
            open_image(name)
        assert "Errno" not in str(error.value) and "damaged" not in str(error.value)
    with pytest.raises(ValueError, match="null"):
        open_image("a\0b.png")


def test_a_picture_that_may_not_be_read(tmp_path, monkeypatch):
    def locked(*_):
        raise PermissionError(13, "Permission denied")

    picture("RGB", (5, 3)).save(tmp_path / "locked.png")
    monkeypatch.setattr("builtins.open", locked)
    with pytest.raises(ValueError, match="locked.png: permission denied"):
        open_image(tmp_path / "locked.png")


def test_eps_without_ghostscript(tmp_path, monkeypatch):
    picture("RGB", (5, 3)).save(tmp_path / "drawing.eps")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", False)
    with pytest.raises(ValueError, match="drawing.eps is an EPS picture.*Ghostscript.*install"):
        open_image(tmp_path / "drawing.eps")


def test_a_missing_codec_is_no_damage(tmp_path, monkeypatch):
    picture("RGB", (5, 3)).save(tmp_path / "picture.png")

    def fail(image):
        raise OSError("decoder zip not available")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    with pytest.raises(ValueError, match="picture.png is of a kind that Pillow cannot read here"):
        open_image(tmp_path / "picture.png")


HEAD = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"


def test_heic_needs_a_package(tmp_path, monkeypatch):
    (tmp_path / "photo.heic").write_bytes(HEAD + bytes(100))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ValueError, match="photo.heic is a HEIC picture.*pip install pillow-heif"):
        open_image(tmp_path / "photo.heic")


def test_heic_is_read_where_the_package_is(tmp_path, monkeypatch):
    """A package that stands in for it reads such a file as a picture of one colour."""

    class Photo(ImageFile.ImageFile):
        format = "HEIF"

        def _open(self):
            self._size, self._mode = (6, 4), "RGB"

        def load(self):
            self._im = Image.new("RGB", self.size, "red").im

    def register_heif_opener():
        Image.register_open("HEIF", Photo, lambda head: head[4:8] == b"ftyp")

    (tmp_path / "photo.heic").write_bytes(HEAD + bytes(100))
    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=register_heif_opener))
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    assert np.array_equal(np.asarray(open_image(tmp_path / "photo.heic")), np.asarray(Image.new("RGB", (6, 4), "red")))


def test_a_telephones_200_megapixels_are_allowed(tmp_path, monkeypatch):
    assert opening.MOST_PIXELS * Image.MAX_IMAGE_PIXELS > 16384 * 12288
    picture("RGB", (18, 13)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow itself would refuse more than 200
    assert open_image(tmp_path / "large.png").size == (18, 13) and Image.MAX_IMAGE_PIXELS == 100
    processor(14)([open_image(tmp_path / "large.png")], pad=True)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 90)
    with pytest.raises(ValueError, match="large.png is too large a picture: 18×13"):
        open_image(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert open_image(tmp_path / "large.png").size == (18, 13)


# Deep greyscale

GREY = np.asarray(picture("L", (31, 17)))
DEEP = {
    "grey16.png": GREY.astype(np.uint16) * 257,
    "grey12in16.tif": GREY.astype(np.uint16) * 16,
    "grey16.tif": GREY.astype(np.uint16) * 257,
    "int32.tif": GREY.astype(np.int32) * 257,
    "float_0_1.tif": GREY.astype(np.float32) / 255,
    "float_0_65535.tif": GREY.astype(np.float32) * 257,
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_greyscale_is_scaled_when_asked(tmp_path, name, capsys, monkeypatch):
    monkeypatch.setattr(opening, "_told", set())
    Image.fromarray(DEEP[name]).save(tmp_path / name)
    plain = open_image(tmp_path / name)
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and name in said and "--scale-grey" in said
    assert plain.mode != "L"  # as transformers has it
    scaled = open_image(tmp_path / name, scale_grey=True)
    assert scaled.mode == "L" and np.abs(np.asarray(scaled).astype(int) - GREY).max() <= (1 if "12in16" in name else 0)
    open_image(tmp_path / name)
    assert capsys.readouterr().err == ""  # said once


@pytest.mark.parametrize(
    "values, black, white",
    [(np.float32([[-1000, 0, 3000]]), -1000, 3000), (np.int32([[-5, 0, 5]]), -5, 5), (np.float32([[0, np.nan, 1, np.inf]]), 0, 1)],
)
def test_values_below_0_and_what_is_no_number(values, black, white):
    scaled = np.asarray(opening.scaled_grey(Image.fromarray(values)))
    expected = (np.nan_to_num(values.astype(float), posinf=0) - black) / (white - black) * 255
    assert np.abs(scaled - expected).max() <= 0.5


@pytest.mark.parametrize("values", [np.zeros((2, 2), np.uint16), np.full((2, 2), np.nan, np.float32), np.full((2, 2), 1e30, np.float32)])
def test_one_grey_is_no_error(values):
    assert len(np.unique(np.asarray(opening.scaled_grey(Image.fromarray(values))))) == 1


def test_eight_bits_are_left_alone(tmp_path, capsys):
    for mode in ("L", "LA", "RGB", "P", "1"):
        picture("L", (5, 3)).convert(mode).save(tmp_path / "picture.png")
        assert open_image(tmp_path / "picture.png", scale_grey=True) == open_image(tmp_path / "picture.png")
    assert capsys.readouterr().err == ""


# Addresses


@pytest.fixture
def server(monkeypatch):
    """A web server on this machine: its address. What it answers depends on the path."""
    data = io.BytesIO()
    picture("RGB", (20, 15)).save(data, "PNG")
    data = data.getvalue()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/slow.png":
                time.sleep(1)
            if self.path == "/moved.png":
                self.send_response(302)
                self.send_header("Location", "/picture.png")
                return self.end_headers()
            if self.path == "/none.png":
                return self.send_error(404)
            self.send_response(200)
            body = b"<html>" if self.path == "/page" else data
            self.send_header("Content-Length", str(len(body) + 50 * (self.path == "/cut.png")))
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # whoever asked has had enough
                for k in range(0, len(body), 40):
                    self.wfile.write(body[k : k + 40])
                    time.sleep(0.2 * (self.path == "/drips.png"))

        def log_message(self, *_):
            pass

    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}"
    httpd.shutdown()
    httpd.server_close()


@pytest.mark.parametrize("path", ["/picture.png", "/moved.png"])
def test_a_picture_from_an_address(server, path):
    assert np.array_equal(np.asarray(open_image(server + path)), np.asarray(picture("RGB", (20, 15))))


@pytest.mark.parametrize(
    "path, words",
    [("/none.png", "404 Not Found"), ("/page", "is not a picture"), ("/cut.png", "ended 50 bytes before"), ("/slow.png", "longer than 0.5"),
     ("/drips.png", "longer than 0.5")],
)  # fmt: skip
def test_an_address_that_gives_no_picture(server, path, words, monkeypatch):
    monkeypatch.setattr(opening, "PATIENCE", 0.5)
    with pytest.raises(ValueError, match=words) as error:
        open_image(server + path)
    assert server + path in str(error.value)


def test_an_address_with_too_many_bytes(server, monkeypatch):
    monkeypatch.setattr(opening, "MOST_BYTES", 100)
    with pytest.raises(ValueError, match="more than 0.0001 MB"):
        open_image(server + "/picture.png")


@pytest.mark.parametrize("address", ["http://127.0.0.1:1/x.png", "http://", "http://[", "http://127.0.0.1:port/", "http://a b/"])
def test_addresses_that_lead_nowhere(address):
    with pytest.raises(ValueError, match="cannot be|no host"):
        open_image(address)


def test_file_addresses_and_open_files(tmp_path):
    file = tmp_path / "a picture.png"
    picture("RGB", (5, 3)).save(file)
    expected = open_image(file)
    assert open_image(file.as_uri()) == expected and open_image("file://localhost" + file.as_uri()[7:]) == expected
    assert open_image(io.BytesIO(file.read_bytes())) == expected
    with pytest.raises(FileNotFoundError, match="file:///none.png: no such picture"):
        open_image("file:///none.png")
    for read in (open_image, size_of):
        with pytest.raises(ValueError, match="this file is not a picture"):
            read(io.BytesIO(b"text"))


def test_a_decompression_bomb(tmp_path, monkeypatch):
    picture("RGB", (20, 15)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="bomb.png is too large"):
        open_image(tmp_path / "bomb.png")


def test_pillow_neither_warns_nor_leaves_files_open(tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    picture("RGB", (5, 3)).save(tmp_path / "exif.jpg", exif=exif)
    data, length = (tmp_path / "exif.jpg").read_bytes(), b"\x01\x0e\x00\x02\x00\x00\x00\x0e"
    (tmp_path / "exif.jpg").write_bytes(data.replace(length, length[:-2] + b"\xff\xff"))  # longer than the file
    picture("RGB", (20, 15)).save(tmp_path / "large.png")
    Image.new("L", (6, 4)).save(tmp_path / "two.gif", save_all=True, append_images=[Image.new("L", (6, 4), 255)])
    broken = broken_files(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)  # Pillow warns of more and refuses twice as many
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name, size in (("exif.jpg", (3, 5)), ("large.png", (20, 15)), ("two.gif", (6, 4))):
            assert open_image(tmp_path / name).size == size_of(tmp_path / name) == size
        for name in broken:
            with pytest.raises(ValueError):
                open_image(tmp_path / name)
        gc.collect()
    assert [str(warning.message) for warning in caught] == []


# preprocessor_config.json


def write(folder, config, name="preprocessor_config.json"):
    (folder / name).write_text(config if isinstance(config, str) else json.dumps(config))


def test_both_config_files(tmp_path):
    write(tmp_path, {"image_processor": CONFIG, "processor_class": "LlavaProcessor"}, "processor_config.json")
    assert ImageProcessor.from_pretrained(tmp_path) == processor(112)
    write(tmp_path, CONFIG | {"size": {"shortest_edge": 128}})
    assert ImageProcessor.from_pretrained(tmp_path) == processor(112)  # as in transformers, the newer file comes first
    write(tmp_path, {"processor_class": "LlavaProcessor"}, "processor_config.json")
    assert ImageProcessor.from_pretrained(tmp_path) == processor(128, 112)


@pytest.mark.parametrize("content", [{"image_processor": [1]}, [], "[" * 100_000])
def test_a_processor_config_that_is_none(tmp_path, content):
    write(tmp_path, content, "processor_config.json")
    with pytest.raises(ValueError, match="processor_config.json (holds a|is not valid JSON)"):
        ImageProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize("field", ["do_pad", "do_resize", "do_convert_rgb", "resample", "rescale_factor"])
def test_null_is_as_if_the_field_were_not_there(tmp_path, field):
    write(tmp_path, CONFIG | {field: None, "device": None, "image_seq_length": None})
    write(tmp_path, {"image_processor": None, "processor_class": "LlavaProcessor"}, "processor_config.json")
    assert ImageProcessor.from_pretrained(tmp_path) == processor(112)


def test_a_note_called_transparency_is_none():
    image = Image.new("RGB", (112, 112), "red")
    image.info["transparency"] = "none"  # as a PNG's text chunk of this name leaves it
    assert torch.equal(processor(112)([image]), processor(112)([Image.new("RGB", (112, 112), "red")]))


def test_sizes_may_be_numbers(tmp_path):
    write(tmp_path, CONFIG | {"size": 128, "crop_size": 112})
    assert ImageProcessor.from_pretrained(str(tmp_path)) == processor(128, 112)


def test_steps_and_factors_have_defaults(tmp_path):
    write(tmp_path, {name: CONFIG[name] for name in ("size", "crop_size", "image_mean", "image_std")})
    assert ImageProcessor.from_pretrained(tmp_path) == processor(112)


def test_null_in_all_fields_at_once(tmp_path):
    unknown = dict.fromkeys(("do_pad", "pad_size", "data_format", "device", "return_tensors"))  # as transformers 4.57 writes them
    steps = {name: None for name in CONFIG if name not in ("size", "crop_size", "image_mean", "image_std")}
    sizes = {"size": {"shortest_edge": 112, "height": None}, "crop_size": {"height": 112, "width": 112, "longest_edge": None}}
    write(tmp_path, {"image_processor": None, "processor_class": "LlavaProcessor"}, "processor_config.json")
    write(tmp_path, CONFIG | unknown | steps | sizes)
    assert ImageProcessor.from_pretrained(tmp_path) == processor(112)


@pytest.mark.parametrize("files", [{}, {"processor_config.json": {"processor_class": "LlavaProcessor"}}])
def test_no_config(tmp_path, files):
    for name, config in files.items():
        write(tmp_path, config, name)
    with pytest.raises(FileNotFoundError, match="no preprocessor_config.json"):
        ImageProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change, word",
    [
        *[({step: False}, step) for step in CONFIG if step.startswith("do_")],
        ({"do_pad": True}, "do_pad"),
        ({"resample": 2}, "resample"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor"),
        ({"rescale_factor": "1/255"}, "rescale_factor"),
        ({"size": None}, "size"),
        ({"size": {"height": 112, "width": 112}}, "shortest_edge"),
        ({"size": "112"}, "size"),
        ({"size": {"shortest_edge": 112.5}}, "size"),
        ({"size": 0, "crop_size": 0}, "size"),
        ({"size": -112, "crop_size": -112}, "size"),
        ({"size": 111}, "crop_size 112 is larger"),
        ({"crop_size": {"height": 112, "width": 100}}, "crop_size"),
        ({"crop_size": {"width": 112}}, "height"),
        ({"crop_size": True}, "crop_size"),
        ({"image_mean": [0.5]}, "image_mean"),
        ({"image_mean": [0.5] * 4}, "image_mean"),
        ({"image_mean": "abc"}, "image_mean"),
        ({"image_mean": None}, "image_mean"),
        ({"image_std": [0.3, 0.3, 0]}, "image_std"),
        ({"image_std": 0.3}, "image_std"),
    ],
)
def test_configs_that_are_refused(tmp_path, change, word):
    write(tmp_path, CONFIG | change)
    with pytest.raises(ValueError) as error:
        ImageProcessor.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value) and word in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["size", "crop_size", "image_mean", "image_std"])
def test_configs_that_lack_something(tmp_path, name):
    write(tmp_path, {field: value for field, value in CONFIG.items() if field != name})
    with pytest.raises(ValueError, match=f"lacks.*{name}"):
        ImageProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3"])
@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_configs_that_are_no_json_objects(tmp_path, name, text):
    write(tmp_path, text, name)
    with pytest.raises(ValueError, match=name):
        ImageProcessor.from_pretrained(tmp_path)
