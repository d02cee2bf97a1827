"""eP-ALM on the drawn pictures and videos: from fitted tiny backbones to exact answers.

All from the command line, on one core, captions and questions, on renders that nothing has seen.
The backbones are fitted apart from each other: the encoder to the labels of renders, the decoder
to texts about labels that stand before them as one vector. Both are frozen then; what is trained
is the paper's eP-ALM: a connection for each level, and a soft prompt.

Combinations of shape and colour that training never shows are reported and not asked for. The
paper's variants and baselines on the same budget: pytest -s -m slow tests/test_drawn_epalm.py
"""

import json
import os
import random
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product

import numpy as np
import pytest
import torch
import worlds
from PIL import Image
from shell import apart as tinyvl
from tiny import DRAWN_VIT, SEEING, fit_encoder, fit_seeing_decoder, write_vision

from tinyvl import data, draw, draw_av
from tinyvl.models_build import build_encoder

PICTURES, CLIPS, RENDERS, HELD_OUT = 6000, 1600, 3200, 240
VIT = DRAWN_VIT | {"embed_dim": 96, "num_heads": 6}
TIMESFORMER = {
    "model_type": "timesformer", "image_size": 32, "patch_size": 8, "num_frames": 2,
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
TRAINING = ["--batch", "64", "--views", "1", "--device", "cpu", "--workers", "0"]
EPALM = ("--inject", "0:2", "--extract", "1:3")  # all layers, two levels
INPUT = ("--inject", "0:1")


def labels_of(*things: draw.Thing) -> dict[str, str | None]:
    """What is true of each shape: an encoder that says "red, blue, star, ring" has not seen
    which is which, and whoever reads its summary cannot tell."""
    row = dict.fromkeys(f"{shape} {name}" for shape in draw.SHAPES for name in ("is", "size"))
    for thing in things:
        row |= {f"{thing.shape} is": thing.colour, f"{thing.shape} size": thing.size}
    return row


def crowds(count: int) -> Iterator[tuple[dict, str, str]]:
    """Questions about up to six objects: here nobody can guess which colour is which shape's."""
    rng = random.Random(0)
    for _ in range(count):
        several = rng.choice([2, 3, 4, 6])
        shapes, colours = rng.sample(draw.SHAPES, several), rng.sample([*draw.COLOURS], several)
        things = [
            draw.Thing(*x, rng.choice([*draw.SIZES])) for x in zip(shapes, colours, strict=True)
        ]
        question, answer = draw.Scene(things[0], None, "left", "grey").question(
            "en", rng.randrange(3)
        )
        yield labels_of(*things), f"{question} Answer:", answer


@pytest.fixture(scope="module")
def pictures(one_thread, tmp_path_factory) -> dict:
    root, begun = tmp_path_factory.mktemp("pictures"), time.process_time()
    records = draw.draw_images(root / "data", train=PICTURES, held_out=HELD_OUT, seed=0)
    scenes = [scene for scene, _ in draw.scenes(PICTURES, HELD_OUT, seed=0)]
    images = np.stack([draw.render(scene, 0, i) for i, scene in enumerate(scenes)])
    inputs = torch.from_numpy(images).permute(0, 3, 1, 2)

    def labels(scene: draw.Scene) -> dict[str, str | None]:
        return scene.labels() | labels_of(*filter(None, (scene.first, scene.second)))

    write_vision(root / "vision", model_args=VIT)
    config = json.loads((root / "vision/config.json").read_text())
    model, right = fit_encoder(
        {"config": config, "fit": "crop"}, inputs, list(map(labels, scenes)), PICTURES, epochs=12,
        rate=3e-3, readout=True,
    )  # fmt: skip
    write_vision(root / "vision", model_args=VIT, state=model.state_dict())
    seen = torch.tensor([not scene.unseen for scene in scenes[PICTURES:]])
    print(f"encoder: {right[seen].float().mean():.3f} right, {time.process_time() - begun:.0f} s")
    assert right[seen].float().mean() >= 0.95  # the encoder can tell what captions say
    begun, items = time.process_time(), list(crowds(64_000))
    for i, (scene, _) in enumerate(draw.scenes(12_000, 0, seed=1)):
        question, answer = scene.question("en", i)
        items.append((labels(scene), "", scene.caption()))
        items.append((labels(scene), f"{question} Answer:", answer))
    lm = fit_seeing_decoder(root / "lm", "opt", items, **SEEING)
    print(f"decoder: {time.process_time() - begun:.0f} s")
    train = [r for r in records if r["lang"] == "en" and r["split"] == "train"]
    asked = root / "asked.jsonl"  # eight questions about each picture
    asked.write_text(
        "".join(
            json.dumps(
                {"image": f"data/{record['image']}", "question": question, "answers": [answer]}
            )
            + "\n"
            for record, scene in zip(train, scenes, strict=False)
            for question, answer in (scene.question("en", number) for number in range(8))
        )
    )
    return {
        "modality": "image", "root": root, "lm": str(lm),
        "caption": [str(root / "data"), "--epochs", "4", "--rate", "5e-3"],
        "vqa": [str(asked), "--epochs", "1.5", "--rate", "5e-3", "--answer-only"],
    }  # fmt: skip


def where(motion: draw_av.Motion, number: int) -> dict[str, int]:
    """The third of the width and of the height where a shape is in a frame."""
    first, last = np.array(draw_av.MOVES[motion.move])
    x, y = np.sign(np.round((first + (last - first) * number / (draw_av.FRAMES - 1)) / 10))
    return {"shape": motion.shape, "colour": motion.colour, "column": x, "row": y}


@pytest.fixture(scope="module")
def clips(one_thread, tmp_path_factory) -> dict:
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
    known = list(product(draw_av.SHAPES, draw_av.COLOURS, draw_av.MOVES))
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
    assert right >= 0.95  # the encoder can tell what captions say
    model.save_pretrained(root / "vision")
    begun = time.process_time()
    items = []
    for motion in [draw_av.Motion(*row) for row in known] * 20:
        items.append((asdict(motion), "", motion.caption()))
        for question, answer in motion.questions():
            items.append((asdict(motion), f"{question} Answer:", answer))
    lm = fit_seeing_decoder(root / "lm", "opt", items, **SEEING)
    print(f"decoder: {time.process_time() - begun:.0f} s")
    training = [
        str(root / "data"), "--fit", "squash", "--frames", "2", "--epochs", "8", "--rate", "5e-3",
    ]  # fmt: skip
    return {
        "modality": "video", "root": root, "lm": str(lm),
        "caption": training, "vqa": [*training, "--answer-only"],
    }  # fmt: skip


def exact(world: dict, task: str, *options: str) -> float:
    """Trains, tests on new renders -> the exact share of those whose scenes training shows too."""
    root, folder = world["root"], str(world["root"] / "data")
    out = root / "-".join([task, *options]).replace(":", "-")
    begun = sum(os.times()[2:4])
    tinyvl(
        "train", "epalm", "--modality", world["modality"], "--task", task, "--data", *world[task],
        "--lm", world["lm"], "--vision", str(root / "vision"), "--out", str(out), *TRAINING,
        *options,
    )  # fmt: skip
    seconds = sum(os.times()[2:4]) - begun
    records = data.read(folder, split="test", lang="en")
    if task == "vqa":
        answers = out / "answers"
        tinyvl("eval", "vqa", str(out), folder, "--quiet", "-o", str(answers))
        lines = map(json.loads, (answers / "predictions.jsonl").open())
        found = {line["path"]: line["answer"] for line in lines}
        right = {record.path: record.answers[0] for record in records}
    else:
        said = tinyvl("caption", *(r.path for r in records), "-m", str(out), "--beams", "1")
        found = dict(line.split("\t") for line in said.splitlines())
        right = {record.path: record.captions[0] for record in records}
    new = worlds.unseen(root / "data")
    assert found.keys() == right.keys()
    assert len(right) == HELD_OUT
    hits = {path: found[path] == right[path] for path in right}
    seen = [hits[record.path] for record in records if record.path not in new]
    print(
        f"{world['modality']} {task}: {sum(seen) / len(seen):.3f} of {len(seen)}, "
        f"{sum(hits.values()) / len(hits):.3f} of all exact, trained in {seconds:.0f} s"
    )
    return sum(seen) / len(seen)


@pytest.mark.slow  # the quick tests fit it to sounds (test_drawn_av.py)
@pytest.mark.parametrize("task", ["caption", "vqa"])
@pytest.mark.parametrize("kind", ["pictures", "clips"])
def test_new_renders_are_captioned_and_answered_exactly(kind, task, request):
    assert exact(request.getfixturevalue(kind), task, *EPALM) >= 0.95


VARIANTS = {
    "eP-ALM_lin": (*EPALM, "--shared", "--soft", "0"),
    "eP-ALM_pt": (*EPALM, "--shared"),
    "eP-ALM_ada": (*EPALM, "--soft", "0", "--adapters", "8"),
    "B_PromptFuse": (*INPUT, "--extract", "2:3"),
    "B_LimBER": (*INPUT, "--extract", "2:3", "--soft", "0"),
    "B_MAGMA, B_FrozenBiLM": (*INPUT, "--extract", "2:3", "--soft", "0", "--adapters", "8"),
    "B_MAGMA*": (*INPUT, "--tokens", "all", "--soft", "0", "--adapters", "8"),
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("task", ["caption", "vqa"])
@pytest.mark.parametrize("kind", ["pictures", "clips"])
def test_variants_and_baselines_on_the_same_budget(kind, task, variant, request):
    """Its figures are to be read (``-s``): the floor only says that each of them learns."""
    world = request.getfixturevalue(kind)
    print(f"\n{variant}:", end=" ")
    assert exact(world, task, *VARIANTS[variant]) >= 0.25
