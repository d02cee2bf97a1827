"""Files in, lines of text out: what `tinyvl caption` does once its model is loaded."""

import json
import os
import queue
import re
import sys
import threading
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from tinyvl import UserError, media_workers
from tinyvl.captioner import Captioner
from tinyvl.features import FeatureStore


@dataclass
class Style:
    """How captions are searched for."""

    beams: int = 5
    max_tokens: int = 40
    length_penalty: float = 1.0
    early_stopping: bool = True
    sampling: dict[str, Any] | None = None


def captions(
    model: Captioner,
    paths: Iterable[str],
    *,
    style: Style,
    batch: int = 16,
    workers: int | None = None,
    questions: Iterable[str] | None = None,
    store: FeatureStore | None = None,
) -> Iterator[tuple[str, str | UserError, float]]:
    """(path, caption or what is wrong with the file, mean log-probability), in order.

    Pictures are decoded ahead in worker processes. What has come is captioned at once: a slow
    producer at the other end of a pipe makes small batches, not waiting.

    Args:
        questions: one for each path, to be answered by ``model.answer`` in the captions' place.
        store: nothing is decoded, the pictures are what an encoder made of them, from there.
    """
    for group in gathered(decoded(model, paths, questions, workers, store), batch):
        good = [item for item in group if isinstance(item[1], Tensor)]
        found = iter(run(model, good, style))
        for path, picture, *_ in group:
            if isinstance(picture, Tensor):
                yield path, *next(found)
            else:
                yield path, picture, 0.0


def decoded(
    model: Captioner,
    paths: Iterable[str],
    questions: Iterable[str] | None,
    workers: int | None,
    store: FeatureStore | None,
) -> Iterator[tuple]:
    """(path, picture or what is wrong with it), and its question, if there are questions."""
    if store is not None:
        pictures = stored(store, model.reads, paths)
    else:
        encoder = model.encoder
        pictures = media_workers.decode_images(
            paths, encoder.view(), target=encoder.size, workers=workers
        )
    with closing(pictures):  # ends the workers when this generator is closed
        if questions is None:
            yield from pictures
        else:
            for (path, picture), question in zip(pictures, questions, strict=False):
                yield path, picture, question


def stored(
    store: FeatureStore, what: str, paths: Iterable[str]
) -> Iterator[tuple[str, Tensor | UserError]]:
    """The tokens (S, D) or summaries (ΣD,) of each path, or why there are none."""
    for path in paths:
        entry = store.find(os.path.abspath(path))
        if entry is None:
            yield path, UserError(f"{path}: not in {store.folder}, or changed since.")
        elif entry.row is None:
            yield path, UserError(entry.error)
        else:
            yield path, store.read(what, [entry.row])[0]


def run(model: Captioner, pictures: list[tuple], style: Style) -> list[tuple[str, float]]:
    """Captions of (path, decoded picture), or answers to (path, decoded picture, question).

    A batch that does not fit in memory is halved.
    """
    if not pictures:
        return []
    settings = dict(vars(style))
    if style.sampling:  # what is drawn for a file depends on its path and the seed alone
        indices = [zlib.crc32(os.fsencode("\0".join([path, *rest]))) for path, _, *rest in pictures]
        settings["sampling"] = style.sampling | {"indices": indices}
    shapes = [item[1].shape for item in pictures]
    if len(set(shapes)) > 1:  # pictures beside videos
        found: dict[int, tuple[str, float]] = {}
        for shape in dict.fromkeys(shapes):
            rows = [row for row, own in enumerate(shapes) if own == shape]
            found |= zip(rows, run(model, [pictures[row] for row in rows], style), strict=True)
        return [found[row] for row in range(len(pictures))]
    pixels = torch.stack([item[1] for item in pictures])
    try:
        if len(pictures[0]) == 3:
            return model.answer(pixels, [item[2] for item in pictures], **settings)
        return model.caption(pixels, **settings)
    except torch.OutOfMemoryError:
        if len(pictures) == 1:
            raise UserError(
                "One picture does not fit in this device's memory; use fewer --beams or "
                "--device cpu."
            ) from None
    torch.cuda.empty_cache()
    half = len(pictures) // 2
    print(f"out of memory: going on with batches of {half}", file=sys.stderr)
    return run(model, pictures[:half], style) + run(model, pictures[half:], style)


def gathered(items: Iterator[Any], size: int, patience: float = 0.25) -> Iterator[list[Any]]:
    """Lists of up to ``size`` items: full ones when items come fast, what is there when slow."""
    end, ready = object(), queue.Queue(maxsize=2 * size)
    closed = threading.Event()

    def put(item: Any) -> bool:
        while not closed.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def pump() -> None:
        try:
            for item in items:
                if not put(item):
                    return
            put(end)
        except BaseException as error:
            put(error)
        finally:
            items.close()

    thread = threading.Thread(target=pump, daemon=True)
    thread.start()
    try:
        group: list[Any] = []
        while True:
            try:
                item = ready.get(timeout=patience if group else None)
            except queue.Empty:
                yield group
                group = []
                continue
            if item is end:
                break
            if isinstance(item, BaseException):
                if group:
                    yield group
                raise item
            group.append(item)
            if len(group) == size:
                yield group
                group = []
        if group:
            yield group
    finally:
        closed.set()
        thread.join(timeout=5)


def write(
    results: Iterable[tuple[str, str | UserError, float]],
    stream: TextIO,
    *,
    as_json: bool,
    bare: bool,
    question: str | None = None,
) -> int:
    """A line a result, as it comes; what failed goes to standard error. -> the exit status.

    ``bare``: the caption alone (one input); else ``path<TAB>caption``. With a ``question`` the
    results are answers to it.
    """
    asked = {} if question is None else {"question": question}
    name = "caption" if question is None else "answer"
    status = 0
    for path, text, score in results:
        if isinstance(text, UserError):
            status = 1
            print(f"tinyvl: {text}", file=sys.stderr)
            if not as_json:
                continue
            line = json.dumps({"path": path, **asked, "error": str(text)}, ensure_ascii=False)
        elif as_json:
            fields = {"path": path, **asked, name: text, "score": round(score, 4)}
            line = json.dumps(fields, ensure_ascii=False)
        else:
            line = text if bare else f"{path}\t{text}"
        print(line, file=stream, flush=True)
    return status


def open_output(
    out: Path,
    resume: bool,
    *,
    field: str = "caption",
    tabs: int = 1,
    lines: int = 1,
    question: str | None = None,
) -> tuple[TextIO, set[str]]:
    """The file to append to, and the paths it already has results for.

    A line cut off by a kill, the lines of failed files and those of a path with too few lines are
    dropped: they are tried again.

    Args:
        field: what a line of JSON has unless its file failed.
        tabs: how many columns follow the path in a line of text.
        lines: how many lines a path has.
        question: to which the results are answers; those to others stay and do not count.
    """
    append = partial(out.open, "a", encoding="utf-8", errors="surrogateescape")
    if not out.exists():
        try:
            return append(), set()
        except OSError as error:
            raise UserError(f"{out}: cannot be written ({error.strerror}).", 2) from error
    if not resume:
        raise UserError(
            f"{out}: this file exists; go on with it by --resume, or choose another name.", 2
        )
    kept: list[tuple[str, str]] = []  # path, line
    content = out.read_text(encoding="utf-8", errors="surrogateescape")
    for line in re.findall(r"[^\n]*\n", content):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            if field in record:
                ours = record.get("question") == question
                kept.append((record.get("path") if ours else None, line))
        elif line.count("\t") >= tabs:  # a path may hold a tab, a caption or label does not
            kept.append((line.rsplit("\t", tabs)[0], line))
        else:
            raise UserError(f"{out}: this file was not written by tinyvl; nothing was changed.", 2)
    counts = Counter(path for path, _ in kept)
    part = out.with_name(f".{out.name}.part")
    whole = "".join(line for path, line in kept if counts[path] >= lines)
    part.write_text(whole, encoding="utf-8", errors="surrogateescape")
    part.replace(out)
    return append(), {path for path, count in counts.items() if count >= lines}
