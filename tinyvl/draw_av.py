"""The drawn sets of videos and sounds: shapes that move, and tones.

A video is a shape of a colour that moves left, right, up or down, or stays, for a second: only the
order of its frames tells left from right ("a red circle moves left"). A sound is a tone or a buzz
of a pitch that holds, rises or falls, up to three times in a second ("a high buzz falls twice").
Captions and questions are functions of what is drawn, and everything is a pure function of the
seed. Held-out files are new renders of what training shows.
"""

from __future__ import annotations

import wave
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import product, starmap
from pathlib import Path

import numpy as np

from tinyvl.draw import BACKGROUNDS, COLOURS, SHAPES, SIDE, coverage, draw_images, write_set
from tinyvl.files import cache_dir, cached

FRAMES, FPS = 8, 8
MOVES = {  # where a shape is in the first frame and in the last, in pixels from the middle
    "left": ((18, 0), (-18, 0)), "right": ((-18, 0), (18, 0)), "up": ((0, 18), (0, -18)),
    "down": ((0, -18), (0, 18)), "nowhere": ((0, 0), (0, 0)),
}  # fmt: skip
RATE = 16_000  # samples of a sound, which lasts a second
KINDS = ("tone", "buzz")
PITCHES = {"low": 300.0, "middle": 800.0, "high": 2100.0}  # Hz
BENDS = {"holds": 1.0, "rises": 1.5, "falls": 1 / 1.5}  # the last pitch over the first
TIMES = ("once", "twice", "thrice")


@dataclass(frozen=True)
class Motion:
    """What a video shows."""

    shape: str
    colour: str
    move: str

    def caption(self, lang: str = "en") -> str:
        does = "stays still" if self.move == "nowhere" else f"moves {self.move}"
        return f"a {self.colour} {self.shape} {does}"

    fields = asdict

    def questions(self) -> list[tuple[str, str]]:
        return [
            (f"what colour is the {self.shape}?", self.colour),
            (f"what shape is {self.colour}?", self.shape),
            (f"where does the {self.shape} move?", self.move),
        ]


@dataclass(frozen=True)
class Signal:
    """What a sound is."""

    kind: str
    pitch: str
    bend: str
    times: str

    def caption(self, lang: str = "en") -> str:
        return f"a {self.pitch} {self.kind} {self.bend} {self.times}"

    fields = asdict

    def questions(self) -> list[tuple[str, str]]:
        return [
            ("what is this sound?", self.kind),
            (f"how high is the {self.kind}?", self.pitch),
            (f"what does the {self.kind} do?", self.bend),
            ("how often does it sound?", self.times),
        ]


def draw_videos(
    folder: str | Path, train: int = 600, held_out: int = 100, seed: int = 0
) -> list[dict]:
    """Draw videos into ``folder``: ``drawn.jsonl`` and ``videos/*.avi`` (64 x 64, 8 frames, PNG).

    Arguments and errors are those of `draw.draw_images`. A video has one record, in English.
    """
    parts = _choose(starmap(Motion, product(SHAPES, COLOURS, MOVES)), train, held_out, seed)
    return write_set(folder, "video", "videos", "avi", parts, write_video, seed)


def draw_sounds(
    folder: str | Path, train: int = 600, held_out: int = 100, seed: int = 0
) -> list[dict]:
    """Draw sounds into ``folder``: ``drawn.jsonl`` and ``sounds/*.wav`` (a second, 16 kHz mono).

    Arguments and errors are those of `draw.draw_images`. A sound has one record, in English.
    """
    parts = _choose(starmap(Signal, product(KINDS, PITCHES, BENDS, TIMES)), train, held_out, seed)
    return write_set(folder, "audio", "sounds", "wav", parts, write_sound, seed)


def _choose(known: Iterable, train: int, held_out: int, seed: int) -> list[tuple]:
    """What each file shows, its split, and its question: the parts of `draw.write_set`."""
    known, rng = list(known), np.random.Generator(np.random.PCG64([seed, 3]))
    shown = [known[i] for i in rng.integers(len(known), size=train)]
    # What was shown is held out in turn, so that a small held-out part is pairwise distinct.
    distinct = list(dict.fromkeys(shown))
    order = rng.permutation(len(distinct))
    held = [distinct[order[i % len(distinct)]] for i in range(held_out)]
    parts = []
    for index, each in enumerate(shown + held):
        questions, split = each.questions(), "train" if index < train else "test"
        parts.append((each, split, [questions[rng.integers(len(questions))]]))
    return parts


DRAW = {"image": draw_images, "video": draw_videos, "audio": draw_sounds}
NAMES = {"image": "drawn-2", "video": "moving-1", "audio": "tones-1"}  # drawn-1 had no questions


def default_folder(modality: str = "image") -> Path:
    """The drawn set of "image", "video" or "audio" in the cache, drawn there the first time."""
    folder = cache_dir() / NAMES[modality]
    if not (folder / "drawn.jsonl").exists():
        with cached(folder) as new:
            DRAW[modality](new)
    return folder


def render_video(motion: Motion, seed: int, index: int) -> np.ndarray:
    """The frames with the jitter of video ``index``: (8, 64, 64, 3), uint8."""
    rng = np.random.Generator(np.random.PCG64([seed, 4, index]))
    ground = list(BACKGROUNDS.values())[rng.integers(len(BACKGROUNDS))]
    mottle = np.kron(rng.uniform(-4, 4, (8, 8)), np.ones((SIDE // 8, SIDE // 8)))
    canvas = np.array(ground) + rng.uniform(-6, 6, 3) + mottle[..., None]
    paint = np.array(COLOURS[motion.colour]) + rng.uniform(-10, 10, 3)
    first, last = np.array(MOVES[motion.move], dtype=float)
    middle = SIDE / 2 + rng.uniform(-2, 2, 2)
    radius, tilt = rng.uniform(11, 13), rng.uniform(-0.06, 0.06)
    frames = []
    for number in range(FRAMES):
        x, y = middle + first + (last - first) * number / (FRAMES - 1)
        alpha = coverage(motion.shape, x, y, radius, tilt)[..., None]
        frames.append(canvas * (1 - alpha) + paint * alpha)
    return np.stack(frames).round().clip(0, 255).astype(np.uint8)


def write_video(path: Path, motion: Motion, seed: int, index: int) -> None:
    """Lossless, each frame by itself."""
    import av

    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("png", rate=FPS)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "rgb24"
        for pixels in render_video(motion, seed, index):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def render_sound(signal: Signal, seed: int, index: int) -> np.ndarray:
    """The samples with the jitter of sound ``index``: (16000,), int16."""
    rng = np.random.Generator(np.random.PCG64([seed, 5, index]))
    sound = rng.normal(0, 0.002, RATE)
    count, size = 1 + TIMES.index(signal.times), int(0.2 * RATE)
    pitch = PITCHES[signal.pitch] * rng.uniform(0.93, 1.07)
    loud = rng.uniform(0.2, 0.5)
    starts = 0.03 + 0.31 * np.arange(count) + rng.uniform(0, 0.06)
    ramp = np.linspace(0, 1, size)
    fade = np.minimum(1, 20 * np.minimum(ramp, 1 - ramp))  # no clicks
    phase = 2 * np.pi * np.cumsum(pitch * BENDS[signal.bend] ** ramp) / RATE
    burst = np.sin(phase)
    if signal.kind == "buzz":  # the first odd harmonics of a square wave
        burst = sum(np.sin(k * phase) / k for k in (1, 3, 5))
    for start in starts:
        first = int(start * RATE)
        sound[first : first + size] += loud * fade * burst
    return (sound.clip(-1, 1) * 32767).round().astype("<i2")


def write_sound(path: Path, signal: Signal, seed: int, index: int) -> None:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", "not compressed"))  # mono, 16 bits
        file.writeframes(render_sound(signal, seed, index).tobytes())
