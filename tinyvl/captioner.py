"""What the captioners (I-Tuning, ClipCap, eP-ALM) share: frozen parts, loss, decoding.

A sequence is ``[bos] prompt text [eos]``. A method says what it adds to the decoder: `see`
turns an encoder's percept into whatever its modules read, once for each image, and `run` is one
pass of the decoder with that added.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tinyvl import UserError, decode
from tinyvl.decoder import Cache, Decoder
from tinyvl.encoders import ImageEncoder, Percept
from tinyvl.text import Text, tidy


@dataclass
class Batch:
    """A micro-batch: captions, grouped by picture."""

    pictures: Tensor  # (I, 3, H, W), (I, T, 3, H, W); of a cache (I, S, D) tokens or (I, ΣD)
    rows: Tensor  # (B,) which picture each caption belongs to
    ids: Tensor  # (B, T) [bos] prompt text [eos], padded on the right
    targets: Tensor  # (B, T) True where the token is predicted by the one before it
    states: Tensor | None = None  # (B, T - 1, d) ids[:, :-1] after the layers of text alone
    keys: Tensor | None = None  # (I,) equal where pictures are the same

    def to(self, device: torch.device) -> "Batch":
        return Batch(
            *(None if x is None else x.to(device, non_blocking=True) for x in vars(self).values())
        )

    def split(self, pieces: int) -> list["Batch"]:
        """The same captions in this many smaller batches."""
        if pieces == 1:
            return [self]
        size = -(-len(self.ids) // pieces)
        out = []
        for i in range(0, len(self.ids), size):
            used, rows = self.rows[i : i + size].unique(return_inverse=True)
            part = slice(i, i + size)
            states = None if self.states is None else self.states[part]
            keys = None if self.keys is None else self.keys[used]
            out.append(
                Batch(self.pictures[used], rows, self.ids[part], self.targets[part], states, keys)
            )
        return out


def collate(
    captions: list[list[int]],
    rows: list[int],
    pictures: Tensor,
    text: Text,
    prompt: list[int],
    states: list[Tensor] | None = None,
    keys: Tensor | None = None,
) -> Batch:
    """Bare caption ids to a `Batch`, with the captions' states (each (1 + P + t, d)) if known.

    Padding is on the right: with a causal decoder no real token sees it, so no mask is needed (a
    test compares it with left padding)."""
    width = max(map(len, captions)) + len(prompt) + 2
    ids = torch.full((len(captions), width), text.eos)
    targets = torch.zeros(len(captions), width, dtype=torch.bool)
    for i, caption in enumerate(captions):
        line = [text.bos, *prompt, *caption, text.eos]
        ids[i, : len(line)] = torch.tensor(line)
        targets[i, 1 + len(prompt) : len(line)] = True
    padded = None if states is None else nn.utils.rnn.pad_sequence(states, batch_first=True)
    return Batch(pictures, torch.tensor(rows), ids, targets, padded, keys)


class Captioner(nn.Module, ABC):
    """A frozen encoder and a frozen decoder with trainable modules between them."""

    reads = "tokens"  # what of a percept: "tokens" or "summaries"
    levels: int | None = 1  # how many of the encoder's summaries the method reads; None: all
    text_layers: int = 0  # the decoder's first layers that nothing of the picture reaches
    crop_area = 0.5  # how much of a picture a random crop leaves at least, if there are crops
    fixed_pictures = True  # the encoder is frozen: it makes the same of a picture in every epoch
    whole_steps = False  # the loss is a sum over captions: their order in a step is free

    def __init__(
        self,
        encoder: ImageEncoder | None,
        decoder: Decoder,
        text: Text,
        prompt: str,
        length: int = 0,
    ):
        """``length`` is that of a prefix which takes positions before the sequence.

        Raises:
            UserError: prefix and prompt leave no room for a word and the end.
        """
        super().__init__()
        self.encoder, self.decoder, self.text, self.length = encoder, decoder, text, length
        self.prompt = text.encode([prompt])[0] if prompt else []
        if self.room < 2:
            before = f"a prefix of {length} and " if length else ""
            raise UserError(
                f"This decoder's {decoder.config.max_positions} positions have no room for text "
                f"behind {before}a prompt of {len(self.prompt)} tokens.",
                2,
            )
        self.amp: torch.dtype | None = None  # autocast type, set by `models.place`

    def trainable(self, name: str) -> bool:
        """Which parameters are trained, saved and counted."""
        return not name.startswith(("encoder.", "decoder."))

    def kept(self, name: str) -> bool:
        """Which parameters a checkpoint holds."""
        return self.trainable(name)

    def train(self, mode: bool = True) -> "Captioner":
        """As in PyTorch, but for the encoder: its batch statistics and dropout stay frozen."""
        super().train(mode)
        if self.encoder is not None:
            self.encoder.eval()
        return self

    @abstractmethod
    def see(self, percept: Percept) -> Any:
        """An encoder's percept (I images) to what the method's modules read, rows of I."""

    @abstractmethod
    def pick(self, visual: Any, rows: Tensor) -> Any:
        """The rows of what `see` gave."""

    @abstractmethod
    def run(
        self,
        x: Tensor,
        visual: Any,
        cache: Cache | None = None,
        mask: Tensor | None = None,
        first: int = 0,
    ) -> Tensor:
        """One pass of the decoder, ids (B, T) -> final hidden states (B, T, d).

        Rows are grouped by image, the same number for each of visual's. With first > 0, x has the
        states (B, T, d) that this layer reads.
        """

    def encode(self, captions: list[str], max_tokens: int) -> list[list[int]]:
        """Bare ids of captions, as training reads them."""
        lead = " " if self.prompt else ""  # a prompt ends in a word
        longest = min(max_tokens, self.room - 1)
        return [ids[:longest] for ids in self.text.encode([lead + tidy(c) for c in captions])]

    @property
    def fixed_text(self) -> bool:
        return self.text_layers > 0

    def state_rows(self, caption: Sequence[int]) -> int:
        """How many states `states` makes of a caption's ids: of all but the end."""
        return 1 + len(self.prompt) + len(caption)

    @torch.no_grad()
    def states(self, captions: Sequence[Sequence[int]]) -> Tensor:
        """What the text layers make of captions, one after another (rows, d)."""
        lines = [[self.text.bos, *self.prompt, *caption] for caption in captions]
        ids = torch.full((len(lines), max(map(len, lines))), self.text.eos)
        real = torch.zeros(ids.shape, dtype=torch.bool)
        for row, line in enumerate(lines):
            ids[row, : len(line)] = torch.tensor(line)
            real[row, : len(line)] = True
        real = real.to(self.device)
        with self.autocast():
            states = self.decoder(ids.to(self.device), real, last=self.text_layers)
        return states[real].to(self.decoder.embed.weight.dtype)

    def collate(
        self,
        captions: list[list[int]],
        rows: list[int],
        pictures: Tensor,
        keys: list[int],
        states: list[Tensor] | None = None,
    ) -> Batch:
        """A `Batch` of caption ids; ``keys`` are equal where pictures are the same."""
        keys = torch.tensor(keys)
        return collate(captions, rows, pictures, self.text, self.prompt, states, keys)

    def checkpoint(self, on: bool) -> None:
        """Recompute the decoder's layers in the backward pass."""
        self.decoder.checkpointing = on

    def decays(self, parameter: nn.Parameter) -> bool:
        """Whether weight decay pulls at it: at all."""
        return True

    @property
    def room(self) -> int:
        """How many tokens, the end included, the decoder can place behind the prompt."""
        return self.decoder.config.max_positions - self.length - 1 - len(self.prompt)

    @property
    def device(self) -> torch.device:
        return self.decoder.embed.weight.device

    def autocast(self):
        """Mixed precision where the model was placed with it."""
        return torch.autocast(self.device.type, self.amp) if self.amp else nullcontext()

    def halve(self, dtype: torch.dtype) -> None:
        """What is not trained in half precision; pictures are still normalised in float32."""
        for tower in (self.encoder.model, self.decoder):
            if not any(parameter.requires_grad for parameter in tower.parameters()):
                tower.to(dtype)
        for parameter in self.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)

    def percept(self, pictures: Tensor) -> Percept:
        """Pictures, videos or sounds through the encoder; what a cache has of them as it is."""
        if pictures.ndim > 3:
            return self.encoder(pictures)
        if self.amp is None:
            pictures = pictures.float()
        if self.reads == "tokens":
            return Percept(pictures, [])
        widths = self.encoder.widths
        pictures = pictures[:, -sum(widths) :]
        return Percept(pictures[:, None], list(pictures.split(widths, -1)))

    def loss(self, batch: Batch, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Summed cross-entropy of the target tokens, in nats, and their number.

        ``weights`` (B,) multiply the captions' sums.
        """
        batch = batch.to(self.device)
        with self.autocast():
            visual = self.pick(self.see(self.percept(batch.pictures)), batch.rows)
            read = batch.targets[:, 1:]
            real = read.long().flip(1).cummax(1).values.flip(1).bool()  # up to the last target
            if batch.states is None:
                hidden = self.run(batch.ids[:, :-1], visual, mask=real)
            else:
                hidden = self.run(batch.states, visual, mask=real, first=self.text_layers)
            logits = self.decoder.logits(hidden[read])  # only where a token is predicted
        wanted = batch.ids[:, 1:][read]
        if weights is None:
            return F.cross_entropy(logits, wanted, reduction="sum"), read.sum()
        losses = F.cross_entropy(logits, wanted, reduction="none")
        return (losses * weights[read.nonzero()[:, 0]]).sum(), read.sum()

    def attention(self):
        """On a CPU the plain kernel: the fused one is slow backward over short texts."""
        return sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else nullcontext()

    def accumulate(
        self, batches: list[Batch], scaler: torch.amp.GradScaler | None = None
    ) -> dict[str, float]:
        """Adds the gradients of one optimizer step: the mean over all its real tokens.

        -> {"loss": nats per token, "tokens": how many, "captions": how many}.
        """
        self.train()
        tokens = sum(int(batch.targets[:, 1:].sum()) for batch in batches)
        total = torch.zeros((), device=self.device)
        with self.attention():  # backward too: checkpointed layers are computed again there
            for batch in batches:
                loss, _ = self.loss(batch)
                share = loss / tokens
                (scaler.scale(share) if scaler else share).backward()
                total += share.detach()
        captions = sum(len(batch.ids) for batch in batches)
        return {"loss": total.item(), "tokens": tokens, "captions": captions}

    @torch.no_grad()
    def validate(self, batches: Iterable[Batch]) -> float:
        """Mean cross-entropy per token, nats."""
        self.eval()
        total, tokens = 0.0, 0
        with self.attention():
            for batch in batches:
                loss, count = self.loss(batch)
                total, tokens = total + loss.item(), tokens + count.item()
        return total / tokens if tokens else float("nan")

    def stepper(self, visual: Any, images: int, mask: Tensor | None = None) -> decode.Step:
        """`decode`'s step function for a batch of images, with a cache of its own.

        ``mask`` (I, T) says which tokens of the prompts are real.
        """
        cache = Cache()
        state = {"visual": visual, "image": torch.arange(images, device=self.device)}

        def step(ids: Tensor, rows: Tensor | None) -> Tensor:
            if rows is not None:
                cache.reorder(rows)
                image = state["image"][rows]  # which image each row belongs to
                alive = image.unique_consecutive()
                left = state["image"].unique_consecutive()
                if len(alive) != len(left):  # finished images leave the batch
                    keep = torch.searchsorted(left, alive)
                    state["visual"] = self.pick(state["visual"], keep)
                state["image"] = image
            with self.autocast():
                hidden = self.run(ids, state["visual"], cache, mask if rows is None else None)
                return self.decoder.logits(hidden[:, -1])

        return step

    @torch.no_grad()
    def caption(
        self,
        pictures: Tensor,
        *,
        beams: int = 5,
        max_tokens: int = 40,
        length_penalty: float = 1.0,
        early_stopping: bool = True,
        sampling: dict | None = None,
    ) -> list[tuple[str, float]]:
        """Captions of a batch of pictures (I, 3, H, W), each with its mean log-probability.

        ``sampling`` (temperature, top_k, top_p, seed, indices: see `decode.sample`) samples instead
        of searching.
        """
        return self.continued(
            pictures,
            [[self.text.bos, *self.prompt]] * len(pictures),
            beams=beams,
            max_tokens=max_tokens,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            sampling=sampling,
        )

    def continued(
        self,
        pictures: Tensor,
        lines: list[list[int]],
        *,
        beams: int,
        max_tokens: int,
        length_penalty: float,
        early_stopping: bool,
        sampling: dict | None,
    ) -> list[tuple[str, float]]:
        """What the model writes behind these ids, a line a picture, padded on the left."""
        with self.autocast():
            visual = self.see(self.percept(pictures.to(self.device)))
        width = max(map(len, lines))
        padded = [[self.text.eos] * (width - len(line)) + line for line in lines]
        prompt = torch.tensor(padded, device=self.device)
        lengths = torch.tensor([len(line) for line in lines], device=self.device)
        mask = torch.arange(width, device=self.device) >= width - lengths[:, None]
        step = self.stepper(visual, len(pictures), mask)
        room = self.room + 1 + len(self.prompt) - width
        common = {
            "eos": self.text.eos,
            "max_new_tokens": max(1, min(max_tokens, room)),
            "forbid": self.text.spare(self.decoder.config.vocab_size),
        }
        if sampling is not None:
            found = decode.sample(step, prompt, **common, **sampling)
        elif beams == 1:
            found = decode.greedy(step, prompt, **common)
        else:
            search = decode.beam(
                step,
                prompt,
                beams=beams,
                length_penalty=length_penalty,
                early_stopping=early_stopping,
                **common,
            )
            found = [best[0] for best in search]
        return [(self.text.decode(h.tokens), h.mean_logprob) for h in found]
