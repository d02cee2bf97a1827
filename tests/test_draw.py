import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tinyvl import UserError, data, draw, text

DRAWN = Path(__file__).parent.parent / "data"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    draw.draw_images(folder, train=120, held_out=30, seed=3)
    return folder


def rows(folder: Path) -> list[dict]:
    lines = (folder / "drawn.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def pixels(folder: Path) -> dict[str, bytes]:
    return {
        file.name: np.asarray(Image.open(file)).tobytes() for file in (folder / "images").iterdir()
    }


def test_the_same_seed_draws_the_same(drawn, tmp_path):
    records = draw.draw_images(tmp_path / "again", train=120, held_out=30, seed=3)
    again = tmp_path / "again"
    assert (again / "drawn.jsonl").read_bytes() == (drawn / "drawn.jsonl").read_bytes()
    assert pixels(again) == pixels(drawn)
    assert records == rows(drawn)
    draw.draw_images(tmp_path / "other", train=120, held_out=30, seed=4)
    assert rows(tmp_path / "other") != rows(drawn)
    assert not set(pixels(tmp_path / "other").values()) & set(pixels(drawn).values())


def test_the_shipped_set_is_what_the_generator_draws(tmp_path):
    draw.draw_images(tmp_path, train=240, held_out=60, seed=0)
    assert (tmp_path / "drawn.jsonl").read_bytes() == (DRAWN / "drawn.jsonl").read_bytes()
    assert pixels(tmp_path) == pixels(DRAWN)


def test_the_shipped_set_is_small_and_reads():
    assert sum(file.stat().st_size for file in DRAWN.rglob("*") if file.is_file()) < 900_000
    for lang in draw.LANGUAGES:
        train = data.read(DRAWN, split="train", lang=lang)
        test = data.read(DRAWN, split="test", lang=lang)
        assert (len(train), len(test)) == (240, 60)
        assert all(Path(record.image).is_file() for record in train + test)
        assert len({record.captions[0] for record in test}) == 60


def test_pictures(drawn):
    names = {row["image"] for row in rows(drawn)}
    assert {f"images/{file}" for file in pixels(drawn)} == names
    for name in names:
        picture = Image.open(drawn / name)
        assert (picture.size, picture.mode) == ((64, 64), "RGB")


def test_records_have_both_languages_and_labels(drawn):
    english, german = ([r for r in rows(drawn) if r["lang"] == lang] for lang in ("en", "de"))
    assert len(english) == len(german) == 150
    strip = {"lang", "captions", "question", "answers"}
    for one, other in zip(english, german, strict=True):
        assert {k: one[k] for k in one.keys() - strip} == {k: other[k] for k in one.keys() - strip}
    assert Counter(row["split"] for row in english) == {"train": 120, "test": 30}
    for row in english:
        words = row["captions"][0].split()
        for label in ("shape", "colour", "size", "background", "shape2", "colour2", "size2"):
            assert row[label] is None or row[label] in words
        assert row["place"].split()[0] in words


def test_each_picture_has_a_question_that_its_labels_answer(drawn):
    kinds = {
        r"what colour is the background\?": "background", r"where is the (\w+)\?": "place",
        r"what (left of|above) the (\w+)\?|what is (left of|above) the (\w+)\?": "shape",
    }  # fmt: skip
    seen = Counter()
    for row in (r for r in rows(drawn) if r["lang"] == "en"):
        question, (answer,) = row["question"], row["answers"]
        second = row["shape2"] is not None and any(
            question == ask.format(**{k: row[f"{k}2"] for k in ("shape", "colour")})
            for ask in ("what colour is the {shape}?", "what shape is {colour}?",
                        "how big is the {shape}?")
        )  # fmt: skip
        label = next((name for ask, name in kinds.items() if re.fullmatch(ask, question)), None)
        words = {"what colour": "colour", "what shape": "shape", "how big": "size"}
        label = label or words[" ".join(question.split()[:2])] + "2" * second
        assert answer == row[label], question
        seen[label] += 1
    assert len(seen) == 8


def test_held_out_scenes_are_distinct_and_seen_or_unseen(drawn):
    everything = rows(drawn)
    for lang in draw.LANGUAGES:
        train = [r for r in everything if r["lang"] == lang and r["split"] == "train"]
        test = [r for r in everything if r["lang"] == lang and r["split"] == "test"]
        shown = {r["captions"][0] for r in train}
        assert len({r["captions"][0] for r in test}) == len(test)
        assert Counter(r["combination"] for r in test) == {"seen": 24, "unseen": 6}
        assert {r["combination"] for r in train} == {"seen"}
        for row in test:
            assert (row["captions"][0] in shown) == (row["combination"] == "seen")


def test_training_never_shows_a_withheld_pair_and_shows_all_others():
    pairs = {
        (thing.shape, thing.colour)
        for scene, split in draw.scenes(2000, 0, seed=0)
        for thing in (scene.first, scene.second)
        if thing
    }
    every = {(shape, colour) for shape in draw.SHAPES for colour in draw.COLOURS}
    assert pairs == every - set(draw.WITHHELD.items())


def test_held_out_renders_are_new(drawn):
    train = {row["image"] for row in rows(drawn) if row["split"] == "train"}
    picture = pixels(drawn)
    assert len(set(picture.values())) == len(picture) == len(train) + 30


@pytest.mark.parametrize(
    ("scene", "english", "german"),
    [
        (
            draw.Scene(draw.Thing("circle", "red", "small"), None, "left", "grey"),
            "a small red circle on the left of a grey picture",
            "ein kleiner roter Kreis links auf grauem Grund",
        ),
        (
            draw.Scene(draw.Thing("cross", "orange", "big"), None, "middle", "pink"),
            "a big orange cross in the middle of a pink picture",
            "ein großes orangefarbenes Kreuz in der Mitte auf rosa Grund",
        ),
        (
            draw.Scene(
                draw.Thing("ring", "purple", "big"),
                draw.Thing("square", "blue", "small"),
                "left of",
                "beige",
            ),
            "a big purple ring left of a small blue square in a beige picture",
            "ein großer violetter Ring links neben einem kleinen blauen Quadrat auf beigem Grund",
        ),
        (
            draw.Scene(
                draw.Thing("triangle", "white", "small"),
                draw.Thing("star", "black", "big"),
                "above",
                "grey",
            ),
            "a small white triangle above a big black star in a grey picture",
            "ein kleines weißes Dreieck über einem großen schwarzen Stern auf grauem Grund",
        ),
    ],
)
def test_captions(scene, english, german):
    assert (scene.caption("en"), scene.caption("de")) == (english, german)
    assert text.tidy(english) == english


def test_the_vocabulary_is_small():
    captions = [scene.caption() for scene, _ in draw.scenes(2000, 300, seed=0)]
    assert len({word for caption in captions for word in caption.split()}) < 40
    assert max(len(caption.split()) for caption in captions) <= 15


def test_a_picture_shows_what_its_scene_says():
    def paint(name):
        return np.array({**draw.COLOURS, **draw.BACKGROUNDS}[name])

    counted = Counter()
    for index, (scene, _) in enumerate(draw.scenes(300, 0, seed=1)):
        picture = draw.render(scene, 1, index).astype(int)
        names = [*draw.COLOURS, scene.background]
        distance = [abs(picture - paint(name)).sum(-1) for name in names]
        nearest = np.argmin(distance, axis=0)
        things = [scene.first] + ([scene.second] if scene.second else [])
        assert (nearest == len(names) - 1).mean() > 0.5
        for i, thing in enumerate(things):
            ys, xs = np.nonzero(nearest == names.index(thing.colour))
            counted[thing.size, thing.shape] += 1
            assert len(xs) > 60
            x, y = draw.RELATIONS[scene.place][i] if scene.second else draw.PLACES[scene.place]
            assert abs(np.median(xs) - x) < 4
            assert abs(np.median(ys) - y) < 4
    assert len(counted) == 12


def test_it_refuses_with_a_sentence(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "mine.png").write_bytes(b"")
    with pytest.raises(UserError, match="name an empty folder"):
        draw.draw_images(tmp_path, train=2, held_out=1)
    with pytest.raises(UserError, match="50 held-out pictures need 40 distinct training scenes"):
        draw.draw_images(tmp_path / "new", train=10, held_out=50)
    assert not (tmp_path / "new").exists()


def test_a_smaller_drawing_leaves_nothing_of_the_larger(tmp_path):
    draw.draw_images(tmp_path, train=20, held_out=5)
    draw.draw_images(tmp_path, train=10, held_out=5)
    assert len(list((tmp_path / "images").iterdir())) == 15
