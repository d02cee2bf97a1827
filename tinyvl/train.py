"""The training loop, read top to bottom.

Everything random is a pure function of (seed, epoch, index), so a run resumes from its step alone
and ends, on a CPU, with the same weights bit for bit as one that was never interrupted.
"""

import json
import math
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyvl import UserError, __version__, data, media, models
from tinyvl.captioner import Batch, Captioner, collate


@dataclass
class Job:
    """What decides a run's result. Saved with the checkpoint, compared on resume."""

    method: str
    data: str
    decoder: str
    vision: str
    fit: str
    options: dict[str, Any]
    recipe: models.Recipe
    prompt: str = ""
    val: str | None = None
    images: str | None = None
    lang: str | None = "en"
    format: str | None = None
    init: str | None = None
    limit: int | None = None
    seed: int = 0
    max_tokens: int = 40  # longer captions are cut
    per_image: int = 5  # captions of a picture that share a micro-batch
    precision: str = "fp32"


@dataclass
class Run:
    """How a run is carried out; changes nothing of its result but the last bits."""

    out: Path
    device: torch.device
    micro: int = 64  # captions in memory at once
    checkpointing: bool = False
    cache: bool = True  # keep the encoder's tokens on disk: each picture is encoded once
    resume: bool = False
    save_every: int = 100  # steps
    validate_every: int | None = None  # steps; None: once an epoch
    workers: int | None = None
    quiet: bool = False
    stop: list[int] = field(default_factory=list)  # signals received


def lr_at(step: int, steps: int, recipe: models.Recipe) -> float:
    """Linear warm-up to the rate, then a cosine to the final rate. ``step`` counts from 0."""
    warm = max(1, round(recipe.warmup * steps))
    if step < warm:
        return recipe.rate * (step + 1) / warm
    share = (step - warm) / max(1, steps - warm)
    low = recipe.final_rate
    return low + (recipe.rate - low) * 0.5 * (1 + math.cos(math.pi * share))


@dataclass
class Group:
    """Captions of one picture that are read together: its keys and values serve them all."""

    record: int
    captions: list[list[int]]


def groups_of(tokens: list[list[list[int]]], per_image: int) -> list[Group]:
    """The captions of each record, sorted by length and cut into groups of at most per_image."""
    groups = []
    for i, captions in enumerate(tokens):
        captions = sorted(captions, key=len)
        groups += [
            Group(i, captions[j : j + per_image]) for j in range(0, len(captions), per_image)
        ]
    return groups


class Pictures:
    """Pictures of a list of records, as uint8 tensors or as cached encoder tokens.

    The cache is one fp16 array on disk beside a column of flags, filled once, in order, and
    continued after a kill. The operating system keeps in memory what fits.
    """

    def __init__(self, records: list[data.Record], model: Captioner, run: Run, name: str):
        self.paths = [r.image for r in records]
        self.transform, self.size = model.encoder.transform(), model.encoder.size
        self.run, self.store, self.bad = run, None, set()
        if not run.cache:
            return
        probe = torch.zeros(1, 3, self.size, self.size, dtype=torch.uint8, device=run.device)
        with torch.no_grad(), model.autocast():
            shape = (len(records), *model.encoder(probe).tokens.shape[1:])
        folder = run.out / "features"
        folder.mkdir(parents=True, exist_ok=True)
        file, flags = folder / f"{name}.f16", folder / f"{name}.done"
        need = math.prod(shape) * 2 - (file.stat().st_size if file.exists() else 0)
        if need > shutil.disk_usage(folder).free * 0.9:
            raise UserError(
                f"{folder}: encoded pictures would take {need / 2**30:.1f} GiB, which does not "
                "fit on this disk; use --no-cache to encode them anew each time.",
                2,
            )
        mode = "r+" if file.exists() and file.stat().st_size == math.prod(shape) * 2 else "w+"
        self.store = np.memmap(file, np.float16, mode, shape=shape)
        self.done = np.memmap(flags, np.uint8, mode if flags.exists() else "w+", shape=shape[:1])
        self._fill(model, name)

    def _fill(self, model: Captioner, name: str) -> None:
        """Encodes blocks of 32 that are not yet whole: the same blocks however often killed."""
        blocks = [range(i, min(i + 32, len(self.done))) for i in range(0, len(self.done), 32)]
        blocks = [block for block in blocks if not self.done[block.start : block.stop].all()]
        decoded = media.decode_images(
            (self.paths[i] for block in blocks for i in block),
            self.transform,
            target=self.size,
            workers=self.run.workers,
        )
        with bar(f"encoding {name} pictures", sum(map(len, blocks)), self.run) as advance:
            for block in blocks:
                found = {i: next(decoded)[1] for i in block}
                good = [i for i in block if not isinstance(found[i], Exception)]
                if good:
                    with torch.no_grad(), model.autocast():
                        stacked = torch.stack([found[i] for i in good]).to(model.device)
                        tokens = model.encoder(stacked).tokens
                    self.store[good] = tokens.half().cpu().numpy()
                for i in block:
                    if i not in good:
                        print(f"tinyvl: skipping {found[i]}", file=sys.stderr)
                    self.done[i] = 1 if i in good else 2
                advance(len(block))
                if self.run.stop:
                    raise Interrupted
        self.bad = set(np.flatnonzero(self.done == 2).tolist())

    def stream(self, wanted: Iterator[list[int]]) -> Iterator[list[Tensor | media.MediaError]]:
        """For each list of records their pictures, in that order."""
        if self.store is not None:
            for indices in wanted:
                yield list(torch.from_numpy(self.store[indices]))
            return
        lists: list[list[int]] = []

        def paths() -> Iterator[str]:
            for indices in wanted:
                lists.append(indices)
                yield from (self.paths[i] for i in indices)

        found: list[Tensor | media.MediaError] = []
        for _, picture in media.decode_images(
            paths(), self.transform, target=self.size, workers=self.run.workers
        ):
            found.append(picture)
            if len(found) == len(lists[0]):
                yield found
                lists.pop(0)
                found = []


class Interrupted(UserError):
    """A signal asked for the end; what was done is saved."""

    def __init__(self) -> None:
        super().__init__("stopped and saved; continue with --resume", 130)


def prepare(records: list[data.Record], model: Captioner, job: Job) -> list[list[list[int]]]:
    """Caption ids of each record, cut to max_tokens."""
    flat = model.text.encode([data.tidy(c) for r in records for c in r.captions])
    ids = iter(flat)
    return [[next(ids)[: job.max_tokens] for _ in r.captions] for r in records]


def batches(
    groups: list[Group],
    order: list[list[int]],
    pictures: Pictures,
    model: Captioner,
) -> Iterator[Batch]:
    """Micro-batches of the groups that each list of ``order`` names."""
    wanted = ([groups[g].record for g in micro] for micro in order)
    for micro, seen in zip(order, pictures.stream(wanted), strict=True):
        good = [(g, p) for g, p in zip(micro, seen, strict=True) if isinstance(p, Tensor)]
        for broken in (p for p in seen if not isinstance(p, Tensor)):
            print(f"tinyvl: skipping {broken}", file=sys.stderr)
        if good:
            captions = [c for g, _ in good for c in groups[g].captions]
            rows = [row for row, (g, _) in enumerate(good) for _ in groups[g].captions]
            seen = torch.stack([p for _, p in good])
            yield collate(captions, rows, seen, model.text, model.prompt)


def load_records(job: Job) -> tuple[list[data.Record], list[data.Record]]:
    """Records to train on and to validate on, by the data's own split or a held-out 2 %."""

    def read(path: str, split: str) -> list[data.Record]:
        records = data.read(path, format=job.format, images=job.images, lang=job.lang)
        if any(r.split for r in records):
            records = [r for r in records if r.split in {split, f"rest{split}"}]
        return [r for r in records if r.captions]

    train, val = read(job.data, "train"), read(job.val or job.data, "val")
    if not train:
        raise UserError(f"{job.data}: no record with a caption to train on.", 2)
    if not job.val and (not val or val == train):  # no validation part of its own
        train, val = data.hold_out(train, seed=job.seed)
    if job.limit:
        train = [train[i] for i in sorted(data.epoch_order(len(train), job.seed, 0)[: job.limit])]
    return train, val


def train(job: Job, run: Run) -> dict[str, Any]:
    """Trains a captioner, -> a summary. Leaves a checkpoint folder in ``run.out``."""
    state = open_run(job, run)
    train_records, val_records = load_records(job)
    torch.manual_seed(job.seed)
    if job.init:
        source = models.checkpoint_folder(job.init)
        config = models.read_config(source)
    else:
        config = models.new_config(
            job.method, job.decoder, job.vision, fit=job.fit, prompt=job.prompt, options=job.options
        )
    precision = models.choose_precision(job.precision, run.device)
    model = models.build(config, device=run.device, precision=precision)
    if job.init:
        models.load_weights(model, source)
    model.decoder.checkpointing = run.checkpointing
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(model.trainable(n) for n in parameters)
    config["training"] = asdict(job) | {"tinyvl": __version__}

    with stopping(run):
        pictures = Pictures(train_records, model, run, "train")
        val_pictures = Pictures(val_records[:1000], model, run, "val")
        tokens = prepare(train_records, model, job)
        for i in pictures.bad:
            tokens[i] = []
        groups = groups_of(tokens, job.per_image)
        lengths = [max(map(len, g.captions)) for g in groups]
        val_groups = [
            Group(i, t[:1])  # one caption a picture: enough to choose by, and cheap
            for i, t in enumerate(prepare(val_records[:1000], model, job))
            if i not in val_pictures.bad
        ]
        by_length = sorted(range(len(val_groups)), key=lambda g: len(val_groups[g].captions[0]))
        val_order = [by_length[i : i + 64] for i in range(0, len(by_length), 64)]

        mean = sum(len(g.captions) for g in groups) / len(groups)
        micro = max(1, round(min(run.micro, job.recipe.batch) / mean))  # groups at once
        per_step = max(1, round(job.recipe.batch / (micro * mean)))  # micro-batches
        steps_per_epoch = math.ceil(math.ceil(len(groups) / micro) / per_step)
        steps = max(1, round(job.recipe.epochs * steps_per_epoch))
        validate_every = run.validate_every or steps_per_epoch

        optimizer = torch.optim.AdamW(
            parameters.values(), lr=job.recipe.rate, weight_decay=job.recipe.weight_decay
        )
        scaler = torch.amp.GradScaler(run.device.type, enabled=precision == torch.float16)
        step, best = 0, math.inf
        if state is not None:
            step, best = restore(state, parameters, optimizer, scaler)
            trim_log(run.out / "log.jsonl", step)
        else:
            models.save_config(run.out, config)
        log = (run.out / "log.jsonl").open("a", encoding="utf-8")
        say(
            run,
            f"{sum(p.numel() for p in parameters.values()):,} trainable parameters; "
            f"{len(train_records):,} pictures, {sum(map(len, tokens)):,} captions, "
            f"{len(val_records):,} pictures to validate on; {steps:,} steps of "
            f"{round(per_step * micro * mean)} captions",
        )
        pieces, started, done, speed = 1, time.monotonic(), 0, 0.0
        with bar("training", steps, run, start=step) as advance:
            source: Iterator[Batch] = iter(())
            epoch = None
            while step < steps:
                if epoch != step // steps_per_epoch:  # a new epoch, or the middle of a resumed one
                    epoch, offset = divmod(step, steps_per_epoch)
                    order = data.length_buckets(lengths, micro, job.seed, epoch)[
                        offset * per_step :
                    ]
                    source = batches(groups, order, pictures, model)
                rate = lr_at(step, steps, job.recipe)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                torch.manual_seed(job.seed * 1_000_003 + step)  # dropout, if a method has any
                taken = [b for _, b in zip(range(per_step), source, strict=False)]
                if not taken:  # every picture of the step was unreadable
                    step += 1
                    continue
                metrics, pieces = accumulate(model, taken, scaler, pieces, run)
                scaler.unscale_(optimizer)
                norm = torch.nn.utils.clip_grad_norm_(parameters.values(), job.recipe.clip)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
                step, done = step + 1, done + metrics["captions"]
                speed = done / (time.monotonic() - started)
                line = {
                    "step": step, "epoch": round(step / steps_per_epoch, 4),
                    "loss": round(metrics["loss"], 5), "rate": rate,
                    "gradient_norm": round(norm.item(), 4),
                    "captions_per_second": round(speed, 2), "peak_memory": peak_memory(run.device),
                }  # fmt: skip
                print(json.dumps(line), file=log, flush=True)
                advance(1, f"loss {metrics['loss']:.3f}  {speed:.1f} captions/s")
                ends = step == steps
                if val_order and (step % validate_every == 0 or ends):
                    value = model.validate(batches(val_groups, val_order, val_pictures, model))
                    print(
                        json.dumps({"step": step, "val_loss": round(value, 5)}),
                        file=log,
                        flush=True,
                    )
                    say(run, f"step {step}: validation loss {value:.4f}")
                    if value < best:
                        best = value
                        models.save(model, run.out, "model.safetensors")
                if step % run.save_every == 0 or ends or run.stop:
                    save_state(run, step, best, parameters, optimizer, scaler)
                if run.stop and not ends:
                    raise Interrupted
    log.close()
    if not val_order:
        models.save(model, run.out, "model.safetensors")
    models.save(model, run.out, "last.safetensors")
    summary = {
        "steps": step, "epochs": job.recipe.epochs, "val_loss": best if val_order else None,
        "captions_per_second": round(speed, 2), "seconds": round(time.monotonic() - started),
    }  # fmt: skip
    models.write_card(run.out, config, summary)
    return summary | {"model": str(run.out)}


def accumulate(
    model: Captioner,
    taken: list[Batch],
    scaler: torch.amp.GradScaler,
    pieces: int,
    run: Run,
) -> tuple[dict[str, float], int]:
    """One step's gradients; a micro-batch that does not fit in memory is halved, and so on."""
    while True:
        try:
            parts = [part for batch in taken for part in batch.split(pieces)]
            return model.accumulate(parts, scaler if scaler.is_enabled() else None), pieces
        except torch.OutOfMemoryError:
            if pieces >= max(len(batch.ids) for batch in taken):
                raise UserError(
                    "One caption at a time does not fit in this device's memory; "
                    "use --checkpointing, a smaller language model or --device cpu."
                ) from None
            pieces *= 2
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            say(run, f"out of memory: going on with micro-batches cut into {pieces}")


def open_run(job: Job, run: Run) -> dict[str, Any] | None:
    """The state to resume from, or None for a new run; refuses what would lose something."""
    state_file = run.out / "training.safetensors"
    config_file = run.out / "config.json"
    if not run.resume:
        if state_file.exists() or (run.out / "model.safetensors").exists():
            raise UserError(
                f"{run.out}: there is a run here already; continue it with --resume, or choose "
                "another --out.",
                2,
            )
        run.out.mkdir(parents=True, exist_ok=True)
        return None
    if not config_file.exists():
        run.out.mkdir(parents=True, exist_ok=True)
        return None  # killed before its first step
    before = json.loads(config_file.read_text(encoding="utf-8"))["training"]
    now = json.loads(json.dumps(asdict(job)))
    changed = [k for k in now if now[k] != before.get(k)]
    if changed:
        k = changed[0]
        raise UserError(
            f"{run.out}: this run was started with {k} = {before.get(k)!r}, not {now[k]!r}; "
            "resume it with the same settings, or choose another --out.",
            2,
        )
    return {"file": state_file} if state_file.exists() else None


def save_state(run: Run, step: int, best: float, parameters, optimizer, scaler) -> None:
    """Everything a resumed run needs, in one file, replaced in one stroke."""
    tensors = {}
    for name, parameter in parameters.items():
        tensors[f"model/{name}"] = parameter.detach()
        for key in ("exp_avg", "exp_avg_sq"):
            tensors[f"{key}/{name}"] = optimizer.state[parameter][key]
    meta = {"step": step, "best": best, "scaler": scaler.state_dict()}
    models.write_tensors(run.out / "training.safetensors", tensors, {"training": json.dumps(meta)})


def restore(state: dict, parameters, optimizer, scaler) -> tuple[int, float]:
    """Fills in parameters and optimizer; -> (steps done, best validation loss)."""
    from safetensors import safe_open

    with safe_open(state["file"], "pt") as file:
        meta = json.loads(file.metadata()["training"])
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(file.get_tensor(f"model/{name}"))
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(meta["step"])),
                    "exp_avg": file.get_tensor(f"exp_avg/{name}").to(parameter.device),
                    "exp_avg_sq": file.get_tensor(f"exp_avg_sq/{name}").to(parameter.device),
                }
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
    models.write_text(file, "".join(f"{line}\n" for line in kept))


@contextmanager
def stopping(run: Run):
    """SIGINT and SIGTERM ask the run to save and end; a second SIGINT ends it at once."""

    def ask(number, frame):
        if run.stop:
            raise KeyboardInterrupt
        run.stop.append(number)
        print("stopping: saving after this step", file=sys.stderr)

    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's memory, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def say(run: Run, message: str) -> None:
    if not run.quiet:
        print(message, file=sys.stderr, flush=True)


@contextmanager
def bar(title: str, total: int, run: Run, start: int = 0):
    """A Rich bar on a terminal; elsewhere a line at most every half minute. -> advance(n, text)."""
    if run.quiet or total == start:
        yield lambda n, text="": None
        return
    if not sys.stderr.isatty():
        done, last = [start], [time.monotonic()]

        def advance(n: int, text: str = "") -> None:
            done[0] += n
            if time.monotonic() - last[0] > 30 or done[0] == total:
                last[0] = time.monotonic()
                print(f"{title}: {done[0]}/{total}  {text}", file=sys.stderr, flush=True)

        yield advance
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[text]}"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=total, completed=start, text="")
        yield lambda n, text="": progress.update(task, advance=n, text=text)
