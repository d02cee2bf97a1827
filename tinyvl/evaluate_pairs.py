"""A model that embeds, over a data set: retrieval both ways, and zero-shot classification.

A run keeps a line for each query with the rank of the first right answer, 1 being the best. All
scores are computed from these.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyvl import UserError, classes, metrics, models, ranks, write
from tinyvl import evaluate_predictions as predictions
from tinyvl.data import Record, say_left_out
from tinyvl.device import Pieces
from tinyvl.evaluate import Checkpoint, Place, Source, by_picture, choose, limited, read, readable
from tinyvl.evaluate_compare import average_runs, compared
from tinyvl.media_workers import decode_images
from tinyvl.metrics import Scores

LENGTH = 30  # of a text in tokens: as LilT's authors evaluate
LILT = 200  # pictures of XTD10 that LilT evaluates on: those from COCO's val2014


class Run:
    """A checkpoint that looks at the pictures of records, and the head of its report."""

    def __init__(
        self, task: str, name: str, source: Source, split: str | None, records: list[Record],
        place: Place, **how: Any,
    ):  # fmt: skip
        """Raises UserError if ``place.out`` is in use, or the checkpoint or features do not fit."""
        checkpoint = Checkpoint(models.open_checkpoint(name, "retrieve"), place)
        self.place, self.head = place, checkpoint.head(task, source, split, **how)
        if place.out is not None and ranks.first():
            predictions.refuse(place.out, self.head, place.resume)
        known = {record.path: record.id for record in records}
        self.model, self.store = checkpoint.load("retrieve", known)

    def look(
        self, log: predictions.Log, records: list[Record],
        answer: Callable[[Record, Tensor], dict[str, Any]],
    ) -> tuple[list[Record], dict[str, Any]]:  # fmt: skip
        """Logs ``answer(record, its picture's unit vector (d,))``; returns as `Log.fill`.

        With features no picture is decoded: the encoder's output is read from there.
        """
        model, place, pieces = self.model, self.place, Pieces()

        def vectors(good: list[tuple[str, Tensor]]) -> Tensor:
            return embed(model.embed_images, torch.stack([picture for _, picture in good]), pieces)

        def work(paths: Iterable[str]) -> Iterator[Tensor | UserError]:
            if self.store is not None:
                decoded = write.stored(self.store, model.reads, paths)
            else:
                view, size = model.encoder.transform(), model.encoder.size
                decoded = decode_images(paths, view, target=size, workers=place.workers)
            groups = write.gathered(decoded, place.batch)
            return (vector for group in groups for _, vector in write.computed(group, vectors))

        def predict(todo: list[Record]) -> Iterator[dict[str, Any] | UserError]:
            found = ranks.shared(work, [record.path for record in todo], place.batch)
            for record, vector in zip(todo, found, strict=True):
                yield answer(record, vector) if isinstance(vector, Tensor) else vector

        return log.fill(records, predict, "pictures", place)


def embed(function: Callable[[Any], Tensor], items: Any, pieces: Pieces | None = None) -> Tensor:
    """Embeddings (n, d) on the CPU, in pieces where memory is short."""

    def attempt(number: int) -> Tensor:
        size = -(-len(items) // number)
        with torch.no_grad():
            parts = [function(items[i : i + size]) for i in range(0, len(items), size)]
            return torch.cat([part.float().cpu() for part in parts])

    return (pieces or Pieces()).run(attempt, len(items))


def run_retrieval(
    name: str, source: Source, *, place: Place, langs: list[str] | None = None,
    protocol: str = "full",
) -> dict[str, Any]:  # fmt: skip
    """Finds captions by picture (TR) and pictures by caption (IR), in each language apart.

    A picture that cannot be read is left out, with its captions. The report's metrics are the mean
    of those of ``langs`` (None: all that the data has). ``protocol`` "lilt" keeps the 200 pictures
    of XTD10 of the paper's Table 2 (those of COCO's val2014: its models saw the other 800 in
    training). Raises UserError as `Run` does, or if there are no captions, or none in a language,
    or no picture can be read.
    """
    records, langs, split = captioned(source, langs, protocol, files=place.features is None)
    pictures = limited(list({record.path: record for record in records}.values()), source.limit)
    source = replace(source, lang=",".join(filter(None, langs)) or None)
    place = replace(place, resume=None)  # embeddings are not kept
    run = Run("retrieval", name, source, split, pictures, place, protocol=protocol)
    seen: dict[str, Tensor] = {}

    def see(record: Record, vector: Tensor) -> dict[str, Any]:
        seen[record.path] = vector
        return {}

    asked = [Record(record.path, id=record.path) for record in pictures]
    done, went = run.look(predictions.Log(None, run.head), asked, see)

    def finish() -> dict[str, Any]:
        log = predictions.Log(place.out, run.head, resume=None)
        for lang in langs:
            part = [r for r in records if r.lang in (lang, None) and r.path in seen]
            for line in search(run.model, part, seen, lang):
                log.add(line)
        scores = retrieval_scores(list(log.lines.values()))
        return predictions.report(run.head | went, len(done), scores, place.out)

    return ranks.told(finish)


def captioned(
    source: Source, langs: list[str] | None, protocol: str, files: bool
) -> tuple[list[Record], list[str | None], str | None]:
    """The records with captions in some languages, these languages, and the part's name."""
    known, split = read(replace(source, lang=None), opened=files)
    part = choose(known, replace(source, limit=None), split)
    records = [record for record in part if record.captions]
    say_left_out(source.path, part, records, "no captions")
    readable(records, ["image"], "pictures")
    if not records:
        raise UserError(f"{source.path}: no captions to retrieve.", 2)
    if protocol == "lilt":
        records = [record for record in records if "val" in os.path.basename(record.path)]
        found = len({record.path for record in records})
        if found != LILT:
            wanted = f"XTD10, which has {LILT} pictures of COCO's val2014"
            raise UserError(f"{source.path}: --protocol lilt is for {wanted}; here are {found}.", 2)
    spoken = sorted({record.lang for record in records if record.lang}) or [None]
    langs = None if langs == ["all"] else langs
    if missing := [lang for lang in langs or () if lang not in spoken]:
        has = ", ".join(filter(None, spoken)) or "does not say which it has"
        raise UserError(f"{source.path}: no captions in {missing[0]!r}; {has}.", 2)
    langs = spoken if langs is None else langs
    return [record for record in records if record.lang in (*langs, None)], langs, split


def search(
    model: Any, records: list[Record], seen: dict[str, Tensor], lang: str | None
) -> Iterator[dict[str, Any]]:
    """The rank of each picture's best caption, and of each caption's picture."""
    paths = list(dict.fromkeys(record.path for record in records))
    row = {path: i for i, path in enumerate(paths)}
    captions = [caption for record in records for caption in record.captions]
    owners = [row[record.path] for record in records for _ in record.captions]
    vectors = embed(partial(model.embed_texts, max_tokens=LENGTH), captions)  # (M, d)
    pictures = torch.stack([seen[path] for path in paths])  # (N, d)
    of_picture, of_text = (ranks.tolist() for ranks in metrics.ranks(pictures, vectors, owners))
    for i, rank in enumerate(of_picture):
        yield {"id": f"{lang} TR {i}", "path": paths[i], "lang": lang, "rank": rank + 1}
    for j, rank in enumerate(of_text):
        line = {"id": f"{lang} IR {j}", "path": paths[owners[j]], "lang": lang, "rank": rank + 1}
        yield line | {"query": captions[j]}


def retrieval_scores(lines: list[dict[str, Any]]) -> Scores:
    """Recalls in each language and their mean, beside those of a random order.

    A bootstrap draws pictures, each with its captions in all languages.
    """
    row = {path: i for i, path in enumerate(dict.fromkeys(line["path"] for line in lines))}
    once, resamples, groups = np.ones((1, len(row))), [], {}
    for lang in dict.fromkeys(line["lang"] for line in lines):
        asked = {"TR": [], "IR": []}
        for line in lines:
            if line["lang"] == lang:
                asked["IR" if "query" in line else "TR"].append((line["path"], line["rank"] - 1))
        captions = Counter(path for path, _ in asked["IR"])
        found = {way: np.array([(row[p], r) for p, r in part]).T for way, part in asked.items()}
        resamples.append(metrics.recall_of(found, len(row)))
        own = {name: float(values[0]) for name, values in resamples[-1](once).items()}
        size = {"items": len(captions), "captions": captions.total()}
        groups[lang] = {**size, **own, "chance": metrics.chance(list(captions.values()))}

    def resample(counts: np.ndarray) -> dict[str, np.ndarray]:
        each = [found(counts) for found in resamples]
        return {name: np.mean([values[name] for values in each], axis=0) for name in each[0]}

    whole = {name: float(values[0]) for name, values in resample(once).items()}
    guesses = [group["chance"] for group in groups.values()]
    extra = {
        "captions": sum(group["captions"] for group in groups.values()),
        "chance": {name: float(np.mean([guess[name] for guess in guesses])) for name in whole},
    }
    return Scores(whole, resample, {"language": groups} if len(groups) > 1 else {}, extra)


def run_zeroshot(
    name: str, source: Source, *, place: Place, prompts: list[str] | None = None,
    class_names: Path | None = None, all_classes: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Classifies pictures by the names of their classes: top-1 and top-5, and of each class.

    The candidates are the classes of all the data, also where only a part or a limit is evaluated.
    See `classes.templates` for ``prompts``, and `classes.names` for ``class_names``. Raises
    UserError as these and `Run` do, or if no record has a class or no picture can be read.
    """
    source = replace(source, lang=None)
    known, split = read(source, opened=place.features is None)
    pictures = by_picture(known)
    known = [record for record in pictures if record.label is not None]
    say_left_out(source.path, pictures, known, "no class")
    records = choose(known, source, split) if known else []
    if not records:
        advice = "give a folder with a folder for each class, or records with a label."
        raise UserError(f"{source.path}: no record has a class; {advice}", 2)
    readable(records, ["image"], "pictures")
    called = classes.names([r.label for r in known], class_names, all_classes=all_classes)
    number, words = {label: i for i, label in enumerate(called)}, list(called.values())
    templates = classes.templates(prompts)
    how = {"class_names": class_names and str(class_names), "classes": len(called)}
    run = Run("zeroshot", name, source, split, records, place, prompts=templates, **how)
    log = predictions.Log(place.out, run.head, resume=place.resume)
    embed_texts = partial(embed, run.model.embed_texts)
    vectors = classes.class_embeddings(embed_texts, words, templates)  # (C, d)

    def classify(record: Record, vector: Tensor) -> dict[str, Any]:
        scores = (vector @ vectors.T)[None]  # (1, C)
        rank = int(metrics.label_ranks(scores, [number[record.label]])) + 1
        best = words[int(scores.argmax())]
        return {"label": best, "truth": called[record.label], "rank": rank}

    done, went = run.look(log, records, classify)

    def finish() -> dict[str, Any]:
        scores = zeroshot_scores([log.lines[record.id] for record in done], len(called))
        return predictions.report(run.head | went, len(done), scores, place.out)

    return ranks.told(finish)


def zeroshot_scores(lines: list[dict[str, Any]], candidates: int) -> Scores:
    """Top-1 and top-5 accuracy, overall and of each class."""
    hits = {f"top{k}": [float(line["rank"] <= k) for line in lines] for k in (1, 5)}
    guess = {"top1": 1 / candidates, "top5": min(1.0, 5 / candidates)}
    return metrics.mean_scores(hits, {"class": [line["truth"] for line in lines]}, chance=guess)


def score_folders(kind: str, folders: Sequence[Path]) -> dict[str, Any]:
    """Scores kept runs again; of several (seeds) also mean and deviation."""
    return average_runs([kept(kind, folder)[0] for folder in folders])


def compare_folders(kind: str, baseline: Path, folder: Path) -> dict[str, Any]:
    """One kept run less another on the same items: see `evaluate_compare.compared`."""
    (base, theirs, keys), (report, ours, others) = kept(kind, baseline), kept(kind, folder)
    if keys != others:
        raise UserError(f"{baseline} and {folder} were not run on the same items.", 2)
    return compared(report, base, ours, theirs)


def kept(kind: str, folder: Path) -> tuple[dict[str, Any], Scores, list[str]]:
    """The report and scores of a run that was kept in a folder, and its items."""
    head = predictions.read_run(folder)
    if head.get("task") != kind:
        message = f"not a folder that `tinyvl eval {kind} -o` made; name one that it did."
        raise UserError(f"{folder}: {message}", 2)
    if not (folder / predictions.REPORT).exists():
        raise UserError(f"{folder}: this run has not come to an end; run it to its end first.")
    lines = sorted(predictions.read_lines(folder), key=lambda line: line["id"])
    retrieval = kind == "retrieval"
    scores = retrieval_scores(lines) if retrieval else zeroshot_scores(lines, head["classes"])
    items = len({line["path"] for line in lines})
    report = predictions.report({**head, "predictions": str(folder)}, items, scores, None)
    return report, scores, [f"{line['id']} {line['path']}" for line in lines]
