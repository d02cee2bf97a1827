"""The command line: parse, call one function, print. Nothing heavy is imported at the top."""

import atexit
import gc
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from tinyvl import (
    UserError,
    __version__,
    cli_analyze,
    cli_ask,
    cli_data,
    cli_epalm,
    cli_eval,
    cli_features,
    cli_search,
    cli_train,
)
from tinyvl.cli_options import (
    Beams,
    Features,
    Frames,
    Json,
    Model,
    Null,
    OutFile,
    Place,
    ResumeFile,
    Search,
    checked,
    grouped,
    load_model,
)

app = typer.Typer(
    name="tinyvl",
    help="Frozen language models that see: caption, train and measure. Data goes to standard "
    "output, everything else to standard error.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cli_train.app, name="train")
app.add_typer(cli_analyze.app, name="analyze")
app.add_typer(cli_data.app, name="data")
app.add_typer(cli_eval.app, name="eval")
app.command("features")(cli_features.features)
app.command("ask")(cli_ask.ask)
cli_train.app.command("epalm")(cli_epalm.train_epalm)
cli_train.app.command("clipcap")(cli_epalm.train_clipcap)
for command in (cli_search.index, cli_search.retrieve, cli_search.classify):
    app.command()(command)


@app.callback(invoke_without_command=True)
def start(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
@grouped
def caption(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            help="Pictures, folders, globs, or - for paths on stdin (as a pipe is); videos or "
            "sounds for a model trained on them."
        ),
    ] = None,
    *,
    model: Model = "default",
    beams: Beams = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest caption, in tokens.")] = 40,
    search: Search,
    batch: Annotated[int, typer.Option(min=1, help="Pictures captioned together.")] = 16,
    as_json: Json = False,
    out: OutFile = None,
    resume: ResumeFile = False,
    null: Null = False,
    frames: Frames = None,
    features: Features = None,
    place: Place,
) -> None:
    """Caption pictures, videos or sounds: a line each, path<TAB>caption where there are several.

    With --features DIR pictures are read there, neither decoded nor encoded; without inputs, all
    that are there.
    """
    if not inputs and features is None:
        if sys.stdin.isatty():
            raise UserError("Name pictures or folders, or pipe their paths in.", 2)
        inputs = ["-"]
    if resume and out is None:
        raise UserError("--resume goes with -o FILE: it skips what that file already has.", 2)
    how = search.style(beams, max_tokens)
    from tinyvl import media, models, write
    from tinyvl.records import SUFFIXES

    inputs = inputs or []
    one = len(inputs) == 1 and inputs[0] != "-" and Path(inputs[0]).is_file()
    config = models.read_config(models.checkpoint_folder(model))
    suffixes = SUFFIXES[models.modality_of(config)]
    paths = media.expand(inputs, sys.stdin, null=null, suffixes=suffixes)
    stream, done, store = sys.stdout, set(), None
    if features is not None:
        from tinyvl.features import open_store

        store = open_store(features, config["vision"], models.reads(config))
        paths = paths if inputs else iter([entry.path for entry in store.entries])
    loaded = load_model(model, place)
    models.take_frames(loaded, frames)
    if store is not None:
        store.check(loaded)
    if out is not None:
        stream, done = write.open_output(out, resume)
        paths = (path for path in paths if path not in done)
    results = write.captions(
        loaded, paths, style=how, batch=batch, workers=place.workers, store=store
    )
    status = write.write(results, stream, as_json=as_json, bare=one and out is None)
    raise typer.Exit(status)


@app.command("models")
def list_models(
    as_json: Json = False,
) -> None:
    """List presets and backbones: parameters, licence, source, whether they are here."""
    from tinyvl import hub, presets

    rows = [
        {
            "name": b.name, "role": b.role, "parameters": b.parameters, "licence": b.licence,
            "source": b.source, "here": hub.available(b.name),
        }
        for b in hub.BACKBONES.values()
    ]  # fmt: skip
    presets = [
        {"name": name, "method": p.method, "language": p.language, "vision": p.vision, "row": p.row}
        for name, p in presets.PRESETS.items()
    ]
    if as_json:
        for row in presets + rows:
            print(json.dumps(row, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for title, entries in (("Presets", presets), ("Backbones", rows)):
        table = Table(title=title, title_justify="left")
        for column in entries[0]:
            table.add_column(column, overflow="fold")
        for entry in entries:
            table.add_row(*(cell(value) for value in entry.values()))
        console.print(table)


def cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value / 1e6:,.1f} M" if isinstance(value, int) else str(value)


@app.command()
def inspect(
    name: Annotated[str, typer.Argument(help="A preset, a checkpoint folder, or default.")],
    as_json: Annotated[bool, typer.Option("--json", help="JSON.")] = False,
) -> None:
    """Count a model's parameters; needs neither weights nor network."""
    from tinyvl import models

    found = models.inspect(name)
    if as_json:
        print(json.dumps(found))
        return
    for key, value in found.items():
        print(f"{key}\t{value:,}" if isinstance(value, int) else f"{key}\t{value}")


@app.command()
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


@app.command()
def samples(
    folder: Annotated[Path, typer.Argument(help="Where to write them.")] = Path("samples"),
) -> None:
    """Write a few public-domain photos to try things on; prints their paths."""
    from tinyvl import hub

    for path in hub.samples(folder):
        print(path)


@app.command("draw")
def draw_set(
    folder: Annotated[Path, typer.Argument(help="Where to draw.")],
    train: Annotated[int, typer.Option(min=1, help="Pictures to train on.")] = 2000,
    held_out: Annotated[int, typer.Option(min=1, help="Pictures held out.")] = 300,
    seed: Annotated[int, typer.Option(help="Another seed is another set.")] = 0,
    modality: Annotated[
        str, typer.Option(help="image; video: shapes that move; audio: tones.")
    ] = "image",
) -> None:
    """Draw a small licence-free set with captions and questions: shapes (in two languages), or
    moving shapes, or tones."""
    from tinyvl import draw, draw_av

    checked(modality)
    make = {"image": draw.draw_images, "video": draw_av.draw_videos, "audio": draw_av.draw_sounds}
    make[modality](folder, train=train, held_out=held_out, seed=seed)
    print(folder / "drawn.jsonl")


def fail(message: str, status: int) -> NoReturn:
    print(f"tinyvl: {message}", file=sys.stderr)
    sys.exit(status)


def main() -> None:
    """The console script: errors a user can mend become one sentence and an exit status."""
    atexit.register(gc.freeze)  # else a last search of torch's modules for garbage takes a second
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # quiet beside worker processes
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for stream in (sys.stdin, sys.stdout):  # file names that are not UTF-8 pass through
        stream.reconfigure(errors="surrogateescape")
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
