"""I-Tuning: cross-attention filters beside the feed-forward layers of a frozen decoder.

Luo et al., "I-Tuning: Tuning Frozen Language Models with Image for Lightweight Image
Captioning", https://arxiv.org/abs/2202.06574. With X the input of a layer's feed-forward and V
the image tokens (section 3):

    Q = W_q X + b_q,  K = W_k V + b_k,  V' = W_v V + b_v      (1) (2) (3)
    S = softmax(Q Kᵀ)                                         (4) one head, not scaled
    Δh = λ W_o (Σ s_i V'_i) + b_o                             (5) added to the layer's output

The paper leaves open the bottleneck width r, λ, the initialisation, the rate and the warm-up.
r = d/2 reproduces its parameter counts; λ = 1; W_o and b_o start at zero, so that training starts
from the untouched language model; W_q and b_q start 1/√r smaller than PyTorch would have them, so
that the unscaled softmax starts as soft as a scaled one. The rates are in ``presets_table.py``.
b_k changes nothing (a softmax does not see what all its scores share); it is there as the paper
counts it.

Not in the paper: ``dropout`` (of the image tokens' entries and of Σ s_i V'_i, in training), which
a small set of pictures needs; `Lower`, because the last map of a CNN trained on classes has lost
some of the colours, parts and places; and the tokens of an enlarged picture, which an encoder can
append to its own.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyvl.captioner import Captioner
from tinyvl.decoder import Decoder, wide
from tinyvl.encoders import ImageEncoder, Percept
from tinyvl.packed import packed
from tinyvl.text import Text

KeysValues = tuple[Tensor, Tensor]  # (I, S, r) each


class ITuneModule(nn.Module):
    """Equations 1 to 5 for one layer."""

    def __init__(
        self, hidden_size: int, vision_width: int, bottleneck: int, scale: float = 1.0,
        dropout: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        self.scale, self.dropout = scale, dropout  # λ
        self.q = nn.Linear(hidden_size, bottleneck)
        self.k = nn.Linear(vision_width, bottleneck)
        self.v = nn.Linear(vision_width, bottleneck)
        self.o = nn.Linear(bottleneck, hidden_size)
        with torch.no_grad():  # unscaled scores of a new module are as small as scaled ones
            self.q.weight.mul_(bottleneck**-0.5)
            self.q.bias.mul_(bottleneck**-0.5)
        nn.init.zeros_(self.o.weight)
        nn.init.zeros_(self.o.bias)
        self.packed_q: nn.Module | None = None  # in a model that only runs
        self.packed_o: nn.Module | None = None  # λ W_o and b_o

    def see(self, tokens: Tensor) -> KeysValues:
        """Image tokens (I, S, D) to keys and values (I, S, r): once for each image."""
        return self.k(tokens), self.v(tokens)

    def weights(self, x: Tensor, k: Tensor) -> Tensor:
        """How x (B, T, d), rows grouped by image, attends to keys (I, S, r): (I, B / I * T, S)."""
        q = (self.packed_q or self.q)(x)  # (1)
        q = q.view(len(k), -1, k.shape[-1])  # an image's rows stand side by side
        with torch.autocast(x.device.type, enabled=False):  # unscaled scores are too large for half
            return (wide(q) @ wide(k).mT).softmax(-1)  # (4)

    def forward(self, x: Tensor, visual: KeysValues) -> Tensor:
        """x (B, T, d), rows grouped by image, to Δh (B, T, d)."""
        k, v = visual  # (2) (3)
        mixed = (self.weights(x, k).to(v.dtype) @ v).view(*x.shape[:2], -1)
        mixed = F.dropout(mixed, self.dropout, self.training)
        if self.packed_o is not None:
            return self.packed_o(mixed)
        return self.scale * F.linear(mixed, self.o.weight) + self.o.bias  # (5)


class Lower(nn.Module):
    """Adds a CNN's lower maps to its last map's tokens, through a narrow linear layer.

    Tokens (I, S, D + below), the lower maps' numbers last, to (I, S, D). It starts at zero.
    """

    def __init__(self, below: int, width: int, rank: int):
        super().__init__()
        self.sizes = [width, below]
        self.down = nn.Linear(below, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        last, below = tokens.split(self.sizes, -1)
        return last + self.up(self.down(below))


class ITune(Captioner):
    """A captioner with an `ITuneModule` in every decoder layer but the first ``drop``."""

    def __init__(
        self, encoder: ImageEncoder, decoder: Decoder, text: Text, *, prompt: str = "",
        bottleneck: int | None = None, drop: int = 0, scale: float = 1.0, dropout: float = 0.0,
        rank: int = 128,
    ):  # fmt: skip
        """Args:
        bottleneck: r; None: half of the decoder's width.
        drop: layers without a module, from the first one on (section 3, "dropping").
        scale: λ.
        rank: of `Lower`, if the encoder gives lower maps.
        """
        super().__init__(encoder, decoder, text, prompt)
        self.dropout = dropout
        self.text_layers = drop
        c = decoder.config
        r = bottleneck or c.hidden_size // 2
        modules = {
            str(i): ITuneModule(c.hidden_size, encoder.width, r, scale, dropout)
            for i in range(drop, c.layers)
        }
        self.itune = nn.ModuleDict(modules)
        below = sum(encoder.below)
        self.lower = Lower(below, encoder.width, rank) if below else None

    def pack(self) -> None:
        super().pack()
        for module in self.itune.children():
            assert isinstance(module, ITuneModule)
            module.packed_o = packed(module.scale * module.o.weight, module.o.bias)
            module.packed_q = packed(module.q.weight, module.q.bias)

    def see(self, percept: Percept) -> dict[int, KeysValues]:
        tokens = percept.tokens if self.lower is None else self.lower(percept.tokens)
        tokens = F.dropout(tokens, self.dropout, self.training)
        modules: dict[str, Any] = dict(self.itune.items())
        # (2) (3) of all layers as one product: its backward adds up the tokens' gradient once.
        maps = [linear for module in modules.values() for linear in (module.k, module.v)]
        weight, bias = torch.cat([m.weight for m in maps]), torch.cat([m.bias for m in maps])
        parts = F.linear(tokens, weight, bias).split([m.out_features for m in maps], -1)
        keys, values = parts[::2], parts[1::2]
        if not torch.is_grad_enabled():  # as each step of decoding reads them: laid out once
            keys = [wide(k.contiguous()) for k in keys]
            values = [v.contiguous() for v in values]
        return dict(zip(map(int, modules), zip(keys, values, strict=True), strict=True))

    def added(self, visual: dict[int, KeysValues]) -> dict[str, Any]:
        branches = {i: lambda x, i=i, kv=kv: self.itune[str(i)](x, kv) for i, kv in visual.items()}
        return {"branches": branches}
