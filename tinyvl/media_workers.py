"""Decoding ahead in worker processes: pictures, videos and sounds in the order of their paths."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from tinyvl import ranks
from tinyvl.media import MediaError, load_image

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from torch import Tensor

# Measured with torch loaded: a fork is ready in 0.02 to 0.08 s (up to 2 GB resident); a spawned
# worker or a fork server in 3 to 7 s, nearly all of it importing torch, and they need a transform
# that pickles. A forked worker inherits dead OpenMP threads and a CUDA context: it computes in
# one thread and never touches the device. Outside Linux, system libraries do not survive a fork.
_CONTEXT = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
_IN_PROCESS = 4  # the first few pictures cost less than starting workers
WAKE = 0.5  # seconds: the longest wait, see `_in_workers`
_START = threading.Lock()  # one start at a time: no child may inherit another's half-made pipe


def decode_images(
    paths: Iterable[str], transform: Callable[[Image.Image], Tensor], *,
    target: int | None = None, workers: int | None = None, lookahead: int = 64,
) -> Iterator[tuple[str, Tensor | MediaError]]:  # fmt: skip
    """Decode and transform pictures in worker processes; results come in the order of the paths.

    A thread reads the paths, so that slow ones (standard input) hold nothing back: at most
    ``lookahead + 1`` ahead of the results. Closing the iterator stops the workers at once.
    ``target`` is the shortest side that is needed, as in `load_image`.

    Args:
        transform: picture -> uint8 (3, H, W) on the CPU; normalisation belongs on the device.
            Where it has a method ``load(path, target)``, that reads the file instead of
            `load_image` (videos, sounds). It must be deterministic, as forked workers share one
            random state, and must pickle except on Linux, where workers are forked.
        workers: 0 decodes in this process. None: a worker per core (those of the machine shared
            with the other processes of torchrun), at most 8, started only after four pictures,
            which this process decodes itself.

    Yields ``(path, tensor)``, or ``(path, MediaError)`` where a picture cannot be decoded, where
    ``transform`` raised, or where a picture killed two workers (they are replaced).
    What ``paths`` raises is raised after the results before it.
    """
    import torch

    def result(answer: np.ndarray | str) -> Tensor | MediaError:
        return MediaError(answer) if isinstance(answer, str) else torch.from_numpy(answer)

    paths = iter(paths)
    alone = _IN_PROCESS if workers is None else 0
    for path in paths if workers == 0 else itertools.islice(paths, alone):
        yield path, result(_decode(path, transform, target))
    for first in paths:
        crew = min(8, max(1, cores() // ranks.beside())) if workers is None else workers
        rest = itertools.chain([first], paths)
        for path, answer in _in_workers(rest, transform, target, min(crew, lookahead), lookahead):
            yield path, result(answer)


def _decode(
    path: str, transform: Callable[[Image.Image], Tensor], target: int | None
) -> np.ndarray | str:
    """The tensor as an array (small, so it goes through a pipe), or what went wrong."""
    load = getattr(transform, "load", load_image)  # of videos and sounds its own
    try:
        image = load(path, target)
    except MediaError as error:
        return str(error)  # not the error itself: its traceback would keep the pixels alive
    try:
        return transform(image).numpy()
    except Exception as error:
        return f"{path}: the transform failed ({type(error).__name__}: {error})"


def cores() -> int:
    """How many cores this process may use, which are fewer in a container than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_workers(
    paths: Iterable[str], transform: Callable[[Image.Image], Tensor], target: int | None,
    workers: int, lookahead: int,
) -> Iterator[tuple[str, np.ndarray | str]]:  # fmt: skip
    # One thread reads paths. One thread per worker sends it a path and waits, so that it is known
    # which picture kills a worker. The answers leave here, in order.
    Image.init()  # all of Pillow's plugins, once instead of in every fork
    slots = threading.Semaphore(lookahead)
    order: queue.SimpleQueue[tuple[str, Future] | BaseException | None] = queue.SimpleQueue()
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    crew: list[_Worker] = []
    threads = ThreadPoolExecutor(workers)

    def ask(path: str) -> np.ndarray | str:
        worker = idle.get()
        try:
            return worker.decode(path)
        finally:
            idle.put(worker)

    def read() -> None:
        try:
            for path in paths:
                slots.acquire()
                order.put((path, threads.submit(ask, path)))  # raises once they are shut down
            order.put(None)
        except BaseException as error:  # raised again below, in its turn
            order.put(error)

    try:
        for _ in range(workers):
            crew.append(_Worker(transform, target))
            idle.put(crew[-1])
        # A daemon, because nothing can interrupt it while it waits for a path.
        threading.Thread(target=read, daemon=True).start()
        while True:
            try:  # no wait is long: a Control-C just before it began would not end it
                item = order.get(timeout=WAKE)
            except queue.Empty:
                continue
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            path, future = item
            while not future.done():
                wait([future], timeout=WAKE)
            answer = future.result()
            slots.release()
            yield path, answer
    finally:
        item = None  # an exception refers to this frame: no cycle
        for worker in crew:
            worker.kill()
        threads.shutdown(cancel_futures=True)
        slots.release()  # the reader may wait for one; it then finds the shutdown
        for worker in crew:
            worker.bury()


class _Worker:
    """A process that decodes one picture at a time, replaced when it dies."""

    def __init__(self, transform: Callable[[Image.Image], Tensor], target: int | None):
        self.job = transform, target
        self.killed = False
        self.start()

    def start(self) -> None:
        with _START, _control_c_held():
            if self.killed:
                return
            self.pipe, theirs = _CONTEXT.Pipe()
            self.process = _CONTEXT.Process(
                target=_serve, args=(theirs, self.pipe, *self.job), daemon=True
            )
            self.process.start()
            theirs.close()  # so that the worker's death ends our reading

    def decode(self, path: str) -> np.ndarray | str:
        for _ in range(2):  # memory may have run out over another picture: a second chance
            try:
                self.pipe.send(path)
                return self.pipe.recv()
            except (EOFError, OSError):  # it died
                self.process.join(1)
                self.process.kill()
                self.bury()
                code = self.process.exitcode or 0
                self.start()
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return f"{path}: decoding it crashed ({how}); the file is damaged, or memory ran out"

    def kill(self) -> None:
        with _START:
            self.killed = True
            self.process.kill()

    def bury(self) -> None:
        self.process.join()
        self.pipe.close()


def _serve(
    pipe: Connection, theirs: Connection, transform: Callable[[Image.Image], Tensor],
    target: int | None,
) -> None:  # fmt: skip
    """A worker's loop: paths in, arrays or sentences out, until the parent is gone."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Control-C means
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    theirs.close()  # or our own copy of the parent's end would outlive the parent
    torch.set_num_threads(1)
    try:
        while True:
            pipe.send(_decode(pipe.recv(), transform, target))
    finally:  # most often EOFError; a fork must not join the parent's threads nor flush its buffers
        os._exit(1)


@contextmanager
def _control_c_held() -> Iterator[None]:
    """Holds Control-C back, so that a child forked here can begin to ignore it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
