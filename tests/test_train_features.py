"""Training and captioning from kept features: as from pictures, and from the right ones only."""

import json
import shutil
from pathlib import Path

import pytest
import worlds
from safetensors import safe_open
from safetensors.torch import save_file
from worlds import CPU, fill, loaded, log, run, stopped

from tinyvl import UserError, models, presets, train, train_batches, write
from tinyvl.features import open_store


def job(world: dict[str, str], **changes) -> presets.Job:
    return worlds.job(world, **{"epochs": 3, **changes})


def store_of(world: dict[str, str], out: Path, split: str | None = None, **changes) -> Path:
    """Features of the world's pictures, the training part first, as a run encodes them."""
    parts = train_batches.load_records(job(world))
    pictures = [(r.image, r.id) for part in parts for r in part if split in (None, r.split)]
    fill(out, pictures, Path(world["vision"]), **changes)
    return out


def test_training_from_features_is_training_without(world, tmp_path):
    train.train(job(world), run(tmp_path / "plain"))
    for part in ("train", "val"):  # the blocks of pictures are those of a run
        store_of(world, tmp_path / "features", part)
    train.train(job(world), run(tmp_path / "cached", features=tmp_path / "features"))
    assert log(tmp_path / "plain") == log(tmp_path / "cached")
    weights = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("plain", "cached")]
    assert weights[0] == weights[1]
    # Both parts at once make other blocks, whose last bits may differ.
    store_of(world, tmp_path / "mixed")
    train.train(job(world), run(tmp_path / "other", features=tmp_path / "mixed"))
    for ours, theirs in zip(log(tmp_path / "other"), log(tmp_path / "plain"), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    assert (tmp_path / "features/manifest.json").exists()


def test_training_from_features_is_resumed_with_the_same_features_only(world, tmp_path):
    store = store_of(world, tmp_path / "features")
    shutil.copytree(store, tmp_path / "copy")
    train.train(job(world), run(tmp_path / "whole", features=store))
    stopped(job(world), run(tmp_path / "parts", features=store), 7)
    with pytest.raises(UserError, match="features"):
        train.train(job(world), run(tmp_path / "parts", resume=True))
    with pytest.raises(UserError, match="features"):
        train.train(job(world), run(tmp_path / "parts", resume=True, features=tmp_path / "copy"))
    train.train(job(world), run(tmp_path / "parts", resume=True, features=store))
    assert log(tmp_path / "whole") == log(tmp_path / "parts")


def test_training_names_what_the_features_lack_and_what_goes_against_them(world, tmp_path, capsys):
    some = store_of(world, tmp_path / "some", "train")
    with pytest.raises(UserError, match=r"9 of 9 pictures are not in these features.*36\.png"):
        train.train(job(world), run(tmp_path / "out", features=some))
    with pytest.raises(UserError, match="leave out --views"):
        train.train(job(world, views=2), run(tmp_path / "out", features=some))
    with pytest.raises(UserError, match="--no-cache"):
        train.train(job(world), run(tmp_path / "out", features=some, cache=False))
    with pytest.raises(UserError, match="fit squash"):
        train.train(job(world, fit="squash"), run(tmp_path / "new", features=some))
    assert not (tmp_path / "new/config.json").exists()
    inside = store_of(world, tmp_path / "out/features")
    with pytest.raises(UserError, match="outside of --out"):
        train.train(job(world), run(tmp_path / "out", features=inside))
    assert (inside / "manifest.json").exists()


def test_training_skips_what_could_not_be_extracted(world, tmp_path, capsys):
    data = Path(world["data"])
    (data.parent / "broken.png").write_bytes(b"not a picture")
    other = data.parent / "with_broken.jsonl"
    line = {"image": "broken.png", "captions": ["a red square"], "split": "train"}
    other.write_text(json.dumps(line) + "\n" + data.read_text())
    world = world | {"data": str(other)}
    store = store_of(world, tmp_path / "features")
    capsys.readouterr()
    train.train(job(world), run(tmp_path / "out", features=store))
    assert capsys.readouterr().err.count("skipping") == 1
    train.train(job(world), run(tmp_path / "plain"))
    for ours, theirs in zip(log(tmp_path / "out"), log(tmp_path / "plain"), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_features_that_are_not_finite_are_named_and_left_out(world, tmp_path, capsys):
    """As an older tinyvl may have kept them."""
    folder = store_of(world, tmp_path / "features")
    shard = folder / "00000.safetensors"
    with safe_open(shard, "pt") as file:
        about, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["tokens"][3, 0, 0] = float("nan")
    tensors["tokens"][36, 0, 0] = float("inf")  # to validate on
    save_file(tensors, shard, about)
    found = train.train(job(world), run(tmp_path / "out", features=folder))
    said = capsys.readouterr().err
    records = [r for part in train_batches.load_records(job(world)) for r in part]
    for row in (3, 36):
        assert f"skipping {records[row].path}: its features are not finite numbers" in said
    assert found["val_loss"] > 0
    assert all(line.get("loss", 1) for line in log(tmp_path / "out"))


def test_captions_from_features_need_no_pictures(world, tmp_path, monkeypatch):
    train.train(job(world), run(tmp_path / "model"))
    model = models.load(str(tmp_path / "model"), device=CPU)
    paths = [r.image for r in train_batches.load_records(job(world))[0]]
    style = write.Style(max_tokens=6)
    plain = list(write.captions(model, paths, style=style, batch=5, workers=0))
    store = open_store(store_of(world, tmp_path / "features"), loaded(Path(world["vision"]))[0])

    def never(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr(write.media_workers, "decode_images", never)
    monkeypatch.setattr(type(model.encoder), "forward", never)
    asked = [*paths, "/no/such.png"]
    found = list(write.captions(model, asked, style=style, batch=5, store=store))
    assert [(path, text) for path, text, _ in found[:-1]] == [(p, t) for p, t, _ in plain]
    assert [s for _, _, s in found[:-1]] == pytest.approx([s for _, _, s in plain], abs=2e-3)
    assert "not in" in str(found[-1][1])
