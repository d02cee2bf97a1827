"""`tinyvl models`, `inspect`, `pull`, `push` and `convert`: models by name, and others' models."""

import json
import sys
from collections.abc import Iterator
from dataclasses import MISSING
from pathlib import Path
from typing import Annotated, Any

import typer

from tinyvl.cli_options import AS_JSON, command, group, known_names, same
from tinyvl.files import dump
from tinyvl.presets_options import METHODS, EPalm, commas, option, span

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
        whole = max(len(entry["name"]) for entry in entries)  # a folded name cannot be copied
        columns = [Column(n, overflow="fold") for n in entries[0]]
        columns[0].min_width = whole
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


convert = group("Turn a checkpoint of a paper's own code into a tinyvl model.")
app.add_typer(convert, name="convert")
FILE = typer.Argument(metavar="FILE", help="The authors' checkpoint: .pt, .pth or .safetensors.")
OUT = option("Output", MISSING, "Folder of the new model.", name="--out,-o")
UNLOCKED = "all: the {} tower was trained whole. Else it is compared with the named one."


@command(convert, "clipcap")
def convert_clipcap(
    file: Annotated[Path, FILE],
    out: Path = OUT,
    language: str | None = option("Model", None, "Its language model: a name or folder.",
        name="--lm", shown="GPT-2 of the file's width"),
    vision: str | None = option("Model", None, "Its CLIP in timm: a name or folder.",
        shown="ViT-B/32 for 512 numbers, RN50x4 for 640"),
    unit: bool | None = option("Model", None, "Trained with --normalize_prefix, or without.",
        name="--unit/--plain", shown="plain, but unit for a transformer over 640 numbers, as "
        "released"),
) -> None:  # fmt: skip
    """ClipCap with a frozen language model: an MLP or a transformer over CLIP's projection.

    A file whose GPT-2 was tuned is refused.
    """
    from tinyvl import convert

    convert.clipcap(file, out, language, vision, unit=unit)
    print(out)


@command(convert, "epalm")
def convert_epalm(
    file: Annotated[Path, FILE],
    out: Path = OUT,
    language: str | None = option("Model", None, "Its language model: a name or folder.",
        name="--lm", shown="OPT of the file's width"),
    vision: str | None = option("Model", None, "Its encoder: a name or folder.",
        shown="the paper's of the modality and width"),
    task: str = same(EPalm, "task", "caption"),
    modality: str = same(EPalm, "modality", "image", shown=None),
    extract: list[int] | None = option("Model", None, "Levels of the encoder, FIRST:END from 0.",
        parse=span, shown="as many of the last as the file has connections"),
    inject: list[int] | None = option("Model", None, "Layers of the decoder, FIRST:END from 0.",
        parse=span, shown="what the file's config says, or the last 12 but one"),
    frames: int | None = same(EPalm, "frames", help="Frames of a video.",
        shown="what the file's config says, or 8 or 16"),
) -> None:  # fmt: skip
    """eP-ALM: connections, soft prompt, adapters (checkpoint_best.pth).

    Where the authors' slot goes on behind the layers that it is injected into, it reads the text;
    tinyvl's reads itself alone, which a line on standard error says.
    """
    from tinyvl import convert

    convert.epalm(
        file, out, language, vision, task=task, modality=modality, extract=extract, inject=inject,
        frames=frames,
    )  # fmt: skip
    print(out)


@command(convert, "lilt")
def convert_lilt(
    file: Annotated[Path, FILE],
    out: Path = OUT,
    language: str = option("Model", MISSING, "Its text encoder: a name or folder.", name="--text"),
    vision: str = option("Model", MISSING, "Its timm encoder: a name or folder."),
    text_unlock: str | None = option("Model", None, UNLOCKED.format("text"), choices=("all",)),
    image_unlock: str | None = option("Model", None, UNLOCKED.format("image"), choices=("all",)),
) -> None:  # fmt: skip
    """LilT, LiT or CLIP of LilT's code (checkpoint_14.pth).

    The towers in the file have to be the named ones, but for adapters, LayerNorms and biases.
    """
    from tinyvl import convert

    unlock = {"text_unlock": text_unlock, "image_unlock": image_unlock}
    convert.lilt(file, out, language, vision, **unlock)
    print(out)
