"""A frozen CNN's layers made fewer and faster, its maps the same."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

FUSED: dict[type[nn.Module], tuple[str, list[float]]] = {  # oneDNN's names, and their numbers
    nn.ReLU: ("relu", []),
    nn.ReLU6: ("hardtanh", [0.0, 6.0]),
    nn.SiLU: ("swish", []),
    nn.Hardswish: ("hardswish", []),
}


def fold_norms(model: nn.Module, run: Callable[[], Any]) -> None:
    """Folds batch norms, and activations that are a part of them, into the convolutions before.

    ``run`` sends a picture through the model, which shows which norm reads what a convolution made.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    made: dict[int, tuple[nn.Conv2d, Tensor]] = {}  # by a tensor's id; it lives on in here
    read: dict[nn.Module, nn.Conv2d] = {}
    calls: Counter[nn.Module] = Counter()

    def makes(module: nn.Conv2d, _: Any, result: Tensor) -> None:
        made[id(result)] = module, result
        calls[module] += 1

    def reads(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        calls[norm] += 1
        if id(inputs[0]) in made:
            read[norm] = made[id(inputs[0])][0]

    # Others of timm's compute their filters anew from the weights.
    kinds = ("Conv2d", "Conv2dSame")
    plain: list[Any] = [m for m in model.modules() if type(m).__name__ in kinds]
    hooks = [norm.register_forward_pre_hook(reads) for norm in norms]
    hooks += [conv.register_forward_hook(makes) for conv in plain]
    if norms:
        with torch.no_grad():
            run()
    for hook in hooks:
        hook.remove()
    users = Counter(read.values())
    names = {module: name for name, module in model.named_modules()}
    for name, norm in list(model.named_modules()):
        conv = read.get(norm)
        if conv is None or calls[norm] > 1 or calls[conv] > 1 or users[conv] > 1:
            continue
        whole = fuse_conv_bn_eval(conv, norm)
        conv.weight, conv.bias = whole.weight, whole.bias
        rest = [m for m in norm.children() if not isinstance(m, nn.Identity)]
        model.set_submodule(name, nn.Sequential(*rest))  # timm's norms have an activation
        if len(rest) == 1 and type(rest[0]) in FUSED:
            model.set_submodule(names[conv], Activated(conv, rest[0]))
            model.set_submodule(name, nn.Identity())


class Activated(nn.Module):
    """A frozen convolution and the activation behind it: on a CPU in one pass over the map.

    By the function of torch's own compiler, if there is one: its name is private.
    """

    def __init__(self, conv: nn.Conv2d, activation: nn.Module):
        super().__init__()
        self.conv, self.activation = conv, activation

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, m, h, w), in the dtype of the filters where that is one pass."""
        conv = self.conv.conv if isinstance(self.conv, Same) else self.conv
        shape = self.conv.shape(x) if isinstance(self.conv, Same) else plain_shape(conv)
        learns = x.requires_grad and torch.is_grad_enabled()  # the one pass has no gradient
        if shape is None or learns or x.device.type != "cpu" or not fuses(conv.weight.dtype):
            return self.activation(self.conv(x))
        filters, padding = shape
        kind, numbers = FUSED[type(self.activation)]
        return torch.ops.mkldnn._convolution_pointwise(
            x.to(filters.dtype), filters, conv.bias, list(padding), list(conv.stride),
            list(conv.dilation), conv.groups, kind, numbers, "",
        )  # fmt: skip


def plain_shape(conv: nn.Conv2d) -> tuple[Tensor, Sequence[int]] | None:
    """A convolution's filters and padding, if it pads nothing but zeros, on both sides alike."""
    if type(conv) is not nn.Conv2d or isinstance(conv.padding, str) or conv.padding_mode != "zeros":
        return None
    return conv.weight, conv.padding


@cache
def fuses(dtype: torch.dtype) -> bool:
    """Whether this torch and this processor have `Activated`'s one pass in ``dtype``."""
    x, all_of_it, ones = (torch.linspace(-3, 3, n).to(dtype) for n in (8 * 25, 8 * 8 * 9, 8))
    x = x.view(1, 8, 5, 5).contiguous(memory_format=torch.channels_last)
    dense = all_of_it.view(8, 8, 3, 3)
    for filters, groups in ((dense, 1), (dense[:, :1], 8)):
        for bias in (ones, None):
            plain = F.conv2d(x, filters, bias, padding=1, groups=groups).float()
            for activation, (kind, numbers) in FUSED.items():
                try:
                    found = torch.ops.mkldnn._convolution_pointwise(
                        x, filters, bias, [1, 1], [1, 1], [1, 1], groups, kind, numbers, ""
                    )
                except (AttributeError, RuntimeError):  # no such function; not on this processor
                    return False
                if not torch.allclose(found.float(), activation()(plain), 1e-2, 0.1):
                    return False
    return True


class Same(nn.Module):
    """A depthwise convolution that pads as TensorFlow does, without a padded copy of its input.

    TensorFlow pads by one more behind than before where the sum is odd. Then a kernel with a row
    and a column of zeros before its own, padded by that more on both sides, gives the same.
    """

    wide: Tensor

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv = conv  # timm's Conv2dSame
        wide = F.pad(conv.weight.detach(), (1, 0, 1, 0))
        wide = wide.contiguous(memory_format=torch.channels_last)
        self.register_buffer("wide", wide, persistent=False)

    def shape(self, x: Tensor) -> tuple[Tensor, Sequence[int]] | None:
        """The filters and how many zeros go on both sides; None: x has to be padded first."""
        from timm.layers import get_same_padding

        conv = self.conv
        sides = zip(x.shape[2:], conv.kernel_size, conv.stride, strict=True)
        sums = [get_same_padding(side, kernel, stride, 1) for side, kernel, stride in sides]
        odd = {total % 2 for total in sums}
        if x.device.type != "cpu" or len(odd) > 1:
            return None
        weight = self.wide.to(conv.weight.dtype) if odd == {1} else conv.weight
        return weight, [(total + 1) // 2 for total in sums]

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W), of any size -> (B, C, ceil(H / stride), ceil(W / stride))."""
        shape, conv = self.shape(x), self.conv
        if shape is None:
            return conv(x)
        return F.conv2d(x, shape[0], conv.bias, conv.stride, shape[1], 1, conv.groups)


def pad_within(model: nn.Module) -> None:
    """Replaces timm's depthwise convolutions with TensorFlow's padding: that copies the input.

    On a CPU the copy takes several times as long as the convolution.
    """
    from timm.layers import Conv2dSame

    for name, module in list(model.named_modules()):
        same = isinstance(module, Conv2dSame) and module.dilation == (1, 1)
        if same and module.groups == module.in_channels:
            model.set_submodule(name, Same(module))
