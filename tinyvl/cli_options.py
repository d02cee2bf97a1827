"""What the commands share: options of one name and meaning, and what reads them."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from tinyvl import UserError

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

# How captions and answers are searched for.
Beams = Annotated[int, typer.Option(min=1, help="Beams of the search; 1 is greedy.")]
LengthPenalty = Annotated[
    float, typer.Option(help="Beam scores are divided by length to this power.")
]
LateStopping = Annotated[
    bool, typer.Option("--late-stopping", help="Search on after all beams have an end.")
]
Sample = Annotated[bool, typer.Option("--sample", help="Sample instead of searching.")]
Temperature = Annotated[float, typer.Option(help="With --sample: below 1 is safer.")]
TopK = Annotated[int, typer.Option(min=0, help="With --sample: the k likeliest.")]
TopP = Annotated[float, typer.Option(help="With --sample: the likeliest with this mass.")]
Seed = Annotated[int, typer.Option(help="With --sample: the seed.")]


def style(
    beams: int,
    max_tokens: int,
    length_penalty: float,
    late: bool,
    sample: bool,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
):
    """The search that these options ask for: a `generate.Style`."""
    if sample and temperature <= 0:
        raise UserError(
            "--temperature is above 0; for the likeliest caption leave out --sample.", 2
        )
    if not 0 < top_p <= 1:
        raise UserError("--top-p is above 0 and at most 1.", 2)
    from tinyvl import generate

    sampling = None
    if sample:
        sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    return generate.Style(beams, max_tokens, length_penalty, not late, sampling)


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


def load_model(
    name: str, device: str | None, precision: str | None, task: str = "caption", **more: Any
):
    """The model of a name, where and how it shall run; ``more`` goes to `models.load`."""
    from tinyvl import models

    target = models.choose_device(device)
    dtype = models.choose_precision(precision, target)
    return models.load(name, task=task, device=target, precision=dtype, **more)
