"""Presets, checkpoint folders, and how a name becomes a model.

A checkpoint folder holds ``config.json`` (method, backbones with their hashes, options) and
``model.safetensors`` (the trainable tensors only); the frozen backbones are fetched by name.
Nothing here reads a pickle.
"""

import json
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from tinyvl import UserError, hub
from tinyvl.captioner import Captioner, Text
from tinyvl.decoder import Decoder
from tinyvl.encoders import build_image_encoder, load_image_encoder
from tinyvl.itune import ITune
from tinyvl.pretrained import decoder_config, load_decoder

METHODS = {"itune": ITune}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEFAULT = {"caption": Path(__file__).parent / "checkpoints" / "caption"}


@dataclass(frozen=True)
class Recipe:
    """How a preset is trained. Rates are AdamW's; warm-up is a share of all steps."""

    batch: int = 64
    epochs: float = 5
    rate: float = 8e-4
    final_rate: float = 0.0
    warmup: float = 0.05
    weight_decay: float = 0.01
    clip: float = 1.0


@dataclass(frozen=True)
class Preset:
    """A row of a paper's table: method, backbones, options, recipe."""

    method: str
    decoder: str
    vision: str
    row: str  # where in the paper
    options: dict[str, Any] = field(default_factory=dict)
    recipe: Recipe = field(default_factory=Recipe)
    fit: str = "crop"


CLIP_B16 = "vit_base_patch16_clip_quickgelu_224.openai"
# Batch and epochs are the paper's; rate, warm-up and decay are not given there. Ours are guesses
# for that batch, not tuned at its scale.
PAPER = Recipe(batch=4096, epochs=30, rate=1e-3, warmup=0.05)
ITUNE = "I-Tuning, Table 1"
PRESETS: dict[str, Preset] = {
    "itune-base": Preset("itune", "gpt2", CLIP_B16, f"{ITUNE}: GPT2-Base", recipe=PAPER),
    "itune-medium": Preset("itune", "gpt2-medium", CLIP_B16, f"{ITUNE}: GPT2-Medium", recipe=PAPER),
    "itune-large": Preset("itune", "gpt2-large", CLIP_B16, f"{ITUNE}: GPT2-Large", recipe=PAPER),
    "itune-large-drop18": Preset(
        "itune", "gpt2-large", CLIP_B16, f"{ITUNE}: GPT2-Large with dropping", {"drop": 18}, PAPER
    ),
}
# Runs everywhere, a CPU included: what commands use without a preset.
SMALL = Preset(
    "itune", "SmolLM2-135M", "EfficientNet-Lite2", "ours", {"drop": 19}, Recipe(), fit="jpeg"
)


def preset(name: str | None) -> Preset:
    """A preset by name; None is the small recipe that runs everywhere."""
    if name in (None, "small"):
        return SMALL
    if name not in PRESETS:
        raise UserError(f"No preset {name!r}; there are {', '.join(PRESETS)}.", 2)
    return PRESETS[name]


# Published configurations, so that a preset can be inspected without its weights.
GPT2 = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024}
CONFIGS: dict[str, dict] = {
    "gpt2": GPT2 | {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "gpt2-medium": GPT2 | {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "gpt2-large": GPT2 | {"n_embd": 1280, "n_layer": 36, "n_head": 20},
    "gpt2-xl": GPT2 | {"n_embd": 1600, "n_layer": 48, "n_head": 25},
    "SmolLM2-135M": {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536,
        "max_position_embeddings": 8192, "rope_theta": 100000.0, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
}  # fmt: skip


def choose_device(name: str | None = None) -> torch.device:
    """The device asked for, else CUDA, else Apple's MPS, else the CPU."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and torch.backends.mps.is_available():
            name = "mps"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"The device {name!r} is not usable here: {error}".split("\n")[0], 2
        ) from error
    return device


def choose_precision(name: str | None, device: torch.device) -> torch.dtype:
    """fp32 on a CPU; on a GPU bf16 where it has it, else fp16. ``name`` forces one."""
    if name is not None:
        if name not in PRECISIONS:
            raise UserError(f"--precision is one of {', '.join(PRECISIONS)}, not {name!r}.", 2)
        return PRECISIONS[name]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def precision_name(dtype: torch.dtype) -> str:
    return next(name for name, value in PRECISIONS.items() if value == dtype)


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


def new_config(
    method: str, decoder: str, vision: str, *, fit: str, prompt: str, options: dict[str, Any]
) -> dict:
    """The ``config.json`` of a model to be trained; fetches its backbones."""
    decoder_folder = hub.fetch(decoder, "decoder")
    vision_folder = hub.fetch(vision, "vision")
    return {
        "format": 1,
        "method": method,
        "decoder": {
            "name": decoder,
            "sha256": hub.fingerprint(decoder_folder),
            "config": json.loads((decoder_folder / "config.json").read_text()),
        },
        "vision": {
            "name": vision,
            "sha256": hub.fingerprint(vision_folder),
            "config": json.loads((vision_folder / "config.json").read_text()),
            "fit": fit,
        },
        "prompt": prompt,
        "options": options,
    }


def build(
    config: dict, *, device: torch.device, precision: torch.dtype, weights: bool = True
) -> Captioner:
    """The model of a ``config.json``, modules new. ``weights`` False: on the meta device."""
    if config.get("format") != 1 or config.get("method") not in METHODS:
        raise UserError(
            f"This checkpoint's method is {config.get('method')!r} in format "
            f"{config.get('format')!r}; this tinyvl reads {', '.join(METHODS)} in format 1.",
            2,
        )
    method = METHODS[config["method"]]
    lm, vision, prompt = config["decoder"], config["vision"], config.get("prompt", "")
    if not weights:
        with torch.device("meta"):
            encoder = build_image_encoder(vision["config"], fit=vision["fit"], levels=method.levels)
            decoder = Decoder(decoder_config(lm["config"]))
            text = Text(None, 0, 0)
            return method(encoder, decoder, text, vision_width=encoder.width, **config["options"])
    folders = {}
    for role, part in (("decoder", lm), ("vision", vision)):
        folders[role] = hub.fetch(part["name"], role)
        if part["sha256"] != hub.fingerprint(folders[role]):
            raise UserError(
                f"{part['name']}: the weights here are not those this model was trained with "
                f"(SHA-256 {part['sha256'][:12]}…); its captions would be wrong."
            )
    encoder = load_image_encoder(folders["vision"], fit=vision["fit"], levels=method.levels)
    decoder = load_decoder(folders["decoder"], dtype=precision)
    text = read_text(folders["decoder"], lm["config"])
    model = method(
        encoder, decoder, text, vision_width=encoder.width, prompt=prompt, **config["options"]
    )
    return place(model, device, precision)


def parts_of(config: dict) -> dict[str, Any]:
    """What of a checkpoint a run that starts from it takes over."""
    return {
        "decoder": config["decoder"]["name"],
        "vision": config["vision"]["name"],
        "fit": config["vision"]["fit"],
        "prompt": config["prompt"],
        "options": config["options"],
    }


def place(model: Captioner, device: torch.device, precision: torch.dtype) -> Captioner:
    """Moves a model: frozen parts in ``precision``, trainable ones in float32 under autocast."""
    half = precision != torch.float32
    if half:
        model.encoder.model.to(precision)  # pictures are still normalised in float32
        model.decoder.to(precision)
    model.amp = precision if half else None
    return model.to(device)


def trainable_state(model: Captioner) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if model.trainable(n)}


def load_trainable(model: Captioner, state: dict[str, torch.Tensor], where: str) -> None:
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


def write_text(file: Path, text: str) -> None:
    """Replaces a file in one stroke: a reader sees the old one or the new one, whole."""
    replace_file(file, lambda part: part.write_text(text, encoding="utf-8"))


def write_tensors(file: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    replace_file(file, lambda part: save_file(tensors, part, metadata))


def replace_file(file: Path, write: Callable[[Path], Any]) -> None:
    part = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        write(part)
        with part.open("rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(part, file)
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror}).") from error
    finally:
        part.unlink(missing_ok=True)


def save_config(folder: Path, config: dict) -> None:
    write_text(folder / "config.json", json.dumps(config, indent=1, ensure_ascii=False) + "\n")


def save(model: Captioner, folder: Path, file: str = "model.safetensors") -> None:
    """The trainable tensors, in the type they are trained in."""
    write_tensors(folder / file, trainable_state(model), {"format": "pt"})


def load_weights(model: Captioner, folder: Path) -> None:
    """Fills a built model with a checkpoint folder's trainable tensors."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: model.safetensors cannot be read ({error}).") from error
    load_trainable(model, state, str(folder))


def write_card(folder: Path, config: dict, summary: dict) -> None:
    """The model card: data, metrics, licences, the settings."""
    lines = [
        "---",
        "library_name: tinyvl",
        "tags: [image-captioning]",
        "---",
        f"# {config['method']} on {config['decoder']['name']} with {config['vision']['name']}",
        "",
        "A tinyvl checkpoint: only the trained modules; the frozen backbones are fetched by name.",
        "",
    ]
    for role in ("decoder", "vision"):
        part = config[role]
        known = hub.find(part["name"])
        licence = known.licence if known else "see its own card"
        lines.append(f"- {role}: {part['name']} (licence: {licence}; SHA-256 {part['sha256']})")
    training = config["training"]
    lines += [f"- data: {Path(training['data']).name}", ""]
    lines += ["```", shlex.join(["tinyvl", *sys.argv[1:]]), "```", "", "| | |", "|---|---|"]
    lines += [f"| {k} | {v} |" for k, v in {**summary, **training["recipe"]}.items()]
    write_text(folder / "README.md", "\n".join(lines) + "\n")


def checkpoint_folder(name: str, task: str = "caption") -> Path:
    """A checkpoint's folder: a path, ``hf://owner/name``, or ``default``."""
    if name == "default":
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


def load(
    name: str = "default",
    *,
    task: str = "caption",
    device: torch.device | None = None,
    precision: torch.dtype | None = None,
) -> Captioner:
    """A trained model, ready to run."""
    folder = checkpoint_folder(name, task)
    device = device or choose_device()
    precision = precision or choose_precision(None, device)
    model = build(read_config(folder), device=device, precision=precision)
    load_weights(model, folder)
    if model.amp:  # no gradients to keep exact: cast once, not in every step
        for name, parameter in model.named_parameters():
            if model.trainable(name):
                parameter.data = parameter.data.to(model.amp)
    return model.requires_grad_(False).eval()


def inspect(name: str) -> dict[str, Any]:
    """Parameter counts of a preset or a checkpoint, on the meta device: no weights, no network."""
    if name in PRESETS or name == "small":
        preset = PRESETS.get(name, SMALL)
        config = {
            "format": 1,
            "method": preset.method,
            "decoder": {"name": preset.decoder, "config": CONFIGS[preset.decoder]},
            "vision": {
                "name": preset.vision,
                "config": {"architecture": architecture(preset.vision)},
                "fit": preset.fit,
            },
            "options": preset.options,
        }
        extra = {"row": preset.row, "recipe": asdict(preset.recipe)}
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
        "decoder": config["decoder"]["name"],
        "vision": config["vision"]["name"],
        "options": config["options"],
        **extra,
    }


def architecture(vision: str) -> str:
    """timm's architecture of an encoder's name."""
    return {"EfficientNet-Lite2": "tf_efficientnet_lite2"}.get(vision, vision.split(".")[0])
