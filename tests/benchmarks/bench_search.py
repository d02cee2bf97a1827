"""Exact search: against numpy's matrix product, against faiss's flat index, and from the shell.

    python tests/benchmarks/bench_search.py [--rows 10000 100000 1000000] [--width 256]
    python tests/benchmarks/bench_search.py --index DIR

Times are of one processor's work (`time.process_time`), the median of turns, so that a busy machine
disturbs the ratios little; memory is the most that 256 queries take. faiss, if it is installed, is
timed as it comes and with its matrix product forced, which it keeps for larger batches by itself;
the rows found are compared first.
``--index`` times `tinyvl retrieve --query "a dog"` on an index, as a process of its own.
"""

import argparse
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
from timing import Report, Ways, alternate, parser

from tinyvl.search import search


def units(rng: np.random.Generator, count: int, width: int) -> np.ndarray:
    vectors = rng.standard_normal((count, width), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def in_memory(options: argparse.Namespace, folder: str, count: int, report: Report) -> None:
    """Searches among ``count`` vectors of a mapped file."""
    rng = np.random.default_rng(0)
    file = Path(folder, f"{count}.f32")
    with file.open("wb") as stream:
        for start in range(0, count, 50_000):
            stream.write(units(rng, min(50_000, count - start), options.width).tobytes())
    mapped = np.memmap(file, "<f4", "r", shape=(count, options.width))
    queries = units(rng, 256, options.width)
    best = search(mapped, queries[:1], 10)[0][0]
    assert best[0] == (mapped @ queries[0]).argmax()
    case = f"{count:,} x {options.width}, 10 best"
    ways: Ways = {
        "tinyvl": lambda: search(mapped, queries[:1], 10),
        "numpy's product alone": lambda: mapped @ queries[0],
    }
    report.speed(f"1 query, {case}", alternate(ways, options, times=3), "tinyvl", 1, "queries")
    ways = {"tinyvl": lambda: search(mapped, queries, 10)} | flat(mapped, queries, report)
    report.speed(f"256 queries, {case}", alternate(ways, options), "tinyvl", 256, "queries")
    tracemalloc.start()
    search(mapped, queries, 10)
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    report.add(f"256 queries, {case}", ours=peak, unit="MiB beside the file")
    file.unlink()


def flat(mapped: np.ndarray, queries: np.ndarray, report: Report) -> Ways:
    """faiss's ways of the same search, if it is installed; its rows are compared."""
    try:
        import faiss
    except ImportError:
        report.add("faiss", note="not installed: not compared")
        return {}
    faiss.omp_set_num_threads(1)
    index = faiss.IndexFlatIP(mapped.shape[1])
    index.add(np.array(mapped))
    usual = faiss.cvar.distance_compute_blas_threshold

    def blas(threshold: int) -> np.ndarray:
        faiss.cvar.distance_compute_blas_threshold = threshold
        return index.search(queries, 10)[1]

    agree = (np.stack([rows for rows, _ in search(mapped, queries, 10)]) == blas(1)).mean()
    assert agree > 0.999, agree  # two nearly as near may change places
    return {"faiss flat": lambda: blas(usual), "faiss flat, matrix product": lambda: blas(1)}


def from_the_shell(index: str, rounds: int) -> None:
    command = [sys.executable, "-m", "tinyvl.cli", "retrieve", "--index", index]
    for _ in range(rounds):
        start = time.perf_counter()
        done = subprocess.run([*command, "--query", "a dog"], capture_output=True, text=True)
        took = time.perf_counter() - start
        print(f"tinyvl retrieve: {took:.2f} s, status {done.returncode}, {done.stdout[:40]!r}")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    options.add_argument("--width", type=int, default=256)
    options.add_argument("--index", help="an index to time the command on")
    options = options.parse_args()
    if options.index:
        from_the_shell(options.index, options.repeats)
        return
    options.cpu = True
    report = Report("search", options)
    with tempfile.TemporaryDirectory() as folder:
        for count in options.rows:
            in_memory(options, folder, count, report)
    report.show()


if __name__ == "__main__":
    main()
