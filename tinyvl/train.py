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
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from tinyvl import UserError, __version__, models, ranks, train_cider, train_run
from tinyvl.captioner import Captioner
from tinyvl.device import Pieces, choose_precision, keep_memory, peak_memory, precision_name
from tinyvl.features import open_store
from tinyvl.presets import Job, Recipe, Run
from tinyvl.progress import bar, say
from tinyvl.train_batches import Feed, cache_dtype, load_records
from tinyvl.train_plan import Plan
from tinyvl.train_run import Interrupted


def lr_at(step: int, steps: int, recipe: Recipe) -> float:
    """Linear warm-up to the rate, then a cosine to the final rate. ``step`` counts from 0."""
    warm = max(1, round(recipe.warmup * steps))
    if step < warm:
        return recipe.first_rate + (recipe.rate - recipe.first_rate) * (step + 1) / warm
    share = (step - warm) / max(1, steps - warm)
    low = recipe.final_rate
    return low + (recipe.rate - low) * 0.5 * (1 + math.cos(math.pi * share))


def train(job: Job, run: Run) -> dict[str, Any]:
    """Trains a captioner or LilT, -> a summary. Leaves a checkpoint folder in ``run.out``.

    UserError: options contradict each other, the data cannot be read, another process trains in
    this folder, or the run is stopped (`Interrupted`).
    """
    keep_memory()
    settings = json.loads(json.dumps(asdict(job) | run.settings()))
    train_run.check_features(job, run)

    def remembered() -> dict[str, Any]:
        resumed = run.resume and (run.out / "config.json").exists()
        return models.read_config(run.out) if resumed else {}

    config = ranks.told(remembered)  # with the backbones that the run started with
    resumed = bool(config)
    train_run.check_run(run, settings, config.get("training", {}) if resumed else None)
    if resumed and (ended := train_run.finished(run.out, job.recipe.epochs)):
        say(f"{run.out}: this run has ended; nothing is left to do", run.quiet)
        return summary_of(job, run, ended["step"], ended["best"])
    with train_run.opened(run, new=not resumed):
        return carry_out(job, run, settings, config)


def summary_of(
    job: Job, run: Run, step: int, best: float, speed: float = 0.0, seconds: float = 0.0
) -> dict[str, Any]:
    return {
        "steps": step, "epochs": job.recipe.epochs,
        "val_loss": best if math.isfinite(best) else None,
        "captions_per_second": round(speed, 2), "seconds": round(seconds), "model": str(run.out),
    }  # fmt: skip


def carry_out(
    job: Job, run: Run, settings: dict[str, Any], config: dict[str, Any]
) -> dict[str, Any]:
    """Trains a new run, or goes on with one that has this ``config``, -> its summary."""
    resumed = bool(config)
    Plan.of([1], job, run).check(ranks.size())  # before an hour of encoding
    train_records, val_records = load_records(job)
    val_records = val_records[:1000]  # enough to choose by
    source = models.open_checkpoint(job.init, models.task_of(job.method)) if job.init else None
    if not resumed:
        config = ranks.told(partial(starting_config, job, source))
    about = models.Checkpoint(run.out, config)
    if not resumed:
        dtype = cache_dtype(job, about.reads)
        command = models.typed()
        config["training"] = {"tinyvl": __version__, "cache_dtype": dtype, "command": command}
    store = open_store(run.features, about.image, about.reads) if run.features else None
    asked = run.asked or config["training"].get("asked", {})
    config["training"] |= settings | {"asked": asked}  # a resumed run may have more epochs
    if ranks.first():
        models.save_config(run.out, config)
    precision = choose_precision(job.precision, run.device)
    torch.manual_seed(job.seed)
    model = models.build(config, device=run.device, precision=precision)
    if source:
        # A start may lack what is trained beside what it has.
        more = ("encoder.", "text.", "image_mlp.") if job.method == "lilt" else ()
        models.load_weights(model, source.folder, more=more)
    if job.locked:
        towers: Any = model
        towers.lock(job.locked)
    model.checkpoint(run.checkpointing)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(model.trainable(n) for n in parameters)

    if store is not None:
        store.check(model)
    with train_run.stopping(run):
        dtype = config["training"].get("cache_dtype", "fp16")  # older runs kept all in fp16
        feed = Feed(train_records, val_records, model, job, run, store, dtype)
        objective: Any = model
        if job.objective == "cider":
            assert isinstance(model, Captioner)
            references = train_cider.captions_of(feed.pictures.keys, train_records)
            val_references = train_cider.captions_of(feed.val_pictures.keys, val_records)
            objective = train_cider.SelfCritical(
                model, references, val_references, job.samples, job.max_tokens
            )
        plan, steps = feed.plan, feed.plan.steps(job.recipe.epochs)
        plan.check(ranks.size())
        validate_every = run.validate_every or plan.steps_per_epoch
        optimizer = torch.optim.AdamW(
            parameter_groups(model, parameters, job.recipe), fused=run.device.type == "cuda"
        )
        scaler = torch.amp.GradScaler(run.device.type, enabled=precision == torch.float16)
        clip = math.inf if job.recipe.clip is None else job.recipe.clip
        average = Average(parameters, job.recipe.average)
        state = train_run.State(
            run.out / "training.safetensors", parameters, average.values, optimizer, scaler
        )
        step, best = state.restore() if resumed else (0, math.inf)
        ranks.copied([*parameters.values(), *average.values.values()])
        log = train_run.open_log(run, step)
        say(
            f"{sum(p.numel() for p in parameters.values()):,} trainable parameters; "
            f"{feed}; {plan.told(job.recipe.epochs)}; {precision_name(precision)} on {run.device}, "
            f"{min(run.micro, plan.captions):,} at once",
            run.quiet,
        )
        advice = "use --checkpointing, a smaller language model or --device cpu"
        pieces = Pieces("One caption at a time", advice)
        seen = feed.pictures
        watch = train_run.Watch(run.out, dict(zip(seen.keys, seen.paths, strict=True)))
        started, done, speed, shown = time.monotonic(), 0.0, 0.0, ""
        with log, bar("training", steps, run.quiet, start=step) as advance:
            batches = ahead(feed.run(step, steps), run.device)
            upcoming: list[Any] = next(batches, [])
            while step < steps:
                rate = lr_at(step, steps, job.recipe)
                for group in optimizer.param_groups:
                    group["lr"] = rate if group["fixed"] is None else group["fixed"]
                torch.manual_seed(job.seed * 1_000_003 + step)  # dropout, if a method has any
                taken, upcoming = upcoming, []
                step += 1
                if ranks.agreed(taken):  # else every picture of the step was unreadable
                    metrics = accumulate(model, objective, taken, scaler, pieces, run.quiet)
                    ranks.add_gradients(parameters.values())
                    scaler.unscale_(optimizer)
                    norms = torch.nn.utils.clip_grad_norm_(parameters.values(), clip)
                    upcoming = next(batches, [])  # read while a GPU is still at work on this one
                    loss, norm = float(metrics["loss"]), norms.item()
                    find = partial(culprits, model, objective, taken)
                    if watch.passes(step, loss, norm, scaler.is_enabled(), find):
                        scaler.step(optimizer)
                        scaler.update()
                        average.update(step)
                    else:
                        scaler.update(scaler.get_scale())  # as it was
                    optimizer.zero_grad(set_to_none=True)
                    done += metrics["captions"]
                    speed = done / (time.monotonic() - started)
                    memory = peak_memory(run.device)
                    train_run.write(
                        log, step=step, epoch=round(step / plan.steps_per_epoch, 4),
                        loss=round(loss, 5), rate=rate,
                        gradient_norm=round(norm, 4),
                        captions_per_second=round(speed, 2), peak_memory=memory,
                    )  # fmt: skip
                    # A contrast of few pairs has a small loss: a ragged last step's is not shown.
                    whole = not model.whole_steps or metrics["captions"] >= 0.9 * plan.captions
                    if whole or not shown:
                        shown = f"loss {loss:.3f}"
                    report = f"{shown}  {speed:.1f} {plan.kind}/s"
                    advance(1, f"{report}  {memory / 2**30:.1f} GiB")
                else:
                    upcoming = next(batches, [])
                ends = step == steps
                if feed.val_order and (step % validate_every == 0 or ends) and ranks.first():
                    with average.applied():
                        value = pieces.run(partial(validate, objective, feed), run.micro, run.quiet)
                        train_run.write(log, step=step, val_loss=round(value, 5))
                        say(f"step {step}: validation loss {value:.4f}", run.quiet)
                        if value < best:
                            best = value
                            models.save(model, run.out, "model.safetensors")
                            watch.saved("model.safetensors", step)
                # Where steps fail, the last good state stays.
                due = step % run.save_every == 0
                if ends or ((due or ranks.agreed(run.stop)) and not watch.row):
                    if ranks.first():
                        state.save(step, best, job.recipe.epochs if ends else None)
                    watch.saved("training.safetensors", step)
                if ranks.agreed(run.stop) and not ends:
                    if ranks.first():
                        keep_stopped(model, run, average)
                    ranks.wait()
                    raise Interrupted

    def finish() -> dict[str, Any]:
        with average.applied():
            models.save(model, run.out, "last.safetensors")
            if not feed.val_order:
                models.save(model, run.out, "model.safetensors")
        if not (run.out / "model.safetensors").exists():
            raise UserError(f"{run.out}: the loss was never finite; train with a lower --rate.")
        summary = summary_of(job, run, step, best, speed, time.monotonic() - started)
        if done:
            models.write_card(run.out, config, {k: v for k, v in summary.items() if k != "model"})
        shutil.rmtree(run.out / "features", ignore_errors=True)
        return summary

    return ranks.told(finish)


def keep_stopped(model: models.Method, run: Run, average: "Average") -> None:
    """A stopped run has weights to look at, or to start another from, as a finished one has."""
    with average.applied():
        models.save(model, run.out, "last.safetensors")
        if not (run.out / "model.safetensors").exists():  # it was not validated yet
            models.save(model, run.out, "model.safetensors")


def starting_config(job: Job, source: models.Checkpoint | None) -> dict[str, Any]:
    """The ``config.json`` of a new run; fetches its backbones."""
    if source:  # the options may be for another task
        return source.config | {"options": job.options}
    return models.new_config(
        job.method, job.language, job.vision, fit=job.fit, prompt=job.prompt, options=job.options,
        media=job.media,
    )  # fmt: skip


def accumulate(
    model: models.Method, objective: Any, taken: list[Any], scaler: torch.amp.GradScaler,
    pieces: Pieces, quiet: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """One step's gradients, -> the metrics of the objective: the model or a `SelfCritical`.

    ``taken``: the step's micro-batches, cut up where they do not fit; not with several processes,
    each of which has some of them.
    """
    if ranks.size() > 1:  # one that began anew would leave the others waiting
        advice = f"use a smaller --micro-batch, or {pieces.advice}"
        pieces, most = Pieces("A micro-batch", advice), 1
    else:
        most = max(len(batch.ids) for batch in taken)

    def attempt(number: int) -> dict[str, Any]:
        model.zero_grad(set_to_none=True)  # an attempt that failed may have left some
        parts = [part for batch in taken for part in batch.split(number)]
        return objective.accumulate(parts, scaler if scaler.is_enabled() else None)

    return pieces.run(attempt, most, quiet)


def ahead(steps: Iterator[list[Any]], device: torch.device) -> Iterator[list[Any]]:
    """The micro-batches of each step; their pictures are copied to a GPU beside its other work."""
    if device.type != "cuda":
        yield from steps
        return
    beside, own = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    for step in steps:
        with torch.cuda.stream(beside):
            there = [part.pictures.pin_memory().to(device, non_blocking=True) for part in step]
        own.wait_stream(beside)  # what is asked of the GPU from here on, not what it is at now
        for pictures in there:
            pictures.record_stream(own)
        yield [replace(part, pictures=seen) for part, seen in zip(step, there, strict=True)]


def culprits(model: models.Method, objective: Any, taken: list[Any]) -> list[int]:
    """The keys of a step's pictures that alone give a loss or gradient that is not finite."""
    found: dict[int, None] = {}
    with ranks.alone():
        for batch in taken:
            for part in batch.split(len(batch.ids)):
                model.zero_grad(set_to_none=True)
                numbers = [torch.as_tensor(objective.accumulate([part])["loss"])]
                numbers += [p.grad for p in model.parameters() if p.grad is not None]
                if not all(number.isfinite().all() for number in numbers):
                    found |= dict.fromkeys(part.keys.tolist())
    return list(dict.fromkeys(key for own in ranks.everyone(list(found)) for key in own))


def validate(objective: Any, feed: Feed, number: int) -> float:
    """The loss on the validation data, whose micro-batches are each cut into ``number``."""
    return objective.validate(part for batch in feed.validation() for part in batch.split(number))


def parameter_groups(
    model: models.Method, parameters: dict[str, torch.nn.Parameter], recipe: Recipe
) -> list[dict[str, Any]]:
    """AdamW's groups: by rate (the schedule's or a fixed one) and by weight decay.

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
    """An exponential moving average of the trainable weights, which is validated and saved.

    Its decay grows to the given one as min(decay, (1 + step) / (10 + step)), so that it soon
    forgets the start. With a decay of 0 there is no average: the weights themselves are saved.
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
