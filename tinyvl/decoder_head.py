"""The output head's logits, and cross-entropy without those of a whole batch at once."""

from typing import Any

import torch
from torch import Tensor

BLOCK = 1024  # rows of a head that a CPU multiplies at once


def scores(hidden: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """States (N, d) times a head (V, d): (N, V), float32, or in ``out`` if given.

    As one product MKL takes 1.7 times as long on a CPU as in blocks, from 3 states to 160.
    """
    learns = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    if out is None and learns:  # what is written into a tensor has no gradient
        return torch.mm(hidden, weight.T).float()
    if out is None:
        out = hidden.new_empty(len(hidden), len(weight), dtype=torch.float32)
    block = BLOCK if hidden.device.type == "cpu" and len(hidden) > 1 else len(weight)
    for part, columns in zip(weight.split(block), out.split(block, 1), strict=True):
        if columns.dtype == hidden.dtype:
            torch.mm(hidden, part.T, out=columns)
        else:
            columns.copy_(torch.mm(hidden, part.T))
    return out


class HeadLosses(torch.autograd.Function):
    """Cross-entropy through a frozen head, some tokens at a time: (N, d), (V, d), (N,) -> (N,).

    Logits over a vocabulary are the largest numbers of a step. Here they are gone once a chunk's
    losses and the gradients of its states, which are known then, have been read off them.
    """

    LOGITS, CPU_LOGITS = 2**26, 2**22  # at once: 256 MiB, and what a CPU's cache holds

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, wanted: Tensor) -> Tensor:
        losses = hidden.new_empty(len(hidden), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        cpu = hidden.device.type == "cpu"
        chunk = max(1, (HeadLosses.CPU_LOGITS if cpu else HeadLosses.LOGITS) // len(weight))
        # The same memory for every chunk: fresh pages cost a CPU more than the arithmetic.
        low = hidden.new_empty(min(chunk, len(hidden)), len(weight))
        wide = low.float()  # itself, if it is float32
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            right = wanted[part, None]
            found = scores(hidden[part], weight, low[: len(right)])
            logits = wide[: len(right)].copy_(found)
            top = logits.amax(-1, keepdim=True)
            own = logits.gather(-1, right)
            shares = logits.sub_(top).exp_()  # of the probability, times the sum
            total = shares.sum(-1, keepdim=True)  # up to V: too large for half precision
            losses[part] = (total.log() + top - own)[:, 0]
            if gradient is not None:
                shares.div_(total).scatter_add_(-1, right, -torch.ones_like(total))
                gradient[part] = found.copy_(shares) @ weight
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * gradients[0][:, None]).to(gradient.dtype), None, None
