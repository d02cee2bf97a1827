"""`tinyvl page`, `tinyvl explain`, `tinyvl runs`: results where people look."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from tinyvl import UserError
from tinyvl.cli_options import MODEL, RERANK, Lines, Place, command, group, load_model, piped, same
from tinyvl.files import Unmarked, dump, quoted
from tinyvl.presets_options import Run, option

app = group()


@command(app, "page")
def page(
    results: Annotated[list[str] | None, typer.Argument(help="JSON Lines of any command (--json), "
        "folders of tinyvl eval -o, or - for standard input (as a pipe is).")] = None,
    *,
    data: str | None = option("Data", None, "Data set with references: each caption or answer gets "
        "its metric, the worst stand first."),
    compare: bool = option("Output", False, "Two results side by side, those that differ first."),
    title: str | None = option("Output", None, "Heading of the page."),
    out: Path | None = same(Lines, "out"),
    show: bool = option("Output", False, "Open it in a browser.", name="--open"),
    quiet: bool = same(Run, "quiet", False),
) -> None:  # fmt: skip
    """Make one HTML file of results: pictures with captions, answers, scores; videos and sounds.

    tinyvl retrieve photos --query "a dog" --json | tinyvl page - -o dogs.html

    Nothing else is needed to look at it, and it fetches nothing. Filter with /, sort, go about with
    the arrow keys.
    """
    names = piped(results, "files of JSON Lines")
    if compare and len(names) != 2:
        raise UserError("--compare takes two results: tinyvl page --compare A B -o page.html.", 2)
    if out is None and show:
        import tempfile

        out = Path(tempfile.mkdtemp(prefix="tinyvl-")) / "page.html"
    if out is None and sys.stdout.isatty():
        raise UserError("Name the page's file with -o page.html, or --open it.", 2)
    from tinyvl import files
    from tinyvl.page import make

    text = make(names, compare=compare, data=data, out=out, title=title, quiet=quiet)
    if out is None:
        sys.stdout.write(text)
        return
    files.write_text(out, text)
    print(out)
    if show:
        import webbrowser

        webbrowser.open(out.absolute().as_uri())


@command(app, "explain")
def explain(
    inputs: Annotated[list[str] | None, typer.Argument(metavar="FILE", help="Pictures, folders, "
        "globs, or - for paths on standard input (as a pipe is).")] = None,
    *,
    text: str | None = option("Data", None, "Show which regions fit these words (LilT)."),
    question: str | None = option("Data", None, "Explain the answer to this question."),
    layer: str | None = option("Output", None, "Of I-Tuning's modules: last, mean over all, or a "
        "layer from 1.", shown="one that a tenth of them follow, 27 of 30"),
    sheet: Path | None = option("Output", None, "Draw to this PNG: a picture, then a tile a word.",
        name="--out,-o"),
    as_json: bool = same(Lines, "as_json", False),
    null: bool = same(Lines, "null", False),
    model: str = MODEL,
    rerank: str | None = RERANK,
    place: Place,
) -> None:  # fmt: skip
    """Show what each word of a caption looked at.

    I-Tuning: a heat map of its attention over the picture. eP-ALM: how much it leaned on each level
    of the encoder and on the prompt. With --text, LilT: which regions fit the words. Without -o or
    --json a line a word: word<TAB>where, after the path where there are several pictures.

    tinyvl explain photo.jpg --json | tinyvl page - -o maps.html shows the maps under the mouse.
    """
    names = piped(inputs)
    if text is not None and question is not None:
        raise UserError("--text and --question are for different models; choose one.", 2)
    from tinyvl import explain, media, models
    from tinyvl.media_workers import decode_images

    task = "retrieve" if text is not None else "vqa" if question is not None else "caption"
    checkpoint = models.open_checkpoint(model, task)
    paths = list(media.expand(names, Unmarked(sys.stdin), null=null))
    loaded = load_model(checkpoint, place, task, rerank=rerank)
    encoder, status, lines = loaded.encoder, 0, []
    pictures = decode_images(paths, encoder.transform(), target=encoder.size, workers=place.workers)
    for path, picture in pictures:
        try:
            if isinstance(picture, UserError):
                raise picture
            if text is not None:
                line = explain.matched(loaded, path, picture, text)
            else:
                line = explain.explain(loaded, path, picture, layer=layer, question=question)
        except UserError as error:
            if error.status == 2:
                raise
            print(f"tinyvl: {error}", file=sys.stderr)
            line, status = {"path": path, "error": str(error)}, 1
        if as_json:
            print(dump(line), flush=True)
        elif sheet is None:
            for word in line.get("words", ()):
                start = f"{quoted(path)}\t" if len(paths) > 1 else ""
                print(f"{start}{word['word']}\t{word['note']}", flush=True)
        lines.append(line)
    if sheet is not None and (drawn := [line for line in lines if "words" in line]):
        from tinyvl.files import replace_file

        image = explain.sheet(drawn)
        replace_file(sheet, lambda part: image.save(part, "PNG"))
        if not as_json:
            print(sheet)
    raise typer.Exit(status)


@command(app, "runs")
def show_runs(
    folders: Annotated[list[Path] | None, typer.Argument(metavar="DIR", help="Runs and their "
        "evaluations (tinyvl eval -o), or folders of these. (default: runs)")] = None,
    *,
    png: Path | None = option("Output", None, "Draw the curves: needs the extra plot."),
    page: Path | None = option("Output", None, "Table and curves as one HTML file."),
    follow: bool = option("Output", False, "Show them as they train, until Control-C."),
    as_json: bool = same(Lines, "as_json", False),
) -> None:  # fmt: skip
    """List and compare training runs: data, losses, speed, metrics of their evaluations.

    A table on a terminal, elsewhere tab-separated. Loss is the last step's, val_loss the best.
    """
    from tinyvl import files, runs

    found = runs.find(folders or [Path("runs")])
    if png is not None or page is not None:
        from tinyvl import plots

        if png is not None:
            plots.curves(found, png)
        if page is not None:
            files.write_text(page, runs.page(found))
    if as_json:
        for run in found:
            print(dump(run.row()))
    elif not sys.stdout.isatty():
        if follow:
            runs.follow(found, lambda seen: print(*runs.as_lines(seen), sep="\n", flush=True))
        else:
            print(*runs.as_lines(found), sep="\n")
    else:
        from rich.console import Console
        from rich.live import Live

        with Live(runs.as_table(found), console=Console(markup=False)) as live:
            if follow:
                runs.follow(found, lambda seen: live.update(runs.as_table(seen), refresh=True))
