"""LilT's towers: pretrained image and text encoders in which something may be trained.

`lilt` says what is added and what is unlocked. Dropout is on in a tower that has something to
train, off in a locked one; BatchNorms keep their statistics, so that a batch cut into pieces is
still the same batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyvl import UserError
from tinyvl.encoders import (
    ImageEncoder,
    Percept,
    build_timm,
    channels_last,
    check_weights,
    normal,
    refuse_missing,
)
from tinyvl.encoders_text import Bert, pool_tokens
from tinyvl.method import Method, MicroBatch, pad
from tinyvl.text import WORDS, clean_caption, cut, tidy


def image_model(
    config: dict, folder: Path | None = None, *, size: int | None, grow: bool
) -> tuple[nn.Module, int]:
    """A timm model, and how many pretrained transformer blocks it has (a CNN: 0).

    Args:
        folder: of the weights (UserError: one is missing); a ViT's position embeddings are
            interpolated (bicubic). None: random.
        size: of its pictures, in pixels; None: its own.
        grow: put one more block on top; it is random.
    """
    from safetensors.torch import load_file
    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

    changes: dict[str, Any] = {}
    if size:
        overlay = {"input_size": (3, size, size)}
        changes = {"pretrained_cfg_overlay": overlay, "img_size": size}
    if folder is not None and config.get("model_args"):
        check_weights(lambda: build_timm(config), folder)
    try:
        model: Any = build_timm(config, **changes)
    except TypeError:  # a CNN: it takes any size
        changes.pop("img_size", None)
        model = build_timm(config, **changes)
    depth = len(model.blocks) if isinstance(model, VisionTransformer) else 0
    if grow and depth:
        model = build_timm(config, depth=depth + 1, **changes)
    if folder is None:
        return model, depth
    state = load_file(folder / "model.safetensors")
    if depth:  # as the authors: no antialiasing
        state = checkpoint_filter_fn(state, model, antialias=False)
    missing, _ = model.load_state_dict(state, strict=False)  # a classifier may be extra
    refuse_missing([n for n in missing if not (grow and n.startswith(f"blocks.{depth}."))], folder)
    return model, depth


def lacks_detail(images: Tensor) -> Tensor:
    """Which pictures, uint8 (B, 3, H, W), are blurred: bool (B,). Those of one colour are not.

    Reduced to a quarter of their sides, these lose less than a twentieth of their contrast (both as
    root mean squares). Most photos do that have been enlarged five times or more, and hardly any
    others.
    """
    x = images.float().mean(1, keepdim=True)
    quarter = [side // 4 for side in x.shape[2:]]
    reduced = F.interpolate(x, quarter, mode="bicubic", antialias=True)
    lost = F.interpolate(reduced, x.shape[2:], mode="bicubic") - x
    contrast = x - x.mean((2, 3), keepdim=True)
    most = contrast.square().mean((1, 2, 3))
    return (lost.square().mean((1, 2, 3)) * 20**2 < most) & (most > 1)


class ImageTower(ImageEncoder):
    """A timm model of which a part may be trained. uint8 (B, 3, H, W) -> tokens (B, S, D)."""

    model: Any  # timm's
    mean: Tensor
    std: Tensor

    def __init__(
        self, model: nn.Module, *, fit: str, pool: str, tuned: frozenset[str], map_adapter: bool,
        blurred: int = 0,
    ):  # fmt: skip
        """Args:
            pool: "token" or "mean".
            tuned: names of the model's trainable parameters.
            map_adapter: all tokens are read, by a `lilt.MapAdapter`.
            blurred: side in pixels at which a CNN reads pictures without detail as well. 0: none.

        UserError: the model, or what is made of its tokens, does not go with ``blurred``.
        """
        super().__init__(model, fit=fit)
        fixed = not self.maps or self.model.pretrained_cfg.get("fixed_input_size")
        if blurred and (fixed or pool != "mean" or map_adapter or not 32 <= blurred < self.size):
            need = "needs a CNN of any size that is read by its mean"
            most = self.size - 1
            raise UserError(f"--image-blurred {blurred} {need}, and 32 to {most} pixels.", 2)
        self.blurred = blurred
        self.pool, self.tuned, self.map_adapter = pool, tuned, map_adapter
        self.learns = bool(tuned)

    def forward(self, images: Tensor) -> Percept:
        """-> tokens (B, S, D): all that a map adapter reads, else one pooled vector (S = 1)."""
        tokens = self.tokens(images)
        return Percept(tokens if self.map_adapter else self.pooled(tokens)[:, None], [])

    def tokens(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> all tokens (B, S, D), normalised.

        What a small picture shows is larger than anything a CNN has learnt from, once enlarged to
        the model's size. So of blurred ones the mean is that of two readings, at two sizes; the one
        at the smaller is itself the mean of picture and mirror image.
        """
        tokens = self.cells(images)
        if self.blurred and (rows := lacks_detail(images)).any():
            side = (self.blurred, self.blurred)
            small = F.interpolate(images.float(), side, mode="bicubic", antialias=True)
            small = small.clamp(0, 255)
            both = [self.cells(x) for x in (small, small.flip(-1))]  # of all: to the same bits
            mean = torch.cat(both, 1).mean(1, keepdim=True)
            tokens = torch.where(rows[:, None, None], (tokens + mean) / 2, tokens)
        return tokens

    def cells(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), 0 to 255, as they are -> tokens (B, S, D), normalised."""
        x = (images.float() / 255 - self.mean) / self.std
        x = x.contiguous(memory_format=torch.channels_last)
        tokens = channels_last(self.model.forward_features(x), self.width)
        return tokens if self.final_norm else normal(tokens.float())

    def pooled(self, tokens: Tensor) -> Tensor:
        """(B, S, D) -> (B, D)."""
        return tokens[:, 0] if self.pool == "token" else tokens.mean(1)

    def checkpoint(self) -> None:
        """Recompute the layers in the backward pass, where the model can."""
        if hasattr(self.model, "set_grad_checkpointing"):
            self.model.set_grad_checkpointing(True)

    def train(self, mode: bool = True) -> "ImageTower":
        """A locked tower stays in eval mode, and so do all BatchNorms."""
        nn.Module.train(self, mode and self.learns)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.training = False
        return self


class TextTower(nn.Module):
    """A BERT of which a part may be trained. ids, mask (B, T) -> vectors (B, D)."""

    def __init__(
        self, model: Any, tokenizer: Any, *, clean: bool, pool: str, tuned: frozenset[str],
        prefix: str = "",
    ):  # fmt: skip
        """Args:
        model: transformers', or `encoders_text.Bert`.
        tokenizer: an `encoders_text.Tokenizer`; None where only parameters are counted.
        clean: texts go through `clean_caption` first.
        pool, tuned: as in `ImageTower`.
        prefix: every text then begins with this.
        """
        super().__init__()
        self.model, self.tokenizer, self.clean, self.prefix = model, tokenizer, clean, prefix
        self.pool, self.tuned, self.learns = pool, tuned, bool(tuned)
        self.width: int = model.config.hidden_size

    def encode(self, texts: list[str], max_tokens: int | None) -> list[list[int]]:
        """Ids of each text with begin and end, cut to ``max_tokens`` in all.

        The prefix's tokens come on top of these. None: as many as the model reads.
        """
        if self.clean:
            words = [clean_caption(text, None).split() for text in texts]
            if max_tokens is not None:
                words = cut(words, WORDS, "words")
            texts = list(map(" ".join, words))
        else:
            texts = list(map(tidy, texts))
        positions = self.model.embeddings.position_embeddings
        longest = positions.num_embeddings
        if positions.padding_idx is not None:  # RoBERTa's kin count from the one behind it
            longest -= positions.padding_idx + 1
        if max_tokens is not None:
            own, nothing = self.tokenizer([self.prefix.strip(), ""])
            longest = min(longest, max_tokens + len(own) - len(nothing))
        lines = self.tokenizer([self.prefix + text for text in texts])
        return cut(lines, longest, "tokens", tail=len(self.tokenizer.end))

    def pad(self, ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Lists of ids to a tensor (B, T) padded on the right, and its mask (B, T) of 1 and 0."""
        fill = self.tokenizer.pad_token_id
        # Attention over no token at all is NaN: a text without tokens has one of padding.
        out, real = pad([line or [fill] for line in ids], fill)
        return out, real.long()

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        here = mask.to(ids.device, non_blocking=True)
        seen = mask if isinstance(self.model, Bert) else here  # ours packs by a mask on the host
        states = self.model(input_ids=ids, attention_mask=seen).last_hidden_state
        return pool_tokens(states, here, self.pool)

    def checkpoint(self) -> None:
        """Recompute the layers in the backward pass."""
        enable = getattr(self.model, "activation_checkpointing_enable", None)  # newer versions
        (enable or self.model.gradient_checkpointing_enable)({"use_reentrant": False})

    def train(self, mode: bool = True) -> "TextTower":
        """A locked tower stays in eval mode: no dropout."""
        return super().train(mode and self.learns)


@dataclass
class Pairs(MicroBatch):
    """A micro-batch. Pictures are uint8 (I, 3, H, W), or a locked tower's tokens (I, S, D) from a
    cache; ``ids`` are (B, T), or a locked tower's vectors (B, D)."""

    mask: Tensor  # (B, T) 1 where there is a token


class DualEncoder(Method):
    """Two towers, and what training and loading ask of them; `lilt.LilT` is what is learnt."""

    crop_area = 0.2
    whole_steps = True
    width: int  # of the common space

    def __init__(self, encoder: ImageTower | None, text: TextTower | None):
        """None where only the other tower is wanted, as by `tinyvl retrieve`."""
        super().__init__()
        self.encoder, self.text = encoder, text

    def kept(self, name: str) -> bool:
        """Untrained random projections, too."""
        return self.trainable(name) or name.partition(".")[0].endswith("projection")

    def holds(self, name: str) -> bool:
        side = self.text if name.startswith("text") else self.encoder
        return side is not None or name == "temperature"

    def lock(self, side: str) -> None:
        """What was trained in the "text" or "image" tower stays as it is, and is still kept."""
        tower: Any = self.text if side == "text" else self.encoder
        tower.learns = False
        tower.requires_grad_(False)

    @property
    def fixed_pictures(self) -> bool:
        return not self.encoder.learns

    @property
    def fixed_text(self) -> bool:
        return not self.text.learns

    def decays(self, parameter: nn.Parameter) -> bool:
        """Matrices only, as in theirs."""
        return parameter.ndim > 1

    def checkpoint(self, on: bool) -> None:
        for tower in (self.encoder, self.text):
            if on and tower.learns:
                tower.checkpoint()

    def halve(self, dtype: torch.dtype) -> None:
        """Locked matrices and filters; autocast needs the rest whole."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)) and not module.weight.requires_grad:
                module.to(dtype)

    def pack(self) -> None:
        if self.encoder:
            self.encoder.pack()

    def encode(self, captions: list[str], max_tokens: int) -> list[list[int]]:
        """With [CLS] and [SEP]."""
        return self.text.encode(captions, max_tokens)

    def state_rows(self, caption: Sequence[int]) -> int:
        return 1

    @torch.no_grad()
    def states(self, captions: Sequence[Sequence[int]]) -> Tensor:
        """The locked text tower's vectors (B, D)."""
        ids, mask = self.text.pad(captions)
        with self.autocast():
            return self.eval().text(ids.to(self.device), mask.to(self.device)).float()

    def collate(
        self, captions: list[list[int]], rows: list[int], pictures: Tensor, keys: list[int],
        states: list[Tensor] | None = None,
    ) -> Pairs:  # fmt: skip
        ids, mask = self.text.pad(captions)
        if states is not None:
            ids = torch.cat(states)
        return Pairs(pictures, torch.tensor(rows), ids, torch.tensor(keys), mask)
