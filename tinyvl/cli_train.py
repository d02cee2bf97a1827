"""`tinyvl train METHOD`: options in, one `train.Job` and one `train.Run` out."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from tinyvl import UserError
from tinyvl.cli_options import Device, Precision, Workers, given, local

app = typer.Typer(no_args_is_help=True, help="Train a method's modules on your data.")


@app.command("itune")
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
    views: Annotated[
        int, typer.Option(min=1, help="Varied views of each picture, one after another by epoch.")
    ] = 1,
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

    row = models.preset(preset, "itune")
    recipe = {
        "epochs": epochs, "batch": batch, "rate": rate, "warmup": warmup,
        "weight_decay": weight_decay,
    }  # fmt: skip
    options = row.options | given(bottleneck=bottleneck, drop=drop, scale=scale)
    if lm is not None and drop is None:
        options.pop("drop", None)  # a preset's layers are counted for its own decoder
    parts = {
        "language": local(lm or row.language),
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
        views=views,
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
