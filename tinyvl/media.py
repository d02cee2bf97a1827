"""Picture files: which there are, and how one is decoded.

``load_image`` turns a path into an upright RGB picture, or says in one sentence why it cannot.
``expand``, in `media_files`, turns what a user names into paths.
"""

from __future__ import annotations

import io
import os
import warnings
import zlib
from bisect import bisect
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from importlib.util import find_spec
from typing import BinaryIO, TypeVar

import numpy as np
from PIL import Image, ImageOps, JpegImagePlugin, UnidentifiedImageError

from tinyvl.media_files import (
    KIND_OF,
    MODALITIES,
    READABLE,
    SUFFIXES,
    MediaError,
    Others,
    expand,
    is_image,
    kind_of,
)

__all__ = [
    "KIND_OF", "MODALITIES", "READABLE", "SUFFIXES", "MediaError", "Others", "expand", "is_image",
    "kind_of", "load_image",
]  # fmt: skip

# No EPS: Pillow would run Ghostscript on a stranger's program. No TGA: it has no magic number.
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "AVIF", "JPEG2000")
# What would be larger once decoded is refused unread. Pillow itself refuses at twice
# PIL.Image.MAX_IMAGE_PIXELS, the same number: to read larger ones, raise both.
MAX_PIXELS = 178_956_970
MAX_TEXT = 2**20  # bytes: Pillow takes a PNG with a longer compressed text for a bomb
T = TypeVar("T")


# ------------------------------------------------------------------------------ one picture


def load_image(
    source: str | os.PathLike[str] | bytes | BinaryIO, target: int | None = None
) -> Image.Image:
    """Decode a picture (a path, bytes, or a binary file, which is left open) to upright RGB.

    Of an animation the first frame is read. EXIF orientation is applied, transparency becomes
    white, and 16-bit and floating-point grey is scaled to 0..255, not clipped to white.

    ``target`` is the shortest side, in pixels, that will be needed. A large JPEG is then decoded at
    1/2, 1/4 or 1/8 scale, but its shortest side stays at least twice that: resized further, it
    differs from the full decode by a fraction of a grey level.

    Raises MediaError: no such file, not a picture, more than `MAX_PIXELS` at the scale at which it
    is decoded, damaged or cut short (a half-grey picture would be captioned as if it were whole).
    Damage that the codec conceals, such as flipped bits inside a JPEG scan, goes unnoticed.
    """
    return _decoded(source, partial(_read, target=target))


def _decoded(
    source: str | os.PathLike[str] | bytes | BinaryIO, read: Callable[[BinaryIO, str], T]
) -> T:
    """What ``read`` makes of a file and its name; any error becomes a MediaError."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        name, opened = "picture in memory", nullcontext(io.BytesIO(source))
    elif hasattr(source, "read"):
        name, opened = str(getattr(source, "name", "picture in memory")), nullcontext(source)
    else:
        name, opened = os.fspath(source), None
    try:
        # Pillow warns of bombs, odd EXIF and more; what matters we refuse in a sentence.
        with warnings.catch_warnings(), opened or open(name, "rb") as file:
            warnings.simplefilter("ignore")
            if not file.seekable():  # a pipe, as in `tinyvl caption <(curl URL)`
                file = io.BytesIO(file.read())
            try:
                return read(file, name)
            except Exception:
                if (slim := _slim_png(file)) is None:
                    raise
                return read(slim, name)
    except MediaError:
        raise
    except Exception as error:  # a decoder may raise anything at all on a damaged file
        raise MediaError(f"{name}: {_reason(error)}") from error


def is_animated(path: str) -> bool:
    """Whether a file is a GIF, PNG, WebP or AVIF of several frames; False on any error."""
    try:
        return _decoded(path, lambda file, name: len(_numbers(_open(file, name))) > 1)
    except MediaError:
        return False


def load_animation(path: str, times: Callable[[float], list[float]]) -> list[Image.Image]:
    """The frames of an animated picture that are shown at some times, as upright RGB.

    ``times`` is told how long the animation lasts, and gives seconds in ascending order. Raises
    MediaError as `load_image`; of an animation that is damaged on the way, its beginning is used.
    """
    return _decoded(path, partial(_frames, times=times))


def _numbers(image: Image.Image) -> range:
    """Of its frames, those that are animated."""
    if image.format not in ("GIF", "PNG", "WEBP", "AVIF"):  # a TIFF has pages
        return range(1)
    return range(int(getattr(image, "default_image", False)), getattr(image, "n_frames", 1))


def _frames(file: BinaryIO, name: str, times: Callable[[float], list[float]]) -> list[Image.Image]:
    image = _open(file, name)
    _refuse_bomb(image, name)
    numbers, ends = _numbers(image), []  # when each frame ends
    for number in numbers:
        try:
            image.seek(number)
            image.load()
        except Exception:
            if not ends:
                raise
            break
        shown = image.info.get("duration", 0) / 1000
        ends.append((ends or [0.0])[-1] + (shown if shown > 0.01 else 0.1))  # as browsers do
    wanted = [min(bisect(ends, time), len(ends) - 1) for time in times(ends[-1])]
    kept: dict[int, Image.Image] = {}
    for i in sorted(set(wanted)):
        image.seek(numbers[i])
        image.load()
        kept[i] = upright(image.copy())
    return [kept[i] for i in wanted]


def why_unopened(error: Exception, kind: str) -> str | None:
    """A clause that says why the system did not open a file; None for any other error."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, IsADirectoryError):
        return f"is a folder, not a {kind}"
    return "permission denied" if isinstance(error, PermissionError) else None


def _reason(error: Exception) -> str:
    if reason := why_unopened(error, "picture"):
        return reason
    if isinstance(error, Image.DecompressionBombError):
        return f"too large to decode safely ({error})"
    if isinstance(error, OSError) and error.errno is not None:
        return f"cannot be read ({error.strerror})"
    return f"damaged or cut short, cannot be decoded ({str(error) or type(error).__name__})"


def _read(file: BinaryIO, name: str, target: int | None) -> Image.Image:
    image = _open(file, name)
    side, pixels = 2 * target if target else None, image.width * image.height
    if pixels > MAX_PIXELS:  # phones write JPEGs of 200 megapixels
        if pixels > 2 * MAX_PIXELS or image.info.get("progressive"):  # held at full size anyway
            _refuse_bomb(image, name)
        side = min(side or MAX_PIXELS, min(image.size) // 2)
    if side:
        image.draft(None, (side, side))  # only JPEGs do anything here
    _refuse_bomb(image, name)
    image.load()
    return upright(image)


def upright(image: Image.Image) -> Image.Image:
    """A picture turned as its EXIF says, in RGB; the given one may be changed."""
    with suppress(Exception):  # broken metadata does not make the picture unusable
        ImageOps.exif_transpose(image, in_place=True)
    image = _rgb(image)
    image.info = {}  # or its EXIF would turn the picture a second time
    return image


def _open(file: BinaryIO, name: str) -> Image.Image:
    """A picture whose header is read and whose pixels are not."""
    file.seek(0)
    head = file.read(4096)
    if not head:
        raise MediaError(f"{name}: the file is empty")
    try:
        return Image.open(file, formats=_heif_formats(head, name) or _FORMATS)
    except UnidentifiedImageError as error:
        raise MediaError(f"{name}: {_what_else(head)}") from error
    except Image.DecompressionBombError:
        if not head.startswith(b"\xff\xd8\xff"):  # a JPEG may be decoded at a smaller scale
            raise
        file.seek(0)
        return JpegImagePlugin.jpeg_factory(file, name)


def _refuse_bomb(image: Image.Image, name: str) -> None:
    if image.width * image.height > MAX_PIXELS:
        size = f"{image.width} x {image.height} pixels"
        raise MediaError(f"{name}: too large to decode safely ({size}, limit {MAX_PIXELS:,})")


def _slim_png(file: BinaryIO) -> BinaryIO | None:
    """A PNG without what Pillow refuses the picture for, and pixels do not need.

    That are profiles, resolutions and the like, and texts (which may say how the picture is turned)
    that are damaged or long once unpacked. None: it has no such, or is no PNG.
    """
    file.seek(0)
    kept, data, at, room = [file.read(8)], file.read(), 0, 16 * MAX_TEXT
    if kept[0] != b"\x89PNG\r\n\x1a\n":
        return None
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        kind, body = data[at + 4 : at + 8], data[at + 8 : end - 4]
        whole = zlib.crc32(kind + body) == int.from_bytes(data[end - 4 : end], "big")
        keep = kind in (b"tRNS", b"acTL", b"fcTL", b"fdAT") or not kind[:1].islower()
        if kind in (b"tEXt", b"zTXt", b"iTXt", b"eXIf"):
            size = _text_size(kind, body)
            keep = whole and size <= min(MAX_TEXT, room)
            room -= size if keep else 0
        if keep:  # else a chunk that a reader may leave out
            kept.append(data[at:end])
        at = end
    slim = b"".join(kept)
    return io.BytesIO(slim) if len(slim) < 8 + len(data) else None


def _text_size(kind: bytes, body: bytes) -> int:
    """How many bytes a PNG's text has once unpacked; of a long one, some more than `MAX_TEXT`."""
    rest = body.partition(b"\0")[2]  # after its keyword: the method, the text
    packed = kind == b"zTXt"
    if kind == b"iTXt":  # packed or not, method, language, translated keyword, text
        packed, rest = rest[:1] == b"\1", b"\0" + rest[2:].split(b"\0", 2)[-1]
    if not packed:
        return len(rest)
    with suppress(zlib.error):
        return len(zlib.decompressobj().decompress(rest[1:], MAX_TEXT + 1))
    return 0


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        grey = np.asarray(image) >> 8  # (H, W), 65535 -> 255
        image = Image.fromarray(grey.astype(np.uint8))
    elif image.mode in ("I", "F"):
        # Neither says what is white: the smallest usual range that fits, else that of the values.
        grey = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0, neginf=0)  # (H, W)
        low, high = min(0.0, float(grey.min())), float(grey.max())
        usual = (255.0, 65535.0) if image.mode == "I" else (1.0,)
        high = next((white for white in usual if high <= white), high)
        grey = ((grey - low) * (255 / (high - low))).round().clip(0, 255)
        image = Image.fromarray(grey.astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def _heif_formats(head: bytes, name: str) -> tuple[str, ...] | None:
    """``("HEIF",)`` for a HEIC or HEIF file by its ftyp box (AVIF is a sister); else None."""
    if head[4:8] != b"ftyp":
        return None
    box = head[8 : int.from_bytes(head[:4], "big")]
    brands = {box[i : i + 4] for i in range(0, len(box), 4)}
    hevc = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
    if not brands & hevc and (not brands & {b"mif1", b"msf1"} or brands & {b"avif", b"avis"}):
        return None
    try:
        import pillow_heif
    except ImportError as error:
        todo = "pip install 'tinyvl[heif]' reads it"
        raise MediaError(f"{name}: a HEIC picture needs an extra package; {todo}") from error
    pillow_heif.register_heif_opener()
    return ("HEIF",)


def _what_else(head: bytes) -> str:
    """Say from its first bytes what a file is that is not a picture."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if b"%pdf-" in text[:1024]:
        return "is a PDF document; turn its pages into pictures first (pdftoppm -png)"
    if text.startswith((b"<!doctype html", b"<html")):
        return "is a web page, not a picture; download the picture itself"
    if text.startswith(b"<") and b"<svg" in text:
        return "is an SVG drawing; render it to PNG first (rsvg-convert, or a browser)"
    formats = ", ".join(_FORMATS)
    formats += ", HEIC" if find_spec("pillow_heif") else ""
    return f"is not a picture in a format tinyvl reads ({formats}), or its header is damaged"
