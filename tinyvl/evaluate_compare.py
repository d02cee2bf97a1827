"""Predictions made elsewhere: scored, averaged over seeds, compared; and reports as tables.

Is one run better than another, or was it luck with the test set? A paired bootstrap draws the test
items again with replacement, the same draw for both runs, and takes the difference of the scores of
each draw ([Efron and Tibshirani 1993](https://doi.org/10.1201/9780429246593); for BLEU
[Koehn 2004](https://aclanthology.org/W04-3250)). A metric that sums counts over the corpus (BLEU,
METEOR) is computed anew from the sums of each draw.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from tinyvl import UserError
from tinyvl import evaluate_predictions as predictions
from tinyvl.data import say_left_out
from tinyvl.evaluate import Lines, Source, choose, described, prepared, read, task_of
from tinyvl.metrics import Scores

RESAMPLES = 1000
SEED = 0
LEVEL = 0.95
CELLS = 4_000_000  # numbers in memory at once: draws x items


def scored(
    kind: str, paths: Sequence[Path], source: Source, scoring: dict[str, Any] | None,
    allow_missing: bool, *, together: bool,
) -> Iterator[tuple[dict[str, Any], Lines, Scores]]:  # fmt: skip
    """Each file's head of a report, predictions by id and scores; those for others are ignored.

    ``together``: only records count that all files have. The ``run.json`` beside a file says what
    made it.
    """
    task = task_of(kind, scoring)
    rows, split = read(source, opened=False)
    everything, paths_of = prepared(rows, source, task), {row.id: row.path for row in rows}
    part = choose(everything, source, split)
    records = [record for record in part if getattr(record, task.truth)]
    if not records:
        raise UserError(f"{source.path}: no {task.truth} to score against.", 2)
    say_left_out(source.path, part, records, f"no {task.truth} to score against")
    files = []
    for path in paths:
        lines = predictions.read(path, everything, task.field, paths_of)
        done = [record for record in records if record.id in lines]
        if len(done) < len(records) and not (allow_missing and done):
            first = next(record.id for record in records if record.id not in lines)
            lacks = f"{len(records) - len(done)} of {len(records)} records, the first {first!r}"
            advice = "--allow-missing scores the others, --split chooses another part."
            raise UserError(f"{path}: no prediction for {lacks}; {advice}")
        files.append((path, lines, done))
        records = done if together else records
    for path, lines, done in files:
        done = records if together else done
        made = predictions.read_run(path if path.is_dir() else path.parent)
        known = {key: made[key] for key in ("checkpoint", "decoding", "shuffled") if key in made}
        name = made.get("model", str(path))
        head = described(kind, name, source, split, predictions=str(path), **known)
        yield head, {record.id: lines[record.id] for record in done}, task.score(done, lines)


def score_files(
    kind: str, paths: Sequence[Path], source: Source, *, scoring: dict[str, Any] | None = None,
    allow_missing: bool = False, results: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Scores predictions made elsewhere; of several files (seeds), see `average_runs`.

    ``scoring`` has options of `metrics_captions.plan_captions`; ``results`` is also written, for
    the evaluation servers. Raises UserError if there is nothing to score against, or, without
    ``allow_missing``, a record has no prediction.
    """
    reports = []
    for head, lines, scores in scored(kind, paths, source, scoring, allow_missing, together=False):
        reports.append(predictions.report(head, len(lines), scores, None))
        if results is not None:
            predictions.export(results, lines, "answer" if kind == "vqa" else "caption")
    return average_runs(reports)


def average_runs(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Several runs as one report: mean and sample standard deviation. One run is its own report."""
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
    kind: str, baseline: Path, path: Path, source: Source, *,
    scoring: dict[str, Any] | None = None, allow_missing: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Predictions less a baseline's, as in `compared`; see `score_files`."""
    both = scored(kind, [baseline, path], source, scoring, allow_missing, together=True)
    (about, _, base), (head, lines, scores) = both
    report = predictions.report(head, len(lines), scores, None)
    return compared(report, {**about, "metrics": base.metrics}, scores, base)


def compared(
    report: dict[str, Any], baseline: dict[str, Any], scores: Scores, base: Scores
) -> dict[str, Any]:
    """A report with its baseline, and with ``difference``: its metrics less the baseline's.

    ``difference`` is metric -> {"value", "low", "high"}, with a 95 % percentile interval. Both runs
    have the same items in the same order.
    """
    found: dict[str, list[np.ndarray]] = {}
    for counts in draws(report["items"]):
        ours, theirs = scores.resample(counts), base.resample(counts)
        for name in ours.keys() & theirs.keys():
            found.setdefault(name, []).append(ours[name] - theirs[name])
    tails, difference = [(1 - LEVEL) / 2, (1 + LEVEL) / 2], {}
    for name in scores.metrics:
        if name in found:
            low, high = np.quantile(np.concatenate(found[name]), tails)
            value = scores.metrics[name] - base.metrics[name]
            difference[name] = {"value": value, "low": float(low), "high": float(high)}
    extra = {"baseline": baseline, "difference": difference, "resamples": RESAMPLES}
    return {**report, **extra}


def draws(items: int) -> Iterator[np.ndarray]:
    """``RESAMPLES`` draws as counts (R, N), some rows at a time."""
    rng = np.random.Generator(np.random.PCG64(SEED))
    rows = max(1, CELLS // items)
    for start in range(0, RESAMPLES, rows):
        drawn = rng.integers(items, size=(min(rows, RESAMPLES - start), items))
        yield np.stack([np.bincount(row, minlength=items) for row in drawn])


ROWS, RUNS = 100, 4  # the most rows of a table on a terminal, and of runs beside their mean
SHARED = ("data", "split", "lang")  # by two runs that are compared
DRAWN = {
    "task", "data", "metrics", "groups", "difference", "baseline", "deviation", "chance", "runs",
}  # fmt: skip


def draw(report: dict[str, Any]) -> None:
    """The report on a terminal: tables of metrics and groups, then a line for each other field."""
    from rich.console import Console

    console, names = Console(highlight=False, markup=False), list(report["metrics"])
    columns = {"": report["metrics"]}
    if "difference" in report:
        columns = {"A": report["baseline"]["metrics"], "B": report["metrics"]}
        for end, title in (("value", "B - A"), ("low", "95 % from"), ("high", "to")):
            columns[title] = {name: found[end] for name, found in report["difference"].items()}
    elif "runs" in report:
        columns = {"mean": report["metrics"], "deviation": report["deviation"]}
        columns |= {str(i): run["metrics"] for i, run in enumerate(report["runs"][:RUNS], 1)}
    if "chance" in report:
        columns["chance"] = report["chance"]
    console.print(f"{report['task']}: {report['data']}")
    rows = {name: [column.get(name) for column in columns.values()] for name in names}
    console.print(table(["", *columns], rows))
    names = [name for name in names if report["metrics"][name] is not None]
    for kind, parts in report.get("groups", {}).items():
        title = f"by {kind.replace('_', ' ')}"
        if len(parts) > ROWS:
            console.print(f"{title}: {len(parts)} rows, which --json has")
            continue
        rows = {name: [part["items"], *map(part.get, names)] for name, part in parts.items()}
        if kind == "language" and "chance" in report:  # LilT's Table 2
            rows["chance"] = ["", *(report["chance"][name] for name in names)]
        console.print(title)
        console.print(table(["", "items", *names], rows))
    lines: dict[str, Any] = {}
    if base := report.get("baseline"):  # what made each, side by side
        for key in ("predictions", "model", "checkpoint", "decoding", "shuffled"):
            what = f", {key}" if key != "predictions" else ""
            lines |= {f"{side}{what}": own.get(key) for side, own in (("A", base), ("B", report))}
        report = {key: value for key, value in report.items() if key not in base or key in SHARED}
    lines |= report
    lines |= {f"run {i}": run["predictions"] for i, run in enumerate(report.get("runs", ()), 1)}
    for key, value in lines.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {part}" for name, part in value.items() if part is not None)
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        if key not in DRAWN and value not in (None, "", False):
            console.print(f"{key.replace('_', ' ')}: {value}")


def table(columns: list[str], rows: dict[str, list[Any]]) -> Any:
    """A table of numbers within 80 columns, the names of its rows on the left."""

    def cell(value: float | int | str | None) -> str:
        return f"{value:.4f}" if isinstance(value, float) else "-" if value is None else str(value)

    from rich import box
    from rich.table import Table

    drawn = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    for i, column in enumerate(columns):
        drawn.add_column(column, justify="right" if i else "left", no_wrap=bool(i), overflow="fold")
    for name, values in rows.items():
        drawn.add_row(name, *map(cell, values))
    return drawn
