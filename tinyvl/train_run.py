"""The folder of a training run: its saved state and log, resuming, and how it is asked to stop."""

import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from tinyvl import UserError, files, ranks
from tinyvl.models_config import read_config
from tinyvl.presets import Job, Run
from tinyvl.progress import skip


class Interrupted(UserError):
    """A signal asked for the end; what was done is saved."""

    def __init__(self) -> None:
        super().__init__("stopped and saved; continue with --resume", 130)


@contextmanager
def stopping(run: Run) -> Iterator[None]:
    """SIGINT and SIGTERM ask the run to save and end; a second SIGINT ends it at once."""

    def ask(number, frame):
        if run.stop:
            raise KeyboardInterrupt
        run.stop.append(number)
        advice = "Control-C again ends it at once, and --resume goes on from what was saved before"
        print(f"stopping: saving after this step; {advice}", file=sys.stderr)

    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_features(job: Job, run: Run) -> None:
    """Refuses options that contradict a finished cache (``run.features``) with a `UserError`."""
    if run.features is None:
        return
    if job.options.get("size"):
        raise UserError("--features are of the encoder's own size: leave out --size.", 2)
    if job.views > 1 or job.crops:
        raise UserError(
            "--features has one view of each picture: leave out --views and --crops.", 2
        )
    if not run.cache:
        raise UserError("--features and --no-cache contradict each other: leave out one.", 2)
    theirs = run.features.absolute()
    if (run.out / "features").absolute() in (theirs, *theirs.parents):
        raise UserError(
            f"{run.features}: a run keeps its own features there and deletes them at its end; "
            "keep these outside of --out.",
            2,
        )


def remembered(out: Path, method: str) -> dict[str, Any]:
    """The options that the run in a folder was started with; {} if there is none.

    UserError: it is of another method, or its config cannot be read.
    """
    if not (out / "config.json").exists():
        return {}
    config = read_config(out)
    if config["method"] != method:
        raise UserError(f"{out}: this is a run of {config['method']}, not of {method}.", 2)
    started = config.get("training", {})
    own = {"micro": started["micro"]} if "micro" in started else {}  # its default is the device's
    asked = own | started.get("asked", {})
    return asked | ({"features": Path(asked["features"])} if "features" in asked else {})


def check_run(run: Run, settings: dict[str, Any], started: dict[str, Any] | None) -> None:
    """Checks that a run may be started or resumed.

    ``settings`` decide the result; ``started``: those that the run was started with, None: it is
    new. More epochs may be added where the rate is the same at any step after the warm-up.
    UserError: a new run would overwrite another, or the settings differ.
    """
    if started is None:
        if not run.resume and any(
            (run.out / name).exists() for name in ("training.safetensors", "model.safetensors")
        ):
            raise UserError(
                f"{run.out}: there is a run here already; continue it with --resume, or choose "
                "another --out.",
                2,
            )
        return
    name = next((n for n in settings if settings[n] != started.get(n)), None)
    if name is None:
        return
    old, new = started.get(name), settings[name]
    advice = "resume it with the same settings, or choose another --out"
    if isinstance(old, dict) and isinstance(new, dict):  # a recipe, options
        part = next(n for n in {**new, **old} if old.get(n) != new.get(n))
        if (name, part) == ("recipe", "epochs"):
            same = new | {"epochs": old["epochs"]} == old
            if same and new["epochs"] > old["epochs"] and new["rate"] == new["final_rate"]:
                return
            if new["epochs"] > old["epochs"]:
                advice = "its rate falls to the end of these; to train on, start another run from "
                advice += f"it: --init {run.out} and another --out"
        name, old, new = f"{name}.{part}", old.get(part), new.get(part)
    was = f"this run was started with {name} = {old!r}, not {new!r}"
    raise UserError(f"{run.out}: {was}; {advice}.", 2)


def finished(out: Path, epochs: float) -> dict[str, Any] | None:
    """The last step and the best loss of a run that has ended after so many epochs, or None."""
    from safetensors import safe_open

    if not all((out / name).exists() for name in ("training.safetensors", "README.md")):
        return None
    with safe_open(out / "training.safetensors", "pt") as file:
        meta = json.loads(file.metadata()["training"])
    return meta if meta.get("ended") == epochs else None


@contextmanager
def opened(run: Run, new: bool) -> Iterator[None]:
    """The folder of a run while it is at work; a start that fails leaves none.

    That is, before its first step, with a `UserError`: what a stopped or killed run has encoded is
    kept for --resume. Of several processes the first one has it.
    """
    if not ranks.first():
        ranks.wait()
        yield
        return
    made = [folder for folder in (run.out, *run.out.parents) if not folder.exists()]
    try:
        run.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{run.out}: cannot be made ({error.strerror}).", 2) from error
    with files.locked(run.out, "another process is training this run"):
        if new:
            shutil.rmtree(run.out / "features", ignore_errors=True)  # of a start without a step
        for part in run.out.glob(".*.safetensors.*"):  # a file that a kill left half written
            part.unlink()
        ranks.wait()
        try:
            yield
        except UserError as error:
            log = run.out / "log.jsonl"
            started = log.exists() and log.stat().st_size
            if new and not started and not isinstance(error, Interrupted):
                shutil.rmtree(run.out / "features", ignore_errors=True)
                for name in ("config.json", "log.jsonl", *([".lock"] if made else [])):
                    (run.out / name).unlink(missing_ok=True)
                for folder in made:
                    with suppress(OSError):
                        folder.rmdir()
            raise


class Watch:
    """Steps whose loss or gradient is not finite change no weight; many in a row end the run.

    ``paths``: the file of each picture's key in a micro-batch.
    """

    MOST = 10  # in a row

    def __init__(self, out: Path, paths: dict[int, str]):
        self.out, self.paths, self.row = out, paths, 0
        self.kept: str | None = None  # the last checkpoint

    def saved(self, name: str, step: int) -> None:
        self.kept = f"{self.out / name} of step {step}"

    def passes(
        self, step: int, loss: float, norm: float, scaled: bool, culprits: Callable[[], list[int]]
    ) -> bool:
        """Whether a step may change the weights; else it is named, with the files of ``culprits``.

        ``scaled``: fp16's scaler skips gradients that overflow and makes them smaller.
        UserError: there have been too many.
        """
        if math.isfinite(loss) and (scaled or math.isfinite(norm)):
            self.row = 0 if math.isfinite(norm) else self.row
            return True
        self.row += 1
        files = [self.paths[key] for key in culprits()]
        more = f" and {len(files) - 3} more" if len(files) > 3 else ""
        why = f", because of {', '.join(files[:3])}{more}" if files else ""
        what = "gradient" if math.isfinite(loss) else "loss"
        skip(f"step {step}: its {what} is not finite{why}")
        if self.row == self.MOST:
            kept = f"the last good checkpoint is {self.kept}" if self.kept else "none is saved yet"
            raise UserError(
                f"{self.out}: {self.row} steps in a row, up to step {step}, had a loss or gradient "
                f"that is not finite; {kept}; train with a lower --rate, or without these records."
            )
        return False


@dataclass
class State:
    """What a resumed run needs: kept in one file, which `save` replaces at once."""

    file: Path
    parameters: dict[str, torch.nn.Parameter]
    average: dict[str, Tensor]  # of the parameters; empty if there is none
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler

    def save(self, step: int, best: float, ended: float | None = None) -> None:
        """``ended``: the epochs of a run that is at its end."""
        tensors = {}
        for name, parameter in self.parameters.items():
            tensors[f"model/{name}"] = parameter.detach()
            for key, value in self.optimizer.state[parameter].items():  # none before an update
                tensors[f"{key}/{name}"] = value
        tensors |= {f"average/{name}": value for name, value in self.average.items()}
        meta = {"step": step, "best": best, "scaler": self.scaler.state_dict(), "ended": ended}
        files.write_tensors(self.file, tensors, {"training": json.dumps(meta)})

    def restore(self) -> tuple[int, float]:
        """Fills in what was saved; -> (steps done, best validation loss).

        UserError: the file is damaged, or of another model.
        """
        if not self.file.exists():  # stopped before anything was saved
            return 0, math.inf
        try:
            return self._restored()
        except Exception as error:  # of safetensors, of JSON, or of shapes that differ
            what = f"cannot be resumed from ({str(error)[:200]})"
            raise UserError(f"{self.file}: {what}; train in another --out.") from error

    def _restored(self) -> tuple[int, float]:
        from safetensors import safe_open

        with safe_open(self.file, "pt") as file, torch.no_grad():
            meta, kept = json.loads(file.metadata()["training"]), set(file.keys())
            for name, parameter in self.parameters.items():
                found = file.get_tensor(f"model/{name}")
                if not found.isfinite().all():
                    raise ValueError(f"{name} is not of finite numbers")
                parameter.copy_(found)
                if name in self.average:
                    self.average[name].copy_(file.get_tensor(f"average/{name}"))
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    if f"{key}/{name}" in kept:
                        value = file.get_tensor(f"{key}/{name}")
                        if key != "step" or self.optimizer.defaults["fused"]:
                            value = value.to(parameter.device)
                        self.optimizer.state[parameter][key] = value
        self.scaler.load_state_dict(meta["scaler"])
        return int(meta["step"]), float(meta["best"])


def open_log(run: Run, step: int) -> TextIO:
    """The run's log.jsonl after this step, to be appended to.

    Lines of steps that will be taken again go, and so does a line cut off by a kill. Of several
    processes the first one writes it.
    """
    if not ranks.first():
        return open(os.devnull, "a", encoding="utf-8")
    file, kept = run.out / "log.jsonl", []
    text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    for line in text.splitlines():
        with suppress(ValueError, LookupError, TypeError):
            if json.loads(line)["step"] <= step:
                kept.append(f"{line}\n")
    files.write_text(file, "".join(kept))
    return file.open("a", encoding="utf-8")


def write(log: TextIO, **values: float) -> None:
    """A line of log.jsonl. Numbers that are not finite become null: JSON has no infinity."""
    finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
    print(json.dumps(finite), file=log, flush=True)
