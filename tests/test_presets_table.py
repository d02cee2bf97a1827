"""The rows of eP-ALM's tables: the README's commands, the recipes of appendix A, the help."""

import re
import shlex
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest
import shell
import torch

from tinyvl import models, presets, train

README = (Path(__file__).parent.parent / "README.md").read_text()
SECTION = README.split("### Rows of the papers: eP-ALM")[1].split("\n##")[0]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in SECTION.splitlines()
    if re.match(r"\| (\d|Figure)", line)
]


def commands() -> list[str]:
    """Everything that the table says to run."""
    found = []
    for *_, base, own in ROWS:
        bases, entries = (re.findall("`([^`]+)`", cell) for cell in (base, own))
        more = [entry for entry in entries if entry.startswith("--")]
        found += [f"train epalm {line}" for line in bases]
        found += [f"train epalm {line} {entry}" for line in bases for entry in more]
        found += [entry.removeprefix("tinyvl ") for entry in entries if entry not in more]
    return list(dict.fromkeys(found))


COMMANDS = commands()
TRAINED = [line for line in COMMANDS if line.startswith("train")]


@cache
def job_of(line: str) -> presets.Job:
    """What a `tinyvl train` command would train."""
    jobs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train", lambda job, run: jobs.append(job) or {})
        done = shell.run(*shlex.split(line), "--data", "x", "--device", "cpu")
    assert done.returncode == 0, f"{line}: {done.stderr}"
    return jobs[0]


@cache
def built(language: str, vision: str, options: str, media: str) -> tuple[int, int]:
    """Trained parameters and all, of a model that is made on the meta device."""
    config = {
        "format": 1, "method": "epalm", "options": eval(options), "prompt": "",
        "decoder": {"name": language, "config": presets.CONFIGS[language]},
        "vision": {
            "name": vision, "fit": "squash", **eval(media),
            "config": presets.CONFIGS.get(vision) or {"architecture": models.architecture(vision)},
        },
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "clamp_", lambda x, *a, **k: x)  # idle there, and slow
        model = models.build(
            config, device=torch.device("meta"), precision=torch.float32, weights=False
        )
    own = [p.numel() for n, p in model.named_parameters() if model.trainable(n)]
    return sum(own), sum(p.numel() for p in model.parameters())


def counted(line: str) -> tuple[int, int]:
    job = job_of(line)
    return built(job.language, job.vision, repr(job.options), repr(job.media))


def test_every_table_and_figure_with_results_is_there():
    named = set(re.findall(r"\d+", " ".join(row[0].replace("Figure", "") for row in ROWS)))
    assert named >= {str(number) for number in range(1, 17)}
    figures = {row[0] for row in ROWS if row[0].startswith("Figure")}
    assert figures == {"Figure 3", "Figure 4", "Figure 5", "Figures 6, 8, 9"}
    assert len(TRAINED) > 70


@pytest.mark.parametrize("line", [line for line in COMMANDS if line not in TRAINED])
def test_commands_behind_training_parse(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = shell.run(*shlex.split(line))
    assert done.returncode in (1, 2)
    assert re.fullmatch("tinyvl: (DATA does not exist|RUN: no tinyvl checkpoint .*)\n", done.stderr)


@pytest.mark.parametrize("line", TRAINED)
def test_training_commands_parse_and_their_models_fit(line):
    trained, total = counted(line)
    assert 0 < trained <= total


@pytest.mark.parametrize(
    ("line", "percent"),
    [
        ("--preset epalm-pt --task vqa", 0.55),  # 0.549: the paper cuts to 0.54
        ("--preset epalm-pt-l --task vqa", 0.06),
        ("--preset frozenbilm --task vqa", 3.72),  # Table 4
        ("--preset epalm-video --task vqa", 0.89),
        ("--preset epalm-video --task vqa --shared", 0.54),
        ("--preset epalm-audio", 0.90),  # Tables 6 and 15
        (
            "--preset magma --modality audio --vision MIT/ast-finetuned-audioset-10-10-0.4593",
            3.76,
        ),
        ("--preset epalm-audio --soft 0 --adapters 8 --shared", 3.76),
        ("--preset epalm-audio --deep", 0.93),
        ("--preset epalm-audio --shared", 0.55),
    ],
)
def test_the_shares_of_trained_parameters_are_the_tables(line, percent):
    assert f"train epalm {line}" in TRAINED
    trained, total = counted(f"train epalm {line}")
    assert round(100 * trained / total, 2) == percent


PLAIN = {
    "batch": 64, "epochs": 8, "first_rate": 1e-5, "rate": 2e-5, "final_rate": 1e-6,
    "weight_decay": 0.02, "clip": None, "average": 0.0,
    "fixed": {"soft": 1e-5, "deep": 1e-5, "adapters": 1e-5, "encoder": 1e-7, "decoder": 1e-7},
}  # fmt: skip
LARGE = PLAIN | {
    "batch": 16, "first_rate": 1e-4, "rate": 2e-4, "final_rate": 1e-5,
    "fixed": PLAIN["fixed"] | {"soft": 1e-3},
}  # fmt: skip
FEW = {"epochs": 64, "first_rate": 1e-4, "rate": 2e-4, "final_rate": 1e-5}


@pytest.mark.parametrize(
    ("line", "recipe"),
    [
        ("--preset epalm", PLAIN),
        ("--preset epalm-ada --task vqa", PLAIN),
        ("--preset epalm --task vqa --recipe gqa", PLAIN | {"batch": 128}),
        ("--preset epalm --task vqa --recipe long", PLAIN | {"epochs": 32}),
        ("--preset epalm --task vqa --recipe few-shot --limit 1%", PLAIN | FEW),
        (
            "--preset epalm-lin --task vqa --recipe few-shot-100 --limit 512",
            PLAIN | FEW | {"epochs": 100},
        ),
        ("--preset epalm-pt-l --task vqa", LARGE),
        ("--preset epalm-pt-l --task vqa --recipe long", LARGE | {"epochs": 32}),
        ("--preset epalm-cc3m", LARGE | {"epochs": 4}),
        ("--preset epalm-video --task vqa", PLAIN | {"batch": 32, "epochs": 25}),
        ("--preset frozenbilm --task vqa", PLAIN | {"batch": 32, "epochs": 25}),
        ("--preset epalm-video", PLAIN | {"epochs": 25}),
        ("--preset epalm --modality video", PLAIN | {"epochs": 25}),
        ("--preset epalm-audio", PLAIN | {"batch": 32, "epochs": 30}),
        (
            "--preset magma --modality audio --vision MIT/ast-finetuned-audioset-10-10-0.4593",
            PLAIN | {"batch": 32, "epochs": 30},
        ),
        (
            "--preset epalm --task vqa --recipe video-zero-shot",
            PLAIN | FEW | {"epochs": 4},
        ),
        ("--preset epalm --lm facebook/opt-350m --task vqa --unfreeze vision,lm", PLAIN),
    ],
)
def test_recipes_are_those_of_appendix_a(line, recipe):
    found = asdict(job_of(f"train epalm {line}").recipe)
    assert {name: found[name] for name in recipe} == recipe
    # 400 steps in the authors' code, of VQA v2's 443,757 questions in 8 epochs.
    assert found["warmup"] == pytest.approx(400 / (8 * 443_757 / 64), rel=0.05)


def test_frames_and_masks_are_those_of_appendix_a():
    video = "train epalm --preset epalm-video"
    assert job_of(f"{video} --task vqa").media["frames"] == 8
    assert job_of(video).media["frames"] == 16
    assert job_of(f"{video} --frames 8").media["frames"] == 8
    audio = "train epalm --preset epalm-audio"
    assert job_of(audio).media["masks"] == [24, 96]  # mel bins, frames
    assert job_of(f"{audio} --time-mask 192 --frequency-mask 48").media["masks"] == [48, 192]
    for line in (video, audio, "train epalm --preset epalm --modality video"):
        assert job_of(line).crops  # new frames and masks in every epoch


def test_the_help_gives_the_range_of_every_row():
    from typer.main import get_command

    from tinyvl import cli

    command = get_command(cli.app).commands["train"].commands["epalm"]
    said = {parameter.name: parameter.help for parameter in command.params}
    used = {name: set() for name in ("extract", "inject")}
    for row in ROWS:
        for name, of_row in used.items():
            of_row |= set(re.findall(rf"--{name} (\S+?)`?[ ;|]", f"{row[3]} "))
    assert used["extract"] == {"11:12", "0:12"}
    assert used["inject"] == {"0:24", "0:1", "0:32", "20:32"}
    for name, ranges in used.items():
        for each in ranges | {"extract": {"6:12"}, "inject": {"12:24"}}[name]:
            assert each in said[name]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("epalm --soft 0 --mlp", "about a soft prompt"),
        ("epalm --soft 0 --deep", "about a soft prompt"),
        ("epalm --preset epalm-lin --soft-rate 1e-3", "about a soft prompt"),
        ("epalm --adapter-rate 1e-3", "--adapter-rate and --adapt go with --adapters"),
        ("epalm --task vqa --per-image 2", "--per-image goes with --task caption"),
        ("epalm --answer-only", "go with --task vqa"),
        ("epalm --crops --views 2", "give one of them"),
        ("itune --coarsest 32", "--coarsest is about the --views"),
        ("epalm --modality audio --coarsest 32", "--coarsest is about the --views"),
        ("epalm --modality audio --views 1 --time-mask 9", "laid in --crops and --views"),
        ("epalm --inject 3", "FIRST:END"),
        ("epalm --limit 200%", "--limit is a number"),
        ("epalm --rate -1", "--rate"),
        ("clipcap --layers 2", "go with --mapping transformer"),
        ("clipcap --mapping mlp --heads 2", "go with --mapping transformer"),
        ("clipcap --preset epalm", "there are clipcap, clipcap-transformer"),
    ],
)
def test_options_that_would_do_nothing_are_refused(line, said, monkeypatch):
    monkeypatch.setattr(train, "train", lambda job, run: pytest.fail("it trains"))
    done = shell.run("train", *line.split(), "--data", "x", "--device", "cpu")
    assert done.returncode == 2
    assert said in done.stderr
