"""`tinyvl features` and --features on the command line: killed, resumed, read by the others."""

import json
import os
import random
import signal
from pathlib import Path

import pytest
import shell
import torch
import worlds
from PIL import Image
from safetensors.torch import load_file
from tiny import write_text, write_vision
from worlds import content, kill, paint

from tinyvl import UserError, features


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, str]:
    return worlds.noise(tmp_path_factory.mktemp("world"))


def tinyvl(*args: object) -> tuple[int, list[dict], str]:
    """A command in this process: exit status, the JSON lines on stdout, what went to stderr."""
    try:
        done = shell.invoke(*args)
    except UserError as error:
        return error.status, [], str(error)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return done.exit_code, lines, done.stderr


def encoder(world: dict[str, str], *more: object) -> list[object]:
    return ["--vision", world["vision"], "--fit", "crop", "--device", "cpu", "--workers", 0, *more]


def trained(world: dict[str, str]) -> list[object]:
    quick = ["--epochs", 1, "--quiet"]
    return ["--data", world["data"], "--lm", world["language"], *encoder(world), *quick]


def images(world: dict[str, str]) -> list[str]:
    return sorted(map(str, (Path(world["data"]).parent / "images").iterdir()))


def test_a_data_set_and_then_another(world, tmp_path):
    status, lines, said = tinyvl(
        "features", world["data"], *encoder(world), "--out", tmp_path / "f"
    )
    assert status == 0
    assert lines == [
        {"features": str(tmp_path / "f"), "extracted": 40, "kept": 0, "failed": 0,
         "bytes": sum(map(len, content(tmp_path / "f").values()))}
    ]  # fmt: skip
    assert "the features of 40 pictures take 0.00 GB" in said
    more = paint(tmp_path / "more", 3, first=40)
    (tmp_path / "more/broken.png").write_bytes(b"nothing")
    both = [world["data"], tmp_path / "more"]
    status, lines, said = tinyvl("features", *both, *encoder(world), "--out", tmp_path / "f")
    assert status == 1
    assert (lines[0]["extracted"], lines[0]["kept"], lines[0]["failed"]) == (3, 40, 1)
    assert "skipping" in said
    assert "broken.png" in said
    split = ["--split", "val", "--limit", 5, "--quiet"]
    status, lines, said = tinyvl(
        "features", world["data"], *encoder(world, *split), "--out", tmp_path / "g"
    )
    assert (status, said, lines[0]["extracted"]) == (0, "", 5)
    assert len(more) == 3


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--fit", "squash"], "choose another --out"),
        (["--dtype", "bf16"], "choose another --out"),
        (["--dtype", "int8"], "--dtype"),
        (["--split", "test"], "no split 'test'"),
        (["--vision", "/no/such"], "/no/such"),
    ],
)
def test_mistakes_cost_one_sentence(world, tmp_path, more, said):
    out = ["--out", tmp_path / "f"]
    assert tinyvl("features", world["data"], *encoder(world, "--limit", 2), *out)[0] == 0
    before = content(tmp_path / "f")
    status, lines, message = tinyvl("features", world["data"], *encoder(world, *more), *out)
    assert status in (1, 2)
    assert lines == []
    assert said in message
    assert "\n" not in message
    assert content(tmp_path / "f") == before


def test_train_and_caption_read_features(world, tmp_path):
    store = tmp_path / "f"
    tinyvl("features", world["data"], *encoder(world), "--out", store)
    common = trained(world)
    status, lines, said = tinyvl(
        "train", "itune", *common, "--features", store, "--out", tmp_path / "m"
    )
    assert (status, said) == (0, "")
    model = ["--model", tmp_path / "m", "--device", "cpu", "--max-tokens", 5, "--json"]
    status, found, said = tinyvl("caption", *model, "--features", store)
    assert (status, said.count("\n"), " captions in " in said) == (0, 1, True)
    assert [line["path"] for line in found] == images(world)
    status, plain, _ = tinyvl(
        "caption", *model, "--workers", 0, Path(world["data"]).parent / "images"
    )
    assert [line["caption"] for line in found] == [line["caption"] for line in plain]
    some = [images(world)[7], str(tmp_path / "else.png")]
    status, lines, said = tinyvl("caption", *model, "--features", store, *some)
    assert status == 1
    assert lines[0] == found[7]
    assert "not in" in lines[1]["error"]
    other = write_vision(tmp_path / "other", seed=5)
    tinyvl("features", world["data"], *encoder(world), "--vision", other, "--out", tmp_path / "g")
    for command in (
        ["caption", *model, "--features", tmp_path / "g"],
        ["train", "itune", *common, "--features", tmp_path / "g", "--out", tmp_path / "n"],
        ["train", "itune", *common, "--features", tmp_path, "--out", tmp_path / "n"],
    ):
        status, lines, message = tinyvl(*command)
        assert (status, lines) == (2, [])
        assert "features" in message
        assert "\n" not in message


def test_killed_at_any_moment_it_ends_with_the_same_bytes(world, tmp_path, monkeypatch):
    """SIGKILL and then Control-C, at random moments, workers and all."""
    paint(tmp_path / "in", 6)
    originals = sorted((tmp_path / "in").iterdir())
    for i in range(6, 500):
        os.link(originals[i % 6], tmp_path / f"in/{i:04}.png")
    program = "from tinyvl import features; features.SHARD_ROWS = 32"

    def arguments(out: str) -> list[str]:
        folders = [tmp_path / "in", "--out", tmp_path / out]
        return [str(a) for a in ("features", *encoder(world, "--workers", 1), *folders)]

    chance, parts = random.Random(8), tmp_path / "parts"
    for number in (signal.SIGKILL, signal.SIGINT):
        at = len(list(parts.glob("0*"))) + chance.randint(1, 5)

        def ready(at: int = at) -> bool:
            return len(list(parts.glob("0*"))) >= at

        status, said = kill(arguments("parts"), number, ready, program)
        if status == 0:
            break  # done before the signal came
        assert status == (-9 if number == signal.SIGKILL else 130), said
        if number == signal.SIGINT:
            assert "goes on from here" in said
        assert not (parts / "manifest.json").exists()
    monkeypatch.setattr(features, "SHARD_ROWS", 32)
    _, (counts,), _ = tinyvl(*arguments("parts"))
    assert counts["kept"] >= 2 * 32
    assert counts["extracted"] + counts["kept"] == 500
    assert tinyvl(*arguments("whole"))[0] == 0
    assert content(parts) == content(tmp_path / "whole")


def test_pictures_that_are_no_longer_there_are_captioned_from_features(world, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    Image.new("RGB", (40, 40), "red").save(folder / "a.png")
    tinyvl("features", folder, *encoder(world), "--out", tmp_path / "f")
    common = trained(world)
    tinyvl("train", "itune", *common, "--out", tmp_path / "m")
    (folder / "a.png").unlink()
    status, lines, _ = tinyvl(
        *("caption", "--json", "--model", tmp_path / "m", "--device", "cpu"),
        *("--features", tmp_path / "f"),
    )
    assert status == 0
    assert [line["path"] for line in lines] == [str(folder / "a.png")]


def test_maps_are_trained_on_kept_and_captioned_from(world, tmp_path):
    """Lower maps and larger pictures: the same from a cache as without; one without is refused."""
    cnn = write_vision(tmp_path / "cnn", "test_efficientnet", {})
    place = ["--vision", cnn, "--fit", "crop", "--device", "cpu", "--workers", 0, "--quiet"]
    both = ["--lower", 2, "--larger", 208]
    for name, more in (("with", both), ("without", [])):
        out = ["--out", tmp_path / name]
        assert tinyvl("features", world["data"], *place, *more, *out)[0] == 0
    common = [
        "--data",
        world["data"],
        "--lm",
        world["language"],
        *place,
        "--limit",
        6,
        "--epochs",
        1,
    ]
    common += [*both, "--rank", 4, "--out", tmp_path / "m"]
    status, _, said = tinyvl("train", "itune", *common, "--features", tmp_path / "without")
    assert status == 2
    assert "lower 2, larger 208" in said
    status, _, said = tinyvl("train", "itune", *common, "--features", tmp_path / "with")
    assert (status, said) == (0, "")
    model = ["--model", tmp_path / "m", "--device", "cpu", "--max-tokens", 5, "--json"]
    status, kept, _ = tinyvl("caption", *model, "--features", tmp_path / "with")
    pictures = [line["path"] for line in kept]
    status, plain, _ = tinyvl("caption", *model, "--workers", 0, *pictures)
    assert [line["caption"] for line in kept] == [line["caption"] for line in plain]
    common = ["--data", world["data"], *place[:2], "--fit", "crop", *place[4:], "--epochs", 1]
    lm, text = (
        ["--lm", world["language"]],
        write_text(tmp_path / "text", ["a red ring", "a blue cross"]),
    )
    methods = {
        "itune": lm, "epalm": lm,
        "lilt": ["--text", text, "--views", 1, "--image-adapter", "deep"],
    }  # fmt: skip
    for method, more in methods.items():  # what more there is does not disturb
        for store, model in (("with", "a"), ("without", "b")):
            out = ["--features", tmp_path / store, "--out", tmp_path / f"{method}-{model}"]
            status, _, said = tinyvl("train", method, *common, *more, *out)
            assert (status, said) == (0, ""), method
        one, other = (load_file(tmp_path / f"{method}-{n}" / "model.safetensors") for n in "ab")
        torch.testing.assert_close(one, other)
    plain = ["--data", world["data"], "--lm", world["language"], *place, "--out", tmp_path / "n"]
    status, _, said = tinyvl("train", "itune", *plain, "--rank", 4)
    assert (status, said) == (2, "--rank goes with --lower.")
    more = ["--init", tmp_path / "m", "--data", world["data"], "--lower", 1]
    status, _, said = tinyvl("train", "itune", *more, "--out", tmp_path / "n")
    assert status == 2
    assert "--init brings its own --lower" in said
    status, _, said = tinyvl("features", *plain[1:2], "--what", "summaries", *both, "-o", "x")
    assert (status, said) == (2, "--lower is about the tokens of pictures.")
