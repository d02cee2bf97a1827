"""How the command line is made of dataclasses, and the options that several commands share."""

import inspect
import os
import stat
import sys
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, is_dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_origin

import typer
import typer.core

from tinyvl import UserError, ranks
from tinyvl.presets import small_defaults
from tinyvl.presets_options import Job, Run, check_choice, declared, flag, option, options_of
from tinyvl.text import ANSWERS

if TYPE_CHECKING:
    from tinyvl.decode import Style
    from tinyvl.models import Checkpoint

PANELS = ("Data", "Model", "Recipe", "Run", "Decoding", "Output", "Advanced")  # in this order


class Command(typer.core.TyperCommand):
    """A command whose --help stands with the options that hardly anyone needs."""

    def get_params(self, ctx: Any) -> list:
        params = super().get_params(ctx)
        params[-1].rich_help_panel = PANELS[-1]
        return params


def group(help: str = "") -> typer.Typer:
    """A group of commands, or without help what a module adds to the first level."""
    return typer.Typer(
        help=help, no_args_is_help=True, add_completion=False, rich_markup_mode="rich"
    )


def command(app: typer.Typer, name: str) -> Callable[[Callable], Callable]:
    """Makes a function the command ``name`` of ``app``, with options as in `grouped`."""

    def add(function: Callable) -> Callable:
        paragraphs = (inspect.getdoc(function) or "").split("\n\n")
        text = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
        app.command(name, cls=Command, help=text.replace("[", "\\["))(grouped(function))
        return function

    return add


@dataclass
class Taken:
    """What a parameter of a command takes from the command line."""

    options: dict[str, Field]
    make: Callable[[dict[str, Any]], Any]  # of the options that were given, the parameter's value
    shown: dict[str, Any]  # defaults for --help, where they are not the fields'
    needed: bool = True  # options without a default have to be given


def taken(parameter: inspect.Parameter) -> Taken | None:
    """None: the parameter is Typer's own."""
    kind, default = parameter.annotation, parameter.default
    if is_dataclass(kind):
        own = {} if default is parameter.empty else vars(default)

        def make(asked: dict[str, Any]) -> Any:
            made = kind(**own | asked)
            if hasattr(made, "given"):
                made.given = asked
            return made

        return Taken(declared(kind), make, own)
    if get_origin(kind) is Annotated and kind.__origin__ is dict:
        method = kind.__metadata__[0]
        return Taken(options_of(method), lambda asked: asked, small_defaults(method), needed=False)
    if isinstance(default, Field):
        name = parameter.name
        default.type = kind
        return Taken({name: default}, lambda asked: asked.get(name, default.default), {})
    return None


def grouped(function: Callable) -> Callable:
    """A command made of a function, whose parameters say what options it has.

    - ``part: Part``, a dataclass: its fields' options; the function gets an instance. A default
      instance has the command's own defaults; a field ``given`` gets the options that were given.
    - ``asked: Annotated[dict, METHOD]``: all options of that method's training; the function gets
      a dictionary of those that were given.
    - ``batch: int = option(...)``: that option.
    - all else is Typer's.
    """
    own, groups = [], {}
    for parameter in inspect.signature(function).parameters.values():
        if found := taken(parameter):
            groups[parameter.name] = found
        else:
            own.append(parameter.replace(kind=parameter.KEYWORD_ONLY))
    options = {name: of for found in groups.values() for name, of in found.options.items()}
    made = [
        typer_option(name, of, found.shown.get(name), found.needed)
        for found in groups.values()
        for name, of in found.options.items()
    ]
    made.sort(key=lambda one: PANELS.index(options[one.name].metadata["panel"]))

    @wraps(function)
    def run(**told: Any) -> Any:
        given = {n: value_of(n, of, told[n]) for n, of in options.items() if told[n] is not None}
        values = {parameter.name: told[parameter.name] for parameter in own}
        for name, found in groups.items():
            values[name] = found.make({n: given[n] for n in found.options if n in given})
        return function(**values)

    signature = inspect.Signature(own + made)
    run.__signature__ = signature  # type: ignore[attr-defined]
    run.__annotations__ = {name: one.annotation for name, one in signature.parameters.items()}
    return run


def typer_option(name: str, of: Field, shown: Any, needed: bool) -> inspect.Parameter:
    """Typer's option of a field. None, which --help does not show, says that it was not given."""
    told = of.metadata
    kind = str if told["parse"] else of.type
    names = told["name"].split(",") if told["name"] else [flag(name, of)]
    default = default_text(of, shown)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=... if needed and of.default is MISSING else None,
        annotation=Annotated[
            kind | None,
            typer.Option(
                *names,
                help=told["help"] + (f" (default: {default})" if default else ""),
                metavar=told.get("metavar"),
                rich_help_panel=told["panel"],
                show_default=False,
                autocompletion=completer(name, of),
            ),
        ],
    )


def known_names(incomplete: str) -> list[str]:
    """Presets and backbones that begin so: for a shell to complete."""
    from tinyvl.hub_table import BACKBONES
    from tinyvl.presets import PRESETS

    return [name for name in ("default", *PRESETS, *BACKBONES) if name.startswith(incomplete)]


def completer(name: str, of: Field) -> Callable[[str], list[str]] | None:
    """What a shell offers for an option's value; None: files."""
    if choices := of.metadata["choices"]:
        return lambda incomplete: [word for word in choices if word.startswith(incomplete)]
    return known_names if name in ("preset", "language", "vision", "model") else None


def default_text(of: Field, shown: Any) -> str:
    """What --help gives as the default: ``shown`` if there is such, or the field's."""
    if shown is None:
        shown = of.default if of.metadata["shown"] is None else of.metadata["shown"]
    if isinstance(shown, bool):
        yes, _, no = of.metadata["name"].partition("/")
        return (yes if shown else no).removeprefix("--") if yes and no else ""
    if shown is None or shown is MISSING:
        return ""
    return f"{shown:g}" if isinstance(shown, float) else str(shown)


def value_of(name: str, of: Field, value: Any) -> Any:
    """The value of what was given, or a UserError that says what it has to be."""
    told, typed = of.metadata, flag(name, of)
    if told["parse"]:
        try:
            value = told["parse"](value)
        except ValueError as error:
            raise UserError(f"{typed} {error}, not {value!r}.", 2) from None
    check_choice(name, of, value)
    for word, bound, sign in (("least", told.get("min"), 1), ("most", told.get("max"), -1)):
        if bound is not None and not value * sign >= bound * sign:
            raise UserError(f"{typed} is at {word} {bound:g}, not {value:g}.", 2)
    return value


# Options of several commands.


def same(cls: type, name: str, default: Any = None, **changes: Any) -> Any:
    """An option that a dataclass of training declares, with a default of its own."""
    return field(default=default, metadata=dict(declared(cls)[name].metadata) | changes)


def batch_of(size: int = 16) -> Any:
    return option("Run", size, "Pictures in the model at once.", min=1)


MODEL = option("Model", "default", "Checkpoint folder, hf://owner/name, or default.", shown="",
    name="--model,-m")  # fmt: skip
AS_JSON = option("Output", False, "JSON instead of text.", name="--json")
FEATURES = same(Run, "features")
FRAMES = option("Data", None, "Frames of a video.", shown="as in training, or 8", min=1)
PROMPTS = option("Model", None, "Sentence with {} for the class (\"a photo of the number {}\" "
    "suits SVHN), a file of them, or clip for CLIP's seven. Several are averaged.", name="--prompt",
    shown='"a photo of a {}"')  # fmt: skip


@dataclass
class Place:
    """Where a model runs."""

    device: str | None = same(Run, "device")
    precision: str | None = same(Job, "precision")
    workers: int | None = same(Run, "workers")


@dataclass
class Lines:
    """Paths in, lines out."""

    out: Path | None = option("Output", None, "Write to this file instead of standard output.",
        name="--out,-o")  # fmt: skip
    as_json: bool = option("Output", False, "JSON Lines.", name="--json")
    resume: bool = option("Output", False, "With -o: skip what the file already has.")
    null: bool = option("Advanced", False, "Paths on standard input end with NUL, not newline.",
        name="--null,-0")  # fmt: skip

    def __post_init__(self) -> None:
        if self.resume and self.out is None:
            raise UserError("--resume goes with -o FILE: it skips what that file already has.", 2)


@dataclass
class Reader(Place, Lines):
    """A model that reads files and writes lines."""

    model: str = MODEL
    batch: int = batch_of()
    quiet: bool = same(Run, "quiet", False)


@dataclass
class Teller(Reader):
    """One that writes captions or answers."""

    frames: int | None = FRAMES
    features: Path | None = FEATURES


def piped(inputs: list[str] | None, what: str = "pictures or folders") -> list[str]:
    """The inputs, or - for a pipe. UserError: there is neither, or nothing comes."""
    if not inputs and nothing_piped():
        raise UserError(f"Name {what}, or pipe their paths in.", 2)
    return inputs or ["-"]


def nothing_piped() -> bool:
    """Whether standard input is a terminal, or is nothing (as that of a timed job is)."""
    if sys.stdin.isatty():
        return True
    try:
        about = os.fstat(sys.stdin.fileno())
    except OSError:  # it is no file
        return False
    empty = stat.S_ISREG(about.st_mode) and about.st_size == 0
    return ranks.first() and (empty or stat.S_ISCHR(about.st_mode))


DRAWN = ("temperature", "top_k", "top_p", "seed")  # options of sampling


@dataclass
class Search:
    """How captions and answers are searched for, or sampled."""

    beams: int = option("Decoding", 5, "Beams of the search; 1 is greedy.", min=1)
    max_tokens: int = option("Decoding", 40, "Longest text, in tokens.", min=1)
    length_penalty: float = option("Decoding", 1.0, "Beam scores are divided by length to this "
        "power: above 1 is longer.")  # fmt: skip
    sample: bool = option("Decoding", False, "Sample instead of searching.")
    temperature: float = option("Decoding", 1.0, "With --sample: below 1 is safer.")
    top_k: int = option("Decoding", 0, "With --sample: only the k likeliest words; 0: all.", min=0)
    top_p: float = option("Decoding", 1.0, "With --sample: only the likeliest words with this "
        "mass.")  # fmt: skip
    seed: int = option("Decoding", 0, "With --sample: the seed.")
    late_stopping: bool = option("Advanced", False, "Search on after all beams have an end.")
    given: dict[str, Any] = field(default_factory=dict)

    def style(self) -> "Style":
        """The search as `write` takes it.

        UserError: values out of range; sampling's without --sample, the search's with it.
        """
        searched = ("beams", "length_penalty", "late_stopping")
        for name in searched if self.sample else DRAWN:
            if name in self.given:
                out = "is for searching: leave it or --sample out"
                idle = out if self.sample else "goes with --sample"
                raise UserError(f"--{name.replace('_', '-')} {idle}.", 2)
        if self.temperature <= 0:
            raise UserError(
                "--temperature is above 0; for the likeliest caption leave out --sample.", 2
            )
        if not 0 < self.top_p <= 1:
            raise UserError("--top-p is above 0 and at most 1.", 2)
        from tinyvl.decode import Style

        sampling = {name: getattr(self, name) for name in DRAWN} if self.sample else None
        return Style(
            self.beams, self.max_tokens, self.length_penalty, not self.late_stopping, sampling
        )


RERANK = option("Decoding", None, "A search model that chooses among the beams what fits the "
    "picture; none: the likeliest.", shown="the model's own")  # fmt: skip
ANSWER = Search(**ANSWERS)  # how `ask` and `eval vqa` search, unless told otherwise


def load_model(name: "str | Checkpoint", place: Place, task: str = "caption", **more: Any) -> Any:
    """The model of a name, where and how it shall run; ``more`` goes to `models.load`."""
    from tinyvl import models
    from tinyvl.device import choose_device, choose_precision, keep_memory

    keep_memory()
    target = choose_device(place.device)
    dtype = choose_precision(place.precision, target)
    return models.load(name, task=task, device=target, precision=dtype, **more)
