"""What training and loading ask of any method, and the micro-batches that they hand to it."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

PER_PICTURE = ("pictures", "keys")  # these have a row for each picture, the others for each caption


@dataclass
class MicroBatch:
    """I pictures and their B captions: what `captioner.Batch` and `lilt.Pairs` share."""

    pictures: Tensor  # (I, ...)
    rows: Tensor  # (B,) which picture each caption belongs to
    ids: Tensor  # (B, T)

    def to(self, device: torch.device) -> Self:
        """The same batch on another device."""
        moved: dict[str, Any] = {
            name: x if x is None else x.to(device, non_blocking=True)
            for name, x in vars(self).items()
        }
        return replace(self, **moved)

    def split(self, pieces: int) -> list[Self]:
        """The same captions in this many smaller batches."""
        if pieces == 1:
            return [self]
        size = -(-len(self.ids) // pieces)
        out = []
        for i in range(0, len(self.ids), size):
            part = slice(i, i + size)
            used, rows = self.rows[part].unique(return_inverse=True)
            own: dict[str, Any] = {
                name: x if x is None else x[used if name in PER_PICTURE else part]
                for name, x in vars(self).items()
            }
            out.append(replace(self, **own | {"rows": rows}))
        return out


def pad(lines: Sequence[Sequence[int]], fill: int, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Lists of ids to one tensor (B, T), and where it has real ids, (B, T) bool.

    ``fill`` stands on the right of the ids, or on their ``left``.
    """
    width = max(map(len, lines))
    ids = torch.full((len(lines), width), fill)
    real = torch.zeros(len(lines), width, dtype=torch.bool)
    for row, line in enumerate(lines):
        place = slice(width - len(line), width) if left else slice(len(line))
        ids[row, place] = torch.tensor(line)
        real[row, place] = True
    return ids, real


@runtime_checkable
class Method(Protocol):
    """What training, extraction, evaluation and loading may ask of a model, besides `nn.Module`.

    `Captioner` and `LilT` have all of it. To write, a captioner has `caption` and `answer`; to
    retrieve, LilT has `embed_images` and `embed_texts`.
    """

    encoder: Any  # reads pictures: size, view, crop, modality, ...
    text: Any  # reads texts
    amp: torch.dtype | None  # autocast's type, set by `place`
    crop_area: float  # the least share of a picture's area that a random crop keeps
    reads: str  # the part of a percept that the method reads: "tokens" or "summaries"
    whole_steps: bool  # the loss compares all pairs of a step with each other

    @property
    def device(self) -> torch.device: ...
    @property
    def fixed_pictures(self) -> bool: ...  # a picture gives the same in every epoch
    @property
    def fixed_text(self) -> bool: ...  # `states` of a text are the same in every epoch

    # Which parameters are trained; are in a checkpoint; are here, of a checkpoint's; decay.
    def trainable(self, name: str) -> bool: ...
    def kept(self, name: str) -> bool: ...
    def holds(self, name: str) -> bool: ...
    def decays(self, parameter: nn.Parameter) -> bool: ...

    # How it runs: recompute layers in the backward pass, frozen parts in half precision.
    def checkpoint(self, on: bool) -> None: ...
    def halve(self, dtype: torch.dtype) -> None: ...
    def autocast(self) -> AbstractContextManager: ...

    # Captions to ids, to states that may be kept on disk, to a micro-batch.
    def encode(self, captions: list[str], max_tokens: int) -> list[list[int]]: ...
    def state_rows(self, caption: Sequence[int]) -> int: ...
    def states(self, captions: Sequence[Sequence[int]]) -> Tensor: ...
    def collate(
        self,
        captions: list[list[int]],
        rows: list[int],
        pictures: Tensor,
        keys: list[int],
        states: list[Tensor] | None = None,
    ) -> MicroBatch: ...

    # A step's gradients and figures; the loss on validation data.
    def accumulate(
        self, batches: list[Any], scaler: torch.amp.GradScaler | None = None
    ) -> dict[str, float]: ...
    def validate(self, batches: Iterable[Any]) -> float: ...

    # Of `nn.Module`.
    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]: ...
    def parameters(self) -> Iterable[nn.Parameter]: ...
    def requires_grad_(self, requires_grad: bool = True) -> Any: ...
    def zero_grad(self, set_to_none: bool = True) -> None: ...
    def to(self, device: torch.device) -> Any: ...
    def train(self, mode: bool = True) -> Any: ...
    def eval(self) -> Any: ...
