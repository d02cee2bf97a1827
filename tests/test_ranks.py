"""Two processes over gloo give what one process gives: weights, lines, features, index, report.

Where each has one micro-batch of a step their sums are the same to the bit.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import ranked
import shell
import torch
from safetensors.torch import load_file
from tiny import write_text
from torch.testing import assert_close
from worlds import content, files, losses, paint, steps, write_lines

from tinyvl import UserError, data, features, ranks, store, train
from tinyvl.device import Pieces

CPU = ["--device", "cpu", "--workers", 0, "--quiet"]
STEP = ["--batch", 12, "--micro-batch", 6, "--rate", 3e-3, "--save-every", 5]
Words = list[object]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    paint(folder, 37)
    (folder / "005.png").write_bytes(b"no picture")
    for i in range(0, 37, 4):
        (folder / f"{i:03}.txt").write_text(f"a red square\nblue at the {i}\n")
    classes = [{"image": f"{folder}/{i:03}.png", "label": ["red", "blue"][i % 2]} for i in range(9)]
    write_lines(folder.with_name("classes.jsonl"), classes)
    return folder


@pytest.fixture(scope="module")
def both(world, photos, tmp_path_factory, one_thread) -> dict[str, Path]:
    """Of each number of processes the folder in which it has carried out the same commands."""
    root = tmp_path_factory.mktemp("ranks")
    one, two = root / "one", root / "two"
    captions = [c for r in data.read(world["data"]) for c in r.captions]
    towers = str(write_text(root / "bert", captions))  # has dropout
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "SHARD_ROWS", 32)
        done = {name: shell.run(*words) for name, words in trainings(world, towers, one).items()}
        shutil.copytree(one / "more", two / "more")
        rest = {"more": longer(one), **readings(world, photos, one, one)}
        done |= {name: shell.run(*words) for name, words in rest.items()}
    for name, found in done.items():
        (one / f"{name}.out").write_text(found.stdout)
    todo = trainings(world, towers, two) | {"more": longer(two)}
    todo |= readings(world, photos, one, two)
    wrong = ["caption", photos, "-m", root / "none", *CPU]
    commands = [[words, two / f"{name}.out"] for name, words in [*todo.items(), ("", wrong)]]
    first, other = (process.errors.splitlines() for process in ranked.run(two, commands))
    assert json.loads(first[-1]) == [*(done[name].returncode for name in todo), 2]
    (two / "errors").write_text("\n".join(first[:-1] + other[:-1]))
    return {"one": one, "two": two}


def trainings(world: dict[str, str], towers: str, out: Path) -> dict[str, Words]:
    own = ["--data", world["data"], *CPU]
    frozen = [*own, "--vision", world["vision"]]
    lm = [*frozen, "--lm", world["language"], *STEP]
    lilt = ["train", "lilt", *frozen, "--text", towers, "--preset", "lilt-lwa-base", "--size", 32]
    itune = ["train", "itune", *lm, "--drop", 1, "--per-image", 2]
    ragged = ["--batch", 66, "--micro-batch", 6]  # steps of 11 micro-batches and of a single one
    return {
        "itune": [*itune, "--out", out / "itune", "--epochs", 2],
        "epalm": ["train", "epalm", *lm, "--out", out / "epalm", "--epochs", 1],
        "clipcap": ["train", "clipcap", *lm, *ragged, "--out", out / "clipcap", "--epochs", 2],
        "lilt": [*lilt, *ragged, "--out", out / "lilt", "--epochs", 2],
        "cider": ["train", "itune", *own, *STEP, "--objective", "cider", "--init", out / "itune",
                  "--epochs", 1, "--out", out / "cider", "--max-tokens", 8, "--samples", 2],
        "more": [*itune, "--out", out / "more", "--epochs", 1, "--final-rate", 3e-3],
    }  # fmt: skip


def longer(out: Path) -> Words:
    """What the last of the trainings has begun goes on."""
    return ["train", "itune", "--out", out / "more", "--resume", "--epochs", 2, *CPU]


def readings(world: dict[str, str], photos: Path, models: Path, out: Path) -> dict[str, Words]:
    itune, lilt, four = models / "itune", models / "lilt", ["--batch", 4, *CPU]
    return {
        "caption": ["caption", photos, "-m", itune, "--json", *four],
        "lines": ["caption", photos, "-m", itune, "-o", out / "lines", *four],
        "features": ["features", photos, "--vision", world["vision"], "-o", out / "features", *CPU],
        "index": ["index", photos, "-m", lilt, "-o", out / "index", *four],
        "scores": ["eval", "caption", itune, world["data"], "-o", out / "scores",
                   "--metrics", "BLEU-1,CIDEr", *four],
        "retrieval": ["eval", "retrieval", lilt, world["data"], *four],
        "zeroshot": ["eval", "zeroshot", lilt, photos.parent / "classes.jsonl", *four],
    }  # fmt: skip


@pytest.mark.parametrize("name", ["itune", "epalm", "clipcap", "lilt", "cider", "more"])
def test_training_ends_with_the_same_weights(both, name):
    """In two runs the processes have 5 and 6 micro-batches of a step, then none and one."""
    one, two = both["one"] / name, both["two"] / name
    assert losses(two) == pytest.approx(losses(one), abs=2e-5)
    assert {file.name for file in one.iterdir()} == {file.name for file in two.iterdir()}
    for file in ("model.safetensors", "last.safetensors"):
        ours, theirs = load_file(one / file), load_file(two / file)
        assert ours.keys() == theirs.keys()
        for tensor in ours:
            atol = 1e-5 if name in ("clipcap", "lilt") else 0
            assert_close(theirs[tensor], ours[tensor], rtol=0, atol=atol)


def test_the_first_process_prints_all_in_order(both):
    one, two = both["one"], both["two"]
    for name in ("caption", "lines", "features", "index", "itune", "more"):
        text, expected = ((folder / f"{name}.out").read_text() for folder in (two, one))
        for timed in ("captions_per_second", "seconds"):
            text, expected = (re.sub(rf'"{timed}": [^,]*', "", said) for said in (text, expected))
        assert text.replace("/two/", "/one/") == expected
    assert len((two / "caption.out").read_text().splitlines()) == 37


def test_files_are_the_same(both):
    one, two = both["one"], both["two"]
    assert (two / "lines").read_bytes() == (one / "lines").read_bytes()
    assert (two / "lines").read_text().count("\n") == 36
    for name in ("features", "index"):
        assert content(two / name) == content(one / name)
    assert len([*(two / "features").glob("*.safetensors")]) == 2


def test_reports_are_the_same(both):
    one, two = both["one"], both["two"]
    for name in ("scores", "retrieval", "zeroshot"):
        ours, theirs = (json.loads((root / f"{name}.out").read_text()) for root in (one, two))
        times = dict.fromkeys(("seconds", "items_per_second"))
        assert theirs | times == ours | times
    file = "scores/predictions.jsonl"
    assert (two / file).read_bytes() == (one / file).read_bytes()


def test_what_goes_wrong_is_said_once(both, photos):
    said = (both["two"] / "errors").read_text().splitlines()
    broken = [line for line in said if str(photos / "005.png") in line]
    assert len(broken) == 5  # two runs of caption, features, index, zeroshot
    assert [line for line in said if line not in broken] == [said[-1]]
    assert "none" in said[-1]


def test_of_several_processes_none_cuts_its_batches_up(monkeypatch):
    """The others would wait for it."""

    def accumulate(parts, scaler):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(ranks, "size", lambda: 2)
    model = SimpleNamespace(zero_grad=lambda set_to_none: None, accumulate=accumulate)
    scaler, pieces = torch.amp.GradScaler("cpu", enabled=False), Pieces("One", "wait")
    with pytest.raises(UserError, match="use a smaller --micro-batch, or wait"):
        train.accumulate(model, model, [], scaler, pieces)


def torchrun(*words: object, **more: object) -> subprocess.Popen:
    command = ["-m", "torch.distributed.run", "--nproc-per-node", 2, *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *map(str, command)], **pipes, **more)


@pytest.mark.slow
def test_torchrun_captions_paths_from_a_pipe(both, photos):
    paths = sorted(map(str, photos.glob("*.png")))
    words = ["-m", "tinyvl", "caption", "-", "-m", both["one"] / "itune", "--json", *CPU]
    process = torchrun(*words, "--batch", 4, stdin=subprocess.PIPE)
    out, said = process.communicate("\n".join(paths))
    assert out == (both["one"] / "caption.out").read_text()
    assert said.count("005.png") == 1
    assert process.returncode == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["retrieve", "--query", "a"], "torchrun is for tinyvl caption"),
        (["train", "itune", "--micro-batch", "64"], "a step has 1 micro-batches, too few for 2"),
    ],
)
def test_torchrun_says_once_what_cannot_be_done(world, tmp_path, words, told):
    own = ["--data", world["data"], "--lm", world["language"], "--vision", world["vision"]]
    more = [*own, "--out", tmp_path / "out"] if words[0] == "train" else []
    process = torchrun("-m", "tinyvl", *words, *more, *CPU[:4])
    out, said = process.communicate()
    assert (out, said.count(told), process.returncode) == ("", 1, 1)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_one_process_that_fails_ends_all(world, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "from tinyvl import UserError, cli, ranks, train_run\n"
        "def passes(self, step, *rest):\n"
        "    if step == 3 and ranks.rank() == 1: raise UserError('a cable was pulled')\n"
        "    return True\n"
        "train_run.Watch.passes = passes\n"
        "cli.main()\n"
    )
    words = trainings(world, "", tmp_path)["itune"]
    process = torchrun(program, *words)
    _, said = process.communicate(timeout=300)
    assert said.count("tinyvl: ") == said.count("tinyvl: a cable was pulled") == 1
    assert process.returncode == 1
    assert steps(tmp_path / "itune") <= 3


@pytest.mark.slow
def test_features_that_were_killed_have_no_gap(world, photos, tmp_path):
    """The second process has written its shard while the first was still at the one before."""
    program, out = tmp_path / "program.py", tmp_path / "features"
    program.write_text(
        "import os, time\n"
        "from tinyvl import cli, features, ranks, store\n"
        "features.SHARD_ROWS = 32\n"
        "real = store.write_shard\n"
        "def slow(file, *rest):\n"
        f"    open(r'{tmp_path}/%d' % ranks.rank(), 'w').write(str(os.getpid()))\n"
        "    time.sleep(60 if ranks.first() else 0)\n"
        "    real(file, *rest)\n"
        "store.write_shard = slow\n"
        "cli.main()\n"
    )
    words = ["features", photos, "--vision", world["vision"], *CPU]
    process = torchrun(program, *words, "-o", out)
    wanted = [out / store.WAITING.format(1), tmp_path / "0", tmp_path / "1"]
    while not all(file.exists() and file.stat().st_size for file in wanted):
        assert process.poll() is None
        time.sleep(0.05)
    for pid in (process.pid, int((tmp_path / "0").read_text()), int((tmp_path / "1").read_text())):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()
    assert not [*out.glob("*.safetensors")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "SHARD_ROWS", 32)
        for name in ("features", "whole"):
            assert shell.run(*(*words, "-o", tmp_path / name)).returncode == 1
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["torchrun", "the second process"])
def test_a_signal_stops_all_after_the_same_step(world, both, tmp_path, whom):
    program = tmp_path / "program.py"
    program.write_text(
        "import os, time\n"
        "from tinyvl import cli, ranks, train_run\n"
        "def passes(self, step, *rest):\n"
        "    if step == 3:\n"
        f"        open(r'{tmp_path}/%d' % ranks.rank(), 'w').write(str(os.getpid()))\n"
        "        time.sleep(2)\n"
        "    return True\n"
        "train_run.Watch.passes = passes\n"
        "cli.main()\n"
    )
    words = trainings(world, "", tmp_path)["itune"]
    process = torchrun(program, *words)
    while not (tmp_path / "0").exists() or not (tmp_path / "1").exists():
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)
    pid = process.pid if whom == "torchrun" else int((tmp_path / "1").read_text())
    os.kill(pid, signal.SIGINT)
    _, said = process.communicate(timeout=300)
    assert said.count("stopped and saved; continue with --resume") == 1, said
    assert steps(tmp_path / "itune") == 3
    done = shell.run("train", "itune", "--out", tmp_path / "itune", "--resume", *CPU)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "itune") == files(both["one"] / "itune")


@pytest.mark.slow
def test_a_step_that_is_not_finite_is_left_out_by_all(world, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "from tinyvl import captioner, cli\n"
        "real = captioner.Captioner.loss\n"
        "def loss(self, batch, weights=None):\n"
        "    found, count = real(self, batch, weights)\n"
        "    return found * (float('nan') if 20 in batch.keys else 1), count\n"
        "captioner.Captioner.loss = loss\n"
        "if __name__ == '__main__': cli.main()\n"
    )
    words = trainings(world, "", tmp_path / "two")["itune"]
    _, said = torchrun(program, *words).communicate(timeout=300)
    assert said.count("skipping step") == said.count("its loss is not finite, because of") == 2
    assert said.count("/20.png") == 2
    alone = trainings(world, "", tmp_path / "one")["itune"]
    done = subprocess.run([sys.executable, program, *map(str, alone)], capture_output=True)
    assert done.returncode == 0
    assert files(tmp_path / "one/itune") == files(tmp_path / "two/itune")
