"""`tinyvl data check|convert`: look at data sets, and turn them into JSON Lines."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tinyvl import UserError
from tinyvl.cli_options import Workers

FORMATS = (  # as in data_formats.READERS, which is too heavy to import for the help
    *("jsonl", "karpathy", "coco", "nocaps", "flickr", "visual-genome", "cc3m", "xtd10", "vqa"),
    *("gqa", "daquar", "msrvtt", "msrvtt-qa", "msvd", "msvd-qa", "audiocaps", "clotho"),
    *("webdataset", "classes", "folder"),
)
Format = Annotated[
    str | None,
    typer.Option(help=f"Force the format: {', '.join(FORMATS)}. (default: recognised)"),
]
Split = Annotated[str | None, typer.Option(help="Only this split.")]
Lang = Annotated[str | None, typer.Option(help="Only this language, where records say.")]
Images = Annotated[
    Path | None,
    typer.Option(help="Folder of the pictures, videos or sounds. (default: the usual ones)"),
]
SHOWN = 10  # problems named on standard error; --json has all

app = typer.Typer(no_args_is_help=True, help="Check data sets, and turn them into JSON Lines.")


@app.command("check")
def check_data(
    paths: Annotated[list[Path], typer.Argument(help="Data sets: files or folders.")],
    format: Format = None,
    split: Split = None,
    lang: Lang = None,
    images: Images = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="Only look whether files exist; decode none.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    workers: Workers = None,
) -> None:
    """Validate data sets without training on them.

    Counts records, files, splits, languages, captions and their lengths, and finds missing and
    damaged files, blank captions, and files that are in two splits. Several data sets that name no
    split are taken for the splits of one. Exit status 1: there are problems.
    """
    from tinyvl import data_check

    report = data_check.check(
        paths, format=format, split=split, lang=lang, images=images, fast=fast, workers=workers,
        quiet=quiet,
    )  # fmt: skip
    for detail in report["details"][:SHOWN]:
        record = f" ({detail['record']})" if "record" in detail else ""
        print(f"tinyvl: {detail['path']}{record}: {detail['error']}", file=sys.stderr)
    if (more := len(report["details"]) - SHOWN) > 0:
        print(f"tinyvl: and {more:,} problems more; --json lists them all", file=sys.stderr)
    if report["problems"].get("missing") == sum(report["files"].values()):
        print("tinyvl: none of the files is there; --images says where they are", file=sys.stderr)
    if as_json:
        print(json.dumps(report, ensure_ascii=False))
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
    from rich.table import Table

    columns = ("files", "records", "captions", "questions")
    table = Table("split")
    for column in columns:
        table.add_column(column, justify="right")
    for name, split in report["splits"].items():
        table.add_row(name, *(f"{split.get(column, 0):,}" for column in columns))
    facts = Table(show_header=False)
    for row in rows:
        facts.add_row(*row)
    wrong = Table("problem", "count")
    for row in problems:
        wrong.add_row(*row, style="red" if report["details"] else "green")
    for each in (table, facts, wrong):
        Console().print(each)


def listed(values: dict[str, Any], most: int = 12) -> str:
    pairs = [f"{name} {value:,}" for name, value in values.items()]
    return ", ".join(pairs[:most]) + (f", … ({len(pairs):,} in all)" if len(pairs) > most else "")


@app.command("convert")
def convert_data(
    path: Annotated[Path, typer.Argument(help="A data set: a file or a folder.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The JSON Lines file to write.")],
    format: Format = None,
    split: Split = None,
    lang: Lang = None,
    images: Images = None,
) -> None:
    """Write a data set as JSON Lines, the paths in it relative to that file.

    A WebDataset's pictures stay where they were unpacked, in the cache. Prints the file's path.
    """
    if out.exists():
        raise UserError(f"{out}: this file exists; choose another name, or delete it first.", 2)
    from tinyvl import data
    from tinyvl.files import replace_file

    records = data.read(path, format=format, split=split, lang=lang, images=images)

    def write(part: Path) -> None:
        with open(part, "w", encoding="utf-8") as file:
            file.writelines(f"{data.line_of(record, out.parent)}\n" for record in records)

    replace_file(out, write)
    print(f"tinyvl: {len(records):,} records", file=sys.stderr)
    print(out)
