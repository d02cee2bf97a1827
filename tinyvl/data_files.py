"""Where the files of a published data set are: it gives their names, rarely their folder."""

import logging
import os
from collections.abc import Callable
from functools import cache, partial
from itertools import product
from pathlib import Path

from tinyvl import UserError
from tinyvl.data_records import OR, Record
from tinyvl.media import KIND_OF

log = logging.getLogger(__name__)

_CLOTHO = ("validation", "development", "evaluation")
_PARTS = ("", "train", "val", "test", "training", *_CLOTHO)
_SOUNDS = (".", "audio", "audios", "wav", "wavs", "waveforms", "clotho_audio_files")
# The usual folders, below the folder of the annotations or below its parent.
FOLDERS = {
    "image": (
        *("", "images", "Images", "images/train", "images/val", "images/test"),
        *("train2014", "val2014", "train2017", "val2017", "test2014", "test2015", "test2017"),
        *(f"images/{part}{year}" for part in ("train", "val", "test") for year in (2014, 2017)),
        *("images/test2015", "Flicker8k_Dataset", "Flickr8k_Dataset"),
        *("flickr30k-images", "flickr30k_images"),
        *("VG_100K", "VG_100K_2", "images/VG_100K", "images/VG_100K_2", "nyu_depth_images"),
        *("train", "val", "test", "training", "validation", "train_image", "val_image"),
    ),
    "video": (
        *("", "videos", "video", "clips", "YouTubeClips", "TrainValVideo", "TestVideo", "all"),
        *("videos/all", "train-video", "test-video", "videos/train", "videos/val", "videos/test"),
    ),
    "audio": (
        *(f"{folder}/{part}" for folder, part in product(_SOUNDS, _PARTS)),
        *(f"clotho_audio_{part}/{inner}" for part in _CLOTHO for inner in ("", part)),
    ),
}
PLURAL = {"image": "pictures", "video": "videos", "audio": "sounds"}


def locate_own(records: list[Record], folder: Path, path: Path, required: bool = True) -> None:
    """Make paths that are relative to a folder absolute.

    Only the first few files are looked for: a run reads its records often, and says later what is
    missing. Raises UserError if they are ``required`` and none of the few is there.
    """
    if required and not any((folder / record.path).is_file() for record in records[:5]):
        raise _nowhere(records[0], path, folder)
    base = os.path.abspath(folder)
    for record in records:
        record.path = os.path.normpath(os.path.join(base, record.path))


def locate(
    records: list[Record], path: Path, *, images: Path | None = None, required: bool = True,
    drop: bool = False,
) -> list[Record]:  # fmt: skip
    """Find the files of a published data set, and make their paths absolute.

    A file is looked for under each name it may have (`OR`), with any suffix of its kind, in each of
    the usual folders: below ``images``, or else below the annotations' folder and its parent.
    Folders are listed once, and no file is opened. Records whose file is missing are left out if
    ``drop``; otherwise they get the path that it would have beside the first file that is found, or
    in the first of the places. Raises UserError if files are ``required`` and none is found.
    """
    home = path if path.is_dir() else path.parent
    bases = [home.absolute(), home.absolute().parent] if images is None else [images.absolute()]
    usual, listing = cache(partial(_usual, bases)), cache(_listing)
    found, missing, first = [], [], None
    for record in records:
        places = usual(record.modality)
        place, file = _find(record, places, listing)
        (found if file else missing).append(record)
        if file and first is None:  # look here first for the others
            first = place
            places.insert(0, places.pop(places.index(place)))
        record.path = file or record.path
    if first is None and required:
        raise _nowhere(records[0], path, images or f"{home} or the usual folders near it")
    for record in missing:
        name = record.path.split(OR)[0]
        record.path = os.path.normpath(os.path.join(first or bases[0], name))
    if missing and first is not None:
        log.warning(
            "%s: %s %d of %d %s: not there, the first is %s",
            *(path, "left out" if drop else "did not find", len(missing), len(records)),
            *(PLURAL[missing[0].modality], missing[0].path),
        )
    return found if drop else records


def _nowhere(record: Record, path: Path, where: object) -> UserError:
    many, name = PLURAL[record.modality], record.path.split(OR)[0]
    advice = f"name the folder of the {many} with --images"
    return UserError(f"{path}: its first {many[:-1]}, {name}, is not in {where}; {advice}")


def _usual(bases: list[Path], modality: str) -> list[str]:
    """The usual folders that exist."""
    places = (os.path.join(base, name) for base in bases for name in FOLDERS[modality])
    return [place for place in dict.fromkeys(map(os.path.normpath, places)) if os.path.isdir(place)]


Listing = dict[str | tuple[str, str], str]


def _find(
    record: Record, places: list[str], listing: Callable[[str], Listing]
) -> tuple[str, str] | tuple[None, None]:
    """The first place that has a record's file, and the file."""
    modality, names = record.modality, []
    for name in record.path.split(OR):
        head, base = os.path.split(name)
        stem, suffix = os.path.splitext(base)
        own = KIND_OF.get(suffix.lower()) == modality
        names.append((head, base, (modality, stem if own else base)))
    for place in places:
        for head, base, key in names:
            folder = os.path.join(place, head) if head else place
            known = listing(folder)
            if file := known.get(base) or known.get(key):
                return place, os.path.normpath(os.path.join(folder, file))
    return None, None


def _listing(folder: str) -> Listing:
    """The names in a folder, by themselves and by (kind of file, name without suffix)."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        names = []
    listing: Listing = {}
    for name in names:
        stem, suffix = os.path.splitext(name)
        if kind := KIND_OF.get(suffix.lower()):
            listing.setdefault((kind, stem), name)
    return listing | {name: name for name in names}
