"""Training runs: found in folders, and told apart by what their files say.

A run is a folder with ``config.json`` and ``log.jsonl`` or ``model.safetensors``; an evaluation is
one with ``report.json`` (`tinyvl eval -o`), which belongs to the run whose weights have its hash.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from time import sleep
from typing import Any

from safetensors import SafetensorError

from tinyvl import UserError, files
from tinyvl.hub_table import file_sha256

COLUMNS = ("run", "method", "backbones", "trained", "data", "epochs", "loss", "val_loss", "metrics",
    "captions_per_second", "when")  # fmt: skip


@dataclass
class Seen:
    """A run, as far as it has come."""

    folder: Path
    config: dict[str, Any]
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    def log(self) -> list[dict[str, Any]]:
        """The lines of its log, without one that is being written."""
        lines = []
        with suppress(OSError):
            for text in (self.folder / "log.jsonl").read_text(encoding="utf-8").splitlines():
                with suppress(ValueError):
                    lines.append(json.loads(text))
        return lines

    def row(self) -> dict[str, Any]:
        """Its line of the table; what is not known is None."""
        log, training = self.log(), self.config.get("training", {})
        last: dict[str, Any] = {}
        for line in log:
            last |= line
        losses = [line["val_loss"] for line in log if line.get("val_loss") is not None]
        epochs = training.get("recipe", {}).get("epochs")
        metrics: dict[str, Any] = {}
        for report in self.evaluations:
            name = Path(str(report.get("data", ""))).stem
            metrics |= {
                f"{metric} ({name})": value
                for metric, value in report["metrics"].items()
                if value is not None
            }
        file = self.folder / ("log.jsonl" if log else "config.json")
        return {
            "run": str(self.folder),
            "method": self.config["method"],
            "language": training.get("language"),
            "vision": training.get("vision"),
            "trained": parameters(self.folder),
            "data": training.get("data") and Path(training["data"]).name,
            "step": last.get("step"),
            "epoch": last.get("epoch"),
            "epochs": epochs,
            "loss": last.get("loss"),
            "val_loss": min(losses, default=None),
            "captions_per_second": last.get("captions_per_second"),
            "metrics": metrics,
            "when": datetime.fromtimestamp(file.stat().st_mtime).isoformat(" ", "minutes"),
        }

    def done(self) -> bool:
        row = self.row()
        return not row["epoch"] or (row["epochs"] or 0) - row["epoch"] < 1e-3


def find(folders: Iterable[Path]) -> list[Seen]:
    """The runs in some folders, by name. UserError: there is none."""
    runs, reports, named = [], [], list(folders)
    for top in named:
        for place, inside, names in os.walk(top):
            inside[:] = sorted(n for n in inside if n != "features" and not n.startswith("."))
            folder = Path(place)
            if "report.json" in names and (report := read(folder / "report.json")):
                reports.append(report)
            if "config.json" in names and {"log.jsonl", "model.safetensors"} & set(names):
                config = read(folder / "config.json")
                if "method" in config:
                    runs.append(Seen(folder, config))
    if not runs:
        raise UserError(f"{', '.join(map(str, named))}: no runs of tinyvl train there.", 2)
    if reports:
        of_weights = {digest(run.folder): run for run in runs}
        for report in reports:
            weights = report.get("checkpoint")
            sha256 = weights.get("sha256") if isinstance(weights, dict) else None
            if sha256 and sha256 in of_weights and isinstance(report.get("metrics"), dict):
                of_weights[sha256].evaluations.append(report)
    return runs


def evaluations(folder: Path, places: Iterable[Path]) -> list[dict[str, Any]]:
    """The reports in some folders that are of one run's weights."""
    sha256, found = digest(folder), {}
    for top in places:
        for file in sorted(top.rglob("report.json")):
            report = read(file)
            about = report.get("checkpoint")
            own = isinstance(about, dict) and sha256 and about.get("sha256") == sha256
            if own and isinstance(report.get("metrics"), dict):
                found[file.resolve()] = report
    return [*found.values()]


def read(file: Path) -> dict[str, Any]:
    """An object of JSON; empty where it cannot be read."""
    with suppress(UserError):
        return files.read_object(file)
    return {}


def digest(folder: Path) -> str | None:
    with suppress(OSError):
        return file_sha256(folder / "model.safetensors")
    return None


def parameters(folder: Path) -> int | None:
    """How many numbers a checkpoint holds; None: there is none yet."""
    with suppress(OSError, SafetensorError):
        return files.numbers_in(folder / "model.safetensors")
    return None


def cells(row: dict[str, Any]) -> dict[str, str]:
    """A row as a person reads it."""

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    trained = row["trained"]
    backbones = [Path(name).name for name in (row["language"], row["vision"]) if name]
    metrics = [f"{name} {number(value, '.3f')}" for name, value in row["metrics"].items()]
    return {
        "run": row["run"],
        "method": row["method"],
        "backbones": " + ".join(backbones) or "-",
        "trained": "-" if trained is None else f"{trained / 1e6:.2f} M",
        "data": row["data"] or "-",
        "epochs": f"{number(row['epoch'], 'g')}/{number(row['epochs'], 'g')}",
        "loss": number(row["loss"], ".3f"),
        "val_loss": number(row["val_loss"], ".3f"),
        "metrics": ", ".join(metrics) or "-",
        "captions_per_second": number(row["captions_per_second"], ".1f"),
        "when": row["when"],
    }


def follow(runs: list[Seen], show: Callable[[list[Seen]], None], seconds: float = 2.0) -> None:
    """Shows the runs whenever a log has grown, until all are done or Control-C."""
    before: list[Any] = []
    with suppress(KeyboardInterrupt):
        while True:
            now = [size(run.folder / "log.jsonl") for run in runs]
            if now != before:
                show(runs)
                before = now
                if all(run.done() for run in runs):
                    return
            sleep(seconds)


def size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def as_table(runs: list[Seen]) -> Any:
    """Rich's table of the runs."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in COLUMNS:
        table.add_column(name.replace("_", " "), overflow="fold")
    for run in runs:
        table.add_row(*cells(run.row()).values())
    return table


def as_lines(runs: list[Seen]) -> Iterator[str]:
    """The table as tab-separated text, its head first."""
    yield "\t".join(COLUMNS)
    for run in runs:
        yield "\t".join(cells(run.row()).values())


def page(runs: list[Seen]) -> str:
    """The table and the curves as one HTML file."""
    import io

    from tinyvl.page import clean, document
    from tinyvl.page_media import uri
    from tinyvl.plots import curves

    curves(runs, drawn := io.BytesIO())
    rows = "".join(
        f"<tr>{''.join(f'<td>{clean(cell)}</td>' for cell in cells(run.row()).values())}</tr>"
        for run in runs
    )
    head = "".join(f"<th>{name.replace('_', ' ')}</th>" for name in COLUMNS)
    image = (
        f'<img class="wide" alt="Curves of the runs" src="{uri("image/png", drawn.getvalue())}">'
    )
    body = f'<div class="scroll"><table><tr>{head}</tr>{rows}</table></div>{image}'
    return document("Runs", f"{len(runs)} runs", body)
