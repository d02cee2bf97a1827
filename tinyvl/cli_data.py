"""`tinyvl data check|convert` and `tinyvl features`: data sets looked at, turned into, encoded."""

import json
import sys
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from tinyvl import UserError
from tinyvl.cli_options import Place, batch_of, command, group, same
from tinyvl.files import dump, local, write_text
from tinyvl.presets import small_defaults
from tinyvl.presets_options import EPalm, ITune, Job, Run, option

FORMATS = (  # as in data.READERS, which is too heavy to import for the help
    *("jsonl", "karpathy", "coco", "nocaps", "flickr", "visual-genome", "cc3m", "xtd10", "vqa"),
    *("gqa", "daquar", "msrvtt", "msrvtt-qa", "msvd", "msvd-qa", "audiocaps", "clotho"),
    *("webdataset", "classes", "folder"),
)
SMALL = small_defaults("itune")
SHOWN = 10  # problems named on standard error; --json has all

app = group()
sets = group("Check data sets, and turn them into JSON Lines.")
app.add_typer(sets, name="data")


@dataclass
class Reading:
    """How a data set is read."""

    format: str | None = same(Job, "format",
        help=f"Read the data as this format: {', '.join(FORMATS)}.", panel="Data")  # fmt: skip
    split: str | None = option("Data", None, "Only this split.")
    lang: str | None = option("Data", None, "Only this language, if records say.")
    images: str | None = same(Job, "images")


@command(sets, "check")
def check_data(
    paths: Annotated[list[Path], typer.Argument(help="Data sets: files or folders.")], *,
    reading: Reading,
    fast: bool = option("Run", False, "Only look whether files exist; decode none."),
    as_json: bool = option("Output", False, "One JSON object.", name="--json"),
    quiet: bool = same(Run, "quiet", False), workers: int | None = same(Run, "workers"),
) -> None:  # fmt: skip
    """Validate data sets without training on them.

    Counts records, files, splits, languages, captions and their lengths, and finds missing and
    damaged files, blank captions, and files that are in two splits. Several data sets that name no
    split are taken for the splits of one. Exit status 1: there are problems.
    """
    from tinyvl import data_check

    report = data_check.check(paths, **vars(reading), fast=fast, workers=workers, quiet=quiet)
    for detail in report["details"][:SHOWN]:
        record = f" ({detail['record']})" if "record" in detail else ""
        print(f"tinyvl: {detail['path']}{record}: {detail['error']}", file=sys.stderr)
    if (more := len(report["details"]) - SHOWN) > 0:
        print(f"tinyvl: and {more:,} problems more; --json lists them all", file=sys.stderr)
    if report["problems"].get("missing") == sum(report["files"].values()):
        print("tinyvl: none of the files is there; --images says where they are", file=sys.stderr)
    if as_json:
        print(dump(report))
    else:
        show(report)
    raise typer.Exit(bool(report["details"]))


def show(report: dict[str, Any]) -> None:
    """The report as tables on a terminal, and elsewhere as name<TAB>value lines."""
    rows = [("data", f"{entry['path']} ({entry['format']})") for entry in report["data"]]
    rows.append(("records", f"{report['records']:,}"))
    rows += [(f"{kind} files", f"{n:,}") for kind, n in report["files"].items()]
    rows += [(name, listed(report[name])) for name in ("langs", "domains") if name in report]
    if "classes" in report:
        each = report["classes"].values()
        rows.append(("classes", f"{len(each):,}, of {min(each):,} to {max(each):,} records"))
    for part in ("captions", "questions"):
        for name, value in report.get(part, {}).items():
            value = f"{value:,}" if isinstance(value, int) else value
            if value:
                text = value if isinstance(value, str) else listed(value)
                rows.append((f"{part}, {name.replace('_', ' ')}", text))
    problems = [(kind, f"{n:,}") for kind, n in report["problems"].items()]
    problems = problems or [("none", "" if report["decoded"] else "files were not decoded")]
    if not sys.stdout.isatty():
        rows += [(f"split {name}", listed(split)) for name, split in report["splits"].items()]
        for name, value in rows + [(f"problem: {kind}", n) for kind, n in problems]:
            print(f"{name}\t{value}")
        return
    from rich.console import Console
    from rich.table import Column, Table

    columns = ("files", "records", "captions", "questions")
    table = Table("split", *(Column(column, justify="right") for column in columns))
    for name, split in report["splits"].items():
        table.add_row(name, *(f"{split.get(column, 0):,}" for column in columns))
    facts = Table(show_header=False)
    for row in rows:
        facts.add_row(*row)
    wrong = Table("problem", "count")
    for row in problems:
        wrong.add_row(*row, style="red" if report["details"] else "green")
    for each in (table, facts, wrong):
        Console(markup=False).print(each)


def listed(values: dict[str, Any], most: int = 12) -> str:
    pairs = [f"{name} {value:,}" for name, value in values.items()]
    return ", ".join(pairs[:most]) + (f", … ({len(pairs):,} in all)" if len(pairs) > most else "")


def write_records(records: list, out: Path) -> None:
    """A new JSON Lines file; UserError: it exists."""
    from tinyvl import data

    if out.exists():
        raise UserError(f"{out}: this file exists; choose another name, or delete it first.", 2)
    write_text(out, "".join(f"{data.line_of(record, out.parent)}\n" for record in records))
    print(f"tinyvl: {len(records):,} records", file=sys.stderr)
    print(out)


@command(sets, "convert")
def convert_data(
    paths: Annotated[list[Path], typer.Argument(help="Data sets: files or folders.")],
    *,
    out: Path = option("Output", MISSING, "The JSON Lines file to write.", name="--out,-o"),
    reading: Reading,
) -> None:
    """Write data sets as one JSON Lines file, the paths in it relative to that file.

    Of several sets, records that name no part are of the part in the file's name (a_train.jsonl). A
    WebDataset's pictures stay where they were unpacked, in the cache. Prints the file's path.
    """
    from tinyvl import data
    from tinyvl.data_records import split_in

    records = []
    for path in paths:
        for record in data.read(path, **vars(reading)):
            if len(paths) > 1 and record.split is None:
                record = replace(record, split=split_in(path.name))
            records.append(record)
    write_records(records, out)


@command(sets, "questions")
def make_questions(
    path: Annotated[Path, typer.Argument(help="A data set with captions.")],
    *,
    out: Path = option("Output", MISSING, "The JSON Lines file to write.", name="--out,-o"),
    reading: Reading,
) -> None:
    """Write questions and answers made from captions in English: what, how many, what color.

    Each is about what several captions of a picture agree on. Prints the file's path.
    """
    from tinyvl import data, data_make

    write_records(data_make.make(data.read(path, **vars(reading))), out)


@command(app, "features")
def features(
    data: Annotated[
        list[str], typer.Argument(help="Data sets as `tinyvl train` reads them, image folders.")
    ],
    *,
    out: Path = option("Output", MISSING, "Folder of the features.", name="--out,-o"),
    preset: str | None = option("Model", None, "Its encoder: a paper's row, or itune-default, the "
        "shipped model's.", shown="what `tinyvl train itune` reads"),
    vision: str | None = same(EPalm, "vision", help="Frozen encoder: a name or folder."),
    fit: str | None = same(Job, "fit"),
    modality: str | None = same(EPalm, "modality"),
    frames: int | None = option("Data", None, "Frames of a video.", shown="8", min=1),
    lower: int | None = same(ITune, "lower", shown=str(SMALL["lower"])),
    larger: int | None = same(ITune, "larger", shown="0"),
    what: str = option("Output", "both", "tokens (I-Tuning reads them), summaries (eP-ALM), or "
        "both.", choices=("tokens", "summaries", "both")),
    dtype: str = option("Advanced", "fp16", "Kept as fp16, bf16 or fp32.",
        choices=("fp16", "bf16", "fp32")),
    split: str | None = option("Data", None, "This part of the data only."),
    images: str | None = same(Job, "images"),
    format: str | None = same(Job, "format"),
    limit: int | None = option("Data", None, "The first pictures only.", min=1),
    batch: int = batch_of(32),
    quiet: bool = same(Run, "quiet", False),
    place: Place,
) -> None:  # fmt: skip
    """Encode pictures once: token maps and summaries, on disk, for --features DIR elsewhere.

    Says first how much disk it takes. Killed at any moment, it goes on when called again, to the
    same bytes; with more data it adds what is new. Prints the counts as JSON.
    """
    from tinyvl import data as readers
    from tinyvl import features as kept
    from tinyvl import presets
    from tinyvl.device import choose_device, choose_precision, keep_memory

    asked = {"modality": modality, "frames": frames, "lower": lower, "larger": larger}
    asked = {name: value for name, value in asked.items() if value is not None}
    row, kind, told = presets.encoder_of(preset, vision, asked, summaries=what == "summaries")
    target = choose_device(place.device)
    precision = choose_precision(place.precision, target)
    records = [
        record
        for path in data
        for record in readers.read(path, format=format, split=split, images=images)
    ]
    found = [record for record in records if record.modality == kind]
    pictures = list(dict.fromkeys((r.path, r.id) for r in found))[:limit]
    if not pictures:
        nouns = {"image": "pictures", "video": "videos", "audio": "sounds"}
        raise UserError(f"{', '.join(data)}: no {nouns[kind]} there.", 2)
    readers.say_left_out(", ".join(data), records, found, f"not {kind}")
    keep_memory()
    description, encoder = kept.load_encoder(
        local(vision or row.vision), fit or row.fit, device=target, precision=precision, media=told
    )
    head = kept.contents(description, encoder, what=what, dtype=dtype)
    run = Run(out, target, workers=place.workers, quiet=quiet)
    try:
        done = kept.extract(out, pictures, encoder, head, run, batch=batch)
    except KeyboardInterrupt:
        raise UserError("stopped; the same command goes on from here.", 130) from None
    print(json.dumps({"features": str(out), **done}))
    raise typer.Exit(1 if done["failed"] else 0)
