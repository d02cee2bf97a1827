"""Readers of captioned pictures, videos and sounds, in the formats they were published in.

Each yields the records of a file as the file has them: paths not yet looked for, blank captions
kept. `data.read` does the rest.
"""

import csv
import logging
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tinyvl import UserError
from tinyvl.data_records import (
    OR,
    Record,
    entries,
    get,
    json_items,
    json_object,
    matched,
    name_in,
    split_in,
    splits_beside,
    unlike,
)
from tinyvl.files import open_text, read_text, text_lines
from tinyvl.media import is_image

log = logging.getLogger(__name__)


def read_karpathy(path: Path) -> Iterator[Record]:
    """Karpathy's ``dataset_coco.json``, ``dataset_flickr8k.json``, ``dataset_flickr30k.json``."""
    for where, entry in entries(json_object(path), "images", path):
        name = name_in(entry, "filename", where)
        folder = get(entry, "filepath", str, where, default="")
        captions = [get(each, "raw", str, at) for at, each in entries(entry, "sentences", where)]
        number = get(entry, "imgid", (int, str), where, default=name)
        number = str(get(entry, "cocoid", (int, str), where, default=number))
        path_in = f"{folder}/{name}{OR}{name}" if folder else name
        yield Record(path_in, captions, number, get(entry, "split", str, where))


def read_coco(path: Path) -> Iterator[Record]:
    """COCO's ``captions_*.json``, and ``image_info_*.json``, which has no captions.

    `data.read` leaves out images without a caption where others have one, and counts them.
    """
    return (record for record, _, _ in _coco(path))


def _coco(path: Path) -> Iterator[tuple[Record, dict, str]]:
    document = json_object(path)
    images: dict[int | str, tuple[dict, str]] = {}
    names: dict[int | str, str] = {}
    captions: dict[int | str, list[str]] = {}
    for where, entry in entries(document, "images", path):
        number = get(entry, "id", (int, str), where)
        unlike(names, number, name_in(entry, "file_name", where), where)
        images[number] = entry, where
    for where, entry in entries(document, "annotations", path, default=[]):
        number = get(entry, "image_id", (int, str), where)
        if number not in images:
            raise UserError(f"{where}: 'image_id' {number} is not among the images")
        captions.setdefault(number, []).append(get(entry, "caption", str, where))
    for number, (entry, where) in images.items():
        yield Record(entry["file_name"], captions.get(number, []), str(number)), entry, where


def read_nocaps(path: Path) -> Iterator[Record]:
    """NoCaps (https://nocaps.org): COCO's keys, and each image's domain: in, near or out.

    ``nocaps_val_4500_captions.json``, ``nocaps_{val,test}_image_info.json`` (without captions; the
    test set's domains are not published). The ids are those that the evaluation server expects.
    """
    for record, entry, where in _coco(path):
        domain = get(entry, "domain", str, where, default=None)
        record.domain = domain and domain.removesuffix("-domain")
        if record.domain not in (None, "in", "near", "out"):
            wanted = "in-domain, near-domain or out-domain"
            raise UserError(f"{where}: 'domain' should be {wanted}, found {domain!r}")
        record.split = split_in(path.name)
        yield record


# The second number of results.csv is not always followed by a bar: one line of the original lacks
# it ("2199200615.jpg| 4   A dog runs across the grass .").
FLICKR_TOKEN = re.compile(r"([^\t]+)#\d+\t\s*(.*)")
FLICKR_RESULTS = re.compile(r"([^|,]+?)\s*\|\s*\d+\s*\|?\s*(.*)")
FLICKR_CSV = re.compile(r"[^,\t|]+\.(jpg|jpeg|png)\s*,.*", re.IGNORECASE)
FLICKR_HEADER = re.compile(r"image,\s*caption|image_name\s*\|\s*comment_number\s*\|\s*comment")
FLICKR = (FLICKR_HEADER, FLICKR_TOKEN, FLICKR_RESULTS, FLICKR_CSV)  # what the first line may be


def read_flickr(path: Path) -> Iterator[Record]:
    """Flickr8k's and Flickr30k's caption lists, in each of the three forms they come in.

    ``1.jpg#0<tab>caption`` (``Flickr8k.token.txt``, ``results_20130124.token``), ``1.jpg,caption``
    under a header (``captions.txt``) and ``1.jpg| 0| caption`` under a header (``results.csv``).
    The split is that of ``Flickr_8k.{train,dev,test}Images.txt``, if these are beside the file.
    """
    captions: dict[str, list[str]] = {}
    for where, line in text_lines(path):
        if FLICKR_HEADER.fullmatch(line):
            continue
        match = FLICKR_TOKEN.fullmatch(line) or FLICKR_RESULTS.fullmatch(line)
        name, *rest = match.groups() if match else _row(line, where)
        if not rest or not any(map(is_image, [name, Path(name).stem])):
            wanted = "'x.jpg#0<tab>caption', 'x.jpg,caption' or 'x.jpg| 0| caption'"
            raise UserError(f"{where}: expected {wanted}, found {line[:60]!r}")
        captions.setdefault(name, []).append(",".join(rest))
    parts = {"train": "train", "val": "dev", "test": "test"}
    splits = splits_beside(path, **{k: f"Flickr_8k.{v}Images.txt" for k, v in parts.items()})
    # Flickr8k lists captions of "2258277193_586949ec62.jpg.1", a picture that it does not have.
    odd = {name for name in captions if not is_image(name)}
    if odd:
        log.warning("%s: left out %d names that are no pictures: %s", path, len(odd), min(odd))
    for name, texts in captions.items():
        if name not in odd:
            yield Record(name, texts, name, splits.get(name))


def read_visual_genome(path: Path) -> Iterator[Record]:
    """Visual Genome's ``region_descriptions.json``: the regions' phrases are the captions."""
    for where, entry in json_items(path):
        phrases = [get(each, "phrase", str, at) for at, each in entries(entry, "regions", where)]
        number = get(entry, "id", (int, str), where)
        yield Record(f"{number}.jpg", phrases, str(number))


CC3M = re.compile(r"([^\t]+)\t([^\t]+)")
CC3M_HEADER = re.compile(r"caption\t(url|path|image|file|filepath)", re.IGNORECASE)


def read_cc3m(path: Path) -> Iterator[Record]:
    """Conceptual Captions' TSV: ``caption<tab>url``, or ``caption<tab>path``.

    The picture of a URL is looked for under the names that downloaders give it: img2dataset's
    ``00012/000123456.jpg``, the URL's CRC-32 (ViLBERT, LAVIS), ``00123456.jpg`` (VL-BERT), or the
    last part of the URL. Pictures that are not there (links die) are left out and counted. The id
    of a URL is its number in the list, from 0.
    """
    split, number = split_in(path.name), -1
    for where, line in text_lines(path):
        if CC3M_HEADER.fullmatch(line):
            continue
        number += 1
        caption, address = matched(CC3M, line, where, "caption<tab>url or path").groups()
        if re.match(r"https?://", address):
            last = re.split("[?#]", address)[0].rsplit("/", 1)[-1]
            names = (
                f"{number // 10_000:05d}/{number:09d}.jpg",
                f"{zlib.crc32(address.encode('utf-8', 'replace'))}",
                f"{number:08d}.jpg",
                *([last] if is_image(last) else []),
            )
            yield Record(OR.join(names), [caption], str(number), split)
        else:
            yield Record(address, [caption], address, split)


XTD10 = re.compile(r"test_1kcaptions_(\w+)\.txt")


def read_xtd10(path: Path) -> Iterator[Record]:
    """XTD10's ``test_1kcaptions_xx.txt``, or a folder of them: a caption a line, a file a language.

    The pictures are COCO's; ``test_image_names.txt``, beside the file, names them, a line each. The
    language is as in the file's name (Japanese is ``jp`` there).
    """
    folder = path if path.is_dir() else path.parent
    listing = folder / "test_image_names.txt"
    whole = path.is_dir() or path.name == listing.name
    files = sorted(folder.glob("test_1kcaptions_*.txt")) if whole else [path]
    if not listing.exists():
        raise UserError(f"{path}: {listing.name}, which names its pictures, is not beside it")
    names = [name for _, name in text_lines(listing)]
    for file in files:
        lang = matched(XTD10, file.name, f"{file}", "test_1kcaptions_de.txt")[1]
        # Not text_lines: a blank line is a picture without a caption.
        captions = read_text(file).removesuffix("\n").split("\n")
        while len(captions) > len(names) and not captions[-1].strip():
            captions.pop()
        if len(captions) != len(names):
            counts = f"{len(captions)} captions, but {listing} names {len(names)} pictures"
            raise UserError(f"{file}: has {counts}")
        for name, caption in zip(names, captions, strict=True):
            yield Record(name, [caption.strip()], name, "test", lang)


def read_msrvtt(path: Path) -> Iterator[Record]:
    """MSR-VTT's ``*videodatainfo*.json``: 20 captions a video, split train, val or test."""
    document = json_object(path)
    captions: dict[str, list[str]] = {}
    for where, entry in entries(document, "sentences", path):
        name = name_in(entry, "video_id", where)
        captions.setdefault(name, []).append(get(entry, "caption", str, where))
    splits: dict[str, str | None] = {}
    links: dict[str, str | None] = {}
    for where, entry in entries(document, "videos", path):
        name = name_in(entry, "video_id", where)
        unlike(splits, name, get(entry, "split", str, where, default=None), where)
        unlike(links, name, get(entry, "url", str, where, default=None), where)
    if unknown := captions.keys() - splits:
        raise UserError(f"{path}: sentences describe {min(unknown)}, which is not among its videos")
    for name, split in splits.items():
        yield Record(video=f"{name}.mp4", captions=captions.get(name, []), id=name, split=split)


MSVD = re.compile(r"([\w-]{11}_\d+_\d+)\s+(\S.*)")


def read_msvd(path: Path) -> Iterator[Record]:
    """MSVD's ``AllVideoDescriptions.txt``, ``clip caption`` a line; or ``{clip: [captions]}`` JSON.

    The split is that of ``{train,val,test}_list.txt``, if these are beside the file; or else, with
    ``youtube_mapping.txt``, the usual one: videos 1 to 1200, to 1300 and to 1970.
    """
    captions: dict[str, list[str]] = {}
    if path.suffix == ".json":
        for clip, texts in json_object(path).items():
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise UserError(f"{path}, {clip}: expected a list of captions")
            captions.setdefault(clip.removesuffix(".avi"), []).extend(texts)
    else:
        for where, line in text_lines(path):
            if line.startswith("#"):
                continue
            clip, caption = matched(MSVD, line, where, "mv89psg6zh4_33_46 a bird bathes").groups()
            captions.setdefault(clip, []).append(caption)
    numbers = youtube_mapping(path)
    splits = {
        clip: "train" if number <= 1200 else "val" if number <= 1300 else "test"
        for clip, number in numbers.items()
    }
    listed = splits_beside(path, **{part: f"{part}_list.txt" for part in ("train", "val", "test")})
    splits |= {name.removesuffix(".avi"): part for name, part in listed.items()}
    for clip, texts in captions.items():
        names = [f"{clip}.avi", *([f"vid{numbers[clip]}.avi"] if clip in numbers else [])]
        yield Record(video=OR.join(names), captions=texts, id=clip, split=splits.get(clip))


MAPPED = re.compile(r"(\S+)\s+vid(\d+)")


def youtube_mapping(path: Path) -> dict[str, int]:
    """``youtube_mapping.txt`` beside a file, ``mv89psg6zh4_33_46 vid1`` a line: clip -> number."""
    numbers: dict[str, int] = {}
    for where, line in text_lines(path.with_name("youtube_mapping.txt"), optional=True):
        clip, number = matched(MAPPED, line, where, "mv89psg6zh4_33_46 vid1").groups()
        unlike(numbers, clip, int(number), where)
    return numbers


def read_audiocaps(path: Path) -> Iterator[Record]:
    """AudioCaps' ``{train,val,test}.csv`` (https://audiocaps.github.io): a record a clip.

    Downloaders name a sound by its YouTube id (alone, after ``Y``, or before the start in seconds)
    or by the caption's id. Sounds that are not there are left out and counted. Of two clips of one
    video each has its start in its id and in its names.
    """
    clips: dict[tuple[str, int], tuple[str, list[str]]] = {}
    for where, row in _rows(path, ("audiocap_id", "youtube_id", "start_time", "caption")):
        name, start = row["youtube_id"], row["start_time"]
        try:
            seconds = int(float(start))
        except (ValueError, OverflowError):
            raise UserError(f"{where}: 'start_time' should be seconds, found {start!r}") from None
        _, captions = clips.setdefault((name, seconds), (row["audiocap_id"], []))
        captions.append(row["caption"])
    times = Counter(name for name, _ in clips)
    for (name, seconds), (number, captions) in clips.items():
        own = f"{name}_{seconds}"
        names = [own, f"Y{own}", f"{name}_{seconds * 1000}_{seconds * 1000 + 10_000}", number]
        if times[name] == 1:
            own, names = name, [name, f"Y{name}", *names]
        sound = OR.join(f"{each}.wav" for each in names)
        yield Record(audio=sound, captions=captions, id=own, split=split_in(path.name))


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
    """The rows of a CSV file, which must have all the columns: ("FILE, line 3", row)."""
    with open_text(path) as file:
        rows = csv.DictReader(file)
        try:
            for row in rows:
                where = f"{path}, line {rows.line_num}"
                if not any(map(str.strip, filter(None, row.values()))) and None not in row:
                    continue  # a line of blanks
                if None in row:
                    raise UserError(f"{where}: has more columns than the first line; quote commas")
                if lacks := next((name for name in columns if row.get(name) is None), None):
                    raise UserError(f"{where}: {lacks!r} is missing; it should be a text")
                yield where, row
        except csv.Error as error:
            raise UserError(f"{path}, line {rows.line_num}: is not CSV ({error})") from None


def _row(line: str, where: str) -> list[str]:
    """The columns of a line of CSV."""
    try:
        return next(csv.reader([line]))
    except csv.Error as error:
        raise UserError(f"{where}: is not CSV ({error})") from None
