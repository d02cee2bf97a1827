"""`tinyvl index`, `tinyvl retrieve`, `tinyvl classify`: the commands of two aligned encoders."""

import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from tinyvl import UserError
from tinyvl.cli_options import (
    Json,
    Model,
    Null,
    OutFile,
    Place,
    Prompts,
    ResumeFile,
    grouped,
    load_model,
)

AnyModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="Checkpoint folder, hf://owner/name, or default. (default: what made the index)",
    ),
]
HIDDEN = ".tinyvl"  # the index of a folder, in that folder
SIDES = ("text", "image")


def load_towers(name: str, place: Place, sides: Iterable[str] = SIDES) -> Any:
    return load_model(name, place, task="retrieve", sides=sides)


def loader(place: Place) -> Callable[..., Any]:
    """What `search` loads a model with."""
    return lambda name, *sides: load_towers(name, place, *sides)


@grouped
def index(
    *,
    data: Annotated[
        str, typer.Argument(help="A folder, a data set, or - for paths on standard input.")
    ] = ".",
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="The index's folder. (default: .tinyvl in the folder)"),
    ] = None,
    model: AnyModel = None,
    format: Annotated[str | None, typer.Option(help="Force the data set's format.")] = None,
    images: Annotated[str | None, typer.Option(help="Folder of the data set's pictures.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures embedded together.")] = 16,
    null: Null = False,
    place: Place,
) -> None:
    """Embed pictures, and their captions if they have any, to be searched: prints the index.

    Run again, it embeds what is new, takes over what was moved, and drops what is gone; killed,
    it goes on where it was.
    """
    if out is None:
        if not os.path.isdir(data):
            raise UserError("Name the index's folder with -o INDEX.", 2)
        out = Path(data) / HIDDEN
    from tinyvl.search import bring_up_to_date

    status, _ = bring_up_to_date(
        data, out, model, loader(place), batch=batch, workers=place.workers, null=null,
        format=format, images=images,
    )  # fmt: skip
    print(out)
    raise typer.Exit(status)


@grouped
def retrieve(
    *,
    folder: Annotated[
        str | None,
        typer.Argument(help="A folder to search; indexed first if need be. (default: this one)"),
    ] = None,
    query: Annotated[
        list[str] | None,
        typer.Option("--query", "-q", help="What to look for; repeatable; - reads lines on stdin."),
    ] = None,
    image: Annotated[
        list[str] | None, typer.Option("--image", "-i", help="A picture to look for; repeatable.")
    ] = None,
    plus: Annotated[
        list[str] | None, typer.Option(help="Text or picture added to each query; repeatable.")
    ] = None,
    minus: Annotated[
        list[str] | None,
        typer.Option(help="Text or picture subtracted from each query; repeatable."),
    ] = None,
    index: Annotated[Path | None, typer.Option(help="An index made by tinyvl index -o.")] = None,
    k: Annotated[int, typer.Option("-k", min=0, help="Results of each query; 0: all.")] = 10,
    threshold: Annotated[
        float | None, typer.Option(help="Leave out results that score less (-1 to 1).")
    ] = None,
    captions: Annotated[
        bool, typer.Option("--captions", help="Search the index's captions, not its pictures.")
    ] = False,
    as_json: Json = False,
    null: Annotated[
        bool, typer.Option("-0", "--null", help="Only the results, a NUL after each: for xargs -0.")
    ] = False,
    model: AnyModel = None,
    place: Place,
) -> None:
    """Find pictures by words or by a picture: a path a line, best first.

    Where there are several queries, query<TAB>path.
    """
    if index and folder:
        raise UserError("Name a folder or an --index, not both.", 2)
    if as_json and null:
        raise UserError("--json and -0 are two forms of output; choose one.", 2)
    texts, images = query or [], image or []
    if not texts and not images:
        if sys.stdin.isatty():
            raise UserError("Say what to look for: --query TEXT or --image FILE.", 2)
        texts = ["-"]
    if not all(text.strip() for text in texts):
        raise UserError("--query takes a text, not an empty one.", 2)
    if folder and not os.path.isdir(folder):
        raise UserError(f"{folder}: not a folder; an index elsewhere is named by --index.", 2)
    from tinyvl.search import Query, answers, groups, opened, shift_of, shown, term

    piped, pictures = "-" in texts, [Query(path, True) for path in images]
    adds, subtracts = [term(t) for t in plus or []], [term(t) for t in minus or []]
    named = [Query(text) for text in texts] + pictures + adds + subtracts
    status, found, loaded = opened(
        folder, index, model, loader(place), named, captions=captions, workers=place.workers
    )
    settings = {
        "k": k, "threshold": threshold, "captions": captions,
        "shift": shift_of(loaded, adds, subtracts), "show": shown(found, folder),
    }  # fmt: skip
    several = piped or len(texts) + len(images) > 1
    for group in groups(texts, pictures):
        for hits in answers(found, loaded, group, **settings):
            if isinstance(hits, UserError):
                status = 1
                print(f"tinyvl: {hits}", file=sys.stderr)
                continue
            for hit in hits:
                if as_json:
                    fields = {k: v for k, v in vars(hit).items() if v is not None}
                    fields["score"] = round(hit.score, 6)
                    line = json.dumps(fields, ensure_ascii=False)
                else:
                    line = hit.path if hit.caption is None else hit.caption
                    line = f"{hit.query}\t{line}" if several and not null else line
                print(line, end="\0" if null else "\n")
        sys.stdout.flush()
    raise typer.Exit(status)


@grouped
def classify(
    *,
    inputs: Annotated[
        list[str] | None,
        typer.Argument(help="Pictures, folders, globs, or - for paths on stdin (as a pipe is)."),
    ] = None,
    labels: Annotated[
        str, typer.Option(help="Names between commas, or a file with one a line.")
    ] = "",
    prompt: Prompts = None,
    top: Annotated[int, typer.Option("--top", "-k", min=1, help="Labels of each picture.")] = 1,
    model: Model = "default",
    batch: Annotated[int, typer.Option(min=1, help="Pictures embedded together.")] = 16,
    as_json: Json = False,
    out: OutFile = None,
    resume: ResumeFile = False,
    null: Null = False,
    place: Place,
) -> None:
    """Say which label fits a picture: path<TAB>label<TAB>probability (no path for one picture)."""
    if not inputs:
        if sys.stdin.isatty():
            raise UserError("Name pictures or folders, or pipe their paths in.", 2)
        inputs = ["-"]
    if not labels:
        raise UserError('Name the labels: --labels "cat,dog", or a file with one a line.', 2)
    if resume and out is None:
        raise UserError("--resume goes with -o FILE: it skips what that file already has.", 2)
    from tinyvl import media
    from tinyvl.classes import class_embeddings, templates
    from tinyvl.search import classify, read_labels
    from tinyvl.write import open_output, write_rows

    names, prompts = read_labels(labels), templates(prompt)
    one = len(inputs) == 1 and inputs[0] != "-" and Path(inputs[0]).is_file()
    paths = media.expand(inputs, sys.stdin, null=null)
    stream, done = sys.stdout, set()
    loaded = load_towers(model, place)
    classes = class_embeddings(loaded.embed_texts, names, prompts)
    if out is not None:
        lines = min(top, len(names))
        stream, done = open_output(out, resume, field="label", tabs=2, lines=lines)
        paths = (path for path in paths if path not in done)
    results = classify(loaded, paths, names, classes, top=top, batch=batch, workers=place.workers)
    text, bare = "{label}\t{probability:.4f}", one and out is None
    raise typer.Exit(write_rows(results, stream, text, as_json=as_json, bare=bare))
