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
        begun = last = time.monotonic()
        done = start

        def advance(n: int, text: str = "") -> None:
            nonlocal done, last
            done, now = done + n, time.monotonic()
            if now - last > 30 or done == total:
                last, left = now, (now - begun) / (done - start) * (total - done)
                say(f"{title}: {done}/{total}  {left / 60:.0f} min left  {text}")

        yield advance
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (
        "{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        "{task.fields[text]}",
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=total, completed=start, text="")
        yield lambda n, text="": progress.update(task, advance=n, text=text)
