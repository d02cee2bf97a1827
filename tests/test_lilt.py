"""LilT: parameter counts, towers, adapters, loss and gradients against slow references."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from tiny import write_text, write_vision
from torch import Tensor
from transformers import BertModel

from tinyvl import UserError, hub, hub_table, lilt, models, presets
from tinyvl.encoders_text import load_text_model
from tinyvl.lilt import LilT, Pairs
from tinyvl.lilt_towers import lacks_detail
from tinyvl.text import clean_caption

CPU = torch.device("cpu")
CAPTIONS = [
    "a red dog",
    "two dogs on green grass",
    "a cat",
    "the red house by the sea",
    "a blue car",
]


@pytest.mark.parametrize(
    ("name", "count", "percent"),
    [
        ("lilt-frozen", 1, 0.00),
        ("lilt-ln-only", 76_801, 0.04),
        ("lilt-projection", 393_729, 0.20),
        ("lilt-ln", 470_529, 0.24),
        ("lilt-bitfit", 598_785, 0.31),
        ("lilt-da-noln", 14_571_009, 6.96),
        ("lilt-da-base", 14_646_273, 7.00),  # 6.99 in the paper
        ("lilt-lwa-noln", 14_595_585, 6.97),
        ("lilt-lwa-base", 14_672_385, 7.01),
        ("lilt-lwa-bitfit", 14_800_641, 7.07),  # 7.09 in the paper
        ("lilt-da-bitfit", 14_775_297, 7.06),
        ("lit", 109_285_377, 56.01),
        ("lit-reversed", 86_238_465, 44.20),  # 43.99 in the paper
        ("lit-lwa", 116_424_705, 57.57),
        ("clip-base", 195_130_113, 100),
        ("lilt-da-large", 25_920_001, None),
        ("lilt-lwa-large", 51_180_033, 7.43),
        ("lilt-da-tiny", 736_449, None),
        ("lit-tiny", 4_451_841, 44.57),
        ("lilt-da-small", 5_185_153, None),
        ("clip-tiny", 9_987_777, 100),
        ("lit-small", 28_730_881, 56.98),
        ("clip-small", 50_419_585, 100),
    ],
)
def test_parameter_counts_are_the_papers(name, count, percent, monkeypatch):
    monkeypatch.setattr(hub, "fetch", None)  # neither weights nor network
    found = models.inspect(name)
    assert found["trainable_parameters"] == count
    if percent is not None:
        assert found["trainable_percent"] == pytest.approx(percent, abs=0.0051)


def test_every_preset_has_the_papers_recipe():
    """Section 2.4, and the authors' code: lengths of captions, 1,000 steps of warm-up."""
    expected = {
        "batch": 512, "epochs": 15, "rate": 1e-4, "final_rate": 1e-5, "weight_decay": 0.02,
        "clip": None, "first_rate": 0.0, "average": 0.0, "fixed": {},
    }  # fmt: skip
    for name, row in presets.PRESETS.items():
        if row.method == "lilt" and name != "lilt-default":
            recipe = asdict(row.recipe)
            assert recipe.pop("warmup") * 15 * 591_753 / 512 == pytest.approx(1000, rel=0.01)
            assert recipe == expected
            assert (row.options["size"], row.options["clean"]) == (256, True)
            assert row.job == {"crops": True, "per_image": 1, "max_tokens": 25}


def test_every_preset_of_lilt_is_there():
    names = """lilt-frozen lilt-ln-only lilt-projection lilt-ln lilt-bitfit lilt-da-noln
        lilt-da-tiny lilt-da-small lilt-da-base lilt-da-large lilt-lwa-noln lilt-lwa-base
        lilt-lwa-large lilt-lwa-bitfit lilt-da-bitfit lilt-lwa-multilingual lilt-da-multilingual
        lit lit-tiny lit-small lit-reversed lit-da lit-lwa clip-tiny clip-small clip-base
        lilt-default"""
    assert set(names.split()) == {n for n, row in presets.PRESETS.items() if row.method == "lilt"}


# ----------------------------------------------------------------------------------------- towers


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("towers")
    return {
        "text": str(write_text(root / "text", CAPTIONS)),
        "vision": str(write_vision(root / "vision")),
        "cnn": str(write_vision(root / "cnn", "tf_efficientnet_lite0", {})),
    }


def build(folders: dict[str, str], vision: str = "vision", fit: str = "squash", **options) -> LilT:
    torch.manual_seed(0)
    config = models.new_config(
        "lilt", folders["text"], folders[vision], fit=fit, prompt="", options=options
    )
    return models.build(config, device=CPU, precision=torch.float32)


def pictures(count: int, side: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


def pairs_of(model: LilT, rows: list[int], keys: list[int], side: int = 32) -> Pairs:
    ids, mask = model.text.pad(model.text.encode([CAPTIONS[i % 5] for i in range(len(rows))], 25))
    return Pairs(pictures(len(keys), side), torch.tensor(rows), ids, torch.tensor(keys), mask)


def test_a_text_without_tokens_is_finite(folders):
    model = build(folders).eval()
    for texts in ([[], model.text.encode(CAPTIONS[:1], 25)[0]], [[]]):
        ids, mask = model.text.pad(texts)
        assert mask.sum(1).min() == 1
        assert model.text_vectors(ids, mask).isfinite().all()


def test_without_additions_the_towers_are_timms_and_transformers(folders):
    model = build(folders).eval()
    x = pictures(3)
    vit = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0,
        **json.loads((Path(folders["vision"]) / "config.json").read_text())["model_args"],
    ).eval()  # fmt: skip
    vit.load_state_dict(load_file(f"{folders['vision']}/model.safetensors"), strict=False)
    bert = BertModel.from_pretrained(folders["text"], add_pooling_layer=False).eval()
    ids, mask = model.text.pad(model.text.encode(CAPTIONS, 25))
    with torch.no_grad():
        image = vit.forward_features((x.float() / 255 - 0.5) / 0.5)[:, 0]
        text = bert(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0]
        ours = model.embed_images(x), model.embed_texts(CAPTIONS)
    for vectors, layer, got in zip(
        (image, text), (model.image_projection, model.text_projection), ours, strict=True
    ):
        expected = F.normalize(F.linear(vectors, layer.weight, layer.bias), dim=-1)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    # alone or in a padded batch, a text is the same vector
    torch.testing.assert_close(model.embed_texts(CAPTIONS[:1]), ours[1][:1], atol=1e-5, rtol=0)


def slow_adapter(x: Tensor, adapter: lilt.Adapter) -> Tensor:
    h = x @ adapter.down.weight.T + adapter.down.bias
    h = 0.5 * h * (1 + torch.erf(h / 2**0.5))
    return x + h @ adapter.up.weight.T + adapter.up.bias


def test_layerwise_adapters_stand_where_the_authors_have_them(folders):
    towers = {"adapter": "layerwise", "unlock": "layernorm"}
    model = build(folders, image=towers, text=towers).eval()
    vit, bert = model.encoder.model, model.text.model
    x = (pictures(2).float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        h = vit._pos_embed(vit.patch_embed(x))
        for block in vit.blocks:  # x + attn(norm1(adapter1(x))), x + mlp(norm2(adapter2(x)))
            h = h + block.attn(block.norm1.norm(slow_adapter(h, block.norm1.adapter)))
            h = h + block.mlp(block.norm2.norm(slow_adapter(h, block.norm2.adapter)))
        expected = vit.norm(h)[:, 0]
        torch.testing.assert_close(
            model.encoder(pictures(2)).tokens[:, 0], expected, atol=1e-5, rtol=0
        )
        ids, mask = model.text.pad(model.text.encode(CAPTIONS[:1], 25))
        theirs = load_text_model(Path(folders["text"]))  # transformers'
        h = theirs.embeddings(input_ids=ids)
        ours = bert.encoder["layer"]
        for layer, own in zip(theirs.encoder.layer, ours, strict=True):
            out = layer.attention.output  # LayerNorm(adapter(dense(...)) + residual), twice
            a = out.dense(layer.attention.self(h)[0])
            h = out.LayerNorm(slow_adapter(a, own.attention["output"].dropout.adapter) + h)
            a = layer.output.dense(layer.intermediate(h))
            h = layer.output.LayerNorm(slow_adapter(a, own.output.dropout.adapter) + h)
        torch.testing.assert_close(model.text(ids, mask), h[:, 0], atol=1e-5, rtol=0)
    adapter = vit.blocks[0].norm1.adapter
    assert adapter.down.weight.shape == (8, 32)  # a quarter of the width
    assert 0.01 < adapter.up.weight.std() < 0.03  # the authors' initialisation, not zero
    assert not adapter.up.bias.any()


def test_deep_adapters_are_a_new_layer_on_the_pretrained_stack(folders):
    deep = build(folders, image={"adapter": "deep"}, text={"adapter": "deep"}).eval()
    plain = build(folders).eval()
    assert len(deep.encoder.model.blocks) == len(plain.encoder.model.blocks) + 1
    ids, mask = plain.text.pad(plain.text.encode(CAPTIONS, 25))
    x = (pictures(2).float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        h = plain.encoder.model.patch_embed(x)
        h = plain.encoder.model.blocks(plain.encoder.model._pos_embed(h))
        h = deep.encoder.model.norm(deep.encoder.model.blocks[-1](h))[:, 0]
        torch.testing.assert_close(deep.encoder(pictures(2)).tokens[:, 0], h, atol=1e-5, rtol=0)
        hidden = plain.text.model(input_ids=ids, attention_mask=mask).last_hidden_state
        far = torch.zeros(5, 1, 1, ids.shape[1]).masked_fill(mask[:, None, None] == 0, -1e9)
        expected = deep.text.model.encoder.layer[-1](hidden, far)
        expected = expected[0] if isinstance(expected, tuple) else expected
        torch.testing.assert_close(deep.text(ids, mask), expected[:, 0], atol=1e-5, rtol=0)
    names = {n for n, _ in deep.named_parameters() if deep.trainable(n)}
    towers = {n for n in names if n.startswith(("encoder.", "text."))}
    assert {n.split(".")[2] for n in towers if n.startswith("encoder")} == {"blocks", "norm"}
    assert all(".3." in n or n.startswith("encoder.model.norm.") for n in towers)


def test_what_is_unlocked(folders):
    def names(**tuning):
        model = build(folders, image=tuning, text=tuning)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == {
            n for n, _ in model.named_parameters() if model.trainable(n)
        }
        return {n for n in dict(model.named_parameters()) if n.startswith(("enc", "text."))}, {
            n for n, _ in model.named_parameters() if model.trainable(n) and "projection" not in n
        } - {"temperature"}

    everything, norms = names(unlock="layernorm")
    assert norms == {n for n in everything if "norm" in n.lower()}
    assert "text.model.embeddings.LayerNorm.weight" in norms
    assert "encoder.model.norm.bias" in norms
    assert names(unlock="bitfit")[1] == {n for n in everything if n.endswith("bias")}
    assert names(unlock="all")[1] == everything
    assert names()[1] == set()
    some = names(unlock="layernorm", layers=[1, 2])[1]  # Figure 5
    assert some == {n for n in norms if ".0." not in n and "embeddings" not in n}
    some = names(unlock="layernorm", layers=[0, 1])[1]
    assert some == {n for n in norms if ".2." not in n and not n.startswith("encoder.model.norm")}
    with pytest.raises(UserError, match="unlocked: name that too"):
        build(folders, text={"layers": [0, 1]})
    everything, adapted = names(unlock="bitfit", adapter="layerwise")
    assert adapted == {n for n in everything if n.endswith("bias") or ".adapter." in n}


def test_position_embeddings_are_interpolated_as_the_authors_do(folders):
    model = build(folders, size=48)  # 4 x 4 patches of 8 pixels become 6 x 6
    old = load_file(f"{folders['vision']}/model.safetensors")["pos_embed"]
    grid = old[:, 1:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (6, 6), mode="bicubic", align_corners=False)
    expected = torch.cat((old[:, :1], grid.flatten(2).transpose(1, 2)), 1)
    torch.testing.assert_close(model.encoder.model.pos_embed, expected, atol=1e-6, rtol=0)
    assert model.encoder.size == 48
    assert model.embed_images(pictures(2, 48)).shape == (2, 256)


def test_a_cnn_has_projections_and_deep_adapters_and_says_what_it_has_not(folders):
    side = 224
    model = build(folders, "cnn", image={"adapter": "deep", "width": 64}, text={"pool": "mean"})
    assert model.embed_images(pictures(1, side)).shape == (1, 256)
    assert model.embed_texts(CAPTIONS).norm(dim=-1) == pytest.approx(torch.ones(5), abs=1e-5)
    assert not any(
        n.startswith("encoder.") and model.trainable(n) for n, _ in model.named_parameters()
    )
    assert any(
        n.startswith("map_adapter.") and model.trainable(n) for n, _ in model.named_parameters()
    )
    model = build(folders, "cnn", image={"unlock": "all"}).train()
    assert model.encoder.model.bn1.training is False  # its statistics stay
    for tuning, reason in (
        ({"unlock": "layernorm"}, "no LayerNorms"),
        ({"adapter": "layerwise"}, "no transformer blocks"),
        ({"pool": "token"}, r"no \[CLS\]"),
        ({"unlock": "bitfit", "layers": [0, 1]}, "no transformer layers"),
    ):
        with pytest.raises(UserError, match=reason) as found:
            build(folders, "cnn", image=tuning)
        assert found.value.status == 2


def test_dropout_is_on_only_in_a_tower_that_is_trained(folders):
    model = build(folders, text={"unlock": "layernorm"}).train()
    assert all(m.training for m in model.text.modules())
    assert not any(m.training for m in model.encoder.modules())
    model = build(folders, image={"unlock": "layernorm"}).train()
    assert not any(m.training for m in model.text.modules())
    assert model.encoder.training
    assert not any(m.training for m in model.eval().modules())


def test_random_towers_are_trained_whole(folders):
    whole = {"unlock": "all"}
    a = build(folders, image=whole, text=whole, random_init=True)
    b = build(folders, image=whole, text=whole)
    same = [torch.equal(a.state_dict()[n], t) for n, t in b.state_dict().items() if t.ndim > 1]
    assert sum(same) <= 3  # the projections, drawn alike
    with pytest.raises(UserError, match="trained whole"):
        build(folders, random_init=True)


@pytest.mark.parametrize("clean", [True, False])
def test_a_query_is_as_long_as_its_tower_reads(folders, caplog, clean):
    """30 tokens are LilT's evaluation's, 30 words its training's; what is cut is counted."""
    words = CAPTIONS[0].split()
    queries = [" ".join((words * 30)[:n]) for n in (35, 36, 46, 47, 90)]  # 48 positions in all
    model = build(folders, clean=clean)
    vectors = model.embed_texts(queries)
    assert caplog.messages == ["tinyvl: cut 2 of 5 texts to 48 tokens"]
    assert not torch.allclose(vectors[0], vectors[1], atol=1e-4)
    assert [len(line) for line in model.text.encode(queries[:2], 30)] == [30, 30]
    assert "cut 2 of 2 texts to 30 tokens" in caplog.text
    assert ("cut 2 of 2 texts to 30 words" in caplog.text) == clean


def test_robertas_positions_count_from_behind_the_padding(folders):
    from transformers import XLMRobertaConfig, XLMRobertaModel

    from tinyvl.lilt_towers import TextTower

    model = build(folders)
    config = XLMRobertaConfig(
        vocab_size=60, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, max_position_embeddings=20, pad_token_id=1,
    )  # fmt: skip
    roberta = XLMRobertaModel(config, add_pooling_layer=False).eval()
    tower = TextTower(roberta, model.text.tokenizer, clean=False, pool="mean", tuned=frozenset())
    ids = tower.encode([CAPTIONS[0] * 30], None)
    assert len(ids[0]) == 18
    assert tower(*tower.pad(ids)).shape == (1, 8)


def test_captions_are_cleaned_as_the_authors_do():
    assert clean_caption('A man\'s "Red-hot" and/or   blue; car. (fast!)') == (
        "a mans red hot and or blue car fast"
    )
    assert clean_caption("w " * 40) == " ".join("w" * 30)
    assert clean_caption("<PERSON>, with a well-known <person>'s dog!") == (  # CC3M's names
        "person with a well known persons dog"
    )


# ------------------------------------------------------------------------------ loss and gradients


def test_a_prefix_begins_every_text_and_takes_no_room(folders, tmp_path):
    plain = build(folders, text={"pool": "mean"})
    model = build(folders, text={"pool": "mean", "prefix": "red dog: "}, clean=True)
    before = plain.text.encode(["red dog: A red dog runs".lower(), "red dog: sky"], 30)
    assert model.text.encode(["A red, dog runs!", "sky"], 30) == before
    colon = len(plain.text.encode(["red dog:"], 30)[0]) - 2  # the prefix's own tokens
    (cut,) = model.text.encode(["a red dog runs " * 9], 6)
    assert len(cut) == 6 + colon
    assert cut[-1] == before[0][-1]
    models.save_config(tmp_path, config := models.new_config(
        "lilt", folders["text"], folders["vision"], fit="squash", prompt="",
        options={"text": {"prefix": "red dog: "}},
    ))  # fmt: skip
    models.save(models.build(config, device=CPU, precision=torch.float32), tmp_path)
    for sides in (["text"], ["text", "image"]):
        loaded = models.load(str(tmp_path), task="retrieve", device=CPU, sides=sides)
        assert loaded.text.prefix == "red dog: "
    assert plain.text.prefix == ""


def test_a_known_encoder_brings_its_prefix():
    for name in ("multilingual-e5-small", "intfloat/multilingual-e5-small"):
        assert hub_table.prefix_of(name) == "query: "
        job = presets.job_of("lilt", {"language": name})
        assert job.options["text"]["prefix"] == "query: "
    assert hub_table.prefix_of("some/folder") == ""
    english = presets.job_of("lilt", {"language": "all-MiniLM-L6-v2"})
    assert "prefix" not in english.options["text"]


def slow_loss(images: Tensor, texts: Tensor, rows: list[int], keys: list[int], t: float) -> float:
    """Equation 1, pair by pair; what is of the same picture is no negative."""
    total = 0.0
    for j, row in enumerate(rows):
        own = math.exp(images[row] @ texts[j] / t)
        wrong_images = [i for i in range(len(keys)) if keys[i] != keys[row]]
        wrong_texts = [k for k in range(len(rows)) if keys[rows[k]] != keys[row]]
        i2t = own + sum(math.exp(images[row] @ texts[k] / t) for k in wrong_texts)
        t2i = own + sum(
            math.exp(images[i] @ texts[j] / t) / keys.count(keys[i]) for i in wrong_images
        )
        total -= (math.log(own / i2t) + math.log(own / t2i)) / 2
    return total / len(rows)


@pytest.mark.parametrize(
    ("rows", "keys"),
    [([0, 1, 2, 3], [0, 1, 2, 3]), ([0, 0, 1, 2, 2, 2], [0, 1, 2]), ([0, 1, 1, 2], [7, 5, 7])],
)
def test_the_loss_is_equation_1(rows, keys):
    torch.manual_seed(0)
    images = F.normalize(torch.randn(len(keys), 8), dim=-1)
    texts = F.normalize(torch.randn(len(rows), 8), dim=-1)
    args = torch.tensor(rows), torch.tensor(keys), torch.tensor(0.2)
    loss = lilt.contrastive_loss(images, texts, *args)
    assert loss.item() == pytest.approx(slow_loss(images, texts, rows, keys, 0.2), abs=1e-5)


TOWERS = [
    {"adapter": "layerwise", "unlock": "layernorm"},
    {"adapter": "deep", "unlock": "bitfit"},
    {"unlock": "all"},
]


@pytest.mark.parametrize("tower", TOWERS, ids=["lwa", "da", "clip"])
def test_cached_gradients_are_those_of_the_plain_batch(folders, tower):
    """Without dropout, cut in three or whole, against one autograd pass over the slow loss."""
    shape = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    text = str(write_text(Path(folders["text"] + "-dry"), CAPTIONS, **shape))
    model = build(folders | {"text": text}, image=tower, text=tower)
    rows, keys = [0, 0, 1, 2, 3, 4, 4, 5], [0, 1, 2, 1, 4, 5]
    batch = pairs_of(model, rows, keys)

    def gradients(step) -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        step()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    def plain() -> None:
        model.train()
        images = model.image_vectors(batch.pictures)
        texts = model.text_vectors(batch.ids, batch.mask)
        t, total = model.temperature, 0
        for j, row in enumerate(rows):
            i2t = [k for k in range(8) if k == j or keys[rows[k]] != keys[row]]
            t2i = [i for i in range(6) if i == row or keys[i] != keys[row]]
            copies = torch.tensor([1 if i == row else keys.count(keys[i]) for i in t2i])
            own = images[row] @ texts[j] / t
            total += torch.logsumexp(texts[i2t] @ images[row] / t, 0) / 2 - own
            total += torch.logsumexp(images[t2i] @ texts[j] / t - copies.log(), 0) / 2
        (total / 8).backward()

    expected = gradients(plain)
    assert expected.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for pieces in (1, 3, 8):
        found = gradients(lambda n=pieces: model.accumulate(batch.split(n)))
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_both_passes_of_a_micro_batch_drop_the_same(folders):
    """With dropout: the cached pass's vectors are those that the second pass differentiates."""
    model = build(folders, text={"unlock": "all"})
    batch, seen = pairs_of(model, [0, 1, 2, 3], [0, 1, 2, 3]), []
    real = model.text_vectors
    model.text_vectors = lambda *args: seen.append(out := real(*args)) or out
    torch.manual_seed(5)
    model.accumulate(batch.split(2))
    assert [v.requires_grad for v in seen] == [False, False, True, True]
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])
    assert not torch.equal(seen[0], model.eval() and real(batch.ids[:2], batch.mask[:2]))


def test_the_temperature_is_clamped_and_divides(folders):
    model = build(folders)
    batch = pairs_of(model, [0, 1, 2], [0, 1, 2])
    for wild, tame in ((3.0, 0.5), (-1.0, 0.001)):
        model.temperature.data.fill_(wild)
        model.accumulate([batch])
        assert model.temperature.item() == pytest.approx(tame)


def resized(picture: Tensor, *sides: int) -> Tensor:
    """uint8 (3, H, W) -> the picture at each of these sides in turn, bicubic, float (3, S, S)."""
    channels = [Image.fromarray(channel.numpy().astype(np.float32)) for channel in picture]
    for side in sides:
        channels = [c.resize((side, side), Image.Resampling.BICUBIC) for c in channels]
    return torch.stack([torch.from_numpy(np.array(channel)) for channel in channels])


def test_a_picture_lacks_detail_if_a_quarter_of_its_size_does_as_well():
    """Against Pillow's resampling: noise of N pixels enlarged to 260, alone, flat, and faint."""
    noise = [
        resized(pictures(1, n)[0], 260).round().clamp(0, 255).byte() for n in (16, 32, 64, 130)
    ]
    flat = torch.full((3, 260, 260), 128, dtype=torch.uint8)
    red = torch.tensor([201, 7, 99], dtype=torch.uint8)[:, None, None].expand(3, 260, 260)
    rows = torch.stack([*noise, pictures(1, 260)[0], flat, flat // 5 + noise[0] // 9, red])
    expected = []
    for row in rows:
        grey = row.float().mean(0, keepdim=True)
        lost = (resized(grey, 65, 260) - grey).square().mean().sqrt()
        contrast = (grey - grey.mean()).square().mean().sqrt()
        expected.append(bool(20 * lost < contrast and contrast > 1))
    assert lacks_detail(rows).tolist() == expected
    assert expected == [True, False, False, False, False, False, True, False]


def test_blurred_pictures_are_read_at_a_smaller_size_too(folders):
    """The mean of both readings, each done alone; other pictures are read as they were.

    The one at the smaller size is of the picture and of its mirror image.
    """
    plain, model = build(folders, "cnn"), build(folders, "cnn", image={"blurred": 96})
    model.load_state_dict(plain.state_dict())
    small = resized(pictures(1, 24)[0], 224).round().clamp(0, 255).byte()
    rows = torch.stack([pictures(1, 224)[0], small, pictures(2, 224)[1]])
    found, before = model.encoder(rows).tokens, plain.encoder(rows).tokens
    tower = plain.encoder
    less = resized(small, 96).clamp(0, 255)
    half = (tower.cells(less[None]) + tower.cells(less.flip(2)[None])) / 2
    assert half.shape[1] == 9
    torch.testing.assert_close(
        found[1, 0], (tower.pooled(tower.cells(small[None]))[0] + half[0].mean(0)) / 2,
        atol=1e-4, rtol=1e-4,
    )  # fmt: skip
    assert not torch.allclose(found[1], before[1], atol=1e-2)
    torch.testing.assert_close(found[[0, 2]], before[[0, 2]])
    alone = torch.cat([model.encoder(row[None]).tokens for row in rows])
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)
    others = model.encoder(torch.stack([small, small, small])).tokens
    assert torch.equal(others[1], found[1])  # whatever is beside it
    deep, large, tiny = {"adapter": "deep"}, {"blurred": 224}, {"blurred": 16}
    for vision, image in (("vision", {}), ("cnn", deep), ("cnn", large), ("cnn", tiny)):
        with pytest.raises(UserError, match="needs a CNN of any size that is read by its mean"):
            build(folders, vision, image={"blurred": 96, "pool": "mean"} | image)


def test_an_mlp_stands_beside_the_projection_and_starts_at_zero(folders):
    """Against the two written out; where only texts are read it is not asked for."""
    plain, model = build(folders), build(folders, image={"mlp": 20})
    count = sum(p.numel() for n, p in model.named_parameters() if n.startswith("image_mlp."))
    assert count == 32 * 20 + 20 + 20 * 256 + 256
    assert all(
        model.trainable(n) and p.requires_grad for n, p in model.image_mlp.named_parameters()
    )
    model.load_state_dict(plain.state_dict(), strict=False)
    seen = pictures(3)
    assert torch.equal(model.embed_images(seen), plain.embed_images(seen))
    for parameter in model.image_mlp.parameters():
        parameter.data = 0.3 * torch.randn_like(parameter)
    with torch.no_grad():
        vector = model.encoder(seen).tokens[:, 0]
        (w1, b1), (w2, b2) = ((model.image_mlp[i].weight, model.image_mlp[i].bias) for i in (0, 2))
        hidden = vector @ w1.T + b1
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        linear = vector @ model.image_projection.weight.T + model.image_projection.bias
        expected = F.normalize(linear + hidden @ w2.T + b2, dim=-1)
    torch.testing.assert_close(model.embed_images(seen), expected, atol=1e-5, rtol=1e-4)
    assert not torch.equal(model.embed_images(seen), plain.embed_images(seen))


def test_dropout_before_the_projections_is_trainings_only_and_repeats(folders):
    """Half of what a projection reads is gone in training; both passes drop the same."""
    options = {"image": {"dropout": 0.5, "pool": "mean"}, "text": {"dropout": 0.5}}
    model = build(folders, **options)
    bare = build(folders, image={"pool": "mean"})
    bare.load_state_dict(model.state_dict())
    seen = pictures(6)
    torch.testing.assert_close(model.eval().embed_images(seen), bare.eval().embed_images(seen))
    batch = pairs_of(model, [0, 1, 2], [0, 1, 2])
    model.train()
    torch.manual_seed(0)
    first = model.image_vectors(batch.pictures)
    assert (first - model.image_vectors(batch.pictures)).abs().max() > 0.01
    torch.manual_seed(0)
    torch.testing.assert_close(model.image_vectors(batch.pictures), first)


def test_a_fixed_temperature_is_neither_trained_nor_saved(folders):
    model = build(folders, temperature=0.05, learn_temperature=False)
    assert model.temperature.item() == pytest.approx(0.05)
    assert not model.temperature.requires_grad
    assert "temperature" not in models.trainable_state(model)
    learned = build(folders, temperature=0.05)
    assert "temperature" in models.trainable_state(learned)
