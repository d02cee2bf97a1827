"""Training eP-ALM, its baselines and ClipCap: each learns eight pictures, alters only its own."""

import json
import subprocess
from pathlib import Path

import pytest
import shell
import torch
import worlds
from safetensors.torch import load_file
from worlds import ANIMALS as WORDS
from worlds import CPU, QUESTION, run

from tinyvl import UserError, models, presets, train, train_batches
from tinyvl.data import Record

CAPTIONERS = [row for row in presets.PRESETS.items() if row[1].method in ("epalm", "clipcap")]
ROWS = {  # presets that differ by their backbones alone are learnt once
    json.dumps([row.method, row.options]): name for name, row in reversed(CAPTIONERS)
}
CASES = [(name, "caption") for name in ROWS.values()] + [
    (name, "vqa") for name in ROWS.values() if presets.PRESETS[name].method == "epalm"
]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, str]:
    return worlds.stripes(tmp_path_factory.mktemp("epalm"))


def build(world: dict[str, str], method: str, options: dict):
    config = models.new_config(
        method, world["language"], world["vision"], fit="squash", prompt="", options=options
    )
    torch.manual_seed(0)
    return models.build(config, device=CPU, precision=torch.float32)


def test_all_variants_and_baselines_are_learnt():
    assert set(ROWS.values()) == {
        *("epalm", "epalm-pt", "epalm-lin", "epalm-ada", "epalm-pt-l", "promptfuse", "limber"),
        *("magma", "magma-all", "clipcap", "clipcap-transformer"),
    }  # FrozenBiLM is MAGMA on a video's [CLS]


@pytest.mark.parametrize(("name", "task"), [*CASES, ("deep", "caption")])
def test_each_variant_and_baseline_learns_eight_pictures(name, task, world):
    row = presets.PRESETS["epalm" if name == "deep" else name]
    options = dict(row.options)
    options |= {"layers": 2, "heads": 4} if "mapping" in options else {}
    if name == "epalm-lin":  # half of this decoder is one layer, and a slot there says little
        options["inject"] = [0, 3]
    options |= {"deep": True} if name == "deep" else {}
    options |= {"task": "vqa"} if task == "vqa" else {}
    model = build(world, row.method, options)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not model.trainable(n)}
    if task == "vqa":
        ids = model.encode_answers([(QUESTION, word) for word in WORDS], 8)
    else:
        ids = model.encode(WORDS, 8)
    draw = torch.Generator().manual_seed(5)  # what an encoder would tell them by
    width = sum(model.encoder.widths)
    shape = (8, 5, 32) if model.reads == "tokens" else (8, width)
    seen = 2 * torch.randn(shape, generator=draw)
    batch = model.collate(ids, list(range(8)), seen, list(range(8)))

    def said() -> list[str]:
        asked = [[QUESTION] * 8] if task == "vqa" else []
        found = (model.answer if asked else model.caption)(seen, *asked, beams=1, max_tokens=4)
        return [text for text, _ in found]

    assert sum(a == b for a, b in zip(said(), WORDS, strict=True)) <= 2  # nothing is known yet
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, rate = torch.optim.Adam(parameters), 3e-2
    steps = 300 if name == "epalm-lin" else 100
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 10) * (1 - step / steps)
        model.accumulate([batch])
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 9 and said() == WORDS:
            break
    assert said() == WORDS
    for n, p in model.named_parameters():
        assert model.trainable(n) or torch.equal(p, frozen[n])


def job(world: dict[str, str], **changes) -> presets.Job:
    recipe = {"batch": 4, "epochs": 2, "rate": 1e-3, "fixed": {"soft": 1e-4}}
    common = {"method": "epalm", "fit": "squash", "options": {}}
    return worlds.job(world, **{**recipe, **common, **changes})


def test_each_question_has_its_answers_the_most_frequent_first(world):
    model = build(world, "epalm", {"task": "vqa"})
    record = Record("x.png", question=QUESTION, answers=["bee", "ant", "ant"])
    (lines,) = train_batches.prepare([record], model, job(world, options={"task": "vqa"}))
    said = [model.text.decode(line) for line in lines]
    assert said == [f"{QUESTION} Answer: {word}" for word in ("ant", "ant", "bee")]


def test_a_limited_run_reads_records_that_the_seed_draws(world):
    def read(seed: int, limit: int | str) -> list[str]:
        records, _ = train_batches.load_records(job(world, seed=seed, limit=limit))
        return [record.captions[0] for record in records]

    few = read(0, "50%")
    assert few == read(0, 4) == [word for word in WORDS if word in few]  # in the data's order
    assert len(few) == 4
    assert len({tuple(read(seed, 4)) for seed in range(5)}) > 2
    assert read(0, 512) == WORDS


def test_the_schedule_moves_the_connection_and_leaves_prompt_and_adapters(world):
    recipe = presets.PRESETS["epalm"].recipe
    rates = [train.lr_at(step, 10000, recipe) for step in range(10000)]
    assert rates[0] == pytest.approx(1e-5, rel=0.02)
    assert max(rates) == pytest.approx(2e-5)
    assert rates[-1] == pytest.approx(1e-6, rel=0.01)
    model = build(world, "epalm", {"adapters": 8, "unfreeze": ["vision", "lm"]})
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    groups = train.parameter_groups(model, parameters, recipe)
    rate_of = {id(p): group["fixed"] for group in groups for p in group["params"]}
    wanted = {"connector": None, "soft": 1e-5, "adapters": 1e-5, "encoder": 1e-7, "decoder": 1e-7}
    assert {n.partition(".")[0] for n in parameters} == set(wanted)
    for name, parameter in parameters.items():
        assert rate_of[id(parameter)] == wanted[name.partition(".")[0]]


def test_trained_to_answer_saved_loaded_and_asked(world, tmp_path):
    out = tmp_path / "out"
    train.train(job(world, options={"task": "vqa", "answer_only": True}), run(out))
    model = models.load(str(out), task="vqa", device=CPU)
    saved = load_file(out / "model.safetensors")
    assert set(saved) == {n for n, _ in model.named_parameters() if model.trainable(n)}
    assert {n.partition(".")[0] for n in saved} == {"connector", "soft"}
    trained, fresh = (
        models.build(models.read_config(out), device=CPU, precision=torch.float32) for _ in "ab"
    )
    models.load_weights(trained, out)
    for (name, a), (_, b) in zip(
        trained.state_dict().items(), fresh.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b) != model.trainable(name), name
    with pytest.raises(UserError, match="does not caption"):
        models.load(str(out), device=CPU)

    def ask(*args: str, stdin: str = "") -> subprocess.CompletedProcess:
        return shell.run("ask", *args, "-m", out, stdin=stdin)

    folder = Path(world["data"]).parent
    pictures = [str(folder / f"{i}.png") for i in range(3)]
    done = ask(*pictures[:2], str(folder / "none.png"), QUESTION, "--json")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 1
    assert [list(line) for line in lines[:2]] == [["path", "question", "answer", "score"]] * 2
    assert lines[2]["question"] == QUESTION
    assert "error" in lines[2]
    file = tmp_path / "answers.jsonl"
    ask(pictures[0], QUESTION, "--json", "-o", str(file))
    ask(pictures[0], "what is that?", "--json", "-o", str(file), "--resume")
    done = ask("-", QUESTION, "--json", "-o", str(file), "--resume", stdin="\n".join(pictures))
    assert done.returncode == 0, done.stderr
    kept = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["path"], line["question"]) for line in kept] == [
        (pictures[0], QUESTION), (pictures[0], "what is that?"),
        (pictures[1], QUESTION), (pictures[2], QUESTION),
    ]  # fmt: skip
    assert kept[0] == lines[0]
    check_choices(ask, pictures, tmp_path)
    bare = ask(pictures[1], QUESTION)
    assert bare.stdout == lines[1]["answer"] + "\n"
    assert ask(pictures[0]).returncode == 2


def check_choices(ask, pictures: list[str], tmp_path: Path) -> None:
    """`ask --choices` names the likeliest."""
    done = ask(*pictures[:2], QUESTION, "--choices", "ant, bee,cat", "--json")
    assert done.returncode == 0, done.stderr
    for line in map(json.loads, done.stdout.splitlines()):
        assert list(line) == ["path", "question", "answer", "score", "choices"]
        assert list(line["choices"]) == ["ant", "bee", "cat"]
        assert sum(line["choices"].values()) == pytest.approx(1, abs=1e-5)
        assert line["answer"] == max(line["choices"], key=line["choices"].get)
        assert line["score"] < 0
    assert ask(pictures[1], QUESTION, "--choices", "cat,ant,bee").stdout == line["answer"] + "\n"
    kept = tmp_path / "chosen.jsonl"
    for choices in ("ant,bee", "ant,cat", "ant,cat"):
        ask(pictures[0], QUESTION, "--choices", choices, "--json", "-o", kept, "--resume")
    named = [list(json.loads(line)["choices"]) for line in kept.read_text().splitlines()]
    assert named == [["ant", "bee"], ["ant", "cat"]]
    for more, said in (
        (["--choices", "ant"], "two answers or more"),
        (["--choices", "ant,,bee"], "two answers or more"),
        (["--choices", "ant,bee", "--beams", "2"], "--beams is for answers in the model's words"),
    ):
        done = ask(pictures[0], QUESTION, *more)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert said in done.stderr


def test_the_shipped_model_is_the_default_of_ask(world, tmp_path, monkeypatch):
    """Until its weights are there, one sentence says so."""
    shipped, picture = tmp_path / "answer", Path(world["data"]).parent / "0.png"
    monkeypatch.setitem(models.DEFAULT, "vqa", shipped)
    data = tmp_path / "asked.jsonl"
    record = {"image": str(picture), "question": QUESTION, "answers": ["ant"]}
    data.write_text(json.dumps(record | {"choices": ["ant", "bee"]}) + "\n")
    commands = (
        ["ask", picture, QUESTION], ["ask", picture, QUESTION, "-m", "default"],
        ["eval", "vqa", data], ["eval", "vqa", "default", data, "--shuffle-images"][:4],
        ["inspect", "default", "--task", "vqa", "--json"],
    )  # fmt: skip
    for command in commands:
        done = shell.run(*command)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "No model that answers questions is shipped yet" in done.stderr
    train.train(job(world, options={"task": "vqa", "answer_only": True}, epochs=1), run(shipped))
    said = [shell.run(*command) for command in commands]
    assert [done.returncode for done in said] == [0] * len(commands), [d.stderr for d in said]
    assert said[0].stdout == said[1].stdout == shell.run(*commands[0], "-m", shipped).stdout
    assert json.loads(said[2].stdout)["with_choices"] == 1
    assert json.loads(said[4].stdout)["method"] == "epalm"
    assert models.start_of("default", "epalm")["options"]["task"] == "vqa"


def test_unfrozen_towers_are_trained_and_saved(world, tmp_path):
    this = job(world, options={"unfreeze": ["vision", "lm"]}, epochs=1, fixed={})
    train.train(this, run(tmp_path))
    saved = load_file(tmp_path / "model.safetensors")
    assert {n.partition(".")[0] for n in saved} == {"connector", "soft", "encoder", "decoder"}
    model, fresh = (
        models.build(models.read_config(tmp_path), device=CPU, precision=torch.float32)
        for _ in "ab"
    )
    models.load_weights(model, tmp_path)
    for name in ("encoder.model.blocks.0.attn.qkv.weight", "decoder.layers.0.ffn.up.weight"):
        assert not torch.equal(model.state_dict()[name], fresh.state_dict()[name])


@pytest.mark.parametrize("method", ["epalm", "clipcap"])
def test_checkpointing_changes_only_the_last_bits(method, world):
    options = {"adapters": 4} if method == "epalm" else {}
    model = build(world, method, options)
    gradients = []
    for on in (False, True):
        model.checkpoint(on)
        batch = model.collate(
            model.encode(WORDS, 8), list(range(8)),
            torch.randn(8, sum(model.encoder.widths), generator=torch.Generator().manual_seed(0)),
            list(range(8)),
        )  # fmt: skip
        model.zero_grad()
        model.accumulate([batch])
        gradients.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        )
    for name, first in gradients[0].items():
        torch.testing.assert_close(first, gradients[1][name], rtol=1e-4, atol=1e-6)
