"""The feature cache: what an encoder makes of each picture, computed once and kept on disk.

A folder of shards (`store`): ``tokens`` (n, S, D) and ``summaries.00`` (n, D_level), ..., lowest
level first. Its head, ``manifest.json``, says which encoder made what, and the row of each picture.
`extract` fills it: worker processes decode while the encoder computes (`features_encode`).
`FeatureStore` reads it.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import astuple
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tinyvl import UserError, files, hub, models, ranks, store
from tinyvl.device import PRECISIONS, precision_name
from tinyvl.encoders import Encoder, ImageEncoder
from tinyvl.features_encode import encode, parts_of, percept, weight
from tinyvl.models_build import build_encoder
from tinyvl.presets import Run
from tinyvl.progress import bar, say, skip
from tinyvl.store import Entry, Known, Shards
from tinyvl.train_run import Interrupted

if TYPE_CHECKING:
    from PIL.Image import Image

MANIFEST = "manifest.json"
HEAD = {"encoder": dict, "transform": dict, "tensors": dict, "shards": list, "records": list}
HEAD |= {"what": str, "dtype": str}
WHAT = ("tokens", "summaries", "both")
SHARD_BYTES = 2**26  # of a shard: twice that is held in memory
SHARD_ROWS = 512  # a kill costs at most a shard, so that it is soon done where rows are small too
BLOCK = 32  # pictures encoded together; a shard has a whole number of blocks
Pairs = Iterable[tuple[str, str]]  # absolute paths and ids of pictures

# ----------------------------------------------------------------------------------- reading


class FeatureStore(Shards):
    """A finished cache."""

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        with store.sound(folder, "manifest"):
            super().__init__(folder, manifest, PRECISIONS[manifest["dtype"]])
            self.known = Known(Entry(*record) for record in manifest["records"])
            if not all(e.row is None or 0 <= e.row < len(self) for e in self.entries):
                raise ValueError("a record's row is not there")
        self.manifest = manifest
        self.part = slice(None), slice(None)  # of the tokens: which, and which of their numbers
        self.ids: dict[str, str] = {}  # of the paths that were asked for by their records

    @classmethod
    def open(cls, folder: str | Path) -> "FeatureStore":
        """Raises UserError: no cache is there, it is unfinished, damaged, or of a later format."""
        folder = Path(folder)
        manifest = store.read_head(folder / MANIFEST, "features", HEAD, 2)
        if manifest is None:
            advice = "no features there; `tinyvl features DATA --out DIR` makes them"
            if any(folder.glob("*.safetensors")):
                advice = "this extraction did not finish; run the same `tinyvl features` again"
            raise UserError(f"{folder}: {advice}.", 2)
        return cls(folder, manifest)

    @property
    def entries(self) -> list[Entry]:
        """The pictures, in the order of extraction."""
        return list(self.known.by_path.values())

    def find(self, path: str, id: str | None = None) -> Entry | None:
        """A picture's entry by absolute path, else by id; None: not here, or changed since."""
        return self.known.find(path, id or self.ids.get(path))

    def entries_of(self, pictures: Pairs) -> list[Entry]:
        """The entries of some (absolute path, id); `find` then knows them by the path alone.

        Raises UserError: some are not here, or have changed.
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
        """Token maps of some rows: (n, S, D), in the dtype on disk."""
        return self.rows("tokens", indices, self.part)

    def summaries(self, indices: Sequence[int]) -> list[Tensor]:
        """The summaries of some rows, a level each, lowest first: (n, D_level)."""
        return [self.rows(name, indices) for name in self.tensors if name != "tokens"]

    def read(self, what: str, indices: Sequence[int]) -> Tensor:
        """What a method reads of some rows: "tokens" (n, S, D), or "summaries" joined (n, ΣD)."""
        return self.tokens(indices) if what == "tokens" else torch.cat(self.summaries(indices), -1)

    def check(self, model: Any) -> None:
        """Raises UserError: the model's encoder is not as it was: partly trained, or resized."""
        if not model.fixed_pictures:
            raise UserError("--features is for an encoder that is wholly frozen; leave it out.", 2)
        theirs = self.manifest["transform"]
        for key, value in json.loads(json.dumps(model.encoder.data_config)).items():
            if value != theirs.get(key):
                was = f"these pictures were prepared with {key} {theirs.get(key)}"
                now = f"this model's encoder takes {key} {value}; it cannot read them"
                raise UserError(f"{self.folder}: {was}, and {now}.", 2)


def open_store(
    folder: str | Path, vision: dict[str, Any], what: str = "tokens", pictures: Pairs = ()
) -> FeatureStore:
    """The cache in a folder, checked before a model is loaded, which may take a while.

    ``vision`` is the encoder's part of the model's ``config.json`` (`models.Checkpoint.image`), and
    ``what`` is what the model reads of it, "tokens" or "summaries".

    Raises UserError: as `FeatureStore.open`; it is of another encoder, or lacks ``what`` or some of
    the ``pictures``.
    """
    found = FeatureStore.open(folder)
    theirs = found.manifest["encoder"]
    keys, lacks = ("sha256", "fit", "config", "modality", "frames"), False
    if what == "tokens":  # there may be more of them than are wanted
        lower, larger = vision.get("lower", 0), vision.get("larger", 0)
        lacks = lower > theirs.get("lower", 0) or larger not in (0, theirs.get("larger", 0))
        cells, widths = found.manifest.get("cells"), found.manifest.get("widths")
        found.part = slice(None if larger else cells), slice(widths and sum(widths[: 1 + lower]))
    else:
        keys += ("projected",)
    if lacks or any(theirs.get(key) != vision.get(key) for key in keys):
        advice = f"this model's encoder is {described(vision)}; extract features with that one"
        raise UserError(f"{folder}: these are features of {described(theirs)}, and {advice}.", 2)
    if found.manifest["what"] not in (what, "both"):
        advice = f"and this model reads {what}; extract with --what {what}"
        raise UserError(f"{folder}: there are {found.manifest['what']} only, {advice}.", 2)
    found.entries_of(pictures)
    return found


def described(vision: dict[str, Any]) -> str:
    keys = ("fit", "modality", "frames", "lower", "larger", "projected")
    about = ", ".join(f"{key} {vision[key]}" for key in keys if key in vision)
    return f"{vision['name']} (SHA-256 {vision['sha256'][:12]}…, {about})"


# ----------------------------------------------------------------------------------- encoding


def load_encoder(
    name: str, fit: str, *, device: torch.device, precision: torch.dtype,
    media: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], Encoder]:  # fmt: skip
    """An encoder by name or folder, and its description as in a checkpoint's ``config.json``."""
    extra = media or {}
    folder = hub.fetch(name, models.role_of("vision", extra))
    vision = {"name": name, "sha256": hub.fingerprint(folder), "fit": fit, **extra}
    vision["config"] = files.read_object(folder / "config.json")
    encoder = build_encoder(vision, folder)
    if isinstance(encoder, ImageEncoder):
        encoder.fold()
    encoder.to(device)
    encoder.model.to(precision)  # pictures are still normalised in float32
    encoder.pack()
    return vision, encoder


def contents(
    vision: dict[str, Any], encoder: Encoder, *, what: str = "both", dtype: str = "fp16"
) -> dict[str, Any]:
    """What decides the numbers in a cache: the head of its manifest and of all its shards.

    ``vision`` is as `load_encoder` gives it. Raises UserError: ``what`` is not one of `WHAT`, or
    ``dtype``, on disk, not one of `PRECISIONS`.
    """
    if what not in WHAT:
        raise UserError(f"--what is one of {', '.join(WHAT)}, not {what!r}.", 2)
    if dtype not in PRECISIONS:
        raise UserError(f"--dtype is one of {', '.join(PRECISIONS)}, not {dtype!r}.", 2)
    parts = parts_of(percept(encoder, encoder.probe()), what)
    head = {
        "format": 1,
        "encoder": vision,
        "transform": encoder.data_config,
        "precision": precision_name(weight(encoder).dtype),
        "what": what,
        "dtype": dtype,
        "tensors": {name: list(part.shape[1:]) for name, part in parts.items()},
    }
    if what != "summaries" and encoder.below:
        head["widths"] = [encoder.width, *encoder.below]
    if what != "summaries" and encoder.larger:  # how many tokens are of the encoder's own size
        with torch.no_grad():
            alone = encoder.look(encoder.probe().to(weight(encoder).device))
        head["cells"] = alone.tokens.shape[1]
    return json.loads(json.dumps(head))


# ----------------------------------------------------------------------------------- writing


def extract(
    folder: Path, pictures: Pairs, encoder: Encoder, head: dict[str, Any], run: Run, *,
    transform: "Callable[[Image], Tensor] | None" = None, batch: int = BLOCK,
    title: str = "extracting features",
    advice: str = "choose another --out, --what summaries, or fewer pictures",
) -> dict[str, Any]:  # fmt: skip
    """Adds to a folder the features of those pictures that it lacks; ``head`` is from `contents`.

    Killed at any moment and called again, it ends with the same bytes. Pictures that cannot be
    read are named and remembered: they are tried again when their file changes. Of several
    processes each makes every so manieth shard, and the first gives them their names.

    Returns how many pictures were "extracted", "kept" and "failed", and the folder's "bytes".
    Raises UserError: the folder has features of another kind, or no room (then do as ``advice``
    says); or a signal has asked ``run`` to stop.
    """
    check = partial(refuse_change, folder, head)
    row = sum(torch.Size(shape).numel() for shape in head["tensors"].values())
    row *= PRECISIONS[head["dtype"]].itemsize  # bytes

    def start() -> tuple[int, list[Entry], int, int]:
        shards, entries = store.read_shards(folder, check)
        todo, kept, failed = Known(entries).compare(pictures)
        need, free = len(todo) * (row + 300), shutil.disk_usage(folder).free
        takes = f"the features of {len(todo):,} pictures take {need / 1e9:,.2f} GB"
        left = f"{free / 1e9:,.2f} GB are free"
        if need > 0.9 * free:
            raise UserError(f"{folder}: {takes}, and {left} on that disk; {advice}.", 2)
        say(f"{takes} in {folder} ({left})", quiet=run.quiet or not todo)
        for error in failed:
            skip(error)
        return len(shards), todo, kept, len(failed)

    def finish() -> int:
        if todo or not (folder / MANIFEST).exists():
            shards, entries = store.read_shards(folder, check)
            records = [astuple(entry) for entry in entries]
            found = head | {"shards": shards, "columns": Entry.__slots__, "records": records}
            files.write_text(folder / MANIFEST, json.dumps(found) + "\n")
        return sum(file.stat().st_size for file in folder.iterdir())

    busy = "another extraction is at work there"
    with store.writing(folder, busy) if ranks.first() else nullcontext():
        first, todo, kept, failed = ranks.told(start)
        if todo:
            rows = max(BLOCK, min(SHARD_ROWS, SHARD_BYTES // row) // BLOCK * BLOCK)
            whole = [todo[i : i + rows] for i in range(0, len(todo), rows)]
            chunks = [[c[i : i + batch] for i in range(0, len(c), batch)] for c in whole]
            blocks = [block for chunk in chunks[ranks.rank() :: ranks.size()] for block in chunk]
            own = sum(map(len, blocks))
            encoded = encode(blocks, encoder, head, transform or encoder.view(), run.workers)
            with closing(encoded), bar(title, own, run.quiet) as done:
                save(folder, first, chunks, encoded, head, run, done)
        bad = ranks.total(sum(entry.error is not None for entry in todo))
        size = ranks.told(finish)
    good = len(todo) - bad
    return {"extracted": good, "kept": kept, "failed": failed + bad, "bytes": size}


def save(
    folder: Path, first: int, chunks: list[list[list[Entry]]], encoded: Iterator[tuple],
    head: dict[str, Any], run: Run, advance: Callable[[int], None],
) -> None:  # fmt: skip
    """Writes a shard for each of ``chunks``, which are some blocks each, from ``first`` on.

    ``encoded`` are the blocks of this process's chunks: one in each round of all processes.
    """
    # One page is filled while the other is written: on a CPU new memory for each shard costs a
    # twentieth of the time. And all of torch's work stays in this thread: in another it would
    # start OpenMP threads of its own, and with more of these than cores the encoder would be a
    # fifth slower from then on.
    rows, dtype, several = sum(map(len, chunks[0])), PRECISIONS[head["dtype"]], ranks.size() > 1
    pages = [
        {name: torch.empty(rows, *shape, dtype=dtype) for name, shape in head["tensors"].items()}
        for _ in range(2)
    ]
    writing: Future | None = None
    written: range | None = None  # the shards of the round that is being written
    with ThreadPoolExecutor(1) as writer:
        for start in range(0, len(chunks), ranks.size()):
            page, filled = pages[start // ranks.size() % 2], 0
            chunk = chunks[start + ranks.rank() :][:1]
            for block, parts, copied in islice(encoded, len(chunk[0]) if chunk else 0):
                if copied is not None:
                    copied.synchronize()
                filled = store.put(page, parts, block, filled)
                for entry in block:
                    if entry.error:
                        skip(entry.error, own=True)
                advance(len(block))
                if run.stop:
                    raise Interrupted
            settle(folder, writing, written)
            written = range(first + start, first + min(start + ranks.size(), len(chunks)))
            if not chunk:
                writing = None
                continue
            shard = {name: tensor[:filled] for name, tensor in page.items()}
            name = (store.WAITING if several else store.SHARD).format(written[ranks.rank()])
            entries = [entry for block in chunk[0] for entry in block]
            writing = writer.submit(store.write_shard, folder / name, head, entries, shard)
        settle(folder, writing, written)


def settle(folder: Path, writing: Future | None, written: range | None) -> None:
    """Waits for the shards of a round; those of several processes then get their names, in order.

    So a kill leaves no gap.
    """
    if writing:
        writing.result()
    if written is None or ranks.size() == 1:
        return
    ranks.wait()
    for number in written if ranks.first() else ():
        os.replace(folder / store.WAITING.format(number), folder / store.SHARD.format(number))


def refuse_change(folder: Path, head: dict[str, Any], before: dict[str, Any]) -> None:
    """Raises UserError: a shard's head, ``before``, is not ``head``: a folder has one kind."""
    key = next((key for key in head if before.get(key) != head[key]), None)
    if key is None:
        return
    was, now = f"{key} {before.get(key)}", f"{key} {head[key]}"
    if key == "encoder":
        was, now = described(before[key]), described(head[key])
        now = f"another configuration of {now}" if now == was else now
    what = f"there are features of {was}, not of {now}"
    raise UserError(f"{folder}: {what}; choose another --out.", 2)
