"""Frames against all of a video decoded, spectrograms against transformers' extractors."""

import random
import shutil
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from tinyvl import draw_av, media_av, media_workers
from tinyvl.media import MediaError, kind_of
from tinyvl.media_augment import RandomCrop, View
from tinyvl.media_av import Clips

CLIPS = Path(__file__).parents[2] / "shared" / "data" / "video"


def grey(i: int) -> int:
    return 10 + 5 * (i % 45)


def write(path: Path, times: list[float], *, codec="mpeg4", gop=12, size=(64, 48)) -> Path:
    """A video whose i-th frame is of one grey, shown from ``times[i]`` seconds on."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height = size
        stream.pix_fmt = "rgb24" if codec == "png" else "yuv420p"
        stream.codec_context.gop_size = gop
        stream.codec_context.time_base = Fraction(1, 1000)
        for i, time in enumerate(times):
            pixels = np.full((size[1], size[0], 3), grey(i), np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = round(time * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def even(count: int, fps: float = 25) -> list[float]:
    return [i / fps for i in range(count)]


def slow(path: Path, times: list[float]) -> list[np.ndarray]:
    """The frame shown at each time: all of the video decoded."""
    with av.open(str(path)) as container:
        frames = [(f.time, f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
    return [[pixels for at, pixels in frames if at <= time][-1] for time in times]


def length(path: Path) -> float:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return float(stream.duration * stream.time_base) if stream.duration else (
            container.duration / 1e6
        )  # fmt: skip


VARIABLE = [0, 0.04, 0.5, 0.55, 0.6, 2.0, 2.04, 2.5, 3.96]


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
@pytest.mark.parametrize("times", [even(100), even(3), VARIABLE], ids=["even", "three", "variable"])
def test_frames_are_those_of_a_full_decode(suffix, times, tmp_path):
    if suffix == "avi" and times == VARIABLE:
        pytest.skip("an AVI has one rate")
    path = write(tmp_path / f"a.{suffix}", times)
    whole = length(path)
    for count in (1, 8, 16):
        found = media_av.load_frames(path, count)
        expected = slow(path, [whole * (i + 0.5) / count for i in range(count)])
        assert len(found) == count
        for one, other in zip(found, expected, strict=True):
            assert np.array_equal(np.asarray(one), other)


def test_each_frame_is_somewhere_in_its_part(tmp_path):
    path = write(tmp_path / "a.mkv", even(200))
    whole, places = length(path), iter([0.01, 0.99, 0.5, 0.2])
    found = media_av.load_frames(path, 4, moment=lambda: next(places))
    times = [whole * (i + p) / 4 for i, p in enumerate([0.01, 0.99, 0.5, 0.2])]
    for one, other in zip(found, slow(path, times), strict=True):
        assert np.array_equal(np.asarray(one), other)


def counted(monkeypatch) -> list[int]:
    """How many frames are decoded from now on."""
    number, following = [0], media_av.following

    def count(container, stream):
        for frame in following(container, stream):
            number[0] += 1
            yield frame

    monkeypatch.setattr(media_av, "following", count)
    return number


def test_a_long_video_is_sought_in(tmp_path, monkeypatch):
    path = write(tmp_path / "long.mp4", even(6000), size=(32, 32))  # four minutes
    number = counted(monkeypatch)
    found = media_av.load_frames(path, 8)
    assert number[0] < 8 * 30, number
    expected = slow(path, [length(path) * (i + 0.5) / 8 for i in range(8)])
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(np.asarray(one), other)


def test_key_frames_far_apart_are_not_decoded_again_and_again(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4", even(1500), gop=600, size=(32, 32))
    number = counted(monkeypatch)
    found = media_av.load_frames(path, 16)
    assert number[0] < 2 * 1500, number
    expected = slow(path, [length(path) * (i + 0.5) / 16 for i in range(16)])
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(np.asarray(one), other)


@pytest.mark.parametrize(
    ("matrix", "turn"),
    [([0, 1, -1, 0], 270), ([0, -1, 1, 0], 90), ([-1, 0, 0, -1], 180), ([1, 0, 0, 1], 0)],
)
def test_a_display_matrix_turns_the_frames(matrix, turn, tmp_path):
    path = tmp_path / "phone.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        pixels = np.zeros((32, 64, 3), np.uint8)
        pixels[:16, :32] = 255  # white at the upper left
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    content = bytearray(path.read_bytes())
    a, b, c, d = ((value << 16) & 0xFFFFFFFF for value in matrix)
    rows = (a, b, 0, c, d, 0, 0, 0, 1 << 30)
    at = content.index(b"tkhd") + 44
    content[at : at + 36] = b"".join(value.to_bytes(4, "big") for value in rows)
    path.write_bytes(bytes(content))
    (frame,) = media_av.load_frames(path, 1)
    white = Image.fromarray(pixels).rotate(turn, expand=True)
    assert frame.size == white.size
    assert np.abs(np.asarray(frame).astype(int) - np.asarray(white)).mean() < 12


def test_what_is_no_video_is_refused_in_a_sentence(tmp_path):
    def refused(path, words):
        with pytest.raises(MediaError, match=words) as raised:
            media_av.load_frames(path, 4)
        assert str(raised.value).startswith(f"{path}: ")
        assert "\n" not in str(raised.value)

    refused(tmp_path / "none.mp4", "there is no such file")
    refused(tmp_path, "is a folder")
    (tmp_path / "empty.mp4").write_bytes(b"")
    refused(tmp_path / "empty.mp4", "the file is empty")
    (tmp_path / "text.mp4").write_text("this is no video " * 100)
    refused(tmp_path / "text.mp4", "damaged, or in no format")
    draw_av.write_sound(tmp_path / "a.wav", draw_av.Signal("tone", "low", "holds", "once"), 0, 0)
    refused(tmp_path / "a.wav", "has sound, but no video")
    whole = write(tmp_path / "whole.mp4", even(50))
    (tmp_path / "cut.mp4").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    refused(tmp_path / "cut.mp4", "damaged, or in no format")
    avi = write(tmp_path / "whole.avi", even(50), codec="png").read_bytes()
    (tmp_path / "none.avi").write_bytes(avi[: avi.index(b"movi") + 4])
    refused(tmp_path / "none.avi", "no frame of this video can be decoded")


def test_of_a_video_that_is_cut_short_what_is_there_is_used(tmp_path):
    whole = write(tmp_path / "whole.avi", even(50), codec="png")
    cut = tmp_path / "cut.avi"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    found = media_av.load_frames(cut, 8)
    levels = [int(np.asarray(frame)[0, 0, 0]) for frame in found]
    assert len(found) == 8
    assert levels == sorted(levels)
    assert levels[0] <= grey(3)
    assert grey(15) <= levels[-1] < grey(30)


def test_the_cover_of_a_song_is_no_video(tmp_path):
    path = tmp_path / "song.mp4"
    draw_av.write_sound(tmp_path / "a.wav", draw_av.Signal("tone", "low", "holds", "once"), 0, 0)
    with av.open(str(tmp_path / "a.wav")) as source, av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=16000)
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        for frame in source.decode(audio=0):
            frame.pts = None
            container.mux(sound.encode(frame))
        container.mux(sound.encode())
        picture = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        container.mux(cover.encode(picture))
        container.mux(cover.encode())
    with pytest.raises(MediaError, match="has sound, but no video"):
        media_av.load_frames(path, 4)


def resized(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture.resize((32, 32)))).permute(2, 0, 1)


def test_clips_are_random_by_key_and_varied_alike(tmp_path):
    path = str(write(tmp_path / "a.mkv", even(200)))
    plain = Clips(resized, 4)
    assert torch.equal(plain(plain.load(path, 32)), plain(plain.load(path, None)))
    made = {}
    for key in ("0/1", "0/2", "0/1 again"):
        clips = Clips(resized, 4, key=key.partition(" ")[0])
        made[key] = clips(clips.load(path, 32))
    assert made["0/1"].shape == (4, 3, 32, 32)
    assert torch.equal(made["0/1"], made["0/1 again"])
    assert not torch.equal(made["0/1"], made["0/2"])
    moved = Path(shutil.copy(path, tmp_path / "sub.mkv")).rename(tmp_path / "new.mkv")
    other = tmp_path / "other"
    other.mkdir()
    moved = str(moved.rename(other / "a.mkv"))
    clips = Clips(resized, 4, key="0/1")
    assert torch.equal(clips(clips.load(moved, 32)), made["0/1"])  # another folder, the same frames

    still = Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 60, 3), np.uint8))
    for transform in (RandomCrop(32, 3, 0, 0.5), View(resized, 2, 0)):
        frames = Clips(transform, 3)([still, still.copy(), still.copy()])
        assert torch.equal(frames[0], transform(still))
        assert torch.equal(frames[1], frames[0])
        assert torch.equal(frames[2], frames[0])


def test_workers_decode_clips_and_pictures(tmp_path):
    paths = [str(write(tmp_path / f"{i}.mkv", even(20 + i))) for i in range(3)]
    Image.new("RGB", (50, 40), "red").save(tmp_path / "a.png")
    (tmp_path / "bad.mkv").write_bytes(b"no")
    paths += [str(tmp_path / "a.png"), str(tmp_path / "bad.mkv")]
    for workers in (0, 2):
        found = dict(media_workers.decode_images(paths, Clips(resized, 4), workers=workers))
        assert [found[path].shape for path in paths[:3]] == [(4, 3, 32, 32)] * 3
        assert found[paths[3]].shape == (1, 3, 32, 32)
        assert "damaged" in str(found[paths[4]])
    still = dict(media_workers.decode_images(paths, Clips(resized, 4, still=True), workers=0))
    assert still[paths[3]].shape == (3, 32, 32)
    assert still[paths[0]].shape == (4, 3, 32, 32)


@pytest.mark.skipif(not CLIPS.is_dir(), reason="no real clips here")
def test_real_clips_decode():
    clips = [path for path in sorted(CLIPS.iterdir()) if kind_of(path) == "video"]
    assert len(clips) > 10
    for path in clips[:4]:
        assert len(media_av.load_frames(path, 8, target=224)) == 8


# ------------------------------------------------------------------------------ sounds


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
    found = media_av.load_sound(path, 10)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, sine(1.5).astype("<i2") / 32768, atol=1e-6)
    assert len(media_av.load_sound(path, 0.5)) == 8000


def test_other_rates_and_channels_become_16_khz_mono(tmp_path):
    one, other = sine(1, 440, 44100), sine(1, 880, 44100)
    path = write_wave(tmp_path / "a.wav", np.stack([one, other], 1).ravel(), 44100, 2)
    found = media_av.load_sound(path, 10)
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
    assert len(media_av.load_sound(path, 2)) == 32000
    assert frames[0] < 3 * 16000


def test_what_has_no_sound_is_refused_in_a_sentence(tmp_path):
    def refused(path, words):
        with pytest.raises(MediaError, match=words) as raised:
            media_av.load_sound(path, 1)
        assert str(raised.value).startswith(f"{path}: ")

    refused(tmp_path / "none.wav", "there is no such file")
    (tmp_path / "empty.wav").write_bytes(b"")
    refused(tmp_path / "empty.wav", "the file is empty")
    (tmp_path / "text.ogg").write_text("no sound " * 50)
    refused(tmp_path / "text.ogg", "damaged, or in no format")
    refused(write_wave(tmp_path / "zero.wav", np.zeros(0)), "no samples|damaged")
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
    found = media_av.spectrogram(extractor, sound)
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
    plain = media_av.spectrogram(extractor, sound)
    silent = media_av.silence(extractor, plain)
    assert np.allclose(plain[-1], silent)  # the padding
    behind, widest = 0, [0, 0]
    for view in range(40):
        sounds = media_av.Sounds(extractor, 10, key=f"0/{view}")
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
        changed = media_av.masked(seen, random.Random(i), (24, 96), 0.0) == 0
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
    assert np.array_equal(media_av.masked(seen, random.Random(0), (0, 0), 0.0), seen)


def test_workers_decode_sounds(tmp_path):
    good = str(write_wave(tmp_path / "a.wav", sine(0.5)))
    (tmp_path / "bad.wav").write_bytes(b"no")
    bad = str(tmp_path / "bad.wav")
    sounds = media_av.Sounds(EXTRACTORS["ast"], 10)
    for workers in (0, 1):
        found = dict(media_workers.decode_images([good, bad], sounds, workers=workers))
        assert found[good].shape == (1, 1024, 128)
        assert "damaged" in str(found[bad])
