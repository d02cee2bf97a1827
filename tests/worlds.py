"""Small worlds on disk (pictures, captions, tiny backbones), and runs that train in them.

A world is what a job reads: ``{"data": ..., "language": ..., "vision": ...}``. Runs of several
test modules are started, stopped, killed and looked into by the functions below.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import (
    AST,
    DRAWN_VIT,
    SEEING,
    TIMESFORMER,
    fit_decoder,
    fit_drawn_vit,
    fit_encoder,
    fit_seeing_decoder,
    write_clip_encoder,
    write_decoder,
    write_vision,
)

from tinyvl import draw, draw_av, features, presets, train
from tinyvl.models_build import build_encoder
from tinyvl.train_run import Interrupted

CPU = torch.device("cpu")
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (40, 60, 220)}
PLACES = {"left": (4, 16), "right": (28, 16), "top": (16, 4)}
ANIMALS = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen"]
QUESTION = "what is this?"
Pairs = list[tuple[str, str]]  # path and id of each picture
TONE_AST = {
    "model_type": "audio-spectrogram-transformer", "hidden_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "intermediate_size": 128, "max_length": 100, "num_mel_bins": 48,
    "patch_size": 8, "frequency_stride": 8, "time_stride": 8,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def write_lines(file: Path, entries: Iterable[dict]) -> Path:
    """A data set as JSON Lines."""
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return file


# ----------------------------------------------------------------------------------------- worlds


def squares(root: Path) -> dict[str, str]:
    """45 pictures of a coloured square somewhere, two captions each, and random backbones."""
    lines, chance = [], random.Random(0)
    for i in range(45):
        colour, place = list(COLOURS)[i % 3], list(PLACES)[i // 3 % 3]
        picture = Image.new("RGB", (32, 32), (chance.randrange(90, 130),) * 3)
        x, y = PLACES[place]
        x, y = x + chance.randint(-2, 2), y + chance.randint(-2, 2)
        picture.paste(COLOURS[colour], (max(x - 6, 0), max(y - 6, 0), x + 6, y + 6))
        picture.save(root / f"{i}.png")
        captions = [f"a {colour} square at the {place}", f"{colour} {place}"]
        split = "val" if i > 35 else "train"
        lines.append({"image": f"{i}.png", "captions": captions, "split": split})
    return {
        "data": str(write_lines(root / "data.jsonl", lines)),
        "language": str(write_decoder(root / "lm", "llama", captions_of(lines))),
        "vision": str(write_vision(root / "vision")),
    }


def captions_of(lines: list[dict]) -> list[str]:
    return [caption for line in lines for caption in line["captions"]]


def paint(folder: Path, count: int, first: int = 0) -> Pairs:
    """Pictures of noise, no two alike in size and content."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for i in range(first, first + count):
        noise = np.random.default_rng(i).integers(0, 256, (5 + i % 3, 4 + i % 5, 3), dtype=np.uint8)
        path = folder / f"{i:03}.png"
        Image.fromarray(noise).resize((50 + i % 7, 40)).save(path)
        found.append((str(path), f"id{i}"))
    return found


def noise(root: Path) -> dict[str, str]:
    """40 pictures of noise, and random backbones."""
    captions = ["a red square", "noise"]
    lines = [
        {"image": path, "captions": captions, "id": id, "split": "val" if i > 30 else "train"}
        for i, (path, id) in enumerate(paint(root / "images", 40))
    ]
    return {
        "data": str(write_lines(root / "data.jsonl", lines)),
        "language": str(write_decoder(root / "lm", "llama", ["a red square noise"])),
        "vision": str(write_vision(root / "vision")),
    }


def stripes(root: Path) -> dict[str, str]:
    """Eight grey pictures from dark to light with a stripe, named and asked about.

    The language model is fitted to the words, as a pretrained one is: the variants with a thousand
    parameters can steer one that knows its language, not one of random numbers.
    """
    lines = []
    for i, word in enumerate(ANIMALS):
        picture = Image.new("RGB", (32, 32), (30 * i, 30 * i, 30 * i))
        picture.paste((250 - 30 * i, 40 * (i % 3), 80), (4 * i, 0, 4 * i + 4, 32))
        picture.save(root / f"{i}.png")
        answers = [word] * 7 + [ANIMALS[(i + 1) % 8]] * 3
        lines.append({"image": f"{i}.png", "captions": [word], "question": QUESTION,
                      "answers": answers, "split": "train"})  # fmt: skip
    lines.append(lines[0] | {"split": "val"})
    texts = ANIMALS + [f"{QUESTION} Answer: {word}" for word in ANIMALS]
    return {
        "data": str(write_lines(root / "data.jsonl", lines)),
        "language": str(fit_decoder(root / "lm", "opt", texts * 4, epochs=12)),
        "vision": str(write_vision(root / "vision")),
    }


def clips(root: Path) -> dict[str, Path]:
    """Nine drawn videos, sounds and three pictures, and random backbones of each kind."""
    texts = []
    for name, make in (("video", draw_av.draw_videos), ("audio", draw_av.draw_sounds)):
        for r in make(root / name, train=6, held_out=3):
            texts += [r["captions"][0], f"{r['question']} Answer: {r['answers'][0]}"]
    write_clip_encoder(root / "timesformer", TIMESFORMER)
    write_clip_encoder(root / "ast", AST | {"max_length": 100, "num_mel_bins": 32})
    write_vision(root / "vit")
    write_decoder(root / "lm", "opt", texts)
    pictures = []
    for i, colour in enumerate(COLOURS):
        Image.new("RGB", (64, 64), colour).save(root / f"{i}.png")
        pictures.append({"image": f"{i}.png", "question": "what colour is the star?",
                         "answers": [colour], "split": "train"})  # fmt: skip
    write_lines(root / "pictures.jsonl", pictures)
    return {path.name: path for path in root.iterdir()}


def tones(root: Path, train: int, held_out: int) -> dict[str, str]:
    """Drawn sounds, an encoder that tells what is heard in them, and a decoder that writes it."""
    records = draw_av.draw_sounds(root / "data", train=train, held_out=held_out)
    names = draw_av.Signal.__dataclass_fields__
    labels = [{name: record[name] for name in names} for record in records]
    vision = {"config": TONE_AST, "fit": "crop", "modality": "audio"}
    view = build_encoder(vision).view()
    sounds = [draw_av.render_sound(draw_av.Signal(**row), 0, i) for i, row in enumerate(labels)]
    inputs = torch.stack([view((sound / 32768).astype("float32")) for sound in sounds])
    model, right = fit_encoder(vision, inputs, labels, train, epochs=18)
    assert right.float().mean() >= 0.98  # the encoder can tell what captions say
    model.save_pretrained(root / "vision")
    items = []
    heard = product(draw_av.KINDS, draw_av.PITCHES, draw_av.BENDS, draw_av.TIMES)
    for tone in [draw_av.Signal(*row) for row in heard] * 60:
        items.append((asdict(tone), "", tone.caption()))
        for question, answer in tone.questions():
            items.append((asdict(tone), f"{question} Answer:", answer))
    return {
        "data": str(root / "data"), "vision": str(root / "vision"),
        "language": str(fit_seeing_decoder(root / "lm", "opt", items, **SEEING)),
    }  # fmt: skip


def scenes(root: Path) -> None:
    """6,300 drawn pictures, the last 300 held out, and a ViT that tells their labels: a minute."""
    draw.draw_images(root / "data", train=6000, held_out=300, seed=0)
    state, right = fit_drawn_vit(6000, 300, epochs=10)
    unseen = torch.tensor([scene.unseen for scene, _ in draw.scenes(6000, 300, seed=0)[6000:]])
    assert right[~unseen].float().mean() >= 0.98  # the encoder can tell what captions say
    write_vision(root / "vision", model_args=DRAWN_VIT, state=state)


def unseen(folder: Path) -> set[str]:
    """Drawn pictures or clips that pair a shape with a colour as training never does."""
    lines = map(json.loads, (folder / "drawn.jsonl").open())
    return {
        str(folder / (line.get("image") or line["video"]))
        for line in lines
        if line.get("combination") == "unseen"
    }


# ------------------------------------------------------------------------------------------- runs


def job(world: dict[str, str], **changes) -> presets.Job:
    """A few epochs of I-Tuning; fields of the recipe are among the changes."""
    recipe = {"batch": 12, "epochs": 4, "rate": 3e-3}
    for name in presets.Recipe.__dataclass_fields__.keys() & changes:
        recipe[name] = changes.pop(name)
    common = {"method": "itune", "fit": "crop", "options": {"drop": 1}, "per_image": 2}
    return presets.Job(**{**common, "recipe": presets.Recipe(**recipe), **world, **changes})


def run(out: Path, **changes) -> presets.Run:
    settings = {"micro": 6, "save_every": 5, "quiet": True, "workers": 0}
    return presets.Run(out=out, device=CPU, **(settings | changes))


def log(out: Path, *keep: str) -> list[dict]:
    """The lines of a run's log, without what hangs on the clock."""
    keep = keep or ("step", "loss", "val_loss", "rate", "gradient_norm")
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [{name: line[name] for name in keep if name in line} for line in lines]


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in log(out) if "loss" in line]


def files(out: Path) -> dict[str, bytes]:
    """The weights of a run, which equal runs have in common to the last bit."""
    return {name: (out / name).read_bytes() for name in ("model.safetensors", "last.safetensors")}


def content(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def steps(out: Path) -> int:
    """How many steps a run has logged so far."""
    log = out / "log.jsonl"
    return log.read_text().count('"loss"') if log.exists() else 0


class When(list):
    """A list of signals that is empty until a condition holds, as if a signal came then."""

    def __init__(self, condition: Callable[[], bool]):
        super().__init__()
        self.condition = condition

    def __bool__(self) -> bool:
        return self.condition()


def stopped(job: presets.Job, run: presets.Run, step: int) -> None:
    """Trains until so many steps are logged: then a signal comes."""
    run.stop = When(lambda: steps(run.out) >= step)
    with pytest.raises(Interrupted):
        train.train(job, run)


def after(questions: int) -> When:
    """A signal that comes after so many questions whether there is one."""
    left = iter(range(questions))
    return When(lambda: next(left, None) is None)


def kill(
    arguments: list[str], number: signal.Signals, ready: Callable[[], bool], program: str = "pass"
) -> tuple[int, str]:
    """Starts ``tinyvl ARGUMENTS`` in a process of its own and signals it as soon as it is ready.

    ``program``: Python to run before it. -> its exit status and what it wrote to standard error.
    """
    command = [sys.executable, "-c", f"{program}; from tinyvl import cli; cli.main()", *arguments]
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # the same sums as here
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    while not ready() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


# --------------------------------------------------------------------------------------- features


def loaded(folder: Path, fit: str = "crop", precision: torch.dtype = torch.float32):
    return features.load_encoder(str(folder), fit, device=CPU, precision=precision)


def fill(out: Path, pictures: Pairs, vision: Path, stop: list | None = None, **changes) -> dict:
    """`extract` with a tiny encoder, in this process."""
    chosen = {k: changes.pop(k) for k in ("fit", "precision") if k in changes}
    description, encoder = loaded(vision, **chosen)
    kinds = {k: changes.pop(k) for k in ("what", "dtype") if k in changes}
    head = features.contents(description, encoder, **kinds)
    run = presets.Run(out, CPU, workers=0, quiet=True)
    if stop is not None:
        run.stop = stop
    return features.extract(out, pictures, encoder, head, run, **changes)
