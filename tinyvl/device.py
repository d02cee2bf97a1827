"""The device a model runs on, its precision and its memory."""

import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch

from tinyvl import UserError, ranks
from tinyvl.progress import say

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
T = TypeVar("T")


def choose_device(name: str | None = None) -> torch.device:
    """The device asked for (UserError: it cannot be used here), else CUDA, Apple's MPS, the CPU.

    Of several processes on a machine each has a GPU of its own.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and torch.backends.mps.is_available() and ranks.size() == 1:
            name = "mps"
    if name == "cuda" and ranks.size() > 1:
        name = f"cuda:{ranks.local() % torch.cuda.device_count()}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"The device {name!r} is not usable here: {error}".split("\n")[0], 2
        ) from error
    return device


def choose_precision(name: str | None, device: torch.device) -> torch.dtype:
    """On a GPU bf16 where it has it, else fp16; on a CPU fp32.

    But bf16 on a CPU that multiplies it half as fast again as fp32, or faster. ``name`` forces
    one, and where it is slow here, that is said. UserError: it is no name of a precision.
    """
    if name is not None:
        if name not in PRECISIONS:
            raise UserError(f"--precision is one of {', '.join(PRECISIONS)}, not {name!r}.", 2)
        chosen = PRECISIONS[name]
        if device.type == "cpu" and chosen != torch.float32 and cpu_speed(chosen) < 0.67:
            slow_here(name)
        return chosen
    if device.type != "cuda":
        fast = device.type == "cpu" and cpu_speed(torch.bfloat16) >= 1.5
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


@cache
def cpu_speed(dtype: torch.dtype) -> float:
    """How many times as fast as fp32 this processor multiplies matrices of ``dtype``.

    Measured once in a process, in some 50 ms: with instructions for bf16 (AVX512-BF16, AMX) it is
    2 or more; without them a tenth or less, and an hour's training would take a day. The
    environment variable TINYVL_BF16 says instead that bf16 is fast (1) or is not (0).
    """
    told = os.environ.get("TINYVL_BF16")
    if told and dtype == torch.bfloat16:
        return 2.0 if told == "1" else 1.0
    took = {}
    for each in (torch.float32, dtype):
        left, right = torch.ones(64, 576, dtype=each), torch.ones(576, 1536, dtype=each)
        left @ right  # the first one prepares
        times = []
        for _ in range(3):
            started = time.perf_counter()
            left @ right
            times.append(time.perf_counter() - started)
        took[each] = statistics.median(times)
    return took[torch.float32] / took[dtype]


@cache
def slow_here(name: str) -> None:
    """Says it once."""
    times = 1 / cpu_speed(PRECISIONS[name])
    say(f"this processor multiplies {name} {times:.0f} times slower than fp32: --precision fp32")


def precision_name(dtype: torch.dtype) -> str:
    return next(name for name, value in PRECISIONS.items() if value == dtype)


def keep_memory() -> None:
    """Lets glibc keep freed memory instead of giving it back to the system.

    A step's tensors are large, so malloc maps and unmaps each of them: on a CPU, page faults took
    a third of the training time. Does nothing with another C library.
    """
    import ctypes

    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return
    # Only larger blocks are mapped on their own. With all of them in the heap, it fragments: a run
    # took three times the memory.
    mallopt(-3, 2**25)  # M_MMAP_THRESHOLD
    mallopt(-1, 2**29)  # M_TRIM_THRESHOLD: how much may lie free


def peak_memory(device: torch.device) -> int:
    """The most memory taken so far, in bytes: the GPU's, or this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def out_of_memory(error: RuntimeError) -> bool:
    """Whether the device had no room: not every part of torch has an error of its own for that."""
    says = ("out of memory", "can't allocate memory", "_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(s in str(error) for s in says)


class Pieces:
    """Cuts a batch into twice as many pieces whenever memory runs out.

    The number of pieces stays for the batches that follow, which are about as large. ``what`` is
    the smallest batch there is; ``advice``: what to do where even that does not fit.
    """

    def __init__(self, what: str = "One picture", advice: str = "use --device cpu"):
        self.what, self.advice, self.number = what, advice, 1

    def run(self, attempt: Callable[[int], T], most: int, quiet: bool = False) -> T:
        """``attempt(number)``, called again with twice the number after an out-of-memory error.

        It does the whole work from the start, in that many pieces of at most ``most``. UserError:
        these do not fit either.
        """
        while True:
            try:
                return attempt(min(self.number, most))
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                if not out_of_memory(error):
                    raise
                if self.number >= most:
                    raise UserError(
                        f"{self.what} does not fit in this device's memory; {self.advice}."
                    ) from None
            # Outside of the handler, whose error holds on to the tensors of the failed attempt.
            self.number *= 2
            torch.cuda.empty_cache()
            say(f"out of memory: going on with batches cut into {self.number}", quiet)
