"""Decoding with tensors that stay where they are, so that a GPU can repeat a step by itself.

A step of a small decoder is some hundred short kernels, and to start each takes a GPU's host longer
than the kernel runs. A CUDA graph starts all of them at once. It wants the same memory in every
step: so keys and values have room for the whole text from the start (`StaticCache`), the step
counts in a tensor, and finished texts stay in the batch until all have ended.

On a CPU `Steps` does the same work without a graph; tests compare it with the growing cache there.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tinyvl.decoder import Cache
from tinyvl.progress import say


def shapes(tree: Any) -> Any:
    """Shape and type of each tensor of a tree, to compare trees by."""
    return tuple((x.shape, x.dtype) for x in pytree.tree_leaves(tree))


class StaticCache(Cache):
    """Keys and values of ``rows`` texts, with room for ``room`` more tokens each.

    What stands before these, prefix and prompt, is a texts' own and is copied once; only the new
    tokens change places when beams do. Layers whose prefix is shorter have it further right.
    """

    def __init__(self, read: Cache, rows: Tensor, room: int):
        """``read``: what the prompts left, (I, ...); ``rows`` (N,): the prompt of each text."""
        super().__init__()
        self.length, self.room = read.length, room  # more than 0: a prefix is not added again
        one = next(iter(read.layers.values()))[0]
        before = {layer: k.shape[2] for layer, (k, _) in read.layers.items()}
        self.before, self.order = max(before.values()), {x: i for i, x in enumerate(before)}
        (_, heads, _, width), n = one.shape, len(rows)
        self.kept = one.new_zeros(2, len(before), n, heads, self.before + room, width)
        self.base = torch.ones(n, read.length, dtype=torch.bool, device=one.device)
        self.count = torch.zeros(n, 1, dtype=torch.long, device=one.device)  # of real tokens
        self.skipped = {layer: self.before - own for layer, own in before.items()}
        self.step = torch.zeros(1, dtype=torch.long, device=one.device)
        self.fill(read, rows)

    def fill(self, read: Cache, rows: Tensor) -> None:
        """Begins anew with what other prompts of the same shape left."""
        for layer, pair in read.layers.items():
            for kind, x in enumerate(pair):
                place = self.kept[kind, self.order[layer], :, :, self.skipped[layer] : self.before]
                place.copy_(x.index_select(0, rows))
        self.base.fill_(True)
        if read.mask is not None:
            self.base.copy_(read.mask.index_select(0, rows))
        self.count.copy_(self.base.sum(1, keepdim=True))
        self.step.zero_()

    def begin(self) -> None:
        """Before the layers of a step: the positions of its tokens, and what they look at."""
        self.positions = self.count + self.step
        n, device = len(self.base), self.base.device
        new = (torch.arange(self.room, device=device) <= self.step).expand(n, -1)
        text = torch.cat((self.base, new), 1)  # (N, prompt + room)
        self.masks = {}
        for skipped in sorted(set(self.skipped.values())):
            prefix = self.before - skipped - self.base.shape[1]
            front = [torch.zeros, torch.ones]
            parts = [
                make(n, size, dtype=torch.bool, device=device)
                for make, size in zip(front, (skipped, prefix), strict=True)
            ]
            self.masks[skipped] = torch.cat((*parts, text), 1)[:, None, None]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        place = self.kept[:, self.order[layer]]
        for whole, new in zip(place, (k, v), strict=True):
            whole.index_copy_(2, self.before + self.step, new.to(whole.dtype))
        return place[0], place[1]

    def seen(self, layer: int, mask: Tensor | None) -> Tensor | None:
        return self.masks[self.skipped[layer]]

    def reorder(self, rows: Tensor) -> None:
        """Rows change places among the texts of one prompt."""
        new = self.kept[:, :, :, :, self.before :]
        new.copy_(new.index_select(2, rows))


class Steps:
    """The steps of texts of one shape: ids (N, 1) and rows (N,) -> logits (N, V).

    ``run(ids, visual, cache)`` is a pass of the decoder to the last token's logits. On a GPU a step
    of the second batch is captured as a CUDA graph, of which all others are replays: for a single
    batch that takes longer than it saves.
    """

    def __init__(self, run: Callable[..., Tensor], visual: Any, cache: StaticCache):
        self.run, self.cache = run, cache
        self.visual = pytree.tree_map(torch.clone, visual)
        n, device = len(cache.base), cache.base.device
        self.ids = torch.zeros(n, 1, dtype=torch.long, device=device)
        self.rows = torch.arange(n, device=device)
        self.captures, self.again = device.type == "cuda", False
        self.graph: Any = None
        self.logits: Tensor | None = None

    def fill(self, visual: Any, read: Cache, rows: Tensor) -> None:
        """Other pictures and prompts of the same shape."""
        new, old = (pytree.tree_leaves(tree) for tree in (visual, self.visual))
        for own, other in zip(old, new, strict=True):
            own.copy_(other)
        self.cache.fill(read, rows)
        self.again = True

    def __call__(self, ids: Tensor, rows: Tensor) -> Tensor:
        self.ids.copy_(ids)
        self.rows.copy_(rows)
        if not (self.captures and self.again):
            return self.work()
        if self.graph is None:
            try:
                self.capture()
            except RuntimeError as error:  # of a driver, or an operation that no graph can hold
                self.graph, self.captures = None, False
                say(f"no CUDA graph of a decoding step, going on without: {error}".split("\n")[0])
                return self.work()
        self.graph.replay()
        assert self.logits is not None
        return self.logits

    def work(self) -> Tensor:
        self.cache.reorder(self.rows)
        self.cache.begin()
        logits = self.run(self.ids, self.visual, self.cache)
        self.cache.step.add_(1)
        return logits

    def capture(self) -> None:
        """Runs the step aside, as torch asks for, and records it; the cache is as it was then."""
        rows, here = self.rows.clone(), torch.cuda.current_stream()
        self.rows.copy_(torch.arange(len(rows), device=rows.device))
        try:
            aside = torch.cuda.Stream()
            aside.wait_stream(here)
            with torch.cuda.stream(aside):
                for _ in range(2):
                    self.work()
                    self.cache.step.zero_()
            here.wait_stream(aside)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.logits = self.work()
        finally:
            self.cache.step.zero_()
            self.rows.copy_(rows)
