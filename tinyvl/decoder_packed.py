"""A frozen decoder's matrices, kept as oneDNN multiplies by them: faster steps on a CPU.

oneDNN cuts a matrix into tiles. Of a plain tensor it makes them anew in each product, which with
as few rows as a step of decoding has takes about as long as the product; of a frozen matrix they
can be made once. Then 5 to 160 rows take a quarter to a half less time, one or a thousand about as
long as before. A head that is the embedding, too, is kept twice.

The functions are those that torch's own compiler calls in a model it freezes
(torch/_inductor/fx_passes/mkldnn_fusion.py). Their names are private, so `packs` first sees whether
they are there and right.
"""

from functools import cache

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


def pack(model: decoder.Decoder) -> None:
    """Packs a frozen decoder's linear layers and its head, where that is possible.

    Their weights cannot be read, saved, moved to another device or dtype, or trained from then on.
    """
    c, weight = model.config, model.embed.weight
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
