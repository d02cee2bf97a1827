"""`tinyvl train METHOD`: options in, one `presets.Job` and one `presets.Run` out."""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinyvl import UserError
from tinyvl.cli_options import Device, Features, Precision, Workers, given, grouped, local

if TYPE_CHECKING:
    from tinyvl.presets import Preset

app = typer.Typer(no_args_is_help=True, help="Train a method's modules on your data.")


LM = Annotated[str | None, typer.Option(help="Frozen language model: a name or folder.")]
Vision = Annotated[str | None, typer.Option(help="Frozen timm encoder: a name or folder.")]
Prompt = Annotated[str | None, typer.Option(help="Text before every caption or question.")]


@dataclass
class Training:
    """The options of every method: the data, the schedule, and how the run is carried out."""

    data: Annotated[
        str | None,
        typer.Option(
            help="JSON Lines, Karpathy or COCO JSON, Flickr token file, image folder. "
            "(default: a small set that tinyvl draws)"
        ),
    ] = None
    val: Annotated[
        str | None, typer.Option(help="Validation data. (default: the data's own, or 2 % of it)")
    ] = None
    images: Annotated[str | None, typer.Option(help="Folder of the pictures.")] = None
    format: Annotated[str | None, typer.Option(help="Force the data's format.")] = None
    lang: Annotated[str, typer.Option(help="Language of the captions, where records say.")] = "en"
    limit: Annotated[
        str | None,
        typer.Option(
            help="Train on so many records (LilT: pairs), drawn by the seed: 512, 1% or 10%."
        ),
    ] = None
    fit: Annotated[
        str | None,
        typer.Option(help="crop: the encoder's own; squash: the whole; jpeg: made small."),
    ] = None
    views: Annotated[
        int | None,
        typer.Option(min=1, help="Varied views of each picture, one after another by epoch."),
    ] = None
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longer captions are cut.")] = None
    per_image: Annotated[
        int | None, typer.Option(min=1, help="Captions of a picture that share a micro-batch.")
    ] = None
    epochs: Annotated[float | None, typer.Option(min=0, help="Passes over the captions.")] = None
    batch: Annotated[int | None, typer.Option(min=1, help="Captions per optimizer step.")] = None
    micro_batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Captions in memory at once. (default: 64; of LilT 2500 where all that is learnt "
            "reads what is kept of the towers)",
        ),
    ] = None
    rate: Annotated[
        float | None, typer.Option(min=0, help="AdamW's learning rate after warm-up.")
    ] = None
    final_rate: Annotated[float | None, typer.Option(min=0, help="Where the schedule ends.")] = None
    warmup: Annotated[float | None, typer.Option(min=0, max=1, help="As a share of all steps.")] = (
        None
    )
    weight_decay: Annotated[float | None, typer.Option(min=0, help="AdamW's weight decay.")] = None
    average: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=0.99999,
            help="Decay of a moving average of the weights, which is what is saved; 0: none.",
        ),
    ] = None
    seed: Annotated[int, typer.Option(help="Initialisation and order.")] = 0
    init: Annotated[str | None, typer.Option(help="Checkpoint to fine-tune (after VLP, say).")] = (
        None
    )
    out: Annotated[Path | None, typer.Option(help="Checkpoint folder. (default: runs/METHOD)")] = (
        None
    )
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False
    save_every: Annotated[int, typer.Option(min=1, help="Steps between saved states.")] = 100
    validate_every: Annotated[
        int | None, typer.Option(min=1, help="Steps. (default: an epoch)")
    ] = None
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Recompute layers: less memory, slower.")
    ] = False
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Encode pictures anew in each epoch.")
    ] = False
    features: Features = None
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False
    device: Device = None
    precision: Precision = None
    workers: Workers = None

    def recipe(self) -> dict[str, Any]:
        """What was asked for of a `presets.Recipe`."""
        names = ("epochs", "batch", "rate", "final_rate", "warmup", "weight_decay", "average")
        return given(**{name: getattr(self, name) for name in names})


@app.command("itune")
@grouped
def train_itune(
    *,
    preset: Annotated[
        str | None, typer.Option(help="A paper's row, e.g. itune-base; options override it.")
    ] = None,
    lm: LM = None,
    vision: Vision = None,
    bottleneck: Annotated[
        int | None,
        typer.Option(min=1, help="r. (default: 104 with the default decoder, else half its width)"),
    ] = None,
    drop: Annotated[
        int | None, typer.Option(min=0, help="No modules in the first N layers.")
    ] = None,
    scale: Annotated[float | None, typer.Option(help="λ of equation 5.")] = None,
    lower: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Read N stages of a CNN below its last map, too (not the paper). (default: 2 with "
            "the default encoder, else 0)",
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Of the linear layer that reads them. (default: 120 with the default encoder, "
            "else 128)",
        ),
    ] = None,
    larger: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Of a CNN, read the picture enlarged to N pixels, too (not the paper). (default: "
            "390 with the default encoder, else 0)",
        ),
    ] = None,
    dropout: Annotated[
        float | None,
        typer.Option(min=0, max=0.9, help="Of image tokens and what modules read, in training."),
    ] = None,
    prompt: Prompt = None,
    objective: Annotated[
        str | None,
        typer.Option(
            help="likelihood, or cider: self-critical training on the model's own captions, after "
            "likelihood (--init)."
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=2, help="With --objective cider: captions drawn of a picture."),
    ] = None,
    training: Training,
) -> None:
    """I-Tuning: cross-attention modules beside the feed-forwards of a frozen decoder.

    As it stands it trains on a small drawn set, on any machine: an hour of one CPU core, a third of
    it with --drop 19 --bottleneck 288 --lower 0 --larger 0. Prints the summary as JSON. The paper's
    rows: --preset itune-base, itune-medium, itune-large, itune-large-drop18; its VLP is --epochs 10
    on Visual Genome, then --init that run's folder.
    """
    from tinyvl import models, presets

    row = presets.preset(preset, "itune")
    maps = models.maps_read(row, vision, given(lower=lower, larger=larger))
    if rank is not None and "lower" not in maps and training.init is None:
        raise UserError("--rank goes with --lower.", 2)
    sizes = dict(row.options)
    if lm not in (None, row.language):  # a preset's are chosen for its own backbones
        sizes = {name: size for name, size in sizes.items() if name not in ("drop", "bottleneck")}
    if "lower" not in maps or vision not in (None, row.vision):
        sizes.pop("rank", None)
    options = sizes | given(bottleneck=bottleneck, drop=drop, scale=scale, rank=rank)
    parts = starting(
        row, training, options, lm=lm, vision=vision, prompt=prompt, bottleneck=bottleneck,
        drop=drop, scale=scale, lower=lower, rank=rank, larger=larger,
    )  # fmt: skip
    if training.init is None:
        parts["media"] = maps
    parts["options"] |= given(dropout=dropout)
    if objective == "cider" and training.per_image is not None:
        raise UserError("--per-image goes with --objective likelihood; cider has --samples.", 2)
    if objective != "cider" and samples is not None:
        raise UserError("--samples goes with --objective cider.", 2)
    launch(row, parts, training, given(objective=chosen(objective), samples=samples))


ADAPTER = "none, layerwise (in every layer) or deep (one more layer)."
UNLOCK = "Pretrained parameters trained: none, layernorm, bitfit (biases) or all."
LAYERS = "Unlock in these layers only, e.g. 0:5 or 6:-1 (the first to the last)."
DROPOUT = "Of what the projection reads, in training."
POOL = "token (the first) or mean."


@app.command("lilt")
@grouped
def train_lilt(
    *,
    preset: Annotated[
        str | None, typer.Option(help="A paper's row, e.g. lilt-lwa-base; options override it.")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="Text encoder of the BERT family: a name or folder.")
    ] = None,
    vision: Annotated[str | None, typer.Option(help="timm encoder: a name or folder.")] = None,
    text_adapter: Annotated[str | None, typer.Option(help=ADAPTER)] = None,
    image_adapter: Annotated[str | None, typer.Option(help=ADAPTER)] = None,
    text_unlock: Annotated[str | None, typer.Option(help=UNLOCK)] = None,
    image_unlock: Annotated[str | None, typer.Option(help=UNLOCK)] = None,
    text_layers: Annotated[str | None, typer.Option(help=LAYERS)] = None,
    image_layers: Annotated[str | None, typer.Option(help=LAYERS)] = None,
    lock: Annotated[
        str | None,
        typer.Option(
            help="Figure 5's patterns: A4 locks again the 4 deepest text layers and the 4 "
            "shallowest image layers, B4 the others' ends."
        ),
    ] = None,
    text_pool: Annotated[str | None, typer.Option(help=POOL)] = None,
    image_pool: Annotated[str | None, typer.Option(help=POOL)] = None,
    image_width: Annotated[
        int | None, typer.Option(min=64, help="Width of a deep adapter on a CNN's feature map.")
    ] = None,
    text_dropout: Annotated[float | None, typer.Option(min=0, max=1, help=DROPOUT)] = None,
    image_dropout: Annotated[float | None, typer.Option(min=0, max=1, help=DROPOUT)] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.001, max=0.5, help="Where the temperature starts.")
    ] = None,
    learn_temperature: Annotated[
        bool | None,
        typer.Option("--learn-temperature/--fixed-temperature", help="Train it, or leave it."),
    ] = None,
    embed: Annotated[int | None, typer.Option(min=1, help="Width of the common space.")] = None,
    projections: Annotated[
        bool | None, typer.Option("--projections/--locked-projections", help="Train them, or not.")
    ] = None,
    random_init: Annotated[
        bool | None,
        typer.Option("--random-init", help="Towers without pretraining (--preset clip-base)."),
    ] = None,
    size: Annotated[int | None, typer.Option(min=16, help="Pixels of a picture's side.")] = None,
    crops: Annotated[
        bool | None,
        typer.Option(
            "--crops/--no-crops",
            help="A random crop with RandAugment, new in every epoch, or the picture as it is.",
        ),
    ] = None,
    clean: Annotated[
        bool | None,
        typer.Option("--clean/--raw", help="Lower-case captions without punctuation, or as are."),
    ] = None,
    training: Training,
) -> None:
    """LilT: align an image encoder and a text encoder, training little of either.

    As it stands it trains on a small drawn set in minutes, on any machine. Prints the summary as
    JSON. The paper's rows are presets (`tinyvl models`). Its other experiments are options: Figure
    5 --lock, 6 --preset clip-base --random-init, 7 --text bert-base-uncased or --vision
    vit_base_patch16_224.dino, 8 --text prajjwal1/bert-tiny or --vision deit_tiny_patch16_224, 9 and
    10 --limit 5000 and 50000.
    """
    from tinyvl import presets

    row = presets.preset(preset, "lilt")
    sides = {
        "text": given(
            adapter=text_adapter, unlock=text_unlock, pool=text_pool, dropout=text_dropout,
            layers=layers_of(text_layers),
        ),
        "image": given(
            adapter=image_adapter, unlock=image_unlock, pool=image_pool, dropout=image_dropout,
            width=image_width,
            layers=layers_of(image_layers),
        ),
    }  # fmt: skip
    if lock:
        shallow, deep = locked(lock)
        sides["text"]["layers"] = deep if lock[0] in "aA" else shallow
        sides["image"]["layers"] = shallow if lock[0] in "aA" else deep
    more = given(
        embed=embed,
        projections=projections,
        random_init=random_init,
        size=size,
        clean=clean,
        temperature=temperature,
        learn_temperature=learn_temperature,
    )
    options = row.options | more
    for side, changes in sides.items():
        options[side] = row.options.get(side, {}) | changes
    own = {f"{side}_{name}": value for side in sides for name, value in sides[side].items()}
    parts = starting(row, training, options, text=text, vision=vision, **own, **more)
    if training.micro_batch is None:
        learns = any(
            parts["options"].get(side, {}).get(what, "none") != "none"
            for side in sides
            for what in ("unlock", "adapter")
        )
        fresh = training.no_cache or (row.job.get("crops") if crops is None else crops)
        training.micro_batch = 64 if learns or fresh else 2500
    launch(row, parts, training, given(crops=crops))


def chosen(objective: str | None) -> str | None:
    if objective not in (None, "likelihood", "cider"):
        raise UserError(f"--objective is likelihood or cider, not {objective!r}.", 2)
    return objective


def layers_of(text: str | None) -> list[int] | None:
    """ "6:-1" -> [6, -1]."""
    if text is None:
        return None
    try:
        first, last = text.split(":")
        return [int(first), int(last)]
    except ValueError:
        raise UserError(f"Layers are given as FIRST:LAST, e.g. 0:5, not {text!r}.", 2) from None


def locked(pattern: str) -> tuple[list[int], list[int]]:
    """ "A4" -> the layers left when the 4 shallowest are locked, and when the 4 deepest are."""
    if pattern[0] not in "aAbB" or not pattern[1:].isdigit():
        raise UserError(f"--lock is A or B and a number of layers, e.g. A4, not {pattern!r}.", 2)
    number = int(pattern[1:])
    return [number, -1], [0, -1 - number]


def limit_of(text: str | None) -> Any:
    """ "512" -> 512; "1%" stays."""
    if text is None:
        return None
    if text.isdigit() and int(text):
        return int(text)
    try:
        share = float(text.removesuffix("%")) if text.endswith("%") else -1
    except ValueError:
        share = -1
    if not 0 < share <= 100:
        raise UserError(f"--limit is a number, or a percentage like 1%, not {text!r}.", 2)
    return text


def starting(
    row: "Preset", training: Training, options: dict[str, Any], **brought: Any
) -> dict[str, Any]:
    """The parts of a `presets.Job`: the preset's with what was asked for, or those of --init.

    Args:
        options: the method's, for a run without --init.
        brought: what comes with --init, so that it may not be asked for beside it; of these
            ``lm`` or ``text``, ``vision`` and ``prompt`` are parts themselves.

    Raises:
        UserError: one of them is, or --init is a model of another method.
    """
    from tinyvl import models

    brought = given(fit=training.fit, **brought)
    if training.init is None:
        return {
            "language": local(brought.get("lm") or brought.get("text") or row.language),
            "vision": local(brought.get("vision") or row.vision),
            "fit": training.fit or row.fit,
            "prompt": brought.get("prompt", ""),
            "options": options,
        }
    if brought:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in brought)
        raise UserError(f"--init brings its own {names}: leave that out.", 2)
    config = models.read_config(models.checkpoint_folder(training.init, models.task_of(row.method)))
    if config.get("method") != row.method:
        raise UserError(f"{training.init}: a model of another method than {row.method}.", 2)
    return models.parts_of(config)


def launch(
    row: "Preset",
    parts: dict[str, Any],
    training: Training,
    changes: dict[str, Any] | None = None,
    recipe: dict[str, Any] | None = None,
) -> None:
    """Trains what the options say and prints the summary.

    ``changes`` are made to the preset's `presets.Job`, ``recipe`` to its `presets.Recipe`; what
    the command line says of either comes last.
    """
    from tinyvl import models, presets, train
    from tinyvl.device import choose_device, choose_precision, precision_name

    changes = {k: v for k, v in row.job.items() if k != "media"} | (changes or {})
    changes |= given(
        max_tokens=training.max_tokens, per_image=training.per_image, views=training.views
    )
    if changes.get("crops") and (training.views or 1) > 1:
        raise UserError("--crops are new in every epoch, --views a few: give one of them.", 2)
    target = choose_device(training.device)
    dtype = choose_precision(training.precision, target)
    data = training.data
    if data is None:
        from tinyvl import draw_av

        data = str(draw_av.default_folder(models.modality_in(parts.get("media", {}))))
    job = presets.Job(
        method=row.method,
        data=os.path.abspath(data),
        **parts,
        recipe=replace(row.recipe, **(recipe or {}) | training.recipe()),
        val=training.val and os.path.abspath(training.val),
        images=training.images and os.path.abspath(training.images),
        lang=training.lang,
        format=training.format,
        init=training.init and local(training.init),
        limit=limit_of(training.limit),
        seed=training.seed,
        precision=precision_name(dtype),
        **changes,
    )
    run = presets.Run(
        out=training.out or Path("runs") / row.method,
        device=target,
        micro=training.micro_batch or 64,
        checkpointing=training.checkpointing,
        cache=not training.no_cache,
        features=training.features,
        resume=training.resume,
        save_every=training.save_every,
        validate_every=training.validate_every,
        workers=training.workers,
        quiet=training.quiet,
    )
    print(json.dumps(train.train(job, run)))
