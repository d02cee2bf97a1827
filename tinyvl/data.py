"""Data sets: reading them, their splits, and the order of training.

`read` turns a file or a folder into a list of `Record`, whatever its format, which is recognised by
content, not by name. The other rooms of the family are behind this one: `data_records` (the
record), `data_captions`, `data_questions` and `data_folders` (a reader for each format),
`data_files` (where the pictures are).
"""

import hashlib
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from tinyvl import UserError
from tinyvl import data_captions as captions
from tinyvl import data_folders as folders
from tinyvl import data_questions as questions
from tinyvl.data_files import locate, locate_own
from tinyvl.data_folders import SYNSET, first_synonyms, read_names
from tinyvl.data_records import Record, clashes, line_of, part_of, read_jsonl, split_in
from tinyvl.files import not_null, open_text
from tinyvl.text import has_words

__all__ = [
    "SYNSET",
    "Record",
    "clashes",
    "first_synonyms",
    "line_of",
    "part_of",
    "read_names",
    "split_in",
]
log = logging.getLogger(__name__)

READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    "jsonl": read_jsonl,  # this package's own
    "karpathy": captions.read_karpathy,  # dataset_{coco,flickr8k,flickr30k}.json
    "coco": captions.read_coco,  # captions_*.json, image_info_*.json
    "nocaps": captions.read_nocaps,  # nocaps_val_4500_captions.json, nocaps_*_image_info.json
    "flickr": captions.read_flickr,  # Flickr8k's and Flickr30k's token files and CSV files
    "visual-genome": captions.read_visual_genome,  # region_descriptions.json
    "cc3m": captions.read_cc3m,  # Conceptual Captions: caption<tab>url
    "xtd10": captions.read_xtd10,  # test_1kcaptions_xx.txt, or their folder
    "vqa": questions.read_vqa,  # VQA v1 and v2, OK-VQA: *_questions.json, *_annotations.json
    "gqa": questions.read_gqa,  # *_questions.json
    "daquar": questions.read_daquar,  # questions and answers, a line each
    "msrvtt": captions.read_msrvtt,  # *videodatainfo*.json
    "msrvtt-qa": questions.read_msrvtt_qa,  # {train,val,test}_qa.json
    "msvd": captions.read_msvd,  # AllVideoDescriptions.txt, or JSON
    "msvd-qa": questions.read_msvd_qa,  # {train,val,test}_qa.json
    "audiocaps": captions.read_audiocaps,  # {train,val,test}.csv
    "clotho": captions.read_clotho,  # clotho_captions_*.csv
    "webdataset": folders.read_webdataset,  # a .tar or a folder of them; needs an extra package
    "classes": folders.read_classes,  # <class>/x.jpg, or <split>/<class>/x.jpg
    "folder": folders.read_folder,  # any other folder of pictures, captions in x.txt beside x.jpg
}
FOLDERS = {"classes", "folder"}  # the path is a folder
EITHER = {"webdataset", "xtd10"}  # the path is a file or a folder
OWN = {"jsonl", "classes", "folder", "webdataset"}  # paths are where the file says
LINKS = {"cc3m", "audiocaps"}  # downloaded from links, of which some are dead
# The files looked at in a folder. Not all text files: each picture may have one beside it.
LISTINGS = (
    *("*.jsonl", "*.json", "*.csv", "*.tsv", "*.token", "*.token.txt", "captions.txt"),
    *("qa.*.txt", "all_qa_pairs.txt", "AllVideoDescriptions.txt"),
)


def read(
    path: str | Path, *, format: str | None = None, split: str | None = None,
    images: str | Path | None = None, lang: str | None = None, files: bool = True,
    blank: bool = False, malformed: list[UserError] | None = None,
) -> list[Record]:  # fmt: skip
    """Read a data set: a file or folder in one of the formats of `READERS`.

    Args:
        format: a name in `READERS`. Default: recognised from the content.
        split: see `select_split`, which also takes several splits of what was read once.
        images: the folder of the pictures (videos, sounds). Default: JSON Lines name paths relative
            to the file, and `data_files.locate` looks for those of published formats.
        lang: keep the records in this language, and those that name none; "en,de" are two, and
            "all" is every one.
        files: False keeps records whose file is missing (to score predictions, say).
        blank: keep captions without words, images without captions in a list of captions, and
            two pictures, or two questions, of one id.
        malformed: takes the errors of a JSON Lines file's malformed lines, which are left out.

    Raises UserError if there is no such file, the format is unknown, a record is malformed,
    pictures are missing, two have one id, or nothing is left to keep.
    """
    path = Path(path).expanduser()
    if format is None:
        path, format = recognise(path)
    elif not path.exists():
        raise UserError(f"{path} does not exist", 2)
    if format not in READERS:
        raise UserError(f"unknown format {format!r}; choose from {', '.join(READERS)}", 2)
    if format not in EITHER and path.is_dir() != (format in FOLDERS):
        wants = "a folder" if format in FOLDERS else "a file"
        raise UserError(f"format {format!r} reads {wants}, which {path} is not", 2)
    with readable(path):
        if format == "jsonl":
            records = list(read_jsonl(path, malformed))
        else:
            records = list(READERS[format](path))
    if not records and not malformed:
        raise UserError(f"{path} holds no {'pictures' if format in FOLDERS else 'records'}")
    for record in records:
        record.split = part_of(record.split)
    if not blank:
        records = _worded(records, path, format)
    if format in OWN and images is None:
        locate_own(records, path if path.is_dir() else path.parent, path, files)
    else:
        folder = None if images is None else Path(images).expanduser()
        drop = files and format in LINKS
        records = locate(records, path, images=folder, required=files, drop=drop)
    if not blank and (clash := next(clashes(records), None)):
        raise UserError(f"{path}: {clash[2]}; give each its own")
    if lang not in (None, "all"):
        found = {record.lang for record in records}
        wanted = {None, *(name.strip() for name in lang.split(","))}
        everything = records
        records = [record for record in everything if record.lang in wanted]
        if records:
            say_left_out(path, everything, records, f"not in {lang!r}; --lang all reads them")
        else:
            raise UserError(f"{path} has no records in {lang!r}, only in {_listed(found)}", 2)
    try:
        return records if split is None else select_split(records, split)
    except UserError as error:
        raise UserError(f"{path}: {error}", 2) from None


def _worded(records: list[Record], path: Path, format: str) -> list[Record]:
    """Leaves out captions without words, and COCO's images without a caption; says how many."""
    total = sum(len(record.captions) for record in records)
    for record in records:
        record.captions = [caption for caption in record.captions if has_words(caption)]
    if bare := total - sum(len(record.captions) for record in records):
        log.warning("%s: left out %d of %d captions: no words in them", path, bare, total)
    if format not in ("coco", "nocaps"):
        return records
    # COCO lists images and captions apart, and its test set has no captions at all.
    captioned = [record for record in records if record.captions]
    if 0 < len(captioned) < len(records):
        bare = len(records) - len(captioned)
        log.warning("%s: left out %d of %d images: no caption", path, bare, len(records))
        return captioned
    return records


def say_left_out(where: object, records: list[Record], kept: list[Record], why: str) -> None:
    """Says on standard error how many records are not kept, and why, if any are not."""
    if missing := len(records) - len(kept):
        log.warning("%s: left out %d of %d records: %s", where, missing, len(records), why)


def select_split(records: list[Record], want: str) -> list[Record]:
    """The records of one split, or UserError if there is none.

    ``"train"`` includes Karpathy's ``restval`` (COCO: 113,287 images).
    """
    want = part_of(want)
    names = {"train", "restval"} if want == "train" else {want}
    chosen = [record for record in records if record.split in names]
    bare = sum(record.split is None for record in records)
    if chosen and bare:
        log.warning("left out %d of %d records: they name no split", bare, len(records))
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
    Raises UserError if there are fewer than two images.
    """
    ids: dict[str, str] = {}
    for record in records:
        ids[record.path] = min(record.id, ids.get(record.path, record.id))
    if len(ids) < 2:
        raise UserError("one picture cannot be split into training and validation: give more", 2)

    def place(image: str) -> float:  # uniform in [0, 1)
        name = f"{seed}:{ids[image]}".encode("utf-8", "surrogatepass")
        digest = hashlib.sha256(name).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    order = sorted((place(image), ids[image], image) for image in ids)
    count = sum(value < fraction for value, _, _ in order)
    held = {image for _, _, image in order[: min(max(count, 1), len(order) - 1)]}
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


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns an `OSError` while a data set is read into a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot be read ({error.strerror})") from error


def recognise(path: Path) -> tuple[Path, str]:
    """The file to read and its format. Of a folder, the one data set in it, or the folder itself.

    Raises UserError if there is no such file, its format is not known, or the folder holds several
    data sets.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist", 2)
    with readable(path):
        if path.is_dir():
            return _in_folder(path)
        format = sniff(path) or ("jsonl" if path.suffix == ".jsonl" else None)
    if format == "results":
        score = "'tinyvl eval caption --predictions'"
        raise UserError(f"{path} holds results, not a data set: score it with {score}")
    if format is None:
        with open_text(path, errors="ignore") as file:
            not_null(file.read(2**20), path)
        known = ", ".join(READERS)
        advice = "look at the file, or name its format with --format"
        raise UserError(f"{path} is in no format that tinyvl recognises ({known}): {advice}")
    return path, format


def _in_folder(path: Path) -> tuple[Path, str]:
    files = sorted({file for pattern in LISTINGS for file in path.glob(pattern) if file.is_file()})
    found = [(file, format) for file in files if (format := sniff(file)) not in (None, "results")]
    pairs = {file for file, format in found if format == "vqa" and "_questions" in file.name}
    answers = {other for file in pairs for other in questions.partners(file)}
    found = [(file, format) for file, format in found if file not in answers]
    if len(found) > 1:
        names = ", ".join(file.name for file, _ in found[:3]) + (", …" if len(found) > 3 else "")
        raise UserError(f"{path} holds several data sets ({names}): name one of these files", 2)
    if found:
        return found[0]
    if (path / "test_image_names.txt").exists():
        return path, "xtd10"
    if any(path.glob("*.tar")):
        return path, "webdataset"
    return path, "classes" if folders.is_classes(path) else "folder"


def sniff(path: Path) -> str | None:
    """The format of a file, from its first megabyte: COCO's files are too large to parse twice.

    A list of predictions is ``"results"``, which has no reader.
    """
    if path.suffix == ".tar":
        return "webdataset"
    if captions.XTD10.fullmatch(path.name) or path.name == "test_image_names.txt":
        return "xtd10"
    with open_text(path, errors="ignore") as file:
        text = file.read(2**20).lstrip()
    if text.startswith(("{", "[")):
        return _json_format(text)
    lines = [line.strip() for line in text.split("\n") if line.strip() and line[0] != "#"]
    first, second = [*lines[:2], "", ""][:2]
    if first.startswith("audiocap_id,"):
        return "audiocaps"
    if first.startswith("file_name,caption_1"):
        return "clotho"
    asks = questions.DAQUAR.fullmatch
    if asks(first) and second and not asks(second):
        return "daquar"
    if any(line.fullmatch(first) for line in captions.FLICKR):
        return "flickr"
    if captions.CC3M_HEADER.fullmatch(first) or CC3M_LINE.fullmatch(first):
        return "cc3m"
    return "msvd" if captions.MSVD.fullmatch(first) else None


CC3M_LINE = re.compile(r"[^\t]+\t(https?://\S+|[^\t]+\.(jpe?g|png|webp|gif))", re.IGNORECASE)
MSVD_JSON = re.compile(r'\{\s*"[\w-]{11}_\d+_\d+(\.avi)?"\s*:\s*\[')


def _json_format(text: str) -> str | None:
    def has(*keys: str, value: str = "") -> bool:
        return all(re.search(rf'"{key}"\s*:\s*{value}', text) for key in keys)

    if text.startswith("["):
        if has("regions", value=r"\[") and has("phrase"):
            return "visual-genome"
        if has("question", "video_id"):
            return "msrvtt-qa" if has("category_id") else "msvd-qa"
        if has("(image|video|audio)", value='"'):
            return "jsonl"
        return "results" if has("image_id", "caption") else None
    if has("questions", value=r"\[") or (has("annotations", value=r"\[") and has("question_id")):
        return "vqa"
    if has("videos", value=r"\[") or has("sen_id", "video_id"):
        return "msrvtt"
    if has("images", value=r"\["):
        if has("sentences"):
            return "karpathy"
        return "nocaps" if has("open_images_id") or has("domain") else "coco"
    if has("annotations", value=r"\[") and has("image_id", "caption"):
        return "coco"
    if has("imageId", "question"):
        return "gqa"
    if MSVD_JSON.match(text):
        return "msvd"
    text = text.partition("\n")[0]  # of our own format, the first record
    return "jsonl" if has("(image|video|audio)", value='"') else None
