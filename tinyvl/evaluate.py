"""A model that writes, over a data set: predictions, scores, one report.

`run` makes captions or answers and scores them; `evaluate_files` scores those made elsewhere, and
`evaluate_dual` models that embed. A report is one JSON object ``{task, model, data, metrics, ...}``
that says what was run and what came out. Metrics are fractions; CIDEr's and SPIDEr's 1.0 is the
papers' 100.
"""

import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tinyvl import (
    UserError,
    __version__,
    bootstrap,
    data,
    files,
    metrics,
    models,
    predictions,
    write,
)
from tinyvl.data import Record
from tinyvl.device import choose_device, choose_precision, keep_memory, precision_name
from tinyvl.features import FeatureStore, open_store
from tinyvl.progress import bar
from tinyvl.records import READABLE


@dataclass
class Source:
    """Which records are evaluated."""

    path: str
    split: str | None = None  # None: test if there is one, else val, else all
    lang: str | None = "en"
    limit: int | None = None  # this many items, drawn evenly, the same each time
    format: str | None = None
    images: str | None = None
    answers_top: int | None = None  # only questions that `answerable` keeps


@dataclass
class Scoring:
    """How captions are scored: see `metrics.caption_scores`."""

    metrics: Sequence[str] | None = None
    java: str | None = None
    spice_jars: Path | None = None


@dataclass
class Scores:
    """Of everything, of its parts, and how a bootstrap draws the items again."""

    metrics: dict[str, float | None]
    resample: bootstrap.Resample | None = None
    groups: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)  # what the report says besides


@dataclass
class Place:
    """Where a model runs, and how much of it at once."""

    device: torch.device
    precision: torch.dtype
    batch: int = 16
    workers: int | None = None
    quiet: bool = False


@dataclass(frozen=True)
class Task:
    """What is predicted, for which records, and against what."""

    field: str
    prepare: Callable[[list[Record]], list[Record]]
    truth: str
    score: Callable[[list[Record], dict[str, str]], Scores]


def place(
    device: str | None, precision: str | None, batch: int, workers: int | None, quiet: bool
) -> Place:
    """A `Place` from what the command line says."""
    keep_memory()
    target = choose_device(device)
    dtype = choose_precision(precision, target)
    return Place(target, dtype, batch, workers, quiet)


# ----------------------------------------------------------------------------- records


def read(
    source: Source, task: Task | None = None, *, opened: bool = True
) -> tuple[list[Record], str | None]:
    """All records in the source's language, and the name of the part that is evaluated.

    ``opened`` False: nothing will open the pictures, and they may be elsewhere.
    """
    options = {"format": source.format, "images": source.images, "lang": source.lang}
    records = data.read(source.path, **options, files=opened)
    if task:
        records = task.prepare(records)
        if not records:
            raise UserError(f"{source.path}: no record asks a question.", 2)
    splits = {record.split for record in records}
    split = source.split or next((name for name in ("test", "val") if name in splits), None)
    return records, split


def answerable(records: list[Record], everything: list[Record], top: int) -> list[Record]:
    """The questions whose answer is among the ``top`` most frequent ones.

    A question's answer is what most of its annotators say, of equals the first, normalised. The
    frequent ones are those of the training part, where there is one, else of all; ties are broken
    by the alphabet.
    """

    def answer(record: Record) -> str | None:
        said = Counter(map(metrics.normalise_answer, record.answers)).most_common(1)
        return said[0][0] if said else None

    known = [record for record in everything if record.split == "train"] or everything
    counts = Counter(answer(record) for record in known if record.answers)
    frequent = set(sorted(counts, key=lambda text: (-counts[text], text))[:top])
    return [record for record in records if answer(record) in frequent]


def choose(records: list[Record], source: Source, split: str | None) -> list[Record]:
    """The records of the part, at most ``limit``."""
    everything = records
    if split not in (None, "all"):
        try:
            records = data.select_split(records, split)
        except UserError as error:
            raise UserError(f"{source.path}: {error}", 2) from None
    if source.answers_top is not None:
        records = answerable(records, everything, source.answers_top)
        if not records:
            raise UserError(
                f"{source.path}: no question has such an answer; raise --answers-top.", 2
            )
    if source.limit is not None:
        order = data.epoch_order(len(records), 0, 0)[: source.limit]
        records = [records[i] for i in sorted(order)]
    return records


def by_picture(records: list[Record]) -> list[Record]:
    """A record for each id, with the captions of all that have it."""
    merged: dict[str, Record] = {}
    for record in records:
        first = merged.get(record.id)
        if first is None:
            merged[record.id] = replace(record, captions=list(record.captions))
        elif first.path != record.path:
            raise UserError(
                f"the id {record.id!r} names both {first.path} and {record.path}; give each its own"
            )
        else:
            first.captions += record.captions
    return list(merged.values())


def by_question(records: list[Record]) -> list[Record]:
    """The records that ask something, each with an id of its own.

    That is ``question_id``, or the picture's id with the question's number among the picture's.
    """
    asked = [record for record in records if record.question]
    names = [record.question_id or record.id for record in asked]
    if len(set(names)) < len(names):
        count: dict[str, int] = {}
        for i, name in enumerate(names):
            count[name] = count.get(name, -1) + 1
            names[i] = f"{name}#{count[name]}"
    return [replace(record, id=name) for record, name in zip(asked, names, strict=True)]


def pictures_only(records: list[Record]) -> None:
    other = next((record for record in records if record.modality != "image"), None)
    if other is not None:
        raise UserError(f"{other.path}: this is {other.modality}, and the model reads pictures.", 2)


def readable(records: list[Record], modality: str) -> None:
    """Whether a model of that modality can read all: pictures and videos alike, or sounds."""
    other = next((r for r in records if r.modality not in READABLE[modality]), None)
    if other is not None:
        reads = {"audio": "sounds"}.get(modality, "pictures and videos")
        raise UserError(f"{other.path}: this is {other.modality}, and the model reads {reads}.", 2)


def swapped(records: list[Record]) -> list[str]:
    """Each record's picture, given to another one: half the list of pictures further on."""
    paths = list(dict.fromkeys(record.path for record in records))
    if len(paths) < 2:
        raise UserError("--shuffle-images needs two pictures to swap.", 2)
    half = len(paths) // 2
    other = dict(zip(paths, paths[half:] + paths[:half], strict=True))
    return [other[record.path] for record in records]


# ----------------------------------------------------------------------------- scores


def score_captions(records: list[Record], texts: dict[str, str], scoring: Scoring) -> Scores:
    """Captions against the records' own; each NoCaps domain also as a corpus of its own."""

    def score(part: list[Record]) -> metrics.CaptionScores:
        return metrics.caption_scores(
            {record.id: record.captions for record in part},
            {record.id: texts[record.id] for record in part},
            **vars(scoring),
        )

    whole = score(records)
    domains: dict[str, list[Record]] = {}
    for record in records:
        if record.domain is not None:
            domains.setdefault(record.domain, []).append(record)
    groups = {}
    if domains:
        groups["domain"] = {
            name: {"items": len(part), **score(part).metrics} for name, part in domains.items()
        }
    extra = {"tokenizer": whole.tokenizer, "not_scored": whole.missing}
    return Scores(whole.metrics, whole.resample, groups, extra)


def score_answers(records: list[Record], texts: dict[str, str]) -> Scores:
    """Answers against the annotators': all together, by question type and by answer type.

    ``accuracy`` is VQA v2's where a question has several answers and equality where it has one (as
    GQA's is); ``strict_accuracy`` is equality of the raw texts.
    """
    items: dict[str, list[float]] = {"accuracy": [], "strict_accuracy": []}
    for record in records:
        answer, known = texts[record.id], record.answers
        official = metrics.vqa_accuracy if len(known) > 1 else metrics.gqa_accuracy
        items["accuracy"].append(official(answer, known))
        items["strict_accuracy"].append(metrics.strict_accuracy(answer, known))

    groups = {}
    for kind in ("question_type", "answer_type"):
        types = [getattr(record, kind) for record in records]
        means = {name: metrics.by_type(values, types) for name, values in items.items()}
        counts = Counter(types)
        parts = {
            name: {
                "items": counts[name],
                **{metric: values[name] for metric, values in means.items()},
            }
            for name in means["accuracy"]
        }
        if parts:
            groups[kind] = parts
    whole = {name: sum(values) / len(values) for name, values in items.items()}
    return Scores(whole, bootstrap.mean_of(items), groups)


def task_of(name: str, scoring: Scoring | None = None) -> Task:
    if name == "vqa":
        return Task("answer", by_question, "answers", score_answers)
    scoring = scoring or Scoring()
    score = partial(score_captions, scoring=scoring)
    return Task("caption", by_picture, "captions", score)


# ----------------------------------------------------------------------------- a model


def checkpoint(name: str, task: str) -> dict[str, str]:
    """What tells a checkpoint from others, and what it is made of."""
    folder = models.checkpoint_folder(name, task)
    config = models.read_config(folder)
    parts = {
        side: part["name"]
        for side, part in config.items()
        if isinstance(part, dict) and "name" in part
    }
    try:
        with (folder / "model.safetensors").open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{folder}: model.safetensors cannot be read ({error}).") from error
    return {"method": config.get("method"), **parts, "sha256": digest}


def load(
    name: str, place: Place, task: str, features: Path | None, pictures: dict[str, str]
) -> tuple[Any, FeatureStore | None]:
    """The model, and where there are ``features`` their store, which has all the pictures.

    Args:
        pictures: {absolute path: id}.
    """
    store = None
    if features is not None:  # before the model: it may take a while
        config = models.read_config(models.checkpoint_folder(name, task))
        store = open_store(features, models.image_side(config), models.reads(config))
        store.entries_of(pictures.items())
    model = models.load(name, task=task, device=place.device, precision=place.precision)
    if store is not None:
        store.check(model)
    return model, store


def described(
    task: str, name: str, source: Source, split: str | None, **how: Any
) -> dict[str, Any]:
    """What decides a result: the head of the report, and what a resumed run must share."""
    path = str(Path(source.path).expanduser().absolute())
    head = {"task": task, "model": name, "data": path, "split": split, "lang": source.lang, **how}
    if source.answers_top is not None:
        head["answers_top"] = source.answers_top
    return json.loads(json.dumps(head))


def fill(
    log: predictions.Log,
    records: list[Record],
    results: Callable[[list[Record]], Iterator[dict[str, Any] | UserError]],
    place: Place,
    title: str,
) -> dict[str, Any]:
    """Predicts what the log lacks. -> how it went; a picture that fails costs a message."""
    todo = [record for record in records if record.id not in log.lines]
    kept, failed = len(records) - len(todo), 0
    begun = time.monotonic()
    with bar(title, len(records), place.quiet, start=kept) as advance:
        for record, found in zip(todo, results(todo), strict=True):
            if isinstance(found, UserError):
                failed += 1
                print(f"tinyvl: {found}", file=sys.stderr)
            else:
                log.add({"id": record.id, "path": record.path, **found})
            advance(1)
    seconds = time.monotonic() - begun
    pace = round((len(todo) - failed) / seconds, 3) if todo else None
    return {
        "failed": failed,
        "kept": kept,  # of these, made by earlier, interrupted runs
        "seconds": round(seconds, 2),
        "items_per_second": pace,
        "device": str(place.device),
    }


def run(
    kind: str,
    name: str,
    source: Source,
    *,
    style: write.Style,
    scoring: Scoring | None = None,
    place: Place,
    out: Path | None = None,
    resume: bool = False,
    shuffle: bool = False,
    results: Path | None = None,
    features: Path | None = None,
    frames: int | None = None,
) -> dict[str, Any]:
    """Captions (``kind`` "caption") or answers ("vqa") by a model, scored. -> the report.

    Args:
        name: a checkpoint.
        out: a folder for predictions and report, from which ``resume`` goes on.
        shuffle: give each picture's place to another one: how much does the model look?
        results: also write what the evaluation servers take to this file.
        features: a folder of `tinyvl features`, to read there what the encoder makes of pictures.
        frames: of a video, in place of the model's own number.

    Raises:
        UserError: as the parts do; or nothing to predict.
    """
    task = task_of(kind, scoring)
    everything, split = read(source, task, opened=features is None)
    records = choose(everything, source, split)
    scored = [record for record in records if getattr(record, task.truth)]
    if scored:
        records = scored
    elif out is None and results is None:
        raise UserError(
            f"{source.path}: no {task.truth} to score against; --out or --results keeps the "
            "predictions.",
            2,
        )
    modality = models.modality_of(models.read_config(models.checkpoint_folder(name, kind)))
    readable(records, modality)
    if kind == "caption" and scored:
        metrics.plan_captions(**vars(scoring))  # before the long run
    shown = {record.id: record.path for record in records}
    if shuffle:  # among all of the part, so that a greater --limit swaps them the same
        part = choose(everything, replace(source, limit=None), split)
        shown = {record.id: path for record, path in zip(part, swapped(part), strict=True)}
    head = described(
        kind, name, source, split,
        checkpoint=checkpoint(name, kind), decoding=vars(style), shuffled=shuffle,
        features=str(features.absolute()) if features else None,
        precision=precision_name(place.precision), tinyvl=__version__,
        **({} if frames is None else {"frames": frames}),
    )  # fmt: skip
    ids = {record.path: record.id for record in everything}
    model, store = load(name, place, kind, features, {path: ids[path] for path in shown.values()})
    models.take_frames(model, frames)
    log = predictions.Log(out, head, resume=resume)

    def predict(todo: list[Record]) -> Iterator[dict[str, Any] | UserError]:
        found = write.captions(
            model,
            [shown[record.id] for record in todo],
            style=style,
            batch=place.batch,
            workers=place.workers,
            questions=[record.question for record in todo] if kind == "vqa" else None,
            store=store,
        )
        for record, (_, text, score) in zip(todo, found, strict=True):
            if isinstance(text, UserError):
                yield text
            else:
                question = {"question": record.question} if kind == "vqa" else {}
                yield {**question, task.field: text, "score": round(score, 4)}

    how = fill(log, records, predict, place, "captions" if kind == "caption" else "answers")
    texts = {r.id: log.lines[r.id][task.field] for r in records if r.id in log.lines}
    if results is not None:
        predictions.export(results, texts, task.field)
    done = [record for record in records if record.id in texts]
    if not done:
        raise UserError(f"{source.path}: none of its pictures could be read.")
    scores = task.score(done, texts) if scored else Scores({})
    return finish(head | how, len(done), scores, out)


def finish(head: dict[str, Any], items: int, scores: Scores, out: Path | None) -> dict[str, Any]:
    """The report, kept beside the predictions."""
    report = {**head, "items": items, "metrics": scores.metrics, **scores.extra}
    if scores.groups:
        report["groups"] = scores.groups
    if out is not None:
        text = json.dumps(report, indent=1, ensure_ascii=False)
        files.write_text(out / predictions.REPORT, text + "\n")
    return report
