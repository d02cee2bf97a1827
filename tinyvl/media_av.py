"""Videos: frames for a video encoder.

Of a video, one frame from each equal part of its length is read. Frames are sought, not streamed:
of an hour of video, only what lies between a key frame and a chosen frame is decoded, and only
chosen frames are kept. A moment gives the frame that a player shows then, whatever the frame rate;
a video of fewer frames repeats some.

What is damaged is read past: only a file of which nothing decodes is refused.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from tinyvl.media import (
    MAX_PIXELS,
    MediaError,
    is_animated,
    kind_of,
    load_animation,
    load_image,
    why_unopened,
)
from tinyvl.media_augment import Varied, content

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.stream import Stream
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream
    from torch import Tensor

NEAR = 2.0  # seconds: a frame further ahead is sought, a nearer one decoded up to
ERRORS = 1000  # failed reads in a row that end a file


# Of FFmpeg's containers those of the suffixes that are read: others, such as playlists, open
# further files and addresses, and image2 takes a name like a%d.png for many files.
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegvideo,mpegts,asf,flv,live_flv,ogg,wav,w64,"
    "flac,mp3,aac,aiff,caf,amr,m4v,h264,hevc,av1,obu,ivf,gif,apng,webp,webp_anim,"
    "png_pipe,jpeg_pipe,webp_pipe,bmp_pipe"
)


def container_of(name: str) -> InputContainer:
    """An open file, never an address: a file may be called 12:30.mp4, or http:a.mp4."""
    import av

    safe = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
    return av.open(f"file:{name}", options=safe)


@contextmanager
def opened(name: str, kind: str) -> Iterator[InputContainer]:
    """A video's or sound's container. Raises MediaError: not to be opened, or PyAV fails inside."""
    try:
        with container_of(name) as container:
            yield container
    except MediaError:
        raise
    except Exception as error:  # a decoder may raise anything at all on a damaged file
        said = getattr(error, "strerror", None) or str(error)
        reason = f"damaged, or in no format that can be read ({said})"
        if os.path.isfile(name) and not os.path.getsize(name):
            reason = "the file is empty"
        raise MediaError(f"{name}: {why_unopened(error, kind) or reason}") from error


# ------------------------------------------------------------------------------ videos


def load_frames(
    path: str | os.PathLike[str], count: int, *, moment: Callable[[], float] | None = None,
    target: int | None = None,
) -> list[Image.Image]:  # fmt: skip
    """Upright RGB frames of a video, ``count`` of them, in order.

    ``moment`` is called for each part of the video: where in it the frame is, from 0 to 1; else in
    the middle. ``target`` is the shortest side, in pixels, that will be needed; much larger frames
    are reduced at once, never below twice that.

    Frames of pixels that are not square are as wide as a player shows them. Of an animated picture
    (GIF, PNG, WebP) frames are read alike.

    Raises MediaError: no such file, not a video (a sound, perhaps with a cover), nothing in it that
    can be decoded, or frames of more than `media.MAX_PIXELS`. Of a video that is cut short or
    damaged on the way, what can be decoded is used.
    """
    import av

    def times(start: float, length: float) -> list[float]:
        places = [0.5 if moment is None else moment() for _ in range(count)]
        return [start + length * (i + place) / count for i, place in enumerate(places)]

    name, cover = os.fspath(path), av.stream.Disposition.attached_pic
    if kind_of(name) == "image" and is_animated(name):
        return [fitted(frame, target) for frame in load_animation(name, partial(times, 0.0))]
    with opened(name, "video") as container:
        videos = [s for s in container.streams.video if s.codec_context]  # else of no known codec
        videos = [s for s in videos if not s.disposition & cover]
        if not videos:
            sound = container.streams.audio
            raise MediaError(f"{name}: {'has sound, but no video' if sound else 'is no video'}")
        stream, frames = videos[0], []
        refuse_bomb(name, stream.codec_context)
        for frame in shown(container, stream, times(*span(name, container, stream))):
            refuse_bomb(name, frame)  # their size may change on the way
            frames.append(picture(frame, target, stream.sample_aspect_ratio))
    if not frames:
        raise MediaError(f"{name}: no frame of this video can be decoded")
    return frames


def moves(path: str) -> bool:
    """Whether a file that is named like a picture is a video, as web sites serve GIFs."""
    try:
        with open(path, "rb") as file:
            head = file.read(12)
    except OSError:
        return False
    mp4 = head[8:11] in (b"iso", b"mp4", b"avc", b"M4V", b"das", b"qt ")
    return head.startswith(b"\x1aE\xdf\xa3") or (head[4:8] == b"ftyp" and mp4)


def refuse_bomb(name: str, seen: Any) -> None:
    if seen.width * seen.height > MAX_PIXELS:
        raise MediaError(f"{name}: too large to decode safely (over {MAX_PIXELS:,} pixels)")


def shown(
    container: InputContainer, stream: VideoStream, times: list[float]
) -> Iterator[VideoFrame]:
    """The frame that a player shows at each of these times (seconds, ascending)."""
    follow, near = following(container, stream), NEAR
    here: VideoFrame | None = None  # shown at the time we are at
    ahead = next(follow, None)  # the one after it
    timed = ahead is not None and ahead.time is not None
    rate, number = float(stream.average_rate or 25), 0

    def time_of(frame: VideoFrame) -> float:
        return frame.time if timed and frame.time is not None else number / rate

    for time in times:
        if timed and ahead is not None and time - time_of(ahead) > near:
            before = time_of(ahead)
            follow, found = sought(container, stream, time)
            if found is None or found.time is None:  # past the end: up to it from the start
                start, near = float((stream.start_time or 0) * stream.time_base), float("inf")
                follow, found = sought(container, stream, start)
            elif found.time <= before:  # its key frames lie far apart: decode rather
                near *= 4
            here, ahead = (None, found) if found else (ahead, None)
        while ahead is not None and (here is None or time_of(ahead) <= time):
            here, ahead, number = ahead, next(follow, None), number + 1
        if here is None:
            return
        yield here


def sought(
    container: InputContainer, stream: VideoStream, time: float
) -> tuple[Iterator[VideoFrame], VideoFrame | None]:
    """The frames from the key frame before a time on, and the first of them, taken."""
    import av

    try:
        container.seek(int(time / stream.time_base), stream=stream)
    except (av.FFmpegError, ValueError):  # a file that cannot be sought in
        return iter(()), None
    follow = following(container, stream)
    return follow, next(follow, None)


def following(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    """The frames from here on, without those that are damaged."""
    for packet in packets(container, stream):
        yield from decoded(packet) or ()


def packets(container: InputContainer, stream: Stream) -> Iterator[Packet]:
    """The packets from here on, past what cannot be read, and an empty one at the end."""
    import av

    failed = 0
    while failed < ERRORS:
        try:
            for packet in container.demux(stream):
                failed = 0
                yield packet
            return
        except (av.FFmpegError, ValueError):
            failed += 1


def decoded(packet: Packet) -> list[Any] | None:
    """A packet's frames; None: it is damaged."""
    import av

    try:
        return packet.decode()
    except (av.FFmpegError, ValueError):
        return None


def picture(frame: VideoFrame, target: int | None, aspect: Any = None) -> Image.Image:
    """A frame as an upright picture, reduced if it is much larger than is needed.

    ``aspect``: the width of a pixel divided by its height.
    """
    image = fitted(frame.to_image(), target, float(aspect or 1))
    turn = round(frame.rotation)  # degrees counterclockwise, from the file's display matrix
    return image if turn % 90 else image.rotate(turn, expand=True)


def fitted(image: Image.Image, target: int | None, aspect: float = 1.0) -> Image.Image:
    """A picture with square pixels, and with fewer if it is much larger than is needed."""
    if not 1 / 8 < aspect < 8:  # damaged, too
        aspect = 1.0
    width, height = max(1, round(image.width * aspect)), image.height
    if target and (factor := min(width, height) // (2 * target)) > 1:
        image = image.reduce(factor)
        width, height = round(image.width * aspect), image.height
    square = (max(1, width), height)
    return image if square == image.size else image.resize(square, Image.Resampling.BICUBIC)


def span(name: str, container: InputContainer, stream: VideoStream) -> tuple[float, float]:
    """When a video starts and how long it is, in seconds.

    A container says this of its longest stream, and may lie of each. So what it says is compared
    with its index or, where that differs or there is none, with the times of the last packets.
    """
    import av

    start = float((stream.start_time or 0) * stream.time_base)
    said, index = float((stream.duration or 0) * stream.time_base), stream.index_entries
    if said and len(index):
        last = float(index[len(index) - 1].timestamp * stream.time_base)
        if 0 <= start + said - last <= 1:  # B-frames are stored before their time
            return start, said
    said = said or (container.duration or 0) / av.time_base
    found = last_time(name, stream, start + said) or last_time(name, stream, None) or start
    near = max(0.1, 2 / float(stream.average_rate or 25))
    return start, said if abs(start + said - found) <= near else found - start


def last_time(name: str, stream: VideoStream, late: float | None) -> float | None:
    """When the last packet of a stream ends; they are read from ``late`` on, or None: all.

    Packets without times last as long as the stream's rate says. None: there is no packet.
    """
    import av

    end, number = None, 0
    with container_of(name) as again:
        own = again.streams[stream.index]
        try:
            if late is not None:
                again.seek(int(late / own.time_base), stream=own)
        except (av.FFmpegError, ValueError):  # a file that cannot be sought in
            return None
        for packet in packets(again, own):
            time = packet.dts if packet.pts is None else packet.pts
            if time is not None:
                last = float((time + (packet.duration or 0)) * packet.time_base)
                end = last if end is None else max(end, last)
            number += bool(packet.size)
    return number / float(stream.average_rate or 25) if end is None and late is None else end


class Clips:
    """A video file to the frames that an encoder reads: uint8 (T, 3, H, W). Picklable.

    A picture is a video of one frame, an animated one of several; with ``still`` any is just a
    picture (3, H, W). Frames are taken from the middle of their parts, or with ``key`` at random
    places, which depend on the key and on the file's name and size. A varied transform varies all
    frames alike.
    """

    def __init__(
        self, transform: Callable[[Image.Image], Tensor], frames: int, *, still: bool = False,
        key: str | None = None,
    ):  # fmt: skip
        self.transform, self.frames, self.still, self.key = transform, frames, still, key

    def load(self, path: str, target: int | None) -> Image.Image | list[Image.Image]:
        kind = kind_of(path)
        if kind == "image" and (moves(path) or (not self.still and is_animated(path))):
            kind = "video"
        if kind == "image" or (self.still and kind != "video"):
            return load_image(path, target)
        moment = None
        if self.key is not None:
            size = os.path.getsize(path) if os.path.exists(path) else 0
            moment = random.Random(f"{self.key}/{os.path.basename(path)}/{size}").random
        return load_frames(path, self.frames, moment=moment, target=target)

    def __call__(self, seen: Image.Image | list[Image.Image]) -> Tensor:
        frames, transform = [seen] if isinstance(seen, Image.Image) else seen, self.transform
        if isinstance(transform, Varied):
            transform = partial(transform.vary, content=content(frames[0]))
        views = [transform(frame) for frame in frames]
        if self.still and isinstance(seen, Image.Image):
            return views[0]
        # numpy's stack: this may run in a thread, where torch's would start OpenMP threads of its
        # own; with more of these than cores, all that follows in the main thread is a fifth slower.
        import torch

        return torch.from_numpy(np.stack([view.numpy() for view in views]))
