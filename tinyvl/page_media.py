"""Files as a page holds them: small pictures, frames of videos, sounds and heat maps, as data."""

import base64
import io
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from tinyvl import UserError, media

SIZES = ((256, 65), (256, 40), (192, 30), (128, 20))  # of a thumbnail: longest side, quality
BYTES = 9000  # of a thumbnail at most: a hundred of them and their texts are under 1.5 MB
FRAMES = 4  # of a video
SECONDS = 10  # of a sound


@dataclass
class Shown:
    """What the page has of a file: the data of pictures, or of a sound, or why there is nothing."""

    kind: str = "image"
    data: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    error: str = ""


def look(path: str) -> Shown:
    """A file as the page shows it."""
    kind = media.kind_of(path) or "image"
    try:
        if kind == "audio":
            return Shown(kind, [sound(path)])
        if kind == "video":
            from tinyvl.media_av import load_frames

            pictures = load_frames(path, FRAMES, target=SIZES[0][0] // 2)
        else:
            pictures = [media.load_image(path, SIZES[0][0] // 2)]
    except UserError as error:
        return Shown(kind, error=str(error).removeprefix(f"{path}: "))
    data = [thumbnail(picture, BYTES // len(pictures)) for picture in pictures]
    return Shown(kind, data, [picture.size for picture in pictures])


def thumbnail(picture: Image.Image, room: int) -> str:
    """The data of a small picture, in about ``room`` bytes; ``picture`` becomes that small."""
    for side, quality in SIZES:
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
        picture.save(stream := io.BytesIO(), "WEBP", quality=quality)
        if stream.tell() <= room:
            break
    return uri("image/webp", stream.getvalue())


def sound(path: str) -> str:
    """The data of a sound's first seconds, as MP3."""
    import av

    from tinyvl.media_sound import RATE, load_sound

    heard = (load_sound(path, SECONDS).clip(-1, 1) * 32767).astype(np.int16)[None]
    with av.open(stream := io.BytesIO(), "w", format="mp3") as out:
        track = out.add_stream("mp3", rate=RATE, layout="mono")
        track.bit_rate = 32_000
        frame = av.AudioFrame.from_ndarray(heard, format="s16", layout="mono")
        frame.sample_rate = RATE
        out.mux(track.encode(frame) + track.encode(None))
    return uri("audio/mpeg", stream.getvalue())


def uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def overlay(cells: list[list[float]], size: tuple[int, int]) -> Image.Image:
    """A map (H, W) to lay over a picture of this size: red where high, dark up to its median.

    The dark shows it on red things, too.
    """
    values = np.asarray(cells, np.float32)
    low, high = np.median(values), values.max()
    share = ((values - low) / max(high - low, 1e-9)).clip(0, 1)
    wide = np.asarray(Image.fromarray(share).resize(size, Image.Resampling.BICUBIC)).clip(0, 1)
    red, dark = 120 * wide, 140 * (1 - wide)  # the opacity of each
    colours = np.zeros((*wide.shape, 4), np.float32)
    colours[..., :2] = (red / (red + dark))[..., None] * (255, 50)
    colours[..., 3] = red + dark
    return Image.fromarray(colours.round().astype(np.uint8))


def heat(cells: list[list[float]]) -> str:
    """The data of a map's `overlay`, small."""
    wide = overlay(cells, (8 * len(cells[0]), 8 * len(cells)))
    wide.save(stream := io.BytesIO(), "WEBP", quality=40)
    return uri("image/webp", stream.getvalue())
