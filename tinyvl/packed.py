"""Frozen matrices kept as oneDNN multiplies by them: a faster decoder and ViT on a CPU.

oneDNN cuts a matrix into tiles. Of a plain tensor it makes them anew in each product, which with
as few rows as a step of decoding has takes about as long as the product; of a frozen matrix they
can be made once. Then 5 to 160 rows take a quarter to a half less time, one or a thousand about as
long as before. A head that is the embedding, too, is kept twice. The activation behind a product is
computed while its numbers are at hand: CLIP's, three passes over memory in timm, takes a fifth of a
ViT's time in bf16.

The functions are those that torch's own compiler calls in a model it freezes
(torch/_inductor/fx_passes/mkldnn_fusion.py). Their names are private, so `packs` first sees whether
they are there and right.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyvl import decoder

TILED_FOR = 40  # rows, eight pictures' five beams; any number can be multiplied
ACTIVATIONS = {  # none, and oneDNN's name for one of `decoder.ACTIVATIONS`, and how it is computed
    "": ("none", ""),
    "gelu_new": ("gelu", "tanh"),
    "gelu_pytorch_tanh": ("gelu", "tanh"),
    "gelu": ("gelu", "none"),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
    "swish": ("swish", ""),
}
TIMMS = {  # classes in timm's ViTs: f(x) is g(s x) / s, and g's name above, and s
    "GELU": ("gelu", 1.0),
    "GELUTanh": ("gelu_new", 1.0),
    "ReLU": ("relu", 1.0),
    "SiLU": ("silu", 1.0),
    "QuickGELU": ("silu", 1.702),  # CLIP's: x * sigmoid(1.702 x)
}


class Packed(nn.Module):
    """A linear layer (..., k) -> (..., m) and the activation behind it, without gradients.

    Its tiles cannot be read, pickled or moved; a copy shares them.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, activation: str = ""):
        """``weight`` (m, k), ``bias`` (m,); ``activation``: one of `ACTIVATIONS`, or none."""
        super().__init__()
        self.dtype, (self.kind, self.how) = weight.dtype, ACTIVATIONS[activation]
        tiles = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), TILED_FOR)
        self.register_buffer("tiles", tiles, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)

    def __deepcopy__(self, memo: dict) -> "Packed":
        return self

    def forward(self, x: Tensor) -> Tensor:
        """In the dtype of the weight, whatever that of ``x``."""
        assert not (x.requires_grad and torch.is_grad_enabled()), "no gradient goes through tiles"
        x = x.to(self.dtype)
        return torch.ops.mkldnn._linear_pointwise(x, self.tiles, self.bias, self.kind, [], self.how)


@cache
def packs(dtype: torch.dtype) -> bool:
    """Whether this torch and this processor multiply by tiles of ``dtype``, and rightly."""
    x, weight, ones = (torch.linspace(-1, 1, n).to(dtype) for n in (3 * 64, 32 * 64, 32))
    x, weight = x.view(3, 64), weight.view(32, 64)
    for bias in (ones, None):
        plain = F.linear(x, weight, bias).float()
        for name in ACTIVATIONS:
            then = decoder.ACTIVATIONS[name] if name else nn.Identity()
            try:
                found = Packed(weight, bias, name)(x)
            except (AttributeError, RuntimeError):  # no such function; not on this processor
                return False
            if not torch.allclose(found.float(), then(plain), 1e-2, 1e-2):
                return False
    return True


def packed(weight: Tensor, bias: Tensor | None = None, activation: str = "") -> Packed | None:
    """None: this is not possible here (see `packs`), or the matrix is not in a CPU's memory."""
    if weight.device.type != "cpu" or not packs(weight.dtype):
        return None
    return Packed(weight, bias, activation)


def pack_decoder(model: decoder.Decoder) -> None:
    """Packs a frozen decoder's linear layers and its head, where that is possible.

    Their weights cannot be read, saved, moved to another device or dtype, or trained from then on.
    """
    c, weight = model.config, model.embed.weight
    block: Any
    for block in model.layers:
        for name, module in list(block.named_modules()):
            if not isinstance(module, nn.Linear):
                continue
            first = name == ("ffn.gate" if c.gated else "ffn.up")
            new = packed(module.weight, module.bias, c.activation if first else "")
            if new is not None:
                block.set_submodule(name, new)
                if first:
                    block.ffn.activation = nn.Identity()
    model.packed_head = packed(weight if model.head is None else model.head.weight)


@torch.no_grad()
def pack_vit(model: nn.Module) -> None:
    """Packs the attention and feed-forward layers of a frozen timm model, where that is possible.

    Those of the classes alone that plain ViTs are made of: others may read a layer's weight
    themselves. They are from then on as `pack_decoder` says.
    """
    from timm.layers import Mlp
    from timm.models.vision_transformer import Attention

    for block in list(model.modules()):
        if type(block) is Attention:
            pack_linears(block)
        elif type(block) is Mlp and type(block.fc1) is nn.Linear:
            pack_mlp(block)


def pack_mlp(block: Any) -> None:
    """Packs timm's Mlp, its activation, too, if it is one of `TIMMS`: the matrices take the s."""
    kind = type(block.act).__name__
    if getattr(block.act, "approximate", "none") == "tanh":  # torch's own GELU
        kind = "GELUTanh"
    if kind not in TIMMS or type(block.norm) is not nn.Identity:
        return pack_linears(block)
    name, s = TIMMS[kind]
    bias = block.fc1.bias
    first = packed(s * block.fc1.weight, None if bias is None else s * bias, name)
    last = packed(block.fc2.weight / s, block.fc2.bias)
    if first is not None and last is not None:
        block.fc1, block.act, block.fc2 = first, nn.Identity(), last


def pack_linears(model: nn.Module) -> None:
    """Packs all linear layers within, which must be called and not read; see `pack_decoder`."""
    for name, linear in list(model.named_modules()):
        if type(linear) is nn.Linear and (new := packed(linear.weight, linear.bias)) is not None:
            model.set_submodule(name, new)
