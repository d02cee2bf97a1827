"""What a training run reads: records, caption ids, pictures or their cached tokens, batches."""

import math
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tinyvl import UserError, data, media
from tinyvl.captioner import Batch, Captioner, collate
from tinyvl.job import Interrupted, Job, Run, bar


def load_records(job: Job) -> tuple[list[data.Record], list[data.Record]]:
    """Records to train on and to validate on, by the data's own split or a held-out 2 %."""

    def read(path: str, split: str) -> list[data.Record]:
        records = data.read(path, format=job.format, images=job.images, lang=job.lang)
        if any(r.split for r in records):
            wanted = {"train", "restval"} if split == "train" else {split}
            if path == job.val and not any(r.split in wanted for r in records):
                wanted = {r.split for r in records}  # a file of its own is taken whole
            records = [r for r in records if r.split in wanted]
        return [r for r in records if r.captions and r.image]

    train, val = read(job.data, "train"), read(job.val or job.data, "val")
    if not train:
        raise UserError(f"{job.data}: no picture with a caption to train on.", 2)
    if not job.val and (not val or val == train):  # no validation part of its own
        train, val = data.hold_out(train, seed=job.seed)
    if job.limit:
        train = [train[i] for i in sorted(data.epoch_order(len(train), job.seed, 0)[: job.limit])]
    return train, val


@dataclass
class Group:
    """Captions of one picture that are read together: its keys and values serve them all."""

    record: int
    captions: list[list[int]]


def groups_of(tokens: list[list[list[int]]], per_image: int) -> list[Group]:
    """The captions of each record, sorted by length and cut into groups of at most per_image."""
    groups = []
    for i, captions in enumerate(tokens):
        captions = sorted(captions, key=len)
        groups += [
            Group(i, captions[j : j + per_image]) for j in range(0, len(captions), per_image)
        ]
    return groups


class Pictures:
    """Pictures of a list of records, as uint8 tensors or as cached encoder tokens.

    The cache is one fp16 array on disk beside a column of flags, filled once, in order, and
    continued after a kill. The operating system keeps in memory what fits.
    """

    def __init__(self, records: list[data.Record], model: Captioner, run: Run, name: str):
        self.paths = [r.image for r in records]
        self.transform, self.size = model.encoder.transform(), model.encoder.size
        self.run, self.store, self.bad = run, None, set()
        if not run.cache:
            return
        probe = torch.zeros(1, 3, self.size, self.size, dtype=torch.uint8, device=run.device)
        with torch.no_grad(), model.autocast():
            shape = (len(records), *model.encoder(probe).tokens.shape[1:])
        folder = run.out / "features"
        folder.mkdir(parents=True, exist_ok=True)
        file, flags = folder / f"{name}.f16", folder / f"{name}.done"
        need = math.prod(shape) * 2 - (file.stat().st_size if file.exists() else 0)
        if need > shutil.disk_usage(folder).free * 0.9:
            raise UserError(
                f"{folder}: encoded pictures would take {need / 2**30:.1f} GiB, which does not "
                "fit on this disk; use --no-cache to encode them anew each time.",
                2,
            )
        mode = "r+" if file.exists() and file.stat().st_size == math.prod(shape) * 2 else "w+"
        self.store = np.memmap(file, np.float16, mode, shape=shape)
        self.done = np.memmap(flags, np.uint8, mode if flags.exists() else "w+", shape=shape[:1])
        self._fill(model, name)

    def _fill(self, model: Captioner, name: str) -> None:
        """Encodes blocks of 32 that are not yet whole: the same blocks however often killed."""
        blocks = [range(i, min(i + 32, len(self.done))) for i in range(0, len(self.done), 32)]
        blocks = [block for block in blocks if not self.done[block.start : block.stop].all()]
        decoded = media.decode_images(
            (self.paths[i] for block in blocks for i in block),
            self.transform,
            target=self.size,
            workers=self.run.workers,
        )
        with bar(f"encoding {name} pictures", sum(map(len, blocks)), self.run) as advance:
            for block in blocks:
                found = {i: next(decoded)[1] for i in block}
                good = [i for i in block if not isinstance(found[i], Exception)]
                if good:
                    with torch.no_grad(), model.autocast():
                        stacked = torch.stack([found[i] for i in good]).to(model.device)
                        tokens = model.encoder(stacked).tokens
                    self.store[good] = tokens.half().cpu().numpy()
                for i in block:
                    if i not in good:
                        print(f"tinyvl: skipping {found[i]}", file=sys.stderr)
                    self.done[i] = 1 if i in good else 2
                advance(len(block))
                if self.run.stop:
                    raise Interrupted
        self.bad = set(np.flatnonzero(self.done == 2).tolist())

    def stream(self, wanted: Iterator[list[int]]) -> Iterator[list[Tensor | media.MediaError]]:
        """For each list of records their pictures, in that order."""
        if self.store is not None:
            for indices in wanted:
                yield list(torch.from_numpy(self.store[indices]))
            return
        lists: list[list[int]] = []

        def paths() -> Iterator[str]:
            for indices in wanted:
                lists.append(indices)
                yield from (self.paths[i] for i in indices)

        found: list[Tensor | media.MediaError] = []
        for _, picture in media.decode_images(
            paths(), self.transform, target=self.size, workers=self.run.workers
        ):
            found.append(picture)
            if len(found) == len(lists[0]):
                yield found
                lists.pop(0)
                found = []


def prepare(records: list[data.Record], model: Captioner, job: Job) -> list[list[list[int]]]:
    """Caption ids of each record, cut to max_tokens and to the decoder's positions."""
    longest = min(job.max_tokens, model.room - 1)
    lead = " " if model.prompt else ""  # a prompt ends in a word
    flat = model.text.encode([lead + data.tidy(c) for r in records for c in r.captions])
    ids = iter(flat)
    return [[next(ids)[:longest] for _ in r.captions] for r in records]


def batches(
    groups: list[Group],
    order: list[list[int]],
    pictures: Pictures,
    model: Captioner,
) -> Iterator[Batch | None]:
    """Micro-batches of the groups that each list of ``order`` names; None: all unreadable."""
    wanted = ([groups[g].record for g in micro] for micro in order)
    for micro, seen in zip(order, pictures.stream(wanted), strict=True):
        good = [(g, p) for g, p in zip(micro, seen, strict=True) if isinstance(p, Tensor)]
        for broken in (p for p in seen if not isinstance(p, Tensor)):
            print(f"tinyvl: skipping {broken}", file=sys.stderr)
        if not good:
            yield None  # keeps its place, so that a resumed run counts the same
            continue
        captions = [c for g, _ in good for c in groups[g].captions]
        rows = [row for row, (g, _) in enumerate(good) for _ in groups[g].captions]
        seen = torch.stack([p for _, p in good])
        yield collate(captions, rows, seen, model.text, model.prompt)
