"""An evaluation's report as tables on a terminal."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

ROWS, RUNS = 100, 4  # the most rows of a table on a terminal, and of runs beside their mean
DRAWN = (
    "task",
    "data",
    "metrics",
    "groups",
    "difference",
    "baseline",
    "deviation",
    "chance",
    "runs",
)


def draw(report: dict[str, Any]) -> None:
    """The report as tables: the metrics, those of each part; then what was run, a line each."""
    console = Console()
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
    named = {
        name: [cell(column.get(name)) for column in columns.values()] for name in report["metrics"]
    }
    console.print(f"{report['task']}: {report['data']}", highlight=False, markup=False)
    console.print(table(["", *columns], named))
    for kind, parts in report.get("groups", {}).items():
        metrics = [name for name, value in report["metrics"].items() if value is not None]
        rows = {
            name: [str(part["items"]), *(cell(part.get(metric)) for metric in metrics)]
            for name, part in parts.items()
        }
        if kind == "language" and "chance" in report:  # LilT's Table 2
            rows["chance"] = ["", *(cell(report["chance"][metric]) for metric in metrics)]
        title = f"by {kind.replace('_', ' ')}"
        if len(rows) <= ROWS:
            console.print(title)
            console.print(table(["", "items", *metrics], rows))
        else:
            console.print(f"{title}: {len(rows)} rows, which --json has", highlight=False)
    lines = {"A": report.get("baseline", {}).get("predictions")}
    lines |= {"B" if lines["A"] and key == "predictions" else key: report[key] for key in report}
    lines |= {f"run {i}": run["predictions"] for i, run in enumerate(report.get("runs", ()), 1)}
    for key, value in lines.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {part}" for name, part in value.items() if part is not None)
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        if key not in DRAWN and value not in (None, "", False):
            console.print(f"{key.replace('_', ' ')}: {value}", highlight=False, markup=False)


def table(columns: list[str], rows: dict[str, list[str]]) -> Table:
    """A table of numbers that fits 80 columns, with the names of its rows on the left."""
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for i, column in enumerate(columns):
        drawn.add_column(column, justify="right" if i else "left", no_wrap=bool(i))
    for name, cells in rows.items():
        drawn.add_row(name, *cells)
    return drawn


def cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
