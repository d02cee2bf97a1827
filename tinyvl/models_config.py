"""What a checkpoint's ``config.json`` says, and whether it can be: it may be a stranger's."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tinyvl import UserError, files
from tinyvl.presets_options import METHODS

# A configuration's backbones and the role in which `hub` fetches each.
ROLES = {"decoder": "decoder", "vision": "vision", "text": "text", "image": "vision"}
# More layers and larger numbers than a model has would fill the memory before they are compared
# with the weights. The last is of our own options: widths, pixels, frames.
LAYERS, NUMBER, OPTION = 2**10, 2**24, 2**14


def towers(method: str) -> tuple[str, str]:
    """What a configuration calls a method's language side and its image side."""
    return ("text", "image") if method == "lilt" else ("decoder", "vision")


def backbones(config: dict) -> dict[str, dict]:
    """A configuration's backbones by what it calls them."""
    return {side: config[side] for side in ROLES if side in config}


def role_of(side: str, part: dict) -> str:
    """The role in which `hub` fetches a backbone."""
    return "audio" if part.get("modality") == "audio" else ROLES[side]


def read_config(folder: Path) -> dict[str, Any]:
    """A checkpoint's ``config.json``. UserError: it cannot be read, or is of no checkpoint."""
    config = files.read_object(folder / "config.json")
    method = config.get("method")
    if config.get("format") != 1 or method not in [*METHODS]:
        this = f"method is {str(method)[:60]!r} in format {str(config.get('format'))[:60]}"
        known = f"this tinyvl reads {', '.join(METHODS)} in format 1"
        raise UserError(f"{folder}: this checkpoint's {this}; {known}.", 2)
    language, image = towers(method)
    of_side = {"name": str, "sha256": str, "config": dict}
    wanted = {"": {"options": dict}, language: of_side, image: of_side | {"fit": str}}
    for side, fields in wanted.items():
        part = config.get(side) if side else config
        for name, kind in fields.items():
            if not isinstance(part, dict) or not isinstance(part.get(name), kind):
                lacks = f"{side}.{name}".strip(".")
                raise UserError(f"{folder}: config.json lacks {lacks}, as a checkpoint's has it.")
    if config.get("rerank", "default") != "default":  # a stranger's names no other model
        raise UserError(f"{folder}: the rerank of config.json is not default.")
    return config


def check_sizes(config: dict[str, Any]) -> None:
    """Raises a UserError for a number that no model has."""
    limit(config.get("options"), OPTION)
    for part in backbones(config).values():
        limit(part["config"], NUMBER)
        limit({key: value for key, value in part.items() if key != "config"}, OPTION)


def limit(value: Any, most: int, key: str = "") -> None:
    if isinstance(value, dict):
        for name, inner in value.items():
            limit(inner, most, str(name))
    elif isinstance(value, list):
        for inner in value:
            limit(inner, most, key)
    elif isinstance(value, int) and abs(value) > (
        LAYERS if re.search("layer|depth", key) else most
    ):
        raise UserError(f"No model has {key} {value}: this config.json is not used.", 2)


@contextmanager
def fitting(config: dict[str, Any]) -> Iterator[None]:
    """While a model is built: what its configuration and weights cause becomes one sentence."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # timm, transformers and tokenizers raise anything at all
        said = (str(error).strip() or type(error).__name__).partition("\n")[0]
        names = " and ".join(part.get("name", side) for side, part in backbones(config).items())
        what = f"the configuration, the weights and the options of {names} do not fit together"
        raise UserError(f"{what} ({said[:200]}).") from error
