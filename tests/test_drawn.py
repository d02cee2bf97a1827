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
import worlds
from shell import apart as tinyvl
from tiny import fit_decoder

from tinyvl import data

RECIPES = {"gpt2": ("18", "1.5e-3"), "opt": ("24", "1e-3"), "llama": ("18", "1.5e-3")}


@pytest.fixture(scope="module")
def training(drawn, one_thread, request, tmp_path_factory) -> Iterator[dict[str, Future]]:
    """The families that are asked for, trained beside each other: folder and seconds of each."""
    asked = [
        item.callspec.params["family"]
        for item in request.session.items
        if item.fspath == request.fspath
    ]
    root = tmp_path_factory.mktemp("trained")
    texts = [r.captions[0] for r in data.read(drawn / "data", split="train", lang="en")]
    models = {f: fit_decoder(root / f / "lm", f, texts, epochs=2) for f in asked}

    def train(family: str) -> tuple[Path, float]:
        epochs, rate = RECIPES[family]
        started = time.monotonic()
        tinyvl(
            "train", "itune", "--data", str(drawn / "data"), "--lm", str(models[family]),
            "--vision", str(drawn / "vision"), "--fit", "crop", "--out", str(root / family / "out"),
            "--epochs", epochs, "--rate", rate, "--batch", "64", "--device", "cpu",
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
    records = data.read(drawn / "data", split="test", lang="en")
    paths = [record.path for record in records]
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
    unseen, found = worlds.unseen(drawn / "data"), {False: [], True: []}
    for line, record in zip(said, records, strict=True):
        found[record.path in unseen].append(line["caption"] == record.captions[0])
    seen, new = (sum(right) / len(right) for right in found.values())
    print(
        f"{family}: {seen:.3f} of new renders exact, {new:.3f} of unseen combinations, "
        f"trained in {seconds:.0f} s"
    )
    assert seen >= 0.95
    assert (folder / "README.md").exists()
