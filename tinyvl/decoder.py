"""The frozen language model: one plain-PyTorch decoder for the GPT-2, OPT and Llama families.

The methods live inside the decoder's layers, so it is ours. What they need of it:

- ``branches``: a function of a layer's feed-forward input, added to its output (I-Tuning);
- ``adapters``: functions of a layer's attention and feed-forward outputs (eP-ALM, MAGMA);
- ``prefix``: keys and values of extra tokens. The text of a layer attends to them, and they never
  attend to the text (eP-ALM's slot, soft and deep prompts, ClipCap's prefix). `Decoder.prefix`
  makes them for one layer, `Decoder.read` for tokens that run through several;
- ``first``/``last``: run only some of the layers, to reuse states below the first module.

Weights come from transformers checkpoints (`decoder_weights.py`); logits equal transformers'.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache as memo
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tinyvl.decoder_head import HeadLosses, scores

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {  # by transformers' names
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
}
MOST = 2**22  # numbers of keys that a step copies to float32: malloc does not keep far larger ones
Function = Callable[[Tensor], Tensor]
Branches = dict[int, Function]
Adapters = dict[int, tuple[Function, Function]]
Prefix = dict[int, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class DecoderConfig:
    """Everything that tells one decoder from another."""

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_size: int
    max_positions: int
    activation: str
    eps: float
    embed_size: int  # width of the token embeddings; differs from hidden_size in OPT-350M
    gated: bool = False  # SwiGLU feed-forward
    rms_norm: bool = False
    pre_norm: bool = True  # False: OPT-350M normalises after each residual
    final_norm: bool = True
    qkv_bias: bool = True
    o_bias: bool = True
    ffn_bias: bool = True
    tied: bool = True  # output head shares the token embedding
    position_offset: int = 0  # OPT keeps two unused rows before position 0
    rope: tuple[float, ...] = ()  # RoPE's head_dim / 2 frequencies; none: learned positions


class Cache:
    """Keys and values of what has been read, (B, kv_heads, S, head_dim) for each layer.

    A layer's own prefix lies before its text, so layers may differ in S; ``length`` counts text.
    """

    def __init__(self) -> None:
        self.layers: Prefix = {}
        self.mask: Tensor | None = None  # (B, length) True where a token is real
        self.length = 0
        self.positions: Tensor | None = None  # (B, 1) of the next tokens, where a cache knows them

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if layer in self.layers:
            before = self.layers[layer]
            k, v = torch.cat((before[0], k), 2), torch.cat((before[1], v), 2)
        self.layers[layer] = k, v
        return k, v

    def seen(self, layer: int, mask: Tensor | None) -> Tensor | None:
        """The mask of what a layer's queries look at; ``mask``: that of the text."""
        return mask

    def reorder(self, rows: Tensor) -> None:
        """Row j goes on from the former row rows[j]."""
        for layer, (k, v) in self.layers.items():
            self.layers[layer] = k.index_select(0, rows), v.index_select(0, rows)
        if self.mask is not None:
            self.mask = self.mask.index_select(0, rows)


@dataclass
class Context:
    """What the layers share in one forward pass."""

    rope: tuple[Tensor, Tensor] | None  # cos, sin (N, 1, head_dim) or (B or 1, T, 1, head_dim)
    mask: Tensor | None  # (B or 1, 1, T, S) True where a query may look; None: causal
    cache: Cache | None
    prefix: Prefix
    shape: tuple[int, int]  # B, T
    real: Tensor | None  # (N,) which of the B * T tokens are not padding; None: all

    def pack(self, x: Tensor) -> Tensor:
        """(B, T, d) -> (N, d): padding costs the token-wise layers nothing."""
        return x if self.real is None else x.flatten(0, 1).index_select(0, self.real)

    def spread(self, x: Tensor) -> Tensor:
        """(N, d) -> (B, T, d), zeros where there is padding."""
        if self.real is None:
            return x
        batch, length = self.shape
        padded = x.new_zeros(batch * length, x.shape[-1]).index_copy(0, self.real, x)
        return padded.view(batch, length, -1)


def norm_layer(config: DecoderConfig, size: int) -> nn.Module:
    return (nn.RMSNorm if config.rms_norm else nn.LayerNorm)(size, eps=config.eps)


class Attention(nn.Module):
    """Multi-head self-attention with grouped keys and values, RoPE where the family has it."""

    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.head_dim, self.grouped = c.head_dim, c.kv_heads != c.heads
        self.q = nn.Linear(c.hidden_size, c.heads * c.head_dim, c.qkv_bias)
        self.k = nn.Linear(c.hidden_size, c.kv_heads * c.head_dim, c.qkv_bias)
        self.v = nn.Linear(c.hidden_size, c.kv_heads * c.head_dim, c.qkv_bias)
        self.o = nn.Linear(c.heads * c.head_dim, c.hidden_size, c.o_bias)

    def heads(self, x: Tensor) -> Tensor:  # (B, T, h * head_dim) -> (B, h, T, head_dim)
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def turned(self, x: Tensor, context: Context) -> Tensor:
        """Queries or keys (..., h * head_dim) with RoPE, where the family has it."""
        if context.rope is None:
            return x
        return rotate(x.unflatten(-1, (-1, self.head_dim)), *context.rope).flatten(-2)

    def forward(self, x: Tensor, layer: int, context: Context) -> Tensor:
        q, k, v = self.turned(self.q(x), context), self.turned(self.k(x), context), self.v(x)
        q, k, v = (self.heads(context.spread(part)) for part in (q, k, v))
        mask = context.mask
        new = layer in context.prefix and not (context.cache and context.cache.length)
        if new:  # the prefix stands before the text; later steps find it in the cache
            before = context.prefix[layer]
            groups = len(k) // len(before[0])  # rows that share one image
            k, v = (
                torch.cat((p.to(t.dtype).repeat_interleave(groups, 0), t), 2)
                for p, t in zip(before, (k, v), strict=True)
            )
        if context.cache is not None:
            k, v = context.cache.append(layer, k, v)
            mask = context.cache.seen(layer, mask)
        if mask is not None and (extra := k.shape[2] - mask.shape[-1]):
            mask = F.pad(mask, (extra, 0), value=True)
        causal = mask is None and q.shape[2] > 1
        if q.device.type == "cpu" and q.shape[2] == 1 and k.numel() <= MOST:
            with torch.autocast("cpu", enabled=False):  # the copies are not what takes time
                out = attend(wide(q), wide(k), wide(v), mask, causal).to(v.dtype)
        elif q.device.type == "cpu" and any(part.requires_grad for part in (q, k, v)):
            out = attend(q, k, v, mask, causal)
        else:
            out = F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=causal, enable_gqa=self.grouped
            )
        return self.o(context.pack(out.transpose(1, 2).flatten(2)))


def wide(x: Tensor) -> Tensor:
    """In float32, or in float64 as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """`F.scaled_dot_product_attention`, of which q (B, h, T, D) has h / g heads for one of k and v
    (B, g, S, D). Over short texts torch's own kernels are slow on a CPU: backward, and for the one
    token of a step of decoding, in bf16 up to six times as slow."""
    shape, (batch, groups, keys, width) = q.shape, k.shape
    q = (q * width**-0.5).reshape(batch * groups, -1, width)  # a group's queries, head by head
    k, v = (x.reshape(batch * groups, keys, width) for x in (k, v))
    scores = torch.bmm(q, k.mT).view(batch, -1, shape[2], keys)  # (B, h, T, S)
    if causal:
        mask = torch.ones(shape[2], keys, dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    shares = scores.softmax(-1).to(v.dtype).view(batch * groups, -1, keys)
    return torch.bmm(shares, v).view(shape)


@memo
def tensor_of(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """The same tensor in every step: to copy it to a GPU anew would wait for the GPU."""
    return torch.tensor(numbers, device=device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, halves convention of transformers' Llama."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    return x * cos.to(x.dtype) + turned * sin.to(x.dtype)


class FeedForward(nn.Module):
    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.up = nn.Linear(c.hidden_size, c.ffn_size, c.ffn_bias)
        self.gate = nn.Linear(c.hidden_size, c.ffn_size, c.ffn_bias) if c.gated else None
        self.down = nn.Linear(c.ffn_size, c.hidden_size, c.ffn_bias)
        self.activation = ACTIVATIONS[c.activation]

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        return self.down(self.activation(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """One layer: attention and feed-forward, each normalised before (or, OPT-350M, after)."""

    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.pre_norm = c.pre_norm
        self.norm1, self.norm2 = norm_layer(c, c.hidden_size), norm_layer(c, c.hidden_size)
        self.attention, self.ffn = Attention(c), FeedForward(c)

    def forward(
        self,
        x: Tensor,  # (B, T, d), or (N, d) where there is padding
        layer: int,
        context: Context,
        branch: Function | None = None,
        adapters: tuple[Function, Function] | None = None,
    ) -> Tensor:
        pre = self.pre_norm
        after_attention, after_ffn = adapters or (nn.Identity(), nn.Identity())
        x = x + after_attention(self.attention(self.norm1(x) if pre else x, layer, context))
        inner = self.norm2(x) if pre else self.norm1(x)  # what the feed-forward reads
        out = after_ffn(self.ffn(inner))
        if branch is not None:
            out = out + context.pack(branch(context.spread(inner))).to(out.dtype)
        return x + out if pre else self.norm2(inner + out)


class Decoder(nn.Module):
    """A frozen causal language model.

    Token ids (B, T), or embeddings (B, T, d), to final hidden states (B, T, d); `logits` maps
    those to the vocabulary, so that logits are computed only where something reads them.
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = c = config
        self.embed = nn.Embedding(c.vocab_size, c.embed_size)
        wide = c.embed_size != c.hidden_size
        self.project_in = nn.Linear(c.embed_size, c.hidden_size, False) if wide else None
        self.project_out = nn.Linear(c.hidden_size, c.embed_size, False) if wide else None
        rows = c.max_positions + c.position_offset
        self.positions = None if c.rope else nn.Embedding(rows, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = norm_layer(c, c.hidden_size) if c.final_norm else None
        self.head = None if c.tied else nn.Linear(c.embed_size, c.vocab_size, False)
        self.packed_head: nn.Module | None = None  # on a CPU: see ``packed``
        self.checkpointing = False  # recompute layers that carry gradients in backward

    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, cache: Cache | None = None,
        branches: Branches | None = None, adapters: Adapters | None = None,
        prefix: Prefix | None = None, first: int = 0, last: int | None = None,
        start: int | None = 0,
    ) -> Tensor:  # fmt: skip
        """Hidden states of the layers [first, last), normalised if last is the last.

        Args:
            x: token ids (B, T), embeddings (B, T, d) as `embed_tokens` gives them, or, with
                first > 0, the hidden states that layer reads.
            mask: (B, T) True where a token is real. Padding may stand on either side; None: all
                are real. Padded positions return numbers without meaning. A GPU need not be waited
                for where the mask is on the host.
            cache: read and extended. The mask is for the new tokens.
            branches: {layer: function of the feed-forward's input, added to its output}.
            adapters: {layer: functions of the attention's and of the feed-forward's output}.
            prefix: {layer: keys and values} from `prefix`; rows of x are grouped by image.
            start: the position of the text's first token, the same in every step with a cache.
                None: the tokens have no position, so no learned one is added and RoPE does not
                turn them.
        """
        last = self.config.layers if last is None else last
        if x.dtype == torch.long:
            x = self.embed_tokens(x)
        batch, length = x.shape[:2]
        if mask is not None and bool(mask.all()) and (cache is None or cache.mask is None):
            mask = None  # no padding: the fast causal path
        real = None
        if mask is not None:
            real = mask.flatten().nonzero()[:, 0].to(x.device, non_blocking=True)
            mask = mask.to(x.device, non_blocking=True)
        positions, attend = self._positions(x, mask, cache)
        rope = None
        if start is not None and self.positions is None:
            places = positions if real is None else positions.flatten()[real]
            rope = self._rope(places + start)
        elif start is not None and self.positions is not None and first == 0:
            x = x + self.positions(positions + start + self.config.position_offset)
        if prefix and attend is None and length > 1:  # the causal kernel sees its own square only
            attend = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        context = Context(rope, attend, cache, prefix or {}, (batch, length), real)
        x = context.pack(x)
        for i in range(first, last):
            block, added = self.layers[i], ((branches or {}).get(i), (adapters or {}).get(i))
            carries = torch.is_grad_enabled() and (x.requires_grad or any(added))
            if self.checkpointing and carries and cache is None:  # a cache is not to grow twice
                x = checkpoint(block, x, i, context, *added, use_reentrant=False)
            else:
                x = block(x, i, context, *added)
        x = context.spread(x)
        if cache is not None:
            cache.length += length
        return self.norm(x) if self.norm is not None and last == self.config.layers else x

    def _positions(
        self, x: Tensor, mask: Tensor | None, cache: Cache | None
    ) -> tuple[Tensor, Tensor | None]:
        """Positions (B or 1, T) and the attention mask (B or 1, 1, T, S), None where causal."""
        if cache is not None and cache.positions is not None:
            return cache.positions, None
        past, (batch, length) = cache.length if cache else 0, x.shape[:2]
        ones = partial(torch.ones, dtype=torch.bool, device=x.device)
        if cache and (mask is not None or cache.mask is not None):
            before = ones(batch, past) if cache.mask is None else cache.mask
            cache.mask = mask = torch.cat(
                (before, ones(batch, length) if mask is None else mask), 1
            )
        if mask is None:
            positions = torch.arange(past, past + length, device=x.device)[None]
            plain = past == 0 or length == 1
            return positions, None if plain else ones(length, past + length).tril(past)[None, None]
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, past:]
        causal = ones(length, past + length).tril(past)
        own = causal.triu(past)  # a padded query sees itself: softmax stays finite
        return positions, ((causal & mask[:, None, :]) | own)[:, None]

    def _rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (..., 1, head_dim) of positions (...), in float32."""
        angles = positions[..., None].float() * tensor_of(self.config.rope, positions.device)
        angles = torch.cat((angles, angles), -1)[..., None, :]
        return angles.cos(), angles.sin()

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, d), positions not yet added."""
        return self.widen(self.embed(ids))

    def widen(self, x: Tensor) -> Tensor:
        """Embeddings (..., embed_size) -> (..., d): the same but in OPT-350M."""
        return x if self.project_in is None else self.project_in(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Final hidden states (..., d) to logits (..., vocab_size), in float32 or as packed."""
        hidden, weight = self._read_out(hidden)
        if self.packed_head is not None:
            return self.packed_head(hidden)
        return scores(hidden.flatten(0, -2), weight).unflatten(0, hidden.shape[:-1])

    def losses(self, hidden: Tensor, wanted: Tensor) -> Tensor:
        """Cross-entropy (N,), float32, of the tokens ``wanted`` (N,) behind states (N, d)."""
        hidden, weight = self._read_out(hidden)
        if weight.requires_grad:
            return F.cross_entropy(F.linear(hidden, weight).float(), wanted, reduction="none")
        return HeadLosses.apply(hidden, weight, wanted)

    def _read_out(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What the head multiplies: states (..., embed_size) and its matrix."""
        if self.project_out is not None:
            hidden = self.project_out(hidden)
        weight = self.embed.weight if self.head is None else self.head.weight
        return hidden.to(weight.dtype), weight

    def prefix(self, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (I, kv_heads, P, head_dim) of extra tokens (I, P, d) entering a layer.

        They carry no position: a learned one is never added, and RoPE turns them by zero.
        """
        block = self.layers[layer]
        assert isinstance(block, Block)
        x = block.norm1(hidden) if block.pre_norm else hidden
        attention = block.attention
        return attention.heads(attention.k(x)), attention.heads(attention.v(x))

    def read(
        self, x: Tensor, *, adapters: Adapters | None = None, prefix: Prefix | None = None,
        first: int = 0, last: int | None = None, start: int | None = None,
    ) -> tuple[Tensor, Prefix]:  # fmt: skip
        """Tokens (I, P, d) that stand before the text, through the layers [first, last).

        -> their states behind these layers, and the keys and values that the text sees of them
        and of what the prefix had before them. The arguments are those of `forward`.
        """
        cache = Cache()
        x = self(
            x, cache=cache, adapters=adapters, prefix=prefix, first=first, last=last, start=start
        )
        return x, cache.layers

    def train(self, mode: bool = True) -> "Decoder":
        """A frozen model stays in eval mode."""
        return super().train(False)
