"""An index on disk: embeddings of pictures and captions, what they belong to, what made them.

A folder that holds

    index.json                      the model and its fingerprint, the source, counts, generation
    images.G.f32, images.G.jsonl    generation G: row i of the matrix (rows, width) of little-endian
    captions.G.f32, captions.G.jsonl    float32 belongs to line i of the list
    images.part.f32, .part.jsonl    what an unfinished run has embedded so far
    captions.part.f32, .part.jsonl
    lock

The pictures' rows are sorted by the bytes of their paths; the captions' by their text, each text
once. New vectors are appended to the `part` files as they come, so a killed run loses no more
than the batch in its hands. Its end writes the next generation and then, in one stroke,
`index.json`, which names it: a reader sees the old index or the new one, whole.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tinyvl import UserError, files

TABLES = ("images", "captions")
FIELDS = {"model", "fingerprint", "width", "source", "root", "generation", *TABLES}
COPY = 8192  # rows copied at once
FILES = re.compile(r"\.?(?:images|captions)\.(\d+|part)\.(?:f32|jsonl)(\.\d+)?")


@dataclass(slots=True)
class Row:
    """What a vector belongs to: a picture, or a caption of it."""

    path: str  # below the source's folder, else absolute
    digest: str  # of the file's bytes, or of the caption
    size: int = 0
    mtime: int = 0  # nanoseconds
    caption: str | None = None

    def line(self) -> str:
        fields: dict[str, Any] = {"path": self.path, "digest": self.digest}
        if self.caption is None:
            fields |= {"size": self.size, "mtime": self.mtime}
        else:
            fields |= {"caption": self.caption}
        return json.dumps(fields) + "\n"  # in ASCII: names that are not UTF-8 survive

    @property
    def place(self) -> bytes:
        """What rows are sorted by."""
        return os.fsencode(self.path) if self.caption is None else self.caption.encode()


def one_line(text: str) -> str:
    """A text as it is embedded: white space collapsed, what is no Unicode a question mark."""
    return " ".join(text.split()).encode("utf-8", "replace").decode()


@dataclass(slots=True)
class Table:
    """A generation of an index's images or captions."""

    list: BinaryIO | None  # open, so that it can be read after a new generation has replaced it
    vectors: np.ndarray  # (rows, width) float32, mapped

    def rows(self) -> list[Row]:
        return list(self.pick(range(len(self.vectors))).values())

    def pick(self, numbers: Iterable[int]) -> dict[int, Row]:
        """Some of the rows: one pass over the list, which parses no others.

        Raises:
            UserError: the list is damaged.
        """
        wanted = set(map(int, numbers))
        if not wanted:
            return {}
        with sound(Path(self.list.name).parent):
            self.list.seek(0)
            lines = itertools.islice(self.list, max(wanted) + 1)
            rows = {i: Row(**json.loads(line)) for i, line in enumerate(lines) if i in wanted}
            if len(rows) < len(wanted):
                raise ValueError(f"{self.list.name} is cut short")
        return rows


@contextmanager
def sound(folder: Path) -> Iterator[None]:
    """While an index is read, what does not fit together is told as damage."""
    try:
        yield
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{folder}: this index is damaged ({error}); delete it and index anew."
        ) from error


def mapped(file: Path, rows: int, width: int) -> np.ndarray:
    if not rows:
        return np.empty((0, width), np.float32)  # an empty file cannot be mapped
    return np.memmap(file, "<f4", "r", shape=(rows, width))


# ---------------------------------------------------------------------------------------- reading


class Index:
    """A finished index, to be read."""

    def __init__(self, folder: Path):
        """Raises UserError: there is none, it is unfinished, damaged, or of a later format."""
        self.folder = folder
        for attempt in range(2):  # its writer may replace the files while they are opened
            self.about = read_about(folder)
            if self.about is None:
                raise UserError(f"{folder}: no index there; make one with tinyvl index.", 2)
            if not self.about["generation"]:
                raise UserError(
                    f"{folder}: this index is unfinished; run tinyvl index again to go on.", 2
                )
            try:
                self.images, self.captions = (open_table(folder, self.about, n) for n in TABLES)
                return
            except UserError:
                if attempt:
                    raise

    @property
    def root(self) -> str:
        """The folder that the rows' paths start from; "" where they are absolute."""
        return located(self.about["root"], self.folder)


def open_table(folder: Path, about: dict[str, Any], name: str) -> Table:
    stem, count = f"{name}.{about['generation']}", about[name]
    with sound(folder):
        lines = (folder / f"{stem}.jsonl").open("rb") if count else None
        return Table(lines, mapped(folder / f"{stem}.f32", count, about["width"]))


def read_about(folder: Path) -> dict[str, Any] | None:
    """What ``index.json`` says; None where there is none."""
    try:
        about = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        known = about["format"] == 1
        if known and (missing := FIELDS - about.keys()):
            raise ValueError(f"it lacks {min(missing)}")
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        raise UserError(f"{folder} is a file, not the folder of an index.", 2) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: index.json cannot be read ({error}).") from error
    if not known:
        raise UserError(f"{folder}: an index of a later tinyvl; update this one, or index anew.", 2)
    return about


def check_model(folder: Path, about: dict[str, Any], model: Any, name: str) -> None:
    """Raises UserError: the index's vectors and the model's do not belong together."""
    if about["fingerprint"] != model.fingerprint:
        raise UserError(
            f"{folder} was made by another model ({about['model']}) than {name} is now; name that "
            "one with --model, or delete the index to make it anew.",
            2,
        )


def portable(path: str, root: str, folder: Path) -> str:
    """An absolute path as `index.json` keeps it: relative where the index lies below ``root``.

    So a folder can be moved together with the index in it.
    """
    home = os.path.abspath(folder)
    below = root and os.path.join(home, "").startswith(os.path.join(root, ""))
    return os.path.relpath(path, home) if below else path


def located(path: str, folder: Path) -> str:
    """The absolute path of what `portable` gave."""
    return os.path.normpath(os.path.join(os.path.abspath(folder), path)) if path else ""


# ---------------------------------------------------------------------------------------- writing


class Part:
    """What a run has embedded so far, found again by the next one after a kill."""

    def __init__(self, folder: Path, name: str, width: int):
        self.width = width
        self.files = [folder / f"{name}.part.{kind}" for kind in ("f32", "jsonl")]
        self.matrix, self.list = (file.open("a+b") for file in self.files)
        room = self.matrix.seek(0, os.SEEK_END) // (4 * width)
        self.rows: list[Row] = []
        self.list.seek(0)
        whole = 0
        for line in self.list:
            if not line.endswith(b"\n") or len(self.rows) == room:
                break  # the kill cut it off, or its vector
            try:
                self.rows.append(Row(**json.loads(line)))
            except (ValueError, TypeError):
                break  # so did a power cut
            whole += len(line)
        self.list.truncate(whole)
        self.matrix.truncate(len(self.rows) * 4 * width)

    def append(self, rows: list[Row], vectors: np.ndarray) -> None:
        """Vectors go first: a line says that its vector is there."""
        matrix = np.ascontiguousarray(vectors, "<f4").tobytes()
        lines = "".join(row.line() for row in rows).encode("ascii")
        for file, content in ((self.matrix, matrix), (self.list, lines)):
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self.rows += rows

    def vectors(self) -> np.ndarray:
        return mapped(self.files[0], len(self.rows), self.width)

    def close(self) -> None:
        self.matrix.close()
        self.list.close()


def write_about(folder: Path, about: dict[str, Any]) -> None:
    files.write_text(folder / "index.json", json.dumps(about, indent=1) + "\n")


def write_table(folder: Path, stem: str, rows: list[Row], vectors: dict[str, tuple]) -> None:
    """A new generation: ``rows`` in their order, a vector each, by its digest.

    Args:
        vectors: digest -> (a matrix, a row of it).
    """

    def matrix(part: Path) -> None:
        with part.open("wb") as file:
            for i in range(0, len(rows), COPY):
                found = (vectors[row.digest] for row in rows[i : i + COPY])
                file.write(b"".join(source[n].tobytes() for source, n in found))

    def lines(part: Path) -> None:
        with part.open("w", encoding="ascii") as file:
            file.writelines(row.line() for row in rows)

    files.replace_file(folder / f"{stem}.f32", matrix)
    files.replace_file(folder / f"{stem}.jsonl", lines)


def sweep(folder: Path, generation: int) -> None:
    """Removes other generations, and what ended or killed runs left."""
    for file in folder.iterdir():
        found = FILES.fullmatch(file.name)
        if found and (found[1] != str(generation) or found[2]):
            try:
                file.unlink()
            except OSError:  # Windows, while somebody reads it: the next run's turn
                continue
