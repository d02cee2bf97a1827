"""From records to micro-batches: what is read, what is cached, and how it is grouped."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from worlds import files, job, losses, run, stopped

from tinyvl import UserError, data, models, train, train_batches, train_states
from tinyvl.data import Record
from tinyvl.train_plan import Plan


def loaded(folder: Path, *entries: dict, val: list[dict] | None = None, **options):
    """What `load_records` gives of JSON Lines: the pictures' names."""
    for file, lines in (("set.jsonl", entries), ("val.jsonl", val or ())):
        (folder / file).write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    for entry in (*entries, *(val or ())):
        (folder / next(iter(entry.values()))).touch()
    asked = {
        "data": str(folder / "set.jsonl"), "val": str(folder / "val.jsonl") if val else None,
        "format": None, "images": None, "lang": "en", "task": "caption", "modality": "image",
        "seed": 0, "limit": None, "method": "itune",
    }  # fmt: skip
    parts = train_batches.load_records(SimpleNamespace(**asked | options))
    return [[Path(record.path).name for record in part] for part in parts]


DOG = {"captions": ["a dog"]}


def test_what_a_run_does_not_read_is_counted_with_its_reason(tmp_path, caplog):
    found = loaded(
        tmp_path,
        *({"image": f"{i}.jpg", "split": "train", **DOG} for i in range(2)),
        *({"image": f"{i}.jpg", **DOG} for i in range(2, 5)),
        {"image": "v.jpg", "split": "validation", **DOG},
        {"image": "t.jpg", "split": "test", **DOG},  # the test part is meant to stay out
        {"image": "o.jpg", "split": "other", **DOG},
        {"video": "a.mp4", "split": "train", **DOG},
        {"image": "n.jpg", "split": "train"},
        {"image": "e.jpg", "split": "train", "captions": ["...", "😀"]},
        {"image": "d.jpg", "split": "train", "lang": "de", **DOG},
    )
    assert found == [["0.jpg", "1.jpg"], ["v.jpg"]]
    text = caplog.text
    assert "left out 2 of 12 captions: no words in them" in text
    assert "left out 1 of 12 records: not in 'en'; --lang all reads them" in text
    reasons = "3 without a split, where others have one; 1 of the part 'other'; 1 video, not image"
    assert f"left out 7 of 11 records: {reasons}; 2 without a caption" in text


def test_nothing_is_said_where_everything_is_read(tmp_path, caplog):
    pictures = [{"image": f"{i}.jpg", **DOG} for i in range(3)]
    assert sum(map(len, loaded(tmp_path, *pictures))) == 3
    found = loaded(tmp_path, *pictures, val=[{"image": "v.jpg", **DOG}])
    assert found == [["0.jpg", "1.jpg", "2.jpg"], ["v.jpg"]]
    assert caplog.text == ""


def test_questions_without_words_or_answers_are_counted(tmp_path, caplog):
    asked = [{"image": f"{i}.jpg", "question": "what?", "answers": ["dog"]} for i in range(2)]
    odd = [{"image": "b.jpg", "question": "??", "answers": ["dog"]}]
    odd += [{"image": "c.jpg", "question": "what?"}]
    assert sum(map(len, loaded(tmp_path, *asked, *odd, task="vqa"))) == 2
    assert "left out 2 of 4 records: 2 without a question and answer" in caplog.text


def test_groups_hold_captions_of_one_picture_by_length():
    tokens = [[[1] * 5, [2], [3] * 3], [], [[4]]]
    groups = train_batches.groups_of(tokens, 2)
    assert [(g.record, [len(c) for c in g.captions]) for g in groups] == [
        (0, [1, 3]), (0, [5]), (2, [1]),
    ]  # fmt: skip


def test_cached_tokens_give_the_loss_of_uncached_ones(world, tmp_path):
    for cache in (True, False):
        train.train(job(world, epochs=2), run(tmp_path / str(cache), cache=cache))
    cached, plain = (losses(tmp_path / str(cache)) for cache in (True, False))
    assert cached == pytest.approx(plain, abs=2e-3)  # the cache keeps tokens in fp16


SUMMARIES = {"method": "epalm", "options": {"soft": 2}, "epochs": 1}


def test_cached_summaries_of_an_fp32_run_are_exact(world, tmp_path):
    found = {}
    for cache in (True, False):
        train.train(job(world, **SUMMARIES), run(tmp_path / str(cache), cache=cache))
        found[cache] = losses(tmp_path / str(cache))
    assert len(found[True]) == 6
    assert found[True] == pytest.approx(found[False], abs=1e-6)
    half = job(world, precision="bf16", **SUMMARIES)
    assert train_batches.cache_dtype(half, "summaries") == "fp16"


def test_a_run_that_began_with_summaries_in_fp16_goes_on_with_them(world, tmp_path, monkeypatch):
    """As runs did before ``cache_dtype`` was noted with their settings."""
    monkeypatch.setattr(train, "cache_dtype", lambda job, reads: "fp16")
    train.train(job(world, **SUMMARIES), run(tmp_path / "whole"))
    stopped(job(world, **SUMMARIES), run(tmp_path / "parts"), 2)
    monkeypatch.undo()
    file = tmp_path / "parts/config.json"
    config = json.loads(file.read_text())
    assert config["training"].pop("cache_dtype") == "fp16"
    file.write_text(json.dumps(config))
    train.train(job(world, **SUMMARIES), run(tmp_path / "parts", resume=True))
    assert files(tmp_path / "whole") == files(tmp_path / "parts")


def test_captions_states_that_a_kill_cut_off_are_read_again(world, tmp_path, monkeypatch):
    monkeypatch.setattr(train_states, "BLOCK", 4)
    config = models.new_config(
        "itune", world["language"], world["vision"], fit="crop", prompt="", options={"drop": 1}
    )
    model = models.build(config, device=torch.device("cpu"), precision=torch.float32)
    tokens = [[[i, j] for j in range(i)] + [[i]] for i in range(5)]
    file = tmp_path / "features/train.rows"
    whole = train_states.TextStates(tokens, model, run(tmp_path), "train")
    kept = file.read_bytes()
    captions = [c for lines in tokens for c in lines]
    for caption, states in zip(captions, whole.of(captions), strict=True):
        torch.testing.assert_close(states, model.states([caption]), rtol=0, atol=1e-5)
    seen, real = [], model.states
    monkeypatch.setattr(model, "states", lambda block: seen.append(len(block)) or real(block))
    for left, read in ((0, [4, 4, 4, 3]), (len(kept) // 2 + 5, [4, 3]), (len(kept), [])):
        file.write_bytes(kept[:left])
        seen.clear()
        train_states.TextStates(tokens, model, run(tmp_path), "train")
        assert seen[1:] == read  # the first tells how large a state is
        assert file.read_bytes() == kept


def test_nothing_to_train_on_is_said(world, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text(
        json.dumps({"image": str(Path(world["data"]).parent / "0.png"), "captions": []})
    )
    with pytest.raises(UserError, match="no picture with a caption"):
        train.train(job(world | {"data": str(empty)}), run(tmp_path / "out"))


def test_the_annotations_are_read_once(world, monkeypatch):
    read, paths = data.read, []
    monkeypatch.setattr(data, "read", lambda path, **more: paths.append(path) or read(path, **more))
    train_batches.load_records(job(world))
    assert paths == [world["data"]]
    train_batches.load_records(job(world, val=world["data"]))
    assert paths == [world["data"]] * 2


def test_restval_is_training_data_and_val_is_not(world, tmp_path):
    root = Path(world["data"]).parent
    images = [
        {"filename": f"{i}.png", "split": split, "sentences": [{"raw": "a dog"}], "imgid": i}
        for i, split in enumerate(["train", "restval", "restval", "val", "test"])
    ]
    file = root / "karpathy.json"
    file.write_text(json.dumps({"images": images}))
    train_records, val = train_batches.load_records(job(world | {"data": str(file)}))
    assert [r.id for r in train_records] == ["0", "1", "2"]
    assert [r.id for r in val] == ["3"]
    test = root / "test.json"  # a validation file of its own is taken whole
    test.write_text(json.dumps({"images": images[4:]}))
    _, val = train_batches.load_records(job(world | {"data": str(file), "val": str(test)}))
    assert [r.id for r in val] == ["4"]


def test_one_caption_a_picture_fills_the_batches(world, tmp_path):
    lines = [json.loads(line) for line in Path(world["data"]).read_text().splitlines()]
    single = Path(world["data"]).parent / "single.jsonl"
    single.write_text(
        "".join(json.dumps(line | {"captions": line["captions"][:1]}) + "\n" for line in lines)
    )
    summary = train.train(
        job(world | {"data": str(single)}, batch=12, epochs=1, per_image=5),
        run(tmp_path / "out", micro=12),
    )
    assert summary["steps"] == 3  # 36 captions


def test_captions_are_cut_to_the_decoders_positions(world, tmp_path):
    config = models.new_config(
        "itune", world["language"], world["vision"], fit="crop", prompt="a", options={}
    )
    model = models.build(config, device=torch.device("cpu"), precision=torch.float32)
    long = Record("x.png", ["red " * 200], "x")
    (ids,) = train_batches.prepare([long], model, job(world, max_tokens=500))[0]
    assert len(ids) == 64 - 1 - 1 - 1  # positions, bos, prompt, eos
    pictures = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    model.caption(pictures, beams=1, max_tokens=500)


def test_an_epoch_reads_one_answer_in_proportion_to_the_annotators():
    group = train_batches.Group(3, [[1]] * 7 + [[2]] * 3, drawn=True)
    drawn = [tuple(group.read(0, epoch)[0]) for epoch in range(4000)]
    assert Counter(drawn)[(1,)] / 4000 == pytest.approx(0.7, abs=0.03)
    assert drawn[:50] == [tuple(group.read(0, epoch)[0]) for epoch in range(50)]
    assert drawn[:50] != [tuple(group.read(1, epoch)[0]) for epoch in range(50)]
    other = train_batches.Group(4, group.captions, drawn=True)
    assert drawn[:50] != [tuple(other.read(0, epoch)[0]) for epoch in range(50)]


@pytest.mark.parametrize(("limit", "number"), [(512, 512), ("1%", 44), ("10%", 444), ("0.01%", 1)])
def test_a_limit_is_a_number_or_a_share(limit, number):
    assert train_batches.share(limit, 4437) == number


def test_a_limit_counts_pairs():
    records = [
        Record(f"{i}.png", captions=[f"{i} {j}" for j in range(5)], id=str(i)) for i in range(40)
    ]
    for limit in (7, 150):
        kept = train_batches.limit_pairs(records, limit, seed=3)
        assert sum(len(r.captions) for r in kept) == limit
        assert all(c.startswith(f"{r.id} ") for r in kept for c in r.captions)
        assert kept == train_batches.limit_pairs(records, limit, seed=3)
    assert sum(len(r.captions) for r in train_batches.limit_pairs(records, "10%", seed=3)) == round(
        sum(len(r.captions) for r in records) / 10
    )
    assert len(train_batches.limit_pairs(records, 1000, seed=3)) == 40


def test_a_batch_that_the_data_does_not_fill_says_so():
    asked = SimpleNamespace(
        objective="likelihood", task="caption", recipe=SimpleNamespace(batch=64)
    )
    plan = Plan.of([5] * 6, asked, SimpleNamespace(micro=64))
    assert plan.told(50) == "50 steps of 30 captions (the data does not fill a batch of 64)"
    plan = Plan.of([1] * 128, asked, SimpleNamespace(micro=16))
    assert (plan.per_step, plan.told(1)) == (4, "2 steps of 64 captions")
