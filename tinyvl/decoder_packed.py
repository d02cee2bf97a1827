"""A frozen decoder's matrices, kept as oneDNN multiplies by them: faster steps on a CPU.

oneDNN cuts a matrix into tiles. Of a plain tensor it makes them anew in each product, which with
as few rows as a step of decoding has takes about as long as the product; of a frozen matrix they
can be made once. The functions are those that torch's own compiler calls in a model it freezes
(torch/_inductor/fx_passes/mkldnn_fusion.py). Their names are private, so `packs` first sees whether
they are there and right.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyvl.decoder import Decoder

ROWS = 40  # that the tiles are made for; any number can be multiplied. 8 pictures of 5 beams
ACTIVATIONS = {  # oneDNN's name for one of `decoder.ACTIVATIONS`, and how it is computed
    "gelu_new": ("gelu", "tanh"),
    "gelu_pytorch_tanh": ("gelu", "tanh"),
    "gelu": ("gelu", "none"),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
    "swish": ("swish", ""),
}


class Packed(nn.Module):
    """A linear layer (..., k) -> (..., m) and the activation behind it. It has no gradients."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, activation: str = ""):
        """``weight`` (m, k), ``bias`` (m,); ``activation``: one of `ACTIVATIONS`, or none."""
        super().__init__()
        self.dtype, (self.kind, self.how) = weight.dtype, ACTIVATIONS.get(activation, ("none", ""))
        tiles = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
        self.register_buffer("tiles", tiles, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """In the dtype of the weight, whatever that of ``x``."""
        x = x.to(self.dtype)
        return torch.ops.mkldnn._linear_pointwise(x, self.tiles, self.bias, self.kind, [], self.how)


@cache
def packs(dtype: torch.dtype) -> bool:
    """Whether this torch and this processor multiply by tiles of ``dtype``, and rightly."""
    x, weight, bias = (torch.linspace(-1, 1, n).to(dtype) for n in (3 * 64, 32 * 64, 32))
    x, weight = x.view(3, 64), weight.view(32, 64)
    try:
        found = Packed(weight, bias)(x)
    except (AttributeError, RuntimeError):  # no such function; not on this processor
        return False
    return torch.allclose(found.float(), F.linear(x, weight, bias).float(), 1e-2, 1e-2)


def packed(weight: Tensor, bias: Tensor | None = None, activation: str = "") -> Packed | None:
    """None: it would not help here (see `packs`), or the matrix is not in a CPU's memory."""
    if weight.device.type != "cpu" or not packs(weight.dtype):
        return None
    return Packed(weight, bias, activation)


def pack(decoder: Decoder) -> None:
    """Packs a frozen decoder's linear layers and its head, where that helps.

    Their weights cannot be read, moved to another dtype or trained from then on.
    """
    c, weight = decoder.config, decoder.embed.weight
    for block in decoder.layers:
        for name, module in list(block.named_modules()):
            if isinstance(module, nn.Linear):
                first = name == ("ffn.gate" if c.gated else "ffn.up")
                new = packed(module.weight, module.bias, c.activation if first else "")
                block.set_submodule(name, new or module)
                if first and new:
                    block.ffn.activation = nn.Identity()
    decoder.packed_head = packed(weight if decoder.head is None else decoder.head.weight)
