"""Commands in one process of several: `python ranked.py FILE`, with the variables of torchrun.

FILE has a JSON list of [arguments, file for what goes to standard output]. A start with its imports
takes seconds, so the commands are run one after another.
"""

import json
import os
import socket
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

HERE = Path(__file__)


def run(folder: Path, commands: list[list], processes: int = 2) -> list[subprocess.Popen]:
    """Runs commands in some processes over gloo; -> these, ended, with what they wrote."""
    file = folder / "commands.json"
    file.write_text(json.dumps([[list(map(str, words)), str(out)] for words, out in commands]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {
        "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, HERE, file], text=True, stderr=subprocess.PIPE,
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(processes)
    ]  # fmt: skip
    for process in started:
        process.errors = process.communicate(timeout=600)[1]
    return started


def main() -> None:
    from tinyvl import cli, features, ranks

    features.SHARD_ROWS = 32  # more shards than one
    end, ranks.end = ranks.end, ranks.wait  # the next command goes on with the same processes
    statuses = []
    for words, out in json.loads(Path(sys.argv[1]).read_text()):
        arguments = sys.argv
        sys.argv = ["tinyvl", *words]
        ranks.start()
        target = open(out if ranks.first() else os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        with target, redirect_stdout(target):
            try:
                cli.main()
            except SystemExit as ended:
                statuses.append(ended.code or 0)
        sys.argv = arguments
    print(json.dumps(statuses), file=ranks.stderr())
    end()


if __name__ == "__main__":
    main()
