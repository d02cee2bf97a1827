"""Predictions on disk: a run's own, which survive a kill; other people's, matched to records.

A prediction is one JSON line, ``{"id", "path", "caption", "score"}`` (or ``"answer"``). `read`
takes such lines, where ``id``, ``question_id``, ``image_id``, ``path`` or ``image`` names the
record, and the arrays of COCO's, NoCaps's and VQA's results files.
"""

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyvl import UserError, ranks
from tinyvl.data_records import Record, get, parsed
from tinyvl.files import dump, hold, read_object, read_text, write_text
from tinyvl.metrics import Scores
from tinyvl.progress import bar, say

if TYPE_CHECKING:
    from tinyvl.evaluate import Place

FILE, RUN, REPORT = "predictions.jsonl", "run.json", "report.json"
IDS = ("id", "question_id", "image_id")
PATHS = ("path", "image", "video", "audio")
BUSY = "another process is writing this run"
OPEN = {"encoding": "utf-8", "errors": "surrogateescape"}  # earlier runs wrote names as they are


class Log:
    """A run's predictions as they are made: in a folder, or in memory where there is none.

    The folder's ``run.json`` says what decides the predictions; a resumed run must have the same.
    A line cut off by a kill is dropped, so its picture is done again.
    """

    def __init__(self, folder: Path | None, run: dict[str, Any], *, resume: bool | None = False):
        """Opens or makes the folder. Raises UserError as `refuse` does.

        Of several processes the first one writes it.
        """
        self.run, self.stream = run, None
        self.lines: dict[str, dict[str, Any]] = {}
        if folder is None or not ranks.first():
            return
        if refuse(folder, run, resume):
            with suppress(FileNotFoundError), (folder / FILE).open("r+b") as file:
                hold(file, folder, BUSY)  # before anything is changed
            self.lines = {line["id"]: line for line in read_lines(folder)}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: cannot be made ({error.strerror}).", 2) from error
        write_text(folder / RUN, dump(run, indent=1) + "\n")
        write_text(folder / FILE, "".join(f"{dump(line)}\n" for line in self.lines.values()))
        self.stream = (folder / FILE).open("a", encoding="utf-8", newline="\n")
        hold(self.stream, folder, BUSY)

    def add(self, line: dict[str, Any]) -> None:
        """Keeps a prediction, on disk at once."""
        self.lines[line["id"]] = line
        if self.stream:
            self.stream.write(dump(line) + "\n")
            self.stream.flush()

    def fill(
        self, records: list[Record],
        predict: Callable[[list[Record]], Iterator[dict[str, Any] | UserError]], title: str,
        place: "Place",
    ) -> tuple[list[Record], dict[str, Any]]:  # fmt: skip
        """Predicts what is missing -> the records that have a prediction, and how it went.

        A record that fails costs a message. Raises UserError if all do.
        """
        todo = ranks.told(lambda: [r for r in records if r.id not in self.lines])
        kept, failed = len(records) - len(todo), 0
        begun = time.monotonic()
        with bar(title, len(records), place.quiet, start=kept) as advance:
            for record, found in zip(todo, predict(todo), strict=True):
                if isinstance(found, UserError):
                    failed += 1
                    say(f"tinyvl: {found}")
                else:
                    self.add({"id": record.id, "path": record.path, **found})
                advance(1)
        seconds = time.monotonic() - begun
        done = [record for record in records if record.id in self.lines]
        if not done:
            raise UserError(f"{self.run['data']}: none of its pictures could be read.")
        pace = round((len(todo) - failed) / seconds, 3) if todo else None
        went = {"failed": failed, "kept": kept}  # kept: made by earlier, interrupted runs
        went |= {"seconds": round(seconds, 2), "items_per_second": pace}
        return done, went | {"device": str(place.device)}


def refuse(folder: Path, run: dict[str, Any], resume: bool | None) -> bool:
    """Whether the folder has this run. ``resume`` None: this kind of run cannot be resumed.

    Raises UserError if the folder has other things or another run in it, or ``resume`` is not True.
    """
    if folder.is_file() or folder.suffix in (".json", ".jsonl"):
        message = f"--out names a folder, which gets {FILE} and {REPORT}: choose another name."
        raise UserError(f"{folder}: {message}", 2)
    if not (folder / RUN).exists():
        if folder.is_dir() and any(folder.iterdir()):
            message = "this folder has other things in it; choose another for --out."
            raise UserError(f"{folder}: {message}", 2)
        return False
    if not resume:
        way = "" if resume is None else "go on with it by --resume, or "
        raise UserError(f"{folder}: this folder has a run in it; {way}choose another.", 2)
    before = read_run(folder)
    for key in before.keys() | run.keys():
        if before.get(key) != run.get(key):
            made = f"made with {key} {before.get(key)!r}, now it is {run.get(key)!r}"
            raise UserError(f"{folder}: {made}; choose another folder for --out.", 2)
    return True


def read_run(folder: Path) -> dict[str, Any]:
    """A folder's ``run.json``; empty where there is none."""
    with suppress(UserError):
        return read_object(folder / RUN)
    return {}


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """The lines that a run has written, without one that a kill cut off."""
    found = []
    with suppress(FileNotFoundError):
        for line in re.findall(r"[^\n]*\n", (folder / FILE).read_text(**OPEN)):
            with suppress(ValueError):
                found.append(json.loads(line))
    if odd := [line for line in found if not isinstance(line, dict) or "id" not in line]:
        raise UserError(f"{folder / FILE}: {str(odd[0])[:60]!r} is no prediction.")
    return found


def report(head: dict[str, Any], items: int, scores: Scores, out: Path | None) -> dict[str, Any]:
    """The report; it is also written beside the predictions in ``out``."""
    whole = {**head, "items": items, "metrics": scores.metrics, **scores.extra}
    if scores.groups:
        whole["groups"] = scores.groups
    if out is not None:
        write_text(out / REPORT, dump(whole, indent=1) + "\n")
    return whole


def export(file: Path, lines: dict[str, dict[str, Any]], field: str) -> None:
    """Writes what the servers of COCO and NoCaps (captions) and of VQA (answers) take."""
    key = "question_id" if field == "answer" else "image_id"

    def number(text: str) -> int | str:  # as the published files have it
        return int(text) if re.fullmatch(r"0|[1-9]\d*", text) else text

    results = [{key: number(name), field: line[field]} for name, line in lines.items()]
    write_text(file, dump(results) + "\n")


def read(
    path: Path, records: list[Record], field: str, paths: dict[str, str] | None = None
) -> dict[str, dict[str, Any]]:
    """The predictions of a file or of a run's folder, by the record's id.

    Of each its ``field``, and the probabilities of its ``choices``, if there are some.

    ``paths``: the picture of each id that the data has; a record may stand for several.

    The file is JSON Lines, or a JSON array. Lines that have an ``error`` instead, as `tinyvl
    caption --json` writes for a file it cannot read, are left out. Raises UserError if there is no
    such file, or a line is no prediction of one record, the only one.
    """
    path = path.expanduser()
    file = path / FILE if path.is_dir() else path
    content = read_text(file, "surrogateescape")
    if content.lstrip().startswith("["):
        entries = [(f"{file}, [{i}]", e) for i, e in enumerate(parsed(content, file))]
    else:
        lines = [(f"{file}, line {i}", line) for i, line in enumerate(content.split("\n"), 1)]
        lines = [(where, line.removeprefix("\ufeff")) for where, line in lines]
        entries = [(where, parsed(line, where)) for where, line in lines if line.strip()]
    find, lines = finder(records, paths or {}), {}
    for where, entry in entries:
        if isinstance(entry, dict) and "error" in entry and field not in entry:
            continue
        get(entry, field, str, where)
        if not any(entry.get(key) is not None for key in IDS + PATHS):
            raise UserError(f"{where}: nothing names the record; give an {', '.join(IDS)} or path")
        key = find(where, entry)
        if key in lines and lines[key][field] != entry[field]:
            raise UserError(f"{where}: a second prediction for {key!r}; keep one for each record")
        odds = get(entry, "choices", dict, where, default={})
        if not all(isinstance(value, int | float) for value in odds.values()):
            raise UserError(f"{where}: 'choices' should give each choice a probability")
        lines[key] = {field: entry[field]} | ({"choices": odds} if odds else {})
    if not lines:
        raise UserError(f"{file} holds no predictions")
    return lines


def finder(records: list[Record], known: dict[str, str]) -> Callable[[str, dict[str, Any]], str]:
    """``find(where, entry)`` is the id of the record that an entry names; UserError without one.

    It is named by id or by path: the same path, or the same file name where only one record has it;
    among several questions about a picture, by ``question`` too.
    """
    ids = {record.id for record in records}
    named: dict[str, list[Record]] = {}  # by path and by file name
    for record in records:
        for name in {record.path, os.path.basename(record.path)}:
            named.setdefault(name, []).append(record)

    def find(where: str, entry: dict[str, Any]) -> str:
        names, paths = (
            [str(entry[key]) for key in keys if entry.get(key) is not None] for keys in (IDS, PATHS)
        )
        for name in names:
            if name in ids:
                return name
        for name in [known[name] for name in names if name in known] + paths:
            hits = named.get(os.path.abspath(name)) or named.get(os.path.basename(name), [])
            if "question" in entry:
                hits = [record for record in hits if record.question == entry["question"]]
            if len(hits) == 1:
                return hits[0].id
            if hits:
                many = f"{name!r} names {len(hits)} records of the data"
                raise UserError(f"{where}: {many}; name one by its id")
        raise UserError(f"{where}: {(names + paths)[0]!r} is not in the data")

    return find
