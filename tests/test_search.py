"""Exact search against a slow reference."""

import tracemalloc

import numpy as np
import pytest

from tinyvl import search


def units(rng: np.random.Generator, count: int, width: int = 32) -> np.ndarray:
    vectors = rng.standard_normal((count, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def slow_search(vectors, queries, k, threshold=None):
    """All scores in float64, sorted, equal ones by row."""
    answers = []
    for query in queries:
        scores = [float((v.astype(np.float64) * query).sum()) for v in vectors]
        order = sorted(range(len(vectors)), key=lambda row: (-scores[row], row))
        order = [r for r in order if threshold is None or scores[r] >= threshold][: k or None]
        answers.append((order, [scores[r] for r in order]))
    return answers


def same(found, expected):
    assert len(found) == len(expected)
    for (rows, scores), (slow_rows, slow_scores) in zip(found, expected, strict=True):
        assert rows.tolist() == slow_rows
        np.testing.assert_allclose(scores, slow_scores, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("count", "queries"), [(1, 1), (300, 1), (257, 5), (700, 300)])
@pytest.mark.parametrize(("k", "threshold"), [(1, None), (10, None), (0, 0.2), (400, None)])
def test_search_is_that_of_a_slow_reference(monkeypatch, count, queries, k, threshold):
    monkeypatch.setattr(search, "ROWS", 64)  # many blocks, and a short last one
    rng = np.random.default_rng(count)
    vectors, asked = units(rng, count), units(rng, queries)[:20].repeat(max(1, queries // 20), 0)
    some = slice(None, None, max(1, len(asked) // 8))
    found = search.search(vectors, asked, k, threshold)
    same(found[some], slow_search(vectors, asked[some], k, threshold))


def test_equal_scores_are_in_the_order_of_rows_whatever_is_asked_beside(monkeypatch):
    rng = np.random.default_rng(0)
    vectors = units(rng, 40)[rng.integers(0, 40, 3000)]  # about 75 copies of each
    asked = units(rng, 33)
    expected = slow_search(vectors, asked[:2], 100)
    for rows in (64, 1000, 16384):
        monkeypatch.setattr(search, "ROWS", rows)
        same(search.search(vectors, asked, 100)[:2], expected)
        same(search.search(vectors, asked[:1], 100), expected[:1])


def test_what_float32_cannot_tell_apart_is_ordered_in_float64():
    rng = np.random.default_rng(1)
    query = units(rng, 1)
    vectors = np.repeat(query, 500, 0) + rng.integers(-2, 3, (500, 32)) * np.float32(6e-8)
    vectors = vectors.astype(np.float32)
    products = (vectors @ query[0]).argsort(kind="stable")[::-1]
    expected = slow_search(vectors, query, 50)
    assert products[:50].tolist() != expected[0][0]  # the test would show a plain product
    same(search.search(vectors, query, 50), expected)


def test_nothing_to_find():
    empty = np.empty((0, 8), np.float32)
    ((rows, scores),) = search.search(empty, np.ones((1, 8), np.float32), 5)
    assert (len(rows), len(scores)) == (0, 0)
    assert search.search(np.ones((3, 8), np.float32), empty, 5) == []
    eye = np.eye(8, dtype=np.float32)
    ((rows, _),) = search.search(eye, -eye[:1], 0, 0.5)
    assert len(rows) == 0


def test_a_mapped_file_is_not_loaded(tmp_path):
    rng = np.random.default_rng(2)
    file = tmp_path / "v.f32"
    with file.open("wb") as stream:
        for _ in range(20):
            stream.write(units(rng, 10_000, 64).tobytes())  # 51 MB in all
    vectors = np.memmap(file, "<f4", "r", shape=(200_000, 64))
    tracemalloc.start()
    search.search(vectors, units(rng, 4, 64), 10)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4e6
