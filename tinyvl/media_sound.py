"""Sounds: spectrograms for an audio encoder.

Of a sound, the beginning is decoded to 16 kHz mono, past what is damaged. The spectrograms are
those of transformers' feature extractors: AST's has 128 mel bins by 1,024 frames of 10 ms,
Whisper's 80 by 3,000. A shorter sound is padded; masks (SpecAugment,
https://arxiv.org/abs/1904.08779) come after that, as in eP-ALM's code.
"""

from __future__ import annotations

import os
import random
import sys
import zlib
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyvl.media import MediaError
from tinyvl.media_av import decoded, opened, packets

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.stream import Stream
    from torch import Tensor

RATE = 16_000  # samples a second
MISSING = 0.25  # seconds of a sound: less is not said
LOUDEST = 1000.0  # a sample, of which full scale is 1: louder ones are no sound
MASKS = (24, 96)  # mel bins and frames: the widest masks of eP-ALM's appendix A


def load_sound(path: str | os.PathLike[str], seconds: float) -> np.ndarray:
    """The first seconds of a sound, or of a video's sound track: float32 (N,), 16 kHz mono.

    Raises MediaError: no such file, no sound in it, none that can be decoded, or samples that are
    no numbers or absurdly loud. Of a sound that is cut short or damaged on the way, what can be
    decoded is used; standard error says how much is missing.
    """
    name, wanted = os.fspath(path), round(seconds * RATE)
    with opened(name, "sound") as container:
        if not container.streams.audio:
            raise MediaError(f"{name}: has no sound in it")
        with np.errstate(all="ignore"):
            sound, missing = heard(container, container.streams.audio[0], wanted)
    sound = sound[:wanted]
    if not sound.size:
        raise MediaError(f"{name}: the sound in it has no samples that can be decoded")
    peak = float(np.abs(sound).max())
    if not peak <= LOUDEST:  # nor is NaN
        what = f"as large as {peak:.3g}, where 1 is the loudest"
        what = "that are no numbers" if np.isnan(peak) else what
        raise MediaError(f"{name}: this sound has samples {what}; make the file anew")
    if missing > MISSING:
        why = f"about {missing:.1f} s of this sound are damaged or missing; the rest is used"
        print(f"tinyvl: {name}: {why}", file=sys.stderr)
    return sound


def heard(container: InputContainer, stream: Stream, wanted: int) -> tuple[np.ndarray, float]:
    """A sound up to about ``wanted`` samples, float32 (n,), and the seconds that are missing there.

    Joined files may change their rate and channels on the way.
    """
    import av

    parts, have, seconds = [np.empty(0, np.float32)], 0, 0.0
    good, bad, first, last = 0, 0, None, 0  # bytes; times, in the stream's unit
    resampler = av.AudioResampler(format="fltp", rate=RATE)

    def keep(frame: Any) -> None:
        nonlocal have
        for part in resampler.resample(frame):
            # Mono is the mean of the channels; FFmpeg's own would be up to 1.4 times as loud.
            parts.append(part.to_ndarray().mean(0))
            have += parts[-1].size

    for packet in packets(container, stream):
        frames, size = decoded(packet), packet.size
        if frames is None:
            bad += size
            continue
        last = packet.pts or last
        for frame in frames:
            first, good = frame.pts if first is None else first, good + size
            seconds, size = seconds + frame.samples / frame.sample_rate, 0
            try:
                keep(frame)
            except (av.FFmpegError, ValueError):  # it has another rate, or other channels
                with suppress(av.FFmpegError, ValueError):
                    keep(None)
                    resampler = av.AudioResampler(format="fltp", rate=RATE)
                    keep(frame)
        if have >= wanted:
            break
    else:
        with suppress(av.FFmpegError, ValueError):
            keep(None)
    late = float((last - (first or 0)) * (stream.time_base or 0)) - seconds
    return np.concatenate(parts), max(late, bad / max(1, good) * seconds)


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
