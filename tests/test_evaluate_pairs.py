"""Retrieval and zero-shot classification over a data set, by a model that knows colours."""

import json
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_metrics import recall

from tinyvl import UserError, evaluate, evaluate_pairs, metrics, models

PLACE = evaluate.Place(torch.device("cpu"), torch.float32, batch=4, workers=0, quiet=True)
COLOURS = {
    "red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0),
    "purple": (160, 32, 160), "white": (255, 255, 255), "gray": (90, 90, 90),
}  # fmt: skip
GERMAN = dict(zip(COLOURS, ["rot", "grün", "blau", "gelb", "lila", "weiß", "grau"], strict=True))


class Encoder:
    size = 8

    def transform(self):
        return lambda picture: torch.from_numpy(np.array(picture.resize((8, 8)))).permute(2, 0, 1)


class Colours:
    """Pictures by their mean colour, texts by the colour they name; English and a bit of German."""

    width = 4
    encoder = Encoder()

    def __init__(self):
        self.batches = []

    def embed(self, colours: list) -> torch.Tensor:
        x = torch.tensor(colours, dtype=torch.float32)
        return torch.nn.functional.normalize(
            torch.cat([x, torch.full((len(x), 1), 40.0)], 1), dim=1
        )

    def embed_images(self, pixels: torch.Tensor) -> torch.Tensor:
        assert pixels.dtype == torch.uint8
        self.batches.append(len(pixels))
        return self.embed(pixels.float().mean((2, 3)).tolist())

    def embed_texts(self, texts: list[str], max_tokens: int | None = None) -> torch.Tensor:
        known = COLOURS | {"rot": COLOURS["red"], "grün": COLOURS["green"]}
        named = [next((c for w, c in known.items() if w in text), (9, 9, 9)) for text in texts]
        shade = [zlib.crc32(text.encode()) % 60 for text in texts]  # no two texts are quite alike
        return self.embed([[x + s, y - s, z] for (x, y, z), s in zip(named, shade, strict=True)])


@pytest.fixture
def model(tmp_path, monkeypatch) -> Colours:
    folder = tmp_path / "model"
    folder.mkdir()
    part = {"sha256": "", "config": {}}
    config = {"format": 1, "method": "lilt", "options": {}, "text": {"name": "words"} | part}
    config["image"] = {"name": "colours", "fit": "jpeg"} | part
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"weights")
    fake = Colours()
    monkeypatch.setattr(models, "load", lambda *a, **k: fake)
    return fake


def shades(folder: Path, n: int = 14) -> list[tuple[str, str]]:
    """Pictures of colours, a little off. -> (file, colour)."""
    rng = np.random.default_rng(0)
    found = []
    for i in range(n):
        name = list(COLOURS)[i % len(COLOURS)]
        colour = np.clip(np.array(COLOURS[name]) + rng.integers(-110, 110, 3), 0, 255)
        Image.new("RGB", (20, 10), tuple(int(c) for c in colour)).save(folder / f"{i}.png")
        found.append((f"{i}.png", name))
    return found


@pytest.fixture
def pairs(tmp_path) -> evaluate.Source:
    """14 pictures with one to three English captions, and 9 of them with a German one."""
    entries = []
    for i, (file, name) in enumerate(shades(tmp_path)):
        captions = [f"a {name} square {i}", f"{name} all over", "nothing to see"][: 1 + i % 3]
        entries.append({"image": file, "captions": captions, "lang": "en"})
        if i < 9:
            entries.append(
                {"image": file, "captions": [f"ein Quadrat, {GERMAN[name]}"], "lang": "de"}
            )
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))
    return evaluate.Source(str(file), lang=None)


def retrieval(tmp_path, source, out=None, **options):
    place = replace(PLACE, out=out)
    return evaluate_pairs.run_retrieval(str(tmp_path / "model"), source, place=place, **options)


def by_hand(model: Colours, source: evaluate.Source, lang: str) -> dict[str, float]:
    """Recalls by sorting all scores, one picture at a time; the best of its captions counts."""
    entries = [json.loads(line) for line in Path(source.path).read_text().splitlines()]
    entries = [entry for entry in entries if entry["lang"] == lang]
    pictures = [np.array(Image.open(Path(source.path).parent / e["image"])) for e in entries]
    images = model.embed([picture.mean((0, 1)).tolist() for picture in pictures])
    texts = [text for entry in entries for text in entry["captions"]]
    owner = np.array([i for i, entry in enumerate(entries) for _ in entry["captions"]])
    scores = np.float32(images.double() @ model.embed_texts(texts).double().T)
    found = {}
    for k in (1, 5, 10):
        tr = [
            (scores[i][owner != i] >= scores[i][owner == i].max()).sum() < k
            for i in range(len(entries))
        ]
        ir = [(np.delete(scores[:, j], i) >= scores[i, j]).sum() < k for j, i in enumerate(owner)]
        found |= {f"TR@{k}": np.mean(tr), f"IR@{k}": np.mean(ir)}
    for way in ("TR", "IR"):
        found[f"{way}-mean"] = np.mean([found[f"{way}@{k}"] for k in (1, 5, 10)])
    return found


def test_recalls_of_each_language_and_their_mean(model, pairs, tmp_path):
    report = retrieval(tmp_path, pairs)
    wanted = {lang: by_hand(model, pairs, lang) for lang in ("de", "en")}
    groups = report["groups"]["language"]
    assert list(groups) == ["de", "en"]
    for lang, values in wanted.items():
        assert {name: groups[lang][name] for name in values} == pytest.approx(values)
    assert 0.3 < wanted["en"]["TR@1"] < 1  # neither all nor nothing, or it would tell little
    assert wanted["de"]["TR@1"] < wanted["en"]["TR@1"]
    assert [(groups[lang]["items"], groups[lang]["captions"]) for lang in groups] == [
        (9, 9),
        (14, 27),
    ]
    for name, value in report["metrics"].items():
        assert value == pytest.approx((wanted["de"][name] + wanted["en"][name]) / 2)
    assert (report["task"], report["lang"], report["protocol"]) == ("retrieval", "de,en", "full")
    assert (report["items"], report["captions"]) == (14, 36)
    assert sum(model.batches) == 14  # every picture once, whatever the languages


def test_one_language_is_what_metrics_recall_says(model, pairs, tmp_path):
    report = retrieval(tmp_path, pairs, langs=["en"])
    entries = [json.loads(line) for line in Path(pairs.path).read_text().splitlines()]
    entries = [entry for entry in entries if entry["lang"] == "en"]
    images = [Image.open(tmp_path / entry["image"]) for entry in entries]
    vectors = model.embed_images(torch.stack([model.encoder.transform()(i) for i in images]))
    texts = [text for entry in entries for text in entry["captions"]]
    owner = [i for i, entry in enumerate(entries) for _ in entry["captions"]]
    wanted = recall(vectors, model.embed_texts(texts), owner)
    assert report["metrics"] == pytest.approx(wanted)
    assert set(report["metrics"]) == set(wanted)
    assert "groups" not in report
    with pytest.raises(UserError, match="'fr'; de, en"):
        retrieval(tmp_path, pairs, langs=["fr"])


def test_chance_is_what_a_random_order_scores():
    captions = [1, 2, 3, 2, 1, 3, 4, 1, 1, 2, 2, 2]
    owner = [i for i, n in enumerate(captions) for _ in range(n)]
    rng = np.random.default_rng(0)
    tried = [
        recall(torch.from_numpy(rng.random((12, len(owner)))), torch.eye(len(owner)), owner)
        for _ in range(1500)
    ]
    for name, value in metrics.chance(captions).items():
        assert value == pytest.approx(np.mean([found[name] for found in tried]), abs=0.012), name
    assert metrics.chance([1, 1])["TR@5"] == 1
    thousand = metrics.chance([5] * 1000)
    assert (thousand["IR@1"], thousand["TR@1"]) == pytest.approx((0.001, 0.001))


def test_a_limit_is_on_pictures_and_shared_by_the_languages(model, pairs, tmp_path):
    report = retrieval(tmp_path, replace(pairs, limit=6))
    assert report["items"] == 6
    assert report["groups"]["language"]["en"]["items"] == 6


def test_a_broken_picture_is_left_out_with_its_captions(model, pairs, tmp_path, capsys):
    (tmp_path / "3.png").write_bytes(b"nothing")
    report = retrieval(tmp_path, pairs, langs=["en"])
    assert (report["failed"], report["items"], report["captions"]) == (1, 13, 26)
    assert "3.png" in capsys.readouterr().err


def test_lilts_protocol_keeps_the_pictures_of_val2014(model, tmp_path):
    """XTD10 as it is published: a caption a line, a file a language, COCO's names beside."""
    (tmp_path / "xtd" / "images").mkdir(parents=True)
    names = [f"COCO_{'val' if i < 200 else 'train'}2014_{i:012d}.jpg" for i in range(210)]
    for i, name in enumerate(names):
        colour = (i, 255 - i, 7 * i % 256)
        Image.new("RGB", (4, 4), colour).save(tmp_path / "xtd/images" / name)

    def publish(names: list[str]) -> evaluate.Source:
        (tmp_path / "xtd/test_image_names.txt").write_text("".join(f"{n}\n" for n in names))
        for lang in ("de", "ko"):
            lines = "".join(f"ein rot Ding {i}\n" for i in range(len(names)))
            (tmp_path / f"xtd/test_1kcaptions_{lang}.txt").write_text(lines)
        return evaluate.Source(str(tmp_path / "xtd"), lang=None)

    source = publish(names)
    assert retrieval(tmp_path, source)["items"] == 210
    report = retrieval(tmp_path, source, protocol="lilt")
    assert (report["items"], report["protocol"], report["lang"]) == (200, "lilt", "de,ko")
    assert (report["chance"]["IR@10"], report["chance"]["TR@10"]) == pytest.approx((0.05, 0.05))
    with pytest.raises(UserError, match="199"):
        retrieval(tmp_path, publish(names[1:]), protocol="lilt")


def test_kept_runs_are_averaged_and_compared(model, pairs, tmp_path):
    first = retrieval(tmp_path, pairs, out=tmp_path / "a")
    same = [(9, 9, 9)]  # a collapsed model
    model.embed_texts = lambda texts, **options: model.embed(same * len(texts))
    second = retrieval(tmp_path, pairs, out=tmp_path / "b")
    assert second["metrics"]["TR@1"] == 0  # ties are misses
    again = evaluate_pairs.score_folders("retrieval", [tmp_path / "a"])
    assert again["metrics"] == first["metrics"]
    assert (again["items"], again["chance"]) == (first["items"], first["chance"])
    both = evaluate_pairs.score_folders("retrieval", [tmp_path / "a", tmp_path / "b"])
    assert both["metrics"]["TR@1"] == pytest.approx(first["metrics"]["TR@1"] / 2)
    report = evaluate_pairs.compare_folders("retrieval", tmp_path / "b", tmp_path / "a")
    found = report["difference"]["TR@1"]
    assert found["value"] == pytest.approx(first["metrics"]["TR@1"])
    assert 0 < found["low"] < found["value"] < found["high"] <= 1
    other = retrieval(tmp_path, replace(pairs, limit=5), out=tmp_path / "c")
    assert other["items"] == 5
    with pytest.raises(UserError, match="not run on the same items"):
        evaluate_pairs.compare_folders("retrieval", tmp_path / "a", tmp_path / "c")
    with pytest.raises(UserError, match="choose another") as caught:
        retrieval(tmp_path, pairs, out=tmp_path / "a")
    assert "--resume" not in str(caught.value)
    (tmp_path / "b/report.json").unlink()
    with pytest.raises(UserError, match="to its end"):
        evaluate_pairs.score_folders("retrieval", [tmp_path / "b"])
    with pytest.raises(UserError, match="eval zeroshot"):
        evaluate_pairs.score_folders("zeroshot", [tmp_path / "a"])


def test_a_bootstrap_draws_pictures_with_their_captions(model, pairs, tmp_path):
    """The same values as a data set that has each picture as often as it was drawn."""
    retrieval(tmp_path, pairs, langs=["en"], out=tmp_path / "a")
    lines = [
        json.loads(line) for line in (tmp_path / "a/predictions.jsonl").read_text().splitlines()
    ]
    paths = list(dict.fromkeys(line["path"] for line in lines))
    counts = np.random.default_rng(0).multinomial(14, [1 / 14] * 14, size=3)
    found = evaluate_pairs.retrieval_scores(lines).resample(counts)
    for row in range(3):
        times = dict(zip(paths, counts[row], strict=True))
        for way in ("TR", "IR"):
            ranks = [
                line["rank"]
                for line in lines
                if ("query" in line) == (way == "IR")
                for _ in range(times[line["path"]])
            ]
            assert found[f"{way}@1"][row] == pytest.approx(np.mean(np.array(ranks) <= 1))


# ----------------------------------------------------------------------------- zero-shot


@pytest.fixture
def folders(tmp_path) -> evaluate.Source:
    root = tmp_path / "photos"
    for i, (file, name) in enumerate(shades(tmp_path, 28)):
        (root / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / file).rename(root / name / f"{i}.png")
    return evaluate.Source(str(root))


def zeroshot(tmp_path, source, out=None, resume=False, **options):
    place = replace(PLACE, out=out, resume=resume)
    return evaluate_pairs.run_zeroshot(str(tmp_path / "model"), source, place=place, **options)


def test_zeroshot_accuracy(model, folders, tmp_path):
    report = zeroshot(tmp_path, folders, out=tmp_path / "out")
    names = sorted(COLOURS)
    files = sorted(Path(folders.path).rglob("*.png"))
    transform = model.encoder.transform()
    images = model.embed_images(torch.stack([transform(Image.open(file)) for file in files]))
    scores = images @ model.embed_texts([f"a photo of {name}" for name in names]).T
    labels = torch.tensor([names.index(file.parent.name) for file in files])
    ranks = metrics.label_ranks(scores, labels)
    wanted = {f"top{k}": (ranks < k).double().mean().item() for k in (1, 5)}
    assert report["metrics"] == pytest.approx(wanted)
    assert 0.5 < report["metrics"]["top1"] < 1
    right = scores.argmax(1) == labels
    for i, name in enumerate(names):
        group = report["groups"]["class"][name]
        assert group["top1"] == pytest.approx(right[labels == i].float().mean().item())
        assert group["items"] == 4
    assert (report["items"], report["classes"]) == (28, 7)
    assert report["chance"] == {"top1": 1 / 7, "top5": 5 / 7}
    assert report["prompts"] == ["a photo of {}"]
    lines = [
        json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()
    ]
    assert [line["label"] for line in lines] == [names[i] for i in scores.argmax(1)]


def test_zeroshot_goes_on_after_a_kill(model, folders, tmp_path, monkeypatch):
    whole = zeroshot(tmp_path, folders, out=tmp_path / "whole")
    real = model.embed_images

    def killed(pixels):
        if sum(model.batches) >= 40:  # 28 of the whole run, and 12
            raise KeyboardInterrupt
        return real(pixels)

    monkeypatch.setattr(model, "embed_images", killed)
    with pytest.raises(KeyboardInterrupt):
        zeroshot(tmp_path, folders, out=tmp_path / "part")
    monkeypatch.setattr(model, "embed_images", real)
    again = zeroshot(tmp_path, folders, out=tmp_path / "part", resume=True)
    assert again["kept"] == 12
    for name in ("seconds", "items_per_second", "kept"):
        whole.pop(name), again.pop(name)
    assert again == whole


def test_candidates_are_the_datas_classes_or_all_that_are_named(model, folders, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("".join(f"{name}\n" for name in [*COLOURS, "dark", "bright"]))
    assert zeroshot(tmp_path, folders, class_names=names)["classes"] == 7
    every = zeroshot(tmp_path, folders, class_names=names, all_classes=True)
    assert every["classes"] == 9
    few = zeroshot(tmp_path, replace(folders, limit=3))
    assert (few["items"], few["classes"]) == (3, 7)


def test_prompts_are_ensembled(model, folders, tmp_path):
    asked = []
    real = model.embed_texts
    model.embed_texts = lambda texts: asked.extend(texts) or real(texts)
    file = tmp_path / "prompts.txt"
    file.write_text("the colour {}\n{}, a square\n")
    report = zeroshot(tmp_path, folders, prompts=["a {} thing", str(file)])
    assert report["prompts"] == ["a {} thing", "the colour {}", "{}, a square"]
    assert asked[:3] == ["a blue thing", "the colour blue", "blue, a square"]


def test_kept_zeroshot_runs_are_compared(model, folders, tmp_path):
    first = zeroshot(tmp_path, folders, out=tmp_path / "a")
    model.embed_texts = lambda texts: model.embed([(9, 9, 9)] * len(texts))
    zeroshot(tmp_path, folders, out=tmp_path / "b")
    report = evaluate_pairs.compare_folders("zeroshot", tmp_path / "b", tmp_path / "a")
    assert report["metrics"] == first["metrics"]
    assert report["difference"]["top1"]["value"] == first["metrics"]["top1"]
    assert report["difference"]["top1"]["low"] > 0


def test_data_without_classes(model, pairs, tmp_path):
    with pytest.raises(UserError, match="no record has a class"):
        zeroshot(tmp_path, pairs)


def test_data_without_captions(model, folders, tmp_path):
    with pytest.raises(UserError, match="no captions to retrieve"):
        retrieval(tmp_path, folders)


def test_out_of_memory_halves_the_batch(capsys):
    def tight(items):
        if len(items) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.tensor([[float(i)] for i in items])

    assert evaluate_pairs.embed(tight, list(range(7))).flatten().tolist() == list(range(7))
    assert "out of memory" in capsys.readouterr().err
