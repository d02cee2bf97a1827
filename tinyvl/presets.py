"""Presets: the papers' rows, the options, and how the two become a `Job` and a `Run`.

The rows are in `presets_table`, the options in `presets_options`.
"""

import itertools
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from tinyvl import UserError, ranks
from tinyvl.files import local
from tinyvl.hub_table import AST, CONFIGS, TIMESFORMER, architecture, prefix_of
from tinyvl.presets_options import EPalm, Job, Recipe, Run, declared, flag, flat, options_of
from tinyvl.presets_table import AV_RECIPES, FRAMES, PRESETS, RECIPES, SMALL, Preset

__all__ = ["AST", "CONFIGS", "PRESETS", "RECIPES", "SMALL", "TIMESFORMER", "Job", "Preset"]
__all__ += ["Recipe", "Run", "architecture", "encoder_of", "job_of", "preset", "run_of"]


ANEW = ("device", "workers", "quiet")  # options that a resumed run does not take over


def preset(name: str | None, method: str, modality: str | None = None) -> Preset:
    """A preset of a method by name; None is the small recipe that runs everywhere."""
    if name in (None, "small"):
        return SMALL[method if modality in (None, "image") else f"{method}-{modality}"]
    own = [known for known, row in PRESETS.items() if row.method == method]
    if name not in own:
        raise UserError(f"No preset {name!r} of {method}; there are {', '.join(own)}.", 2)
    return PRESETS[name]


def small_defaults(method: str) -> dict[str, Any]:
    """What the small recipe sets, by the options' names: what --help gives as defaults."""
    row = SMALL[method]
    own = vars(row.recipe) | flat(row.options) | row.job | row.job.get("media", {})
    return own | {"language": row.language, "vision": row.vision, "fit": row.fit}


def maps_read(row: Preset, vision: str | None, asked: dict[str, int]) -> dict[str, Any]:
    """Which maps of a CNN are read: the preset's with its own encoder, and what was asked for."""
    own = row.job.get("media", {}) if vision in (None, row.vision) else {}
    maps = {key: own[key] for key in ("lower", "larger") if key in own} | asked
    return {key: value for key, value in maps.items() if value}


def encoder_of(
    name: str | None, vision: str | None, asked: dict[str, Any], *, summaries: bool
) -> tuple[Preset, str, dict[str, Any]]:
    """What `tinyvl features` encodes with: a preset, the modality, and extra encoder options.

    ``vision``: another encoder than the preset's; ``asked``: of modality, frames, lower and larger
    those that were given; ``summaries``: no tokens are kept. UserError: no such preset, or options
    that would do nothing.
    """
    modality = asked.get("modality")
    row = PRESETS.get(name or "") or preset(
        name, "itune" if modality in (None, "image") else "epalm", modality
    )
    kind = modality or row.job.get("media", {}).get("modality", "image")
    if "frames" in asked and kind != "video":
        raise UserError("--frames goes with --modality video.", 2)
    maps = chosen(asked, "lower", "larger")
    if kind == "image" and not summaries:
        return row, kind, maps_read(row, vision, maps)
    if idle := [name for name, value in maps.items() if value]:
        raise UserError(f"--{idle[0]} is about the tokens of pictures.", 2)
    told = {} if kind == "image" else {"modality": kind}
    return row, kind, told | ({"frames": asked.get("frames", 8)} if kind == "video" else {})


def chosen(asked: dict[str, Any], *names: str) -> dict[str, Any]:
    """Of the options that were given those of these names."""
    return {name: asked[name] for name in names if name in asked}


def job_of(method: str, asked: dict[str, Any], start: dict[str, Any] | None = None) -> Job:
    """The preset's job, or the small recipe's, with the options that were given.

    ``asked``: the given options, by their names in `options_of`; ``start``: with --init, the
    checkpoint's parts (`models.start_of`), which stay as they are. UserError: options that do not
    go together, or would do nothing.
    """
    row = preset(asked.get("preset"), method, asked.get("modality"))
    parts = new_parts(method, row, asked) if start is None else kept_parts(row, start, asked)
    kind, task = parts["media"].get("modality", "image"), parts["options"].get("task", "caption")
    parts["media"] |= av_options(kind, task, asked, parts["media"])
    changes = {name: value for name, value in row.job.items() if name != "media"}
    if "preset" in asked and kind != "image":
        changes.setdefault("crops", True)  # as in the presets of videos and sounds
    if method in ("epalm", "itune") and "features" in asked:  # they hold one view of each
        changes = {name: value for name, value in changes.items() if name not in ("views", "crops")}
    changes |= chosen(asked, "crops", *(name for name in declared(Job) if name not in parts))
    check_method(method, asked, parts, changes)
    if changes.get("crops") and asked.get("views", 1) > 1:
        raise UserError("--crops are new in every epoch, --views a few: give one of them.", 2)
    for name in ("data", "val", "images"):
        if name in changes:
            changes[name] = os.path.abspath(changes[name])
    if "init" in changes:
        changes["init"] = local(changes["init"])
    changes.setdefault("data", "")
    recipe = recipe_of(row, asked, parts["options"], kind, task)
    return Job(method=method, recipe=recipe, **parts, **changes)


def own_options(method: str, asked: dict[str, Any], into: str = "options") -> dict[str, Any]:
    """The method's options that were given, by where a `Job` keeps them."""
    own = options_of(method)
    shared = declared(Job, Recipe, Run)
    names = [n for n in asked if n not in shared and own[n].metadata.get("into", "options") == into]
    return chosen(asked, *names)


def new_parts(method: str, row: Preset, asked: dict[str, Any]) -> dict[str, Any]:
    """The model's parts: the preset's, with the options that were given."""
    options, own = dict(row.options), own_options(method, asked)
    media = dict(row.job.get("media", {}))
    if method == "itune":
        media = maps_read(row, asked.get("vision"), own_options(method, asked, "media"))
        if "rank" in asked and "lower" not in media:
            raise UserError("--rank goes with --lower.", 2)
        if asked.get("language", row.language) != row.language:  # sizes chosen for its own decoder
            options = {n: size for n, size in options.items() if n not in ("drop", "bottleneck")}
        if "lower" not in media or asked.get("vision", row.vision) != row.vision:
            options.pop("rank", None)
    elif method == "clipcap":
        media |= own_options(method, asked, "media")
    elif method == "lilt":
        own = towers(options, own, asked.get("lock"))
        if "text_prefix" not in asked:  # the preset's is of its own encoder
            prefix = prefix_of(asked.get("language", row.language))
            own["text"] = {n: v for n, v in own["text"].items() if n != "prefix"}
            own["text"] |= {"prefix": prefix} if prefix else {}
    elif asked.get("modality", media.get("modality", "image")) != media.get("modality", "image"):
        media = {} if asked["modality"] == "image" else {"modality": asked["modality"]}
    return {
        "language": local(asked.get("language", row.language)),
        "vision": local(asked.get("vision", row.vision)),
        "fit": asked.get("fit", row.fit),
        "prompt": asked.get("prompt", ""),
        "options": options | own,
        "media": media,
    }


def kept_parts(row: Preset, start: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """The parts of a checkpoint that a run starts from, with the options that it leaves free.

    A preset that was named may add to LilT's towers what the checkpoint trained nothing of.
    UserError: an option was given that the checkpoint decides.
    """
    method = row.method
    own, ours = options_of(method), declared(Job, Recipe, Run)
    model = {"language", "vision", "fit", "prompt"}
    fixed = [
        flag(name, own[name])
        for name in sorted(asked, key=list(own).index)
        if name in model or not (name in ours or name == "preset" or own[name].metadata.get("free"))
    ]
    if fixed:
        raise UserError(f"--init brings its own {', '.join(fixed)}: leave that out.", 2)
    changes = own_options(method, asked)
    if method == "lilt":
        if "preset" in asked:
            for side, what in itertools.product(("image", "text"), ("adapter", "unlock", "mlp")):
                added = row.options.get(side, {}).get(what)
                if added and start["options"].get(side, {}).get(what) in (None, "none", 0):
                    changes.setdefault(f"{side}_{what}", added)
        changes = towers(start["options"], changes, None)
    options = start["options"] | changes
    return start | {"options": options, "media": dict(start["media"])}


def towers(
    preset: dict[str, Any], own: dict[str, Any], lock: tuple[str, int] | None
) -> dict[str, Any]:
    """LilT's options with each tower's in a dictionary of its own; ``lock`` is Figure 5's."""
    sides = {side: dict(preset.get(side, {})) for side in ("text", "image")}
    rest = {}
    for name, value in own.items():
        side, _, what = name.partition("_")
        if side in sides:
            sides[side][what] = value
        else:
            rest[name] = value
    if lock:
        letter, number = lock
        shallow, deep = [number, -1], [0, -1 - number]  # what is left when these are locked
        sides["text"]["layers"], sides["image"]["layers"] = (
            (deep, shallow) if letter == "A" else (shallow, deep)
        )
    return rest | sides


def av_options(
    kind: str, task: str, asked: dict[str, Any], before: dict[str, Any]
) -> dict[str, Any]:
    """Extra encoder options of videos and sounds; ``before``: the preset's or the checkpoint's."""
    if "frames" in asked and kind != "video":
        raise UserError("--frames goes with --modality video.", 2)
    if chosen(asked, "time_mask", "frequency_mask") and kind != "audio":
        raise UserError("--time-mask and --frequency-mask go with --modality audio.", 2)
    if kind == "video":
        return {"frames": asked.get("frames", before.get("frames", FRAMES[task]))}
    if kind == "audio":
        bins, frames = before.get("masks", (EPalm.frequency_mask, EPalm.time_mask))
        return {"masks": [asked.get("frequency_mask", bins), asked.get("time_mask", frames)]}
    return {}


def check_method(
    method: str, asked: dict[str, Any], parts: dict[str, Any], changes: dict[str, Any]
) -> None:
    """Refuses options that would do nothing."""
    options = parts["options"]
    vqa = options.get("task") == "vqa"
    varied = changes.get("crops") or changes.get("views", 1) > 1
    idle = [
        (not varied, ["time_mask", "frequency_mask"],
         "--time-mask and --frequency-mask are laid in --crops and --views."),
        (changes.get("views", 1) == 1 or parts["media"].get("modality") == "audio",
         ["coarsest"], "--coarsest is about the --views of pictures and videos."),
        ("init" not in asked, ["locked"],
         "--locked is about a tower of the model that --init names."),
        (not vqa, ["answer_only", "separator"],
         "--answer-only and --separator go with --task vqa."),
        (vqa, ["per_image"],
         "--per-image goes with --task caption: a question is read once."),
        (not options.get("soft", 10), ["mlp", "deep", "soft_rate"],
         "--mlp, --deep and --soft-rate are about a soft prompt: give --soft 10."),
        (not options.get("adapters"), ["adapter_rate", "adapt"],
         "--adapter-rate and --adapt go with --adapters."),
        (method == "clipcap" and options.get("mapping") != "transformer", ["layers", "heads"],
         "--layers and --heads go with --mapping transformer."),
        (changes.get("objective") == "cider", ["per_image"],
         "--per-image goes with --objective likelihood; cider has --samples."),
        (changes.get("objective") != "cider", ["samples"],
         "--samples goes with --objective cider."),
    ]  # fmt: skip
    for does_nothing, names, message in idle:
        if does_nothing and chosen(asked, *names):
            raise UserError(message, 2)


def recipe_of(
    row: Preset, asked: dict[str, Any], options: dict[str, Any], kind: str, task: str
) -> Recipe:
    """The preset's recipe, changed for the kind of data and by the options that were given."""
    name = asked.get("recipe")
    if name is None and "preset" in asked and kind != "image":
        name = AV_RECIPES[kind, task]
    if name is not None and name not in RECIPES:
        raise UserError(f"--recipe is one of {', '.join(RECIPES)}, not {name!r}.", 2)
    fixed = dict(row.recipe.fixed)
    for option, modules in (("soft_rate", ("soft", "deep")), ("adapter_rate", ("adapters",))):
        for module in modules if option in asked else ():
            fixed.pop(module, None)
            if asked[option]:
                fixed[module] = asked[option]
    if options.get("unfreeze"):
        fixed |= {"encoder": 1e-7, "decoder": 1e-7}
    recipe = replace(row.recipe, fixed=fixed, **RECIPES.get(name, {}))
    if asked.get("rate", recipe.rate) < recipe.first_rate:
        recipe = replace(recipe, first_rate=0.0)
    return replace(recipe, **chosen(asked, *declared(Recipe)))


def out_of(method: str) -> Path:
    """Where a run lies unless --out says it."""
    return Path("runs") / method


def run_of(job: Job, asked: dict[str, Any], device: Any) -> Run:
    """How the job is carried out."""
    row = preset(asked.get("preset"), job.method, asked.get("modality"))
    own = {"out": out_of(job.method), "cache": row.cache or "features" in asked}
    run = Run(**own | chosen(asked, *declared(Run)) | {"device": device, "asked": kept(job, asked)})
    if "micro" in asked:
        return run
    if str(device).startswith("cuda"):  # what does not fit is cut up
        run.micro = job.recipe.batch
    if job.method == "lilt" and run.cache and not job.crops:
        sides = [job.options.get(side, {}) for side in {"text", "image"} - {job.locked}]
        learns = {side.get(what, "none") for side in sides for what in ("unlock", "adapter")}
        if learns == {"none"}:  # what is learnt reads what is kept of the towers
            run.micro = 2500
    if ranks.size() > 1:  # each has a part of every step
        run.micro = max(1, min(run.micro, job.recipe.batch // ranks.size()))
    return run


def kept(job: Job, asked: dict[str, Any]) -> dict[str, Any]:
    """Of the options that were given those that a resumed run takes over, ready for JSON.

    Not what each run says anew, such as its device; files and folders by their whole paths.
    """
    anew = ("out", "resume", "config", "dry_run", *ANEW)
    whole = {name: getattr(job, name) for name in declared(Job) if isinstance(asked.get(name), str)}
    if "features" in asked:
        whole["features"] = str(Path(asked["features"]).absolute())
    own = {name: value for name, value in asked.items() if name not in anew}
    return own | whole | {"precision": job.precision}
