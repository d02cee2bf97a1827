"""`tinyvl eval TASK [MODEL] DATA`: a model over a data set, one report on standard output."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinyvl import UserError
from tinyvl.cli_options import (
    FEATURES,
    FRAMES,
    PROMPTS,
    Place,
    Search,
    batch_of,
    command,
    group,
    same,
)
from tinyvl.presets_options import Job, Run, commas, option

if TYPE_CHECKING:
    from tinyvl import evaluate

app = group()
tasks = group(
    "Run a model over a data set and score it. A table on a terminal; with --json, and where "
    "standard output is no terminal, one JSON object {task, model, data, metrics, ...}. Metrics "
    "are fractions; CIDEr's and SPIDEr's 1.0 is the papers' 100."
)
app.add_typer(tasks, name="eval")

ModelData = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[MODEL] DATA",
        show_default=False,
        help="A checkpoint folder, hf://owner/name or default; then the data: what `tinyvl train` "
        "reads. One argument is the data.",
    ),
]


@dataclass
class Part:
    """Which records of the data are evaluated."""

    split: str | None = option("Data", None, "Part of the data.",
        shown="test if there is one, val, or all")  # fmt: skip
    limit: int | None = option("Data", None, "Evaluate this many items, the same each time.", min=1)
    format: str | None = same(Job, "format")
    images: str | None = same(Job, "images")

    def source(self, data: str, lang: str | None = None, top: int | None = None) -> Any:
        from tinyvl.evaluate import Source

        return Source(data, self.split, lang, self.limit, self.format, self.images, top)


@dataclass
class Running(Place):
    """Where a model runs, and how the report is shown."""

    batch: int = batch_of()
    as_json: bool = option("Output", False, "JSON on a terminal, too.", name="--json")
    quiet: bool = same(Run, "quiet", False)

    def place(self) -> "evaluate.Place":
        from tinyvl import evaluate

        return evaluate.place(self.device, self.precision, self.batch, self.workers, self.quiet)


@dataclass
class Kept:
    """Where predictions are kept, and which are scored instead of a model's."""

    out: Path | None = option("Output", None, "Folder to keep predictions.jsonl and report.json "
        "in.", name="--out,-o")  # fmt: skip
    predictions: list[Path] | None = option("Data", None, "Score a folder of -o again. Several "
        "times (seeds): mean and deviation.")  # fmt: skip
    compare: tuple[Path, Path] | None = option("Data", None, "Score two: B, and B less A with 95 % "
        "intervals (bootstrap).", metavar="A B")  # fmt: skip


@dataclass
class KeptOn(Kept):
    """The same, of an evaluation that can be continued."""

    resume: bool = option("Output", False, "With -o: keep the predictions that are there.")

    def __post_init__(self) -> None:
        if self.resume and self.out is None and not (self.predictions or self.compare):
            raise UserError(
                "--resume goes with -o DIR: it keeps the predictions that are there.", 2
            )


@dataclass
class Texts(KeptOn):
    """The same of captions and answers, which may have been made elsewhere."""

    predictions: list[Path] | None = option("Data", None, "Score these predictions instead of a "
        "model's: JSON Lines, a results file, or a folder of -o. Several times (seeds): mean and "
        "deviation.")  # fmt: skip
    allow_missing: bool = option("Data", False, "Score the records that have a prediction.")
    results: Path | None = option("Output", None, "Also write a results file for the COCO, NoCaps "
        "or VQA server.")  # fmt: skip
    shuffle: bool = option("Advanced", False, "Control: each picture's place goes to another one.",
        name="--shuffle-images")  # fmt: skip
    features: Path | None = same(Run, "features")

    def made_elsewhere(self) -> bool:
        """Are predictions scored that are there already?

        Raises:
            UserError: options that do not fit.
        """
        if not (self.predictions or self.compare):
            if self.allow_missing:
                raise UserError("--allow-missing is for --predictions and --compare.", 2)
            return False
        if self.predictions and self.compare:
            raise UserError("--predictions scores each, --compare two: give one of them.", 2)
        if self.out or self.resume or self.shuffle or self.features:
            raise UserError(
                "--out, --resume, --features and --shuffle-images are for running a model.", 2
            )
        if self.results and (self.compare or len(self.predictions or ()) > 1):
            raise UserError("--results writes one set of predictions: give one.", 2)
        return True


def model_and_data(arguments: list[str] | None, *, model: bool = True) -> tuple[str, str]:
    """[MODEL] DATA; ``model`` False: the predictions are there, only DATA is wanted."""
    arguments = arguments or []
    if not 1 <= len(arguments) <= (2 if model else 1):
        wants = "[MODEL] DATA" if model else "DATA alone, as the predictions are there"
        raise UserError(f"This command takes {wants}; {len(arguments)} arguments were given.", 2)
    return ("default", *arguments)[-2:]


@command(tasks, "caption")
def caption(
    arguments: ModelData = None,
    *,
    made: Texts,
    part: Part,
    lang: str = same(Job, "lang", "en"),
    metrics: list[str] | None = option("Output", None, "Some only, by commas: "
        "BLEU-4,CIDEr,METEOR,ROUGE-L,SPICE,SPIDEr.", parse=commas),
    java: str | None = option("Advanced", None, "The java to run METEOR with."),
    spice_jars: Path | None = option("Advanced", None, "Folder of Stanford CoreNLP 3.6.0's jars: "
        "SPICE, too."),
    search: Search,
    frames: int | None = FRAMES,
    running: Running,
) -> None:  # fmt: skip
    """Caption a data set's pictures; score: BLEU, METEOR, ROUGE-L, CIDEr, SPICE.

    NoCaps is scored by domain, each a corpus of its own, and overall. CIDEr depends on the set of
    references: that of a part (--limit, --allow-missing) is not comparable to the whole's.

    `tinyvl eval caption --predictions FILE DATA` scores captions made elsewhere: JSON Lines of {id
    | image_id | path | image, caption}, or COCO results.
    """
    scoring, data = (metrics, java, spice_jars), (part, lang, None)
    evaluated("caption", arguments, made, data, search, frames, running, scoring)


@command(tasks, "vqa")
def vqa(
    arguments: ModelData = None,
    *,
    made: Texts,
    part: Part,
    lang: str = same(Job, "lang", "en"),
    answers_top: int | None = option("Data", None, "Only questions whose answer (of several the "
        "annotators' first choice) is one of the N most frequent of the training part, or of all "
        "where there is none: 1000 for eP-ALM's Table 5.", min=1),
    search: Search = Search(max_tokens=10),
    frames: int | None = FRAMES,
    running: Running,
) -> None:  # fmt: skip
    """Answer a data set's questions; score: VQA v2's accuracy, strict, by type of question.

    accuracy is VQA v2's official one where a question has several answers, and equality where it
    has one (GQA); strict_accuracy compares the raw texts. A model may be asked about another set
    than it was trained on. eP-ALM's Table 8: --sample, or --beams 1 to 5.

    `tinyvl eval vqa --predictions FILE DATA` scores answers made elsewhere: JSON Lines of
    {question_id | id | path and question, answer}, or a VQA results file.
    """
    evaluated("vqa", arguments, made, (part, lang, answers_top), search, frames, running, ())


def evaluated(
    kind: str,
    arguments: list[str] | None,
    made: Texts,
    data: tuple[Part, str, int | None],
    search: Search,
    frames: int | None,
    running: Running,
    scoring: tuple,
) -> None:
    """Scores a model's captions or answers, or those made elsewhere."""
    elsewhere, style = made.made_elsewhere(), search.style()
    from tinyvl import evaluate, evaluate_compare

    model, path = model_and_data(arguments, model=not elsewhere)
    part, lang, top = data
    source = part.source(path, lang, top)
    scorer = evaluate.Scoring(*scoring) if scoring else None
    if elsewhere:
        report = evaluate_compare.of_files(
            kind, made.predictions, made.compare, source,
            scoring=scorer, allow_missing=made.allow_missing, results=made.results,
        )  # fmt: skip
    else:
        report = evaluate.run(
            kind, model, source, style=style, scoring=scorer, out=made.out, resume=made.resume,
            shuffle=made.shuffle, results=made.results, features=made.features, frames=frames,
            place=running.place(),
        )  # fmt: skip
    show(report, running.as_json)


@command(tasks, "retrieval")
def retrieval(
    arguments: ModelData = None,
    *,
    kept: Kept,
    part: Part,
    lang: list[str] | None = option("Data", None, "Languages, by commas: a row each.", parse=commas,
        shown="all that the data has"),
    protocol: str = option("Data", "full", "full; lilt: the 200 pictures of XTD10 of the paper's "
        "Table 2.", choices=("full", "lilt")),
    features: Path | None = FEATURES,
    running: Running = Running(batch=32),
) -> None:  # fmt: skip
    """Find captions by picture (TR) and pictures by caption (IR): recall at 1, 5, 10, and means.

    Ties count as misses. Each language is searched by itself; the metrics are their mean. Chance is
    what a random order would score.
    """
    again("retrieval", arguments, kept, features, running)
    model, data = model_and_data(arguments)
    from tinyvl import evaluate_pairs

    report = evaluate_pairs.run_retrieval(
        model, part.source(data), langs=lang, protocol=protocol, out=kept.out, features=features,
        place=running.place(),
    )  # fmt: skip
    show(report, running.as_json)


@command(tasks, "zeroshot")
def zeroshot(
    arguments: ModelData = None,
    *,
    kept: KeptOn,
    part: Part,
    prompt: list[str] | None = PROMPTS,
    classes: Path | None = option("Data", None, "File of class names: with a label each (n01440764 "
        "tench; tabs; JSON), or a name a line in the folders' order.",
        shown="the folders' own, ImageNet's by timm"),
    all_classes: bool = option("Data", False, "Choose among all of --classes, not only those the "
        "data has."),
    features: Path | None = FEATURES,
    running: Running = Running(batch=32),
) -> None:  # fmt: skip
    """Classify pictures by the names of their classes: top-1 and top-5, and of each class in JSON.

    DATA is a folder with a folder for each class (CIFAR, SVHN, ImageNet-V2, ImageNet-A), or records
    with a label. ImageNet-A is evaluated among its own 200 classes.
    """
    if all_classes and classes is None:
        raise UserError("--all-classes is about the names of --classes FILE: give that too.", 2)
    again("zeroshot", arguments, kept, features, running)
    model, data = model_and_data(arguments)
    from tinyvl import evaluate_pairs

    report = evaluate_pairs.run_zeroshot(
        model, part.source(data), prompts=prompt, class_names=classes, all_classes=all_classes,
        out=kept.out, resume=kept.resume, features=features, place=running.place(),
    )  # fmt: skip
    show(report, running.as_json)


def again(
    kind: str, arguments: list[str] | None, kept: Kept, features: Path | None, running: Running
) -> None:
    """Reports on runs that are kept in folders and leaves, if that is what was asked for."""
    if not kept.predictions and not kept.compare:
        return
    both, resume = kept.predictions and kept.compare, vars(kept).get("resume")
    if arguments or kept.out or resume or features or both:
        raise UserError(
            "--predictions or --compare takes folders that -o made, and nothing else is needed.", 2
        )
    from tinyvl import evaluate_pairs

    if kept.compare:
        show(evaluate_pairs.compare_folders(kind, *kept.compare), running.as_json)
    show(evaluate_pairs.score_folders(kind, kept.predictions), running.as_json)


def show(report: dict[str, Any], as_json: bool) -> None:
    """The report on standard output; leaves with status 1 where a picture failed."""
    if as_json or not sys.stdout.isatty():
        print(json.dumps(report, ensure_ascii=False))
    else:
        from tinyvl.evaluate_compare import draw

        draw(report)
    raise typer.Exit(1 if report.get("failed") else 0)
