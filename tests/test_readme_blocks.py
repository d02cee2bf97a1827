"""Every command block of the README, run in its order on a handful of files: minutes."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import published as published_sets
import pytest

from tinyvl import hub

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
COMMANDS = [line[2:] for block in BLOCKS for line in block.splitlines() if line.startswith("$ ")]
# Trainings see a few records for a step or two; what never ends is asked to stop.
FEW = "--limit 6 --epochs 1 --batch 4 --micro-batch 4"
# Not these: what needs a model hub, and checkpoints of others (test_hub_push.py, test_convert.py).
ELSEWHERE = ("tinyvl push", "tinyvl caption --model hf://", "tinyvl convert")
REST = [c for c in COMMANDS if c.startswith(("tinyvl", "find")) and not c.startswith(ELSEWHERE)]


def shell(command: str, folder: Path, seconds: int = 300) -> subprocess.CompletedProcess:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    own = {"PATH": path, "TINYVL_CACHE": str(hub.cache_dir()), "BROWSER": "true"}
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], cwd=folder, env=os.environ | own,
        capture_output=True, text=True, timeout=seconds,
    )  # fmt: skip


def short(command: str) -> str:
    """The command on little data."""
    if not command.startswith("tinyvl train"):
        return command.replace("runs --follow", "runs --follow & sleep 8; kill -INT $!; wait; true")
    command = re.sub(r" --(limit|epochs|batch|micro-batch|size) \S+", "", command)
    return f"{command} {FEW}" + " --size 64" * (" lilt " in command)


def lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """The files that the README speaks of, each as small as can be."""
    root = tmp_path_factory.mktemp("readme")
    done = shell("tinyvl samples photos", root)
    if done.returncode:
        pytest.skip(f"no package index here: {done.stderr.strip()}")
    for kind, name, own, file in (
        ("video", "clips", "videos", "clip.mp4"),
        ("audio", "sounds", "sounds", "dog.wav"),
        ("audio", "esc10", "sounds", "x.wav"),
    ):
        drawn = root / f"drawn-{name}"
        done = shell(f"tinyvl draw {drawn} --modality {kind} --train 8 --held-out 4", root)
        assert done.returncode == 0, done.stderr
        text = (drawn / "drawn.jsonl").read_text().replace(f'"{own}/', f'"{drawn.name}/{own}/')
        (root / f"{name}.jsonl").write_text(text)
        shutil.copy(min((drawn / own).iterdir()), root / file)
    photos = sorted((root / "photos").glob("*.*g"))
    said = ["a cat looks up", "a cup of coffee on a table", "a man with a camera", "a rocket"]
    captions = [
        {"image": f"photos/{p.name}", "captions": [said[i % 4], "a photo"], "split": split}
        for i, p in enumerate(photos)
        for split in [("train", "train", "val", "test")[i % 4]]
    ]
    tests = [c | {"split": "test"} for c in captions]
    for name in ("captions", "part", "flickr8k_train"):
        lines(root / f"{name}.jsonl", captions)
    for name in ("flickr8k_test", "coco_test"):
        lines(root / f"{name}.jsonl", tests)
    words = {"en": "a cat", "de": "eine Katze", "fr": "un chat"}
    lines(root / "flickr8k_test_multilingual.jsonl", [
        {"image": c["image"], "captions": [word], "lang": lang, "split": "test"}
        for c in captions for lang, word in words.items()
    ])  # fmt: skip
    questions = [
        {"image": c["image"], "question": "what is this?", "answers": ["a cat"],
         "split": c["split"], "choices": ["a cat", "a dog"]}
        for c in captions
    ]  # fmt: skip
    for name in ("questions", "daquar_train", "daquar_test", "visual7w_test"):
        lines(root / f"{name}.jsonl", questions)
    shutil.copy(photos[0], root / "photo.jpg")
    for name in ("imagenet-a", "cifar10/test"):
        for label, photo in zip(("cat", "dog"), photos, strict=False):
            (root / name / label).mkdir(parents=True)
            shutil.copy(photo, root / name / label)
    published(root, photos)
    picture = published_sets.vqa(root)[0].parent / "val2014/COCO_val2014_000000000042.jpg"
    shutil.copy(photos[0], picture)
    answers = [{"question_id": 42000, "answer": "cat"}, {"question_id": 42001, "answer": "yes"}]
    (root / "answers.json").write_text(json.dumps(answers))
    # Pages of these come before the section that makes them.
    done = shell("tinyvl eval caption dataset_coco.json --beams 1 -o scores/mine", root)
    assert done.returncode == 0, done.stderr
    for name in ("one", "two"):
        shutil.copytree(root / "scores/mine", root / "scores" / name)
    return root


def published(root: Path, photos: list[Path]) -> None:
    """The published files that are named: COCO's, Karpathy's, VQA's; results of others."""
    images = [{"id": i, "file_name": f"photos/{p.name}"} for i, p in enumerate(photos)]
    notes = [{"id": i, "image_id": i, "caption": "a cat"} for i in range(len(photos))]
    coco = {"images": images, "annotations": notes}
    (root / "captions_val2017.json").write_text(json.dumps(coco))
    results = [{"image_id": i, "caption": "a cat sits"} for i in range(len(photos))]
    (root / "results.json").write_text(json.dumps(results))
    entries = [
        {"filepath": "photos", "filename": p.name, "cocoid": i, "imgid": i,
         "split": "train" if i < 4 else "test",
         "sentences": [{"raw": "a cat", "tokens": ["a", "cat"], "sentid": i}], "sentids": [i]}
        for i, p in enumerate(photos)
    ]  # fmt: skip
    document = {"dataset": "coco", "images": entries}
    (root / "dataset_coco.json").write_text(json.dumps(document))


@pytest.mark.slow
@pytest.mark.parametrize("command", REST)
def test_every_command_block_runs(command, world):
    """It exits with 0; what it prints is the other tests' matter."""
    if "--resume" not in command:  # what an earlier one has left
        named = re.search(r" (?:--out|-o) (\S+)", command)
        out = world / (named[1] if named else f"runs/{command.split()[2]}")
        if out.is_dir():
            shutil.rmtree(out)
        elif named and command.startswith("tinyvl data"):
            out.unlink(missing_ok=True)
    done = shell(short(command), world)
    assert done.returncode == 0, done.stderr[-400:]
