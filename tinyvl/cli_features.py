"""`tinyvl features DATA --out DIR`: pictures encoded once, for train, eval and caption to read."""

import json
from pathlib import Path
from typing import Annotated

import typer

from tinyvl import UserError
from tinyvl.cli_options import Device, Precision, Workers, checked, given, local


def features(
    data: Annotated[
        list[str], typer.Argument(help="Data sets as `tinyvl train` reads them, image folders.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the features.")],
    preset: Annotated[
        str | None, typer.Option(help="A paper's row: its encoder. Without: the default model's.")
    ] = None,
    vision: Annotated[str | None, typer.Option(help="Frozen encoder: a name or folder.")] = None,
    fit: Annotated[
        str | None,
        typer.Option(help="crop: the encoder's own; squash: the whole; jpeg: made small."),
    ] = None,
    modality: Annotated[
        str | None, typer.Option(help="image, video or audio. (default: the preset's, or image)")
    ] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Of a video. (default: 8)")] = None,
    lower: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Tokens with N stages of a CNN below its last map. (default: 2 with the default "
            "encoder, else 0)",
        ),
    ] = None,
    larger: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Of a CNN, tokens of the picture enlarged to N pixels as well. (default: 390 with "
            "the default encoder, else 0)",
        ),
    ] = None,
    what: Annotated[
        str, typer.Option(help="tokens (I-Tuning reads them), summaries (eP-ALM), or both.")
    ] = "both",
    dtype: Annotated[str, typer.Option(help="On disk: fp16, bf16 or fp32.")] = "fp16",
    split: Annotated[str | None, typer.Option(help="This part of the data only.")] = None,
    images: Annotated[str | None, typer.Option(help="Folder of the pictures.")] = None,
    format: Annotated[str | None, typer.Option(help="Force the data's format.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first pictures only.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures in the encoder at once.")] = 32,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    device: Device = None,
    precision: Precision = None,
    workers: Workers = None,
) -> None:
    """Encode pictures once: token maps and summaries, on disk, for --features DIR elsewhere.

    Says first how much disk it takes. Killed at any moment, it goes on when called again, to the
    same bytes; with more data it adds what is new. Prints the counts as JSON.
    """
    from tinyvl import data as sets
    from tinyvl import models, presets
    from tinyvl.device import choose_device, choose_precision, keep_memory
    from tinyvl.features import contents, extract, load_encoder
    from tinyvl.presets import Run

    method = "itune" if modality in (None, "image") else "epalm"
    row = presets.PRESETS.get(preset) or presets.preset(preset, method, checked(modality))
    kind = modality or models.modality_in(row.job.get("media", {}))
    if frames is not None and kind != "video":
        raise UserError("--frames goes with --modality video.", 2)
    asked, told = given(lower=lower, larger=larger), {}
    if kind != "image" or what == "summaries":
        for name, value in asked.items():
            if value:
                raise UserError(f"--{name} is about the tokens of pictures.", 2)
    else:
        told = models.maps_read(row, vision, asked)
    told |= {} if kind == "image" else {"modality": kind} | given(frames=frames)
    if kind == "video":
        told.setdefault("frames", 8)
    target = choose_device(device)
    dtype_of_encoder = choose_precision(precision, target)
    records = [
        record
        for path in data
        for record in sets.read(path, format=format, split=split, images=images)
    ]
    pictures = list(dict.fromkeys((r.path, r.id) for r in records if r.modality == kind))[:limit]
    if not pictures:
        what = {"image": "pictures", "video": "videos", "audio": "sounds"}[kind]
        raise UserError(f"{', '.join(data)}: no {what} there.", 2)
    keep_memory()
    description, encoder = load_encoder(
        local(vision or row.vision),
        fit or row.fit,
        device=target,
        precision=dtype_of_encoder,
        media=told,
    )
    head = contents(description, encoder, what=what, dtype=dtype)
    run = Run(out, target, workers=workers, quiet=quiet)
    try:
        done = extract(out, pictures, encoder, head, run, batch=batch)
    except KeyboardInterrupt:
        raise UserError("stopped; the same command goes on from here.", 130) from None
    print(json.dumps({"features": str(out), **done}))
    raise typer.Exit(1 if done["failed"] else 0)
