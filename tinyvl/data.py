"""Records of pictures and captions, readers of the published formats, and the order of training.

A record in a JSON Lines file is one line, its paths relative to the file:

    {"image": "images/1.jpg", "captions": ["a dog runs"], "id": "1", "split": "train", "lang": "en"}

Only ``image`` is needed. `read` turns a file or a folder into a list of `Record`, whatever its
format: `READERS` names them, and the format is recognised from what the file holds. A field that
is missing or malformed is a `UserError` that names the file and the record.
"""

import csv
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinyvl import UserError

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset(
    [
        *(".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
        *(".ppm", ".pgm", ".heic", ".heif", ".avif"),
    ]
)
# Where the published data sets keep their pictures, seen from the captions' folder or its parent.
PICTURE_FOLDERS = (
    "",
    "images",
    "Images",
    *("train2014", "val2014", "train2017", "val2017"),
    *("Flicker8k_Dataset", "Flickr8k_Dataset", "flickr30k-images", "flickr30k_images"),
)


@dataclass(slots=True)
class Record:
    """A picture with its captions.

    ``image`` is an absolute path (in what a reader yields, the path as the file has it), ``id``
    names the picture on any machine, ``split`` and ``lang`` are None where the file has none.
    """

    image: str
    captions: list[str]
    id: str
    split: str | None = None
    lang: str | None = None


def read(
    path: str | Path,
    *,
    format: str | None = None,
    split: str | None = None,
    images: str | Path | None = None,
    lang: str | None = None,
) -> list[Record]:
    """Read a data set.

    Args:
        path: a file in one of the formats of `READERS`, a folder that holds one such file, or a
            folder of pictures.
        format: a name in `READERS`; otherwise recognised from the content.
        split: keep this part (see `select_split`).
        images: the folder that the file's picture paths are relative to. Otherwise they are
            relative to the file, or to where the published data sets keep them. Only the first
            few pictures are looked for.
        lang: keep the records in this language, and those that name none.

    Raises:
        UserError: no such file, an unknown format, a malformed record, missing pictures, or
            nothing left to keep.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if format is None:
        path, format = _recognise(path)
    elif format not in READERS:
        raise UserError(f"unknown format {format!r}; choose from {', '.join(READERS)}", 2)
    elif path.is_dir() != (format == "folder"):
        wants = "a folder" if format == "folder" else "a file"
        raise UserError(f"format {format!r} reads {wants}, and {path} is none", 2)
    records = list(READERS[format](path))
    if not records:
        raise UserError(f"{path} holds no {'pictures' if format == 'folder' else 'records'}")
    _locate(records, path, format, images)
    if lang is not None:
        found = {record.lang for record in records}
        records = [record for record in records if record.lang in (lang, None)]
        if not records:
            raise UserError(f"{path} has no records in {lang!r}, only in {_listed(found)}", 2)
    if split is None:
        return records
    try:
        return select_split(records, split)
    except UserError as error:
        raise UserError(f"{path}: {error}", 2) from None


def select_split(records: list[Record], want: str) -> list[Record]:
    """The records of one part; ``"train"`` has Karpathy's ``restval`` too (COCO: 113,287 images).

    Raises:
        UserError: there is no such part.
    """
    names = {"train", "restval"} if want == "train" else {want}
    chosen = [record for record in records if record.split in names]
    if not chosen:
        found = {record.split for record in records} - {None}
        has = f"only {_listed(found)}" if found else "as its records name no split"
        raise UserError(f"there is no split {want!r}, {has}", 2)
    return chosen


def hold_out(
    records: list[Record], fraction: float = 0.02, seed: int = 0
) -> tuple[list[Record], list[Record]]:
    """Split off a validation part by image: ``(train, val)``, each in the order of ``records``.

    An image's side is a hash of its id and the seed, so it stays when records are added, and all
    records of an image are on one side. ``val`` has about ``fraction`` of the images, at least one.

    Raises:
        UserError: fewer than two images.
    """
    ids: dict[str, str] = {}
    for record in records:
        ids[record.image] = min(record.id, ids.get(record.image, record.id))
    if len(ids) < 2:
        raise UserError("one picture cannot be split into training and validation: give more", 2)

    def place(image: str) -> float:  # uniform in [0, 1)
        digest = hashlib.sha256(f"{seed}:{ids[image]}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    places = {image: place(image) for image in ids}
    order = sorted(places, key=lambda image: (places[image], ids[image], image))
    count = sum(value < fraction for value in places.values())
    held = set(order[: min(max(count, 1), len(order) - 1)])
    train = [record for record in records if record.image not in held]
    return train, [record for record in records if record.image in held]


def tidy(caption: str) -> str:
    """A caption as training reads it; tidying twice changes nothing more.

    White space is collapsed, the space that tokenised captions have before ``. , ; : ! ?``,
    ``'s`` and ``n't`` is dropped, LaTeX quotes become ``"``, and the final full stop goes: nine in
    ten of Flickr8k's captions have one and the rest do not, and the metrics' tokenizer ignores it.
    """
    text = " ".join(caption.split())
    text = re.sub(r" (?=[.,;:!?](?!\w)|(?:'s|n't)\b)", "", text)  # (?!\w): not before ".5"
    return text.replace("``", '"').replace("''", '"').rstrip(" .")


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """The order of ``n`` examples in an epoch: a pure function of (seed, epoch).

    A permutation from NumPy's PCG64 seeded with ``[seed, epoch]``.
    """
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(n).tolist()


def length_buckets(
    lengths: list[int], batch: int, seed: int, epoch: int, pool: int = 50, shuffle: bool = True
) -> list[list[int]]:
    """Batches of examples of similar length, in random order: a pure function of (seed, epoch).

    The epoch's order is cut into pools of ``pool`` batches, each pool is sorted by length and cut
    into batches, and the batches are shuffled. Each index occurs once; one batch may be short.
    Without ``shuffle`` the pools stay together, each a random part of the examples.
    """
    order = epoch_order(len(lengths), seed, epoch)
    batches = []
    for start in range(0, len(order), pool * batch):
        chunk = sorted(order[start : start + pool * batch], key=lengths.__getitem__)
        batches += [chunk[i : i + batch] for i in range(0, len(chunk), batch)]
    if not shuffle:
        return batches
    rng = np.random.Generator(np.random.PCG64([seed, epoch, 1]))
    return [batches[i] for i in rng.permutation(len(batches))]


# Readers: each yields the records of a path, with picture paths as the file has them.


def read_jsonl(path: Path) -> Iterator[Record]:
    """This package's own format, a record a line; one ``caption`` does for ``captions`` too."""
    for where, line in _lines(path):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where} is not JSON: {error}") from None
        image = _picture(entry, "image", where)
        plural = "captions" if "captions" in entry else "caption"
        captions = _field(entry, plural, (list, str), where, default=[])
        captions = [captions] if isinstance(captions, str) else captions
        if not all(isinstance(caption, str) for caption in captions):
            raise UserError(f"{where}: 'captions' should be texts")
        yield Record(
            image,
            [caption for caption in captions if caption.strip()],
            str(_field(entry, "id", (str, int), where, default=image)),
            _field(entry, "split", str, where, default=None),
            _field(entry, "lang", str, where, default=None),
        )


def read_karpathy(path: Path) -> Iterator[Record]:
    """Karpathy's ``dataset_coco.json``, ``dataset_flickr8k.json``, ``dataset_flickr30k.json``."""
    document = _json(path)
    for i, entry in enumerate(_field(document, "images", list, path)):
        where = f"{path}, images[{i}]"
        name = _picture(entry, "filename", where)
        folder = _field(entry, "filepath", str, where, default="")
        captions = [
            _field(sentence, "raw", str, f"{where}.sentences[{j}]")
            for j, sentence in enumerate(_field(entry, "sentences", list, where))
        ]
        number = _field(entry, "imgid", (int, str), where, default=name)
        yield Record(
            f"{folder}/{name}" if folder else name,
            [caption for caption in captions if caption.strip()],
            str(_field(entry, "cocoid", (int, str), where, default=number)),
            _field(entry, "split", str, where),
        )


def read_coco(path: Path) -> Iterator[Record]:
    """COCO's ``captions_*.json``. Images without a caption are left out and counted."""
    document = _json(path)
    captions: dict[int | str, list[str]] = {}
    names: dict[int | str, str] = {}
    for i, entry in enumerate(_field(document, "images", list, path)):
        where = f"{path}, images[{i}]"
        number = _field(entry, "id", (int, str), where)
        names[number] = _picture(entry, "file_name", where)
    for i, entry in enumerate(_field(document, "annotations", list, path)):
        where = f"{path}, annotations[{i}]"
        number = _field(entry, "image_id", (int, str), where)
        if number not in names:
            raise UserError(f"{where}: 'image_id' {number} is not among the images")
        caption = _field(entry, "caption", str, where)
        if caption.strip():
            captions.setdefault(number, []).append(caption)
    if len(captions) < len(names):
        bare = len(names) - len(captions)
        log.warning("%s: left out %d of %d images: no caption", path, bare, len(names))
    for number, name in names.items():
        if number in captions:
            yield Record(name, captions[number], str(number))


# The second number of results.csv is not always followed by a bar: one line of the original lacks
# it ("2199200615.jpg| 4   A dog runs across the grass .").
FLICKR_TOKEN = re.compile(r"([^\t]+)#\d+\t\s*(.*)")
FLICKR_RESULTS = re.compile(r"([^|,]+?)\s*\|\s*\d+\s*\|?\s*(.*)")
FLICKR_CSV = re.compile(r"[^,\t|]+\.(jpg|jpeg|png)\s*,.*", re.IGNORECASE)
FLICKR_HEADER = re.compile(r"image,\s*caption|image_name\s*\|\s*comment_number\s*\|\s*comment")


def read_flickr(path: Path) -> Iterator[Record]:
    """Flickr8k's and Flickr30k's caption lists, in each of the three shapes they come in.

    ``1.jpg#0<tab>caption`` (``Flickr8k.token.txt``, ``results_20130124.token``), ``1.jpg,caption``
    under a header (``captions.txt``) and ``1.jpg| 0| caption`` under a header (``results.csv``).
    The split is that of ``Flickr_8k.{train,dev,test}Images.txt`` where these lie beside the file.
    """
    captions: dict[str, list[str]] = {}
    for where, line in _lines(path):
        if FLICKR_HEADER.fullmatch(line):
            continue
        match = FLICKR_TOKEN.fullmatch(line) or FLICKR_RESULTS.fullmatch(line)
        name, *rest = match.groups() if match else next(csv.reader([line]))
        if not rest or IMAGE_SUFFIXES.isdisjoint(Path(name.lower()).suffixes):
            raise UserError(
                f"{where}: expected 'x.jpg#0<tab>caption', 'x.jpg,caption' or 'x.jpg| 0| caption', "
                f"found {line[:60]!r}"
            )
        captions.setdefault(name, []).append(",".join(rest))
    splits = {
        name: split
        for split, part in (("train", "train"), ("val", "dev"), ("test", "test"))
        if (listing := path.with_name(f"Flickr_8k.{part}Images.txt")).exists()
        for _, name in _lines(listing)
    }
    # Flickr8k lists captions of "2258277193_586949ec62.jpg.1", a picture that it does not have.
    odd = {name for name in captions if Path(name).suffix.lower() not in IMAGE_SUFFIXES}
    if odd:
        log.warning("%s: left out %d names that are no pictures: %s", path, len(odd), min(odd))
    for name, texts in captions.items():
        if name not in odd:
            yield Record(name, [text for text in texts if text.strip()], name, splits.get(name))


def read_folder(path: Path) -> Iterator[Record]:
    """The pictures in a folder and below it, by name; ``x.txt`` beside ``x.jpg`` has captions."""
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path)
        hidden = any(part.startswith(".") for part in name.parts)
        if file.suffix.lower() not in IMAGE_SUFFIXES or hidden or not file.is_file():
            continue
        beside = file.with_suffix(".txt")
        captions = [line for _, line in _lines(beside)] if beside.exists() else []
        yield Record(name.as_posix(), captions, name.as_posix())


READERS = {
    "jsonl": read_jsonl,
    "karpathy": read_karpathy,
    "coco": read_coco,
    "flickr": read_flickr,
    "folder": read_folder,
}


def _recognise(path: Path) -> tuple[Path, str]:
    """The file to read and its format; for a folder, the one data set in it or the folder."""
    if not path.is_dir():
        format = _sniff(path) or ("jsonl" if path.suffix == ".jsonl" else None)
        if format is None:
            raise UserError(
                f"{path} is in no format that tinyvl recognises ({', '.join(READERS)}): "
                "look at the file, or name its format with --format"
            )
        return path, format
    listings = ("*.jsonl", "*.json", "*.token", "*.token.txt", "captions.txt", "results.csv")
    files = sorted({file for pattern in listings for file in path.glob(pattern) if file.is_file()})
    found = [(file, format) for file in files if (format := _sniff(file))]
    if len(found) > 1:
        names = ", ".join(file.name for file, _ in found[:3]) + (", …" if len(found) > 3 else "")
        raise UserError(f"{path} holds several data sets ({names}): name one of these files", 2)
    return found[0] if found else (path, "folder")


def _sniff(path: Path) -> str | None:
    """The format of a file, from its first megabyte: COCO's files are too large to parse twice."""
    with open(path, "rb") as file:
        text = file.read(2**20).decode("utf-8-sig", errors="ignore").lstrip()
    first = text.partition("\n")[0].rstrip()
    if text.startswith("{"):
        if re.search(r'"images"\s*:\s*\[', text):
            return "karpathy" if '"sentences"' in text else "coco"
        return "jsonl" if re.search(r'"image"\s*:', first) else None
    shapes = (FLICKR_HEADER, FLICKR_TOKEN, FLICKR_RESULTS, FLICKR_CSV)
    return "flickr" if any(shape.fullmatch(first) for shape in shapes) else None


def _locate(records: list[Record], path: Path, format: str, images: str | Path | None) -> None:
    """Make the records' picture paths absolute; the first few decide which folder they are in."""
    home = path if path.is_dir() else path.parent
    if images is not None:
        home = Path(images).expanduser()
    if images is None and format in ("jsonl", "folder"):
        folders = [home]
    else:
        bases = [home] if images is not None else [home, home.absolute().parent]
        folders = [base / name for base in bases for name in PICTURE_FOLDERS]
    for folder in folders:
        if any((folder / record.image).is_file() for record in records[:5]):
            for record in records:
                record.image = os.path.abspath(os.path.join(folder, record.image))
            return
    raise UserError(
        f"{path}: its first picture, {records[0].image}, is not in {home}"
        f"{'' if len(folders) == 1 else ' or the usual folders near it'}; "
        "say with --images which folder the pictures are in"
    )


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines of a text file that are not blank, stripped, each after the name of its place."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line := line.strip():
                    yield f"{path}, line {number}", line
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text in UTF-8") from None


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text in UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}") from None


REQUIRED = object()
KINDS = {str: "a text", int: "a number", list: "a list"}


def _field(
    entry: Any, key: str, kinds: type | tuple, where: object, default: Any = REQUIRED
) -> Any:
    """``entry[key]``, which must be of one of the kinds; null counts as missing."""
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected a JSON object, found {str(entry)[:60]!r}")
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    value = entry.get(key)
    if value is None:
        if default is REQUIRED:
            raise UserError(f"{where}: {key!r} is missing; it should be {KINDS[kinds[0]]}")
        return default
    if not isinstance(value, kinds):
        wanted = " or ".join(KINDS[kind] for kind in kinds)
        raise UserError(f"{where}: {key!r} should be {wanted}, found {str(value)[:60]!r}")
    return value


def _picture(entry: Any, key: str, where: object) -> str:
    name = _field(entry, key, str, where)
    if not name.strip():
        raise UserError(f"{where}: {key!r} should name a picture, found {name!r}")
    return name


def _listed(names: set[str | None]) -> str:
    return ", ".join(sorted(repr(name) for name in names if name is not None)) or "none"
