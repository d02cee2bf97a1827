"""Videos become a few frames, one from each equal part of their length.

Frames are sought, not streamed: of an hour of video only what lies between a key frame and a
chosen frame is decoded, and only chosen frames are kept. A moment shows the frame that a player
shows then, so that a variable rate needs no care; a video of fewer frames repeats some.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from PIL import Image

from tinyvl.media import MAX_PIXELS, MediaError, is_image, load_image
from tinyvl.media_augment import content

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream
    from torch import Tensor

NEAR = 2.0  # seconds: a frame further ahead is sought, a nearer one decoded up to
UPRIGHT = {  # degrees against the clock that a display matrix asks for
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    -180: Image.Transpose.ROTATE_180,
    -90: Image.Transpose.ROTATE_270,
}


class Clips:
    """A file to what an encoder takes of it: frames (T, 3, H, W) of a video. Picklable.

    A picture is a video of one frame, or with ``still`` just a picture (3, H, W). The frames are
    in the middle of their parts, or with ``key`` at random places, which depend on the key and on
    the file's name and size. Whatever is varied is varied alike in all frames.
    """

    def __init__(
        self,
        transform: Callable[[Image.Image], Tensor],
        frames: int,
        *,
        still: bool = False,
        key: str | None = None,
    ):
        self.transform, self.frames, self.still, self.key = transform, frames, still, key

    def load(self, path: str, target: int | None) -> Image.Image | list[Image.Image]:
        """What `media.decode_images` calls in the place of `load_image`."""
        if is_image(path) or (self.still and not is_video(path)):
            return load_image(path, target)
        moment = None
        if self.key is not None:
            size = os.path.getsize(path) if os.path.exists(path) else 0
            moment = random.Random(f"{self.key}/{os.path.basename(path)}/{size}").random
        return load_frames(path, self.frames, moment=moment, target=target)

    def __call__(self, seen: Image.Image | list[Image.Image]) -> Tensor:
        import numpy as np
        import torch

        frames = [seen] if isinstance(seen, Image.Image) else seen
        vary = getattr(self.transform, "vary", None)
        if vary is None:
            views = [self.transform(frame) for frame in frames]
        else:
            first = content(frames[0])
            views = [vary(frame, first) for frame in frames]
        if self.still and isinstance(seen, Image.Image):
            return views[0]
        # numpy's stack: this may run in a thread, where torch's would start OpenMP threads of its
        # own; with more of these than cores, all that follows in the main thread is a fifth slower.
        return torch.from_numpy(np.stack([view.numpy() for view in views]))


def is_video(path: str | os.PathLike[str]) -> bool:
    """Whether the name ends like a video's."""
    from tinyvl.records import SUFFIXES

    return os.path.splitext(path)[1].lower() in SUFFIXES["video"]


def load_frames(
    path: str | os.PathLike[str],
    count: int,
    *,
    moment: Callable[[], float] | None = None,
    target: int | None = None,
) -> list[Image.Image]:
    """Upright RGB frames of a video, ``count`` of them, in order.

    Args:
        moment: where in its part each frame is, from 0 to 1; called once a part. None: the middle.
        target: the shortest side, in pixels, that will be needed; much larger frames are reduced
            at once, never below twice that.

    Raises:
        MediaError: no such file, not a video (a sound, perhaps with a cover), nothing in it that
            can be decoded, or frames of more than ``media.MAX_PIXELS``. Of a video that is cut
            short or damaged on the way, what can be decoded is used.
    """
    import av

    name = os.fspath(path)
    try:
        with av.open(name) as container:
            videos = [s for s in container.streams.video if not is_cover(s)]
            if not videos:
                sound = container.streams.audio
                raise MediaError(f"{name}: {'has sound, but no video' if sound else 'is no video'}")
            stream = videos[0]
            if stream.codec_context.width * stream.codec_context.height > MAX_PIXELS:
                raise MediaError(f"{name}: too large to decode safely (over {MAX_PIXELS:,} pixels)")
            start, length = span(name, container, stream)
            places = [0.5 if moment is None else moment() for _ in range(count)]
            times = [start + length * (i + place) / count for i, place in enumerate(places)]
            frames = [picture(frame, target) for frame in shown(container, stream, times)]
    except MediaError:
        raise
    except (av.FFmpegError, OSError, ValueError) as error:
        raise MediaError(f"{name}: {why(error, name)}") from error
    if not frames:
        raise MediaError(f"{name}: no frame of this video can be decoded")
    return frames


def shown(
    container: InputContainer, stream: VideoStream, times: list[float]
) -> Iterator[VideoFrame]:
    """The frame that is shown at each of these times, in ascending order; none if there is none."""
    import av

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
            try:
                container.seek(int(time / stream.time_base), stream=stream)
                follow = following(container, stream)
                found = next(follow, None)
            except (av.FFmpegError, ValueError):  # a file that cannot be sought in
                found = None
            if found is None or found.time is None:  # past the end: up to it from the start
                container.seek(int(stream.start_time or 0), stream=stream)
                follow, near = following(container, stream), float("inf")
                found = next(follow, None)
            elif found.time <= before:  # its key frames lie far apart: decode rather
                near *= 4
            here, ahead = None, found
        while ahead is not None and (here is None or time_of(ahead) <= time):
            here, ahead, number = ahead, next(follow, None), number + 1
        if here is None:
            return
        yield here


def following(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    """The frames from here on; the end, or damage that cannot be passed, ends it."""
    import av

    try:
        yield from container.decode(stream)
    except (av.FFmpegError, ValueError):
        return


def picture(frame: VideoFrame, target: int | None) -> Image.Image:
    """A frame as an upright picture, reduced if it is much larger than is needed."""
    image = frame.to_image()
    if target and min(image.size) >= 4 * target:
        image = image.reduce(min(image.size) // (2 * target))
    upright = UPRIGHT.get(round(frame.rotation))
    return image if upright is None else image.transpose(upright)


def is_cover(stream: VideoStream) -> bool:
    """Whether this is the picture on the cover of a sound."""
    import av

    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def span(name: str, container: InputContainer, stream: VideoStream) -> tuple[float, float]:
    """When a video starts and how long it is, in seconds.

    Where the file does not say how long, its packets do: they are read, not decoded.
    """
    import av

    start = float((stream.start_time or 0) * stream.time_base)
    if stream.duration:
        return start, float(stream.duration * stream.time_base)
    if container.duration:
        return start, container.duration / av.time_base
    end = start
    with av.open(name) as again:
        for packet in again.demux(again.streams[stream.index]):
            if packet.pts is not None:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
    return start, end - start


def why(error: Exception, name: str) -> str:
    """A clause for what PyAV or the system raised."""
    match error:
        case FileNotFoundError():
            return "there is no such file"
        case IsADirectoryError():
            return "is a folder"
        case PermissionError():
            return "permission denied"
    if os.path.isfile(name) and not os.path.getsize(name):
        return "the file is empty"
    reason = getattr(error, "strerror", None) or str(error)
    return f"damaged, or in no format that can be read ({reason})"
