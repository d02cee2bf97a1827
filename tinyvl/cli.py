"""The command line: parse, call one function, print. Nothing heavy is imported at the top."""

import atexit
import gc
import json
import os
import signal
import sys
import time
from functools import cache, partial
from importlib import import_module
from itertools import repeat
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
import typer.core
import typer.main

from tinyvl import UserError, __version__, ranks
from tinyvl.cli_options import (
    ANSWER,
    AS_JSON,
    RERANK,
    Lines,
    Search,
    Teller,
    command,
    group,
    load_model,
    piped,
    same,
)
from tinyvl.files import ESCAPED, Unmarked, cache_name, local
from tinyvl.presets_options import EPalm, commas, option

# In the order a person meets them. A command that stands in another module is imported when it is
# called, or shown by --help.
COMMANDS = {
    "caption": "cli", "ask": "cli", "retrieve": "cli_search", "classify": "cli_search",
    "page": "cli_seen", "explain": "cli_seen", "index": "cli_search", "features": "cli_data",
    "train": "cli_train", "eval": "cli_eval", "runs": "cli_seen", "data": "cli_data",
    "models": "cli_models", "inspect": "cli_models", "analyze": "cli", "samples": "cli",
    "pull": "cli_models", "push": "cli_models",
    "convert": "cli_models", "draw": "cli",
}  # fmt: skip
SHARED = ("caption", "ask", "index", "features", "train", "eval")  # by the processes of torchrun


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
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def start(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version, torch's, the device, the cache.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    if version:
        import torch

        from tinyvl.device import choose_device, choose_precision, precision_name

        device = choose_device()
        print(f"tinyvl {__version__}")
        print(f"torch {torch.__version__}")
        print(f"device {device} ({precision_name(choose_precision(None, device))})")
        print(f"cache {cache_name()}")
        raise typer.Exit


@command(app, "caption")
def caption(
    inputs: Annotated[list[str] | None, typer.Argument(metavar="FILE", help="Pictures, folders, "
        "globs, or - for paths on standard input (as a pipe is); videos or sounds for a model "
        "trained on them.")] = None,
    *,
    search: Search,
    rerank: str | None = RERANK,
    how: Teller,
) -> None:  # fmt: skip
    """Caption pictures, videos or sounds: a line each, path<TAB>caption where there are several.

    With --features DIR pictures are read there, neither decoded nor encoded; without inputs, all
    that are there.
    """
    texts((inputs or []) if how.features else piped(inputs), None, search, how, rerank=rerank)


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
    choices: list[str] | None = None, rerank: str | None = None,
) -> NoReturn:  # fmt: skip
    """Writes a caption of each file, or the answer to a question, and leaves with the status."""
    style = search.style()
    from tinyvl import media, models, write
    from tinyvl.progress import Told
    from tinyvl.rerank import reranker

    task, field = ("caption", "caption") if question is None else ("vqa", "answer")
    bare = len(files) == 1 and files[0] != "-" and Path(files[0]).is_file() and how.out is None
    checkpoint = models.open_checkpoint(how.model, task)
    if question is None:
        stored = how.features is not None
        style.rerank = reranker(checkpoint, rerank, style, stored=stored)
    others = media.Others(checkpoint.modality, how.quiet)
    paths = media.expand(files, Unmarked(sys.stdin), null=how.null, others=others)
    stream, done, store = None, set(), None
    told = Told({"caption": "captions", "vqa": "answers"}[task], None, how.out, how.quiet)
    if how.out is not None:
        write.check_output(how.out, how.resume)
    if how.features is not None:
        from tinyvl.features import open_store

        store = open_store(how.features, checkpoint.image, checkpoint.reads)
        paths = paths if files else iter([entry.path for entry in store.entries])
    if "-" not in files:
        paths, told.total, there = write.listed(paths)
        if not there and told.total and store is None:
            none = write.absent(paths)
            raise typer.Exit(
                write.write(none, None, as_json=how.as_json, bare=False, question=question)
            )
    loaded = load_model(checkpoint, how, task, rerank=style.rerank)
    models.take_frames(loaded, how.frames)
    if store is not None:
        store.check(loaded)
    if how.out is not None and ranks.first():
        made_by = dict(vars(style))
        if style.rerank is None:  # of answers
            del made_by["rerank"]
        stream, done = write.open_output(
            how.out, how.resume, field=field, question=question, choices=choices,
            made_by={"model": local(how.model)} | ({} if choices else made_by),
        )  # fmt: skip
        paths = (path for path in paths if path not in done)
    work = partial(
        write.captions, loaded, style=None if choices else style, batch=how.batch,
        workers=how.workers, questions=None if question is None else repeat(question),
        choices=repeat(choices) if choices else None, store=store,
    )  # fmt: skip
    results = ranks.shared(work, paths, how.batch)
    raise typer.Exit(
        write.write(results, stream, as_json=how.as_json, bare=bare, question=question, told=told)
    )


analyze = group("Look into what training changed.")
app.add_typer(analyze, name="analyze")


analyze.callback()(lambda: None)  # else a group of one command is that command


@command(analyze, "layernorm")
def layernorm(
    model: Annotated[str, typer.Argument(help="A LilT checkpoint folder or hf://owner/name.")],
    out: Path | None = same(Lines, "out"),
    png: Path | None = option("Output", None, "Draw the figure: needs the extra plot."),
    as_json: bool = AS_JSON,
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
    if ranks.speaks():
        print(f"tinyvl: {message}", file=ranks.stderr())
    if not ranks.first():
        time.sleep(1)  # torchrun stops all when one ends: the first may be tidying up
    sys.exit(status)


def main() -> None:
    """The console script: errors a user can mend become one sentence and an exit status."""
    atexit.register(gc.freeze)  # else a last search of torch's modules for garbage takes a second
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # quiet beside worker processes
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if "OMP_WAIT_POLICY" not in os.environ:
        # Torch's threads sleep while they wait: beside other work, spinning took most of the time.
        # But to sleep at once costs a CNN of many small layers a fourth of its speed.
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # of GNU's OpenMP: some 50 microseconds
    # As the files that it writes, output is in UTF-8; a terminal may have another encoding.
    encoding = None if sys.stdout.isatty() else "utf-8"
    sys.stdout.reconfigure(encoding=encoding, errors=ESCAPED)
    signal.signal(signal.SIGTERM, stop)
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        try:
            joined()
            app(prog_name="tinyvl")
        except SystemExit:
            ranks.end()
            raise
        finally:
            sys.stdout.flush()  # while an error can be told
    except UserError as error:
        if debug:
            raise
        drop_output()
        fail(str(error), error.status)
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except BrokenPipeError:  # the reader of our output has gone: nothing is left to say
        ranks.speaks()
        drop_output()
        sys.exit(1)
    except OSError as error:  # a full disk, a folder that has gone, a file that must not be read
        if debug:
            raise
        drop_output()
        fail(f"{error.filename or 'the output'}: {error.strerror or error}", 1)
    except Exception as error:
        if ranks.lost(error):  # it has said why, or was killed
            fail("another process of this command has ended; torchrun's report says how", 1)
        sys.stderr = ranks.stderr()
        raise


def joined() -> None:
    """Several processes of torchrun work together. UserError: not at this command."""
    ranks.start()
    named = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    if ranks.size() > 1 and named not in SHARED:
        raise UserError(f"torchrun is for tinyvl {', '.join(SHARED)}; leave it out here.", 2)


def drop_output() -> None:
    """What waits to be printed is given up, or Python would try once more at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def stop(number: int, frame: Any) -> NoReturn:
    """SIGTERM ends a command as Control-C does: what can go on is told, scratch files go."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
