"""Rows of numbers on disk: the feature cache and the search index keep theirs in this way.

A folder holds rows and a head, a JSON file that says what they are and what made them. One process
writes at a time, and it may be killed at any moment: the next one reads what is whole and goes on
behind it. The head is written last. Rows are read through a memory map, in one of two forms:

    shards  (features)  ``00000.safetensors``, ...: several tensors of one dtype. A file appears
            whole and never changes; its header names the pictures that its rows belong to.
    table   (index)     ``images.G.f32`` and ``images.G.jsonl``: one float32 matrix, which a search
            reads from end to end, and a line of JSON for each of its rows. A run appends its rows
            to ``images.part.*``; its end merges old and new into the next generation, G + 1.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tinyvl import UserError, files

SHARD = "{:05}.safetensors"
AGAIN = "restore it, or extract into another folder"
ANEW = "delete it and index anew"
WAITING = ".{:05}.safetensors.0"  # a shard that one of several processes has written
HALF = re.compile(r"\.+[^.].*\.(?:safetensors|json|f32|jsonl)(?:\.\d+)+")  # and of `files`
OF_TABLES = re.compile(r"\w+\.(\d+|part)\.(?:f32|jsonl)")


@contextmanager
def writing(folder: Path, busy: str) -> Iterator[None]:
    """The only writer of a folder, which is made if need be; what a kill left half written goes.

    Raises UserError: the folder cannot be made, or another process writes there: ``busy``.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}).", 2) from error
    with files.locked(folder, busy):
        for file in folder.iterdir():
            if HALF.fullmatch(file.name):
                file.unlink()
        yield


def read_head(file: Path, what: str, fields: dict[str, type], status: int) -> dict[str, Any] | None:
    """What the head of ``what`` says, which must have some fields; None where there is none.

    ``fields``: the kind of each; a number is 0 or more. Raises UserError: it is damaged (with
    ``status``), of a later format, or its folder is a file.
    """
    try:
        head = json.loads(file.read_text(encoding="utf-8"))
        known = head["format"] == 1
        if known and (missing := set(fields) - head.keys()):
            raise ValueError(f"it lacks {min(missing)}")
        for name, kind in fields.items() if known else ():
            if type(head[name]) is not kind or (kind is int and head[name] < 0):
                raise ValueError(f"its {name} is {str(head[name])[:60]!r}")
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        raise UserError(f"{file.parent} is a file, not a folder of {what}.", 2) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{file.parent}: {file.name} cannot be read ({error}).", status) from error
    if not known:
        advice = f"of a later tinyvl; update this one, or make the {what} anew"
        raise UserError(f"{file.parent}: {file.name} is {advice}.", 2)
    return head


@contextmanager
def sound(folder: Path, what: str = "index", *, advice: str = AGAIN) -> Iterator[None]:
    """While files are taken apart, what does not fit together is reported as damage."""
    try:
        yield
    except (OSError, ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise UserError(f"{folder}: this {what} is damaged ({error}); {advice}.") from error


@dataclass(slots=True)
class Entry:
    """A picture: its file as it was, and its row in the shards."""

    path: str
    id: str
    bytes: int  # -1: there was no file
    modified: int  # nanoseconds
    error: str | None = None  # why it could not be read
    row: int | None = None


def finite(rows: Tensor) -> Tensor:
    """Which rows (n, ...) have no NaN and no infinity: (n,) bool."""
    return rows.flatten(1).sum(1, dtype=torch.float32).isfinite()


def put(page: dict[str, Tensor], parts: dict[str, Tensor], block: list[Entry], at: int) -> int:
    """Copies the rows of a block's good entries to a page, from row ``at`` on; -> the next row.

    Rows that are not finite in the page's dtype are left out, and their entries say so.
    """
    good = [entry for entry in block if not entry.error]
    rows = slice(at, at + len(good))
    for name, part in parts.items():
        page[name][rows] = part
    fine = torch.ones(len(good), dtype=torch.bool)
    for name in parts:
        fine &= finite(page[name][rows])
    for entry, ok in zip(good, fine.tolist(), strict=True):
        if not ok:
            kind = str(page[name].dtype).removeprefix("torch.")
            entry.error = f"{entry.path}: its features are not finite numbers in {kind}"
    for name in parts if not fine.all() else ():
        kept = page[name][rows][fine]
        page[name][at : at + len(kept)] = kept
    return at + int(fine.sum())


class Known:
    """Entries by path, and by id and file name for a data set that was moved."""

    def __init__(self, entries: Iterable[Entry] = ()):
        self.by_path: dict[str, Entry] = {}
        self.by_name: dict[tuple[str, str], Entry | None] = {}
        for entry in entries:
            self.add(entry)

    def add(self, entry: Entry) -> None:
        """Takes the place of an older entry: the file has changed."""
        name = entry.id, os.path.basename(entry.path)
        known = self.by_name.get(name, entry)
        self.by_path[entry.path] = entry
        self.by_name[name] = entry if known and known.path == entry.path else None  # None: two

    def compare(self, pictures: Iterable[tuple[str, str]]) -> tuple[list[Entry], int, list[str]]:
        """Of some (path, id): new entries, how many have rows, and what is wrong with the rest."""
        todo, kept, failed = [], 0, []
        for path, id in dict.fromkeys(pictures):
            entry = self.find(path, id)
            if entry is None:
                todo.append(Entry(path, id, *files.stat(path)))
                self.add(todo[-1])
            elif entry.row is not None:
                kept += 1
            elif entry.error:
                failed.append(entry.error)
        return todo, kept, failed

    def find(self, path: str, id: str | None = None) -> Entry | None:
        """The entry of a picture, unless its file is there and has changed since."""
        there = files.stat(path)
        if entry := self.by_path.get(path):
            same = (entry.bytes, entry.modified) == there
        elif id and (entry := self.by_name.get((id, os.path.basename(path)))):
            # The same file at another place; were it still at its own, this would be another one.
            same = entry.bytes == there[0] and not os.path.exists(entry.path)
        return entry if entry and (same or there[0] < 0) else None  # features may travel alone


# ------------------------------------------------------------------------------------------- shards


class Shards:
    """Finished shards, memory-mapped: only the rows that are asked for are read."""

    def __init__(self, folder: Path, head: dict[str, Any], dtype: torch.dtype):
        """Raises UserError: a file that the head names is missing, or has another size."""
        self.folder, self.tensors, self.dtype = folder, head["tensors"], dtype
        self.files = [folder / SHARD.format(number) for number in range(len(head["shards"]))]
        for file, shard in zip(self.files, head["shards"], strict=True):
            if files.stat(file)[0] != shard["bytes"]:
                raise UserError(f"{folder}: {file.name} is missing or was changed; {AGAIN}.", 2)
        self.ends = list(itertools.accumulate(int(shard["rows"]) for shard in head["shards"]))
        self.mapped: dict[tuple[int, str], Tensor] = {}

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def rows(self, name: str, indices: Sequence[int], part: tuple[slice, ...] = ()) -> Tensor:
        """Some rows of a tensor, or the same part of each: (n, ...), in the dtype on disk.

        Raises UserError: there is no such tensor, or its file is damaged.
        """
        if name not in self.tensors:
            raise UserError(f"{self.folder}: {name} are not kept there.", 2)
        where = [bisect(self.ends, index) for index in indices]
        maps = {file: self._map(file, name) for file in where}  # checked before memory is taken
        shape = torch.empty(self.tensors[name], device="meta")[part].shape
        out = torch.empty(len(indices), *shape, dtype=self.dtype)
        for i, (file, index) in enumerate(zip(where, indices, strict=True)):
            out[i] = maps[file][index - (self.ends[file - 1] if file else 0), *part]
        return out

    def _map(self, file: int, name: str) -> Tensor:
        if (file, name) not in self.mapped:
            try:
                with safe_open(self.files[file], "pt") as shard:  # maps it, keeps no descriptor
                    found = shard.get_tensor(name)
            except (OSError, SafetensorError) as error:
                raise UserError(f"{self.files[file]}: cannot be read ({error}).") from error
            rows = self.ends[file] - (self.ends[file - 1] if file else 0)
            if [*found.shape] != [rows, *self.tensors[name]] or found.dtype != self.dtype:
                what = f"its {name} are {found.dtype} {[*found.shape]}, which the manifest denies"
                raise UserError(f"{self.files[file]}: {what}; {AGAIN}.", 2)
            self.mapped[file, name] = found
        return self.mapped[file, name]


def write_shard(file: Path, head: dict, entries: list[Entry], tensors: dict[str, Tensor]) -> None:
    """One file, in one stroke: the tensors; the head and the entries in its header."""
    records = [astuple(entry)[:5] for entry in entries]
    # One key only: of several, safetensors writes the order in which a hash map has them.
    metadata = {"tinyvl": json.dumps({"head": head, "records": records})}
    files.write_tensors(file, tensors, metadata)


def read_shards(
    folder: Path, check: Callable[[dict[str, Any]], None]
) -> tuple[list[dict[str, Any]], list[Entry]]:
    """The shards that are there, and the entries of all, with their rows.

    Raises UserError: one is missing, a file is none, or ``check`` refuses its head.
    """
    shards, entries, row = [], [], 0
    for number, file in enumerate(sorted(folder.glob("*.safetensors"))):
        try:
            with safe_open(file, "pt") as shard:
                found = json.loads(shard.metadata()["tinyvl"])
            head, records = found["head"], [Entry(*record) for record in found["records"]]
            head.keys()
        except Exception as error:  # of safetensors, of JSON, or of something else in it
            message = f"{file}: this is no shard of features; extract into another folder."
            raise UserError(message, 2) from error
        if file.name != SHARD.format(number):
            raise UserError(f"{folder}: {SHARD.format(number)} is missing; {AGAIN}.", 2)
        check(head)
        first = row
        for entry in records:
            if entry.error is None:
                entry.row, row = row, row + 1
            entries.append(entry)
        shards.append({"file": file.name, "rows": row - first, "bytes": file.stat().st_size})
    return shards, entries


# ------------------------------------------------------------------------------------------- tables


@dataclass(slots=True)
class Row:
    """The picture, or its caption, that a row of a table belongs to."""

    path: str  # below the source's folder, else absolute
    digest: str  # of the file's bytes, or of the caption
    size: int = 0
    mtime: int = 0  # nanoseconds
    caption: str | None = None

    @classmethod
    def of(cls, line: bytes) -> Row:
        """Raises ValueError or TypeError: it is not such a line."""
        row = cls(**json.loads(line))
        if not all(isinstance(text, str) for text in (row.path, row.digest, row.caption or "")):
            raise ValueError(f"no row: {line[:60]!r}")
        return row

    def line(self) -> str:
        fields = {name: value for name in self.__slots__ if (value := getattr(self, name))}
        return json.dumps(fields) + "\n"  # in ASCII: names that are not UTF-8 survive


@dataclass(slots=True)
class Table:
    """A finished table, open: it can be read on after a new generation has replaced it."""

    list: BinaryIO | None  # None: it has no rows
    vectors: np.ndarray  # (rows, width) float32, mapped
    numbers: list[int] | None = None  # of the rows in the list; None: all of them

    def part(self, keep: Callable[[str], bool]) -> Table:
        """The rows whose paths are to be kept; their vectors are copied."""
        numbers = [i for i, row in enumerate(self.rows()) if keep(row.path)]
        return Table(self.list, self.vectors[numbers], numbers)

    def rows(self) -> list[Row]:
        return list(self.pick(range(len(self.vectors))).values())

    def pick(self, numbers: Iterable[int]) -> dict[int, Row]:
        """Some of the rows: one pass over the list, which parses no others.

        Raises UserError: the list is damaged.
        """
        wanted = {self.numbers[n] if self.numbers else n: n for n in map(int, numbers)}
        if not wanted:
            return {}
        with sound(Path(self.list.name).parent, advice=ANEW):
            self.list.seek(0)
            lines = itertools.islice(self.list, max(wanted) + 1)
            found = ((wanted[i], line) for i, line in enumerate(lines) if i in wanted)
            rows = {i: Row.of(line) for i, line in found}
            if len(rows) < len(wanted):
                raise ValueError(f"{self.list.name} is cut short")
        return rows


def open_table(folder: Path, about: dict[str, Any], name: str) -> Table:
    """Raises UserError: a file is missing or too short."""
    stem, count = f"{name}.{about['generation']}", about[name]
    with sound(folder, advice=ANEW):
        lines = (folder / f"{stem}.jsonl").open("rb") if count else None
        return Table(lines, mapped(folder / f"{stem}.f32", count, about["width"]))


def mapped(file: Path, rows: int, width: int) -> np.ndarray:
    if not rows:
        return np.empty((0, width), np.float32)  # an empty file cannot be mapped
    return np.memmap(file, "<f4", "r", shape=(rows, width))


class Part:
    """The rows of a table that a run has computed so far; after a kill the next run finds them."""

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
                self.rows.append(Row.of(line))
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


def write_table(folder: Path, stem: str, rows: list[Row], vectors: dict[str, tuple]) -> None:
    """A table of ``rows`` in their order. ``vectors``: by digest, a matrix and a row of it."""

    def write(part: Path, content: Iterable[bytes]) -> None:
        with part.open("wb") as file:
            file.writelines(content)

    places = (vectors[row.digest] for row in rows)
    matrix = (source[n].tobytes() for source, n in places)
    lines = (row.line().encode("ascii") for row in rows)
    files.replace_file(folder / f"{stem}.f32", lambda part: write(part, matrix))
    files.replace_file(folder / f"{stem}.jsonl", lambda part: write(part, lines))


def sweep(folder: Path, generation: int) -> None:
    """Removes the tables of other generations, and parts that are merged."""
    for file in folder.iterdir():
        found = OF_TABLES.fullmatch(file.name)
        if found and found[1] != str(generation):
            with suppress(OSError):  # Windows, while somebody reads it: the next run's turn
                file.unlink()
