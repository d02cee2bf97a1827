"""What a training run is, how it is asked to stop, and how it reports."""

import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tinyvl import UserError, models


@dataclass
class Job:
    """What decides a run's result. Saved with the checkpoint, compared on resume."""

    method: str
    data: str
    language: str  # the decoder, or LilT's text encoder
    vision: str
    fit: str
    options: dict[str, Any]
    recipe: models.Recipe
    prompt: str = ""
    val: str | None = None
    images: str | None = None
    lang: str | None = "en"
    format: str | None = None
    init: str | None = None
    limit: int | str | None = None  # of the training records; "1%": a share of them
    seed: int = 0
    max_tokens: int = 40  # longer captions are cut
    per_image: int = 5  # captions of a picture that share a micro-batch
    objective: str = "likelihood"  # or "cider": see `scst`
    samples: int = 5  # captions of a picture that "cider" compares
    views: int = 1  # of each picture, one after another by epoch; 1: the picture itself
    crops: bool = False  # a random crop of each picture, augmented, new in every epoch
    media: dict[str, Any] = field(default_factory=dict)  # what is told to an encoder of others
    precision: str = "fp32"

    @property
    def task(self) -> str:
        """What the captions are: "caption", or "vqa" where they are questions with answers."""
        return self.options.get("task", "caption")

    @property
    def modality(self) -> str:
        """What is captioned, or asked about: "image", "video" or "audio"."""
        return self.media.get("modality", "image")


@dataclass
class Run:
    """How a run is carried out."""

    out: Path
    device: torch.device
    micro: int = 64  # captions in memory at once
    checkpointing: bool = False
    cache: bool = True  # keep the encoder's tokens on disk: each picture is encoded once
    features: Path | None = None  # a finished cache (`features`) to read instead
    resume: bool = False
    save_every: int = 100  # steps
    validate_every: int | None = None  # steps; None: once an epoch
    workers: int | None = None
    quiet: bool = False
    stop: list[int] = field(default_factory=list)  # signals received

    def settings(self) -> dict[str, Any]:
        """What changes the order or the choice of the best weights after all."""
        return {
            "micro": self.micro,
            "cache": self.cache,
            "features": self.features and str(self.features.absolute()),
            "validate_every": self.validate_every,
        }


class Interrupted(UserError):
    """A signal asked for the end; what was done is saved."""

    def __init__(self) -> None:
        super().__init__("stopped and saved; continue with --resume", 130)


@contextmanager
def stopping(run: Run):
    """SIGINT and SIGTERM ask the run to save and end; a second SIGINT ends it at once."""

    def ask(number, frame):
        if run.stop:
            raise KeyboardInterrupt
        run.stop.append(number)
        print("stopping: saving after this step", file=sys.stderr)

    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def keep_memory() -> None:
    """Lets glibc keep freed memory instead of giving it back to the system and faulting it in anew.

    A step's tensors are large, so that malloc maps and unmaps each of them: on a CPU a third of
    the time of training went into page faults. No effect elsewhere.
    """
    if sys.platform != "linux":
        return
    import ctypes

    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return
    # Only blocks above this are mapped on their own. More in the heap would fragment it: with all
    # of them there, three times the memory was taken.
    mallopt(-3, 2**25)  # M_MMAP_THRESHOLD
    mallopt(-1, 2**29)  # M_TRIM_THRESHOLD: so much may lie free


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's memory, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def say(run: Run, message: str) -> None:
    if not run.quiet:
        print(message, file=sys.stderr, flush=True)


@contextmanager
def bar(title: str, total: int, run: Run, start: int = 0):
    """A Rich bar on a terminal; elsewhere a line at most every half minute. -> advance(n, text)."""
    if run.quiet or total == start:
        yield lambda n, text="": None
        return
    if not sys.stderr.isatty():
        begun = time.monotonic()
        done, last = [start], [begun]

        def advance(n: int, text: str = "") -> None:
            done[0] += n
            if time.monotonic() - last[0] > 30 or done[0] == total:
                last[0] = time.monotonic()
                pace = (time.monotonic() - begun) / (done[0] - start)
                left = f"{pace * (total - done[0]) / 60:.0f} min left"
                print(f"{title}: {done[0]}/{total}  {left}  {text}", file=sys.stderr, flush=True)

        yield advance
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[text]}"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=total, completed=start, text="")
        yield lambda n, text="": progress.update(task, advance=n, text=text)
