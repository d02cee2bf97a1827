"""The command line: parse, call one function, print. Nothing heavy is imported at the top."""

import atexit
import gc
import json
import os
import sys
from functools import cache
from importlib import import_module
from itertools import repeat
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
import typer.core
import typer.main

from tinyvl import UserError, __version__
from tinyvl.cli_options import (
    ANSWER,
    Lines,
    Search,
    Teller,
    command,
    group,
    load_model,
    piped,
    same,
)
from tinyvl.files import ESCAPED, Unmarked, dump
from tinyvl.presets_options import EPalm, commas, option

# In the order a person meets them. A command that stands in another module is imported when it is
# called, or shown by --help.
COMMANDS = {
    "caption": "cli", "ask": "cli", "retrieve": "cli_search", "classify": "cli_search",
    "page": "cli_seen", "explain": "cli_seen", "index": "cli_search", "features": "cli_data",
    "train": "cli_train", "eval": "cli_eval", "runs": "cli_seen", "data": "cli_data",
    "models": "cli", "inspect": "cli", "analyze": "cli", "samples": "cli",
    "pull": "cli", "draw": "cli",
}  # fmt: skip


class Commands(typer.core.TyperGroup):
    """All commands: those of this module, and those that are imported."""

    @property
    def commands(self) -> dict[str, Any]:
        return {name: self.get_command(None, name) for name in COMMANDS}

    @commands.setter
    def commands(self, own: dict[str, Any]) -> None:
        self.own = own

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        module = COMMANDS.get(cmd_name, "cli")
        own = self.own if module == "cli" else imported(module)
        return own.get(cmd_name)


@cache
def imported(module: str) -> dict[str, Any]:
    return typer.main.get_command(import_module(f"tinyvl.{module}").app).commands


app = typer.Typer(
    name="tinyvl",
    cls=Commands,
    help="Frozen language models that see: caption, train and measure. Data goes to standard "
    "output, everything else to standard error.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
JSON = option("Output", False, "JSON instead of text.", name="--json")


@app.callback(invoke_without_command=True)
def start(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@command(app, "caption")
def caption(
    inputs: Annotated[list[str] | None, typer.Argument(metavar="FILE", help="Pictures, folders, "
        "globs, or - for paths on standard input (as a pipe is); videos or sounds for a model "
        "trained on them.")] = None,
    *,
    search: Search,
    how: Teller,
) -> None:  # fmt: skip
    """Caption pictures, videos or sounds: a line each, path<TAB>caption where there are several.

    With --features DIR pictures are read there, neither decoded nor encoded; without inputs, all
    that are there.
    """
    texts((inputs or []) if how.features else piped(inputs), None, search, how)


@command(app, "ask")
def ask(
    inputs: Annotated[list[str], typer.Argument(metavar="FILE... QUESTION", help="Pictures, videos "
        "or sounds (what the model reads), folders, globs, or - for paths on standard input, and "
        'last the "question".')],
    *,
    choices: list[str] | None = option("Decoding", None, "Answer with the likeliest of these, by "
        'commas: "cat,dog,bird".', parse=commas),
    search: Search = ANSWER,
    how: Teller,
) -> None:  # fmt: skip
    """Ask a question about pictures, videos or sounds: a line each, path<TAB>answer for several.

    --model names one of `tinyvl train epalm --task vqa`. Without files paths come from a pipe.
    """
    *files, question = inputs
    question = " ".join(question.split())
    if not files and Path(question).exists():
        raise UserError(f'Put a question behind {question}: tinyvl ask FILE "question".', 2)
    files = piped(files, "pictures before the question")
    if not question:
        raise UserError("The question, which comes last, is empty.", 2)
    if choices is not None:
        choices = list(dict.fromkeys(" ".join(choice.split()) for choice in choices))
        if len(choices) < 2 or "" in choices:
            raise UserError('--choices takes two answers or more: --choices "cat,dog".', 2)
        if search.given:
            idle = next(iter(search.given)).replace("_", "-")
            raise UserError(
                f"--{idle} is for answers in the model's words: leave it or --choices out.", 2
            )
    texts(files, question, search, how, choices)


def texts(
    files: list[str], question: str | None, search: Search, how: Teller,
    choices: list[str] | None = None,
) -> NoReturn:  # fmt: skip
    """Writes a caption of each file, or the answer to a question, and leaves with the status."""
    style = search.style()
    from tinyvl import media, models, write

    task, field = ("caption", "caption") if question is None else ("vqa", "answer")
    bare = len(files) == 1 and files[0] != "-" and Path(files[0]).is_file() and how.out is None
    checkpoint = models.open_checkpoint(how.model, task)
    suffixes = media.SUFFIXES[checkpoint.modality]
    paths = media.expand(files, Unmarked(sys.stdin), null=how.null, suffixes=suffixes)
    stream, done, store = sys.stdout, set(), None
    if how.features is not None:
        from tinyvl.features import open_store

        store = open_store(how.features, checkpoint.image, checkpoint.reads)
        paths = paths if files else iter([entry.path for entry in store.entries])
    loaded = load_model(checkpoint, how, task)
    models.take_frames(loaded, how.frames)
    if store is not None:
        store.check(loaded)
    if how.out is not None:
        stream, done = write.open_output(
            how.out, how.resume, field=field, question=question, choices=choices
        )
        paths = (path for path in paths if path not in done)
    results = write.captions(
        loaded, paths, style=None if choices else style, batch=how.batch, workers=how.workers,
        questions=None if question is None else repeat(question),
        choices=repeat(choices) if choices else None, store=store,
    )  # fmt: skip
    raise typer.Exit(
        write.write(results, stream, as_json=how.as_json, bare=bare, question=question)
    )


@command(app, "models")
def list_models(as_json: bool = JSON) -> None:
    """List presets and backbones: parameters, licence, source, whether they are here."""
    from tinyvl import hub, presets

    backbones = [
        {
            "name": b.name, "role": b.role, "parameters": b.parameters, "licence": b.licence,
            "source": b.source, "here": hub.available(b.name),
        }
        for b in hub.BACKBONES.values()
    ]  # fmt: skip
    rows = [
        {"name": name, "method": p.method, "language": p.language, "vision": p.vision, "row": p.row}
        for name, p in presets.PRESETS.items()
    ]
    if as_json:
        for row in rows + backbones:
            print(dump(row))
        return
    from rich.console import Console
    from rich.table import Column, Table

    console = Console(markup=False)
    for title, entries in (("Presets", rows), ("Backbones", backbones)):
        columns = (Column(name, overflow="fold") for name in entries[0])
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
    name: Annotated[str, typer.Argument(help="A preset, a checkpoint folder, or default.")],
    as_json: bool = JSON,
    task: str = option("Model", "caption", "Which default: caption, vqa or retrieve.",
        choices=("caption", "vqa", "retrieve")),
) -> None:  # fmt: skip
    """Count a model's parameters; needs neither weights nor network."""
    from tinyvl import models

    found = models.inspect(name, task)
    if as_json:
        print(json.dumps(found))
        return
    for key, value in found.items():
        print(f"{key}\t{value:,}" if isinstance(value, int) else f"{key}\t{value}")


analyze = group("Look into what training changed.")
app.add_typer(analyze, name="analyze")


analyze.callback()(lambda: None)  # else a group of one command is that command


@command(analyze, "layernorm")
def layernorm(
    model: Annotated[str, typer.Argument(help="A LilT checkpoint folder or hf://owner/name.")],
    out: Path | None = same(Lines, "out"),
    png: Path | None = option("Output", None, "Draw the figure: needs the extra plot."),
    as_json: bool = JSON,
) -> None:
    """LilT's Figure 4: how far each LayerNorm moved from the pretrained one, by depth.

    A row each: tower, layer, norm (1 or 2 in a layer), parameter (scale or bias), L1 norm of the
    change. Pearson's r of depth and change goes to standard error.
    """
    from tinyvl import files, plots

    rows = plots.layernorm_shifts(model)
    r = plots.correlations(rows)
    if png is not None:
        plots.plot(rows, png)
    text = plots.as_csv(rows)
    if as_json:
        text = json.dumps({"model": model, "pearson": r, "shifts": rows}) + "\n"
    if out is not None:
        files.write_text(out, text)
    else:
        sys.stdout.write(text)
    for tower, found in r.items():
        for parameter, value in found.items():
            shown = "undefined" if value is None else f"{value:.3f}"
            print(f"{tower} {parameter}: r = {shown}", file=sys.stderr)


@command(app, "samples")
def samples(
    folder: Annotated[Path, typer.Argument(help="Where to write them.")] = Path("samples"),
) -> None:
    """Write eight photos without copyright to try things on; prints their paths.

    What each shows, whose it is and its licence go to standard error.
    """
    from tinyvl import hub_wheels

    for path in hub_wheels.samples(folder):
        print(path)


@command(app, "pull")
def pull(
    names: Annotated[list[str], typer.Argument(help="Backbones or presets to fetch ahead.")],
) -> None:
    """Fetch backbones ahead of their use; prints the folders."""
    from tinyvl import hub, presets

    wanted = []
    for name in names:
        rows = [presets.PRESETS[name]] if name in presets.PRESETS else []
        rows = list(presets.SMALL.values()) if name == "default" else rows
        wanted += [part for row in rows for part in (row.language, row.vision)] or [name]
    for folder in hub.pull(wanted):
        print(folder)


@command(app, "draw")
def draw_set(
    folder: Annotated[Path, typer.Argument(help="Where to draw.")],
    train: int = option("Data", 2000, "Pictures to train on.", min=1),
    held_out: int = option("Data", 300, "Pictures held out.", min=1),
    seed: int = option("Data", 0, "Another seed is another set."),
    modality: str = same(
        EPalm, "modality", "image", help="image; video: shapes that move; audio: tones.", shown=None
    ),
) -> None:
    """Draw a small licence-free set with captions and questions: shapes, moving shapes or tones."""
    from tinyvl.draw_av import DRAW

    DRAW[modality](folder, train=train, held_out=held_out, seed=seed)
    print(folder / "drawn.jsonl")


def fail(message: str, status: int) -> NoReturn:
    print(f"tinyvl: {message}", file=sys.stderr)
    sys.exit(status)


def main() -> None:
    """The console script: errors a user can mend become one sentence and an exit status."""
    atexit.register(gc.freeze)  # else a last search of torch's modules for garbage takes a second
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # quiet beside worker processes
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # As the files that it writes, output is in UTF-8; a terminal may have another encoding.
    encoding = None if sys.stdout.isatty() else "utf-8"
    sys.stdout.reconfigure(encoding=encoding, errors=ESCAPED)
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        app()
    except UserError as error:
        if debug:
            raise
        fail(str(error), error.status)
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except BrokenPipeError:  # the reader of our output has gone: nothing is left to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
