"""Files as a page holds them: small pictures, frames of videos, sounds and heat maps, as data."""

import base64
import io
from dataclasses import dataclass, field
from statistics import median

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
    import numpy as np

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


def heat(cells: list[list[float]]) -> str:
    """The data of a heat map (H, W): red where it is high, clear up to its median."""
    flat = [float(value) for row in cells for value in row]
    low, high = median(flat), max(flat)
    picture = Image.new("RGBA", (len(cells[0]), len(cells)))
    shares = (max(0.0, value - low) / (high - low or 1.0) for value in flat)
    picture.putdata([(255, 40, 0, round(200 * share)) for share in shares])
    wide = picture.resize((8 * picture.width, 8 * picture.height), Image.Resampling.BICUBIC)
    wide.save(stream := io.BytesIO(), "WEBP", quality=40)
    return uri("image/webp", stream.getvalue())
