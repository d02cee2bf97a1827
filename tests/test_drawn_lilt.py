"""LilT on the drawn set, from the command line: new renders found by caption, captions by render.

The towers are tiny, fitted and then locked: a ViT that tells the labels of a scene, a BERT that
takes English and German captions of one meaning for the same. LilT is trained on pictures with
English captions alone, and asked in both languages.

No two held-out scenes have a caption in common, so each picture has one right caption and each
caption one right picture among all 300. Scenes whose pair of shape and colour training never
shows are among these; their own recall is printed apart.
"""

import json

import pytest
import shell
import worlds
from tiny import fit_bilingual_bert

from tinyvl import draw


def tinyvl(*args: str) -> str:
    return shell.apart(*args, "--device", "cpu", "--workers", "0")


@pytest.mark.slow
def test_new_renders_are_found_in_both_languages_after_training_on_one(drawn, one_thread, tmp_path):
    shown = dict.fromkeys(scene for scene, part in draw.scenes(6000, 300, 0) if part == "train")
    translations = [(scene.caption("en"), scene.caption("de")) for scene in shown]
    text = fit_bilingual_bert(tmp_path / "text", translations, epochs=6)

    data, out = str(drawn / "data"), str(tmp_path / "out")
    tinyvl(
        "train", "lilt", "--data", data, "--lang", "en", "--text", str(text), "--text-pool", "mean",
        "--text-dropout", "0", "--vision", str(drawn / "vision"), "--fit", "crop",
        "--image-pool", "mean", "--image-adapter", "deep", "--image-dropout", "0", "--views", "1",
        "--embed", "64", "--batch", "250", "--micro-batch", "250", "--epochs", "8",
        "--rate", "3e-3", "--out", out,
    )  # fmt: skip
    report = json.loads(tinyvl("eval", "retrieval", out, data, "-o", str(tmp_path / "run")))
    assert (report["split"], report["items"], report["captions"]) == ("test", 300, 600)
    unseen = worlds.unseen(drawn / "data")
    hits: dict[tuple, list[bool]] = {}
    for line in map(json.loads, (tmp_path / "run/predictions.jsonl").read_text().splitlines()):
        way = "IR" if "query" in line else "TR"
        hits.setdefault((line["lang"], way, line["path"] in unseen), []).append(line["rank"] == 1)
    recall = {key: sum(found) / len(found) for key, found in hits.items()}
    for (lang, way, new), value in recall.items():
        print(f"{lang} {way} R@1 of {'unseen combinations' if new else 'new renders'}: {value:.3f}")
    for way in ("TR", "IR"):
        assert len(hits["en", way, False]) == 240
        assert recall["en", way, False] >= 0.95  # chance is 0.003
        assert recall["de", way, False] >= 0.9
