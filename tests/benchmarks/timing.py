"""What the benchmarks share: runs that take turns, their medians, a table and JSON lines."""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from tinyvl.device import choose_precision, cpu_speed

Ways = dict[str, Callable[[], object]]


def parser(document: str, repeats: int = 3) -> argparse.ArgumentParser:
    """Options that every benchmark has; ``document``: its docstring."""
    parser = argparse.ArgumentParser(description=document.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=repeats, help="turns that are timed")
    parser.add_argument("--json", type=Path, help="a file to append JSON lines to")
    told = "CPU seconds in place of the clock's: for a busy machine, with one thread"
    parser.add_argument("--cpu", action="store_true", help=told)
    return parser


def alternate(
    ways: Ways, options: argparse.Namespace, *, times: int = 1, warm: bool = True
) -> dict[str, list[float]]:
    """Seconds of each way, A, B, A, B, ...: what else the machine does strikes all of them.

    ``options``: those of `parser`; ``times``: more turns of what is short; ``warm``: each way runs
    once before.
    """
    clock = time.process_time if options.cpu else time.perf_counter
    for way in ways.values() if warm else ():
        way()
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.repeats * times):
        for name, way in ways.items():
            started = clock()
            way()
            taken[name].append(clock() - started)
    return taken


def ratio(peer: list[float], ours: list[float]) -> float:
    """How many times as fast as the peer: the median of the turns' ratios."""
    return statistics.median(p / o for p, o in zip(peer, ours, strict=True))


class Report:
    """Rows of a benchmark, shown as a table at the end and appended to a file as JSON lines."""

    def __init__(self, name: str, options: argparse.Namespace):
        """``options``: those of `parser`."""
        self.name, self.file, self.clock = name, options.json, "CPU" if options.cpu else "wall"
        self.rows: list[dict] = []

    def speed(
        self, case: str, taken: dict[str, list[float]], ours: str, count: float, unit: str,
        **targets: float,
    ) -> None:  # fmt: skip
        """A row for each peer in ``taken``; ``targets``: the wanted ratio, by a peer's first word.

        ``count``: how many of the ``unit`` a run handles.
        """
        for peer in [name for name in taken if name != ours] or [None]:
            row = {"case": case, "unit": f"{unit}/s"}
            row["ours"] = count / statistics.median(taken[ours])
            if peer is not None:
                row |= {"peer": peer, "theirs": count / statistics.median(taken[peer])}
                row |= {"ratio": ratio(taken[peer], taken[ours])}
                row |= {"target": targets.get(peer.split()[0])}
            self.add(**row)

    def add(self, case: str, **columns: object) -> None:
        """A row: ours, unit, and optionally peer, theirs, ratio, target, note."""
        row = {"benchmark": self.name, "case": case}
        row |= {name: value for name, value in columns.items() if value is not None}
        self.rows.append(row)
        if self.file is not None:
            about = {"clock": self.clock, "threads": torch.get_num_threads()}
            about["torch"] = torch.__version__
            if hasattr(os, "getloadavg"):
                about["load"] = round(os.getloadavg()[0], 2)
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row | about) + "\n")

    def show(self) -> None:
        """The table. A target with a minus is a most, as of memory."""
        title = f"{self.name}, {torch.get_num_threads()} threads, {self.clock} time"
        table = Table(title=title, title_justify="left")
        for column in ("case", "tinyvl", "peer", "its", "ratio", "target"):
            table.add_column(column, justify="right" if column in ("ratio", "target") else "left")
        for row in self.rows:
            cells = [row["case"]]
            cells.append(number(row.get("ours"), row.get("unit", "")) or row.get("note", ""))
            cells += [row.get("peer", ""), number(row.get("theirs"), row.get("unit", ""))]
            cells += [f"{row['ratio']:.2f}" if "ratio" in row else "", bound(row.get("target"))]
            table.add_row(*cells)
        Console(width=max(120, Console().width)).print(table)


def precisions(report: Report, what: str) -> list[torch.dtype]:
    """fp32, and bf16 where it is a CPU's default; else a row says why not."""
    if choose_precision(None, torch.device("cpu")) == torch.bfloat16:
        return [torch.float32, torch.bfloat16]
    note = f"{cpu_speed(torch.bfloat16):.2f} times fp32's speed here: not measured"
    report.add(f"{what} in bf16", note=note)
    return [torch.float32]


def number(value: float | None, unit: str) -> str:
    return "" if value is None else f"{value:,.4g} {unit}"


def bound(target: float | None) -> str:
    """A target's sign and number: at least, or, where it is negative, at most."""
    if target is None:
        return ""
    return f"≥ {target:.2f}" if target > 0 else f"≤ {-target:.2f}"


def skewed(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """How far two tensors are apart, as a share of the second one's norm."""
    return ((ours - theirs).norm() / theirs.norm().clamp(min=1e-12)).item()
