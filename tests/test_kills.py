"""SIGKILL at random moments, 64 times: what goes on afterwards ends as if nothing had been.

Each run is a fork of this process, which has torch loaded, so that a moment is one of the work and
not of the imports. (`test_train.py`, `test_index.py` and others kill whole processes, once each.)
"""

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import shell
import worlds
from dual import Dual
from tiny import write_captioner, write_text
from worlds import COLOURS, PLACES, job, run

from tinyvl import index, index_source, train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="forks"),
]
Work = Callable[[Path], object]
TEXTS = [f"a {colour} square at the {place}" for colour in COLOURS for place in PLACES]


def start(work: Work, out: Path) -> int:
    """The work in a process of its own, which is silent; -> its id."""
    if pid := os.fork():
        return pid
    try:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        work(out)
        os._exit(0)
    finally:
        os._exit(1)


def finish(work: Work, out: Path) -> float:
    """-> the seconds that it took."""
    begun = time.monotonic()
    _, status = os.waitpid(start(work, out), 0)
    assert status == 0
    return time.monotonic() - begun


def survives(work: Work, folder: Path, result: Callable[[Path], object], kills: int) -> None:
    """Kills the work at random moments of its length, and lets it end: with the whole one's result.

    Where it ends before it is killed, it begins anew elsewhere.
    """
    length, chance, killed = finish(work, folder / "whole"), random.Random(18), 0
    wanted, turn = result(folder / "whole"), 0
    while killed < kills:
        out = folder / f"parts-{turn}"
        pid = start(work, out)
        time.sleep(chance.uniform(0, length))
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        killed += status == signal.SIGKILL
        if status == 0:
            assert result(out) == wanted
            turn += 1
    finish(work, folder / f"parts-{turn}")
    assert result(folder / f"parts-{turn}") == wanted
    print(f"{killed} kills within {length:.1f} s each, {turn + 1} ends", file=sys.stderr)


@pytest.mark.parametrize("method", ["itune", "epalm", "clipcap", "lilt"])
def test_training(method, world, tmp_path):
    options = {"itune": {"drop": 1}, "clipcap": {"heads": 4, "layers": 1, "length": 2}}
    changes: dict = {"method": method, "options": options.get(method, {}), "epochs": 3}
    if method == "lilt":
        text = write_text(
            tmp_path / "text", [*TEXTS, *(f"{c} {p}" for c in COLOURS for p in PLACES)]
        )
        changes |= {"language": str(text), "per_image": 1, "clip": None}
    asked = job(world, **changes)

    def work(out: Path) -> None:
        train.train(asked, run(out, save_every=3, resume=True))

    survives(work, tmp_path, worlds.files, 8)


def test_features(world, tmp_path):
    pictures = worlds.paint(tmp_path / "in", 200)
    vision = Path(world["vision"])
    survives(lambda out: worlds.fill(out, pictures, vision), tmp_path, worlds.content, 8)


def test_index(tmp_path, monkeypatch):
    monkeypatch.setenv("DUAL_SLOW", "0.02")
    worlds.paint(tmp_path / "in", 200)

    def work(out: Path) -> None:
        source = index_source.read_source(str(tmp_path / "in"))
        index.update(out, source, Dual(), name="m", batch=4, workers=0)

    def result(out: Path) -> tuple:
        found = index.Index(out).images
        return found.rows(), found.vectors.tobytes()

    survives(work, tmp_path, result, 8)


@pytest.mark.parametrize("command", ["caption", "eval"])
def test_captions_and_evaluations(command, world, tmp_path):
    model, data = write_captioner(tmp_path / "model", TEXTS), Path(world["data"])
    common = ["--beams", 1, "--max-tokens", 6, "--device", "cpu", "--workers", 0, "--batch", 1]

    def work(out: Path) -> None:
        if command == "caption":
            out.touch()
            shell.run("caption", data.parent, "--model", model, *common, "-o", out, "--resume")
        else:
            score = ["--metrics", "BLEU-4", "--split", "train", "-o", out, "--resume"]
            shell.run("eval", "caption", model, data, *common, *score)

    def result(out: Path) -> str:
        return (out if command == "caption" else out / "predictions.jsonl").read_text()

    survives(work, tmp_path, result, 8)
