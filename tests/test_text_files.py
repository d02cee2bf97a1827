"""Text as people have it is read, and names of any kind are written: one reader, one writer."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_data import touch
from tiny import write_captioner

from tinyvl import (
    UserError,
    classes,
    cli_data,
    cli_search,
    data,
    data_check,
    files,
    index_source,
    search,
    write,
)
from tinyvl import evaluate_predictions as predictions
from tinyvl.data import Record

MARKS = {"utf-8-sig": "utf-8-sig", "UTF-16": "utf-16", "UTF-32": "utf-32"}
FORMATS = {  # a file's name, what is in it, and what else has to be there
    "set.jsonl": '{"image": "é.jpg", "caption": "a dog"}\r\n\r\n{"image": "b.jpg", "caption": "ü"}',
    "array.json": '[{"image": "é.jpg", "caption": "a dog"}, {"image": "b.jpg", "caption": "ü"}]\n',
    "captions.txt": "image,caption\r\né.jpg,a dog\r\n \r\nb.jpg,ü\r\n",
    "results.token": "é.jpg#0\ta dog\n\nb.jpg#0\tü",
    "cc3m.tsv": "a dog\té.jpg\r\nü\tb.jpg\r\n",
    "clotho.csv": "file_name,caption_1,caption_2,caption_3,caption_4,caption_5\r\n"
    'é.wav,a dog,x,x,x,x\r\n  \r\n"b.wav",ü,x,x,x,x\r\n',
}


@pytest.mark.parametrize("encoding", ["utf-8", *MARKS.values()])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_reads_what_a_byte_order_mark_says(tmp_path, name, encoding):
    touch(tmp_path, "é.jpg", "b.jpg", "é.wav", "b.wav")
    (tmp_path / name).write_bytes(FORMATS[name].encode(encoding))
    found = data.read(tmp_path / name)
    assert [os.path.basename(record.path)[0] for record in found] == ["é", "b"]
    assert [record.captions[0] for record in found] == ["a dog", "ü"]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("encoding", ["utf-16-le", "latin-1"])
def test_every_format_refuses_another_encoding_by_name(tmp_path, name, encoding):
    touch(tmp_path, "é.jpg", "b.jpg", "é.wav", "b.wav")
    (tmp_path / name).write_bytes(FORMATS[name].encode(encoding))
    formats = {"jsonl": "jsonl", "json": "jsonl", "txt": "flickr", "token": "flickr"}
    format = (formats | {"tsv": "cc3m", "csv": "clotho"})[name.rpartition(".")[2]]
    format = format if encoding == "latin-1" else None
    with pytest.raises(UserError, match=rf"{name}.* is not text in UTF-8"):
        data.read(tmp_path / name, format=format)


def test_lines_end_in_lf_or_crlf_and_nowhere_else(tmp_path):
    file = tmp_path / "list.txt"
    file.write_bytes("\ufeffa\rb\r\n \n\ufeffc\u2028d\x0be\x85f\n".encode())
    lines = [(f"{file}, line 1", "a\rb"), (f"{file}, line 3", "c\u2028d\x0be\x85f")]
    assert list(files.text_lines(file)) == lines


@pytest.mark.parametrize("encoding", MARKS.values())
def test_class_names_prompts_and_labels_are_read_alike(tmp_path, encoding):
    file = tmp_path / "list.txt"
    file.write_bytes("ein {} Hündchen\r\n\r\nein\x0b{}\r\n".encode(encoding))
    assert classes.templates([str(file)]) == ["ein {} Hündchen", "ein\x0b{}"]
    assert search.read_labels(str(file)) == ["ein {} Hündchen", "ein {}"]
    assert classes.names(["0", "1"], file) == {"0": "ein {} Hündchen", "1": "ein\x0b{}"}
    file.write_bytes(b"caf\xe9\n\xe9t\xe9\n")
    for read in (lambda: classes.names(["a"], file), lambda: search.read_labels(str(file))):
        with pytest.raises(UserError, match=r"list\.txt is not text in UTF-8") as caught:
            read()
        assert caught.value.status == 2


def test_captions_beside_pictures_are_one_text_in_index_and_training(tmp_path, capsys):
    touch(tmp_path, "a.png", "b.png", "c.png", "d.png")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa cup\r\n")
    (tmp_path / "b.txt").write_bytes(b"a cup\n\n...\n")
    (tmp_path / "c.txt").write_bytes("a cup\n".encode("utf-16"))
    (tmp_path / "d.txt").write_bytes("a cup\n".encode("utf-16-le"))
    found = index_source.read_source(str(tmp_path)).captions
    assert found == {"a.png": ["a cup"], "b.png": ["a cup"], "c.png": ["a cup"], "d.png": []}
    said = capsys.readouterr().err
    assert "d.txt, line 1 is not text in UTF-8: it has NUL" in said
    assert "skipping 1 captions without words in " in said
    with pytest.raises(UserError, match=r"d\.txt, line 1 is not text in UTF-8: it has NUL"):
        data.read(tmp_path)
    (tmp_path / "d.txt").unlink()
    assert [record.captions for record in data.read(tmp_path)] == [["a cup"]] * 3 + [[]]


def test_paths_and_queries_on_standard_input_lose_their_mark(monkeypatch, tmp_path):
    def given(content: bytes) -> None:
        (tmp_path / "in").write_bytes(content)
        monkeypatch.setattr(sys, "stdin", open(tmp_path / "in", encoding="ascii"))  # noqa: SIM115

    given(b"\xef\xbb\xbf/a.png\r\n/b\rc.png\n")
    assert list(index_source.read_source("-").captions) == ["/a.png", "/b\rc.png"]
    given("\ufeffein Hündchen\r\n\r\na cat".encode())
    ((first, second),) = search.groups(["-"], [])
    assert (first.name, second.name) == ("ein Hündchen", "a cat")
    given("/a.png\n".encode("utf-16"))
    with pytest.raises(UserError, match="standard input is UTF-16; give it as UTF-8"):
        index_source.read_source("-")


def test_a_query_in_another_encoding_is_refused_and_others_are_answered():
    import torch

    class Model:
        def embed_texts(self, texts):
            return torch.ones(len(texts), 2)

    bad, good = search.embed(Model(), [search.Query("caf\udce9"), search.Query("café")])
    assert "'caf\\udce9': this query is not text in UTF-8." in str(bad)
    assert good.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.json", '[{"image": "a.jpg"}] {"image": "b.jpg"}', "behind the end .* stands"),
        ("a.json", '[{"image": "a.jpg"}]]', "behind the end of its JSON array stands ']'"),
        ("a.jsonl", '{"image": "a.jpg"} {"image": "b.jpg"}', "line 1 is not JSON: Extra data"),
        ("a.json", '{"images": [], "annotations": []} x', "is not JSON: Extra data"),
        ("a.jsonl", '{"image": "a.jpg", "caption": "x", "caption": "y"}', "there twice: 'x' and"),
        ("a.json", '{"1": {"imageId": "1", "question": "?"}, "1": {}}', "'1' is there twice"),
        ("a.json", '{"mv89psg6zh4_3_4": ["x"], "mv89psg6zh4_3_4": ["y"]}', "is there twice"),
        ("a.jsonl", '{"image": ' + "[" * 100_000, "line 1 is not JSON"),
        ("a.csv", "file_name,caption_1,caption_2,caption_3,caption_4,caption_5\na.wav,1,2,3,4,5,6",
         "line 2: has more columns than the first line"),
        ("captions.txt", "image,caption\na.jpg,a\rb\n", "line 2: is not CSV"),
    ],
)  # fmt: skip
def test_nothing_is_dropped_from_a_document(tmp_path, name, text, said):
    touch(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / name).write_bytes(text.encode())
    with pytest.raises(UserError, match=said):
        data.read(tmp_path / name)


def test_xtd10_takes_blank_lines_at_its_end(tmp_path):
    touch(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "test_image_names.txt").write_text("a.jpg\nb.jpg\n\n")
    (tmp_path / "test_1kcaptions_de.txt").write_bytes("\ufeffein Hund\r\n\r\n\r\n\r\n".encode())
    assert [record.captions for record in data.read(tmp_path)] == [["ein Hund"], []]


# ------------------------------------------------------------------------------------- written

ODD = [
    "b\nc.png",
    "d\re.png",
    'with "quotes".png',
    '"q".png',
    "tab\t.png",
    "gr\udcfcn.png",
    "猫.png",
]


@pytest.mark.parametrize("as_json", [False, True])
def test_a_resumed_run_has_every_name_that_was_written(tmp_path, as_json):
    out = tmp_path / "out"
    for part in (ODD[:4], ODD[4:]):  # the second goes on with the file of the first
        stream, done = write.open_output(out, True)
        assert done == set(ODD[: 4 if part == ODD[4:] else 0])
        results = [(name, "a dog", -1.0) for name in part]
        assert write.write(results, stream, as_json=as_json, bare=False) == 0
        stream.close()
    assert len(out.read_bytes().split(b"\n")) == len(ODD) + 1
    stream, done = write.open_output(out, True)
    stream.close()
    assert done == set(ODD)


def test_lines_of_earlier_versions_are_resumed(tmp_path):
    out = tmp_path / "out.tsv"
    out.write_bytes(b'\xef\xbb\xbf"odd.png\ta dog\r\ngr\xfcn.png\ta cat\r\n')
    stream, done = write.open_output(out, True)
    stream.close()
    assert done == {'"odd.png', "gr\udcfcn.png"}


def test_predictions_are_read_back_and_their_log_is_text(tmp_path):
    records = [Record(f"/{name}", ["a dog"], name) for name in ODD]
    log = predictions.Log(tmp_path / "run", {"data": "gr\udcfcn.jsonl"})
    for record in records:
        log.add({"id": record.id, "path": record.path, "caption": "a \ud83d dog"})
    predictions.report({"data": "gr\udcfcn"}, 1, predictions.Scores({}), tmp_path / "run")
    for file in (tmp_path / "run").iterdir():
        file.read_text(encoding="utf-8")
    again = predictions.Log(tmp_path / "run", {"data": "gr\udcfcn.jsonl"}, resume=True)
    assert again.lines == log.lines
    assert list(predictions.read(tmp_path / "run", records, "caption")) == ODD
    lines = {"gr\udcfcn": {"caption": "\ud83d"}}
    predictions.export(tmp_path / "out.json", lines, "caption")
    assert json.loads((tmp_path / "out.json").read_text())[0]["caption"] == "\ud83d"


def test_predictions_are_read_as_other_texts(tmp_path):
    records = [Record("/a.png", ["ein Hündchen"], "1"), Record("/b.png", ["x"], "2")]
    lines = "".join(f'\ufeff{{"id": {i}, "caption": "ü"}}\r\n\r\n' for i in (1, 2))  # two, joined
    for encoding in ("utf-8", "utf-16"):
        (tmp_path / "p.jsonl").write_bytes(lines.encode(encoding))
        assert predictions.read(tmp_path / "p.jsonl", records, "caption") == {
            "1": {"caption": "ü"},
            "2": {"caption": "ü"},
        }
    (tmp_path / "p.jsonl").write_bytes(lines[1:].encode("utf-16-le"))
    with pytest.raises(UserError, match="is not text in UTF-8"):
        predictions.read(tmp_path / "p.jsonl", records, "caption")


def test_retrieve_prints_a_line_a_result_and_bare_names_with_nul():
    hit = search.Hit("a\ndog", 1, "b\nc.png", 0.5)
    assert cli_search.line_of(hit, False, True, False) == '"a\\ndog"\t"b\\nc.png"'
    assert cli_search.line_of(hit, False, True, True) == "b\nc.png"
    assert json.loads(cli_search.line_of(hit, True, True, False))["path"] == "b\nc.png"


def test_what_is_written_never_fails_because_of_a_name(tmp_path):
    files.write_text(tmp_path / "card.md", "gr\udcfcn \ud83d 猫")
    assert (tmp_path / "card.md").read_bytes() == b"gr\xfcn \\ud83d " + "猫".encode()


def test_output_is_utf8_where_standard_output_is_not(tmp_path):
    """As on Windows, where a pipe or a file has cp1252; the terminal's own encoding is kept."""
    from PIL import Image

    model = write_captioner(tmp_path / "model", ["a red dog"])
    for name in ("1.png", "2猫.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    args = ["caption", str(tmp_path / "1.png"), str(tmp_path / "2猫.png"), "-m", str(model)]
    for encoding in ("cp1252", "ascii"):
        done = subprocess.run(
            [sys.executable, "-m", "tinyvl.cli", *args, "--max-tokens", "2"], capture_output=True,
            env=os.environ | {"PYTHONIOENCODING": encoding},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert [line.split("\t")[0] for line in done.stdout.decode().splitlines()] == args[1:3]


def test_brackets_in_names_are_no_markup(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    (tmp_path / "[").mkdir()
    (tmp_path / "[/x].jsonl").write_text('{"image": "a.jpg", "captions": ["a"]}')
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.chdir(tmp_path)
    cli_data.show(data_check.check([Path("[/x].jsonl")], fast=True))
    assert "[/x].jsonl" in sys.stdout.getvalue()
