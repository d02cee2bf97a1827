"""Pictures through a frozen encoder, block by block, as the tensors that a feature cache keeps."""

from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tinyvl import media_workers
from tinyvl.device import PRECISIONS, Pieces
from tinyvl.encoders import Encoder, Percept
from tinyvl.store import Entry

if TYPE_CHECKING:
    from PIL.Image import Image


def parts_of(percept: Percept, what: str) -> dict[str, Tensor]:
    """A percept as the tensors of a shard."""
    parts = {"tokens": percept.tokens} if what != "summaries" else {}
    if what != "tokens":
        parts |= {f"summaries.{i:02}": level for i, level in enumerate(percept.summaries)}
    return parts


def weight(encoder: Encoder) -> Tensor:
    """One of its weights: they share a device and a dtype."""
    return next(encoder.model.parameters())


def percept(encoder: Encoder, pictures: Tensor, pieces: Pieces | None = None) -> Percept:
    """Decoded pictures (B, 3, H, W) through the encoder, cut up where they do not fit."""
    device, precision = weight(encoder).device, weight(encoder).dtype
    half = precision != torch.float32

    def attempt(number: int) -> Percept:
        with torch.no_grad(), torch.autocast(device.type, precision) if half else nullcontext():
            parts = [encoder(p.to(device, non_blocking=True)) for p in pictures.chunk(number)]
        return parts[0] if len(parts) == 1 else Percept.join(parts)

    return (pieces or Pieces()).run(attempt, len(pictures))


def encode(
    blocks: list[list[Entry]], encoder: Encoder, head: dict[str, Any],
    transform: "Callable[[Image], Tensor]", workers: int | None,
) -> Iterator[tuple[list[Entry], dict[str, Tensor], "torch.cuda.Event | None"]]:  # fmt: skip
    """Blocks, the tensors of their good pictures, and the event at which a GPU has copied them.

    Notes the errors of pictures that cannot be read. From a GPU the tensors come in the cache's
    dtype, on a CPU as the encoder gave them; and one block late: a GPU computes the next one while
    they are copied and kept.
    """
    device, dtype = weight(encoder).device, PRECISIONS[head["dtype"]]
    gpu, pieces = device.type == "cuda", Pieces()
    largest = max(map(len, blocks), default=0)
    decoded = media_workers.decode_images(
        (entry.path for block in blocks for entry in block),
        transform,
        target=encoder.size,
        workers=workers,
        # Far ahead of a GPU; on a CPU that would take cores from the encoder's threads.
        lookahead=max(64, 2 * largest) if gpu else 4 * media_workers.cores(),
    )
    late = None
    with closing(decoded):
        for block in blocks:
            good, parts, copied = [], {}, None
            for entry, (_, picture) in zip(block, islice(decoded, len(block)), strict=True):
                if isinstance(picture, Tensor):
                    good.append((entry, picture))
                else:
                    entry.error = str(picture)
            if good:
                parts = encoded_parts(good, encoder, head, pieces)
            if parts and gpu:  # fewer bytes to copy; on a CPU the page makes them ``dtype``
                for name, part in parts.items():
                    parts[name] = part.to(dtype).contiguous().to("cpu", non_blocking=True)
                copied = torch.cuda.current_stream(device).record_event()
            if late:
                yield late
            late = block, parts, copied
        if late:
            yield late


def encoded_parts(
    good: list[tuple[Entry, Tensor]], encoder: Encoder, head: dict[str, Any], pieces: Pieces
) -> dict[str, Tensor]:
    """The tensors of decoded pictures, in order; those of one shape are encoded together.

    Notes an error where a picture among videos has fewer tokens than they.
    """
    gpu, found = weight(encoder).device.type == "cuda", []
    rows: list[int] = []
    for shape in dict.fromkeys(picture.shape for _, picture in good):
        own = [row for row, (_, picture) in enumerate(good) if picture.shape == shape]
        pictures = torch.stack([good[row][1] for row in own])
        seen = percept(encoder, pictures.pin_memory() if gpu else pictures, pieces)
        parts = parts_of(seen, head["what"])
        if any(list(part.shape[1:]) != head["tensors"][name] for name, part in parts.items()):
            for entry in (good[row][0] for row in own):
                entry.error = f"{entry.path}: is no video, and gives other tokens; keep summaries"
            continue
        rows, found = rows + own, [*found, parts]
    if len(found) < 2:
        return found[0] if found else {}
    order = torch.tensor(rows).argsort()
    return {name: torch.cat([parts[name] for parts in found])[order] for name in found[0]}
