"""What the commands share: options of one name and meaning, and what reads them."""

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinyvl import UserError

if TYPE_CHECKING:
    from tinyvl.write import Style

Model = Annotated[
    str, typer.Option("--model", "-m", help="Checkpoint folder, hf://owner/name, or default.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps. (default: the best)")]
Precision = Annotated[
    str | None, typer.Option(help="fp32, bf16 or fp16. (default: bf16 on a GPU, fp32 on a CPU)")
]
Workers = Annotated[
    int | None, typer.Option(min=0, help="Processes that decode pictures. (default: by the cores)")
]
Features = Annotated[
    Path | None,
    typer.Option(help="Folder of `tinyvl features`: read there, not encoded. (default: none)"),
]

Frames = Annotated[
    int | None, typer.Option(min=1, help="Of a video. (default: as in training, or 8)")
]

# Paths in, lines out.
Json = Annotated[bool, typer.Option("--json", help="JSON Lines.")]
OutFile = Annotated[
    Path | None, typer.Option("-o", "--out", help="Write to this file instead of stdout.")
]
ResumeFile = Annotated[
    bool, typer.Option("--resume", help="With -o: skip what the file already has.")
]
Null = Annotated[
    bool, typer.Option("-0", "--null", help="Paths on stdin end with NUL, not newline.")
]

# Zero-shot classification.
Prompts = Annotated[
    list[str] | None,
    typer.Option(
        "--prompt",
        help="Template with {} for the class, a file of them, or clip for CLIP's seven; "
        'several are ensembled. SVHN: "a photo of the number {}". Without: "a photo of {}".',
    ),
]

Beams = Annotated[
    int | None, typer.Option(min=1, help="Beams of the search; 1 is greedy. (default: 5)")
]


def grouped(command: Callable) -> Callable:
    """A command that takes a dataclass of options takes each of them on the command line."""
    parameters, groups = [], {}
    for parameter in inspect.signature(command).parameters.values():
        if is_dataclass(parameter.annotation):
            groups[parameter.name] = parameter.annotation
            own = inspect.signature(parameter.annotation).parameters.values()
            parameters += [field.replace(kind=parameter.KEYWORD_ONLY) for field in own]
        else:
            parameters.append(parameter.replace(kind=parameter.KEYWORD_ONLY))

    @wraps(command)
    def run(**given: Any) -> Any:
        for name, group in groups.items():
            own = inspect.signature(group).parameters
            given[name] = group(**{field: given.pop(field) for field in own if field in given})
        return command(**given)

    run.__signature__ = inspect.Signature(parameters)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


@dataclass
class Place:
    """Where a model runs."""

    device: Device = None
    precision: Precision = None
    workers: Workers = None


@dataclass
class Search:
    """How captions and answers are searched for."""

    length_penalty: Annotated[
        float | None,
        typer.Option(
            help="Beam scores are divided by length to this power: above 1 is longer. (default: 1)"
        ),
    ] = None
    late_stopping: Annotated[
        bool, typer.Option("--late-stopping", help="Search on after all beams have an end.")
    ] = False
    sample: Annotated[bool, typer.Option("--sample", help="Sample instead of searching.")] = False
    temperature: Annotated[
        float | None, typer.Option(help="With --sample: below 1 is safer. (default: 1)")
    ] = None
    top_k: Annotated[int | None, typer.Option(min=0, help="With --sample: the k likeliest.")] = None
    top_p: Annotated[
        float | None, typer.Option(help="With --sample: the likeliest with this mass.")
    ] = None
    seed: Annotated[int | None, typer.Option(help="With --sample: the seed. (default: 0)")] = None

    def style(self, beams: int | None, max_tokens: int, *, usual: int = 5) -> "Style":
        """The search that these options ask for, with ``usual`` beams if none are.

        Raises:
            UserError: options out of range, of sampling without --sample, of searching with it.
        """
        drawn = given(
            temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, seed=self.seed
        )
        late = self.late_stopping or None
        searched = given(beams=beams, length_penalty=self.length_penalty, late_stopping=late)
        if idle := searched if self.sample else drawn:
            option = "--" + next(iter(idle)).replace("_", "-")
            out = "is for searching: leave it or --sample out"
            raise UserError(f"{option} {out if self.sample else 'goes with --sample'}.", 2)
        drawn = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 0} | drawn
        if drawn["temperature"] <= 0:
            raise UserError(
                "--temperature is above 0; for the likeliest caption leave out --sample.", 2
            )
        if not 0 < drawn["top_p"] <= 1:
            raise UserError("--top-p is above 0 and at most 1.", 2)
        from tinyvl import write

        return write.Style(
            beams or usual,
            max_tokens,
            1.0 if self.length_penalty is None else self.length_penalty,
            not self.late_stopping,
            drawn if self.sample else None,
        )


def given(**options: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def checked(modality: str | None) -> str | None:
    """One of the three, or none given."""
    if modality not in (None, "image", "video", "audio"):
        raise UserError(f"--modality is image, video or audio, not {modality!r}.", 2)
    return modality


def local(name: str) -> str:
    """A folder's whole path, so that a checkpoint finds it from anywhere; names as they are."""
    path = os.path.expanduser(name)
    return os.path.abspath(path) if os.path.isdir(path) else name


def load_model(name: str, place: Place, task: str = "caption", **more: Any):
    """The model of a name, where and how it shall run; ``more`` goes to `models.load`."""
    from tinyvl import models
    from tinyvl.device import choose_device, choose_precision, keep_memory

    keep_memory()
    target = choose_device(place.device)
    dtype = choose_precision(place.precision, target)
    return models.load(name, task=task, device=target, precision=dtype, **more)
