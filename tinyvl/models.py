"""Checkpoint folders, and how a name becomes a model.

A checkpoint folder holds ``config.json`` (method, backbones with their hashes, options) and
``model.safetensors`` (the trainable tensors only); the frozen backbones are fetched by name.
Nothing here reads a pickle.
"""

import hashlib
import json
import os
import shlex
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tinyvl import UserError, files, hub, models_card
from tinyvl.device import choose_device, choose_precision
from tinyvl.method import Method
from tinyvl.models_build import (
    build,
    check_options,
    class_of,
    new_config,
    place,
    with_options,
)
from tinyvl.models_config import ROLES, backbones, read_config, role_of, towers
from tinyvl.presets import CONFIGS, PRESETS, SMALL, architecture
from tinyvl.rerank import NONE, Reranker, check_encoders

if TYPE_CHECKING:
    from tinyvl.encoders import ImageEncoder

__all__ = [
    "CONFIGS", "Method", "architecture", "build", "check_options", "new_config", "place",
    "role_of", "with_options",
]  # fmt: skip

SHIPPED = Path(__file__).parent / "checkpoints"
DEFAULT = {
    "caption": SHIPPED / "caption", "vqa": SHIPPED / "answer", "retrieve": SHIPPED / "search",
}  # fmt: skip
READING = 2  # raised when the same checkpoints embed otherwise than before: see `fingerprint`
DOES = {"caption": "caption", "vqa": "answer questions", "retrieve": "embed"}  # tasks


# ------------------------------------------------------------------------------- what a config says


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's folder and its ``config.json``, read once."""

    folder: Path
    config: dict[str, Any]
    name: str = ""  # as the user named it

    @property
    def method(self) -> str:
        return self.config["method"]

    @property
    def task(self) -> str:
        """What it was trained for: "caption", "vqa" or "retrieve"."""
        written = self.config.get("options", {}).get("task", "caption")
        return "retrieve" if self.config.get("method") == "lilt" else written

    @property
    def image(self) -> dict[str, Any]:
        """The image encoder's part of the config: name, sha256, config, fit."""
        return self.config[towers(self.method)[1]]

    @property
    def media(self) -> dict[str, Any]:
        """Extra encoder options: of videos, of sounds, of a CNN's maps, of CLIP's projection."""
        keys = ("modality", "frames", "masks", "lower", "larger", "projected")
        return {key: self.image[key] for key in keys if key in self.image}

    @property
    def modality(self) -> str:
        """What it perceives: "image", "video" or "audio"."""
        return self.image.get("modality", "image")

    @cached_property
    def reads(self) -> str:
        """The part of a percept that its method reads: "tokens" or "summaries"."""
        every = self.config.get("options", {}).get("tokens") == "all"
        return "tokens" if every else class_of(self.method).reads


def open_checkpoint(name: str, task: str = "caption") -> Checkpoint:
    """The checkpoint of a name, as in `checkpoint_folder`; its config is read here and only here.

    UserError: there is none, or its config cannot be read.
    """
    folder = checkpoint_folder(name, task)
    return Checkpoint(folder, read_config(folder), name)


def task_of(method: str) -> str:
    """The task whose default model a method's ``default`` is."""
    return {"lilt": "retrieve", "epalm": "vqa"}.get(method, "caption")


# ------------------------------------------------------------------------------------------ folders


def trainable_state(model: Method) -> dict[str, Tensor]:
    """What a checkpoint keeps: what is trained, and untrained random projections."""
    return {n: p.detach() for n, p in model.named_parameters() if model.kept(n)}


def save_config(folder: Path, config: dict) -> None:
    files.write_text(folder / "config.json", files.dump(config, indent=1) + "\n")


def save(model: Method, folder: Path, file: str = "model.safetensors") -> None:
    """The trainable tensors, in the type they are trained in."""
    files.write_tensors(folder / file, trainable_state(model), {"format": "pt"})


def load_weights(model: Method, folder: Path, *, more: tuple[str, ...] = ()) -> None:
    """Fills a built model with a checkpoint folder's trainable tensors.

    Names that begin with one of ``more`` may be missing. UserError: they cannot be read, a name is
    missing or unknown, a shape differs, or one is not of finite numbers.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(folder / "model.safetensors")
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{folder}: model.safetensors cannot be read ({error}).") from error
    state = {name: tensor for name, tensor in state.items() if model.holds(name)}
    own = trainable_state(model)
    own = {name: t for name, t in own.items() if name in state or not name.startswith(more)}
    odd = sorted(own.keys() ^ state.keys())
    if odd := odd or [name for name in own if own[name].shape != state[name].shape]:
        raise UserError(f"{folder}: these weights do not fit the model ({odd[0]}).", 2)
    for name in own:
        if not (state[name].is_floating_point() and state[name].float().isfinite().all()):
            raise UserError(f"{folder}: these weights are not finite numbers ({name}).")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])


def command_of(config: dict[str, Any]) -> str:
    """The command that made a model, as its config keeps it; "" where it does not."""
    made = {**config.get("converted", {}), **config.get("training", {})}
    return made.get("command", "")


def typed() -> str:
    """This command, with files and folders by their names alone; "" in a program of others."""
    if Path(sys.argv[0]).stem not in ("tinyvl", "__main__", "cli"):
        return ""
    return shlex.join(["tinyvl", *models_card.nameless(sys.argv[1:])])


def card_of(found: Checkpoint, summary: dict[str, Any], **more: Any) -> str:
    """The model card: backbones, licences, data, metrics, the command. ``more``: as in `card`."""
    more = {"command": command_of(found.config) or typed()} | more
    parts = backbones(found.config)
    about = found.config, parts, found.modality, found.task
    return models_card.card(*about, summary=summary, **more)


def write_card(folder: Path, config: dict, summary: dict) -> None:
    """The model card of a checkpoint folder."""
    files.write_text(folder / "README.md", card_of(Checkpoint(folder, config), summary))


def checkpoint_folder(name: str, task: str = "caption") -> Path:
    """A checkpoint's folder: a path, ``hf://owner/name``, or ``default``.

    UserError: there is no checkpoint, or the default of this task is not shipped yet.
    """
    if name == "default":
        folder = DEFAULT[task]
        if task == "vqa" and not (folder / "config.json").is_file():
            raise UserError(
                "No model that answers questions is shipped yet: train one (`tinyvl train epalm "
                "--task vqa --data ...`) and name its folder.",
                2,
            )
    elif name.startswith("hf://"):
        folder = hub.fetch(name.removeprefix("hf://"), "checkpoint")
    else:
        folder = Path(name).expanduser()
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{name}: no tinyvl checkpoint there (a folder with config.json and "
            "model.safetensors, hf://owner/name, or default).",
            2,
        )
    return folder


def fingerprint(folder: Path, config: dict) -> str:
    """A hash of all that makes a checkpoint's embeddings: two with the same one embed alike."""
    parts = {
        side: {k: v for k, v in part.items() if k != "name"}
        for side, part in backbones(config).items()
    }
    about = json.dumps([config["method"], parts, config["options"], READING], sort_keys=True)
    with (folder / "model.safetensors").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(about.encode())
    return digest.hexdigest()


def load(
    name: str | Checkpoint = "default", *, task: str = "caption",
    device: torch.device | None = None, precision: torch.dtype | None = None,
    sides: Iterable[str] = tuple(ROLES), rerank: str | None = None,
    encoder: "ImageEncoder | None" = None,
) -> Any:  # fmt: skip
    """A trained model, ready to run.

    It is a `Captioner` for captions and for answers ("vqa"), a `LilT` to retrieve.

    Args:
        name: as in `checkpoint_folder`, or a checkpoint that is already open.
        sides: of a LilT's towers, "text" and "image", those to load. A text alone needs no timm,
            a picture alone no transformers, and each takes seconds to import.
        rerank: a search model that chooses among a captioner's beams, or "none"; None: the one that
            its config names.
        encoder: a LilT's pictures are read by this one's model, which is not loaded again.

    UserError: the model is for another task, or cannot be loaded, or the search model cannot.
    """
    found = name if isinstance(name, Checkpoint) else open_checkpoint(name, task)
    config = found.config
    if found.task != task:
        raise UserError(f"{found.name}: this model does not {DOES[task]}; name one that does.", 2)
    device = device or choose_device()
    precision = precision or choose_precision(None, device)
    model: Any = build(config, device=device, precision=precision, sides=sides, encoder=encoder)
    load_weights(model, found.folder)
    if task == "retrieve":
        model.fingerprint = fingerprint(found.folder, config)
    freeze(model)
    if task != "caption" and rerank not in (None, NONE):
        raise UserError("Reranking is for captions: leave out rerank.", 2)
    rerank = rerank or config.get("rerank") or NONE
    if rerank != NONE:
        other = open_checkpoint(rerank, "retrieve")
        check_encoders(config, model.encoder, other, rerank)
        try:
            how = {"device": device, "precision": precision, "encoder": model.encoder}
            search = load(other, task="retrieve", **how)
        except UserError as error:
            advice = f"It is to choose among the captions; rerank {NONE} does without."
            raise UserError(f"{error} {advice}", error.status) from error
        model.reranker = Reranker(search)
    return model


def freeze(model: Method) -> None:
    """Makes a placed model ready to run: all of it in its precision, matrices packed.

    On a CPU a model can then be neither saved nor moved: see `packed.pack_decoder`.
    """
    model.requires_grad_(False).eval()
    if model.amp:  # no gradients to keep exact: cast once, not in every step
        model.halve(model.amp)
    model.pack()


def take_frames(model: Method, frames: int | None) -> None:
    """Another number of frames of a video than in training. UserError: the model reads sounds."""
    if frames is None:
        return
    if model.encoder.modality == "audio":
        raise UserError("--frames is for videos, and this model reads sounds.", 2)
    model.encoder.frames = frames


def inspect(name: str, task: str = "caption") -> dict[str, Any]:
    """Parameter counts of a preset or a checkpoint, on the meta device: no weights, no network.

    Of a backbone known by name what the table says of it. ``task``: whose default "default" is.
    UserError: the name is none of these.
    """
    extra: dict[str, Any] = {}
    if known := hub.find(name):
        return {
            "name": known.name, "role": known.role, "total_parameters": known.parameters,
            "licence": known.licence, "source": known.source, "here": hub.available(known.name),
        }  # fmt: skip
    if name in PRESETS or name in (*SMALL, "small"):
        row = PRESETS.get(name) or SMALL[name if name in SMALL else "itune"]
        language, vision = towers(row.method)
        config = {
            "format": 1,
            "method": row.method,
            language: {"name": row.language, "config": CONFIGS[row.language]},
            vision: {
                "name": row.vision,
                "config": CONFIGS.get(row.vision) or {"architecture": architecture(row.vision)},
                "fit": row.fit,
                **row.job.get("media", {}),
            },
            "options": row.options,
        }
        extra = {"row": row.row, "recipe": asdict(row.recipe)}
    elif name == "default" or name.startswith("hf://") or os.path.isdir(name):
        config = open_checkpoint(name, task).config
    else:
        raise UserError(
            f"{name}: neither a preset nor a checkpoint folder nor a known backbone; `tinyvl "
            "models` lists presets and backbones.",
            2,
        )
    model = build(config, device=torch.device("meta"), precision=torch.float32, weights=False)
    trainable = sum(p.numel() for n, p in model.named_parameters() if model.trainable(n))
    total = sum(p.numel() for p in model.parameters())
    return {
        "name": name,
        "method": config["method"],
        "trainable_parameters": trainable,
        "total_parameters": total,
        "trainable_percent": round(100 * trainable / total, 3),
        **{side: part["name"] for side, part in backbones(config).items()},
        "options": config["options"],
        "vision_options": Checkpoint(Path(name), config).media,
        **extra,
    }


def start_of(name: str, method: str) -> dict[str, Any]:
    """The job fields that a run with --init inherits from a checkpoint.

    UserError: there is none of that name, or it is of another method.
    """
    found = open_checkpoint(name, task_of(method))
    if found.config.get("method") != method:
        raise UserError(f"{name}: a model of another method than {method}.", 2)
    return {
        "language": found.config[towers(method)[0]]["name"],
        "vision": found.image["name"],
        "fit": found.image["fit"],
        "prompt": found.config.get("prompt", ""),
        "options": found.config["options"],
        "media": found.media,
    }
