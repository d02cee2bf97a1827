"""BERT without transformers, and a model of which one tower is loaded."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import write_text, write_vision
from transformers import AutoTokenizer, BertModel

from tinyvl import UserError, encoders_text, hub, models
from tinyvl.lilt_towers import TextTower

TEXTS = ["a red dog runs", "two cats sleep on the mat", "sky", "", "an unknown zebra " * 30]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("towers")
    return {
        "text": str(write_text(root / "text", TEXTS[:3])),
        "vision": str(write_vision(root / "vision")),
        "cnn": str(write_vision(root / "cnn", "tf_efficientnet_lite0", {})),
    }


def same_as_transformers(folder) -> None:
    ours, tokenizer = encoders_text.load(folder)
    theirs = BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    known = AutoTokenizer.from_pretrained(folder)
    for longest in (30, 8):
        tower = TextTower(ours, tokenizer, clean=False, pool="token", tuned=frozenset())
        ids = tower.encode(TEXTS, longest)
        assert ids == known(TEXTS, truncation=True, max_length=longest)["input_ids"]
    assert tokenizer.pad_token_id == known.pad_token_id
    rows = [torch.tensor(row) for row in ids]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True)
    with torch.no_grad():
        found = ours(padded, mask).last_hidden_state
        expected = theirs(input_ids=padded, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=0)


def test_hidden_states_and_ids_are_those_of_transformers(folders, tmp_path):
    folder = hub.fetch(folders["text"], "text")
    assert encoders_text.readable(folder)
    same_as_transformers(folder)


def test_a_text_in_a_large_batch_is_the_text_alone(folders, monkeypatch):
    """Padding is left out and attention runs piece by piece: vectors and gradients stay."""
    ours, _ = encoders_text.load(hub.fetch(folders["text"], "text"))
    torch.manual_seed(0)
    lengths = torch.randint(1, 12, (9,)).tolist()
    ids = torch.randint(len(ours.embeddings["word_embeddings"].weight), (9, max(lengths)))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    weight = ours.encoder["layer"][0].intermediate["dense"].weight.requires_grad_()
    found = []
    for size in (1, 2, 64):
        monkeypatch.setattr(encoders_text.Piece, "TEXTS", size)
        states = ours(ids, mask).last_hidden_state
        assert not states[mask == 0].any()
        (states**2).sum().backward()
        found.append((states.detach(), weight.grad.clone()))
        weight.grad = None
    for states, gradient in found[:2]:
        torch.testing.assert_close(states, found[2][0], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(gradient, found[2][1], atol=1e-5, rtol=1e-4)


def test_the_names_of_the_first_checkpoints_are_read(folders, tmp_path):
    """bert-base-uncased has a prefix, and gamma and beta for a LayerNorm's weight and bias."""
    folder = hub.fetch(folders["text"], "text")
    new, _ = encoders_text.load(folder)
    state = load_file(folder / "model.safetensors")
    old = {f"bert.{name}": tensor for name, tensor in state.items()}
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): t
        for n, t in old.items()
    }
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    save_file(old, tmp_path / "model.safetensors")
    again, _ = encoders_text.load(tmp_path)
    for name, tensor in new.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor)
    del old["bert.encoder.layer.1.output.dense.weight"]
    save_file(old, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="weights of encoder"):
        encoders_text.load(tmp_path)


@pytest.mark.parametrize(
    ("vision", "options"),
    [
        ("vision", {}),
        ("vision", {"text": {"adapter": "layerwise", "unlock": "layernorm"}}),
        ("vision", {"text": {"adapter": "deep", "pool": "mean"}, "clean": True}),
        ("cnn", {"text": {"unlock": "all"}, "image": {"adapter": "deep", "width": 64}}),
        ("vision", {"image": {"adapter": "layerwise"}, "text": {"unlock": "bitfit"}}),
    ],
)
def test_one_tower_embeds_as_both_do(folders, tmp_path, vision, options, monkeypatch):
    torch.manual_seed(0)
    config = models.new_config(
        "lilt", folders["text"], folders[vision], fit="squash", prompt="", options=options
    )
    model = models.build(config, device=CPU, precision=torch.float32)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if model.trainable(name):  # as if trained
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    models.save_config(tmp_path, config)
    models.save(model, tmp_path)
    load = {"task": "retrieve", "device": CPU}
    both = models.load(str(tmp_path), **load)
    text = models.load(str(tmp_path), **load, sides=["text"])
    image = models.load(str(tmp_path), **load, sides=["image"])
    assert isinstance(text.text.model, encoders_text.Bert)
    assert (text.encoder, image.text) == (None, None)
    assert both.fingerprint == text.fingerprint == image.fingerprint
    expected = both.embed_texts(TEXTS)
    torch.testing.assert_close(text.embed_texts(TEXTS), expected, atol=1e-5, rtol=0)
    side = both.encoder.size
    pictures = torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8, generator=generator)
    expected = both.embed_images(pictures)
    torch.testing.assert_close(image.embed_images(pictures), expected, atol=1e-6, rtol=0)
    with monkeypatch.context() as patch:  # the same weights, read otherwise
        patch.setattr(models, "READING", -1)
        assert models.load(str(tmp_path), **load).fingerprint != both.fingerprint
    model.temperature.data += 0.01
    models.save(model, tmp_path)
    assert models.load(str(tmp_path), **load).fingerprint != both.fingerprint


def test_a_text_alone_imports_neither_timm_nor_transformers(folders, tmp_path):
    """They take seconds; so does torch's compiler."""
    config = models.new_config(
        "lilt", folders["text"], folders["vision"], fit="squash", prompt="", options={}
    )
    model = models.build(config, device=CPU, precision=torch.float32)
    models.save_config(tmp_path, config)
    models.save(model, tmp_path)
    code = (
        "import sys; from tinyvl import models; "
        f"model = models.load({str(tmp_path)!r}, task='retrieve', sides=['text']); "
        "model.embed_texts(['a red dog']); "
        "print([m for m in ('timm', 'transformers', 'torch._dynamo') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
