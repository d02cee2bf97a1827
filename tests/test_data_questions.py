"""Readers of questions: VQA v2, GQA, DAQUAR about pictures, MSRVTT-QA, MSVD-QA about videos."""

import json
import logging

import pytest
from published import CLIP, VQA_ANSWERS, daquar, gqa, msvd_qa, raises, touch, vqa, write, write_json

from tinyvl import UserError, data

QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
ANNOTATIONS = "v2_mscoco_val2014_annotations.json"


def changed(path, keys: list, change: dict) -> None:
    """Change an entry deep in a JSON file."""
    document = json.loads(path.read_text())
    entry = document
    for key in keys:
        entry = entry[key]
    entry |= change
    write_json(path, document)


# VQA v2


def test_vqa_either_file_first(tmp_path):
    _, expected = vqa(tmp_path)
    assert data.read(tmp_path / ANNOTATIONS) == expected
    assert expected[0].answers == VQA_ANSWERS  # all ten, as annotated, in order


@pytest.mark.parametrize("named", [QUESTIONS, ANNOTATIONS])
def test_vqa_partner_in_a_folder_of_its_own(tmp_path, named):
    _, expected = vqa(tmp_path)
    moved = {}
    for name, folder in ((QUESTIONS, "Questions"), (ANNOTATIONS, "Annotations")):
        (tmp_path / folder).mkdir()
        moved[name] = (tmp_path / name).rename(tmp_path / folder / name)
    assert data.read(moved[named]) == expected


def test_vqa_questions_alone(tmp_path, caplog):
    path, expected = vqa(tmp_path)
    (tmp_path / ANNOTATIONS).unlink()
    with caplog.at_level(logging.WARNING):
        records = data.read(path)
    assert [(r.question, r.answers, r.split) for r in records] == [
        (record.question, [], "val") for record in expected
    ]
    assert "its questions have no answers" in caplog.text


@pytest.mark.parametrize("part", ["test2015", "test-dev2015"])
def test_vqa_test_set(tmp_path, caplog, part):
    (picture,) = touch(tmp_path / "test2015", "COCO_test2015_000000262144.jpg")
    questions = [{"image_id": 262144, "question": "Is the ball flying?", "question_id": 262144000}]
    document = {"data_type": "mscoco", "data_subtype": part, "questions": questions}
    path = write_json(tmp_path / f"v2_OpenEnded_mscoco_{part}_questions.json", document)
    with caplog.at_level(logging.WARNING):
        (record,) = data.read(path)
    assert (record.image, record.answers) == (picture, [])
    assert record.split == part.removesuffix("2015")
    assert caplog.text == ""


def test_vqa_finds_the_pictures_of_coco_2017(tmp_path):
    path, _ = vqa(tmp_path)
    (tmp_path / "val2014/COCO_val2014_000000000042.jpg").unlink()
    (picture,) = touch(tmp_path / "train2017", "000000000042.jpg")
    assert {record.image for record in data.read(path)} == {picture}


def test_vqa_v1_has_choices_and_abstract_scenes_their_own_names(tmp_path):
    (picture,) = touch(tmp_path, "images/abstract_v002_val2015_000000000042.png")
    common = {"data_type": "abstract_v002", "data_subtype": "val2015"}
    choices = ["yes", "no", "red"]
    question = {
        "image_id": 42, "question": "Is it?", "question_id": 420, "multiple_choices": choices,
    }  # fmt: skip
    annotation = {"question_id": 420, "image_id": 42, "answers": [{"answer": "yes"}]}
    path = write_json(
        tmp_path / "MultipleChoice_abstract_v002_val2015_questions.json",
        common | {"questions": [question]},
    )
    answers = write_json(
        tmp_path / "abstract_v002_val2015_annotations.json", common | {"annotations": [annotation]}
    )
    for named in (path, answers):
        (record,) = data.read(named)
        assert (record.image, record.choices, record.answers) == (picture, choices, ["yes"])
        assert record.question_type is None


@pytest.mark.parametrize(
    ("file", "keys", "change", "complaint"),
    [
        (QUESTIONS, ["questions", 1], {"question": None}, "questions[1]: 'question' is missing"),
        (QUESTIONS, ["questions", 1], {"image_id": "x"}, "questions[1]: 'image_id' should be a n"),
        (QUESTIONS, ["questions", 1], {"question_id": 9}, "questions[1]: question 9 has no annot"),
        (QUESTIONS, [], {"questions": {}}, "'questions' should be a list"),
        (ANNOTATIONS, ["annotations", 0], {"question_id": None}, "annotations[0]: 'question_id' "),
        (ANNOTATIONS, ["annotations", 0], {"answers": "yes"}, "annotations[0]: 'answers' should "),
        (
            ANNOTATIONS,
            ["annotations", 1, "answers", 2],
            {"answer": None},
            "annotations[1].answers[2]: 'answer' is missing",
        ),
        (ANNOTATIONS, ["annotations", 0], {"answer_type": 3}, "annotations[0]: 'answer_type' sho"),
    ],
)
def test_vqa_names_file_and_entry(tmp_path, file, keys, change, complaint):
    path, _ = vqa(tmp_path)
    changed(tmp_path / file, keys, change)
    with pytest.raises(UserError) as caught:
        data.read(path, format="vqa")
    assert str(tmp_path / file) in str(caught.value)
    assert complaint in str(caught.value)


def test_vqa_annotations_without_questions(tmp_path):
    path, _ = vqa(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=rf"questions are not beside it; .*{QUESTIONS}"):
        data.read(tmp_path / ANNOTATIONS)
    odd = (tmp_path / ANNOTATIONS).rename(tmp_path / "answers.json")
    with pytest.raises(UserError, match="named as they were published"):
        data.read(odd)


# GQA


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"imageId": None}, "question 07333408: 'imageId' is missing"),
        ({"question": 3}, "question 07333408: 'question' should be a text"),
        ({"answer": ["pipe"]}, "question 07333408: 'answer' should be a text"),
        ({"types": "query"}, "question 07333408: 'types' should be an object"),
    ],
)
def test_gqa_names_the_malformed_question(tmp_path, change, complaint):
    path, _ = gqa(tmp_path)
    changed(path, ["07333408"], change)
    with pytest.raises(UserError) as caught:
        data.read(path)
    assert f"{path}, {complaint}" in str(caught.value)


def test_gqa_test_set(tmp_path):
    touch(tmp_path / "images", "n161313.jpg")
    entry = {"question": "Is it?", "imageId": "n161313", "isBalanced": True}
    path = write_json(tmp_path / "test_all_questions.json", {"201971873": entry})
    (record,) = data.read(path)
    assert (record.split, record.answers, record.question_id) == ("test", [], "201971873")
    assert (record.question_type, record.answer_type) == (None, None)


# DAQUAR


def test_daquar_takes_the_picture_out_of_the_question(tmp_path):
    touch(tmp_path / "images", "image3.jpg")
    asked = {
        "what is left of the sink in the image3 ?": "what is left of the sink",
        "how many chairs are there on this image3 ?": "how many chairs are there",
        "what is dominant color of the image3 ?": "what is dominant color",
        "how many towels are there in image3 ?": "how many towels are there",
        "what is in the image3 on the wall in the image3 ?": "what is in the image3 on the wall",
    }
    path = write(tmp_path / "all_qa_pairs.txt", "".join(f"{q}\nred\n" for q in asked))
    assert [record.question for record in data.read(path)] == list(asked.values())


def test_daquar_split_by_lists(tmp_path):
    path, _ = daquar(tmp_path)
    path = path.rename(tmp_path / "all_qa_pairs.txt")
    write(tmp_path / "train_images_list.txt", "image17\n")
    write(tmp_path / "test_images_list.txt", "image3\n")
    assert [record.split for record in data.read(path)] == ["test", "train"]


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        (["what is it ?", "table"], "line 3: expected '... in the image7 ?', found 'what is it ?'"),
        (["what is it in the image3 ?"], "line 3: this question is not followed by an answer"),
        (["a in the image3 ?", "b in the image3 ?"], "line 3: this question is not followed by"),
    ],
)
def test_daquar_names_the_malformed_line(tmp_path, lines, complaint):
    touch(tmp_path, "image3.png")
    path = write(tmp_path / "qa.txt", "\n".join(["what in the image3 ?", "table", *lines]))
    with pytest.raises(UserError) as caught:
        data.read(path)
    assert f"{path}, {complaint}" in str(caught.value)


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
