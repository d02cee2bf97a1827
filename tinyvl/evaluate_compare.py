"""Predictions made elsewhere: scored, averaged over seeds, compared with confidence intervals."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from tinyvl import UserError, bootstrap
from tinyvl import evaluate_predictions as predictions
from tinyvl.data import Record
from tinyvl.evaluate import Scoring, Source, Task, choose, described, finish, read, task_of


def of_files(
    kind: str,
    paths: list[Path] | None,
    pair: tuple[Path, Path] | None,
    source: Source,
    **options: Any,
) -> dict[str, Any]:
    """`compare_files` of a pair, `score_files` of anything else."""
    if pair:
        options.pop("results", None)
        return compare_files(kind, *pair, source, **options)
    return score_files(kind, paths, source, **options)


def score_files(
    kind: str,
    paths: Sequence[Path],
    source: Source,
    *,
    scoring: Scoring | None = None,
    allow_missing: bool = False,
    results: Path | None = None,
) -> dict[str, Any]:
    """Scores predictions made elsewhere; of several files, runs of one model with other seeds.

    Args:
        paths: files or run folders, see `predictions.read`. Several give the mean of each metric,
            its sample standard deviation, and each run's own.
        allow_missing: score the records that have a prediction; else each must have one.
        results: also write what the evaluation servers take to this file.
    """
    task = task_of(kind, scoring)
    everything, records, split = truths(task, source)
    reports = []
    for path in paths:
        texts, done = made_elsewhere(task, path, everything, records, allow_missing)
        head = head_of_file(kind, path, source, split)
        reports.append(finish(head, len(done), task.score(done, texts), None))
        if results is not None:
            predictions.export(
                results, {record.id: texts[record.id] for record in done}, task.field
            )
    return average_runs(reports)


def average_runs(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Several runs as one report: mean and sample standard deviation; a run alone is itself."""
    if len(reports) == 1:
        return reports[0]
    first = reports[0]
    columns = {name: [r["metrics"][name] for r in reports] for name in first["metrics"]}
    whole = {name: values for name, values in columns.items() if None not in values}
    return {
        **{key: first[key] for key in ("task", "data", "split", "lang", "items")},
        "model": ", ".join(dict.fromkeys(report["model"] for report in reports)),
        "metrics": {n: mean(whole[n]) if n in whole else None for n in columns},
        "deviation": {n: stdev(whole[n]) if n in whole else None for n in columns},
        "runs": reports,
    }


def compare_files(
    kind: str,
    baseline: Path,
    path: Path,
    source: Source,
    *,
    scoring: Scoring | None = None,
    allow_missing: bool = False,
) -> dict[str, Any]:
    """Predictions against a baseline's: the differences with 95 % confidence intervals.

    The report's metrics are those of ``path``; ``difference`` is theirs less the baseline's, with
    the ``low`` and ``high`` end of a paired bootstrap's interval (see `bootstrap.differences`).
    ``allow_missing``: score the records that have both predictions.
    """
    task = task_of(kind, scoring)
    everything, records, split = truths(task, source)
    theirs, done = made_elsewhere(task, baseline, everything, records, allow_missing)
    ours, done = made_elsewhere(task, path, everything, done, allow_missing)
    scores, base = task.score(done, ours), task.score(done, theirs)
    head = head_of_file(kind, path, source, split)
    return {
        **finish(head, len(done), scores, None),
        "baseline": {**head_of_file(kind, baseline, source, split), "metrics": base.metrics},
        "difference": bootstrap.differences(
            base.metrics, scores.metrics, base.resample, scores.resample, len(done)
        ),
        "resamples": bootstrap.RESAMPLES,
    }


def truths(task: Task, source: Source) -> tuple[list[Record], list[Record], str | None]:
    """All records, those that predictions are scored on, and the name of that part."""
    everything, split = read(source, task, opened=False)
    records = [r for r in choose(everything, source, split) if getattr(r, task.truth)]
    if not records:
        raise UserError(f"{source.path}: no {task.truth} to score against.", 2)
    return everything, records, split


def made_elsewhere(
    task: Task, path: Path, everything: list[Record], records: list[Record], allow_missing: bool
) -> tuple[dict[str, str], list[Record]]:
    """A file's predictions, and the records that have one. Those for other parts are left aside."""
    texts = predictions.match(predictions.read(path, task.field), everything, task.field)
    done = [record for record in records if record.id in texts]
    if len(done) < len(records) and not (allow_missing and done):
        first = next(record.id for record in records if record.id not in texts)
        raise UserError(
            f"{path}: no prediction for {len(records) - len(done)} of {len(records)} records, the "
            f"first {first!r}; --allow-missing scores the others, --split chooses another part."
        )
    return texts, done


def head_of_file(kind: str, path: Path, source: Source, split: str | None) -> dict[str, Any]:
    """A report's head; what made the predictions is told by the ``run.json`` beside them."""
    made = predictions.read_run(path if path.is_dir() else path.parent)
    known = {key: made[key] for key in ("checkpoint", "decoding", "shuffled") if key in made}
    name = made.get("model", str(path))
    return described(kind, name, source, split, predictions=str(path), **known)
