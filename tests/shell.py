"""The command line as the shell calls it, in this process: a start with its imports takes seconds.

What needs a process of its own (signals, pipes that close, standard input that comes slowly) starts
one: `[sys.executable, "-m", "tinyvl.cli", ...]`.
"""

import io
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner, Result

from tinyvl import cli


def run(*args: object, stdin: str = "", tty: bool = False) -> subprocess.CompletedProcess:
    """``tinyvl ARGS``: its exit status, and what it wrote to standard output and error."""
    source = io.TextIOWrapper(io.BytesIO(os.fsencode(stdin)))
    source.isatty = lambda: tty
    streams = [io.BytesIO(), io.BytesIO()]  # names that are not UTF-8 come out too
    kept = []  # a wrapper that nobody holds closes its stream
    arguments = list(map(str, args))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", source)
        for name, stream in zip(("stdout", "stderr"), streams, strict=True):
            wrapped = io.TextIOWrapper(stream, errors="backslashreplace", write_through=True)
            kept.append(wrapped)
            patch.setattr(sys, name, wrapped)
        patch.setattr(sys, "argv", ["tinyvl", *arguments])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        sys.stdout.flush()
    out, err = (os.fsdecode(stream.getvalue()) for stream in streams)
    return subprocess.CompletedProcess(arguments, exit.value.code or 0, out, err)


def invoke(*args: object) -> Result:
    """``tinyvl ARGS`` without `cli.main` around it: a `UserError` is raised as it is."""
    result = CliRunner().invoke(cli.app, list(map(str, args)))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def apart(*args: str) -> str:
    """``tinyvl ARGS`` in a process of its own, on one thread: what it wrote to standard output."""
    done = subprocess.run(
        [sys.executable, "-m", "tinyvl.cli", *args],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout
