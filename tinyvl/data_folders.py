"""Readers of folders and archives: pictures, classes of pictures, WebDataset tars."""

import glob
import hashlib
import json
import logging
import os
import re
import shutil
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

from tinyvl import UserError, files
from tinyvl.data_records import (
    PARTS,
    Record,
    json_document,
    parsed,
    records_of,
    split_in,
    unlike,
)
from tinyvl.files import text_lines
from tinyvl.media import KIND_OF, MODALITIES

log = logging.getLogger(__name__)
ROOM = "set TINYVL_CACHE to a folder on a larger disk"


def read_folder(path: Path) -> Iterator[Record]:
    """The pictures in a folder and below it, by name; ``x.txt`` beside ``x.jpg`` has captions.

    Without pictures the videos are read, and without these the sounds.
    """
    kinds = {name: KIND_OF[name.suffix.lower()] for name in _media(path)}
    first = next((kind for kind in MODALITIES if kind in kinds.values()), None)
    for name in (name for name, kind in kinds.items() if kind == first):
        beside = text_lines((path / name).with_suffix(".txt"), optional=True)
        captions = [line for _, line in beside]
        yield Record(**{first: name.as_posix()}, captions=captions, id=name.as_posix())


def read_classes(path: Path) -> Iterator[Record]:
    """A folder of classes: ``<class>/x.jpg``, or ``<split>/<class>/x.jpg`` under train, val, test.

    Videos and sounds are read alike. The class's name is its folder's, or the first synonym in a
    list beside the folders (or in the folder above): ``LOC_synset_mapping.txt``,
    ``synset_words.txt``, ``words.txt``, ``imagenet_class_index.json`` or ``Labels.json``.
    """
    found = [(name, name.parts) for name in _media(path)]
    by_split = all(parts[0].lower() in PARTS for _, parts in found)
    names = _class_names(path, {parts[by_split] for _, parts in found if len(parts) > 1 + by_split})
    for name, parts in found:
        if len(parts) < 2 + by_split:
            raise UserError(f"{path / name}: is in no class's folder")
        yield Record(
            **{KIND_OF[name.suffix.lower()]: name.as_posix()},
            id=name.as_posix(),
            split=PARTS[parts[0].lower()] if by_split else split_in(path.absolute().name),
            label=names.get(parts[by_split], parts[by_split]),
        )


def is_classes(path: Path) -> bool:
    """Whether a folder looks like one of classes, from the first file of each folder in it.

    It has two folders or more, each with pictures (or videos, or sounds) right in it that have no
    captions beside them; or folders called train, val or test that look so. There are no pictures
    beside the folders.
    """
    folders = []
    for entry in os.scandir(path):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            folders.append(Path(entry.path))
        elif Path(entry.name).suffix.lower() in KIND_OF:
            return False
    if folders and all(folder.name.lower() in PARTS for folder in folders):
        return all(map(is_classes, folders))
    firsts = [_first_media(folder) for folder in folders]
    return len(firsts) > 1 and all(
        first is not None and not first.with_suffix(".txt").exists() for first in firsts
    )


def _first_media(folder: Path) -> Path | None:
    with os.scandir(folder) as entries:
        paths = (Path(entry.path) for entry in entries if not entry.name.startswith("."))
        return next((path for path in paths if path.suffix.lower() in KIND_OF), None)


def _media(path: Path) -> Iterator[Path]:
    """The pictures, videos and sounds below a folder, relative to it, sorted; hidden ones not."""
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path)
        hidden = any(part.startswith(".") for part in name.parts)
        if file.suffix.lower() in KIND_OF and not hidden and file.is_file():
            yield name


LISTS = (
    "LOC_synset_mapping.txt", "synset_words.txt", "words.txt", "imagenet_class_index.json",
    "Labels.json",
)  # fmt: skip


def _class_names(path: Path, folders: set[str]) -> dict[str, str]:
    """The classes' names in a list beside the folders, if there is one that has them all."""
    for place, name in product((path, path.absolute().parent), LISTS):
        if (place / name).exists():
            with suppress(UserError):  # a list of something else
                tables, _ = read_names(place / name, r"[^\s,]+")
                if tables and folders <= tables[-1].keys():  # the last, which has the synsets
                    return first_synonyms({folder: tables[-1][folder] for folder in folders})
    return {}


SYNSET = r"n\d{8}"  # WordNet's number of a class of ImageNet


def read_names(file: Path, label: str = SYNSET) -> tuple[list[dict[str, str]], list[str]]:
    """A file's tables {label: name} (by number and by synset, say), or its names alone.

    It is JSON, or text with a name a line: behind a label and a tab, behind a label that matches
    ``label`` and a space, or alone. Raises UserError if it cannot be read.
    """
    if not file.is_file():
        raise UserError(f"{file} does not exist", 2)
    if file.suffix == ".json":
        document = json_document(file)
        if isinstance(document, list):
            return [], [str(name) for name in document]
        odd = UserError(f"{file}: neither a list of names nor a name for each label.")
        if not isinstance(document, dict):
            raise odd
        tables: list[dict[str, str]] = [{}, {}]
        for key, name in document.items():  # "0": ["n01440764", "tench"], or "0": "tench"
            *labels, words = [key, *name] if isinstance(name, list) else [key, name]
            if not labels or not isinstance(words, str):
                raise odd
            for table, one in zip(tables, labels, strict=False):
                unlike(table, str(one), words, file)
        return [table for table in tables if table], []
    lines = [line for _, line in text_lines(file)]
    pairs = [re.fullmatch(rf"([^\t]+)\t\s*(.+)|({label})[ ,]\s*(.+)", line) for line in lines]
    if lines and all(pairs):
        table: dict[str, str] = {}
        for pair in pairs:
            unlike(table, pair[1] or pair[3], pair[2] or pair[4], file)
        return [table], []
    return [], lines


def first_synonyms(known: dict[str, str]) -> dict[str, str]:
    """Names of classes by label: ``tench, Tinca tinca`` becomes ``tench``.

    Two classes stay two, as ImageNet's two cranes: where the first synonym is shared, all synonyms
    are kept, and where these are shared too, the label is added.
    """
    whole = {label: name.replace("_", " ") for label, name in known.items()}
    names = {label: name.split(",")[0].strip() for label, name in whole.items()}
    times = Counter(names.values())
    names = {label: name if times[name] == 1 else whole[label] for label, name in names.items()}
    times = Counter(names.values())
    return {key: name if times[name] == 1 else f"{name} ({key})" for key, name in names.items()}


# The parts of a WebDataset sample by their keys. One may be called so before its suffix, or by a
# number: `image.jpg`, `0.jpg`. What `img` holds decoders see by its content, not by the suffix.
NAMED = {
    **dict.fromkeys(("img", "image", "picture", "photo"), ".jpg"),
    **{"video": ".mp4", "audio": ".wav", "sound": ".wav"},
}
TEXTS = ("txt", "text", "caption", "captions")


def read_webdataset(path: Path) -> Iterator[Record]:
    """A WebDataset ``.tar``, or a folder of them: files that share a name up to its first dot.

    ``jpg`` (or any picture, video or sound; see `NAMED`) with ``txt`` (a caption a line), ``json``
    (fields as in JSON Lines: caption, question, answers, label, ...) and ``cls`` (a class, by its
    name or its line in ``classnames.txt`` beside the tars, from 0). Each tar is unpacked once, into
    the cache (``TINYVL_CACHE``), so that its pictures are files like all others; delete them there.
    """
    tars = sorted(path.glob("*.tar")) if path.is_dir() else [path]
    listing = (path if path.is_dir() else path.parent) / "classnames.txt"
    classes = [line for _, line in text_lines(listing, optional=True)]
    folders = {tar: _unpacked(tar) for tar in tars}
    if waiting := [tar for tar, folder in folders.items() if not folder.exists()]:
        _check_space(waiting)
    known: dict[str, Path] = {}
    for tar, folder in folders.items():
        if not folder.exists():
            _unpack(tar, folder)
        for _, note in text_lines(folder / "left_out.txt"):
            log.warning("%s: left out %s", tar, note)
        for where, line in text_lines(folder / "samples.jsonl"):
            entry = json.loads(line)
            where = f"{tar}, {entry['id']}"
            if known.setdefault(entry["id"], tar) != tar:  # each tar may count from 0
                entry["id"] = f"{tar.stem}/{entry['id']}"
            if (label := entry.pop("cls", None)) is not None:
                if classes and (not label.isdecimal() or int(label) >= len(classes)):
                    raise UserError(f"{where}: class {label!r} is not a line of {listing}")
                entry["label"] = classes[int(label)] if classes else label
            for record in records_of(entry, where):
                record.path = str(folder / record.path)
                record.split = record.split or split_in(tar.stem)
                yield record


def _unpacked(tar: Path) -> Path:
    """The cache folder of a tar: another one when the tar has changed."""
    state = tar.stat()
    key = f"2|{tar.absolute()}|{state.st_size}|{state.st_mtime_ns}"  # 2: of what `_unpack` writes
    digest = hashlib.sha256(os.fsencode(key)).hexdigest()[:12]
    return files.cache_dir() / "webdataset" / f"{tar.stem}-{digest}"


def _check_space(tars: list[Path]) -> None:
    cache = files.cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    need, free = sum(tar.stat().st_size for tar in tars), shutil.disk_usage(cache).free
    if need > 0.95 * free:
        left = f"{cache} has {free / 2**30:.1f} GiB left; {ROOM}"
        raise UserError(f"{tars[0]}: unpacking takes {need / 2**30:.1f} GiB, and {left}")
    if need > 2**30:
        log.warning("unpacking %d tars, %.1f GiB, into %s", len(tars), need / 2**30, cache)


def _unpack(tar: Path, folder: Path) -> None:
    """Write a tar's samples as files and ``samples.jsonl``; the folder appears when it is whole.

    The parts of a sample need not be neighbours. ``left_out.txt`` says what is not in the samples.
    """
    for rest in folder.parent.glob(f".{glob.escape(folder.name)}-*"):  # of a run that was killed
        if time.time() - rest.stat().st_mtime > 24 * 3600:
            shutil.rmtree(rest, ignore_errors=True)
    samples: dict[str, dict[str, Any]] = {}  # by name: the fields, and of each kind the file
    unread, seen = Counter[str](), set[tuple[str, str]]()
    with files.building(folder, advice=ROOM) as part:
        for number, (name, key, content) in enumerate(_parts(tar)):
            if (name, key) in seen:
                both = f"two parts are called {name}.{key}"
                raise UserError(f"{tar}: damaged, or not a WebDataset tar: {both}")
            seen.add((name, key))
            sample, (kind, suffix) = samples.setdefault(name, {}), _kind(key)
            if kind in MODALITIES and kind not in sample:
                sample[kind] = f"{number:07d}{suffix}"  # never its own name: it may point anywhere
                (part / sample[kind]).write_bytes(content)
            elif kind in ("captions", "json", "cls"):
                fields = _fields(kind, content, f"{tar}, {name}: its {key!r}")
                samples[name] = fields | sample if kind == "json" else sample | fields
            else:
                unread[key] += 1
        whole = {name: sample for name, sample in samples.items() if sample.keys() & {*MODALITIES}}
        for sample in whole.values():
            for other in [kind for kind in MODALITIES if kind in sample][1:]:
                unread[other] += 1
                del sample[other]
        lines = (json.dumps(sample | {"id": name}) + "\n" for name, sample in whole.items())
        (part / "samples.jsonl").write_text("".join(lines), encoding="utf-8")
        notes = [f"parts called {key}: {count}\n" for key, count in unread.most_common(9)]
        if bare := [name for name in samples if name not in whole]:
            first = f"the first is {bare[0]!r}"
            what = f"{len(bare)} of {len(samples)} samples: no picture, video or sound; {first}"
            notes.insert(0, f"{what}\n")
        (part / "left_out.txt").write_text("".join(notes), "utf-8", files.ESCAPED)


def _parts(tar: Path) -> Iterator[tuple[str, str, bytes]]:
    """Each file of a tar: its name up to the first dot, the rest in lower case, and the bytes."""
    try:
        from webdataset.tariterators import base_plus_ext, tar_file_expander
    except ImportError as error:
        advice = "pip install 'tinyvl[webdataset]'"
        raise UserError(f"{tar}: reading tars needs an extra package; {advice}") from error
    with open(tar, "rb") as stream:
        try:
            _plain(tar)
            for file in tar_file_expander([{"url": str(tar), "stream": stream}]):
                name, key = base_plus_ext(file.get("fname", ""))  # the last has none
                if name is not None:
                    yield name, key.lower(), file["data"]
        except (tarfile.TarError, EOFError, ValueError) as error:
            raise UserError(f"{tar}: damaged, or not a WebDataset tar ({error.args[0]})") from error


def _plain(tar: Path) -> None:
    """Raises ReadError: a tar is compressed, or sparse: it may unpack to more than any memory."""
    with tarfile.open(tar, "r:") as members:
        for member in members:
            if member.issparse():
                raise tarfile.ReadError(f"{member.name} is a sparse file")


def _kind(key: str) -> tuple[str, str]:
    """What a part is, "image", "captions", ...; "" where it is nothing that is read; its suffix."""
    before, _, last = key.rpartition(".")
    if before and not before.isdecimal() and before not in (*NAMED, *TEXTS):
        return "", ""  # as seg.png, a mask
    suffix = NAMED.get(key, f".{last}")
    if last in TEXTS:
        return "captions", ""
    return KIND_OF.get(suffix, last if last in ("json", "cls") else ""), suffix


def _fields(kind: str, content: bytes, where: str) -> dict[str, Any]:
    """The fields of a record that a text part says."""
    text = files.decode(content, where).strip()
    if kind == "json":
        fields = parsed(text, where)
        if not isinstance(fields, dict):
            raise UserError(f"{where} should be an object, found {text[:60]!r}")
        return {k: v for k, v in fields.items() if k not in (*MODALITIES, "cls")}
    if kind == "cls":
        return {"cls": text}
    return {"captions": [line.strip() for line in text.split("\n")]}
