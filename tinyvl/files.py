"""Files that are replaced in one stroke: a reader, and a kill, find the old one or the new one."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyvl import UserError

if TYPE_CHECKING:
    import torch


def write_text(file: Path, text: str) -> None:
    """A text in UTF-8."""
    replace_file(file, lambda part: part.write_text(text, encoding="utf-8"))


def write_tensors(file: Path, tensors: "dict[str, torch.Tensor]", metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    replace_file(file, lambda part: save_file(tensors, part, metadata))


def replace_file(file: Path, write: Callable[[Path], Any]) -> None:
    """``write`` fills a file beside it, which then takes its place; a device is written to.

    Raises:
        UserError: it cannot be written.
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
def locked(folder: Path, message: str) -> Iterator[None]:
    """One writer of a folder at a time; the lock goes with its process, however that ends.

    Raises:
        UserError: another process has it; ``message`` says what that one is doing.
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


def local(name: str) -> str:
    """A folder's whole path, so that a checkpoint finds it from anywhere; other names unchanged."""
    path = os.path.expanduser(name)
    return os.path.abspath(path) if os.path.isdir(path) else name
