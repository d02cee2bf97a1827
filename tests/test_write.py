"""Captioning from the shell: what is printed where, in which order, and what a failure costs."""

import io
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import shell
import torch
from PIL import Image
from tiny import write_captioner

from tinyvl import UserError, cli, models, progress, write


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """An untrained I-Tuning model over a handful of words."""
    texts = ["a red dog runs", "two cats sleep", "the sky is blue"]
    return write_captioner(tmp_path_factory.mktemp("checkpoint"), texts)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    for i in range(9):
        Image.new("RGB", (40 + i, 30), (25 * i, 90, 255 - 25 * i)).save(root / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def caption(checkpoint):
    return lambda *args, stdin="": shell.run(
        "caption", "--model", checkpoint, "--max-tokens", "8", *args, stdin=stdin
    )


@pytest.fixture(scope="module")
def expected(checkpoint, photos) -> dict[str, tuple[str, float]]:
    """Captions of the photos one by one."""
    model = models.load(str(checkpoint), device=torch.device("cpu"))
    transform = model.encoder.transform()
    return {
        str(file): model.caption(transform(Image.open(file))[None], beams=5, max_tokens=8)[0]
        for file in sorted(photos.iterdir())
    }


def test_one_picture_gives_its_caption_and_nothing_else(caption, photos, expected):
    done = caption(str(photos / "3.png"))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == expected[str(photos / "3.png")][0] + "\n"


def test_a_folder_gives_a_line_a_picture_in_order(caption, photos, expected):
    done = caption(str(photos), "--batch", "4")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{path}\t{text}" for path, (text, _) in expected.items()]


def test_json_on_a_pipe_with_bad_files_named_and_the_rest_done(caption, photos, expected, tmp_path):
    bad, missing = tmp_path / "bad.png", tmp_path / "missing.png"
    bad.write_bytes(b"nothing")
    paths = [str(photos / "0.png"), str(bad), str(photos / "1.png"), str(missing)]
    done = caption("-", "--json", stdin="".join(p + "\n" for p in paths))
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 1
    assert [line["path"] for line in lines] == paths
    assert ["error" in line for line in lines] == [False, True, False, True]
    for line in (lines[0], lines[2]):
        text, score = expected[line["path"]]
        assert line["caption"] == text
        assert line["score"] == pytest.approx(score, abs=1e-3)
    *errors, end = done.stderr.splitlines()
    assert len(errors) == 2
    assert re.fullmatch(r"tinyvl: 2 captions in \d+ s, 2 failed", end)
    assert "bad.png" in errors[0]
    assert "missing.png" in errors[1]


def test_nul_separated_paths(caption, photos):
    odd = photos.parent / "with\nnewline.png"
    Image.new("RGB", (30, 30), "red").save(odd)
    done = caption("-", "-0", "--json", stdin=f"{odd}\0")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["path"] == str(odd)


def test_output_file_is_resumed_and_never_overwritten(caption, photos, expected, tmp_path):
    out = tmp_path / "captions.tsv"
    whole = "".join(f"{path}\t{text}\n" for path, (text, _) in expected.items())
    done = caption(str(photos), "-o", str(out))
    assert (done.returncode, done.stdout) == (0, "")
    assert out.read_text() == whole
    again = caption(str(photos), "-o", str(out))
    assert again.returncode == 2
    assert "--resume" in again.stderr
    assert out.read_text() == whole
    lines = whole.splitlines(keepends=True)
    out.write_text("".join(lines[:4]) + lines[4][:10])  # killed in the middle of a line
    assert caption(str(photos), "-o", str(out), "--resume").returncode == 0
    assert out.read_text() == whole


def test_resuming_json_tries_failed_files_again(tmp_path):
    out = tmp_path / "out.jsonl"
    good = {"path": "a.png", "caption": "a dog", "score": -1.0}
    out.write_text(json.dumps(good) + "\n" + json.dumps({"path": "b.png", "error": "no"}) + "\n")
    stream, done = write.open_output(out, True)
    stream.close()
    assert done == {"a.png"}
    assert [json.loads(line) for line in out.read_text().splitlines()] == [good]


def test_odd_paths_survive_a_resume(tmp_path):
    out = tmp_path / "out.tsv"
    rows = "a\u2028b.png\ta dog\nc\td.png\ta cat\n{x}.png\ta bird\nlast.png\ta"
    out.write_text(rows)
    stream, done = write.open_output(out, True)
    stream.close()
    assert done == {"a\u2028b.png", "c\td.png", "{x}.png"}
    assert out.read_text() == rows.rpartition("\n")[0] + "\n"


def test_files_that_are_not_there_cost_no_model(monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "load_model", None)
    done = shell.run("caption", tmp_path / "a.png", tmp_path / "b.png", "--json")
    assert done.returncode == 1
    line = json.loads(done.stdout.splitlines()[0])
    assert line == {"path": f"{tmp_path}/a.png", "error": "there is no such file"}


def test_a_resumed_file_is_gone_on_with_by_the_same_search(tmp_path):
    out = tmp_path / "out.tsv"
    write.open_output(out, False, made_by={"model": "m", "beams": 5})[0].close()
    write.open_output(out, True, made_by={"model": "m", "beams": 5})[0].close()
    with pytest.raises(UserError, match="made with beams 5, not 3") as caught:
        write.open_output(out, True, made_by={"model": "m", "beams": 3})
    assert caught.value.status == 2
    assert [file.name for file in tmp_path.iterdir()] == [".out.tsv.json", "out.tsv"]


def test_a_stopped_run_says_how_to_go_on(capsys):
    def results():
        yield "a", "a dog", -0.5
        raise KeyboardInterrupt

    told = progress.Told("captions", 9, Path("out.tsv"))
    with pytest.raises(UserError, match=r"after 1 of 9 captions; go on with -o out.tsv --resume"):
        write.write(results(), io.StringIO(), as_json=False, bare=False, told=told)


def test_the_time_left_is_by_all_that_was_done(monkeypatch, capsys):
    """Results come sixteen at once: the rate between two of them would be far too high."""
    clock = iter([0.0, 40.0, 40.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.bar("captions", 64) as advance:
        advance(16)
    assert capsys.readouterr().err == "captions: 16/64  2.5 s each, 2 min left\n"


def test_a_mistake_in_the_model_leaves_no_output_file(photos, tmp_path):
    out = tmp_path / "out.tsv"
    done = shell.run("caption", photos, "--model", "no/such", "-o", out)
    assert done.returncode == 2
    assert not out.exists()
    with pytest.raises(UserError, match="cannot be written"):
        write.open_output(tmp_path / "no" / "folder" / "out.tsv", False)


def test_a_foreign_file_is_not_touched_by_resume(tmp_path):
    out = tmp_path / "notes.txt"
    out.write_text("my notes\n")
    with pytest.raises(UserError, match="not written by tinyvl"):
        write.open_output(out, True)
    assert out.read_text() == "my notes\n"


def test_a_closed_pipe_ends_quietly(checkpoint, photos):
    caption = f"{sys.executable} -m tinyvl.cli caption --model {checkpoint} --batch 1"
    command = f"{caption} {photos} | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == ""


def test_captions_stream_as_paths_come(checkpoint, photos):
    """A producer that pauses at the other end of a pipe gets its captions before it ends."""
    command = [sys.executable, "-m", "tinyvl.cli", "caption", "--model", str(checkpoint), "-"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process.stdin.write(f"{photos / '0.png'}\n")
    process.stdin.flush()
    first = process.stdout.readline()  # would block for ever if it waited for a full batch
    assert first.startswith(str(photos / "0.png"))
    out, _ = process.communicate(f"{photos / '1.png'}\n", timeout=60)
    assert out.startswith(str(photos / "1.png"))


@pytest.mark.parametrize(
    ("args", "status", "said"),
    [
        (["no_such.png"], 1, "no_such.png"),
        (["a.png", "--model", "no/such/model"], 2, "no tinyvl checkpoint"),
        (["a.png", "--resume"], 2, "-o FILE"),
        (["a.png", "--sample", "--temperature", "0"], 2, "--temperature"),
        (["a.png", "--sample", "--top-p", "1.5"], 2, "--top-p"),
        (["a.png", "--temperature", "0.7"], 2, "--temperature goes with --sample"),
        (["a.png", "--seed", "0"], 2, "--seed goes with --sample"),
        (["a.png", "--sample", "--beams", "4"], 2, "--beams is for searching"),
        (["a.png", "--sample", "--late-stopping"], 2, "--late-stopping is for searching"),
        (["-", "--device", "cuda:99"], 2, "cuda:99"),
        (["-", "--precision", "fp8"], 2, "fp8"),
    ],
)
def test_mistakes_cost_one_sentence(args, status, said, checkpoint):
    model = [] if "--model" in args else ["--model", str(checkpoint)]
    done = shell.run("caption", *args, *model)
    assert done.returncode == status
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""


def test_an_empty_folder_says_so(caption, tmp_path):
    done = caption(str(tmp_path))
    assert done.returncode == 1
    assert "no images" in done.stderr


def test_sampling_depends_on_the_seed_and_the_file_not_on_the_batch(caption, photos):
    runs = [
        caption(str(photos), "--sample", "--temperature", "2", "--seed", seed, "--batch", n).stdout
        for seed, n in (("1", "9"), ("1", "2"), ("2", "9"))
    ]
    assert runs[0] == runs[1] != runs[2]


def test_batches_fill_when_items_come_fast_and_go_when_they_are_slow():
    def fast():
        yield from range(10)

    assert list(write.gathered(fast(), 4)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]

    def slow():
        yield 0
        time.sleep(0.6)
        yield 1

    assert list(write.gathered(slow(), 4, patience=0.1)) == [[0], [1]]

    def broken():
        yield 0
        raise UserError("gone")

    batches = write.gathered(broken(), 4)
    assert next(batches) == [0]
    with pytest.raises(UserError, match="gone"):
        next(batches)


def test_out_of_memory_halves_the_batch(capsys):
    class Tight:
        def caption(self, pictures, **style):
            if len(pictures) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return [(str(int(p)), 0.0) for p in pictures]

    pictures = [(f"{i}.png", torch.tensor(i)) for i in range(7)]
    found = write.run(Tight(), pictures, write.Style())
    assert [text for text, _ in found] == [str(i) for i in range(7)]
    assert "out of memory" in capsys.readouterr().err


def test_failed_files_are_reported_in_json_too(capsys):
    stream = io.StringIO()
    results = [("a", "a dog", -0.5), ("b", UserError("b: broken."), 0.0)]
    assert write.write(results, stream, as_json=True, bare=False) == 1
    assert [json.loads(line) for line in stream.getvalue().splitlines()] == [
        {"path": "a", "caption": "a dog", "score": -0.5},
        {"path": "b", "error": "broken."},
    ]
    assert capsys.readouterr().err == "tinyvl: b: broken.\n"
