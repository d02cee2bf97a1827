"""What the captioners (I-Tuning, ClipCap, eP-ALM) share: frozen parts, loss, decoding, answers.

A sequence is ``[bos] prompt text [eos]``. A method says what it adds to the decoder: `see` turns
an encoder's percept into what the method's modules read, once for each picture, and `run` is one
pass of the decoder with that added. "Picture" stands for video and sound too.
"""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tinyvl import UserError, decode, ranks
from tinyvl.decode import Hypothesis, Style
from tinyvl.decoder import Cache, Decoder
from tinyvl.decoder_static import StaticCache, Steps, shapes
from tinyvl.encoders import ImageEncoder, Percept
from tinyvl.method import Method, MicroBatch, pad
from tinyvl.packed import pack_decoder
from tinyvl.rerank import NONE, Reranker
from tinyvl.text import ANSWERS, Questions, Text, cut, tidy


@dataclass
class Batch(MicroBatch):
    """A micro-batch. Pictures are (I, 3, H, W) or (I, T, 3, H, W), or what a feature cache has of
    them: tokens (I, S, D), or all summaries one after another (I, ΣD).

    ``ids`` are ``[bos] prompt text [eos]``, padded on the right.
    """

    targets: Tensor  # (B, T) True where the token is predicted by the one before it
    states: Tensor | None = None  # (B, T - 1, d) ids[:, :-1] after the `text_layers`


class Captioner(Method):
    """A frozen encoder and a frozen decoder with trainable modules between them."""

    levels: int | None = 1  # how many of the encoder's summaries the method reads; None: all
    text_layers: int = 0  # how many of the first layers the picture does not reach
    crop_area = 0.5
    questions: Questions | None = None  # set where the model answers questions
    reranker: Reranker | None = None  # set where a search model chooses among the beams

    def __init__(
        self, encoder: ImageEncoder, decoder: Decoder, text: Text, prompt: str, length: int = 0
    ):
        """``length``: of a prefix that takes positions before the sequence."""
        super().__init__()
        self.encoder, self.decoder, self.text, self.length = encoder, decoder, text, length
        self.steps: dict[Any, Steps] = {}  # of the last shape that was decoded
        self.prompt = text.encode([prompt])[0] if prompt else []

    # ------------------------------------------------------------------------ what a method says

    @abstractmethod
    def see(self, percept: Percept) -> Any:
        """An encoder's percept (I pictures) to what the method's modules read, a row a picture."""

    def pick(self, visual: Any, rows: Tensor) -> Any:
        """These rows of what `see` gave."""
        return {layer: (k[rows], v[rows]) for layer, (k, v) in visual.items()}

    @abstractmethod
    def added(self, visual: Any) -> dict[str, Any]:
        """What the picture adds to the decoder, as arguments of `Decoder.forward`."""

    def run(
        self, x: Tensor, visual: Any, cache: Cache | None = None, mask: Tensor | None = None,
        first: int = 0,
    ) -> Tensor:  # fmt: skip
        """One pass of the decoder, ids (B, T) -> final hidden states (B, T, d).

        Rows are grouped by picture, the same number for each row of ``visual``. With first > 0,
        x has the states (B, T, d) that this layer reads.
        """
        return self.decoder(x, mask, cache=cache, first=first, **self.added(visual))

    # ------------------------------------------------------------- what is trained, and how it runs

    def trainable(self, name: str) -> bool:
        return not name.startswith(("encoder.", "decoder."))

    @property
    def fixed_pictures(self) -> bool:
        return not self.encoder.learns

    def checkpoint(self, on: bool) -> None:
        self.decoder.checkpointing = on

    def halve(self, dtype: torch.dtype) -> None:
        """Puts what is not trained into half precision; pictures stay normalised in float32."""
        for tower in (self.encoder.model, self.decoder):
            if not any(parameter.requires_grad for parameter in tower.parameters()):
                tower.to(dtype)
        for parameter in self.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)

    def pack(self) -> None:
        self.encoder.pack()
        pack_decoder(self.decoder)

    def attention(self) -> AbstractContextManager:
        """On a CPU the plain kernel: the fused one is slow backward over short texts."""
        return sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else nullcontext()

    @property
    def static(self) -> bool:
        """Whether a step of decoding works in tensors that keep their shapes and places."""
        return self.device.type == "cuda"

    # ------------------------------------------------------------------------- text and pictures

    @property
    def room(self) -> int:
        """How many tokens, the end included, fit after the prompt."""
        return self.decoder.config.max_positions - self.length - 1 - len(self.prompt)

    def encode(self, captions: list[str], max_tokens: int) -> list[list[int]]:
        """Bare ids: without begin, prompt and end."""
        lead = " " if self.prompt else ""  # a prompt ends in a word
        longest = min(max_tokens, self.room - 1)
        return cut(self.text.encode([lead + tidy(c) for c in captions]), longest, "tokens")

    def encode_answers(self, pairs: list[tuple[str, str]], max_tokens: int) -> list[list[int]]:
        """As `encode`, of (question, answer)."""
        assert self.questions is not None
        max_tokens = min(max_tokens, self.room // 2)
        return self.questions.encode(pairs, self.room - max_tokens, max_tokens - 1)

    @property
    def fixed_text(self) -> bool:
        return self.text_layers > 0

    def state_rows(self, caption: Sequence[int]) -> int:
        """One for each token but the end."""
        return 1 + len(self.prompt) + len(caption)

    @torch.no_grad()
    def states(self, captions: Sequence[Sequence[int]]) -> Tensor:
        """The captions after the `text_layers`, one after another (rows, d)."""
        lines = [[self.text.bos, *self.prompt, *caption] for caption in captions]
        ids, real = (tensor.to(self.device) for tensor in pad(lines, self.text.eos))
        with self.autocast():
            states = self.decoder(ids, real, last=self.text_layers)
        return states[real].to(self.decoder.embed.weight.dtype)

    def collate(
        self, captions: list[list[int]], rows: list[int], pictures: Tensor, keys: list[int],
        states: list[Tensor] | None = None,
    ) -> Batch:  # fmt: skip
        """A `Batch` of bare ids.

        Padding is on the right: with a causal decoder no real token sees it, so no mask is needed
        (a test compares it with left padding).
        """
        lead = [self.text.bos, *self.prompt]
        ids, targets = pad([[*lead, *c, self.text.eos] for c in captions], self.text.eos)
        targets[:, : len(lead)] = False
        if self.questions is not None and self.questions.answer_only:
            for row, caption in enumerate(captions):
                targets[row, : len(lead) + self.questions.answer_at(caption)] = False
        padded = None if states is None else nn.utils.rnn.pad_sequence(states, batch_first=True)
        return Batch(pictures, torch.tensor(rows), ids, torch.tensor(keys), targets, padded)

    def percept(self, pictures: Tensor | Percept) -> Percept:
        """A batch's pictures through the encoder; as they are, if from a cache or already seen."""
        if isinstance(pictures, Percept):
            return pictures
        pictures = pictures.to(self.device)
        if pictures.ndim > 3:
            return self.encoder(pictures)
        if self.amp is None:
            pictures = pictures.float()
        if self.reads == "tokens":
            return Percept(pictures, [])
        widths = self.encoder.widths
        pictures = pictures[:, -sum(widths) :]  # a cache has all levels, the last ones are read
        return Percept(pictures[:, None], list(pictures.split(widths, -1)))

    # -------------------------------------------------------------------------------------- loss

    def loss(self, batch: Batch, weights: Tensor | None = None) -> tuple[Tensor, int]:
        """Summed cross-entropy of the target tokens, in nats, and their number.

        The batch is on the host, but for pictures that are on their way already. ``weights`` (B,)
        multiply the captions' sums.
        """
        images, number = len(batch.pictures), len(batch.rows)
        alike = torch.arange(images).repeat_interleave(number // images)  # so many rows for each
        even = torch.equal(batch.rows, alike)
        read = batch.targets[:, 1:]  # on the host, so that a GPU need not be waited for
        real = read.long().flip(1).cummax(1).values.flip(1).bool()  # up to the last target
        row, place = read.nonzero(as_tuple=True)
        at = row * read.shape[1] + place
        rows, at = (i.to(self.device, non_blocking=True) for i in (row, at))
        batch = batch.to(self.device)
        with self.autocast():
            visual = self.see(self.percept(batch.pictures))
            if not even:
                visual = self.pick(visual, batch.rows)
            if batch.states is None:
                hidden = self.run(batch.ids[:, :-1], visual, mask=real)
            else:
                hidden = self.run(batch.states, visual, mask=real, first=self.text_layers)
            # Only where a token is predicted.
            wanted = batch.ids[:, 1:].flatten()[at]
            losses = self.decoder.losses(hidden.flatten(0, 1)[at], wanted)
        if weights is not None:
            losses = losses * weights[rows]
        return losses.sum(), len(row)

    def accumulate(
        self, batches: list[Batch], scaler: torch.amp.GradScaler | None = None
    ) -> dict[str, Any]:
        """As `Method.accumulate`: the loss is the mean over the step's tokens, in nats."""
        self.train()
        if ranks.rank():  # each process drops out other numbers
            torch.manual_seed((torch.initial_seed() + (ranks.rank() << 40)) % (1 << 63))
        tokens = ranks.total(sum(int(batch.targets[:, 1:].sum()) for batch in batches))
        total = torch.zeros((), device=self.device)
        with self.attention():  # backward too: checkpointed layers are computed again there
            for batch in batches:
                loss, _ = self.loss(batch)
                share = loss / tokens
                (scaler.scale(share) if scaler else share).backward()
                total += share.detach()
        captions = ranks.total(sum(len(batch.ids) for batch in batches))
        mean: Any = ranks.total(total.item()) if ranks.size() > 1 else total
        return {"loss": mean, "tokens": tokens, "captions": captions}

    @torch.no_grad()
    def validate(self, batches: Iterable[Batch]) -> float:
        """Mean cross-entropy per token, nats."""
        self.eval()
        total, tokens = 0.0, 0
        with self.attention():
            for batch in batches:
                loss, count = self.loss(batch)
                total, tokens = total + loss.item(), tokens + count
        return total / tokens if tokens else float("nan")

    # ---------------------------------------------------------------------- captions and answers

    def caption(self, pictures: Tensor, **search: Any) -> list[tuple[str, float]]:
        """Captions of a batch of pictures (I, 3, H, W), each with its mean log-probability.

        ``search``: the fields of `Style`. UserError: this model answers questions.
        """
        if self.questions is not None:
            raise UserError("This model answers questions (tinyvl ask); name one for captions.", 2)
        lines = [[self.text.bos, *self.prompt]] * len(pictures)
        return self.continued(pictures, lines, Style(**search))

    def answer(
        self, pictures: Tensor | Percept, questions: list[str], **search: Any
    ) -> list[tuple[str, float]]:
        """Answers to a question about each picture (I, 3, H, W), with mean log-probabilities.

        An answer depends neither on the other questions nor on the batch. ``search``: the fields
        of `Style`, and `ANSWERS` where they are not given. UserError: this model writes captions.
        """
        return self.continued(pictures, *self.answering(questions, **search))

    def answering(self, questions: list[str], **search: Any) -> tuple[list[list[int]], Style]:
        """Ids up to where each answer starts, and how it is searched for."""
        options: Any = ANSWERS | search
        style = Style(**options)
        style.max_tokens = min(style.max_tokens, max(1, self.room // 2))
        return self.asked(questions, style.max_tokens), style

    def asked(self, questions: list[str], max_tokens: int) -> list[list[int]]:
        """Ids up to where the answer starts; it has room for ``max_tokens``."""
        if self.questions is None:
            raise UserError("This model makes captions; name one trained with --task vqa.", 2)
        lead = [self.text.bos, *self.prompt]
        return [lead + line for line in self.questions.ask(questions, self.room - max_tokens)]

    @torch.no_grad()
    def look(self, pictures: Tensor) -> Percept:
        """Pictures through the encoder, once for an answer and a choice."""
        with self.autocast():
            return self.percept(pictures)

    @torch.no_grad()
    def choose(
        self, pictures: Tensor | Percept, questions: list[str], choices: list[list[str]]
    ) -> list[list[Hypothesis]]:
        """How likely the choices of each question are as its answer, end token included.

        Picture and question are read once for all choices; `decode.chances` compares them. Neither
        the other questions nor the batch matter. UserError: this model writes captions.
        """
        half = max(1, self.room // 2)
        prompt, mask = pad(self.asked(questions, half), self.text.eos, left=True)
        assert self.questions is not None
        replies = self.questions.replies([choice for own in choices for choice in own])
        lines = [[*ids, self.text.eos] for ids in cut(replies, half - 1, "tokens")]
        owner = [i for i, own in enumerate(choices) for _ in own]
        found: list[list[Hypothesis]] = [[] for _ in choices]
        if not lines:
            return found
        wanted, real = (tensor.to(self.device) for tensor in pad(lines, self.text.eos))  # (C, T)
        rows, cache = torch.tensor(owner, device=self.device), Cache()
        with self.autocast():
            visual = self.see(self.percept(pictures))
            read = self.run(prompt.to(self.device), visual, cache, mask.to(self.device))
            cache.reorder(rows)
            hidden = read[rows, -1:]  # (C, 1, d) what the answers' first tokens are predicted from
            if wanted.shape[1] > 1:
                rest = self.run(wanted[:, :-1], self.pick(visual, rows), cache, real[:, 1:])
                hidden = torch.cat((hidden, rest), 1)
            logits = self.decoder.logits(hidden[real]).float()
        each = logits.log_softmax(-1).gather(-1, wanted[real][:, None])[:, 0]
        sums = each.new_zeros(len(lines)).index_add(0, real.nonzero()[:, 0], each)
        for row, ids, total in zip(owner, lines, sums.tolist(), strict=True):
            found[row].append(Hypothesis(ids[:-1], total, total, True))
        return found

    def continued(
        self, pictures: Tensor | Percept, lines: list[list[int]], style: Style
    ) -> list[tuple[str, float]]:
        """What the model writes after these ids, a line a picture, padded on the left."""
        found = self.written(pictures, lines, style)
        return [(self.text.decode(h.tokens), h.mean_logprob) for h in found]

    @torch.no_grad()
    def written(
        self, pictures: Tensor | Percept, lines: list[list[int]], style: Style
    ) -> list[Hypothesis]:
        """As `continued`, in tokens."""
        with self.autocast():
            seen = self.percept(pictures)
            visual = self.see(seen)
        prompt, mask = (t.to(self.device) for t in pad(lines, self.text.eos, left=True))
        room = self.room + 1 + len(self.prompt) - prompt.shape[1]
        longest = max(1, min(style.max_tokens, room))
        step, stay = self.stepper(visual, len(lines), longest, mask)
        common: dict[str, Any] = {
            "eos": self.text.eos,
            "max_new_tokens": longest,
            "forbid": self.text.spare(self.decoder.config.vocab_size),
            "stay": stay,
        }
        if style.sampling is not None:
            return decode.sample(step, prompt, **common, **style.sampling)
        if style.beams == 1:
            return decode.greedy(step, prompt, **common)
        how: Any = {n: getattr(style, n) for n in ("beams", "length_penalty", "early_stopping")}
        if self.reranker is None or style.rerank == NONE:
            return [best[0] for best in decode.beam(step, prompt, **common, **how)]
        found = decode.beam(step, prompt, returned=style.beams, **common, **how)
        texts = [[self.text.decode(text.tokens) for text in own] for own in found]
        return self.reranker.best(seen.tokens, found, texts)

    def stepper(
        self, visual: Any, images: int, longest: int, mask: Tensor | None = None
    ) -> tuple[decode.Step, int]:
        """`decode`'s step function for a batch of pictures, and ``stay`` that goes with it.

        ``longest``: how many tokens follow the prompts; ``mask`` (I, T) says which tokens of the
        prompts are real. On a GPU all batches of a shape but the first are replays of one step.
        """
        cache = Cache()
        if self.static:
            return self.fixed_step(visual, images, longest, mask, cache), 4
        state = {"visual": visual, "image": torch.arange(images, device=self.device)}

        def step(ids: Tensor, rows: Tensor | None) -> Tensor:
            if rows is not None:
                cache.reorder(rows)
                image = state["image"][rows]  # which picture each row belongs to
                alive = image.unique_consecutive()
                left = state["image"].unique_consecutive()
                if len(alive) != len(left):  # finished pictures leave the batch
                    keep = torch.searchsorted(left, alive)
                    state["visual"] = self.pick(state["visual"], keep)
                state["image"] = image
            return self.next_logits(ids, state["visual"], cache, mask if rows is None else None)

        return step, 0

    def next_logits(
        self, ids: Tensor, visual: Any, cache: Cache, mask: Tensor | None = None
    ) -> Tensor:
        """ids (N, T) -> logits (N, V) of what follows the last of them."""
        with self.autocast():
            hidden = self.run(ids, visual, cache, mask)
            return self.decoder.logits(hidden[:, -1])

    def fixed_step(
        self, visual: Any, images: int, longest: int, mask: Tensor | None, cache: Cache
    ) -> decode.Step:
        """A step function whose tensors keep their shapes and places: see ``decoder_static``."""
        steps: list[Steps] = []

        def step(ids: Tensor, rows: Tensor | None) -> Tensor:
            if rows is None:
                return self.next_logits(ids, visual, cache, mask)
            if not steps:
                trained = tuple(p.data_ptr() for p in self.parameters() if p.requires_grad)
                shape = shapes((visual, cache.layers)), len(rows), longest, trained
                if shape not in self.steps:
                    fixed = StaticCache(cache, rows, longest)
                    self.steps = {shape: Steps(self.next_logits, visual, fixed)}  # the last one
                else:
                    self.steps[shape].fill(visual, cache, rows)
                steps.append(self.steps[shape])
                rows = torch.arange(len(rows), device=rows.device)
            return steps[0](ids, rows)

        return step
