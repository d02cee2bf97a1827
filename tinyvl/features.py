"""The feature cache on disk: what an encoder makes of each picture, computed once.

A folder holds safetensors shards (``00000.safetensors``, ...) and ``manifest.json``. A shard has
``tokens`` (n, S, D) and ``summaries.00`` (n, D_level), ..., lowest level first, and its header
names the pictures they are of: an extraction that was killed goes on behind the shards it finds.
The manifest is written last. It says which encoder made what, and in which row each picture is.
`extract` fills such a folder; `FeatureStore` reads it.
"""

import json
import os
from bisect import bisect
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tinyvl import UserError, files

MANIFEST = "manifest.json"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
CODES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}  # in a shard's header
COLUMNS = ["path", "id", "bytes", "modified", "error", "row"]  # of the manifest's records


@dataclass(slots=True)
class Entry:
    """A picture in a cache: the file as it was, and the row that it got."""

    path: str
    id: str
    bytes: int  # -1: there was no file
    modified: int  # nanoseconds
    error: str | None = None  # why it could not be read
    row: int | None = None


def stat(path: str | Path) -> tuple[int, int]:
    """Size and time of change of a file; (-1, 0) if there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return -1, 0
    return found.st_size, found.st_mtime_ns


class Index:
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

    def find(self, path: str, id: str | None = None) -> Entry | None:
        """The entry of a picture, unless its file is there and has changed since."""
        there = stat(path)
        if entry := self.by_path.get(path):
            same = (entry.bytes, entry.modified) == there
        elif id and (entry := self.by_name.get((id, os.path.basename(path)))):
            # The same file at another place; were it still at its own, this would be another one.
            same = entry.bytes == there[0] and not os.path.exists(entry.path)
        return entry if entry and (same or there[0] < 0) else None  # features may travel alone


class FeatureStore:
    """A finished cache, memory-mapped: only the rows that are asked for are read."""

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder, self.manifest = folder, manifest
        self.index = Index(Entry(*record) for record in manifest["records"])
        self.ends = list(accumulate(shard["rows"] for shard in manifest["shards"]))
        self.mapped: dict[tuple[int, str], Tensor] = {}
        self.part = slice(None), slice(None)  # of the tokens: which, and which of their numbers
        self.ids: dict[str, str] = {}  # of the paths that were asked for by their records

    @classmethod
    def open(cls, folder: str | Path) -> "FeatureStore":
        """The cache in a folder.

        Raises:
            UserError: none is there, it is unfinished, of another format, or a shard is amiss.
        """
        folder = Path(folder)
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            advice = "no features there; `tinyvl features DATA --out DIR` makes them"
            if any(folder.glob("*.safetensors")):
                advice = "this extraction did not finish; run the same `tinyvl features` again"
            raise UserError(f"{folder}: {advice}.", 2) from None
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}: {MANIFEST} cannot be read ({error}).", 2) from None
        if not isinstance(manifest, dict) or manifest.get("format") != 1:
            raise UserError(f"{folder}: {MANIFEST} is not one that this tinyvl reads.", 2)
        for shard in manifest["shards"]:
            if stat(folder / shard["file"])[0] != shard["bytes"]:
                raise UserError(
                    f"{folder}: {shard['file']} is missing or not what was written; restore it, or "
                    "extract into another folder.",
                    2,
                )
        return cls(folder, manifest)

    def __len__(self) -> int:
        """How many rows there are."""
        return self.ends[-1] if self.ends else 0

    @property
    def entries(self) -> list[Entry]:
        """The pictures, in the order of extraction; ``error`` says which could not be read."""
        return list(self.index.by_path.values())

    def find(self, path: str, id: str | None = None) -> Entry | None:
        """The entry of a picture by absolute path, or else by the id its record has.

        None: it is not here, or the file has changed since.
        """
        return self.index.find(path, id or self.ids.get(path))

    def entries_of(self, pictures: Iterable[tuple[str, str]]) -> list[Entry]:
        """The entries of some (absolute path, id); `find` then knows them by the path alone.

        Raises:
            UserError: some are not here, or have changed.
        """
        pictures = list(pictures)
        self.ids |= pictures
        found = [self.find(path, id) for path, id in pictures]
        missing = [path for (path, _), entry in zip(pictures, found, strict=True) if entry is None]
        if missing:
            raise UserError(
                f"{self.folder}: {len(missing):,} of {len(pictures):,} pictures are not in these "
                f"features or have changed since, such as {missing[0]}; `tinyvl features DATA "
                f"--out {self.folder}` with the options of the first time adds them.",
                2,
            )
        return found

    def tokens(self, indices: Sequence[int]) -> Tensor:
        """Token maps of some rows: (n, S, D), in the type they are kept in; of these its part."""
        return self._rows("tokens", indices, self.part)

    def summaries(self, indices: Sequence[int]) -> list[Tensor]:
        """The summaries of some rows, a level each, lowest first: (n, D_level)."""
        names = [name for name in self.manifest["tensors"] if name != "tokens"]
        return [self._rows(name, indices) for name in names]

    def read(self, what: str, indices: Sequence[int]) -> Tensor:
        """What a method reads of some rows: "tokens" (n, S, D), or "summaries" in a row (n, ΣD)."""
        if what == "tokens":
            return self.tokens(indices)
        return torch.cat(self.summaries(indices), -1)

    def _rows(self, name: str, indices: Sequence[int], part: tuple[slice, ...] = ()) -> Tensor:
        if name not in self.manifest["tensors"]:
            raise UserError(f"{self.folder}: {name} are not kept there.", 2)
        shape, dtype = self.manifest["tensors"][name], DTYPES[self.manifest["dtype"]]
        shape = torch.empty(shape, device="meta")[part].shape
        out = torch.empty(len(indices), *shape, dtype=dtype)
        for i, index in enumerate(indices):
            file = bisect(self.ends, index)
            out[i] = self._map(file, name)[index - (self.ends[file - 1] if file else 0), *part]
        return out

    def _map(self, file: int, name: str) -> Tensor:
        if (file, name) not in self.mapped:
            path = self.folder / self.manifest["shards"][file]["file"]
            try:
                with safe_open(path, "pt") as shard:  # maps the file, and keeps no descriptor
                    self.mapped[file, name] = shard.get_tensor(name)
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path}: cannot be read ({error}).") from error
        return self.mapped[file, name]

    def check(self, model: Any) -> None:
        """Refuses a model whose encoder is not as it was: partly trained, or of another size."""
        if not model.fixed_pictures:
            raise UserError("--features is for an encoder that is wholly frozen; leave it out.", 2)
        theirs = self.manifest["transform"]
        ours = json.loads(json.dumps(model.encoder.data_config))
        for key in ours:
            if ours[key] != theirs.get(key):
                raise UserError(
                    f"{self.folder}: these pictures were prepared with {key} {theirs.get(key)}, "
                    f"and this model's encoder takes {key} {ours[key]}; it cannot read them.",
                    2,
                )


def open_store(folder: str | Path, vision: dict[str, Any], what: str = "tokens") -> FeatureStore:
    """The cache in a folder, if it is of this encoder and has ``what``: "tokens" or "summaries".

    Args:
        vision: the encoder's part of a checkpoint's ``config.json`` (`models.image_side`).

    Raises:
        UserError: as `FeatureStore.open`; or it is of another encoder, or has not ``what``.
    """
    store = FeatureStore.open(folder)
    theirs = store.manifest["encoder"]
    keys, lacks = ("sha256", "fit", "config", "modality", "frames"), False
    if what == "tokens":  # of which there may be more than are wanted
        below = [encoder.get("lower", 0) for encoder in (vision, theirs)]
        larger = [encoder.get("larger", 0) for encoder in (vision, theirs)]
        lacks = below[0] > below[1] or larger[0] not in (0, larger[1])
        cells = None if larger[0] else store.manifest.get("cells")
        widths = store.manifest.get("widths")
        store.part = slice(cells), slice(widths and sum(widths[: 1 + below[0]]))
    if lacks or any(theirs.get(key) != vision.get(key) for key in keys):
        raise UserError(
            f"{folder}: these are features of {described(theirs)}, and this model's encoder is "
            f"{described(vision)}; extract features with that one.",
            2,
        )
    if store.manifest["what"] not in (what, "both"):
        raise UserError(
            f"{folder}: there are {store.manifest['what']} only, and this model reads {what}; "
            f"extract with --what {what}.",
            2,
        )
    return store


def described(vision: dict[str, Any]) -> str:
    keys = ("fit", "modality", "frames", "lower", "larger")
    told = {key: vision[key] for key in keys if key in vision}
    about = ", ".join(f"{key} {value}" for key, value in told.items())
    return f"{vision['name']} (SHA-256 {vision['sha256'][:12]}…, {about})"


# ------------------------------------------------------------------------------- writing


def shard_name(number: int) -> str:
    return f"{number:05}.safetensors"


def room(head: dict[str, Any], rows: int) -> dict[str, Tensor]:
    """Memory for the tensors of a shard of so many rows."""
    dtype = DTYPES[head["dtype"]]
    return {name: torch.empty(rows, *shape, dtype=dtype) for name, shape in head["tensors"].items()}


def write_shard(
    folder: Path,
    number: int,
    head: dict[str, Any],
    entries: list[Entry],
    tensors: dict[str, Tensor],
) -> None:
    """One file, in one stroke: the tensors; the head and the entries in its header."""
    records = [astuple(entry)[:5] for entry in entries]
    # One key only: of several, safetensors writes the order in which a hash map has them.
    metadata = {"tinyvl": json.dumps({"head": head, "records": records})}

    files.replace_file(
        folder / shard_name(number), lambda part: write_safetensors(part, tensors, metadata)
    )


def write_safetensors(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """The bytes of `safetensors.torch.save_file`, of contiguous tensors of one dtype.

    That holds Python's lock while it writes, so that an encoder on the CPU would wait meanwhile.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(tensors):
            stream.write(tensors[name].view(torch.uint8).numpy())


def read_shards(folder: Path, head: dict[str, Any]) -> tuple[list[dict], list[Entry]]:
    """The shards that are there, and their entries with the rows they have.

    Raises:
        UserError: a shard is missing, or they are not of this ``head``.
    """
    shards, entries, row = [], [], 0
    for number, file in enumerate(sorted(folder.glob("*.safetensors"))):
        try:
            with safe_open(file, "pt") as shard:
                found = json.loads(shard.metadata()["tinyvl"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{file}: this is no shard of features; extract into another folder.", 2
            ) from error
        if file.name != shard_name(number):
            raise UserError(
                f"{folder}: {shard_name(number)} is missing; restore it, or extract into another "
                "folder.",
                2,
            )
        refuse_change(folder, found["head"], head)
        first = row
        for record in found["records"]:
            entry = Entry(*record)
            if entry.error is None:
                entry.row, row = row, row + 1
            entries.append(entry)
        shards.append({"file": file.name, "rows": row - first, "bytes": file.stat().st_size})
    return shards, entries


def refuse_change(folder: Path, before: dict[str, Any], head: dict[str, Any]) -> None:
    """One folder has features of one kind."""
    key = next((key for key in head if before.get(key) != head[key]), None)
    if key is None:
        return
    was, now = f"{key} {before.get(key)}", f"{key} {head[key]}"
    if key == "encoder":
        was, now = described(before[key]), described(head[key])
        now = f"another configuration of {now}" if now == was else now
    raise UserError(
        f"{folder}: there are features of {was}, not of {now}; choose another --out.", 2
    )


def write_manifest(folder: Path, head: dict[str, Any]) -> None:
    """The manifest, a record a line, of the shards that are there."""
    shards, entries = read_shards(folder, head)
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    lines.append(f' "shards": {json.dumps(shards)}')
    lines.append(f' "columns": {json.dumps(COLUMNS)}')
    records = ",\n".join(f"  {json.dumps(astuple(entry))}" for entry in entries)
    lines.append(f' "records": [\n{records}\n ]')
    files.write_text(folder / MANIFEST, "{\n" + ",\n".join(lines) + "\n}\n")
