"""Files become tensors: image decoding that survives what people have on their disks.

``expand`` turns what a user names (files, folders, patterns, ``-``) into paths, ``load_image``
turns a path into an upright RGB picture or one sentence that says why not, and ``decode_images``
does so in worker processes, in order and as the paths come.
"""

from __future__ import annotations

import glob
import io
import itertools
import multiprocessing
import os
import queue
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from tinyvl import UserError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from torch import Tensor

MODALITIES = ("image", "video", "audio")
SUFFIXES = {
    kind: frozenset(suffixes.split())
    for kind, suffixes in {
        "image": ".jpg .jpeg .jpe .jfif .mpo .png .apng .gif .webp .avif .heic .heif .hif "
        ".bmp .tif .tiff .jp2 .j2k .ppm .pgm .pbm .pnm",
        "video": ".mp4 .avi .mkv .webm .mov .m4v .mpg .mpeg .wmv .flv .3gp .ogv .ts",
        "audio": ".wav .flac .mp3 .ogg .oga .opus .m4a .aac .aif .aiff .wma",
    }.items()
}
KIND_OF = {suffix: kind for kind in MODALITIES for suffix in SUFFIXES[kind]}
# What a model of each modality reads: a picture is a video of one frame, and a video has a sound.
READABLE = {
    "image": ("image", "video"),
    "video": ("video", "image"),
    "audio": ("audio", "video"),
}
IMAGE_SUFFIXES = SUFFIXES["image"]
# No EPS: Pillow would run Ghostscript on a stranger's program. No TGA: it has no magic number.
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "AVIF", "JPEG2000")
# Larger pictures are refused unread. Pillow itself refuses at twice PIL.Image.MAX_IMAGE_PIXELS,
# the same number: to read larger ones, raise both.
MAX_PIXELS = 178_956_970

_UPRIGHT = {  # EXIF orientation -> what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class MediaError(UserError):
    """A file that cannot be used: one sentence, ``PATH: REASON``."""


# ------------------------------------------------------------------------------ one picture


def load_image(
    source: str | os.PathLike[str] | bytes | BinaryIO, target: int | None = None
) -> Image.Image:
    """Decode a picture to upright RGB, whatever it is stored as.

    The first frame of an animation; EXIF orientation applied; transparency laid over white;
    16-bit and floating-point grey scaled to 0..255 instead of clipped to white.

    Args:
        source: a path, the bytes of a file, or a binary file object (left open).
        target: the shortest side, in pixels, that will be needed. A large JPEG is then decoded
            at 1/2, 1/4 or 1/8 scale, never below twice ``target`` on its shortest side (at
            twice, the picture resized further differs from the full decode by a fraction of a
            grey level); other pictures and JPEGs under four times ``target`` come at full size.

    Raises:
        MediaError: no such file, not a picture, more than ``MAX_PIXELS`` (from the header,
            undecoded), or damaged. A file that is cut short is refused, however much of it is
            there: a half-grey picture would be captioned as if it were one. (Damage that the
            codec conceals, such as flipped bits inside a JPEG scan, goes unnoticed.)
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        name, opened = "picture in memory", nullcontext(io.BytesIO(source))
    elif hasattr(source, "read"):
        name, opened = str(getattr(source, "name", "picture in memory")), nullcontext(source)
    else:
        name, opened = os.fspath(source), None
    try:
        # Pillow warns of bombs, odd EXIF and more; either we refuse in a sentence or all is well.
        with warnings.catch_warnings(), opened or open(name, "rb") as file:
            warnings.simplefilter("ignore")
            return _read(file, name, target)
    except MediaError:
        raise
    except Exception as error:  # a decoder may raise anything at all on a damaged file
        raise MediaError(f"{name}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    match error:
        case FileNotFoundError():
            return "there is no such file"
        case IsADirectoryError():
            return "is a folder, not a picture"
        case PermissionError():
            return "permission denied"
        case Image.DecompressionBombError():
            return f"too large to decode safely ({error})"
        case OSError(errno=int()):
            return f"cannot be read ({error.strerror})"
    return f"damaged or cut short, cannot be decoded ({str(error) or type(error).__name__})"


def _read(file: BinaryIO, name: str, target: int | None) -> Image.Image:
    if not file.seekable():  # a pipe, as in `tinyvl caption <(curl URL)`
        file = io.BytesIO(file.read())
    file.seek(0)
    head = file.read(4096)
    if not head:
        raise MediaError(f"{name}: the file is empty")
    try:
        image = Image.open(file, formats=_heif_formats(head, name) or _FORMATS)
    except UnidentifiedImageError as error:
        raise MediaError(f"{name}: {_what_else(head)}") from error
    if image.width * image.height > MAX_PIXELS:
        size = f"{image.width} x {image.height} pixels"
        raise MediaError(f"{name}: too large to decode safely ({size}, limit {MAX_PIXELS:,})")
    if target:
        image.draft(None, (2 * target, 2 * target))  # only JPEGs do anything here
    image.load()
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # broken metadata does not make the picture unusable
        orientation = 1
    image = _rgb(image)
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    image.info = {}  # or its EXIF would turn the picture a second time
    return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        grey = np.asarray(image) >> 8  # (H, W), 65535 -> 255
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        # Neither says what is white: the smallest usual range that holds the values, else theirs.
        grey = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0, neginf=0)  # (H, W)
        low, high = min(0.0, float(grey.min())), float(grey.max())
        usual = (255.0, 65535.0) if image.mode == "I" else (1.0,)
        high = next((white for white in usual if high <= white), high)
        grey = ((grey - low) * (255 / (high - low))).round().clip(0, 255)
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def _heif_formats(head: bytes, name: str) -> tuple[str, ...] | None:
    """``("HEIF",)`` for a HEIC or HEIF file by its ftyp box (AVIF is a sister); else None."""
    if head[4:8] != b"ftyp":
        return None
    box = head[8 : int.from_bytes(head[:4], "big")]
    brands = {box[i : i + 4] for i in range(0, len(box), 4)}
    hevc = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
    if not brands & hevc and (not brands & {b"mif1", b"msf1"} or brands & {b"avif", b"avis"}):
        return None
    try:
        import pillow_heif
    except ImportError as error:
        todo = "pip install 'tinyvl[heif]' reads it"
        raise MediaError(f"{name}: a HEIC picture needs an extra package; {todo}") from error
    pillow_heif.register_heif_opener()
    return ("HEIF",)


def _what_else(head: bytes) -> str:
    """Say what a file that is no picture is, from its first bytes."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if b"%pdf-" in text[:1024]:
        return "is a PDF document; turn its pages into pictures first (pdftoppm -png)"
    if text.startswith((b"<!doctype html", b"<html")):
        return "is a web page, not a picture; download the picture itself"
    if text.startswith(b"<") and b"<svg" in text:
        return "is an SVG drawing; render it to PNG first (rsvg-convert, or a browser)"
    formats = ", ".join(_FORMATS)
    return f"is not a picture in a format tinyvl reads ({formats}, HEIC), or its header is damaged"


# ------------------------------------------------------------------------------ many paths


def is_image(path: str | os.PathLike[str]) -> bool:
    """Whether the name ends like a picture's (``IMAGE_SUFFIXES``, upper or lower case)."""
    return os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES


def expand(
    inputs: Iterable[str],
    stdin: TextIO | BinaryIO | None = None,
    null: bool = False,
    suffixes: frozenset[str] = IMAGE_SUFFIXES,
) -> Iterator[str]:
    """Turn what a user names into paths, lazily and in order.

    A file stays as it is, and so does what does not exist (the decoder then says so). A folder
    gives the pictures in and below it, sorted, hidden ones and linked folders left out; a folder
    that may not be read gives itself. A pattern that the shell left alone (``*.jpg``) gives its
    matches, sorted; a file whose name has brackets is a file. ``-`` gives the lines of standard
    input as they come, each taken literally.

    Args:
        inputs: files, folders, patterns and ``-``.
        stdin: what ``-`` reads, standard input by default; binary, or text that wraps binary.
        null: the names on ``stdin`` end with NUL instead of a newline.
        suffixes: of the files that a folder gives: pictures, or videos or sounds instead.

    Raises:
        MediaError: a folder has none of these; raised last, when all other inputs have been given.
        UserError: standard input holds NUL bytes, but ``null`` is False.
    """
    empty = []
    for item in map(os.fspath, inputs):
        if item == "-":
            yield from _lines(sys.stdin if stdin is None else stdin, null)
            continue
        matches = [item]
        if glob.has_magic(item) and not os.path.lexists(item):
            matches = sorted(glob.glob(item, recursive=True)) or [item]
        for path in matches:
            if not os.path.isdir(path):
                yield path
                continue
            found = _files_below(path, suffixes)
            first = next(found, None)
            if first is None:
                empty.append(path)
            else:
                yield first
                yield from found
    if empty:
        what = "images" if suffixes == IMAGE_SUFFIXES else "such files"
        raise MediaError("; ".join(f"{path}: no {what} in this folder" for path in empty))


def _files_below(folder: str, suffixes: frozenset[str]) -> Iterator[str]:
    todo = [(folder, True)]  # a stack: the next in order is last
    while todo:
        path, is_folder = todo.pop()
        if not is_folder:
            yield path
            continue
        try:
            with os.scandir(path) as listing:
                entries = sorted(listing, key=lambda entry: entry.name, reverse=True)
        except OSError:
            yield path  # the decoder says why it cannot be read
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                todo.append((entry.path, True))
            elif os.path.splitext(entry.name)[1].lower() in suffixes and (
                entry.is_file() or entry.is_symlink()
            ):
                todo.append((entry.path, False))


def _lines(stdin: TextIO | BinaryIO, null: bool) -> Iterator[str]:
    # The unbuffered file, of which nobody has read yet: its read returns what is there; and a
    # thread that waits in it holds no lock, while one waiting in sys.stdin would hang forked
    # children and abort the exit.
    file = getattr(stdin, "buffer", stdin)
    file = getattr(file, "raw", file)
    end, rest = (b"\0" if null else b"\n"), b""
    while chunk := file.read(65536):
        *lines, rest = (rest + (os.fsencode(chunk) if isinstance(chunk, str) else chunk)).split(end)
        yield from _names(lines, null)
    yield from _names([rest], null)


def _names(lines: list[bytes], null: bool) -> Iterator[str]:
    for line in lines:
        if not null:
            line = line.removesuffix(b"\r")
            if b"\0" in line:
                todo = "use -0 for NUL-separated names, and name a picture by its path"
                raise UserError(f"standard input is not a list of paths, a line each; {todo}", 2)
        if line if null else line.strip():
            yield line.decode(sys.getfilesystemencoding(), "surrogateescape")


# ------------------------------------------------------------------------------ many pictures

# Measured with torch loaded: a fork is ready in 0.02 to 0.08 s (up to 2 GB resident); a spawned
# worker or a fork server in 3 to 7 s, nearly all of it importing torch, and they need a transform
# that pickles. A forked worker inherits dead OpenMP threads and a CUDA context: it computes in
# one thread and never touches the device. Outside Linux, system libraries do not survive a fork.
_CONTEXT = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
_IN_PROCESS = 4  # the first few pictures cost less than starting workers
WAKE = 0.5  # seconds: the longest that this program waits without looking up
_START = threading.Lock()  # one start at a time: no child may inherit another's half-made pipe


def decode_images(
    paths: Iterable[str],
    transform: Callable[[Image.Image], Tensor],
    *,
    target: int | None = None,
    workers: int | None = None,
    lookahead: int = 64,
) -> Iterator[tuple[str, Tensor | MediaError]]:
    """Decode and transform pictures in worker processes; results come in the order of the paths.

    The paths are read in a thread, so slow ones (standard input) hold back nothing that is
    already there. Closing the iterator stops the workers at once.

    Args:
        paths: read at most ``lookahead + 1`` ahead of the results.
        transform: makes a ``uint8`` tensor ``(3, H, W)`` on the CPU; normalisation belongs on
            the device. With a ``load(path, target)`` of its own it reads other files (videos,
            sounds) and makes what it likes of them. Deterministic: forked workers share one
            random state. It must pickle where workers are spawned (anywhere but Linux).
        target: the shortest side that ``transform`` needs, see ``load_image``.
        workers: 0 decodes in this process; None takes a worker per core, at most 8, and decodes
            the first four pictures in this process, so that a few pictures start none.
        lookahead: the most pictures decoded, or being decoded, and not yet taken.

    Yields:
        ``(path, tensor)``, or ``(path, MediaError)`` for a picture that cannot be decoded, on
        which ``transform`` raised, or which killed its worker (twice; the worker is replaced).
        What ``paths`` raises is raised after the results that came before it.
    """
    import torch

    def result(answer: np.ndarray | str) -> Tensor | MediaError:
        return MediaError(answer) if isinstance(answer, str) else torch.from_numpy(answer)

    paths = iter(paths)
    alone = _IN_PROCESS if workers is None else 0
    for path in paths if workers == 0 else itertools.islice(paths, alone):
        yield path, result(_decode(path, transform, target))
    for first in paths:
        crew = min(8, cores()) if workers is None else workers
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
    """How many this process may use: fewer than the machine has, in a container for instance."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_workers(
    paths: Iterable[str],
    transform: Callable[[Image.Image], Tensor],
    target: int | None,
    workers: int,
    lookahead: int,
) -> Iterator[tuple[str, np.ndarray | str]]:
    # A thread reads paths; a thread per worker hands it one path and waits, so that a worker that
    # dies does so on a known picture; and here the answers leave in order.
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
        while (item := _get(order)) is not None:
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


def _get(order: queue.SimpleQueue) -> Any:
    """What comes next.

    A Control-C that arrives in the instant before a thread begins to wait does not wake it, so
    nothing here waits for long.
    """
    while True:
        try:
            return order.get(timeout=WAKE)
        except queue.Empty:
            continue


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
    pipe: Connection,
    theirs: Connection,
    transform: Callable[[Image.Image], Tensor],
    target: int | None,
) -> None:
    """What a worker runs: paths in, arrays or sentences out, until the parent is gone."""
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
    """A child forked in here cannot die of Control-C, with a traceback, before it ignores it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
