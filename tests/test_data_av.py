"""Readers of videos and sounds: MSR-VTT, MSVD, AudioCaps, Clotho."""

import json

import pytest
from published import CLIP, audiocaps, clotho, msrvtt, msvd, msvd_qa, touch, write, write_json

from tinyvl import UserError, data


def raises(path, complaint: str) -> None:
    with pytest.raises(UserError) as caught:
        data.read(path)
    assert f"{path}{complaint}" in str(caught.value)


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


# Video questions


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"question": None}, ", [0]: 'question' is missing"),
        ({"video_id": "vid1"}, ", [0]: 'video_id' should be a number"),
        ({"answer": 3}, ", [0]: 'answer' should be a text"),
    ],
)
def test_video_questions_name_the_malformed_entry(tmp_path, change, complaint):
    path, _ = msvd_qa(tmp_path)
    (entry,) = json.loads(path.read_text())
    write_json(path, [entry | change])
    raises(path, complaint)


def test_msvd_qa_without_its_mapping_and_with_videos_by_number(tmp_path):
    path, _ = msvd_qa(tmp_path)
    (video,) = touch(tmp_path, "video/vid1.mp4")
    (tmp_path / "YouTubeClips" / f"{CLIP}.avi").unlink()
    (record,) = data.read(path)
    assert (record.video, record.id) == (video, CLIP)
    (tmp_path / "youtube_mapping.txt").unlink()
    (record,) = data.read(path)
    assert (record.video, record.id) == (video, "vid1")


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
