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
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tinyvl import UserError, files, hub, lilt
from tinyvl.captioner import Captioner
from tinyvl.clipcap import ClipCap
from tinyvl.decoder import Decoder
from tinyvl.decoder_weights import decoder_config, load_decoder
from tinyvl.device import choose_device, choose_precision
from tinyvl.encoders_av import build_encoder
from tinyvl.epalm import EPalm
from tinyvl.itune import ITune
from tinyvl.lilt import LilT
from tinyvl.presets import CONFIGS, PRESETS, SMALL, architecture
from tinyvl.text import Text

Model = Captioner | LilT
METHODS = {"itune": ITune, "epalm": EPalm, "clipcap": ClipCap, "lilt": LilT}
TASKS = {"caption": Captioner, "vqa": EPalm, "retrieve": LilT}
# A configuration's backbones and the role in which `hub` fetches each.
ROLES = {"decoder": "decoder", "vision": "vision", "text": "text", "image": "vision"}
SHIPPED = Path(__file__).parent / "checkpoints"
DEFAULT = {"caption": SHIPPED / "caption", "retrieve": SHIPPED / "search"}


def read_text(folder: Path, raw: dict) -> Text:
    """The tokenizer of a decoder's folder, with the ids that begin and end a sequence.

    A tokenizer.json is read as it is, for importing transformers takes longer than a caption;
    where there is none (OPT), transformers makes one of the older files.
    """
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        names = folder / "tokenizer_config.json"
        special = json.loads(names.read_text(encoding="utf-8")) if names.is_file() else {}

        def own(key: str) -> int | None:
            token = special.get(key)
            token = token.get("content") if isinstance(token, dict) else token
            return None if token is None else tokenizer.token_to_id(token)

        bos, eos = own("bos_token"), own("eos_token")
    else:
        from transformers import AutoTokenizer

        slow = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        bos, eos, tokenizer = slow.bos_token_id, slow.eos_token_id, slow.backend_tokenizer
    tokenizer.no_truncation()
    tokenizer.no_padding()
    eos = first(eos, raw.get("eos_token_id"))
    bos = first(bos, raw.get("bos_token_id"), eos)
    if eos is None:
        raise UserError(f"{folder}: this tokenizer has no token that ends a text.")
    return Text(tokenizer, bos, eos)


def first(*values):
    """The first value that is there; the first item of a list (several end tokens)."""
    value = next((v for v in values if v is not None), None)
    return value[0] if isinstance(value, list) else value


def image_side(config: dict) -> dict:
    """The image encoder's part of a ``config.json``: name, sha256, config, fit."""
    return config[towers(config["method"])[1]]


def task_of(method: str) -> str:
    """The task whose default model a method's ``default`` is."""
    return "retrieve" if method == "lilt" else "caption"


def towers(method: str) -> tuple[str, str]:
    """What a configuration calls a method's language side and its image side."""
    return ("text", "image") if method == "lilt" else ("decoder", "vision")


def backbones(config: dict) -> dict[str, dict]:
    """A configuration's backbones by what it calls them."""
    return {side: config[side] for side in ROLES if side in config}


def role_of(side: str, part: dict) -> str:
    """The role in which `hub` fetches a backbone."""
    return "audio" if part.get("modality") == "audio" else ROLES[side]


def new_config(
    method: str,
    language: str,
    vision: str,
    *,
    fit: str,
    prompt: str,
    options: dict[str, Any],
    media: dict[str, Any] | None = None,
) -> dict:
    """The ``config.json`` of a model to be trained; fetches its backbones.

    ``media`` is what else an encoder is told, as in `encoders_av.build_encoder`.
    """
    config: dict[str, Any] = {"format": 1, "method": method}
    for side, name in zip(towers(method), (language, vision), strict=True):
        told = (media or {}) if ROLES[side] == "vision" else {}
        folder = hub.fetch(name, role_of(side, told))
        config[side] = {
            "name": name,
            "sha256": hub.fingerprint(folder),
            "config": json.loads((folder / "config.json").read_text()),
        }
        if ROLES[side] == "vision":
            config[side] |= {"fit": fit, **told}
    if method != "lilt":
        config["prompt"] = prompt
    return config | {"options": options}


def build(
    config: dict,
    *,
    device: torch.device,
    precision: torch.dtype,
    weights: bool = True,
    sides: Iterable[str] = ROLES,
) -> Model:
    """The model of a ``config.json``, modules new.

    Args:
        weights: False: on the meta device.
        sides: of a LilT's "text" and "image" those that are wanted.
    """
    if config.get("format") != 1 or config.get("method") not in METHODS:
        raise UserError(
            f"This checkpoint's method is {config.get('method')!r} in format "
            f"{config.get('format')!r}; this tinyvl reads {', '.join(METHODS)} in format 1.",
            2,
        )
    if not weights:
        with torch.device("meta"):
            return assemble(config, None, precision)
    folders = {}
    for side, part in backbones(config).items():
        if side not in sides:
            continue
        folders[side] = hub.fetch(part["name"], role_of(side, part))
        if part["sha256"] != hub.fingerprint(folders[side]):
            raise UserError(
                f"{part['name']}: the weights here are not those this model was trained with "
                f"(SHA-256 {part['sha256'][:12]}…); its answers would be wrong."
            )
    return place(assemble(config, folders, precision), device, precision)


def assemble(config: dict, folders: dict[str, Path] | None, precision: torch.dtype) -> Model:
    """The model over the backbones of these folders; None: parameters only."""
    if config["method"] == "lilt":
        return lilt.build(config, folders)
    method = METHODS[config["method"]]
    lm, vision, prompt = config["decoder"], config["vision"], config.get("prompt", "")
    if folders is None:
        encoder = build_encoder(vision, levels=method.levels)
        decoder, text, prompt = Decoder(decoder_config(lm["config"])), Text(None, 0, 0), ""
    else:
        encoder = build_encoder(vision, folders["vision"], levels=method.levels)
        decoder = load_decoder(folders["decoder"], dtype=precision)
        text = read_text(folders["decoder"], lm["config"])
    return method(
        encoder, decoder, text, vision_width=encoder.width, prompt=prompt, **config["options"]
    )


def reads(config: dict) -> str:
    """What of its encoder the model of a ``config.json`` reads: "tokens" or "summaries"."""
    every = config.get("options", {}).get("tokens") == "all"
    return "tokens" if every else METHODS[config["method"]].reads


def parts_of(config: dict) -> dict[str, Any]:
    """What of a checkpoint a run that starts from it takes over."""
    language, vision = (config[side] for side in towers(config["method"]))
    return {
        "language": language["name"],
        "vision": vision["name"],
        "fit": vision["fit"],
        "prompt": config.get("prompt", ""),
        "options": config["options"],
        "media": media_of(config),
    }


def media_of(config: dict) -> dict[str, Any]:
    """What an encoder was told beside how pictures fit: of videos, of sounds, of a CNN's maps."""
    vision = image_side(config)
    keys = ("modality", "frames", "masks", "lower", "larger")
    return {key: vision[key] for key in keys if key in vision}


def modality_in(media: dict[str, Any]) -> str:
    """The modality of an encoder that was told this: "image", "video" or "audio"."""
    return media.get("modality", "image")


def modality_of(config: dict) -> str:
    """What a model of a ``config.json`` perceives."""
    return modality_in(media_of(config))


def place(model: Model, device: torch.device, precision: torch.dtype) -> Model:
    """Moves a model: frozen parts in ``precision``, trainable ones in float32 under autocast."""
    if precision != torch.float32:
        model.halve(precision)
        model.amp = precision
    return model.to(device)


def trainable_state(model: Model) -> dict[str, torch.Tensor]:
    """What a checkpoint keeps: what is trained, and what is as random without being trained."""
    return {n: p.detach() for n, p in model.named_parameters() if model.kept(n)}


def load_trainable(model: Model, state: dict[str, torch.Tensor], where: str) -> None:
    """Fills in the trainable tensors; any name too many, missing or misshapen is refused."""
    own = trainable_state(model)
    if own.keys() != state.keys() or any(own[n].shape != state[n].shape for n in own):
        odd = sorted(own.keys() ^ state.keys()) or [
            n for n in own if own[n].shape != state[n].shape
        ]
        raise UserError(f"{where}: these weights do not fit the model ({odd[0]}).", 2)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])


def save_config(folder: Path, config: dict) -> None:
    files.write_text(
        folder / "config.json", json.dumps(config, indent=1, ensure_ascii=False) + "\n"
    )


def save(model: Model, folder: Path, file: str = "model.safetensors") -> None:
    """The trainable tensors, in the type they are trained in."""
    files.write_tensors(folder / file, trainable_state(model), {"format": "pt"})


def load_weights(model: Model, folder: Path) -> None:
    """Fills a built model with a checkpoint folder's trainable tensors."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: model.safetensors cannot be read ({error}).") from error
    if isinstance(model, LilT):
        state = {name: tensor for name, tensor in state.items() if model.holds(name)}
    load_trainable(model, state, str(folder))


def tag_of(config: dict) -> str:
    """What a model that writes is for."""
    what = "question-answering" if config["options"].get("task") == "vqa" else "captioning"
    return f"{modality_of(config)}-{what}"


def write_card(folder: Path, config: dict, summary: dict) -> None:
    """The model card: data, metrics, licences, the settings."""
    parts = backbones(config)
    lines = [
        "---",
        "library_name: tinyvl",
        f"tags: [{'image-text-retrieval' if config['method'] == 'lilt' else tag_of(config)}]",
        "---",
        f"# {config['method']} on {' with '.join(part['name'] for part in parts.values())}",
        "",
        "A tinyvl checkpoint: only the trained modules; the frozen backbones are fetched by name.",
        "",
    ]
    for side, part in parts.items():
        known = hub.find(part["name"])
        licence = known.licence if known else "see its own card"
        lines.append(f"- {side}: {part['name']} (licence: {licence}; SHA-256 {part['sha256']})")
    training = config["training"]
    lines += [f"- data: {Path(training['data']).name}", ""]
    lines += ["```", shlex.join(["tinyvl", *sys.argv[1:]]), "```", "", "| | |", "|---|---|"]
    lines += [f"| {k} | {v} |" for k, v in {**summary, **training["recipe"]}.items()]
    files.write_text(folder / "README.md", "\n".join(lines) + "\n")


def checkpoint_folder(name: str, task: str = "caption") -> Path:
    """A checkpoint's folder: a path, ``hf://owner/name``, or ``default``."""
    if name == "default":
        if task not in DEFAULT:
            raise UserError(
                "No model that answers questions is shipped yet: train one (`tinyvl train epalm "
                "--task vqa --data ...`) and name its folder.",
                2,
            )
        folder = DEFAULT[task]
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


def read_config(folder: Path) -> dict:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: config.json cannot be read ({error}).") from error


def fingerprint(folder: Path, config: dict) -> str:
    """What tells a checkpoint's embeddings from another's: a hash of all that makes them."""
    parts = {
        side: {k: v for k, v in part.items() if k != "name"}
        for side, part in backbones(config).items()
    }
    about = json.dumps([config["method"], parts, config["options"]], sort_keys=True)
    with (folder / "model.safetensors").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(about.encode())
    return digest.hexdigest()


def load(
    name: str = "default",
    *,
    task: str = "caption",
    device: torch.device | None = None,
    precision: torch.dtype | None = None,
    sides: Iterable[str] = ROLES,
) -> Model:
    """A trained model, ready to run.

    It is a `Captioner` for captions, an `EPalm` for answers ("vqa"), a `LilT` to retrieve.

    Args:
        sides: of a LilT's towers, "text" and "image", those to load. A text alone needs no timm,
            a picture alone no transformers, and each takes seconds to import.
    """
    folder = checkpoint_folder(name, task)
    device = device or choose_device()
    precision = precision or choose_precision(None, device)
    config = read_config(folder)
    own = config.get("options", {}).get("task", "caption")  # what a captioner was trained for
    method = METHODS.get(config.get("method"), TASKS[task])
    if not issubclass(method, TASKS[task]) or (task != "retrieve" and own != task):
        does = {"caption": "caption", "vqa": "answer questions", "retrieve": "embed"}[task]
        raise UserError(f"{name}: this model does not {does}; name one that does.", 2)
    model = build(config, device=device, precision=precision, sides=sides)
    load_weights(model, folder)
    if task == "retrieve":
        model.fingerprint = fingerprint(folder, config)
    model.requires_grad_(False).eval()
    if model.amp:  # no gradients to keep exact: cast once, not in every step
        model.halve(model.amp)
    return model


def take_frames(model: Model, frames: int | None) -> None:
    """Another number of frames of a video than the model was trained with."""
    if frames is None:
        return
    if model.encoder.modality == "audio":
        raise UserError("--frames is for videos, and this model reads sounds.", 2)
    model.encoder.frames = frames


def inspect(name: str) -> dict[str, Any]:
    """Parameter counts of a preset or a checkpoint, on the meta device: no weights, no network."""
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
        config, extra = read_config(checkpoint_folder(name)), {}
    else:
        raise UserError(
            f"{name}: neither a preset nor a checkpoint folder; `tinyvl models` lists presets.", 2
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
        "vision_options": media_of(config),
        **extra,
    }


def start_of(name: str, method: str) -> dict[str, Any]:
    """The parts of the checkpoint that a training run starts from, as in `parts_of`.

    Raises:
        UserError: there is none of that name, or it is of another method.
    """
    config = read_config(checkpoint_folder(name, task_of(method)))
    if config.get("method") != method:
        raise UserError(f"{name}: a model of another method than {method}.", 2)
    return parts_of(config)
