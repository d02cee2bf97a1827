"""Self-critical sequence training: a captioner learns from the CIDEr of its own captions.

Rennie et al., "Self-critical Sequence Training for Image Captioning",
https://arxiv.org/abs/1612.00563. Of each picture K captions are sampled; those that score above
the others become likelier and those below less likely. The baseline of a sample is the mean of
the picture's other samples (Luo, "A Better Variant of Self-Critical Sequence Training",
https://arxiv.org/abs/2003.09971), which needs no greedy decoding:

    loss = - Σ_k (r_k - mean of the other r) log p(caption_k) / tokens

The rewards count the end of a caption as a word. Without it, captions that break off ("a man in
front of a") score as well as whole ones. The captioner must have been trained by cross-entropy.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from tinyvl import decode, ranks
from tinyvl.captioner import Batch, Captioner
from tinyvl.data import Record
from tinyvl.metrics_captions import Cider, tokenise

END = "</S>"  # no caption has this word: `tokenise` makes lower case


class SelfCritical:
    """The objective in place of cross-entropy: `accumulate` and `validate` of a `Captioner`.

    ``references``: {a picture's key in a `Batch`: its captions}; ``samples``: K; ``max_tokens``:
    the length of a sampled caption at most, its end included.
    """

    def __init__(
        self, model: Captioner, references: dict[int, list[str]],
        val_references: dict[int, list[str]], samples: int, max_tokens: int,
    ):  # fmt: skip
        self.model, self.samples, self.max_tokens = model, samples, max_tokens
        self.cider, self.number = scorer(references)
        self.val_cider, self.val_number = scorer(val_references)

    def accumulate(
        self, batches: list[Batch], scaler: torch.amp.GradScaler | None = None
    ) -> dict[str, float]:
        """Adds the gradients of one optimizer step; -> "loss" is minus the samples' mean CIDEr."""
        model = self.model.eval()  # the sampled captions' own probabilities: no dropout
        drawn = [self.sample(batch) for batch in batches]
        tokens = ranks.total(sum(int(batch.targets.sum()) for batch, _ in drawn))
        rewards = 0.0
        with model.attention():
            for batch, reward in drawn:
                others = (reward.sum(1, keepdim=True) - reward) / (self.samples - 1)
                loss, _ = model.loss(batch, (reward - others).flatten())
                share = loss / tokens
                (scaler.scale(share) if scaler else share).backward()
                rewards += reward.sum().item()
        captions = ranks.total(sum(len(batch.ids) for batch, _ in drawn))
        return {"loss": -ranks.total(rewards) / captions, "tokens": tokens, "captions": captions}

    @torch.no_grad()
    def sample(self, batch: Batch) -> tuple[Batch, Tensor]:
        """A batch of K sampled captions a picture, and their rewards (I, K)."""
        model, pictures = self.model, len(batch.pictures)
        rows = torch.arange(pictures).repeat_interleave(self.samples)
        found = self.write(batch, rows, sampling=torch.initial_seed())
        captions = [h.tokens for h in found]
        new = model.collate(captions, rows.tolist(), batch.pictures, batch.keys.tolist())
        for row, hypothesis in enumerate(found):
            if not hypothesis.finished:  # its end was not sampled
                new.targets[row, 1 + len(model.prompt) + len(hypothesis.tokens)] = False
        keys = batch.keys[rows].tolist()
        rewards = [
            self.cider.score(self.number[key], words(model.text.decode(h.tokens), h.finished))
            for key, h in zip(keys, found, strict=True)
        ]
        return new, torch.tensor(rewards, device=model.device).view(pictures, self.samples)

    def write(
        self, batch: Batch, rows: Tensor, sampling: int | None = None
    ) -> list[decode.Hypothesis]:
        """A caption for each row of pictures, sampled with this seed or else greedy."""
        model = self.model
        rows = rows.to(model.device)
        with model.autocast():
            visual = model.pick(model.see(model.percept(batch.pictures.to(model.device))), rows)
        line = [model.text.bos, *model.prompt]
        prompt = torch.tensor([line] * len(rows), device=model.device)
        longest = min(self.max_tokens, model.room)
        step, stay = model.stepper(visual, len(rows), longest)
        common: dict[str, Any] = {
            "eos": model.text.eos,
            "max_new_tokens": longest,
            "stay": stay,
            "forbid": model.text.spare(model.decoder.config.vocab_size),
        }
        if sampling is None:
            return decode.greedy(step, prompt, **common)
        nth = torch.arange(len(rows)) % self.samples
        indices = (batch.keys[rows.cpu()] * self.samples + nth).tolist()
        return decode.sample(step, prompt, seed=sampling, indices=indices, **common)

    @torch.no_grad()
    def validate(self, batches: Iterable[Batch]) -> float:
        """Minus the mean CIDEr of greedy captions."""
        model, scores = self.model.eval(), []
        for batch in batches:
            found = self.write(batch, torch.arange(len(batch.pictures)))
            for key, h in zip(batch.keys.tolist(), found, strict=True):
                caption = words(model.text.decode(h.tokens), h.finished)
                scores.append(self.val_cider.score(self.val_number[key], caption))
        return -sum(scores) / len(scores) if scores else math.nan


def captions_of(keys: Sequence[int], records: Sequence[Record]) -> dict[int, list[str]]:
    """{a picture's key: the captions of all its records}."""
    found: dict[int, list[str]] = {}
    for key, record in zip(keys, records, strict=True):
        found.setdefault(key, []).extend(record.captions)
    return found


def scorer(references: dict[int, list[str]]) -> tuple[Cider, dict[int, int]]:
    """CIDEr against captions by key, and each key's number there."""
    known = [[words(caption, True) for caption in captions] for captions in references.values()]
    return Cider(known), {key: i for i, key in enumerate(references)}


def words(caption: str, finished: bool) -> str:
    """A caption's words, with a word for its end."""
    return f"{tokenise(caption)} {END}" if finished else tokenise(caption)
