"""Readers: every published format recognised and read; then those with captions, one by one."""

import json
import logging
import zlib

import pytest
from published import (
    CLIP,
    PUBLISHED,
    audiocaps,
    clotho,
    coco,
    msrvtt,
    msvd,
    nocaps,
    raises,
    touch,
    visual_genome,
    write,
    write_json,
    xtd10,
)

from tinyvl import UserError, data
from tinyvl.data import READERS, Record, line_of, recognise

# All formats


def test_each_format_has_a_miniature():
    assert set(PUBLISHED) | {"webdataset"} == set(READERS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_recognised_and_read(tmp_path, name):
    path, expected = PUBLISHED[name](tmp_path)
    assert recognise(path) == (path, name)
    assert data.read(path) == expected
    assert data.read(path, format=name) == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_recognised_by_keys_whatever_the_file_is_called(tmp_path, name):
    path, _ = PUBLISHED[name](tmp_path / "published")
    if path.is_file():
        other = write(tmp_path / "elsewhere/some.data", path.read_bytes())
        assert recognise(other) == (other, name)


@pytest.mark.parametrize("name", sorted(set(PUBLISHED) - {"classes", "folder"}))
def test_found_in_its_folder(tmp_path, name):
    path, expected = PUBLISHED[name](tmp_path)
    folder = path if path.is_dir() else path.parent
    assert data.read(folder) == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_round_trip_through_json_lines(tmp_path, name):
    path, expected = PUBLISHED[name](tmp_path / "published")
    records = data.read(path)
    out = tmp_path / "elsewhere" / "converted.jsonl"
    write(out, "".join(f"{line_of(record, out.parent)}\n" for record in records))
    assert data.read(out) == records == expected
    assert all(not line.split('": "')[1].startswith("/") for line in out.read_text().splitlines())


def test_round_trip_of_a_name_that_is_not_utf8(tmp_path):
    record = Record(str(tmp_path / "gr\udcfcn.jpg"), ["grün"], "gr\udcfcn")
    (tmp_path / "gr\udcfcn.jpg").touch()
    path = write(tmp_path / "set.jsonl", line_of(record, tmp_path) + "\n")
    assert data.read(path) == [record]


@pytest.mark.parametrize("name", sorted(set(PUBLISHED) - {"classes", "folder"}))
def test_without_the_files(tmp_path, name):
    path, expected = PUBLISHED[name](tmp_path)
    for record in expected:
        (tmp_path / record.path).unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"first (picture|video|sound), .* --images") as caught:
        data.read(path)
    assert "\0" not in str(caught.value)
    records = data.read(path, files=False)
    assert [r.id for r in expected if r.id not in {record.id for record in records}] == []
    assert all(record.path.startswith(str(tmp_path)) for record in records)
    assert all("\0" not in record.path for record in records)


@pytest.mark.parametrize("name", sorted(set(PUBLISHED) - {"jsonl", "classes", "folder"}))
def test_files_elsewhere(tmp_path, name):
    path, expected = PUBLISHED[name](tmp_path / "here")
    moved = tmp_path / "far"
    for record in expected:
        write(moved / record.path.rsplit("/", 1)[1])
        (tmp_path / record.path).unlink(missing_ok=True)
    records = data.read(path, images=moved)
    assert len(records) == len(expected)
    for record, before in zip(records, expected, strict=True):
        assert record.path == str(moved / before.path.rsplit("/", 1)[1])


def test_some_files_missing_is_said_once(tmp_path, caplog):
    path, expected = coco(tmp_path)
    (tmp_path / "val2017/000000000043.jpg").unlink()
    with caplog.at_level(logging.WARNING):
        assert data.read(path) == expected
    assert "did not find 1 of 2 pictures" in caplog.text


def test_one_folder_comes_before_others(tmp_path):
    """The folder that has the first picture has the others too, wherever else their names occur."""
    path, expected = coco(tmp_path)
    touch(tmp_path / "annotations", "000000000043.jpg")
    assert data.read(path) == expected


def test_other_suffixes_of_the_same_kind_will_do(tmp_path):
    path, expected = coco(tmp_path)
    for record in expected:
        (tmp_path / record.image).rename(record.image.replace(".jpg", ".webp"))
        write(tmp_path / record.image.replace(".jpg", ".mp4"))
    assert [r.image for r in data.read(path)] == [
        record.image.replace(".jpg", ".webp") for record in expected
    ]


def test_what_the_system_refuses_is_one_sentence(tmp_path):
    path, _ = xtd10(tmp_path)
    (path / "test_image_names.txt").unlink()
    (path / "test_image_names.txt").mkdir()
    with pytest.raises(
        UserError, match=r"test_image_names\.txt: cannot be read \(Is a directory\)"
    ):
        data.read(path)


def test_results_are_no_data_set(tmp_path):
    path = write_json(tmp_path / "results.json", [{"image_id": 1, "caption": "a dog"}])
    with pytest.raises(UserError, match=r"holds results, .* --predictions"):
        data.read(path)


# JSON Lines


def test_json_array(tmp_path):
    """As ALBEF, BLIP and LilT have it."""
    touch(tmp_path, "a.jpg", "b.jpg")
    entries = [
        {"image": "a.jpg", "caption": "a dog", "image_id": "coco_1"},
        {"image": "b.jpg", "question": "what?", "answer": ["cat", "dog"], "question_id": 3},
    ]
    path = write(tmp_path / "pairs.json", json.dumps(entries, indent=2))
    assert data.read(path) == [
        Record(str(tmp_path / "a.jpg"), ["a dog"], "coco_1"),
        Record(
            str(tmp_path / "b.jpg"), id="b.jpg", question="what?", answers=["cat", "dog"],
            question_id="3",
        ),
    ]  # fmt: skip
    del entries[1]["image"]
    path = write_json(tmp_path / "pairs.json", entries)
    with pytest.raises(UserError, match=r"pairs\.json, \[1\]: 'image' is missing"):
        data.read(path)
    path = write(tmp_path / "pairs.json", json.dumps(entries)[:-20])
    with pytest.raises(UserError, match=r"pairs\.json is not JSON"):
        data.read(path)


def test_captions_by_language(tmp_path):
    (picture,) = touch(tmp_path, "a.jpg")
    line = {"image": "a.jpg", "en": ["a dog"], "de": ["ein Hund", "Hund"], "de_independent": ["x"]}
    path = write(tmp_path / "set.jsonl", json.dumps(line))
    assert data.read(path) == [
        Record(picture, ["a dog"], "a.jpg", lang="en"),
        Record(picture, ["ein Hund", "Hund"], "a.jpg", lang="de"),
    ]
    assert [record.lang for record in data.read(path, lang="de")] == ["de"]
    path = write(tmp_path / "set.jsonl", json.dumps(line | {"captions": ["own"]}))
    assert [record.captions for record in data.read(path)] == [["own"]]


def test_blank_captions_are_kept_when_asked_for(tmp_path):
    touch(tmp_path, "a.jpg")
    path = write(tmp_path / "set.jsonl", '{"image": "a.jpg", "captions": ["x", " "]}')
    assert data.read(path)[0].captions == ["x"]
    assert data.read(path, blank=True)[0].captions == ["x", " "]


# COCO, NoCaps


def test_coco_test_images_have_no_captions(tmp_path):
    path, expected = coco(tmp_path)
    document = json.loads(path.read_text())
    del document["annotations"]
    write_json(path, document)
    records = data.read(path)
    assert [record.image for record in records] == [record.image for record in expected]
    assert [record.captions for record in records] == [[], []]


def test_coco_keeps_images_without_captions_when_asked_for(tmp_path):
    path, _ = coco(tmp_path)
    document = json.loads(path.read_text())
    document["annotations"] = document["annotations"][:1]
    write_json(path, document)
    assert [record.id for record in data.read(path)] == ["43"]
    assert [record.id for record in data.read(path, blank=True)] == ["42", "43"]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"domain": "far-domain"}, "images[1]: 'domain' should be in-domain"),
        ({"domain": 3}, "images[1]: 'domain' should be a text, found '3'"),
        ({"file_name": None}, "images[1]: 'file_name' is missing"),
        ({"id": [1]}, "images[1]: 'id' should be a number or a text"),
    ],
)
def test_nocaps_names_the_malformed_image(tmp_path, change, complaint):
    path, _ = nocaps(tmp_path)
    document = json.loads(path.read_text())
    document["images"][1] |= change
    write_json(path, document)
    with pytest.raises(UserError) as caught:
        data.read(path)
    assert f"{path}, {complaint}" in str(caught.value)


def test_nocaps_test_set_has_neither_captions_nor_domains(tmp_path):
    path, _ = nocaps(tmp_path)
    document = json.loads(path.read_text())
    for entry in document["images"]:
        del entry["domain"]
    del document["annotations"]
    write_json(tmp_path / "nocaps_test_image_info.json", document)
    path.unlink()
    records = data.read(tmp_path)
    assert [(r.split, r.domain, r.captions) for r in records] == [("test", None, [])] * 3


# Visual Genome


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"regions": None}, "[1]: 'regions' is missing"),
        (
            {"regions": [{"phrase": "x"}, {"phrase": 5}]},
            "[1].regions[1]: 'phrase' should be a text",
        ),
        ({"id": None}, "[1]: 'id' is missing"),
    ],
)
def test_visual_genome_names_the_malformed_image(tmp_path, change, complaint):
    path, _ = visual_genome(tmp_path)
    document = json.loads(path.read_text())
    document[1] |= change
    write_json(path, document)
    with pytest.raises(UserError) as caught:
        data.read(path)
    assert f"{path}, {complaint}" in str(caught.value)


# Conceptual Captions

URL = "https://example.org/dir/photo.jpg?w=1"


@pytest.mark.parametrize(
    "name",
    [
        "00000/000000001.jpg",
        f"{zlib.crc32(URL.encode())}",
        "train_image/00000001.jpg",
        "images/photo.jpg",
        f"{zlib.crc32(URL.encode())}.png",
    ],
)
def test_cc3m_names_that_downloaders_give(tmp_path, name):
    (picture,) = touch(tmp_path, name)
    path = write(tmp_path / "cc3m.tsv", f"caption\turl\nfirst\thttp://dead.org/x\na dog\t{URL}\n")
    assert data.read(path) == [Record(picture, ["a dog"], "1")]


def test_cc3m_counts_the_dead_links(tmp_path, caplog):
    touch(tmp_path, "photo.jpg")
    path = write(tmp_path / "val.tsv", f"a cat\thttps://dead.org/cat\na dog\t{URL}\n")
    with caplog.at_level(logging.WARNING):
        assert [record.id for record in data.read(path)] == ["1"]
    assert "left out 1 of 2 pictures" in caplog.text
    assert [record.id for record in data.read(path, files=False)] == ["0", "1"]


def test_cc3m_with_paths(tmp_path):
    one, two = touch(tmp_path, "pictures/1.jpg", "pictures/deep/2.png")
    path = write(tmp_path / "pairs.tsv", "a dog\tpictures/1.jpg\na cat\tpictures/deep/2.png\n")
    assert data.read(path) == [
        Record(one, ["a dog"], "pictures/1.jpg"),
        Record(two, ["a cat"], "pictures/deep/2.png"),
    ]
    path = write(tmp_path / "pairs.tsv", "a dog\tpictures/1.jpg\na cat\n")
    with pytest.raises(UserError, match=r"pairs\.tsv, line 2: expected 'caption<tab>url or path'"):
        data.read(path)


# XTD10


def test_xtd10_one_language(tmp_path):
    folder, expected = xtd10(tmp_path)
    assert data.read(folder / "test_1kcaptions_jp.txt") == expected[2:]
    assert data.read(folder / "test_image_names.txt") == expected
    assert data.read(folder, lang="de") == expected[:2]


def test_xtd10_lines_must_match(tmp_path):
    folder, _ = xtd10(tmp_path)
    path = write(folder / "test_1kcaptions_de.txt", "ein Hund\n\n")
    assert [record.captions for record in data.read(path)] == [["ein Hund"], []]
    write(path, b"ein Hund\ngr\xfcn\n")
    with pytest.raises(UserError, match=r"test_1kcaptions_de\.txt is not text in UTF-8"):
        data.read(path)
    write(path, "ein Hund\n")
    with pytest.raises(UserError, match=r"has 1 captions, but .*test_image_names\.txt names 2"):
        data.read(folder)
    (folder / "test_image_names.txt").unlink()
    with pytest.raises(UserError, match=r"test_image_names\.txt.* is not beside it"):
        data.read(path)


# MSR-VTT


def test_msrvtt_test_set_without_captions_and_videos_in_two_folders(tmp_path):
    path, _ = msrvtt(tmp_path)
    document = json.loads(path.read_text())
    document["sentences"].pop(0)
    document["videos"][1]["split"] = "test"
    write_json(path, document)
    touch(tmp_path / "TestVideo", "video6513.mp4")
    (tmp_path / "TrainValVideo/video6513.webm").unlink()
    _, test = data.read(path)
    assert (test.video, test.captions, test.split) == (
        str(tmp_path / "TestVideo/video6513.mp4"),
        [],
        "test",
    )


@pytest.mark.parametrize(
    ("part", "change", "complaint"),
    [
        ("videos", {"video_id": None}, ", videos[1]: 'video_id' is missing"),
        ("videos", {"split": 1}, ", videos[1]: 'split' should be a text"),
        ("sentences", {"caption": None}, ", sentences[1]: 'caption' is missing"),
        ("sentences", {"video_id": "video9"}, ": sentences describe video9, which is not among"),
    ],
)
def test_msrvtt_names_the_malformed_entry(tmp_path, part, change, complaint):
    path, _ = msrvtt(tmp_path)
    document = json.loads(path.read_text())
    document[part][1] |= change
    write_json(path, document)
    raises(path, complaint)


# MSVD


def test_msvd_json(tmp_path):
    path, expected = msvd(tmp_path)
    document = {f"{record.id}.avi": record.captions for record in expected}
    path.unlink()
    path = write_json(tmp_path / "captions.json", document)
    assert data.read(path) == expected
    write_json(path, document | {f"{CLIP}.avi": ["a", 3]})
    raises(path, f", {CLIP}.avi: expected a list of captions")


def test_msvd_split_lists_come_before_the_mapping(tmp_path):
    path, _ = msvd(tmp_path)
    write(tmp_path / "val_list.txt", f"{CLIP}\n")
    assert [record.split for record in data.read(path)] == ["val", "test"]
    (tmp_path / "youtube_mapping.txt").unlink()
    assert [record.split for record in data.read(path)] == ["val", None]


def test_msvd_names_the_malformed_line(tmp_path):
    path, _ = msvd(tmp_path)
    write(path, f"{CLIP} a squirrel\nno clip here\n")
    raises(path, ", line 2: expected 'mv89psg6zh4_33_46 a bird bathes', found 'no clip here'")
    write(path, f"{CLIP} a squirrel\n")
    mapping = write(tmp_path / "youtube_mapping.txt", f"{CLIP} 1\n")
    with pytest.raises(UserError, match=rf"{mapping}, line 1: expected"):
        data.read(path)


# AudioCaps, Clotho


@pytest.mark.parametrize(
    "name",
    ["GOD8Bt5LfDE", "YGOD8Bt5LfDE", "GOD8Bt5LfDE_100", "GOD8Bt5LfDE_100000_110000", "103545"],
)
@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_audiocaps_names_that_downloaders_give(tmp_path, name, suffix):
    path, expected = audiocaps(tmp_path)
    (tmp_path / expected[1].audio).unlink()
    (sound,) = touch(tmp_path, f"wavs/{name}{suffix}")
    assert data.read(path)[1].audio == sound


def test_audiocaps_keeps_clips_of_one_video_apart(tmp_path):
    path, _ = audiocaps(tmp_path)
    write(path, path.read_text() + "1,7fmOlUlwoNg,50,Something else\n")
    records = data.read(path, files=False)
    assert [len(record.captions) for record in records] == [2, 1, 1, 1]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("1,abc,30", ", line 6: 'caption' is missing"),
        ("1,abc,soon,x", ", line 6: 'start_time' should be seconds, found 'soon'"),
        ("1,abc,inf,x", ", line 6: 'start_time' should be seconds, found 'inf'"),
    ],
)
def test_audiocaps_names_the_malformed_row(tmp_path, row, complaint):
    path, _ = audiocaps(tmp_path)
    write(path, path.read_text() + row + "\n")
    raises(path, complaint)


def test_clotho_names_the_malformed_row(tmp_path):
    path, _ = clotho(tmp_path)
    write(path, path.read_text() + "b.wav,one,two\n")
    raises(path, ", line 3: 'caption_3' is missing")
    path.write_bytes(path.read_bytes() + b"gr\xfcn.wav,1,2,3,4,5\n")
    raises(path, " is not text in UTF-8")


@pytest.mark.parametrize(
    ("part", "split"), [("development", "train"), ("validation", "val"), ("evaluation", "test")]
)
def test_clotho_parts(tmp_path, part, split):
    path, _ = clotho(tmp_path)
    path = path.rename(tmp_path / f"clotho_captions_{part}.csv")
    assert data.read(path)[0].split == split
