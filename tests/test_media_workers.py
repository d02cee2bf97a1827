"""The workers that decode ahead."""

import faulthandler
import io
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_media import encoded, photo, scene

from tinyvl import media_workers
from tinyvl.media import MediaError, expand
from tinyvl.media_workers import decode_images


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (3, H, W)


def awkward(image: Image.Image) -> torch.Tensor:
    """Sleeps, raises or dies as the picture's first pixel says."""
    red, green, _ = image.getpixel((0, 0))
    if red == 1:
        os._exit(7)
    if red == 2:
        faulthandler.disable()  # pytest's, which would print
        os.kill(os.getpid(), signal.SIGSEGV)
    if red == 3:
        raise ValueError("not this one")
    if red == 4:
        sys.exit(9)
    time.sleep(green / 1000)
    return to_tensor(image)


@pytest.fixture
def pictures(tmp_path):
    """Makes pictures of one colour; awkward() acts on red, sleeps green milliseconds."""

    def make(*colours: tuple[int, int]) -> list[str]:
        paths = []
        for i, (red, green) in enumerate(colours):
            paths.append(str(tmp_path / f"{i:03}.png"))
            Image.new("RGB", (8, 6), (red, green, i % 256)).save(paths[-1])
        return paths

    return make


def children_of(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError):  # a thread that ended meanwhile
            found += map(int, (task / "children").read_text().split())
    return found


@pytest.fixture
def children():
    """The processes forked from this one and not reaped; a test must leave none."""

    if not Path("/proc/self/task").exists():
        pytest.skip("needs /proc")
    assert children_of(os.getpid()) == []
    yield lambda: children_of(os.getpid())
    assert children_of(os.getpid()) == []


def test_decode_order(pictures, children):
    rng = random.Random(0)
    paths = pictures(*((0, rng.randrange(30)) for _ in range(40)))
    results = list(decode_images(paths, awkward, workers=3, lookahead=7))
    assert [path for path, _ in results] == paths
    for i, (_, tensor) in enumerate(results):
        assert (tensor.dtype, tensor.shape) == (torch.uint8, (3, 6, 8))
        assert tensor[2, 0, 0] == i
        tensor.add_(1)  # it is ours to write to


def test_workers_change_nothing(tmp_path, children):
    paths = [str(tmp_path / name) for name in "abcdefgh"]
    for i, path in enumerate(paths[:5]):
        photo(300 + i, 200, i).save(path, "JPEG")
    Path(paths[5]).write_bytes(b"not a picture")
    Path(paths[6]).write_bytes(Path(paths[0]).read_bytes()[:500])
    options = {"target": 50, "transform": to_tensor}
    here = list(decode_images(paths, workers=0, **options))
    assert sum(isinstance(result, MediaError) for _, result in here) == 3
    for workers in (2, None):
        there = list(decode_images(paths, workers=workers, **options))
        for (path, a), (same, b) in zip(here, there, strict=True):
            assert path == same
            assert str(a) == str(b) if isinstance(a, MediaError) else torch.equal(a, b)


def test_a_failing_or_dying_picture_costs_only_itself(pictures, children):
    bad = {2: 1, 5: 3, 6: 2, 7: 4, 11: 1}
    paths = pictures(*((bad.get(i, 0), 2) for i in range(14)))
    results = list(decode_images(paths, awkward, workers=2))
    assert [path for path, _ in results] == paths
    for i, (path, result) in enumerate(results):
        assert isinstance(result, MediaError) == (i in bad)
        if i in bad:
            assert str(result).startswith(f"{path}: ")
    said = {i: str(results[i][1]) for i in bad}
    assert "crashed (exit status 7)" in said[2]
    assert "the transform failed (ValueError: not this one)" in said[5]
    assert "crashed (SIGSEGV)" in said[6]
    assert "crashed (exit status" in said[7]
    (_, result), *_ = decode_images(paths[5:6], awkward, workers=0)
    assert str(result) == said[5]


def test_a_worker_killed_between_pictures_costs_nothing(pictures, children):
    paths = pictures(*[(0, 1)] * 12)
    results = decode_images(paths, awkward, workers=1, lookahead=1)
    for _ in paths[:-1]:
        next(results)
        for pid in children():
            os.kill(pid, signal.SIGKILL)
    assert isinstance(next(results)[1], torch.Tensor)
    assert list(results) == []


def test_slow_paths_hold_nothing_back(pictures, children):
    paths = pictures(*[(0, 0)] * 8)
    go_on = threading.Event()

    def slow():
        yield from paths[:6]
        assert go_on.wait(20)  # only the consumer, having had all six, lets this continue
        yield from paths[6:]

    for workers in (2, None):
        go_on.clear()
        results = decode_images(slow(), to_tensor, workers=workers)
        assert [next(results)[0] for _ in range(6)] == paths[:6]
        go_on.set()
        assert [path for path, _ in results] == paths[6:]


def test_lookahead_is_bounded(pictures, children):
    (path,) = pictures((0, 0))
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield path

    results = decode_images(endless(), to_tensor, workers=2, lookahead=5)
    for done in range(1, 30):
        next(results)
        if done % 10 == 0:
            time.sleep(0.1)
        assert taken <= done + 5 + 1
    deadline = time.monotonic() + 10
    while taken < 29 + 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert taken >= 29 + 5  # and it does look ahead
    results.close()


def test_closing_early_is_prompt(pictures, children):
    paths = pictures((0, 0), *[(0, 255)] * 40)
    for never in (False, True):  # with paths left, and waiting for a path that never comes

        def source(never=never):
            yield from paths[:3] if never else paths
            threading.Event().wait()

        before = threading.active_count()
        results = decode_images(source(), awkward, workers=2, lookahead=5)
        next(results)
        assert len(children()) == 2
        time.sleep(0.1)  # the reader is as far ahead as it may be
        start = time.perf_counter()
        results.close()
        assert time.perf_counter() - start < 3
        assert children() == []
        deadline = time.monotonic() + 5
        while threading.active_count() > before + never and time.monotonic() < deadline:
            time.sleep(0.01)
        assert threading.active_count() == before + never  # who waits for a path cannot be stopped


def test_few_pictures_start_no_process(pictures, children, monkeypatch):
    monkeypatch.setattr(media_workers, "_Worker", None)
    paths = pictures(*[(0, 0)] * 4)
    assert [path for path, _ in decode_images(paths, to_tensor)] == paths
    assert list(decode_images([], to_tensor)) == []
    assert list(decode_images([], to_tensor, workers=2)) == []


@pytest.mark.parametrize("workers", [0, 2, None])
def test_what_the_paths_raise_comes_in_its_turn(pictures, children, workers):
    paths = pictures(*[(0, 5)] * 6)

    def failing():
        yield from paths
        raise MediaError("empty: no images in this folder")

    seen = []
    with pytest.raises(MediaError, match="no images"):
        seen.extend(path for path, _ in decode_images(failing(), awkward, workers=workers))
    results = decode_images(failing(), awkward, workers=workers)
    assert [next(results)[0] for _ in paths] == paths


def test_workers_after_parallel_torch(pictures, children):
    def transform(image: Image.Image) -> torch.Tensor:
        assert torch.get_num_threads() == 1
        tall = to_tensor(image)[None].float()
        return torch.nn.functional.interpolate(tall, size=(512, 512), mode="bilinear")[0].byte()

    before = torch.get_num_threads()
    torch.set_num_threads(2)  # starts the parent's OpenMP threads, which no fork inherits
    try:
        torch.randn(512, 512) @ torch.randn(512, 512)
        torch.randn(1 << 20).exp().sum()
        for _, tensor in decode_images(pictures(*[(0, 0)] * 6), transform, workers=2):
            assert tensor.shape == (3, 512, 512)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_no_warning_reaches_the_user(pictures, children):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
        assert len(list(decode_images(pictures(*[(0, 0)] * 6), to_tensor, workers=2))) == 6


def test_undecodable_name_decodes(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.png"
    try:
        Path(os.fsdecode(path)).write_bytes(encoded(scene(), "PNG"))
    except OSError:
        pytest.skip("this file system wants UTF-8 names")
    (name,) = expand(["-"], io.BytesIO(path + b"\n"))
    for workers in (0, 1):
        (got, tensor), *_ = decode_images([name], to_tensor, workers=workers)
        assert got == name
        assert tensor.shape == (3, 64, 96)


PROGRAM = """
import os, signal, numpy, torch
from tinyvl.media import expand
from tinyvl.media_workers import decode_images

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

def transform(image):
    if image.getpixel((0, 0))[0] == 1:
        os._exit(1)
    return torch.from_numpy(numpy.array(image)).permute(2, 0, 1)

for path, result in decode_images(expand(["-"]), transform, workers=2):
    print(path, flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and process groups")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL, None])
def test_the_whole_program_ends(pictures, how):
    """Control-C (to the group, as a terminal sends it), a kill, and the end of the input."""
    paths = pictures((0, 0), (1, 0), (0, 0))
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for path in paths:
        program.stdin.write(f"{path}\n")
        program.stdin.flush()
        # While standard input stays open; and the worker that dies on the second is replaced while
        # a thread reads there.
        assert program.stdout.readline() == f"{path}\n"
    workers = children_of(program.pid)
    assert len(workers) == 2
    if how == signal.SIGINT:
        os.killpg(program.pid, how)
    elif how == signal.SIGKILL:
        program.kill()
    else:
        program.stdin.close()
    code = program.wait(60)
    errors = program.stderr.read()
    if how != signal.SIGINT:
        assert (code, errors) == (-how if how else 0, "")
    else:
        assert code == -signal.SIGINT
        assert errors.count("Traceback") == 1  # the program's own, none of a worker
        assert "Fatal Python error" not in errors
    deadline = time.monotonic() + 5
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(alive, workers))
    program.stdout.close()
    program.stderr.close()
    with suppress(BrokenPipeError):
        program.stdin.close()


def alive(pid: int) -> bool:
    """Not gone and not a zombie (an orphan is reaped by the system's first process, or not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
