"""`tinyvl ask`: one question about pictures."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from tinyvl import UserError
from tinyvl.cli_options import (
    Features,
    Frames,
    Model,
    Null,
    OutFile,
    Place,
    ResumeFile,
    Search,
    grouped,
    load_model,
)


@grouped
def ask(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Pictures, videos or sounds (what the model reads), folders, globs, or - for "
            'paths on stdin, and last the "question".',
            metavar="FILE... QUESTION",
        ),
    ],
    *,
    model: Model = "default",
    beams: Annotated[
        int | None, typer.Option(min=1, help="Beams of the search; 1 is greedy. (default: 3)")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 10,
    search: Search,
    batch: Annotated[int, typer.Option(min=1, help="Pictures asked about together.")] = 16,
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON Lines: path, question, answer, score.")
    ] = False,
    out: OutFile = None,
    resume: ResumeFile = False,
    null: Null = False,
    frames: Frames = None,
    features: Features = None,
    place: Place,
) -> None:
    """Ask a question about pictures, videos or sounds: a line each, path<TAB>answer for several.

    The model is one of `tinyvl train epalm --task vqa`. Without files paths come from a pipe.
    """
    *files, question = inputs
    question = " ".join(question.split())
    if not files:
        if Path(question).exists():
            raise UserError(f'Put a question behind {question}: tinyvl ask FILE "question".', 2)
        if sys.stdin.isatty():
            raise UserError("Name pictures before the question, or pipe their paths in.", 2)
        files = ["-"]
    if not question:
        raise UserError("The question, which comes last, is empty.", 2)
    if resume and out is None:
        raise UserError("--resume goes with -o FILE: it skips what that file already has.", 2)
    how = search.style(beams, max_tokens, usual=3)
    from itertools import repeat

    from tinyvl import media, models, write
    from tinyvl.records import SUFFIXES

    one = len(files) == 1 and files[0] != "-" and Path(files[0]).is_file()
    config = models.read_config(models.checkpoint_folder(model, "vqa"))
    suffixes = SUFFIXES[models.modality_of(config)]
    paths = media.expand(files, sys.stdin, null=null, suffixes=suffixes)
    stream, done, store = sys.stdout, set(), None
    if features is not None:
        from tinyvl.features import open_store

        store = open_store(features, config["vision"], models.reads(config))
    loaded = load_model(model, place, "vqa")
    models.take_frames(loaded, frames)
    if store is not None:
        store.check(loaded)
    if out is not None:
        stream, done = write.open_output(out, resume, field="answer", question=question)
        paths = (path for path in paths if path not in done)
    results = write.captions(
        loaded, paths, style=how, batch=batch, workers=place.workers, questions=repeat(question),
        store=store,
    )  # fmt: skip
    bare = one and out is None
    status = write.write(results, stream, as_json=as_json, bare=bare, question=question)
    raise typer.Exit(status)
