"""What the commands share: options of one name and meaning, and what reads them."""

import os
from typing import Annotated, Any

import typer

Model = Annotated[
    str, typer.Option("--model", "-m", help="Checkpoint folder, hf://owner/name, or default.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps. [default: the best]")]
Precision = Annotated[
    str | None, typer.Option(help="fp32, bf16 or fp16. [default: bf16 on a GPU, fp32 on a CPU]")
]
Workers = Annotated[
    int | None, typer.Option(min=0, help="Processes that decode pictures. [default: by the cores]")
]


def given(**options: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}


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
