"""`tinyvl data check` and `data convert`."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import shell
from PIL import Image
from published import PUBLISHED, coco, vqa, write, write_json, write_tar, xtd10

from tinyvl import UserError, cli_data, data, data_check
from tinyvl.data import Record

SHARED = Path(__file__).parents[2] / "shared" / "data"


run = partial(shell.invoke, "data")


def report(*args: object) -> tuple[int, dict]:
    result = run("check", *args, "--json", "--workers", "0", "--quiet")
    return result.exit_code, json.loads(result.stdout)


def picture(path: Path, seed: int = 0) -> Path:
    """A small picture, unlike those of other seeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def lines(path: Path, *entries: dict) -> Path:
    return write(path, "".join(json.dumps(entry) + "\n" for entry in entries))


@pytest.fixture
def good(tmp_path) -> Path:
    """Two splits, each a picture with its captions."""
    for i, split in enumerate(("train", "val")):
        picture(tmp_path / f"{split}.png", i)
    return lines(
        tmp_path / "set.jsonl",
        {"image": "train.png", "captions": ["a dog runs", "two dogs"], "split": "train"},
        {"image": "val.png", "captions": ["a"], "split": "val", "lang": "en"},
    )


# check


def test_formats_in_the_help_are_those_there_are():
    assert list(cli_data.FORMATS) == list(data.READERS)


def test_every_option_has_help():
    import typer.main

    for name, command in typer.main.get_command(cli_data.sets).commands.items():
        assert command.help, name
        assert all(parameter.help for parameter in command.params), name


def test_check_counts(good):
    status, found = report(good)
    assert status == 0
    assert found == {
        "data": [{"path": str(good), "format": "jsonl", "records": 2}],
        "records": 2,
        "files": {"image": 2},
        "splits": {
            "train": {"files": 1, "records": 1, "captions": 2, "questions": 0},
            "val": {"files": 1, "records": 1, "captions": 1, "questions": 0},
        },
        "langs": {"en": 1},
        "captions": {
            "total": 3,
            "per_record": {"min": 1, "median": 2, "mean": 1.5, "p95": 1, "max": 2},
            "words": {"min": 1, "median": 2, "mean": 2, "p95": 2, "max": 3},
            "characters": {"min": 1, "median": 8, "mean": 6.33, "p95": 8, "max": 10},
        },
        "decoded": True,
        "problems": {},
        "details": [],
    }


def test_check_of_questions(tmp_path):
    path, _ = vqa(tmp_path)
    picture(tmp_path / "val2014/COCO_val2014_000000000042.jpg")
    status, found = report(path)
    assert status == 0
    assert found["questions"] == {
        "total": 2,
        "words": {"min": 3, "median": 3, "mean": 3, "p95": 3, "max": 3},
        "answers_per_question": {"min": 10, "median": 10, "mean": 10, "p95": 10, "max": 10},
        "question_types": {"what is this": 1, "is it": 1},
        "answer_types": {"other": 1, "yes/no": 1},
    }
    assert found["splits"] == {"val": {"files": 1, "records": 2, "captions": 0, "questions": 2}}


def kinds(found: dict) -> list[tuple[str, str]]:
    return [(detail["problem"], Path(detail["path"]).name) for detail in found["details"]]


def test_check_finds_missing_and_damaged_pictures(good):
    whole = picture(good.parent / "whole.jpg").read_bytes()
    write(good.parent / "cut.jpg", whole[:-100])
    write(good.parent / "text.png", "<html>not found</html>")
    with open(good, "a") as file:
        for name in ("cut.jpg", "gone.jpg", "text.png", "whole.jpg"):
            file.write(json.dumps({"image": name, "captions": ["x"], "split": "val"}) + "\n")
    status, found = report(good)
    assert status == 1
    assert kinds(found) == [
        ("missing", "gone.jpg"),
        ("unreadable", "cut.jpg"),
        ("unreadable", "text.png"),
    ]
    assert found["problems"] == {"missing": 1, "unreadable": 2}
    assert found["details"][1]["error"].startswith("damaged or cut short")
    assert "web page" in found["details"][2]["error"]
    status, found = report(good, "--fast")
    assert (status, kinds(found)) == (1, [("missing", "gone.jpg")])
    assert not found["decoded"]


def test_check_decodes_in_workers(good):
    """More pictures than are decoded without them."""
    for i in range(8):
        picture(good.parent / f"{i}.png", i + 10)
    write(good.parent / "7.png", "damaged")
    entries = [{"image": f"{i}.png", "captions": ["x"]} for i in range(8)]
    path = lines(good.parent / "more.jsonl", *entries)
    result = run("check", path, "--json", "--workers", 2)
    assert kinds(json.loads(result.stdout)) == [("unreadable", "7.png")]
    assert result.exit_code == 1
    assert "7.png: " in result.stderr


def test_check_finds_blank_texts(tmp_path):
    for i in range(5):
        picture(tmp_path / f"{i}.png", i)
    path = lines(
        tmp_path / "set.jsonl",
        {"image": "0.png", "captions": ["a dog", "  ", ""]},
        {"image": "1.png"},
        {"image": "2.png", "question": " ", "answers": ["yes"], "question_id": 1},
        {"image": "3.png", "question": "what?", "answers": ["", " "], "question_id": 2},
        {"image": "3.png", "question": "why?", "answers": ["so"], "question_id": 2},
        {"image": "4.png", "label": "dog"},
    )
    status, found = report(path)
    assert status == 1
    assert kinds(found) == [
        ("blank caption", "0.png"),
        ("blank caption", "0.png"),
        ("no caption", "1.png"),
        ("blank question", "2.png"),
        ("no answer", "3.png"),
        ("repeated question", "3.png"),
    ]
    assert found["details"][0]["error"] == "caption 2 of 3 is blank"
    assert found["details"][4]["record"] == "2"
    assert found["classes"] == {"dog": 1}


def test_a_test_set_without_answers_or_captions_is_fine(tmp_path):
    picture(tmp_path / "0.png")
    question = {"image": "0.png", "question": "what?"}
    path = lines(
        tmp_path / "set.jsonl",
        question | {"split": "train", "answers": ["dog"], "question_id": 1},
        {"image": "0.png", "question": "why?", "split": "train", "answers": ["so"]},
    )
    assert report(path)[0] == 0
    path = lines(tmp_path / "set.jsonl", question | {"split": "test"}, question | {"split": "test"})
    assert report(path)[0] == 0
    assert report(lines(tmp_path / "set.jsonl", {"image": "0.png"}))[0] == 0
    train = {"image": "0.png", "captions": ["x"], "split": "train"}
    picture(tmp_path / "1.png", 1)
    path = lines(tmp_path / "set.jsonl", train, {"image": "1.png", "split": "test"})
    assert report(path)[0] == 0


def test_check_counts_coco_images_without_captions(tmp_path):
    path, expected = coco(tmp_path)
    for i, record in enumerate(expected):
        picture(Path(record.image), i)
    document = json.loads(path.read_text())
    document["annotations"] = document["annotations"][:1]
    write_json(path, document)
    status, found = report(path)
    assert (status, kinds(found)) == (1, [("no caption", "000000000042.jpg")])


def test_check_finds_files_in_two_splits(good):
    shutil.copy(good.parent / "train.png", good.parent / "copy.png")
    with open(good, "a") as file:
        for name, split in (
            ("train.png", "val"),  # the same path
            ("copy.png", "test"),  # the same bytes
            ("val.png", "val"),  # twice in one split is no leak
        ):
            file.write(json.dumps({"image": name, "captions": ["x"], "split": split}) + "\n")
    status, found = report(good)
    assert status == 1
    assert kinds(found) == [
        ("in two splits", "train.png"),
        ("same content in two splits", "copy.png"),
    ]
    assert found["details"][0]["error"] == "is in train and val"
    assert str(good.parent / "train.png") in found["details"][1]["error"]
    assert kinds(report(good, "--fast")[1]) == [("in two splits", "train.png")]


def test_restval_is_train(tmp_path):
    picture(tmp_path / "0.png")
    entries = [
        {"image": "0.png", "captions": ["x"], "split": split} for split in ("train", "restval")
    ]
    assert report(lines(tmp_path / "set.jsonl", *entries))[0] == 0


def test_check_of_a_file_a_split(tmp_path):
    picture(tmp_path / "0.png")
    picture(tmp_path / "1.png", 1)
    shutil.copy(tmp_path / "0.png", tmp_path / "2.png")
    one, two = (
        lines(tmp_path / f"{name}.jsonl", *({"image": f"{i}.png", "captions": ["x"]} for i in ids))
        for name, ids in (("train", (0, 1)), ("test", (1, 2)))
    )
    assert report(one)[0] == report(two)[0] == 0
    status, found = report(one, two)
    assert status == 1
    assert list(found["splits"]) == ["train", "test"]
    assert found["problems"] == {"in two splits": 1, "same content in two splits": 1}


def test_check_without_any_files(tmp_path):
    folder, expected = xtd10(tmp_path)
    for record in expected:
        Path(record.image).unlink(missing_ok=True)
    result = run("check", folder, "--quiet")
    assert result.exit_code == 1
    assert "--images says where they are" in result.stderr
    assert "langs\tde 2, jp 2" in result.stdout
    assert "problem: missing\t2" in result.stdout


def test_check_of_downloads_counts_the_dead_links(tmp_path):
    path, _ = PUBLISHED["cc3m"](tmp_path)
    status, found = report(path, "--fast")
    assert (status, found["problems"], found["records"]) == (1, {"missing": 1}, 3)


def write_sound(path: Path) -> None:
    import wave

    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(1600))


def write_video(path: Path) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for i in range(3):
            pixels = np.full((32, 32, 3), 80 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def test_check_opens_videos_and_sounds(tmp_path):
    write_sound(tmp_path / "a.wav")
    write_video(tmp_path / "b.mp4")
    write(tmp_path / "c.wav", (tmp_path / "a.wav").read_bytes()[:20])
    write(tmp_path / "d.mp4", "no video")
    shutil.copy(tmp_path / "a.wav", tmp_path / "e.mp4")
    shutil.copy(tmp_path / "b.mp4", tmp_path / "f.wav")
    path = lines(
        tmp_path / "set.jsonl",
        *({"audio": f"{name}.wav", "captions": ["x"]} for name in "acf"),
        *({"video": f"{name}.mp4", "captions": ["x"]} for name in "bde"),
    )
    status, found = report(path)
    assert status == 1
    assert found["files"] == {"video": 3, "audio": 3}
    assert kinds(found) == [
        ("unreadable", f"{name}") for name in ("c.wav", "f.wav", "d.mp4", "e.mp4")
    ]
    errors = [detail["error"] for detail in found["details"]]
    assert errors[1] == "has no sound in it"
    assert errors[3] == "has sound, but no video"
    assert errors[2].startswith("damaged, or in no format that can be read")


def test_check_names_every_malformed_line_and_checks_the_rest(good):
    with open(good, "a") as file:
        file.write('{"image": 3}\n{"image": "gone.png", "captions": ["x"]}\nno JSON\n')
    status, found = report(good)
    assert (status, found["records"]) == (1, 3)
    assert [(d["problem"], d["error"][:24]) for d in found["details"]] == [
        ("malformed", "line 3: 'image' should be"[:24]), ("malformed", "line 5 is not JSON: Expe"),
        ("missing", "there is no such file"),
    ]  # fmt: skip


def test_check_prints_tables_on_a_terminal(good, monkeypatch, capsys):
    found = data_check.check([good], workers=0, quiet=True)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    cli_data.show(found)
    shown = capsys.readouterr().out
    assert "split" in shown
    assert "train" in shown
    assert "median" in shown
    assert "none" in shown


def test_check_names_a_few_problems_and_counts_the_rest(tmp_path):
    picture(tmp_path / "0.png")
    entries = [{"image": f"{i}.png", "captions": ["x"]} for i in range(30)]
    result = run("check", lines(tmp_path / "set.jsonl", *entries), "--fast")
    assert result.stderr.count("there is no such file") == cli_data.SHOWN
    assert f"and {29 - cli_data.SHOWN} problems more" in result.stderr


# convert


@pytest.mark.parametrize("name", PUBLISHED)
def test_convert_reads_back_the_same(tmp_path, name):
    path, expected = PUBLISHED[name](tmp_path / "published")
    out = tmp_path / "out" / "set.jsonl"
    out.parent.mkdir()
    result = run("convert", path, "-o", out)
    assert (result.exit_code, result.stdout) == (0, f"{out}\n")
    assert data.read(out) == expected
    assert os.listdir(out.parent) == ["set.jsonl"]
    shutil.move(tmp_path / "published", tmp_path / "moved" / "published")
    shutil.move(out.parent, tmp_path / "moved" / "out")  # the paths are relative to the file
    assert len(data.read(tmp_path / "moved" / "out" / "set.jsonl")) == len(expected)


def test_convert_webdataset_reads_back_the_same(tmp_path, monkeypatch):
    pytest.importorskip("webdataset")
    monkeypatch.setenv("TINYVL_CACHE", str(tmp_path / "cache"))
    tar = write_tar(tmp_path / "a.tar", [("a.jpg", b"x"), ("a.txt", b"a dog"), ("a.cls", b"3")])
    run("convert", tar, "-o", tmp_path / "set.jsonl")
    (record,) = data.read(tmp_path / "set.jsonl")
    assert record == data.read(tar)[0]
    assert (record.captions, record.label) == (["a dog"], "3")


def test_convert_a_part(tmp_path):
    folder, expected = xtd10(tmp_path)
    run("convert", folder, "-o", tmp_path / "de.jsonl", "--lang", "de", "--split", "test")
    assert data.read(tmp_path / "de.jsonl") == expected[:2]
    with pytest.raises(UserError, match="no split 'train'"):
        run("convert", folder, "-o", tmp_path / "x.jsonl", "--split", "train")
    assert not (tmp_path / "x.jsonl").exists()


def test_convert_with_pictures_elsewhere(tmp_path):
    path, expected = coco(tmp_path / "here")
    shutil.move(tmp_path / "here/val2017", tmp_path / "far")
    out = tmp_path / "set.jsonl"
    run("convert", path, "-o", out, "--images", tmp_path / "far", "--format", "coco")
    assert [record.image for record in data.read(out)] == [
        str(tmp_path / "far" / Path(record.image).name) for record in expected
    ]


def test_convert_overwrites_nothing(good):
    before = good.read_bytes()
    with pytest.raises(UserError, match="this file exists") as caught:
        run("convert", good, "-o", good)
    assert caught.value.status == 2
    assert good.read_bytes() == before


def test_convert_into_no_folder(good):
    with pytest.raises(UserError, match="cannot be written"):
        run("convert", good, "-o", good.parent / "nowhere/set.jsonl")


def test_convert_drops_blank_captions(tmp_path):
    picture(tmp_path / "0.png")
    path = lines(tmp_path / "set.jsonl", {"image": "0.png", "captions": ["x", " "]})
    run("convert", path, "-o", tmp_path / "out.jsonl")
    assert '"captions": ["x"]' in (tmp_path / "out.jsonl").read_text()


def test_as_a_process(good):
    """Data on standard output, the rest on standard error, and the exit status."""
    write(good.parent / "val.png", "damaged")
    command = [sys.executable, "-m", "tinyvl.cli", "data", "check", str(good), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert json.loads(done.stdout)["problems"] == {"unreadable": 1}
    assert "val.png: " in done.stderr


# Real data


def real(path: str) -> Path:
    if not (SHARED / path).exists():
        pytest.skip(f"{SHARED / path} is not here")
    return SHARED / path


# path -> format, records, files, and what else is known of it
REAL = {
    "pairs/flickr8k_train.jsonl": ("jsonl", 6000, 6000),
    "pairs/flickr8k_val.jsonl": ("jsonl", 1000, 1000),
    "pairs/flickr8k_test.jsonl": ("jsonl", 1000, 1000),
    "pairs/flickr8k_unused.jsonl": ("jsonl", 91, 91),
    "pairs/flickr8k_test.pt.jsonl": ("jsonl", 1000, 1000),
    "pairs/flickr8k_test.zh.jsonl": ("jsonl", 1000, 1000),
    "pairs/flickr8k_test.ar.jsonl": ("jsonl", 1000, 1000),
    "pairs/flickr8k_test.multi30k.jsonl": ("jsonl", 4 * 929, 929),
    "pairs/flickr8k_test_multilingual.jsonl": ("jsonl", 7 * 929, 929),
    "pairs/dataset_flickr8k_rebuilt.json": ("karpathy", 8000, 8000),
    "pairs/images": ("folder", 8091, 8091),
    "visual7w/visual7w_train.jsonl": ("jsonl", 11_318, None),
    "visual7w/visual7w_val.jsonl": ("jsonl", 767, None),
    "visual7w/visual7w_test.jsonl": ("jsonl", 1611, None),
    "daquar/daquar_disjoint_test.jsonl": ("jsonl", 2476, None),
    "daquar/all_qa_pairs.txt": ("daquar", 12_468, 1447),
    "esc10": ("jsonl", 400, 400),
    "esc10/audio": ("classes", 400, 400),
    "cifar10": ("classes", 1000, 1000),
    "cifar10/test": ("classes", 1000, 1000),
    "video": ("folder", 12, 12),
    "xtd10": ("xtd10", 11_000, 1000),
    "xtd10/test_1kcaptions_ko.txt": ("xtd10", 1000, 1000),
    "coco_annotations/captions_val2017.json": ("coco", 5000, 5000),
    "coco_annotations/coco_mini_captions_val2017.json": ("coco", 79, 79),
    "coco_annotations/coco_mini_captions_train2017.json": ("coco", 80, 80),
}


@pytest.mark.slow
@pytest.mark.parametrize("path", REAL)
def test_real_data_is_read(path, tmp_path):
    format, records, files = REAL[path]
    status, found = report(real(path), "--fast")
    absent = path.startswith(("xtd10", "coco"))  # annotations only
    assert status == absent
    assert found["data"][0]["format"] == format
    assert found["records"] == records
    assert files is None or sum(found["files"].values()) == files
    wordless = {"no words": 2} if path == "xtd10" else {}  # "." and the like
    assert found["problems"] == ({"missing": files} if absent else {}) | wordless
    if not absent:
        run("convert", real(path), "-o", tmp_path / "set.jsonl")
        assert data.read(tmp_path / "set.jsonl") == data.read(real(path))


@pytest.mark.slow
def test_real_daquar_is_the_same_in_both_forms():
    def plain(records: list[Record]) -> list[tuple]:
        return sorted((r.image, r.question, *r.answers) for r in records)

    parts = []
    for part in ("train", "val", "test"):
        parts += data.read(real(f"daquar/daquar_disjoint_{part}.jsonl"))
    assert plain(data.read(real("daquar/all_qa_pairs.txt"))) == plain(parts)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["esc10", "video", "cifar10", "visual7w/visual7w_test.jsonl"])
def test_real_files_decode(path):
    assert report(real(path))[1]["problems"] == {}


@pytest.mark.slow
def test_real_results_are_told_apart():
    with pytest.raises(UserError, match="holds results"):
        run("check", real("coco_annotations/captions_val2014_fakecap_results.json"))
