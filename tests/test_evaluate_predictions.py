"""Predictions on disk: kept over a kill, read from others' files, matched to records."""

import json

import pytest

from tinyvl import UserError
from tinyvl import evaluate_predictions as predictions
from tinyvl.data import Record

RUN = {"model": "m", "decoding": {"beams": 5}}


def records() -> list[Record]:
    return [
        Record("/data/a/1.jpg", id="1"),
        Record("/data/a/2.jpg", id="2"),
        Record("/data/b/2.jpg", id="b/2"),
    ]


def lines(path, entries) -> None:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def found(path, entries, field="caption") -> dict[str, str]:
    lines(path, entries)
    read = predictions.read(path, records(), field)
    assert all(list(line) == [field] for line in read.values())
    return {name: line[field] for name, line in read.items()}


def test_a_log_goes_on_after_a_kill_in_the_middle_of_a_line(tmp_path):
    folder = tmp_path / "out"
    log = predictions.Log(folder, RUN)
    log.add({"id": "a", "caption": "x\u2028y"})
    log.stream.write('{"id": "b", "capt')
    log.stream.close()
    again = predictions.Log(folder, RUN, resume=True)
    assert list(again.lines) == ["a"]
    again.add({"id": "b", "caption": "z"})
    again.stream.close()
    kept = (folder / "predictions.jsonl").read_text().split("\n")
    assert [json.loads(line)["id"] for line in kept if line] == ["a", "b"]


def test_a_log_in_memory_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    predictions.Log(None, RUN).add({"id": "a"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("run", "resume", "said"),
    [
        (RUN, False, "--resume"),
        (RUN | {"decoding": {"beams": 1}}, True, "'beams': 5"),
        (RUN | {"new": 1}, True, "new"),
    ],
)
def test_a_folder_is_not_mixed_with_another_run(tmp_path, run, resume, said):
    predictions.Log(tmp_path / "out", RUN).add({"id": "a"})
    before = (tmp_path / "out/predictions.jsonl").read_text()
    with pytest.raises(UserError, match=said):
        predictions.Log(tmp_path / "out", run, resume=resume)
    assert (tmp_path / "out/predictions.jsonl").read_text() == before


def test_a_folder_with_other_things_and_a_file_are_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for out in (tmp_path, tmp_path / "thesis.txt", tmp_path / "out.jsonl"):
        with pytest.raises(UserError, match="choose another"):
            predictions.Log(out, RUN, resume=True)


def test_records_are_named_by_id_path_or_file_name(tmp_path):
    entries = [
        {"image_id": 1, "caption": "one"},
        {"path": "/data/a/2.jpg", "caption": "two"},
        {"id": "b/2", "image": "elsewhere/2.jpg", "caption": "three"},
    ]
    assert found(tmp_path / "p.jsonl", entries) == {"1": "one", "2": "two", "b/2": "three"}
    assert found(tmp_path / "p.jsonl", [{"image": "x/1.jpg", "caption": "c"}]) == {"1": "c"}


def test_results_files_are_arrays(tmp_path):
    file = tmp_path / "results.json"
    file.write_text(json.dumps([{"image_id": 1, "caption": "one"}], indent=1))
    assert predictions.read(file, records(), "caption") == {"1": {"caption": "one"}}


def test_lines_of_pictures_that_failed_are_no_predictions(tmp_path):
    entries = [{"path": "/data/a/1.jpg", "error": "broken"}, {"id": "2", "caption": "two"}]
    assert found(tmp_path / "p.jsonl", entries) == {"2": "two"}


def test_questions_about_one_picture_are_told_apart(tmp_path):
    asked = [
        Record("/data/1.jpg", id="1#0", question="what?"),
        Record("/data/1.jpg", id="1#1", question="where?"),
    ]
    lines(tmp_path / "p.jsonl", [{"path": "1.jpg", "question": "where?", "answer": "here"}])
    assert predictions.read(tmp_path / "p.jsonl", asked, "answer") == {"1#1": {"answer": "here"}}
    odds = {"path": "1.jpg", "question": "what?", "answer": "x", "choices": {"x": 0.7, "y": 0.3}}
    lines(tmp_path / "p.jsonl", [odds])
    read = predictions.read(tmp_path / "p.jsonl", asked, "answer")
    assert read == {"1#0": {"answer": "x", "choices": {"x": 0.7, "y": 0.3}}}


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([{"id": "1", "caption": "a"}, {"path": "/data/a/1.jpg", "caption": "b"}], "second"),
        ([{"id": "7", "caption": "a"}], "line 1: '7' is not in the data"),
        ([{"image": "x/2.jpg", "caption": "a"}], "2 records"),
        ([{"caption": "a"}], "nothing names"),
        ([{"id": "1", "text": "a"}], "'caption' is missing"),
        ([{"id": "1", "caption": ["a"]}], "should be a text"),
        ([{"id": "1", "caption": "a", "choices": ["a"]}], "'choices' should be an object"),
        ([{"id": "1", "caption": "a", "choices": {"a": "b"}}], "give each choice a probability"),
        (["x"], "JSON object"),
        ([], "no predictions"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_sentence(tmp_path, entries, said):
    with pytest.raises(UserError, match=said) as caught:
        found(tmp_path / "p.jsonl", entries)
    assert "p.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ['{"id": 1, "caption"\n', '[{"id": 1,\n'])
def test_a_file_that_is_not_json(tmp_path, content):
    (tmp_path / "p").write_text(content)
    with pytest.raises(UserError, match="is not JSON"):
        predictions.read(tmp_path / "p", records(), "caption")
    with pytest.raises(UserError, match="cannot be read"):
        predictions.read(tmp_path / "none", records(), "caption")


def test_servers_get_numbers_where_ids_are_numbers(tmp_path):
    texts = {"42": "a dog", "007": "a spy", "a/b.jpg": "été"}
    made = {name: {"caption": text} for name, text in texts.items()}
    predictions.export(tmp_path / "r.json", made, "caption")
    assert json.loads((tmp_path / "r.json").read_text()) == [
        {"image_id": 42, "caption": "a dog"},
        {"image_id": "007", "caption": "a spy"},
        {"image_id": "a/b.jpg", "caption": "été"},
    ]
    predictions.export(tmp_path / "r.json", {"1001": {"answer": "yes"}}, "answer")
    assert json.loads((tmp_path / "r.json").read_text()) == [{"question_id": 1001, "answer": "yes"}]
