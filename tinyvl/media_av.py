"""Videos and sounds: frames for a video encoder, spectrograms for an audio encoder.

Of a video, one frame from each equal part of its length is read. Frames are sought, not streamed:
of an hour of video, only what lies between a key frame and a chosen frame is decoded, and only
chosen frames are kept. A moment gives the frame that a player shows then, whatever the frame rate;
a video of fewer frames repeats some.

Of a sound, the beginning is decoded to 16 kHz mono. The spectrograms are those of transformers'
feature extractors: AST's has 128 mel bins by 1,024 frames of 10 ms, Whisper's 80 by 3,000. A
shorter sound is padded; masks (SpecAugment, https://arxiv.org/abs/1904.08779) come after that, as
in eP-ALM's code.
"""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from tinyvl.media import MAX_PIXELS, MediaError, kind_of, load_image, why_unopened
from tinyvl.media_augment import Varied, content

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream
    from torch import Tensor

NEAR = 2.0  # seconds: a frame further ahead is sought, a nearer one decoded up to
RATE = 16_000  # samples a second
MASKS = (24, 96)  # mel bins and frames: the widest masks of eP-ALM's appendix A


@contextmanager
def opened(name: str, kind: str) -> Iterator[InputContainer]:
    """A video's or sound's container. Raises MediaError: not to be opened, or PyAV fails inside."""
    import av

    try:
        with av.open(name) as container:
            yield container
    except MediaError:
        raise
    except (av.FFmpegError, OSError, ValueError) as error:
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

    Raises MediaError: no such file, not a video (a sound, perhaps with a cover), nothing in it that
    can be decoded, or frames of more than `media.MAX_PIXELS`. Of a video that is cut short or
    damaged on the way, what can be decoded is used.
    """
    import av

    name, cover = os.fspath(path), av.stream.Disposition.attached_pic
    with opened(name, "video") as container:
        videos = [s for s in container.streams.video if not s.disposition & cover]
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
    if not frames:
        raise MediaError(f"{name}: no frame of this video can be decoded")
    return frames


def shown(
    container: InputContainer, stream: VideoStream, times: list[float]
) -> Iterator[VideoFrame]:
    """The frame that a player shows at each of these times (seconds, ascending)."""
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
    """The frames from here on, until the end or until damage."""
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
    turn = round(frame.rotation)  # degrees counterclockwise, from the file's display matrix
    return image if turn % 90 else image.rotate(turn, expand=True)


def span(name: str, container: InputContainer, stream: VideoStream) -> tuple[float, float]:
    """When a video starts and how long it is, in seconds.

    Where the file does not say how long it is, its packets are read, not decoded.
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


# ------------------------------------------------------------------------------ sounds


def load_sound(path: str | os.PathLike[str], seconds: float) -> np.ndarray:
    """The first seconds of a sound, or of a video's sound track: float32 (N,), 16 kHz mono.

    Raises MediaError: no such file, no sound in it, or none that can be decoded. Of a sound that is
    cut short or damaged on the way, what can be decoded is used.
    """
    import av

    name, wanted = os.fspath(path), round(seconds * RATE)
    parts, have = [np.empty(0, np.float32)], 0
    with opened(name, "sound") as container:
        if not container.streams.audio:
            raise MediaError(f"{name}: has no sound in it")
        # Mono is the mean of the channels; FFmpeg's own would be up to 1.4 times as loud.
        resampler = av.AudioResampler(format="fltp", rate=RATE)
        try:
            for frame in container.decode(container.streams.audio[0]):
                for part in resampler.resample(frame):
                    parts.append(part.to_ndarray().mean(0))
                    have += parts[-1].size
                if have >= wanted:
                    break
            else:
                parts += [part.to_ndarray().mean(0) for part in resampler.resample(None)]
        except (av.FFmpegError, ValueError):
            if not have:
                raise
    sound = np.concatenate(parts)[:wanted]
    if not sound.size:
        raise MediaError(f"{name}: the sound in it has no samples")
    return sound


class Clips:
    """A video file to the frames that an encoder reads: uint8 (T, 3, H, W). Picklable.

    A picture is a video of one frame, or with ``still`` just a picture (3, H, W). Frames are
    taken from the middle of their parts, or with ``key`` at random places, which depend on the key
    and on the file's name and size. A varied transform varies all frames alike.
    """

    def __init__(
        self, transform: Callable[[Image.Image], Tensor], frames: int, *, still: bool = False,
        key: str | None = None,
    ):  # fmt: skip
        self.transform, self.frames, self.still, self.key = transform, frames, still, key

    def load(self, path: str, target: int | None) -> Image.Image | list[Image.Image]:
        kind = kind_of(path)
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


class Sounds:
    """A sound file to an audio encoder's input: float32 (1, frames, mel bins). Picklable.

    With ``key`` a band of mel bins and a band of frames of the padded spectrogram are silenced.
    The bands depend only on the key and the sound.
    """

    def __init__(
        self, extractor: Any, seconds: float, *, key: str | None = None, masks: tuple = MASKS
    ):
        self.extractor, self.seconds, self.key, self.masks = extractor, seconds, key, masks

    def load(self, path: str, target: int | None) -> np.ndarray:
        return load_sound(path, self.seconds)

    def __call__(self, sound: np.ndarray) -> Tensor:
        import torch

        seen = spectrogram(self.extractor, sound)
        if self.key is not None:
            rng = random.Random(f"{self.key}/{zlib.crc32(sound.tobytes())}")
            seen = masked(seen, rng, self.masks, silence(self.extractor, seen))
        return torch.from_numpy(seen)[None]


def spectrogram(extractor: Any, sound: np.ndarray) -> np.ndarray:
    """(N,) -> float32 (frames, mel bins), padded or cut to what the encoder reads."""
    if hasattr(extractor, "n_fft"):  # Whisper's: (mel bins, frames)
        found = extractor(sound, sampling_rate=RATE, return_tensors="np")["input_features"][0].T
    else:
        if sound.size < 400:  # AST's is of whole windows of 25 ms
            sound = np.pad(sound, (0, 400 - sound.size))
        found = extractor(sound, sampling_rate=RATE, return_tensors="np")["input_values"][0]
    return np.ascontiguousarray(found, dtype=np.float32)


def silence(extractor: Any, seen: np.ndarray) -> float:
    """The value of padding: AST's is a normalised zero, Whisper's the spectrogram's minimum."""
    if hasattr(extractor, "n_fft"):
        return float(seen.min())
    return extractor.normalize(0.0) if extractor.do_normalize else 0.0


def masked(seen: np.ndarray, rng: random.Random, masks: tuple, value: float) -> np.ndarray:
    """A spectrogram (frames, mel bins) with a band of each axis at ``value``.

    The widths are drawn from 0 up to ``masks`` (mel bins, frames), the places from those that fit.
    """
    seen = seen.copy()
    for axis, widest in ((1, masks[0]), (0, masks[1])):
        width = round(rng.uniform(0, min(widest, seen.shape[axis])))
        first = rng.randint(0, seen.shape[axis] - width)
        band = slice(first, first + width)
        seen[(slice(None), band) if axis else band] = value
    return seen
