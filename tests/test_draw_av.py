"""The drawn videos and sounds show what their captions say, the same for the same seed."""

import hashlib
import json
import wave
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tinyvl import UserError, data, draw_av, media_av

MAKE = {"video": draw_av.draw_videos, "audio": draw_av.draw_sounds}
FOLDER = {"video": "videos", "audio": "sounds"}


@pytest.mark.parametrize("modality", MAKE)
def test_the_same_seed_draws_the_same(modality, tmp_path):
    one = MAKE[modality](tmp_path / "a", train=5, held_out=3)
    MAKE[modality](tmp_path / "b", train=5, held_out=3)
    MAKE[modality](tmp_path / "c", train=5, held_out=3, seed=1)
    files = {
        name: {p.name: p.read_bytes() for p in (tmp_path / name / FOLDER[modality]).iterdir()}
        for name in "abc"
    }
    assert files["a"] == files["b"]
    assert len(set(files["a"].values())) == 8
    assert not set(files["a"].values()) & set(files["c"].values())
    lines = (tmp_path / "a/drawn.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == one
    assert [r["split"] for r in one] == ["train"] * 5 + ["test"] * 3
    shown = {r["captions"][0] for r in one[:5]}
    held = [r["captions"][0] for r in one[5:]]
    assert set(held) <= shown
    assert len(set(held)) == 3
    assert len(data.read(tmp_path / "a", split="train")) == 5
    for record in one:
        known = {draw_av.Motion: ("shape", "colour", "move"),
                 draw_av.Signal: ("kind", "pitch", "bend", "times")}  # fmt: skip
        kind = draw_av.Motion if modality == "video" else draw_av.Signal
        thing = kind(**{name: record[name] for name in known[kind]})
        assert record["captions"] == [thing.caption()]
        assert (record["question"], record["answers"][0]) in thing.questions()


DIGESTS = {"video": "f293690e73416a25", "audio": "b400cfbb8ebfe08e"}


@pytest.mark.parametrize("modality", DIGESTS)
def test_the_default_sets_stay_what_they_are(modality, tmp_path):
    """Listing, frames and samples; of pictures, test_draw.py compares the shipped set."""
    records = MAKE[modality](tmp_path, train=30, held_out=15)
    digest = hashlib.sha256((tmp_path / "drawn.jsonl").read_bytes())
    for i, record in enumerate(records):
        if modality == "video":
            motion = draw_av.Motion(record["shape"], record["colour"], record["move"])
            digest.update(draw_av.render_video(motion, 0, i).tobytes())
        else:
            digest.update((tmp_path / record["audio"]).read_bytes())
    assert digest.hexdigest()[:16] == DIGESTS[modality]


@pytest.mark.parametrize("move", draw_av.MOVES)
def test_a_shape_moves_where_its_caption_says(move, tmp_path):
    motion = draw_av.Motion("circle", "black", move)
    draw_av.write_video(tmp_path / "a.avi", motion, 0, 3)
    frames = [np.asarray(f).astype(int) for f in media_av.load_frames(tmp_path / "a.avi", 8)]
    expected = draw_av.render_video(motion, 0, 3)
    assert all(np.array_equal(a, b) for a, b in zip(frames, expected, strict=True))
    centres = []
    for frame in frames:
        ys, xs = np.nonzero(frame.sum(-1) < 150)
        centres.append((xs.mean(), ys.mean()))
    way = np.array(centres[-1]) - centres[0]
    side = {"left": (-36, 0), "right": (36, 0), "up": (0, -36), "down": (0, 36)}
    assert np.abs(way - side.get(move, (0, 0))).max() < 2


def bursts(sound: np.ndarray) -> list[np.ndarray]:
    loud = np.abs(sound).reshape(-1, 160).max(1) > 2000  # by hundredths of a second
    edges = np.flatnonzero(np.diff(np.r_[False, loud, False].astype(int)))
    return [sound[a * 160 : b * 160] for a, b in zip(edges[::2], edges[1::2], strict=True)]


def hertz(piece: np.ndarray) -> float:
    spectrum = np.abs(np.fft.rfft(piece * np.hanning(len(piece)), 16000))
    return float(spectrum.argmax())


@pytest.mark.parametrize("index", range(12))
def test_a_sound_is_what_its_caption_says(index):
    rng = np.random.default_rng(index)
    known = (draw_av.KINDS, draw_av.PITCHES, draw_av.BENDS, draw_av.TIMES)
    signal = draw_av.Signal(*(list(each)[rng.integers(len(each))] for each in known))
    sound = draw_av.render_sound(signal, 0, index).astype(float)
    pieces = bursts(sound)
    assert len(pieces) == 1 + draw_av.TIMES.index(signal.times)
    for piece in pieces:
        first, last = hertz(piece[160:1000]), hertz(piece[-1000:-160])
        bend = last / first
        assert {"holds": 0.95 < bend < 1.05, "rises": bend > 1.2, "falls": bend < 0.85}[signal.bend]
        assert first / draw_av.PITCHES[signal.pitch] == pytest.approx(1, abs=0.17)
        held = piece[:800]
        spectrum = np.abs(np.fft.rfft(held * np.hanning(len(held)), 16000))
        at = round(3 * hertz(held))
        third = spectrum[at - 150 : at + 150].max() / spectrum.max()
        assert (third > 0.12) == (signal.kind == "buzz")


def test_files_of_others_are_left_alone(tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos/mine.avi").write_bytes(b"")
    with pytest.raises(UserError, match="name an empty folder"):
        draw_av.draw_videos(tmp_path, train=2, held_out=1)
    draw_av.draw_sounds(tmp_path / "sounds", train=2, held_out=1)
    listing = (tmp_path / "sounds/drawn.jsonl").read_bytes()
    with pytest.raises(UserError, match="name an empty folder"):
        draw_av.draw_videos(tmp_path / "sounds", train=2, held_out=1)
    assert (tmp_path / "sounds/drawn.jsonl").read_bytes() == listing


def test_each_modality_has_its_default_set(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYVL_CACHE", str(tmp_path))
    small = {"train": 2, "held_out": 1}
    for modality, make in draw_av.DRAW.items():
        monkeypatch.setitem(draw_av.DRAW, modality, partial(make, **small))
    for modality in draw_av.DRAW:
        folder = draw_av.default_folder(modality)
        assert folder.parent == Path(tmp_path)
        assert {r.modality for r in data.read(folder)} == {modality}


def test_a_wave_is_16_khz_mono(tmp_path):
    draw_av.write_sound(tmp_path / "a.wav", draw_av.Signal("buzz", "low", "falls", "once"), 0, 0)
    with wave.open(str(tmp_path / "a.wav")) as file:
        assert (file.getframerate(), file.getnchannels(), file.getnframes()) == (16000, 1, 16000)
