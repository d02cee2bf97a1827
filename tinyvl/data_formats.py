"""The formats of data sets, and how one is recognised: by a file's content, not by its name."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tinyvl import UserError
from tinyvl import data_captions as captions
from tinyvl import data_folders as folders
from tinyvl import data_questions as questions
from tinyvl.data_records import Record, read_jsonl

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
        raise UserError(f"{path} does not exist")
    with readable(path):
        if path.is_dir():
            return _in_folder(path)
        format = sniff(path) or ("jsonl" if path.suffix == ".jsonl" else None)
    if format == "results":
        score = "'tinyvl eval caption --predictions'"
        raise UserError(f"{path} holds results, not a data set: score it with {score}")
    if format is None:
        raise UserError(
            f"{path} is in no format that tinyvl recognises ({', '.join(READERS)}): "
            "look at the file, or name its format with --format"
        )
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
    with open(path, "rb") as file:
        text = file.read(2**20).decode("utf-8-sig", errors="ignore").lstrip()
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
