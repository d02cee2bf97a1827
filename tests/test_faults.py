"""Faults of the place: full disks, folders that cannot be written or vanish, locks, signals, pipes.

A command that meets one ends with one sentence and status 1, and what was there before stays; the
same command then goes on to what it would have made without the fault.
"""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import pytest
import shell
import torch
import worlds
from dual import Dual
from PIL import Image
from tiny import write_captioner
from worlds import job, run, steps

from tinyvl import UserError, files, hub_wheels, index, index_source, media, train, write
from tinyvl import evaluate_predictions as predictions
from tinyvl.decode import Style
from tinyvl.files import Unmarked

FULL = "File too large|No space left"


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: as a full disk, for this process alone."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def closed() -> Path:
    """A folder in which nobody can write: root could in any other."""
    folder = Path("/sys/kernel")
    if not folder.is_dir():
        pytest.skip("no folder that not even root can write to")
    return folder


@pytest.fixture(scope="module")
def captioner(tmp_path_factory) -> Path:
    return write_captioner(tmp_path_factory.mktemp("captioner"), ["a red dog runs"])


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    worlds.paint(root, 40)
    return root


def one_sentence(done: subprocess.CompletedProcess, status: int, words: str = "") -> None:
    said = [line for line in done.stderr.splitlines() if line.startswith("tinyvl: ")]
    assert (done.returncode, len(said)) == (status, 1), done.stderr
    assert "Traceback" not in done.stderr
    assert words in said[0]


# ------------------------------------------------------------------------------ writing


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory) -> dict[str, bytes]:
    """The weights of a run of one epoch that meets no fault."""
    out = tmp_path_factory.mktemp("whole")
    train.train(job(world, epochs=1), run(out))
    return worlds.files(out)


@pytest.mark.parametrize("size", [5_000, 60_000])  # features, a state
def test_training_on_a_full_disk(world, whole, tmp_path, size):
    short = job(world, epochs=1)
    with disk_of(size), pytest.raises(UserError, match=FULL):
        train.train(short, run(tmp_path / "parts"))
    assert not list((tmp_path / "parts").glob(".*.safetensors*"))
    again = (tmp_path / "parts" / "config.json").exists()
    train.train(short, run(tmp_path / "parts", resume=again))
    assert worlds.files(tmp_path / "parts") == whole


def test_features_on_a_full_disk(photos, world, tmp_path):
    pictures = [(str(path), path.name) for path in sorted(photos.iterdir())]
    vision = Path(world["vision"])
    worlds.fill(tmp_path / "parts", pictures[:20], vision)
    before = worlds.content(tmp_path / "parts")
    with disk_of(20_000), pytest.raises(UserError, match=FULL):
        worlds.fill(tmp_path / "parts", pictures, vision)
    assert worlds.content(tmp_path / "parts") == before
    assert worlds.fill(tmp_path / "parts", pictures, vision)["extracted"] == 20


def refresh(folder: Path, photos: Path, model: Dual | None = None) -> index.Changes:
    source = index_source.read_source(str(photos))
    return index.update(folder, source, model or Dual(), name="m", batch=4, workers=0)


def test_an_index_on_a_full_disk(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "in")
    for path in sorted((tmp_path / "in").iterdir())[30:]:
        path.rename(tmp_path / path.name)
    refresh(tmp_path / "i", tmp_path / "in")
    before = index.Index(tmp_path / "i").images.rows()
    for path in tmp_path.glob("*.png"):
        path.rename(tmp_path / "in" / path.name)
    with disk_of(2000), pytest.raises(UserError, match=FULL):
        refresh(tmp_path / "i", tmp_path / "in")
    assert index.Index(tmp_path / "i").images.rows() == before
    refresh(tmp_path / "i", tmp_path / "in")
    refresh(tmp_path / "whole", tmp_path / "in")
    found = [index.Index(tmp_path / name).images for name in ("i", "whole")]
    assert found[0].rows() == found[1].rows()
    assert found[0].vectors.tobytes() == found[1].vectors.tobytes()


def test_captions_on_a_full_disk(captioner, photos, tmp_path):
    out = tmp_path / "out.jsonl"
    command = ["caption", photos, "--model", captioner, "--json", "--beams", 1, "--max-tokens", 4]
    with disk_of(2000):
        done = shell.run(*command, "-o", out)
    one_sentence(done, 1, "out.jsonl: cannot be written")
    assert 0 < out.stat().st_size <= 2000
    assert shell.run(*command, "-o", out, "--resume").returncode == 0
    assert out.read_text() == shell.run(*command).stdout


@pytest.mark.parametrize("command", ["--version", "models --json", "--help"])
def test_standard_output_on_a_full_disk(command):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "tinyvl.cli", *command.split()],
            stdout=full, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert done.stderr == "tinyvl: the output: No space left on device\n"
    assert done.returncode == 1


@pytest.mark.parametrize("what", ["train", "features", "index", "caption", "eval", "convert"])
def test_a_folder_that_cannot_be_written(what, closed, world, captioner, photos, tmp_path):
    out = closed / "tinyvl"
    data = worlds.write_lines(tmp_path / "d.jsonl", [{"image": str(photos / "000.png"), "captions": ["a"]}])  # fmt: skip  # noqa: E501
    vision = ["--vision", world["vision"], "--fit", "crop", "--device", "cpu"]
    command = {
        "train": ["train", "itune", "--data", data, "--lm", world["language"], *vision,
                  "--out", out],
        "features": ["features", data, *vision, "-o", out],
        "caption": ["caption", photos / "000.png", "--model", captioner, "-o", out],
        "eval": ["eval", "caption", captioner, data, "--metrics", "BLEU-1", "-o", out],
        "convert": ["data", "convert", data, "-o", out],
    }  # fmt: skip
    if what == "index":
        with pytest.raises(UserError, match=r"cannot be (made|written)"):
            refresh(out, photos)
        return
    done = shell.run(*command[what])
    one_sentence(done, 1 if what == "convert" else 2, "cannot be")


def test_a_folder_that_vanishes(world, photos, tmp_path):
    def gone(name: str, ready: Callable[[], bool]) -> worlds.When:
        def check() -> bool:
            if ready():
                shutil.rmtree(tmp_path / name, ignore_errors=True)
            return False

        return worlds.When(check)

    hook = gone("t", lambda: steps(tmp_path / "t") > 2)
    with pytest.raises(UserError, match="cannot be written"):
        train.train(job(world, epochs=1), run(tmp_path / "t", stop=hook))
    pictures = [(str(path), path.name) for path in sorted(photos.iterdir())]
    with pytest.raises((UserError, OSError), match=r"cannot be written|No such file"):
        worlds.fill(tmp_path / "f", pictures, Path(world["vision"]), gone("f", lambda: True))

    class Removes(Dual):
        def embed_images(self, pictures: torch.Tensor) -> torch.Tensor:
            shutil.rmtree(tmp_path / "i", ignore_errors=True)
            return super().embed_images(pictures)

    with pytest.raises(UserError, match="cannot be written"):
        refresh(tmp_path / "i", photos, Removes())


# ------------------------------------------------------------------------------ locks


@contextmanager
def held(file: Path) -> Iterator[None]:
    """Another process holds the lock of a file, and is then killed."""
    code = (
        "import sys, time; from pathlib import Path; from tinyvl import files\n"
        "file = open(sys.argv[1], 'a'); files.hold(file, Path(), '')\nprint('held', flush=True)\n"
        "time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(file)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        yield
    finally:
        holder.kill()
        holder.communicate()


def test_one_writer_of_a_run_of_predictions_and_of_captions(world, tmp_path):
    for name in ("run", "eval"):
        (tmp_path / name).mkdir()
    predictions.Log(tmp_path / "eval", {"a": 1}).stream.close()
    (tmp_path / "out.tsv").write_text("a.png\ta dog\n")

    def trained() -> None:
        train.train(job(world, epochs=0.1), run(tmp_path / "run"))

    def logged() -> None:
        predictions.Log(tmp_path / "eval", {"a": 1}, resume=True).stream.close()

    def kept(folder: Path) -> dict[Path, bytes]:
        files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
        return {path: path.read_bytes() for path in files}

    def written() -> None:
        write.open_output(tmp_path / "out.tsv", True)[0].close()

    for file, use in (
        (tmp_path / "run" / ".lock", trained),
        (tmp_path / "eval" / "predictions.jsonl", logged),
        (tmp_path / "out.tsv", written),
    ):
        before = kept(file.parent)
        with held(file):
            with pytest.raises(UserError, match=r"another process is .*; wait until it has ended"):
                use()
            assert kept(file.parent) == before
        use()  # a dead process holds nothing


def test_locks_on_windows(tmp_path, monkeypatch):
    """Without ``fcntl`` a byte far behind the end is locked by ``msvcrt``."""
    taken = set()

    class Msvcrt:
        LK_NBLCK = 2

        @staticmethod
        def locking(descriptor: int, mode: int, count: int) -> None:
            place = os.fstat(descriptor).st_ino, os.lseek(descriptor, 0, os.SEEK_CUR)
            if place in taken:
                raise PermissionError(13, "Permission denied")
            taken.add(place)

    monkeypatch.setitem(sys.modules, "fcntl", None)  # as if there were none
    monkeypatch.setitem(sys.modules, "msvcrt", Msvcrt)
    with (
        files.locked(tmp_path, "busy"),
        pytest.raises(UserError, match="busy; wait"),
        files.locked(tmp_path, "busy"),
    ):
        raise AssertionError
    with (tmp_path / "a").open("a") as file:
        files.hold(file, tmp_path, "busy")
        file.write("text")
    assert (tmp_path / "a").read_text() == "text"
    assert {at for _, at in taken} == {2**30}


# ------------------------------------------------------------------------------ signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_training_saves_first(number, world, whole, tmp_path):
    sent, short = [], job(world, epochs=1)

    def send() -> bool:
        if steps(tmp_path / "parts") == 3 and not sent:
            sent.append(number)
            os.kill(os.getpid(), number)
        return bool(list.__len__(asked.stop))

    asked = run(tmp_path / "parts", stop=worlds.When(send))
    with pytest.raises(UserError, match="stopped and saved; continue with --resume"):
        train.train(short, asked)
    assert steps(tmp_path / "parts") == 3
    train.train(short, run(tmp_path / "parts", resume=True))
    assert worlds.files(tmp_path / "parts") == whole


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_other_commands_end_at_once(number, monkeypatch):
    def samples(folder: Path) -> list[Path]:
        os.kill(os.getpid(), number)
        time.sleep(5)
        return []

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    monkeypatch.setattr(hub_wheels, "samples", samples)
    done = shell.run("samples")
    assert (done.returncode, done.stderr) == (130, "")


# ------------------------------------------------------------------------------ pipes


class Blind:
    """A model that says one thing of every picture."""

    class encoder:
        size = 8
        view = staticmethod(lambda: lambda picture: torch.zeros(3, 8, 8, dtype=torch.uint8))

    def caption(self, pictures: torch.Tensor, **options: object) -> list[tuple[str, float]]:
        return [("a dog", -1.0)] * len(pictures)


class Endless:
    """Standard input that never ends: the same few paths again and again."""

    def __init__(self, *paths: object, turns: int = 10**9):
        self.lines, self.left = "".join(f"{p}\n" for p in paths).encode(), turns

    def read(self, size: int) -> bytes:
        self.left -= 1
        return self.lines if self.left >= 0 else b""


def captions(stdin: Endless) -> Iterator[tuple]:
    paths = media.expand(["-"], Unmarked(stdin))
    return write.captions(Blind(), paths, style=Style(), workers=0)


def test_an_endless_input_is_streamed_in_constant_memory(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    found = captions(Endless(tmp_path / "a.png", tmp_path / "none.png"))
    peaks = []
    tracemalloc.start()
    try:
        for _ in range(3):
            tracemalloc.reset_peak()
            part = list(islice(found, 300))
            assert [text == "a dog" for _, text, _ in part] == [True, False] * 150
            peaks.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()
        found.close()
    assert peaks[2] < peaks[0] + 200_000


@pytest.mark.slow
def test_a_hundred_thousand_paths(tmp_path):
    names = [tmp_path / f"{i}.png" for i in range(10)]
    tracemalloc.start()
    count = sum(
        isinstance(text, UserError) for _, text, _ in captions(Endless(*names, turns=10**4))
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 100_000
    assert peak < 20_000_000


PLAIN = {
    "LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "COLUMNS": "40",
    "NO_COLOR": "1", "TERM": "dumb",
}  # fmt: skip


@pytest.mark.parametrize(
    "command", ["--help", "train itune --help", "models", "data check é.jsonl"]
)
def test_no_terminal_no_colour_c_locale_40_columns(command, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")  # JSON's other names are no names there
    worlds.write_lines(tmp_path / "é.jsonl", [{"image": "a.png", "captions": ["une idée"]}])
    done = subprocess.run(
        [sys.executable, "-m", "tinyvl.cli", *command.split()],
        env=os.environ | PLAIN, cwd=tmp_path, capture_output=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    out, err = done.stdout.decode(), done.stderr.decode()  # UTF-8, whatever the locale says
    assert (done.returncode, "\x1b" in out + err, "Traceback" in err) == (0, False, False), err
    if command.endswith("--help"):
        assert max(map(len, out.splitlines())) <= 40


def test_a_reader_that_closes_early_ends_every_command_quietly():
    command = f"{sys.executable} -m tinyvl.cli models --json | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (len(done.stdout.splitlines()), done.stderr) == (1, "")
