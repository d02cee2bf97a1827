"""Sounds against transformers' own extractors, and the files that people have."""

import random
import wave
from pathlib import Path

import av
import numpy as np
import pytest
import transformers

from tinyvl import draw_av, media, media_audio
from tinyvl.media import MediaError


def write(path: Path, samples: np.ndarray, rate: int = 16000, channels: int = 1) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return path


def sine(seconds: float, hertz: float = 440, rate: int = 16000) -> np.ndarray:
    return 12000 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def test_samples_are_as_written(tmp_path):
    path = write(tmp_path / "a.wav", sine(1.5))
    found = media_audio.load_sound(path, 10)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, sine(1.5).astype("<i2") / 32768, atol=1e-6)
    assert len(media_audio.load_sound(path, 0.5)) == 8000


def test_other_rates_and_channels_become_16_khz_mono(tmp_path):
    one, other = sine(1, 440, 44100), sine(1, 880, 44100)
    path = write(tmp_path / "a.wav", np.stack([one, other], 1).ravel(), 44100, 2)
    found = media_audio.load_sound(path, 10)
    assert abs(len(found) - 16000) < 50
    middle = slice(2000, 14000)
    expected = (sine(1, 440) + sine(1, 880))[: len(found)] / 2 / 32768
    np.testing.assert_allclose(found[middle], expected[middle], atol=0.01)


def test_only_the_beginning_of_a_long_sound_is_decoded(tmp_path, monkeypatch):
    path = write(tmp_path / "long.wav", sine(120))
    frames = [0]
    resampler = av.AudioResampler

    class Counting:
        def __init__(self, **options):
            self.own = resampler(**options)

        def resample(self, frame):
            frames[0] += 0 if frame is None else frame.samples
            return self.own.resample(frame)

    monkeypatch.setattr(av, "AudioResampler", Counting)
    assert len(media_audio.load_sound(path, 2)) == 32000
    assert frames[0] < 3 * 16000


def test_what_has_no_sound_is_refused_in_a_sentence(tmp_path):
    def refused(path, words):
        with pytest.raises(MediaError, match=words) as raised:
            media_audio.load_sound(path, 1)
        assert str(raised.value).startswith(f"{path}: ")

    refused(tmp_path / "none.wav", "there is no such file")
    (tmp_path / "empty.wav").write_bytes(b"")
    refused(tmp_path / "empty.wav", "the file is empty")
    (tmp_path / "text.ogg").write_text("no sound " * 50)
    refused(tmp_path / "text.ogg", "damaged, or in no format")
    refused(write(tmp_path / "zero.wav", np.zeros(0)), "no samples|damaged")
    draw_av.write_video(tmp_path / "a.avi", draw_av.Motion("star", "red", "left"), 0, 0)
    refused(tmp_path / "a.avi", "has no sound in it")


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
    found = media_audio.spectrogram(extractor, sound)
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
    plain = media_audio.spectrogram(extractor, sound)
    silent = media_audio.silence(extractor, plain)
    assert np.allclose(plain[-1], silent)  # the padding
    behind, widest = 0, [0, 0]
    for view in range(40):
        sounds = media_audio.Sounds(extractor, 10, key=f"0/{view}")
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
        changed = media_audio.masked(seen, random.Random(i), (24, 96), 0.0) == 0
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
    assert np.array_equal(media_audio.masked(seen, random.Random(0), (0, 0), 0.0), seen)


def test_workers_decode_sounds(tmp_path):
    good = str(write(tmp_path / "a.wav", sine(0.5)))
    (tmp_path / "bad.wav").write_bytes(b"no")
    bad = str(tmp_path / "bad.wav")
    sounds = media_audio.Sounds(EXTRACTORS["ast"], 10)
    for workers in (0, 1):
        found = dict(media.decode_images([good, bad], sounds, workers=workers))
        assert found[good].shape == (1, 1024, 128)
        assert "damaged" in str(found[bad])
