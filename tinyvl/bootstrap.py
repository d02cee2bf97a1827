"""Is one run better than another, or was it luck with the test set? The paired bootstrap.

The test items are drawn again with replacement, the same draw for both runs, and the difference is
computed on each draw ([Efron and Tibshirani 1993](https://doi.org/10.1201/9780429246593); for BLEU
[Koehn 2004](https://aclanthology.org/W04-3250)). A metric that sums counts over the corpus (BLEU,
METEOR) is computed anew from the sums of each draw.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

RESAMPLES = 1000
SEED = 0
LEVEL = 0.95
CELLS = 4_000_000  # numbers in memory at once: draws x items

# (R, N) how often each of N items counts in each of R draws -> metric -> (R,) its values.
Resample = Callable[[np.ndarray], dict[str, np.ndarray]]


def draws(items: int) -> Iterator[np.ndarray]:
    """``RESAMPLES`` draws, as counts (R, N), some rows at a time."""
    rng = np.random.Generator(np.random.PCG64(SEED))
    rows = max(1, CELLS // items)
    for start in range(0, RESAMPLES, rows):
        drawn = rng.integers(items, size=(min(rows, RESAMPLES - start), items))
        yield np.stack([np.bincount(row, minlength=items) for row in drawn])


def mean_of(items: dict[str, list[float]]) -> Resample:
    """The resample of metrics that are the mean of their items."""

    def resample(counts: np.ndarray) -> dict[str, np.ndarray]:
        return {name: counts @ np.asarray(values) / counts.sum(1) for name, values in items.items()}

    return resample


def differences(
    baseline: dict[str, float | None],
    metrics: dict[str, float | None],
    resample_baseline: Resample,
    resample: Resample,
    items: int,
) -> dict[str, dict[str, Any]]:
    """``metrics`` less ``baseline``, each with its 95 % percentile interval.

    Both runs' items are the same, in the same order. -> metric -> {"value", "low", "high"}.
    """
    found: dict[str, list[np.ndarray]] = {}
    for counts in draws(items):
        base, other = resample_baseline(counts), resample(counts)
        for name in base.keys() & other.keys():
            found.setdefault(name, []).append(other[name] - base[name])
    tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    out = {}
    for name in metrics:
        if name in found:
            low, high = np.quantile(np.concatenate(found[name]), tails)
            value = metrics[name] - baseline[name]
            out[name] = {"value": value, "low": float(low), "high": float(high)}
    return out
