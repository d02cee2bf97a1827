"""Where the files of a published data set are: it says their names, rarely their folder."""

import logging
import os
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path

from tinyvl import UserError
from tinyvl.data_records import KIND_OF, OR, Record

log = logging.getLogger(__name__)

_PARTS = ("", "train", "val", "test", "training", "validation", "development", "evaluation")
# Where they are kept, seen from the folder of the annotations or its parent.
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
        *("videos/all", "train-video", "test-video"),
        *(f"videos/{part}" for part in ("train", "val", "test")),
    ),
    "audio": tuple(
        f"{folder}/{part}".strip("/")
        for folder, part in product(
            ("", "audio", "audios", "wav", "wavs", "waveforms", "clotho_audio_files"), _PARTS
        )
    )
    + tuple(
        f"clotho_audio_{part}{inner}"
        for part in ("development", "validation", "evaluation")
        for inner in ("", f"/{part}")
    ),
}
WORDS = {
    "image": ("picture", "pictures"),
    "video": ("video", "videos"),
    "audio": ("sound", "sounds"),
}


def locate_own(records: list[Record], folder: Path, path: Path, required: bool = True) -> None:
    """Make the paths of records absolute that are relative to a folder.

    Only the first few are looked for: a run reads its records often, and says then what is missing.
    """
    if required and not any((folder / record.path).is_file() for record in records[:5]):
        raise _nowhere(records[0], path, f"{folder}")
    base = os.path.abspath(folder)
    for record in records:
        record.path = os.path.normpath(os.path.join(base, record.path))


def locate(
    records: list[Record],
    path: Path,
    *,
    images: Path | None = None,
    required: bool = True,
    drop: bool = False,
) -> list[Record]:
    """Find the files of a published data set, and make their paths absolute.

    A file is looked for under each name it may have (`OR`), with any suffix of its kind, in each of
    the usual folders. Folders are listed once; no file is touched.

    Args:
        records: changed in place.
        path: the annotations' file, or folder.
        images: look here instead of in the annotations' folder and its parent.
        required: whether it is an error that none is found; else they are where the first of the
            places would have them.
        drop: leave out those that are not there.

    Raises:
        UserError: none of the files is there.
    """
    home = path if path.is_dir() else path.parent
    bases = [home.absolute(), home.absolute().parent] if images is None else [images.absolute()]
    finder = Finder(bases)
    first = finder.settle(records)
    if first is None and required:
        where = f"{home} or the usual folders near it" if images is None else f"{images}"
        raise _nowhere(records[0], path, where)
    found, missing = [], []
    for record in records:
        file = None if first is None else finder.find(record)
        if file is None:
            missing.append(record)
            name = record.path.split(OR)[0]
            file = os.path.normpath(os.path.join(first or bases[0], name))
            if not drop:
                found.append(record)
        else:
            found.append(record)
        record.path = file
    if missing and first is not None:
        log.warning(
            "%s: %s %d of %d %s: not there, the first is %s",
            *(path, "left out" if drop else "did not find", len(missing), len(records)),
            *(WORDS[missing[0].modality][1], missing[0].path),
        )
    return found


def _nowhere(record: Record, path: Path, where: str) -> UserError:
    one, many = WORDS[record.modality]
    return UserError(
        f"{path}: its first {one}, {record.path.split(OR)[0]}, is not in {where}; "
        f"say with --images which folder the {many} are in"
    )


class Finder:
    """Looks for files in the usual folders of some bases; lists each folder once."""

    def __init__(self, bases: Sequence[Path]):
        self.bases = bases
        self.places: dict[str, list[str]] = {}  # by modality: the folders that exist
        self.listings: dict[str, dict[str | tuple[str, str], str]] = {}

    def settle(self, records: Iterable[Record]) -> str | None:
        """The folder of the first file that is found: others are looked for there first."""
        for record in records:
            places = self._places(record.modality)
            for place in places:
                if self._in([place], record):
                    places.remove(place)
                    places.insert(0, place)
                    return place
        return None

    def find(self, record: Record) -> str | None:
        """A record's file, or None."""
        return self._in(self._places(record.modality), record)

    def _places(self, modality: str) -> list[str]:
        if modality not in self.places:
            places = [os.path.join(b, name) for b in self.bases for name in FOLDERS[modality]]
            places = dict.fromkeys(map(os.path.normpath, places))
            self.places[modality] = [place for place in places if os.path.isdir(place)]
        return self.places[modality]

    def _in(self, places: list[str], record: Record) -> str | None:
        modality, names = record.modality, []
        for name in record.path.split(OR):
            head, base = os.path.split(name)
            stem, suffix = os.path.splitext(base)
            own = KIND_OF.get(suffix.lower()) == modality
            names.append((head, base, (modality, stem if own else base)))
        for place in places:
            for head, base, key in names:
                folder = os.path.join(place, head) if head else place
                listing = self.listings.get(folder) or self._listing(folder)
                if file := listing.get(base) or listing.get(key):
                    return os.path.normpath(os.path.join(folder, file))
        return None

    def _listing(self, folder: str) -> dict[str | tuple[str, str], str]:
        """The names in a folder, by themselves and by (kind of file, name without suffix)."""
        try:
            names = sorted(os.listdir(folder))
        except OSError:
            names = []
        listing: dict[str | tuple[str, str], str] = {"": ""}
        for name in names:
            stem, suffix = os.path.splitext(name)
            if kind := KIND_OF.get(suffix.lower()):
                listing.setdefault((kind, stem), name)
        self.listings[folder] = listing | {name: name for name in names}
        return self.listings[folder]
