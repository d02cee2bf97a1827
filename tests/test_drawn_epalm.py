"""eP-ALM on the drawn pictures and videos: from fitted tiny backbones to exact answers.

All from the command line, on one core, captions and questions, on renders that nothing has seen.
The backbones are fitted apart from each other: the encoder to the labels of renders, the decoder
to follow labels that stand before a text as words. Both are frozen then, and what is trained is a
connection for each level, a soft prompt and adapters (the paper's eP-ALM with adapters).

Combinations of shape and colour that training never shows are reported and not asked for.
Minutes each, so run by hand: pytest -s -m slow tests/test_drawn_epalm.py
"""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image
from shell import apart as tinyvl
from tiny import DRAWN_VIT, fit_encoder, fit_following_decoder, told, write_vision

from tinyvl import data, draw, draw_av
from tinyvl.encoders_av import build_encoder

pytestmark = pytest.mark.slow
PICTURES, CLIPS, RENDERS, HELD_OUT = 6000, 1600, 3200, 240
VIT = DRAWN_VIT | {"embed_dim": 96, "num_heads": 6}
TIMESFORMER = {
    "model_type": "timesformer", "image_size": 32, "patch_size": 8, "num_frames": 2,
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
DECODER = {
    "hidden_size": 96, "word_embed_proj_dim": 96, "ffn_dim": 192, "num_hidden_layers": 4,
}  # fmt: skip
TRAINING = [
    "--inject", "0:4", "--extract", "1:3", "--adapters", "2", "--batch", "64",
    "--views", "1", "--device", "cpu", "--workers", "0",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # here and in the commands: the same sums on any number of cores
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> dict:
    root, begun = tmp_path_factory.mktemp("pictures"), time.process_time()
    draw.draw_images(root / "data", train=PICTURES, held_out=HELD_OUT, seed=0)
    scenes = [scene for scene, _ in draw.scenes(PICTURES, HELD_OUT, seed=0)]
    images = np.stack([draw.render(scene, 0, i) for i, scene in enumerate(scenes)])
    inputs, labels = torch.from_numpy(images).permute(0, 3, 1, 2), [s.labels() for s in scenes]
    write_vision(root / "vision", model_args=VIT)
    config = json.loads((root / "vision/config.json").read_text())
    model, right = fit_encoder(
        {"config": config, "fit": "crop"}, inputs, labels, PICTURES, epochs=10, rate=3e-3,
        readout=True,
    )  # fmt: skip
    write_vision(root / "vision", model_args=VIT, state=model.state_dict())
    seen = torch.tensor([not scene.unseen for scene in scenes[PICTURES:]])
    print(f"encoder: {right[seen].float().mean():.3f} right, {time.process_time() - begun:.0f} s")
    assert right[seen].float().mean() >= 0.98  # the encoder can tell what captions say
    some, begun = scenes[:3000], time.process_time()
    texts = [("", scene.caption()) for scene in some]
    for turn in range(2):
        asked = [scene.question("en", 3 * i + turn) for i, scene in enumerate(some)]
        texts += [(f"{question} Answer:", answer) for question, answer in asked]
    pairs = told(labels[:3000] * 3, texts)
    lm = fit_following_decoder(root / "lm", "opt", pairs, epochs=4, **DECODER)
    print(f"decoder: {time.process_time() - begun:.0f} s")
    return {
        "modality": "image",
        "root": root,
        "lm": str(lm),
        "more": ["--epochs", "8", "--rate", "5e-3"],
    }


def where(motion: draw_av.Motion, number: int) -> dict[str, int]:
    """The third of the width and of the height where a shape is in a frame."""
    first, last = np.array(draw_av.MOVES[motion.move])
    x, y = np.sign(np.round((first + (last - first) * number / (draw_av.FRAMES - 1)) / 10))
    return {"shape": motion.shape, "colour": motion.colour, "column": x, "row": y}


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> dict:
    """The encoder is fitted as TimeSformer's authors do: on single frames, then on clips.

    It sees more renders than are written as files, in four frames each and two pairs of frames.
    """
    root, begun = tmp_path_factory.mktemp("clips"), time.process_time()
    records = draw_av.draw_videos(root / "data", train=CLIPS, held_out=HELD_OUT)
    names = draw_av.Motion.__dataclass_fields__
    labels = [{name: record[name] for name in names} for record in records]
    vision = {"config": TIMESFORMER, "fit": "squash", "modality": "video", "frames": 2}
    encoder = build_encoder(vision)
    frame = encoder.transform()
    drawn = [(draw_av.Motion(**row), index) for index, row in enumerate(labels)]
    known = draw_av.every(draw_av.SHAPES, draw_av.COLOURS, draw_av.MOVES)
    more = [(draw_av.Motion(*known[i % len(known)]), 10_000 + i) for i in range(RENDERS - CLIPS)]
    drawn = drawn[:CLIPS] + more + drawn[CLIPS:]
    inputs = torch.stack([
        torch.stack([frame(Image.fromarray(x)) for x in draw_av.render_video(motion, 0, index)])
        for motion, index in drawn
    ])  # (N, 8, 3, 32, 32)  # fmt: skip
    print(f"drawn: {time.process_time() - begun:.0f} s")
    torch.manual_seed(0)
    torch.nn.init.normal_(encoder.model.embeddings.time_embeddings, std=0.5)
    for layer in encoder.layers:  # attention over time adds nothing at first
        torch.nn.init.zeros_(layer.temporal_dense.weight)
        torch.nn.init.zeros_(layer.temporal_dense.bias)
    places = [where(motion, number) for motion, _ in drawn for number in range(0, 8, 2)]
    model, right = fit_encoder(
        vision, inputs[:, ::2].flatten(0, 1), places, 4 * RENDERS, epochs=5, rate=3e-3,
        readout=True, start=encoder.model,
    )  # fmt: skip
    print(f"stills: {right.float().mean():.3f} right, {time.process_time() - begun:.0f} s")
    pairs = torch.stack([inputs[:, 0::4], inputs[:, 2::4]], 1)  # the second is what --frames 2 sees
    told_twice = [asdict(motion) for motion, _ in drawn for _ in range(2)]
    model, right = fit_encoder(
        vision, pairs.flatten(0, 1), told_twice, 2 * RENDERS, epochs=5, rate=3e-3, readout=True,
        start=model,
    )  # fmt: skip
    right = right[1::2].float().mean()
    print(f"encoder: {right:.3f} right, {time.process_time() - begun:.0f} s")
    assert right >= 0.97  # the encoder can tell what captions say
    model.save_pretrained(root / "vision")
    train, begun = records[:CLIPS], time.process_time()
    texts = [("", record["captions"][0]) for record in train]
    texts += [(f"{record['question']} Answer:", record["answers"][0]) for record in train]
    pairs = told(labels[:CLIPS] * 2, texts)
    lm = fit_following_decoder(root / "lm", "opt", pairs, epochs=4, **DECODER)
    print(f"decoder: {time.process_time() - begun:.0f} s")
    return {
        "modality": "video", "root": root, "lm": str(lm),
        "more": ["--fit", "squash", "--frames", "2", "--epochs", "8", "--rate", "1e-2"],
    }  # fmt: skip


UNBOUND = "the tiny decoder answers 72 % about two objects even with their labels before it"


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        ("pictures", "caption"),
        pytest.param("pictures", "vqa", marks=pytest.mark.xfail(reason=UNBOUND, strict=True)),
        ("clips", "caption"),
        ("clips", "vqa"),
    ],
)
def test_new_renders_are_captioned_and_answered_exactly(kind, task, request):
    world = request.getfixturevalue(kind)
    root, folder = world["root"], str(world["root"] / "data")
    out, begun = root / task, sum(os.times()[2:4])
    more = ["--answer-only"] if task == "vqa" else []
    tinyvl(
        "train", "epalm", "--modality", world["modality"], "--task", task, "--data", folder,
        "--lm", world["lm"], "--vision", str(root / "vision"), "--out", str(out),
        *TRAINING, *world["more"], *more,
    )  # fmt: skip
    print(f"{kind}, {task}: trained in {sum(os.times()[2:4]) - begun:.0f} s")
    records = data.read(folder, split="test", lang="en")
    if task == "vqa":
        tinyvl("eval", "vqa", str(out), folder, "--quiet", "-o", str(root / "answers"))
        lines = map(json.loads, (root / "answers/predictions.jsonl").open())
        found = {line["path"]: line["answer"] for line in lines}
        right = {record.path: record.answers[0] for record in records}
    else:
        said = tinyvl("caption", *(r.path for r in records), "-m", str(out), "--beams", "1")
        found = dict(line.split("\t") for line in said.splitlines())
        right = {record.path: record.captions[0] for record in records}
    listed = [json.loads(line) for line in (root / "data/drawn.jsonl").open()]
    new = {line["id"] for line in listed if line.get("combination") == "unseen"}
    assert found.keys() == right.keys()
    assert len(right) == HELD_OUT
    exact = {path: found[path] == right[path] for path in right}
    seen = [exact[record.path] for record in records if record.id not in new]
    share = sum(exact.values()) / len(exact)
    print(f"{kind}, {task}: {sum(seen) / len(seen):.3f} of {len(seen)}, {share:.3f} of all exact")
    assert sum(seen) / len(seen) >= 0.95
