"""Runs in folders: told apart in a table, drawn, and followed as they go."""

import hashlib
import json
import math
import threading
from pathlib import Path

import pytest
import shell
import torch
from PIL import Image
from safetensors.torch import save_file

from tinyvl import UserError, runs


def write(root: Path, name: str, steps: int, of: int, losses: list[float | None]) -> Path:
    """A run of ``of`` steps an epoch, two epochs in all, of which some are done."""
    folder = root / name
    folder.mkdir(parents=True)
    training = {"language": "gpt2", "vision": "/far/vit", "data": "/far/coco.jsonl",
                "recipe": {"epochs": 2}}  # fmt: skip
    config = {"format": 1, "method": "itune", "training": training}
    (folder / "config.json").write_text(json.dumps(config))
    lines = []
    for step in range(1, steps + 1):
        loss = 3 * math.exp(-step / 20)
        lines.append({"step": step, "epoch": step / of, "loss": loss, "captions_per_second": 9.5})
        if step % of == 0 and losses:
            lines.append({"step": step, "val_loss": losses[step // of - 1]})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "log.jsonl").write_text(text + '{"step": 99, "los')  # one that is being written
    save_file(
        {"a": torch.zeros(3, 4), "b": torch.tensor(float(steps))}, folder / "model.safetensors"
    )
    return folder


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    done = write(tmp_path / "runs", "done", 60, 30, [1.5, 1.75])
    write(tmp_path / "runs", "half", 30, 30, [None])
    scores = tmp_path / "scores"
    scores.mkdir()
    sha256 = hashlib.sha256((done / "model.safetensors").read_bytes()).hexdigest()
    report = {"task": "caption", "data": "/far/val.json", "checkpoint": {"sha256": sha256},
              "metrics": {"CIDEr": 0.5, "SPICE": None}}  # fmt: skip
    (scores / "report.json").write_text(json.dumps(report))
    other = tmp_path / "runs" / "other"  # a backbone's folder is no run
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "gpt2"}')
    (other / "model.safetensors").touch()
    return tmp_path


def test_a_table_of_runs_and_their_evaluations(folder):
    done = shell.run("runs", "runs", "scores", "--json")
    first, second = map(json.loads, done.stdout.splitlines())
    assert (first["run"], first["method"], first["data"]) == ("runs/done", "itune", "coco.jsonl")
    assert (first["trained"], first["step"], first["epoch"], first["epochs"]) == (13, 60, 2, 2)
    assert (first["val_loss"], first["metrics"]) == (1.5, {"CIDEr (val)": 0.5})
    assert (second["epoch"], second["val_loss"], second["metrics"]) == (1, None, {})
    head, *rows = (line.split("\t") for line in shell.run("runs").stdout.splitlines())
    assert head == list(runs.COLUMNS)
    assert rows[0][:6] == ["runs/done", "itune", "gpt2 + vit", "0.00 M", "coco.jsonl", "2/2"]
    assert [run.done() for run in runs.find([Path("runs")])] == [True, False]


def test_curves_are_drawn_and_stand_in_a_page(folder):
    pytest.importorskip("matplotlib")
    done = shell.run("runs", "runs", "scores", "--png", "c.png", "--page", "c.html")
    assert done.returncode == 0, done.stderr
    assert Image.open("c.png").width > 3 * Image.open("c.png").height  # three panels
    page = Path("c.html").read_text()
    assert page.count("<tr>") == 3
    assert 'src="data:image/png;base64,' in page
    assert "<form" not in page


def test_without_matplotlib_one_sentence_says_what_to_install(folder, no_matplotlib):
    done = shell.run("runs", "--png", "c.png")
    assert (done.returncode, done.stdout) == (2, "")
    assert "pip install 'tinyvl[plot]'" in done.stderr


def test_a_run_is_followed_until_it_is_done(folder):
    (half,) = runs.find([folder / "runs" / "half"])
    shown = []

    def grow() -> None:
        with (half.folder / "log.jsonl").open("a") as log:
            log.write('s": 1}\n' + json.dumps({"step": 60, "epoch": 2.0, "loss": 0.1}) + "\n")

    timer = threading.Timer(0.3, grow)
    timer.start()
    runs.follow([half], lambda seen: shown.append(seen[0].row()["step"]), seconds=0.05)
    assert shown == [30, 60]
    done = shell.run("runs", half.folder, "--follow")
    assert done.stdout.count("\n") == 2


def test_no_runs_are_said(tmp_path):
    with pytest.raises(UserError, match="no runs"):
        runs.find([tmp_path])
