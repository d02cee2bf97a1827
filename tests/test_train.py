"""The training loop: what it learns, what it leaves alone, and that it survives being killed."""

import json
import random
import signal
from dataclasses import asdict
from pathlib import Path

import pytest
import shell
import torch
from safetensors.torch import load_file
from worlds import files, job, kill, log, losses, run, steps, stopped

from tinyvl import UserError, data, models, presets, train, train_run
from tinyvl.data import Record


def test_the_rate_warms_up_and_falls_along_a_cosine():
    recipe = presets.Recipe(rate=1.0, final_rate=0.1, warmup=0.1)
    rates = [train.lr_at(step, 100, recipe) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0.1 < rates[-1] < 0.102


def test_training_lowers_the_loss_and_changes_nothing_frozen(world, tmp_path):
    summary = train.train(job(world, epochs=30), run(tmp_path / "out"))
    found = losses(tmp_path / "out")
    assert found[-1] < 0.5 * found[0]
    best = min(line["val_loss"] for line in log(tmp_path / "out") if "val_loss" in line)
    assert summary["val_loss"] == pytest.approx(best, abs=1e-5)
    assert summary["steps"] == len(found) == 30 * 6  # 36 pictures x 2 captions / 12

    config = models.read_config(tmp_path / "out")
    model, fresh = (
        models.build(config, device=torch.device("cpu"), precision=torch.float32) for _ in "ab"
    )
    models.load_weights(model, tmp_path / "out")
    for (name, a), (_, b) in zip(
        model.state_dict().items(), fresh.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b) != model.trainable(name), name
    saved = load_file(tmp_path / "out/model.safetensors")
    assert set(saved) == {n for n, _ in fresh.named_parameters() if fresh.trainable(n)}
    assert (tmp_path / "out/README.md").read_text().count("SHA-256") == 2


def test_frozen_parts_are_bit_identical_in_the_trained_process(world, tmp_path, monkeypatch):
    kept = {}
    build = models.build

    def spy(*args, **kwargs):
        model = build(*args, **kwargs)
        kept["model"] = model
        kept["before"] = {n: t.clone() for n, t in model.state_dict().items()}
        return model

    monkeypatch.setattr(models, "build", spy)
    train.train(job(world), run(tmp_path / "out"))
    for name, after in kept["model"].state_dict().items():
        assert torch.equal(after, kept["before"][name]) != kept["model"].trainable(name), name


def test_a_stopped_run_is_a_checkpoint(world, tmp_path):
    """Its averaged weights, with which another run can start."""
    stopped(job(world, average=0.9), run(tmp_path / "parts"), 3)
    kept = load_file(tmp_path / "parts/last.safetensors")
    state = load_file(tmp_path / "parts/training.safetensors")
    assert kept.keys() == load_file(tmp_path / "parts/model.safetensors").keys()
    for name, tensor in kept.items():
        torch.testing.assert_close(tensor, state[f"average/{name}"])
    train.train(job(world, init=str(tmp_path / "parts"), epochs=0.1), run(tmp_path / "next"))


@pytest.mark.parametrize("cache", [True, False])
def test_a_stopped_and_resumed_run_ends_bit_for_bit_like_a_whole_one(world, tmp_path, cache):
    train.train(job(world), run(tmp_path / "whole", cache=cache))
    for stop in (3, 11):  # inside an epoch, twice
        stopped(job(world), run(tmp_path / "parts", cache=cache, resume=stop > 3), stop)
    train.train(job(world), run(tmp_path / "parts", cache=cache, resume=True))
    assert files(tmp_path / "whole") == files(tmp_path / "parts")
    assert log(tmp_path / "whole") == log(tmp_path / "parts")


def command(world: dict[str, str], out: Path, *more: str) -> list[str]:
    return [
        "train", "itune", "--data", world["data"],
        "--lm", world["language"], "--vision", world["vision"], "--out", str(out), "--fit", "crop",
        "--batch", "12", "--micro-batch", "6", "--per-image", "2", "--epochs", "7",
        "--rate", "3e-3", "--save-every", "7", "--device", "cpu", "--workers", "0", "--resume",
        *more,
    ]  # fmt: skip


def test_killed_at_two_steps_and_resumed_from_the_command_line(world, tmp_path):
    """SIGKILL, then SIGINT, then to the end: the same weights as one run."""
    chance, parts = random.Random(4), tmp_path / "parts"
    for number in (signal.SIGKILL, signal.SIGINT):
        at = steps(parts) + chance.randint(4, 14)
        status, errors = kill(command(world, parts), number, lambda at=at: steps(parts) >= at)
        assert status == (-9 if number == signal.SIGKILL else 130), errors
        if number == signal.SIGINT:
            assert "continue with --resume" in errors
    done = shell.run(*command(world, tmp_path / "parts"))
    assert json.loads(done.stdout)["steps"] == 42
    assert shell.run(*command(world, tmp_path / "whole")).returncode == 0
    assert files(tmp_path / "whole") == files(tmp_path / "parts")


def test_a_run_is_not_overwritten_nor_resumed_with_other_settings(world, tmp_path):
    train.train(job(world, epochs=1), run(tmp_path / "out"))
    before = files(tmp_path / "out")
    with pytest.raises(UserError, match="--resume"):
        train.train(job(world, epochs=1), run(tmp_path / "out"))
    with pytest.raises(UserError, match="seed"):
        train.train(job(world, epochs=1, seed=5), run(tmp_path / "out", resume=True))
    with pytest.raises(UserError, match=r"with recipe.epochs = 1, not 2; its rate .* --init"):
        train.train(job(world, epochs=2), run(tmp_path / "out", resume=True))
    assert files(tmp_path / "out") == before


def test_a_finished_run_says_so_and_goes_on_where_its_rate_does_not_fall(
    world, tmp_path, monkeypatch, capsys
):
    still = {"rate": 1e-3, "final_rate": 1e-3}
    first = train.train(job(world, epochs=1, **still), run(tmp_path / "out"))
    with monkeypatch.context() as patch:
        patch.setattr(train, "load_records", None)  # not even the data is read
        again = train.train(job(world, epochs=1, **still), run(tmp_path / "out", resume=True,
                                                               quiet=False))  # fmt: skip
    assert again["steps"] == first["steps"] == 6
    assert again["val_loss"] == first["val_loss"]
    assert "has ended" in capsys.readouterr().err
    more = train.train(job(world, epochs=2, **still), run(tmp_path / "out", resume=True))
    assert (more["steps"], len(losses(tmp_path / "out"))) == (12, 12)
    assert models.read_config(tmp_path / "out")["training"]["recipe"]["epochs"] == 2


def test_a_start_that_fails_leaves_no_folder(world, tmp_path):
    for changes in ({"options": {"drop": 99}}, {"data": str(tmp_path / "none.jsonl")}):
        with pytest.raises(UserError):
            train.train(job(world, **changes), run(tmp_path / "runs" / "out"))
        assert not (tmp_path / "runs").exists()


def test_a_resumed_run_has_its_options_in_its_folder(world, tmp_path):
    """All but --out and --resume; the options come from files, too."""
    typed = command(world, tmp_path / "out")[2:-1]
    pairs = dict(zip(typed[::2], typed[1::2], strict=True))
    numbers = {"--batch": int, "--micro-batch": int, "--per-image": int, "--rate": float}
    told = {
        name.removeprefix("--"): numbers[name](value) if name in numbers else value
        for name, value in pairs.items()
        if name not in ("--out", "--epochs", "--save-every", "--workers")
    }
    (tmp_path / "run.json").write_text(json.dumps(told))
    out = ["--out", str(tmp_path / "out")]
    start = ["train", "itune", "--config", str(tmp_path / "run.json"), *out, "--epochs", "1"]
    dry = shell.run(*start, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert not (tmp_path / "out").exists()
    done = shell.run(*start)
    found, planned = json.loads(done.stdout), json.loads(dry.stdout)
    assert found["steps"] == planned["steps"] == 6
    assert planned["memory"] > 16 * planned["trainable_parameters"]
    again = shell.run("train", "itune", *out, "--resume", "--device", "cpu")
    assert (again.returncode, json.loads(again.stdout)["steps"]) == (0, 6), again.stderr
    other = shell.run("train", "itune", *out, "--resume", "--seed", "4")
    assert other.returncode == 2
    assert "seed = 0, not 4" in other.stderr


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.toml", "epoch = 3", "no option 'epoch'; is epochs meant?"),
        ("a.toml", "epochs = 'x'", "epochs is a number, not 'x'"),
        ("a.json", '{"batch": 0}', "--batch is at least 1"),
        ("a.json", "batch: 3", "is not JSON"),
        ("a.json", "[3]", "takes an object"),
    ],
)
def test_a_file_of_options_is_checked_as_options_are(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    done = shell.run("train", "itune", "--config", tmp_path / name, "--out", tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert not (tmp_path / "out").exists()


def test_accumulation_and_checkpointing_change_only_the_last_bits(world):
    """One step of eight captions of three pictures, in one piece and cut up."""
    config = models.new_config(
        "itune", world["language"], world["vision"], fit="crop", prompt="a", options={}
    )
    torch.manual_seed(0)
    model = models.build(config, device=torch.device("cpu"), precision=torch.float32)
    lines = ["a red square at the left", "red left", "a blue square", "blue top", "green"]
    pictures = torch.randint(0, 256, (3, 3, 32, 32)).byte()
    captions = model.encode([*lines, *lines[:3]], 12)
    batch = model.collate(captions, [0, 0, 1, 1, 1, 2, 2, 2], pictures, [0, 1, 2])
    found = []
    for pieces, checkpointing in ((1, False), (2, False), (3, False), (8, False), (1, True)):
        parts = batch.split(pieces)
        assert len(parts) == pieces
        model.zero_grad()
        model.checkpoint(checkpointing)
        metrics = model.accumulate(parts)
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append((metrics, grads))
    (whole, expected), *others = found
    assert set(expected) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert max(grad.abs().max() for grad in expected.values()) > 1e-3
    for metrics, grads in others:
        assert float(metrics["loss"]) == pytest.approx(float(whole["loss"]), abs=1e-6)
        assert metrics["tokens"] == whole["tokens"]
        for name, grad in grads.items():
            torch.testing.assert_close(grad, expected[name], rtol=0, atol=1e-6)


def test_broken_pictures_are_named_and_skipped(world, tmp_path, capsys):
    annotations = Path(world["data"])
    broken = annotations.parent / "broken.png"
    broken.write_bytes(b"not a picture")
    lines = annotations.read_text() + json.dumps(
        {"image": "broken.png", "captions": ["a red square"], "split": "train"}
    )
    other = annotations.parent / "with_broken.jsonl"
    other.write_text(lines + "\n")
    for cache in (True, False):
        out = tmp_path / str(cache)
        train.train(job(world | {"data": str(other)}, epochs=1), run(out, cache=cache))
        assert "broken.png" in capsys.readouterr().err
        assert (out / "model.safetensors").exists()


def test_fine_tuning_starts_from_the_other_runs_weights(world, tmp_path):
    train.train(job(world, epochs=10), run(tmp_path / "vlp"))
    train.train(
        job(world, epochs=0.2, rate=0.0, init=str(tmp_path / "vlp")), run(tmp_path / "tuned")
    )
    a, b = (load_file(tmp_path / n / "model.safetensors") for n in ("vlp", "tuned"))
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[n], b[n], atol=1e-4) for n in a)


def test_a_batch_that_does_not_fit_is_halved(world, tmp_path, monkeypatch, capsys):
    from tinyvl.itune import ITune

    real, sizes = ITune.loss, []

    def tight(self, batch):
        sizes.append(len(batch.ids))
        if len(batch.ids) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, batch)

    monkeypatch.setattr(ITune, "loss", tight)
    monkeypatch.setattr(ITune, "validate", lambda self, batches: 1.0)
    train.train(job(world, epochs=1), run(tmp_path / "out", quiet=False))
    assert "out of memory" in capsys.readouterr().err
    assert max(sizes[1:]) == 3
    monkeypatch.undo()
    train.train(job(world, epochs=1), run(tmp_path / "plain"))
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "plain"), abs=1e-3)


def test_validation_is_cut_up_too(world, tmp_path, monkeypatch):
    from tinyvl.itune import ITune

    real = ITune.loss

    def tight(self, batch):
        if len(batch.ids) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, batch)

    plain = train.train(job(world, epochs=1), run(tmp_path / "plain"))
    monkeypatch.setattr(ITune, "loss", tight)
    found = train.train(job(world, epochs=1), run(tmp_path / "out"))
    assert found["val_loss"] == pytest.approx(plain["val_loss"], abs=1e-3)


def spoilt(monkeypatch, when, value: str = "loss") -> None:
    """The loss or gradient of batches where ``when(batch)`` is not a number."""
    from tinyvl.itune import ITune

    real = ITune.loss

    def loss(self, batch, *rest):
        total, tokens = real(self, batch, *rest)
        if not torch.is_grad_enabled() or not when(batch):
            return total, tokens
        if value == "loss":
            return total * float("nan"), tokens
        total.register_hook(lambda gradient: gradient * float("inf"))
        return total, tokens

    monkeypatch.setattr(ITune, "loss", loss)


@pytest.mark.parametrize("value", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_and_its_record_named(
    value, world, tmp_path, monkeypatch, capsys
):
    spoilt(monkeypatch, lambda batch: 7 in batch.keys, value)
    summary = train.train(job(world, epochs=2), run(tmp_path / "out"))
    said = [line for line in capsys.readouterr().err.splitlines() if "not finite" in line]
    records, _ = train.load_records(job(world))
    assert len(said) == 2  # once in each epoch
    for line in said:
        assert line.startswith("tinyvl: skipping step ")
        assert line.endswith(f"its {value} is not finite, because of {records[7].path}")
    bad = [line for line in log(tmp_path / "out") if "loss" in line and None in line.values()]
    assert len(bad) == 2
    assert summary["val_loss"] > 0
    for tensor in load_file(tmp_path / "out/last.safetensors").values():
        assert tensor.isfinite().all()


def test_a_skipped_step_changes_nothing(world, tmp_path, monkeypatch):
    spoilt(monkeypatch, lambda batch: True)
    settings = {"epochs": 1, "average": 0.9}  # six steps
    train.train(job(world, **settings), run(tmp_path / "out"))
    found = load_file(tmp_path / "out/training.safetensors")
    assert not [name for name in found if name.startswith("exp_avg")]
    assert all(
        torch.equal(t, found[f"average/{n[6:]}"]) for n, t in found.items() if n[:6] == "model/"
    )


def test_many_bad_steps_in_a_row_end_the_run(world, tmp_path, monkeypatch, capsys):
    taken = [0]

    def when(batch) -> bool:
        taken[0] += 1
        return taken[0] > 14  # two micro-batches a step

    spoilt(monkeypatch, when)
    with pytest.raises(UserError, match="10 steps in a row") as raised:
        train.train(job(world, epochs=9), run(tmp_path / "out"))
    good = tmp_path / "out/model.safetensors"  # of the second epoch, whose first step was good
    assert f"the last good checkpoint is {good} of step 12;" in str(raised.value)
    said = capsys.readouterr().err
    assert said.count("skipping step") == 10
    monkeypatch.undo()
    assert load_file(good)
    state = load_file(tmp_path / "out/training.safetensors")  # of step 5: none of the bad ones
    assert {int(value) for name, value in state.items() if name.startswith("step/")} == {5}


def test_an_overflow_of_fp16_is_left_to_the_scaler(tmp_path, capsys):
    watch = train_run.Watch(tmp_path, {0: "a.png"})
    for step in range(50):
        assert watch.passes(step, 1.0, float("inf"), True, list)
    assert not watch.passes(50, float("nan"), float("nan"), True, lambda: [0])
    assert "step 50: its loss is not finite, because of a.png" in capsys.readouterr().err


def test_bf16_on_a_cpu_trains(world, tmp_path):
    train.train(job(world, epochs=4, precision="bf16"), run(tmp_path / "out"))
    found = losses(tmp_path / "out")
    assert found[-1] < found[0]
    saved = load_file(tmp_path / "out/model.safetensors")
    assert all(t.dtype == torch.float32 for t in saved.values())


def test_validation_is_held_out_where_the_data_has_no_split(world):
    records = [Record(f"{i}.png", ["a"], str(i)) for i in range(500)]
    a, b = data.hold_out(records)
    assert len(a) + len(b) == 500
    assert 2 <= len(b) <= 25
    assert not {r.id for r in a} & {r.id for r in b}


def test_an_abandoned_start_leaves_no_stale_features(world, tmp_path):
    """Other settings in the same folder, where a first start never saved a state."""
    stopped(job(world, fit="crop"), run(tmp_path / "out"), 0)  # while encoding
    train.train(job(world, fit="squash", epochs=1), run(tmp_path / "out"))
    train.train(job(world, fit="squash", epochs=1), run(tmp_path / "fresh"))
    assert losses(tmp_path / "out") == losses(tmp_path / "fresh")
    assert files(tmp_path / "out") == files(tmp_path / "fresh")
    assert not (tmp_path / "out/features").exists()


def test_resuming_with_another_micro_batch_is_refused(world, tmp_path):
    train.train(job(world, epochs=1), run(tmp_path / "out"))
    with pytest.raises(UserError, match="micro"):
        train.train(job(world, epochs=1), run(tmp_path / "out", resume=True, micro=3))


def test_nothing_readable_and_nothing_finite_are_said(world, tmp_path):
    root = tmp_path / "bad"
    root.mkdir()
    lines = []
    for i in range(4):
        (root / f"{i}.png").write_bytes(b"no picture")
        lines.append(json.dumps({"image": f"{i}.png", "captions": ["a red square"]}) + "\n")
    (root / "data.jsonl").write_text("".join(lines))
    with pytest.raises(UserError, match="none of its pictures"):
        train.train(job(world | {"data": str(root / "data.jsonl")}), run(tmp_path / "a"))
    with pytest.raises(UserError, match="lower --rate"):
        train.train(job(world, rate=1e30, epochs=1), run(tmp_path / "b"))
    for line in (tmp_path / "b/log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(name))


def test_a_job_survives_json():
    made = job({"data": "d", "language": "l", "vision": "v"})
    assert json.loads(json.dumps(asdict(made)))["recipe"]["batch"] == 12


def test_an_average_of_the_weights_is_what_is_saved_and_resumed(world, tmp_path):
    """Against the average written out: after each step, decays of 2/11, 3/12, ... up to 0.9."""
    seen = []

    class Watched(train.Average):
        def update(self, step):
            seen.append({n: p.detach().clone() for n, p in self.parameters.items()})
            if step == 1:
                seen.insert(0, {n: v.clone() for n, v in self.values.items()})
            super().update(step)

    settings = job(world, average=0.9)
    whole = train.Average
    train.Average = Watched
    try:
        train.train(settings, run(tmp_path / "whole"))
    finally:
        train.Average = whole
    mean, *later = seen
    for step, weights in enumerate(later, 1):
        decay = min(0.9, (1 + step) / (10 + step))
        mean = {n: decay * mean[n] + (1 - decay) * weights[n] for n in mean}
    saved = load_file(tmp_path / "whole/last.safetensors")
    assert len(later) == 24
    for name, value in saved.items():
        assert torch.allclose(value, mean[name], atol=1e-6), name
        assert not torch.allclose(value, later[-1][name], atol=1e-6), name

    stopped(settings, run(tmp_path / "parts"), 11)
    train.train(settings, run(tmp_path / "parts", resume=True))
    assert files(tmp_path / "whole") == files(tmp_path / "parts")


def test_dropout_is_of_training_alone_and_leaves_the_encoder_as_it_is(world, tmp_path):
    train.train(job(world, epochs=2), run(tmp_path / "plain", cache=False))
    dropped = job(world, epochs=2, options={"drop": 1, "dropout": 0.4})
    train.train(dropped, run(tmp_path / "a", cache=False))
    train.train(dropped, run(tmp_path / "b", cache=False))
    assert files(tmp_path / "a") == files(tmp_path / "b") != files(tmp_path / "plain")
    model = models.load(str(tmp_path / "a"), device=torch.device("cpu"))
    pictures = torch.randint(0, 256, (2, 3, 32, 32)).byte()
    batch = model.collate(model.encode(["red", "a blue square"], 9), [0, 1], pictures, [0, 1])
    assert model.loss(batch)[0] == model.loss(batch)[0]
    model.train()
    assert not any(module.training for module in model.encoder.modules())
    assert model.loss(batch)[0] != model.loss(batch)[0]
