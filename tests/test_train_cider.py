"""Self-critical training: its gradient is the slow formula's."""

import pytest
import shell
import torch
from worlds import after, files, job, losses, run

from tinyvl import models, train, train_cider, train_run
from tinyvl.train_cider import SelfCritical


@pytest.fixture(scope="module")
def model(world, tmp_path_factory):
    train.train(job(world, epochs=8), run(tmp_path_factory.mktemp("start") / "out"))
    folder = tmp_path_factory.getbasetemp() / "start0/out"
    return str(folder)


def loaded(folder: str):
    config = models.read_config(models.checkpoint_folder(folder, "caption"))
    built = models.build(config, device=torch.device("cpu"), precision=torch.float32)
    models.load_weights(built, models.checkpoint_folder(folder, "caption"))
    return built


def batches(built, references: dict[int, list[str]]):
    generator = torch.Generator().manual_seed(0)
    for keys in ([4, 7], [9]):
        pictures = torch.randint(0, 256, (len(keys), 3, 32, 32), generator=generator).byte()
        lines = built.encode([references[key][0] for key in keys], 12)
        yield built.collate(lines, list(range(len(keys))), pictures, keys)


def test_the_gradient_is_that_of_the_slow_formula(model):
    built = loaded(model)
    references = {4: ["a red square"], 7: ["blue left", "a blue square"], 9: ["green at the top"]}
    objective = SelfCritical(built, references, {}, samples=3, max_tokens=8)
    torch.manual_seed(5)
    metrics = objective.accumulate(list(batches(built, references)))
    found = {n: p.grad.clone() for n, p in built.named_parameters() if p.grad is not None}
    assert set(found) == {n for n, p in built.named_parameters() if p.requires_grad}
    built.zero_grad()

    torch.manual_seed(5)
    total, tokens, rewards = 0.0, 0, []
    for batch in batches(built, references):
        rows = torch.arange(len(batch.keys)).repeat_interleave(3)
        drawn = objective.write(batch, rows, sampling=5)
        for picture, key in enumerate(batch.keys.tolist()):
            own = drawn[3 * picture : 3 * picture + 3]
            reward = [
                objective.cider.score(
                    objective.number[key],
                    train_cider.words(built.text.decode(h.tokens), h.finished),
                )
                for h in own
            ]
            rewards += reward
            for k, h in enumerate(own):
                baseline = sum(r for j, r in enumerate(reward) if j != k) / 2
                ids = [built.text.bos, *h.tokens, *([built.text.eos] if h.finished else [])]
                seen = built.see(built.percept(batch.pictures[picture : picture + 1]))
                for t in range(1, len(ids)):  # a forward pass for each token
                    hidden = built.run(torch.tensor([ids[:t]]), seen)
                    logprob = built.decoder.logits(hidden[:, -1]).log_softmax(-1)[0, ids[t]]
                    total = total - (reward[k] - baseline) * logprob
                    tokens += 1
    (total / tokens).backward()
    assert len(set(rewards)) > 3
    assert metrics["loss"] == pytest.approx(-sum(rewards) / len(rewards))
    assert (metrics["captions"], metrics["tokens"]) == (9, tokens)
    for name, p in built.named_parameters():
        if p.requires_grad:
            assert torch.allclose(found[name], p.grad, atol=1e-5), name


def test_samples_do_not_hang_on_the_batch(model):
    built = loaded(model)
    references = {4: ["a red square"], 7: ["blue left"]}
    objective = SelfCritical(built, references, {}, samples=3, max_tokens=8)
    (batch, _) = batches(built, references | {9: ["green"]})
    rows = torch.arange(2).repeat_interleave(3)
    together = objective.write(batch, rows, sampling=1)
    apart = [
        h
        for part in batch.split(2)
        for h in objective.write(part, torch.zeros(3, dtype=torch.long), sampling=1)
    ]
    assert [h.tokens for h in together] == [h.tokens for h in apart]


def test_it_raises_cider_and_goes_on_after_a_stop(world, model, tmp_path):
    settings = {"objective": "cider", "init": model, "rate": 2e-3, "batch": 60, "max_tokens": 10}
    summary = train.train(job(world, epochs=6, **settings), run(tmp_path / "whole", micro=30))
    found = losses(tmp_path / "whole")
    assert sum(found[-3:]) < sum(found[:3])  # minus CIDEr
    before = train.train(job(world, epochs=1, **settings, seed=1), run(tmp_path / "b", micro=30))
    assert summary["val_loss"] <= before["val_loss"] < 0
    stopped = run(tmp_path / "parts", micro=30, save_every=2)
    stopped.stop = after(4)
    with pytest.raises(train_run.Interrupted):
        train.train(job(world, epochs=6, **settings), stopped)
    again = run(tmp_path / "parts", micro=30, save_every=2, resume=True)
    train.train(job(world, epochs=6, **settings), again)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--objective bleu", "--objective is likelihood or cider, not 'bleu'"),
        ("--samples 3", "--samples goes with"),
        ("--objective cider --per-image 2", "--per-image goes with"),
    ],
)
def test_options_that_would_do_nothing_are_refused(line, said):
    done = shell.run("train", "itune", "--device", "cpu", *line.split())
    assert done.returncode == 2
    assert said in done.stderr
