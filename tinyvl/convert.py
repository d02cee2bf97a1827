"""Checkpoints of the papers' own code become tinyvl folders: ClipCap's, eP-ALM's and LilT's.

ClipCap: https://github.com/rmokady/CLIP_prefix_caption; eP-ALM: https://github.com/mshukor/eP-ALM;
LilT is in ``convert_lilt.py``. What the names and shapes of a file's tensors tell is read off them.
What we cannot compute as the authors do is refused, or said in a remark of the model card.
"""

import re
from pathlib import Path
from typing import Any

import torch

from tinyvl import UserError, files, hub, models
from tinyvl.convert_files import (
    State,
    converter,
    count,
    prepared,
    read,
    renamed,
    same,
    under,
    write,
)
from tinyvl.convert_lilt import lilt
from tinyvl.decoder_weights import convert_state, decoder_config, load_decoder
from tinyvl.encoders import head_size
from tinyvl.hub_table import AST, TIMESFORMER
from tinyvl.models_build import build_encoder
from tinyvl.progress import say

__all__ = ["clipcap", "epalm", "lilt"]

# ---------------------------------------------------------------------------------------- ClipCap

CLIPS = {512: "vit_base_patch32_clip_quickgelu_224.openai", 640: "resnet50x4_clip.openai"}
GPTS = {768: "gpt2", 1024: "gpt2-medium", 1280: "gpt2-large"}
MLP = {r"model\.0\.(\w+)": r"mapping.0.\1", r"model\.2\.(\w+)": r"mapping.2.\1"}
TRANSFORMER = {
    r"linear\.(\w+)": r"mapping.linear.\1", "prefix_const": "mapping.constants",
    r"transformer\.layers\.(\d+)\.(norm[12])\.(\w+)": r"mapping.layers.\1.\2.\3",
    r"transformer\.layers\.(\d+)\.attn\.to_queries\.(weight)": r"mapping.layers.\1.q.\2",
    r"transformer\.layers\.(\d+)\.attn\.to_keys_values\.(weight)": r"mapping.layers.\1.kv.\2",
    r"transformer\.layers\.(\d+)\.attn\.project\.(\w+)": r"mapping.layers.\1.o.\2",
    r"transformer\.layers\.(\d+)\.mlp\.fc1\.(\w+)": r"mapping.layers.\1.up.\2",
    r"transformer\.layers\.(\d+)\.mlp\.fc2\.(\w+)": r"mapping.layers.\1.down.\2",
}  # fmt: skip
BEAMS = (
    "Greedy captions (--beams 1) are those of the authors' code; its beam search keeps finished "
    "texts in another way."
)


@converter
def clipcap(
    file: Path, out: Path, language: str | None, vision: str | None, *, unit: bool | None = None
) -> None:
    """ClipCap with a frozen GPT-2; None: the backbone that the widths are of.

    ``unit``: pictures' vectors have length one (the authors' ``--normalize_prefix``). None: those
    of a transformer over RN50x4's 640 numbers have, as of the released one. UserError: as in `read`
    and `write`; the language model was tuned, or the encoder's projection has another width.
    """
    state, _ = read(file)
    mapper = under(state, "clip_project.")
    if "prefix_const" in mapper and "linear.weight" in mapper:
        length, width = mapper["prefix_const"].shape
        seen = mapper["linear.weight"].shape[1]
        if len(mapper["linear.weight"]) != length * width:
            clip = len(mapper["linear.weight"]) // width
            raise UserError(
                f"{file}: {clip} tokens of the picture and a prefix of {length}; tinyvl's mapping "
                "has as many of both."
            )
        layers = count(mapper, r"transformer\.layers\.(\d+)\.")
        options = {"mapping": "transformer", "layers": layers, "heads": 8}
        names = TRANSFORMER
    elif "model.0.weight" in mapper and "model.2.weight" in mapper:
        seen, width = mapper["model.0.weight"].shape[1], width_of(state, language)
        length, options, names = len(mapper["model.2.weight"]) // width, {"mapping": "mlp"}, MLP
    else:
        raise UserError(f"{file}: no clip_project of ClipCap's, MLP or transformer, in there.", 2)
    language, vision = language or GPTS.get(width), vision or CLIPS.get(seen)
    if not (language and vision):
        raise UserError(f"Name the backbones of width {width} (--lm) and {seen} (--vision).", 2)
    if unit is None and (unit := names is TRANSFORMER and seen == 640):
        say("Vectors are scaled to length one, as for the authors' released transformer.")
    config = models.new_config(
        "clipcap", language, vision, fit="crop", prompt="",
        options=options | {"length": length, "bare": True},
        media={"projected": "unit" if unit else "plain"},
    )  # fmt: skip
    prepared(config, crop_pct=1.0, crop_mode="center")
    size = head_size(config["vision"]["config"])
    if size != seen:
        raise UserError(f"{file} reads {seen} numbers of a picture; {vision} gives {size}.", 2)
    frozen(under(state, "gpt."), config["decoder"], file)
    if re.match(r"vit\w*_clip_\d.*\.openai", vision):
        say("OpenAI's CLIP was trained with QuickGELU: timm's names with quickgelu compute it.")
    write(out, file, config, renamed(mapper, names, file), [BEAMS])


def width_of(state: State, language: str | None) -> int:
    """The width of the embeddings in a file, or in the named language model."""
    tables = [t for n, t in state.items() if re.search(r"\.(wte|embed_tokens)\.weight$", n)]
    if tables:
        return tables[0].shape[1]
    folder = hub.fetch(language or "gpt2", "decoder")
    return decoder_config(files.read_object(folder / "config.json")).embed_size


def frozen(gpt: State, decoder: dict[str, Any], file: Path) -> None:
    """Raises a UserError where a file's language model is not the named one."""
    if not gpt:
        return
    try:
        theirs = convert_state(
            decoder["config"]["model_type"], gpt, decoder_config(decoder["config"])
        )
    except KeyError as error:
        raise UserError(f"{file}: its language model is of another kind (no {error}).") from None
    for name, own in load_decoder(hub.fetch(decoder["name"], "decoder")).named_parameters():
        if name not in theirs or not same(theirs[name], own):
            raise UserError(
                f"{file}: its language model is not {decoder['name']} ({name} differs): tinyvl "
                "keeps the language model frozen, so a tuned one is not converted."
            )


# ----------------------------------------------------------------------------------------- eP-ALM

OPTS = {width: f"facebook/opt-{size}" for width, size in (
    (768, "125m"), (1024, "350m"), (2048, "1.3b"), (2560, "2.7b"), (4096, "6.7b"),
)}  # fmt: skip
ENCODERS = {
    ("image", 768): "vit_base_patch16_224.augreg_in21k_ft_in1k",
    ("image", 1024): "vit_large_patch16_224.augreg_in21k_ft_in1k",
    ("video", 768): TIMESFORMER, ("audio", 768): AST,
}  # fmt: skip
BLOCK = r"(?:model_text\.model\.decoder\.layers|transformer)\.(\d+)"
EPALM = {
    r"connector\.(\d+)\.(\w+)": r"connector.\1.\2",
    r"prompt_module\.prefix_embedding\.0\.weight": "soft.tokens.weight",
    r"prompt_module\.prefix_embedding\.1\.(\w+)": r"soft.mlp.0.\1",
    r"prompt_module\.prefix_embedding\.3\.(\w+)": r"soft.mlp.2.\1",
    BLOCK + r"\.self_attn\.adapter\.0\.(\w+)": r"adapters.\1.0.down.\2",
    BLOCK + r"\.self_attn\.adapter\.2\.(\w+)": r"adapters.\1.0.up.\2",
    BLOCK + r"\.fc2\.1\.adapter\.0\.(\w+)": r"adapters.\1.1.down.\2",
    BLOCK + r"\.fc2\.1\.adapter\.2\.(\w+)": r"adapters.\1.1.up.\2",
}  # fmt: skip


@converter
def epalm(
    file: Path, out: Path, language: str | None, vision: str | None, *, task: str = "caption",
    modality: str = "image", extract: list[int] | None = None, inject: list[int] | None = None,
    frames: int | None = None,
) -> None:  # fmt: skip
    """eP-ALM; None: the backbones that the widths are of, and what the file's own config says.

    Args:
        task, modality: what it was trained for; the file does not tell.
        extract, inject: levels and layers, as `epalm.EPalm`'s.
        frames: of a video.

    UserError: as in `read` and `write`; the levels do not divide the layers evenly.
    """
    state, rest = read(file)
    told = rest["config"] if isinstance(rest.get("config"), dict) else {}
    if told.get("text_step", 1) != 1 or told.get("select_higher_step"):
        raise UserError(f"{file}: its slot is not replaced in every layer; not converted.")
    state = renamed(state, EPALM, file)
    connections = count(state, r"connector\.(\d+)\.")
    if not connections:
        raise UserError(f"{file}: no connector of eP-ALM's in there.", 2)
    width, seen = state["connector.0.weight"].shape
    language, vision = language or OPTS.get(width), vision or ENCODERS.get((modality, seen))
    if not (language and vision):
        raise UserError(f"Name the backbones of width {width} (--lm) and {seen} (--vision).", 2)
    options = {"task": task} | soft_of(state) | adapters_of(state, width)
    media: dict[str, Any] = {} if modality == "image" else {"modality": modality}
    if modality == "video":
        media["frames"] = frames or told.get("num_frames") or {"vqa": 8, "caption": 16}[task]
    config = models.new_config(
        "epalm", language, vision, fit="squash", prompt="", options=options, media=media
    )
    prepared(config)
    with torch.device("meta"):
        levels = len(build_encoder(config["vision"]).widths)
    layers = decoder_config(config["decoder"]["config"]).layers
    if inject is None and told.get("end_layer_idx"):
        inject = [told.get("start_layer_idx", 0), told["end_layer_idx"]]
    if inject is None:
        inject = [max(0, layers - 13), layers - 1]
        say(f"{file} does not say the layers it injects into: the authors' {inject[0]}:{inject[1]}")
    number = connections if connections > 1 else told.get("injected_hidden_states")
    if extract is None and number is None:
        raise UserError(f"{file} has one connection; say with --extract which levels it is of.", 2)
    first, end = extract or (levels - int(number or 0), levels)
    if (inject[1] - inject[0]) % max(1, end - first):
        raise UserError(
            f"{end - first} levels do not divide {inject[1] - inject[0]} layers evenly: the "
            "authors' code shares such layers out in another way; not converted."
        )
    options |= {"extract": [first, end], "inject": inject}
    options["shared"] = connections == 1 and end - first > 1
    write(out, file, config, state, remarks_on(config, inject[1], layers))


def soft_of(state: State) -> dict[str, Any]:
    """The options of the soft prompt."""
    tokens = state.get("soft.tokens.weight")
    return {"soft": 0 if tokens is None else len(tokens), "mlp": "soft.mlp.0.weight" in state}


def adapters_of(state: State, width: int) -> dict[str, Any]:
    """The options of the adapters. Where one of a layer's two is missing, one that adds zero."""
    sizes = {len(t) for name, t in state.items() if name.endswith("down.weight")}
    numbers = sorted({int(name.split(".")[1]) for name in state if name.startswith("adapters.")})
    if not sizes:
        return {}
    size, span = min(sizes), [numbers[0], numbers[-1] + 1]
    for number in range(*span):
        for place in (0, 1):
            shapes = {"down.weight": (size, width), "down.bias": (size,)}
            shapes |= {"up.weight": (width, size), "up.bias": (width,)}
            for name, shape in shapes.items():
                state.setdefault(f"adapters.{number}.{place}.{name}", torch.zeros(shape))
    return {"adapters": width // size, "adapt": span}


def remarks_on(config: dict[str, Any], end: int, layers: int) -> list[str]:
    """What the model computes in another way than the authors' code."""
    found = []
    if end < layers:
        found.append(
            f"In the layers from {end} on the authors' slot has read the whole text, here only "
            "itself: outputs differ by what these layers make of it."
        )
    if config["vision"]["config"].get("model_type") == "timesformer":
        found.append(
            "Frames are normalised by TimeSformer's own mean and deviation, not by CLIP's, and are "
            "taken from the middle of each part of a video, not at random."
        )
    return found
