"""The search index: unit vectors of pictures and captions, and bringing them up to date.

A folder with two tables (`store`), ``images.G.*`` and ``captions.G.*``, and ``index.json``, which
names the model and its fingerprint, the source, the counts, the generation G and the files that
could not be read. It is replaced in one stroke: a reader sees the old index or the new one, whole.

What is there after any history of runs, kills and changes is what a new index would hold. Vectors
are kept by the content they were made from, so a file that was moved, copied or touched is not
embedded again. Rows are sorted: pictures by the bytes of their paths, captions by their text, each
text once. So nothing tells in which order they came.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyvl import UserError, files, media_workers, ranks, store
from tinyvl.device import Pieces
from tinyvl.index_source import Source
from tinyvl.progress import bar, skip
from tinyvl.store import Part, Row, open_table, write_table

TABLES = ("images", "captions")
FIELDS = {
    **dict.fromkeys(("model", "fingerprint", "source", "root"), str),
    **dict.fromkeys(("width", "generation", *TABLES), int),
}  # fmt: skip
TEXTS = 64  # captions embedded together


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
                why = "this index is unfinished; run tinyvl index again to go on"
                raise UserError(f"{folder}: {why}.", 2)
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

    def narrow(self, folder: str) -> None:
        """Leaves only what lies in a folder below the root, and that folder's captions."""
        start = os.path.join(os.path.relpath(folder, self.root), "")
        self.images, self.captions = (
            table.part(lambda path: path.startswith(start))
            for table in (self.images, self.captions)
        )


def read_about(folder: Path) -> dict[str, Any] | None:
    return store.read_head(folder / "index.json", "index", FIELDS, 1)


def write_about(folder: Path, about: dict[str, Any]) -> None:
    files.write_text(folder / "index.json", json.dumps(about, indent=1) + "\n")


def check_model(folder: Path, about: dict[str, Any], model: Any, name: str) -> None:
    """Raises UserError: the index's vectors and the model's do not belong together."""
    if about["fingerprint"] != model.fingerprint:
        if about["model"] == name:
            what = f"the model {name} has changed since this index was made"
            raise UserError(f"{folder}: {what}; delete that folder and run tinyvl index again.", 2)
        advice = "name that one with --model, or delete the index to make it anew"
        made = f"made by another model ({about['model']}) than {name} is now"
        raise UserError(f"{folder} was {made}; {advice}.", 2)
    if about["width"] != model.width:
        raise UserError(f"{folder}: this index is damaged; delete it and index anew.")


def portable(path: str, root: str, folder: Path) -> str:
    """An absolute path as `index.json` keeps it: relative where the index lies below ``root``.

    So a folder can be moved with the index in it.
    """
    home = os.path.abspath(folder)
    below = root and os.path.join(home, "").startswith(os.path.join(root, ""))
    return os.path.relpath(path, home) if below else path


def located(path: str, folder: Path) -> str:
    """The absolute path of what `portable` gave."""
    return os.path.normpath(os.path.join(os.path.abspath(folder), path)) if path else ""


# ----------------------------------------------------------------------------------- updating


@dataclass
class Changes:
    """What an update found, in pictures."""

    embedded: int = 0
    moved: int = 0  # or copied: the content was known
    unchanged: int = 0
    gone: int = 0
    unreadable: int = 0
    known_bad: int = 0  # could not be read by an earlier run, and are the same now
    captions: int = 0  # embedded

    def __str__(self) -> str:
        captions = "caption embedded" if self.captions == 1 else "captions embedded"
        words = {"moved": "moved or copied", "captions": captions}
        words["known_bad"] = "unreadable as before (--retry tries again)"
        return ", ".join(f"{n:,} {words.get(what, what)}" for what, n in vars(self).items() if n)


def update(
    folder: Path, source: Source, model: Any, *, name: str, batch: int = 16,
    workers: int | None = None, retry: bool = False, quiet: bool = False,
) -> Changes:  # fmt: skip
    """Brings an index up to date with its source, or makes it. Those who search load ``name``.

    A picture is embedded in a batch of a fixed size, the last one filled up, because in batches of
    two sizes the same picture may differ in its last bits: so on a CPU the vectors are the same to
    the bit, however the work was cut. A caption is padded to the longest beside it, and may differ
    by some 1e-7. What cannot be decoded is named on standard error and left out; later runs leave
    it out without a word, unless it changes or they ``retry``. Several processes share the
    embedding; all else is the first one's work, and the others' ``source`` is not read.

    Raises UserError: the index is of another source or model, is being written by another process,
    or cannot be written.
    """
    if not ranks.first():
        for work, size in embedders(model, batch, workers):
            deque(ranks.shared(work, (), size), 0)
        return Changes()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with store.writing(folder, "another process is writing this index"):
            about = begin(folder, source, model, name)
            work = Update(folder, about, source, model, batch, workers, quiet)
            work.known_bad = {} if retry else about.get("failed", {})
            return work.run()
    except OSError as error:
        why = f"the index cannot be written ({error.strerror or error})"
        where = error.filename or folder
        raise UserError(f"{where}: {why}; name another place with -o.") from error


def begin(folder: Path, source: Source, model: Any, name: str) -> dict[str, Any]:
    """The index's description, checked; a new index gets one, without rows."""
    about = read_about(folder)
    if about is None:
        about = {
            "format": 1, "model": name, "fingerprint": model.fingerprint, "width": model.width,
            "source": portable(source.name, source.root, folder),
            "root": portable(source.root, source.root, folder),
            "generation": 0, "images": 0, "captions": 0, "failed": {},
        }  # fmt: skip
        write_about(folder, about)
    check_model(folder, about, model, name)
    known = "-" if about["source"] == "-" else located(about["source"], folder)
    if known != source.name:
        raise UserError(f"{folder} is the index of {known}; choose another place with -o.", 2)
    return about


class Update:
    """One run over an index that is locked."""

    def __init__(
        self, folder: Path, about: dict, source: Source, model: Any, batch: int,
        workers: int | None, quiet: bool,
    ):  # fmt: skip
        self.folder, self.about, self.source, self.quiet = folder, about, source, quiet
        self.batch, self.embedders = batch, embedders(model, batch, workers)
        self.known_bad: dict[str, list[int]] = {}  # as index.json's "failed": size and mtime
        self.bad: dict[str, list[int]] = {}
        self.changes = Changes()
        self.old = {name: open_table(folder, about, name) for name in TABLES}
        self.parts = {name: Part(folder, name, model.width) for name in TABLES}
        self.before = {name: table.rows() for name, table in self.old.items()}

    def run(self) -> Changes:
        rows = {"images": self.pictures()}
        rows["captions"] = self.captions(rows["images"])
        for part in self.parts.values():
            part.close()
        failed = {path: self.bad[path] for path in sorted(self.bad, key=os.fsencode)}
        other = rows != self.before or not self.about["generation"]
        if other:
            self.about["generation"] += 1
            for name in TABLES:
                stem = f"{name}.{self.about['generation']}"
                write_table(self.folder, stem, rows[name], self.vectors(name))
                self.about[name] = len(rows[name])
        if other or failed != self.about.get("failed", {}):
            write_about(self.folder, self.about | {"failed": failed})
        store.sweep(self.folder, self.about["generation"])
        return self.changes

    def vectors(self, name: str) -> dict[str, tuple[np.ndarray, int]]:
        """Of each digest that is known: a matrix and a row of it."""
        old, part = self.old[name].vectors, self.parts[name].vectors()
        found = {row.digest: (part, i) for i, row in enumerate(self.parts[name].rows)}
        return found | {row.digest: (old, i) for i, row in enumerate(self.before[name])}

    def pictures(self) -> list[Row]:
        """Embeds what is new; -> the rows of all pictures that can be read, sorted."""
        last = {row.path: row for row in (*self.before["images"], *self.parts["images"].rows)}
        rows: list[Row] = []
        changed: list[Row] = []  # without their digests
        for path in self.source.captions:
            bad = self.known_bad.get(path)
            if bad and bad == list(files.stat(self.source.file(path))):
                self.bad[path] = bad
                self.changes.known_bad += 1
                continue
            try:
                found = os.stat(self.source.file(path))
            except OSError as error:
                self.failed(path, error.strerror)
                continue
            row = last.get(path)
            if row and (row.size, row.mtime) == (found.st_size, found.st_mtime_ns):
                rows.append(row)
            elif stat.S_ISREG(found.st_mode):
                changed.append(Row(path, "", found.st_size, found.st_mtime_ns))
            else:
                self.failed(path, "it is not a file")
        new: list[Row] = []  # but for files that were only touched
        read, broken = self.embed(changed)
        for row in read:
            if row.digest in broken:
                self.failed(row.path, broken[row.digest])
                continue
            rows.append(row)
            if row.path not in last or row.digest != last[row.path].digest:
                new.append(row)
        changes, paths = self.changes, self.source.captions
        changes.unchanged = len(rows) - len(new)
        changes.moved = len(new) - changes.embedded
        left = Counter(row.digest for row in self.before["images"] if row.path not in paths)
        changes.gone = (left - Counter(row.digest for row in new)).total()  # but what was moved
        return sorted(rows, key=lambda row: os.fsencode(row.path))

    def embed(self, changed: list[Row]) -> tuple[list[Row], dict[str, str]]:
        """Embeds what is not known by its content.

        -> the rows of the files that could be opened, and {digest: why} of those not decoded.
        """
        part, known = self.parts["images"], set(self.vectors("images"))
        rows: list[Row] = []
        waiting: deque[Row] = deque()  # for their vectors

        def unknown() -> Iterator[str]:  # runs in the decoder's reading thread
            for row in changed:
                path = self.source.file(row.path)
                try:
                    with open(path, "rb") as file:
                        row.digest = hashlib.file_digest(file, blake).hexdigest()
                except OSError as error:
                    self.failed(row.path, error.strerror)
                    continue
                rows.append(row)
                if row.digest not in known:
                    known.add(row.digest)
                    waiting.append(row)
                    yield path

        work, size = self.embedders[0]
        found, broken = ranks.shared(work, unknown(), size), {}
        with bar("pictures", len(changed), self.quiet) as advance:
            while group := list(islice(found, size)):
                good: list[tuple[Row, np.ndarray]] = []
                for vector in group:
                    row = waiting.popleft()
                    if isinstance(vector, str):
                        broken[row.digest] = vector
                    else:
                        good.append((row, vector))
                if good:
                    part.append([row for row, _ in good], np.stack([v for _, v in good]))
                self.changes.embedded += len(good)
                advance(len(group))
        return rows, broken

    def failed(self, path: str, why: str | None) -> None:
        self.changes.unreadable += 1
        self.bad[path] = list(files.stat(self.source.file(path)))
        skip(f"{self.source.file(path)}: {why}")

    def captions(self, pictures: list[Row]) -> list[Row]:
        """Embeds the captions that are new; -> the rows of all, sorted."""
        texts = self.source.texts(row.path for row in pictures)
        digests = {text: blake(text.encode()).hexdigest() for text in texts}
        rows = [Row(path, digests[text], caption=text) for text, path in texts.items()]
        known = self.vectors("captions")
        new = [row for row in rows if row.digest not in known]
        new.sort(key=lambda row: (len(row.caption), row.caption))  # little padding
        work, size = self.embedders[1]
        found = ranks.shared(work, [row.caption for row in new], size)
        with bar("captions", len(new), self.quiet) as advance:
            for i in range(0, len(new), size):
                group = new[i : i + size]
                self.parts["captions"].append(group, np.stack([*islice(found, len(group))]))
                advance(len(group))
        deque(found, 0)  # several processes end together
        self.changes.captions = len(new)
        return sorted(rows, key=lambda row: row.caption)


def blake(content: bytes = b"") -> Any:
    """The hash that tells contents apart."""
    return hashlib.blake2b(content, digest_size=16)


def embedders(model: Any, batch: int, workers: int | None) -> list[tuple[Any, int]]:
    """What embeds pictures and what embeds captions, as `ranks.shared` takes it: work, block."""
    return [(partial(of_pictures, model, batch, workers), batch), (partial(of_texts, model), TEXTS)]


def of_pictures(
    model: Any, batch: int, workers: int | None, paths: Iterable[str]
) -> Iterator[np.ndarray | str]:
    """Of each picture its vector (width,) float32, or why there is none."""
    encoder, pieces = model.encoder, Pieces()
    decoded = media_workers.decode_images(
        paths, encoder.transform(), target=encoder.size, workers=workers
    )
    while group := list(islice(decoded, batch)):
        good = [picture for _, picture in group if isinstance(picture, Tensor)]
        vectors = iter(embed_images(model, good, batch, pieces) if good else ())
        for path, picture in group:
            if not isinstance(picture, Tensor):
                yield str(picture).removeprefix(f"{path}: ")
                continue
            vector = next(vectors)
            fine = np.isfinite(vector).all()
            yield vector if fine else "the model makes numbers of it that are not finite"


def of_texts(model: Any, texts: Iterable[str]) -> Iterator[np.ndarray]:
    """Of each text its vector (width,) float32."""
    texts = iter(texts)
    while group := list(islice(texts, TEXTS)):
        yield from model.embed_texts(group).float().cpu().numpy()


def embed_images(model: Any, pictures: list[Tensor], size: int, pieces: Pieces) -> np.ndarray:
    """uint8 (3, H, W) each -> (n, width) float32, as one batch filled up to ``size``.

    Where memory is short, it is cut into ``pieces`` of one size, the last filled up.
    """

    def attempt(number: int) -> np.ndarray:
        each, found = -(-size // number), []
        for i in range(0, len(pictures), each):
            part = pictures[i : i + each]
            filled = torch.stack(part + [part[-1]] * (each - len(part)))
            found.append(model.embed_images(filled)[: len(part)].float().cpu().numpy())
        return np.concatenate(found)

    return pieces.run(attempt, size)
