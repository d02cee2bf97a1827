"""The options of training: each is declared here once, with its type, default, help and panel.

Training reads these dataclasses, and `cli_options.grouped` makes the command line of them. Nothing
heavy is imported: `tinyvl --help` reads this file too.
"""

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyvl import UserError

if TYPE_CHECKING:
    import torch


def option(
    panel: str, default: Any, help: str, *, name: str = "", shown: str | None = None,
    parse: Callable[[str], Any] | None = None, choices: tuple[str, ...] = (), **more: Any,
) -> Any:  # fmt: skip
    """A field of a dataclass that is an option of the command line, too.

    Args:
        panel: where --help shows it: a heading of `cli_options.PANELS`.
        default: with MISSING the option has to be given, but in training.
        name: on the command line, where it is not the field's: "--lm", "--out,-o", "--clean/--raw".
        shown: what --help gives as the default, where the value does not say it.
        parse: makes the value of the text; its ValueError says what the text should be.
        choices: the only values.
        more: ``min``, ``max`` and ``metavar``; and of a method's options ``of`` (the methods that
            have it, if not all), ``free`` (a run with --init may change it) and ``into`` (where a
            `Job` keeps it: its "options", its "media", or "" for somewhere else).
    """
    told = {"help": help, "panel": panel, "name": name, "shown": shown, "parse": parse}
    return field(default=default, metadata=told | {"choices": choices} | more)


def span(text: str) -> list[int]:
    """ "6:12" -> [6, 12]."""
    first, _, end = text.partition(":")
    if not (first.isdigit() and end.isdigit()):
        raise ValueError("is FIRST:END, e.g. 6:12")
    return [int(first), int(end)]


def layers(text: str) -> list[int]:
    """ "6:-1" -> [6, -1]."""
    try:
        first, last = map(int, text.split(":"))
    except ValueError:
        raise ValueError("is FIRST:LAST, e.g. 0:5") from None
    return [first, last]


def pattern(text: str) -> tuple[str, int]:
    """ "A4" -> ("A", 4)."""
    if text[:1] not in tuple("aAbB") or not text[1:].isdigit():
        raise ValueError("is A or B and a number of layers, e.g. A4")
    return text[0].upper(), int(text[1:])


def amount(text: str) -> int | str:
    """ "512" -> 512; "1%" stays."""
    if text.isdigit() and int(text):
        return int(text)
    with suppress(ValueError):
        if text.endswith("%") and 0 < float(text[:-1]) <= 100:
            return text
    raise ValueError("is a number, or a percentage like 1%")


def commas(text: str) -> list[str]:
    """ "a, b" -> ["a", "b"]."""
    return [part.strip() for part in text.split(",")]


# fmt: off
@dataclass(frozen=True)
class Recipe:
    """How the weights are trained, by AdamW. The warm-up is a share of all steps."""

    batch: int = option("Recipe", 64, "Captions in an optimizer step.", min=1)
    epochs: float = option("Recipe", 5, "Passes over the captions.", min=0)
    rate: float = option("Recipe", 8e-4, "Learning rate after the warm-up.", min=0)
    final_rate: float = option("Recipe", 0.0, "Learning rate at the end.", min=0)
    first_rate: float = 0.0  # at the start of the warm-up
    warmup: float = option("Recipe", 0.05, "Warm-up's share of all steps.", min=0, max=1)
    weight_decay: float = option("Recipe", 0.01, "Weight decay.", min=0)
    clip: float | None = 1.0  # the gradients' norm is cut to this; None: not cut
    average: float = option("Advanced", 0.0, "Decay of a moving average of the weights, which is "
        "then what is saved; 0: none.", min=0, max=0.99999)
    fixed: dict[str, float] = field(default_factory=dict)  # rates without a schedule, by module


@dataclass
class Job:
    """What decides a run's result. Saved with the checkpoint, compared on resume."""

    method: str
    data: str = option("Data", MISSING, "JSON Lines, Karpathy or COCO JSON, a Flickr token file, "
        "or a folder of pictures.", shown="a small set that tinyvl draws")
    # The decoder, or LilT's text encoder.
    language: str = option("Model", MISSING, "Frozen language model: a name or folder.",
        name="--lm")
    vision: str = option("Model", MISSING, "Frozen timm encoder: a name or folder.")
    fit: str = option("Advanced", MISSING, "How pictures become square. crop: the encoder's own "
        "way; squash: resize the whole; jpeg: squash a small JPEG of it.",
        choices=("crop", "squash", "jpeg"))
    options: dict[str, Any]
    recipe: Recipe
    prompt: str = option("Model", "", "Text before every caption or question.",
        of=("itune", "epalm", "clipcap"))
    val: str | None = option("Data", None, "Validation data.", shown="the data's own, or 2 % of it")
    images: str | None = option("Data", None, "Folder of the pictures, videos or sounds.",
        shown="beside the data")
    lang: str | None = option("Data", "en", "Languages of the captions, if records say: en, "
        "or en,de, or all.")
    format: str | None = option("Advanced", None, "Read the data as this format.",
        shown="recognised")
    init: str | None = option("Model", None, "Checkpoint to start from.")
    locked: str | None = option("Model", None, "text or image: what --init has trained in this "
        "tower stays as it is; its vectors are kept, so that large batches cost little.",
        choices=("text", "image"), of=("lilt",))
    limit: int | str | None = option("Data", None, "Train on this many records (LilT: pairs), "
        "drawn by the seed: 512, 1% or 10%.", parse=amount)
    seed: int = option("Run", 0, "Decides initialisation and order.")
    max_tokens: int = option("Data", 40, "Longest caption; what is cut is counted.", min=1)
    per_image: int = option("Advanced", 5, "Captions of a picture that share a micro-batch.", min=1)
    objective: str = option("Recipe", "likelihood", "likelihood, or cider: reward the model's own "
        "captions (self-critical), after a first run that --init names.",
        choices=("likelihood", "cider"), of=("itune",))
    samples: int = option("Recipe", 5, "With --objective cider: captions drawn of each picture.",
        min=2, of=("itune",))
    views: int = option("Recipe", 1, "Varied views of each picture, one an epoch in turn.", min=1)
    coarsest: int | None = option("Advanced", None, "Of --views: the longer side of the coarsest "
        "ones, in pixels, most of them coarse; 32 for thumbnails.", shown="128, as likely as 256",
        min=8, max=256)
    crops: bool = False  # a random crop of each picture, augmented, new in every epoch
    media: dict[str, Any] = field(default_factory=dict)  # extra encoder options
    precision: str = option("Run", "fp32", "fp32, bf16 or fp16.",
        shown="bf16 where the GPU or CPU is fast at it")

    @property
    def task(self) -> str:
        """What the texts are: "caption", or "vqa" for questions with answers."""
        return self.options.get("task", "caption")

    @property
    def modality(self) -> str:
        """What is captioned, or asked about: "image", "video" or "audio"."""
        return self.media.get("modality", "image")


@dataclass
class Run:
    """How a run is carried out."""

    out: Path = option("Output", MISSING, "Checkpoint folder.", shown="runs/METHOD")
    device: "torch.device" = option("Run", MISSING, "cpu, cuda, cuda:1 or mps.", parse=str,
        shown="the best there is")
    architecture: str | None = option("Model", None, "timm's name for the model in the file of "
        "weights (.safetensors, .pth) that --vision names.")
    random_vision: bool = option("Model", False, "--vision is a name of timm's; random weights, as "
        "a control.", name="--random-init", of=("itune", "epalm", "clipcap"))
    micro: int = option("Run", 64, "Captions in memory at once; what does not fit is cut up. "
        "(default: 64; on a GPU the whole batch; 2500 in LilT with frozen, cached towers)",
        name="--micro-batch", shown="", min=1)
    checkpointing: bool = option("Run", False, "Recompute layers: less memory, slower.")
    # Of what the encoder says of each picture, on disk.
    cache: bool = option("Advanced", True, "Encode pictures anew in each epoch.",
        name=" /--no-cache", shown="")
    features: Path | None = option("Run", None, "Folder that `tinyvl features` made: read it "
        "instead of encoding.")
    resume: bool = option("Output", False, "Continue the run in --out, with the options it has.")
    config: Path | None = option("Run", None, "JSON or TOML file with options, called as here; "
        "those of the command line count more.")
    dry_run: bool = option("Run", False, "Say what would be trained, its steps, memory and disk.")
    save_every: int = option("Advanced", 100, "Steps between saved states.", min=1)
    validate_every: int | None = option("Advanced", None, "Steps between validations.",
        shown="an epoch", min=1)
    workers: int | None = option("Advanced", None, "Processes that decode pictures.",
        shown="by the cores", min=0)
    quiet: bool = option("Output", False, "No progress.")
    stop: list[int] = field(default_factory=list)  # signals received
    asked: dict[str, Any] = field(default_factory=dict)  # the options that a resumed run takes over

    def settings(self) -> dict[str, Any]:
        """What changes the order or the choice of the best weights after all."""
        return {
            "micro": self.micro,
            "cache": self.cache,
            "features": self.features and str(self.features.absolute()),
            "validate_every": self.validate_every,
        }


# The methods' own options. Defaults are their constructors' (a test compares them).


@dataclass
class ITune:
    preset: str | None = option("Model", None, "A paper's row, itune-base say, or itune-default, "
        "the shipped model's shape and recipe; other options override it.", into="")
    bottleneck: int | None = option("Model", None, "Width r of the modules; with another decoder "
        "than the default, half its width.", min=1)
    drop: int = option("Model", 0, "No modules in the first N layers; with another decoder: 0.",
        min=0)
    scale: float = option("Model", 1.0, "λ of equation 5.")
    lower: int = option("Model", 0, "Read N more stages of a CNN below its last map (not the "
        "paper). With another encoder than the default: 0.", min=0, into="media")
    rank: int = option("Advanced", 128, "Rank of the linear layer that reads them. With another "
        "encoder: 128.", min=1)
    larger: int = option("Model", 0, "Read a CNN's picture enlarged to N pixels, too (not the "
        "paper). With another encoder: 0.", min=0, into="media")
    dropout: float = option("Recipe", 0.0, "Dropout of image tokens and of what modules read.",
        min=0, max=0.9, free=True)


@dataclass(kw_only=True)
class EPalm:
    # Tables 9 and 14 in ranges from 0, the end not included. The authors' code ends one layer early
    # (11:23 of OPT-350M's 24 layers, 19:31 of OPT-2.7B's 32).
    preset: str | None = option("Model", None, "A paper's row: epalm, epalm-pt, epalm-lin, "
        "epalm-ada, epalm-pt-l, epalm-cc3m, promptfuse, limber, magma, magma-all, epalm-video, "
        "frozenbilm, epalm-audio; other options override it.", into="")
    task: str = option("Data", "caption", "caption, or vqa: questions with answers.",
        choices=("caption", "vqa"), free=True)
    modality: str = option("Data", "image", "image, video or audio.",
        choices=("image", "video", "audio"), into="", shown="the preset's, or image")
    vision: str = option("Model", MISSING, "Frozen encoder, a name or folder. Pictures: timm's or "
        "TimeSformer; videos: the same (timm's: mean over frames, Table 13); sounds: AST or "
        "Whisper.", into="")
    frames: int | None = option("Data", None, "Frames of a video, one from each equal part: the "
        "middle one, with --crops and --views a random one.", min=1, into="", free=True,
        shown="8 for questions, 16 for captions")
    time_mask: int = option("Advanced", 96, "Widest mask over a sound's frames, in --crops and "
        "--views.", min=0, into="", free=True)
    frequency_mask: int = option("Advanced", 24, "Widest mask over a sound's mel bins.", min=0,
        into="", free=True)
    shared: bool = option("Model", False, "One connection for all levels, or one each.",
        name="--shared/--separate")
    soft: int = option("Model", 10, "Length of the soft prompt; 0: none.", min=0)
    mlp: bool = option("Model", True, "An MLP behind the soft prompt.", name="--mlp/--no-mlp")
    deep: bool = option("Model", False, "A soft prompt in every layer.", name="--deep/--shallow")
    adapters: int | None = option("Model", None, "Adapters with this factor (the paper's: 8); 0: "
        "none.", min=0, shown="0")
    adapt: list[int] | None = option("Advanced", None, "Layers of the decoder with adapters, "
        "FIRST:END. Without a prompt, what the layers below make of a text is computed once.",
        parse=span, shown="all")
    extract: list[int] | None = option("Model", None, 'Levels of the encoder that are read, '
        'FIRST:END from 0. Tables 9 and 14, of 12: 11:12 (row "12"), 6:12 ("6 to 12"), 0:12 ("1 to '
        '12").', parse=span, shown="the last 6")
    inject: list[int] | None = option("Model", None, "Layers of the decoder that they go to, "
        "FIRST:END. Table 9, of OPT-350M's 24: 12:24 (\"12 to 23\"), 0:24 (\"1 to 23\"), 0:1 "
        "(\"1\"). Table 14, of OPT-2.7B's 32: 20:32 (\"19 to 31\"), 0:32 (\"1 to 31\"), 0:1 "
        "(\"1\").", parse=span, shown="the last 12, or half of them")
    tokens: str = option("Model", "cls", "cls, or all: all tokens of the encoder's end instead of "
        "summaries.", choices=("cls", "all"))
    unfreeze: list[str] | None = option("Model", None, "vision, lm or vision,lm: train these too, "
        "at 1e-7.", parse=commas, shown="neither")
    answer_only: bool = option("Recipe", False, "The loss on the answer, or on all of it.",
        name="--answer-only/--whole", free=True)
    separator: str | None = option("Advanced", None, "Words between question and answer.",
        free=True, shown='a spare row, else " Answer:"')
    recipe: str | None = option("Recipe", None, "The paper's recipe for a kind of data: gqa, long "
        "(Table 10), few-shot, few-shot-100, video-qa, video-caption, video-zero-shot, audio.",
        into="", free=True)
    soft_rate: float | None = option("Recipe", None, "Fixed rate of soft and deep prompts; 0: the "
        "schedule.", min=0, into="", free=True, shown="the preset's")
    adapter_rate: float | None = option("Recipe", None, "Fixed rate of adapters; 0: the schedule.",
        min=0, into="", free=True, shown="the preset's")
    crops: bool = option("Recipe", False, "A random crop with RandAugment, of videos at random "
        "moments, of sounds random masks: new in every epoch (nothing is cached), as the authors; "
        "or all as it is.", name="--crops/--no-crops", into="", free=True)


@dataclass
class ClipCap:
    preset: str | None = option("Model", None, "clipcap or clipcap-transformer; other options "
        "override it.", into="")
    mapping: str = option("Model", "mlp", "mlp or transformer.", choices=("mlp", "transformer"))
    length: int = option("Model", 10, "Length of the prefix.", min=1)
    layers: int = option("Model", 8, "Layers of the transformer.", min=1)
    heads: int = option("Model", 8, "Heads of the transformer.", min=1)
    projected: str | None = option("Model", None, "Read CLIP's projection of a picture, as the "
        "authors: plain, or unit (scaled to length one).", choices=("plain", "unit"), into="media",
        shown="what is projected")
    bare: bool = option("Advanced", False, "Texts as the authors': without a begin token, and with "
        "a full stop as their end.", name="--bare/--begun")


@dataclass
class Tuning:
    """What is trained in a tower of LilT, and how its vector is read."""

    adapter: str = option("Model", "none", "none, layerwise (in every layer) or deep (one more "
        "layer).", choices=("none", "layerwise", "deep"), free=True)
    unlock: str = option("Model", "none", "Pretrained parameters to train: none, layernorm, bitfit "
        "(biases) or all.", choices=("none", "layernorm", "bitfit", "all"), free=True)
    layers: list[int] | None = option("Advanced", None, "Unlock these layers only, e.g. 0:5 or "
        "6:-1 (the first to the last).", parse=layers, free=True)
    pool: str | None = option("Advanced", None, "token (the first) or mean.",
        choices=("token", "mean"), shown="token where there is one")
    dropout: float = option("Recipe", 0.0, "Dropout of what the projection reads.", min=0, max=1,
        free=True)


@dataclass
class TextTuning(Tuning):
    prefix: str = option("Advanced", "", "Every text begins with this.",
        shown="'query: ' for e5, else nothing")


@dataclass
class ImageTuning(Tuning):
    width: int = option("Advanced", 384, "Width of a deep adapter on a CNN's feature map.", min=64)
    mlp: int = option("Model", 0, "Width of an MLP beside the image's projection (not the paper). "
        "0: none.", min=0, free=True)
    blurred: int = option("Model", 0, "Read blurred pictures, as enlarged ones are, at N pixels, "
        "too (not the paper; CNNs). 0: no.", min=0, free=True)


@dataclass(kw_only=True)
class LilT:
    text: TextTuning  # --text-adapter and so on
    image: ImageTuning
    preset: str | None = option("Model", None, "A paper's row, e.g. lilt-lwa-base (`tinyvl models` "
        "lists them); other options override it.", into="")
    language: str = option("Model", MISSING, "Text encoder of the BERT family: a name or folder.",
        name="--text", into="")
    vision: str = option("Model", MISSING, "timm encoder: a name or folder.", into="")
    lock: tuple[str, int] | None = option("Advanced", None, "Figure 5's patterns: A4 locks the 4 "
        "deepest text layers and the 4 shallowest image layers again, B4 the other ends.",
        parse=pattern, into="")
    temperature: float = option("Recipe", 0.07, "Temperature at the start.", min=0.001, max=0.5)
    learn_temperature: bool = option("Recipe", True, "Train the temperature, or leave it.",
        name="--learn-temperature/--fixed-temperature")
    embed: int = option("Model", 256, "Width of the common space.", min=1)
    projections: bool = option("Advanced", True, "Train the projections, or not.",
        name="--projections/--locked-projections")
    random_init: bool = option("Model", False, "Start from untrained towers (--preset clip-base).")
    size: int | None = option("Model", None, "Pixels of a picture's side.", min=16,
        shown="the encoder's")
    crops: bool = option("Recipe", False, "A random crop with RandAugment, new in every epoch, or "
        "the picture as it is.", name="--crops/--no-crops", into="", free=True)
    clean: bool = option("Data", False, "Lower-case captions without punctuation, or as they are.",
        name="--clean/--raw")
    token_types: bool = option("Advanced", True, "BERT adds its token-type embedding, or not, as "
        "in the authors' code.", name="--token-types/--no-token-types")


# fmt: on
METHODS: dict[str, type] = {"itune": ITune, "epalm": EPalm, "clipcap": ClipCap, "lilt": LilT}


def declared(*classes: type) -> dict[str, Field]:
    """The options of dataclasses by name, a tower's as "text_adapter"; later classes count more."""
    found: dict[str, Field] = {}
    for own in (own for cls in classes for own in fields(cls)):
        if own.type in (TextTuning, ImageTuning):
            found |= {f"{own.name}_{name}": of for name, of in declared(own.type).items()}
        elif "help" in own.metadata:
            found[own.name] = own
    return found


def options_of(method: str) -> dict[str, Field]:
    """The options of `tinyvl train METHOD`."""
    own = declared(Job, Recipe, Run, METHODS[method])
    own = {"preset": own.pop("preset")} | own
    return {name: of for name, of in own.items() if method in of.metadata.get("of", (method,))}


def flat(options: dict[str, Any]) -> dict[str, Any]:
    """A method's options by name, a tower's as in `declared`: "text_adapter"."""
    towers = [(side, own) for side, own in options.items() if isinstance(own, dict)]
    return options | {f"{side}_{name}": own[name] for side, own in towers for name in own}


def check_choice(name: str, of: Field, value: Any) -> None:
    """Raises a UserError for a value that is none of an option's choices."""
    choices = of.metadata["choices"]
    if choices and value not in (None, *choices):
        raise UserError(
            f"{flag(name, of)} is {', '.join(choices[:-1])} or {choices[-1]}, not {value!r}.", 2
        )


def check_choices(method: str, options: dict[str, Any]) -> None:
    """`check_choice` for a method's options as a checkpoint has them."""
    own = flat(options)
    for name, of in declared(METHODS[method]).items():
        check_choice(name, of, own.get(name))


def flag(name: str, of: Field) -> str:
    """An option as it is typed: "--max-tokens"."""
    typed = of.metadata["name"] or f"--{name.replace('_', '-')}"
    return next(filter(None, re.split("[,/ ]", typed)))
