"""LilT's towers: a frozen image or text encoder of which a part is unlocked, or something added.

`lilt` says what they are for. Layerwise adapters stand where the authors' code has them: on a ViT
block's branch, before norm1 and norm2; in BERT after the dense layer and its dropout, before the
LayerNorm that adds the residual. Deep adapters are one more layer on top of a stack. Dropout is on
in a tower that has something to train, off in a locked one; BatchNorms keep their statistics, so
that a batch cut into pieces is still the same batch.

A tower without [CLS] (a CNN) is read by the mean of its last feature map; a deep adapter on it is
one transformer block over the map's cells, projected to a width of choice.
"""

import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyvl import UserError
from tinyvl.encoders import ImageEncoder, Percept, build_timm, channels_last, norm_types, normal
from tinyvl.encoders_text import TextEncoder, pool_tokens

ADAPTERS = ("none", "layerwise", "deep")
UNLOCKS = ("none", "layernorm", "bitfit", "all")


@dataclass(frozen=True)
class Tuning:
    """What of a tower is trained, and how it is read."""

    adapter: str = "none"  # ADAPTERS
    unlock: str = "none"  # UNLOCKS: of the pretrained parameters
    layers: tuple[int, int] | None = None  # unlock only in first..last; -1 is the deepest (Fig. 5)
    pool: str | None = None  # "token", "mean"; None: the paper's token 0 where there is one
    width: int = 384  # of the block over a feature map
    dropout: float = 0.0  # of what the projection reads, in training; the paper has none

    def __post_init__(self):
        for name, known in (("adapter", ADAPTERS), ("unlock", UNLOCKS)):
            if getattr(self, name) not in known:
                raise UserError(f"{name} is one of {', '.join(known)}.", 2)
        if self.layers and self.unlock == "none":
            raise UserError(
                "Layers are chosen of what is unlocked: name that too, as by --text-unlock "
                "layernorm or --image-unlock layernorm.",
                2,
            )


# ---------------------------------------------------------------------------------- what is added


class Adapter(nn.Module):
    """x + W_up gelu(W_down x), with biases; the bottleneck has a quarter of the width."""

    def __init__(self, width: int, init: Callable[[Tensor], Any], reduction: int = 4):
        super().__init__()
        self.down = nn.Linear(width, width // reduction)
        self.up = nn.Linear(width // reduction, width)
        for layer in (self.down, self.up):
            init(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(F.gelu(self.down(x)))


def add_layerwise_adapters(model: nn.Module) -> int:
    """Two adapters in each layer of a timm ViT or a BERT, initialised as each is; -> how many."""
    count = 0
    for module in list(model.modules()):
        if all(hasattr(module, name) for name in ("norm1", "attn", "norm2", "mlp")):
            for name in ("norm1", "norm2"):
                norm = getattr(module, name)
                adapter = Adapter(norm.weight.numel(), partial(nn.init.trunc_normal_, std=0.02))
                setattr(module, name, nn.Sequential(OrderedDict(adapter=adapter, norm=norm)))
                count += 1
        elif all(hasattr(module, name) for name in ("dense", "dropout", "LayerNorm")):
            # BERT: LayerNorm(dropout(dense(h)) + residual)
            adapter = Adapter(module.dense.out_features, partial(nn.init.normal_, std=0.02))
            parts = OrderedDict(dropout=module.dropout, adapter=adapter)
            module.dropout = nn.Sequential(parts)
            count += 1
    return count


class MapAdapter(nn.Module):
    """A deep adapter for a feature map: one transformer block over its cells, then their mean."""

    def __init__(self, cells: int, map_width: int, width: int):
        from timm.models.vision_transformer import Block

        super().__init__()
        self.project = nn.Linear(map_width, width)
        self.positions = nn.Parameter(torch.zeros(cells, width))
        self.block = Block(width, num_heads=max(1, width // 64), qkv_bias=True)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, S, D) -> (B, width)."""
        return self.norm(self.block(self.project(tokens) + self.positions)).mean(1)


# -------------------------------------------------------------------------------- what is unlocked


def unlocked(model: nn.Module, tuning: Tuning, depth: int, grown: int, where: str) -> frozenset:
    """Names of a tower's trainable parameters. ``depth`` counts its pretrained layers."""
    names = [name for name, _ in model.named_parameters()]
    added = re.compile(r"\.adapter\.")
    if grown:  # the new layer, and the norm behind a ViT's stack
        added = re.compile(rf"(^|\.)(layer|blocks)\.{depth}\.|^norm\.")
    norms = {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, norm_types())
        for name, _ in module.named_parameters()
    }
    kinds = {
        "none": lambda name: False,
        "layernorm": norms.__contains__,
        "bitfit": lambda name: "bias" in name,
        "all": lambda name: True,
    }
    first, last = (i if i >= 0 else depth + i for i in tuning.layers or (0, -1))

    def inside(name: str) -> bool:
        found = re.search(r"(?:^|\.)(?:layer|blocks)\.(\d+)\.", name)
        layer = int(found[1]) if found else depth - 1 if name.startswith("norm.") else 0
        return first <= layer <= last  # embeddings go with the first layer, the norm with the last

    chosen = {n for n in names if kinds[tuning.unlock](n) and (inside(n) or not tuning.layers)}
    if tuning.unlock != "none" and not chosen:
        what = {"layernorm": "LayerNorms", "bitfit": "biases"}.get(tuning.unlock, "parameters")
        layers = f" in the layers {first} to {last}" if tuning.layers else ""
        raise UserError(f"{where} has no {what}{layers} to unlock; choose another preset.", 2)
    return frozenset(chosen | {n for n in names if tuning.adapter != "none" and added.search(n)})


# ---------------------------------------------------------------------------------------- towers


def image_model(
    config: dict, *, size: int | None, grow: bool, state: dict[str, Tensor] | None = None
) -> nn.Module:
    """A timm model for pictures of ``size`` pixels, its stack one block deeper with ``grow``.

    Args:
        state: pretrained weights; a ViT's position embeddings are interpolated (bicubic), a new
            block stays random.
    """
    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

    changes: dict[str, Any] = {}
    if size:
        overlay = {"input_size": (3, size, size)}
        changes = {"pretrained_cfg_overlay": overlay, "img_size": size}
    try:
        model = build_timm(config, **changes)
    except TypeError:  # a CNN: it takes any size
        changes.pop("img_size", None)
        model = build_timm(config, **changes)
    depth = len(model.blocks) if isinstance(model, VisionTransformer) else 0
    if grow and depth:
        model = build_timm(config, depth=depth + 1, **changes)
    if state is None:
        return model
    if depth:  # as the authors: no antialiasing
        state = checkpoint_filter_fn(dict(state), model, antialias=False)
    missing, _ = model.load_state_dict(state, strict=False)  # a classifier may be extra
    if missing := [n for n in missing if not (grow and n.startswith(f"blocks.{depth}."))]:
        raise UserError(
            f"The image encoder's weights of {missing[0]} (and maybe more) are missing."
        )
    return model


class ImageTower(ImageEncoder):
    """A timm model of which a part may be trained. uint8 (B, 3, H, W) -> tokens (B, S, D)."""

    def __init__(self, model: nn.Module, *, fit: str, tuning: Tuning, where: str):
        from timm.models.vision_transformer import VisionTransformer

        super().__init__(model, fit=fit)
        vit = isinstance(model, VisionTransformer)
        grown = vit and tuning.adapter == "deep"
        depth = len(model.blocks) - grown if vit else 0
        self.map_adapter = tuning.adapter == "deep" and not vit
        if tuning.adapter == "layerwise" and not (vit and add_layerwise_adapters(model)):
            raise UserError(
                f"{where} has no transformer blocks to put layerwise adapters in; use a deep "
                "adapter (--image-adapter deep) or a ViT.",
                2,
            )
        if tuning.layers and not vit:
            raise UserError(f"{where} has no transformer layers to choose from.", 2)
        self.pool = tuning.pool or ("token" if getattr(model, "num_prefix_tokens", 0) else "mean")
        if self.pool == "token" and not getattr(model, "num_prefix_tokens", 0):
            raise UserError(f"{where} has no [CLS] token; pool its tokens by their mean.", 2)
        own = Tuning("none" if self.map_adapter else tuning.adapter, tuning.unlock, tuning.layers)
        self.tuned = unlocked(model, own, depth, grown, where)

    def forward(self, images: Tensor) -> Percept:
        """-> tokens (B, S, D): all that a map adapter reads, else one pooled vector (S = 1)."""
        x = (images.float() / 255 - self.mean) / self.std
        x = x.contiguous(memory_format=torch.channels_last)
        tokens = channels_last(self.model.forward_features(x), self.width)
        if not self.final_norm:
            tokens = normal(tokens.float())
        return Percept(tokens if self.map_adapter else self.pooled(tokens)[:, None], [])

    def pooled(self, tokens: Tensor) -> Tensor:
        """(B, S, D) -> (B, D)."""
        return tokens[:, 0] if self.pool == "token" else tokens.mean(1)

    def train(self, mode: bool = True):
        """Locked towers stay in eval mode, and so do all BatchNorms."""
        nn.Module.train(self, mode and bool(self.tuned))
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.training = False
        return self


class TextTower(TextEncoder):
    """A BERT of which a part may be trained. ids, mask (B, T) -> vectors (B, D)."""

    def __init__(
        self, model: nn.Module, tokenizer: Any, *, clean: bool, tuning: Tuning, where: str
    ):
        super().__init__(model, tokenizer, clean=clean)
        grown = tuning.adapter == "deep"
        if tuning.adapter == "layerwise" and not add_layerwise_adapters(self.model):
            raise UserError(f"{where} is no BERT that layerwise adapters fit into.", 2)
        self.pool = tuning.pool or "token"
        depth = self.model.config.num_hidden_layers - grown
        self.tuned = unlocked(self.model, tuning, depth, grown, where)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return pool_tokens(super().forward(ids, mask), mask, self.pool)

    def train(self, mode: bool = True):
        """A locked tower stays in eval mode: no dropout."""
        return nn.Module.train(self, mode and bool(self.tuned))
