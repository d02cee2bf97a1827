"""Pictures as people have them, made here one by one."""

import inspect
import io
import os
import random
import struct
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFile, PngImagePlugin
from PIL.PngImagePlugin import PngInfo

from tinyvl import UserError, media
from tinyvl.media import MediaError, Others, expand, is_image, load_image


def scene(width: int = 96, height: int = 64) -> Image.Image:
    """Red, green, blue and yellow quarters with a black corner: no symmetry, exact colours."""
    image = Image.new("RGB", (width, height), (200, 30, 30))
    draw = ImageDraw.Draw(image)
    draw.rectangle((width // 2, 0, width, height // 2 - 1), fill=(30, 200, 30))
    draw.rectangle((0, height // 2, width // 2 - 1, height), fill=(30, 30, 200))
    draw.rectangle((width // 2, height // 2, width, height), fill=(200, 200, 30))
    draw.rectangle((0, 0, width // 8, height // 8), fill=(0, 0, 0))
    return image


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise at every scale, as in a photograph."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3), np.float32)
    for octave in (4, 16, 64, 512):
        noise = rng.integers(0, 256, (octave, octave, 3), dtype=np.uint8)
        total += (
            np.asarray(Image.fromarray(noise).resize((width, height)), np.float32) / octave**0.5
        )
    return Image.fromarray((total * (255 / total.max())).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def difference(a: Image.Image, b: Image.Image) -> float:
    """Mean absolute difference in grey levels; the sizes must agree."""
    assert a.size == b.size
    return float(np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).mean())


# ------------------------------------------------------------------------------ formats


@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("PPM", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("JPEG2000", {}, 1),
        ("JPEG", {"quality": 95}, 4),
        ("JPEG", {"quality": 95, "progressive": True}, 4),
        ("AVIF", {"quality": 90}, 4),
    ],
)
def test_formats(tmp_path, kind, options, tolerance):
    data = encoded(scene(), kind, **options)
    path = tmp_path / "no_suffix"  # the content decides, not the name
    path.write_bytes(data)
    with path.open("rb") as file:
        for source in (path, str(path), data, io.BytesIO(data), file):
            image = load_image(source)
            assert (type(image), image.mode) == (Image.Image, "RGB")
            assert difference(image, scene()) <= tolerance
        assert not file.closed


def test_multi_picture_jpeg():
    data = encoded(photo(1600, 1200), "MPO", save_all=True, append_images=[photo(1600, 1200, 1)])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert difference(load_image(data), photo(1600, 1200)) < 8
    assert load_image(data, target=100).size == (400, 300)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animation_gives_its_first_frame(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    later = Image.new("RGB", scene().size, "white")
    data = encoded(scene(), kind, save_all=True, append_images=[later, later], **options)
    assert Image.open(io.BytesIO(data)).is_animated
    assert difference(load_image(data), scene()) == 0


def test_cmyk():
    data = encoded(scene().convert("CMYK"), "JPEG", quality=95)
    assert b"Adobe" in data[:200]  # which stores CMYK inverted
    assert difference(load_image(data), scene()) < 4
    assert difference(load_image(encoded(scene().convert("CMYK"), "TIFF")), scene()) < 1


def corner_over_white(path_or_bytes) -> tuple[tuple, tuple]:
    image = load_image(path_or_bytes)
    return image.getpixel((0, 0)), image.getpixel((95, 63))


def test_palette():
    assert difference(load_image(encoded(scene().quantize(8), "PNG")), scene()) < 2
    palette = scene().quantize(8)
    black = palette.getpixel((0, 0))
    for kind in ("PNG", "GIF"):
        first, last = corner_over_white(encoded(palette, kind, transparency=black))
        assert first == (255, 255, 255)
        assert last == (200, 200, 30)
    alphas = bytes(128 if i == black else 255 for i in range(8))  # a half-transparent entry
    assert corner_over_white(encoded(palette, "PNG", transparency=alphas))[0] == (127, 127, 127)


def test_transparency_lies_over_white():
    alpha = Image.new("L", (96, 64), 255)
    ImageDraw.Draw(alpha).rectangle((0, 0, 12, 8), fill=0)
    rgba = scene()
    rgba.putalpha(alpha)
    for kind in ("PNG", "TIFF", "JPEG2000"):
        assert corner_over_white(encoded(rgba, kind)) == ((255,) * 3, (200, 200, 30))
    grey = scene().convert("L")
    shade = (grey.getpixel((95, 63)),) * 3
    la = grey.copy()
    la.putalpha(alpha)
    assert corner_over_white(encoded(la, "PNG")) == ((255,) * 3, shade)
    # A colour named transparent (tRNS) in pictures without alpha.
    assert corner_over_white(encoded(grey, "PNG", transparency=0)) == ((255,) * 3, shade)
    named = encoded(scene(), "PNG", transparency=(0, 0, 0))
    assert corner_over_white(named) == ((255,) * 3, (200, 200, 30))


def test_one_bit():
    bits = scene().convert("L").point(lambda v: 255 * (v > 50), "1")
    for kind in ("PNG", "TIFF", "PPM"):
        image = load_image(encoded(bits, kind))
        assert image.getpixel((0, 0)) == (0, 0, 0)
        assert image.getpixel((95, 63)) == (255, 255, 255)


def test_sixteen_bit_grey_is_scaled():
    ramp = np.linspace(0, 65535, 256, dtype=np.uint16)[None].repeat(4, 0)  # (4, 256)
    for kind in ("PNG", "TIFF", "PPM"):
        image = load_image(encoded(Image.fromarray(ramp), kind))
        assert image.mode == "RGB"
        assert np.abs(np.asarray(image)[0, :, 0].astype(int) - np.arange(256)).max() <= 1
        assert image.getpixel((255, 0)) == (255, 255, 255)
        assert image.getpixel((0, 0)) == (0, 0, 0)
    big = Image.frombytes("I;16B", (256, 4), ramp.astype(">u2").tobytes())
    assert load_image(encoded(big, "TIFF")).getpixel((128, 0)) == (128, 128, 128)


@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        ([0, 100, 255], np.int32, [0, 100, 255]),
        ([0, 257 * 100, 60000], np.int32, [0, 100, 233]),
        ([0, 1_000_000, 2_000_000], np.int32, [0, 128, 255]),
        ([-100, 0, 155], np.int32, [0, 72, 183]),
        ([0, 0, 0], np.int32, [0, 0, 0]),
        ([0, 0.5, 1], np.float32, [0, 128, 255]),
        ([0, 0.1, 0.2], np.float32, [0, 26, 51]),
        ([0, 50, 200], np.float32, [0, 64, 255]),
        ([-1, 0, 1], np.float32, [0, 128, 255]),
        ([np.nan, 0.5, np.inf], np.float32, [0, 128, 0]),
    ],
)
def test_wide_grey(values, dtype, expected):
    image = Image.fromarray(np.array([values], dtype))
    grey = np.asarray(load_image(encoded(image, "TIFF")))[0, :, 0]
    assert np.abs(grey.astype(int) - expected).max() <= 1


# ------------------------------------------------------------------------------ orientation

AS_STORED = {  # orientation -> how a camera held that way stores the upright picture
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", AS_STORED)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF"])
def test_orientation(kind, orientation):
    stored = scene(480, 320)
    if AS_STORED[orientation] is not None:
        stored = stored.transpose(AS_STORED[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, kind, exif=exif)
    image = load_image(data)
    assert difference(image, scene(480, 320)) < 4
    assert image.getexif().get(0x0112, 1) == 1  # nobody turns it again
    if kind == "JPEG":  # scaled decoding turns as well
        small = load_image(data, target=80)
        assert difference(small, scene(480, 320).resize((240, 160))) < 4


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_impossible_orientation_is_ignored(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert difference(load_image(encoded(scene(), "JPEG", exif=exif)), scene()) < 5


def test_broken_exif_is_ignored(recwarn):
    exif = Image.Exif()
    exif[0x0112] = 6
    for broken in (exif.tobytes()[:14], b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff"):
        assert load_image(encoded(scene(), "JPEG", exif=broken)).size == (96, 64)
    assert not recwarn


# ------------------------------------------------------------------------------ refusals


def refusal(source, target=None) -> str:
    with pytest.raises(MediaError) as caught:
        load_image(source, target)
    assert caught.value.status == 1
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000"])
def test_truncated(tmp_path, kind):
    data = encoded(photo(160, 120), kind)
    path = tmp_path / "cut"
    for keep in (0.1, 0.5, 0.9, 0.98):
        path.write_bytes(data[: int(keep * len(data))])
        assert refusal(path).startswith(f"{path}: ")
    path.write_bytes(data[:6])  # the magic number and no more
    assert refusal(path)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES  # nobody's global was touched


def test_truncated_jpeg_at_its_markers():
    data = encoded(photo(160, 120), "JPEG")
    scan = data.index(b"\xff\xda")
    for end in (2, 20, scan, scan + 2, scan + 14, scan + 100, len(data) - 40):
        assert "damaged" in refusal(data[:end])
        assert refusal(data[:end], target=20)
    assert load_image(data)


def test_empty_and_foreign_files(tmp_path):
    for content, reason in [
        (b"", "the file is empty"),
        (b"hello, world\n" * 100, "is not a picture in a format tinyvl reads"),
        (random.Random(0).randbytes(5000), "is not a picture in a format tinyvl reads"),
        (b"%PDF-1.7\n%\xe2\xe3", "is a PDF document; turn its pages into pictures"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "is an SVG drawing; render it to PNG"),
        (b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- x -->\n<svg/>', "is an SVG drawing"),
        (b"<!DOCTYPE html><html><svg/></html>", "is a web page, not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not a picture in a format"),
    ]:
        path = tmp_path / "file.jpg"
        path.write_bytes(content)
        assert refusal(path).startswith(f"{path}: {reason}")
        assert refusal(content).startswith(f"picture in memory: {reason}")


def test_paths_that_cannot_be_opened(tmp_path):
    assert refusal(tmp_path / "no.jpg") == f"{tmp_path}/no.jpg: there is no such file"
    assert refusal(tmp_path) == f"{tmp_path}: is a folder, not a picture"
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    assert "cannot be read (Too many levels of symbolic links)" in refusal(tmp_path / "loop.jpg")
    assert "cannot be read (File name too long)" in refusal(str(tmp_path / ("x" * 300)))
    assert "null" in refusal("a\0b.jpg")


def test_permission_denied(tmp_path, monkeypatch):
    path = tmp_path / "secret.png"
    scene().save(path)
    path.chmod(0)
    if os.access(path, os.R_OK):  # the superuser reads everything

        def denied(*_):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(media, "open", denied, raising=False)
    assert refusal(path) == f"{path}: permission denied"


def png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 1 << 20) + b"IDAT"


def test_bomb_is_refused_from_its_header(monkeypatch, recwarn):
    def decoded(_):
        raise AssertionError("the bomb was decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decoded)
    for size in ((50_000, 50_000), (13_400, 13_400)):
        assert "too large to decode safely" in refusal(png_header(*size))
    monkeypatch.setattr(media, "MAX_PIXELS", 5000)
    assert "(96 x 64 pixels, limit 5,000)" in refusal(encoded(scene(), "PNG"))
    monkeypatch.undo()
    # Between half the limit and the limit Pillow would warn.
    assert "damaged or cut short" in refusal(png_header(10_000, 10_000)[:60])
    large = encoded(Image.new("1", (10_000, 9_000)), "PNG")
    assert load_image(large).size == (10_000, 9_000)
    assert not recwarn


def png_with(*chunks: tuple[bytes, bytes], after: bool = False) -> bytes:
    """The scene, with chunks of these kinds and bodies before or after its pixels."""
    info = PngInfo()
    for kind, body in chunks:
        info.add(kind, body, after_idat=after)
    return encoded(scene(), "PNG", pnginfo=info)


LONG = zlib.compress(b"n" * (2**20 + 1))  # one more than Pillow unpacks of a text


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    "chunks",
    [
        [(b"zTXt", b"workflow\0\0" + LONG)],
        [(b"iTXt", b"workflow\0\1\0\0\0" + LONG)],
        [(b"iCCP", b"profile\0\0" + LONG)],
        [(b"tEXt", b"a\0" + bytes(2**20 + 1))],
        [(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**20)))] * 65,  # 65 MiB in all
        [(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**28)))],  # a bomb: it is not unpacked
        [(b"zTXt", b"a\0\0no zlib"), (b"gAMA", b"\0"), (b"cHRM", b""), (b"sRGB", b"")],
    ],
    ids=["text", "itext", "profile", "plain", "many", "bomb", "malformed"],
)
def test_what_stands_around_a_pngs_pixels_does_not_damage_it(chunks, after, monkeypatch):
    if len(chunks) == 1:  # of all texts together, so that this one need not be so long
        monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", 2**20)
    assert difference(load_image(png_with(*chunks, after=after)), scene()) == 0


def test_a_text_whose_checksum_is_wrong_does_not_damage_a_png():
    data = bytearray(png_with((b"tEXt", b"author\0somebody")))
    data[data.index(b"somebody")] ^= 1
    assert difference(load_image(bytes(data)), scene()) == 0
    data[data.index(b"IDAT") + 20] ^= 1  # that of its pixels does
    assert "damaged" in refusal(bytes(data))


def test_a_png_with_a_long_text_is_still_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = scene().transpose(AS_STORED[6])
    content = exif.tobytes()
    raw = zlib.compress(b"\nexif\n%8d\n%s\n" % (len(content), content.hex().encode()))
    for by_text in (False, True):
        info = PngInfo()
        if by_text:  # as ImageMagick writes it
            info.add(b"zTXt", b"Raw profile type exif\0\0" + raw)
        info.add(b"zTXt", b"workflow\0\0" + LONG)
        options = {} if by_text else {"exif": exif}
        data = encoded(turned, "PNG", pnginfo=info, **options)
        assert difference(load_image(data), scene()) == 0


def test_photos_of_200_megapixels_are_decoded_at_a_scale(monkeypatch):
    monkeypatch.setattr(media, "MAX_PIXELS", 100_000)  # as if these were so large
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)
    phone = photo(420, 320)
    data = encoded(phone, "JPEG", quality=90)
    assert load_image(data, target=30).size == (105, 80)
    whole = load_image(data)  # by half, where nothing says what is needed
    assert whole.size == load_image(data, target=300).size == (210, 160)
    assert difference(whole, phone.reduce(2)) < 3
    several = encoded(phone, "MPO", save_all=True, append_images=[phone])
    assert load_image(several, target=30).size == (105, 80)
    assert "too large" in refusal(encoded(phone, "PNG"), 30)
    assert "too large" in refusal(encoded(phone, "JPEG", progressive=True), 30)
    assert "too large" in refusal(encoded(photo(600, 400), "JPEG"), 30)  # more than twice


def test_unseekable_file():
    read_end, write_end = os.pipe()
    data = encoded(scene(), "PNG")
    with os.fdopen(write_end, "wb") as file:
        file.write(data)
    assert difference(load_image(f"/dev/fd/{read_end}"), scene()) == 0
    os.close(read_end)


# ------------------------------------------------------------------------------ HEIC and AVIF


def ftyp(*brands: bytes) -> bytes:
    box = b"ftyp" + brands[0] + bytes(4) + b"".join(brands)
    return struct.pack(">I", len(box) + 4) + box + bytes(100)


def test_heic_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if not installed
    path = tmp_path / "photo.jpg"  # phones and chat programs rename them
    for brands in ((b"heic", b"mif1"), (b"mif1", b"heic"), (b"heix",), (b"mif1", b"miaf")):
        path.write_bytes(ftyp(*brands))
        assert "pip install 'tinyvl[heif]'" in refusal(path)
    for brands in ((b"avif", b"mif1"), (b"mif1", b"avif"), (b"isom", b"mp42")):
        path.write_bytes(ftyp(*brands))
        assert "heif" not in refusal(path)


def test_heic_with_the_extra():
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = scene(480, 320).transpose(AS_STORED[6])
    data = encoded(stored, "HEIF", quality=90, exif=exif.tobytes())
    assert difference(load_image(data), scene(480, 320)) < 4
    assert refusal(data[: len(data) // 2])


# ------------------------------------------------------------------------------ draft


def test_draft_never_goes_below_the_target():
    for width, height in ((4000, 3000), (3000, 4000), (1999, 1501), (640, 480), (100, 80)):
        data = encoded(Image.new("RGB", (width, height), "teal"), "JPEG")
        for target in (64, 224, 384, 5000):
            image = load_image(data, target)
            assert min(image.size) >= min(target, width, height)
            assert min(image.size) >= 2 * target or image.size == (width, height)
            assert min(image.size) < 4 * target or 8 * min(image.size) <= min(width, height) + 8


def test_draft_equals_the_full_decode_after_resizing():
    original = photo(4000, 3000)
    data = encoded(original, "JPEG", quality=90)
    start = time.process_time()
    full = load_image(data)
    middle = time.process_time()
    small = load_image(data, target=240)
    end = time.process_time()
    assert (full.size, small.size) == ((4000, 3000), (1000, 750))
    expected = full.resize((320, 240), Image.Resampling.BICUBIC)
    got = small.resize((320, 240), Image.Resampling.BICUBIC)
    assert difference(got, expected) < 0.5
    assert np.abs(np.asarray(got, int) - np.asarray(expected, int)).max() <= 4
    assert end - middle < 0.8 * (middle - start)


# ------------------------------------------------------------------------------ expand


@pytest.fixture
def tree(tmp_path, monkeypatch):
    names = "b.jpg a.PNG sub/z.webp sub/deeper/y.gif c.txt .hidden.jpg .git/x.jpg sub/n.json"
    for name in [*names.split(), "empty/readme.md", "[1].jpg", "1.jpg"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_is_image():
    assert all(map(is_image, ["a.jpg", "b/C.JPEG", "x.Heic", "d.tiff", Path("e.png")]))
    assert not any(map(is_image, ["a.txt", "jpg", "b.jpg.part", "video.mp4", ""]))


def test_expand_files_folders_and_patterns(tree):
    below = ["1.jpg", "[1].jpg", "a.PNG", "b.jpg", "sub/deeper/y.gif", "sub/z.webp"]
    assert list(expand([str(tree)])) == [f"{tree}/{name}" for name in below]
    assert list(expand(["."])) == [f"./{name}" for name in below]
    assert list(expand(["c.txt", "b.jpg", "gone.jpg"])) == ["c.txt", "b.jpg", "gone.jpg"]
    assert list(expand(["*.jpg"])) == ["1.jpg", "[1].jpg", "b.jpg"]
    assert list(expand(["**/*.gif"])) == ["sub/deeper/y.gif"]
    assert list(expand(["[1].jpg"])) == ["[1].jpg"]  # a file, not a pattern
    assert list(expand(["[12].jpg"])) == ["1.jpg"]
    assert list(expand(["s*b"])) == ["sub/deeper/y.gif", "sub/z.webp"]
    assert list(expand(["no*.jpg"])) == ["no*.jpg"]  # the decoder says that it is not there
    assert list(expand([".git"])) == [".git/x.jpg"]  # hidden, but named
    assert list(expand([Path("b.jpg")])) == ["b.jpg"]


def test_expand_links(tree):
    (tree / "sub/loop").symlink_to(tree)
    (tree / "sub/gone.jpg").symlink_to(tree / "nowhere")
    (tree / "link").symlink_to(tree / "sub")
    os.mkfifo(tree / "sub/pipe.jpg")  # opening it would wait for ever
    assert list(expand(["link"])) == ["link/deeper/y.gif", "link/gone.jpg", "link/z.webp"]


def test_expand_empty_folder_is_said_last(tree):
    found = expand(["empty", "b.jpg"])
    assert next(found) == "b.jpg"
    with pytest.raises(MediaError, match=r"^empty: no images in this folder$"):
        next(found)


def test_expand_unreadable_folder_gives_itself(tree, monkeypatch):
    def denied(path):
        if str(path).endswith("deeper"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", denied)
    assert list(expand(["sub"])) == ["sub/deeper", "sub/z.webp"]


def test_expand_deep_and_lazy(tree):
    def inputs():
        yield "b.jpg"
        raise AssertionError("read ahead")

    assert next(expand(inputs())) == "b.jpg"
    below = tree / "/".join("d" * 200)
    below.mkdir(parents=True)
    (below / "x.jpg").touch()
    limit = sys.getrecursionlimit()
    try:
        sys.setrecursionlimit(len(inspect.stack()) + 100)  # folders go deeper than Python recurses
        assert list(expand(["d"])) == [f"{below.relative_to(tree)}/x.jpg"]
    finally:
        sys.setrecursionlimit(limit)


def test_expand_standard_input():
    data = b"a.jpg\r\n\n  \n b c.jpg \n*.png\n./caf\xe9.jpg\nlast.jpg"
    expected = ["a.jpg", " b c.jpg ", "*.png", "./caf\udce9.jpg", "last.jpg"]
    text = io.TextIOWrapper(io.BytesIO(data), "utf-8")  # strict, as in a test runner
    assert list(expand(["-"], io.BytesIO(data))) == expected
    assert list(expand(["-"], text)) == expected
    assert list(expand(["x", "-", "y"], io.BytesIO(b"m\n"))) == ["x", "m", "y"]
    assert list(expand(["-"], io.StringIO("é.jpg\nb"))) == ["é.jpg", "b"]
    assert list(expand(["-"], io.BytesIO())) == []
    null = b"a\nb.jpg\0\0c.jpg\r\0 \0d"
    assert list(expand(["-"], io.BytesIO(null), null=True)) == ["a\nb.jpg", "c.jpg\r", " ", "d"]
    with pytest.raises(UserError, match="read with -0") as caught:
        list(expand(["-"], io.BytesIO(b"a.jpg\0b.jpg\0")))
    assert caught.value.status == 2


def test_a_picture_on_standard_input_is_no_list_of_paths():
    found = expand(["-"], io.BytesIO(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"))
    with pytest.raises(UserError, match=r"- stands for paths .* name a picture by its path"):
        next(found)


def test_what_a_folder_has_besides_is_counted_by_kind(tmp_path, capsys):
    for name in [
        "a.jpg",
        "a.txt",
        "b.NEF",
        "c.cr2",
        "d.mp4",
        "e.psd",
        "README",
        "x.json",
        ".hidden",
    ]:
        (tmp_path / name).touch()
    assert list(expand([str(tmp_path)], others=Others("image"))) == [f"{tmp_path}/a.jpg"]
    said = capsys.readouterr().err
    for part in ("2 RAW pictures (.", "1 video (.mp4)", "2 other files ("):
        assert part in said
    assert list(expand([str(tmp_path)], others=Others("video", quiet=True))) == [
        f"{tmp_path}/d.mp4"
    ]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("null", [False, True])
def test_expand_streams_standard_input(null):
    end = b"\0" if null else b"\n"
    read_end, write_end = os.pipe()
    with os.fdopen(read_end, "rb") as stdin, os.fdopen(write_end, "wb", 0) as writer:
        found = expand(["-"], stdin, null)
        for name in (b"one.jpg", b"two.jpg"):
            writer.write(name + end + b"part of the next")
            assert next(found) == name.decode()  # hangs if it waits for more
            writer.write(end)
            assert next(found) == "part of the next"
