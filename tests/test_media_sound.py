"""Sounds, and spectrograms against transformers' extractors."""

import random
import struct
import wave
from pathlib import Path

import av
import numpy as np
import pytest
import transformers

from tinyvl import draw_av, media_sound, media_workers
from tinyvl.media import MediaError


def write_wave(path: Path, samples: np.ndarray, rate: int = 16000, channels: int = 1) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return path


def sine(seconds: float, hertz: float = 440, rate: int = 16000) -> np.ndarray:
    return 12000 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def test_samples_are_as_written(tmp_path):
    path = write_wave(tmp_path / "a.wav", sine(1.5))
    found = media_sound.load_sound(path, 10)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, sine(1.5).astype("<i2") / 32768, atol=1e-6)
    assert len(media_sound.load_sound(path, 0.5)) == 8000


def test_other_rates_and_channels_become_16_khz_mono(tmp_path):
    one, other = sine(1, 440, 44100), sine(1, 880, 44100)
    path = write_wave(tmp_path / "a.wav", np.stack([one, other], 1).ravel(), 44100, 2)
    found = media_sound.load_sound(path, 10)
    assert abs(len(found) - 16000) < 50
    middle = slice(2000, 14000)
    expected = (sine(1, 440) + sine(1, 880))[: len(found)] / 2 / 32768
    np.testing.assert_allclose(found[middle], expected[middle], atol=0.01)


def test_only_the_beginning_of_a_long_sound_is_decoded(tmp_path, monkeypatch):
    path = write_wave(tmp_path / "long.wav", sine(120))
    frames = [0]
    resampler = av.AudioResampler

    class Counting:
        def __init__(self, **options):
            self.own = resampler(**options)

        def resample(self, frame):
            frames[0] += 0 if frame is None else frame.samples
            return self.own.resample(frame)

    monkeypatch.setattr(av, "AudioResampler", Counting)
    assert len(media_sound.load_sound(path, 2)) == 32000
    assert frames[0] < 3 * 16000


def test_what_has_no_sound_is_refused_in_a_sentence(tmp_path):
    def refused(path, words):
        with pytest.raises(MediaError, match=words) as raised:
            media_sound.load_sound(path, 1)
        assert str(raised.value).startswith(f"{path}: ")

    refused(tmp_path / "none.wav", "there is no such file")
    (tmp_path / "empty.wav").write_bytes(b"")
    refused(tmp_path / "empty.wav", "the file is empty")
    (tmp_path / "text.ogg").write_text("no sound " * 50)
    refused(tmp_path / "text.ogg", "damaged, or in no format")
    refused(write_wave(tmp_path / "zero.wav", np.zeros(0)), "no samples|damaged")
    draw_av.write_video(tmp_path / "a.avi", draw_av.Motion("star", "red", "left"), 0, 0)
    refused(tmp_path / "a.avi", "has no sound in it")


def write_floats(path: Path, samples: np.ndarray, rate: int = 16000) -> Path:
    raw = samples.astype("<f4").tobytes()
    about = struct.pack("<IHHIIHH", 16, 3, 1, rate, 4 * rate, 4, 32)
    head = b"RIFF" + struct.pack("<I", 36 + len(raw)) + b"WAVEfmt " + about
    path.write_bytes(head + b"data" + struct.pack("<I", len(raw)) + raw)
    return path


@pytest.mark.parametrize("rate", [16000, 44100])
@pytest.mark.parametrize(
    ("value", "words"),
    [
        (np.nan, "are no numbers"),
        (np.inf, "as large as inf|are no numbers"),
        (-np.inf, "as large as inf|are no numbers"),
        (3e38, r"as large as .*e\+3\d|as large as inf|are no numbers"),
        (-5000, "as large as "),
    ],
)
def test_samples_that_cannot_be_are_refused(value, words, rate, tmp_path):
    sound = (sine(0.5, rate=rate) / 32768).astype(np.float32)
    path = write_floats(tmp_path / "a.wav", sound, rate)
    assert np.isfinite(media_sound.load_sound(path, 1)).all()
    sound[100] = value
    path = write_floats(tmp_path / "bad.wav", sound, rate)
    with pytest.raises(MediaError, match=rf"^{path}: this sound has samples .*({words})"):
        media_sound.load_sound(path, 1)


def write_mp3(path: Path, hertz: float, rate: int = 44100, layout: str = "stereo") -> bytes:
    """Two seconds of a tone, 128 kbit/s."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libmp3lame", rate=rate, layout=layout, bit_rate=128_000)
        tone = (sine(2, hertz, rate) / 32768).astype(np.float32)
        for i in range(0, len(tone), 1152):
            part = np.stack([tone[i : i + 1152]] * (2 if layout == "stereo" else 1))
            frame = av.AudioFrame.from_ndarray(part, "fltp", layout)
            frame.sample_rate, frame.pts = rate, i
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path.read_bytes()


def pitch(sound: np.ndarray) -> float:
    """The loudest frequency, in hertz."""
    return float(np.abs(np.fft.rfft(sound)).argmax() * 16000 / len(sound))


def test_joined_mp3s_are_read_to_the_end(tmp_path, capsys):
    one = write_mp3(tmp_path / "a.mp3", 440)
    for name, options in {"same": {}, "other": {"rate": 22050, "layout": "mono"}}.items():
        path = tmp_path / f"{name}.mp3"
        path.write_bytes(one + write_mp3(tmp_path / "b.mp3", 880, **options))
        found = media_sound.load_sound(path, 10)
        assert abs(len(found) / 16000 - 4) < 0.15
        assert abs(pitch(found[8000:24000]) - 440) < 5
        assert abs(pitch(found[40000:56000]) - 880) < 5
    assert not capsys.readouterr().err


@pytest.mark.parametrize("junk", [bytes(6000), random.Random(0).randbytes(6000)])
def test_a_damaged_mp3_is_read_past_the_damage(junk, tmp_path, capsys):
    data = bytearray(write_mp3(tmp_path / "a.mp3", 440))
    data[12000 : 12000 + len(junk)] = junk
    path = tmp_path / "bad.mp3"
    path.write_bytes(data)
    found = media_sound.load_sound(path, 10)
    assert 1.5 < len(found) / 16000 < 1.75
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"tinyvl: {path}: about 0.4 s of this sound are damaged or missing")
    path.write_bytes(random.Random(1).randbytes(3000))
    with pytest.raises(MediaError):
        media_sound.load_sound(path, 10)


def test_a_gap_is_told_and_a_whole_sound_is_not(tmp_path, capsys):
    for name, codec in {"a.ogg": "libopus", "a.flac": "flac", "a.m4a": "aac"}.items():
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream(codec, rate=48000, layout="mono")
            wave_format = "s16" if codec == "flac" else "fltp" if codec == "aac" else "flt"
            kind = np.int16 if codec == "flac" else np.float32
            for i in range(0, 5 * 48000, 960):
                frame = av.AudioFrame.from_ndarray(np.ones((1, 960), kind), wave_format, "mono")
                frame.sample_rate, frame.pts = 48000, i
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        assert len(media_sound.load_sound(tmp_path / name, 10)) == pytest.approx(80000, abs=600)
    assert not capsys.readouterr().err
    pages = (tmp_path / "a.ogg").read_bytes().split(b"OggS")
    (tmp_path / "gap.ogg").write_bytes(b"OggS".join(pages[:4] + pages[5:]))  # a page is lost
    found = media_sound.load_sound(tmp_path / "gap.ogg", 10)
    assert f"about {(80000 - len(found)) / 16000:.1f} s" in capsys.readouterr().err


EXTRACTORS = {
    "ast": transformers.ASTFeatureExtractor(),
    "whisper": transformers.WhisperFeatureExtractor(),
}


@pytest.mark.parametrize("seconds", [0.01, 3, 40])
@pytest.mark.parametrize("kind", EXTRACTORS)
def test_spectrograms_are_transformers_own_padded_or_cut(kind, seconds):
    extractor = EXTRACTORS[kind]
    rng = np.random.default_rng(0)
    sound = rng.normal(0, 0.1, round(seconds * 16000)).astype(np.float32)
    found = media_sound.spectrogram(extractor, sound)
    if kind == "ast":
        assert found.shape == (1024, 128)
        whole = np.pad(sound, (0, max(0, 400 - sound.size)))
        expected = extractor(whole, sampling_rate=16000, return_tensors="np")["input_values"][0]
    else:
        assert found.shape == (3000, 80)
        expected = extractor(sound, sampling_rate=16000, return_tensors="np")
        expected = expected["input_features"][0].T
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", EXTRACTORS)
def test_masks_lie_over_the_padded_spectrogram_and_look_like_padding(kind):
    extractor = EXTRACTORS[kind]
    sound = np.random.default_rng(0).normal(0, 0.1, 16000).astype(np.float32)  # 1 s: 100 frames
    plain = media_sound.spectrogram(extractor, sound)
    silent = media_sound.silence(extractor, plain)
    assert np.allclose(plain[-1], silent)  # the padding
    behind, widest = 0, [0, 0]
    for view in range(40):
        sounds = media_sound.Sounds(extractor, 10, key=f"0/{view}")
        seen = sounds(sound)[0].numpy()
        changed = seen != plain
        assert np.allclose(seen[changed], silent)
        bins, frames = changed[:20].all(0).sum(), changed.all(1).sum()
        widest = [max(widest[0], bins), max(widest[1], frames)]
        # A mask of frames that fell on the padding changes nothing: it was drawn over all of it.
        behind += frames == 0
        assert np.array_equal(sounds(sound)[0].numpy(), seen)  # the same again
    assert behind > 20
    assert 12 < widest[0] <= 24
    assert widest[1] <= 96


def test_masks_have_the_widths_and_places_asked_for():
    seen, widths, firsts = np.ones((1024, 128), np.float32), [], []
    for i in range(300):
        changed = media_sound.masked(seen, random.Random(i), (24, 96), 0.0) == 0
        frames, bins = np.flatnonzero(changed.all(1)), np.flatnonzero(changed.all(0))
        widths.append((len(bins), len(frames)))
        firsts += [frames[0]] if len(frames) else []
        assert len(frames) == 0 or np.ptp(frames) == len(frames) - 1  # one band
    bins, frames = np.array(widths).T
    assert bins.max() == 24
    assert frames.max() in (95, 96)
    assert abs(frames.mean() - 48) < 6
    assert abs(bins.mean() - 12) < 2
    assert max(firsts) > 900
    assert np.array_equal(media_sound.masked(seen, random.Random(0), (0, 0), 0.0), seen)


def test_workers_decode_sounds(tmp_path):
    good = str(write_wave(tmp_path / "a.wav", sine(0.5)))
    (tmp_path / "bad.wav").write_bytes(b"no")
    bad = str(tmp_path / "bad.wav")
    sounds = media_sound.Sounds(EXTRACTORS["ast"], 10)
    for workers in (0, 1):
        found = dict(media_workers.decode_images([good, bad], sounds, workers=workers))
        assert found[good].shape == (1, 1024, 128)
        assert "damaged" in str(found[bad])
