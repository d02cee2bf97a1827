"""The whole way on the drawn set: fit tiny backbones, freeze them, train, caption new renders.

All from the command line, on a CPU, in well under two minutes a decoder family; each trains in one
thread, and as many at once as there are cores.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from shell import apart as tinyvl
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


RECIPES = {"gpt2": ("18", "1.5e-3"), "opt": ("24", "1e-3"), "llama": ("18", "1.5e-3")}


@pytest.fixture(scope="module")
def training(drawn, request, tmp_path_factory) -> Iterator[dict[str, Future]]:
    """The families that are asked for, trained beside each other: folder and seconds of each."""
    asked = [
        item.callspec.params["family"]
        for item in request.session.items
        if item.fspath == request.fspath
    ]
    root = tmp_path_factory.mktemp("trained")
    models = {f: fit_decoder(root / f / "lm", f, drawn["texts"], epochs=2) for f in asked}

    def train(family: str) -> tuple[Path, float]:
        epochs, rate = RECIPES[family]
        started = time.monotonic()
        tinyvl(
            "train", "itune", "--data", drawn["data"], "--lm", str(models[family]), "--vision",
            drawn["vision"], "--fit", "crop", "--out", str(root / family / "out"), "--epochs",
            epochs, "--rate", rate, "--batch", "64", "--device", "cpu",
        )  # fmt: skip
        return root / family / "out", time.monotonic() - started

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {family: pool.submit(train, family) for family in asked}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize(
    "family",
    ["gpt2", *(pytest.param(family, marks=pytest.mark.slow) for family in ("opt", "llama"))],
)
def test_itune_captions_new_renders_exactly(family, drawn, training, tmp_path):
    folder, seconds = training[family].result()
    paths = list(drawn["test"])
    listing = tmp_path / "list"
    listing.write_text("".join(f"{path}\n" for path in paths))
    with listing.open() as stdin:
        done = subprocess.run(
            [sys.executable, "-m", "tinyvl.cli", "caption", "-", "--json", "--batch", "64",
             "--model", str(folder)],
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
    assert (folder / "README.md").exists()
