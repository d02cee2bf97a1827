import itertools
import json
import logging
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tinyvl import UserError, data, data_captions, text


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def write_json(path: Path, document: object) -> Path:
    return write(path, json.dumps(document))


def touch(folder: Path, *names: str) -> None:
    """Pictures as far as a reader looks: files."""
    for name in names:
        write(folder / name, "")


def records_of(*images: str, **fields) -> list[data.Record]:
    return [data.Record(image, ["x"], image, **fields) for image in images]


# JSON Lines


def test_jsonl_reads_records_relative_to_the_file(tmp_path):
    touch(tmp_path, "pictures/1.jpg")
    lines = [
        '\ufeff{"image": "pictures/1.jpg", "captions": ["ein Hund", ""], "id": 7, '
        '"split": "val", "lang": "de", "shape": "ring"}',
        "",
        '{"image": "pictures/1.jpg", "captions": "a dog"}',
        '{"image": "pictures/2.jpg", "caption": "a cat"}',
        '{"image": "pictures/2.jpg", "captions": null}',
    ]
    path = write(tmp_path / "set.jsonl", "\n".join(lines))
    one, two = (str(tmp_path / "pictures" / name) for name in ("1.jpg", "2.jpg"))
    assert data.read(path) == [
        data.Record(one, ["ein Hund"], "7", "val", "de"),
        data.Record(one, ["a dog"], "pictures/1.jpg"),
        data.Record(two, ["a cat"], "pictures/2.jpg"),
        data.Record(two, [], "pictures/2.jpg"),
    ]


def test_jsonl_paths_become_absolute_and_plain(tmp_path, monkeypatch):
    touch(tmp_path, "pictures/1.jpg")
    write(tmp_path / "sets/a.jsonl", '{"image": "../pictures/1.jpg"}')
    monkeypatch.chdir(tmp_path)
    assert data.read("sets/a.jsonl")[0].image == str(tmp_path / "pictures/1.jpg")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"image": "1.jpg", "captions": ["a"]', "not JSON"),
        ('["1.jpg", "a dog"]', "expected a JSON object"),
        ('{"picture": "1.jpg"}', "'image' is missing"),
        ('{"image": " "}', "'image' should name a picture"),
        ('{"image": 3}', "'image' should be a text, found '3'"),
        ('{"image": "1.jpg", "captions": 3}', "'captions' should be a list or a text"),
        ('{"image": "1.jpg", "captions": ["a", 3]}', "'captions' should be texts"),
        ('{"image": "1.jpg", "video": "1.mp4"}', "has image and video"),
        ('{"image": "1.jpg", "answers": [1]}', "'answers' should be texts"),
        ('{"image": "1.jpg", "choices": "a"}', "'choices' should be a list, found 'a'"),
        ('{"image": "1.jpg", "choices": ["a", 1]}', "'choices' should be a list of texts"),
        (
            '{"image": "1.jpg", "answers": ["c"], "choices": ["a", "b"]}',
            "the answer 'c' is not among the 'choices'",
        ),
        ('{"image": "1.jpg", "question": 3}', "'question' should be a text"),
        ('{"image": "1.jpg", "split": 1}', "'split' should be a text"),
        ('{"image": "1.jpg", "lang": ["en"]}', "'lang' should be a text"),
    ],
)
def test_jsonl_names_the_malformed_line(tmp_path, line, complaint):
    touch(tmp_path, "1.jpg")
    good = '{"image": "1.jpg", "captions": ["a dog"]}'
    path = write(tmp_path / "set.jsonl", f"{good}\n\n{line}\n{good}\n")
    with pytest.raises(UserError) as caught:
        data.read(path)
    assert f"{path}, line 3" in str(caught.value)
    assert complaint in str(caught.value)


def test_jsonl_malformed_from_the_first_line_on(tmp_path):
    path = write(tmp_path / "set.jsonl", '{"picture": "1.jpg"}\n')
    with pytest.raises(UserError, match=r"line 1: 'image' is missing"):
        data.read(path)


def test_jsonl_of_videos_sounds_questions_and_classes(tmp_path):
    touch(tmp_path, "1.mp4", "1.ogg", "1.jpg")
    question = {"question": "what?", "answers": ["dog", "dog"], "choices": ["dog", "cat"]}
    entries = [
        {"video": "1.mp4", "caption": "a dog", "domain": "in"},
        {"audio": "1.ogg", "label": "dog bark", "fold": 1},
        {"image": "1.jpg", **question, "question_id": 5, "question_type": "what", "id": 1},
        {"image": "1.jpg", "question": "why?", "answer": "because", "answer_type": "other"},
    ]
    path = write(tmp_path / "set.jsonl", "\n".join(map(json.dumps, entries)))
    video, audio, image = (str(tmp_path / name) for name in ("1.mp4", "1.ogg", "1.jpg"))
    records = data.read(path)
    assert records == [
        data.Record(video=video, captions=["a dog"], id="1.mp4", domain="in"),
        data.Record(audio=audio, id="1.ogg", label="dog bark"),
        data.Record(image, id="1", **question, question_id="5", question_type="what"),
        data.Record(image, id="1.jpg", question="why?", answers=["because"], answer_type="other"),
    ]
    assert [(record.modality, record.path) for record in records[:3]] == [
        ("video", video),
        ("audio", audio),
        ("image", image),
    ]


def test_lang_keeps_one_language_and_records_without(tmp_path):
    touch(tmp_path, "1.jpg")
    entries = [{"image": "1.jpg", "lang": lang, "id": str(lang)} for lang in ("en", "de", None)]
    path = write(tmp_path / "set.jsonl", "\n".join(map(json.dumps, entries)))
    assert [record.id for record in data.read(path, lang="en")] == ["en", "None"]
    assert len(data.read(path)) == len(data.read(path, lang="all")) == 3
    assert [record.id for record in data.read(path, lang="fr, de")] == ["de", "None"]
    path = write(tmp_path / "german.jsonl", json.dumps(entries[1]))
    with pytest.raises(UserError, match="no records in 'fr', only in 'de'"):
        data.read(path, lang="fr")


# Karpathy


def karpathy_entry(name: str, split: str, **fields) -> dict:
    sentences = [{"raw": f"{name} {i}", "tokens": []} for i in range(2)]
    return {"filename": name, "split": split, "sentences": sentences, "imgid": 4, **fields}


def test_karpathy(tmp_path):
    touch(tmp_path / "images", "a.jpg")
    entries = [karpathy_entry("a.jpg", "train"), karpathy_entry("b.jpg", "test", imgid=5)]
    path = write_json(tmp_path / "dataset_flickr8k.json", {"images": entries, "dataset": "x"})
    assert data.read(path) == [
        data.Record(str(tmp_path / "images/a.jpg"), ["a.jpg 0", "a.jpg 1"], "4", "train"),
        data.Record(str(tmp_path / "images/b.jpg"), ["b.jpg 0", "b.jpg 1"], "5", "test"),
    ]


def test_karpathy_coco_has_folders_ids_and_restval(tmp_path):
    touch(tmp_path / "coco/val2014", "a.jpg", "b.jpg")
    entries = [
        karpathy_entry("a.jpg", "restval", filepath="val2014", cocoid=391895),
        karpathy_entry("b.jpg", "test", filepath="val2014", cocoid=9),
    ]
    path = write_json(tmp_path / "coco/annotations/dataset_coco.json", {"images": entries})
    (train,) = data.read(path, split="train")
    assert (train.image, train.id) == (str(tmp_path / "coco/val2014/a.jpg"), "391895")
    assert [record.id for record in data.read(path, split="test")] == ["9"]
    with pytest.raises(UserError, match="no split 'val', only 'restval', 'test'") as caught:
        data.read(path, split="val")
    assert caught.value.status == 2


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"filename": None}, "images[1]: 'filename' is missing"),
        ({"split": None}, "images[1]: 'split' is missing"),
        ({"sentences": "a dog"}, "images[1]: 'sentences' should be a list, found 'a dog'"),
        ({"sentences": [{"raw": "x"}, {}]}, "images[1].sentences[1]: 'raw' is missing"),
        ({"imgid": [1]}, "images[1]: 'imgid' should be a number or a text"),
    ],
)
def test_karpathy_names_the_malformed_image(tmp_path, change, complaint):
    entries = [karpathy_entry("a.jpg", "train"), {**karpathy_entry("b.jpg", "train"), **change}]
    path = write_json(tmp_path / "set.json", {"images": entries})
    with pytest.raises(UserError) as caught:
        data.read(path)
    assert f"{path}, {complaint}" in str(caught.value)


# COCO captions


def coco_document() -> dict:
    return {
        "info": {},
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in (1, 2, 3)],
        "licenses": [],
        "annotations": [
            {"image_id": 3, "caption": "a cat\n", "id": 1},
            {"image_id": 1, "caption": "a dog", "id": 2},
            {"image_id": 3, "caption": "two cats", "id": 3},
            {"image_id": 2, "caption": "  ", "id": 4},
        ],
    }


def test_coco_leaves_out_and_counts_images_without_captions(tmp_path, caplog):
    touch(tmp_path / "train2014", "1.jpg")
    path = write_json(tmp_path / "annotations/captions_train2014.json", coco_document())
    with caplog.at_level(logging.WARNING):
        records = data.read(path)
    assert [(record.id, record.captions) for record in records] == [
        ("1", ["a dog"]),
        ("3", ["a cat\n", "two cats"]),
    ]
    assert records[1].image == str(tmp_path / "train2014/3.jpg")
    assert records[1].split is None
    assert "left out 1 of 3 images" in caplog.text


def test_coco_over_several_lines_is_recognised(tmp_path):
    touch(tmp_path, "1.jpg")
    path = write(tmp_path / "captions.json", json.dumps(coco_document(), indent=1))
    assert len(data.read(path)) == 2


@pytest.mark.parametrize(
    ("part", "change", "complaint"),
    [
        ("images", {"file_name": None}, "images[1]: 'file_name' is missing"),
        ("images", {"id": None}, "images[1]: 'id' is missing"),
        ("annotations", {"caption": 5}, "annotations[1]: 'caption' should be a text, found '5'"),
        ("annotations", {"image_id": 9}, "annotations[1]: 'image_id' 9 is not among the images"),
    ],
)
def test_coco_names_the_malformed_entry(tmp_path, part, change, complaint):
    document = coco_document()
    document[part][1].update(change)
    path = write_json(tmp_path / "captions.json", document)
    with pytest.raises(UserError) as caught:
        data.read(path)
    assert f"{path}, {complaint}" in str(caught.value)


def test_broken_json_is_named(tmp_path):
    path = write(tmp_path / "captions.json", '{"images": [')
    with pytest.raises(UserError, match=r"captions\.json is not JSON"):
        data.read(path)


# Flickr

FLICKR = {
    "Flickr8k.token.txt": "a.jpg#0\tA dog , running .\na.jpg#1\tTwo | 3 dogs\nb.jpg#0\tA cat\n",
    "captions.txt": 'image,caption\na.jpg,"A dog , running ."\na.jpg,Two | 3 dogs\nb.jpg,A cat\n',
    "results.csv": "image_name| comment_number| comment\n"
    "a.jpg| 0| A dog , running .\na.jpg| 1   Two | 3 dogs\nb.jpg| 0| A cat\n",
}


@pytest.mark.parametrize("name", FLICKR)
def test_flickr(tmp_path, name):
    touch(tmp_path / "Images", "a.jpg", "b.jpg")
    path = write(tmp_path / name, FLICKR[name])
    expected = [
        data.Record(str(tmp_path / "Images/a.jpg"), ["A dog , running .", "Two | 3 dogs"], "a.jpg"),
        data.Record(str(tmp_path / "Images/b.jpg"), ["A cat"], "b.jpg"),
    ]
    assert data.read(path) == expected
    assert data.read(tmp_path) == expected


def test_flickr_csv_unquotes(tmp_path):
    path = write(tmp_path / "captions.txt", 'image,caption\na.jpg,"A ""no, no"" sign"\n')
    assert next(data_captions.read_flickr(path)).captions == ['A "no, no" sign']


def test_flickr8k_splits_and_the_picture_that_is_none(tmp_path, caplog):
    text = FLICKR["Flickr8k.token.txt"] + "2258277193_586949ec62.jpg.1#0\tA man\n"
    path = write(tmp_path / "Flickr8k.token.txt", text)
    write(tmp_path / "Flickr_8k.devImages.txt", "b.jpg\n")
    write(tmp_path / "Flickr_8k.trainImages.txt", "a.jpg\n")
    with caplog.at_level(logging.WARNING):
        records = list(data_captions.read_flickr(path))
    assert [(record.id, record.split) for record in records] == [
        ("a.jpg", "train"),
        ("b.jpg", "val"),
    ]
    assert "left out 1 names that are no pictures" in caplog.text


@pytest.mark.parametrize("line", ["c.jpg", "c.jpg#0 no tab", "and so on, he said"])
def test_flickr_names_the_malformed_line(tmp_path, line):
    path = write(tmp_path / "captions.txt", f"image,caption\na.jpg,A dog\n{line}\n")
    with pytest.raises(UserError, match=r"captions\.txt, line 3: expected 'x\.jpg#0"):
        data.read(path)


# Folders


def test_folder_of_pictures(tmp_path):
    touch(tmp_path, "b.PNG", "sub/a.jpg", ".hidden/c.jpg", "notes.md", "sub/.d.jpg")
    write(tmp_path / "b.txt", "a dog\n\n two dogs \n")
    assert data.read(tmp_path) == [
        data.Record(str(tmp_path / "b.PNG"), ["a dog", "two dogs"], "b.PNG"),
        data.Record(str(tmp_path / "sub/a.jpg"), [], "sub/a.jpg"),
    ]


def test_folder_with_one_data_set_or_with_several(tmp_path):
    touch(tmp_path, "1.jpg")
    write(tmp_path / "package.json", '{"name": "not a data set"}')
    write(tmp_path / "a.jsonl", '{"image": "1.jpg", "captions": ["x"], "id": "one"}')
    assert data.read(tmp_path)[0].id == "one"
    assert data.read(tmp_path, format="folder")[0].id == "1.jpg"
    write(tmp_path / "b.jsonl", '{"image": "1.jpg"}')
    with pytest.raises(UserError, match=r"several data sets \(a\.jsonl, b\.jsonl\)"):
        data.read(tmp_path)


# What read refuses, and where it looks


def test_read_refuses_with_a_sentence(tmp_path):
    write(tmp_path / "notes.txt", "some notes\n")
    write(tmp_path / "empty.jsonl", "\n")
    (tmp_path / "latin.jsonl").write_bytes(b'{"image": "gr\xfcn.jpg"}\n')
    (tmp_path / "bare").mkdir()
    for path, options, complaint in [
        ("missing.jsonl", {}, "does not exist"),
        ("notes.txt", {}, "in no format that tinyvl recognises"),
        ("notes.txt", {"format": "parquet"}, "unknown format 'parquet'; choose from jsonl,"),
        ("notes.txt", {"format": "folder"}, "reads a folder"),
        ("bare", {"format": "jsonl"}, "reads a file"),
        ("bare", {}, "holds no pictures"),
        ("empty.jsonl", {}, "holds no records"),
        ("latin.jsonl", {}, "not text in UTF-8"),
    ]:
        with pytest.raises(UserError) as caught:
            data.read(tmp_path / path, **options)
        assert complaint in str(caught.value)


def test_format_can_be_forced(tmp_path):
    touch(tmp_path, "1.jpg")
    path = write(tmp_path / "records", '\n{"id": 1,\t"image": "1.jpg"}')
    assert data.read(path, format="jsonl")[0].id == "1"


def test_pictures_elsewhere(tmp_path):
    touch(tmp_path / "far/val2014", "1.jpg")
    path = write_json(tmp_path / "sets/captions.json", coco_document())
    assert data.read(path, images=tmp_path / "far")[0].image == str(tmp_path / "far/val2014/1.jpg")
    with pytest.raises(UserError, match=r"first picture, 1\.jpg, .* --images"):
        data.read(path)
    with pytest.raises(UserError, match=r"first picture, 1\.jpg, .*nowhere.* --images"):
        data.read(path, images=tmp_path / "nowhere")


def test_only_the_first_pictures_are_looked_for(tmp_path, monkeypatch):
    touch(tmp_path, "1.jpg")
    lines = [json.dumps({"image": f"{i}.jpg"}) for i in range(1, 1000)]
    path = write(tmp_path / "set.jsonl", "\n".join(lines))
    looked = []
    is_file = Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda self: looked.append(self) or is_file(self))
    assert len(data.read(path)) == 999
    assert len(looked) < 10


# Splits


def test_select_split(caplog):
    records = [
        *records_of("1", split="train"),
        *records_of("2", split="restval"),
        *records_of("3", split="val"),
        *records_of("4"),
    ]
    assert [record.id for record in data.select_split(records, "train")] == ["1", "2"]
    assert caplog.messages == ["left out 1 of 4 records: they name no split"]
    assert data.select_split(records[:3], "val") == records[2:3]
    assert len(caplog.messages) == 1  # those of other parts are expected
    assert [record.id for record in data.select_split(records, "restval")] == ["2"]
    assert [record.id for record in data.select_split(records, "val")] == ["3"]
    with pytest.raises(UserError, match="name no split"):
        data.select_split(records[3:], "train")


def test_hold_out_is_by_image_and_in_order():
    records = [data.Record(f"/x/{i}.jpg", ["x"], f"{i}-{j}") for i in range(500) for j in range(3)]
    train, val = data.hold_out(records, 0.1)
    assert not {record.image for record in train} & {record.image for record in val}
    assert sorted([*train, *val], key=records.index) == records
    assert [record for record in records if record in train] == train
    assert 30 <= len(val) / 3 <= 70
    assert data.hold_out(records, 0.1) == (train, val)
    assert data.hold_out(records, 0.1, seed=1)[1] != val


def test_hold_out_does_not_move_when_records_are_added_or_the_folder_moves():
    names = [str(i) for i in range(600)]
    _, before = data.hold_out(records_of(*names[:300]), 0.1)
    _, after = data.hold_out(records_of(*reversed(names)), 0.1)
    assert {r.id for r in before} == {r.id for r in after if int(r.id) < 300}
    moved = [data.Record(f"/elsewhere/{name}", ["x"], name) for name in names[:300]]
    assert [r.id for r in data.hold_out(moved, 0.1)[1]] == [r.id for r in before]


def test_hold_out_leaves_something_on_both_sides():
    for fraction in (0.0, 0.02, 0.9, 1.0):
        train, val = data.hold_out(records_of("1", "2", "3"), fraction)
        assert train
        assert val
    with pytest.raises(UserError, match="one picture"):
        data.hold_out(records_of("1", "1"))


# Captions


@pytest.mark.parametrize(
    ("raw", "tidied"),
    [
        ("A girl going into a wooden building .", "A girl going into a wooden building"),
        ("A dog , a cat ;  two\tbirds : why ?\n", "A dog, a cat; two birds: why?"),
        ("The man 's hat does n't fit .", "The man's hat doesn't fit"),
        ("A sign says `` No Dogs '' .", 'A sign says " No Dogs "'),
        ("He waits ...", "He waits"),
        ("Mr. T. runs.", "Mr. T. runs"),
        ("a .5 litre jar", "a .5 litre jar"),
        ("Stop !", "Stop!"),
        ("ein großer Kreis", "ein großer Kreis"),
        (" . ", ""),
    ],
)
def test_tidy(raw, tidied):
    assert text.tidy(raw) == tidied


def test_tidy_is_idempotent():
    rng = random.Random(0)
    pieces = [*" '`.,;:!?\"sx5", "n't", "'s", "  ", " a "]
    for _ in range(20_000):
        once = text.tidy("".join(rng.choices(pieces, k=rng.randint(1, 12))))
        assert text.tidy(once) == once


# Order


def test_epoch_order_is_a_pure_function_of_seed_and_epoch():
    order = data.epoch_order(100, seed=3, epoch=5)
    assert sorted(order) == list(range(100))
    assert order == data.epoch_order(100, seed=3, epoch=5)
    assert order != data.epoch_order(100, seed=3, epoch=6)
    assert order != data.epoch_order(100, seed=5, epoch=3)
    assert data.epoch_order(0, 0, 0) == []


@pytest.mark.parametrize(("n", "batch"), [(1000, 8), (1003, 8), (5, 8), (8, 8), (0, 4), (7, 1)])
def test_length_buckets_hold_every_index_once(n, batch):
    lengths = [(i * 7919) % 31 for i in range(n)]
    batches = data.length_buckets(lengths, batch, seed=1, epoch=2, pool=5)
    assert sorted(itertools.chain(*batches)) == list(range(n))
    assert len(batches) == -(-n // batch)
    assert sum(len(indices) < batch for indices in batches) <= 1
    assert batches == data.length_buckets(lengths, batch, seed=1, epoch=2, pool=5)


def test_length_buckets_are_of_similar_length_in_random_order():
    rng = random.Random(0)
    lengths = [rng.randint(5, 60) for _ in range(6400)]

    def padded(batches: list[list[int]]) -> int:
        return sum(max(lengths[i] for i in batch) * len(batch) for batch in batches)

    batches = data.length_buckets(lengths, 64, seed=0, epoch=0)
    order = data.epoch_order(len(lengths), 0, 0)
    unsorted = [order[i : i + 64] for i in range(0, len(order), 64)]
    assert padded(batches) < 1.05 * sum(lengths) < padded(unsorted) / 1.5
    firsts = [lengths[batch[0]] for batch in batches]
    assert sorted(firsts) != firsts
    assert batches != data.length_buckets(lengths, 64, seed=0, epoch=1)
    assert batches != data.length_buckets(lengths, 64, seed=1, epoch=0)


def test_no_torch_at_import():
    code = "import sys, tinyvl.data, tinyvl.draw; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# Real data


@pytest.fixture
def real() -> Path:
    folder = os.environ.get("TINYVL_SHARED")
    if not folder:
        pytest.skip("TINYVL_SHARED is not set")
    return Path(folder) / "data"


@pytest.mark.slow
@pytest.mark.parametrize(("split", "images"), [("train", 6000), ("val", 1000), ("test", 1000)])
def test_flickr8k_in_both_formats(real, split, images):
    lines = data.read(real / f"pairs/flickr8k_{split}.jsonl")
    karpathy = data.read(real / "pairs/dataset_flickr8k_rebuilt.json", split=split)
    assert len(lines) == len(karpathy) == images
    assert all(Path(record.image).is_file() for record in lines)

    def captions(records):
        return {record.image: sorted(record.captions) for record in records}

    assert captions(lines) == captions(karpathy)
    assert {len(record.captions) for record in lines} == {5}


@pytest.mark.slow
def test_flickr8k_written_as_token_files_reads_the_same(real, tmp_path):
    records = data.read(real / "pairs/flickr8k_val.jsonl")
    token, table, results = [], ["image,caption"], ["image_name| comment_number| comment"]
    for record in records:
        name = Path(record.image).name
        for i, caption in enumerate(record.captions):
            token.append(f"{name}#{i}\t{caption}")
            quoted = caption.replace('"', '""')
            table.append(f'{name},"{quoted}"')
            results.append(f"{name}| {i}| {caption}")
    for name, lines in (("a.token", token), ("captions.txt", table), ("results.csv", results)):
        path = write(tmp_path / name, "\n".join(lines))
        again = data.read(path, images=real / "pairs/images")
        assert [(r.image, r.captions) for r in again] == [(r.image, r.captions) for r in records]


@pytest.mark.slow
def test_coco_annotations(real):
    folder = real / "coco_annotations"
    full = list(data_captions.read_coco(folder / "captions_val2017.json"))
    assert len(full) == 5000
    assert sum(len(record.captions) for record in full) == 25_014
    by_id = {record.id: record for record in full}
    mini = list(data_captions.read_coco(folder / "coco_mini_captions_val2017.json"))
    assert len(mini) == 79
    for record in mini:
        assert record.image == by_id[record.id].image
        assert sorted(record.captions) == sorted(by_id[record.id].captions)
    train = list(data_captions.read_coco(folder / "coco_mini_captions_train2017.json"))
    assert (len(train), sum(len(record.captions) for record in train)) == (80, 400)
    with pytest.raises(UserError, match="--images"):
        data.read(folder / "captions_val2017.json")


@pytest.mark.slow
def test_multilingual_records(real):
    path = real / "pairs/flickr8k_test_multilingual.jsonl"
    assert len(data.read(path)) == 7 * 929
    assert {record.lang for record in data.read(path, lang="zh")} == {"zh"}
