"""Checkpoint folders: what is in them, and what is refused."""

import inspect
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import shell
import torch
from safetensors.torch import load_file, save_file
from tiny import write_decoder, write_vision

from tinyvl import UserError, device, files, hub, models, models_config, presets, text, train
from tinyvl.captioner import Captioner
from tinyvl.lilt import LilT

CPU = torch.device("cpu")


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    config = models.new_config(
        "itune",
        str(write_decoder(tmp_path / "lm", "llama", ["a red dog"])),
        str(write_vision(tmp_path / "vision")),
        fit="crop",
        prompt="a",
        options={"drop": 1, "bottleneck": 8},
    )
    model = models.build(config, device=CPU, precision=torch.float32)
    for parameter in model.itune.parameters():
        parameter.data += torch.randn_like(parameter)
    (tmp_path / "out").mkdir()
    models.save_config(tmp_path / "out", config)
    models.save(model, tmp_path / "out")
    return tmp_path / "out"


def test_what_is_saved_is_what_is_loaded(checkpoint):
    model = models.load(str(checkpoint), device=CPU)
    saved = load_file(checkpoint / "model.safetensors")
    state = models.trainable_state(model)
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[n], state[n]) for n in saved)
    assert not any(p.requires_grad for p in model.parameters())
    assert model.prompt == model.text.encode(["a"])[0]
    assert sorted(p.name for p in checkpoint.iterdir()) == ["config.json", "model.safetensors"]


def test_a_checkpoint_is_read_once(checkpoint, monkeypatch):
    found = models.open_checkpoint(str(checkpoint))
    assert (found.method, found.task, found.modality) == ("itune", "caption", "image")
    assert (found.reads, found.image["fit"]) == ("tokens", "crop")
    monkeypatch.setattr(models, "read_config", None)
    model = models.load(found, device=CPU)
    assert (
        models.trainable_state(model).keys() == load_file(found.folder / "model.safetensors").keys()
    )
    with pytest.raises(UserError, match="out: this model does not embed") as error:
        models.load(found, task="retrieve", device=CPU)
    assert error.value.status == 2


METHOD = sorted(
    name
    for name in {*vars(models.Method), *models.Method.__annotations__}
    if not name.startswith("_")
)


@pytest.mark.parametrize("kind", [Captioner, LilT])
def test_captioners_and_lilt_are_methods(kind, checkpoint):
    """They have all of `models.Method`, and its functions take what it says."""
    if kind is LilT:
        row = presets.PRESETS["lilt-da-tiny"]
        config = {
            "format": 1, "method": "lilt", "options": row.options,
            "text": {"name": "t", "config": presets.CONFIGS[row.language]},
            "image": {"name": "i", "fit": row.fit, "config": {"architecture": row.vision}},
        }  # fmt: skip
        model = models.build(config, device=CPU, precision=torch.float32, weights=False)
    else:
        model = models.load(str(checkpoint), device=CPU)
    assert isinstance(model, models.Method)
    assert len(METHOD) > 20
    for name in METHOD:
        asked = getattr(models.Method, name, None)
        if inspect.isfunction(asked) and name != "to":  # which takes *args
            given = inspect.signature(getattr(model, name)).parameters
            names = list(inspect.signature(asked).parameters)[1:]
            assert list(given)[: len(names)] == names, name
            assert all(p.default is not p.empty for p in list(given.values())[len(names) :]), name


def test_loading_a_captioner_imports_no_other_method(checkpoint):
    code = (
        "import sys; from tinyvl import models; models.load(sys.argv[1]); "
        "print(*(m for m in sys.modules if m.startswith('tinyvl')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(checkpoint)], capture_output=True, text=True, check=True
    )
    rooms = set(done.stdout.replace("tinyvl.", "").split())
    assert "itune" in rooms
    assert not rooms & {"epalm", "clipcap", "lilt", "lilt_towers", "bert", "encoders_text", "data"}


def test_half_precision_weights_load_as_float32(checkpoint):
    saved = load_file(checkpoint / "model.safetensors")
    save_file({n: t.half() for n, t in saved.items()}, checkpoint / "model.safetensors")
    state = models.trainable_state(models.load(str(checkpoint), device=CPU))
    assert all(t.dtype == torch.float32 for t in state.values())
    assert all(torch.allclose(state[n], saved[n], atol=1e-2) for n in saved)


def test_a_run_from_a_checkpoint_has_its_parts(checkpoint):
    start, config = models.start_of(str(checkpoint), "itune"), models.read_config(checkpoint)
    assert start == {
        "language": config["decoder"]["name"], "vision": config["vision"]["name"], "fit": "crop",
        "prompt": "a", "options": {"drop": 1, "bottleneck": 8}, "media": {},
    }  # fmt: skip
    with pytest.raises(UserError, match="another method than epalm"):
        models.start_of(str(checkpoint), "epalm")


def test_an_encoder_of_sounds_is_fetched_as_one():
    assert models_config.role_of("vision", {"modality": "audio"}) == "audio"
    assert {side: models_config.role_of(side, {}) for side in models_config.ROLES} == {
        "decoder": "decoder", "vision": "vision", "text": "text", "image": "vision",
    }  # fmt: skip


def test_other_backbone_weights_are_refused(checkpoint):
    write_decoder(checkpoint.parent / "lm", "llama", ["a red dog"], seed=1)
    with pytest.raises(UserError, match="not those this model was trained with"):
        models.load(str(checkpoint), device=CPU)


@pytest.mark.parametrize("change", ["more", "fewer", "shape"])
def test_weights_that_do_not_fit_are_refused(checkpoint, change):
    saved = load_file(checkpoint / "model.safetensors")
    name = "itune.1.q.weight"
    if change == "more":
        saved["itune.0.q.weight"] = saved[name].clone()
    elif change == "fewer":
        del saved[name]
    else:
        saved[name] = saved[name][:4].clone()
    save_file(saved, checkpoint / "model.safetensors")
    with pytest.raises(UserError, match=r"do not fit the model \(itune\.[01]\.q"):
        models.load(str(checkpoint), device=CPU)


@pytest.mark.parametrize("damage", [b"", b"not a safetensors file at all"])
def test_damaged_weights_are_one_sentence(checkpoint, damage):
    (checkpoint / "model.safetensors").write_bytes(damage)
    with pytest.raises(UserError, match="cannot be read"):
        models.load(str(checkpoint), device=CPU)


def test_another_method_or_format_is_named(checkpoint):
    config = models.read_config(checkpoint)
    for change in ({"method": "telepathy"}, {"format": 9}):
        models.save_config(checkpoint, config | change)
        with pytest.raises(UserError, match=r"telepathy|9"):
            models.load(str(checkpoint), device=CPU)


def test_no_pickle_is_ever_read(checkpoint):
    shutil.move(checkpoint / "model.safetensors", checkpoint / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"model\.safetensors"):
        models.load(str(checkpoint), device=CPU)


def test_writing_is_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "config.json"
    files.write_text(file, "old")

    def full(part: Path) -> None:
        part.write_text("half of the n")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left"):
        files.replace_file(file, full)
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["config.json"]


def test_a_pipe_is_written_to_and_stays_a_pipe(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    files.write_text(pipe, "all of it")
    assert os.read(reader, 100) == b"all of it"
    os.close(reader)
    assert pipe.is_fifo()


def test_inspect_needs_neither_weights_nor_network(checkpoint, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(hub, "fetch", refuse)
    shutil.rmtree(checkpoint.parent / "lm")
    found = models.inspect(str(checkpoint))
    # two modules: q, k, v with biases, and o, at r = 8 between d = 48 and D = 32
    assert found["trainable_parameters"] == 2 * (2 * 48 * 8 + 2 * 32 * 8 + 3 * 8 + 48)
    assert found["method"] == "itune"
    for name in (n for n, row in presets.PRESETS.items() if row.method == "itune"):
        preset = models.inspect(name)
        assert preset["trainable_percent"] == pytest.approx(
            100 * preset["trainable_parameters"] / preset["total_parameters"], abs=1e-3
        )


def test_presets_are_the_papers_rows():
    for name, batch, epochs in (("itune-base", 4096, 30), ("itune-large-drop18", 4096, 30)):
        recipe = models.inspect(name)["recipe"]
        assert (recipe["batch"], recipe["epochs"]) == (batch, epochs)
    with pytest.raises(UserError, match="itune-base"):
        presets.preset("itune-huge", "itune")
    with pytest.raises(UserError, match="neither a preset nor a checkpoint"):
        models.inspect("itune-huge")


def test_the_shipped_model_is_small_and_of_the_default_backbones():
    folder = models.checkpoint_folder("default")
    assert (folder / "model.safetensors").stat().st_size <= 24 * 2**20
    config = models.read_config(folder)
    assert config["decoder"]["name"] == "SmolLM2-135M"
    assert config["vision"]["name"] == "EfficientNet-Lite2"
    state = load_file(folder / "model.safetensors")
    assert all(t.dtype == torch.float16 for t in state.values())
    assert models.inspect("default")["trainable_parameters"] == sum(
        t.numel() for t in state.values()
    )
    card = (folder / "README.md").read_text()
    assert "Flickr8k" in card
    assert "research" in card
    assert json.dumps(config).count("/") < 3  # no path of the machine it was trained on


def test_the_shipped_models_shape_is_a_preset():
    """So that one cache of features serves both, and the small recipe is small."""
    row, shipped = models.inspect("itune-default"), models.inspect("default")
    for key in ("trainable_parameters", "vision_options"):
        assert row[key] == shipped[key]
    small = models.inspect("small")
    assert small["trainable_parameters"] < shipped["trainable_parameters"] / 3
    for own in presets.PRESETS["itune-default"], presets.preset(None, "itune"):
        media = own.job["media"]
        assert presets.maps_read(own, None, {}) == media
        assert presets.maps_read(own, own.vision, {"lower": 1, "larger": 0}) == {"lower": 1}
        assert presets.maps_read(own, "resnet50", {}) == {}
        assert presets.maps_read(own, "resnet50", {"larger": 448}) == {"larger": 448}


@pytest.mark.parametrize(
    ("asked", "options", "media"),
    [
        ([], {"bottleneck": 144, "drop": 24, "rank": 120}, {"lower": 2}),
        (["--lm", "gpt2"], {"rank": 120}, {"lower": 2}),
        (["--lm", "SmolLM2-135M", "--drop", "9", "--lower", "0", "--larger", "390"],
         {"bottleneck": 144, "drop": 9}, {"larger": 390}),
        (["--vision", "resnet50", "--larger", "448"], {"bottleneck": 144, "drop": 24},
         {"larger": 448}),
        (["--vision", "resnet50", "--lower", "2"], {"bottleneck": 144, "drop": 24}, {"lower": 2}),
        (["--preset", "itune-default"], {"bottleneck": 104, "rank": 120, "dropout": 0.1},
         {"lower": 2, "larger": 390}),
        (["--preset", "itune-default", "--lm", "gpt2"], {"rank": 120, "dropout": 0.1},
         {"lower": 2, "larger": 390}),
        (["--preset", "itune-large-drop18", "--lm", "gpt2"], {}, {}),
    ],
)  # fmt: skip
def test_a_presets_sizes_are_for_its_own_backbones(asked, options, media, monkeypatch):
    jobs = []
    monkeypatch.setattr(train, "train", lambda job, run: jobs.append(job) or {})
    done = shell.run("train", "itune", "--data", "d", "--device", "cpu", *asked)
    assert done.returncode == 0, done.stderr
    assert (jobs[0].options, jobs[0].media) == (options, media)


def test_precision_and_device_choose_themselves():
    assert device.choose_precision(None, CPU) == torch.float32
    assert device.choose_precision("bf16", CPU) == torch.bfloat16
    with pytest.raises(UserError, match="fp8"):
        device.choose_precision("fp8", CPU)
    with pytest.raises(UserError, match="nonsense"):
        device.choose_device("nonsense")


TEXTS = ["a dog runs", " A  dog, isn't it?", "Zwei Hunde über 3 Zäune.", "犬と猫 🐕", ""]


@pytest.mark.parametrize("kind", ["tokenizer.json", "vocab.json"])
def test_texts_are_read_as_transformers_reads_them(kind, tmp_path):
    """From tokenizer.json alone, and from GPT-2's older files that OPT has."""
    from transformers import AutoTokenizer

    if kind == "tokenizer.json":
        folder = hub.fetch("SmolLM2-135M", "decoder") if hub.available("SmolLM2-135M") else None
        if folder is None:
            pytest.skip("SmolLM2-135M is not in the cache")
    else:
        folder = tmp_path
        letters = "".join(sorted({*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,?'Ġ"}))
        words = ["<pad>", "</s>", "<unk>", *letters, "do", "dog", "Ġdog"]
        (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
        (folder / "merges.txt").write_text("#version: 0.2\nd o\ndo g\nĠ dog\n")
        names = {
            "bos_token": "</s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
        }
        config = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, **names}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / "config.json").write_text(json.dumps({"model_type": "opt"}))
    ours, peer = text.read_text(folder, {}), AutoTokenizer.from_pretrained(folder)
    texts = TEXTS if kind == "tokenizer.json" else TEXTS[:2]
    encoded = ours.encode(texts)
    assert encoded == peer(texts, add_special_tokens=False)["input_ids"]
    for ids in encoded:
        with_end = [ours.bos, *ids, ours.eos]
        assert ours.decode(with_end) == " ".join(
            peer.decode(with_end, skip_special_tokens=True).split()
        )
    assert (ours.bos, ours.eos) == (peer.bos_token_id, peer.eos_token_id)


def test_the_shipped_model_for_search_is_small_and_of_the_default_backbones():
    folder = models.DEFAULT["retrieve"]
    assert (folder / "model.safetensors").stat().st_size <= 12 * 2**20
    config = models.read_config(folder)
    assert (config["text"]["name"], config["image"]["name"]) == (
        presets.SMALL["lilt"].language, presets.SMALL["lilt"].vision,
    )  # fmt: skip
    kept = load_file(folder / "model.safetensors")
    model = models.build(
        config, device=torch.device("meta"), precision=torch.float32, weights=False
    )
    own = models.trainable_state(model)
    assert {n: t.shape for n, t in kept.items()} == {n: t.shape for n, t in own.items()}


@pytest.mark.skipif(not models.DEFAULT["vqa"].exists(), reason="not shipped yet")
def test_the_shipped_model_for_answers_is_small_and_of_the_default_backbones():
    folder = models.checkpoint_folder("default", "vqa")
    assert (folder / "model.safetensors").stat().st_size <= 24 * 2**20
    config = models.read_config(folder)
    assert (config["decoder"]["name"], config["vision"]["name"]) == (
        presets.SMALL["epalm"].language, presets.SMALL["epalm"].vision,
    )  # fmt: skip
    assert models.Checkpoint(folder, config).task == "vqa"
    kept = load_file(folder / "model.safetensors")
    found = models.inspect("default", "vqa")
    assert found["trainable_parameters"] == sum(tensor.numel() for tensor in kept.values())
    assert "research" in (folder / "README.md").read_text()
    assert json.dumps(config).count("/") < 3  # no path of the machine it was trained on
