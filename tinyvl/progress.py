"""What a long job says while it runs, on standard error: lines and bars."""

import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tinyvl import UserError, ranks


def say(message: str, quiet: bool = False) -> None:
    """A line on standard error."""
    if not quiet:
        print(message, file=sys.stderr, flush=True)


def skip(why: str, own: bool = False) -> None:
    """Names an input that is left out, and why: ``FILE: REASON``.

    ``own``: of several processes only this one knows it.
    """
    print(f"tinyvl: skipping {why}", file=ranks.stderr() if own else sys.stderr)


def duration(seconds: float) -> str:
    """ "40 s", "3 min", "2.5 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


@contextmanager
def bar(title: str, total: int | None, quiet: bool = False, start: int = 0):
    """A Rich bar on a terminal; elsewhere a line at most every half minute. -> advance(n, text).

    Both say the count, the rate and the time left, by the mean of all that was done so far: results
    come in batches, and a rate over the last seconds would be that inside a batch. Without a
    ``total``, which a pipe does not tell, there is no time left.
    """
    if quiet or total == start:
        yield lambda n, text="": None
        return
    begun, done = time.monotonic(), start

    def pace(n: int) -> str:
        nonlocal done
        done += n
        rate = (done - start) / max(time.monotonic() - begun, 1e-3)
        speed = f"{rate:.1f}/s" if rate >= 1 or not rate else f"{1 / rate:.1f} s each"
        return speed + (f", {duration((total - done) / rate)} left" if total and rate else "")

    if not sys.stderr.isatty():
        last, of = begun, "" if total is None else f"/{total:,}"

        def advance(n: int, text: str = "") -> None:
            nonlocal last
            now, speed = time.monotonic(), pace(n)
            if now - last > 30:
                last = now
                say(f"{title}: {done:,}{of}  {speed}  {text}".rstrip())

        yield advance
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress

    columns = (
        "{task.description}", BarColumn(), MofNCompleteColumn(), "{task.fields[pace]}",
        "{task.fields[text]}",
    )  # fmt: skip
    both = sys.stdout.isatty()  # then lines of data go above the bar
    with Progress(*columns, console=Console(stderr=True), redirect_stdout=both) as progress:
        task = progress.add_task(title, total=total, completed=start, pace="", text="")
        yield lambda n, text="": progress.update(task, advance=n, pace=pace(n), text=text)


@dataclass
class Told:
    """What is said of many files on standard error while they are worked on, and at the end."""

    what: str = "files"
    total: int | None = None  # None: a pipe does not tell
    out: Path | None = None
    quiet: bool = True

    def end(self, count: int, failed: int, seconds: float) -> None:
        """``count``: with those that ``failed``."""
        if count > 1:
            many = f", {failed:,} failed" if failed else ""
            done = f"{count - failed:,} {self.what}"
            say(f"tinyvl: {done} in {duration(seconds)}{many}", self.quiet)

    def stopped(self, count: int) -> UserError:
        """On Control-C."""
        of = f" of {self.total:,}" if self.total else ""
        advice = f"go on with -o {self.out} --resume" if self.out else "--resume needs -o FILE"
        return UserError(f"stopped after {count:,}{of} {self.what}; {advice}", 130)
