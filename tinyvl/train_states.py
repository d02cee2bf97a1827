"""What the frozen layers under a method's modules make of captions, kept for all epochs."""

import shutil
from bisect import bisect
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinyvl import ranks
from tinyvl.device import Pieces
from tinyvl.presets import Run
from tinyvl.progress import bar, say
from tinyvl.train_run import Interrupted

BLOCK = 256  # captions whose states are computed together


class TextStates:
    """What frozen layers that no picture reaches make of each caption.

    I-Tuning that drops its first N modules reads the same states of those N layers in every epoch;
    LilT with a locked text tower reads the same vectors. They are computed once, in the layers' own
    precision, and kept in a file of the run, which a killed run goes on filling. Training does
    without where the disk has no room for them.
    """

    def __init__(self, tokens: list[list[list[int]]], model: Any, run: Run, name: str):
        self.store: Tensor | None = None
        captions = sorted({tuple(c) for lines in tokens for c in lines}, key=lambda c: (len(c), c))
        if not run.cache or not model.fixed_text or not captions:
            return
        ends = list(accumulate(model.state_rows(c) for c in captions))
        starts = [0, *ends]  # of each caption's rows; the last is the end of all
        self.rows = {c: slice(starts[i], ends[i]) for i, c in enumerate(captions)}
        probe, file = model.states(captions[:1]), run.out / "features" / f"{name}.rows"
        row = probe[0].nbytes
        if ranks.told(lambda: self.fill(captions, starts, row, file, model, run)):
            size = ends[-1] * probe.shape[1]
            numbers = torch.from_file(str(file), size=size, dtype=probe.dtype)
            self.store = numbers.view(ends[-1], -1)

    @staticmethod
    def fill(
        captions: list[tuple[int, ...]], starts: list[int], row: int, file: Path, model: Any,
        run: Run,
    ) -> bool:  # fmt: skip
        """Writes the states, ``row`` bytes each; -> False: the disk has no room for them."""
        pieces, size, ends = Pieces("One caption"), starts[-1], starts[1:]
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab") as stream:
            # What a kill left of a block is computed again: in the blocks of a run without a kill,
            # for the last bits of a state depend on its batch.
            done = bisect(ends, stream.tell() // row)
            if done < len(captions):
                done = done // BLOCK * BLOCK
            stream.truncate(starts[done] * row)
            if (size - starts[done]) * row > shutil.disk_usage(file.parent).free * 0.9:
                say("no room on this disk for the captions' states: going on without", run.quiet)
                return False
            title = f"reading {file.stem} captions"
            with bar(title, len(captions), run.quiet, done) as advance:
                for i in range(done, len(captions), BLOCK):
                    block = captions[i : i + BLOCK]

                    def attempt(number: int, block: list[tuple[int, ...]] = block) -> Tensor:
                        each = -(-len(block) // number)
                        parts = [block[j : j + each] for j in range(0, len(block), each)]
                        return torch.cat([model.states(part).cpu() for part in parts])

                    states = pieces.run(attempt, len(block), run.quiet).contiguous()
                    stream.write(states.view(torch.uint8).numpy().tobytes())
                    stream.flush()
                    advance(len(block))
                    if run.stop:
                        raise Interrupted
        return True

    def of(self, captions: list[list[int]]) -> list[Tensor] | None:
        """The states (rows, d) of each caption, or None where they are not kept."""
        if self.store is None:
            return None
        return [self.store[self.rows[tuple(c)]] for c in captions]
