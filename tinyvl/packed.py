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

from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from tinyvl.decoder import Decoder

TILED_FOR = 40  # rows, eight pictures' five beams; any number can be multiplied
QUICK = 1.702  # CLIP's QuickGELU is x * sigmoid(1.702 x)
TANH: Any = partial(F.gelu, approximate="tanh")
ACTIVATIONS: dict[str, tuple[str, str, Callable[[Tensor], Tensor]]] = {
    # none, and as a config.json has them: oneDNN's name, how it is computed, and torch's
    "": ("none", "", lambda x: x),
    "gelu_new": ("gelu", "tanh", TANH),
    "gelu_pytorch_tanh": ("gelu", "tanh", TANH),
    "gelu": ("gelu", "none", F.gelu),
    "relu": ("relu", "", F.relu),
    "silu": ("swish", "", F.silu),
    "swish": ("swish", "", F.silu),
}
TIMMS = {  # what the classes in timm's ViTs are called there
    "GELU": "gelu", "GELUTanh": "gelu_new", "ReLU": "relu", "SiLU": "silu", "QuickGELU": "silu",
}  # fmt: skip


class Packed(nn.Module):
    """A linear layer (..., k) -> (..., m) and the activation behind it, without gradients.

    Its tiles cannot be read, pickled or moved; a copy shares them.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, activation: str = ""):
        """``weight`` (m, k), ``bias`` (m,); ``activation``: one of `ACTIVATIONS`, or none."""
        super().__init__()
        self.dtype, (self.kind, self.how, _) = weight.dtype, ACTIVATIONS[activation]
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
        for name, (_, _, then) in ACTIVATIONS.items():
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


def pack_decoder(model: "Decoder") -> None:
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
    """Packs timm's Mlp: with s = 1.702, QuickGELU(x) is SiLU(s x) / s, and its matrices take s."""
    kind = activation_of(block.act) if type(block.norm) is nn.Identity else None
    if kind is None:
        return pack_linears(block)
    s = QUICK if type(block.act).__name__ == "QuickGELU" else 1.0
    bias = block.fc1.bias
    first = packed(s * block.fc1.weight, None if bias is None else s * bias, kind)
    last = packed(block.fc2.weight / s, block.fc2.bias)
    if first is not None and last is not None:
        block.fc1, block.act, block.fc2 = first, nn.Identity(), last


def pack_linears(model: nn.Module) -> None:
    """Packs all linear layers within, which must be called and not read; see `pack_decoder`."""
    for name, linear in list(model.named_modules()):
        if type(linear) is nn.Linear and (new := packed(linear.weight, linear.bias)) is not None:
            model.set_submodule(name, new)


def activation_of(module: nn.Module) -> str | None:
    """Its name in `ACTIVATIONS`: QuickGELU's is SiLU's. None: it has none."""
    if getattr(module, "approximate", "none") == "tanh":
        return "gelu_new"
    return TIMMS.get(type(module).__name__)
