"""The whole way on the drawn set: fit tiny backbones, freeze them, train, caption new renders.

All from the command line, on a CPU, in well under two minutes a decoder family.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import DRAWN_VIT, fit_decoder, fit_drawn_vit, write_vision

from tinyvl import data, draw


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Iterator[dict]:
    root = tmp_path_factory.mktemp("drawn")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # here and in the commands: the same sums on any number of cores
    draw.draw_images(root / "data", train=6000, held_out=300, seed=0)
    state, scenes, right = fit_drawn_vit(6000, 300, epochs=10)
    unseen = torch.tensor([scene.unseen for scene in scenes])
    assert right[~unseen].float().mean() >= 0.98  # the encoder can tell what captions say
    records = data.read(root / "data", lang="en")
    yield {
        "data": str(root / "data"),
        "vision": str(write_vision(root / "vision", model_args=DRAWN_VIT, state=state)),
        "texts": [r.captions[0] for r in records if r.split == "train"],
        "test": {r.image: r.captions[0] for r in records if r.split == "test"},
        "unseen": [scene.unseen for scene in scenes],
    }
    torch.set_num_threads(threads)


def tinyvl(*args: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tinyvl.cli", *args],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("family", "epochs", "rate"),
    [("gpt2", "18", "1.5e-3"), ("opt", "24", "1e-3"), ("llama", "18", "1.5e-3")],
)
def test_itune_captions_new_renders_exactly(family, epochs, rate, drawn, tmp_path):
    lm = fit_decoder(tmp_path / "lm", family, drawn["texts"], epochs=2)
    started = time.monotonic()
    tinyvl(
        "train", "itune", "--data", drawn["data"], "--lm", str(lm), "--vision", drawn["vision"],
        "--fit", "crop", "--out", str(tmp_path / "out"), "--epochs", epochs, "--rate", rate,
        "--batch", "64", "--device", "cpu",
    )  # fmt: skip
    seconds = time.monotonic() - started
    paths = list(drawn["test"])
    listing = tmp_path / "list"
    listing.write_text("".join(f"{path}\n" for path in paths))
    with listing.open() as stdin:
        done = subprocess.run(
            [sys.executable, "-m", "tinyvl.cli", "caption", "-", "--json", "--batch", "64",
             "--model", str(tmp_path / "out")],
            stdin=stdin, capture_output=True, text=True, check=True,
        )  # fmt: skip
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["path"] for line in said] == paths
    right = [line["caption"] == drawn["test"][line["path"]] for line in said]
    seen = [r for r, unseen in zip(right, drawn["unseen"], strict=True) if not unseen]
    new = [r for r, unseen in zip(right, drawn["unseen"], strict=True) if unseen]
    print(
        f"{family}: {sum(seen) / len(seen):.3f} of new renders exact, {sum(new) / len(new):.3f} "
        f"of unseen combinations, trained in {seconds:.0f} s"
    )
    assert sum(seen) / len(seen) >= 0.95
    assert Path(tmp_path / "out/README.md").exists()
