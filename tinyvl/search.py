"""Searching an index, exactly, and telling which label fits a picture best.

`tinyvl retrieve` makes vectors of its queries and looks for the rows of an index that are most
similar; `tinyvl classify` compares pictures with the vectors of labels, put into prompts.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyvl import UserError, media, media_workers
from tinyvl.device import Pieces
from tinyvl.files import Unmarked, text_lines
from tinyvl.index import Index, embed_images
from tinyvl.index_source import one_line
from tinyvl.store import Row
from tinyvl.write import computed, gathered

SLACK = 1e-5  # more than an fp32 product of unit vectors is wrong by, at any width in use
ROWS, QUERIES = 16384, 256  # of one matrix product: 16 MiB of scores


def search(
    vectors: np.ndarray, queries: np.ndarray, k: int, threshold: float | None = None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The ``k`` rows most similar to each query: exact, best first, equal scores by row.

    Rows and queries are unit vectors, float32 (N, d), in memory or mapped, and (Q, d). ``k`` 0: all
    rows; those that score less than ``threshold`` are left out. Returns (rows int64, scores
    float64) of each query.

    The matrix is read in blocks, once for 256 queries; a mapped file is never copied as a whole.
    The products in fp32 only choose candidates: what is within their error of the k-th best is
    scored again in float64, each row by itself. So a score, and the order of equal ones, depends
    on neither the blocks nor the other queries nor the library that multiplies.
    """
    if not len(vectors):
        return [(np.empty(0, np.int64), np.empty(0)) for _ in queries]
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

    start, size, limit = 0, min(256, ROWS), 2 * k * count  # small blocks first make the floors
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


# ---------------------------------------------------------------------------------------- queries


@dataclass
class Query:
    """A text, or the path of a picture."""

    name: str
    picture: bool = False


@dataclass
class Hit:
    """One line of the answer to a query."""

    query: str
    rank: int  # from 1
    path: str
    score: float  # the cosine of the angle between query and result
    caption: str | None = None


def term(text: str) -> Query:
    """What ``--plus`` or ``--minus`` names: the picture of that path, else the text.

    Raises UserError: it is the name of a picture that is not there.
    """
    if os.path.isfile(text):
        return Query(text, True)
    if media.is_image(text):
        raise UserError(f"{text}: there is no such file.")
    return Query(text)


def embed(model: Any, queries: list[Query]) -> list[np.ndarray | UserError]:
    """A unit vector (width,) for each query, or what is wrong with it."""
    texts = [one_line(query.name) for query in queries if not query.picture]
    files = [query.name for query in queries if query.picture]
    words = iter(model.embed_texts(texts).float().cpu().numpy() if texts else ())
    decoded: Iterator = iter(())
    if files:  # a model of texts alone has no encoder
        encoder = model.encoder
        decoded = media_workers.decode_images(files, encoder.transform(), target=encoder.size)
    out: list[np.ndarray | UserError] = []
    for query in queries:
        found = next(decoded)[1] if query.picture else next(words)
        if not query.picture and re.search("[\ud800-\udfff]", query.name):
            found = UserError(f"{query.name!r}: this query is not text in UTF-8.")
        if isinstance(found, torch.Tensor):
            found = model.embed_images(found[None])[0].float().cpu().numpy()
        out.append(found)
    return out


def shift_of(model: Any, plus: list[Query], minus: list[Query]) -> np.ndarray | float:
    """What ``--plus`` and ``--minus`` add to queries. Raises UserError: an unreadable picture."""
    shift: np.ndarray | float = 0.0
    for i, vector in enumerate(embed(model, plus + minus)):
        if isinstance(vector, UserError):
            raise vector
        shift = shift + (vector if i < len(plus) else -vector)
    return shift


def answers(
    index: Index, model: Any, queries: list[Query], *, k: int, threshold: float | None = None,
    shift: np.ndarray | float = 0.0, captions: bool = False, duplicates: bool = False,
    show: Callable[[str], str] = str,
) -> Iterator[list[Hit] | UserError]:  # fmt: skip
    """For each query its results, best first, or what is wrong with it.

    ``shift`` is added to each query's vector before that is made a unit vector again. Results are
    pictures, or with ``captions`` captions; of equal files the first one, unless ``duplicates``
    are wanted. ``show`` gives a row's path as it is printed.
    """
    table = index.captions if captions else index.images
    found, vectors = embed(model, queries), []
    for i, (query, vector) in enumerate(zip(queries, found, strict=True)):
        if not isinstance(vector, UserError):
            vector = vector + shift
            if (length := np.linalg.norm(vector)) < 1e-3:
                found[i] = UserError(f"{query.name}: nothing is left after --plus and --minus.")
            else:
                vectors.append(vector / length)
    matrix = np.stack(vectors) if vectors else np.empty((0, model.width))
    most = k
    while True:
        results = search(table.vectors, matrix, most, threshold)
        rows = table.pick(n for numbers, _ in results for n in numbers)
        found_rows = [
            list(zip(*pairs, strict=True)) if duplicates else folded(pairs, rows)
            for pairs in results
        ]
        if (
            not k
            or most >= len(table.vectors)
            or all(
                len(own) >= k or len(numbers) < most
                for own, (numbers, _) in zip(found_rows, results, strict=True)
            )
        ):
            break
        most *= 2  # too many of them were equal files
    remaining = iter(found_rows)
    for query, vector in zip(queries, found, strict=True):
        if isinstance(vector, UserError):
            yield vector
            continue
        yield [
            Hit(query.name, rank, show(rows[n].path), float(score), rows[n].caption)
            for rank, (n, score) in enumerate(next(remaining)[: k or None], 1)
        ]


def folded(pairs: tuple[np.ndarray, np.ndarray], rows: dict[int, Row]) -> list[tuple[int, float]]:
    """(row, score) of results, of those with the same content only the first."""
    first: dict[str, tuple[int, float]] = {}
    for n, score in zip(*pairs, strict=True):
        first.setdefault(rows[n].digest, (n, score))
    return list(first.values())


# ----------------------------------------------------------------------------------------- labels


def read_labels(given: str) -> list[str]:
    """The lines of a file, or names between commas; each once. Raises UserError: fewer than two."""
    there = os.path.isfile(given)
    try:
        lines = [line for _, line in text_lines(Path(given))] if there else []
    except UserError as error:
        raise UserError(f"--labels: {error}", 2) from None
    parts = (" ".join(part.split()) for part in (lines if there else given.split(",")))
    labels = list(dict.fromkeys(filter(None, parts)))
    if len(labels) < 2:
        takes = "--labels takes two names or more, between commas or a line each in a file"
        has = f"{given!r} {'' if there else 'is no file and '}has {len(labels)}"
        raise UserError(f"{takes}; {has}.", 2)
    return labels


def classify(
    model: Any, paths: Iterable[str], labels: list[str], classes: Tensor, *, top: int = 1,
    batch: int = 16, workers: int | None = None,
) -> Iterator[tuple[str, list[dict[str, Any]] | UserError]]:  # fmt: skip
    """(path, its ``top`` likeliest labels, or what is wrong with the picture), in order.

    A picture's probabilities are the softmax of its products with the labels' vectors (C, d),
    ``classes``, divided by the model's temperature: what the model was trained to make right, with
    the labels in the place of a batch's captions. Labels come as the fields of `write_rows`.
    """
    classes, temperature = classes.float().cpu(), float(model.temperature)
    encoder, pieces = model.encoder, Pieces()
    decoded = media_workers.decode_images(
        paths, encoder.transform(), target=encoder.size, workers=workers
    )

    def likeliest(good: list[tuple[str, Tensor]]) -> Iterator[list[dict[str, Any]]]:
        vectors = embed_images(model, [picture for _, picture in good], len(good), pieces)  # (B, d)
        chances = (torch.from_numpy(vectors) @ classes.T / temperature).softmax(dim=1)  # (B, C)
        for values, which in zip(*chances.topk(min(top, len(labels))), strict=True):
            yield [
                {"label": labels[i], "probability": round(p, 6), "rank": rank}
                for rank, (i, p) in enumerate(zip(which, values.tolist(), strict=True), 1)
            ]

    for group in gathered(decoded, batch):
        yield from computed(group, likeliest)


def groups(texts: list[str], images: list[Query]) -> Iterator[list[Query]]:
    """Queries to be answered together: those named, then those on standard input as they come."""
    named = [Query(text) for text in texts if text != "-"] + images
    if named:
        yield named
    if "-" in texts:
        lines = (Query(line.strip()) for line in media.expand(["-"], Unmarked(sys.stdin)))
        yield from gathered(lines, QUERIES)
