"""Figures: what alignment changed, and the curves of training runs.

LilT's Figure 4 is the shift of each LayerNorm against the pretrained one.

For layer i of a tower and its two LayerNorms, the L1 norm of the difference between the trained and
the pretrained scale γ, and between the shifts β (https://arxiv.org/abs/2301.04558, section 3.4).
Pearson's r says whether it grows with depth: in the paper r > 0 for images and r < 0 for text.
"""

import re
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch

from tinyvl import UserError, models
from tinyvl.encoders import norm_types
from tinyvl.files import replace_file

if TYPE_CHECKING:
    from tinyvl.runs import Seen

FIELDS = ("tower", "layer", "norm", "parameter", "l1")


def layernorm_shifts(name: str) -> list[dict[str, Any]]:
    """The shifts of a LilT checkpoint's LayerNorms, a row each with the `FIELDS`.

    ``layer`` counts from 1; the LayerNorm of a BERT's embeddings stands as layer 0 and a ViT's
    final norm behind the last layer. ``norm`` is 1 or 2 inside a layer, else 0; ``parameter`` is
    "scale" or "bias". Layers that training added have no pretrained counterpart and are left out.

    Raises UserError if the model is no LilT, or its pretrained LayerNorms were all locked.
    """
    checkpoint = models.open_checkpoint(name, "retrieve")
    config = checkpoint.config
    if config.get("method") != "lilt":
        raise UserError(f"{name}: only models of the method lilt have LayerNorms to compare.", 2)
    model = models.build(config, device=torch.device("cpu"), precision=torch.float32)
    depths = {
        "image": len(getattr(model.encoder.model, "blocks", [])),
        "text": model.text.model.config.num_hidden_layers,
    }
    for side in depths:  # but for what a deep adapter added
        depths[side] -= config["options"].get(side, {}).get("adapter") == "deep"
    before = {
        f"{prefix}.{part}": tensor.detach().clone()
        for prefix, module in model.named_modules()
        if isinstance(module, norm_types())
        for part, tensor in module.named_parameters()
        if model.trainable(f"{prefix}.{part}")
    }
    models.load_weights(model, checkpoint.folder)
    after = dict(model.named_parameters())
    rows = []
    for parameter, old in before.items():
        if place := position(parameter, depths):
            shift = (after[parameter].detach() - old).abs().sum().item()
            rows.append((*place, shift))
    if not rows:
        message = "its LayerNorms were locked; compare a model trained with LayerNorms unlocked"
        raise UserError(f"{name}: {message} (--preset lilt-ln, or --text-unlock layernorm).", 2)
    return [dict(zip(FIELDS, row, strict=True)) for row in sorted(rows)]


def position(parameter: str, depths: dict[str, int]) -> tuple[str, int, int, str] | None:
    """Tower, layer, norm and kind of a LayerNorm's parameter; None where training added it."""
    tower = {"encoder": "image", "text": "text"}.get(parameter.partition(".")[0])
    if tower is None:
        return None
    kind = "scale" if parameter.endswith("weight") else "bias"
    found = re.search(r"\.(?:layer|blocks)\.(\d+)\.", parameter)
    if found is None:
        return tower, 0 if tower == "text" else depths[tower] + 1, 0, kind
    layer = int(found[1]) + 1
    second = "norm2." in parameter or ("attention" not in parameter and tower == "text")
    return (tower, layer, 1 + second, kind) if layer <= depths[tower] else None


def series(rows: list[dict[str, Any]]) -> dict[str, dict[str, tuple[list[int], list[float]]]]:
    """tower -> parameter -> layers and shifts of the LayerNorms inside layers."""
    found: dict[str, dict[str, tuple[list[int], list[float]]]] = {}
    for row in rows:
        if row["norm"]:
            x, y = found.setdefault(row["tower"], {}).setdefault(row["parameter"], ([], []))
            x.append(row["layer"])
            y.append(row["l1"])
    return found


def correlations(rows: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Pearson's r of depth and shift, or None where one does not vary: {tower: {parameter: r}}."""
    found: dict[str, dict[str, float | None]] = {}
    for tower, curves in series(rows).items():
        for parameter, (x, y) in curves.items():
            varies = len({*x}) > 1 and len({*y}) > 1
            found.setdefault(tower, {})[parameter] = (
                statistics.correlation(x, y) if varies else None
            )
    return found


def as_csv(rows: list[dict[str, Any]]) -> str:
    lines = [FIELDS, *([*list(row.values())[:4], f"{row['l1']:.6g}"] for row in rows)]
    return "".join(",".join(map(str, line)) + "\n" for line in lines)


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Figure 4 as a picture: a panel a tower, a line with its 95 % confidence band a parameter."""
    pyplot = drawing()
    curves, r = series(rows), correlations(rows)
    colours = {"scale": "tab:blue", "bias": "tab:orange"}
    figure, axes = pyplot.subplots(1, len(curves), figsize=(5 * len(curves), 3.6), squeeze=False)
    for axis, tower in zip(axes[0], sorted(curves), strict=True):
        for parameter in sorted(curves[tower], reverse=True):
            x, y = map(np.array, curves[tower][parameter])
            value, colour = r[tower][parameter], colours[parameter]
            label = parameter + ("" if value is None else f" (r = {value:.2f})")
            axis.scatter(x, y, s=14, color=colour, label=label)
            if len(set(x.tolist())) > 2:
                grid = np.linspace(x.min(), x.max(), 50)
                line, half = regression_band(x, y, grid)
                axis.plot(grid, line, color=colour)
                axis.fill_between(grid, line - half, line + half, color=colour, alpha=0.2, lw=0)
        axis.set(title=f"{tower} tower", xlabel="layer", ylabel="L1 shift of LayerNorm")
        axis.legend()
    figure.tight_layout()
    replace_file(file, lambda part: figure.savefig(part, format="png", dpi=150))
    pyplot.close(figure)


def drawing() -> Any:
    """Matplotlib's pyplot. UserError: it is not installed."""
    try:
        import matplotlib
    except ImportError:
        advice = "pip install 'tinyvl[plot]', or leave out --png and --page."
        raise UserError(f"Drawing needs matplotlib: {advice}", 2) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def curves(runs: "list[Seen]", file: Path | BinaryIO) -> None:
    """Loss and validation loss of runs by step, and bars of the metrics of their evaluations."""
    pyplot = drawing()
    logs, names = [run.log() for run in runs], [str(run.folder) for run in runs]
    scores = [run.row()["metrics"] for run in runs]
    metrics = list(dict.fromkeys(name for each in scores for name in each))
    panels = ["loss"]
    panels += ["val_loss"] if any("val_loss" in line for log in logs for line in log) else []
    panels += ["metrics"] if metrics else []
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.5 * len(panels), 4), squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        axis.set_title(panel.replace("val_loss", "validation loss"))
        for i, (name, log, score) in enumerate(zip(names, logs, scores, strict=True)):
            colour = f"C{i % 10}"
            if panel == "metrics":
                places = [
                    m + (i - len(runs) / 2 + 0.5) * 0.8 / len(runs) for m in range(len(metrics))
                ]
                values = [score.get(metric) or 0 for metric in metrics]
                axis.bar(places, values, 0.8 / len(runs), color=colour, label=name)
                axis.set_xticks(range(len(metrics)), metrics, rotation=20, ha="right", fontsize=8)
                continue
            steps = [line["step"] for line in log if line.get(panel) is not None]
            values = [line[panel] for line in log if line.get(panel) is not None]
            if panel == "loss" and len(values) > 20:  # the steps' own, and a running mean
                axis.plot(steps, values, color=colour, alpha=0.2, lw=0.8)
                values = running(values, max(5, len(values) // 50))
            axis.plot(steps, values, color=colour, label=name, marker="." * (len(values) < 20))
            axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()

    def save(target: Any) -> None:
        figure.savefig(target, format="png", dpi=130)

    if isinstance(file, Path):
        replace_file(file, save)
    else:
        save(file)
    pyplot.close(figure)


def running(values: list[float], width: int) -> list[float]:
    """The mean over each value and those before it, ``width`` at most."""
    sums = np.concatenate(([0.0], np.cumsum(values)))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return ((sums[ends] - sums[starts]) / (ends - starts)).tolist()


def regression_band(
    x: np.ndarray, y: np.ndarray, grid: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The least-squares line on ``grid`` and half the width of its 95 % confidence band."""
    slope, start = np.polyfit(x, y, 1)
    left = len(x) - 2
    error = np.sqrt(((y - slope * x - start) ** 2).sum() / left)
    spread = ((x - x.mean()) ** 2).sum()
    student = 1.96 + 2.37 / left + 2.82 / left**2  # its 97.5 % quantile (Cornish and Fisher)
    half = student * error * np.sqrt(1 / len(x) + (grid - x.mean()) ** 2 / spread)
    return slope * grid + start, half
