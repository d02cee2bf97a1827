"""LilT on the drawn set, from the command line: new renders found by caption, captions by render.

The towers are tiny, fitted and then locked: a ViT that tells the labels of a scene, a BERT that
takes English and German captions of one meaning for the same. LilT is trained on pictures with
English captions alone, and asked in both languages.

No two held-out scenes have a caption in common, so each picture has one right caption and each
caption one right picture among all 300. Scenes whose pair of shape and colour training never
shows are among these; their own recall is printed apart.
"""

import json
from pathlib import Path

import pytest
import shell
import torch
from tiny import DRAWN_VIT, fit_bilingual_bert, fit_drawn_vit, write_vision

from tinyvl import draw


def tinyvl(*args: str) -> str:
    return shell.apart(*args, "--device", "cpu", "--workers", "0")


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # here and in the commands: the same sums on any number of cores
    yield
    torch.set_num_threads(threads)


def test_new_renders_are_found_in_both_languages_after_training_on_one(tmp_path, one_thread):
    records = draw.draw_images(tmp_path / "data", train=6000, held_out=300, seed=0)
    state, *_ = fit_drawn_vit(6000, 300, epochs=10)
    vision = write_vision(tmp_path / "vision", model_args=DRAWN_VIT, state=state)
    shown = dict.fromkeys(scene for scene, part in draw.scenes(6000, 300, 0) if part == "train")
    translations = [(scene.caption("en"), scene.caption("de")) for scene in shown]
    text = fit_bilingual_bert(tmp_path / "text", translations, epochs=6)

    data, out = str(tmp_path / "data"), str(tmp_path / "out")
    tinyvl(
        "train", "lilt", "--data", data, "--lang", "en", "--text", str(text), "--text-pool", "mean",
        "--text-dropout", "0", "--vision", str(vision), "--fit", "crop", "--image-pool", "mean",
        "--image-adapter", "deep", "--image-dropout", "0", "--views", "1", "--embed", "64",
        "--batch", "250", "--micro-batch", "250", "--epochs", "8", "--rate", "3e-3", "--out", out,
    )  # fmt: skip
    report = json.loads(tinyvl("eval", "retrieval", out, data, "-o", str(tmp_path / "run")))
    assert (report["split"], report["items"], report["captions"]) == ("test", 300, 600)
    unseen = {r["image"]: r["combination"] == "unseen" for r in records}
    hits: dict[tuple, list[bool]] = {}
    for line in map(json.loads, (tmp_path / "run/predictions.jsonl").read_text().splitlines()):
        way = "IR" if "query" in line else "TR"
        new = unseen[str(Path(line["path"]).relative_to(data))]
        hits.setdefault((line["lang"], way, new), []).append(line["rank"] == 1)
    recall = {key: sum(found) / len(found) for key, found in hits.items()}
    for (lang, way, new), value in recall.items():
        print(f"{lang} {way} R@1 of {'unseen combinations' if new else 'new renders'}: {value:.3f}")
    for way in ("TR", "IR"):
        assert len(hits["en", way, False]) == 240
        assert recall["en", way, False] >= 0.95  # chance is 0.003
        assert recall["de", way, False] >= 0.9
