"""`tinyvl index`, `tinyvl retrieve`, `tinyvl classify`: the commands of two aligned encoders."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from tinyvl import UserError, ranks
from tinyvl.cli_options import (
    PROMPTS,
    Lines,
    Place,
    Reader,
    batch_of,
    command,
    group,
    load_model,
    nothing_piped,
    piped,
    same,
)
from tinyvl.files import Unmarked, dump, local, quoted
from tinyvl.presets_options import Job, Run, option

app = group()
ANY_MODEL = option("Model", None, "Checkpoint folder, hf://owner/name, or default.",
    name="--model,-m", shown="what made the index")  # fmt: skip

RETRY = option("Data", False, "Try again the files that could not be read.")


def loader(place: Place) -> Callable[..., Any]:
    """Loads the model of a name, or of its sides those that are wanted."""
    return lambda name, sides=("text", "image"): load_model(name, place, "retrieve", sides=sides)


@command(app, "index")
def index(
    data: Annotated[
        str, typer.Argument(help="A folder, a data set, or - for paths on standard input.")
    ] = ".",
    *,
    out: Path | None = option("Output", None, "The index's folder.", name="--out,-o",
        shown=".tinyvl in the folder"),
    model: str | None = ANY_MODEL,
    format: str | None = same(Job, "format"),
    images: str | None = same(Job, "images"),
    batch: int = batch_of(),
    null: bool = same(Lines, "null", False),
    retry: bool = RETRY,
    export: str | None = option("Output", None, "Write the index that DATA has for another engine, "
        "to the file -o: faiss, or parquet (LanceDB, Qdrant, pgvector).",
        choices=("faiss", "parquet")),
    quiet: bool = same(Run, "quiet", False),
    place: Place,
) -> None:  # fmt: skip
    """Embed pictures, and their captions if they have any, to be searched: prints the index.

    Run again, it embeds what is new, takes over what was moved, and drops what is gone; killed, it
    goes on where it was. Files that cannot be read are named once.
    """
    if export is not None:
        if model or format or images or null or retry:
            idle = "--model, --format, --images, -0 and --retry"
            raise UserError(f"--export writes the index as it is: leave out {idle}.", 2)
        export_index(Path(data), out, export, quiet)
        return
    if out is None and not os.path.isdir(data):
        raise UserError("Name the index's folder with -o INDEX.", 2)
    from tinyvl import index_source, search_open

    out = out or Path(data) / search_open.HIDDEN
    source = index_source.Source(data, "")  # the first of several processes reads it
    if ranks.first():
        source = index_source.read_source(data, null, format, images, quiet)
    status, _ = search_open.bring_up_to_date(
        source, out, model, loader(place), batch=batch, workers=place.workers, retry=retry,
        quiet=quiet,
    )  # fmt: skip
    print(out)
    raise typer.Exit(status)


def export_index(folder: Path, out: Path | None, kind: str, quiet: bool) -> None:
    """Writes the vectors of an index, as it is, to a file; prints its name."""
    if out is None:
        raise UserError(f"Name the file with -o FILE: --export {kind} {folder} -o FILE.", 2)
    from tinyvl import index_export
    from tinyvl.progress import say

    count = ranks.told(lambda: index_export.export(folder, out, kind))
    say(f"{out}: {count:,} vectors", quiet)
    print(out)


@command(app, "retrieve")
def retrieve(
    folders: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FOLDER]", help="A folder to search: by its own index, which is "
            "made and kept up to date, or that of a folder around it. (default: this one)"),
    ] = None,
    *,
    query: list[str] | None = option("Data", None, "What to look for; repeatable; - or a pipe: a "
        "query a line on standard input.", name="--query,-q"),
    image: list[str] | None = option("Data", None, "A picture to look for; repeatable.",
        name="--image,-i"),
    plus: list[str] | None = option("Data", None, "Text or picture added to each query; "
        "repeatable."),
    minus: list[str] | None = option("Data", None, "Text or picture subtracted from each query; "
        "repeatable."),
    index: Path | None = option("Data", None, "An index made by tinyvl index -o."),
    k: int = option("Output", 10, "Results of each query; 0: all.", name="-k", min=0),
    threshold: float | None = option("Output", None, "Leave out results that score less (-1 to "
        "1)."),
    captions: bool = option("Data", False, "Search the index's captions, not its pictures."),
    update: bool = option("Data", True, "Search the index as it is, though its folder has changed.",
        name=" /--no-update", shown=""),
    retry: bool = RETRY,
    scores: bool = option("Output", False, "Print the score behind each result."),
    duplicates: bool = option("Output", False, "Show all of several equal files, not one."),
    as_json: bool = same(Lines, "as_json", False),
    null: bool = option("Output", False, "Only the results, a NUL after each: for xargs -0.",
        name="--null,-0"),
    quiet: bool = same(Run, "quiet", False),
    model: str | None = ANY_MODEL,
    place: Place,
) -> None:  # fmt: skip
    """Find pictures by words or by a picture: a path a line, best first.

    Where there are several queries, query<TAB>path.
    """
    folder, *others = folders or [None]
    if others:
        advice = f'words to look for are named by --query: --query "{others[0]}"'
        raise UserError(f"One folder is searched; {advice}.", 2)
    if index and folder:
        raise UserError("Name a folder or an --index, not both.", 2)
    if null and (as_json or scores):
        raise UserError(f"-0 and {'--json' if as_json else '--scores'} do not go together.", 2)
    if threshold is not None and not -1 <= threshold <= 1:
        raise UserError(f"--threshold is from -1 to 1, not {threshold:g}.", 2)
    texts, images = asked_for(query or [], image or [], folder)
    from tinyvl import search, search_open

    pictures = [search.Query(path, True) for path in images]
    adds, subtracts = [[search.term(text) for text in terms or []] for terms in (plus, minus)]
    named = [search.Query(text) for text in texts] + pictures + adds + subtracts
    status, found, loaded = search_open.opened(
        folder, index, model, loader(place), named, captions=captions, fresh=update,
        workers=place.workers, retry=retry, quiet=quiet,
    )  # fmt: skip
    several = "-" in texts or len(texts) + len(images) > 1
    for queries in search.groups(texts, pictures):
        for hits in search.answers(
            found, loaded, queries, k=k, threshold=threshold, captions=captions,
            duplicates=duplicates, shift=search.shift_of(loaded, adds, subtracts),
            show=search_open.shown(found, folder),
        ):  # fmt: skip
            if isinstance(hits, UserError):
                status = 1
                print(f"tinyvl: {hits}", file=sys.stderr)
                continue
            for hit in hits:
                line = line_of(hit, as_json, several, null)
                line += f"\t{hit.score:.4f}" if scores and not as_json else ""
                print(line, end="\0" if null else "\n")
        sys.stdout.flush()
    raise typer.Exit(status)


def asked_for(texts: list[str], images: list[str], folder: str | None) -> tuple[list, list]:
    """The texts and pictures to look for. UserError: there are none, or nothing to search."""
    if folder and not os.path.isdir(folder):
        advice = "an index elsewhere is named by --index"
        if not texts and not images:
            advice = f'words to look for are named by --query: --query "{folder}"'
        raise UserError(f"{folder}: not a folder; {advice}.", 2)
    if not texts and not images:
        if nothing_piped():
            raise UserError("Say what to look for: --query TEXT or --image FILE.", 2)
        texts = ["-"]
    if images and not texts and not any(map(os.path.exists, images)):
        raise UserError(f"{images[0]}: there is no such file.")
    if not all(text.strip() for text in texts):
        raise UserError("--query takes a text, not an empty one.", 2)
    return texts, images


def line_of(hit: Any, as_json: bool, several: bool, null: bool) -> str:
    """A result as it is printed: after its query where there are several; bare with ``null``."""
    if as_json:
        fields = {name: value for name, value in vars(hit).items() if value is not None}
        return dump(fields | {"score": round(hit.score, 6)})
    if null:
        return hit.path if hit.caption is None else hit.caption
    line = quoted(hit.path) if hit.caption is None else hit.caption
    return f"{quoted(hit.query)}\t{line}" if several else line


@command(app, "classify")
def classify(
    inputs: Annotated[list[str] | None, typer.Argument(metavar="FILE", help="Pictures, folders, "
        "globs, or - for paths on standard input (as a pipe is).")] = None,
    *,
    labels: str = option("Data", "", "Names between commas, or a file with one a line."),
    prompt: list[str] | None = PROMPTS,
    top: int = option("Output", 1, "Labels of each picture.", name="--top,-k", min=1),
    how: Reader,
) -> None:  # fmt: skip
    """Say which label fits a picture: path<TAB>label<TAB>probability (no path for one picture)."""
    inputs = piped(inputs)
    if not labels:
        raise UserError('Name the labels: --labels "cat,dog", or a file with one a line.', 2)
    from tinyvl import media
    from tinyvl.classes import class_embeddings, templates
    from tinyvl.progress import Told
    from tinyvl.search import classify, read_labels
    from tinyvl.write import absent, check_output, listed, open_output, write_rows

    names, prompts = read_labels(labels), templates(prompt)
    bare = len(inputs) == 1 and inputs[0] != "-" and Path(inputs[0]).is_file() and how.out is None
    others, text = media.Others("image", how.quiet), "{label}\t{probability:.4f}"
    paths = media.expand(inputs, Unmarked(sys.stdin), null=how.null, others=others)
    stream, done, told = None, set(), Told("pictures", None, how.out, how.quiet)
    if how.out is not None:
        check_output(how.out, how.resume)
    if "-" not in inputs:
        paths, told.total, there = listed(paths)
        if not there and told.total:
            raise typer.Exit(write_rows(absent(paths), None, text, as_json=how.as_json, bare=False))
    loaded = loader(how)(how.model)
    classes = class_embeddings(loaded.embed_texts, names, prompts)
    if how.out is not None:
        many = min(top, len(names))
        made_by = {"model": local(how.model), "labels": names, "prompts": prompts, "top": top}
        stream, done = open_output(
            how.out, how.resume, field="label", tabs=2, lines=many, made_by=made_by
        )
        paths = (path for path in paths if path not in done)
    results = classify(loaded, paths, names, classes, top=top, batch=how.batch, workers=how.workers)
    raise typer.Exit(write_rows(results, stream, text, as_json=how.as_json, bare=bare, told=told))
