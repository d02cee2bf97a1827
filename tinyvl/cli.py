"""The command line: parse, call one function, print. Nothing heavy is imported at the top."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from tinyvl import UserError, __version__

app = typer.Typer(
    name="tinyvl",
    help="Frozen language models that see: caption, train and measure. Data goes to standard "
    "output, everything else to standard error.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
train_app = typer.Typer(no_args_is_help=True, help="Train a method's modules on your data.")
app.add_typer(train_app, name="train")

Model = Annotated[
    str, typer.Option("--model", "-m", help="Checkpoint folder, hf://owner/name, or default.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps. [default: the best]")]
Precision = Annotated[
    str | None, typer.Option(help="fp32, bf16 or fp16. [default: bf16 on a GPU, fp32 on a CPU]")
]
Workers = Annotated[
    int | None, typer.Option(min=0, help="Processes that decode pictures. [default: by the cores]")
]


@app.callback(invoke_without_command=True)
def start(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def caption(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(help="Pictures, folders, globs, or - for paths on stdin (as a pipe is)."),
    ] = None,
    model: Model = "default",
    beams: Annotated[int, typer.Option(min=1, help="Beams of the search; 1 is greedy.")] = 5,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest caption, in tokens.")] = 40,
    length_penalty: Annotated[
        float, typer.Option(help="Beam scores are divided by length to this power.")
    ] = 1.0,
    late: Annotated[
        bool, typer.Option("--late-stopping", help="Search on after all beams have an end.")
    ] = False,
    sample: Annotated[bool, typer.Option("--sample", help="Sample instead of searching.")] = False,
    temperature: Annotated[float, typer.Option(help="With --sample: below 1 is safer.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="With --sample: the k likeliest.")] = 0,
    top_p: Annotated[
        float, typer.Option(help="With --sample: the likeliest with this mass.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="With --sample: the seed.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Pictures captioned together.")] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="JSON Lines.")] = False,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Write to this file instead of stdout.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="With -o: skip what the file already has.")
    ] = False,
    null: Annotated[
        bool, typer.Option("-0", "--null", help="Paths on stdin end with NUL, not newline.")
    ] = False,
    device: Device = None,
    precision: Precision = None,
    workers: Workers = None,
) -> None:
    """Caption pictures: a line each, path<TAB>caption where there are several."""
    if sample and temperature <= 0:
        raise UserError(
            "--temperature is above 0; for the likeliest caption leave out --sample.", 2
        )
    if not 0 < top_p <= 1:
        raise UserError("--top-p is above 0 and at most 1.", 2)
    if not inputs:
        if sys.stdin.isatty():
            raise UserError("Name pictures or folders, or pipe their paths in.", 2)
        inputs = ["-"]
    if resume and out is None:
        raise UserError("--resume goes with -o FILE: it skips what that file already has.", 2)
    from tinyvl import generate, media

    one = len(inputs) == 1 and inputs[0] != "-" and Path(inputs[0]).is_file()
    paths = media.expand(inputs, sys.stdin, null=null)
    stream, done = sys.stdout, set()
    loaded = load_model(model, device, precision)
    if out is not None:
        stream, done = generate.open_output(out, resume)
        paths = (path for path in paths if path not in done)
    sampling = None
    if sample:
        sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    style = generate.Style(beams, max_tokens, length_penalty, not late, sampling)
    results = generate.captions(loaded, paths, style=style, batch=batch, workers=workers)
    status = generate.write(results, stream, as_json=as_json, bare=one and out is None)
    raise typer.Exit(status)


@train_app.command("itune")
def train_itune(
    preset: Annotated[
        str | None, typer.Option(help="A paper's row, e.g. itune-base; options override it.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="JSON Lines, Karpathy or COCO JSON, Flickr token file, image folder. "
            "[default: a small set that tinyvl draws]"
        ),
    ] = None,
    val: Annotated[
        str | None, typer.Option(help="Validation data. [default: the data's own, or 2 % of it]")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Checkpoint folder. [default: runs/itune]")
    ] = None,
    lm: Annotated[str | None, typer.Option(help="Frozen language model: a name or folder.")] = None,
    vision: Annotated[
        str | None, typer.Option(help="Frozen timm encoder: a name or folder.")
    ] = None,
    init: Annotated[
        str | None, typer.Option(help="Checkpoint to fine-tune (after VLP, say).")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    epochs: Annotated[float | None, typer.Option(min=0, help="Passes over the captions.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Captions per optimizer step.")] = None,
    micro_batch: Annotated[int, typer.Option(min=1, help="Captions in memory at once.")] = 64,
    rate: Annotated[float | None, typer.Option(help="AdamW's learning rate after warm-up.")] = None,
    warmup: Annotated[
        float | None, typer.Option(min=0, max=1, help="Warm-up, as a share of all steps.")
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(help="AdamW's weight decay.")] = None,
    bottleneck: Annotated[
        int | None, typer.Option(min=1, help="r. [default: half the width]")
    ] = None,
    drop: Annotated[
        int | None, typer.Option(min=0, help="No modules in the first N layers.")
    ] = None,
    scale: Annotated[float | None, typer.Option(help="λ of equation 5.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Text before every caption.")] = None,
    fit: Annotated[
        str | None,
        typer.Option(help="crop: the encoder's own; squash: the whole; jpeg: made small."),
    ] = None,
    images: Annotated[str | None, typer.Option(help="Folder of the pictures.")] = None,
    format: Annotated[str | None, typer.Option(help="Force the data's format.")] = None,
    lang: Annotated[str, typer.Option(help="Language of the captions, where records say.")] = "en",
    limit: Annotated[int | None, typer.Option(min=1, help="Train on this many pictures.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longer captions are cut.")] = 40,
    per_image: Annotated[
        int, typer.Option(min=1, help="Captions of a picture that share a micro-batch.")
    ] = 5,
    seed: Annotated[int, typer.Option(help="Initialisation and order.")] = 0,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between saved states.")] = 100,
    validate_every: Annotated[
        int | None, typer.Option(min=1, help="Steps. [default: an epoch]")
    ] = None,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Recompute layers: less memory, slower.")
    ] = False,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Encode pictures anew in each epoch.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    device: Device = None,
    precision: Precision = None,
    workers: Workers = None,
) -> None:
    """I-Tuning: cross-attention modules beside the feed-forwards of a frozen decoder.

    As it stands it trains on a small drawn set in minutes, on any machine. Prints the summary as
    JSON. The paper's rows: --preset itune-base, itune-medium, itune-large, itune-large-drop18; its
    VLP is --epochs 10 on Visual Genome, then --init that run's folder.
    """
    from dataclasses import replace

    from tinyvl import models, train

    row = models.preset(preset)
    recipe = {
        "epochs": epochs, "batch": batch, "rate": rate, "warmup": warmup,
        "weight_decay": weight_decay,
    }  # fmt: skip
    options = row.options | given(bottleneck=bottleneck, drop=drop, scale=scale)
    if lm is not None and drop is None:
        options.pop("drop", None)  # a preset's layers are counted for its own decoder
    parts = {
        "decoder": local(lm or row.decoder),
        "vision": local(vision or row.vision),
        "fit": fit or row.fit,
        "prompt": prompt or "",
        "options": options,
    }
    if init is not None:
        if given(lm=lm, vision=vision, fit=fit, prompt=prompt, b=bottleneck, d=drop, s=scale):
            raise UserError(
                "--init brings its own --lm, --vision, --fit, --prompt, --bottleneck, --drop and "
                "--scale: leave them out.",
                2,
            )
        parts = models.parts_of(models.read_config(models.checkpoint_folder(init)))
    target = models.choose_device(device)
    dtype = models.choose_precision(precision, target)
    if data is None:
        from tinyvl import draw

        data = str(draw.default_folder())
    job = train.Job(
        method="itune",
        data=os.path.abspath(data),
        **parts,
        recipe=replace(row.recipe, **given(**recipe)),
        val=val and os.path.abspath(val),
        images=images and os.path.abspath(images),
        lang=lang,
        format=format,
        init=init and local(init),
        limit=limit,
        seed=seed,
        max_tokens=max_tokens,
        per_image=per_image,
        precision=models.precision_name(dtype),
    )
    run = train.Run(
        out=out or Path("runs/itune"),
        device=target,
        micro=micro_batch,
        checkpointing=checkpointing,
        cache=not no_cache,
        resume=resume,
        save_every=save_every,
        validate_every=validate_every,
        workers=workers,
        quiet=quiet,
    )
    print(json.dumps(train.train(job, run)))


def given(**options: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def local(name: str) -> str:
    """A folder's whole path, so that a checkpoint finds it from anywhere; names as they are."""
    path = os.path.expanduser(name)
    return os.path.abspath(path) if os.path.isdir(path) else name


def load_model(name: str, device: str | None, precision: str | None):
    from tinyvl import models

    target = models.choose_device(device)
    return models.load(name, device=target, precision=models.choose_precision(precision, target))


@app.command("models")
def list_models(
    as_json: Annotated[bool, typer.Option("--json", help="JSON Lines.")] = False,
) -> None:
    """List presets and backbones: parameters, licence, source, whether they are here."""
    from tinyvl import hub, models

    rows = [
        {
            "name": b.name, "role": b.role, "parameters": b.parameters, "licence": b.licence,
            "source": b.source, "here": hub.available(b.name),
        }
        for b in hub.BACKBONES.values()
    ]  # fmt: skip
    presets = [
        {"name": name, "method": p.method, "decoder": p.decoder, "vision": p.vision, "row": p.row}
        for name, p in models.PRESETS.items()
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
    from tinyvl import hub, models

    wanted = []
    for name in names:
        row = models.PRESETS.get(name) or (models.SMALL if name == "default" else None)
        wanted += [name] if row is None else [row.decoder, row.vision]
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
) -> None:
    """Draw the small licence-free set: shapes, with captions in two languages."""
    from tinyvl import draw

    draw.draw_images(folder, train=train, held_out=held_out, seed=seed)
    print(folder / "drawn.jsonl")


def fail(message: str, status: int) -> NoReturn:
    print(f"tinyvl: {message}", file=sys.stderr)
    sys.exit(status)


def main() -> None:
    """The console script: errors a user can mend become one sentence and an exit status."""
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
