"""`tinyvl models`, `inspect`, `pull` and `push`: models by name, from the hub and to it."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from tinyvl.cli_options import AS_JSON, command, group, known_names
from tinyvl.files import dump
from tinyvl.presets_options import METHODS, commas, option

ROLES = ("decoder", "vision", "text", "audio")
app = group()


@command(app, "models")
def list_models(
    as_json: bool = AS_JSON,
    method: str | None = option("Data", None, "Only presets of this method.", choices=METHODS),
    role: str | None = option("Data", None, "Only backbones of this role.", choices=ROLES),
) -> None:
    """List presets and backbones: parameters, licence, source, whether they are here.

    A table on a terminal; elsewhere a line each, by tabs: preset, name, method, language, vision,
    row; backbone, name, role, parameters, licence, source, here.
    """
    from tinyvl import hub, presets

    backbones = [
        {
            "name": b.name, "role": b.role, "parameters": b.parameters, "licence": b.licence,
            "source": b.source, "here": hub.available(b.name),
        }
        for b in hub.BACKBONES.values()
        if role in (None, b.role) and (role or not method)
    ]  # fmt: skip
    rows = [
        {"name": name, "method": p.method, "language": p.language, "vision": p.vision, "row": p.row}
        for name, p in presets.PRESETS.items()
        if method in (None, p.method) and (method or not role)
    ]
    if as_json:
        for row in rows + backbones:
            print(dump(row))
        return
    if not sys.stdout.isatty():
        for kind, entries in (("preset", rows), ("backbone", backbones)):
            for entry in entries:
                told = ("yes" if v is True else "no" if v is False else v for v in entry.values())
                print(kind, *told, sep="\t")
        return
    from rich.console import Console
    from rich.table import Column, Table

    console = Console(markup=False)
    for title, entries in (("Presets", rows), ("Backbones", backbones)):
        if not entries:
            continue
        columns = (Column(n, overflow="fold", no_wrap=n == "name") for n in entries[0])
        table = Table(*columns, title=title, title_justify="left")
        for entry in entries:
            table.add_row(*(cell(value) for value in entry.values()))
        console.print(table)


def cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value / 1e6:,.1f} M" if isinstance(value, int) else str(value)


@command(app, "inspect")
def inspect(
    name: Annotated[str, typer.Argument(help="A preset, a checkpoint, default, or a backbone.",
        autocompletion=known_names)],
    as_json: bool = AS_JSON,
    task: str = option("Model", "caption", "Which default: caption, vqa or retrieve.",
        choices=("caption", "vqa", "retrieve")),
) -> None:  # fmt: skip
    """Count a model's parameters; needs neither weights nor network."""
    from tinyvl import models

    found = models.inspect(name, task)
    if as_json:
        print(json.dumps(found))
        return
    for key, value in flattened(found):
        print(f"{key}\t{value}")


def flattened(values: dict[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Names and values as text, of what stands in a dictionary "options.drop"."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flattened(value, f"{before}{name}.")
        elif isinstance(value, bool) or value is None:
            yield before + name, {True: "yes", False: "no", None: "-"}[value]
        elif isinstance(value, list | tuple):
            yield before + name, ",".join(map(str, value))
        else:
            yield before + name, f"{value:,}" if isinstance(value, int) else str(value)


@command(app, "pull")
def pull(
    names: Annotated[
        list[str],
        typer.Argument(help="Backbones or presets to fetch ahead.", autocompletion=known_names),
    ],
) -> None:
    """Fetch backbones ahead of their use; prints the folders."""
    from tinyvl import hub, presets

    wanted = []
    for name in names:  # default: what captions, searches and trains where no model is named
        rows = [presets.SMALL[own] for own in ("itune", "lilt")] if name == "default" else []
        rows = [presets.PRESETS[name]] if name in presets.PRESETS else rows
        wanted += [part for row in rows for part in (row.language, row.vision)] or [name]
    for folder in hub.pull(dict.fromkeys(wanted)):
        print(folder)


@command(app, "push")
def push(
    run: Annotated[str, typer.Argument(help="A checkpoint folder.")],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME",
        help="Repository of the model hub; it is made if there is none.")],
    private: bool = option("Output", False, "A new repository is private."),
    message: str = option("Output", "", "Message of the commit.", shown="the method"),
    scores: list[str] = option("Data", ("runs", "scores"), "Folders with evaluations (tinyvl eval "
        "-o) for the card, by commas.", parse=commas, shown="runs,scores"),
) -> None:  # fmt: skip
    """Upload a checkpoint to the model hub; prints the hf://owner/name that loads it.

    Only config.json, model.safetensors and README.md, the model card, which is renewed: backbones
    and their licences, data, the command, metrics of evaluations. Paths become file names.
    """
    from tinyvl import hub_push

    places = [Path(place).expanduser() for place in scores]
    print(hub_push.push(run, repository, private=private, message=message, scores=places))
