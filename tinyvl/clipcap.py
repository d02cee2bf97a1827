"""ClipCap: a picture's vector mapped to a prefix of a frozen decoder. I-Tuning's baseline.

Mokady, Hertz and Bermano, "ClipCap: CLIP Prefix for Image Captioning",
https://arxiv.org/abs/2111.09734. An MLP, or a transformer over the vector's projection and
learned constants, makes 10 embeddings that stand where words would, at positions 0 to 9; the
sequence is ``prefix [bos] text [eos]``. The prefix sees no text, so its keys and values are made
once for each image.

The vector is the encoder's last summary: [CLS] after the final norm. The authors read CLIP's
projection of it (the encoder's option ``projected``), and their sequence is ``prefix text .`` (our
option ``bare``): the prefix's last embedding then stands where [bos] would.
The language model stays frozen with both mappings (the paper's MLP goes with a tuned GPT-2). The
transformer's 42,728,448 parameters over 640 numbers and GPT-2 are the 43 M of both papers.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyvl.captioner import Captioner
from tinyvl.decoder import Cache, Decoder, Prefix
from tinyvl.encoders import ImageEncoder, Percept
from tinyvl.text import Text


class Layer(nn.Module):
    """A pre-norm transformer layer with ReLU; queries, keys and values have no bias."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.o = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(I, S, d) -> (I, S, d)"""
        normed = self.norm1(x)
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.q(normed), *self.kv(normed).chunk(2, -1))
        )
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Reads the vector as ``length`` tokens, and as many learned constants after them.

    The prefix is the final states of the constants.
    """

    def __init__(self, vision_width: int, width: int, length: int, layers: int, heads: int):
        super().__init__()
        self.linear = nn.Linear(vision_width, length * width)
        self.constants = nn.Parameter(torch.randn(length, width))
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """(I, D) -> (I, length * d)"""
        length = len(self.constants)
        x = self.linear(x).unflatten(-1, (length, -1))
        x = torch.cat((x, self.constants.to(x.dtype).expand(len(x), -1, -1)), 1)
        for layer in self.layers:
            x = layer(x)
        return x[:, length:].flatten(1)


Seen = tuple[Prefix, Tensor]  # the prefix, and what of it stands in the place of [bos]


class ClipCap(Captioner):
    """A captioner with a mapping before its text."""

    reads = "summaries"

    def __init__(
        self, encoder: ImageEncoder, decoder: Decoder, text: Text, *, prompt: str = "",
        mapping: str = "mlp", length: int = 10, layers: int = 8, heads: int = 8, bare: bool = False,
    ):  # fmt: skip
        """Args:
        mapping: "mlp" or "transformer", which has ``layers`` and ``heads``.
        length: of the prefix.
        bare: texts have no begin token and end at a full stop.
        """
        if bare and text.tokenizer is not None:
            text = Text(text.tokenizer, text.bos, [text.eos, *text.encode(["."])[0]][-1])
        super().__init__(encoder, decoder, text, prompt, length - bare)
        self.bare = bare
        width, vision_width = decoder.config.embed_size, encoder.widths[-1]
        self.mapping: nn.Module
        if mapping == "transformer":
            self.mapping = Transformer(vision_width, width, length, layers, heads)
        else:
            middle = width * length // 2
            self.mapping = nn.Sequential(
                nn.Linear(vision_width, middle), nn.Tanh(), nn.Linear(middle, width * length)
            )

    def see(self, percept: Percept) -> Seen:
        """The last summary (I, D) to the prefix's keys and values in every layer."""
        prefix = self.mapping(percept.summaries[-1]).unflatten(-1, (self.length + self.bare, -1))
        first, last = self.decoder.widen(prefix).split((self.length, int(self.bare)), 1)
        return self.decoder.read(first, start=0)[1] if self.length else {}, last

    def pick(self, visual: Seen, rows: Tensor) -> Seen:
        return super().pick(visual[0], rows), visual[1][rows]

    def run(
        self, x: Tensor, visual: Seen, cache: Cache | None = None, mask: Tensor | None = None,
        first: int = 0,
    ) -> Tensor:  # fmt: skip
        if self.bare and not (cache and cache.length):
            begin = torch.zeros_like(x[:, 0]) if mask is None else mask.int().argmax(1)  # (B,)
            here = torch.arange(x.shape[1], device=x.device) == begin[:, None].to(x.device)
            last = visual[1].repeat_interleave(len(x) // len(visual[1]), 0)  # (B, 1, d)
            x = self.decoder.embed_tokens(x)
            x = torch.where(here[..., None], last.to(x.dtype), x)
        return super().run(x, visual, cache, mask, first)

    def added(self, visual: Seen) -> dict[str, Any]:
        return {"prefix": visual[0], "start": self.length}
