"""Image encoders of timm that have no folder yet: a bare file of weights, or none at all."""

import difflib
import json
from pathlib import Path
from typing import Any

from tinyvl import UserError
from tinyvl.files import cache_dir, cached, write_tensors
from tinyvl.hub_table import file_sha256, write_json, write_source
from tinyvl.progress import say

FILES = (".safetensors", ".pth", ".pt", ".bin")


def check_name(name: str) -> None:
    """Raises UserError: timm has no model of this name; it says which is nearest."""
    import timm

    base = name.partition(".")[0]
    known = timm.list_models() if not timm.is_model(base) else []
    if known:
        near = difflib.get_close_matches(base, known, 1, 0.5)
        meant = f"; is {near[0]} meant?" if near else "."
        raise UserError(f"timm has no image model named {base!r}{meant}", 2)
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError:  # not this tag
        near = difflib.get_close_matches(name, timm.list_pretrained(f"{base}.*"), 3, 0)
        has = f"; there are {', '.join(near)}" if near else ""
        raise UserError(f"{name}: timm has no such weights{has}.", 2) from None


def adopted(file: str, architecture: str) -> Path:
    """A folder in the cache with the weights of a .safetensors or .pth file, as timm keeps them.

    UserError: there is no such file or architecture, or it holds no tensors.
    """
    path = Path(file).expanduser()
    if not path.is_file() or path.suffix not in FILES:
        raise UserError(
            f"--architecture goes with a file of weights ({', '.join(FILES)}); {file} is none.", 2
        )
    check_name(architecture)
    sha256 = file_sha256(path)
    target = cache_dir() / "backbones" / f"{path.stem}-{architecture}-{sha256[:12]}"
    if not (target / "config.json").is_file():
        with cached(target) as new:
            write_tensors(new / "model.safetensors", tensors_of(path), {"format": "pt"})
            write_json(new / "config.json", described(architecture))
            write_source(new, architecture, str(path.absolute()), sha256)
    say(f"{file} is kept as {target}")
    return target


def tensors_of(path: Path) -> dict[str, Any]:
    """What a file of weights holds, without what training added to it and to its names."""
    import pickle

    import torch
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
        why = str(error).split("\n")[0]
        raise UserError(f"{path}: no file of weights alone ({why}).") from None
    for key in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    tensors = {
        name.removeprefix("module."): tensor.clone()  # tied ones cannot be written
        for name, tensor in (found.items() if isinstance(found, dict) else ())
        if isinstance(tensor, torch.Tensor)
    }
    if not tensors:
        raise UserError(f"{path}: holds no tensors by name.")
    return tensors


def randomly(architecture: str, seed: int) -> Path:
    """A folder in the cache with random weights of an architecture: the same for the same seed.

    UserError: timm has none of this name.
    """
    import timm
    import torch

    check_name(architecture)
    target = cache_dir() / "backbones" / f"{architecture}-random-{seed}"
    if not (target / "config.json").is_file():
        with cached(target) as new, torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            state = timm.create_model(architecture, pretrained=False, num_classes=0).state_dict()
            write_tensors(new / "model.safetensors", state, {"format": "pt"})
            write_json(new / "config.json", described(architecture))
            sha256 = file_sha256(new / "model.safetensors")
            write_source(new, architecture, f"random weights, seed {seed}", sha256)
    return target


def described(architecture: str) -> dict[str, Any]:
    """The config.json of timm's own configuration of an architecture."""
    import timm

    known = timm.get_pretrained_cfg(architecture)
    cfg = known.to_dict() if known else {}
    keys = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    keys += ("num_classes", "fixed_input_size")
    cfg = json.loads(json.dumps({key: cfg[key] for key in keys if cfg.get(key) is not None}))
    return {"architecture": architecture.partition(".")[0], "pretrained_cfg": cfg}
