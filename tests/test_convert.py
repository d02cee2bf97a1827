"""Files in the layout of the papers' own code, of random weights, against references of that code.

The references are written down here from what the original models compute, slowly and plainly.
"""

import json
import math
import os
import sys
import types
from pathlib import Path

import pytest
import shell
import tiny
import torch
import torch.nn.functional as F
import worlds
from safetensors.torch import load_file

from tinyvl import UserError, models, presets, train
from tinyvl.decoder import Cache

CPU = torch.device("cpu")
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)  # CLIP's
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
TEXTS = ["a red square .", "a blue circle at the left ."]
State = dict[str, torch.Tensor]


def pictures(count: int = 4, size: int = 32) -> torch.Tensor:
    torch.manual_seed(5)
    return torch.randint(256, (count, 3, size, size), dtype=torch.uint8)


def seen(x: torch.Tensor) -> torch.Tensor:
    return (x / 255 - MEAN) / STD


def noise(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [0.3 * torch.randn(shape) for shape in shapes]


def linear(state: State, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def norm(state: State, name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def load(folder: Path, task: str = "caption"):
    return models.load(str(folder), task=task, device=CPU, precision=torch.float32)


def failed(*args: object) -> str:
    done = shell.run("convert", *args)
    assert done.returncode, done.stderr
    assert done.stderr.strip().count("\n") == 0, done.stderr
    return done.stderr


# ---------------------------------------------------------------------------------------- ClipCap

CLIP = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4,
        "num_classes": 24}  # fmt: skip
LENGTH, WIDTH = 4, 48


@pytest.fixture(scope="module")
def clip_parts(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("clipcap")
    tiny.write_decoder(root / "lm", "gpt2", TEXTS)
    tiny.write_vision(root / "vision", "vit_base_patch32_clip_quickgelu_224", CLIP)
    return root


def gpt2(root: Path):
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel.from_pretrained(root / "lm").eval()


def clipcap_state(root: Path, mapping: str) -> State:
    """As `torch.save(model.state_dict())` of the authors' ClipCaptionPrefix."""
    torch.manual_seed(2)
    state = {f"gpt.{name}": tensor for name, tensor in gpt2(root).state_dict().items()}
    state["gpt.transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    middle, wide = WIDTH * LENGTH // 2, WIDTH * LENGTH
    shapes: dict[str, tuple[int, ...]] = {}
    if mapping == "mlp":
        shapes = {"model.0.weight": (middle, 24), "model.0.bias": (middle,),
                  "model.2.weight": (wide, middle), "model.2.bias": (wide,)}  # fmt: skip
    else:
        shapes = {"linear.weight": (wide, 24), "linear.bias": (wide,),
                  "prefix_const": (LENGTH, WIDTH)}  # fmt: skip
        for i in range(2):
            layer = {"attn.to_queries.weight": (WIDTH, WIDTH),
                     "attn.to_keys_values.weight": (2 * WIDTH, WIDTH),
                     "attn.project.weight": (WIDTH, WIDTH), "attn.project.bias": (WIDTH,),
                     "mlp.fc1.weight": (2 * WIDTH, WIDTH), "mlp.fc1.bias": (2 * WIDTH,),
                     "mlp.fc2.weight": (WIDTH, 2 * WIDTH), "mlp.fc2.bias": (WIDTH,)}  # fmt: skip
            for k in (1, 2):
                layer |= {f"norm{k}.weight": (WIDTH,), f"norm{k}.bias": (WIDTH,)}
            shapes |= {f"transformer.layers.{i}.{name}": shape for name, shape in layer.items()}
    made = zip(shapes, noise(*shapes.values()), strict=True)
    return state | {f"clip_project.{name}": tensor for name, tensor in made}


def their_prefix(state: State, vector: torch.Tensor) -> torch.Tensor:
    """One picture's vector (24,) -> (LENGTH, WIDTH)."""
    own = {n.removeprefix("clip_project."): t for n, t in state.items() if "clip_project" in n}
    if "model.0.weight" in own:
        return linear(own, "model.2", linear(own, "model.0", vector).tanh()).view(LENGTH, WIDTH)
    x = torch.cat([linear(own, "linear", vector).view(LENGTH, WIDTH), own["prefix_const"]])
    for i in range(2):
        layer = f"transformer.layers.{i}"
        normed = norm(own, f"{layer}.norm1", x, 1e-5)
        queries = linear(own, f"{layer}.attn.to_queries", normed).view(-1, 8, WIDTH // 8)
        both = linear(own, f"{layer}.attn.to_keys_values", normed).view(-1, 2, 8, WIDTH // 8)
        scores = torch.einsum("nhd,mhd->nmh", queries, both[:, 0]) * (WIDTH // 8) ** -0.5
        mixed = torch.einsum("nmh,mhd->nhd", scores.softmax(1), both[:, 1]).reshape(-1, WIDTH)
        x = x + linear(own, f"{layer}.attn.project", mixed)
        inner = linear(own, f"{layer}.mlp.fc1", norm(own, f"{layer}.norm2", x, 1e-5)).relu()
        x = x + linear(own, f"{layer}.mlp.fc2", inner)
    return x[LENGTH:]


def projected(root: Path, x: torch.Tensor) -> torch.Tensor:
    """CLIP's embedding of pictures: timm's model with its head."""
    import timm

    model = timm.create_model("vit_base_patch32_clip_quickgelu_224", **CLIP).eval()
    model.load_state_dict(load_file(root / "vision/model.safetensors"))
    return model(seen(x))


@pytest.mark.parametrize(("mapping", "unit"), [("mlp", False), ("transformer", True)])
def test_clipcap(clip_parts, tmp_path, mapping, unit):
    root, state = clip_parts, clipcap_state(clip_parts, mapping)
    torch.save(state, tmp_path / "weights.pt")
    parts = ["--lm", root / "lm", "--vision", root / "vision", *["--unit"] * unit]
    out = tmp_path / "out"
    done = shell.run("convert", "clipcap", tmp_path / "weights.pt", "-o", out, *parts)
    assert (done.returncode, done.stdout) == (0, f"{out}\n"), done.stderr
    config = models.read_config(out)
    assert config["options"]["length"] == LENGTH
    assert config["vision"]["config"]["pretrained_cfg"]["crop_pct"] == 1.0
    assert str(root) not in (out / "README.md").read_text()
    assert "```\ntinyvl convert clipcap weights.pt" in (out / "README.md").read_text()
    model, theirs, x = load(out), gpt2(root), pictures()
    stop, ended = model.text.eos, 0
    assert model.text.tokenizer.id_to_token(stop) == "."
    captions = model.written(x, [[model.text.bos]] * 4, style(12))
    with torch.no_grad():
        vectors = projected(root, x)
        vectors = vectors / vectors.norm(2, -1, keepdim=True) if unit else vectors
        for i in range(4):
            prefix = their_prefix(state, vectors[i])
            tokens = torch.tensor([3, 5, 2, 4])
            words = torch.cat([prefix, theirs.transformer.wte(tokens)])
            slow = theirs(inputs_embeds=words[None]).logits[0, LENGTH - 1 :]
            ids, visual = (
                torch.tensor([[model.text.bos, *tokens]]),
                model.see(model.encoder(x[[i]])),
            )
            fast = model.decoder.logits(model.run(ids, visual))[0]
            torch.testing.assert_close(fast, slow, rtol=0, atol=1e-4)
            cache = Cache()
            steps = [model.run(ids[:, t : t + 1], visual, cache) for t in range(5)]
            cached = model.decoder.logits(torch.cat(steps, 1))[0]
            torch.testing.assert_close(cached, slow, rtol=0, atol=1e-4)
            said: list[int] = []
            while len(said) < 12:  # greedy, as generate2 with one entry
                words = torch.cat([prefix, theirs.transformer.wte(torch.tensor(said).long())])
                logits = theirs(inputs_embeds=words[None]).logits[0, -1]
                if (token := int(logits.argmax())) == stop:
                    ended += 1
                    break
                said.append(token)
            assert captions[i].tokens == said
    print(ended)


def style(tokens: int):
    from tinyvl.decode import Style

    return Style(beams=1, max_tokens=tokens)


def test_clipcap_learns_on_from_there(clip_parts, tmp_path):
    """The loss has a gradient, also through what stands in the place of [bos]."""
    torch.save(clipcap_state(clip_parts, "mlp"), tmp_path / "w.pt")
    parts = ["--lm", clip_parts / "lm", "--vision", clip_parts / "vision"]
    assert (
        shell.run("convert", "clipcap", tmp_path / "w.pt", "-o", tmp_path / "o", *parts).returncode
        == 0
    )
    config = models.read_config(tmp_path / "o")
    model = models.build(config, device=CPU, precision=torch.float32)
    models.load_weights(model, tmp_path / "o")
    ids = model.encode(["a red square ."], 20)
    assert model.text.eos not in ids[0]
    batch = model.collate([*ids, ids[0][:1]], [0, 1], pictures(2), [0, 1])
    loss, tokens = model.loss(batch)
    assert tokens == len(ids[0]) + 1 + 2
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.mapping.parameters())


@pytest.fixture(scope="module")
def dotted(tmp_path_factory) -> dict[str, str]:
    """Coloured squares, a CLIP with its projection, and a decoder that knows the full stop."""
    root = tmp_path_factory.mktemp("dotted")
    world = worlds.squares(root)
    captions = worlds.captions_of(
        [json.loads(x) for x in Path(world["data"]).read_text().splitlines()]
    )
    tiny.write_decoder(root / "gpt", "gpt2", [*captions, "."])
    tiny.write_vision(root / "clip", "vit_base_patch32_clip_quickgelu_224", CLIP)
    return world | {"language": str(root / "gpt"), "vision": str(root / "clip")}


@pytest.mark.parametrize("cache", [True, False])
def test_clipcap_trains_as_its_authors_did(dotted, tmp_path, cache):
    options = {"bare": True, "length": 4}
    job = worlds.job(dotted, method="clipcap", options=options, media={"projected": "unit"})
    train.train(job, worlds.run(tmp_path / "out", cache=cache))
    losses = worlds.losses(tmp_path / "out")
    assert losses[-1] < losses[0]
    assert models.start_of(str(tmp_path / "out"), "clipcap")["media"] == {"projected": "unit"}
    assert len(load(tmp_path / "out").caption(pictures(2), beams=2)) == 2
    asked = {"projected": "plain", "bare": True}
    assert presets.job_of("clipcap", asked).media == {"projected": "plain"}
    without = dotted | {"language": str(Path(dotted["language"]).parent / "lm")}
    job = worlds.job(without, method="clipcap", options=options)
    with pytest.raises(UserError, match="no full stop"):
        train.train(job, worlds.run(tmp_path / "none"))


def test_clipcap_that_cannot_be_is_refused(clip_parts, tmp_path):
    good = clipcap_state(clip_parts, "mlp")
    file, parts = tmp_path / "w.pt", ["--lm", clip_parts / "lm", "--vision", clip_parts / "vision"]

    def said(state: State, *more: object) -> str:
        torch.save(state, file)
        assert not (tmp_path / "o").exists()
        return failed("clipcap", file, "-o", tmp_path / "o", *(more or parts))

    tuned = dict(good)
    name = "gpt.transformer.h.1.mlp.c_fc.weight"
    tuned[name] = good[name] + 1e-3
    assert "layers.1.ffn.up.weight differs" in said(tuned)
    assert "keeps the language model frozen" in said(tuned)
    assert "no clip_project" in said({"gpt.x": torch.zeros(2)})
    deeper = good | {"clip_project.model.4.weight": torch.zeros(2)}
    assert "model.4.weight is nothing" in said(deeper)
    assert "--vision" in said(good, "--lm", clip_parts / "lm")
    tiny.write_vision(
        tmp_path / "other", "vit_base_patch32_clip_quickgelu_224", CLIP | {"num_classes": 16}
    )
    assert "reads 24 numbers" in said(good, *parts[:2], "--vision", tmp_path / "other")
    longer = clipcap_state(clip_parts, "transformer")
    longer["clip_project.prefix_const"] = torch.zeros(2 * LENGTH, WIDTH)
    assert "a prefix of 8" in said(longer)
    bad = dict(good)
    bad["clip_project.model.0.bias"] = torch.full_like(good["clip_project.model.0.bias"], math.nan)
    assert "not finite" in said(bad)
    flat = clipcap_state(clip_parts, "transformer") | {"clip_project.prefix_const": torch.zeros(5)}
    assert "not laid out as the authors' files are" in said(flat)
    file.write_bytes(b"no such thing")
    assert "no checkpoint that can be read safely" in failed("clipcap", file, "-o", tmp_path / "o")
    assert "no such file" in failed("clipcap", tmp_path / "none", "-o", tmp_path / "o")


# ------------------------------------------------------------------------------------------- LilT

WORDS = ["a red square", "a blue circle at the left", "red"]
DEIT3 = tiny.VIT | {"init_values": 1e-5, "no_embed_class": True}


@pytest.fixture(scope="module")
def lilt_parts(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("lilt")
    tiny.write_text(root / "text", WORDS)
    tiny.write_vision(root / "deit", "deit_tiny_patch16_224", tiny.VIT)
    tiny.write_vision(root / "deit3", "deit3_small_patch16_224", DEIT3)
    return root


def lilt_state(root: Path, vision: str, variant: str, size: int = 48) -> State:
    """As the authors keep it: both towers, pictures of another size than the pretrained one."""
    torch.manual_seed(4)
    image = load_file(root / vision / "model.safetensors")
    image = {n: t for n, t in image.items() if not n.startswith(("head", "fc_norm"))}
    places = image["pos_embed"]
    own = places[:, places.shape[1] - 16 :].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    grid = (size // 8, size // 8)
    grown = F.interpolate(own, grid, mode="bicubic", align_corners=False)
    grown = grown.permute(0, 2, 3, 1).flatten(1, 2)
    image["pos_embed"] = torch.cat([places[:, : places.shape[1] - 16], grown], 1)
    image = {n.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): t
             for n, t in image.items()}  # fmt: skip
    text = load_file(root / "text/model.safetensors")
    text = {n: t for n, t in text.items() if not n.startswith("pooler") and "token_type" not in n}
    text["embeddings.position_ids"] = torch.arange(48)[None]

    def change(state: State, which: str) -> None:
        for name in state:
            if which in name.lower():
                state[name] = state[name] + 0.1 * torch.randn(state[name].shape)

    if variant == "layerwise":
        places = [f"blocks.{i}.adapter{k}" for i in range(3) for k in (1, 2)]
        for tower, names in (
            (image, places),
            (text, [f"encoder.layer.{i}.{o}.adapter" for i in range(3)
                    for o in ("attention.output", "output")]),
        ):  # fmt: skip
            for name in names:
                shapes = {"down_sampler.weight": (8, 32), "down_sampler.bias": (8,),
                          "up_sampler.weight": (32, 8), "up_sampler.bias": (32,)}  # fmt: skip
                made = zip(shapes, noise(*shapes.values()), strict=True)
                tower |= {f"{name}.{part}": tensor for part, tensor in made}
            change(tower, "norm")
    if variant == "deep":
        for tower, stem in ((image, "blocks"), (text, "encoder.layer")):
            layer = [n for n in tower if n.startswith(f"{stem}.2.")]
            tower |= {n.replace(".2.", ".3.", 1): torch.randn(tower[n].shape) * 0.2 for n in layer}
        image["norm.weight"] = image["norm.weight"] + 0.1
    if variant == "bitfit":
        change(image, "bias")
        change(text, "bias")
    if variant == "lit":
        change(text, "e")  # everything
    proj = noise((16, 32), (16,), (16, 32), (16,))
    ends = zip(("vision_proj.weight", "vision_proj.bias", "text_proj.weight", "text_proj.bias"),
               proj, strict=True)  # fmt: skip
    state = {f"visual_encoder.{n}": t for n, t in image.items()}
    state |= {f"text_encoder.{n}": t for n, t in text.items()}
    return state | dict(ends) | {"temp": torch.tensor(0.05)}


def adapted(state: State, name: str, x: torch.Tensor) -> torch.Tensor:
    if f"{name}.down_sampler.weight" not in state:
        return x
    return x + linear(state, f"{name}.up_sampler", F.gelu(linear(state, f"{name}.down_sampler", x)))


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """(T, d) each, four heads -> (T, d)"""
    q, k, v = (x.unflatten(-1, (4, -1)).transpose(0, 1) for x in (q, k, v))
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


def their_image(state: State, picture: torch.Tensor) -> torch.Tensor:
    own = {n.removeprefix("visual_encoder."): t for n, t in state.items()}
    patch = own["patch_embed.proj.weight"]
    x = F.conv2d(seen(picture)[None], patch, own["patch_embed.proj.bias"], stride=8)[0].flatten(1).T
    places = own["pos_embed"][0]
    if len(places) == len(x):  # deit_v2
        x = torch.cat([own["cls_token"][0], x + places])
    else:
        x = torch.cat([own["cls_token"][0], x]) + places
    for i in range(sum(n.startswith("blocks.") and n.endswith("norm1.bias") for n in own)):
        block, one = f"blocks.{i}", torch.ones(())
        normed = norm(own, f"{block}.norm1", adapted(own, f"{block}.adapter1", x), 1e-6)
        mixed = attention(*linear(own, f"{block}.attn.qkv", normed).chunk(3, -1))
        x = x + own.get(f"{block}.gamma_1", one) * linear(own, f"{block}.attn.proj", mixed)
        normed = norm(own, f"{block}.norm2", adapted(own, f"{block}.adapter2", x), 1e-6)
        inner = F.gelu(linear(own, f"{block}.mlp.fc1", normed))
        x = x + own.get(f"{block}.gamma_2", one) * linear(own, f"{block}.mlp.fc2", inner)
    return F.normalize(linear(state, "vision_proj", norm(own, "norm", x, 1e-6)[0]), dim=-1)


def their_text(state: State, ids: list[int]) -> torch.Tensor:
    own = {n.removeprefix("text_encoder."): t for n, t in state.items()}
    x = own["embeddings.word_embeddings.weight"][ids]
    x = x + own["embeddings.position_embeddings.weight"][: len(ids)]  # no token types
    x = norm(own, "embeddings.LayerNorm", x, 1e-12)
    for i in range(sum(n.endswith("output.LayerNorm.bias") for n in own) // 2):
        layer = f"encoder.layer.{i}"
        parts = (linear(own, f"{layer}.attention.self.{n}", x) for n in ("query", "key", "value"))
        out = linear(own, f"{layer}.attention.output.dense", attention(*parts))
        out = adapted(own, f"{layer}.attention.output.adapter", out)
        x = norm(own, f"{layer}.attention.output.LayerNorm", out + x, 1e-12)
        out = linear(
            own, f"{layer}.output.dense", F.gelu(linear(own, f"{layer}.intermediate.dense", x))
        )
        x = norm(
            own,
            f"{layer}.output.LayerNorm",
            adapted(own, f"{layer}.output.adapter", out) + x,
            1e-12,
        )
    return F.normalize(linear(state, "text_proj", x[0]), dim=-1)


def save_lilt(state: State, file: Path, monkeypatch) -> Path:
    """With the configuration beside the tensors, of a class that is not installed here."""
    name = "omegaconf.dictconfig"
    module = types.ModuleType(name)
    module.DictConfig = type("DictConfig", (), {"__module__": name})
    config = module.DictConfig()
    config._content = {"embed_dim": 16}
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "omegaconf", types.ModuleType("omegaconf"))
        patch.setitem(sys.modules, name, module)
        torch.save({"model": state, "optimizer": {}, "config": config, "epoch": 14}, file)
    return file


@pytest.mark.parametrize(
    ("variant", "vision", "unlock"),
    [("layerwise", "deit", "layernorm"), ("layerwise", "deit3", "layernorm"),
     ("deep", "deit", "none"), ("bitfit", "deit", "bitfit"), ("lit", "deit", "none")],
)  # fmt: skip
def test_lilt(lilt_parts, tmp_path, monkeypatch, variant, vision, unlock):
    state = lilt_state(lilt_parts, vision, variant)
    file = save_lilt(state, tmp_path / "checkpoint_14.pth", monkeypatch)
    parts = ["--text", lilt_parts / "text", "--vision", lilt_parts / vision]
    parts += ["--text-unlock", "all"] * (variant == "lit")
    done = shell.run("convert", "lilt", file, "-o", tmp_path / "out", *parts)
    assert done.returncode == 0, done.stderr
    options = models.read_config(tmp_path / "out")["options"]
    assert (options["size"], options["embed"]) == (48, 16)
    assert options["image"]["unlock"] == unlock
    assert options["text"]["unlock"] == ("all" if variant == "lit" else unlock)
    adapter = {"layerwise": "layerwise", "deep": "deep"}.get(variant, "none")
    assert options["text"]["adapter"] == options["image"]["adapter"] == adapter
    model, x = load(tmp_path / "out", "retrieve"), pictures(3, 48)
    assert model.temperature.item() == pytest.approx(0.05)
    with torch.no_grad():
        slow = torch.stack([their_image(state, picture) for picture in x])
        torch.testing.assert_close(model.embed_images(x), slow, rtol=0, atol=1e-4)
        lines = model.text.tokenizer(WORDS)
        slow = torch.stack([their_text(state, ids) for ids in lines])
        torch.testing.assert_close(model.embed_texts(WORDS), slow, rtol=0, atol=1e-4)
    alone = models.load(
        str(tmp_path / "out"), task="retrieve", device=CPU, precision=torch.float32, sides=["text"]
    )  # our own BERT
    torch.testing.assert_close(alone.embed_texts(WORDS), slow, rtol=0, atol=1e-4)


def test_lilt_that_cannot_be_is_refused(lilt_parts, tmp_path, monkeypatch):
    state = lilt_state(lilt_parts, "deit", "layerwise")
    text, deit = ["--text", lilt_parts / "text"], ["--vision", lilt_parts / "deit"]

    def said(state: State, *parts: object) -> str:
        file = save_lilt(state, tmp_path / "c.pth", monkeypatch)
        return failed("lilt", file, "-o", tmp_path / "o", *parts)

    tiny.write_text(tmp_path / "text", WORDS, seed=9)
    why = said(state, "--text", tmp_path / "text", *deit)
    assert "the text tower is not that of" in why
    assert "--text-unlock all" in why
    assert "the image tower is not that of" in said(state, *text, "--vision", lilt_parts / "deit3")
    tiny.write_text(tmp_path / "short", WORDS, num_hidden_layers=1)
    assert "has 1; not converted" in said(state, "--text", tmp_path / "short", *deit)
    whole = {n: t for n, t in state.items() if n != "temp"}
    assert "no visual_encoder and text_encoder" in said(whole, *text, *deit)
    odd = state | {"visual_encoder.extra": torch.zeros(2)}
    assert "extra is nothing" in said(odd, *text, *deit)
    assert not (tmp_path / "o").exists()


# ----------------------------------------------------------------------------------------- eP-ALM

LAYERS, LEVELS = 4, 2


@pytest.fixture(scope="module")
def epalm_parts(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("epalm")
    tiny.write_decoder(root / "lm", "opt", TEXTS, num_hidden_layers=LAYERS)
    tiny.write_vision(root / "vision")
    return root


def epalm_state(*, shared: bool, mlp: bool, adapters: tuple[str, ...] = ()) -> State:
    """What the authors keep: all but the language model and the encoder."""
    torch.manual_seed(6)
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(1 if shared else LEVELS):
        shapes |= {f"connector.{i}.weight": (48, 32), f"connector.{i}.bias": (48,)}
    prompt = "prompt_module.prefix_embedding"
    shapes[f"{prompt}.0.weight"] = (5, 48)
    for i in (1, 3) if mlp else ():
        shapes |= {f"{prompt}.{i}.weight": (48, 48), f"{prompt}.{i}.bias": (48,)}
    for i in range(LAYERS):
        for place in adapters:
            name = f"transformer.{i}.{place}"
            shapes |= {f"{name}.0.weight": (12, 48), f"{name}.0.bias": (12,),
                       f"{name}.2.weight": (48, 12), f"{name}.2.bias": (48,)}  # fmt: skip
    state = dict(zip(shapes, noise(*shapes.values()), strict=True))
    twice = {
        n.replace("transformer", "model_text.model.decoder.layers"): t for n, t in state.items()
    }
    return state | twice


def levels_of(root: Path, x: torch.Tensor) -> list[torch.Tensor]:
    """[CLS] of each block after the final norm, (I, 32) each."""
    import timm

    model = timm.create_model("vit_tiny_patch16_224", **tiny.VIT).eval()
    model.load_state_dict(load_file(root / "vision/model.safetensors"))
    x = model._pos_embed(model.patch_embed(seen(x)))
    found = []
    for block in model.blocks:
        x = block(x)
        found.append(model.norm(x)[:, 0])
    return found


def their_opt(
    root: Path, state: State, slots: list[torch.Tensor], ids: list[int], inject: tuple[int, int],
    alone: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Logits (T, V) of a text with a picture's slots (48,) in the layers [start, end).

    The slot's row of the mask is open: it sees the whole text. With ``alone`` it sees itself.
    """
    own = load_file(root / "lm/model.safetensors")
    own = {n.removeprefix("model.decoder."): t for n, t in own.items()}
    prompt = state["prompt_module.prefix_embedding.0.weight"]
    if "prompt_module.prefix_embedding.1.weight" in state:
        prompt = linear(state, "prompt_module.prefix_embedding.1", prompt).tanh()
        prompt = linear(state, "prompt_module.prefix_embedding.3", prompt)
    words = own["embed_tokens.weight"][ids] + own["embed_positions.weight"][2 : 2 + len(ids)]
    x = torch.cat([prompt, words])
    mask = torch.ones(len(x), len(x)).tril().bool()
    start, end = inject
    for i in range(LAYERS):
        if start <= i < end:
            slot = slots[min((i - start) // ((end - start) // len(slots)), len(slots) - 1)]
            if i == start:
                x = torch.cat([slot[None], x])
                mask = F.pad(mask, (1, 0, 1, 0), value=True)
                mask[0, 1:] = not alone
            x[0] = slot
        layer = f"layers.{i}"
        normed = norm(own, f"{layer}.self_attn_layer_norm", x, 1e-5)
        parts = (linear(own, f"{layer}.self_attn.{n}_proj", normed) for n in "qkv")
        q, k, v = (part.unflatten(-1, (4, 12)).transpose(0, 1) for part in parts)
        scores = (q @ k.transpose(1, 2) * 12**-0.5).masked_fill(~mask, -math.inf)
        mixed = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        out = linear(own, f"{layer}.self_attn.out_proj", mixed)
        x = x + houlsby(state, f"transformer.{i}.self_attn.adapter", out)
        normed = norm(own, f"{layer}.final_layer_norm", x, 1e-5)
        out = linear(own, f"{layer}.fc2", linear(own, f"{layer}.fc1", normed).relu())
        x = x + houlsby(state, f"transformer.{i}.fc2.1.adapter", out)
    x = norm(own, "final_layer_norm", x, 1e-5)[-len(ids) :]
    return x @ own["embed_tokens.weight"].T


def houlsby(state: State, name: str, x: torch.Tensor) -> torch.Tensor:
    if f"{name}.0.weight" not in state:
        return x
    return x + linear(state, f"{name}.2", linear(state, f"{name}.0", x).relu())


BOTH = ("self_attn.adapter", "fc2.1.adapter")


@pytest.mark.parametrize(
    ("kind", "inject", "told"),
    [({"shared": False, "mlp": True}, (2, 4), {}),
     ({"shared": True, "mlp": False, "adapters": BOTH}, (0, 4), {"injected_hidden_states": 2}),
     ({"shared": False, "mlp": False, "adapters": BOTH[1:]}, (1, 3), {})],
)  # fmt: skip
def test_epalm(epalm_parts, tmp_path, kind, inject, told):
    root, state = epalm_parts, epalm_state(**kind)
    config = {"start_layer_idx": inject[0], "end_layer_idx": inject[1], **told}
    torch.save({"model": state, "config": config, "epoch": 7}, tmp_path / "checkpoint_best.pth")
    parts = ["--lm", root / "lm", "--vision", root / "vision"]
    out = tmp_path / "out"
    done = shell.run("convert", "epalm", tmp_path / "checkpoint_best.pth", "-o", out, *parts)
    assert done.returncode == 0, done.stderr
    options = models.read_config(out)["options"]
    assert (options["extract"], options["inject"]) == ([1, 3], [*inject])
    assert (options["soft"], options["shared"]) == (5, kind["shared"])
    leaks = inject[1] < LAYERS
    assert ("the authors' slot has read the whole text" in done.stderr) == leaks
    assert ("has read the whole text" in (out / "README.md").read_text()) == leaks
    model, x = load(out), pictures(2)
    captions = model.written(x, [[model.text.bos]] * 2, style(8))
    with torch.no_grad():
        levels, off = levels_of(root, x)[-LEVELS:], 0.0
        for i in range(2):
            slots = [linear(state, f"connector.{0 if kind['shared'] else k}", level[i])
                     for k, level in enumerate(levels)]  # fmt: skip
            ids = [model.text.bos, 3, 5, 2, 4]
            slow = their_opt(root, state, slots, ids, inject, alone=leaks)
            fast = model.run(torch.tensor([ids]), model.see(model.encoder(x[[i]])))
            fast = model.decoder.logits(fast)[0]
            torch.testing.assert_close(fast, slow, rtol=0, atol=1e-4)
            authors = their_opt(root, state, slots, ids, inject)
            off = max(off, float((authors - fast).abs().max()))
            said = [model.text.bos]
            while len(said) < 9:
                logits = their_opt(root, state, slots, said, inject, alone=leaks)[-1]
                if (token := int(logits.argmax())) == model.text.eos:
                    break
                said.append(token)
            assert captions[i].tokens == said[1:]
    assert (off > 1e-3) == leaks


def test_epalm_that_answers_and_what_is_refused(epalm_parts, tmp_path):
    parts = ["--lm", epalm_parts / "lm", "--vision", epalm_parts / "vision"]
    file, out = tmp_path / "c.pth", tmp_path / "out"
    torch.save({"model": epalm_state(shared=False, mlp=True)}, file)
    more = ["--task", "vqa", "--inject", "2:4"]
    assert shell.run("convert", "epalm", file, "-o", out, *parts, *more).returncode == 0
    assert load(out, "vqa").answer(pictures(1), ["a red square"])[0][0] is not None
    assert "is a model here already" in failed("epalm", file, "-o", out, *parts, *more)

    def said(state: State, *more: object, **config: object) -> str:
        torch.save({"model": state, "config": config}, file)
        return failed("epalm", file, "-o", tmp_path / "o", *parts, *more)

    good = epalm_state(shared=False, mlp=True)
    assert "do not divide 3 layers evenly" in said(good, "--inject", "1:4")
    assert "not replaced in every layer" in said(good, text_step=2)
    assert "0:9 is not within" in said(good, "--inject", "0:9", "--extract", "0:3")
    assert "say with --extract" in said(epalm_state(shared=True, mlp=True), "--inject", "0:4")
    other = good | {"transformer.0.fc2.adapter.0.weight": torch.zeros(3, 48)}
    assert "fc2.adapter.0.weight is nothing" in said(other)
    assert "no connector" in said({n: t for n, t in good.items() if "connector" not in n})
    uneven = good | {"connector.1.weight": torch.zeros(40, 32)}
    assert "connector.1.weight: [40, 32] in the file" in said(uneven, "--inject", "2:4")


class Evil:
    def __init__(self, function, text: str):
        self.call = function, (text,)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [eval, os.system])
def test_nothing_in_a_file_is_run(clip_parts, tmp_path, function):
    """What a file names beside its tensors is called neither by torch nor by us."""
    made = tmp_path / "made"
    text = f"touch {made}" if function is os.system else f"open({str(made)!r}, 'w')"
    state = clipcap_state(clip_parts, "mlp")
    torch.save({"model": state, "config": Evil(function, text)}, tmp_path / "w.pt")
    parts = ["--lm", clip_parts / "lm", "--vision", clip_parts / "vision"]
    done = shell.run("convert", "clipcap", tmp_path / "w.pt", "-o", tmp_path / "o", *parts)
    assert done.returncode == 0 or "cannot be" in done.stderr or "safely" in done.stderr
    assert not made.exists()
