"""Readers of folders and archives: pictures, classes of pictures, WebDataset tars."""

import builtins
import json
import os
import shutil
import time
from pathlib import Path

import pytest
from published import touch, write, write_json, write_tar

from tinyvl import UserError, data, data_folders
from tinyvl.data import Record, recognise

# Folders


@pytest.mark.parametrize(
    ("names", "format"),
    [
        (["cat/1.jpg", "dog/1.jpg"], "classes"),
        (["cat/1.jpg", "dog/1.jpg", "notes.md", ".hidden.jpg", ".git/x"], "classes"),
        (["cat/1.ogg", "dog/1.ogg"], "classes"),
        (["train/cat/1.jpg", "train/dog/1.jpg", "val/cat/2.jpg", "val/dog/2.jpg"], "classes"),
        (["test/cat/1.jpg", "test/dog/1.jpg"], "classes"),
        (["cat/1.jpg", "dog/1.jpg", "3.jpg"], "folder"),  # a picture beside the folders
        (["cat/1.jpg", "cat/1.txt", "dog/1.jpg"], "folder"),  # captions
        (["images/1.jpg"], "folder"),  # one folder is no choice
        (["cat/1.jpg", "dog/1.jpg", "notes/x.md"], "folder"),  # a folder without pictures
        (["2024/may/1.jpg", "2024/june/1.jpg", "2025/may/1.jpg"], "folder"),  # an album
        (["train/1.jpg", "val/2.jpg"], "folder"),  # parts without classes
    ],
)
def test_when_a_folder_is_one_of_classes(tmp_path, names, format):
    touch(tmp_path, *names)
    assert recognise(tmp_path) == (tmp_path, format)


def test_classes_change_nothing_but_the_label_and_the_split(tmp_path):
    touch(tmp_path, "test/cat/1.jpg", "test/dog/1.jpg")
    for record, plain in zip(
        data.read(tmp_path), data.read(tmp_path, format="folder"), strict=True
    ):
        assert (record.label, record.split) == (Path(record.path).parent.name, "test")
        record.label = record.split = None
        assert record == plain


def test_classes_with_folders_inside(tmp_path):
    names = ["cat/1.jpg", "cat/more/2.jpg", "dog/3.jpg"]
    touch(tmp_path, *names)
    records = data.read(tmp_path)
    assert [(r.id, r.label) for r in records] == list(
        zip(names, ["cat", "cat", "dog"], strict=True)
    )


def test_classes_split_is_the_folder_named(tmp_path):
    touch(tmp_path / "val", "cat/1.jpg", "dog/1.jpg")
    assert {record.split for record in data.read(tmp_path / "val")} == {"val"}


@pytest.mark.parametrize("names", [["cat/1.jpg", "2.jpg"], ["train/cat/1.jpg", "val/2.jpg"]])
def test_classes_forced_on_what_has_none(tmp_path, names):
    touch(tmp_path, *names)
    with pytest.raises(UserError, match=r"2\.jpg: is in no class's folder"):
        data.read(tmp_path, format="classes")


SYNSETS = {
    "n01440764": "tench, Tinca tinca",
    "n02012849": "crane",
    "n03126707": "crane",
    "n03710637": "maillot",
    "n03710721": "maillot, tank suit",
}
LISTS = {
    "LOC_synset_mapping.txt": "".join(f"{k} {v}\n" for k, v in SYNSETS.items()),
    "synset_words.txt": "".join(f"{k} {v}\n" for k, v in SYNSETS.items()),
    "words.txt": "".join(f"{k}\t{v}\n" for k, v in {**SYNSETS, "n00001740": "entity"}.items()),
    "Labels.json": json.dumps(SYNSETS),
    "imagenet_class_index.json": json.dumps(
        {i: [k, v.replace(" ", "_")] for i, (k, v) in enumerate(SYNSETS.items())}
    ),
}


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("above", [False, True])
def test_classes_called_by_a_list(tmp_path, name, above):
    folder = tmp_path / "val"
    touch(folder, *(f"{synset}/1.jpg" for synset in SYNSETS))
    write((tmp_path if above else folder) / name, LISTS[name])
    # Two classes never become one: all synonyms where the first is shared, else the folder too.
    assert [record.label for record in data.read(folder)] == [
        "tench",
        "crane (n02012849)",
        "crane (n03126707)",
        "maillot",
        "maillot, tank suit",
    ]


def test_classes_with_a_list_of_others_keep_their_folders_names(tmp_path):
    touch(tmp_path, "n01440764/1.jpg", "white fox/1.jpg")
    write(tmp_path / "LOC_synset_mapping.txt", LISTS["LOC_synset_mapping.txt"])
    assert [record.label for record in data.read(tmp_path)] == ["n01440764", "white fox"]


def test_folder_without_pictures_gives_videos_then_sounds(tmp_path):
    sound, video, picture = touch(tmp_path, "a.wav", "b/c.mp4", "d.jpg")
    write(tmp_path / "a.txt", "a dog barks\n")
    assert [record.path for record in data.read(tmp_path)] == [picture]
    Path(picture).unlink()
    assert data.read(tmp_path) == [Record(video=video, id="b/c.mp4")]
    Path(video).unlink()
    assert data.read(tmp_path) == [Record(audio=sound, captions=["a dog barks"], id="a.wav")]


# WebDataset

MEMBERS = [
    ("dir/000.jpg", b"picture 0"),
    ("dir/000.json", json.dumps({"caption": "from json", "key": "000", "lang": "en"}).encode()),
    ("dir/000.txt", "a dog\nzwei Hunde für dich\n".encode()),
    ("dir/001.cls", b"1"),
    ("dir/001.PNG", b"picture 1"),
    ("002.json", json.dumps({"question": "what?", "answers": ["dog"], "id": "own"}).encode()),
    ("002.webp", b"picture 2"),
    ("003.seg.png", b"a mask is no picture of its own"),
    ("004.mp4", b"video"),
    ("004.txt", b"a video"),
    ("../../005.flac", b"sound"),
]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    pytest.importorskip("webdataset")
    monkeypatch.setenv("TINYVL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_webdataset_reads_as_its_own_library_does(tmp_path, cache):
    import webdataset

    tar = write_tar(tmp_path / "val-000.tar", MEMBERS)
    records = data.read(tar)
    samples = [s for s in webdataset.WebDataset(str(tar), shardshuffle=False) if len(s) > 3]
    samples = [s for s in samples if "seg.png" not in s]
    assert [record.id for record in records] == [sample["__key__"] for sample in samples]
    for record, sample in zip(records, samples, strict=True):
        suffix = Path(record.path).suffix.lstrip(".")
        assert Path(record.path).read_bytes() == sample[suffix]
        assert record.path.startswith(str(cache / "webdataset"))
    first, second, third, fourth, fifth = records
    assert first.captions == ["a dog", "zwei Hunde für dich"]
    assert (first.lang, first.split) == ("en", "val")
    assert (second.label, second.modality) == ("1", "image")
    assert (third.question, third.answers) == ("what?", ["dog"])
    assert (fourth.modality, fourth.captions) == ("video", ["a video"])
    assert (fifth.modality, fifth.id) == ("audio", "../../005")


def test_webdataset_folder_of_tars_with_class_names(tmp_path, cache):
    folder = tmp_path / "set"
    for i in range(2):
        write_tar(folder / f"{i}.tar", [("a.jpg", b"%d" % i), ("a.cls", b"%d" % i)])
    write(folder / "classnames.txt", "cat\nwhite dog\n")
    assert recognise(folder) == (folder, "webdataset")
    records = data.read(folder)
    assert [record.label for record in records] == ["cat", "white dog"]
    assert [Path(record.path).read_bytes() for record in records] == [b"0", b"1"]
    write(folder / "classnames.txt", "cat\n")
    with pytest.raises(UserError, match=r"1\.tar, a: class '1' is not a line of .*classnames"):
        data.read(folder)


def test_webdataset_unpacks_once_and_anew_when_the_tar_changes(tmp_path, cache, monkeypatch):
    tar = write_tar(tmp_path / "a.tar", MEMBERS)
    before = data.read(tar)
    with monkeypatch.context() as patch:
        patch.setattr(data_folders, "_unpack", None)
        assert data.read(tar) == before
    write_tar(tar, [("x.jpg", b"new")])
    (record,) = data.read(tar)
    assert Path(record.path).read_bytes() == b"new"


def test_webdataset_killed_while_unpacking_starts_again(tmp_path, cache, monkeypatch):
    tar = write_tar(tmp_path / "a.tar", MEMBERS)
    parts = data_folders._parts

    def killed(path):
        yield next(parts(path))
        raise KeyboardInterrupt

    monkeypatch.setattr(data_folders, "_parts", killed)
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **options: None)  # as kill -9 would have it
    with pytest.raises(KeyboardInterrupt):
        data.read(tar)
    monkeypatch.undo()
    monkeypatch.setenv("TINYVL_CACHE", str(cache))
    (rest,) = (cache / "webdataset").iterdir()
    os.utime(rest, (time.time() - 1e6,) * 2)
    assert len(data.read(tar)) == 5
    assert len(list((cache / "webdataset").iterdir())) == 1


@pytest.mark.parametrize(
    ("members", "complaint"),
    [
        ([("a.jpg", b""), ("a.json", b"{")], r"a\.tar, a: its 'json' is not JSON"),
        ([("a.jpg", b""), ("a.json", b"[1]")], r"a\.tar, a: its 'json' should be an object"),
        ([("a.jpg", b""), ("a.txt", b"gr\xfcn")], r"a\.tar, a: its 'txt' is not text in UTF-8"),
        ([("a.jpg", b""), ("a.json", b'{"caption": 3}')], r"a\.tar, a: 'caption' should be a list"),
        ([("a.jpg", b""), ("a.jpg", b"")], r"a\.tar: damaged, or not a WebDataset tar"),
        ([("a.txt", b"x")], r"a\.tar holds no records"),
    ],
)
def test_webdataset_names_the_malformed_sample(tmp_path, cache, members, complaint):
    with pytest.raises(UserError, match=complaint):
        data.read(write_tar(tmp_path / "a.tar", members))


def test_webdataset_parts_have_other_keys_and_need_not_be_neighbours(tmp_path, cache, caplog):
    members = [
        ("0.jpg", b"0"), ("1.img", b"1"), ("2.image.JPG", b"2"), ("3.0.png", b"3"),
        ("3.1.png", b"-"), ("4.video", b"4"), ("0.caption", b"\xef\xbb\xbfzero\r\n"),
        ("1.text", "one".encode("utf-16")), ("2.caption.txt", b"two"),
        ("4.json", b'{"caption": "four"}'), ("5.txt", b"five"),
        ("3.txt", b"three"), ("6.jpg", b"6"), ("6.wav", b"-"), ("6.seg.png", b"-"), ("6.npy", b"-"),
    ]  # fmt: skip
    tar = write_tar(tmp_path / "a.tar", members)
    for _ in range(2):  # unpacked, and found unpacked
        caplog.clear()
        records = data.read(tar)
        assert [(r.id, Path(r.path).read_bytes().decode()) for r in records] == [
            (name, name) for name in "012346"
        ]
        said = [["zero"], ["one"], ["two"], ["three"], ["four"], []]
        assert [record.captions for record in records] == said
        assert [record.modality for record in records][3:] == ["image", "video", "image"]
        text = caplog.text
        assert "left out 1 of 7 samples: no picture, video or sound; the first is '5'" in text
        for key in ("1.png", "audio", "seg.png", "npy"):
            assert f"left out parts called {key}: 1" in text


def test_webdataset_tars_that_count_from_zero_have_ids_of_their_own(tmp_path, cache):
    for name in ("a", "b"):
        write_tar(tmp_path / "set" / f"{name}.tar", [("0.jpg", name.encode()), ("0.txt", b"x")])
    assert [record.id for record in data.read(tmp_path / "set")] == ["0", "b/0"]


def test_webdataset_damaged_leaves_nothing_behind(tmp_path, cache):
    tar = write_tar(tmp_path / "a.tar", [(f"{i}.jpg", bytes(20_000)) for i in range(5)])
    for content in (tar.read_bytes()[:50_000], b"no tar at all", b""):
        tar.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.tar"):
            data.read(tar)
        assert not list((cache / "webdataset").iterdir())


def test_webdataset_that_does_not_fit_is_refused(tmp_path, cache, monkeypatch):
    tar = write_tar(tmp_path / "a.tar", MEMBERS)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 9))
    with pytest.raises(UserError, match=r"unpacking takes .* TINYVL_CACHE"):
        data.read(tar)


def test_webdataset_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYVL_CACHE", str(tmp_path / "cache"))
    tar = write_tar(tmp_path / "a.tar", MEMBERS)
    real = builtins.__import__

    def absent(name, *args, **options):
        if name.startswith("webdataset"):
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UserError, match=r"pip install 'tinyvl\[webdataset\]'"):
        data.read(tar)


def test_class_list_of_another_shape_is_ignored(tmp_path):
    touch(tmp_path, "cat/1.jpg", "dog/1.jpg")
    write_json(tmp_path / "Labels.json", {"cat": 3, "dog": ["a"]})
    assert [record.label for record in data.read(tmp_path)] == ["cat", "dog"]
