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
from tinyvl.augment import View
from tinyvl.captioner import Batch, Captioner, collate
from tinyvl.job import Interrupted, Job, Run, bar, say


def load_records(job: Job) -> tuple[list[data.Record], list[data.Record]]:
    """Records to train on and to validate on, by the data's own split or a held-out 2 %."""

    def read(path: str, split: str) -> list[data.Record]:
        records = data.read(path, format=job.format, images=job.images, lang=job.lang)
        if any(r.split for r in records):
            wanted = {"train", "restval"} if split == "train" else {split}
            if path == job.val and not any(r.split in wanted for r in records):
                wanted = {r.split for r in records}  # a file of its own is taken whole
            records = [r for r in records if r.split in wanted]
        return [r for r in records if r.captions]

    train, val = read(job.data, "train"), read(job.val or job.data, "val")
    if not train:
        raise UserError(f"{job.data}: no record with a caption to train on.", 2)
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

    Each has ``views`` views (`augment.View`), one after another by epoch. The cache is one fp16
    array on disk beside a column of flags, filled once, in order, and continued after a kill. The
    operating system keeps in memory what fits.
    """

    def __init__(
        self,
        records: list[data.Record],
        model: Captioner,
        run: Run,
        name: str,
        views: int = 1,
        seed: int = 0,
    ):
        self.paths = [r.image for r in records]
        own, self.size = model.encoder.transform(), model.encoder.size
        self.transforms = [View(own, view, seed) if view else own for view in range(views)]
        self.run, self.store, self.bad = run, None, set()
        if not run.cache:
            return
        probe = torch.zeros(1, 3, self.size, self.size, dtype=torch.uint8, device=run.device)
        with torch.no_grad(), model.autocast():
            shape = (views, len(records), *model.encoder(probe).tokens.shape[1:])
        self.store, fresh = cached(run, f"{name}.f16", shape, torch.float16)
        if self.store is None:
            raise UserError(
                f"{run.out}: encoded pictures would take {math.prod(shape) / 2**29:.1f} GiB, which "
                "does not fit on this disk; use --no-cache to encode them anew each time.",
                2,
            )
        self.done, _ = cached(run, f"{name}.done", shape[:2], torch.uint8, fresh=fresh)
        for view in range(views):
            self._fill(model, view, f"encoding {name} pictures" + f", view {view}" * (views > 1))
        self.bad = set((self.done == 2).any(0).nonzero()[:, 0].tolist())

    def _fill(self, model: Captioner, view: int, title: str) -> None:
        """Encodes blocks of 32 that are not yet whole: the same blocks however often killed."""
        store, done = self.store[view], self.done[view]
        blocks = [range(i, min(i + 32, len(done))) for i in range(0, len(done), 32)]
        blocks = [block for block in blocks if not done[block.start : block.stop].all()]
        decoded = media.decode_images(
            (self.paths[i] for block in blocks for i in block),
            self.transforms[view],
            target=self.size,
            workers=self.run.workers,
        )
        with bar(title, sum(map(len, blocks)), self.run) as advance:
            for block in blocks:
                found = {i: next(decoded)[1] for i in block}
                good = [i for i in block if not isinstance(found[i], Exception)]
                if good:
                    with torch.no_grad(), model.autocast():
                        stacked = torch.stack([found[i] for i in good]).to(model.device)
                        store[good] = model.encoder(stacked).tokens.half().cpu()
                for i in block:
                    if i not in good and view == 0:
                        print(f"tinyvl: skipping {found[i]}", file=sys.stderr)
                    done[i] = 1 if i in good else 2
                advance(len(block))
                if self.run.stop:
                    raise Interrupted

    def stream(
        self, wanted: Iterator[list[int]], epoch: int
    ) -> Iterator[list[Tensor | media.MediaError]]:
        """For each list of records their pictures, in that order, as this epoch sees them."""
        view = epoch % len(self.transforms)
        if self.store is not None:
            for indices in wanted:
                yield list(self.store[view, indices])
            return
        lists: list[list[int]] = []

        def paths() -> Iterator[str]:
            for indices in wanted:
                lists.append(indices)
                yield from (self.paths[i] for i in indices)

        found: list[Tensor | media.MediaError] = []
        for _, picture in media.decode_images(
            paths(), self.transforms[view], target=self.size, workers=self.run.workers
        ):
            found.append(picture)
            if len(found) == len(lists[0]):
                yield found
                lists.pop(0)
                found = []


class TextStates:
    """What the decoder's lower layers make of each caption, where no picture reaches them.

    I-Tuning that drops its first N modules reads the same states of those N layers in every epoch.
    They are computed once, in the decoder's own precision, and kept on disk as pictures are;
    where the disk has no room for them, training does without.
    """

    def __init__(self, tokens: list[list[list[int]]], model: Captioner, run: Run, name: str):
        self.store: Tensor | None = None
        if not run.cache or not model.text_layers:
            return
        lead = [model.text.bos, *model.prompt]
        captions = sorted(
            {tuple(c) for record in tokens for c in record}, key=lambda c: (len(c), c)
        )
        ends = np.cumsum([len(lead) + len(c) for c in captions]).tolist()
        self.rows = {
            c: slice(end - len(lead) - len(c), end) for c, end in zip(captions, ends, strict=True)
        }
        weight, width = model.decoder.embed.weight, model.decoder.config.hidden_size
        shape = (ends[-1] if ends else 0, width)
        self.store, fresh = cached(run, f"{name}.states", shape, weight.dtype)
        if self.store is None:
            say(run, "no room on this disk for the lower layers' states: going on without")
            return
        blocks = [captions[i : i + 256] for i in range(0, len(captions), 256)]
        done, _ = cached(run, f"{name}.states.done", (len(blocks),), torch.uint8, fresh=fresh)
        with bar(f"reading {name} captions", len(blocks), run) as advance:
            for i, block in enumerate(blocks):
                if not done[i]:
                    longest = len(lead) + len(block[-1])
                    ids = torch.full((len(block), longest), model.text.eos)
                    real = torch.zeros(len(block), longest, dtype=torch.bool)
                    for row, c in enumerate(block):
                        ids[row, : len(lead) + len(c)] = torch.tensor([*lead, *c])
                        real[row, : len(lead) + len(c)] = True
                    with torch.no_grad(), model.autocast():
                        states = model.decoder(
                            ids.to(model.device), real.to(model.device), last=model.text_layers
                        )
                    place = slice(self.rows[block[0]].start, self.rows[block[-1]].stop)
                    self.store[place] = states[real.to(model.device)].to(weight.dtype).cpu()
                    done[i] = 1
                advance(1)
                if run.stop:
                    raise Interrupted

    def of(self, captions: list[list[int]]) -> list[Tensor] | None:
        """The states (1 + P + t, d) of each caption, or None where they are not kept."""
        if self.store is None:
            return None
        return [self.store[self.rows[tuple(c)]] for c in captions]


def cached(
    run: Run, name: str, shape: tuple[int, ...], dtype: torch.dtype, *, fresh: bool = False
) -> tuple[Tensor | None, bool]:
    """A tensor that lives in a file of the run, and whether it is new (zeros).

    None where the disk has no room for it.
    """
    folder = run.out / "features"
    folder.mkdir(parents=True, exist_ok=True)
    file, need = folder / name, math.prod(shape) * dtype.itemsize
    fresh = fresh or not file.exists() or file.stat().st_size != need
    if fresh:
        file.unlink(missing_ok=True)
        if need > shutil.disk_usage(folder).free * 0.9:
            return None, True
        with file.open("wb") as stream:
            stream.truncate(need)
    if not need:
        return torch.zeros(shape, dtype=dtype), fresh
    kept = torch.from_file(str(file), shared=True, size=math.prod(shape), dtype=dtype)
    return kept.view(shape), fresh


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
    states: TextStates,
    model: Captioner,
    epoch: int = 0,
) -> Iterator[Batch | None]:
    """Micro-batches of the groups that each list of ``order`` names; None: all unreadable."""
    wanted = ([groups[g].record for g in micro] for micro in order)
    for micro, seen in zip(order, pictures.stream(wanted, epoch), strict=True):
        good = [(g, p) for g, p in zip(micro, seen, strict=True) if isinstance(p, Tensor)]
        for broken in (p for p in seen if not isinstance(p, Tensor)):
            print(f"tinyvl: skipping {broken}", file=sys.stderr)
        if not good:
            yield None  # keeps its place, so that a resumed run counts the same
            continue
        captions = [c for g, _ in good for c in groups[g].captions]
        rows = [row for row, (g, _) in enumerate(good) for _ in groups[g].captions]
        seen = torch.stack([p for _, p in good])
        yield collate(captions, rows, seen, model.text, model.prompt, states.of(captions))
