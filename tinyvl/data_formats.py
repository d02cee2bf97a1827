"""The formats of data sets, and how one is recognised: from a file's keys, not from its name.

| format | what |
|---|---|
| jsonl | this package's own: JSON Lines, or a JSON array, of records |
| karpathy | ``dataset_{coco,flickr8k,flickr30k}.json`` |
| coco | ``captions_*.json``, ``image_info_*.json`` |
| nocaps | ``nocaps_val_4500_captions.json``, ``nocaps_*_image_info.json`` |
| flickr | Flickr8k's and Flickr30k's token files, ``captions.txt``, ``results.csv`` |
| visual-genome | ``region_descriptions.json`` |
| cc3m | Conceptual Captions: ``caption<tab>url`` or ``caption<tab>path`` |
| xtd10 | ``test_1kcaptions_xx.txt``, or their folder |
| vqa | VQA v2 (v1, OK-VQA): ``*_questions.json`` or ``*_annotations.json`` |
| gqa | GQA's ``*_questions.json`` |
| daquar | DAQUAR's questions and answers, a line each |
| msrvtt, msrvtt-qa | ``*videodatainfo*.json``; ``{train,val,test}_qa.json`` |
| msvd, msvd-qa | ``AllVideoDescriptions.txt`` or JSON; ``{train,val,test}_qa.json`` |
| audiocaps, clotho | their CSV files |
| webdataset | a ``.tar``, or a folder of them (needs ``tinyvl[webdataset]``) |
| classes | a folder of classes: ``<class>/x.jpg``, or ``<split>/<class>/x.jpg`` |
| folder | any other folder of pictures, with captions in ``x.txt`` beside ``x.jpg`` |
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from tinyvl import UserError
from tinyvl.data_av import (
    MSVD,
    read_audiocaps,
    read_clotho,
    read_msrvtt,
    read_msrvtt_qa,
    read_msvd,
    read_msvd_qa,
)
from tinyvl.data_captions import (
    CC3M_HEADER,
    FLICKR_CSV,
    FLICKR_HEADER,
    FLICKR_RESULTS,
    FLICKR_TOKEN,
    XTD10,
    read_cc3m,
    read_coco,
    read_flickr,
    read_jsonl,
    read_karpathy,
    read_nocaps,
    read_visual_genome,
    read_xtd10,
)
from tinyvl.data_folders import is_classes, read_classes, read_folder, read_webdataset
from tinyvl.data_questions import DAQUAR, partners, read_daquar, read_gqa, read_vqa
from tinyvl.data_records import Record, readable

READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    "jsonl": read_jsonl,
    "karpathy": read_karpathy,
    "coco": read_coco,
    "nocaps": read_nocaps,
    "flickr": read_flickr,
    "visual-genome": read_visual_genome,
    "cc3m": read_cc3m,
    "xtd10": read_xtd10,
    "vqa": read_vqa,
    "gqa": read_gqa,
    "daquar": read_daquar,
    "msrvtt": read_msrvtt,
    "msrvtt-qa": read_msrvtt_qa,
    "msvd": read_msvd,
    "msvd-qa": read_msvd_qa,
    "audiocaps": read_audiocaps,
    "clotho": read_clotho,
    "webdataset": read_webdataset,
    "classes": read_classes,
    "folder": read_folder,
}
FOLDERS = {"classes", "folder"}  # formats that are folders
EITHER = {"webdataset", "xtd10"}  # a file or a folder
OWN = {"jsonl", "classes", "folder", "webdataset"}  # paths are where the file says
LINKS = {"cc3m", "audiocaps"}  # downloaded from links, of which some are dead
# What a folder is searched for. Not all text files: each picture may have one beside it.
LISTINGS = (
    *("*.jsonl", "*.json", "*.csv", "*.tsv", "*.token", "*.token.txt", "captions.txt"),
    *("results.csv", "qa.*.txt", "all_qa_pairs.txt", "AllVideoDescriptions.txt"),
)


def recognise(path: Path) -> tuple[Path, str]:
    """The file to read and its format; for a folder, the one data set in it or the folder.

    Raises:
        UserError: no such file, no known format, or a folder that holds several data sets.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist")
    with readable(path):
        if path.is_dir():
            return _in_folder(path)
        format = sniff(path) or ("jsonl" if path.suffix == ".jsonl" else None)
    if format == "results":
        raise UserError(
            f"{path} holds results, not a data set: score it with "
            "'tinyvl eval caption --predictions'"
        )
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
    answers = {other for file in pairs for other in partners(file)}
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
    return path, "classes" if is_classes(path) else "folder"


def sniff(path: Path) -> str | None:
    """The format of a file, from its first megabyte: COCO's files are too large to parse twice.

    ``"results"`` is a list of predictions, which no reader takes.
    """
    if path.suffix == ".tar":
        return "webdataset"
    if XTD10.fullmatch(path.name) or path.name == "test_image_names.txt":
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
    if DAQUAR.fullmatch(first) and second and not DAQUAR.fullmatch(second):
        return "daquar"
    if any(s.fullmatch(first) for s in (FLICKR_HEADER, FLICKR_TOKEN, FLICKR_RESULTS, FLICKR_CSV)):
        return "flickr"
    if CC3M_HEADER.fullmatch(first) or CC3M_LINE.fullmatch(first):
        return "cc3m"
    return "msvd" if MSVD.fullmatch(first) else None


CC3M_LINE = re.compile(r"[^\t]+\t(https?://\S+|[^\t]+\.(jpe?g|png|webp|gif))", re.IGNORECASE)
MSVD_JSON = re.compile(r'\{\s*"[\w-]{11}_\d+_\d+(\.avi)?"\s*:\s*\[')


def _json_format(text: str) -> str | None:
    def has(*keys: str, value: str = "") -> bool:
        return all(re.search(rf'"{key}"\s*:\s*{value}', text) for key in keys)

    medium = re.search(r'"(image|video|audio)"\s*:\s*"', text.partition("\n")[0])
    if text.startswith("["):
        if has("regions", value=r"\[") and has("phrase"):
            return "visual-genome"
        if has("question", "video_id"):
            return "msrvtt-qa" if has("category_id") else "msvd-qa"
        if re.search(r'"(image|video|audio)"\s*:\s*"', text):
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
    return "jsonl" if medium else None
