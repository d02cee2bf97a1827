"""The whole way on the drawn videos and sounds: from fitted tiny backbones to exact answers.

All from the command line, on one core, captions and questions, on new renders.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
import torch
from tiny import fit_decoder, fit_encoder, hinted

from tinyvl import data, draw_av
from tinyvl.encoders_av import build_encoder

TRAIN, HELD_OUT = {"video": 1600, "audio": 640}, 120
EPOCHS = {"video": 30, "audio": 18}  # of the encoder
TINY = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128,
}  # fmt: skip
ENCODERS = {
    "video": TINY | {
        "model_type": "timesformer", "image_size": 64, "patch_size": 16, "num_frames": 4,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    },
    "audio": TINY | {
        "model_type": "audio-spectrogram-transformer", "max_length": 100, "num_mel_bins": 48,
        "patch_size": 8, "frequency_stride": 8, "time_stride": 8,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    },
}  # fmt: skip
MORE = {"video": ["--frames", "4"], "audio": []}


def parsed(record: dict, kind: type):
    return kind(**{name: record[name] for name in kind.__dataclass_fields__})


@pytest.fixture(scope="module", params=["video", "audio"])
def world(request, tmp_path_factory) -> dict:
    root, modality = tmp_path_factory.mktemp(request.param), request.param
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    begun = time.monotonic()
    make = {"video": draw_av.draw_videos, "audio": draw_av.draw_sounds}[modality]
    records = make(root / "data", train=TRAIN[modality], held_out=HELD_OUT)
    kind = {"video": draw_av.Motion, "audio": draw_av.Signal}[modality]
    scenes = [parsed(record, kind) for record in records]
    vision = {"config": ENCODERS[modality], "fit": "squash", "modality": modality, "frames": 4}
    view = build_encoder(vision).view()
    if modality == "video":
        frames = [draw_av.render_video(scene, 0, i)[1::2] for i, scene in enumerate(scenes)]
        inputs = torch.stack([torch.from_numpy(f) for f in frames]).permute(0, 1, 4, 2, 3)
    else:
        made = [draw_av.render_sound(scene, 0, i) for i, scene in enumerate(scenes)]
        inputs = torch.stack([view((sound / 32768).astype("float32")) for sound in made])
    drawn = time.monotonic()
    labels = [asdict(scene) for scene in scenes]
    epochs, rate = EPOCHS[modality], 2e-3
    model, right = fit_encoder(vision, inputs, labels, TRAIN[modality], epochs=epochs, rate=rate)
    print(f"{modality}: drawn in {drawn - begun:.0f} s, encoder fitted in "
          f"{time.monotonic() - drawn:.0f} s: {right.float().mean():.3f} right")  # fmt: skip
    assert right.float().mean() >= 0.97  # the encoder can tell what captions say
    model.save_pretrained(root / "vision")
    train = [record for record in records if record["split"] == "train"]
    asked = [f"{r['question']} Answer: {r['answers'][0]}" for r in train]
    begun = time.monotonic()
    texts = [record["captions"][0] for record in train] + asked
    texts = hinted(texts, labels[: len(train)] * 2)
    lm = fit_decoder(root / "lm", "opt", texts, epochs=4, num_hidden_layers=4)
    print(f"decoder fitted in {time.monotonic() - begun:.0f} s")
    yield {
        "modality": modality, "data": str(root / "data"), "lm": str(lm), "root": root,
        "vision": str(root / "vision"),
    }  # fmt: skip
    torch.set_num_threads(threads)


def tinyvl(*args: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tinyvl.cli", *args],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("task", ["caption", "vqa"])
def test_new_renders_are_captioned_and_answered_exactly(task, world):
    out = world["root"] / task
    begun = time.monotonic()
    tinyvl(
        "train", "epalm", "--modality", world["modality"], "--task", task, "--data", world["data"],
        "--lm", world["lm"], "--vision", world["vision"], "--fit", "squash", "--out", str(out),
        "--inject", "0:4", "--epochs", "12", "--rate", "1e-2", "--batch", "32", "--views", "1",
        "--device", "cpu", *MORE[world["modality"]],
    )  # fmt: skip
    print(f"trained in {time.monotonic() - begun:.0f} s")
    records = data.read(world["data"], split="test")
    if task == "vqa":
        report = json.loads(tinyvl("eval", "vqa", str(out), world["data"], "--quiet"))
        print(f"{world['modality']} {task}: {report['metrics']}")
        assert report["items"] == HELD_OUT
        assert report["metrics"]["strict_accuracy"] >= 0.95
        line = tinyvl("ask", records[0].path, records[0].question, "-m", str(out))
        assert len(line.splitlines()) == 1
        return
    paths = [record.path for record in records]
    said = tinyvl("caption", *paths, "-m", str(out), "--batch", "64", "--beams", "1")
    found = dict(line.split("\t") for line in said.splitlines())
    exact = [found[record.path] == record.captions[0] for record in records]
    print(f"{world['modality']} {task}: {sum(exact) / len(exact):.3f} exact")
    assert sum(exact) / len(exact) >= 0.95
