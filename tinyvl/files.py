"""Text files as people have them; files and folders that appear in one stroke.

A reader, and a kill, find the old file or the new one.
"""

import codecs
import io
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TextIO

from tinyvl import UserError

if TYPE_CHECKING:
    import torch

# ------------------------------------------------------------------------------------ text

MARKS = {  # a byte order mark says the encoding; UTF-32's begins as UTF-16's
    codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip


def encoding_of(head: bytes) -> str:
    """The encoding of a text that begins so: what its byte order mark says, or UTF-8."""
    return next((name for mark, name in MARKS.items() if head.startswith(mark)), "utf-8")


@contextmanager
def open_text(file: Path, errors: str = "strict") -> Iterator[TextIO]:
    """A text file to be read: UTF-8, or what its byte order mark says; lines end in LF, or CRLF.

    UserError: it cannot be read, or is in another encoding.
    """
    try:
        with open(file, "rb") as stream:
            head = stream.peek(4)[:4]  # not read twice: it may be a pipe
            yield io.TextIOWrapper(stream, encoding_of(head), errors, newline="\n")
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    except UnicodeError:
        raise UserError(f"{file} is not text in UTF-8; save it in that encoding") from None


def not_null(text: str, where: object) -> str:
    """The text. UserError: it has NUL characters, as UTF-16 read as UTF-8 has."""
    if "\0" in text:
        what = "has NUL characters, as UTF-16 has without a byte order mark"
        raise UserError(f"{where} is not text in UTF-8: it {what}")
    return text


def decode(content: bytes, where: object) -> str:
    """Bytes as text, as `open_text` reads a file. UserError: they are in another encoding."""
    try:
        return not_null(content.decode(encoding_of(content)), where)
    except UnicodeError:
        raise UserError(f"{where} is not text in UTF-8; save it in that encoding") from None


def read_text(file: Path, errors: str = "strict") -> str:
    """A text file. UserError: as `open_text`."""
    with open_text(file, errors) as stream:
        return not_null(stream.read(), file)


def text_lines(file: Path, *, optional: bool = False) -> Iterator[tuple[str, str]]:
    """The lines of a text file, stripped, without blank ones: ("FILE, line 3", line).

    A carriage return inside a line is a part of it. UserError: as `open_text`.
    """
    if optional and not file.exists():
        return
    with open_text(file) as stream:
        for number, line in enumerate(stream, 1):
            line = line.removeprefix("\ufeff").strip()  # the mark of a file joined to another
            if line:
                yield f"{file}, line {number}", not_null(line, f"{file}, line {number}")


class Unmarked:
    """Standard input, or another stream of bytes, without its byte order mark."""

    def __init__(self, stream: Any):
        # Unbuffered, so that a line is there as soon as it was written.
        stream = getattr(stream, "buffer", stream)
        self.stream, self.begun = getattr(stream, "raw", stream), False

    def read(self, size: int) -> bytes:
        """The next bytes. UserError: the mark says that it is UTF-16 or UTF-32."""
        found = self.stream.read(size)
        if not self.begun and found:
            self.begun = True
            if (encoding := encoding_of(found)) not in ("utf-8", "utf-8-sig"):
                raise UserError(f"standard input is {encoding.upper()}; give it as UTF-8", 2)
            found = found.removeprefix(codecs.BOM_UTF8)
        return found


def escape(error: UnicodeError) -> tuple[str | bytes, int]:
    """Of a name that is no Unicode its bytes; of what an encoding lacks, an escape."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)


ESCAPED = "tinyvl.escaped"  # how text is written: it never fails
codecs.register_error(ESCAPED, escape)


def dump(value: Any, **layout: Any) -> str:
    """JSON, in characters; what is no Unicode (a name that is not UTF-8) makes all of it ASCII."""
    text = json.dumps(value, ensure_ascii=False, **layout)
    try:
        text.encode()
    except UnicodeEncodeError:  # only an escape brings it through a file
        return json.dumps(value, **layout)
    return text


def quoted(name: str) -> str:
    """A name as it stands in a line: with tabs or line breaks, or a quote first, JSON's text."""
    return json.dumps(name, ensure_ascii=False) if re.search(r'[\t\n\r]|^"', name) else name


def unquoted(name: str) -> str:
    """The name that `quoted` was given."""
    with suppress(ValueError):
        return json.loads(name) if name.startswith('"') else name
    return name


def read_object(file: Path) -> dict[str, Any]:
    """A file's JSON object, such as a ``config.json``. UserError: it cannot be read, or is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file.parent}: {file.name} cannot be read ({error}).") from error
    return found


def numbers_in(file: Path) -> int:
    """How many numbers a safetensors file holds: what it says at its start."""
    from safetensors import safe_open

    with safe_open(file, "numpy") as stored:
        return sum(math.prod(stored.get_slice(name).get_shape()) for name in stored.keys())  # noqa: SIM118


def stat(path: str | Path) -> tuple[int, int]:
    """A file's size in bytes and its time of change in nanoseconds; (-1, 0) if there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return -1, 0
    return found.st_size, found.st_mtime_ns


# ----------------------------------------------------------------------------- in one stroke


def write_text(file: Path, text: str) -> None:
    replace_file(file, lambda part: part.write_bytes(text.encode("utf-8", ESCAPED)))


def write_tensors(file: Path, tensors: "dict[str, torch.Tensor]", metadata: dict[str, str]) -> None:
    """A safetensors file of tensors on the CPU or elsewhere. UserError: it cannot be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}

    def write(part: Path) -> None:
        try:
            save_file(tensors, part, metadata)
        except SafetensorError as error:  # so it calls a full disk, too
            raise OSError(None, str(error)) from error

    replace_file(file, write)


def replace_file(file: Path, write: Callable[[Path], Any]) -> None:
    """``write`` fills a file beside it, which then takes its place; a device is written to.

    Raises UserError: it cannot be written.
    """
    part = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        if file.exists() and not file.is_file():  # /dev/stdout would become a file
            write(file)
            return
        part.touch()
        mode = part.stat().st_mode
        write(part)
        part.chmod(mode)  # safetensors makes files that only their owner can read
        with part.open("rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(part, file)
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror}).") from error
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def building(target: Path, where: str = "", advice: str = "free some space") -> Iterator[Path]:
    """An empty folder that becomes ``target`` at once when the body ends without an error.

    Two processes may build the same thing: whoever ends first has made it.

    Raises UserError, with ``advice``: ``where``, or the folder around it, cannot be written to.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=target.parent, prefix=f".{target.name}-", ignore_cleanup_errors=True
        ) as scratch:
            new = Path(scratch) / "new"
            new.mkdir()
            yield new
            for file in new.iterdir():
                if file.is_file():  # safetensors writes for the owner only; others may read
                    file.chmod(0o644)
            try:
                os.replace(new, target)
            except OSError:
                if not target.is_dir():
                    raise
                if {file.name for file in new.iterdir()} - {file.name for file in target.iterdir()}:
                    os.replace(target, new.with_name("old"))  # it is not whole: ours is
                    os.replace(new, target)
    except OSError as error:
        what = f"{where or target.parent} ({error.strerror or error})"
        raise UserError(f"Cannot write to {what}; {advice}.") from error


@contextmanager
def locked(folder: Path, message: str) -> Iterator[None]:
    """One writer of a folder at a time; the lock goes with its process, however that ends.

    Raises UserError: another process has it; ``message`` says what that one is doing.
    """
    try:
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}).") from error
    with file:
        hold(file, folder, message)
        yield


def hold(file: IO, where: Path, message: str) -> None:
    """Locks a file that is open for writing until it is closed, or its process ends.

    Opening and closing it once more in this process unlocks it. Raises UserError: as `locked`.
    """
    try:
        try:
            import fcntl
        except ImportError:  # Windows, where a byte that is locked cannot be read by others
            import msvcrt

            at = os.lseek(file.fileno(), 0, os.SEEK_CUR)
            os.lseek(file.fileno(), 2**30, os.SEEK_SET)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            os.lseek(file.fileno(), at, os.SEEK_SET)
        else:  # not flock, which forked workers inherit and keep after a kill
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise UserError(f"{where}: {message}; wait until it has ended.") from error
    except OSError:
        pass  # a file system without locks, or a pipe


def cache_dir() -> Path:
    """$TINYVL_CACHE, or the platform's folder for what can be fetched again; need not exist."""
    if own := os.environ.get("TINYVL_CACHE"):
        return Path(own).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local") / "tinyvl"
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/tinyvl"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinyvl"


def cache_name() -> str:
    """The cache's path for people, the home folder as ``~``."""
    with suppress(ValueError):
        return str(Path("~") / cache_dir().relative_to(Path.home()))
    return str(cache_dir())


def cached(target: Path) -> AbstractContextManager[Path]:
    """`building` of a folder in the cache."""
    advice = "free some space or set TINYVL_CACHE to another folder"
    return building(target, f"the cache {cache_name()}", advice)


def local(name: str) -> str:
    """A folder's whole path, so that a checkpoint finds it from anywhere; other names unchanged."""
    path = os.path.expanduser(name)
    return os.path.abspath(path) if os.path.isdir(path) else name
