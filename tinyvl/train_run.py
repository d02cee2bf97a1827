"""A training run: how it is asked to stop."""

import signal
import sys
from contextlib import contextmanager

from tinyvl import UserError
from tinyvl.presets import Run


class Interrupted(UserError):
    """A signal asked for the end; what was done is saved."""

    def __init__(self) -> None:
        super().__init__("stopped and saved; continue with --resume", 130)


@contextmanager
def stopping(run: Run):
    """SIGINT and SIGTERM ask the run to save and end; a second SIGINT ends it at once."""

    def ask(number, frame):
        if run.stop:
            raise KeyboardInterrupt
        run.stop.append(number)
        print("stopping: saving after this step", file=sys.stderr)

    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
