"""Exact search: against numpy's matrix product, against faiss's flat index, and from the shell.

    python tests/benchmarks/bench_search.py [--rows 1000000] [--width 256] [--index DIR]

Times are of one processor's work (`time.process_time`), the best of some rounds in which all ways
take turns, so that a busy machine disturbs the ratios little. faiss, if it is installed, is timed
as it comes and with its matrix product forced, which it keeps for larger batches by itself.
``--index`` times `tinyvl retrieve --query "a dog"` on an index, as a process of its own.
"""

import argparse
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tinyvl.search import search


def units(rng: np.random.Generator, count: int, width: int) -> np.ndarray:
    vectors = rng.standard_normal((count, width), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def seconds(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.process_time()
            way()
            best[name] = min(best[name], time.process_time() - start)
    return best


def in_memory(options: argparse.Namespace, folder: str) -> None:
    rng = np.random.default_rng(0)
    file = Path(folder, "vectors.f32")
    with file.open("wb") as stream:
        for start in range(0, options.rows, 50_000):
            count = min(50_000, options.rows - start)
            stream.write(units(rng, count, options.width).tobytes())
    shape = (options.rows, options.width)
    mapped = np.memmap(file, "<f4", "r", shape=shape)
    queries = units(rng, 256, options.width)
    ways: dict[str, Callable[[], object]] = {
        "numpy, 1 query": lambda: mapped @ queries[0],
        "search, 1 query": lambda: search(mapped, queries[:1], 10),
        "search, 256 queries": lambda: search(mapped, queries, 10),
    }
    try:
        import faiss
    except ImportError:
        print("faiss is not installed: not compared")
    else:
        faiss.omp_set_num_threads(1)
        flat = faiss.IndexFlatIP(options.width)
        flat.add(np.array(mapped))
        usual = faiss.cvar.distance_compute_blas_threshold

        def blas(threshold: int) -> np.ndarray:
            faiss.cvar.distance_compute_blas_threshold = threshold
            return flat.search(queries, 10)[1]

        ways |= {
            "faiss, 256 queries": lambda: blas(usual),
            "faiss, 256 queries, matrix product": lambda: blas(1),
        }
        agree = np.stack([rows for rows, _ in search(mapped, queries, 10)]) == blas(1)
        print(f"rows that agree with faiss: {agree.mean():.4f}")
    best = seconds(ways, options.rounds)
    print(f"{options.rows:,} x {options.width}, the 10 best, one processor")
    for name, value in best.items():
        print(f"{name:36} {value:8.3f} s")
    print(f"1 query: x{best['search, 1 query'] / best['numpy, 1 query']:.2f} of numpy's product")
    for name in ways:
        if name.startswith("faiss"):
            print(f"256 queries: x{best['search, 256 queries'] / best[name]:.2f} of {name}")
    tracemalloc.start()
    search(mapped, queries, 10)
    print(f"peak memory of 256 queries: {tracemalloc.get_traced_memory()[1] / 2**20:.0f} MiB")
    print(f"(the file: {file.stat().st_size / 2**20:.0f} MiB, mapped)")


def from_the_shell(index: str, rounds: int) -> None:
    command = [sys.executable, "-m", "tinyvl.cli", "retrieve", "--index", index]
    for _ in range(rounds):
        start = time.perf_counter()
        done = subprocess.run([*command, "--query", "a dog"], capture_output=True, text=True)
        took = time.perf_counter() - start
        print(f"tinyvl retrieve: {took:.2f} s, status {done.returncode}, {done.stdout[:40]!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--index", help="an index to time the command on")
    options = parser.parse_args()
    if options.index:
        from_the_shell(options.index, options.rounds)
        return
    with tempfile.TemporaryDirectory() as folder:
        in_memory(options, folder)


if __name__ == "__main__":
    main()
