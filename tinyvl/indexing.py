"""Bringing an index up to date with a folder or a data set: what `tinyvl index` does.

What is there after any history of runs, kills and changes is what a new index would hold: vectors
are kept by the content they were made from, so a file that was moved, copied or touched is not
embedded again, and rows are sorted, so nothing tells in which order they came.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyvl import UserError, data, files, index, media, media_workers
from tinyvl.index import TABLES, Part, Row
from tinyvl.progress import bar

TEXTS = 64  # captions embedded together


@dataclass
class Source:
    """What is indexed."""

    name: str  # absolute path of a folder or a data file; "-" for a list of paths
    root: str  # the folder that paths are relative to; "" where all are absolute
    captions: dict[str, list[str]] = field(default_factory=dict)  # of each picture, by its path

    def full(self, path: str) -> str:
        return os.path.join(self.root, path)


def read_source(
    name: str, null: bool = False, format: str | None = None, images: str | None = None
) -> Source:
    """A folder's pictures (captions from ``x.txt`` beside ``x.jpg``), a data set, or ``-``.

    Args:
        null: the paths behind ``-`` end with NUL.
        format: of the data set; with ``images``, their folder, as in `data.read`.

    Raises:
        UserError: as `data.read`, or there are no pictures. The index is then left as it is: a
            disk that is not mounted looks like an empty folder.
    """
    if (format or images) and (name == "-" or os.path.isdir(name)):
        raise UserError("--format and --images go with a data set, not with bare pictures.", 2)
    if name == "-":
        source = Source("-", "")
        for path in media.expand(["-"], null=null):
            source.captions[os.path.abspath(path)] = []
    elif os.path.isdir(name):
        root = os.path.abspath(name)
        source = Source(root, root)
        for path in media.expand([root]):
            source.captions[os.path.relpath(path, root)] = captions_beside(path)
    else:
        file = os.path.abspath(os.path.expanduser(name))
        root = os.path.dirname(file)
        source = Source(file, root)
        for record in data.read(file, format=format, images=images):
            if record.image:
                path = record.image.removeprefix(os.path.join(root, ""))
                source.captions.setdefault(path, []).extend(record.captions)
    if not source.captions:
        raise UserError(f"{name}: no pictures to index.")
    return source


def captions_beside(picture: str) -> list[str]:
    """The lines of ``x.txt`` beside ``x.jpg``."""
    try:
        with open(
            os.path.splitext(picture)[0] + ".txt", encoding="utf-8", errors="replace"
        ) as file:
            return list(file)
    except OSError:
        return []


@dataclass
class Changes:
    """What an update found, in pictures."""

    embedded: int = 0
    moved: int = 0  # or copied: the content was known
    unchanged: int = 0
    gone: int = 0
    unreadable: int = 0
    captions: int = 0  # embedded

    def __str__(self) -> str:
        captions = "caption embedded" if self.captions == 1 else "captions embedded"
        words = {"moved": "moved or copied", "captions": captions}
        found = [f"{n:,} {words.get(what, what)}" for what, n in vars(self).items() if n]
        return ", ".join(found)


def update(
    folder: Path,
    source: Source,
    model: Any,
    *,
    name: str,
    batch: int = 16,
    workers: int | None = None,
) -> Changes:
    """Brings an index up to date with its source, or makes it.

    A picture is embedded in a batch of a fixed size, the last one filled up, because in batches of
    two sizes the same picture may differ in its last bits: so on a CPU the vectors are the same to
    the bit, however the work was cut. A caption is padded to the longest beside it, and may differ
    by some 1e-7.

    Args:
        folder: the index; made where it does not exist.
        model: a dual encoder: ``embed_images``, ``embed_texts``, ``encoder``, ``width``,
            ``fingerprint``.
        name: what the model is loaded by, for those who search.

    Raises:
        UserError: the index is of another source or model, is being written by another process,
            or cannot be written. What cannot be decoded is named on standard error and left out.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with files.locked(folder, "another process is writing this index"):
            about = begin(folder, source, model, name)
            return Update(folder, about, source, model, batch, workers).run()
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: the index cannot be written ({error.strerror or error}); "
            "name another place with -o."
        ) from error


def begin(folder: Path, source: Source, model: Any, name: str) -> dict[str, Any]:
    """The index's description, checked; a new index gets one, without rows."""
    about = index.read_about(folder)
    if about is None:
        about = {
            "format": 1, "model": name, "fingerprint": model.fingerprint, "width": model.width,
            "source": index.portable(source.name, source.root, folder),
            "root": index.portable(source.root, source.root, folder),
            "generation": 0, "images": 0, "captions": 0,
        }  # fmt: skip
        index.write_about(folder, about)
    index.check_model(folder, about, model, name)
    known = about["source"]
    known = known if known == "-" else index.located(known, folder)
    if known != source.name:
        raise UserError(f"{folder} is the index of {known}; choose another place with -o.", 2)
    return about


class Update:
    """One run over an index that is locked."""

    def __init__(
        self, folder: Path, about: dict, source: Source, model: Any, batch: int, workers: int | None
    ):
        self.folder, self.about, self.source, self.model = folder, about, source, model
        self.batch, self.workers = batch, workers
        self.changes = Changes()
        self.old = {name: index.open_table(folder, about, name) for name in TABLES}
        self.parts = {name: Part(folder, name, model.width) for name in TABLES}
        self.before = {name: table.rows() for name, table in self.old.items()}

    def run(self) -> Changes:
        rows = {"images": self.pictures()}
        rows["captions"] = self.captions(rows["images"])
        for part in self.parts.values():
            part.close()
        if rows != self.before or not self.about["generation"]:
            generation = self.about["generation"] + 1
            for name in TABLES:
                stem = f"{name}.{generation}"
                index.write_table(self.folder, stem, rows[name], self.vectors(name))
            counts = {name: len(rows[name]) for name in TABLES}
            self.about |= {"generation": generation} | counts
            index.write_about(self.folder, self.about)
        index.sweep(self.folder, self.about["generation"])
        return self.changes

    def known(self, name: str) -> set[str]:
        return {row.digest for row in (*self.before[name], *self.parts[name].rows)}

    def vectors(self, name: str) -> dict[str, tuple[np.ndarray, int]]:
        """Of each digest: a matrix and a row of it."""
        old, part = self.old[name].vectors, self.parts[name].vectors()
        found = {row.digest: (part, i) for i, row in enumerate(self.parts[name].rows)}
        return found | {row.digest: (old, i) for i, row in enumerate(self.before[name])}

    def pictures(self) -> list[Row]:
        """Embeds what is new; -> the rows of all pictures that can be read, sorted."""
        part, known = self.parts["images"], self.known("images")
        last = {row.path: row for row in (*self.before["images"], *part.rows)}
        rows: list[Row] = []
        changed: list[tuple[str, os.stat_result]] = []
        for path in self.source.captions:
            try:
                status = os.stat(self.source.full(path))
            except OSError as error:
                self.failed(path, error.strerror)
                continue
            row = last.get(path)
            if row and (row.size, row.mtime) == (status.st_size, status.st_mtime_ns):
                rows.append(row)
            elif stat.S_ISREG(status.st_mode):
                changed.append((path, status))
            else:
                self.failed(path, "it is not a file")
        waiting: deque[Row] = deque()  # at the decoder

        def unknown() -> Iterator[str]:  # runs in the decoder's reading thread
            for path, status in changed:
                try:
                    digest = file_digest(self.source.full(path))
                except OSError as error:
                    self.failed(path, error.strerror)
                    continue
                rows.append(Row(path, digest, status.st_size, status.st_mtime_ns))
                if digest not in known:
                    known.add(digest)
                    waiting.append(rows[-1])
                    yield self.source.full(path)

        decoded = media_workers.decode_images(
            unknown(),
            self.model.encoder.transform(),
            target=self.model.encoder.size,
            workers=self.workers,
        )
        broken: dict[str, str] = {}  # digest -> why
        with bar("pictures", len(changed)) as advance:
            for group in batched(decoded, self.batch):
                found = [(waiting.popleft(), picture) for _, picture in group]
                good = [(row, picture) for row, picture in found if isinstance(picture, Tensor)]
                for row, error in found:
                    if not isinstance(error, Tensor):
                        path = self.source.full(row.path)
                        broken[row.digest] = str(error).removeprefix(f"{path}: ")
                if good:
                    vectors = embed_images(self.model, [p for _, p in good], self.batch)
                    part.append([row for row, _ in good], vectors)
                self.changes.embedded += len(good)
                advance(len(group))
        for row in rows:
            if row.digest in broken:
                self.failed(row.path, broken[row.digest])
        rows = [row for row in rows if row.digest not in broken]
        changes, paths = self.changes, self.source.captions.keys()
        new = [row for row in rows if row.path not in last or row.digest != last[row.path].digest]
        changes.unchanged = len(rows) - len(new)
        changes.moved = len(new) - changes.embedded
        left = Counter(row.digest for row in self.before["images"] if row.path not in paths)
        changes.gone = (left - Counter(row.digest for row in new)).total()  # but what was moved
        return sorted(rows, key=lambda row: row.place)

    def failed(self, path: str, why: str | None) -> None:
        self.changes.unreadable += 1
        print(f"tinyvl: skipping {self.source.full(path)}: {why}", file=sys.stderr)

    def captions(self, pictures: list[Row]) -> list[Row]:
        """Embeds the captions that are new; -> the rows of all, sorted."""
        texts: dict[str, str] = {}  # -> the first picture that has it
        for row in pictures:
            for text in self.source.captions[row.path]:
                texts.setdefault(index.one_line(text), row.path)
        texts.pop("", None)
        rows = [Row(path, text_digest(text), caption=text) for text, path in texts.items()]
        known = self.known("captions")
        new = [row for row in rows if row.digest not in known]
        new.sort(key=lambda row: (len(row.caption), row.caption))  # little padding
        with bar("captions", len(new)) as advance:
            for group in batched(new, TEXTS):
                vectors = self.model.embed_texts([row.caption for row in group])
                self.parts["captions"].append(group, vectors.float().cpu().numpy())
                advance(len(group))
        self.changes.captions = len(new)
        return sorted(rows, key=lambda row: row.place)


def file_digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def text_digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def batched(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    while group := list(islice(items, size)):
        yield group


def embed_images(model: Any, pictures: list[Tensor], size: int) -> np.ndarray:
    """uint8 (3, H, W) each -> (n, width) float32; always in batches of ``size``, filled up."""
    filled = pictures + [pictures[-1]] * (size - len(pictures))
    try:
        return model.embed_images(torch.stack(filled))[: len(pictures)].float().cpu().numpy()
    except torch.OutOfMemoryError:
        if size == 1:
            raise UserError(
                "One picture does not fit in this device's memory; use --device cpu."
            ) from None
    torch.cuda.empty_cache()
    half = -(-size // 2)
    print(f"out of memory: going on with batches of {half}", file=sys.stderr)
    parts = (pictures[i : i + half] for i in range(0, len(pictures), half))
    return np.concatenate([embed_images(model, part, half) for part in parts])
