"""`tinyvl eval TASK [MODEL] DATA`: a model over a data set, one report on standard output."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from tinyvl import UserError
from tinyvl.cli_options import (
    ANSWER,
    FRAMES,
    PROMPTS,
    RERANK,
    Place,
    Search,
    batch_of,
    command,
    group,
    same,
)
from tinyvl.files import dump
from tinyvl.presets_options import Job, Run, commas, option

app = group()
tasks = group(
    "Run a model over a data set and score it. A table on a terminal; with --json, and where "
    "standard output is no terminal, one JSON object {task, model, data, metrics, ...}. Metrics "
    "are fractions; CIDEr's and SPIDEr's 1.0 is the papers' 100."
)
app.add_typer(tasks, name="eval")

ModelData = Annotated[list[str] | None, typer.Argument(
    metavar="[MODEL] DATA", show_default=False,
    help="A checkpoint folder, hf://owner/name or default; then the data: what `tinyvl train` "
    "reads. One argument is the data.",
)]  # fmt: skip
RESUME = option("Output", False, "With -o: keep the predictions that are there.")


# fmt: off
@dataclass
class Evaluation(Place):
    """What all four tasks have."""

    predictions: list[Path] | None = option("Data", None, "Score a folder of -o again. Several "
        "times (seeds): mean and deviation.")
    compare: tuple[Path, Path] | None = option("Data", None, "Score two: B, and B less A with 95 % "
        "intervals (bootstrap).", metavar="A B")
    split: str | None = option("Data", None, "Part of the data.",
        shown="test if there is one, val, or all")
    limit: int | None = option("Data", None, "Evaluate this many items, the same each time.", min=1)
    format: str | None = same(Job, "format")
    images: str | None = same(Job, "images")
    features: Path | None = same(Run, "features")
    batch: int = batch_of()
    out: Path | None = option("Output", None, "Folder to keep predictions.jsonl and report.json "
        "in.", name="--out,-o")
    as_json: bool = option("Output", False, "JSON on a terminal, too.", name="--json")
    quiet: bool = same(Run, "quiet", False)
    resume = False  # an option of all but retrieval, which does not keep its embeddings

    def __post_init__(self) -> None:
        if self.resume and self.out is None and not (self.predictions or self.compare):
            kept = "it keeps the predictions that are there."
            raise UserError(f"--resume goes with -o DIR: {kept}", 2)

    def source(self, data: str, lang: str | None = None, top: int | None = None) -> Any:
        from tinyvl.evaluate import Source

        return Source(data, self.split, lang, self.limit, self.format, self.images, top)

    def place(self) -> Any:
        from tinyvl import evaluate

        return evaluate.place(
            self.device, self.precision, batch=self.batch, workers=self.workers, quiet=self.quiet,
            out=self.out, resume=self.resume, features=self.features,
        )


@dataclass
class Texts(Evaluation):
    """Captions and answers, which may have been made elsewhere."""

    predictions: list[Path] | None = option("Data", None, "Score these predictions instead of a "
        "model's: JSON Lines, a results file, or a folder of -o. Several times (seeds): mean and "
        "deviation.")
    allow_missing: bool = option("Data", False, "Score the records that have a prediction.")
    lang: str = same(Job, "lang", "en")
    frames: int | None = FRAMES
    resume: bool = RESUME
    results: Path | None = option("Output", None, "Also write a results file for the COCO, NoCaps "
        "or VQA server.")
    shuffle: bool = option("Advanced", False, "Control: each picture's place goes to another one.",
        name="--shuffle-images")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.predictions or self.compare):
            if self.allow_missing:
                raise UserError("--allow-missing is for --predictions and --compare.", 2)
            return
        if self.predictions and self.compare:
            raise UserError("--predictions scores each, --compare two: give one of them.", 2)
        if self.out or self.resume or self.shuffle or self.features or self.frames:
            idle = "--out, --resume, --features, --frames and --shuffle-images"
            raise UserError(f"{idle} are for running a model.", 2)
        if self.results and (self.compare or len(self.predictions or ()) > 1):
            raise UserError("--results writes one set of predictions: give one.", 2)


@dataclass
class Classes(Evaluation):
    """Zero-shot classification."""

    resume: bool = RESUME


# fmt: on
def model_and_data(arguments: list[str] | None, *, model: bool = True) -> tuple[str, str]:
    """[MODEL] DATA; ``model`` False: the predictions are there, only DATA is wanted."""
    arguments = arguments or []
    if not 1 <= len(arguments) <= (2 if model else 1):
        wants = "[MODEL] DATA" if model else "DATA alone, as the predictions are there"
        raise UserError(f"This command takes {wants}; {len(arguments)} arguments were given.", 2)
    only = arguments[0] if len(arguments) == 1 else ""
    named = only.startswith("hf://") or (only == "default" and not Path(only).exists())
    if named or (only and (Path(only) / "model.safetensors").is_file()):
        raise UserError(f"{only} is a model; name the data behind it.", 2)
    return ("default", *arguments)[-2:]


@command(tasks, "caption")
def caption(
    arguments: ModelData = None,
    *,
    asked: Texts,
    metrics: list[str] | None = option("Output", None, "Some only, by commas: "
        "BLEU-4,CIDEr,METEOR,ROUGE-L,SPICE,SPIDEr.", parse=commas),
    java: str | None = option("Advanced", None, "The java to run METEOR with."),
    spice_jars: Path | None = option("Advanced", None, "Folder of Stanford CoreNLP 3.6.0's jars: "
        "SPICE, too."),
    search: Search,
    rerank: str | None = RERANK,
) -> None:  # fmt: skip
    """Caption a data set's pictures; score: BLEU, METEOR, ROUGE-L, CIDEr, SPICE.

    NoCaps is scored by domain, each a corpus of its own, and overall. CIDEr depends on the set of
    references: that of a part (--limit, --allow-missing) is not comparable to the whole's.

    `tinyvl eval caption --predictions FILE DATA` scores captions made elsewhere: JSON Lines of {id
    | image_id | path | image, caption}, or COCO results.
    """
    scoring = {"metrics": metrics, "java": java, "spice_jars": spice_jars}
    of_texts("caption", arguments, asked, search, scoring=scoring, rerank=rerank)


@command(tasks, "vqa")
def vqa(
    arguments: ModelData = None,
    *,
    asked: Texts,
    answers_top: int | None = option("Data", None, "Only questions whose answer (of several the "
        "annotators' first choice) is one of the N most frequent of the training part, or of all "
        "where there is none: 1000 for eP-ALM's Table 5.", min=1),
    search: Search = ANSWER,
) -> None:  # fmt: skip
    """Answer a data set's questions; score: VQA v2's accuracy, strict, by type of question.

    accuracy is VQA v2's official one where a question has several answers, and equality where it
    has one (GQA); strict_accuracy compares the raw texts. Where questions have choices (Visual7W,
    VQA v1), multiple_choice_accuracy is that of the likeliest choice; a tie is a miss. A model may
    be asked about another set than it was trained on. eP-ALM's Table 8: --sample, or --beams 1 to
    5.

    `tinyvl eval vqa --predictions FILE DATA` scores answers made elsewhere: JSON Lines of
    {question_id | id | path and question, answer, and maybe choices: {choice: probability}}, or a
    VQA results file.
    """
    of_texts("vqa", arguments, asked, search, top=answers_top)


def of_texts(
    kind: str, arguments: list[str] | None, asked: Texts, search: Search, *,
    scoring: dict[str, Any] | None = None, top: int | None = None, rerank: str | None = None,
) -> None:  # fmt: skip
    """Scores a model's captions or answers, or those made elsewhere."""
    elsewhere = asked.predictions or asked.compare
    idle = [*search.given, *([] if rerank is None else ["rerank"])]
    if elsewhere and idle:
        raise UserError(f"--{idle[0].replace('_', '-')} is for running a model.", 2)
    style = search.style()
    style.rerank = rerank
    from tinyvl import evaluate, evaluate_compare

    model, path = model_and_data(arguments, model=not elsewhere)
    source = asked.source(path, asked.lang, top)
    more = {"scoring": scoring, "allow_missing": asked.allow_missing}
    if asked.compare:
        report = evaluate_compare.compare_files(kind, *asked.compare, source, **more)
    elif asked.predictions:
        paths, results = asked.predictions, asked.results
        report = evaluate_compare.score_files(kind, paths, source, results=results, **more)
    else:
        report = evaluate.run(
            kind, model, source, style=style, place=asked.place(), scoring=scoring,
            shuffle=asked.shuffle, results=asked.results, frames=asked.frames,
        )  # fmt: skip
    show(report, asked.as_json)


@command(tasks, "retrieval")
def retrieval(
    arguments: ModelData = None,
    *,
    asked: Evaluation = Evaluation(batch=32),
    lang: list[str] | None = option("Data", None, "Languages, by commas, or all: a row each.",
        parse=commas, shown="all that the data has"),
    protocol: str = option("Data", "full", "full; lilt: the 200 pictures of XTD10 of the paper's "
        "Table 2.", choices=("full", "lilt")),
) -> None:  # fmt: skip
    """Find captions by picture (TR) and pictures by caption (IR): recall at 1, 5, 10, and means.

    Ties count as misses. Each language is searched by itself; the metrics are their mean. Chance is
    what a random order would score.
    """
    of_pairs("retrieval", arguments, asked, langs=lang, protocol=protocol)


@command(tasks, "zeroshot")
def zeroshot(
    arguments: ModelData = None,
    *,
    asked: Classes = Classes(batch=32),
    prompt: list[str] | None = PROMPTS,
    classes: Path | None = option("Data", None, "File of class names: with a label each (n01440764 "
        "tench; tabs; JSON), or a name a line in the folders' order.",
        shown="the folders' own, ImageNet's by timm"),
    all_classes: bool = option("Data", False, "Choose among all of --classes, not only those the "
        "data has."),
) -> None:  # fmt: skip
    """Classify pictures by the names of their classes: top-1 and top-5, and of each class in JSON.

    DATA is a folder with a folder for each class (CIFAR, SVHN, ImageNet-V2, ImageNet-A), or records
    with a label. ImageNet-A is evaluated among its own 200 classes.
    """
    if all_classes and classes is None:
        raise UserError("--all-classes is about the names of --classes FILE: give that too.", 2)
    named = {"prompts": prompt, "class_names": classes, "all_classes": all_classes}
    of_pairs("zeroshot", arguments, asked, **named)


def of_pairs(kind: str, arguments: list[str] | None, asked: Evaluation, **options: Any) -> None:
    """Scores a model that embeds, or runs that are kept in folders."""
    if asked.predictions or asked.compare:
        both = asked.predictions and asked.compare
        if arguments or asked.out or asked.resume or asked.features or both:
            message = "takes folders that -o made, and nothing else is needed."
            raise UserError(f"--predictions or --compare {message}", 2)
    else:
        model, data = model_and_data(arguments)
    from tinyvl import evaluate_pairs

    if asked.compare:
        report = evaluate_pairs.compare_folders(kind, *asked.compare)
    elif asked.predictions:
        report = evaluate_pairs.score_folders(kind, asked.predictions)
    else:
        run = {"retrieval": evaluate_pairs.run_retrieval, "zeroshot": evaluate_pairs.run_zeroshot}
        report = run[kind](model, asked.source(data), place=asked.place(), **options)
    show(report, asked.as_json)


def show(report: dict[str, Any], as_json: bool) -> None:
    """The report on standard output; leaves with status 1 where a picture failed."""
    if as_json or not sys.stdout.isatty():
        print(dump(report))
    else:
        from tinyvl.evaluate_compare import draw

        draw(report)
    raise typer.Exit(1 if report.get("failed") else 0)
