"""tinyvl from Python: the same results as the commands, for paths, PIL images and tensors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import shell
import torch
from PIL import Image
from tiny import write_captioner, write_decoder, write_text

import tinyvl
from tinyvl import UserError, models

CPU = torch.device("cpu")


def untrained(folder: Path, method: str, language: Path, vision: Path, **options) -> Path:
    """A checkpoint of a method over random backbones."""
    config = models.new_config(
        method, str(language), str(vision), fit="squash", prompt="", options=options
    )
    torch.manual_seed(0)
    model = models.build(config, device=CPU, precision=torch.float32)
    folder.mkdir()
    models.save_config(folder, config)
    models.save(model, folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A model of each task."""
    root, texts = tmp_path_factory.mktemp("models"), ["a red dog runs", "what is this? Answer:"]
    caption = write_captioner(root / "caption", texts)
    vision, lm = caption / "vision", write_decoder(root / "lm", "opt", texts)
    bert = write_text(root / "bert", texts)
    return {
        "caption": caption,
        "vqa": untrained(root / "ask", "epalm", lm, vision, task="vqa"),
        "retrieve": untrained(root / "search", "lilt", bert, vision),
    }


@pytest.fixture(autouse=True)
def shipped(folders, monkeypatch):
    """These models stand for those that are shipped."""
    monkeypatch.setattr(models, "DEFAULT", folders)


@pytest.fixture
def photos(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, name in enumerate(("coffee.png", "rocket.jpg", "chelsea.png")):
        noise = np.random.default_rng(i).integers(0, 256, (20, 24 + i, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / name)
    monkeypatch.chdir(tmp_path)
    return Path("photos")


def lines(*args: object) -> list[dict]:
    done = shell.run(*args, "--json")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def kinds(photos: Path) -> list:
    """The folder's pictures: a path, a PIL image, a tensor."""
    first, second, third = sorted(photos.glob("*.*g"))
    tensor = torch.from_numpy(np.array(Image.open(third))).permute(2, 0, 1)
    return [first, Image.open(second), tensor]


def test_captions_are_the_commands(photos):
    model = tinyvl.load()
    said = model.caption(kinds(photos), batch=2, max_tokens=8)
    command = lines("caption", photos, "--max-tokens", "8")
    assert [s.text for s in said] == [line["caption"] for line in command]
    assert [s.score for s in said] == pytest.approx([line["score"] for line in command], abs=1e-4)
    (alone,) = model.caption(str(photos / "rocket.jpg"), max_tokens=8)
    assert alone.text == said[2].text
    floats = kinds(photos)[2].float() / 255
    assert model.caption(floats, max_tokens=8) == [alone]
    drawn = model.caption(photos / "rocket.jpg", sampling={"seed": 1}, max_tokens=8)
    (line,) = lines("caption", photos / "rocket.jpg", "--sample", "--seed", "1", "--max-tokens=8")
    assert drawn[0].text == line["caption"]
    assert model.caption([]) == []


def test_answers_are_the_commands(photos):
    model, question = tinyvl.load("default", task="vqa"), "what is this?"
    command = lines("ask", photos, question)
    said = model.answer(kinds(photos), question)
    assert [s.text for s in said] == [line["answer"] for line in command]
    others = model.answer(sorted(photos.glob("*.*g")), [question] * 3, batch=2)
    assert [s.text for s in others] == [s.text for s in said]  # sums in batches of another size
    assert [s.score for s in others] == pytest.approx([s.score for s in said], abs=1e-6)
    chosen = model.answer(kinds(photos), question, choices=["dog", "red"])
    command = lines("ask", photos, question, "--choices", "dog,red")
    assert [s.text for s in chosen] == [line["answer"] for line in command]
    assert chosen[0].choices == pytest.approx(command[0]["choices"], abs=1e-5)
    with pytest.raises(UserError, match="2 questions for 3 pictures"):
        model.answer(kinds(photos), [question] * 2)


def test_vectors_and_searches_are_the_commands(photos):
    assert shell.run("index", photos).returncode == 0
    command = lines("retrieve", photos, "-q", "a dog", "-k", "2")
    index = tinyvl.open_index(photos)
    hits = index.search("a dog", k=2)
    assert [hit.path for hit in hits] == [line["path"] for line in command]
    assert [hit.score for hit in hits] == pytest.approx(
        [line["score"] for line in command], abs=1e-6
    )
    assert tinyvl.open_index(photos / ".tinyvl").search("a dog", k=2) == hits
    assert index.search(image=hits[1].path, k=1)[0].path == hits[1].path
    assert index.search("a dog", threshold=1.0) == []
    model = tinyvl.load("default", task="retrieve")
    pictures, (text,) = model.embed_images(kinds(photos), batch=2), model.embed_texts("a dog")
    scores = dict(zip(sorted(map(str, photos.glob("*.*g"))), pictures @ text, strict=False))
    for hit in hits:
        assert float(scores[hit.path]) == pytest.approx(hit.score, abs=1e-6)
    assert model.embed_images([]).shape == (0, text.numel())


def test_a_folder_says_what_its_model_does(folders, photos):
    model = tinyvl.load(folders["vqa"], device="cpu", precision="fp32")
    assert model.answer(photos / "rocket.jpg", "what is this?", beams=1)[0].text is not None
    with pytest.raises(UserError, match=r'to caption, tinyvl.load\("default", task="caption"\)'):
        model.caption(photos / "rocket.jpg")
    with pytest.raises(UserError, match="does not embed"):
        tinyvl.load(folders["vqa"], task="retrieve")


def test_mistakes_cost_one_sentence(photos):
    model = tinyvl.load()
    (photos / "bad.png").write_bytes(b"no")
    with pytest.raises(UserError, match=r"bad\.png: "):
        model.caption(photos / "bad.png")
    with pytest.raises(UserError, match=r"is \(3, H, W\), not \(1, 3, 4, 4\)"):
        model.caption([torch.zeros(1, 3, 4, 4)])
    with pytest.raises(UserError, match="between 0 and 1"):
        model.caption(torch.full((3, 4, 4), 7.0))
    with pytest.raises(UserError, match="no index there"):
        tinyvl.open_index(photos)


def test_the_readmes_example_runs(photos, tmp_path, folders):
    """As a notebook would run it; only the models are smaller."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "ask").symlink_to(folders["vqa"])
    shell.run("index", photos)
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    blocks = [block.split("```")[0] for block in readme.split("```python\n")[1:]]
    (example,) = [block for block in blocks if "model.caption" in block]
    names: dict = {}
    exec(example, names)
    assert {Path(hit.path).suffix for hit in names["hits"]} <= {".png", ".jpg"}


def test_the_import_is_light():
    program = "import tinyvl, sys; print(sorted({m.split('.')[0] for m in sys.modules}))"
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=os.environ, check=True
    ).stdout
    assert not {"torch", "numpy", "PIL", "timm", "typer", "rich"} & set(eval(found))
