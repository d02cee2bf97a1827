"""Indexes against new ones after any history."""

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from dual import Dual
from PIL import Image

from tinyvl import UserError, index, index_source
from tinyvl.device import Pieces
from tinyvl.index import Index


def paint(file: Path, seed: int) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return file


@pytest.fixture
def photos(tmp_path) -> Path:
    for i in range(30):
        paint(tmp_path / "photos" / ("abc"[i % 3]) / f"{i}.png", i)
    return tmp_path / "photos"


def refresh(folder: Path, data: Path | str, model: Dual | None = None, batch: int = 4):
    source = index_source.read_source(str(data))
    return index.update(folder, source, model or Dual(), name="m", batch=batch, workers=0)


def contents(folder: Path) -> dict:
    """All that an index holds, as bytes and values; and that nothing else lies in its folder."""
    found = Index(folder)
    generation = found.about["generation"]
    names = {f"{t}.{generation}.{e}" for t in index.TABLES for e in ("f32", "jsonl")}
    assert {file.name for file in folder.iterdir()} == names | {"index.json", ".lock"}
    tables = {"images": found.images, "captions": found.captions}
    return {
        name: (table.rows(), np.asarray(table.vectors).tobytes()) for name, table in tables.items()
    }


def test_an_index_holds_the_vectors_of_its_pictures(tmp_path, photos):
    changes = refresh(tmp_path / "i", photos)
    assert (changes.embedded, str(changes)) == (30, "30 embedded")
    found, model = Index(tmp_path / "i"), Dual()
    rows = found.images.rows()
    paths = [row.path for row in rows]
    assert paths == sorted(f"{'abc'[i % 3]}/{i}.png" for i in range(30))
    for row, vector in zip(rows, found.images.vectors, strict=True):
        picture = model.encoder.transform()(Image.open(photos / row.path))
        expected = model.embed_images(picture[None])[0].numpy()
        np.testing.assert_allclose(vector, expected, atol=1e-6)
    assert found.images.pick([7, 2]) == {7: rows[7], 2: rows[2]}


def test_what_is_known_is_not_embedded_again(tmp_path, photos):
    def embedded() -> int:
        model = Dual()
        changes = refresh(tmp_path / "i", photos, model)
        assert contents(tmp_path / "i") == fresh(tmp_path, photos)
        assert (changes.embedded == 0) == (model.seen == [])
        return changes.embedded

    assert embedded() == 30
    assert embedded() == 0
    (photos / "a" / "0.png").rename(photos / "new name.png")  # renamed
    shutil.move(photos / "b", photos / "deep")  # moved
    shutil.copy(photos / "c" / "2.png", photos / "copy.png")  # copied
    os.utime(photos / "c" / "5.png", (1, 1))  # touched
    (photos / "c" / "8.png").rename(photos / "t.png")  # two names exchanged
    (photos / "c" / "11.png").rename(photos / "c" / "8.png")
    (photos / "t.png").rename(photos / "c" / "11.png")
    assert embedded() == 0
    paint(photos / "c" / "2.png", 99)  # changed
    assert embedded() == 1
    (photos / "c" / "2.png").unlink()
    assert embedded() == 0


def test_the_summary_counts_each_picture_once(tmp_path, photos):
    refresh(tmp_path / "i", photos)
    (photos / "a" / "0.png").rename(photos / "renamed.png")
    (photos / "a" / "3.png").rename(photos / "b" / "1.png")  # over another one
    shutil.copy(photos / "c" / "2.png", photos / "copy.png")
    (photos / "c" / "5.png").unlink()
    paint(photos / "c" / "8.png", 99)
    changes = refresh(tmp_path / "i", photos)
    assert str(changes) == "1 embedded, 3 moved or copied, 25 unchanged, 1 gone"


def fresh(tmp_path: Path, data: Path) -> dict:
    new = tmp_path / "fresh"
    shutil.rmtree(new, ignore_errors=True)
    refresh(new, data)
    return contents(new)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("seed", range(8))
def test_any_history_ends_as_a_new_index(tmp_path, photos, seed, monkeypatch, capsys):
    """Changes of all kinds, runs that are killed anywhere, files cut off in the middle."""
    rng, numbers = random.Random(seed), itertools.count(1000)
    append = index.Part.append

    def change() -> None:
        files = sorted(f for f in photos.rglob("*") if f.is_file())
        file, other = rng.sample(files, 2)
        kinds = ("add", "delete", "rename", "change", "touch", "copy", "exchange", "break")
        match rng.choice(kinds):
            case "add":
                paint(photos / f"{next(numbers)}.png", next(numbers))
            case "delete" if len(files) > 5:
                file.unlink()
            case "rename":
                file.rename(photos / rng.choice("abc") / f"{next(numbers)}.png")
            case "change":
                paint(file, next(numbers))
            case "touch":
                os.utime(file, ns=(next(numbers), next(numbers)))
            case "copy":
                shutil.copy(file, other)
            case "exchange":
                file.rename(photos / "t"), other.rename(file), (photos / "t").rename(other)
            case "break":
                file.write_bytes(b"no picture " + file.name.encode())

    def killed_after(count: int, torn: int):
        calls = itertools.count()

        def killed(part, rows, vectors):
            if next(calls) == count:
                part.matrix.write(vectors.tobytes()[: torn * 13])
                part.list.write(rows[0].line().encode()[:torn] + b"\n" * (torn % 2))
                part.matrix.flush(), part.list.flush()
                raise Killed
            append(part, rows, vectors)

        return killed

    for _ in range(5):
        for _ in range(rng.randrange(12)):
            change()
        if rng.random() < 0.7:
            killed = killed_after(rng.randrange(5), rng.randrange(40))
            monkeypatch.setattr(index.Part, "append", killed)
            step = rng.choice(["append", "write_about", "write_table"])
            if step != "append":
                monkeypatch.setattr(index, step, lambda *a: (_ for _ in ()).throw(Killed))
            with suppress(Killed):
                refresh(tmp_path / "i", photos)
            monkeypatch.undo()
    refresh(tmp_path / "i", photos)
    assert contents(tmp_path / "i") == fresh(tmp_path, photos)


def test_killed_half_way_then_ten_deleted_added_and_renamed(tmp_path, photos):
    """A real SIGKILL, decoding processes and all."""
    for i in range(100, 180):
        paint(photos / f"{i}.png", i)
    command = [sys.executable, str(Path(__file__).parent / "dual.py"), "index", str(photos)]
    command += ["--batch", "4", "--workers", "2", "-o"]
    env = os.environ | {"DUAL_SLOW": "0.15", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, str(tmp_path / "i")], env=env, stderr=subprocess.PIPE)
    listed = tmp_path / "i" / "images.part.jsonl"
    until = time.monotonic() + 60
    while not listed.exists() or listed.read_bytes().count(b"\n") < 40:
        assert time.monotonic() < until, process.stderr.read()
        time.sleep(0.02)
    process.kill()
    process.wait()
    done = listed.read_bytes().count(b"\n")
    assert 40 <= done < 110
    with pytest.raises(UserError, match="unfinished"):
        Index(tmp_path / "i")
    for i in range(100, 110):
        (photos / f"{i}.png").unlink()
        paint(photos / f"new {i}.png", 10 * i)
        (photos / f"{i + 50}.png").rename(photos / f"renamed {i}.png")
    changes = refresh(tmp_path / "i", photos)
    assert changes.embedded <= 110 - done + 10 + 4
    assert contents(tmp_path / "i") == fresh(tmp_path, photos)


def test_files_that_cannot_be_read_are_named_and_left_out(tmp_path, photos, capsys):
    refresh(tmp_path / "i", photos)
    capsys.readouterr()
    for name in ("bad.png", "same.png", "a/0.png"):
        (photos / name).write_bytes(b"nothing")
    (photos / "gone.png").symlink_to(photos / "nowhere.png")
    os.mkfifo(photos / "pipe.png")  # a folder's listing leaves it out
    changes = refresh(tmp_path / "i", photos)
    assert (changes.unreadable, changes.embedded, changes.unchanged) == (4, 0, 29)
    said = capsys.readouterr().err
    for name in ("bad.png", "same.png", "a/0.png", "gone.png"):
        assert said.count(f"skipping {photos / name}: ") == 1
    assert len(Index(tmp_path / "i").images.vectors) == 29
    assert contents(tmp_path / "i") == fresh(tmp_path, photos)
    paths = "".join(f"{photos / name}\n" for name in ("pipe.png", "a", "b/1.png", "b/1.png"))
    process = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "dual.py"), "index", "-", "-o", "j"],
        input=paths, text=True, capture_output=True, cwd=tmp_path,
    )  # fmt: skip
    assert (process.returncode, process.stdout) == (1, "j\n")
    assert "a: it is not a file" in process.stderr
    assert [row.path for row in Index(tmp_path / "j").images.rows()] == [str(photos / "b/1.png")]


def test_batches_are_filled_up_so_that_a_picture_is_embedded_in_one_size(tmp_path, photos):
    model = Dual()
    refresh(tmp_path / "i", photos, model, batch=8)
    assert model.seen == [8, 8, 8, 8]


def test_out_of_memory_halves_the_batch(capsys):
    class Tight(Dual):
        def embed_images(self, pictures):
            if len(pictures) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().embed_images(pictures)

    pictures = list(torch.randint(0, 255, (7, 3, 8, 8), dtype=torch.uint8))
    found = index.embed_images(Tight(), pictures, 7, Pieces("One picture", "use less"))
    np.testing.assert_allclose(found, Dual().embed_images(torch.stack(pictures)), atol=1e-6)
    assert "out of memory" in capsys.readouterr().err


def test_names_that_are_no_text(tmp_path, photos):
    names = [b"line\nbreak.png", b"latin \xe9.png", "schön.png".encode(), b"tab\t.png"]
    for i, name in enumerate(names):
        paint(photos / os.fsdecode(name), 500 + i)
    refresh(tmp_path / "i", photos)
    paths = {os.fsencode(row.path) for row in Index(tmp_path / "i").images.rows()}
    assert paths >= set(names)
    assert refresh(tmp_path / "i", photos).unchanged == 34


@pytest.fixture
def data(tmp_path, photos) -> Path:
    file = tmp_path / "data.jsonl"
    rows = [
        {"image": "photos/a/0.png", "captions": ["a red dog", "a blue  cat"]},
        {"image": "photos/b/1.png", "captions": ["a blue cat"]},
        {"image": "photos/a/0.png", "captions": ["ein roter Hund \ud83d"], "lang": "de"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_captions_of_a_data_set(tmp_path, data):
    changes = refresh(tmp_path / "i", data)
    assert (changes.embedded, changes.captions) == (2, 3)
    found = Index(tmp_path / "i")
    rows = found.captions.rows()
    assert [(row.caption, row.path) for row in rows] == [
        ("a blue cat", "photos/a/0.png"),
        ("a red dog", "photos/a/0.png"),
        ("ein roter Hund ?", "photos/a/0.png"),
    ]
    expected = Dual().embed_texts([row.caption for row in rows])
    np.testing.assert_allclose(found.captions.vectors, expected, atol=1e-6)
    lines = data.read_text().splitlines()
    data.write_text("\n".join([lines[1], lines[0].replace("red", "green")]))
    changes = refresh(tmp_path / "i", data)
    assert (changes.embedded, changes.captions, changes.unchanged) == (0, 1, 2)
    assert contents(tmp_path / "i") == fresh(tmp_path, data)


def test_captions_beside_the_pictures_of_a_folder(tmp_path, photos):
    (photos / "a" / "3.txt").write_text("a white cat\n\n a dog \n")
    refresh(tmp_path / "i", photos)
    rows = Index(tmp_path / "i").captions.rows()
    assert [(row.caption, row.path) for row in rows] == [
        ("a dog", "a/3.png"), ("a white cat", "a/3.png")
    ]  # fmt: skip


def test_an_index_inside_its_folder_moves_with_it(tmp_path, photos):
    refresh(photos / ".tinyvl", photos)
    moved = tmp_path / "elsewhere"
    photos.rename(moved)
    assert Index(moved / ".tinyvl").root == str(moved)
    assert refresh(moved / ".tinyvl", moved).unchanged == 30


def test_an_empty_folder_leaves_the_index_as_it_is(tmp_path, photos):
    refresh(tmp_path / "i", photos)
    photos.rename(tmp_path / "unmounted")
    photos.mkdir()
    before = contents(tmp_path / "i")
    with pytest.raises(UserError, match="no images in this folder"):
        refresh(tmp_path / "i", photos)
    assert contents(tmp_path / "i") == before


def test_mistakes_cost_one_sentence(tmp_path, photos):
    home = tmp_path / "i"
    with pytest.raises(UserError, match="no index there"):
        Index(home)
    refresh(home, photos)
    with pytest.raises(UserError, match=r"m has changed since .*; delete .* index again"):
        refresh(home, photos, Dual("two"))
    with pytest.raises(UserError, match=r"made by another model \(m\)"):
        index.check_model(home, index.read_about(home), Dual("two"), "n")
    with pytest.raises(UserError, match=f"is the index of {photos}"):
        refresh(home, photos / "a")
    with pytest.raises(UserError, match="is a file"):
        Index(photos / "a" / "0.png")
    with pytest.raises(UserError, match="cannot be written"):
        refresh(photos / "a" / "0.png", photos)
    lines = (home / "images.1.jsonl").read_bytes()
    for damage in (lines[:500], lines[:-60], b"[]\n" * 30, None):
        if damage is None:
            (home / "images.1.jsonl").unlink()
        else:
            (home / "images.1.jsonl").write_bytes(damage)
        for use in (lambda: Index(home).images.pick([29]), lambda: refresh(home, photos)):
            with pytest.raises(UserError, match="damaged"):
                use()
    (home / "images.1.jsonl").write_bytes(lines)
    os.truncate(home / "images.1.f32", 40)
    for use in (lambda: Index(home), lambda: refresh(home, photos)):
        with pytest.raises(UserError, match="damaged"):
            use()
    about = json.loads((home / "index.json").read_text())
    (home / "index.json").write_text(json.dumps(about | {"format": 2}))
    with pytest.raises(UserError, match="later tinyvl"):
        Index(home)
    (home / "index.json").write_text('{"format": 1}')
    with pytest.raises(UserError, match="cannot be read"):
        refresh(home, photos)
    (home / "index.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        Index(home)


def test_one_writer_at_a_time(tmp_path, photos):
    refresh(tmp_path / "i", photos)
    hold = (
        "import sys, time; from pathlib import Path; from tinyvl import files\n"
        f"with files.locked(Path({str(tmp_path / 'i')!r}), 'busy'):\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="another process"):
            refresh(tmp_path / "i", photos)
    finally:
        holder.kill()
        holder.wait()
    assert refresh(tmp_path / "i", photos).unchanged == 30


def test_what_a_kill_left_half_written_goes_and_other_files_stay(tmp_path, photos):
    refresh(tmp_path / "i", photos)
    before = contents(tmp_path / "i")
    for name in (".index.json.123", ".images.1.f32.77"):
        (tmp_path / "i" / name).write_text("half")
    mine = tmp_path / "i" / ".my.own.file"
    mine.write_text("mine")
    refresh(tmp_path / "i", photos)
    assert mine.read_text() == "mine"
    mine.unlink()
    assert contents(tmp_path / "i") == before


def test_a_reader_keeps_what_it_opened_while_a_writer_replaces_it(tmp_path, photos, monkeypatch):
    refresh(tmp_path / "i", photos)
    old = Index(tmp_path / "i")
    before, rows = old.images.vectors.copy(), old.images.rows()
    opened = index.open_table

    def slow(folder, about, name):  # the writer ends between index.json and the tables
        monkeypatch.undo()
        (photos / "a" / "0.png").unlink(missing_ok=True)
        refresh(tmp_path / "i", photos)
        return opened(folder, about, name)

    monkeypatch.setattr(index, "open_table", slow)
    new = Index(tmp_path / "i")
    assert (len(new.images.vectors), new.about["generation"]) == (29, 2)
    np.testing.assert_array_equal(old.images.vectors, before)
    assert old.images.rows() == rows


PHOTOS = Path(__file__).parents[2] / "shared" / "data" / "pairs" / "images"


@pytest.mark.slow
@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the photos are not here")
def test_8000_photos_killed_half_way_and_changed(tmp_path):
    """Real photos, towers and commands, bit for bit; untrained and at 96 pixels: minutes."""
    from tinyvl import models
    from tinyvl.presets import SMALL

    row, cpu = SMALL["lilt"], torch.device("cpu")
    options = row.options | {"size": 96}
    torch.manual_seed(0)
    config = models.new_config(
        "lilt", row.language, row.vision, fit=row.fit, prompt="", options=options
    )
    checkpoint, photos, home = tmp_path / "model", tmp_path / "photos", tmp_path / "i"
    checkpoint.mkdir()
    models.save_config(checkpoint, config)
    models.save(models.build(config, device=cpu, precision=torch.float32), checkpoint)
    files = sorted(PHOTOS.iterdir())
    photos.mkdir()
    for file in files[:8000]:
        (photos / file.name).symlink_to(file)

    def command(out: Path) -> list[str]:
        start = [sys.executable, "-m", "tinyvl.cli", "index", str(photos), "-o", str(out)]
        return [*start, "--model", str(checkpoint)]

    process = subprocess.Popen(command(home))
    listed = home / "images.part.jsonl"
    while not listed.exists() or listed.read_bytes().count(b"\n") < 4000:
        assert process.poll() is None
        time.sleep(0.5)
    process.kill()
    process.wait()
    subprocess.run(command(home), check=True)
    for old, new in zip(sorted(photos.iterdir())[:30:3], files[8000:8010], strict=True):
        old.unlink()
        (photos / new.name).symlink_to(new)
    for old in sorted(photos.iterdir())[4000:4010]:
        old.rename(photos / f"renamed {old.name}")
    done = subprocess.run(command(home), check=True, capture_output=True, text=True)
    assert f"{home}: 10 embedded, 10 moved or copied, 7,980 unchanged, 10 gone" in done.stderr
    subprocess.run(command(tmp_path / "fresh"), check=True)
    assert contents(home) == contents(tmp_path / "fresh")
    assert len(Index(home).images.vectors) == 8000
