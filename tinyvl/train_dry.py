"""`tinyvl train --dry-run`: what a run would train, its steps, its memory and its disk."""

from typing import Any

import torch

from tinyvl import features, models, train_batches, train_run
from tinyvl.device import PRECISIONS
from tinyvl.presets import Job, Run
from tinyvl.progress import say
from tinyvl.train import starting_config
from tinyvl.train_plan import Plan


def estimate(job: Job, run: Run) -> dict[str, Any]:
    """Reads the data and fetches the backbones, but neither decodes a picture nor trains.

    ``memory`` is that of weights, gradients and optimizer, in bytes; what layers compute comes on
    top. ``disk``: pictures as the encoder sees them, which are kept during the run, and all that
    is saved. A picture that cannot be read is counted.

    UserError: as `train.train`.
    """
    train_run.check_features(job, run)
    train_run.check_run(run, {}, {} if run.resume else None)
    train, val = train_batches.load_records(job)
    source = models.open_checkpoint(job.init, models.task_of(job.method)) if job.init else None
    config = starting_config(job, source)
    meta = torch.device("meta")
    model = models.build(config, device=meta, precision=torch.float32, weights=False)
    once = job.objective == "cider" or job.task == "vqa"  # a group is a picture, or a question
    most = min(job.per_image, run.micro, job.recipe.batch)
    counts = [1 if once else len(record.captions) for record in train]
    plan = Plan.of([min(most, n - i) for n in counts for i in range(0, n, most)], job, run)
    own = [p.numel() for n, p in model.named_parameters() if model.trainable(n)]
    every = sum(p.numel() for p in model.parameters())
    moving, trained, size = bool(job.recipe.average), sum(own), PRECISIONS[job.precision].itemsize
    pictures = {record.path for record in train}
    row = 0
    if run.features is None and run.cache and not job.crops and model.fixed_pictures:
        dtype = train_batches.cache_dtype(job, model.reads)
        shapes = features.contents({}, model.encoder, what=model.reads, dtype=dtype)["tensors"]
        row = sum(torch.Size(s).numel() for s in shapes.values()) * PRECISIONS[dtype].itemsize
    kept = len(pictures) * job.views + len({record.path for record in val[:1000]})
    found = {
        "method": job.method, "language": job.language, "vision": job.vision, "data": job.data,
        "trainable_parameters": trained, "total_parameters": every,
        "pictures": len(pictures), plan.kind.replace(" ", "_"): plan.size,
        "batch": plan.captions, "epochs": job.recipe.epochs, "steps": plan.steps(job.recipe.epochs),
        "memory": (every - trained) * size + trained * 4 * (4 + moving),
        "disk": kept * row + trained * 4 * (5 + moving), "out": str(run.out),
    }  # fmt: skip
    say(
        f"{run.out}: {trained:,} trainable parameters; {len(pictures):,} pictures, {plan.size:,} "
        f"{plan.kind}; {plan.told(job.recipe.epochs)}; {found['memory'] / 1e9:.2f} GB of memory "
        f"and what layers compute; {found['disk'] / 1e9:.2f} GB of disk",
        run.quiet,
    )
    return found
