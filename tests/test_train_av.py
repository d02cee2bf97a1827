"""eP-ALM on videos and sounds, with random tiny backbones: train, save, load, ask, evaluate."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import shell
import torch
import worlds
from PIL import Image
from worlds import CPU, write_lines

from tinyvl import UserError, evaluate, models, presets, train, train_batches, write
from tinyvl.features import FeatureStore, open_store


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Path]:
    return worlds.clips(tmp_path_factory.mktemp("av"))


ENCODERS = {"video": "timesformer", "audio": "ast", "image": "timesformer"}


def trained(world, out: Path, modality: str, task: str = "caption", vision=None, **changes) -> dict:
    told = {"video": {"frames": 4}, "audio": {"masks": [8, 20]}, "image": {}}[modality]
    media = {} if modality == "image" else {"modality": modality, **told}
    data = world["pictures.jsonl"] if modality == "image" else world[modality]
    parts = {"data": data, "language": world["lm"], "vision": world[vision or ENCODERS[modality]]}
    job = worlds.job(
        {name: str(path) for name, path in parts.items()},
        **{"method": "epalm", "fit": "squash", "options": {"task": task}, "media": media,
           "per_image": 1, "batch": 4, "epochs": 3, "rate": 1e-3, **changes},
    )  # fmt: skip
    return train.train(job, presets.Run(out=out, device=CPU, quiet=True, workers=0))


PLACE = evaluate.Place(CPU, torch.float32, workers=0, quiet=True)
GREEDY = write.Style(beams=1, max_tokens=6)


@pytest.mark.parametrize("modality", ["video", "audio"])
def test_trained_saved_asked_and_measured(modality, world, tmp_path):
    trained(world, tmp_path / "a", modality, "vqa", views=2)
    assert models.open_checkpoint(str(tmp_path / "a")).modality == modality
    model = models.load(str(tmp_path / "a"), task="vqa", device=CPU)
    assert model.encoder.modality == modality
    assert {n.partition(".")[0] for n, _ in model.named_parameters() if model.kept(n)} == {
        "connector", "soft",
    }  # fmt: skip
    source = evaluate.Source(str(world[modality]))
    report = evaluate.run("vqa", str(tmp_path / "a"), source, style=GREEDY, place=PLACE)
    assert report["items"] == 3
    folder = world[modality] / {"video": "videos", "audio": "sounds"}[modality]
    first = sorted(folder.iterdir())[0]
    (tmp_path / f"bad{first.suffix}").write_bytes(b"no")
    result = shell.invoke(
        "ask", str(first), str(tmp_path / f"bad{first.suffix}"), str(tmp_path / "no"), "what is?",
        "-m", str(tmp_path / "a"), "--json", "--device", "cpu", "--workers", "0",
    )  # fmt: skip
    assert result.exit_code == 1
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert list(lines[0]) == ["path", "question", "answer", "score"]
    assert "damaged" in lines[1]["error"]
    assert "no such file" in lines[2]["error"]


def test_a_folder_gives_its_videos_and_a_batch_does_not_matter(world, tmp_path):
    trained(world, tmp_path / "a", "video")
    model = models.load(str(tmp_path / "a"), device=CPU)
    paths = [str(path) for path in sorted((world["video"] / "videos").iterdir())[:3]]
    paths.insert(1, str(world["0.png"]))  # a picture among videos
    style = write.Style(beams=2, max_tokens=6)
    together = list(write.captions(model, paths, style=style, workers=0))
    for path, found in zip(paths, together, strict=True):
        ((_, text, score),) = write.captions(model, [path], style=style, workers=0)
        assert (path, text) == found[:2]
        assert score == pytest.approx(found[2], abs=1e-4)
    result = shell.invoke(
        "caption", str(world["video"]), "-m", str(tmp_path / "a"), "--device", "cpu", "--beams",
        "1", "--frames", "2", "--workers", "0",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) == 9


@pytest.mark.parametrize("vision", ["timesformer", "vit"])
def test_a_model_of_pictures_answers_about_videos(vision, world, tmp_path):
    trained(world, tmp_path / "a", "image", "vqa", vision=vision)
    source = evaluate.Source(str(world["video"]))
    run = {"style": GREEDY, "place": PLACE}
    report = evaluate.run("vqa", str(tmp_path / "a"), source, frames=4, **run)
    assert report["items"] == 3
    assert report["frames"] == 4
    with pytest.raises(UserError, match="this is audio, and the model reads pictures and videos"):
        evaluate.run("vqa", str(tmp_path / "a"), evaluate.Source(str(world["audio"])), **run)


def inputs(world, modality: str, tmp_path, **options) -> list[torch.Tensor]:
    """What three epochs see of the first record."""
    told = {"modality": modality, "frames": 4, "masks": [8, 20]}
    config = models.new_config(
        "epalm", str(world["lm"]), str(world[ENCODERS[modality]]), fit="squash", prompt="",
        options={}, media=told,
    )  # fmt: skip
    model = models.build(config, device=CPU, precision=torch.float32)
    job = presets.Job(
        "epalm", str(world[modality]), "", "", "", {}, presets.Recipe(), media=told, **options
    )
    records, _ = train_batches.load_records(job)
    run = presets.Run(tmp_path, CPU, quiet=True, workers=0, cache=False)
    seen = train_batches.Pictures(
        records, model, run, "train", job.views, job.seed, crops=job.crops
    )
    return [next(seen.stream([[0]], epoch))[0] for epoch in range(3)]


@pytest.mark.parametrize("modality", ["video", "audio"])
def test_what_an_epoch_sees_is_a_function_of_seed_and_epoch(modality, world, tmp_path):
    plain = inputs(world, modality, tmp_path)
    assert torch.equal(plain[0], plain[1])
    crops = inputs(world, modality, tmp_path, crops=True)
    assert crops[0].shape == plain[0].shape
    assert not torch.equal(crops[0], crops[1])
    again = inputs(world, modality, tmp_path, crops=True)
    assert all(torch.equal(a, b) for a, b in zip(crops, again, strict=True))
    assert not torch.equal(inputs(world, modality, tmp_path, crops=True, seed=1)[0], crops[0])
    views = inputs(world, modality, tmp_path, views=2)
    assert torch.equal(views[0], plain[0])  # the first view is what evaluation sees
    assert torch.equal(views[0], views[2])
    assert not torch.equal(views[0], views[1])


def test_features_of_videos_are_read_by_models_of_the_same_frames(world, tmp_path):
    arguments = ["features", str(world["video"]), "--modality", "video", "--frames", "4",
                 "--vision", str(world["timesformer"]), "--fit", "squash", "--what", "summaries",
                 "--out", str(tmp_path / "kept"), "--device", "cpu", "--quiet", "--workers",
                 "0"]  # fmt: skip
    result = shell.invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["extracted"] == 9
    trained(world, tmp_path / "a", "video")
    source = evaluate.Source(str(world["video"]))
    places = [
        replace(PLACE, out=tmp_path / "one"),
        replace(PLACE, out=tmp_path / "two", features=tmp_path / "kept"),
    ]
    run = {"style": GREEDY, "scoring": {"metrics": ["BLEU-4"]}}
    one, two = (
        evaluate.run("caption", str(tmp_path / "a"), source, place=place, **run) for place in places
    )
    assert one["items"] == two["items"] == 3
    vision = models.read_config(tmp_path / "a")["vision"]
    with pytest.raises(UserError, match="frames 4"):
        open_store(tmp_path / "kept", vision | {"frames": 8}, "summaries")


def test_pictures_and_animations_stand_beside_videos(world, tmp_path):
    red, blue = (Image.new("RGB", (64, 48), colour) for colour in ("red", "blue"))
    red.save(tmp_path / "still.gif")
    red.save(tmp_path / "moves.gif", save_all=True, append_images=[blue], duration=500)
    (video,) = sorted((world["video"] / "videos").iterdir())[:1]
    names = [str(video), "still.gif", "moves.gif"]
    lines = [{"video": name, "captions": ["a thing"], "split": "train"} for name in names]
    data = write_lines(tmp_path / "set.jsonl", lines)
    arguments = ["features", str(data), "--modality", "video", "--frames", "4", "--vision",
                 str(world["timesformer"]), "--fit", "squash", "--device", "cpu", "--quiet",
                 "--workers", "0"]  # fmt: skip
    kept = shell.invoke(*arguments, "--what", "summaries", "--out", str(tmp_path / "kept"))
    assert json.loads(kept.stdout)["extracted"] == 3
    alone = tmp_path / "alone.jsonl"
    for i, line in enumerate(lines):
        write_lines(alone, [line])
        shell.invoke(*arguments[:1], str(alone), *arguments[2:], "--what", "summaries", "--out",
                     str(tmp_path / f"{i}"))  # fmt: skip
        one, all_three = (FeatureStore.open(tmp_path / n) for n in (f"{i}", "kept"))
        torch.testing.assert_close(one.read("summaries", [0]), all_three.read("summaries", [i]))
    both = shell.invoke(*arguments, "--what", "both", "--out", str(tmp_path / "both"))
    assert json.loads(both.stdout)["extracted"] == 2
    assert "still.gif: is no video, and gives other tokens" in both.stderr
    trained(world | {"video": data}, tmp_path / "a", "video", crops=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--modality", "smell"], "--modality is image, video or audio, not 'smell'"),
        (["--frames", "4"], "--frames goes with --modality video"),
        (["--modality", "video", "--time-mask", "4"], "go with --modality audio"),
        (["--modality", "audio", "--data", "VIDEO"], "no sound with a caption to train on"),
        (["--modality", "audio", "--data", "AUDIO", "--vision", "TS"], "not audio"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, words, world, tmp_path):
    places = {"VIDEO": "video", "AUDIO": "audio", "TS": "timesformer"}
    arguments = [str(world[places[a]]) if a in places else a for a in arguments]
    if "--data" not in arguments:
        arguments += ["--data", str(world["pictures.jsonl"])]
    with pytest.raises(UserError, match=re.escape(words)) as said:
        shell.invoke("train", "epalm", *arguments, "--lm", world["lm"], "--out", tmp_path / "x")
    assert said.value.status == 2
