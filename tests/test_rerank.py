"""A search model that chooses among a captioner's beams."""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import shell
import torch
from PIL import Image
from tiny import write_decoder, write_text, write_vision

import tinyvl
from tinyvl import UserError, decode, models

CPU = torch.device("cpu")
SEARCH = {"embed": 16, "text": {"pool": "mean"}}
TEXTS = ["a red dog runs", "two cats sleep here", "the sky is blue and wide"]


class World(NamedTuple):
    captioner: Path
    search: Path
    media: dict


def untrained(folder: Path, method: str, language: Path, vision: Path, *, media=None, **options):
    """A checkpoint over random backbones whose modules say much."""
    fit = options.pop("fit", "squash")
    config = models.new_config(
        method, str(language), str(vision), fit=fit, prompt="", options=options, media=media
    )
    torch.manual_seed(3)
    model = models.build(config, device=CPU, precision=torch.float32)
    for name, parameter in model.named_parameters():
        if model.kept(name) and name != "temperature":
            parameter.data += 0.3 * torch.randn_like(parameter)
    if method == "lilt":  # else all texts are alike
        model.text_projection.bias.data = -(
            model.text_projection.weight
            @ model.text(*model.text.pad(model.text.encode(TEXTS, 9))).mean(0)
        ).detach()
    folder.mkdir()
    models.save_config(folder, config)
    models.save(model, folder)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("rerank")
    write_decoder(root / "lm", "llama", TEXTS)
    write_text(root / "bert", TEXTS)
    write_vision(root / "vit")
    write_vision(root / "cnn", "test_efficientnet", {})
    return root


@pytest.fixture(scope="module", params=["vit", "cnn"])
def world(request, root) -> World:
    """A ViT; a CNN of which the captioner reads more: lower maps, and a larger picture's tokens."""
    name, media = request.param, {}
    if name == "cnn":
        media = {"lower": 2, "larger": 224}
    return World(
        untrained(root / f"{name}-i", "itune", root / "lm", root / name, media=media, rank=6),
        untrained(root / f"{name}-s", "lilt", root / "bert", root / name, **SEARCH),
        media,
    )


@pytest.fixture(scope="module")
def photos(root) -> Path:
    folder = root / "photos"
    folder.mkdir()
    for i in range(8):
        noise = np.random.default_rng(i).integers(0, 256, (6, 6 + i, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((90, 70)).save(folder / f"{i}.png")
    return folder


def load(folder: Path, **more):
    return models.load(str(folder), device=CPU, precision=torch.float32, **more)


def seen(model, photos: Path) -> torch.Tensor:
    view = model.encoder.view()
    return torch.stack([view(Image.open(file)) for file in sorted(photos.iterdir())])


def slow(world: World, photos: Path, monkeypatch, beams: int = 5) -> list[list[tuple]]:
    """Of each photo, one by one, all (text, log-probability, similarity) that were found."""
    captioner = load(world.captioner)
    search = load(world.search, task="retrieve")
    found: list = []
    beam = decode.beam

    def all_of_them(*args, **options):
        found.extend(beam(*args, returned=beams, **options))
        return found[-1:]

    out = []
    for picture in seen(captioner, photos):
        with monkeypatch.context() as patch:
            patch.setattr(decode, "beam", all_of_them)
            captioner.caption(picture[None], beams=beams, max_tokens=8)
        own = [(captioner.text.decode(h.tokens), h.mean_logprob) for h in found.pop()]
        vector = search.embed_images(picture[None])[0]
        close = [float(vector @ search.embed_texts([text])[0]) for text, _ in own]
        out.append([(text, score, like) for (text, score), like in zip(own, close, strict=True)])
    return out


def test_the_text_is_the_best_by_both_models(world, photos, monkeypatch):
    every = slow(world, photos, monkeypatch)
    wanted = [max(own, key=lambda each: each[1] + 4 * each[2]) for own in every]
    model = load(world.captioner, rerank=str(world.search))
    said = model.caption(seen(model, photos), beams=5, max_tokens=8)
    assert [text for text, _ in said] == [text for text, *_ in wanted]
    torch.testing.assert_close([s for _, s in said], [s for _, s, _ in wanted], rtol=0, atol=1e-4)
    changed = sum(best[0] != own[0][0] for best, own in zip(wanted, every, strict=True))
    assert changed > 1  # the likeliest is not always chosen


def test_the_similarity_is_the_search_models_own(world, photos):
    """What it reads is found among the captioner's tokens: no second pass of the encoder."""
    model, search = (
        load(world.captioner, rerank=str(world.search)),
        load(world.search, task="retrieve"),
    )
    pictures = seen(model, photos)
    with torch.no_grad():
        tokens = model.encoder(pictures).tokens
    assert model.reranker.model.encoder.model is model.encoder.model  # in memory once
    assert bool(world.media) == (tokens.shape[1:] != search.encoder.tokens(pictures).shape[1:])
    found = model.reranker.similarities(tokens, [TEXTS, TEXTS[:1]] * 4)
    whole = search.embed_images(pictures) @ search.embed_texts(TEXTS).T
    for i, own in enumerate(found):
        torch.testing.assert_close(torch.tensor(own), whole[i, : len(own)], rtol=0, atol=1e-5)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_in_half_precision_the_similarity_is_nearly_the_same(world, photos, precision):
    model, search = (
        models.load(
            str(world.captioner), device=CPU, precision=precision, rerank=str(world.search)
        ),
        load(world.search, task="retrieve"),
    )
    pictures = seen(model, photos)
    found = model.reranker.similarities(model.look(pictures).tokens, [TEXTS] * 8)
    whole = search.embed_images(pictures) @ search.embed_texts(TEXTS).T
    torch.testing.assert_close(torch.tensor(found), whole, rtol=0, atol=0.03)
    assert len(model.caption(pictures, beams=3, max_tokens=8)) == 8


def test_greedy_and_sampled_captions_are_left_alone(world, photos):
    plain, model = load(world.captioner), load(world.captioner, rerank=str(world.search))
    pictures = seen(model, photos)
    drawn = {"temperature": 1.0, "seed": 1}
    for search in ({"beams": 1}, {"sampling": drawn}):
        assert model.caption(pictures, **search) == plain.caption(pictures, **search)


def test_what_is_trained_stays_the_captioners(world):
    model = load(world.captioner, rerank=str(world.search))
    names = {name for name, _ in load(world.captioner).named_parameters()}
    assert {name for name, _ in model.named_parameters()} == names


def test_a_config_asks_for_the_default_and_the_command_line_for_another_or_none(
    world, photos, tmp_path, monkeypatch
):
    monkeypatch.setitem(models.DEFAULT, "retrieve", world.search)
    config = models.open_checkpoint(str(world.captioner)).config
    models.save_config(tmp_path, config | {"rerank": "default"})
    weights = (world.captioner / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights)

    def said(model: Path, *options: object) -> list[str]:
        done = shell.run("caption", photos, "--max-tokens", 8, "--model", model, *options)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    plain, ranked = said(world.captioner), said(world.captioner, "--rerank", world.search)
    assert plain != ranked
    assert said(tmp_path) == ranked
    assert said(tmp_path, "--rerank", "none") == plain
    assert said(tmp_path, "--beams", 1) == said(world.captioner, "--beams", 1)
    files = sorted(map(str, photos.iterdir()))
    here = tinyvl.load(tmp_path).caption(files, max_tokens=8)
    assert [f"{p}\t{one.text}" for p, one in zip(files, here, strict=True)] == ranked
    for there in (
        tinyvl.load(tmp_path, rerank="none").caption(files, max_tokens=8),
        tinyvl.load(tmp_path).caption(files, max_tokens=8, rerank="none"),
    ):
        assert [f"{p}\t{one.text}" for p, one in zip(files, there, strict=True)] == plain
    shown = shell.run("explain", files[0], "--model", tmp_path, "--json")
    assert json.loads(shown.stdout)["caption"] == tinyvl.load(tmp_path).caption(files[0])[0].text
    shown = shell.run("explain", files[0], "--model", tmp_path, "--json", "--rerank", "none")
    assert (
        json.loads(shown.stdout)["caption"]
        == load(world.captioner).caption(seen(load(world.captioner), photos)[:1])[0][0]
    )


def test_a_file_of_likeliest_captions_is_not_gone_on_with_by_others(world, photos, tmp_path):
    out = tmp_path / "captions.tsv"
    common = ("caption", photos, "--max-tokens", 8, "--model", world.captioner, "-o", out)
    assert shell.run(*common).returncode == 0
    note = tmp_path / ".captions.tsv.json"
    about = json.loads(note.read_text())
    assert about.pop("rerank") == "none"
    for known in (about | {"rerank": "none"}, about):  # an older version did not say
        note.write_text(json.dumps(known))
        done = shell.run(*common, "--resume", "--rerank", world.search)
        assert done.returncode == 2
        assert "made with rerank none" in done.stderr
        assert shell.run(*common, "--resume").returncode == 0


def test_a_strangers_config_names_no_other_model(world, tmp_path):
    config = models.open_checkpoint(str(world.captioner)).config
    models.save_config(tmp_path, config | {"rerank": "hf://someone/else"})
    with pytest.raises(UserError, match="is not default"):
        models.open_checkpoint(str(tmp_path))


def test_an_evaluation_says_so_and_goes_on_with_the_same_alone(world, photos, tmp_path):
    lines = [{"image": str(file), "captions": TEXTS} for file in sorted(photos.iterdir())]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rest = (world.captioner, data, "--metrics", "CIDEr", "--out", tmp_path / "out", "--json")
    done = shell.run("eval", "caption", "--rerank", world.search, *rest)
    assert done.returncode == 0, done.stderr
    decoding = json.loads(done.stdout)["decoding"]
    assert decoding["rerank"] == str(world.search)
    weights = (world.search / "model.safetensors").read_bytes()
    assert decoding["reranker"] == hashlib.sha256(weights).hexdigest()  # whatever its name is
    other = shell.run("eval", "caption", *rest, "--resume")
    assert other.returncode == 2
    assert "rerank" in other.stderr or "decoding" in other.stderr


def test_stored_tokens_do_as_pictures_do(world, photos, root, tmp_path):
    vision = json.loads((world.captioner / "config.json").read_text())["vision"]["name"]
    maps = [word for key, value in world.media.items() for word in (f"--{key}", value)]
    made = shell.run(
        "features", photos, "-o", tmp_path / "all", "--vision", vision, "--fit", "squash", *maps,
        "--dtype", "fp32",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    common = ("caption", "--model", world.captioner, "--rerank", world.search, "--max-tokens", 8)
    direct, stored = shell.run(*common, photos), shell.run(*common, "--features", tmp_path / "all")
    assert stored.returncode == 0, stored.stderr
    assert stored.stdout == direct.stdout


def test_stored_summaries_have_nothing_to_read(root, photos, tmp_path):
    clipcap = untrained(tmp_path / "clipcap", "clipcap", root / "lm", root / "vit")
    search = untrained(tmp_path / "search", "lilt", root / "bert", root / "vit", embed=16)
    made = shell.run("features", photos, "-o", tmp_path / "all", "--vision", root / "vit",
        "--fit", "squash")  # fmt: skip
    assert made.returncode == 0, made.stderr
    common = ("caption", "--model", clipcap, "--rerank", search, "--max-tokens", 8)
    assert shell.run(*common, photos).returncode == 0
    out = tmp_path / "captions.tsv"
    done = shell.run(*common, "--features", tmp_path / "all", "-o", out)
    assert done.returncode == 2
    assert "--rerank none" in done.stderr
    assert not out.exists()


def test_what_cannot_rerank_is_refused_in_a_sentence(root, tmp_path):
    lm, bert, vit = (root / name for name in ("lm", "bert", "vit"))
    captioner = untrained(tmp_path / "captioner", "itune", lm, vit)
    other = write_vision(tmp_path / "other", seed=5)
    layernorm = {"adapter": "none", "unlock": "layernorm", "layers": None}
    searches = {
        "another encoder": (other, {}, "on the same encoder"),
        "another fit": (vit, {"fit": "crop"}, "on the same encoder"),
        "another size": (vit, {"size": 64}, "pictures of 64 pixels"),
        "a grown one": (vit, {"image": {"adapter": "deep"}}, "was changed in training"),
        "a trained one": (vit, {"image": layernorm}, "was changed in training"),
    }
    for name, (vision, options, why) in searches.items():
        search = untrained(tmp_path / name, "lilt", bert, vision, **options)
        with pytest.raises(UserError, match=why):
            load(captioner, rerank=str(search))
    with pytest.raises(UserError, match="no search model"):
        load(captioner, rerank=str(captioner))
    unfrozen = untrained(tmp_path / "unfrozen", "epalm", lm, vit, unfreeze=["vision"])
    with pytest.raises(UserError, match="was changed in training"):
        load(unfrozen, rerank=str(untrained(tmp_path / "plain", "lilt", bert, vit)))
    video = untrained(
        tmp_path / "video", "epalm", lm, vit, media={"modality": "video", "frames": 2}
    )
    with pytest.raises(UserError, match="perceives video"):
        load(video, rerank=str(tmp_path / "plain"))
    with pytest.raises(UserError, match="for captions"):
        load(tmp_path / "plain", task="retrieve", rerank=str(tmp_path / "plain"))
    for options in (["--beams", 1], ["--sample"]):
        done = shell.run("caption", bert, "--model", captioner, "--rerank", "default", *options)
        assert done.returncode == 2
        assert "chooses among beams" in done.stderr
