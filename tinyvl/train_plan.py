"""How the captions of an epoch are cut into optimizer steps: arithmetic alone."""

import math
from dataclasses import dataclass

from tinyvl import UserError
from tinyvl.presets import Job, Run


@dataclass(frozen=True)
class Plan:
    """Sizes of an epoch, of its steps and of their micro-batches."""

    groups: int  # captions of one picture that are read together count as one
    size: int  # captions of an epoch
    batch: int  # captions of a step, as asked for
    micro: int  # groups of a micro-batch
    per_step: int  # micro-batches of a step
    kind: str  # what the captions are

    @staticmethod
    def of(captions: list[int], job: Job, run: Run) -> "Plan":
        """The plan for groups of so many captions each; at least one group."""
        cider = job.objective == "cider"
        size = sum(captions) * (job.samples if cider else 1)
        mean, batch = size / len(captions), job.recipe.batch
        micro = max(1, round(min(run.micro, batch) / mean))
        per_step = max(1, round(batch / (micro * mean)))
        kind = "questions" if job.task == "vqa" else "sampled captions" if cider else "captions"
        return Plan(len(captions), size, batch, micro, per_step, kind)

    @property
    def captions(self) -> int:
        """Captions of a step."""
        return min(self.size, round(self.per_step * self.micro * self.size / self.groups))

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(math.ceil(self.groups / self.micro) / self.per_step)

    def steps(self, epochs: float) -> int:
        return max(1, round(epochs * self.steps_per_epoch))

    def check(self, processes: int) -> None:
        """UserError: a step has fewer micro-batches than there are processes."""
        if self.per_step < processes:
            few = f"a step has {self.per_step} micro-batches, too few for {processes} processes"
            size = max(1, self.batch // processes)
            raise UserError(f"{few}; give --micro-batch {size} or less, or a larger --batch.", 2)

    def told(self, epochs: float) -> str:
        """ "50 steps of 30 captions", and why they are not as large as was asked for."""
        few = f" (the data does not fill a batch of {self.batch:,})"
        said = f"{self.steps(epochs):,} steps of {self.captions:,} {self.kind}"
        return said + few * (self.size < self.batch)
