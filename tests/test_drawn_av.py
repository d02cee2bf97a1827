"""The whole way on the drawn sounds: from fitted tiny backbones to exact answers.

All from the command line, on one core, captions and questions, on new renders.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product

import pytest
import torch
from shell import apart as tinyvl
from tiny import SEEING, fit_encoder, fit_seeing_decoder

from tinyvl import data, draw_av
from tinyvl.encoders_build import build_encoder

TRAIN, HELD_OUT = 640, 120
AST = {
    "model_type": "audio-spectrogram-transformer", "hidden_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "intermediate_size": 128, "max_length": 100, "num_mel_bins": 48,
    "patch_size": 8, "frequency_stride": 8, "time_stride": 8,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterator[dict]:
    root = tmp_path_factory.mktemp("tones")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # here and in the commands: the same sums on any number of cores
    records = draw_av.draw_sounds(root / "data", train=TRAIN, held_out=HELD_OUT)
    names = draw_av.Signal.__dataclass_fields__
    labels = [{name: record[name] for name in names} for record in records]
    vision = {"config": AST, "fit": "crop", "modality": "audio"}
    view = build_encoder(vision).view()
    sounds = [draw_av.render_sound(draw_av.Signal(**row), 0, i) for i, row in enumerate(labels)]
    inputs = torch.stack([view((sound / 32768).astype("float32")) for sound in sounds])
    model, right = fit_encoder(vision, inputs, labels, TRAIN, epochs=18)
    assert right.float().mean() >= 0.98  # the encoder can tell what captions say
    model.save_pretrained(root / "vision")
    signals = [
        draw_av.Signal(*row)
        for row in product(draw_av.KINDS, draw_av.PITCHES, draw_av.BENDS, draw_av.TIMES)
    ]
    items = []
    for signal in signals * 60:
        items.append((asdict(signal), "", signal.caption()))
        for question, answer in signal.questions():
            items.append((asdict(signal), f"{question} Answer:", answer))
    lm = fit_seeing_decoder(root / "lm", "opt", items, **SEEING)
    yield {
        "data": str(root / "data"), "lm": str(lm), "vision": str(root / "vision"), "root": root,
    }  # fmt: skip
    torch.set_num_threads(threads)


@pytest.mark.parametrize("task", ["caption", "vqa"])
def test_new_renders_are_captioned_and_answered_exactly(task, world):
    out = world["root"] / task
    more = ["--answer-only"] if task == "vqa" else []
    begun = time.monotonic()
    tinyvl(
        "train", "epalm", "--modality", "audio", "--task", task, "--data", world["data"],
        "--lm", world["lm"], "--vision", world["vision"], "--out", str(out),
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
