"""Readers of videos and sounds: MSR-VTT, MSVD, AudioCaps, Clotho; captions and questions."""

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from tinyvl import UserError
from tinyvl.data_records import (
    OR,
    PARTS,
    Record,
    get,
    json_document,
    json_items,
    json_object,
    name_in,
    split_in,
    text_lines,
)


def read_msrvtt(path: Path) -> Iterator[Record]:
    """MSR-VTT's ``*videodatainfo*.json``: 20 captions a video, split train, val or test."""
    document = json_document(path)
    captions: dict[str, list[str]] = {}
    for i, entry in enumerate(get(document, "sentences", list, path)):
        where = f"{path}, sentences[{i}]"
        name = name_in(entry, "video_id", where)
        captions.setdefault(name, []).append(get(entry, "caption", str, where))
    splits: dict[str, str | None] = {}
    for i, entry in enumerate(get(document, "videos", list, path)):
        where = f"{path}, videos[{i}]"
        split = get(entry, "split", str, where, default=None)
        splits[name_in(entry, "video_id", where)] = PARTS.get(split, split)
    if unknown := captions.keys() - splits:
        raise UserError(f"{path}: sentences describe {min(unknown)}, which is not among its videos")
    for name, split in splits.items():
        yield Record(video=f"{name}.mp4", captions=captions.get(name, []), id=name, split=split)


def read_msrvtt_qa(path: Path) -> Iterator[Record]:
    """MSRVTT-QA's ``{train,val,test}_qa.json`` (https://github.com/xudejing/video-question-answering)."""
    for record, number in _video_questions(path):
        record.video, record.id = f"video{number}.mp4", f"video{number}"
        yield record


def read_msvd_qa(path: Path) -> Iterator[Record]:
    """MSVD-QA's ``{train,val,test}_qa.json``, of the same authors and shape.

    Video 7 is ``vid7``, or the clip that ``youtube_mapping.txt`` gives it where that lies beside.
    """
    clips = {number: clip for clip, number in _youtube_mapping(path).items()}
    for record, number in _video_questions(path):
        clip, name = clips.get(number), f"vid{number}"
        record.video = f"{clip}.avi{OR}{name}.avi" if clip else f"{name}.avi"
        record.id = clip or name
        yield record


def _video_questions(path: Path) -> Iterator[tuple[Record, int]]:
    for where, entry in json_items(path):
        answer = get(entry, "answer", str, where, default=None)
        number = get(entry, "id", (int, str), where, default=None)
        record = Record(
            split=split_in(path.name),
            question=get(entry, "question", str, where),
            answers=[] if answer is None else [answer],
            question_id=None if number is None else str(number),
        )
        yield record, get(entry, "video_id", int, where)


MSVD = re.compile(r"([\w-]{11}_\d+_\d+)\s+(\S.*)")


def read_msvd(path: Path) -> Iterator[Record]:
    """MSVD's ``AllVideoDescriptions.txt``, ``clip caption`` a line; or ``{clip: [captions]}`` JSON.

    The split is that of ``{train,val,test}_list.txt`` where these lie beside the file; else, with
    ``youtube_mapping.txt``, the usual one: videos 1 to 1200, to 1300 and to 1970.
    """
    captions: dict[str, list[str]] = {}
    if path.suffix == ".json":
        for clip, texts in json_object(path).items():
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise UserError(f"{path}, {clip}: expected a list of captions")
            captions[clip.removesuffix(".avi")] = texts
    else:
        for where, line in text_lines(path):
            if line.startswith("#"):
                continue
            match = MSVD.fullmatch(line)
            if not match:
                raise UserError(
                    f"{where}: expected 'mv89psg6zh4_33_46 a bird is bathing', found {line[:60]!r}"
                )
            captions.setdefault(match[1], []).append(match[2])
    numbers, splits = _youtube_mapping(path), {}
    for clip, number in numbers.items():
        splits[clip] = "train" if number <= 1200 else "val" if number <= 1300 else "test"
    for part in ("train", "val", "test"):
        if (listing := path.with_name(f"{part}_list.txt")).exists():
            splits |= {line.removesuffix(".avi"): part for _, line in text_lines(listing)}
    for clip, texts in captions.items():
        names = [f"{clip}.avi", *([f"vid{numbers[clip]}.avi"] if clip in numbers else [])]
        yield Record(video=OR.join(names), captions=texts, id=clip, split=splits.get(clip))


def _youtube_mapping(path: Path) -> dict[str, int]:
    """``youtube_mapping.txt`` beside a file, ``mv89psg6zh4_33_46 vid1`` a line: clip -> number."""
    mapping = path.with_name("youtube_mapping.txt")
    numbers = {}
    for where, line in text_lines(mapping) if mapping.exists() else ():
        match = re.fullmatch(r"(\S+)\s+vid(\d+)", line)
        if not match:
            raise UserError(f"{where}: expected 'mv89psg6zh4_33_46 vid1', found {line[:60]!r}")
        numbers[match[1]] = int(match[2])
    return numbers


def read_audiocaps(path: Path) -> Iterator[Record]:
    """AudioCaps' ``{train,val,test}.csv`` (https://audiocaps.github.io): a record a clip.

    The sounds are downloaded one by one, and named by the YouTube id (alone, after ``Y``, or before
    the start in seconds) or the caption's id. Those that are not there are left out and counted.
    """
    clips: dict[tuple[str, str], Record] = {}
    for where, row in _rows(path, ("audiocap_id", "youtube_id", "start_time", "caption")):
        name, start = row["youtube_id"], row["start_time"]
        try:
            seconds = int(float(start))
        except (ValueError, OverflowError):
            raise UserError(f"{where}: 'start_time' should be seconds, found {start!r}") from None
        names = (
            *(name, f"Y{name}", f"{name}_{seconds}", f"Y{name}_{seconds}"),
            *(f"{name}_{seconds * 1000}_{seconds * 1000 + 10_000}", row["audiocap_id"]),
        )
        sound = OR.join(f"{each}.wav" for each in names)
        clip = clips.setdefault(
            (name, start), Record(audio=sound, id=name, split=split_in(path.name))
        )
        clip.captions.append(row["caption"])
    yield from clips.values()


def read_clotho(path: Path) -> Iterator[Record]:
    """Clotho's ``clotho_captions_*.csv`` (https://zenodo.org/records/4783391): 5 captions a sound.

    Its parts development, validation and evaluation are train, val and test here.
    """
    columns = [f"caption_{i}" for i in range(1, 6)]
    for _, row in _rows(path, ("file_name", *columns)):
        name = row["file_name"]
        captions = [row[column] for column in columns]
        yield Record(audio=name, captions=captions, id=name, split=split_in(path.name))


def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a CSV file, of which each column that is asked for must be there."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            for row in rows:
                where = f"{path}, line {rows.line_num}"
                for column in columns:
                    if row.get(column) is None:
                        raise UserError(f"{where}: {column!r} is missing; it should be a text")
                yield where, row
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text in UTF-8") from None
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num}: is not CSV ({error})") from None
