"""`tinyvl eval TASK [MODEL] DATA`: a model over a data set, one report on standard output."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinyvl import UserError
from tinyvl.cli_options import (
    Beams,
    Features,
    Frames,
    Place,
    Prompts,
    Search,
    grouped,
)

if TYPE_CHECKING:
    from tinyvl import evaluate

app = typer.Typer(
    no_args_is_help=True,
    help="Run a model over a data set and score it. A table on a terminal; with --json, and where "
    "standard output is no terminal, one JSON object {task, model, data, metrics, ...}. Metrics "
    "are fractions; CIDEr's and SPIDEr's 1.0 is the papers' 100.",
)

ModelData = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[MODEL] DATA",
        show_default=False,
        help="A checkpoint folder, hf://owner/name or default; then the data: what `tinyvl train` "
        "reads. One argument is the data.",
    ),
]
Lang = Annotated[str, typer.Option(help="Language of the texts, where records say.")]
Batch = Annotated[int, typer.Option(min=1, help="Pictures in the model at once.")]
Out = Annotated[
    Path | None,
    typer.Option("-o", "--out", help="Folder to keep predictions.jsonl and report.json in."),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="With -o: keep the predictions that are there.")
]
Predictions = Annotated[
    list[Path] | None,
    typer.Option(
        help="Score these predictions instead of a model's: JSON Lines, a results file, or a "
        "folder of -o. Given several times (seeds): mean and deviation."
    ),
]
Kept = Annotated[
    list[Path] | None,
    typer.Option(
        "--predictions",
        help="A folder of -o, scored again. Several times (seeds): mean and deviation.",
    ),
]
Compare = Annotated[
    tuple[Path, Path] | None,
    typer.Option(
        metavar="A B",
        help="Score two sets of predictions: B, and B less A with 95 % intervals (bootstrap).",
    ),
]
AllowMissing = Annotated[
    bool, typer.Option("--allow-missing", help="Score the records that have a prediction.")
]
Shuffle = Annotated[
    bool,
    typer.Option("--shuffle-images", help="Control: each picture's place goes to another one."),
]


@dataclass
class Part:
    """Which records of the data are evaluated."""

    split: Annotated[
        str | None,
        typer.Option(help="Part of the data. Without: test if there is one, val, or all."),
    ] = None
    limit: Annotated[
        int | None, typer.Option(min=1, help="Evaluate this many items, the same each time.")
    ] = None
    format: Annotated[str | None, typer.Option(help="Force the data's format.")] = None
    images: Annotated[str | None, typer.Option(help="Folder of the pictures.")] = None

    def source(
        self, data: str, lang: str | None, answers_top: int | None = None
    ) -> "evaluate.Source":
        from tinyvl import evaluate

        return evaluate.Source(
            data, self.split, lang, self.limit, self.format, self.images, answers_top
        )


@dataclass
class Running(Place):
    """Where a model runs, and what is shown of it."""

    as_json: Annotated[bool, typer.Option("--json", help="JSON on a terminal too.")] = False
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False

    def place(self, batch: int) -> "evaluate.Place":
        from tinyvl import evaluate

        return evaluate.place(self.device, self.precision, batch, self.workers, self.quiet)


def model_and_data(arguments: list[str] | None, *, model: bool = True) -> tuple[str, str]:
    """[MODEL] DATA; ``model`` False: the predictions are there, only DATA is wanted."""
    arguments = arguments or []
    if not 1 <= len(arguments) <= (2 if model else 1):
        wants = "[MODEL] DATA" if model else "DATA alone, as the predictions are there"
        raise UserError(f"This command takes {wants}; {len(arguments)} arguments were given.", 2)
    return ("default", *arguments)[-2:]


@app.command()
@grouped
def caption(
    arguments: ModelData = None,
    *,
    predictions: Predictions = None,
    compare: Compare = None,
    allow_missing: AllowMissing = False,
    out: Out = None,
    resume: Resume = False,
    results: Annotated[
        Path | None,
        typer.Option(help="Also write a results file for the COCO and NoCaps servers."),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(help="Some only, by commas: BLEU-4,CIDEr,METEOR,ROUGE-L,SPICE,SPIDEr."),
    ] = None,
    java: Annotated[str | None, typer.Option(help="The java to run METEOR with.")] = None,
    spice_jars: Annotated[
        Path | None, typer.Option(help="Folder of Stanford CoreNLP 3.6.0's jars: SPICE too.")
    ] = None,
    shuffle: Shuffle = False,
    lang: Lang = "en",
    part: Part,
    beams: Beams = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest caption, in tokens.")] = 40,
    search: Search,
    frames: Frames = None,
    features: Features = None,
    batch: Batch = 16,
    running: Running,
) -> None:
    """Caption a data set's pictures; score: BLEU, METEOR, ROUGE-L, CIDEr, SPICE.

    NoCaps is scored by domain, each a corpus of its own, and overall. CIDEr depends on the set of
    references: that of a part (--limit, --allow-missing) is not comparable to the whole's.

    tinyvl eval caption --predictions FILE DATA    scores captions made elsewhere: JSON Lines of
    {id | image_id | path | image, caption}, or COCO results.
    """
    names = [name.strip() for name in metrics.split(",")] if metrics else None
    made = check_files(
        predictions, compare, allow_missing, out, resume, results, shuffle or features is not None
    )
    how = search.style(beams, max_tokens)
    from tinyvl import evaluate, evaluate_compare

    model, data = model_and_data(arguments, model=not made)
    source = part.source(data, lang)
    scoring = evaluate.Scoring(names, java, spice_jars)
    if made:
        report = evaluate_compare.of_files(
            "caption", predictions, compare, source,
            scoring=scoring, allow_missing=allow_missing, results=results,
        )  # fmt: skip
    else:
        report = evaluate.run(
            "caption", model, source, style=how, scoring=scoring, out=out, resume=resume,
            shuffle=shuffle, results=results, features=features, frames=frames,
            place=running.place(batch),
        )  # fmt: skip
    show(report, running.as_json)


@app.command()
@grouped
def vqa(
    arguments: ModelData = None,
    *,
    predictions: Predictions = None,
    compare: Compare = None,
    allow_missing: AllowMissing = False,
    out: Out = None,
    resume: Resume = False,
    results: Annotated[
        Path | None, typer.Option(help="Also write a results file for the VQA server.")
    ] = None,
    shuffle: Shuffle = False,
    lang: Lang = "en",
    part: Part,
    answers_top: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Only questions whose answer (of several the annotators' first choice) is one of "
            "the N most frequent of the training part, or of all where there is none: 1000 for "
            "eP-ALM's Table 5.",
        ),
    ] = None,
    beams: Beams = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 10,
    search: Search,
    frames: Frames = None,
    features: Features = None,
    batch: Batch = 16,
    running: Running,
) -> None:
    """Answer a data set's questions; score: VQA v2's accuracy, strict, by type of question.

    accuracy is VQA v2's official one where a question has several answers, and equality where it
    has one (GQA); strict_accuracy compares the raw texts. A model may be asked about another set
    than it was trained on. eP-ALM's Table 8: --sample, or --beams 1 to 5.

    tinyvl eval vqa --predictions FILE DATA    scores answers made elsewhere: JSON Lines of
    {question_id | id | path and question, answer}, or a VQA results file.
    """
    made = check_files(
        predictions, compare, allow_missing, out, resume, results, shuffle or features is not None
    )
    how = search.style(beams, max_tokens)
    from tinyvl import evaluate, evaluate_compare

    model, data = model_and_data(arguments, model=not made)
    source = part.source(data, lang, answers_top)
    if made:
        report = evaluate_compare.of_files(
            "vqa", predictions, compare, source, allow_missing=allow_missing, results=results
        )
    else:
        report = evaluate.run(
            "vqa", model, source, style=how, out=out, resume=resume, shuffle=shuffle,
            results=results, features=features, frames=frames,
            place=running.place(batch),
        )  # fmt: skip
    show(report, running.as_json)


@app.command()
@grouped
def retrieval(
    arguments: ModelData = None,
    *,
    predictions: Kept = None,
    compare: Compare = None,
    out: Out = None,
    lang: Annotated[
        str | None,
        typer.Option(help="Languages, by commas: a row each. Without: all that the data has."),
    ] = None,
    protocol: Annotated[
        str, typer.Option(help="full; lilt: the 200 pictures of XTD10 of the paper's Table 2.")
    ] = "full",
    part: Part,
    features: Features = None,
    batch: Batch = 32,
    running: Running,
) -> None:
    """Find captions by picture (TR) and pictures by caption (IR): recall at 1, 5, 10, and means.

    Ties count as misses. Each language is searched by itself; the metrics are their mean. Chance is
    what a random order would score.
    """
    if protocol not in ("full", "lilt"):
        raise UserError(f"--protocol is full or lilt, not {protocol!r}.", 2)
    if finished("retrieval", arguments, predictions, compare, out or features, running.as_json):
        return
    model, data = model_and_data(arguments)
    from tinyvl import evaluate_pairs

    report = evaluate_pairs.run_retrieval(
        model,
        part.source(data, None),
        langs=[name.strip() for name in lang.split(",")] if lang else None,
        protocol=protocol,
        out=out,
        features=features,
        place=running.place(batch),
    )
    show(report, running.as_json)


@app.command()
@grouped
def zeroshot(
    arguments: ModelData = None,
    *,
    predictions: Kept = None,
    compare: Compare = None,
    out: Out = None,
    resume: Resume = False,
    prompt: Prompts = None,
    classes: Annotated[
        Path | None,
        typer.Option(
            help="File of class names: with a label each (n01440764 tench; tabs; JSON), or a name "
            "a line in the folders' order. Without: the folders' own, ImageNet's by timm."
        ),
    ] = None,
    all_classes: Annotated[
        bool,
        typer.Option(
            "--all-classes", help="Choose among all of --classes, not only those the data has."
        ),
    ] = False,
    part: Part,
    features: Features = None,
    batch: Batch = 32,
    running: Running,
) -> None:
    """Classify pictures by the names of their classes: top-1 and top-5, and of each class in JSON.

    DATA is a folder with a folder for each class (CIFAR, SVHN, ImageNet-V2, ImageNet-A), or records
    with a label. ImageNet-A is evaluated among its own 200 classes.
    """
    if all_classes and classes is None:
        raise UserError("--all-classes is about the names of --classes FILE: give that too.", 2)
    if resume and out is None:
        raise UserError("--resume goes with -o DIR: it keeps the predictions that are there.", 2)
    if finished("zeroshot", arguments, predictions, compare, out or features, running.as_json):
        return
    model, data = model_and_data(arguments)
    from tinyvl import evaluate_pairs

    report = evaluate_pairs.run_zeroshot(
        model,
        part.source(data, None),
        prompts=prompt,
        class_names=classes,
        all_classes=all_classes,
        out=out,
        resume=resume,
        features=features,
        place=running.place(batch),
    )
    show(report, running.as_json)


def finished(
    kind: str,
    arguments: list[str] | None,
    predictions: list[Path] | None,
    compare: tuple[Path, Path] | None,
    model_only: Path | None,
    as_json: bool,
) -> bool:
    """Reports on runs that are kept in folders, if that is what was asked for."""
    if not predictions and not compare:
        return False
    if arguments or model_only or (predictions and compare):
        raise UserError(
            "--predictions or --compare takes folders that -o made, and nothing else is needed.", 2
        )
    from tinyvl import evaluate_pairs

    if compare:
        report = evaluate_pairs.compare_folders(kind, *compare)
    else:
        report = evaluate_pairs.score_folders(kind, predictions)
    show(report, as_json)
    return True


def check_files(
    predictions: list[Path] | None,
    compare: tuple[Path, Path] | None,
    allow_missing: bool,
    out: Path | None,
    resume: bool,
    results: Path | None,
    model_only: bool,
) -> bool:
    """Is it predictions made elsewhere that are scored? Options that do not fit are refused."""
    if predictions and compare:
        raise UserError("--predictions scores each, --compare two: give one of them.", 2)
    if predictions or compare:
        if out or resume or model_only:
            raise UserError(
                "--out, --resume, --features and --shuffle-images are for running a model.", 2
            )
        if results and (compare or len(predictions or ()) > 1):
            raise UserError("--results writes one set of predictions: give one.", 2)
        return True
    if allow_missing:
        raise UserError("--allow-missing is for --predictions and --compare.", 2)
    if resume and out is None:
        raise UserError("--resume goes with -o DIR: it keeps the predictions that are there.", 2)
    return False


def show(report: dict[str, Any], as_json: bool) -> None:
    """The report on standard output; leaves with status 1 where a picture failed."""
    if as_json or not sys.stdout.isatty():
        print(json.dumps(report, ensure_ascii=False))
    else:
        from tinyvl.evaluate_compare import draw

        draw(report)
    raise typer.Exit(1 if report.get("failed") else 0)
