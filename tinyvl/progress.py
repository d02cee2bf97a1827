"""What a long job says while it runs, on standard error: lines and bars."""

import sys
import time
from contextlib import contextmanager


def say(message: str, quiet: bool = False) -> None:
    """A line on standard error."""
    if not quiet:
        print(message, file=sys.stderr, flush=True)


def skip(why: str) -> None:
    """Names an input that is left out, and why: ``FILE: REASON``."""
    print(f"tinyvl: skipping {why}", file=sys.stderr)


@contextmanager
def bar(title: str, total: int, quiet: bool = False, start: int = 0):
    """A Rich bar on a terminal; elsewhere a line at most every half minute. -> advance(n, text)."""
    if quiet or total == start:
        yield lambda n, text="": None
        return
    if not sys.stderr.isatty():
        begun = time.monotonic()
        done, last = [start], [begun]

        def advance(n: int, text: str = "") -> None:
            done[0] += n
            if time.monotonic() - last[0] > 30 or done[0] == total:
                last[0] = time.monotonic()
                pace = (time.monotonic() - begun) / (done[0] - start)
                left = f"{pace * (total - done[0]) / 60:.0f} min left"
                say(f"{title}: {done[0]}/{total}  {left}  {text}")

        yield advance
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[text]}"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=total, completed=start, text="")
        yield lambda n, text="": progress.update(task, advance=n, text=text)
