"""eP-ALM: an encoder's [CLS] tokens, one after another, in one slot of a frozen decoder.

Shukor, Dancette and Cord, "eP-ALM: Efficient Perceptual Augmentation of Language Models",
https://arxiv.org/abs/2303.11403. With E_i the [CLS] token of the encoder's level i after its
final norm, p a soft prompt and t the text:

    [CLS]_i = C_i(E_i(X))                            one linear connection, shared or a level each
    t_j = LM_j([CLS]_i, p_{j-1}, t_{j-1})            (1) in the decoder's last layers

The slot stands before the prompt, the prompt before the text. Each level serves its share of the
layers that are injected into (`level_in`) and replaces what the slot held. After these layers the
slot goes on as a token of its own. It attends to itself alone, so its keys and values in every
layer do not depend on the text: they are made once for each image, as are the prompt's, which
sees the slot and itself. Neither has a position: no learned one is added, RoPE does not turn
them, and the text counts from 0, so the frozen model reads it as ever.

What differs from the authors' code: theirs lets the slot see the whole text, the future and
padding included, and leaves out the last layer ([19, 31) of OPT-2.7B's 32, where the paper says
the last 12); ``inject`` gives their range. Theirs sums the loss over a caption's tokens, times
0.1, where ours is the mean over all tokens of a step: to AdamW that is nearly the same. Where the
number of levels does not divide the number of layers, their last level takes all that is left:
3 levels in 8 layers are 0,0,1,1,2,2,2,2 there and 0,0,0,1,1,1,2,2 here.

PromptFuse, LimBER, MAGMA and FrozenBiLM are options: the last [CLS] token (MAGMA once: all
tokens), at the input ([0, 1)), with a prompt, alone, or with adapters.
"""

from typing import Any

import torch
from torch import Tensor, nn

from tinyvl.captioner import Captioner
from tinyvl.decoder import Adapters, Decoder, Prefix
from tinyvl.encoders import ImageEncoder, Percept
from tinyvl.text import Text

TOWERS = {"vision": "encoder", "lm": "decoder"}  # what ``unfreeze`` calls them
LEVELS, LAYERS = 6, 12  # the paper's: the last of the encoder, the last of the decoder


def ranges(
    extract: list[int] | None, inject: list[int] | None, levels: int, layers: int
) -> tuple[range, range]:
    """The levels that are read and the layers that they are injected into.

    None is the paper's last 6 levels (or all, or one a layer) and last 12 layers (at most half).
    """
    last = min(LAYERS, max(1, layers // 2))
    into = range(*inject) if inject is not None else range(layers - last, layers)
    last = min(LEVELS, levels, len(into))
    read = range(*extract) if extract is not None else range(levels - last, levels)
    return read, into


def level_in(layer: int, inject: range, levels: int) -> int:
    """The number of the level, from 0, that the slot holds in a layer: equal shares, in order."""
    return (layer - inject.start) * levels // len(inject)


class SoftPrompt(nn.Module):
    """Trained tokens (N, d), as they are or through an MLP, initialised as PyTorch does."""

    def __init__(self, tokens: int, width: int, mlp: bool):
        super().__init__()
        self.tokens = nn.Embedding(tokens, width)
        layers = (nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
        self.mlp = nn.Sequential(*layers) if mlp else nn.Identity()

    def forward(self) -> Tensor:
        return self.mlp(self.tokens.weight)


class Adapter(nn.Module):
    """x + W_up relu(W_down x), with biases; the bottleneck has 1/factor of the width.

    Starts close to the identity: N(0, 1e-3), cut at two deviations, as the authors' (and MAGMA's).
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
    """A captioner whose decoder reads the encoder's levels in a slot before the text."""

    levels = None
    reads = "summaries"

    def __init__(
        self, encoder: ImageEncoder, decoder: Decoder, text: Text, *, prompt: str = "",
        shared: bool = False, soft: int = 10, mlp: bool = True, deep: bool = False,
        adapters: int | None = None, adapt: list[int] | None = None,
        extract: list[int] | None = None, inject: list[int] | None = None, tokens: str = "cls",
        unfreeze: list[str] | None = None,
    ):  # fmt: skip
        """Args:
        shared: one connection for all levels, which then have one width.
        soft: length of the soft prompt, 0: none; ``mlp``: through an MLP.
        deep: a soft prompt of that length in every layer in place of one at the input.
        adapters: the factor of sequential adapters after each attention and feed-forward.
        adapt: layers of the decoder that have them, [first, end) from 0; None: all.
        extract: levels of the encoder, [first, end) from 0; see `ranges`.
        inject: layers of the decoder, [start, end) from 0; see `ranges`.
        tokens: "cls"; or "all": the encoder's final tokens in place of the levels.
        unfreeze: "vision", "lm": also train these.
        """
        super().__init__(encoder, decoder, text, prompt)
        c = decoder.config
        levels = 1 if tokens == "all" else len(encoder.widths)
        self.extract, self.inject = ranges(extract, inject, levels, c.layers)
        widths = [encoder.widths[level] for level in self.extract]
        if tokens == "all":
            self.reads, widths = "tokens", [encoder.width]
        self.connector = nn.ModuleList(
            nn.Linear(width, c.hidden_size) for width in (widths[:1] if shared else widths)
        )
        self.soft = SoftPrompt(soft, c.embed_size, mlp) if soft and not deep else None
        self.deep = SoftPrompt(c.layers * soft, c.hidden_size, mlp) if soft and deep else None
        self.adapters = nn.ModuleDict()
        if adapters:
            for i in range(*adapt or (c.layers,)):
                pair = (Adapter(c.hidden_size, adapters) for _ in range(2))
                self.adapters[str(i)] = nn.ModuleList(pair)
        self.unfrozen = [TOWERS[name] for name in unfreeze or []]
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(self.trainable(name))
        self.encoder.learns = "encoder" in self.unfrozen
        touched = self.soft or self.deep or "decoder" in self.unfrozen
        self.text_layers = 0 if touched else min([self.inject.start, *self.pairs])

    def trainable(self, name: str) -> bool:
        tower = name.partition(".")[0]
        return tower not in TOWERS.values() or tower in self.unfrozen

    def see(self, percept: Percept) -> Prefix:
        """Keys and values of slot and prompts in every layer; (1, ...) where all images share."""
        decoder, start = self.decoder, self.inject.start
        prefix = self.slot(percept)
        images, dtype = len(percept.tokens), decoder.embed.weight.dtype
        if self.soft is not None:
            prompt = decoder.widen(self.soft().to(dtype))[None]  # (1, P, d)
            below: Prefix = {}
            if start:  # the same for all images
                prompt, below = decoder.read(prompt, adapters=self.pairs, last=start)
            prompt = prompt.expand(images, -1, -1)
            prefix = decoder.read(prompt, adapters=self.pairs, prefix=prefix, first=start)[1]
            prefix |= below
        if self.deep is not None:
            prompts = self.deep().to(dtype).unflatten(0, (decoder.config.layers, 1, -1))
            for layer, tokens in enumerate(prompts):  # (1, P, d)
                k, v = decoder.prefix(layer, tokens)
                if layer in prefix:
                    k, v = (
                        torch.cat((slot, own.to(slot.dtype).expand(len(slot), -1, -1, -1)), 2)
                        for slot, own in zip(prefix[layer], (k, v), strict=True)
                    )
                prefix[layer] = k, v
        return prefix

    def slot(self, percept: Percept) -> Prefix:
        """[CLS]_i of equation 1: the slot's keys and values in layer ``inject.start`` and later."""
        if self.reads == "tokens":
            levels = [percept.tokens]  # (I, S, D)
        else:
            levels = [percept.summaries[i][:, None] for i in self.extract]  # (I, 1, D_i)
        shared = len(self.connector) == 1
        states = [self.connector[0 if shared else i](level) for i, level in enumerate(levels)]
        end = self.inject.stop
        prefix = {}
        for layer in self.inject:  # (1), (I, 1 or S, d)
            level = level_in(layer, self.inject, len(states))
            prefix[layer] = self.decoder.prefix(layer, states[level])
        if end < self.decoder.config.layers:  # the last one goes on by itself
            alone = self.decoder(
                states[-1], adapters=self.pairs, first=end - 1, last=end, start=None
            )  # (I, 1 or S, d)
            prefix |= self.decoder.read(alone, adapters=self.pairs, first=end)[1]
        return prefix

    @property
    def pairs(self) -> Adapters:
        pairs = {int(i): tuple(pair.children()) for i, pair in self.adapters.items()}
        return {i: (first, second) for i, (first, second) in pairs.items()}

    def pick(self, visual: Prefix, rows: Tensor) -> Prefix:
        return {
            layer: (k, v) if len(k) == 1 else (k[rows], v[rows]) for layer, (k, v) in visual.items()
        }

    def added(self, visual: Prefix) -> dict[str, Any]:
        return {"prefix": visual, "adapters": self.pairs}
