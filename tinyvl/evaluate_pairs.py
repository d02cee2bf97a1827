"""A model that embeds, over a data set: retrieval both ways, and zero-shot classification.

What is kept of a run is a line for each query and the rank of the first right answer, 1 being the
best; everything else is computed from these.
"""

import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyvl import (
    UserError,
    bootstrap,
    classes,
    data,
    media,
    metrics,
    write,
)
from tinyvl import evaluate_predictions as predictions
from tinyvl.data import Record
from tinyvl.device import precision_name
from tinyvl.evaluate import (
    Place,
    Scores,
    Source,
    by_picture,
    checkpoint,
    choose,
    described,
    fill,
    finish,
    load,
    pictures_only,
    read,
)
from tinyvl.evaluate_compare import average_runs
from tinyvl.features import FeatureStore

KS = (1, 5, 10)
LILT = 200  # pictures of XTD10 that LilT evaluates on: those from COCO's val2014


# ----------------------------------------------------------------------------- embedding


def halved(embed: Callable[[Any], Tensor], items: Any) -> Tensor:
    """Embeddings (n, d) on the CPU; a batch that does not fit in memory is halved."""
    try:
        with torch.no_grad():
            return embed(items).float().cpu()
    except torch.OutOfMemoryError:
        if len(items) == 1:
            raise UserError(
                "One picture does not fit in this device's memory; use --device cpu."
            ) from None
    torch.cuda.empty_cache()
    half = len(items) // 2
    print(f"out of memory: going on with batches of {half}", file=sys.stderr)
    return torch.cat([halved(embed, items[:half]), halved(embed, items[half:])])


def embedded(
    model: Any, paths: Sequence[str], place: Place, store: FeatureStore | None
) -> Iterator[Tensor | UserError]:
    """Each picture's unit vector (d,), or what is wrong with it, in order.

    ``store``: nothing is decoded, the pictures are what the encoder made of them, from there.
    """
    if store is not None:
        decoded = write.stored(store, model.reads, paths)
    else:
        encoder = model.encoder
        decoded = media.decode_images(
            paths, encoder.transform(), target=encoder.size, workers=place.workers
        )
    for group in write.gathered(decoded, place.batch):
        good = [picture for _, picture in group if isinstance(picture, Tensor)]
        vectors = iter(halved(model.embed_images, torch.stack(good)) if good else [])
        for _, picture in group:
            yield next(vectors) if isinstance(picture, Tensor) else picture


# ----------------------------------------------------------------------------- retrieval


def run_retrieval(
    name: str,
    source: Source,
    *,
    place: Place,
    langs: list[str] | None = None,
    protocol: str = "full",
    out: Path | None = None,
    features: Path | None = None,
) -> dict[str, Any]:
    """Captions found by picture (TR) and pictures by caption (IR), in each language apart.

    Args:
        langs: languages; None: all that the data has. The report's metrics are their mean.
        protocol: ``"lilt"`` keeps the 200 pictures of XTD10 that the paper's Table 2 is about
            (those of COCO's val2014: its models saw the other 800 in training).
        features: a folder of `tinyvl features`, to read there what the encoder makes of pictures.

    A picture that cannot be read is left out, with its captions.
    """
    known, split = read(replace(source, lang=None), opened=features is None)
    records = [r for r in choose(known, replace(source, limit=None), split) if r.captions]
    pictures_only(records)
    if not records:
        raise UserError(f"{source.path}: no captions to retrieve.", 2)
    if protocol == "lilt":
        records = from_val2014(records, source.path)
    spoken = sorted({record.lang for record in records if record.lang}) or [None]
    if langs is None:
        langs = spoken
    elif missing := [lang for lang in langs if lang not in spoken]:
        has = ", ".join(filter(None, spoken)) or "does not say which it has"
        raise UserError(f"{source.path}: no captions in {missing[0]!r}; {has}.", 2)
    records = [record for record in records if record.lang in (*langs, None)]
    paths = list(dict.fromkeys(record.path for record in records))
    if source.limit is not None:
        order = data.epoch_order(len(paths), 0, 0)[: source.limit]
        paths = [paths[i] for i in sorted(order)]
    head = described(
        "retrieval", name, replace(source, lang=",".join(filter(None, langs)) or None), split,
        protocol=protocol, checkpoint=checkpoint(name, "retrieve"),
        features=str(features.absolute()) if features else None,
        precision=precision_name(place.precision),
    )  # fmt: skip
    if out is not None:
        predictions.refuse(out, head, None)
    ids = {record.path: record.id for record in records}
    model, store = load(name, place, "retrieve", features, {path: ids[path] for path in paths})
    seen: dict[str, Tensor] = {}

    def embed(todo: list[Record]) -> Iterator[dict[str, Any] | UserError]:
        vectors = embedded(model, [record.path for record in todo], place, store)
        for record, vector in zip(todo, vectors, strict=True):
            if isinstance(vector, Tensor):
                seen[record.path] = vector
            yield {} if isinstance(vector, Tensor) else vector

    asked = [Record(path, id=path) for path in paths]
    how = fill(predictions.Log(None, {}), asked, embed, place, "pictures")
    if not seen:
        raise UserError(f"{source.path}: none of its pictures could be read.")
    log = predictions.Log(out, head, resume=None)  # only now: embeddings are not kept
    for lang in langs:
        part = [r for r in records if r.lang in (lang, None) and r.path in seen]
        for line in search(model, part, seen, lang):
            log.add(line)
    scores = retrieval_scores(list(log.lines.values()))
    return finish(head | how, len(seen), scores, out)


def from_val2014(records: list[Record], where: str) -> list[Record]:
    """The pictures that LilT evaluates XTD10 on: 200 of its 1,000, by their names."""
    chosen = [record for record in records if "val" in os.path.basename(record.path)]
    found = len({record.path for record in chosen})
    if found != LILT:
        raise UserError(
            f"{where}: --protocol lilt is for XTD10, which has {LILT} pictures of COCO's val2014; "
            f"here are {found}.",
            2,
        )
    return chosen


def search(
    model: Any, records: list[Record], seen: dict[str, Tensor], lang: str | None
) -> Iterator[dict[str, Any]]:
    """The rank of each picture's best caption, and of each caption's picture."""
    row = {path: i for i, path in enumerate(dict.fromkeys(record.path for record in records))}
    texts = [(caption, row[r.path]) for r in records for caption in r.captions]
    captions, owners = [text for text, _ in texts], [owner for _, owner in texts]
    parts = [captions[i : i + 256] for i in range(0, len(captions), 256)]
    vectors = torch.cat([halved(model.embed_texts, part) for part in parts])  # (M, d)
    pictures = torch.stack([seen[path] for path in row])  # (N, d)
    of_picture, of_text = (ranks.tolist() for ranks in metrics.ranks(pictures, vectors, owners))
    paths = list(row)
    for i, rank in enumerate(of_picture):
        yield {"id": f"{lang} TR {i}", "path": paths[i], "lang": lang, "rank": rank + 1}
    for j, rank in enumerate(of_text):
        line = {"id": f"{lang} IR {j}", "path": paths[owners[j]], "lang": lang, "rank": rank + 1}
        yield line | {"query": captions[j]}


def retrieval_scores(lines: list[dict[str, Any]]) -> Scores:
    """Recalls in each language and their mean, beside those of a random order."""
    row = {path: i for i, path in enumerate(dict.fromkeys(line["path"] for line in lines))}
    parts: dict[str | None, list[dict[str, Any]]] = {}
    for line in lines:
        parts.setdefault(line["lang"], []).append(line)
    resamples = {lang: recalls(part, row) for lang, part in parts.items()}

    def resample(counts: np.ndarray) -> dict[str, np.ndarray]:
        each = [found(counts) for found in resamples.values()]
        return {name: np.mean([values[name] for values in each], axis=0) for name in each[0]}

    once = np.ones((1, len(row)))
    whole = {name: float(values[0]) for name, values in resample(once).items()}
    groups = {}
    for lang, part in parts.items():
        captions = Counter(line["path"] for line in part if "query" in line)
        own = {name: float(values[0]) for name, values in resamples[lang](once).items()}
        size = {"items": len(captions), "captions": captions.total()}
        groups[lang] = {**size, **own, "chance": chance(list(captions.values()))}
    guesses = [group["chance"] for group in groups.values()]
    extra = {
        "captions": sum(group["captions"] for group in groups.values()),
        "chance": {name: float(np.mean([guess[name] for guess in guesses])) for name in whole},
    }
    return Scores(whole, resample, {"language": groups} if len(groups) > 1 else {}, extra)


def recalls(lines: list[dict[str, Any]], row: dict[str, int]) -> bootstrap.Resample:
    """Recall@k and its mean over k, both ways, when picture i counts so often with its captions."""
    totals, hits = {}, {}
    for way in ("TR", "IR"):
        asked = [line for line in lines if ("query" in line) == (way == "IR")]
        rows = [row[line["path"]] for line in asked]
        ranks = np.array([line["rank"] for line in asked])
        totals[way] = np.bincount(rows, minlength=len(row))
        for k in KS:
            hits[way, k] = np.bincount(rows, weights=ranks <= k, minlength=len(row))

    def resample(counts: np.ndarray) -> dict[str, np.ndarray]:
        found = {}
        for way, total in totals.items():
            values = {f"{way}@{k}": counts @ hits[way, k] / (counts @ total) for k in KS}
            found |= values | {f"{way}-mean": np.mean(list(values.values()), axis=0)}
        return found

    return resample


def chance(captions: list[int]) -> dict[str, float]:
    """The recalls to expect of a random order; ``captions``: how many each picture has."""
    pictures, texts = len(captions), sum(captions)
    found = {}
    for k in KS:  # TR: none of a picture's m captions among k of them all
        miss = [
            math.comb(texts - m, k) / math.comb(texts, k) if k <= texts else 0 for m in captions
        ]
        found[f"TR@{k}"] = 1 - sum(miss) / pictures
    found["TR-mean"] = sum(found.values()) / len(KS)
    recall = {f"IR@{k}": min(1.0, k / pictures) for k in KS}
    return found | recall | {"IR-mean": sum(recall.values()) / len(KS)}


# ----------------------------------------------------------------------------- zero-shot


def run_zeroshot(
    name: str,
    source: Source,
    *,
    place: Place,
    prompts: list[str] | None = None,
    class_names: Path | None = None,
    all_classes: bool = False,
    out: Path | None = None,
    resume: bool = False,
    features: Path | None = None,
) -> dict[str, Any]:
    """Pictures classified by the names of their classes: top-1 and top-5, and of each class.

    Args:
        prompts: see `classes.templates`.
        class_names, all_classes: see `classes.names`. The candidates are the classes of the data,
            whatever its part and ``limit``.
        features: as for `run_retrieval`.
    """
    known, split = read(replace(source, lang=None), opened=features is None)
    known = [record for record in by_picture(known) if record.label is not None]
    records = choose(known, source, split) if known else []
    if not records:
        raise UserError(
            f"{source.path}: no record has a class; give a folder with a folder for each class, or "
            "records with a label.",
            2,
        )
    pictures_only(records)
    labels = [record.label for record in known]
    called = classes.names(labels, class_names, all_classes=all_classes)
    templates = classes.templates(prompts)
    head = described(
        "zeroshot", name, replace(source, lang=None), split,
        prompts=templates, class_names=str(class_names) if class_names else None,
        classes=len(called), checkpoint=checkpoint(name, "retrieve"),
        features=str(features.absolute()) if features else None,
        precision=precision_name(place.precision),
    )  # fmt: skip
    pictures = {record.path: record.id for record in records}
    model, store = load(name, place, "retrieve", features, pictures)
    log = predictions.Log(out, head, resume=resume)
    embed_texts = lambda texts: halved(model.embed_texts, texts)  # noqa: E731
    words = metrics.class_embeddings(embed_texts, list(called.values()), templates)  # (C, d)
    place_of = {label: i for i, label in enumerate(called)}

    def predict(todo: list[Record]) -> Iterator[dict[str, Any] | UserError]:
        vectors = embedded(model, [record.path for record in todo], place, store)
        for record, vector in zip(todo, vectors, strict=True):
            if isinstance(vector, UserError):
                yield vector
                continue
            scores = (vector @ words.T)[None]  # (1, C)
            rank = int(metrics.label_ranks(scores, [place_of[record.label]])) + 1
            best = list(called.values())[int(scores.argmax())]
            yield {"label": best, "truth": called[record.label], "rank": rank}

    how = fill(log, records, predict, place, "pictures")
    done = [log.lines[record.id] for record in records if record.id in log.lines]
    if not done:
        raise UserError(f"{source.path}: none of its pictures could be read.")
    return finish(head | how, len(done), zeroshot_scores(done, len(called)), out)


def zeroshot_scores(lines: list[dict[str, Any]], candidates: int) -> Scores:
    """Top-1 and top-5 accuracy, of all and of each class."""
    hits = {f"top{k}": [float(line["rank"] <= k) for line in lines] for k in (1, 5)}
    rows: dict[str, list[int]] = {}
    for i, line in enumerate(lines):
        rows.setdefault(line["truth"], []).append(i)

    def average(part: Sequence[int]) -> dict[str, float]:
        return {name: sum(values[i] for i in part) / len(part) for name, values in hits.items()}

    groups = {name: {"items": len(part), **average(part)} for name, part in sorted(rows.items())}
    guess = {"chance": {"top1": 1 / candidates, "top5": min(1.0, 5 / candidates)}}
    return Scores(average(range(len(lines))), bootstrap.mean_of(hits), {"class": groups}, guess)


# ----------------------------------------------------------------------------- files


def score_folders(kind: str, folders: Sequence[Path]) -> dict[str, Any]:
    """Runs that were kept, scored again; of several (seeds) the mean and the deviation too."""
    return average_runs([kept(kind, folder)[0] for folder in folders])


def compare_folders(kind: str, baseline: Path, folder: Path) -> dict[str, Any]:
    """One kept run against another on the same items: see `evaluate.compare_files`.

    For retrieval a bootstrap draws pictures, each with its captions in all languages.
    """
    (base, theirs, keys), (report, ours, others) = kept(kind, baseline), kept(kind, folder)
    if keys != others:
        raise UserError(f"{baseline} and {folder} were not run on the same items.", 2)
    return {
        **report,
        "baseline": base,
        "difference": bootstrap.differences(
            theirs.metrics, ours.metrics, theirs.resample, ours.resample, report["items"]
        ),
        "resamples": bootstrap.RESAMPLES,
    }


def kept(kind: str, folder: Path) -> tuple[dict[str, Any], Scores, list[str]]:
    """The report and the scores of a run that was kept in a folder, and what its items are."""
    head = predictions.read_run(folder)
    if head.get("task") != kind:
        raise UserError(
            f"{folder}: not a folder that `tinyvl eval {kind} -o` made; name one that it did.", 2
        )
    if not (folder / predictions.REPORT).exists():
        raise UserError(f"{folder}: this run has not come to an end; run it to its end first.")
    lines = sorted(predictions.read_lines(folder), key=lambda line: line["id"])
    if kind == "retrieval":
        scores = retrieval_scores(lines)
    else:
        scores = zeroshot_scores(lines, head["classes"])
    items = len({line["path"] for line in lines})
    report = finish({**head, "predictions": str(folder)}, items, scores, None)
    return report, scores, [f"{line['id']} {line['path']}" for line in lines]
