"""Figure 4 on a checkpoint whose LayerNorms were moved by known amounts."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import shell
import torch
from tiny import write_text, write_vision

from tinyvl import UserError, models, plots

CPU = torch.device("cpu")


def checkpoint(folder: Path, adapter: str = "none", unlock: str = "layernorm") -> str:
    """Scale and bias of image layer i are moved by i a channel, of text layer i by 5 - i."""
    tower = {"adapter": adapter, "unlock": unlock}
    config = models.new_config(
        "lilt", str(write_text(folder / "text", ["a red dog"])),
        str(write_vision(folder / "vision")), fit="squash", prompt="",
        options={"image": tower, "text": tower},
    )  # fmt: skip
    model = models.build(config, device=CPU, precision=torch.float32)
    with torch.no_grad():
        for i in range(3):
            block, layer = model.encoder.model.blocks[i], model.text.model.encoder.layer[i]
            for norm, by in (
                (block.norm1, i + 1), (block.norm2, -i - 1),
                (layer.attention.output.LayerNorm, 4 - i), (layer.output.LayerNorm, i - 4),
            ):  # fmt: skip
                norm.weight += by
                norm.bias -= by
        model.encoder.model.norm.bias += 10
    out = folder / "out"
    out.mkdir()
    models.save_config(out, config)
    models.save(model, out)
    return str(out)


@pytest.fixture(scope="module")
def moved(tmp_path_factory) -> str:
    return checkpoint(tmp_path_factory.mktemp("moved"))


def test_shifts_are_l1_norms_by_layer(moved):
    rows = plots.layernorm_shifts(moved)
    assert len(rows) == 2 * (3 * 2 * 2 + 2)  # two towers, layers, norms, parameters; one norm more
    found = {(r["tower"], r["layer"], r["norm"], r["parameter"]): r["l1"] for r in rows}
    for i in (1, 2, 3):
        for norm in (1, 2):
            for parameter in ("scale", "bias"):  # width 32
                assert found["image", i, norm, parameter] == pytest.approx(32 * i, rel=1e-4)
                assert found["text", i, norm, parameter] == pytest.approx(32 * (5 - i), rel=1e-4)
    assert found["image", 4, 0, "bias"] == pytest.approx(320, rel=1e-4)
    assert found["text", 0, 0, "scale"] == 0
    r = plots.correlations(rows)
    assert r["image"]["scale"] == pytest.approx(1, abs=1e-4)
    assert r["text"]["bias"] == pytest.approx(-1, abs=1e-4)


def test_layers_that_training_added_are_left_out(tmp_path):
    rows = plots.layernorm_shifts(checkpoint(tmp_path, adapter="deep"))
    assert {r["layer"] for r in rows if r["norm"]} == {1, 2, 3}


def test_pearson_is_numpys():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=20), rng.normal(size=20)
    for shifts, wanted in ((y, np.corrcoef(x, y)[0, 1]), ([5.0] * 20, None)):
        rows = [("image", layer, 1, "bias", l1) for layer, l1 in zip(x, shifts, strict=True)]
        rows = [dict(zip(plots.FIELDS, row, strict=True)) for row in rows]
        found = plots.correlations(rows)["image"]["bias"]
        assert found is None if wanted is None else found == pytest.approx(wanted)


def test_locked_layernorms_are_said(tmp_path):
    with pytest.raises(UserError, match="were locked"):
        plots.layernorm_shifts(checkpoint(tmp_path, unlock="none"))


def test_from_the_command_line(moved, tmp_path):
    pytest.importorskip("matplotlib")
    command = ["analyze", "layernorm", moved]
    done = shell.run(*command, "--png", tmp_path / "f.png", "-o", tmp_path / "f.csv")
    assert (done.returncode, done.stdout) == (0, "")
    assert "image scale: r = 1.000" in done.stderr
    assert (tmp_path / "f.png").read_bytes()[:4] == b"\x89PNG"
    rows = list(csv.DictReader((tmp_path / "f.csv").open()))
    assert list(rows[0]) == list(plots.FIELDS)
    done = shell.run(*command, "--json")
    found = json.loads(done.stdout)
    assert found["pearson"]["text"]["scale"] == pytest.approx(-1, abs=1e-4)
    assert len(found["shifts"]) == len(rows)


def test_without_matplotlib_one_sentence_says_what_to_install(no_matplotlib, tmp_path):
    with pytest.raises(UserError, match=r"tinyvl\[plot\]"):
        plots.plot([], tmp_path / "f.png")
