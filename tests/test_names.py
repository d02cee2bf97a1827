"""Two things under one name are refused, naming both; one thing under several names is one."""

import json
from pathlib import Path

import pytest
from test_data import touch

from tinyvl import UserError, data, data_check, evaluate_compare, index_source
from tinyvl.evaluate import Source, choose, read, task_of


def lines(file: Path, *entries: dict) -> Path:
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return file


def coco(*names: str, **more: str) -> str:
    images = [{"id": 1, "file_name": name, **more} for name in names]
    notes = [{"id": i, "image_id": 1, "caption": f"of {name}"} for i, name in enumerate(names)]
    return json.dumps({"images": images, "annotations": notes})


def msrvtt(*videos: dict) -> str:
    sentence = {"sen_id": 0, "video_id": "v1", "caption": "one"}
    return json.dumps({"videos": [{"video_id": "v1"} | v for v in videos], "sentences": [sentence]})


VQA = {"data_subtype": "val2014", "data_type": "mscoco"}
QUESTION = {"image_id": 1, "question_id": 10, "question": "what?"}
QUESTIONS = json.dumps({"questions": [QUESTION, QUESTION | {"question": "who?"}]} | VQA)
ONE_QUESTION = json.dumps({"questions": [QUESTION]} | VQA)
ANSWERS = json.dumps(
    {"annotations": [{"question_id": 10, "answers": [{"answer": a}]} for a in ("cup", "man")]}
)
AUDIO = "audiocap_id,youtube_id,start_time,caption\n"
CASES = [
    ({"coco.json": coco("a.jpg", "b.jpg")}, "1 names both 'a.jpg' and 'b.jpg'"),
    ({"nocaps_val.json": coco("a.jpg", "b.jpg", domain="in-domain")}, "'a.jpg' and 'b.jpg'"),
    ({"videodatainfo.json": msrvtt({"split": "train"}, {"split": "test"})}, "'train' and 'test'"),
    ({"videodatainfo.json": msrvtt({"url": "x/1"}, {"url": "x/2"})}, "'v1' names both 'x/1' and"),
    ({"v2_OpenEnded_mscoco_val2014_questions.json": QUESTIONS}, "'what[?]' .* and 'who[?]' "),
    ({"v2_OpenEnded_mscoco_val2014_questions.json": ONE_QUESTION,
      "v2_mscoco_val2014_annotations.json": ANSWERS}, "10 names both .*'cup'.* and .*'man'"),
    ({"a.jsonl": '{"image": "a.jpg", "id": 1}\n{"image": "b.jpg", "id": "1"}'},
     r"'1' names both .*a\.jpg and .*b\.jpg"),
    ({"a.jsonl": '{"image": "a.jpg", "question": "what?", "question_id": 1}\n'
      '{"image": "a.jpg", "question": "who?", "question_id": 1}'}, "'what[?]' .* and 'who[?]'"),
    ({"dataset_flickr8k.json": json.dumps({"images": [
        {"filename": n, "split": "val", "sentences": [], "imgid": 4} for n in ("a.jpg", "b.jpg")
    ]})}, r"'4' names both .*a\.jpg and .*b\.jpg"),
    ({"AllVideoDescriptions.txt": "mv89psg6zh4_3_4 a bird\n", "train_list.txt": "mv89psg6zh4_3_4",
      "test_list.txt": "mv89psg6zh4_3_4"}, "'mv89psg6zh4_3_4' names both 'train' and 'test'"),
    ({"AllVideoDescriptions.txt": "mv89psg6zh4_3_4 a bird\n",
      "youtube_mapping.txt": "mv89psg6zh4_3_4 vid1\nmv89psg6zh4_3_4 vid2"}, "both '1' and '2'"),
]  # fmt: skip
FILES = ("a.jpg", "b.jpg", "v1.mp4", "COCO_val2014_000000000001.jpg", "mv89psg6zh4_3_4.avi")


@pytest.mark.parametrize(("content", "said"), CASES)
def test_two_things_under_one_name_are_both_named(tmp_path, content, said):
    touch(tmp_path, *FILES)
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=said):
        data.read(tmp_path / next(iter(content)))


@pytest.mark.parametrize(
    "content",
    [
        {"coco.json": coco("a.jpg", "a.jpg")},
        {"videodatainfo.json": msrvtt({"split": "train"}, {"split": "train"})},
    ],
)
def test_one_thing_that_is_listed_twice_is_one(tmp_path, content):
    touch(tmp_path, *FILES)
    for name, text in content.items():
        (tmp_path / name).write_text(text)
        assert len(data.read(tmp_path / name)) == 1


def test_two_clips_of_one_youtube_video_are_two_sounds(tmp_path):
    (tmp_path / "val.csv").write_text(AUDIO + "1,abc,30,x\n2,abc,90,y\n3,abc,30,z\n4,d,5,w\n")
    touch(tmp_path, "abc_30.wav", "Yabc_90.wav", "d.wav", "abc.wav")
    found = [(r.id, Path(r.path).name, r.captions) for r in data.read(tmp_path / "val.csv")]
    assert found[:2] == [("abc_30", "abc_30.wav", ["x", "z"]), ("abc_90", "Yabc_90.wav", ["y"])]
    assert found[2:] == [("d", "d.wav", ["w"])]


def test_data_check_lists_what_has_one_name(tmp_path):
    touch(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    file = lines(tmp_path / "a.jsonl", *({"image": f"{n}.jpg", "id": 1} for n in "abc"))
    report = data_check.check([file], fast=True)
    assert report["problems"] == {"two pictures of one id": 2}
    assert "names both" in report["details"][0]["error"]


def test_a_row_a_caption_is_a_picture_with_all_of_them(tmp_path):
    rows = [{"image": f"{i // 3}.jpg", "caption": f"words {i}", "id": i} for i in range(6)]
    file = lines(tmp_path / "rows.jsonl", *rows)
    source, task = Source(str(file)), task_of("caption", {"metrics": ["BLEU-1"]})
    records, split = read(source, task, opened=False)
    assert [(r.id, len(r.captions)) for r in choose(records, source, split)] == [("0", 3), ("3", 3)]
    options = {"scoring": {"metrics": ["BLEU-1"]}}
    for name in ("0 3", "0 1 2 3 4 5", "2 4"):  # a picture has the names of all its rows
        said = [{"id": i, "caption": f"words {3 * (int(i) // 3)}"} for i in name.split()]
        path = lines(tmp_path / "p.jsonl", *said)
        report = evaluate_compare.score_files("caption", [path], source, **options)
        assert report["items"] == 2
        assert report["metrics"]["BLEU-1"] == pytest.approx(1)
    path = lines(tmp_path / "p.jsonl", {"id": 1, "caption": "a"}, {"id": 2, "caption": "b"})
    with pytest.raises(UserError, match="a second prediction for '0'"):
        evaluate_compare.score_files("caption", [path], source, **options)


@pytest.mark.parametrize("word", ["val", "valid", "validation", "dev", "Validation ", "VAL"])
def test_validation_has_several_words(tmp_path, word):
    touch(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    entries = zip("abc", ("Train", word, ""), strict=True)
    file = lines(tmp_path / "a.jsonl", *({"image": f"{n}.jpg", "split": s} for n, s in entries))
    assert [record.split for record in data.read(file)] == ["train", "val", None]
    assert [Path(record.path).name for record in data.read(file, split=word)] == ["b.jpg"]
    records, split = read(Source(str(file), split=word), opened=False)
    assert (split, len(choose(records, Source(str(file)), split))) == ("val", 1)
    assert read(Source(str(file)), opened=False)[1] == "val"


def test_records_without_a_part_are_counted_where_one_is_chosen(tmp_path, caplog):
    touch(tmp_path, "a.jpg", "b.jpg", "c.mp4")
    entries = [{"image": "a.jpg", "split": "test", "caption": "x"}, {"image": "b.jpg"}]
    file = lines(tmp_path / "a.jsonl", *entries, {"video": "c.mp4"})
    assert len(data.read(file, split="test")) == 1
    assert "left out 2 of 3 records: they name no split" in caplog.text
    index_source.read_source(str(file))
    assert "left out 1 of 3 records: not of a picture" in caplog.text
    said = lines(tmp_path / "p.jsonl", {"id": "a.jpg", "caption": "x"})
    options = {"scoring": {"metrics": ["BLEU-1"]}}
    evaluate_compare.score_files("caption", [said], Source(str(file), split="all"), **options)
    assert "left out 2 of 3 records: no captions to score against" in caplog.text


def test_development_is_left_to_its_data_set(tmp_path):
    touch(tmp_path, "a.jpg")
    file = lines(tmp_path / "a.jsonl", {"image": "a.jpg", "split": "development"})
    assert data.read(file)[0].split == "development"
