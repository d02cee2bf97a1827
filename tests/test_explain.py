"""Heat maps against slow references, and what `tinyvl explain` prints and draws."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import shell
import torch
from PIL import Image
from test_api import untrained
from tiny import write_captioner, write_decoder, write_text, write_vision

from tinyvl import UserError, explain, media, models
from tinyvl.decode import Style
from tinyvl.text import ANSWERS

CPU = torch.device("cpu")
TEXTS = ["a red dog runs", "what is this? Answer:"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    itune = write_captioner(root / "itune", TEXTS)
    vision, lm = itune / "vision", write_decoder(root / "lm", "llama", TEXTS)
    cnn = write_vision(root / "cnn", "resnet18", {"channels": [8, 8, 8, 16], "stem_width": 8})
    bert = write_text(root / "bert", TEXTS)
    asks = {"task": "vqa", "soft": 3, "extract": [1, 3], "inject": [1, 3]}
    mean = {"image": {"pool": "mean"}}
    return {
        "itune": itune,
        "epalm": untrained(root / "epalm", "epalm", lm, vision, **asks),
        "cls": untrained(root / "cls", "lilt", bert, vision),
        "map": untrained(root / "map", "lilt", bert, cnn, **mean),
        "mlp": untrained(root / "mlp", "lilt", bert, cnn, image={"pool": "mean", "mlp": 12}),
    }


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> str:
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("photos") / "a.png"
    Image.fromarray(noise).save(path)
    return str(path)


def opened(folder: Path, photo: str, task: str):
    model = models.load(str(folder), task=task, device=CPU)
    return model, model.encoder.transform()(media.load_image(photo))


def test_a_words_map_is_the_attention_that_chose_it(folders, photo):
    model, picture = opened(folders["itune"], photo, "caption")
    line = explain.explain(model, photo, picture)
    assert line["caption"] == model.caption(picture[None])[0][0]
    words = line["caption"].split()
    assert [word["word"] for word in line["words"]] == words
    ids = [model.text.bos, *model.text.encode([line["caption"]])[0]]
    with torch.no_grad():
        tokens = model.percept(picture[None]).tokens[0]  # (17, D): [CLS] and 4 x 4 patches
        read = {}
        last = model.decoder.layers[-1].ffn
        hook = last.register_forward_hook(lambda _, x, out: read.update(x=x[0]))
        model.run(torch.tensor([ids[:-1]]), model.see(model.percept(picture[None])))
        hook.remove()
        module = model.itune[str(len(model.decoder.layers) - 1)]
        for i, word in enumerate(line["words"]):  # equation 4
            scores = [module.q(read["x"][0, i]) @ module.k(token) for token in tokens]
            wanted = torch.stack(scores).softmax(0)[1:].view(4, 4)
            np.testing.assert_allclose(word["map"], wanted, atol=2e-5)


def test_layers_are_chosen_and_averaged(folders, photo):
    model, picture = opened(folders["itune"], photo, "caption")
    each = [explain.explain(model, photo, picture, layer=str(i))["words"] for i in (1, 2, 3)]
    (mean,) = [explain.explain(model, photo, picture, layer="mean")["words"]]
    for i, word in enumerate(mean):
        np.testing.assert_allclose(
            word["map"], np.mean([words[i]["map"] for words in each], 0), atol=2e-5
        )
    with pytest.raises(UserError, match="1 to 3"):
        explain.explain(model, photo, picture, layer="4")


def test_grids_are_added_by_area():
    weights = torch.zeros(1, 4 + 9)
    weights[0, 3] = 1.0  # the lower right quarter
    weights[0, 4] = 2.0  # the upper left ninth
    (found,) = explain.spread(weights, [2, 3])
    wanted = torch.tensor([[2, 0, 0], [0, 1 / 9, 2 / 9], [0, 2 / 9, 4 / 9]])
    torch.testing.assert_close(found, wanted)


def test_words_lean_on_slot_and_prompt_as_a_softmax_says(folders, photo):
    """The first token of the answer, in each layer: over the keys of prefix and question."""
    model, picture = opened(folders["epalm"], photo, "vqa")
    line = explain.explain(model, photo, picture, question="what is this?")
    (wanted, _), *_ = model.answer(picture[None], ["what is this?"])
    assert line["answer"] == wanted
    word = line["words"][0]
    assert set(word["levels"]) == {"2", "3"}
    assert len(word["prompt"]) == 3
    lead = model.asked(["what is this?"], 10)[0]
    said = model.written(model.look(picture[None]), [lead], Style(**ANSWERS))[0].tokens
    lead += said[: explain.words_of(model.text, said)[0][1][0]]  # up to the word's first token
    assert len(explain.words_of(model.text, said)[0][1]) == 1
    with torch.no_grad():
        visual, total = model.see(model.percept(picture[None])), {}
        for layer in range(3):
            kept = {}
            hook = model.decoder.layers[layer].norm1.register_forward_hook(
                lambda _, x, out, kept=kept: kept.update(x=out)
            )
            model.run(torch.tensor([lead]), visual)
            hook.remove()
            attention = model.decoder.layers[layer].attention
            turn = model.decoder._rope(torch.arange(len(lead))[None])
            q, own = (
                explain.rotate(project(kept["x"]).unflatten(-1, (-1, 12)), *turn).transpose(1, 2)[0]
                for project in (attention.q, attention.k)
            )  # (heads, T, 12)
            q = q[:, -1]
            keys = torch.cat((visual[layer][0][0], own), 1).repeat_interleave(2, 0)
            shares = (q[:, None] * keys).sum(-1).div(math.sqrt(12)).softmax(-1).mean(0)
            total[layer] = shares[: visual[layer][0].shape[2]]
    assert [len(shares) for shares in total.values()] == [3, 4, 4]  # the slot stands first
    slots = {"2": float(total[1][0]), "3": float(total[2][0])}
    assert word["levels"] == pytest.approx(slots, abs=2e-5)
    prompt = (total[0] + total[1][1:] + total[2][1:]) / 3
    np.testing.assert_allclose(word["prompt"], prompt, atol=2e-5)


@pytest.mark.parametrize("kind", ["map", "mlp"])
def test_regions_add_up_to_the_score(folders, photo, kind):
    model, picture = opened(folders[kind], photo, "retrieve")
    for parameter in model.image_mlp.parameters() if kind == "mlp" else ():
        parameter.data = 0.3 * torch.randn_like(parameter)
    line = explain.matched(model, photo, picture, "a red dog")
    score = float(model.embed_images(picture[None])[0] @ model.embed_texts(["a red dog"])[0])
    assert line["score"] == pytest.approx(score, abs=1e-4)
    assert np.sum(line["words"][0]["map"]) == pytest.approx(score, abs=1e-3)


def test_where_a_token_is_read_regions_are_covered(folders, photo):
    model, picture = opened(folders["cls"], photo, "retrieve")
    cells = np.array(explain.matched(model, photo, picture, "a red dog")["words"][0]["map"])
    assert cells.shape == (8, 8)
    grey = picture.float().mean((1, 2)).to(torch.uint8)
    without = picture.clone()
    without[:, 10:18, 0:6] = grey[:, None, None]  # the cell in row 3, column 0, and a border
    (text,) = model.embed_texts(["a red dog"])
    whole, left = (model.embed_images(torch.stack((picture, without))) @ text).tolist()
    assert cells[3, 0] == pytest.approx(whole - left, abs=2e-5)


def test_what_is_seen_of_a_cropped_picture(folders, photo):
    model, _ = opened(folders["map"], photo, "retrieve")
    assert explain.box_of(model.encoder, photo) == [0, 0, 1, 1]  # squashed
    model.encoder.fit = "crop"
    model.encoder.data_config |= {"crop_mode": "center", "crop_pct": 0.8}
    assert explain.box_of(model.encoder, photo) == [0.18, 0.1, 0.82, 0.9]


def test_from_the_command_line(folders, photo, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no")
    done = shell.run("explain", photo, "-m", folders["itune"])
    words = [line.split("\t") for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr
    assert all(note.startswith("most at 0.") for _, note in words)
    sheet = tmp_path / "sheet.png"
    done = shell.run("explain", photo, bad, "-m", folders["itune"], "--json", "-o", sheet)
    assert done.returncode == 1
    first, second = map(json.loads, done.stdout.splitlines())
    assert [word["word"] for word in first["words"]] == [word for word, _ in words]
    assert set(second) == {"path", "error"}
    assert Image.open(sheet).width > 2 * explain.TILE
    lines = tmp_path / "lines.jsonl"
    lines.write_text(done.stdout)
    done = shell.run("page", lines, "--quiet")
    assert done.stdout.count("data-map=") == len(words)
    done = shell.run(
        "explain", photo, "-m", folders["epalm"], "--question", "what is this?", "-o", sheet
    )
    assert (done.returncode, done.stdout) == (0, f"{sheet}\n"), done.stderr
    done = shell.run("explain", photo, "-m", folders["map"], "--text", "a red dog")
    assert done.stdout.startswith("a red dog\tmost at 0.")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("epalm",), "does not caption"),
        (("itune", "--layer", "soon"), "--layer is last, mean, or a layer"),
        (("itune", "--text", "a", "--question", "b"), "choose one"),
    ],
)
def test_mistakes_cost_one_sentence(args, said, folders, photo):
    done = shell.run("explain", photo, "-m", folders[args[0]], *args[1:])
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
