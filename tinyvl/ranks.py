"""Several processes that do the work of one command, as PyTorch's `torchrun` starts them.

``torchrun --nproc-per-node N -m tinyvl train ...`` starts N processes, each with a rank. A process
has one GPU, or some cores of the CPU. All of them see the same files. The first (rank 0) decides
and writes; the others have no standard output and error, but for what only they know. Between CPUs
gloo carries what they tell each other, between GPUs NCCL.

Every function here is for all processes at once, at the same place: one that is alone waits. With
one process, as without torchrun, each gives back what it was given. An error in one process ends
all of them: torchrun stops the others.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from tinyvl import UserError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
U = TypeVar("U")
PATIENCE = timedelta(days=7)  # the others wait while the first one reads a large data set


@dataclass
class Here:
    """This process among the others."""

    rank: int = 0
    size: int = 1
    local: int = 0  # among those of this machine
    beside: int = 1  # how many these are
    store: Any = None  # what all processes can read and write
    stderr: TextIO | None = None  # of a process whose standard error is muted
    alone: bool = False


_here = Here()

# ------------------------------------------------------------------------------- start and end


def start() -> None:
    """Joins the processes that torchrun has started; does nothing where it has started one."""
    env = os.environ
    alone = int(env.get("WORLD_SIZE", 1)) < 2 or not {"RANK", "MASTER_ADDR"} <= env.keys()
    if alone or _here.size > 1:
        return
    import torch
    import torch.distributed as dist

    local, beside = int(env.get("LOCAL_RANK", 0)), int(env.get("LOCAL_WORLD_SIZE", 1))
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(local % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl" if dist.is_nccl_available() else backend
    store, rank, size = next(dist.rendezvous("env://", timeout=PATIENCE))
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    vars(_here).update(rank=rank, size=size, local=local, beside=beside, store=store)
    if rank:
        _here.stderr = sys.stderr
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def end() -> None:
    """Waits until all are done: torchrun stops the others as soon as one has failed."""
    if _here.size > 1:
        import torch.distributed as dist

        wait()
        dist.destroy_process_group()


def size() -> int:
    """How many processes share the work."""
    return 1 if _here.alone else _here.size


def rank() -> int:
    return 0 if _here.alone else _here.rank


def first() -> bool:
    """Whether this is the process that decides and writes."""
    return rank() == 0


def local() -> int:
    """The number of this process on its machine: that of its GPU."""
    return _here.local


def beside() -> int:
    """How many processes share this machine."""
    return _here.beside


def stderr() -> TextIO:
    """Standard error, for what only this process knows."""
    return _here.stderr or sys.stderr


def speaks() -> bool:
    """Whether this process says what went wrong: of several that fail, the first that asks."""
    if _here.size == 1:
        return True
    with suppress(RuntimeError):  # torchrun, which keeps the store, may have gone
        if _here.store.add("tinyvl/failed", 1) == 1:
            return True
    time.sleep(1)  # the first to leave is the end of all: let the one that speaks be it
    return False


def lost(error: Exception) -> bool:
    """Whether it is that of a connection to a process that has ended."""
    words = ("closed by peer", "reset by peer", "Broken pipe", "NCCL", "gloo")
    return _here.size > 1 and any(word in str(error) for word in words)


@contextmanager
def alone() -> Iterator[None]:
    """For a while this process works by itself: the functions below give back what they get."""
    before, _here.alone = _here.alone, True
    try:
        yield
    finally:
        _here.alone = before


# ------------------------------------------------------------------------ what they tell others


def wait() -> None:
    """Until all are here."""
    total(0)


def total(number: T) -> T:
    """The sum of a number over all processes."""
    if size() == 1:
        return number
    import torch
    import torch.distributed as dist

    found = torch.tensor(number, dtype=torch.float64)
    dist.all_reduce(found)
    kind: Any = type(number)
    return kind(found.item())


def agreed(flag: Any) -> bool:
    """Whether it holds in any process."""
    return total(int(bool(flag))) > 0 if size() > 1 else bool(flag)


def told(say: Callable[[], T]) -> T:
    """What the first process makes, which the others do not call, told to all."""
    if size() == 1:
        return say()
    import torch.distributed as dist

    found: list[Any] = [say() if first() else None]
    dist.broadcast_object_list(found, 0)
    wait()  # none goes on before all have heard it
    return found[0]


def everyone(item: T) -> list[T]:
    """The item of each process, by rank."""
    if size() == 1:
        return [item]
    import torch.distributed as dist

    found: list[Any] = [None] * size()
    dist.all_gather_object(found, item)
    return found


def joined(rows: Tensor) -> tuple[Tensor, slice]:
    """The rows (n, ...) of all processes, by rank, and which are this one's; n may be 0."""
    if size() == 1:
        return rows, slice(0, len(rows))
    import torch
    import torch.distributed as dist

    counts = everyone(len(rows))
    filled = rows.new_zeros(max(counts), *rows.shape[1:])
    filled[: len(rows)] = rows
    found = [torch.empty_like(filled) for _ in counts]
    dist.all_gather(found, filled)
    start = sum(counts[: rank()])
    every = torch.cat([part[:count] for part, count in zip(found, counts, strict=True)])
    return every, slice(start, start + len(rows))


def add_gradients(parameters: Iterable[Tensor]) -> None:
    """Gives each parameter the sum of all processes' gradients; None stays where none has one."""
    if size() == 1:
        return
    import torch
    import torch.distributed as dist

    own = list(parameters)
    parts = [(p.new_zeros(p.shape) if p.grad is None else p.grad).flatten().float() for p in own]
    have = torch.tensor([float(p.grad is not None) for p in own], device=own[0].device)
    flat = torch.cat([*parts, have])  # one message: modules are many and small
    dist.all_reduce(flat)
    *sums, have = flat.split([*(p.numel() for p in own), len(own)])
    for parameter, found, some in zip(own, sums, have.tolist(), strict=True):
        if some:
            parameter.grad = found.view(parameter.shape).to(parameter.dtype)


def copied(tensors: Iterable[Tensor]) -> None:
    """Gives all processes the first one's numbers, in place: two processors may round two ways."""
    if size() > 1:
        import torch.distributed as dist

        for tensor in tensors:
            dist.broadcast(tensor.detach(), 0)


# ---------------------------------------------------------------------------------- shared work


def share(items: list[T]) -> list[T]:
    """This process's part of a list of which each gets about as many, in order."""
    count, processes = len(items), size()
    return items[rank() * count // processes : (rank() + 1) * count // processes]


def shared(
    work: Callable[[Iterable[T]], Iterable[U]], items: Iterable[T], block: int
) -> Iterator[U]:
    """``work`` of the first process's items, a result each, in their order; in all processes.

    Blocks of so many items are dealt out in turn: where ``work`` takes ``block`` of them together
    these are the same ones as in a single process. Raises what ended the items, behind the results.
    """
    if size() == 1:
        yield from work(items)
        return

    def listed() -> tuple[list[T], UserError | None]:
        found: list[T] = []
        try:
            found.extend(items)
        except UserError as error:
            return found, error
        return found, None

    everything, error = told(listed)
    own = [item for i, item in enumerate(everything) if i // block % size() == rank()]
    results, whole = iter(work(own)), True
    while whole:
        parts = everyone(list(islice(results, block)))
        yield from chain.from_iterable(parts)
        whole = all(len(part) == block for part in parts)
    if error:
        raise error
