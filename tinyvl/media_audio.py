"""Sounds become what an audio encoder reads: decoded, 16 kHz mono, a spectrogram, perhaps masked.

The spectrograms are those of transformers' own feature extractors: AST's has 128 mel bins by 1,024
frames of 10 ms, Whisper's 80 by 3,000. Of a longer sound the beginning is read, and only that is
decoded; a shorter one is padded, and masking (SpecAugment, https://arxiv.org/abs/1904.08779)
comes after that, as in the authors' code.
"""

from __future__ import annotations

import os
import random
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyvl.media import MediaError
from tinyvl.media_av import why

if TYPE_CHECKING:
    from torch import Tensor

RATE = 16_000  # samples a second
MASKS = (24, 96)  # mel bins and frames: the widest masks of eP-ALM's appendix A


def load_sound(path: str | os.PathLike[str], seconds: float) -> np.ndarray:
    """The first seconds of a sound, or of a video's sound track: float32 (N,), 16 kHz mono.

    Raises:
        MediaError: no such file, no sound in it, or none that can be decoded. Of a sound that is
            cut short or damaged on the way, what can be decoded is used.
    """
    import av

    name, wanted = os.fspath(path), round(seconds * RATE)
    parts, have = [], 0
    try:
        with av.open(name) as container:
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
            except (av.FFmpegError, ValueError) as error:
                if not have:
                    raise MediaError(f"{name}: {why(error, name)}") from error
    except MediaError:
        raise
    except (av.FFmpegError, OSError, ValueError) as error:
        raise MediaError(f"{name}: {why(error, name)}") from error
    sound = np.concatenate([*parts, np.empty(0, np.float32)])[:wanted]
    if not sound.size:
        raise MediaError(f"{name}: the sound in it has no samples")
    return sound


class Sounds:
    """A file to what an audio encoder takes of it: float32 (1, frames, mel bins). Picklable.

    With ``key`` two masks are laid over the padded spectrogram, one of mel bins and one of frames:
    a function of the key, the sound and nothing else. What is masked looks like silence.
    """

    def __init__(
        self, extractor: Any, seconds: float, *, key: str | None = None, masks: tuple = MASKS
    ):
        self.extractor, self.seconds, self.key, self.masks = extractor, seconds, key, masks

    def load(self, path: str, target: int | None) -> np.ndarray:
        """What `media.decode_images` calls in the place of `load_image`."""
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
    """What padding looks like: AST's is a zero of before it normalises, Whisper's the least."""
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
