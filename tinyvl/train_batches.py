"""What a training run reads: records -> groups of caption ids -> micro-batches with pictures."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tinyvl import UserError, data, media, media_workers, ranks
from tinyvl.features import FeatureStore, contents, extract
from tinyvl.presets import Job, Run
from tinyvl.progress import skip
from tinyvl.store import finite
from tinyvl.text import has_words
from tinyvl.train_plan import Plan
from tinyvl.train_states import TextStates

if TYPE_CHECKING:
    from tinyvl.captioner import Batch
    from tinyvl.lilt import Pairs

log = logging.getLogger(__name__)


def load_records(job: Job) -> tuple[list[data.Record], list[data.Record]]:
    """Records to train on and to validate on, by the data's own split or a held-out 2 %.

    UserError: there is nothing to train on, or `data.read` cannot read a file.
    """
    files = {
        path: data.read(path, format=job.format, images=job.images, lang=job.lang)
        for path in dict.fromkeys([job.data, job.val or job.data])
    }

    what = "question and answer" if job.task == "vqa" else "caption"

    def why_not(record: data.Record) -> str:
        """Why a record's part is not read with it."""
        if record.modality != job.modality:
            return f"{record.modality}, not {job.modality}"
        has = record.captions
        if job.task == "vqa":
            has = has_words(record.question or "") and record.answers
        return "" if has else f"without a {what}"

    def part(path: str, split: str) -> list[data.Record]:
        records = files[path]
        names = {r.split for r in records}
        wanted: set[str | None] = {"train", "restval"} if split == "train" else {split}
        if not any(names) or (path == job.val and not names & wanted):
            wanted = names  # without splits; a validation file of its own
        return [r for r in records if r.split in wanted and not why_not(r)]

    train, val = part(job.data, "train"), part(job.val or job.data, "val")
    for path, records in files.items():
        say_unread(path, records, [*train, *val], why_not)
    if not train:
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


def say_unread(
    path: str, records: list[data.Record], read: list[data.Record],
    why_not: Callable[[data.Record], str],
) -> None:  # fmt: skip
    """Says how many records a run does not read, and why; those of other parts are expected."""
    known, reasons = set(map(id, read)), Counter[str]()
    for record in records:
        if id(record) in known:
            continue
        part = data.split_in(record.split or "")
        if why := why_not(record):
            reasons[why] += 1
        elif record.split is None:
            reasons["without a split, where others have one"] += 1
        elif part in (None, "train"):
            reasons[f"of the part {record.split!r}"] += 1
    if reasons:
        each = "; ".join(f"{count:,} {why}" for why, count in reasons.items())
        log.warning("%s: left out %d of %d records: %s", path, reasons.total(), len(records), each)


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

    With ``drawn`` they are one question with each of its answers, repeats kept. Each epoch reads
    one of them, so that an answer's share is that of the annotators who gave it. (The authors' code
    counts at most four annotators of ten, as the VQA metric does.)
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
    return [
        Group(i, sorted(captions, key=len)[j : j + per_image])
        for i, captions in enumerate(tokens)
        for j in range(0, len(captions), per_image)
    ]


class Pictures:
    """Pictures (videos, sounds) of records, as tensors or as an encoder's features from a cache.

    Each epoch sees the next of the ``views`` of a picture (`media_augment.View`). With ``crops``
    each epoch sees a new random crop (`media_augment.RandomCrop`). Of videos and sounds the encoder
    says what is varied. Features are read from ``store``, or else from caches in the run's folder,
    one for each view. Those are filled first, and a killed run goes on filling them. Crops are
    never cached, nor are pictures whose encoder is trained. ``dtype``: see `cache_dtype`.
    """

    def __init__(
        self, records: list[data.Record], model: Any, run: Run, name: str, views: int = 1,
        seed: int = 0, store: FeatureStore | None = None, crops: bool = False, dtype: str = "fp16",
        coarsest: int | None = None,
    ):  # fmt: skip
        self.paths = [r.path for r in records]
        number = {path: i for i, path in enumerate(dict.fromkeys(self.paths))}
        self.keys = [number[path] for path in self.paths]  # equal where pictures are the same
        self.model, self.run, self.seed, self.crops = model, run, seed, crops
        how = {"coarsest": coarsest} if coarsest else {}
        self.transforms = [model.encoder.view(view, seed, **how) for view in range(views)]
        pictures = [(r.path, r.id) for r in records]
        self.stores = [] if store is None else [store]
        if store is None and run.cache and not crops and model.fixed_pictures:
            head = contents({}, model.encoder, what=model.reads, dtype=dtype)
            for view, transform in enumerate(self.transforms):
                folder = run.out / "features" / f"{name}-{view}"
                title = f"encoding {name} pictures" + f", view {view}" * (views > 1)
                advice = "use --no-cache to encode them anew each time"
                extract(
                    folder, pictures, model.encoder, head, run, transform=transform, title=title,
                    advice=advice,
                )  # fmt: skip
                self.stores.append(FeatureStore.open(folder))
        entries = [kept.entries_of(pictures) for kept in self.stores]
        self.rows = [[entry.row for entry in own] for own in entries]
        errors = {i: e.error for own in entries for i, e in enumerate(own) if e.row is None}
        self.bad = set(errors)  # records whose picture cannot be read
        if store is not None:  # else `extract` has named them
            for _, error in sorted(errors.items()):
                skip(error)

    def stream(
        self, wanted: Sequence[Sequence[int]], epoch: int
    ) -> Iterator[list[Tensor | media.MediaError]]:
        """For each list of records their pictures, in that order, as this epoch sees them."""
        view, encoder = epoch % len(self.transforms), self.model.encoder
        if self.stores:
            store, rows = self.stores[view], self.rows[view]
            for indices in wanted:
                found = store.read(self.model.reads, [rows[i] for i in indices])  # none is `bad`
                fine = finite(found).tolist()  # an older tinyvl kept any numbers
                why = "its features are not finite numbers; extract them anew elsewhere"
                yield [
                    picture if ok else media.MediaError(f"{self.paths[i]}: {why}")
                    for i, picture, ok in zip(indices, found, fine, strict=True)
                ]
            return
        transform, target = self.transforms[view], encoder.size
        if self.crops:
            transform, target = encoder.crop(epoch, self.seed, self.model.crop_area), None
        paths = (self.paths[i] for indices in wanted for i in indices)
        decoded = media_workers.decode_images(
            paths, transform, target=target, workers=self.run.workers
        )
        for indices in wanted:
            yield [picture for _, picture in islice(decoded, len(indices))]


def cache_dtype(job: Job, reads: str) -> str:
    """In which type a run's own cache keeps features.

    Summaries are small, and a run in fp32 keeps them exactly. Tokens would take twice the disk.
    """
    return "fp32" if job.precision == "fp32" and reads == "summaries" else "fp16"


def prepare(records: list[data.Record], model: Any, job: Job) -> list[list[list[int]]]:
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


class Feed:
    """The micro-batches of a run: those of each optimizer step, and those to validate on."""

    def __init__(
        self, train: list[data.Record], val: list[data.Record], model: Any, job: Job, run: Run,
        store: FeatureStore | None = None, dtype: str = "fp16",
    ):  # fmt: skip
        """As `Pictures`. UserError: none of the pictures can be read."""
        self.model, self.job = model, job
        self.pictures = Pictures(
            train, model, run, "train", job.views, job.seed, store, job.crops, dtype, job.coarsest
        )
        self.val_pictures = Pictures(val, model, run, "val", store=store, dtype=dtype)
        tokens = prepare(train, model, job)
        for i in self.pictures.bad:
            tokens[i] = []
        cider, vqa = job.objective == "cider", job.task == "vqa"
        if cider:  # reads pictures; the captions are sampled
            self.groups = [Group(i, lines[:1]) for i, lines in enumerate(tokens) if lines]
        elif vqa:
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
        self.states = TextStates([] if cider else tokens, model, run, "train")
        self.val_states = TextStates(known, model, run, "val")
        lengths = [len(g.captions[0]) for g in self.val_groups]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        self.val_order = [order[i : i + run.micro] for i in range(0, len(order), run.micro)]

        self.plan = Plan.of([1 if g.drawn else len(g.captions) for g in self.groups], job, run)

    def __str__(self) -> str:
        return (
            f"{len(set(self.pictures.keys)):,} pictures, {self.plan.size:,} {self.plan.kind}, "
            f"{len({self.val_pictures.keys[g.record] for g in self.val_groups}):,} pictures to "
            "validate on"
        )

    def steps(self, epoch: int, done: int) -> Iterator[list[Batch | Pairs]]:
        """The micro-batches of each step of an epoch after the first ``done``.

        A list is empty where every picture of a step is unreadable. Of several processes each has
        its share of every step.
        """
        # Where a loss compares the captions of a step, a step is a random part of the epoch.
        plan = self.plan
        pools: Any = {"pool": plan.per_step, "shuffle": False} if self.model.whole_steps else {}
        order = data.length_buckets(self.lengths, plan.micro, self.job.seed, epoch, **pools)
        starts = range(done * plan.per_step, len(order), plan.per_step)
        steps = [ranks.share(order[i : i + plan.per_step]) for i in starts]
        mine = [micro for step in steps for micro in step]
        found = self.batches(self.groups, mine, self.pictures, self.states, epoch)
        for step in steps:
            yield [batch for batch in islice(found, len(step)) if batch is not None]

    def run(self, step: int, steps: int) -> Iterator[list[Batch | Pairs]]:
        """The micro-batches of each step from ``step`` on, epoch after epoch."""
        while step < steps:
            epoch, behind = divmod(step, self.plan.steps_per_epoch)
            for taken in islice(self.steps(epoch, behind), steps - step):
                yield taken
                step += 1

    def validation(self) -> Iterator[Batch | Pairs]:
        """The micro-batches to validate on."""
        parts = self.val_groups, self.val_order, self.val_pictures, self.val_states
        return (batch for batch in self.batches(*parts) if batch is not None)

    def batches(
        self, groups: list[Group], order: list[list[int]], pictures: Pictures, states: TextStates,
        epoch: int = 0,
    ) -> Iterator[Batch | Pairs | None]:  # fmt: skip
        """Micro-batches of the groups that each list of ``order`` names; None: all unreadable."""
        wanted = [[groups[g].record for g in micro] for micro in order]
        for micro, seen in zip(order, pictures.stream(wanted, epoch), strict=True):
            good: list[tuple[Group, Tensor]] = []
            for g, picture in zip(micro, seen, strict=True):
                if isinstance(picture, Tensor):
                    good.append((groups[g], picture))
                else:
                    skip(str(picture), own=True)
            if not good:
                yield None  # keeps its place, so that a resumed run counts the same
                continue
            read = [group.read(self.job.seed, epoch) for group, _ in good]
            captions = [c for lines in read for c in lines]
            rows = [row for row, lines in enumerate(read) for _ in lines]
            keys = [pictures.keys[group.record] for group, _ in good]
            together = stacked([picture for _, picture in good])
            yield self.model.collate(captions, rows, together, keys, states.of(captions))


def stacked(pictures: list[Tensor]) -> Tensor:
    """Inputs as a batch; a picture (1, 3, H, W) beside videos (T, 3, H, W) stands still."""
    most = max(map(len, pictures))
    return torch.stack([p.expand(most, *p.shape[1:]) if len(p) == 1 else p for p in pictures])
