"""A frozen CNN's layers made fewer and faster, its maps the same."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def fold_norms(model: nn.Module, run: Callable[[], Any]) -> None:
    """Folds batch norms into the convolutions before them.

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
    for name, norm in list(model.named_modules()):
        conv = read.get(norm)
        if conv is None or calls[norm] > 1 or calls[conv] > 1 or users[conv] > 1:
            continue
        whole = fuse_conv_bn_eval(conv, norm)
        conv.weight, conv.bias = whole.weight, whole.bias
        rest = nn.Sequential(*norm.children())  # timm's norms have an activation
        model.set_submodule(name, rest)


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

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W), of any size -> (B, C, ceil(H / stride), ceil(W / stride))."""
        from timm.layers import get_same_padding

        conv = self.conv
        shape = zip(x.shape[2:], conv.kernel_size, conv.stride, strict=True)
        sums = [get_same_padding(side, kernel, stride, 1) for side, kernel, stride in shape]
        odd = {total % 2 for total in sums}
        if x.device.type != "cpu" or len(odd) > 1:
            return conv(x)
        weight = self.wide if odd == {1} else conv.weight
        before = [(total + 1) // 2 for total in sums]
        return F.conv2d(x, weight, conv.bias, conv.stride, before, 1, conv.groups)


def pad_within(model: nn.Module) -> None:
    """Replaces timm's depthwise convolutions with TensorFlow's padding: that copies the input.

    On a CPU the copy takes several times as long as the convolution.
    """
    from timm.layers import Conv2dSame

    for name, module in list(model.named_modules()):
        same = isinstance(module, Conv2dSame) and module.dilation == (1, 1)
        if same and module.groups == module.in_channels:
            model.set_submodule(name, Same(module))
