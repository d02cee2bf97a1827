"""An index written for other engines, and the README's recipe for one of them."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import shell
from dual import Dual
from test_index import paint, refresh
from test_readme import README

import tinyvl
from tinyvl.index import Index


@pytest.fixture
def photos(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "photos"
    for i in range(7):
        paint(folder / f"{i} é.png", i)
    refresh(folder / ".tinyvl", folder)
    monkeypatch.chdir(tmp_path)
    return folder


def rows_of(photos: Path) -> tuple[list[str], np.ndarray]:
    found = Index(photos / ".tinyvl").images
    return [str(photos / row.path) for row in found.rows()], np.asarray(found.vectors)


@pytest.mark.parametrize("name", ["photos", "photos/.tinyvl"])
def test_parquet_has_paths_vectors_and_the_model(photos, name, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    from tinyvl import index_export

    monkeypatch.setattr(index_export, "BLOCK", 3)
    done = shell.run("index", "--export", "parquet", name, "-o", "out.parquet")
    assert (done.returncode, done.stdout) == (0, "out.parquet\n")
    assert done.stderr == "out.parquet: 7 vectors\n"
    table = parquet.read_table("out.parquet")
    paths, vectors = rows_of(photos)
    assert table["path"].to_pylist() == paths
    assert np.array_equal(np.array(table["vector"].to_pylist(), np.float32), vectors)
    about = json.loads(table.schema.metadata[b"tinyvl"])
    assert about == {"model": "m", "fingerprint": "one", "width": 16}


def test_the_recipe_of_the_readme_finds_what_retrieve_finds(photos, monkeypatch, capsys):
    pytest.importorskip("faiss")
    command = re.search(r"^\$ tinyvl (index --export faiss .*)$", README, re.MULTILINE)[1]
    done = shell.run(*command.split())
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(tinyvl, "load", lambda name, task: Model())
    recipe = next(c for c in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "faiss" in c)
    exec(recipe, {})
    paths, vectors = rows_of(photos)
    best = np.argsort(-(vectors @ Dual().embed_texts(["a dog"])[0].numpy()))[:3]
    assert capsys.readouterr().out == f"{[paths[row] for row in best]}\n"


class Model(Dual):
    def embed_texts(self, texts: str):
        return super().embed_texts([texts])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--export", "csv", "photos", "-o", "x"], "--export is faiss or parquet, not 'csv'"),
        (["--export", "faiss", "photos"], "Name the file with -o FILE"),
        (["--export", "faiss", "photos", "-o", "x", "--retry"], "the index as it is: leave out"),
        (["--export", "faiss", ".", "-o", "x"], "no index there; make one with tinyvl index"),
    ],
)
def test_what_cannot_be_written_is_refused(photos, words, told):
    if "." in words:
        pytest.importorskip("faiss")
    done = shell.run("index", *words)
    assert done.returncode == 2
    assert told in done.stderr
    assert not Path("x").exists()


@pytest.mark.parametrize(("kind", "package"), [("faiss", "faiss-cpu"), ("parquet", "pyarrow")])
def test_without_the_package_a_sentence_names_it(photos, monkeypatch, kind, package):
    from tinyvl import index_export

    def without(name: str):
        raise ImportError(name)

    monkeypatch.setattr(index_export, "import_module", without)
    done = shell.run("index", "--export", kind, "photos", "-o", "x")
    assert done.returncode == 2
    assert f"needs the package {package}: pip install {package}" in done.stderr
