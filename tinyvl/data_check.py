"""Validate data sets without training: what is in them, and what is wrong with them."""

import hashlib
import os
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tinyvl import data, data_formats
from tinyvl.records import MODALITIES, Record

NO_SPLIT = "(none)"


def check(
    paths: list[Path],
    *,
    format: str | None = None,
    split: str | None = None,
    lang: str | None = None,
    images: Path | None = None,
    fast: bool = False,
    workers: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Reads data sets and looks at each of their files.

    Pictures are decoded in worker processes (JPEGs at a small scale, which reads them to their end
    all the same). Of a video or a sound the first frame is decoded. Where there are several splits,
    or several data sets that name none (each is then a split of its own), files in two of them are
    looked for, by path and by content.

    Args:
        paths, format, split, lang, images: as in `data.read`.
        fast: only look whether the files exist; decode and compare nothing.
        workers: processes that decode, as in `media_workers.decode_images`.
        quiet: no progress.

    Returns:
        The report, ready for JSON: counts (``records``, ``files``, ``splits``, ``langs``,
        ``captions``, ``questions``, ``classes``, ``domains``), ``problems`` (a number by kind) and
        ``details`` (a dictionary a problem: ``problem``, ``path``, ``record``, ``error``).

    Raises:
        UserError: a data set cannot be read: its first malformed record, say.
    """
    sets, records = [], []
    for path in paths:
        path, known = (path, format) if format else data_formats.recognise(path)
        found = data.read(
            path, format=known, split=split, lang=lang, images=images, files=False, blank=True
        )
        for record in found:
            if record.split is None and len(paths) > 1:
                record.split = path.stem
        sets.append({"path": str(path), "format": known, "records": len(found)})
        records += found
    files = {record.path: record.modality for record in records}
    missing = {path for path in files if not os.path.isfile(path)}
    there = {path: kind for path, kind in files.items() if path not in missing}
    details = [
        _problem("missing", path, "there is no such file") for path in files if path in missing
    ]
    if not fast:
        details += unreadable(there, workers, quiet)
    details += list(text_problems(records))
    details += list(shared_files(records, set() if fast else there.keys()))
    return {
        "data": sets,
        "records": len(records),
        "files": {kind: n for kind in MODALITIES if (n := list(files.values()).count(kind))},
        **summary(records),
        "decoded": not fast,
        "problems": dict(Counter(detail["problem"] for detail in details)),
        "details": details,
    }


def _problem(kind: str, path: str, error: str, record: Record | None = None) -> dict[str, str]:
    name = {} if record is None else {"record": record.question_id or record.id}
    return {"problem": kind, "path": path, **name, "error": error}


# ------------------------------------------------------------------------------ what there is


def summary(records: list[Record]) -> dict[str, Any]:
    """Counts by split and language, and the distributions of the texts."""
    splits: dict[str, Counter] = defaultdict(Counter)
    files: dict[str, set[str]] = defaultdict(set)
    for record in records:
        name = record.split or NO_SPLIT
        counts = {"records": 1, "captions": len(record.captions)}
        splits[name].update(counts, questions=record.question is not None)
        files[name].add(record.path)
    report: dict[str, Any] = {
        "splits": {name: {"files": len(files[name]), **n} for name, n in splits.items()},
        "langs": _counts(record.lang for record in records),
        "domains": _counts(record.domain for record in records),
        "classes": _counts(record.label for record in records),
    }
    captions = [caption for record in records for caption in record.captions]
    if captions:
        report["captions"] = {
            "total": len(captions),
            "per_record": _numbers([len(record.captions) for record in records]),
            "words": _numbers([len(caption.split()) for caption in captions]),
            "characters": _numbers([len(caption.strip()) for caption in captions]),
        }
    questions = [record for record in records if record.question is not None]
    if questions:
        report["questions"] = {
            "total": len(questions),
            "words": _numbers([len(record.question.split()) for record in questions]),
            "answers_per_question": _numbers([len(record.answers) for record in questions]),
            "question_types": _counts(record.question_type for record in questions),
            "answer_types": _counts(record.answer_type for record in questions),
        }
    return {name: value for name, value in report.items() if value}


def _counts(names: Iterable[str | None]) -> dict[str, int]:
    return dict(Counter(name for name in names if name is not None).most_common())


def _numbers(values: list[int]) -> dict[str, float]:
    values = sorted(values)
    return {
        "min": values[0],
        "median": values[len(values) // 2],
        "mean": round(statistics.fmean(values), 2),
        "p95": values[int(0.95 * (len(values) - 1))],
        "max": values[-1],
    }


# ------------------------------------------------------------------------------ what is wrong


def text_problems(records: list[Record]) -> Iterator[dict[str, str]]:
    """Blank texts, captions and answers that others have and these lack, repeated question ids."""
    captioned = {(record.modality, record.split) for record in records if record.captions}
    answered = {record.split for record in records if any(map(str.strip, record.answers))}
    ids: set[tuple[str | None, str]] = set()
    for record in records:

        def found(kind: str, error: str, record: Record = record) -> dict[str, str]:
            return _problem(kind, record.path, error, record)

        for i, caption in enumerate(record.captions):
            if not caption.strip():
                yield found("blank caption", f"caption {i + 1} of {len(record.captions)} is blank")
        if record.question is None:
            bare = not record.captions and record.label is None
            if bare and (record.modality, record.split) in captioned:
                yield found("no caption", "has no caption, and others have")
            continue
        if not record.question.strip():
            yield found("blank question", "the question is blank")
        if record.split in answered and not any(map(str.strip, record.answers)):
            yield found("no answer", "the question has no answer, and others have")
        if record.question_id is not None:
            key = record.split, record.question_id
            if key in ids:
                yield found("repeated question", "another question has this id")
            ids.add(key)


def shared_files(records: list[Record], compare: Iterable[str]) -> Iterator[dict[str, str]]:
    """Files that are in two splits, and those to ``compare`` whose bytes are.

    Only files of one size are read. What is in no split, or is Karpathy's train and restval at
    once, leaks nothing.
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
        if path in splits:
            by_size[os.path.getsize(path)].append(path)
    for size, group in by_size.items():
        if size == 0 or len(set().union(*(splits[path] for path in group))) < 2:
            continue
        by_content: dict[str, list[str]] = defaultdict(list)
        for path in group:
            try:
                with open(path, "rb") as file:
                    by_content[hashlib.file_digest(file, "sha256").hexdigest()].append(path)
            except OSError:  # decoding it has said so
                continue
        for same in by_content.values():
            for path in same[1:]:
                if splits[path] != splits[same[0]]:
                    (one, *_), (other, *_) = sorted(splits[same[0]]), sorted(splits[path])
                    error = (
                        f"has the same content as {same[0]}, which is in {one} (this in {other})"
                    )
                    yield _problem("same content in two splits", path, error)


def unreadable(
    files: dict[str, str], workers: int | None = None, quiet: bool = False
) -> list[dict[str, str]]:
    """The files (path -> modality) that cannot be decoded."""
    from tinyvl import media, media_workers
    from tinyvl.progress import bar

    problems = []
    images = [path for path, kind in files.items() if kind == "image"]
    with bar("decoding", len(files), quiet) as advance:
        decoded = media_workers.decode_images(images, _nothing, target=64, workers=workers)
        for path, result in decoded:
            if isinstance(result, media.MediaError):
                problems.append(_problem("unreadable", path, _reason(path, str(result))))
            advance(1)
        for path, kind in files.items():
            if kind != "image":
                if error := stream_error(path, kind):
                    problems.append(_problem("unreadable", path, error))
                advance(1)
    return problems


def _nothing(image: Any) -> Any:
    """The least that a picture can be made into: only whether it decodes is asked."""
    import torch

    return torch.zeros(1, dtype=torch.uint8)


def _reason(path: str, message: str) -> str:
    return message.removeprefix(f"{path}: ")


def stream_error(path: str, kind: str) -> str | None:
    """Why the first frame of a file's ``"video"`` or ``"audio"`` cannot be decoded, or None."""
    import av

    try:
        with av.open(path) as container:
            streams = getattr(container.streams, kind)
            if not streams:
                return f"has no {kind} in it"
            if next(container.decode(streams[0]), None) is None:
                return f"its {kind} has no frames"
    except (av.FFmpegError, OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        return f"damaged, or in no format that can be read ({why})"
    return None
