"""Exact search in an index, and classification by the names of the classes."""

from __future__ import annotations

import numpy as np

SLACK = 1e-5  # more than an fp32 product of unit vectors is wrong by, at any width in use
ROWS, QUERIES = 16384, 256  # of one matrix product: 16 MiB of scores


def search(
    vectors: np.ndarray, queries: np.ndarray, k: int, threshold: float | None = None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The ``k`` rows most similar to each query: exact, best first, equal scores by row.

    The matrix is read in blocks, once for 256 queries; a mapped file is never copied as a whole.
    The products in fp32 only choose candidates: what is within their error of the k-th best is
    scored again in float64, each row by itself. So a score, and the order of equal ones, depends
    on neither the blocks nor the other queries nor the library that multiplies.

    Args:
        vectors: unit vectors, float32 (N, d), in memory or mapped.
        queries: unit vectors, float32 (Q, d).
        k: how many; 0: all.
        threshold: leaves out what scores less.

    Returns:
        (rows int64, scores float64) of each query, at most k of each.
    """
    k = min(k, len(vectors)) if k else len(vectors)
    results = []
    for i in range(0, len(queries), QUERIES):
        part = np.asarray(queries[i : i + QUERIES], np.float32)
        least = -np.inf if threshold is None else threshold - SLACK
        owners, rows = candidates(vectors, part, k, least)
        bounds = np.searchsorted(owners, np.arange(len(part) + 1))
        for query, start, end in zip(part, bounds, bounds[1:], strict=False):
            results.append(exact(vectors, query, rows[start:end], k, threshold))
    return results


def candidates(
    vectors: np.ndarray, queries: np.ndarray, k: int, least: float
) -> tuple[np.ndarray, np.ndarray]:
    """Rows that may be among the k best: (owners, rows), sorted by owner, the query's number."""
    count, columns = len(queries), np.ascontiguousarray(queries.T)  # (d, Q)
    floors = np.full(count, least, np.float32)  # (Q,) what scores less is not among the best
    owners, rows, scores = np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)
    buffer = np.empty((min(ROWS, len(vectors)), count), np.float32)

    def prune() -> None:
        nonlocal owners, rows, scores
        order = np.lexsort((-scores, owners))
        owners, rows, scores = owners[order], rows[order], scores[order]
        bounds = np.searchsorted(owners, np.arange(count + 1))
        full = np.flatnonzero(np.diff(bounds) >= k)
        floors[full] = np.maximum(floors[full], scores[bounds[full] + k - 1] - SLACK)
        keep = scores >= floors[owners]
        owners, rows, scores = owners[keep], rows[keep], scores[keep]

    start, size, limit = 0, 256, 2 * k * count  # small blocks first: they make the floors
    while start < len(vectors):
        block = vectors[start : start + size]
        products = np.matmul(block, columns, out=buffer[: len(block)])  # (n, Q)
        found = np.flatnonzero(products >= floors)
        owners = np.concatenate([owners, found % count])
        rows = np.concatenate([rows, found // count + start])
        scores = np.concatenate([scores, products.ravel()[found]])
        if len(scores) > limit:
            prune()
            limit = 2 * max(len(scores), k * count)  # many equal rows: do not sort them each time
        start, size = start + len(block), min(2 * size, ROWS)
    prune()
    return owners, rows


def exact(
    vectors: np.ndarray, query: np.ndarray, rows: np.ndarray, k: int, threshold: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """The k best of some rows by their scores in float64, (rows, scores)."""
    scores = np.empty(len(rows))
    for i in range(0, len(rows), 4096):
        part = vectors[rows[i : i + 4096]].astype(np.float64)
        scores[i : i + 4096] = (part * query).sum(axis=1)
    order = np.lexsort((rows, -scores))[:k]
    if threshold is not None:
        order = order[scores[order] >= threshold]
    return rows[order], scores[order]
