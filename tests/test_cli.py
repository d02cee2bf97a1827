"""The command line: help, listings, errors; what captioning prints is in test_write."""

import json
import os
import re
import subprocess
import sys

import pytest
import shell

from tinyvl import UserError, __version__, cli, hub

COMMANDS = ["caption", "models", "inspect", "pull", "samples", "draw", "features", "train itune"]
COMMANDS += [f"eval {task}" for task in ("caption", "vqa", "retrieval", "zeroshot")]


def tinyvl(*args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tinyvl.cli", *args]
    return subprocess.run(command, capture_output=True, text=True)


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from typer.testing import CliRunner; from tinyvl import cli;"
        "r = CliRunner().invoke(cli.app, ['--help']); assert r.exit_code == 0, r.output;"
        "print([m for m in ('torch', 'transformers', 'timm', 'numpy', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_every_command_and_option_has_help():
    import typer.main

    root = typer.main.get_command(cli.app)
    commands = dict(root.commands)
    for name, group in root.commands.items():
        commands |= {
            f"{name} {key}": value for key, value in getattr(group, "commands", {}).items()
        }
    assert set(COMMANDS) <= set(commands)
    for name, command in commands.items():
        assert command.help, name
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{name} {parameter.name}"
            assert "[" not in parameter.help, f"{name} {parameter.name}"  # Rich would swallow it


def test_version():
    found = dict(line.split(" ", 1) for line in shell.invoke("--version").output.splitlines())
    assert found["tinyvl"] == __version__
    assert list(found) == ["tinyvl", "torch", "device", "cache"]


def test_the_package_is_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "tinyvl", "inspect"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("Usage: tinyvl inspect")


@pytest.mark.parametrize("told", [None, "ACTIVE"])
def test_threads_wait_asleep_unless_the_user_says_otherwise(monkeypatch, told):
    monkeypatch.setenv("OMP_WAIT_POLICY", told or "")
    if told is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setenv("GOMP_SPINCOUNT", "1")  # so that it is put back
    monkeypatch.delenv("GOMP_SPINCOUNT")
    shell.run("--version")
    assert os.environ["OMP_WAIT_POLICY"] == (told or "PASSIVE")
    assert os.environ.get("GOMP_SPINCOUNT") == (None if told else "20000")
    code = "import sys, tinyvl.cli; print('torch' in sys.modules)"  # it is read when torch loads
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n"


def completed(monkeypatch, *words: str) -> set[str]:
    """What a shell offers for the last word."""
    monkeypatch.setenv("_TINYVL_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", " ".join(["tinyvl", *words]))
    monkeypatch.setenv("COMP_CWORD", str(len(words)))
    return set(shell.run(*words).stdout.split())


def test_a_shell_completes_commands_presets_and_backbones(monkeypatch):
    assert completed(monkeypatch, "cap") == {"caption"}
    assert "--beams" in completed(monkeypatch, "caption", "--be")
    assert "itune-base" in completed(monkeypatch, "train", "itune", "--preset", "itune-b")
    assert completed(monkeypatch, "train", "itune", "--lm", "gpt2-m") == {"gpt2-medium"}
    assert completed(monkeypatch, "inspect", "Smol") == {"SmolLM2-135M"}
    assert completed(monkeypatch, "train", "lilt", "--fit", "s") == {"squash"}
    assert completed(monkeypatch, "caption", "pho") == set()  # the shell knows its files


def test_inspect_prints_the_papers_row_as_json():
    result = shell.invoke("inspect", "itune-base", "--json")
    found = json.loads(result.output)
    assert found["name"] == "itune-base"
    assert found["method"] == "itune"
    assert found["trainable_parameters"] == 14_178_816
    assert set(found) >= {"total_parameters", "trainable_percent"}


def test_inspect_prints_lines_and_knows_backbones():
    lines = dict(row.split("\t") for row in shell.invoke("inspect", "epalm").output.splitlines())
    assert (lines["method"], lines["recipe.batch"]) == ("epalm", "64")
    assert not [value for value in lines.values() if value[:1] in "{["]
    lines = dict(row.split("\t") for row in shell.invoke("inspect", "gpt2").output.splitlines())
    assert (lines["role"], lines["total_parameters"]) == ("decoder", "124,439,808")


def test_pull_default_fetches_each_backbone_once(monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "pull", lambda names: asked.extend(names) or ["there"])
    assert shell.invoke("pull", "default").output == "there\n"
    assert sorted(asked) == ["EfficientNet-Lite2", "SmolLM2-135M", "multilingual-e5-small"]


def test_models_lists_presets_and_backbones():
    rows = list(map(json.loads, shell.invoke("models", "--json").output.splitlines()))
    names = {row["name"]: row for row in rows}
    assert {"itune-base", "gpt2", "SmolLM2-135M", "EfficientNet-Lite2"} <= set(names)
    backbone = names["SmolLM2-135M"]
    assert backbone["licence"] == "Apache-2.0"
    assert set(backbone) == {"name", "role", "parameters", "licence", "source", "here"}
    lines = [line.split("\t") for line in shell.invoke("models").output.splitlines()]
    assert ["backbone", "SmolLM2-135M", "decoder", "134515008"] in [line[:4] for line in lines]
    long = max(names, key=len)
    assert long in {line[1] for line in lines}
    lines = shell.invoke("models", "--method", "clipcap").output.splitlines()
    assert [line.split("\t")[1] for line in lines] == ["clipcap", "clipcap-transformer"]
    roles = shell.invoke("models", "--role", "audio").output.splitlines()
    assert "Whisper-tiny.en" in {line.split("\t")[1] for line in roles}
    assert {line.split("\t")[2] for line in roles} == {"audio"}


def test_a_backbone_out_of_reach_is_said_at_once_and_names_what_can_be_had(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # read at its import
    monkeypatch.setattr(hub, "hub_reachable", hub.hub_reachable.__wrapped__)  # asked anew
    monkeypatch.setenv("TINYVL_CACHE", str(tmp_path))
    done = shell.run("train", "itune", "--lm", "gpt2", "--out", tmp_path / "out", "--quiet")
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    for word in ("gpt2", "cache", "hub", "SmolLM2-135M"):
        assert word in done.stderr


@pytest.mark.parametrize(
    ("args", "status", "said"),
    [
        (["inspect", "no-such-preset"], 2, "tinyvl models"),
        (["train", "itune", "--preset", "nope"], 2, "itune-base"),
        (["train", "itune", "--data", "/no/such/file"], 2, "/no/such/file"),
        (["caption", "x.png", "--beams", "0"], 2, "beams"),
        (["frobnicate"], 2, "frobnicate"),
    ],
)
def test_mistakes(args, status, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = shell.run(*args)
    assert done.returncode == status, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_debug_shows_the_traceback():
    assert "Traceback" in tinyvl("--debug", "inspect", "no-such-preset").stderr


def test_draw_writes_the_drawn_set(tmp_path):
    result = shell.invoke("draw", tmp_path / "d", "--train", "4", "--held-out", "2")
    assert result.exit_code == 0
    lines = (tmp_path / "d/drawn.jsonl").read_text().splitlines()
    assert len(lines) == 12  # two languages
    assert result.output.strip() == str(tmp_path / "d/drawn.jsonl")


@pytest.mark.parametrize("words", [["caption"], ["classify", "--labels", "a,b"], ["retrieve"]])
def test_no_input_at_all_is_said(words, tmp_path):
    command = [sys.executable, "-m", "tinyvl.cli", *words]
    done = subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=tmp_path
    )
    assert done.returncode == 2
    assert re.search("pipe their paths in|Say what to look for", done.stderr)


def test_a_misspelt_language_model_has_a_nearest_name(monkeypatch, tmp_path):
    monkeypatch.setenv("TINYVL_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "hub_reachable", lambda: False)
    with pytest.raises(UserError, match="is gpt2-medium meant"):
        hub.fetch("gtp2-medium", "decoder")


def test_a_run_that_is_not_there_is_not_resumed(tmp_path):
    done = shell.run("train", "itune", "--out", tmp_path / "typo", "--resume", "--quiet")
    assert (done.returncode, done.stderr) == (
        2, f"tinyvl: {tmp_path / 'typo'}: there is no run to resume.\n"
    )  # fmt: skip
    assert not (tmp_path / "typo").exists()


def test_words_behind_a_folder_are_a_query_that_lacks_its_option(tmp_path):
    done = shell.run("retrieve", tmp_path, "a dog")
    assert done.returncode == 2
    assert 'words to look for are named by --query: --query "a dog"' in done.stderr


def test_a_model_without_data_is_told_so():
    done = shell.run("eval", "caption", "default")
    assert (done.returncode, "name the data behind it" in done.stderr) == (2, True)


def test_a_table_of_models_folds_no_name(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    shown = shell.invoke("models", "--role", "vision").stdout
    assert "vit_base_patch16_clip_quickgelu_224.openai" in shown
