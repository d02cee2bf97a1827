"""What a training run reads: records, caption ids, pictures or their cached tokens, batches."""

from __future__ import annotations

import hashlib
import math
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tinyvl import UserError, data, media, media_workers
from tinyvl.features import FeatureStore, contents, extract
from tinyvl.presets import Job, Run
from tinyvl.progress import bar, say
from tinyvl.train_run import Interrupted

if TYPE_CHECKING:
    from tinyvl.captioner import Batch
    from tinyvl.lilt import Pairs
    from tinyvl.models import Model


def load_records(job: Job) -> tuple[list[data.Record], list[data.Record]]:
    """Records to train on and to validate on, by the data's own split or a held-out 2 %."""

    def read(path: str, split: str) -> list[data.Record]:
        records = data.read(path, format=job.format, images=job.images, lang=job.lang)
        if any(r.split for r in records):
            wanted = {"train", "restval"} if split == "train" else {split}
            if path == job.val and not any(r.split in wanted for r in records):
                wanted = {r.split for r in records}  # a file of its own is taken whole
            records = [r for r in records if r.split in wanted]
        asked = job.task == "vqa"
        return [
            r
            for r in records
            if r.modality == job.modality and (r.question and r.answers if asked else r.captions)
        ]

    train, val = read(job.data, "train"), read(job.val or job.data, "val")
    if not train:
        what = "question and answer" if job.task == "vqa" else "caption"
        kind = {"image": "picture", "audio": "sound"}.get(job.modality, job.modality)
        raise UserError(f"{job.data}: no {kind} with a {what} to train on.", 2)
    if not job.val and (not val or val == train):  # no validation part of its own
        train, val = data.hold_out(train, seed=job.seed)
    if job.limit and job.method == "lilt":
        train = limit_pairs(train, job.limit, job.seed)
    elif job.limit:
        count = share(job.limit, len(train))
        train = [train[i] for i in sorted(data.epoch_order(len(train), job.seed, 0)[:count])]
    return train, val


def share(limit: int | str, number: int) -> int:
    """A number, or a percentage of a number (at least 1): ``512``, ``"1%"``."""
    if not isinstance(limit, str):
        return limit
    return max(1, round(float(limit.removesuffix("%")) / 100 * number))


def limit_pairs(records: list[data.Record], limit: int | str, seed: int) -> list[data.Record]:
    """That many pairs of a picture and a caption (or "1%"), drawn from all; other captions go."""
    pairs = [(r, c) for r, record in enumerate(records) for c in range(len(record.captions))]
    kept: dict[int, list[str]] = {}
    for i in sorted(data.epoch_order(len(pairs), seed, 0)[: share(limit, len(pairs))]):
        record, caption = pairs[i]
        kept.setdefault(record, []).append(records[record].captions[caption])
    return [replace(records[r], captions=captions) for r, captions in kept.items()]


@dataclass
class Group:
    """Captions of one picture that are read together: its keys and values serve them all.

    With ``drawn`` they are one question with each answer that it got, repeats kept: each epoch
    reads one of them, so in proportion to the annotators' agreement. (The authors' code caps the
    agreement at four annotators of ten, as the VQA metric does.)
    """

    record: int
    captions: list[list[int]]
    drawn: bool = False

    def read(self, seed: int, epoch: int) -> list[list[int]]:
        """The captions that an epoch reads."""
        if not self.drawn or len(self.captions) == 1:
            return self.captions
        digest = hashlib.sha256(f"{seed}/{epoch}/{self.record}".encode()).digest()
        return [self.captions[int.from_bytes(digest[:8], "big") * len(self.captions) >> 64]]


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
    """Pictures (videos, sounds) of records, as tensors or as an encoder's tokens from a cache.

    Each has ``views`` views (`media_augment.View`), one after another by epoch; with ``crops`` a
    new random one in every epoch (`media_augment.RandomCrop`), never cached, as are pictures whose
    encoder learns. What is varied of videos and sounds, their encoders say. The tokens are those of
    ``store``, or else of caches in the run's folder, a view each, that are filled first and go on
    after a kill. The operating system keeps in memory what fits.
    """

    def __init__(
        self,
        records: list[data.Record],
        model: Model,
        run: Run,
        name: str,
        views: int = 1,
        seed: int = 0,
        store: FeatureStore | None = None,
        crops: bool = False,
    ):
        self.paths = [r.path for r in records]
        number = {path: i for i, path in enumerate(dict.fromkeys(self.paths))}
        self.keys = [number[path] for path in self.paths]  # equal where pictures are the same
        self.encoder, self.size = model.encoder, model.encoder.size
        self.transforms = [self.encoder.view(view, seed) for view in range(views)]
        self.run, self.seed, self.crops, self.bad = run, seed, crops, set()
        self.area, self.reads = model.crop_area, model.reads
        self.stores = [] if store is None else [store]
        pictures = [(r.path, r.id) for r in records]
        if store is None and run.cache and not crops and model.fixed_pictures:
            head = contents({}, model.encoder, what=model.reads)
            for view, transform in enumerate(self.transforms):
                folder = run.out / "features" / f"{name}-{view}"
                extract(
                    folder,
                    pictures,
                    model.encoder,
                    head,
                    run,
                    transform=transform,
                    title=f"encoding {name} pictures" + f", view {view}" * (views > 1),
                    advice="use --no-cache to encode them anew each time",
                )
                self.stores.append(FeatureStore.open(folder))
        self.rows = [[e.row for e in kept.entries_of(pictures)] for kept in self.stores]
        for rows in self.rows:
            self.bad |= {i for i, row in enumerate(rows) if row is None}
        if store is not None:
            for i in sorted(self.bad):
                print(f"tinyvl: skipping {store.find(*pictures[i]).error}", file=sys.stderr)

    def stream(
        self, wanted: Iterator[list[int]], epoch: int
    ) -> Iterator[list[Tensor | media.MediaError]]:
        """For each list of records their pictures, in that order, as this epoch sees them."""
        view = epoch % len(self.transforms)
        if self.stores:
            store, rows = self.stores[view], self.rows[view]
            for indices in wanted:
                yield list(store.read(self.reads, [rows[i] for i in indices]))
            return
        lists: list[list[int]] = []

        def paths() -> Iterator[str]:
            for indices in wanted:
                lists.append(indices)
                yield from (self.paths[i] for i in indices)

        transform, target = self.transforms[view], self.size
        if self.crops:
            transform, target = self.encoder.crop(epoch, self.seed, self.area), None
        found: list[Tensor | media.MediaError] = []
        for _, picture in media_workers.decode_images(
            paths(), transform, target=target, workers=self.run.workers
        ):
            found.append(picture)
            if len(found) == len(lists[0]):
                yield found
                lists.pop(0)
                found = []


class TextStates:
    """What frozen layers that no picture reaches make of each caption.

    I-Tuning that drops its first N modules reads the same states of those N layers in every epoch,
    LilT with a locked text tower the same vectors. They are computed once, in the layers' own
    precision, and kept on disk as pictures are; where the disk has no room for them, training does
    without.
    """

    def __init__(self, tokens: list[list[list[int]]], model: Model, run: Run, name: str):
        self.store: Tensor | None = None
        captions = sorted(
            {tuple(c) for record in tokens for c in record}, key=lambda c: (len(c), c)
        )
        if not run.cache or not model.fixed_text or not captions:
            return
        ends = np.cumsum([model.state_rows(c) for c in captions]).tolist()
        self.rows = {
            c: slice(end - model.state_rows(c), end) for c, end in zip(captions, ends, strict=True)
        }
        probe = model.states(captions[:1])
        self.store, fresh = cached(run, f"{name}.states", (ends[-1], probe.shape[1]), probe.dtype)
        if self.store is None:
            say("no room on this disk for the captions' states: going on without", run.quiet)
            return
        blocks = [captions[i : i + 256] for i in range(0, len(captions), 256)]
        done, _ = cached(run, f"{name}.states.done", (len(blocks),), torch.uint8, fresh=fresh)
        with bar(f"reading {name} captions", len(blocks), run.quiet) as advance:
            for i, block in enumerate(blocks):
                if not done[i]:
                    place = slice(self.rows[block[0]].start, self.rows[block[-1]].stop)
                    self.store[place] = model.states(block).cpu()
                    done[i] = 1
                advance(1)
                if run.stop:
                    raise Interrupted

    def of(self, captions: list[list[int]]) -> list[Tensor] | None:
        """The states (rows, d) of each caption, or None where they are not kept."""
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


def prepare(records: list[data.Record], model: Model, job: Job) -> list[list[list[int]]]:
    """Caption ids of each record, cut to max_tokens and to what the model has room for.

    Of a question: its ids with each of its answers, the most frequent one first, repeats kept.
    """
    if job.task == "vqa":
        counts = [Counter(r.answers).most_common() for r in records]
        pairs = [(r.question, a) for r, c in zip(records, counts, strict=True) for a, _ in c]
        ids = iter(model.encode_answers(pairs, job.max_tokens))
        return [[line for _, n in c for line in [next(ids)] * n] for c in counts]
    ids = iter(model.encode([c for r in records for c in r.captions], job.max_tokens))
    return [[next(ids) for _ in r.captions] for r in records]


def batches(
    groups: list[Group],
    order: list[list[int]],
    pictures: Pictures,
    states: TextStates,
    model: Model,
    seed: int,
    epoch: int = 0,
) -> Iterator[Batch | Pairs | None]:
    """Micro-batches of the groups that each list of ``order`` names; None: all unreadable."""
    wanted = ([groups[g].record for g in micro] for micro in order)
    for micro, seen in zip(order, pictures.stream(wanted, epoch), strict=True):
        good = [(g, p) for g, p in zip(micro, seen, strict=True) if isinstance(p, Tensor)]
        for broken in (p for p in seen if not isinstance(p, Tensor)):
            print(f"tinyvl: skipping {broken}", file=sys.stderr)
        if not good:
            yield None  # keeps its place, so that a resumed run counts the same
            continue
        read = [groups[g].read(seed, epoch) for g, _ in good]
        captions = [c for lines in read for c in lines]
        rows = [row for row, lines in enumerate(read) for _ in lines]
        seen = torch.stack([p for _, p in good])
        keys = [pictures.keys[groups[g].record] for g, _ in good]
        yield model.collate(captions, rows, seen, keys, states.of(captions))


class Feed:
    """The micro-batches of a run: those of each optimizer step, and those to validate on."""

    def __init__(
        self,
        train: list[data.Record],
        val: list[data.Record],
        model: Model,
        job: Job,
        run: Run,
        store: FeatureStore | None = None,
    ):
        self.model, self.job = model, job
        self.pictures = Pictures(
            train, model, run, "train", job.views, job.seed, store=store, crops=job.crops
        )
        self.val_pictures = Pictures(val, model, run, "val", store=store)
        tokens = prepare(train, model, job)
        for i in self.pictures.bad:
            tokens[i] = []
        cider = job.objective == "cider"  # reads pictures; the captions are sampled
        self.states = TextStates([] if cider else tokens, model, run, "train")
        if cider:
            self.groups = [Group(i, lines[:1]) for i, lines in enumerate(tokens) if lines]
        elif job.task == "vqa":
            self.groups = [Group(i, lines, drawn=True) for i, lines in enumerate(tokens) if lines]
        else:
            self.groups = groups_of(tokens, min(job.per_image, run.micro, job.recipe.batch))
        if not self.groups:
            raise UserError(f"{job.data}: none of its pictures could be read.")
        self.lengths = [max(map(len, g.captions)) for g in self.groups]
        self.val_groups = [
            Group(i, t[:1])  # one caption a picture: enough to choose by, and cheap
            for i, t in enumerate(prepare(val, model, job))
            if i not in self.val_pictures.bad
        ]
        known = [] if cider else [g.captions for g in self.val_groups]
        self.val_states = TextStates(known, model, run, "val")
        order = sorted(
            range(len(self.val_groups)), key=lambda g: len(self.val_groups[g].captions[0])
        )
        self.val_order = [order[i : i + run.micro] for i in range(0, len(order), run.micro)]

        self.size = sum(1 if g.drawn else len(g.captions) for g in self.groups)
        self.size *= job.samples if cider else 1
        self.kind = (
            "questions" if job.task == "vqa" else "sampled captions" if cider else "captions"
        )
        mean = self.size / len(self.groups)
        self.micro = max(1, round(min(run.micro, job.recipe.batch) / mean))  # groups at once
        self.per_step = max(1, round(job.recipe.batch / (self.micro * mean)))  # micro-batches
        self.captions = round(self.per_step * self.micro * mean)  # in a step
        self.steps_per_epoch = math.ceil(math.ceil(len(self.groups) / self.micro) / self.per_step)

    def __str__(self) -> str:
        return (
            f"{len(self.pictures.paths):,} pictures, "
            f"{self.size:,} {self.kind}, "
            f"{len(self.val_groups):,} pictures to validate on"
        )

    def steps(self, epoch: int, done: int) -> Iterator[list[Batch | Pairs]]:
        """The micro-batches of each step of an epoch behind the first ``done``.

        None at all where every picture of a step is unreadable.
        """
        order = data.length_buckets(
            self.lengths, self.micro, self.job.seed, epoch,
            **({"pool": self.per_step, "shuffle": False} if self.model.whole_steps else {}),
        )  # fmt: skip
        order = order[done * self.per_step :]
        source = batches(
            self.groups, order, self.pictures, self.states, self.model, self.job.seed, epoch
        )
        for _ in range(done, self.steps_per_epoch):
            yield [batch for batch in islice(source, self.per_step) if batch is not None]

    def validation(self) -> Iterator[Batch | Pairs | None]:
        return batches(
            self.val_groups, self.val_order, self.val_pictures, self.val_states, self.model,
            self.job.seed,
        )  # fmt: skip
