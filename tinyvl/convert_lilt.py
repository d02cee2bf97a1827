"""LilT's checkpoints: https://github.com/codezakh/LilT.

They hold both towers, locked or not: comparing them with the named ones shows what was trained.
"""

from pathlib import Path
from typing import Any

import torch

from tinyvl import UserError, models
from tinyvl.convert_files import (
    State,
    converter,
    count,
    prepared,
    read,
    renamed,
    same,
    under,
    wanted_by,
    write,
)
from tinyvl.lilt import unlocked
from tinyvl.lilt_towers import image_model
from tinyvl.presets_options import Tuning

IMAGE_NAMES = {
    r"(blocks\.\d+)\.adapter([12])\.down_sampler\.(\w+)": r"\1.norm\2.adapter.down.\3",
    r"(blocks\.\d+)\.adapter([12])\.up_sampler\.(\w+)": r"\1.norm\2.adapter.up.\3",
    r"(blocks\.\d+)\.gamma_([12])": r"\1.ls\2.gamma",
    r"((?:cls_token|pos_embed|patch_embed\.|blocks\.|norm\.).*)": r"\1",
}  # fmt: skip
TEXT_NAMES = {
    r"(.*\.output)\.adapter\.down_sampler\.(\w+)": r"\1.dropout.adapter.down.\2",
    r"(.*\.output)\.adapter\.up_sampler\.(\w+)": r"\1.dropout.adapter.up.\2",
    r"((?:embeddings|encoder)\..*)": r"\1",
}  # fmt: skip
LAYERS = {"image": r"blocks\.(\d+)\.", "text": r"encoder\.layer\.(\d+)\."}


@converter
def lilt(
    file: Path, out: Path, text: str, vision: str, *, text_unlock: str | None = None,
    image_unlock: str | None = None,
) -> None:  # fmt: skip
    """LilT, LiT or CLIP over the two named encoders.

    ``text_unlock`` and ``image_unlock`` "all": this tower was trained whole. None: what of it was
    trained is seen by comparing it with the named one. UserError: as in `read` and `write`; what
    should be locked differs from the named encoder.
    """
    state, _ = read(file)
    ends = {"vision_proj": "image_projection", "text_proj": "text_projection"}
    rest = {f"{b}.{k}": t for a, b in ends.items() for k, t in under(state, f"{a}.").items()}
    towers = {"image": under(state, "visual_encoder."), "text": under(state, "text_encoder.")}
    if not (all(towers.values()) and "temp" in state and "image_projection.weight" in rest):
        raise UserError(f"{file}: no visual_encoder and text_encoder of LilT's in there.", 2)
    options: dict[str, Any] = {"clean": True, "token_types": False}
    options |= {"embed": len(rest["image_projection.weight"])}
    config = models.new_config("lilt", text, vision, fit="squash", prompt="", options=options)
    prepared(config)
    places, filters = (towers["image"].get(n) for n in ("pos_embed", "patch_embed.proj.weight"))
    if places is None or filters is None:
        raise UserError(f"{file}: its visual_encoder is no ViT.", 2)
    options["size"] = int(places.shape[1] ** 0.5) * filters.shape[-1]  # with or without [CLS]
    for side in towers:
        options[side] = {"adapter": adapter_of(side, towers[side], config, file), "unlock": "none"}
        towers[side] = tower_state(side, towers[side], file)
    model: Any = models.build(config, device=torch.device("cpu"), precision=torch.float32)
    chosen = {"image": image_unlock, "text": text_unlock}
    for side, own in (("image", model.encoder), ("text", model.text)):
        where = f"the {side} tower is not that of {config[side]['name']}"
        learnt = trained(side, own, towers[side], chosen[side], f"{file}: {where}")
        options[side]["unlock"] = learnt
    found = {f"encoder.model.{name}": tensor for name, tensor in towers["image"].items()}
    found |= {f"text.model.{name}": tensor for name, tensor in towers["text"].items()}
    found |= rest | {"temperature": state["temp"]}
    wanted = wanted_by(config)
    write(out, file, config, {n: t for n, t in found.items() if n in wanted}, [])


def adapter_of(side: str, tower: State, config: dict[str, Any], file: Path) -> str:
    """What was added to a tower: "none", "layerwise" adapters or a "deep" one."""
    if side == "image":
        with torch.device("meta"):
            depth = image_model(config["image"]["config"], size=None, grow=False)[1]
    else:
        depth = config["text"]["config"].get("num_hidden_layers", 0)
    more = count(tower, LAYERS[side]) - depth
    inside = any(".down_sampler." in name for name in tower)
    if more not in (0, 1) or (more and inside):
        has = f"{depth + more} {side} layers{' with adapters' * inside}"
        raise UserError(f"{file}: {has}, and {config[side]['name']} has {depth}; not converted.")
    return "deep" if more else "layerwise" if inside else "none"


def tower_state(side: str, tower: State, file: Path) -> State:
    """A tower's tensors under the names of ours."""
    tower = {name: t for name, t in tower.items() if name != "embeddings.position_ids"}
    inside = any(".down_sampler." in name for name in tower)
    names = {"image": IMAGE_NAMES, "text": TEXT_NAMES}[side]
    if inside and side == "image":  # the adapter stands before the norm
        names = {r"(blocks\.\d+\.norm[12])\.(\w+)": r"\1.norm.\2"} | names
    return renamed(tower, names, file)


def trained(side: str, own: Any, tower: State, chosen: str | None, where: str) -> str:
    """What of a pretrained tower was trained: "none", "layernorm", "bitfit" or "all".

    ``own``: the named tower with what was added to it. UserError: something else differs.
    """
    fixed = own.model.state_dict()
    fixed.pop("embeddings.token_type_embeddings.weight", None)  # theirs has none
    if odd := sorted(fixed.keys() ^ tower.keys()):
        raise UserError(f"{where} ({odd[0]} is in one of them only).")
    if chosen == "all":
        return "all"
    off = {"pos_embed": 1e-3}  # it was interpolated
    changed = [
        name
        for name, tensor in fixed.items()
        if name not in own.tuned and not same(tower[name], tensor.float(), off.get(name, 1e-6))
    ]
    for kind in ("none", "layernorm", "bitfit"):
        if unlocked(own.model, Tuning(unlock=kind), 0).issuperset(changed):
            return kind
    whole = f"name the right one, or add --{side}-unlock all if it was trained whole"
    raise UserError(f"{where} ({changed[0]} differs): {whole}.")
