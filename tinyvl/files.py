"""Files and folders that appear in one stroke: a reader, and a kill, find the old or the new."""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyvl import UserError

if TYPE_CHECKING:
    import torch


def write_text(file: Path, text: str) -> None:
    replace_file(file, lambda part: part.write_text(text, encoding="utf-8"))


def write_tensors(file: Path, tensors: "dict[str, torch.Tensor]", metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    replace_file(file, lambda part: save_file(tensors, part, metadata))


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
    with (folder / ".lock").open("w") as file:
        try:
            try:
                import fcntl
            except ImportError:  # Windows
                import msvcrt

                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:  # not flock, which forked workers inherit and keep after a kill
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise UserError(f"{folder}: {message}; wait until it has ended.") from error
        except OSError:
            pass  # a file system without locks
        yield


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
