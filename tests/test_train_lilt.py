"""Training LilT: what it learns, what it leaves alone, and that it survives being killed."""

import json
import random
import signal
from pathlib import Path

import pytest
import shell
import torch
import worlds
from safetensors.torch import load_file
from tiny import write_text, write_vision
from worlds import files, kill, losses, run, steps, stopped

from tinyvl import UserError, data, features, models, presets, train, train_batches

CLIP = {"image": {"unlock": "all"}, "text": {"unlock": "all"}}
LWA = {"adapter": "layerwise", "unlock": "layernorm"}


@pytest.fixture(scope="module")
def world(world, tmp_path_factory) -> dict[str, str]:
    """Coloured squares, and random towers."""
    captions = [c for r in data.read(world["data"]) for c in r.captions]
    return world | {"language": str(write_text(tmp_path_factory.mktemp("text") / "bert", captions))}


def job(world: dict[str, str], **changes) -> presets.Job:
    recipe = {"batch": 16, "weight_decay": 0.02, "clip": None}
    common = {"method": "lilt", "fit": "squash", "options": {"image": LWA, "text": LWA}}
    return worlds.job(world, **{**recipe, **common, "per_image": 1, "max_tokens": 25, **changes})


def test_training_changes_what_is_trained_and_nothing_else(world, tmp_path, monkeypatch):
    kept, build = {}, models.build

    def spy(*args, **kwargs):
        kept["model"] = model = build(*args, **kwargs)
        kept["before"] = {n: t.clone() for n, t in model.state_dict().items()}
        return model

    monkeypatch.setattr(models, "build", spy)
    summary = train.train(job(world, epochs=2), run(tmp_path / "out"))
    assert summary["steps"] == len(losses(tmp_path / "out")) == 2 * 4  # 72 pairs, 18 a step
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
    found = losses(tmp_path)  # nine captions for 36 pictures: never far below 1.5
    assert sum(found[-4:]) < 0.8 * sum(found[:4])


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
        stopped(this, run(tmp_path / "parts", resume=stop > 3), stop)
    train.train(this, run(tmp_path / "parts", resume=True))
    assert files(tmp_path / "whole") == files(tmp_path / "parts")
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


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
    assert losses(tmp_path / "stored") == pytest.approx(losses(tmp_path / "plain"), abs=1e-3)
    if architecture == "vit":
        learns = job(world, options={"image": image | LWA, "text": LWA})
        larger = job(world, options={"image": image, "text": LWA, "size": 48})
        for other, said in ((learns, "wholly frozen"), (larger, "own size")):
            with pytest.raises(UserError, match=said):
                train.train(other, run(tmp_path / "other", features=tmp_path / "features"))


def command(world: dict[str, str], out: Path) -> list[str]:
    return [
        "train", "lilt", "--data", world["data"], "--text",
        world["language"], "--vision", world["vision"], "--preset", "lilt-lwa-base", "--size", "32",
        "--out", str(out), "--batch", "18", "--micro-batch", "6", "--epochs", "5", "--rate",
        "3e-3", "--save-every", "7", "--device", "cpu", "--workers", "0", "--resume",
    ]  # fmt: skip


def test_killed_at_a_random_step_and_resumed_from_the_command_line(world, tmp_path):
    """SIGKILL, then to the end: the same weights as one run, with crops and dropout."""
    at, parts = random.Random(7).randint(5, 15), tmp_path / "parts"
    status, errors = kill(command(world, parts), signal.SIGKILL, lambda: steps(parts) >= at)
    assert status == -9, errors
    done = shell.run(*command(world, parts))
    assert json.loads(done.stdout)["steps"] == 20
    assert shell.run(*command(world, tmp_path / "whole")).returncode == 0
    assert files(tmp_path / "whole") == files(tmp_path / "parts")


def test_kept_results_of_locked_towers_give_the_loss_of_fresh_ones(world, tmp_path):
    for cache in (True, False):
        train.train(job(world, options={}, epochs=2), run(tmp_path / str(cache), cache=cache))
    cached, plain = (losses(tmp_path / str(cache)) for cache in (True, False))
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
            # Where a gradient is almost 0, Adam makes much of its last bits: a rate each at most.
            torch.testing.assert_close(tensor, other[name], rtol=0, atol=3e-4)


def test_the_temperature_and_biases_have_no_weight_decay(world, tmp_path):
    this = job(world, epochs=1, rate=1e-12, weight_decay=1e10)  # rate x decay = 1 %
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
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "fp32"), abs=0.1)
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


def test_a_run_from_a_checkpoint_may_have_more_to_train(world, tmp_path):
    """It starts at the checkpoint's loss but for the new adapters, and trains them."""
    out = tmp_path / "more"
    train.train(job(world, options={}, epochs=1), run(tmp_path / "first"))
    more = {"text": {"adapter": "layerwise", "unlock": "layernorm"}, "image": {}}
    train.train(job(world, options=more, init=str(tmp_path / "first"), epochs=1), run(out))
    first, then = (load_file(path / "model.safetensors") for path in (tmp_path / "first", out))
    assert first.keys() < then.keys()
    assert all(".adapter." in n or "LayerNorm" in n for n in then.keys() - first.keys())
    with pytest.raises(UserError, match="these weights do not fit the model"):
        train.train(job(world, options={}, init=str(out), epochs=1), run(tmp_path / "less"))


def test_an_mlp_joins_a_model_that_has_none_and_views_may_be_coarse(world, tmp_path):
    """Its last layer starts at zero: before a step both give the same loss."""
    train.train(job(world, epochs=1, options={}), run(tmp_path / "a"))
    start = {"init": str(tmp_path / "a"), "views": 2, "coarsest": 16, "epochs": 2}
    more = job(world, options={"image": {"mlp": 8}}, rate=1e-9, **start)
    train.train(more, run(tmp_path / "b"))
    same = job(world, options={}, rate=1e-9, **start)
    train.train(same, run(tmp_path / "c"))
    assert losses(tmp_path / "b") == pytest.approx(losses(tmp_path / "c"), abs=1e-4)
    saved = load_file(tmp_path / "b/model.safetensors")
    assert {n for n in saved if n.startswith("image_mlp.")} == {
        f"image_mlp.{i}.{what}" for i in (0, 2) for what in ("weight", "bias")
    }
    texts = models.load(
        str(tmp_path / "b"), task="retrieve", device=torch.device("cpu"), sides=["text"]
    )
    assert texts.embed_texts(["a red square"]).shape == (1, 256)


@pytest.mark.parametrize("side", ["text", "image"])
def test_a_tower_that_was_trained_may_be_locked(world, tmp_path, side):
    """It stays as it was to the bit, is in the checkpoint, and its vectors are read from disk."""
    train.train(job(world, epochs=2, rate=1e-2), run(tmp_path / "a"))
    start = {"init": str(tmp_path / "a"), "locked": side, "epochs": 2, "rate": 1e-2}
    stopped(job(world, **start), run(tmp_path / "b", save_every=1), 3)
    train.train(job(world, **start), run(tmp_path / "b", resume=True))
    train.train(job(world, **start), run(tmp_path / "c"))
    before, after, whole = (load_file(tmp_path / f"{n}/last.safetensors") for n in "abc")
    tower = "text." if side == "text" else "encoder."
    assert before.keys() == after.keys()
    assert any(name.startswith(tower) for name in before)
    for name, tensor in after.items():
        assert torch.equal(tensor, whole[name]), name
        assert torch.equal(tensor, before[name]) == name.startswith(tower), name
    kept = models.load(str(tmp_path / "b"), task="retrieve", device=torch.device("cpu"))
    assert kept.embed_texts(["a red square"]).isfinite().all()
