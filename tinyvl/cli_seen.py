"""`tinyvl page`: results where people look."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from tinyvl import UserError
from tinyvl.cli_options import Lines, command, group, piped, same
from tinyvl.presets_options import Run, option

app = group()
app.callback()(lambda: None)  # else a group of one command is that command


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
