"""A training step asks a GPU for nothing but its loss: shown on the meta device.

Tensors there have shapes and no numbers, so whatever would wait for a GPU fails: `item`, `nonzero`,
a mask as an index, `if` on a tensor.
"""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from tiny import write_decoder, write_text, write_vision

from tinyvl import models, presets, train, train_run
from tinyvl.cli_train import with_encoder

TEXTS = ["a red dog runs", "two cats sleep on the mat"]
CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("backbones")
    made = {f: write_decoder(root / f, f, TEXTS) for f in ("gpt2", "opt", "llama")}
    return made | {"text": write_text(root / "text", TEXTS), "vision": write_vision(root / "v")}


def built(folders: dict[str, Path], method: str, language: str, options: dict) -> models.Method:
    config = models.new_config(
        method, str(folders[language]), str(folders["vision"]), fit="crop", prompt="",
        options=options,
    )  # fmt: skip
    return models.build(config, device=CPU, precision=torch.float32)


@pytest.mark.parametrize("language", ["gpt2", "opt", "llama"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("itune", {"drop": 1, "dropout": 0.1}), ("epalm", {}), ("epalm", {"adapters": 4}),
        ("clipcap", {}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("even", [True, False])
def test_a_captioners_step_waits_for_nothing(folders, method, options, language, even, monkeypatch):
    model = built(folders, method, language, options)
    captions = model.encode(["a red dog", "two cats sleep on the mat", "dog", "runs on"], 12)
    pictures = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    rows = [0, 0, 1, 1] if even else [0, 1, 1, 1]
    batch = model.collate(captions, rows, pictures, [0, 1])
    expected = model.accumulate(batch.split(2))
    assert expected["loss"] > 0
    model.to(META)
    model.zero_grad()
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # not of "meta"
    found = model.accumulate(batch.split(2))
    assert found["loss"].device == META
    assert {n: found[n] for n in ("tokens", "captions")} == {
        n: expected[n] for n in ("tokens", "captions")
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.device == META for p in trained)


@pytest.mark.parametrize("pieces", [1, 2])
def test_lilts_step_waits_for_nothing(folders, pieces):
    options = {"text": {"adapter": "layerwise"}, "image": {"unlock": "layernorm"}}
    model = built(folders, "lilt", "text", options).to(META)
    captions = model.encode([*TEXTS, "a dog", "cats"], 12)
    pictures = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    batch = model.collate(captions, [0, 1, 2, 3], pictures, [0, 1, 2, 3])
    assert model.accumulate(batch.split(pieces))["loss"].device == META


def test_on_a_gpu_a_micro_batch_is_the_batch(tmp_path, monkeypatch):
    """Unless it is given; a resumed run has that which it began with, on whatever device."""
    asked = with_encoder({"preset": "itune-base", "data": "x.jsonl", "out": tmp_path})
    job = presets.job_of("itune", asked)
    assert presets.run_of(job, asked, torch.device("cuda", 1)).micro == job.recipe.batch
    assert presets.run_of(job, asked, CPU).micro == 64
    assert presets.run_of(job, asked | {"micro": 7}, torch.device("cuda")).micro == 7
    (tmp_path / "config.json").touch()
    config = {"method": "itune", "training": {"micro": 512, "asked": {}}}
    monkeypatch.setattr(train_run, "read_config", lambda _: config)
    before = train_run.remembered(tmp_path, "itune")
    assert presets.run_of(job, before | asked, CPU).micro == 512


def test_steps_are_looked_ahead_at_in_order():
    steps = [[1, 2], [], [3]]
    assert list(train.ahead(iter(steps), CPU)) == steps
