"""What a user names becomes paths: files, folders, patterns, ``-``; and what a suffix says."""

from __future__ import annotations

import glob
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import BinaryIO, TextIO

from tinyvl import UserError

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
READABLE = {"image": ("image", "video"), "video": ("video", "image"), "audio": ("audio", "video")}


class MediaError(UserError):
    """A file that cannot be used: one sentence, ``PATH: REASON``."""


def kind_of(path: str | os.PathLike[str]) -> str | None:
    """What the suffix (upper or lower case) says a file is: "image", "video", "audio" or None."""
    return KIND_OF.get(os.path.splitext(path)[1].lower())


def is_image(path: str | os.PathLike[str]) -> bool:
    """Whether the name ends like a picture's."""
    return kind_of(path) == "image"


def expand(
    inputs: Iterable[str],
    stdin: TextIO | BinaryIO | None = None,
    null: bool = False,
    others: Others | None = None,
) -> Iterator[str]:
    """Turn what a user names into paths, lazily and in order.

    A file stays as it is, and so does a name of nothing: the decoder then says so. A folder gives
    the pictures in and below it, or what ``others`` wants, sorted, without hidden files and linked
    folders, and ``others`` says what else is there; one that may not be read gives itself. A
    pattern that the shell left alone (``*.jpg``) gives its matches, sorted. ``-`` gives the lines
    of standard input, or of ``stdin``, as they come, each taken literally; with ``null`` they end
    with NUL.

    Raises MediaError: a folder has no such file; after all other inputs. Raises UserError: standard
    input holds NUL bytes, but ``null`` is False.
    """
    empty, others = [], others or Others("image", quiet=True)
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
            found = None
            for found in _files_below(path, others):
                yield found
            if not found:
                empty.append(path)
            others.say(path)
    if empty:
        what = "images" if others.wanted == "image" else "such files"
        raise MediaError("; ".join(f"{path}: no {what} in this folder" for path in empty))


class Others:
    """The files of a folder that are not of the ``wanted`` kind, counted by what they are."""

    RAW = frozenset(
        (".cr2", ".cr3", ".nef", ".nrw", ".arw", ".dng", ".raf", ".orf", ".rw2", ".pef", ".srw")
    )
    BESIDE = frozenset((".txt", ".json", ".jsonl", ".csv", ".tsv", ".xmp", ".tar", ".safetensors"))

    def __init__(self, wanted: str, quiet: bool = False):
        self.wanted, self.quiet, self.found = wanted, quiet, Counter[tuple[str, str]]()

    def wants(self, name: str) -> bool:
        suffix = os.path.splitext(name)[1].lower()
        if suffix in SUFFIXES[self.wanted]:
            return True
        if suffix not in self.BESIDE:  # texts beside pictures are no pictures that were missed
            kind = "RAW picture" if suffix in self.RAW else KIND_OF.get(suffix, "other file")
            self.found[kind.replace("image", "picture").replace("audio", "sound"), suffix] += 1
        return False

    def say(self, folder: str) -> None:
        """Names on standard error what was left out of a folder: once, by kind."""
        kinds: dict[str, Counter[str]] = {}
        for (kind, suffix), count in self.found.items():
            kinds.setdefault(kind, Counter())[suffix or "no suffix"] += count
        each = [
            f"{own.total():,} {kind}{'s' * (own.total() > 1)} ({', '.join(list(own)[:5])})"
            for kind, own in kinds.items()
        ]
        if each and not self.quiet:
            print(f"tinyvl: {folder}: left out {', '.join(each)}", file=sys.stderr)
        self.found.clear()


def _files_below(folder: str, others: Others) -> Iterator[str]:
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
            # `is_file` of a link in a circle raises: the decoder says so
            elif (entry.is_symlink() or entry.is_file()) and others.wants(entry.name):
                todo.append((entry.path, False))


def _lines(stdin: TextIO | BinaryIO, null: bool) -> Iterator[str]:
    # The unbuffered file: its read returns what is there, and a thread that waits in it holds no
    # lock. A thread that waits in sys.stdin would hang forked children and abort the exit.
    file = getattr(stdin, "buffer", stdin)
    file = getattr(file, "raw", file)
    end, rest, more = (b"\0" if null else b"\n"), b"", True
    while more:
        chunk = os.fsencode(file.read(65536) or b"")
        more = bool(chunk)
        if b"\0" in chunk and not null:  # before its first lines are taken for names
            what = "- stands for paths on standard input, a line each, and there is a picture, or"
            what += " something else that is no text"
            todo = "name a picture by its path; names that end with NUL are read with -0"
            raise UserError(f"{what}; {todo}", 2)
        *lines, rest = (rest + (chunk or end)).split(end)  # the last line needs no end
        for line in lines:
            line = line if null else line.removesuffix(b"\r")
            if line if null else line.strip():
                yield line.decode(sys.getfilesystemencoding(), "surrogateescape")
