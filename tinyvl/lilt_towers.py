"""LilT's towers: pretrained image and text encoders in which something may be trained.

`lilt` says what is added and what is unlocked. Dropout is on in a tower that has something to
train, off in a locked one; BatchNorms keep their statistics, so that a batch cut into pieces is
still the same batch.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tinyvl import UserError
from tinyvl.encoders import ImageEncoder, Percept, build_timm, channels_last, normal
from tinyvl.encoders_text import TextEncoder, pool_tokens
from tinyvl.method import MicroBatch


def image_model(
    config: dict, *, size: int | None, grow: bool, state: dict[str, Tensor] | None = None
) -> tuple[nn.Module, int]:
    """A timm model, and how many pretrained transformer blocks it has (a CNN: 0).

    Args:
        size: of its pictures, in pixels; None: its own.
        grow: put one more block on top; it is random.
        state: pretrained weights; a ViT's position embeddings are interpolated (bicubic).

    Raises:
        UserError: a weight is missing.
    """
    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

    changes: dict[str, Any] = {}
    if size:
        overlay = {"input_size": (3, size, size)}
        changes = {"pretrained_cfg_overlay": overlay, "img_size": size}
    try:
        model: Any = build_timm(config, **changes)
    except TypeError:  # a CNN: it takes any size
        changes.pop("img_size", None)
        model = build_timm(config, **changes)
    depth = len(model.blocks) if isinstance(model, VisionTransformer) else 0
    if grow and depth:
        model = build_timm(config, depth=depth + 1, **changes)
    if state is None:
        return model, depth
    if depth:  # as the authors: no antialiasing
        state = checkpoint_filter_fn(dict(state), model, antialias=False)
    missing, _ = model.load_state_dict(state, strict=False)  # a classifier may be extra
    if missing := [n for n in missing if not (grow and n.startswith(f"blocks.{depth}."))]:
        raise UserError(
            f"The image encoder's weights of {missing[0]} (and maybe more) are missing."
        )
    return model, depth


class ImageTower(ImageEncoder):
    """A timm model of which a part may be trained. uint8 (B, 3, H, W) -> tokens (B, S, D)."""

    model: Any  # timm's
    mean: Tensor
    std: Tensor

    def __init__(
        self, model: nn.Module, *, fit: str, pool: str, tuned: frozenset[str], map_adapter: bool
    ):
        """Args:
        pool: "token" or "mean".
        tuned: names of the model's trainable parameters.
        map_adapter: all tokens are read, by a `lilt.MapAdapter`.
        """
        super().__init__(model, fit=fit)
        self.pool, self.tuned, self.map_adapter = pool, tuned, map_adapter

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

    def checkpoint(self) -> None:
        """Recompute the layers in the backward pass, where the model can."""
        if hasattr(self.model, "set_grad_checkpointing"):
            self.model.set_grad_checkpointing(True)

    def train(self, mode: bool = True) -> "ImageTower":
        """A locked tower stays in eval mode, and so do all BatchNorms."""
        nn.Module.train(self, mode and bool(self.tuned))
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.training = False
        return self


class TextTower(TextEncoder):
    """A BERT of which a part may be trained. ids, mask (B, T) -> vectors (B, D)."""

    model: Any  # transformers', or `encoders_text.Bert`

    def __init__(
        self, model: nn.Module, tokenizer: Any, *, clean: bool, prefix: str, pool: str,
        tuned: frozenset[str],
    ):  # fmt: skip
        """``pool`` and ``tuned`` as in `ImageTower`, else as in `TextEncoder`."""
        super().__init__(model, tokenizer, clean=clean, prefix=prefix)
        self.pool, self.tuned = pool, tuned

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return pool_tokens(super().forward(ids, mask), mask, self.pool)

    def checkpoint(self) -> None:
        """Recompute the layers in the backward pass."""
        enable = getattr(self.model, "activation_checkpointing_enable", None)  # newer versions
        (enable or self.model.gradient_checkpointing_enable)({"use_reentrant": False})

    def train(self, mode: bool = True) -> "TextTower":
        """A locked tower stays in eval mode: no dropout."""
        return nn.Module.train(self, mode and bool(self.tuned))


@dataclass
class Pairs(MicroBatch):
    """A micro-batch. Pictures are uint8 (I, 3, H, W), or a locked tower's tokens (I, S, D) from a
    cache; ``ids`` are (B, T), or a locked tower's vectors (B, D)."""

    mask: Tensor  # (B, T) 1 where there is a token
    keys: Tensor  # (I,) a number for each picture: equal where pictures are the same


class DualEncoder(nn.Module):
    """Two towers, and what training and loading ask of them; `lilt.LilT` is what is learnt."""

    crop_area = 0.2  # the least share of a picture's area that a random crop keeps
    reads = "tokens"
    whole_steps = True  # the loss compares all the pairs of a step: they are drawn at random
    width: int  # of the common space
    temperature: nn.Parameter

    def __init__(self, encoder: ImageTower | None, text: TextTower | None):
        """None where only the other tower is wanted, as by `tinyvl retrieve`."""
        super().__init__()
        self.encoder: Any = encoder
        self.text: Any = text
        self.amp: torch.dtype | None = None  # autocast type, set by `models.place`

    def trainable(self, name: str) -> bool:
        """Which parameters are trained, saved and counted."""
        raise NotImplementedError

    def kept(self, name: str) -> bool:
        """Which parameters a checkpoint holds: untrained random projections too."""
        return self.trainable(name) or name.partition(".")[0].endswith("projection")

    def holds(self, name: str) -> bool:
        """Which parameters of a checkpoint this model has; it may lack a tower."""
        side = self.text if name.startswith("text") else self.encoder
        return side is not None or name == "temperature"

    @property
    def device(self) -> torch.device:
        return self.temperature.device

    @property
    def fixed_pictures(self) -> bool:
        """Whether the image tower is locked: a picture gives the same in every epoch."""
        return not self.encoder.tuned

    @property
    def fixed_text(self) -> bool:
        """Whether the text tower is locked: a text gives the same in every epoch."""
        return not self.text.tuned

    def decays(self, parameter: nn.Parameter) -> bool:
        """Which parameters have weight decay: matrices, and not the temperature, as in theirs."""
        return parameter.ndim > 1

    def checkpoint(self, on: bool) -> None:
        """Recompute the towers' layers in the backward pass."""
        for tower in (self.encoder, self.text):
            if on and tower.tuned:
                tower.checkpoint()

    def autocast(self) -> AbstractContextManager:
        """Mixed precision where the model was placed with it."""
        return torch.autocast(self.device.type, self.amp) if self.amp else nullcontext()

    def halve(self, dtype: torch.dtype) -> None:
        """Puts locked matrices and filters into half precision; autocast needs the rest whole."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)) and not module.weight.requires_grad:
                module.to(dtype)

    def encode(self, captions: list[str], max_tokens: int) -> list[list[int]]:
        """Ids of captions, [CLS] and [SEP] included, as training reads them."""
        return self.text.encode(captions, max_tokens)

    def state_rows(self, caption: Sequence[int]) -> int:
        """How many rows `states` has for a caption."""
        return 1

    @torch.no_grad()
    def states(self, captions: Sequence[Sequence[int]]) -> Tensor:
        """The locked text tower's vectors (B, D) of captions' ids."""
        ids, mask = self.text.pad(captions)
        with self.autocast():
            return self.eval().text(ids.to(self.device), mask.to(self.device)).float()

    def collate(
        self,
        captions: list[list[int]],
        rows: list[int],
        pictures: Tensor,
        keys: list[int],
        states: list[Tensor] | None = None,
    ) -> Pairs:
        """A micro-batch of caption ids, or of the locked text tower's vectors in their place."""
        ids, mask = self.text.pad(captions)
        if states is not None:
            ids = torch.cat(states)
        return Pairs(pictures, torch.tensor(rows), ids, mask, torch.tensor(keys))
