"""LilT: parameter counts, towers, adapters, loss and gradients against slow references."""

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny import write_text, write_vision
from torch import Tensor
from transformers import BertModel

from tinyvl import models
from tinyvl.lilt import LilT, Pairs

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
        ("lilt-da-bitfit", 14_775_297, 7.06),
        ("lit", 109_285_377, 56.01),
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
    monkeypatch.setattr(models.hub, "fetch", None)  # neither weights nor network
    found = models.inspect(name)
    assert found["trainable_parameters"] == count
    if percent is not None:
        assert found["trainable_percent"] == pytest.approx(percent, abs=0.0051)
    assert found["recipe"]["batch"] == 512


def test_every_preset_of_lilt_is_there():
    names = """lilt-frozen lilt-ln-only lilt-projection lilt-ln lilt-bitfit lilt-da-noln
        lilt-da-tiny lilt-da-small lilt-da-base lilt-da-large lilt-lwa-noln lilt-lwa-base
        lilt-lwa-large lilt-lwa-bitfit lilt-da-bitfit lilt-lwa-multilingual lilt-da-multilingual
        lit lit-tiny lit-small lit-reversed lit-da lit-lwa clip-tiny clip-small clip-base"""
    assert set(names.split()) == {n for n, row in models.PRESETS.items() if row.method == "lilt"}


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
    return Pairs(pictures(len(keys), side), torch.tensor(keys), torch.tensor(rows), ids, mask)


BOTH = {"layerwise": "layerwise", "deep": "deep"}


def test_without_additions_the_towers_are_timms_and_transformers(folders):
    model = build(folders).eval()
    x = pictures(3)
    vit = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0,
        **models.read_config(Path(folders["vision"]))["model_args"],
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
