"""Frames against all of a video decoded."""

import shutil
import struct
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from tinyvl import draw_av, media_av, media_workers
from tinyvl.media import MediaError, kind_of
from tinyvl.media_augment import RandomCrop, View
from tinyvl.media_av import Clips

CLIPS = Path(__file__).parents[2] / "shared" / "data" / "video"


def grey(i: int) -> int:
    return 10 + 4 * (i % 60)


def number_of(pixels) -> int:
    """Which frame this is, by its grey."""
    return round((np.asarray(pixels)[0, 0, 0].item() - 10) / 4)


def numbers(frames) -> list[int]:
    return [number_of(frame) for frame in frames]


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
    """The frame shown at each time: all of the video decoded, past errors."""
    frames = []
    with av.open(str(path)) as container:
        for packet in container.demux(video=0):
            with suppress(av.FFmpegError):
                frames += [(f.time, f.to_ndarray(format="rgb24")) for f in packet.decode()]
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


def test_a_codec_that_nobody_knows_is_no_video(tmp_path):
    path = write(tmp_path / "a.avi", even(5))
    path.write_bytes(path.read_bytes().replace(b"FMP4", b"ZZZZ"))
    with pytest.raises(MediaError, match=r"a\.avi: is no video"):
        media_av.load_frames(path, 2)


def test_of_a_video_that_is_cut_short_what_is_there_is_used(tmp_path):
    whole = write(tmp_path / "whole.avi", even(50), codec="png").read_bytes()
    cut = tmp_path / "cut.avi"
    cut.write_bytes(whole[: whole.index(b"idx1") // 2])  # its header and half of its frames
    found = media_av.load_frames(cut, 8)
    last = number_of(slow(cut, [100])[0]) + 1
    assert 15 <= last <= 35
    expected = [int(last * (i + 0.5) / 8) for i in range(8)]
    assert np.abs(np.array(numbers(found)) - expected).max() <= 1
    no_index = tmp_path / "no_index.avi"
    no_index.write_bytes(whole[: whole.index(b"idx1")])
    assert numbers(media_av.load_frames(no_index, 8)) == [3, 9, 15, 21, 28, 34, 40, 46]


EIGHT = [3, 9, 15, 21, 28, 34, 40, 46]  # of 50 frames, those in the middle of the eighths


def near(path: Path, expected: list[int]) -> bool:
    found = numbers(media_av.load_frames(path, len(expected)))
    return np.abs(np.subtract(found, expected)).max() <= 1


@pytest.mark.parametrize(("suffix", "begin"), [("mkv", 0.0), ("mkv", 5.0), ("flv", 0.0)])
def test_a_longer_sound_does_not_move_the_frames(suffix, begin, tmp_path):
    path = tmp_path / f"a.{suffix}"
    write(tmp_path / "video.mkv", [begin + time for time in even(50)], codec="libx264")
    with av.open(str(tmp_path / "video.mkv")) as video, av.open(str(path), "w") as container:
        copied = container.add_stream_from_template(video.streams.video[0])
        sound = container.add_stream("aac", rate=16000, layout="mono")
        for i in range(0, 10 * 16000, 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts = 16000, i
            container.mux(sound.encode(frame))
        for packet in video.demux(video=0):
            if packet.size:
                packet.stream = copied
                container.mux(packet)
        container.mux(sound.encode(None))
    assert near(path, EIGHT)


def test_a_lying_duration_is_not_believed(tmp_path):
    data = write(tmp_path / "a.mp4", even(50), gop=10).read_bytes()
    for name, factor in (("long", 30), ("short", 0.1)):
        lie, path = bytearray(data), tmp_path / f"{name}.mp4"
        for box, at in ((b"mvhd", 20), (b"mdhd", 20), (b"tkhd", 24), (b"elst", 12)):
            place = data.index(box) + at
            said = int.from_bytes(data[place : place + 4], "big")
            lie[place : place + 4] = round(said * factor).to_bytes(4, "big")
        path.write_bytes(bytes(lie))
        # an edit list that is too short hides what comes after it
        assert near(path, EIGHT) if name == "long" else media_av.load_frames(path, 8)
    data = write(tmp_path / "a.mkv", even(50), gop=10).read_bytes()
    place = data.index(b"\x44\x89\x88") + 3  # Duration, a float of eight bytes
    for factor in (30, 0.1, 0):
        lie = bytearray(data)
        lie[place : place + 8] = struct.pack(">d", factor * 2000)
        (tmp_path / "lie.mkv").write_bytes(bytes(lie))
        assert near(tmp_path / "lie.mkv", EIGHT), factor


def test_frames_without_times_are_counted(tmp_path):
    assert near(write(tmp_path / "a.h264", even(50), codec="libx264", gop=10), EIGHT)


def test_damaged_packets_are_sought_past(tmp_path):
    good = write(tmp_path / "good.mp4", even(60, 1), codec="libx264", gop=10)
    assert near(good, [3, 11, 18, 26, 33, 41, 48, 56])
    with av.open(str(good)) as container:
        keys = [(p.pos, p.size) for p in container.demux(video=0) if p.is_keyframe]
    for bad in ([0], [2], [0, 1, 2, 4], [5]):
        data = bytearray(good.read_bytes())
        for number in bad:
            place, size = keys[number]
            data[place : place + size] = bytes(size)
        (tmp_path / "bad.mp4").write_bytes(bytes(data))
        found = numbers(media_av.load_frames(tmp_path / "bad.mp4", 8))
        assert len(found) == 8
        for one, whole in zip(found, [3, 11, 18, 26, 33, 41, 48, 56], strict=True):
            if whole // 10 not in bad:
                assert abs(one - whole) <= 1, (bad, found)
    data = bytearray(good.read_bytes())
    with av.open(str(good)) as container:
        for packet in container.demux(video=0):
            if packet.size:
                data[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    (tmp_path / "bad.mp4").write_bytes(bytes(data))
    with pytest.raises(MediaError, match=r"bad\.mp4: no frame of this video can be decoded"):
        media_av.load_frames(tmp_path / "bad.mp4", 8)


@pytest.mark.parametrize(("aspect", "size"), [("2/1", (128, 96)), ("8/9", (57, 96))])
def test_pixels_that_are_not_square_become_so(aspect, size, tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 96, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(aspect)
        pixels = np.zeros((96, 64, 3), np.uint8)
        pixels[:, :32] = 255  # the left half is white
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    (frame,) = media_av.load_frames(path, 1)
    assert frame.size == size
    assert abs((np.asarray(frame)[..., 0] > 120).sum() / 96 - size[0] / 2) <= 1
    (small,) = media_av.load_frames(path, 1, target=10)
    assert 20 <= min(small.size) < 40
    assert abs(small.width / small.height - size[0] / size[1]) < 0.05


MATRICES = {"BT.709": (1, 0.2126, 0.0722), "BT.601": (6, 0.299, 0.114), "none": (2, 0.299, 0.114)}


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("standard", MATRICES)
def test_colours_are_those_of_the_files_matrix_and_range(standard, full, tmp_path):
    """Y'CbCr by the standards' coefficients, tagged; untagged videos are of BT.601."""
    tag, kr, kb = MATRICES[standard]
    colours = np.array([(200, 30, 30), (30, 180, 40), (40, 60, 200), (128, 128, 128)])
    rgb = np.repeat(colours[None], 32, 1).repeat(64, 0) / 255
    y = rgb @ [kr, 1 - kr - kb, kb]
    chroma = [(rgb[..., 2] - y) / (2 - 2 * kb), (rgb[..., 0] - y) / (2 - 2 * kr)]
    scale = [(255, 255), (0, 128)] if full else [(219, 224), (16, 128)]
    planes = [scale[0][0] * y + scale[1][0], *(scale[0][1] * c + scale[1][1] for c in chroma)]
    pixels = np.round(planes).clip(0, 255).astype(np.uint8)
    with av.open(str(tmp_path / "c.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=5)
        stream.width, stream.height, stream.pix_fmt = 128, 64, "yuv444p"
        stream.options, context = {"crf": "1"}, stream.codec_context
        context.colorspace, context.color_range = tag, 2 if full else 1
        frame = av.VideoFrame.from_ndarray(pixels, format="yuv444p")
        frame.colorspace, frame.color_range = tag, 2 if full else 1
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    (seen,) = media_av.load_frames(tmp_path / "c.mp4", 1)
    found = [seen.getpixel((32 * i + 16, 32)) for i in range(4)]
    assert np.abs(np.array(found) - colours).max() <= 3


def test_frames_may_change_their_size_on_the_way(tmp_path, monkeypatch):
    path = tmp_path / "a.webm"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(50):
            pixels = np.full((48, 64, 3), grey(i), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
        other = av.CodecContext.create("libvpx", "w")
        other.width, other.height, other.pix_fmt = 96, 96, "yuv420p"
        other.time_base = other.framerate = Fraction(1, 25)
        for i in range(50):
            frame = av.VideoFrame.from_ndarray(np.full((96, 96, 3), grey(i), np.uint8), "rgb24")
            frame.pts, frame.time_base = 50 + i, Fraction(1, 25)
            for packet in [*other.encode(frame), *(other.encode(None) if i == 49 else [])]:
                packet.stream = stream
                container.mux(packet)
    clips = Clips(resized, 4)
    frames = clips.load(str(path), 32)
    assert [frame.size for frame in frames] == [(64, 48)] * 2 + [(96, 96)] * 2
    assert clips(frames).shape == (4, 3, 32, 32)
    monkeypatch.setattr(media_av, "MAX_PIXELS", 5000)
    with pytest.raises(MediaError, match="too large"):
        media_av.load_frames(path, 4)


COLOURS = ["red", "lime", "blue", "yellow"]


def animated(path: Path, **options) -> str:
    """An animated picture of four colours, the first shown for as long as the others together."""
    first, *rest = (Image.new("RGB", (64, 48), colour) for colour in COLOURS)
    times = {"duration": [600, 200, 200, 200]} | options
    lossless = {"lossless": True} if path.suffix == ".webp" else {}
    first.save(path, save_all=True, append_images=rest, **times, **lossless)
    return str(path)


def colours(frames) -> list[str]:
    names = {ImageColor.getrgb(name): name for name in [*COLOURS, "white"]}
    return [names[frame.getpixel((30, 20))] for frame in frames]


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_an_animated_picture_is_a_video(suffix, tmp_path):
    path = animated(tmp_path / f"a.{suffix}")
    assert colours(media_av.load_frames(path, 6)) == ["red"] * 3 + COLOURS[1:]
    places = iter([0.9, 0.1])
    assert colours(media_av.load_frames(path, 2, moment=lambda: next(places))) == ["red", "lime"]
    assert colours(Clips(resized, 4).load(path, 32)) == ["red", "red", "lime", "yellow"]
    still = Clips(resized, 4, still=True).load(path, 32)  # a model of pictures
    assert colours([still]) == ["red"]
    one = tmp_path / f"one.{suffix}"
    Image.new("RGB", (64, 48), "blue").save(one)
    assert Clips(resized, 4).load(str(one), 32).size == (64, 48)
    assert len(media_av.load_frames(one, 4)) == 4 or suffix == "webp"


def test_of_an_animation_that_is_damaged_the_beginning_is_used(tmp_path):
    data = Path(animated(tmp_path / "a.png")).read_bytes()
    path = tmp_path / "cut.png"
    path.write_bytes(data[: data.rindex(b"fcTL") + 30])
    assert colours(media_av.load_frames(path, 5)) == ["red"] * 3 + ["lime", "blue"]


def test_a_picture_that_stands_for_an_animation_is_not_of_it(tmp_path):
    path = tmp_path / "a.png"
    first, *rest = (Image.new("RGB", (64, 48), colour) for colour in ["white", *COLOURS])
    first.save(path, save_all=True, append_images=rest, duration=100, default_image=True)
    assert colours(media_av.load_frames(path, 4)) == COLOURS


def test_a_gif_that_is_an_mp4_is_a_video(tmp_path):
    path = write(tmp_path / "a.mp4", even(50)).rename(tmp_path / "a.gif")
    for still in (False, True):
        found = numbers(Clips(resized, 8, still=still).load(str(path), None))
        assert np.abs(np.subtract(found, EIGHT)).max() <= 1


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
