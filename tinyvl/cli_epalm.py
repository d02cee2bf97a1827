"""`tinyvl train epalm` and `tinyvl train clipcap`."""

from dataclasses import replace
from typing import Annotated, Any

import typer

from tinyvl import UserError
from tinyvl.cli_options import checked, given, grouped
from tinyvl.cli_train import LM, Prompt, Training, Vision, launch, starting

# Tables 9 and 14 in ranges from 0, the end not included. The authors' code ends one layer early
# (11:23 of OPT-350M's 24 layers, 19:31 of OPT-2.7B's 32).
EXTRACT = (
    "Levels of the encoder that are read, FIRST:END from 0. Tables 9 and 14, of 12: 11:12 (row "
    '"12"), 6:12 ("6 to 12"), 0:12 ("1 to 12"). (default: the last 6)'
)
INJECT = (
    "Layers of the decoder that they go to, FIRST:END. Table 9, of OPT-350M's 24: 12:24 "
    '("12 to 23"), 0:24 ("1 to 23"), 0:1 ("1"). Table 14, of OPT-2.7B\'s 32: 20:32 ("19 to 31"), '
    '0:32 ("1 to 31"), 0:1 ("1"). (default: the last 12, or half of them)'
)


@grouped
def train_epalm(
    *,
    preset: Annotated[
        str | None,
        typer.Option(
            help="A paper's row: epalm, epalm-pt, epalm-lin, epalm-ada, epalm-pt-l, epalm-cc3m, "
            "promptfuse, limber, magma, magma-all, epalm-video, frozenbilm, epalm-audio. With "
            "--lm and --vision: the same method on these."
        ),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="caption, or vqa: questions with answers. (default: caption)")
    ] = None,
    modality: Annotated[
        str | None,
        typer.Option(help="image, video or audio. (default: the preset's, or image)"),
    ] = None,
    lm: LM = None,
    vision: Annotated[
        str | None,
        typer.Option(
            help="Frozen encoder, a name or folder: of pictures timm's or TimeSformer, of videos "
            "the same (timm's: the mean over frames, Table 13), of sounds AST or Whisper."
        ),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Of a video, one from each equal part: in evaluation the middle one, in --crops "
            "and --views a random one. (default: 8 for questions, 16 for captions)",
        ),
    ] = None,
    time_mask: Annotated[
        int | None,
        typer.Option(min=0, help="Widest mask of a sound's frames in --crops and --views: 96."),
    ] = None,
    frequency_mask: Annotated[
        int | None, typer.Option(min=0, help="Widest mask of its mel bins: 24.")
    ] = None,
    shared: Annotated[
        bool | None, typer.Option("--shared/--separate", help="One connection, or a level each.")
    ] = None,
    soft: Annotated[
        int | None, typer.Option(min=0, help="Length of the soft prompt; 0: none.")
    ] = None,
    mlp: Annotated[
        bool | None, typer.Option("--mlp/--no-mlp", help="An MLP behind the soft prompt.")
    ] = None,
    deep: Annotated[
        bool | None, typer.Option("--deep/--shallow", help="A soft prompt in every layer.")
    ] = None,
    adapters: Annotated[
        int | None, typer.Option(min=0, help="Adapters with this factor (the paper's: 8); 0: none.")
    ] = None,
    extract: Annotated[str | None, typer.Option(help=EXTRACT)] = None,
    inject: Annotated[str | None, typer.Option(help=INJECT)] = None,
    tokens: Annotated[
        str | None, typer.Option(help="cls, or all: the encoder's tokens instead of summaries.")
    ] = None,
    unfreeze: Annotated[
        str | None, typer.Option(help="vision, lm or vision,lm: train these too, at 1e-7.")
    ] = None,
    answer_only: Annotated[
        bool | None,
        typer.Option("--answer-only/--whole", help="The loss on the answer, or on all of it."),
    ] = None,
    separator: Annotated[
        str | None,
        typer.Option(
            help='Words between question and answer. (default: a spare row, else " Answer:")'
        ),
    ] = None,
    prompt: Prompt = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="The paper's for a kind of data: gqa, long (Table 10), few-shot, few-shot-100, "
            "video-qa, video-caption, video-zero-shot, audio."
        ),
    ] = None,
    soft_rate: Annotated[
        float | None,
        typer.Option(min=0, help="A fixed rate of soft and deep prompts; 0: the schedule."),
    ] = None,
    adapter_rate: Annotated[
        float | None, typer.Option(min=0, help="A fixed rate of adapters; 0: the schedule.")
    ] = None,
    crops: Annotated[
        bool | None,
        typer.Option(
            "--crops/--no-crops",
            help="As the authors, and new in every epoch (nothing is cached): a random crop with "
            "RandAugment, of videos at random moments, of sounds random masks; or all as it is.",
        ),
    ] = None,
    training: Training,
) -> None:
    """eP-ALM: an encoder's [CLS] tokens in one slot of a frozen decoder's last layers.

    As it stands it trains on a small drawn set in minutes, on any machine. Prints the summary as
    JSON. The paper's rows, with --preset: table 1 the presets; 2 --recipe few-shot and --limit; 3,
    5 and 8 `tinyvl eval vqa`; 9 and 14 --extract and --inject; 10 --recipe long; 11 epalm-cc3m; 12
    --unfreeze; 13 --vision and --frames; 15 --deep and --adapters; 16 --time-mask and
    --frequency-mask; figures 3 to 5 --lm and --vision. The README has each row's command.
    """
    from tinyvl import models, presets

    row = presets.preset(preset, "epalm", checked(modality))
    if task not in (None, "caption", "vqa"):
        raise UserError(f"--task is caption or vqa, not {task!r}.", 2)
    own = given(
        shared=shared, soft=soft, mlp=mlp, deep=deep, adapters=adapters, tokens=tokens,
        extract=range_of("extract", extract), inject=range_of("inject", inject),
        unfreeze=unfreeze and unfreeze.split(","),
    )  # fmt: skip
    asked = given(task=task, answer_only=answer_only, separator=separator)
    parts = starting(
        row, training, row.options | own, lm=lm, vision=vision, prompt=prompt, modality=modality,
        **own,
    )  # fmt: skip
    parts["options"] |= asked  # of --init, too: from captions to questions, say
    if training.init is None:
        media = row.job.get("media", {})
        if modality is not None and modality != models.modality_in(media):
            media = {"modality": modality} if modality != "image" else {}
        parts["media"] = media
    vqa = parts["options"].get("task") == "vqa"
    kind = models.modality_in(parts["media"])
    masks = (time_mask, frequency_mask)
    parts["media"] = parts["media"] | told(kind, vqa, frames, *masks, before=parts["media"])
    if recipe is None and preset is not None and kind != "image":
        recipe = presets.AV_RECIPES[kind, "vqa" if vqa else "caption"]
    job = dict(row.job)
    if preset is not None and kind != "image":
        job.setdefault("crops", True)  # as in the presets of its own
    if training.features is not None:  # which have one view of each
        job = {name: value for name, value in job.items() if name not in ("views", "crops")}
    row = replace(row, job=job)
    fresh = job.get("crops") if crops is None else crops
    several = (training.views or job.get("views", 1)) > 1
    if given(t=time_mask, f=frequency_mask) and not fresh and not several:
        raise UserError("--time-mask and --frequency-mask are laid in --crops and --views.", 2)
    if not vqa and given(answer_only=answer_only, separator=separator):
        raise UserError("--answer-only and --separator go with --task vqa.", 2)
    if vqa and training.per_image is not None:
        raise UserError("--per-image goes with --task caption: a question is read once.", 2)
    if not parts["options"].get("soft", 10) and given(mlp=mlp, deep=deep, rate=soft_rate):
        raise UserError("--mlp, --deep and --soft-rate are about a soft prompt: give --soft 10.", 2)
    if not parts["options"].get("adapters") and adapter_rate is not None:
        raise UserError("--adapter-rate goes with --adapters.", 2)
    if recipe is not None and recipe not in presets.RECIPES:
        raise UserError(f"--recipe is one of {', '.join(presets.RECIPES)}, not {recipe!r}.", 2)
    fixed = dict(row.recipe.fixed)
    for names, value in ((("soft", "deep"), soft_rate), (("adapters",), adapter_rate)):
        for name in names if value is not None else ():
            fixed.pop(name, None)
            if value:
                fixed[name] = value
    if parts["options"].get("unfreeze"):
        fixed |= {"encoder": 1e-7, "decoder": 1e-7}
    changes = {"fixed": fixed, **presets.RECIPES.get(recipe, {})}
    first = changes.get("first_rate", row.recipe.first_rate)
    if training.rate is not None and training.rate < first:
        changes["first_rate"] = 0.0
    launch(row, parts, training, given(crops=crops), changes)


def told(
    kind: str, vqa: bool, frames: int | None, time_mask: int | None, frequency_mask: int | None,
    before: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """What the encoder of a modality is told, and was told ``before``."""
    from tinyvl import presets
    from tinyvl.media_av import MASKS

    if frames is not None and kind != "video":
        raise UserError("--frames goes with --modality video.", 2)
    if given(f=frequency_mask, t=time_mask) and kind != "audio":
        raise UserError("--time-mask and --frequency-mask go with --modality audio.", 2)
    if kind == "video":
        own = before.get("frames", presets.FRAMES["vqa" if vqa else "caption"])
        return {"frames": own if frames is None else frames}
    if kind == "audio":
        own = before.get("masks", MASKS)
        widths = zip((frequency_mask, time_mask), own, strict=True)
        return {"masks": [known if width is None else width for width, known in widths]}
    return {}


@grouped
def train_clipcap(
    *,
    preset: Annotated[
        str | None, typer.Option(help="clipcap or clipcap-transformer; options override it.")
    ] = None,
    lm: LM = None,
    vision: Vision = None,
    mapping: Annotated[str | None, typer.Option(help="mlp or transformer.")] = None,
    length: Annotated[int | None, typer.Option(min=1, help="Of the prefix.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Of the transformer.")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Of the transformer.")] = None,
    prompt: Prompt = None,
    training: Training,
) -> None:
    """ClipCap: a picture's vector mapped to a prefix of a frozen decoder.

    As it stands it trains on a small drawn set in minutes, on any machine. Prints the summary as
    JSON.
    """
    from tinyvl import presets

    row = presets.preset(preset, "clipcap")
    own = given(mapping=mapping, length=length, layers=layers, heads=heads)
    if (row.options | own).get("mapping") != "transformer" and given(layers=layers, heads=heads):
        raise UserError("--layers and --heads go with --mapping transformer.", 2)
    parts = starting(row, training, row.options | own, lm=lm, vision=vision, prompt=prompt, **own)
    launch(row, parts, training)


def range_of(name: str, text: str | None) -> list[int] | None:
    """ "6:12" -> [6, 12]."""
    if text is None:
        return None
    first, _, end = text.partition(":")
    if not (first.isdigit() and end.isdigit()):
        raise UserError(f"--{name} is FIRST:END, e.g. 6:12, not {text!r}.", 2)
    return [int(first), int(end)]
