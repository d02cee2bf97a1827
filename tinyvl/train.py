"""The training loop, read top to bottom.

Everything random is a pure function of (seed, epoch, index), so a run resumes from its step alone
and ends, on a CPU, with the same weights bit for bit as one that was never interrupted.
"""

import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch

from tinyvl import UserError, __version__, files, models, train_cider
from tinyvl.captioner import Batch
from tinyvl.data import Record
from tinyvl.device import choose_precision, keep_memory, peak_memory
from tinyvl.features import open_store
from tinyvl.lilt import Pairs
from tinyvl.presets import Job, Recipe, Run
from tinyvl.progress import bar, say
from tinyvl.train_batches import Feed, Pictures, load_records
from tinyvl.train_run import Interrupted, stopping


def lr_at(step: int, steps: int, recipe: Recipe) -> float:
    """Linear warm-up to the rate, then a cosine to the final rate. ``step`` counts from 0."""
    warm = max(1, round(recipe.warmup * steps))
    if step < warm:
        return recipe.first_rate + (recipe.rate - recipe.first_rate) * (step + 1) / warm
    share = (step - warm) / max(1, steps - warm)
    low = recipe.final_rate
    return low + (recipe.rate - low) * 0.5 * (1 + math.cos(math.pi * share))


def train(job: Job, run: Run) -> dict[str, Any]:
    """Trains a captioner or LilT, -> a summary. Leaves a checkpoint folder in ``run.out``."""
    keep_memory()
    settings = json.loads(json.dumps(asdict(job) | run.settings()))
    check_features(job, run)
    state = open_run(settings, run)
    train_records, val_records = load_records(job)
    val_records = val_records[:1000]  # enough to choose by
    torch.manual_seed(job.seed)
    if job.init:
        source = models.checkpoint_folder(job.init, models.task_of(job.method))
        config = models.read_config(source) | {"options": job.options}  # the task may be another
    else:
        config = models.new_config(
            job.method,
            job.language,
            job.vision,
            fit=job.fit,
            prompt=job.prompt,
            options=job.options,
            media=job.media,
        )
    config["training"] = settings | {"tinyvl": __version__}
    if state is not None:
        config = models.read_config(run.out)  # the backbones it was started with
    store = None
    if run.features:
        store = open_store(run.features, models.image_side(config), models.reads(config))
    if state is None:
        models.save_config(run.out, config)
    precision = choose_precision(job.precision, run.device)
    model = models.build(config, device=run.device, precision=precision)
    if job.init:
        models.load_weights(model, source)
    model.checkpoint(run.checkpointing)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(model.trainable(n) for n in parameters)

    if store is not None:
        store.check(model)
    with stopping(run):
        feed = Feed(train_records, val_records, model, job, run, store)
        objective = model
        if job.objective == "cider":
            objective = train_cider.SelfCritical(
                model,
                captions_of(feed.pictures, train_records),
                captions_of(feed.val_pictures, val_records),
                job.samples,
                job.max_tokens,
            )
        steps = max(1, round(job.recipe.epochs * feed.steps_per_epoch))
        validate_every = run.validate_every or feed.steps_per_epoch
        optimizer = torch.optim.AdamW(parameter_groups(model, parameters, job.recipe))
        scaler = torch.amp.GradScaler(run.device.type, enabled=precision == torch.float16)
        clip = math.inf if job.recipe.clip is None else job.recipe.clip
        average = Average(parameters, job.recipe.average)
        step, best = 0, math.inf
        if state:
            step, best = restore(state, parameters, optimizer, scaler, average)
        trim_log(run.out / "log.jsonl", step)
        log = (run.out / "log.jsonl").open("a", encoding="utf-8")
        say(
            f"{sum(p.numel() for p in parameters.values()):,} trainable parameters; "
            f"{feed}; {steps:,} steps of {feed.captions} captions",
            run.quiet,
        )
        pieces, started, done, speed = 1, time.monotonic(), 0, 0.0
        with bar("training", steps, run.quiet, start=step) as advance:
            epoch, source = None, iter(())
            while step < steps:
                if epoch != step // feed.steps_per_epoch:  # anew, or resumed
                    epoch, behind = divmod(step, feed.steps_per_epoch)
                    source = feed.steps(epoch, behind)
                rate = lr_at(step, steps, job.recipe)
                for group in optimizer.param_groups:
                    group["lr"] = rate if group["fixed"] is None else group["fixed"]
                torch.manual_seed(job.seed * 1_000_003 + step)  # dropout, if a method has any
                taken = next(source)
                step += 1
                if taken:  # else every picture of the step was unreadable
                    metrics, pieces = accumulate(model, objective, taken, scaler, pieces, run)
                    scaler.unscale_(optimizer)
                    norm = torch.nn.utils.clip_grad_norm_(parameters.values(), clip)
                    scaler.step(optimizer)
                    scaler.update()
                    optimizer.zero_grad(set_to_none=True)
                    average.update(step)
                    done += metrics["captions"]
                    speed = done / (time.monotonic() - started)
                    memory = peak_memory(run.device)
                    write(
                        log, step=step, epoch=round(step / feed.steps_per_epoch, 4),
                        loss=round(metrics["loss"], 5), rate=rate,
                        gradient_norm=round(norm.item(), 4),
                        captions_per_second=round(speed, 2), peak_memory=memory,
                    )  # fmt: skip
                    report = f"loss {metrics['loss']:.3f}  {speed:.1f} captions/s"
                    advance(1, f"{report}  {memory / 2**30:.1f} GiB")
                ends = step == steps
                if feed.val_order and (step % validate_every == 0 or ends):
                    with average.applied():
                        value = objective.validate(b for b in feed.validation() if b is not None)
                        write(log, step=step, val_loss=round(value, 5))
                        say(f"step {step}: validation loss {value:.4f}", run.quiet)
                        if value < best:
                            best = value
                            models.save(model, run.out, "model.safetensors")
                if step % run.save_every == 0 or ends or run.stop:
                    save_state(run, step, best, parameters, optimizer, scaler, average)
                if run.stop and not ends:
                    raise Interrupted
    log.close()
    with average.applied():
        models.save(model, run.out, "last.safetensors")
        if not feed.val_order:
            models.save(model, run.out, "model.safetensors")
    if not (run.out / "model.safetensors").exists():
        raise UserError(f"{run.out}: the loss was never finite; train with a lower --rate.")
    summary = {
        "steps": step, "epochs": job.recipe.epochs, "val_loss": best if feed.val_order else None,
        "captions_per_second": round(speed, 2), "seconds": round(time.monotonic() - started),
    }  # fmt: skip
    if done:
        models.write_card(run.out, config, summary)
    shutil.rmtree(run.out / "features", ignore_errors=True)
    return summary | {"model": str(run.out)}


def captions_of(pictures: Pictures, records: list[Record]) -> dict[int, list[str]]:
    """{a picture's key: the captions of all its records}."""
    found: dict[int, list[str]] = {}
    for key, record in zip(pictures.keys, records, strict=True):
        found.setdefault(key, []).extend(record.captions)
    return found


def parameter_groups(
    model: models.Method, parameters: dict[str, torch.nn.Parameter], recipe: Recipe
) -> list[dict[str, Any]]:
    """AdamW's groups: those of the schedule and those of a fixed rate, by name, with decay or not.

    A recipe names the first part of a parameter's name: ``soft`` is the soft prompt.
    """
    groups: dict[tuple, list[torch.nn.Parameter]] = {}
    for name, parameter in parameters.items():
        fixed = recipe.fixed.get(name.partition(".")[0])
        decay = recipe.weight_decay if model.decays(parameter) else 0.0
        groups.setdefault((fixed, decay), []).append(parameter)
    return [
        {"params": members, "fixed": fixed, "lr": recipe.rate, "weight_decay": decay}
        for (fixed, decay), members in groups.items()
    ]


class Average:
    """An exponential moving average of the trainable weights: what is validated and saved.

    Its decay grows to the given one as min(decay, (1 + step) / (10 + step)), so that the start is
    soon forgotten. With a decay of 0 there is none, and the weights are their own.
    """

    def __init__(self, parameters: dict[str, torch.nn.Parameter], decay: float):
        self.parameters, self.decay = parameters, decay
        self.values = {n: p.detach().clone() for n, p in parameters.items()} if decay else {}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in self.values.items():
            value.lerp_(self.parameters[name], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the average's weights for a while."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        for name, value in self.values.items():
            parameter = self.parameters[name]
            parameter.data, self.values[name] = value, parameter.data


def write(log: TextIO, **values: float) -> None:
    """A line of log.jsonl; what is not finite is null, for JSON knows no infinity."""
    finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
    print(json.dumps(finite), file=log, flush=True)


def accumulate(
    model: models.Method,
    objective: models.Method | train_cider.SelfCritical,
    taken: list[Batch] | list[Pairs],
    scaler: torch.amp.GradScaler,
    pieces: int,
    run: Run,
) -> tuple[dict[str, float], int]:
    """One step's gradients; a micro-batch that does not fit in memory is halved, and so on."""
    while True:
        try:
            parts = [part for batch in taken for part in batch.split(pieces)]
            return objective.accumulate(parts, scaler if scaler.is_enabled() else None), pieces
        except torch.OutOfMemoryError:
            if pieces >= max(len(batch.ids) for batch in taken):
                raise UserError(
                    "One caption at a time does not fit in this device's memory; "
                    "use --checkpointing, a smaller language model or --device cpu."
                ) from None
            pieces *= 2
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            say(f"out of memory: going on with micro-batches cut into {pieces}", run.quiet)


def check_features(job: Job, run: Run) -> None:
    """Refuses what goes against reading a finished cache."""
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
    if (run.out / "features").absolute() in (
        run.features.absolute(),
        *run.features.absolute().parents,
    ):
        raise UserError(
            f"{run.features} is where the run keeps its own, and clears it: keep features "
            "outside of --out.",
            2,
        )


def open_run(settings: dict[str, Any], run: Run) -> dict[str, Any] | None:
    """The state to resume from, or None for a new run; refuses what would lose something."""
    state_file = run.out / "training.safetensors"
    config_file = run.out / "config.json"
    if not run.resume and (state_file.exists() or (run.out / "model.safetensors").exists()):
        raise UserError(
            f"{run.out}: there is a run here already; continue it with --resume, or choose "
            "another --out.",
            2,
        )
    if not run.resume or not config_file.exists():  # new: nothing of an earlier start counts
        shutil.rmtree(run.out / "features", ignore_errors=True)
        run.out.mkdir(parents=True, exist_ok=True)
        return None
    before = models.read_config(run.out)["training"]
    changed = [k for k in settings if settings[k] != before.get(k)]
    if changed:
        k = changed[0]
        old, new = before.get(k), settings[k]
        if isinstance(old, dict) and isinstance(new, dict):  # a recipe, options
            name = next(n for n in {**new, **old} if old.get(n) != new.get(n))
            k, old, new = f"{k}.{name}", old.get(name), new.get(name)
        raise UserError(
            f"{run.out}: this run was started with {k} = {old!r}, not {new!r}; "
            "resume it with the same settings, or choose another --out.",
            2,
        )
    for part in run.out.glob(".*.safetensors.*"):  # a file that a kill left half written
        part.unlink()
    return {"file": state_file} if state_file.exists() else {}


def save_state(run: Run, step: int, best: float, parameters, optimizer, scaler, average) -> None:
    """Everything a resumed run needs, in one file, replaced in one stroke."""
    tensors = {}
    for name, parameter in parameters.items():
        tensors[f"model/{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():  # none before the first update
            tensors[f"{key}/{name}"] = value
    tensors |= {f"average/{name}": value for name, value in average.values.items()}
    meta = {"step": step, "best": best, "scaler": scaler.state_dict()}
    files.write_tensors(run.out / "training.safetensors", tensors, {"training": json.dumps(meta)})


def restore(state: dict, parameters, optimizer, scaler, average) -> tuple[int, float]:
    """Fills in parameters and optimizer; -> (steps done, best validation loss)."""
    from safetensors import safe_open

    with safe_open(state["file"], "pt") as file:
        meta, kept = json.loads(file.metadata()["training"]), set(file.keys())
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(file.get_tensor(f"model/{name}"))
                if name in average.values:
                    average.values[name].copy_(file.get_tensor(f"average/{name}"))
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    if f"{key}/{name}" in kept:
                        value = file.get_tensor(f"{key}/{name}")
                        value = value if key == "step" else value.to(parameter.device)
                        optimizer.state[parameter][key] = value
    scaler.load_state_dict(meta["scaler"])
    return meta["step"], meta["best"]


def trim_log(file: Path, step: int) -> None:
    """Drops the lines of steps that will be taken again, and a line cut off by a kill."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:
            continue
    files.write_text(file, "".join(f"{line}\n" for line in kept))
