"""Data sets: reading them, their splits, and the order of training.

`read` turns a file or a folder into a list of `Record`, whatever its format. The other rooms of the
family are behind this one: `data_records` (the record), `data_formats` (which format a file has),
`data_captions`, `data_questions` and `data_folders` (a reader for each), `data_files` (where the
pictures are).
"""

import hashlib
import logging
from pathlib import Path

import numpy as np

from tinyvl import UserError
from tinyvl.data_files import locate, locate_own
from tinyvl.data_folders import first_synonyms
from tinyvl.data_formats import EITHER, FOLDERS, LINKS, OWN, READERS, readable, recognise
from tinyvl.data_records import Record, line_of, text_lines

__all__ = [
    "Record", "epoch_order", "first_synonyms", "hold_out", "length_buckets", "line_of", "read",
    "recognise", "select_split", "text_lines",
]  # fmt: skip
log = logging.getLogger(__name__)


def read(
    path: str | Path,
    *,
    format: str | None = None,
    split: str | None = None,
    images: str | Path | None = None,
    lang: str | None = None,
    files: bool = True,
    blank: bool = False,
) -> list[Record]:
    """Read a data set.

    To take several splits of a file, read it once without ``split`` and then use `select_split`.

    Args:
        path: a file or folder in one of the formats of `data_formats.READERS`, or a folder that
            has one such file in it.
        format: a name in `data_formats.READERS`. Default: recognised from the content.
        split: keep this split (see `select_split`).
        images: the folder of the pictures (videos, sounds). Default: JSON Lines name paths relative
            to the file, and `data_files.locate` looks for those of published formats.
        lang: keep the records in this language, and those that name none; "en,de" are two, and
            "all" is every one.
        files: False keeps records whose file is missing (to score predictions, say).
        blank: keep captions that are blank, and images without captions in a list of captions.

    Raises:
        UserError: no such file, an unknown format, a malformed record, missing pictures, or
            nothing left to keep.
    """
    path = Path(path).expanduser()
    if format is None:
        path, format = recognise(path)
    _check_format(path, format)
    with readable(path):
        records = list(READERS[format](path))
    if not records:
        raise UserError(f"{path} holds no {'pictures' if format in FOLDERS else 'records'}")
    if not blank:
        records = _without_blanks(records, path, format)
    if format in OWN and images is None:
        locate_own(records, path if path.is_dir() else path.parent, path, files)
    else:
        folder = None if images is None else Path(images).expanduser()
        drop = files and format in LINKS
        records = locate(records, path, images=folder, required=files, drop=drop)
    if lang not in (None, "all"):
        found = {record.lang for record in records}
        wanted = {None, *(name.strip() for name in lang.split(","))}
        records = [record for record in records if record.lang in wanted]
        if not records:
            raise UserError(f"{path} has no records in {lang!r}, only in {_listed(found)}", 2)
    try:
        return records if split is None else select_split(records, split)
    except UserError as error:
        raise UserError(f"{path}: {error}", 2) from None


def _check_format(path: Path, format: str) -> None:
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if format not in READERS:
        raise UserError(f"unknown format {format!r}; choose from {', '.join(READERS)}", 2)
    if format not in EITHER and path.is_dir() != (format in FOLDERS):
        wants = "a folder" if format in FOLDERS else "a file"
        raise UserError(f"format {format!r} reads {wants}, which {path} is not", 2)


def _without_blanks(records: list[Record], path: Path, format: str) -> list[Record]:
    for record in records:
        record.captions = [caption for caption in record.captions if caption.strip()]
    if format not in ("coco", "nocaps"):
        return records
    # COCO lists images and captions apart, and its test set has no captions at all.
    captioned = [record for record in records if record.captions]
    if 0 < len(captioned) < len(records):
        bare = len(records) - len(captioned)
        log.warning("%s: left out %d of %d images: no caption", path, bare, len(records))
        return captioned
    return records


def select_split(records: list[Record], want: str) -> list[Record]:
    """The records of one split. ``"train"`` includes Karpathy's ``restval`` (COCO: 113,287 images).

    Raises:
        UserError: there is no such split.
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

    All records of an image are on one side, which a hash of its id and the seed decides: it stays
    there when records are added. ``val`` has about ``fraction`` of the images, at least one.

    Raises:
        UserError: fewer than two images.
    """
    ids: dict[str, str] = {}
    for record in records:
        ids[record.path] = min(record.id, ids.get(record.path, record.id))
    if len(ids) < 2:
        raise UserError("one picture cannot be split into training and validation: give more", 2)

    def place(image: str) -> float:  # uniform in [0, 1)
        digest = hashlib.sha256(f"{seed}:{ids[image]}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    places = {image: place(image) for image in ids}
    order = sorted(places, key=lambda image: (places[image], ids[image], image))
    count = sum(value < fraction for value in places.values())
    held = set(order[: min(max(count, 1), len(order) - 1)])
    train = [record for record in records if record.path not in held]
    return train, [record for record in records if record.path in held]


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """The order of ``n`` examples in an epoch: a permutation by PCG64, seeded [seed, epoch]."""
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


def _listed(names: set[str | None]) -> str:
    return ", ".join(sorted(repr(name) for name in names if name is not None)) or "none"
