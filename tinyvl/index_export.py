"""An index in the files that other engines load, for sets past what one machine searches exactly.

    parquet   a row a picture: ``path`` and ``vector`` (a list of d float32 of fixed size). The
              schema's metadata name the model. LanceDB and DuckDB read it; Qdrant and pgvector are
              filled from its columns.
    faiss     a FAISS ``IndexFlatIP``, and beside it ``FILE.json``: the model and the path of each
              of its rows.

Vectors have length one, so the inner product is the cosine. Captions stay in the index.
"""

import json
import os
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from tinyvl import UserError
from tinyvl.files import dump, replace_file, write_text
from tinyvl.index import Index, read_about

BLOCK = 65536  # rows in memory at once
PACKAGES = {"faiss": ("faiss", "faiss-cpu"), "parquet": ("pyarrow.parquet", "pyarrow")}


def export(folder: Path, out: Path, kind: str) -> int:
    """Writes the pictures of an index as a ``kind`` of `PACKAGES`; -> how many there are.

    ``folder``: the index's, or one of pictures with its index in it. UserError: there is none, it
    is damaged, the package of that kind is not installed, or the file cannot be written.
    """
    from tinyvl.search_open import HIDDEN

    module, package = PACKAGES[kind]
    try:
        library = import_module(module)
    except ImportError:
        advice = f"pip install {package}, or 'tinyvl[export]'"
        raise UserError(f"--export {kind} needs the package {package}: {advice}.", 2) from None
    inside = read_about(folder) is None and (folder / HIDDEN).is_dir()
    index = Index(folder / HIDDEN if inside else folder)
    rows = [os.path.join(index.root, row.path) for row in index.images.rows()]
    paths = [path.encode("utf-8", "backslashreplace").decode() for path in rows]
    about = {name: index.about[name] for name in ("model", "fingerprint", "width")}
    write: Callable[..., None] = {"faiss": write_faiss, "parquet": write_parquet}[kind]
    write(library, out, paths, index.images.vectors, about)
    return len(paths)


def blocks(vectors: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Rows that are next to each other, as a matrix in memory."""
    for start in range(0, len(vectors), BLOCK):
        rows = slice(start, start + BLOCK)
        yield rows, np.ascontiguousarray(vectors[rows], np.float32)


def write_faiss(
    faiss: Any, out: Path, paths: list[str], vectors: np.ndarray, about: dict[str, Any]
) -> None:
    index = faiss.IndexFlatIP(about["width"])
    for _, part in blocks(vectors):
        index.add(part)

    def write(file: Path) -> None:
        try:
            faiss.write_index(index, str(file))
        except RuntimeError as error:  # so it calls a full disk, too
            raise OSError(None, str(error).splitlines()[-1]) from error

    replace_file(out, write)
    write_text(out.with_name(f"{out.name}.json"), dump(about | {"paths": paths}) + "\n")


def write_parquet(
    parquet: Any, out: Path, paths: list[str], vectors: np.ndarray, about: dict[str, Any]
) -> None:
    import pyarrow

    kind = pyarrow.list_(pyarrow.float32(), about["width"])
    told = {"tinyvl": json.dumps(about)}
    schema = pyarrow.schema([("path", pyarrow.string()), ("vector", kind)], metadata=told)

    def write(file: Path) -> None:
        with parquet.ParquetWriter(file, schema) as writer:
            for rows, part in blocks(vectors):
                numbers = pyarrow.array(part.ravel())
                lists = pyarrow.FixedSizeListArray.from_arrays(numbers, about["width"])
                columns = [pyarrow.array(paths[rows], pyarrow.string()), lists]
                writer.write_batch(pyarrow.record_batch(columns, schema=schema))

    replace_file(out, write)
