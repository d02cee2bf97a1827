"""Data sets checked without training: what is in them, and what is wrong with them."""

import hashlib
import os
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

from tinyvl import UserError, data
from tinyvl.data import Record
from tinyvl.media import MODALITIES, MediaError
from tinyvl.text import has_words


def check(
    paths: list[Path], *, format: str | None = None, split: str | None = None,
    lang: str | None = None, images: Path | None = None, fast: bool = False,
    workers: int | None = None, quiet: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Read data sets, and look at each of their files.

    Pictures are decoded, JPEGs at a small scale, which still reads them to their end; of a video or
    a sound the first frame is. Files in two splits are looked for, by path and by content. Several
    data sets that name no split are the splits of one. ``fast``: decode and compare nothing.

    Returns the report, ready for JSON: counts (``records``, ``files``, ``splits``, ``langs``,
    ``captions``, ``questions``, ``classes``, ``domains``), ``problems`` (a number by kind) and
    ``details`` (for each problem ``problem``, ``path``, ``record`` and ``error``). Raises UserError
    if a data set cannot be read (at its first malformed record, unless it is JSON Lines).
    """
    sets, records, details = [], [], []
    for path in paths:
        path, known = (path, format) if format else data.recognise(path)
        options = {"format": known, "split": split, "lang": lang, "images": images}
        malformed: list[UserError] = []
        found = data.read(path, **options, files=False, blank=True, malformed=malformed)
        for error in malformed:
            why = str(error).removeprefix(f"{path}, ")
            details.append({"problem": "malformed", "path": str(path), "error": why})
        for record in found:
            if record.split is None and len(paths) > 1:
                record.split = path.stem
        sets.append({"path": str(path), "format": known, "records": len(found)})
        records += found
    files = {record.path: record.modality for record in records}
    there = {path: kind for path, kind in files.items() if os.path.isfile(path)}
    missing = (path for path in files if path not in there)
    details += [_problem("missing", path, "there is no such file") for path in missing]
    if not fast:
        details += unreadable(there, workers, quiet)
    details += text_problems(records)
    details += shared_files(records, [] if fast else there)
    return {
        "data": sets,
        "records": len(records),
        "files": {kind: n for kind in MODALITIES if (n := list(files.values()).count(kind))},
        **summary(records),
        "decoded": not fast,
        "problems": dict(Counter(detail["problem"] for detail in details)),
        "details": details,
    }


def _problem(kind: str, of: Record | str, error: str) -> dict[str, str]:
    """A problem of a record, or of a file."""
    about = {"path": of}
    if isinstance(of, Record):
        about = {"path": of.path, "record": of.question_id or of.id}
    return {"problem": kind, **about, "error": error}


def summary(records: list[Record]) -> dict[str, Any]:
    """Counts by split and language, and the distributions of the texts."""
    splits: dict[str, Counter] = defaultdict(Counter)
    files: dict[str, set[str]] = defaultdict(set)
    for record in records:
        name, asks = record.split or "(none)", record.question is not None
        splits[name].update(records=1, captions=len(record.captions), questions=asks)
        files[name].add(record.path)
    report: dict[str, Any] = {
        "splits": {name: {"files": len(files[name]), **n} for name, n in splits.items()},
        "langs": _counts(record.lang for record in records),
        "domains": _counts(record.domain for record in records),
        "classes": _counts(record.label for record in records),
    }
    if captions := [caption for record in records for caption in record.captions]:
        report["captions"] = {
            "total": len(captions),
            "per_record": _numbers(len(record.captions) for record in records),
            "words": _numbers(len(caption.split()) for caption in captions),
            "characters": _numbers(len(caption.strip()) for caption in captions),
        }
    if questions := [record for record in records if record.question is not None]:
        report["questions"] = {
            "total": len(questions),
            "words": _numbers(len(record.question.split()) for record in questions),
            "answers_per_question": _numbers(len(record.answers) for record in questions),
            "question_types": _counts(record.question_type for record in questions),
            "answer_types": _counts(record.answer_type for record in questions),
        }
    return {name: value for name, value in report.items() if value}


def _counts(names: Iterable[str | None]) -> dict[str, int]:
    return dict(Counter(name for name in names if name is not None).most_common())


def _numbers(values: Iterable[int]) -> dict[str, float]:
    values = sorted(values)
    return {
        "min": values[0], "median": values[len(values) // 2],
        "mean": round(statistics.fmean(values), 2),
        "p95": values[int(0.95 * (len(values) - 1))], "max": values[-1],
    }  # fmt: skip


def text_problems(records: list[Record]) -> Iterator[dict[str, str]]:
    """Texts without words, texts missing where others have some, ids that are not one's own."""
    captioned = {(record.modality, record.split) for record in records if record.captions}
    answered = {record.split for record in records if any(map(str.strip, record.answers))}
    for record in records:
        for i, caption in enumerate(record.captions, 1):
            if not caption.strip():
                error = f"caption {i} of {len(record.captions)} is blank"
                yield _problem("blank caption", record, error)
            elif not has_words(caption):
                error = f"caption {i} of {len(record.captions)} has no words: {caption!r}"
                yield _problem("no words", record, error)
        if record.question is None:
            bare = not record.captions and record.label is None
            if bare and (record.modality, record.split) in captioned:
                yield _problem("no caption", record, "has no caption, and others have")
            continue
        if not record.question.strip():
            yield _problem("blank question", record, "the question is blank")
        elif not has_words(record.question):
            error = f"the question has no words: {record.question!r}"
            yield _problem("no words", record, error)
        if record.split in answered and not any(map(str.strip, record.answers)):
            yield _problem("no answer", record, "the question has no answer, and others have")
    yield from (_problem(*clash) for clash in data.clashes(records))


def shared_files(records: list[Record], compare: Iterable[str]) -> Iterator[dict[str, str]]:
    """Files that are in two splits, and files of ``compare`` with the same bytes in two splits.

    Only files of equal size are read. Files in no split do not count, and Karpathy's ``restval`` is
    part of train.
    """
    splits: dict[str, set[str]] = defaultdict(set)
    for record in records:
        if record.split is not None:
            splits[record.path].add("train" if record.split == "restval" else record.split)
    for path, names in splits.items():
        if len(names) > 1:
            yield _problem("in two splits", path, f"is in {' and '.join(sorted(names))}")
    if len(set().union(*splits.values())) < 2:
        return
    by_size: dict[int, list[str]] = defaultdict(list)
    for path in compare:
        if path in splits and (size := os.path.getsize(path)):
            by_size[size].append(path)
    by_content: dict[str, list[str]] = defaultdict(list)
    for group in by_size.values():
        if len(set().union(*(splits[path] for path in group))) < 2:
            continue
        for path in group:
            with suppress(OSError), open(path, "rb") as file:  # decoding has reported it
                by_content[hashlib.file_digest(file, "sha256").hexdigest()].append(path)
    for first, *others in by_content.values():
        for path in others:
            if splits[path] != splits[first]:
                where = f"{min(splits[first])} (this in {min(splits[path])})"
                error = f"has the same content as {first}, which is in {where}"
                yield _problem("same content in two splits", path, error)


def unreadable(files: dict[str, str], workers: int | None, quiet: bool) -> list[dict[str, str]]:
    """The files (path -> modality) that cannot be decoded."""
    from tinyvl.media_workers import decode_images
    from tinyvl.progress import bar

    images = [path for path, kind in files.items() if kind == "image"]
    streams = ((path, stream_error(path, kind)) for path, kind in files.items() if kind != "image")
    problems = []
    with bar("decoding", len(files), quiet) as advance:
        decoded = decode_images(images, _nothing, target=64, workers=workers)
        for path, found in chain(decoded, streams):
            if isinstance(found, MediaError):
                problems.append(_problem("unreadable", path, str(found).removeprefix(f"{path}: ")))
            advance(1)
    return problems


def _nothing(image: Any) -> Any:
    """The smallest tensor: all that is asked is whether the picture decodes."""
    import torch

    return torch.zeros(1, dtype=torch.uint8)


def stream_error(path: str, kind: str) -> MediaError | None:
    """Why no frame of a ``"video"``, or no sound of an ``"audio"``, can be decoded, or None."""
    from tinyvl.media_av import load_frames
    from tinyvl.media_sound import load_sound

    try:
        if kind == "video":
            load_frames(path, 1, moment=lambda: 0.0, target=64)
        else:
            load_sound(path, 30)  # as much as any encoder hears
    except MediaError as error:
        return error
    return None
