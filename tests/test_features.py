"""The feature cache: its numbers, that it survives being killed, and what it refuses."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import write_vision
from worlds import CPU, Pairs, after, content, fill, loaded, paint

from tinyvl import UserError, encoders, features, media_workers
from tinyvl.features import FeatureStore, open_store
from tinyvl.presets import Run
from tinyvl.train_run import Interrupted

FLICKR = Path(__file__).parents[2] / "shared/data/pairs/flickr8k_test.jsonl"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Pairs:
    return paint(tmp_path_factory.mktemp("pictures"), 150)


@pytest.fixture(scope="module")
def vision(tmp_path_factory) -> Path:
    return write_vision(tmp_path_factory.mktemp("vision") / "vit")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(features, "SHARD_ROWS", 32)


@pytest.mark.parametrize("architecture", ["vit", "test_efficientnet", "test_resnet"])
def test_features_are_what_the_encoder_makes_of_each_picture(
    architecture, pictures, vision, tmp_path
):
    if architecture != "vit":
        vision = write_vision(tmp_path / "cnn", architecture, {})
    found = fill(tmp_path / "out", pictures[:40], vision)
    assert (found["extracted"], found["kept"], found["failed"]) == (40, 0, 0)
    store = FeatureStore.open(tmp_path / "out")
    encoder = loaded(vision)[1]
    transform = encoder.transform()
    assert len(store) == 40
    for i in (0, 17, 39):
        path, id = pictures[i]
        row = store.find(path).row
        assert store.find("/moved/" + Path(path).name, id).row == row
        one = encoder(transform(Image.open(path).convert("RGB"))[None])
        tokens, levels = store.tokens([row]), store.summaries([row])
        assert tokens.dtype == torch.float16
        torch.testing.assert_close(tokens.float(), one.tokens, rtol=2**-10, atol=1e-5)
        assert len(levels) == len(one.summaries)
        for ours, theirs in zip(levels, one.summaries, strict=True):
            torch.testing.assert_close(ours.float(), theirs, rtol=2**-10, atol=1e-5)
    some = store.tokens([39, 0, 0])
    assert torch.equal(some[1], store.tokens([0])[0])
    assert torch.equal(some[1], some[2])
    assert not torch.equal(some[0], some[1])


def test_kept_as_bf16_or_fp32_or_tokens_or_summaries_alone(pictures, vision, tmp_path):
    fill(tmp_path / "both", pictures[:10], vision)
    fill(tmp_path / "bf16", pictures[:10], vision, dtype="bf16", what="tokens")
    fill(tmp_path / "short", pictures[:10], vision, what="summaries")
    fill(tmp_path / "exact", pictures[:10], vision, dtype="fp32")
    both, bf16, short, exact = (
        FeatureStore.open(tmp_path / name) for name in ("both", "bf16", "short", "exact")
    )
    rows = list(range(10))
    assert bf16.tokens(rows).dtype == torch.bfloat16
    torch.testing.assert_close(
        bf16.tokens(rows).float(), both.tokens(rows).float(), rtol=2**-7, atol=1e-3
    )
    assert all(map(torch.equal, short.summaries(rows), both.summaries(rows)))
    assert bf16.summaries(rows) == []
    with pytest.raises(UserError, match="tokens are not kept"):
        short.tokens(rows)
    encoder = loaded(vision)[1]
    seen = encoder(
        torch.stack([encoder.transform()(Image.open(path)) for path, _ in pictures[:10]])
    )
    assert torch.equal(exact.tokens(rows), seen.tokens)
    assert all(map(torch.equal, exact.summaries(rows), seen.summaries))
    size = {n: len(content(tmp_path / n)["00000.safetensors"]) for n in ("both", "short")}
    assert size["both"] == pytest.approx(size["short"] + 10 * 17 * 32 * 2, abs=200)


def test_features_that_are_not_finite_are_not_kept(pictures, vision, tmp_path, monkeypatch, capsys):
    bad = {3: float("nan"), 40: float("inf"), 41: 1e6}  # the last is too large for fp16 alone
    colour, plain = {}, encoders.ImageEncoder.forward
    view = loaded(vision)[1].view()
    for row in bad:
        colour[row] = view(Image.open(pictures[row][0]).convert("RGB"))

    def forward(self, images):
        seen = plain(self, images)
        for row, value in bad.items():
            same = (images == colour[row]).flatten(1).all(1)
            seen.summaries[-1][same, 0] = value
        return seen

    monkeypatch.setattr(encoders.ImageEncoder, "forward", forward)
    found = fill(tmp_path / "half", pictures[:50], vision)
    assert (found["extracted"], found["failed"]) == (47, 3)
    said = capsys.readouterr().err
    for row in bad:
        assert (
            f"skipping {pictures[row][0]}: its features are not finite numbers in float16" in said
        )
    assert fill(tmp_path / "whole", pictures[:50], vision, dtype="fp32")["failed"] == 2
    monkeypatch.undo()
    fill(tmp_path / "good", pictures[:50], vision)
    half, good = (FeatureStore.open(tmp_path / name) for name in ("half", "good"))
    for row in (0, 2, 4, 39, 42, 49):
        rows = [store.find(pictures[row][0]).row for store in (half, good)]
        assert torch.equal(half.tokens(rows[:1]), good.tokens(rows[1:]))
    assert half.find(pictures[3][0]).row is None


def test_interrupted_anywhere_it_ends_with_the_same_bytes(pictures, vision, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"none")
    wanted = [*pictures[:40], (str(broken), "broken"), *pictures[40:]]
    fill(tmp_path / "whole", wanted, vision)
    whole = content(tmp_path / "whole")
    assert [n for n in whole if n[0] == "0"] == [f"0000{i}.safetensors" for i in range(5)]
    for questions in (0, 1, 3):
        with pytest.raises(Interrupted):
            fill(tmp_path / "parts", wanted, vision, after(questions))
        if "manifest.json" not in content(tmp_path / "parts"):
            with pytest.raises(UserError, match="did not finish" if questions else "no features"):
                FeatureStore.open(tmp_path / "parts")
        (tmp_path / "parts/.00009.safetensors.123").write_bytes(b"left by a kill")
    assert 0 < len(content(tmp_path / "parts")) < len(whole) + 1
    fill(tmp_path / "parts", wanted, vision)
    assert content(tmp_path / "parts") == whole
    again = fill(tmp_path / "parts", wanted, vision)
    assert (again["extracted"], again["kept"], again["failed"]) == (0, 150, 1)
    assert content(tmp_path / "parts") == whole


def test_more_data_adds_what_is_new_and_touches_nothing_else(
    pictures, vision, tmp_path, monkeypatch
):
    fill(tmp_path / "out", pictures[:40], vision)
    before = content(tmp_path / "out")
    decoded = []
    real = media_workers.decode_images

    def spy(paths, *args, **kwargs):
        decoded.extend(paths := list(paths))
        return real(paths, *args, **kwargs)

    monkeypatch.setattr(media_workers, "decode_images", spy)
    found = fill(tmp_path / "out", pictures[20:80], vision)
    assert decoded == [path for path, _ in pictures[40:80]]
    assert (found["extracted"], found["kept"]) == (40, 20)
    after = content(tmp_path / "out")
    assert all(after[name] == before[name] for name in before if name != "manifest.json")
    store = FeatureStore.open(tmp_path / "out")
    fill(tmp_path / "whole", pictures[:80], vision)
    whole = FeatureStore.open(tmp_path / "whole")
    for path, _ in pictures[:80]:
        ours, theirs = (s.tokens([s.find(path).row]) for s in (store, whole))
        torch.testing.assert_close(ours, theirs, rtol=2**-10, atol=1e-4)


def test_the_same_picture_twice_is_extracted_once(pictures, vision, tmp_path):
    path = pictures[0][0]
    found = fill(tmp_path / "out", [(path, "a"), (path, "b"), (path, "a")], vision)
    assert found["extracted"] == 1
    assert len(FeatureStore.open(tmp_path / "out")) == 1


def test_a_file_that_changed_is_not_found_and_extracted_again(pictures, vision, tmp_path):
    mine = paint(tmp_path / "in", 3)
    fill(tmp_path / "out", mine, vision)
    old = FeatureStore.open(tmp_path / "out").tokens([1])
    shutil.copy(pictures[9][0], mine[1][0])
    store = FeatureStore.open(tmp_path / "out")
    assert store.find(*mine[1]) is None
    with pytest.raises(UserError, match=r"1 of 3 pictures .* changed since, such as .*001.png"):
        store.entries_of(mine)
    assert fill(tmp_path / "out", mine, vision)["extracted"] == 1
    store = FeatureStore.open(tmp_path / "out")
    new = store.tokens([store.find(*mine[1]).row])
    assert not torch.equal(new, old)
    assert [entry.path for entry in store.entries] == [path for path, _ in mine]


def test_a_data_set_that_moved_is_known_by_id_and_another_one_is_not(vision, tmp_path):
    here = paint(tmp_path / "here", 4)
    fill(tmp_path / "out", here, vision)
    (tmp_path / "here").rename(tmp_path / "there")
    there = [(path.replace("/here/", "/there/"), id) for path, id in here]
    assert fill(tmp_path / "out", there, vision)["extracted"] == 0
    store = FeatureStore.open(tmp_path / "out")
    assert [e.row for e in store.entries_of(there)] == [0, 1, 2, 3]
    shutil.rmtree(tmp_path / "there")  # the features travel alone
    assert [e.row for e in store.entries_of(there)] == [0, 1, 2, 3]
    # The same names, ids and sizes elsewhere, while the first set is still at its place.
    paint(tmp_path / "here", 4)
    other = [(path.replace("/here/", "/other/"), id) for path, id in here]
    shutil.copytree(tmp_path / "here", tmp_path / "other")
    assert store.find(*other[0]) is None
    assert fill(tmp_path / "out", other, vision)["extracted"] == 4


def test_one_folder_holds_features_of_one_kind(pictures, vision, tmp_path):
    fill(tmp_path / "out", pictures[:10], vision)
    before = content(tmp_path / "out")
    other = write_vision(tmp_path / "other", seed=1)
    for change, said in (
        ({"vision": other}, r"other \(SHA-256 .* choose another --out"),
        ({"fit": "squash"}, "fit squash"),
        ({"dtype": "bf16"}, "dtype fp16, not of dtype bf16"),
        ({"what": "tokens"}, "what both, not of what tokens"),
        ({"precision": torch.bfloat16}, "precision fp32, not of precision bf16"),
    ):
        with pytest.raises(UserError, match=said):
            fill(tmp_path / "out", pictures, **{"vision": vision, **change})
    with pytest.raises(UserError, match="--dtype"):
        fill(tmp_path / "new", pictures, vision, dtype="fp8")
    with pytest.raises(UserError, match="--what"):
        fill(tmp_path / "new", pictures, vision, what="all")
    assert content(tmp_path / "out") == before


def test_a_model_reads_features_of_its_own_encoder_only(pictures, vision, tmp_path):
    fill(tmp_path / "out", pictures[:40], vision)
    fill(tmp_path / "short", pictures[:40], vision, what="summaries")
    own = loaded(vision)[0]
    assert len(open_store(tmp_path / "out", own)) == 40
    assert len(open_store(tmp_path / "short", own, "summaries")) == 40
    elsewhere = own | {"name": "the same weights by another name"}
    assert len(open_store(tmp_path / "out", elsewhere)) == 40
    other = loaded(write_vision(tmp_path / "other", seed=1))[0]
    squash = loaded(vision, "squash")[0]
    cropped = own | {"config": own["config"] | {"pretrained_cfg": {"crop_pct": 0.5}}}
    for asked, said in ((other, "other"), (squash, "fit squash"), (cropped, "encoder")):
        with pytest.raises(UserError, match=said):
            open_store(tmp_path / "out", asked)
    with pytest.raises(UserError, match="--what tokens"):
        open_store(tmp_path / "short", own)
    with pytest.raises(UserError, match="no features there"):
        FeatureStore.open(tmp_path)
    (tmp_path / "out/00001.safetensors").rename(tmp_path / "kept")
    with pytest.raises(UserError, match=r"00001.safetensors is missing"):
        FeatureStore.open(tmp_path / "out")
    (tmp_path / "out/00001.safetensors").write_bytes(b"foreign")
    with pytest.raises(UserError, match="no shard of features"):
        fill(tmp_path / "out", pictures[:50], vision)
    (tmp_path / "out/00001.safetensors").unlink()
    (tmp_path / "kept").rename(tmp_path / "out/00002.safetensors")
    with pytest.raises(UserError, match=r"00001.safetensors is missing"):
        fill(tmp_path / "out", pictures[:50], vision)


def test_what_does_not_fit_on_the_disk_is_refused(pictures, vision, tmp_path, monkeypatch, capsys):
    Usage = namedtuple("Usage", "total used free")
    row = 17 * 32 * 2 + 3 * 32 * 2  # tokens and three summaries
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 9999, 9999))
    with pytest.raises(UserError, match=r"150 pictures take 0\.00 GB.*choose another --out"):
        fill(tmp_path / "out", pictures, vision)
    assert not list((tmp_path / "out").glob("*.safetensors"))
    need = 150 * (row + 300)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, need))
    with pytest.raises(UserError, match="are free on that disk"):
        fill(tmp_path / "out", pictures, vision)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, int(need / 0.89)))
    assert need * 0.5 < fill(tmp_path / "out", pictures, vision)["bytes"] < need * 1.1


def test_unreadable_files_are_named_skipped_and_remembered(pictures, vision, tmp_path, capsys):
    broken, gone = tmp_path / "broken.png", tmp_path / "gone.png"
    broken.write_bytes(b"not a picture")
    wanted = [pictures[0], (str(broken), "b"), pictures[1], (str(gone), "g")]
    found = fill(tmp_path / "out", wanted, vision)
    assert (found["extracted"], found["failed"]) == (2, 2)
    said = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[:2] for line in said] == [
        ["tinyvl", f"skipping {broken}"], ["tinyvl", f"skipping {gone}"],
    ]  # fmt: skip
    store = FeatureStore.open(tmp_path / "out")
    assert len(store) == 2
    assert [store.find(*w).row for w in wanted] == [0, None, 1, None]
    assert "no such file" in store.find(*wanted[3]).error
    again = fill(tmp_path / "out", wanted, vision)
    assert (again["extracted"], again["kept"], again["failed"]) == (0, 2, 2)
    assert capsys.readouterr().err.splitlines() == said
    shutil.copy(pictures[5][0], broken)  # mended
    assert fill(tmp_path / "out", wanted, vision)["extracted"] == 1
    all_bad = fill(tmp_path / "bad", [(str(gone), "g")], vision)
    assert all_bad["failed"] == 1
    assert len(FeatureStore.open(tmp_path / "bad")) == 0


def test_two_extractions_do_not_work_in_one_folder(pictures, vision, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    code = (
        "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX);"
        "print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(out / ".lock")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match="another extraction"):
        fill(out, pictures[:5], vision)
    holder.communicate()
    assert fill(out, pictures[:5], vision)["extracted"] == 5


def test_a_batch_that_does_not_fit_is_halved(pictures, vision, tmp_path, monkeypatch):
    fill(tmp_path / "whole", pictures[:40], vision)
    real, sizes = encoders.ImageEncoder.forward, []

    def tight(self, images):
        sizes.append(len(images))
        if len(images) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, images)

    monkeypatch.setattr(encoders.ImageEncoder, "forward", tight)
    fill(tmp_path / "parts", pictures[:40], vision)
    assert max(sizes) == 32
    whole, parts = (FeatureStore.open(tmp_path / n) for n in ("whole", "parts"))
    rows = list(range(40))
    torch.testing.assert_close(whole.tokens(rows), parts.tokens(rows), rtol=2**-10, atol=1e-4)
    for a, b in zip(whole.summaries(rows), parts.summaries(rows), strict=True):
        torch.testing.assert_close(a, b, rtol=2**-10, atol=1e-4)


# ------------------------------------------------------------------------------- at length


@pytest.mark.slow
def test_memory_stays_flat(vision, tmp_path):
    """Twelve times the pictures, 60 MB of features more, and less than 25 MB of memory more."""
    code = (
        "import sys, resource, torch; from pathlib import Path; from tinyvl import features;"
        "from tinyvl.presets import Run;"
        "n, vision, out = int(sys.argv[1]), sys.argv[2], sys.argv[3];"
        "v, e = features.load_encoder(vision, 'crop', device='cpu', precision=torch.float32);"
        "files = sorted(map(str, Path(sys.argv[4]).iterdir()));"
        "features.extract(Path(out), [(p, p) for p in files[:n]], e, features.contents(v, e),"
        "Run(Path(out), torch.device('cpu'), workers=1, quiet=True));"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    wide = write_vision(
        tmp_path / "wide",
        model_args={"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 1, "num_heads": 4},
    )
    paint(tmp_path / "in", 6)
    originals = sorted((tmp_path / "in").iterdir())
    for i in range(6, 7200):
        os.link(originals[i % 6], tmp_path / f"in/{i}.png")
    peaks = {}
    for count in (600, 7200):
        done = subprocess.run(
            [sys.executable, "-c", code, str(count), str(wide), str(tmp_path / f"out{count}"),
             str(tmp_path / "in")],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        peaks[count] = int(done.stdout) / 1024
    print(peaks)
    assert len(FeatureStore.open(tmp_path / "out7200")) == 7200
    assert sum(map(len, content(tmp_path / "out7200").values())) > 60e6
    assert peaks[7200] < peaks[600] + 25
    before = resident()
    store = FeatureStore.open(tmp_path / "out7200")
    for i in range(0, 7200, 100):
        store.tokens([i])
    assert resident() < before + 25


def resident() -> float:
    """MB of memory that belong to this process alone: mapped files do not count."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.slow
@pytest.mark.skipif(not FLICKR.exists(), reason="needs Flickr8k")
def test_flickr8k_with_the_default_encoder(tmp_path):
    """A hundred photos: numbers, size on disk, and one decode for five captions."""
    from tinyvl import data

    records = data.read(FLICKR)[:100]
    description, encoder = features.load_encoder(
        "EfficientNet-Lite2", "jpeg", device=CPU, precision=torch.float32
    )
    head = features.contents(description, encoder)
    run = Run(tmp_path, CPU, quiet=True)
    pictures = [(r.image, r.id) for r in records]
    found = features.extract(tmp_path / "out", pictures, encoder, head, run)
    assert found["extracted"] == 100
    store = open_store(tmp_path / "out", description)
    assert store.tokens([0]).shape == (1, 81, 1280)
    transform = encoder.transform()
    for i in (0, 50, 99):
        with Image.open(records[i].image) as picture:
            one = encoder(transform(picture.convert("RGB"))[None])
        ours = store.tokens([store.find(records[i].image).row]).float()
        torch.testing.assert_close(ours, one.tokens, rtol=2**-9, atol=2e-3)
        for a, b in zip(store.summaries([i]), one.summaries, strict=True):
            torch.testing.assert_close(a.float(), b, rtol=2**-9, atol=2e-3)


def test_the_format_on_disk(pictures, vision, tmp_path):
    """What another program would read: a plain manifest and plain safetensors."""
    from safetensors.torch import load_file

    fill(tmp_path / "out", pictures[:40], vision)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["encoder"]["sha256"] == loaded(vision)[0]["sha256"]
    assert manifest["transform"]["input_size"] == [3, 32, 32]
    assert manifest["tensors"]["tokens"] == [17, 32]
    assert [s["rows"] for s in manifest["shards"]] == [32, 8]
    records = [dict(zip(manifest["columns"], r, strict=True)) for r in manifest["records"]]
    assert [r["path"] for r in records] == [path for path, _ in pictures[:40]]
    assert records[35]["bytes"] == os.stat(pictures[35][0]).st_size
    shard = load_file(tmp_path / "out" / manifest["shards"][1]["file"])
    store = FeatureStore.open(tmp_path / "out")
    assert torch.equal(shard["tokens"][3], store.tokens([records[35]["row"]])[0])
    assert set(shard) == set(manifest["tensors"])
    modes = {file.stat().st_mode for file in (tmp_path / "out").iterdir() if file.suffix}
    assert len(modes) == 1  # others read the shards as they do the manifest
