"""A model that writes, over a data set: predictions, scores, one report.

`run` makes captions or answers and scores them. `evaluate_pairs` does so for models that embed, and
`evaluate_compare` scores predictions made elsewhere. A report is one JSON object
``{task, model, data, metrics, ...}`` that says what was run and what came out. Metrics are
fractions; CIDEr's and SPIDEr's 1.0 is the papers' 100.
"""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from tinyvl import UserError, __version__, data, metrics, models, ranks, write
from tinyvl import evaluate_predictions as predictions
from tinyvl.data import Record
from tinyvl.device import choose_device, choose_precision, keep_memory, precision_name
from tinyvl.features import FeatureStore, open_store
from tinyvl.hub_table import file_sha256
from tinyvl.media import READABLE
from tinyvl.metrics import Scores
from tinyvl.metrics_captions import CaptionScores, caption_scores, plan_captions
from tinyvl.rerank import NONE, reranker

T = TypeVar("T")
Lines = dict[str, dict[str, Any]]


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
class Place:
    """Where a model runs, and where its predictions are kept."""

    device: torch.device
    precision: torch.dtype
    batch: int = 16
    workers: int | None = None
    quiet: bool = False
    out: Path | None = None  # a folder for predictions and report
    resume: bool | None = False  # go on from what is there; None: not to be resumed at all
    features: Path | None = None  # a folder of `tinyvl features`, read instead of encoding


def place(device: str | None, precision: str | None, **more: Any) -> Place:
    """A `Place` from the options of a command."""
    keep_memory()
    target = choose_device(device)
    return Place(target, choose_precision(precision, target), **more)


@dataclass(frozen=True)
class Task:
    """How a task reads its records and scores its predictions."""

    field: str  # of a prediction: its text
    prepare: Callable[[list[Record]], list[Record]]
    truth: str  # of a record: what a prediction is scored against
    score: Callable[[list[Record], Lines], Scores]  # of their predictions by id


def read(
    source: Source, task: Task | None = None, *, opened: bool = True
) -> tuple[list[Record], str | None]:
    """All records in the source's language, and the name of the part that is evaluated.

    ``opened`` False: the pictures may be missing. Raises UserError as `data.read` does, or if no
    record asks a question.
    """
    records = data.read(
        source.path, format=source.format, images=source.images, lang=source.lang, files=opened
    )
    records = prepared(records, source, task) if task else records
    splits = {record.split for record in records}
    split = data.part_of(source.split) or next(
        (name for name in ("test", "val") if name in splits), None
    )
    return records, split


def prepared(records: list[Record], source: Source, task: Task) -> list[Record]:
    """The items of a task. UserError: no record asks a question."""
    if found := task.prepare(records):
        return found
    raise UserError(f"{source.path}: no record asks a question.", 2)


def choose(records: list[Record], source: Source, split: str | None) -> list[Record]:
    """The records of the part, at most ``limit``.

    Raises UserError if there is no such part, or ``answers_top`` leaves nothing of it.
    """
    everything = records
    try:
        if split not in (None, "all"):
            records = data.select_split(records, split)
        if source.answers_top is not None:
            records = answerable(records, everything, source.answers_top)
    except UserError as error:
        raise UserError(f"{source.path}: {error}", 2) from None
    return limited(records, source.limit)


def limited(items: list[T], limit: int | None) -> list[T]:
    """Some of the items, drawn evenly; a larger limit adds to a smaller one's."""
    if limit is None:
        return items
    return [items[i] for i in sorted(data.epoch_order(len(items), 0, 0)[:limit])]


def answerable(records: list[Record], everything: list[Record], top: int) -> list[Record]:
    """The questions whose answer is one of the ``top`` most frequent ones of the training part.

    Without a training part they are those of all records. A question's answer is the one that most
    of its annotators give, normalised; of equals the first. Equally frequent ones go by alphabet.
    Raises UserError if no question is left.
    """

    def answer(record: Record) -> str | None:
        said = Counter(map(metrics.normalise_answer, record.answers)).most_common(1)
        return said[0][0] if said else None

    known = [record for record in everything if record.split == "train"] or everything
    counts = Counter(answer(record) for record in known if record.answers)
    frequent = set(sorted(counts, key=lambda text: (-counts[text], text))[:top])
    if found := [record for record in records if answer(record) in frequent]:
        return found
    raise UserError("no question has such an answer; raise --answers-top.", 2)


def by_picture(records: list[Record]) -> list[Record]:
    """A record for each picture, with all its captions, under the first of its ids."""
    merged: dict[str, Record] = {}
    for record in records:
        first = merged.setdefault(record.path, replace(record, captions=[]))
        first.captions += record.captions
    return list(merged.values())


def by_question(records: list[Record]) -> list[Record]:
    """The records that ask something, each with an id of its own.

    That is ``question_id``, or the picture's id with the question's number among the picture's.
    """
    asked = [record for record in records if record.question]
    names = [record.question_id or record.id for record in asked]
    if len(set(names)) < len(names):
        count: dict[str, Iterator[int]] = {}
        names = [f"{name}#{next(count.setdefault(name, itertools.count()))}" for name in names]
    return [replace(record, id=name) for record, name in zip(asked, names, strict=True)]


def readable(records: list[Record], modalities: Sequence[str], reads: str) -> None:
    """Raises UserError for a record that a model of what ``reads`` names cannot read."""
    other = next((record for record in records if record.modality not in modalities), None)
    if other is not None:
        raise UserError(f"{other.path}: this is {other.modality}, and the model reads {reads}.", 2)


def swapped(records: list[Record]) -> list[str]:
    """For each record another picture: the one that is half the list of pictures further on."""
    paths = list(dict.fromkeys(record.path for record in records))
    if len(paths) < 2:
        raise UserError("--shuffle-images needs two pictures to swap.", 2)
    half = len(paths) // 2
    other = dict(zip(paths, paths[half:] + paths[:half], strict=True))
    return [other[record.path] for record in records]


def score_captions(records: list[Record], lines: Lines, scoring: dict[str, Any]) -> Scores:
    """Captions against the records' own; each NoCaps domain also as a corpus of its own."""

    def score(part: list[Record]) -> CaptionScores:
        references = {record.id: record.captions for record in part}
        texts = {name: lines[name]["caption"] for name in references}
        return caption_scores(references, texts, **scoring)

    whole = score(records)
    domains: dict[str, list[Record]] = {}
    for record in records:
        if record.domain is not None:
            domains.setdefault(record.domain, []).append(record)
    groups = {name: {"items": len(part), **score(part).metrics} for name, part in domains.items()}
    extra = {"tokenizer": whole.tokenizer, "not_scored": whole.missing}
    return Scores(whole.metrics, whole.resample, {"domain": groups} if groups else {}, extra)


def score_answers(records: list[Record], lines: Lines) -> Scores:
    """Answers against the annotators': overall, by question type and by answer type.

    ``accuracy`` is VQA v2's where a question has several answers and equality where it has one (as
    GQA's is); ``strict_accuracy`` is equality of the raw texts. ``multiple_choice_accuracy`` is the
    accuracy of the likeliest choice, of the questions with choices; a tie is a miss.
    """
    items: dict[str, list[float | None]] = {"accuracy": [], "strict_accuracy": []}
    picked, chance = [], []
    for record in records:
        line, known = lines[record.id], record.answers
        official = metrics.vqa_accuracy if len(known) > 1 else metrics.strict_accuracy
        items["accuracy"].append(official(line["answer"], known))
        items["strict_accuracy"].append(metrics.strict_accuracy(line["answer"], known))
        odds = line.get("choices") if record.choices else None
        if odds:
            likeliest = [choice for choice in odds if odds[choice] == max(odds.values())]
            chance.append(sum(official(choice, known) for choice in odds) / len(odds))
            picked.append(official(likeliest[0], known) if len(likeliest) == 1 else 0.0)
        else:
            picked.append(None)
    extra: dict[str, Any] = {}
    if chance:
        items["multiple_choice_accuracy"] = picked
        extra["with_choices"] = len(chance)
        extra["chance"] = {"multiple_choice_accuracy": sum(chance) / len(chance)}
    kinds = ("question_type", "answer_type")
    groups = {kind: [getattr(record, kind) for record in records] for kind in kinds}
    return metrics.mean_scores(items, groups, **extra)


def task_of(name: str, scoring: dict[str, Any] | None = None) -> Task:
    """The task "vqa" or "caption"; ``scoring``: options of `metrics_captions.plan_captions`."""
    if name == "vqa":
        return Task("answer", by_question, "answers", score_answers)
    score = partial(score_captions, scoring=scoring or {})
    return Task("caption", by_picture, "captions", score)


@dataclass
class Checkpoint:
    """An open checkpoint, and where it runs."""

    found: models.Checkpoint
    place: Place

    def head(self, task: str, source: Source, split: str | None, **how: Any) -> dict[str, Any]:
        """The head of a report, which tells this checkpoint from others."""
        about = {"method": self.found.config.get("method")}
        about |= {side: part["name"] for side, part in models.backbones(self.found.config).items()}
        about["sha256"] = digest(self.found)
        features = self.place.features and str(self.place.features.absolute())
        precision = precision_name(self.place.precision)
        how |= {"checkpoint": about, "features": features, "precision": precision}
        return described(task, self.found.name, source, split, **how)

    def load(
        self, task: str, pictures: dict[str, str], **more: Any
    ) -> tuple[Any, FeatureStore | None]:
        """The model for a task, and the store of features of all pictures {absolute path: id}.

        ``more`` goes to `models.load`.
        """
        place, store = self.place, None
        if place.features is not None:  # before the model, which may take a while
            store = open_store(place.features, self.found.image, self.found.reads, pictures.items())
        where = {"device": place.device, "precision": place.precision}
        model = models.load(self.found, task=task, **where, **more)
        if store is not None:
            store.check(model)
        return model, store


def digest(found: models.Checkpoint) -> str:
    """The SHA-256 of a checkpoint's weights. UserError: they cannot be read."""
    try:
        return file_sha256(found.folder / "model.safetensors")
    except OSError as error:
        message = f"{found.folder}: model.safetensors cannot be read ({error})."
        raise UserError(message) from error


def described(
    task: str, name: str, source: Source, split: str | None, **how: Any
) -> dict[str, Any]:
    """The head of a report: all that decides the result. A resumed run must have the same."""
    path = str(Path(source.path).expanduser().absolute())
    head = {"task": task, "model": name, "data": path, "split": split, "lang": source.lang, **how}
    if source.answers_top is not None:
        head["answers_top"] = source.answers_top
    return json.loads(json.dumps(head))


def run(
    kind: str, name: str, source: Source, *, style: write.Style, place: Place,
    scoring: dict[str, Any] | None = None, shuffle: bool = False, results: Path | None = None,
    frames: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Captions (``kind`` "caption") or answers ("vqa") by a model, scored. -> the report.

    ``scoring`` has options of `metrics_captions.plan_captions`. ``shuffle`` shows another picture
    in each one's place: how much does the model look? ``results`` is also written, for the
    evaluation servers. ``frames`` of a video are in place of the model's own number. Raises
    UserError as its parts do, or if there is nothing to predict.
    """
    task, asks = task_of(kind, scoring), kind == "vqa"
    everything, split = read(source, task, opened=place.features is None)
    records = choose(everything, source, split)
    scored = [record for record in records if getattr(record, task.truth)]
    if not scored and place.out is None and results is None:
        message = f"no {task.truth} to score against; --out or --results keeps the predictions."
        raise UserError(f"{source.path}: {message}", 2)
    if scored:
        data.say_left_out(source.path, records, scored, f"no {task.truth} to score against")
    records = scored or records
    checkpoint = Checkpoint(models.open_checkpoint(name, kind), place)
    if not asks:
        stored = place.features is not None
        name = reranker(checkpoint.found, style.rerank, style, stored=stored)
        style = replace(style, rerank=name)
    modality = checkpoint.found.modality
    readable(
        records, READABLE[modality], "sounds" if modality == "audio" else "pictures and videos"
    )
    if scored and not asks:
        plan_captions(**scoring or {})  # before the long run
    shown = {record.id: record.path for record in records}
    if shuffle:  # among all of the part, so that a greater --limit swaps them the same
        part = choose(everything, replace(source, limit=None), split)
        shown = {record.id: path for record, path in zip(part, swapped(part), strict=True)}
    decoding = dict(vars(style))
    if style.rerank in (None, NONE):
        del decoding["rerank"]
    else:
        decoding["reranker"] = digest(models.open_checkpoint(style.rerank, "retrieve"))
    how = {"decoding": decoding, "shuffled": shuffle, "tinyvl": __version__}
    how |= {} if frames is None else {"frames": frames}
    head = checkpoint.head(kind, source, split, **how)
    ids = {record.path: record.id for record in everything}
    pictures = {path: ids[path] for path in shown.values()}
    model, store = checkpoint.load(kind, pictures, rerank=style.rerank)
    models.take_frames(model, frames)
    log = predictions.Log(place.out, head, resume=place.resume)
    chooses = asks and any(record.choices for record in records)

    def predict(todo: list[Record]) -> Iterator[dict[str, Any] | UserError]:
        def work(part: Sequence[Record]) -> Iterator[tuple]:
            return write.captions(
                model, [shown[record.id] for record in part], style=style, batch=place.batch,
                workers=place.workers, store=store,
                questions=[record.question for record in part] if asks else None,
                choices=[[*dict.fromkeys(record.choices)] for record in part] if chooses else None,
            )  # fmt: skip

        found = ranks.shared(work, todo, place.batch)
        for record, (_, text, score, *odds) in zip(todo, found, strict=True):
            good = {"question": record.question} if asks else {}
            good |= {task.field: text, "score": round(score, 4)}
            good |= {"choices": write.rounded(odds[0])} if any(odds) else {}
            yield text if isinstance(text, UserError) else good

    done, went = log.fill(records, predict, f"{task.field}s", place)

    def finish() -> dict[str, Any]:
        lines = {record.id: log.lines[record.id] for record in done}
        if results is not None:
            predictions.export(results, lines, task.field)
        scores = task.score(done, lines) if scored else Scores({})
        return predictions.report(head | went, len(done), scores, place.out)

    return ranks.told(finish)
