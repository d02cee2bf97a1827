"""eP-ALM: an encoder's [CLS] tokens, one after another, in one slot of a frozen decoder.

Shukor, Dancette and Cord, "eP-ALM: Efficient Perceptual Augmentation of Language Models",
https://arxiv.org/abs/2303.11403. With E_i the [CLS] token of the encoder's level i after its
final norm, p a soft prompt and t the text (equation 1):

    [CLS]_i = C_i(E_i(X))                            one linear connection, shared or a level each
    t_j = LM_j([CLS]_i, p_{j-1}, t_{j-1})            in the decoder's last layers

The slot stands before the prompt, the prompt before the text. A range of layers is injected into:
each level serves its share of them, and replaces what the slot held. Behind the range the slot
goes on as a token of its own. Its row of the attention sees itself alone, so what it holds, and
its keys and values in every layer, do not depend on the text: they are made once for each image,
as are the prompt's, which see the slot and each other. Neither has a position: no learned one is
added, RoPE does not turn them, and the text counts from 0, so the frozen model reads it as ever.

The authors' code lets the slot see the whole text, the future and padding included, and leaves
out the last layer ([19, 31) of OPT-2.7B's 32, where the paper says the last 12). Nothing here
does; ``inject`` gives their range. It sums the loss over a caption's tokens, times 0.1, where
ours is the mean over all tokens of a step: to AdamW that is nearly the same.

PromptFuse, LimBER, MAGMA and FrozenBiLM are options: the last [CLS] token (MAGMA once: all
tokens), at the input ([0, 1)), with a prompt, alone, or with adapters.

A question is ``[bos] question</a>answer[eos]``, where ``</a>`` is a spare row of the embedding
(OPT has seven, frozen and never trained) or, where there is none, the words " Answer:".
"""

import torch
from torch import Tensor, nn

from tinyvl import UserError
from tinyvl.captioner import Batch, Captioner
from tinyvl.decoder import Cache, Decoder, Prefix
from tinyvl.encoders import ImageEncoder, Percept
from tinyvl.text import Text

TASKS = ("caption", "vqa")
TOWERS = {"vision": "encoder", "lm": "decoder"}  # what --unfreeze calls them
LEVELS, LAYERS = 6, 12  # the paper's: the last of the encoder, the last of the decoder


class SoftPrompt(nn.Module):
    """Trained tokens (N, d), by themselves or through an MLP, as PyTorch initialises these."""

    def __init__(self, tokens: int, width: int, mlp: bool):
        super().__init__()
        self.tokens = nn.Embedding(tokens, width)
        layers = (nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
        self.mlp = nn.Sequential(*layers) if mlp else nn.Identity()

    def forward(self) -> Tensor:
        return self.mlp(self.tokens.weight)


class Adapter(nn.Module):
    """x + W_up relu(W_down x), with biases; the bottleneck has 1/factor of the width.

    Starts next to the identity: N(0, 1e-3), cut at two deviations, as the authors' (and MAGMA's).
    """

    def __init__(self, width: int, factor: int):
        super().__init__()
        self.down = nn.Linear(width, width // factor)
        self.up = nn.Linear(width // factor, width)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=1e-3)
            with torch.no_grad():
                parameter.clamp_(-2e-3, 2e-3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(torch.relu(self.down(x)))


class EPalm(Captioner):
    """A captioner, or with ``task`` "vqa" one that answers questions."""

    levels = None
    reads = "summaries"

    def __init__(
        self,
        encoder: ImageEncoder,
        decoder: Decoder,
        text: Text,
        *,
        vision_width: int,
        prompt: str = "",
        shared: bool = False,
        soft: int = 10,
        mlp: bool = True,
        deep: bool = False,
        adapters: int | None = None,
        extract: list[int] | None = None,
        inject: list[int] | None = None,
        tokens: str = "cls",
        task: str = "caption",
        answer_only: bool = False,
        separator: str | None = None,
        unfreeze: list[str] | None = None,
    ):
        """Args:
        shared: one connection for all levels, which then have one width.
        soft: length of the soft prompt, 0: none; ``mlp``: through an MLP.
        deep: a soft prompt of that length in every layer in place of one at the input.
        adapters: the factor of sequential adapters after each attention and feed-forward.
        extract: levels of the encoder, [first, end) from 0; None: the last 6 (or fewer).
        inject: layers of the decoder, [start, end) from 0; None: the last 12 (or half of them).
        tokens: "all": not a level's summary but all of the encoder's tokens, final as they are.
        task: "caption" or "vqa".
        answer_only: the loss is on the answer, not on question and answer as in the paper.
        separator: words between question and answer, in place of the above.
        unfreeze: "vision", "lm": also train these.
        """
        super().__init__(encoder, decoder, text, prompt)
        c, self.task, self.answer_only = decoder.config, task, answer_only
        check(task=(task, TASKS), tokens=(tokens, ("cls", "all")))
        if tokens == "all":
            self.reads = "tokens"
        start, end = bounds("inject", inject, c.layers, min(LAYERS, max(1, c.layers // 2)))
        self.inject = range(start, end)
        if tokens == "all":
            if extract is not None:
                raise UserError("All tokens are those of the last level: leave out --extract.", 2)
            self.extract, widths = range(1), [vision_width]
        else:
            number = len(encoder.widths)
            self.extract = range(
                *bounds("extract", extract, number, min(LEVELS, number, len(self.inject)))
            )
            widths = [encoder.widths[level] for level in self.extract]
        if len(self.extract) > len(self.inject):
            raise UserError(
                f"{len(self.extract)} levels of the encoder do not fit into {len(self.inject)} "
                "layers of the decoder; give fewer levels (--extract) or more layers (--inject).",
                2,
            )
        if shared and len(set(widths)) > 1:
            raise UserError(
                f"The encoder's levels differ in width ({', '.join(map(str, widths))}), so they "
                "cannot share one connection; give --separate.",
                2,
            )
        self.connector = nn.ModuleList(
            nn.Linear(width, c.hidden_size) for width in (widths[:1] if shared else widths)
        )
        self.soft = SoftPrompt(soft, c.embed_size, mlp) if soft and not deep else None
        self.deep = SoftPrompt(c.layers * soft, c.hidden_size, mlp) if soft and deep else None
        if adapters and adapters > c.hidden_size:
            raise UserError(
                f"--adapters {adapters} leaves nothing of a width of {c.hidden_size}.", 2
            )
        self.adapters = nn.ModuleDict(
            {
                str(i): nn.ModuleList(Adapter(c.hidden_size, adapters) for _ in range(2))
                for i in range(c.layers if adapters else 0)
            }
        )
        self.unfrozen = tuple(TOWERS[name] for name in unfreeze or [] if name in TOWERS)
        if len(self.unfrozen) < len(unfreeze or []):
            raise UserError("--unfreeze is vision, lm, or vision,lm.", 2)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(self.trainable(name))
        self.encoder.learns = "encoder" in self.unfrozen
        self.fixed_pictures = not self.encoder.learns
        touched = self.soft or self.deep or self.adapters or "decoder" in self.unfrozen
        self.text_layers = 0 if touched else start
        self.separator: list[int] = []
        if task == "vqa" and text.tokenizer is not None:
            spare = text.spare(c.vocab_size)
            self.plain = separator is not None or not spare
            words = " Answer:" if separator is None else separator
            self.separator = text.encode([words])[0] if self.plain else [spare[0]]
            if not self.separator:
                raise UserError("--separator has no word of this decoder's vocabulary.", 2)

    def trainable(self, name: str) -> bool:
        tower = name.partition(".")[0]
        return tower not in ("encoder", "decoder") or tower in self.unfrozen

    # ------------------------------------------------------------------------------ what is seen

    def see(self, percept: Percept) -> Prefix:
        """The keys and values of slot and prompts in every layer; (1, ...) where no image plays."""
        decoder, start = self.decoder, self.inject.start
        prefix = self.slot(percept)
        images = len(percept.tokens)
        if self.soft is not None:
            prompt = decoder.widen(self.soft())[None]  # (1, P, d)
            below = {}
            if start:  # the same for all images
                prompt, below = decoder.read(prompt, adapters=self.added, last=start)
            prompt = prompt.expand(images, -1, -1)
            prefix = decoder.read(prompt, adapters=self.added, prefix=prefix, first=start)[1]
            prefix |= below
        if self.deep is not None:
            prompts = self.deep().unflatten(0, (decoder.config.layers, 1, -1))
            for layer, tokens in enumerate(prompts):
                pair = decoder.prefix(layer, tokens)
                if layer in prefix:
                    before = prefix[layer]
                    pair = tuple(
                        torch.cat((a, b.to(a.dtype).expand(len(a), -1, -1, -1)), 2)
                        for a, b in zip(before, pair, strict=True)
                    )
                prefix[layer] = pair
        return prefix

    def slot(self, percept: Percept) -> Prefix:
        """The slot's keys and values in the layers from the first that is injected into."""
        if self.reads == "tokens":
            states = [percept.tokens]  # (I, S, D)
        else:
            states = [percept.summaries[level][:, None] for level in self.extract]
        shared = len(self.connector) == 1
        states = [self.connector[0 if shared else i](state) for i, state in enumerate(states)]
        start, end = self.inject.start, self.inject.stop
        prefix = {}
        for layer in self.inject:  # consecutive layers share a level
            level = (layer - start) * len(states) // (end - start)
            prefix[layer] = self.decoder.prefix(layer, states[level])
        if end < self.decoder.config.layers:  # the last one goes on by itself
            options = {"adapters": self.added, "start": None}
            last = self.decoder(states[-1], first=end - 1, last=end, **options)
            prefix |= self.decoder.read(last, first=end, **options)[1]
        return prefix

    @property
    def added(self) -> dict[int, tuple[nn.Module, nn.Module]]:
        return {int(i): tuple(pair) for i, pair in self.adapters.items()}

    def pick(self, visual: Prefix, rows: Tensor) -> Prefix:
        return {
            layer: (k, v) if len(k) == 1 else (k[rows], v[rows]) for layer, (k, v) in visual.items()
        }

    def run(
        self,
        x: Tensor,
        visual: Prefix,
        cache: Cache | None = None,
        mask: Tensor | None = None,
        first: int = 0,
    ) -> Tensor:
        return self.decoder(x, mask, cache=cache, adapters=self.added, prefix=visual, first=first)

    # ---------------------------------------------------------------------- questions and answers

    def lines(self, questions: list[str], max_tokens: int) -> list[list[int]]:
        """Ids of ``question</a>``; a question that leaves no room for an answer is cut."""
        lead = " " if self.prompt else ""
        room = max(1, self.room - len(self.separator) - max_tokens)
        ids = self.text.encode([lead + " ".join(question.split()) for question in questions])
        return [line[:room] + self.separator for line in ids]

    def encode_answers(self, pairs: list[tuple[str, str]], max_tokens: int) -> list[list[int]]:
        """Bare ids of ``question</a>answer``, as training reads them."""
        questions = dict.fromkeys(question for question, _ in pairs)
        lead = " " if self.plain else ""
        answers = dict.fromkeys(lead + " ".join(answer.split()) for _, answer in pairs)
        max_tokens = min(max_tokens, self.room // 2)
        lines = dict(zip(questions, self.lines(list(questions), max_tokens), strict=True))
        ids = dict(zip(answers, self.text.encode(list(answers)), strict=True))
        return [
            lines[question] + ids[lead + " ".join(answer.split())][: max_tokens - 1]
            for question, answer in pairs
        ]

    def collate(
        self,
        captions: list[list[int]],
        rows: list[int],
        pictures: Tensor,
        keys: list[int],
        states: list[Tensor] | None = None,
    ) -> Batch:
        batch = super().collate(captions, rows, pictures, keys, states)
        if self.task == "vqa" and self.answer_only:
            size, before = len(self.separator), 1 + len(self.prompt)
            for row, ids in enumerate(captions):
                ends = [i for i in range(size, len(ids) + 1) if ids[i - size : i] == self.separator]
                batch.targets[row, : before + ends[-1]] = False
        return batch

    def caption(self, pictures: Tensor, **options) -> list[tuple[str, float]]:
        if self.task != "caption":
            raise UserError("This model answers questions (tinyvl ask); name one for captions.", 2)
        return super().caption(pictures, **options)

    @torch.no_grad()
    def answer(
        self,
        pictures: Tensor,
        questions: list[str],
        *,
        beams: int = 3,
        max_tokens: int = 20,
        length_penalty: float = 1.0,
        early_stopping: bool = True,
        sampling: dict | None = None,
    ) -> list[tuple[str, float]]:
        """Answers to a question about each picture (I, 3, H, W), with mean log-probabilities.

        An answer depends neither on the other questions nor on how they are batched.
        """
        if self.task != "vqa":
            raise UserError("This model makes captions; name one trained with --task vqa.", 2)
        max_tokens = min(max_tokens, max(1, self.room // 2))
        lead = [self.text.bos, *self.prompt]
        return self.continued(
            pictures,
            [lead + line for line in self.lines(questions, max_tokens)],
            beams=beams,
            max_tokens=max_tokens,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            sampling=sampling,
        )


def bounds(what: str, given: list[int] | None, number: int, default: int) -> tuple[int, int]:
    """A range [first, end) of so many; by default the last ones."""
    first, end = given if given is not None else (number - default, number)
    if not 0 <= first < end <= number:
        raise UserError(
            f"--{what} {first}:{end} is not within the {number} there are (0:{number}).", 2
        )
    return first, end


def check(**given: tuple[str, tuple[str, ...]]) -> None:
    for name, (value, known) in given.items():
        if value not in known:
            raise UserError(f"--{name} is one of {', '.join(known)}, not {value!r}.", 2)
