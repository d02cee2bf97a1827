"""Whatever is thrown at it: mutated data sets, JSON, media; and hostile files through commands.

A reader gives something or raises a `UserError`, in bounded time and memory; a command names each
bad file once and does each good one.
"""

import io
import json
import os
import random
import resource
import struct
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import shell
import torch
import worlds
from PIL import Image
from published import PUBLISHED
from tiny import write_decoder, write_text, write_vision

from tinyvl import UserError, data, draw_av, models
from tinyvl.data_records import line_of
from tinyvl.media import load_image
from tinyvl.media_av import load_frames
from tinyvl.media_sound import load_sound

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

pytestmark = pytest.mark.slow
SECONDS = 30
MANY = settings(
    max_examples=300, deadline=SECONDS * 1000, derandomize=True,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


@st.composite
def mutated(draw, whole: bytes) -> bytes:
    """Bytes with a few places changed, cut out, repeated; or cut short."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at, size = draw(st.integers(0, len(content))), draw(st.integers(0, 40))
        kind = draw(st.sampled_from(["flip", "cut", "repeat", "insert", "end"]))
        if kind == "flip" and at < len(content):
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del content[at : at + size]
        elif kind == "repeat":
            content[at:at] = content[at : at + size] * 3
        elif kind == "insert":
            content[at:at] = draw(st.binary(max_size=8))
        elif kind == "end":
            del content[at:]
    return bytes(content)


def given_or_refused(read: Callable[[], object]) -> None:
    with suppress(UserError):
        read()


# ------------------------------------------------------------------------------ records and JSON


@pytest.mark.parametrize("name", sorted(set(PUBLISHED) - {"classes", "folder"}))
def test_readers_of_records(name, tmp_path):
    path = PUBLISHED[name](tmp_path)[0]
    files = [file for file in tmp_path.rglob("*") if file.is_file() and file.suffix in TEXTS]
    whole = {file: file.read_bytes() for file in files}

    @MANY
    @given(st.data())
    def fuzz(choose) -> None:
        file = choose.draw(st.sampled_from(files))
        file.write_bytes(choose.draw(mutated(whole[file])))
        try:
            for format in (None, name):
                given_or_refused(partial(records, path, format))
        finally:
            file.write_bytes(whole[file])

    fuzz()


TEXTS = (".json", ".jsonl", ".csv", ".tsv", ".txt", ".token")


def records(path: Path, format: str | None) -> list[str]:
    """The lines of a set's records."""
    return [line_of(record, Path("/")) for record in data.read(path, format=format, files=False)]


KEYS = [
    "image", "video", "audio", "captions", "caption", "question", "answers", "answer", "choices",
    "id", "image_id", "split", "lang", "images", "annotations", "file_name", "sentences", "raw",
    "imgid", "cocoid", "filename", "filepath", "sentids", "tokens", "videos", "video_id", "sen_id",
    "regions", "phrase", "questions", "question_id", "category_id", "en", "de", "url",
    "open_images_id", "domain", "label",
]  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["a.jpg", "train", "../../etc/passwd", "\0", "\ud800", "a" * 300]),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=3), inner, max_size=6),
    max_leaves=20,
)  # fmt: skip
OF_JSON = [
    "jsonl", "karpathy", "coco", "nocaps", "visual-genome", "vqa", "gqa", "msrvtt", "msrvtt-qa",
    "msvd", "msvd-qa",
]  # fmt: skip


@pytest.mark.parametrize("format", [None, *OF_JSON])
def test_readers_of_json(format, tmp_path):
    file = tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json"

    @MANY
    @given(JSON, st.booleans())
    def fuzz(value, lines) -> None:
        values = value if lines and isinstance(value, list) else [value]
        file.write_text("\n".join(map(json.dumps, values)))
        given_or_refused(partial(records, file, format))

    fuzz()


# ------------------------------------------------------------------------------ media


def picture(kind: str) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    buffer, image = io.BytesIO(), Image.fromarray(noise)
    more = (
        {"save_all": True, "append_images": [image.rotate(90)]} if kind in ("GIF", "WEBP") else {}
    )
    image.save(buffer, kind, **more)
    return buffer.getvalue()


def clip(folder: Path, sound: bool) -> bytes:
    make = draw_av.draw_sounds if sound else draw_av.draw_videos
    record = make(folder, train=1, held_out=1)[0]
    return (folder / record["audio" if sound else "video"]).read_bytes()


KINDS = ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000", "AVIF", "mp4", "wav"]


@pytest.mark.parametrize("kind", KINDS)
def test_decoding(kind, tmp_path):
    sound, video = kind == "wav", kind == "mp4"
    whole = clip(tmp_path / "clips", sound) if sound or video else picture(kind)
    file = tmp_path / f"a.{kind.lower()}"

    @MANY
    @given(mutated(whole))
    def fuzz(content) -> None:
        file.write_bytes(content)
        if sound:
            given_or_refused(lambda: load_sound(file, 2))
        else:
            given_or_refused(lambda: load_frames(file, 3))
            if not video:
                given_or_refused(lambda: load_image(content, 16))

    fuzz()


# ------------------------------------------------------------------------------ commands


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def hostile(folder: Path) -> tuple[list[str], list[str]]:
    """Files called pictures; -> the paths of those that can be read, and of those that cannot."""
    folder.mkdir()
    whole, chance = picture("PNG"), random.Random(12)
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)
    bomb += chunk(b"IDAT", zlib.compress(bytes(10_000_000), 9)) + chunk(b"IEND", b"")
    good = {
        "plain.png": whole, "a name\nof two lines.png": whole, "猫 \U0001f408.png": whole,
        os.fsdecode(b"latin-\xe9.png"): whole, "-dash.png": whole, "a\ttab.png": whole,
        "[x].png": whole, "gif.jpg": picture("GIF"), "%d.png": whole, "jpeg.png": picture("JPEG"),
    }  # fmt: skip
    bad = {
        "empty.png": b"", "text.jpg": b"not a picture", "bomb.png": bomb, "cut.png": whole[:-300],
        "cut.gif": picture("GIF")[:30], "noise.webp": chance.randbytes(5000),
        "zeros.tif": bytes(5000), "script.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n(x) run\n",
        "pickle.png": b"\x80\x04cos\nsystem\n(S'touch ran'\ntR.", "page.bmp": b"<svg/>",
        "list.png": b"#EXTM3U\n/etc/passwd\n", "nan.jp2": b"\0\0\0\x0cjP  \r\n\x87\n" * 40,
    }  # fmt: skip
    for name, content in {**good, **bad}.items():
        (folder / name).write_bytes(content)
    os.mkfifo(folder / "pipe.png")  # would block whoever opens it
    (folder / "folder.png").mkdir()
    (folder / "loop.png").symlink_to("loop.png")
    return [str(folder / name) for name in good], [
        str(folder / name) for name in [*bad, "loop.png"]
    ]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("home")
    texts = ["a red dog", "what is this? Answer: dog"]
    parts = {
        "decoder": str(write_decoder(root / "lm", "gpt2", texts)),
        "text": str(write_text(root / "text", texts)),
    }
    vision = str(write_vision(root / "vision"))
    for name, method, side, options in (
        ("caption", "itune", "decoder", {}),
        ("ask", "epalm", "decoder", {"task": "vqa", "soft": 2}),
        ("search", "lilt", "text", {"embed": 16}),
    ):
        config = models.new_config(
            method, parts[side], vision, fit="squash", prompt="", options=options
        )
        model = models.build(config, device=torch.device("cpu"), precision=torch.float32)
        (root / name).mkdir()
        models.save_config(root / name, config)
        models.save(model, root / name)
    return root


@pytest.mark.parametrize("command", ["caption", "ask", "features", "index", "train"])
def test_hostile_files_through_commands(command, home, tmp_path):
    good, bad = hostile(tmp_path / "in")
    lines = [{"image": path, "captions": ["a red dog"]} for path in good + bad]
    listed = worlds.write_lines(tmp_path / "set.jsonl", lines)
    decoding, vision = ["--beams", 1, "--max-tokens", 4], ["--vision", home / "vision"]
    out, common = tmp_path / "out", ["--device", "cpu"]
    arguments = {
        "caption": ["caption", tmp_path / "in", "--model", home / "caption", "--json", *decoding],
        "ask": ["ask", tmp_path / "in", "what is this?", "--model", home / "ask", "--json",
                *decoding],
        "features": ["features", listed, *vision, "--fit", "squash", "-o", out],
        "index": ["index", tmp_path / "in", "--model", home / "search", "-o", out],
        "train": ["train", "itune", "--data", listed, "--lm", home / "lm", *vision, "--fit",
                  "squash", "--epochs", 2, "--batch", 4, "--out", out],
    }  # fmt: skip
    begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    done = shell.run(*arguments[command], *common)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert time.monotonic() - begun < SECONDS * (1 + ("PYTEST_XDIST_WORKER" in os.environ))
    assert memory < 2**20  # kilobytes
    assert "Traceback" not in done.stderr
    for path in bad:
        said = [line for line in done.stderr.splitlines() if f"{path}:" in line]
        assert len(said) == 1, (path, said)
    assert done.returncode == (0 if command == "train" else 1)
    if command in ("caption", "ask"):
        found = {
            line["path"]
            for line in map(json.loads, done.stdout.splitlines())
            if "error" not in line
        }
        assert found == set(good)
    elif command == "features":
        assert json.loads(done.stdout)["extracted"] == len(good)


def test_hostile_clips_and_sounds(tmp_path):
    """What calls itself a video or a sound; each costs a sentence, or gives what is in it."""
    wave = clip(tmp_path / "sounds", True)
    for name, content in {
        "empty.wav": b"", "noise.mp3": random.Random(1).randbytes(9000), "text.mp4": b"hello",
        "header.wav": wave[:44], "cut.mp4": clip(tmp_path / "videos", False)[:700],
        "list.ts": b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n", "script.avi": b"ffconcat version 1.0\n",
        "picture.flac": picture("PNG"), "lying.wav": wave[:4] + b"\xff" * 4 + wave[8:],
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
        begun = time.monotonic()
        given_or_refused(lambda name=name: load_sound(tmp_path / name, 2))
        given_or_refused(lambda name=name: load_frames(tmp_path / name, 2))
        assert time.monotonic() - begun < SECONDS
    assert av.__version__  # FFmpeg is still alive
