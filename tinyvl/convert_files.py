"""Files of other code's checkpoints in, tinyvl's checkpoint folders out.

A file is read with ``weights_only=True``. A class that it names beside its tensors, such as LilT's
configuration, is neither imported nor run: an empty dictionary stands for it.
"""

import pickle
import re
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinyvl import UserError, files, models
from tinyvl.hub_table import file_sha256
from tinyvl.progress import say

State = dict[str, Tensor]
CLIP_STATS = {  # all three prepare pictures with CLIP's mean and deviation
    "mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip


def converter(convert: Callable[..., None]) -> Callable[..., None]:
    """A converter of a file, its first argument, that is refused where it is laid out otherwise."""

    @wraps(convert)
    def run(file: Path, *args: Any, **more: Any) -> None:
        try:
            convert(file, *args, **more)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            said = str(error).partition("\n")[0][:200] or type(error).__name__
            raise UserError(f"{file}: not laid out as the authors' files are ({said}).") from error

    return run


class Unread(dict):
    """Stands for what a file has of another package."""

    def __init__(self, *args: Any, **more: Any):
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass


def read(file: Path) -> tuple[State, dict[str, Any]]:
    """The tensors of a file by name, and what else is in it.

    UserError: it cannot be read, or holds no tensors by name.
    """
    from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

    load: Callable[[], Any] = lambda: torch.load(file, map_location="cpu", weights_only=True)  # noqa: E731
    try:
        try:
            found = load()
        except pickle.UnpicklingError:
            strange: list[Any] = [(Unread, n) for n in get_unsafe_globals_in_checkpoint(file)]
            with safe_globals(strange):
                found = load()
    except FileNotFoundError:
        raise UserError(f"{file}: there is no such file.", 2) from None
    except Exception as error:  # torch raises anything at all over a damaged file
        why = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        raise UserError(f"{file}: no checkpoint that can be read safely ({why}).") from None
    found = found if isinstance(found, dict) else {}
    inner = next(
        (found[k] for k in ("model", "state_dict") if isinstance(found.get(k), dict)), found
    )
    state = {
        str(name).removeprefix("module."): tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in inner.items()
        if isinstance(tensor, Tensor)
    }
    if not state:
        raise UserError(f"{file}: holds no tensors by name.")
    return state, found


def under(state: State, prefix: str) -> State:
    """The tensors whose names begin so, under the rest of their names."""
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}


def count(state: State, pattern: str) -> int:
    """How many layers the names have: ``pattern`` has a group for the number."""
    numbers = [int(found[1]) for name in state if (found := re.match(pattern, name))]
    return max(numbers, default=-1) + 1


def renamed(state: State, names: dict[str, str], file: Path) -> State:
    """Under our names: regular expressions for whole names and what takes their place.

    UserError: a name has no place here.
    """
    out = {}
    for name, tensor in state.items():
        ours = (re.sub(f"^{a}$", b, name) for a, b in names.items() if re.fullmatch(a, name))
        if (own := next(ours, None)) is None:
            raise UserError(f"{file}: {name} is nothing that tinyvl's model has; not converted.")
        out[own] = tensor
    return out


def prepared(config: dict[str, Any], **more: Any) -> None:
    """Notes how the authors prepare pictures, in the configuration of a timm encoder."""
    for side in ("vision", "image"):
        if side in config and "architecture" in config[side]["config"]:
            inner = config[side]["config"]
            cfg = {**(inner.get("pretrained_cfg") or {}), **CLIP_STATS, "interpolation": "bicubic"}
            config[side]["config"] = inner | {"pretrained_cfg": cfg | more}


def write(out: Path, file: Path, config: dict[str, Any], state: State, remarks: list[str]) -> None:
    """A checkpoint folder with these trained tensors, which have to be those of its config.

    UserError: they are not, or the folder has a model already.
    """
    for name in ("config.json", "model.safetensors"):
        if (out / name).exists():
            raise UserError(f"{out}: there is a model here already; choose another -o.", 2)
    own = wanted_by(config)
    odd = sorted(own.keys() ^ state.keys()) or [n for n in own if own[n].shape != state[n].shape]
    if odd:
        has, wants = (list(d[odd[0]].shape) if odd[0] in d else "none" for d in (state, own))
        raise UserError(
            f"{file}: these weights do not fit the named backbones and options ({odd[0]}: {has} "
            f"in the file, {wants} in the model)."
        )
    if bad := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
        raise UserError(f"{file}: these weights are not finite numbers ({bad[0]}).")
    config["converted"] = {
        "file": file.name, "sha256": file_sha256(file), "command": models.typed(),
        "remarks": remarks,
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    files.write_tensors(out / "model.safetensors", state, {"format": "pt"})
    models.save_config(out, config)
    models.write_card(out, config, {})
    for remark in remarks:
        say(remark)


def wanted_by(config: dict[str, Any]) -> State:
    """The trained tensors of a config's model, without memory."""
    device = torch.device("meta")
    return models.trainable_state(
        models.build(config, device=device, precision=torch.float32, weights=False)
    )


def same(theirs: Tensor, own: Tensor, off: float = 1e-6) -> bool:
    """Whether two tensors are equal but for rounding; to fp16 too, as a folder may keep its own."""
    if theirs.shape != own.shape:
        return False
    halves = torch.equal(theirs.half(), own.half()) and torch.equal(own, own.half().float())
    return halves or torch.allclose(theirs, own, rtol=0, atol=off)
