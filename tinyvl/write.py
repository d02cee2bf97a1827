"""Files in, lines out: what `tinyvl caption` and its like do once their model is loaded."""

import json
import os
import queue
import re
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from torch import Tensor

from tinyvl import UserError, decode, media_workers
from tinyvl.decode import Style
from tinyvl.device import Pieces
from tinyvl.files import ESCAPED, dump, hold, quoted, read_object, read_text, unquoted, write_text
from tinyvl.progress import Told, bar
from tinyvl.rerank import NONE

if TYPE_CHECKING:
    from tinyvl.captioner import Captioner
    from tinyvl.features import FeatureStore


ADVICE = "use fewer --beams or --device cpu"  # where not even one picture fits

# ----------------------------------------------------------------------------------- captions


def captions(
    model: "Captioner", paths: Iterable[str], *, style: Style | None, batch: int = 16,
    workers: int | None = None, questions: Iterable[str] | None = None,
    choices: Iterable[list[str]] | None = None, store: "FeatureStore | None" = None,
) -> Iterator[tuple]:  # fmt: skip
    """(path, caption or what is wrong with the file, mean log-probability), in order.

    Pictures are decoded ahead in worker processes, or with a ``store`` not at all: the encoder's
    output is read from there. What has come is captioned at once: a slow producer at the other end
    of a pipe makes small batches, not waiting. ``questions``, one a path, are answered instead.
    With ``choices``, too, {choice: probability} is the last of a tuple; without a ``style`` the
    likeliest is the answer.
    """
    pieces = Pieces(advice=ADVICE)
    asked: Any = None if questions is None else zip(questions, strict=False)
    if choices is not None:
        asked = zip(questions or (), choices, strict=False)
    for group in gathered(decoded(model, paths, asked, workers, store), batch):
        for path, found in computed(group, lambda good: run(model, good, style, pieces)):
            yield path, *((found, 0.0) if isinstance(found, UserError) else found)


def decoded(
    model: "Captioner", paths: Iterable[str], asked: Iterable[tuple] | None,
    workers: int | None, store: "FeatureStore | None",
) -> Iterator[tuple]:  # fmt: skip
    """(path, picture or what is wrong with it), and what is ``asked``: question, choices."""
    if store is not None:
        pictures = stored(store, model.reads, paths)
    else:
        view, target = model.encoder.view(), model.encoder.size
        pictures = media_workers.decode_images(paths, view, target=target, workers=workers)
    with closing(pictures):  # ends the workers when this generator is closed
        if asked is None:
            yield from pictures
        else:
            for (path, picture), own in zip(pictures, asked, strict=False):
                yield path, picture, *own


def stored(
    store: "FeatureStore", what: str, paths: Iterable[str]
) -> Iterator[tuple[str, Tensor | UserError]]:
    """The tokens (S, D) or summaries (ΣD,) of each path, or why there are none."""
    for path in paths:
        entry = store.find(os.path.abspath(path))
        if entry is None:
            yield path, UserError(f"{path}: not in {store.folder}, or changed since.")
        else:
            error = entry.error
            found = None if error else store.read(what, [entry.row])[0]
            if found is not None and not found.float().isfinite().all():  # of an older tinyvl
                error = f"{path}: its features are not finite numbers; extract them anew elsewhere"
            yield path, UserError(error) if error else found


def run(
    model: "Captioner", items: list[tuple], style: Style | None, pieces: Pieces | None = None
) -> list[tuple]:
    """Captions of (path, decoded picture), or answers to (path, decoded picture, question).

    Of (path, decoded picture, question, choices) also the choices' probabilities.
    """
    pieces, found = pieces or Pieces(advice=ADVICE), {}
    shapes = [item[1].shape for item in items]
    for shape in dict.fromkeys(shapes):  # several, where pictures are beside videos
        rows = [row for row, own in enumerate(shapes) if own == shape]
        alike = [items[row] for row in rows]
        texts = pieces.run(partial(in_pieces, model, alike, style), len(alike))
        found |= zip(rows, texts, strict=True)
    return [found[row] for row in range(len(items))]


def in_pieces(
    model: "Captioner", items: list[tuple], style: Style | None, number: int
) -> list[tuple]:
    """What `run` makes of items of one shape, in this many batches."""
    each, found = -(-len(items) // number), []
    for i in range(0, len(items), each):
        part, options = items[i : i + each], dict(vars(style)) if style else None
        if style and style.sampling:  # what is drawn for a file depends on its path and the seed
            keys = ["\0".join([item[0], *item[2:3]]) for item in part]
            indices = [zlib.crc32(os.fsencode(key)) for key in keys]
            options |= {"sampling": style.sampling | {"indices": indices}}
        pictures = torch.stack([item[1] for item in part])
        asked = [list(column) for column in zip(*(item[2:] for item in part), strict=True)]
        if len(asked) == 2:
            found += chosen(model, pictures, *asked, options)
        elif asked:
            found += model.answer(pictures, *asked, **options)
        else:
            found += model.caption(pictures, **options)
    return found


def chosen(
    model: "Captioner", pictures: Tensor, questions: list[str], choices: list[list[str]],
    options: dict[str, Any] | None,
) -> list[tuple[str, float, dict[str, float]]]:  # fmt: skip
    """Answers, as `Captioner.answer` gives them, each with its {choice: probability}.

    Without ``options`` of a search the likeliest choice is the answer.
    """
    seen = model.look(pictures)
    scored = model.choose(seen, questions, choices)
    odds = [
        dict(zip(own, decode.chances(found), strict=True))
        for own, found in zip(choices, scored, strict=True)
    ]
    if options is not None:
        answers = model.answer(seen, questions, **options)
    else:
        best = [max(own, key=own.__getitem__) for own in odds]
        answers = [
            (name, found[own.index(name)].mean_logprob)
            for name, own, found in zip(best, choices, scored, strict=True)
        ]
    return [(*answer, own) for answer, own in zip(answers, odds, strict=True)]


def gathered(items: Iterator[Any], size: int, patience: float = 0.25) -> Iterator[list[Any]]:
    """Lists of up to ``size`` items: full ones when items come fast, what is there when slow."""
    end, slow, ready = object(), object(), queue.Queue(maxsize=2 * size)
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
            if all(put(item) for item in items):
                put(end)
        except BaseException as error:
            put(error)
        finally:
            items.close()

    thread = threading.Thread(target=pump, daemon=True)
    thread.start()
    group: list[Any] = []
    try:
        while True:
            try:
                item = ready.get(timeout=patience if group else None)
            except queue.Empty:
                item = slow
            over = item is end or isinstance(item, BaseException)
            if not over and item is not slow:
                group.append(item)
            if group and (over or item is slow or len(group) == size):
                yield group
                group = []
            if item is end:
                return
            if over:
                raise item
    finally:
        closed.set()
        thread.join(timeout=5)


def computed(
    group: list[tuple], compute: Callable[[list[tuple]], Iterable]
) -> Iterator[tuple[str, Any]]:
    """(path, what ``compute`` makes of the item, or what is wrong with its picture), in order.

    Of a group of (path, picture or what is wrong with it, ...), those with pictures at once.
    """
    good = [item for item in group if isinstance(item[1], Tensor)]
    found = iter(compute(good) if good else ())
    for path, picture, *_ in group:
        yield path, next(found) if isinstance(picture, Tensor) else picture


# ----------------------------------------------------------------------------------- lines


def listed(paths: Iterable[str]) -> tuple[Iterator[str], int, bool]:
    """Paths that are told before the work begins: the same, how many, and if any is there.

    An error that ends them (a folder has none) still comes behind the others.
    """
    found: list[str] = []
    errors: list[UserError] = []
    try:
        found.extend(paths)
    except UserError as error:
        errors.append(error)

    def again() -> Iterator[str]:
        yield from found
        for error in errors:
            raise error

    return again(), len(found), any(map(os.path.lexists, found))


def absent(paths: Iterable[str]) -> Iterator[tuple[str, UserError]]:
    """Of files none of which is there; no model is needed to say so."""
    for path in paths:
        yield path, UserError(f"{path}: there is no such file")


def write(
    results: Iterable[tuple], stream: TextIO | None, *, as_json: bool, bare: bool,
    question: str | None = None, told: Told | None = None,
) -> int:  # fmt: skip
    """A line a caption, or answer to a ``question``: see `write_rows`. -> the exit status."""
    name = "caption" if question is None else "answer"

    def row(text: str, score: float, odds: dict[str, float] | None = None) -> dict[str, Any]:
        known = {} if odds is None else {"choices": rounded(odds)}
        return {name: text, "score": round(score, 4)} | known

    rows = (
        (path, text if isinstance(text, UserError) else [row(text, *more)])
        for path, text, *more in results
    )
    asked = {} if question is None else {"question": question}
    text = f"{{{name}}}"
    return write_rows(rows, stream, text, as_json=as_json, bare=bare, fields=asked, told=told)


def rounded(odds: dict[str, float]) -> dict[str, float]:
    return {choice: round(value, 6) for choice, value in odds.items()}


def write_rows(
    results: Iterable[tuple[str, list[dict[str, Any]] | UserError]], stream: TextIO | None,
    text: str, *, as_json: bool, bare: bool, fields: dict[str, Any] | None = None,
    told: Told | None = None,
) -> int:  # fmt: skip
    """A line a row, as they come; what failed goes to standard error. -> the exit status.

    ``stream`` None: standard output. UserError: on Control-C.

    Results are (path, its rows, or what is wrong with it). A line is ``path<TAB>text``, the path
    as `files.quoted` gives it, or ``bare`` (one input) the text alone, which is made of a row by
    `str.format`. With ``as_json`` it is the path, the ``fields`` and the row, or what is wrong.
    """
    told, count, failed, begun = told or Told(), 0, 0, time.monotonic()
    try:
        with bar(told.what, told.total, told.quiet or bare) as advance:
            for path, rows in results:
                count += 1
                if isinstance(rows, UserError):
                    failed += 1
                    print(f"tinyvl: {rows}", file=sys.stderr)
                    why = str(rows).removeprefix(f"{path}: ")
                    rows = [{"error": why}] if as_json else []
                if as_json:
                    head = {"path": path, **(fields or {})}
                    lines = [dump(head | row) for row in rows]
                else:
                    start = "" if bare else f"{quoted(path)}\t"
                    lines = [start + text.format(**row) for row in rows]
                if lines:  # all of a picture's at once: --resume finds whole pictures
                    put("\n".join(lines), stream or sys.stdout)
                advance(1)
    except KeyboardInterrupt:
        raise told.stopped(count) from None
    told.end(count, failed, time.monotonic() - begun)
    return int(failed > 0)


def put(lines: str, stream: TextIO) -> None:
    """Raises UserError: the disk is full, or the like."""
    try:
        print(lines, file=stream, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"{stream.name}: cannot be written ({error.strerror}).") from error


def check_output(out: Path, resume: bool) -> None:
    """Raises UserError: a file is there, and not to be gone on with."""
    if out.exists() and not resume:
        advice = "go on with it by --resume, or choose another name"
        raise UserError(f"{out}: this file exists; {advice}.", 2)


def open_output(
    out: Path, resume: bool, *, field: str = "caption", tabs: int = 1, lines: int = 1,
    question: str | None = None, choices: list[str] | None = None,
    made_by: dict[str, Any] | None = None,
) -> tuple[TextIO, set[str]]:  # fmt: skip
    """The file to append to, and the paths it already has results for.

    A line cut off by a kill, the lines of failed files and those of a path with too few lines are
    dropped: they are tried again. Answers to another ``question``, or of other ``choices``, stay
    and do not count. A line of JSON has ``field`` unless its file failed; in one of text, ``tabs``
    columns follow the path. What the lines are ``made_by`` (the model, the search) stands in a
    hidden file beside it.

    Raises UserError: it cannot be written; it exists, without ``resume``, or is not tinyvl's; its
    lines were made otherwise; or another process writes it.
    """

    def append() -> TextIO:
        try:
            stream = out.open("a", encoding="utf-8", errors=ESCAPED, newline="\n")
        except OSError as error:
            raise UserError(f"{out}: cannot be written ({error.strerror}).", 2) from error
        hold(stream, out, "another process is writing this file")
        return stream

    check_output(out, resume)
    beside, made_by = out.with_name(f".{out.name}.json"), json.loads(json.dumps(made_by))
    if not out.exists():
        stream = append()
        if made_by and out.is_file():
            write_text(beside, json.dumps(made_by) + "\n")
        return stream, set()
    append().close()  # nobody else is at it
    if made_by and beside.exists():
        before = {"rerank": NONE} | read_object(beside)  # which files of older versions do not say
        for name in before.keys() & made_by.keys():  # an answer of given choices has no search
            if before[name] != made_by[name]:
                was = f"its lines were made with {name} {before[name]}, not {made_by[name]}"
                raise UserError(f"{out}: {was}; go on with that, or choose another name.", 2)
        made_by = before | made_by
    kept: list[tuple[str, str]] = []  # path, line
    for line in re.findall(r"[^\n]*\n", read_text(out, "surrogateescape")):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and isinstance(record.get("path"), str):
            if field in record:
                ours = record.get("question") == question
                ours = ours and list(record.get("choices") or ()) == (choices or [])
                kept.append((record["path"] if ours else "", line))
            continue
        if record is not None or line.count("\t") < tabs:
            message = "this file was not written by tinyvl; nothing was changed."
            raise UserError(f"{out}: {message}", 2)
        # A path may hold a tab, a caption or label does not.
        kept.append((unquoted(line.rsplit("\t", tabs)[0]), line))
    counts = Counter(path for path, _ in kept)
    whole = "".join(line for path, line in kept if counts[path] >= lines)
    write_text(out, whole)
    if made_by and out.is_file():
        write_text(beside, json.dumps(made_by) + "\n")
    return append(), {path for path, count in counts.items() if count >= lines}
