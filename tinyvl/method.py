"""What training and loading ask of any method, and the micro-batches that they hand to it."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

PER_PICTURE = ("pictures", "keys")  # these have a row for each picture, the others for each caption


@dataclass
class MicroBatch:
    """I pictures and their B captions: what `captioner.Batch` and `lilt.Pairs` share."""

    pictures: Tensor  # (I, ...)
    rows: Tensor  # (B,) which picture each caption belongs to
    ids: Tensor  # (B, T)
    keys: Tensor  # (I,) a number for each picture: equal where pictures are the same

    def to(self, device: torch.device) -> Self:
        """The same batch on another device."""
        here = {n: x.to(device, non_blocking=True) for n, x in vars(self).items() if x is not None}
        return replace(self, **here)

    def split(self, pieces: int) -> list[Self]:
        """The same captions in this many smaller batches."""
        if pieces == 1:
            return [self]
        size = -(-len(self.ids) // pieces)
        out = []
        for i in range(0, len(self.ids), size):
            part = slice(i, i + size)
            used, rows = self.rows[part].unique(return_inverse=True)
            own = {
                name: x[used if name in PER_PICTURE else part]
                for name, x in vars(self).items()
                if x is not None
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


class Method(nn.Module, ABC):
    """What training, extraction, evaluation and loading may ask of a model.

    To write, a captioner has `caption` and `answer`, too; to retrieve, LilT has `embed_images` and
    `embed_texts`.
    """

    encoder: Any  # reads pictures: size, view, crop, modality, ...
    text: Any  # reads texts
    amp: torch.dtype | None = None  # autocast's type, set by `models.place`
    crop_area: float  # the least share of a picture's area that a random crop keeps
    reads: str = "tokens"  # the part of a percept that the method reads, or "summaries"
    whole_steps = False  # the loss compares all pairs of a step, which are drawn at random

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    @abstractmethod
    def fixed_pictures(self) -> bool:
        """Whether the encoder is frozen: a picture gives the same in every epoch."""

    @property
    @abstractmethod
    def fixed_text(self) -> bool:
        """Whether the `states` of a text are the same in every epoch."""

    # ---------------------------------------------------------------------------- parameters

    @abstractmethod
    def trainable(self, name: str) -> bool:
        """Which parameters are trained, saved and counted."""

    def kept(self, name: str) -> bool:
        """Which parameters a checkpoint holds."""
        return self.trainable(name)

    def holds(self, name: str) -> bool:
        """Which parameters of a checkpoint this model has: all, unless it lacks a part."""
        return True

    def decays(self, parameter: nn.Parameter) -> bool:
        """Which parameters have weight decay."""
        return True

    # --------------------------------------------------------------------------- how it runs

    @abstractmethod
    def checkpoint(self, on: bool) -> None:
        """Recompute layers in the backward pass."""

    @abstractmethod
    def halve(self, dtype: torch.dtype) -> None:
        """Puts what is frozen into half precision."""

    def pack(self) -> None:
        """Makes a model that only runs from now on faster, if there is a way."""

    def autocast(self) -> AbstractContextManager:
        """Mixed precision where the model was placed with it."""
        return torch.autocast(self.device.type, self.amp) if self.amp else nullcontext()

    # ------------------------------------------------------------------------------ training

    @abstractmethod
    def encode(self, captions: list[str], max_tokens: int) -> list[list[int]]:
        """Ids of captions, as training reads them."""

    @abstractmethod
    def state_rows(self, caption: Sequence[int]) -> int:
        """How many rows `states` has for a caption's ids."""

    @abstractmethod
    def states(self, captions: Sequence[Sequence[int]]) -> Tensor:
        """What frozen layers that no picture reaches make of captions' ids: (rows, d)."""

    @abstractmethod
    def collate(
        self, captions: list[list[int]], rows: list[int], pictures: Tensor, keys: list[int],
        states: list[Tensor] | None = None,
    ) -> MicroBatch:  # fmt: skip
        """A micro-batch of captions' ids; the arguments are as in `MicroBatch`.

        ``keys`` are equal where pictures are the same; ``states``: each caption's, if kept.
        """

    @abstractmethod
    def accumulate(
        self, batches: list[Any], scaler: torch.amp.GradScaler | None = None
    ) -> dict[str, Any]:
        """Adds the gradients of one optimizer step; -> {"loss", "captions": how many}.

        The loss may be a number that a GPU has yet to compute: float() waits for it.

        Of several processes each has some of the step's ``batches``, or none, and the gradients of
        these; what is returned is of the whole step.
        """

    @abstractmethod
    def validate(self, batches: Iterable[Any]) -> float:
        """The loss on validation data; NaN where there is none."""
