"""Training LilT: what it learns, what it leaves alone, and that it survives being killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import shell
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import write_text, write_vision

from tinyvl import (
    UserError,
    features,
    media_augment,
    models,
    presets,
    train,
    train_batches,
    train_run,
)
from tinyvl.data import Record

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (40, 60, 220)}
PLACES = {"left": (4, 16), "right": (28, 16), "top": (16, 4)}
CLIP = {"image": {"unlock": "all"}, "text": {"unlock": "all"}}
LWA = {"adapter": "layerwise", "unlock": "layernorm"}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, str]:
    """45 pictures of a coloured square somewhere, and random towers."""
    root = tmp_path_factory.mktemp("world")
    lines, chance = [], random.Random(0)
    for i in range(45):
        colour, place = list(COLOURS)[i % 3], list(PLACES)[i // 3 % 3]
        picture = Image.new("RGB", (32, 32), (chance.randrange(90, 130),) * 3)
        x, y = PLACES[place]
        picture.paste(COLOURS[colour], (max(x - 6, 0), max(y - 6, 0), x + 6, y + 6))
        picture.save(root / f"{i}.png")
        captions = [f"a {colour} square at the {place}", f"{colour} {place}"]
        split = "val" if i > 35 else "train"
        lines.append({"image": f"{i}.png", "captions": captions, "split": split})
    data = root / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = [c for line in lines for c in line["captions"]]
    return {
        "data": str(data),
        "language": str(write_text(root / "text", words)),
        "vision": str(write_vision(root / "vision")),
    }


def job(world: dict[str, str], **changes) -> presets.Job:
    recipe = presets.Recipe(
        batch=changes.pop("batch", 16), epochs=changes.pop("epochs", 4),
        rate=changes.pop("rate", 3e-3), weight_decay=0.02, clip=None,
    )  # fmt: skip
    options = changes.pop("options", {"image": LWA, "text": LWA})
    return presets.Job(
        **{
            "method": "lilt", "fit": "squash", "options": options, "recipe": recipe,
            "per_image": 1, "max_tokens": 25, **world, **changes,
        }
    )  # fmt: skip


def run(out: Path, **changes) -> presets.Run:
    settings = {"micro": 6, "save_every": 5, "quiet": True, "workers": 0}
    return presets.Run(out=out, device=torch.device("cpu"), **(settings | changes))


def losses_of(out: Path) -> list[float]:
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def files(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in ("model.safetensors", "last.safetensors")}


def test_training_changes_what_is_trained_and_nothing_else(world, tmp_path, monkeypatch):
    kept, build = {}, models.build

    def spy(*args, **kwargs):
        kept["model"] = model = build(*args, **kwargs)
        kept["before"] = {n: t.clone() for n, t in model.state_dict().items()}
        return model

    monkeypatch.setattr(models, "build", spy)
    summary = train.train(job(world, epochs=2), run(tmp_path / "out"))
    assert summary["steps"] == len(losses_of(tmp_path / "out")) == 2 * 4  # 72 pairs, 18 a step
    model = kept["model"]
    for name, after in model.state_dict().items():
        assert torch.equal(after, kept["before"][name]) != model.trainable(name), name
    saved = load_file(tmp_path / "out/model.safetensors")
    assert set(saved) == {n for n, _ in model.named_parameters() if model.trainable(n)}
    config = models.read_config(tmp_path / "out")
    for side in ("image", "text"):
        assert config[side]["sha256"]
    loaded = models.load(str(tmp_path / "out"), task="retrieve", device=torch.device("cpu"))
    assert loaded.width == 256
    assert not any(p.requires_grad for p in loaded.parameters())
    card = (tmp_path / "out/README.md").read_text()
    assert card.count("SHA-256") == 2
    assert "image-text-retrieval" in card
    assert models.inspect(str(tmp_path / "out"))["trainable_parameters"] == sum(
        t.numel() for t in saved.values()
    )
    with pytest.raises(UserError, match="does not caption"):
        models.load(str(tmp_path / "out"), task="caption", device=torch.device("cpu"))


def test_training_lowers_the_loss(world, tmp_path):
    train.train(job(world, epochs=40, rate=1e-3, batch=18, options=CLIP), run(tmp_path, micro=18))
    losses = losses_of(tmp_path)  # nine captions for 36 pictures: never far below 1.5
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ({"image": LWA, "text": LWA}, {"crops": True}),
        ({"text": {"pool": "mean"}}, {"per_image": 2}),  # locked: both towers' results are kept
    ],
)
def test_a_stopped_and_resumed_run_ends_bit_for_bit_like_a_whole_one(
    world, tmp_path, options, more
):
    this = job(world, options=options, **more)
    train.train(this, run(tmp_path / "whole"))
    for stop in (3, 9):  # inside an epoch, twice
        settings = run(tmp_path / "parts", resume=stop > 3)
        settings.stop = StopWhen(lambda s=stop: steps(tmp_path / "parts") >= s)
        with pytest.raises(train_run.Interrupted):
            train.train(this, settings)
    train.train(this, run(tmp_path / "parts", resume=True))
    assert files(tmp_path / "whole") == files(tmp_path / "parts")
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "parts")


@pytest.mark.parametrize(
    ("architecture", "image"),
    [("vit", {}), ("vit", {"pool": "mean"}), ("cnn", {}), ("cnn", {"adapter": "deep"})],
)
def test_a_locked_tower_reads_features_of_its_encoder(world, tmp_path, architecture, image):
    """`tinyvl features` keeps all tokens, the run's own cache what the tower makes of them."""
    if architecture == "cnn":
        world = world | {"vision": str(write_vision(tmp_path / "cnn", "test_efficientnet", {}))}
    this = job(world, options={"image": image, "text": LWA}, epochs=1)
    vision, encoder = features.load_encoder(
        world["vision"], "squash", device=torch.device("cpu"), precision=torch.float32
    )
    pictures = [(r.image, r.id) for part in train_batches.load_records(this) for r in part]
    head = features.contents(vision, encoder)
    features.extract(tmp_path / "features", pictures, encoder, head, run(tmp_path))
    train.train(this, run(tmp_path / "plain"))
    train.train(this, run(tmp_path / "stored", features=tmp_path / "features"))
    assert losses_of(tmp_path / "stored") == pytest.approx(losses_of(tmp_path / "plain"), abs=1e-3)
    if architecture == "vit":
        learns = job(world, options={"image": image | LWA, "text": LWA})
        larger = job(world, options={"image": image, "text": LWA, "size": 48})
        for other, said in ((learns, "wholly frozen"), (larger, "own size")):
            with pytest.raises(UserError, match=said):
                train.train(other, run(tmp_path / "other", features=tmp_path / "features"))


class StopWhen(list):
    """A list of signals that is empty until a condition holds."""

    def __init__(self, condition):
        super().__init__()
        self.condition = condition

    def __bool__(self):
        return self.condition()


def steps(out: Path) -> int:
    log = out / "log.jsonl"
    return log.read_text().count('"loss"') if log.exists() else 0


def command(world: dict[str, str], out: Path) -> list[str]:
    return [
        "train", "lilt", "--data", world["data"], "--text",
        world["language"], "--vision", world["vision"], "--preset", "lilt-lwa-base", "--size", "32",
        "--out", str(out), "--batch", "18", "--micro-batch", "6", "--epochs", "5", "--rate",
        "3e-3", "--save-every", "7", "--device", "cpu", "--workers", "0", "--resume",
    ]  # fmt: skip


def test_killed_at_a_random_step_and_resumed_from_the_command_line(world, tmp_path):
    """SIGKILL, then to the end: the same weights as one run, with crops and dropout."""
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # the same sums as here
    at = random.Random(os.getpid()).randint(5, 15)
    process = subprocess.Popen(
        [sys.executable, "-m", "tinyvl.cli", *command(world, tmp_path / "parts")],
        env=env, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while steps(tmp_path / "parts") < at and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == -9, errors
    done = shell.run(*command(world, tmp_path / "parts"))
    assert json.loads(done.stdout)["steps"] == 20
    assert shell.run(*command(world, tmp_path / "whole")).returncode == 0
    assert files(tmp_path / "whole") == files(tmp_path / "parts")


def test_kept_results_of_locked_towers_give_the_loss_of_fresh_ones(world, tmp_path):
    for cache in (True, False):
        train.train(job(world, options={}, epochs=2), run(tmp_path / str(cache), cache=cache))
    cached, plain = (losses_of(tmp_path / str(cache)) for cache in (True, False))
    assert cached == pytest.approx(plain, abs=2e-3)  # pictures are kept as fp16


def test_micro_batches_and_checkpointing_change_only_the_last_bits(world, tmp_path):
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    words = Path(world["data"]).read_text().replace('"', " ").split("\n")
    text = str(write_text(tmp_path / "text", words, **quiet))
    states = []
    for name, change in (("a", {}), ("b", {"micro": 18}), ("c", {"checkpointing": True})):
        train.train(
            job(world | {"language": text}, epochs=1, batch=18), run(tmp_path / name, **change)
        )
        states.append(load_file(tmp_path / name / "last.safetensors"))
    for name, tensor in states[0].items():
        for other in states[1:]:
            torch.testing.assert_close(tensor, other[name], rtol=0, atol=1e-4)


def test_the_temperature_and_biases_have_no_weight_decay(world, tmp_path):
    this = job(world, epochs=1, rate=1e-12)
    this = replace(this, recipe=replace(this.recipe, weight_decay=1e10))  # rate x decay = 1 %
    train.train(this, run(tmp_path / "out"))
    after = load_file(tmp_path / "out/last.safetensors")
    torch.manual_seed(0)
    before = models.build(
        models.read_config(tmp_path / "out"), device=torch.device("cpu"), precision=torch.float32
    )
    before = models.trainable_state(before)
    for name, tensor in after.items():
        shrunk = tensor.norm() < 0.995 * before[name].norm()
        assert shrunk == (tensor.ndim > 1), name


def test_bf16_on_a_cpu_trains(world, tmp_path):
    train.train(job(world, epochs=2, precision="bf16"), run(tmp_path / "out"))
    train.train(job(world, epochs=2), run(tmp_path / "fp32"))
    assert losses_of(tmp_path / "out") == pytest.approx(losses_of(tmp_path / "fp32"), abs=0.1)
    saved = load_file(tmp_path / "out/model.safetensors")
    assert all(t.dtype == torch.float32 for t in saved.values())
    vectors = []
    for precision in (torch.float32, torch.bfloat16):
        model = models.load(
            str(tmp_path / "out"), task="retrieve", device=torch.device("cpu"), precision=precision
        )
        vectors.append(model.embed_texts(["a red square", "blue left"]))
        assert vectors[-1].dtype == torch.float32
    assert (vectors[0] * vectors[1]).sum(-1).min() > 0.99


def test_a_limit_counts_pairs():
    records = [
        Record(f"{i}.png", captions=[f"{i} {j}" for j in range(5)], id=str(i)) for i in range(40)
    ]
    for limit in (7, 150):
        kept = train_batches.limit_pairs(records, limit, seed=3)
        assert sum(len(r.captions) for r in kept) == limit
        assert all(c.startswith(f"{r.id} ") for r in kept for c in r.captions)
        assert kept == train_batches.limit_pairs(records, limit, seed=3)
    assert sum(len(r.captions) for r in train_batches.limit_pairs(records, "10%", seed=3)) == round(
        sum(len(r.captions) for r in records) / 10
    )
    assert len(train_batches.limit_pairs(records, 1000, seed=3)) == 40


# ------------------------------------------------------------------------------------ random crops


def photo(width: int, height: int) -> Image.Image:
    rng = np.random.Generator(np.random.PCG64(0))
    small = rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def test_a_crop_is_a_function_of_seed_epoch_and_picture():
    picture = photo(120, 90)
    one = media_augment.RandomCrop(64, epoch=3, seed=1)(picture)
    assert one.shape == (3, 64, 64)
    assert one.dtype == torch.uint8
    assert torch.equal(one, media_augment.RandomCrop(64, epoch=3, seed=1)(picture.copy()))
    others = [(64, 4, 1), (64, 3, 2)]
    assert not any(torch.equal(one, media_augment.RandomCrop(*other)(picture)) for other in others)


def test_crops_have_the_area_and_aspect_of_random_resized_crops():
    rng = random.Random(0)
    for width, height in ((640, 480), (100, 300), (30, 30)):
        boxes = [media_augment.random_box(width, height, rng) for _ in range(300)]
        for left, top, right, bottom in boxes:
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height
        areas = [(r - x) * (b - y) / width / height for x, y, r, b in boxes]
        assert min(areas) > 0.15
        if width > 100:
            assert min(areas) < 0.25
            assert max(areas) > 0.9
            assert 0.5 < sum(areas) / 300 < 0.65


def test_the_operations_are_randaugments():
    picture = photo(64, 64)
    x = np.asarray(picture).astype(int)
    done = [operation(picture, 0.7, 1) for operation in media_augment.OPERATIONS]
    same, contrast, equal, bright, sharp, shear_x, shear_y, move_x, move_y, turned = (
        np.asarray(p).astype(int) for p in done
    )
    assert (same == x).all()
    assert contrast.min() == 0
    assert contrast.max() == 255
    assert equal.std() > x.std() * 0.9
    assert abs(bright - (x * 1.36).clip(0, 255)).max() <= 1  # 0.1 + 1.8 x 7/10
    assert abs(np.diff(sharp, axis=0)).mean() > abs(np.diff(x, axis=0)).mean()
    assert (move_x[:, :-7] == x[:, 7:]).all()  # seven pixels
    assert (move_x[:, -6:] == 128).all()
    assert (move_y[:-7] == x[7:]).all()
    assert abs(shear_x[0] - x[0]).mean() < 3  # the edge it turns about
    assert abs(shear_y[:, 0] - x[:, 0]).mean() < 3
    assert abs(shear_x[-8] - x[-8]).mean() > 10
    assert (turned[0, 0] == 128).all()
    assert abs(turned[32, 32] - x[32, 32]).max() < 40


def test_locked_projections_are_kept_with_the_checkpoint(world, tmp_path):
    """They are random and never trained: a model without them would embed anew at each load."""
    options = {"image": {"unlock": "layernorm"}, "text": {"unlock": "layernorm"}}
    this = job(world, epochs=1, options=options | {"projections": False})
    train.train(this, run(tmp_path / "out"))
    kept = load_file(tmp_path / "out/model.safetensors")
    assert {"image_projection.weight", "text_projection.bias"} <= kept.keys()
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = models.load(str(tmp_path / "out"), task="retrieve", device=torch.device("cpu"))
        assert not any(model.trainable(n) for n in kept if "projection" in n)
        found.append(model.embed_texts(["a red square"]))
    assert torch.equal(*found)
