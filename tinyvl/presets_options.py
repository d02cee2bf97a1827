"""The options of training: each is declared here once, with its type, default, help and panel.

Training reads these dataclasses, and `cli_options.grouped` makes the command line of them. Nothing
heavy is imported: `tinyvl --help` reads this file too.
"""

import re
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def option(
    default: Any = MISSING,
    help: str = "",
    *,
    panel: str = "Advanced",
    name: str = "",
    shown: str | None = None,
    parse: Callable[[str], Any] | None = None,
    choices: tuple[str, ...] = (),
    **more: Any,
) -> Any:
    """A field of a dataclass that is an option of the command line, too.

    Args:
        default: without one the option has to be given.
        panel: where --help shows it: a heading of `cli_options.PANELS`.
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
    try:
        share = float(text.removesuffix("%")) if text.endswith("%") else -1
    except ValueError:
        share = -1
    if not 0 < share <= 100:
        raise ValueError("is a number, or a percentage like 1%")
    return text


def commas(text: str) -> list[str]:
    """ "a, b" -> ["a", "b"]."""
    return [part.strip() for part in text.split(",")]


CAPTIONERS = ("itune", "epalm", "clipcap")


@dataclass(frozen=True)
class Recipe:
    """How the weights are trained, by AdamW. The warm-up is a share of all steps."""

    batch: int = option(64, "Captions in an optimizer step.", panel="Recipe", min=1)
    epochs: float = option(5, "Passes over the captions.", panel="Recipe", min=0)
    rate: float = option(8e-4, "Learning rate after the warm-up.", panel="Recipe", min=0)
    final_rate: float = option(0.0, "Learning rate at the end.", panel="Recipe", min=0)
    first_rate: float = 0.0  # at the start of the warm-up
    warmup: float = option(0.05, "Warm-up's share of all steps.", panel="Recipe", min=0, max=1)
    weight_decay: float = option(0.01, "Weight decay.", panel="Recipe", min=0)
    clip: float | None = 1.0  # the gradients' norm is cut to this; None: not cut
    average: float = option(
        0.0, "Decay of a moving average of the weights, which is then what is saved; 0: none.",
        min=0, max=0.99999,
    )  # fmt: skip
    fixed: dict[str, float] = field(default_factory=dict)  # rates without a schedule, by module


@dataclass
class Job:
    """What decides a run's result. Saved with the checkpoint, compared on resume."""

    method: str
    data: str = option(
        help="JSON Lines, Karpathy or COCO JSON, a Flickr token file, or a folder of pictures.",
        panel="Data", shown="a small set that tinyvl draws",
    )  # fmt: skip
    language: str = option(  # the decoder, or LilT's text encoder
        help="Frozen language model: a name or folder.", panel="Model", name="--lm"
    )
    vision: str = option(help="Frozen timm encoder: a name or folder.", panel="Model")
    fit: str = option(
        help="How pictures become square. crop: the encoder's own way; squash: resize the whole; "
        "jpeg: squash a small JPEG of it.",
        choices=("crop", "squash", "jpeg"),
    )
    options: dict[str, Any]
    recipe: Recipe
    prompt: str = option("", "Text before every caption or question.", panel="Model", of=CAPTIONERS)
    val: str | None = option(
        None, "Validation data.", panel="Data", shown="the data's own, or 2 % of it"
    )
    images: str | None = option(
        None, "Folder of the pictures, videos or sounds.", panel="Data", shown="beside the data"
    )
    lang: str | None = option("en", "Language of the captions, if records say.", panel="Data")
    format: str | None = option(None, "Read the data as this format.", shown="recognised")
    init: str | None = option(None, "Checkpoint to start from.", panel="Model")
    limit: int | str | None = option(  # of the training records; "1%": a share of them
        None, "Train on this many records (LilT: pairs), drawn by the seed: 512, 1% or 10%.",
        panel="Data", parse=amount,
    )  # fmt: skip
    seed: int = option(0, "Decides initialisation and order.", panel="Run")
    max_tokens: int = option(40, "Longest caption; longer ones are cut.", panel="Data", min=1)
    per_image: int = option(5, "Captions of a picture that share a micro-batch.", min=1)
    objective: str = option(
        "likelihood",
        "likelihood, or cider: reward the model's own captions (self-critical), after a first run "
        "that --init names.",
        panel="Recipe", choices=("likelihood", "cider"), of=("itune",),
    )  # fmt: skip
    samples: int = option(
        5, "With --objective cider: captions drawn of each picture.",
        panel="Recipe", min=2, of=("itune",),
    )  # fmt: skip
    views: int = option(  # 1: the picture itself
        1, "Varied views of each picture, one an epoch in turn.", panel="Recipe", min=1
    )
    crops: bool = False  # a random crop of each picture, augmented, new in every epoch
    media: dict[str, Any] = field(default_factory=dict)  # extra encoder options
    precision: str = option(
        "fp32", "fp32, bf16 or fp16.", panel="Run", shown="bf16 on a GPU, fp32 on a CPU"
    )

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

    out: Path = option(help="Checkpoint folder.", panel="Output", shown="runs/METHOD")
    device: "torch.device" = option(
        help="cpu, cuda, cuda:1 or mps.", panel="Run", parse=str, shown="the best there is"
    )
    micro: int = option(
        64, "Captions in memory at once. (default: 64; 2500 in LilT with frozen, cached towers)",
        panel="Run", name="--micro-batch", shown="", min=1,
    )  # fmt: skip
    checkpointing: bool = option(False, "Recompute layers: less memory, slower.", panel="Run")
    cache: bool = option(  # of the encoder's tokens, on disk
        True, "Encode pictures anew in each epoch.", panel="Run", name=" /--no-cache", shown=""
    )
    features: Path | None = option(
        None, "Folder that `tinyvl features` made: read it instead of encoding.", panel="Run"
    )
    resume: bool = option(False, "Continue the run in --out.", panel="Output")
    save_every: int = option(100, "Steps between saved states.", panel="Advanced", min=1)
    validate_every: int | None = option(None, "Steps between validations.", shown="an epoch", min=1)
    workers: int | None = option(
        None, "Processes that decode pictures.", shown="by the cores", min=0
    )
    quiet: bool = option(False, "No progress.", panel="Output")
    stop: list[int] = field(default_factory=list)  # signals received

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
    preset: str | None = option(
        None, "A paper's row, itune-base say; other options override it.", panel="Model", into=""
    )
    bottleneck: int | None = option(
        None, "Width r of the modules; with another decoder than the default, half its width.",
        panel="Model", min=1,
    )  # fmt: skip
    drop: int = option(0, "No modules in the first N layers.", panel="Model", min=0)
    scale: float = option(1.0, "λ of equation 5.", panel="Model")
    lower: int = option(
        0, "Read N more stages of a CNN below its last map (not the paper). With another encoder "
        "than the default: 0.",
        panel="Model", min=0, into="media",
    )  # fmt: skip
    rank: int = option(
        128, "Rank of the linear layer that reads them. With another encoder: 128.", min=1
    )
    larger: int = option(
        0, "Read a CNN's picture enlarged to N pixels, too (not the paper). With another encoder: "
        "0.",
        panel="Model", min=0, into="media",
    )  # fmt: skip
    dropout: float = option(
        0.0, "Dropout of image tokens and of what modules read.",
        panel="Recipe", min=0, max=0.9, free=True,
    )  # fmt: skip


@dataclass(kw_only=True)
class EPalm:
    # Tables 9 and 14 in ranges from 0, the end not included. The authors' code ends one layer early
    # (11:23 of OPT-350M's 24 layers, 19:31 of OPT-2.7B's 32).
    preset: str | None = option(
        None, "A paper's row: epalm, epalm-pt, epalm-lin, epalm-ada, epalm-pt-l, epalm-cc3m, "
        "promptfuse, limber, magma, magma-all, epalm-video, frozenbilm, epalm-audio; other options "
        "override it.",
        panel="Model", into="",
    )  # fmt: skip
    task: str = option(
        "caption", "caption, or vqa: questions with answers.",
        panel="Data", choices=("caption", "vqa"), free=True,
    )  # fmt: skip
    modality: str = option(
        "image", "image, video or audio.",
        panel="Data", choices=("image", "video", "audio"), into="", shown="the preset's, or image",
    )  # fmt: skip
    vision: str = option(
        help="Frozen encoder, a name or folder. Pictures: timm's or TimeSformer; videos: the same "
        "(timm's: mean over frames, Table 13); sounds: AST or Whisper.",
        panel="Model", into="",
    )  # fmt: skip
    frames: int | None = option(
        None, "Frames of a video, one from each equal part: the middle one, with --crops and "
        "--views a random one.",
        panel="Data", min=1, into="", free=True, shown="8 for questions, 16 for captions",
    )  # fmt: skip
    time_mask: int = option(
        96, "Widest mask over a sound's frames, in --crops and --views.",
        min=0, into="", free=True,
    )  # fmt: skip
    frequency_mask: int = option(
        24, "Widest mask over a sound's mel bins.", min=0, into="", free=True
    )
    shared: bool = option(
        False, "One connection for all levels, or one each.",
        panel="Model", name="--shared/--separate",
    )  # fmt: skip
    soft: int = option(10, "Length of the soft prompt; 0: none.", panel="Model", min=0)
    mlp: bool = option(True, "An MLP behind the soft prompt.", panel="Model", name="--mlp/--no-mlp")
    deep: bool = option(
        False, "A soft prompt in every layer.", panel="Model", name="--deep/--shallow"
    )
    adapters: int | None = option(
        None, "Adapters with this factor (the paper's: 8); 0: none.",
        panel="Model", min=0, shown="0",
    )  # fmt: skip
    extract: list[int] | None = option(
        None, "Levels of the encoder that are read, FIRST:END from 0. Tables 9 and 14, of 12: "
        '11:12 (row "12"), 6:12 ("6 to 12"), 0:12 ("1 to 12").',
        panel="Model", parse=span, shown="the last 6",
    )  # fmt: skip
    inject: list[int] | None = option(
        None, "Layers of the decoder that they go to, FIRST:END. Table 9, of OPT-350M's 24: "
        '12:24 ("12 to 23"), 0:24 ("1 to 23"), 0:1 ("1"). Table 14, of OPT-2.7B\'s 32: '
        '20:32 ("19 to 31"), 0:32 ("1 to 31"), 0:1 ("1").',
        panel="Model", parse=span, shown="the last 12, or half of them",
    )  # fmt: skip
    tokens: str = option(
        "cls", "cls, or all: all tokens of the encoder's end instead of summaries.",
        panel="Model", choices=("cls", "all"),
    )  # fmt: skip
    unfreeze: list[str] | None = option(
        None, "vision, lm or vision,lm: train these too, at 1e-7.",
        panel="Model", parse=commas, shown="neither",
    )  # fmt: skip
    answer_only: bool = option(
        False, "The loss on the answer, or on all of it.",
        panel="Recipe", name="--answer-only/--whole", free=True,
    )  # fmt: skip
    separator: str | None = option(
        None, "Words between question and answer.", free=True, shown='a spare row, else " Answer:"'
    )
    recipe: str | None = option(
        None, "The paper's recipe for a kind of data: gqa, long (Table 10), few-shot, "
        "few-shot-100, video-qa, video-caption, video-zero-shot, audio.",
        panel="Recipe", into="", free=True,
    )  # fmt: skip
    soft_rate: float | None = option(
        None, "Fixed rate of soft and deep prompts; 0: the schedule.",
        panel="Recipe", min=0, into="", free=True, shown="the preset's",
    )  # fmt: skip
    adapter_rate: float | None = option(
        None, "Fixed rate of adapters; 0: the schedule.",
        panel="Recipe", min=0, into="", free=True, shown="the preset's",
    )  # fmt: skip
    crops: bool = option(
        False, "A random crop with RandAugment, of videos at random moments, of sounds random "
        "masks: new in every epoch (nothing is cached), as the authors; or all as it is.",
        panel="Recipe", name="--crops/--no-crops", into="", free=True,
    )  # fmt: skip


@dataclass
class ClipCap:
    preset: str | None = option(
        None, "clipcap or clipcap-transformer; other options override it.", panel="Model", into=""
    )
    mapping: str = option(
        "mlp", "mlp or transformer.", panel="Model", choices=("mlp", "transformer")
    )
    length: int = option(10, "Length of the prefix.", panel="Model", min=1)
    layers: int = option(8, "Layers of the transformer.", panel="Model", min=1)
    heads: int = option(8, "Heads of the transformer.", panel="Model", min=1)


@dataclass
class Tower:
    """What is trained of a tower of LilT."""

    adapter: str = option(
        "none", "none, layerwise (in every layer) or deep (one more layer).",
        panel="Model", choices=("none", "layerwise", "deep"),
    )  # fmt: skip
    unlock: str = option(
        "none", "Pretrained parameters to train: none, layernorm, bitfit (biases) or all.",
        panel="Model", choices=("none", "layernorm", "bitfit", "all"),
    )  # fmt: skip
    layers: list[int] | None = option(
        None, "Unlock these layers only, e.g. 0:5 or 6:-1 (the first to the last).", parse=layers
    )
    pool: str | None = option(
        None, "token (the first) or mean.", choices=("token", "mean"),
        shown="token where there is one",
    )  # fmt: skip
    dropout: float = option(
        0.0, "Dropout of what the projection reads.", panel="Recipe", min=0, max=1
    )


@dataclass
class ImageTower(Tower):
    width: int = option(384, "Width of a deep adapter on a CNN's feature map.", min=64)


@dataclass(kw_only=True)
class LilT:
    text: Tower  # --text-adapter and so on
    image: ImageTower
    preset: str | None = option(
        None, "A paper's row, e.g. lilt-lwa-base (`tinyvl models` lists them); other options "
        "override it.",
        panel="Model", into="",
    )  # fmt: skip
    language: str = option(
        help="Text encoder of the BERT family: a name or folder.",
        panel="Model", name="--text", into="",
    )  # fmt: skip
    vision: str = option(help="timm encoder: a name or folder.", panel="Model", into="")
    lock: tuple[str, int] | None = option(
        None, "Figure 5's patterns: A4 locks the 4 deepest text layers and the 4 shallowest image "
        "layers again, B4 the other ends.",
        parse=pattern, into="",
    )  # fmt: skip
    temperature: float = option(
        0.07, "Temperature at the start.", panel="Recipe", min=0.001, max=0.5
    )
    learn_temperature: bool = option(
        True, "Train the temperature, or leave it.",
        panel="Recipe", name="--learn-temperature/--fixed-temperature",
    )  # fmt: skip
    embed: int = option(256, "Width of the common space.", panel="Model", min=1)
    projections: bool = option(
        True, "Train the projections, or not.", name="--projections/--locked-projections"
    )
    random_init: bool = option(
        False, "Start from untrained towers (--preset clip-base).", panel="Model"
    )
    size: int | None = option(
        None, "Pixels of a picture's side.", panel="Model", min=16, shown="the encoder's"
    )
    crops: bool = option(
        False, "A random crop with RandAugment, new in every epoch, or the picture as it is.",
        panel="Recipe", name="--crops/--no-crops", into="", free=True,
    )  # fmt: skip
    clean: bool = option(
        False, "Lower-case captions without punctuation, or as they are.",
        panel="Data", name="--clean/--raw",
    )  # fmt: skip


METHODS: dict[str, type] = {"itune": ITune, "epalm": EPalm, "clipcap": ClipCap, "lilt": LilT}


def declared(*classes: type) -> dict[str, Field]:
    """The options of dataclasses by name, a tower's as "text_adapter"; later classes count more."""
    found: dict[str, Field] = {}
    for own in (own for cls in classes for own in fields(cls)):
        if own.type in (Tower, ImageTower):
            found |= {f"{own.name}_{name}": of for name, of in declared(own.type).items()}
        elif "help" in own.metadata:
            found[own.name] = own
    return found


def options_of(method: str) -> dict[str, Field]:
    """The options of `tinyvl train METHOD`."""
    own = declared(Job, Recipe, Run, METHODS[method])
    own = {"preset": own.pop("preset")} | own
    return {name: of for name, of in own.items() if method in of.metadata.get("of", (method,))}


def flag(name: str, of: Field) -> str:
    """An option as it is typed: "--max-tokens"."""
    typed = of.metadata["name"] or f"--{name.replace('_', '-')}"
    return next(filter(None, re.split("[,/ ]", typed)))
