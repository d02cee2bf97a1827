"""Readers of captioned pictures: our JSON Lines and the published formats.

Each yields the records of a file as the file has them: paths not yet looked for, blank captions
kept. `data.read` does the rest.
"""

import csv
import json
import logging
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from tinyvl import UserError
from tinyvl.data_records import (
    OR,
    Record,
    get,
    json_document,
    json_items,
    name_in,
    records_of,
    split_in,
    text_lines,
)
from tinyvl.media import is_image

log = logging.getLogger(__name__)


def read_jsonl(path: Path) -> Iterator[Record]:
    """This package's own format, a record a line, or a JSON array of such records."""
    with open(path, "rb") as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"["):
        for where, entry in json_items(path):
            yield from records_of(entry, where)
        return
    for where, line in text_lines(path):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where} is not JSON: {error}") from None
        yield from records_of(entry, where)


def read_karpathy(path: Path) -> Iterator[Record]:
    """Karpathy's ``dataset_coco.json``, ``dataset_flickr8k.json``, ``dataset_flickr30k.json``."""
    document = json_document(path)
    for i, entry in enumerate(get(document, "images", list, path)):
        where = f"{path}, images[{i}]"
        name = name_in(entry, "filename", where)
        folder = get(entry, "filepath", str, where, default="")
        captions = [
            get(sentence, "raw", str, f"{where}.sentences[{j}]")
            for j, sentence in enumerate(get(entry, "sentences", list, where))
        ]
        number = get(entry, "imgid", (int, str), where, default=name)
        yield Record(
            f"{folder}/{name}{OR}{name}" if folder else name,
            captions,
            str(get(entry, "cocoid", (int, str), where, default=number)),
            get(entry, "split", str, where),
        )


def read_coco(path: Path) -> Iterator[Record]:
    """COCO's ``captions_*.json``, and ``image_info_*.json``, which has no captions.

    `data.read` leaves out images without a caption where others have one, and counts them.
    """
    for record, _ in _coco(path):
        yield record


def _coco(path: Path) -> Iterator[tuple[Record, dict]]:
    document = json_document(path)
    captions: dict[int | str, list[str]] = {}
    images: dict[int | str, dict] = {}
    for i, entry in enumerate(get(document, "images", list, path)):
        where = f"{path}, images[{i}]"
        number = get(entry, "id", (int, str), where)
        name_in(entry, "file_name", where)
        images[number] = entry
    for i, entry in enumerate(get(document, "annotations", list, path, default=[])):
        where = f"{path}, annotations[{i}]"
        number = get(entry, "image_id", (int, str), where)
        if number not in images:
            raise UserError(f"{where}: 'image_id' {number} is not among the images")
        captions.setdefault(number, []).append(get(entry, "caption", str, where))
    for number, entry in images.items():
        yield Record(entry["file_name"], captions.get(number, []), str(number)), entry


def read_nocaps(path: Path) -> Iterator[Record]:
    """NoCaps (https://nocaps.org): COCO's shape, and each image's domain: in, near or out.

    ``nocaps_val_4500_captions.json``, ``nocaps_{val,test}_image_info.json`` (no captions; the test
    set keeps its domains to itself). The ids are those that the evaluation server wants.
    """
    for i, (record, entry) in enumerate(_coco(path)):
        domain = get(entry, "domain", str, f"{path}, images[{i}]", default=None)
        if domain is not None:
            domain = domain.removesuffix("-domain")
            if domain not in ("in", "near", "out"):
                raise UserError(
                    f"{path}, images[{i}]: 'domain' should be in-domain, near-domain or "
                    f"out-domain, found {domain!r}"
                )
        record.domain, record.split = domain, split_in(path.name)
        yield record


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
    for where, line in text_lines(path):
        if FLICKR_HEADER.fullmatch(line):
            continue
        match = FLICKR_TOKEN.fullmatch(line) or FLICKR_RESULTS.fullmatch(line)
        name, *rest = match.groups() if match else next(csv.reader([line]))
        if not rest or not any(map(is_image, [name, Path(name).stem])):
            raise UserError(
                f"{where}: expected 'x.jpg#0<tab>caption', 'x.jpg,caption' or 'x.jpg| 0| caption', "
                f"found {line[:60]!r}"
            )
        captions.setdefault(name, []).append(",".join(rest))
    splits = {
        name: split
        for split, part in (("train", "train"), ("val", "dev"), ("test", "test"))
        if (listing := path.with_name(f"Flickr_8k.{part}Images.txt")).exists()
        for _, name in text_lines(listing)
    }
    # Flickr8k lists captions of "2258277193_586949ec62.jpg.1", a picture that it does not have.
    odd = {name for name in captions if not is_image(name)}
    if odd:
        log.warning("%s: left out %d names that are no pictures: %s", path, len(odd), min(odd))
    for name, texts in captions.items():
        if name not in odd:
            yield Record(name, texts, name, splits.get(name))


def read_visual_genome(path: Path) -> Iterator[Record]:
    """Visual Genome's ``region_descriptions.json``: the regions' phrases caption the image."""
    for where, entry in json_items(path):
        phrases = [
            get(region, "phrase", str, f"{where}.regions[{j}]")
            for j, region in enumerate(get(entry, "regions", list, where))
        ]
        number = get(entry, "id", (int, str), where)
        yield Record(f"{number}.jpg", phrases, str(number))


CC3M = re.compile(r"([^\t]+)\t([^\t]+)")
CC3M_HEADER = re.compile(r"caption\t(url|path|image|file|filepath)", re.IGNORECASE)


def read_cc3m(path: Path) -> Iterator[Record]:
    """Conceptual Captions' TSV: ``caption<tab>url``, or ``caption<tab>path``.

    The picture of a URL is looked for under the names that downloaders give it: img2dataset's
    ``00012/000123456.jpg``, the URL's CRC-32 (ViLBERT, LAVIS), ``00123456.jpg`` (VL-BERT), or the
    last part of the URL. Those that are not there (links die) are left out and counted. The id of
    a URL is its number in the list, from 0.
    """
    split, number = split_in(path.name), -1
    for where, line in text_lines(path):
        if CC3M_HEADER.fullmatch(line):
            continue
        number += 1
        match = CC3M.fullmatch(line)
        if not match:
            raise UserError(f"{where}: expected 'caption<tab>url or path', found {line[:60]!r}")
        caption, address = match.groups()
        if re.match(r"https?://", address):
            last = re.split("[?#]", address)[0].rsplit("/", 1)[-1]
            names = (
                f"{number // 10_000:05d}/{number:09d}.jpg",
                f"{zlib.crc32(address.encode())}",
                f"{number:08d}.jpg",
                *([last] if is_image(last) else []),
            )
            yield Record(OR.join(names), [caption], str(number), split)
        else:
            yield Record(address, [caption], address, split)


XTD10 = re.compile(r"test_1kcaptions_(\w+)\.txt")


def read_xtd10(path: Path) -> Iterator[Record]:
    """XTD10's ``test_1kcaptions_xx.txt``, or a folder of them: a caption a line, a file a language.

    The pictures are COCO's, their names beside in ``test_image_names.txt``, a line a picture. The
    language is as the file's name has it (Japanese is ``jp`` there).
    """
    folder = path if path.is_dir() else path.parent
    files = sorted(file for file in folder.glob("test_1kcaptions_*.txt"))
    if not path.is_dir() and path.name != "test_image_names.txt":
        files = [path]
    names_file = folder / "test_image_names.txt"
    if not names_file.exists():
        raise UserError(f"{path}: test_image_names.txt, which names its pictures, is not beside it")
    names = [name for _, name in text_lines(names_file)]
    for file in files:
        match = XTD10.fullmatch(file.name)
        if not match:
            raise UserError(f"{file}: expected a name like test_1kcaptions_de.txt")
        # Not text_lines: a blank line is a picture without a caption.
        captions = file.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
        if len(captions) != len(names):
            raise UserError(
                f"{file}: has {len(captions)} captions, but {names_file} names {len(names)} "
                "pictures"
            )
        for name, caption in zip(names, captions, strict=True):
            yield Record(name, [caption.strip()], name, "test", match[1])
