"""Pictures into a feature cache: decoded in worker processes while the encoder computes."""

import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tinyvl import UserError, hub, media, models
from tinyvl.device import precision_name
from tinyvl.encoders import Percept
from tinyvl.encoders_av import Encoder, build_encoder
from tinyvl.features import (
    DTYPES,
    MANIFEST,
    Entry,
    Index,
    read_shards,
    room,
    stat,
    write_manifest,
    write_shard,
)
from tinyvl.files import locked
from tinyvl.presets import Run
from tinyvl.progress import bar, say
from tinyvl.train_run import Interrupted

if TYPE_CHECKING:
    from PIL.Image import Image

WHAT = ("tokens", "summaries", "both")
SHARD_BYTES = 2**26  # of a shard: twice that is held in memory
SHARD_ROWS = 512  # a kill costs at most a shard, so that it is soon done where rows are small too
BLOCK = 32  # pictures encoded together; a shard has a whole number of blocks


def load_encoder(
    name: str,
    fit: str,
    *,
    device: torch.device,
    precision: torch.dtype,
    media: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], Encoder]:
    """An encoder by name or folder, and its description as in a checkpoint's ``config.json``."""
    told = media or {}
    folder = hub.fetch(name, models.role_of("vision", told))
    config = json.loads((folder / "config.json").read_text())
    vision = {"name": name, "sha256": hub.fingerprint(folder), "config": config, "fit": fit}
    vision |= told
    encoder = build_encoder(vision, folder).to(device)
    encoder.model.to(precision)  # pictures are still normalised in float32
    return vision, encoder


def contents(
    vision: dict[str, Any], encoder: Encoder, *, what: str = "both", dtype: str = "fp16"
) -> dict[str, Any]:
    """What decides the numbers in a cache: the head of its manifest and of all its shards.

    Args:
        vision: name, sha256, config, fit, ... as in a checkpoint's ``config.json``.
        what: "tokens", "summaries" or "both".
        dtype: in which they are kept, "fp16" or "bf16".
    """
    if what not in WHAT:
        raise UserError(f"--what is one of {', '.join(WHAT)}, not {what!r}.", 2)
    if dtype not in DTYPES:
        raise UserError(f"--dtype is one of {', '.join(DTYPES)}, not {dtype!r}.", 2)
    parts = parts_of(percept(encoder, encoder.probe()), what)
    head = {
        "format": 1,
        "encoder": vision,
        "transform": encoder.data_config,
        "precision": precision_name(precision_of(encoder)),
        "what": what,
        "dtype": dtype,
        "tensors": {name: list(part.shape[1:]) for name, part in parts.items()},
    }
    if what != "summaries" and encoder.below:
        head["widths"] = [encoder.width, *encoder.below]
    if what != "summaries" and encoder.larger:  # how many tokens are of the encoder's own size
        with torch.no_grad():
            alone = encoder.look(encoder.probe().to(device_of(encoder)))
        head["cells"] = alone.tokens.shape[1]
    return json.loads(json.dumps(head))


def parts_of(percept: Percept, what: str) -> dict[str, Tensor]:
    """A percept as the tensors of a shard."""
    parts = {"tokens": percept.tokens} if what != "summaries" else {}
    if what != "tokens":
        parts |= {f"summaries.{i:02}": level for i, level in enumerate(percept.summaries)}
    return parts


def precision_of(encoder: Encoder) -> torch.dtype:
    return next(encoder.model.parameters()).dtype


def device_of(encoder: Encoder) -> torch.device:
    return next(encoder.model.parameters()).device


def percept(encoder: Encoder, pictures: Tensor) -> Percept:
    """Decoded pictures (B, 3, H, W) through the encoder; a batch that does not fit is halved."""
    device, precision = device_of(encoder), precision_of(encoder)
    half = precision != torch.float32
    try:
        with torch.no_grad(), torch.autocast(device.type, precision) if half else nullcontext():
            return encoder(pictures.to(device, non_blocking=True))
    except torch.OutOfMemoryError:
        if len(pictures) == 1:
            raise UserError(
                "One picture does not fit in this device's memory; use --device cpu."
            ) from None
    torch.cuda.empty_cache()
    return Percept.join([percept(encoder, part) for part in pictures.chunk(2)])


def encode(
    decoded: Iterator[tuple[str, Tensor | media.MediaError]],
    sizes: Iterable[int],
    encoder: Encoder,
    what: str,
    dtype: torch.dtype,
) -> Iterator[tuple[list[str | None], dict[str, Tensor]]]:
    """Blocks of decoded pictures: what is wrong with each, and the tensors of the good ones.

    From a GPU the tensors come in ``dtype``, on a CPU as the encoder gave them.
    The results come one block late: a GPU computes the next one while they are copied and kept.
    """
    device = device_of(encoder)
    gpu = device.type == "cuda"
    late: tuple[list[str | None], dict[str, Tensor], Any] | None = None
    for size in sizes:
        found = [picture for _, picture in islice(decoded, size)]
        errors = [None if isinstance(picture, Tensor) else str(picture) for picture in found]
        good = [picture for picture in found if isinstance(picture, Tensor)]
        parts, done = {}, None
        if good:
            pictures = torch.stack(good)
            seen = percept(encoder, pictures.pin_memory() if gpu else pictures)
            parts = parts_of(seen, what)
            if gpu:  # half the bytes to copy; on a CPU they become ``dtype`` as they are kept
                parts = {
                    name: part.to(dtype).contiguous().to("cpu", non_blocking=True)
                    for name, part in parts.items()
                }
                done = torch.cuda.current_stream(device).record_event()
        if late:
            yield settled(late)
        late = errors, parts, done
    if late:
        yield settled(late)


def settled(late: tuple[list[str | None], dict[str, Tensor], Any]) -> tuple[list, dict]:
    """A block whose copies from the GPU are complete."""
    errors, parts, done = late
    if done is not None:
        done.synchronize()
    return errors, parts


def extract(
    folder: Path,
    pictures: Iterable[tuple[str, str]],
    encoder: Encoder,
    head: dict[str, Any],
    run: Run,
    *,
    transform: "Callable[[Image], Tensor] | None" = None,
    batch: int = BLOCK,
    title: str = "extracting features",
    advice: str = "choose another --out, --what summaries, or fewer pictures",
) -> dict[str, Any]:
    """Adds to a folder the features of those pictures, (absolute path, id), that it lacks.

    Killed at any moment and called again, it ends with the same bytes. Pictures that cannot be
    read are named and kept in mind: they are tried again when their file changes.

    Args:
        head: what `contents` gave.
        run: workers, whether to be quiet, and the signals that ask for the end.
        transform: in place of the encoder's own.
        batch: pictures in the encoder at once.
        advice: what to do where the disk has no room.

    Returns:
        how many pictures were "extracted", "kept" and "failed", and the folder's "bytes".

    Raises:
        UserError: the folder has features of another kind, or no room.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}).", 2) from error
    with locked(folder, "another extraction is at work there"):
        for part in folder.glob(".*.*.*"):  # a file that a kill left half written
            part.unlink()
        shards, known = read_shards(folder, head)
        index, todo, failed, kept = Index(known), [], [], 0
        for path, id in dict.fromkeys(pictures):
            entry = index.find(path, id)
            if entry is None:
                entry = Entry(path, id, *stat(path))
                todo.append(entry)
                index.add(entry)
            elif entry.row is not None:
                kept += 1
            elif entry.error:
                failed.append(entry.error)
        row = sum(torch.Size(shape).numel() for shape in head["tensors"].values())
        row *= DTYPES[head["dtype"]].itemsize  # bytes
        check_room(folder, len(todo), len(todo) * (row + 300), run, advice)
        for error in failed:
            print(f"tinyvl: skipping {error}", file=sys.stderr)
        rows = max(BLOCK, min(SHARD_ROWS, SHARD_BYTES // row) // BLOCK * BLOCK)
        chunks = [todo[i : i + rows] for i in range(0, len(todo), rows)]
        blocks = [[c[i : i + batch] for i in range(0, len(c), batch)] for c in chunks]
        gpu = device_of(encoder).type == "cuda"
        decoded = media.decode_images(
            (entry.path for entry in todo),
            transform or encoder.view(),
            target=encoder.size,
            workers=run.workers,
            # Far ahead of a GPU; on a CPU that would take cores from the encoder's threads.
            lookahead=max(64, 2 * batch) if gpu else 4 * media.cores(),
        )
        sizes = (len(block) for chunk in blocks for block in chunk)
        encoded = encode(decoded, sizes, encoder, head["what"], DTYPES[head["dtype"]])
        writing: Future | None = None
        # One is filled while the other is written: on a CPU new memory for each shard costs a
        # twentieth of the time. And all of torch's work stays in this thread: in another it would
        # start OpenMP threads of its own, and with more of these than cores the encoder would be
        # a fifth slower from then on.
        pages = [room(head, min(rows, len(todo))) for _ in range(2)]
        with (
            closing(decoded),
            ThreadPoolExecutor(1) as writer,
            bar(title, len(todo), run.quiet) as advance,
        ):
            for number, chunk in enumerate(blocks, start=len(shards)):
                page, filled = pages[number % 2], 0
                for block in chunk:
                    errors, parts = next(encoded)
                    for name, part in parts.items():
                        page[name][filled : filled + len(part)] = part
                    filled += errors.count(None)
                    for entry, error in zip(block, errors, strict=True):
                        if error:
                            entry.error = error
                            failed.append(error)
                            print(f"tinyvl: skipping {error}", file=sys.stderr)
                    advance(len(block))
                    if run.stop:
                        raise Interrupted
                if writing:
                    writing.result()
                entries = [entry for block in chunk for entry in block]
                shard = {name: tensor[:filled] for name, tensor in page.items()}
                writing = writer.submit(write_shard, folder, number, head, entries, shard)
            if writing:
                writing.result()
        if todo or not (folder / MANIFEST).exists():
            write_manifest(folder, head)
    return {
        "extracted": sum(entry.error is None for entry in todo),
        "kept": kept,
        "failed": len(failed),
        "bytes": sum(file.stat().st_size for file in folder.iterdir()),
    }


def check_room(folder: Path, count: int, need: int, run: Run, advice: str) -> None:
    """Says how much disk a job takes, and refuses what does not fit."""
    free = shutil.disk_usage(folder).free
    takes, left = f"{need / 1e9:,.2f} GB", f"{free / 1e9:,.2f} GB"
    if need > 0.9 * free:
        raise UserError(
            f"{folder}: the features of {count:,} pictures take {takes}, and {left} are free on "
            f"that disk; {advice}.",
            2,
        )
    if count:
        say(
            f"the features of {count:,} pictures take {takes} in {folder} ({left} are free)",
            run.quiet,
        )
