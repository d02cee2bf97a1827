"""The whole way on the drawn sounds: from fitted tiny backbones to exact answers.

All from the command line, on one core, captions and questions, on new renders.
"""

import json
import time

import pytest
import worlds
from shell import apart as tinyvl

from tinyvl import data

HELD_OUT = 120


@pytest.fixture(scope="module")
def world(one_thread, tmp_path_factory) -> dict[str, str]:
    return worlds.tones(tmp_path_factory.mktemp("tones"), train=640, held_out=HELD_OUT)


@pytest.mark.parametrize("task", [pytest.param("caption", marks=pytest.mark.slow), "vqa"])
def test_new_renders_are_captioned_and_answered_exactly(task, world, tmp_path):
    out = tmp_path / "out"
    more = ["--answer-only"] if task == "vqa" else []
    begun = time.monotonic()
    tinyvl(
        "train", "epalm", "--modality", "audio", "--task", task, "--data", world["data"],
        "--lm", world["language"], "--vision", world["vision"], "--out", str(out),
        "--inject", "0:2", "--extract", "1:3", "--epochs", "12", "--rate", "5e-3", "--batch", "32",
        "--views", "1", "--device", "cpu", *more,
    )  # fmt: skip
    print(f"trained in {time.monotonic() - begun:.0f} s")
    records = data.read(world["data"], split="test")
    if task == "vqa":
        report = json.loads(tinyvl("eval", "vqa", str(out), world["data"], "--quiet"))
        print(f"{task}: {report['metrics']}")
        assert report["items"] == HELD_OUT
        assert report["metrics"]["strict_accuracy"] >= 0.95
        line = tinyvl("ask", records[0].path, records[0].question, "-m", str(out))
        assert len(line.splitlines()) == 1
        return
    paths = [record.path for record in records]
    said = tinyvl("caption", *paths, "-m", str(out), "--batch", "64", "--beams", "1")
    found = dict(line.split("\t") for line in said.splitlines())
    exact = [found[record.path] == record.captions[0] for record in records]
    print(f"{task}: {sum(exact) / len(exact):.3f} exact")
    assert sum(exact) / len(exact) >= 0.95
