"""Frozen matrices as oneDNN keeps them: the same numbers as plain layers give."""

import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from test_decoder import FAMILIES, left_padded, logits, ours, peer
from test_encoders import encoder_of, pixels
from test_itune import model, pictures  # noqa: F401
from tiny import VIT
from torch import nn

import tinyvl.packed
from tinyvl import models
from tinyvl.decode import Style
from tinyvl.decoder import ACTIVATIONS, Cache
from tinyvl.packed import Packed, pack_decoder, packed, packs

NEAR = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
needs_tiles = pytest.mark.skipif(not packs(torch.float32), reason="no oneDNN here")


@needs_tiles
@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("activation", ["", *ACTIVATIONS])
def test_a_packed_layer_is_a_linear_layer_and_its_activation(dtype, activation):
    if not packs(dtype):
        pytest.skip("this processor has no bf16")
    torch.manual_seed(0)
    then = ACTIVATIONS.get(activation, nn.Identity())
    for bias in (torch.randn(70).to(dtype), None):
        weight = (torch.randn(70, 33) / 6).to(dtype)
        layer = Packed(weight, bias, activation)
        for shape in ((1, 33), (7, 33), (200, 33), (3, 5, 33)):
            x = torch.randn(shape)
            found = layer(x)  # whatever its dtype
            assert found.dtype == dtype
            plain = F.linear(x.to(dtype).double(), weight.double())
            expected = then(plain if bias is None else plain + bias)
            torch.testing.assert_close(found.double(), expected, atol=NEAR[dtype], rtol=NEAR[dtype])


@needs_tiles
@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_decoder_gives_the_logits_it_gave(family):
    plain = ours(peer(family))
    decoder = copy.deepcopy(plain)
    pack_decoder(decoder)
    assert not [m for m in decoder.layers.modules() if isinstance(m, nn.Linear)]
    ids, mask = left_padded()
    torch.testing.assert_close(
        logits(decoder, ids, mask), logits(plain, ids, mask), atol=1e-4, rtol=0
    )
    cache = Cache()
    with torch.no_grad():
        decoder(ids[:, :-1], mask[:, :-1], cache=cache)
        last = decoder.logits(decoder(ids[:, -1:], mask[:, -1:], cache=cache)[:, 0])
    torch.testing.assert_close(last, logits(plain, ids, mask)[:, -1], atol=1e-4, rtol=0)


SWIN = {"img_size": 32, "patch_size": 2, "embed_dim": 32, "depths": (1, 1), "num_heads": (2, 2),
        "window_size": 4}  # fmt: skip
NETS = {  # and how many of its linear layers stay as they are
    "plain": ("vit_tiny_patch16_224", VIT, 0),
    "CLIP": ("vit_base_patch16_clip_quickgelu_224", VIT | {"pre_norm": True}, 0),
    "tanh": ("vit_tiny_patch16_224", VIT | {"act_layer": "gelu_tanh"}, 0),
    "torch's tanh": ("vit_tiny_patch16_224", VIT | {"act_layer": partial(nn.GELU, "tanh")}, 0),
    "relu": ("vit_tiny_patch16_224", VIT | {"act_layer": "relu"}, 0),
    "silu": ("vit_tiny_patch16_224", VIT | {"act_layer": "silu"}, 0),
    "another": ("vit_tiny_patch16_224", VIT | {"act_layer": "mish"}, 0),
    "a norm within": ("vit_tiny_patch16_224", VIT | {"scale_mlp_norm": True}, 0),
    "no biases": ("vit_tiny_patch16_224", VIT | {"qkv_bias": False, "proj_bias": False}, 0),
    "DINOv2": ("vit_small_patch14_reg4_dinov2", VIT | {"reg_tokens": 2, "init_values": 0.1}, 0),
    "DeiT III": ("deit3_small_patch16_224", VIT, 0),
    "BEiT": ("beit_base_patch16_224", VIT, 6),  # whose attention reads its weights itself
    "EVA-02": ("eva02_tiny_patch14_224", VIT, 12),
    "Swin": ("swin_tiny_patch4_window7_224", SWIN, 5),
    "ConvNeXt": ("convnext_tiny", {"depths": (1, 1, 1, 1), "dims": (8, 16, 32, 64)}, 0),
}


@needs_tiles
@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("name", NETS)
def test_a_packed_encoder_sees_what_it_saw(name, dtype):
    if not packs(dtype):
        pytest.skip("this processor has no bf16")
    architecture, args, left = NETS[name]
    plain = encoder_of(architecture, args)
    encoder = copy.deepcopy(plain)
    encoder.model.to(dtype)
    half = copy.deepcopy(encoder)
    for _ in range(2):  # packed is packed
        encoder.pack()
    assert sum(isinstance(m, nn.Linear) for m in encoder.model.modules()) == left
    assert any(isinstance(m, Packed) for m in encoder.model.modules()) == (name != "EVA-02")
    expected, found, rounded = (e(pixels(32)) for e in (plain, encoder, half))
    for exact, quick, other in zip(
        (expected.tokens, *expected.summaries), (found.tokens, *found.summaries),
        (rounded.tokens, *rounded.summaries), strict=True,
    ):  # fmt: skip
        assert quick.dtype == other.dtype
        if dtype == torch.float32:
            torch.testing.assert_close(quick, exact, rtol=0, atol=1e-5)
        else:  # no farther off than rounding takes it
            assert (quick - exact).square().mean() < 1.5 * (other - exact).square().mean()


@needs_tiles
def test_a_packed_captioner_writes_the_same(model):  # noqa: F811
    """With λ = 1.5, which is then in the matrix of equation 5."""
    ready = copy.deepcopy(model)
    models.freeze(ready)
    assert all(m.packed_q and m.packed_o for m in ready.itune.values())
    for style in (Style(beams=3, max_tokens=8), Style(beams=1, max_tokens=8)):
        lines = [[model.text.bos]] * 5
        found = [m.written(pictures(5), lines, style) for m in (model, ready)]
        for plain, quick in zip(*found, strict=True):
            assert quick.tokens == plain.tokens
            assert quick.score == pytest.approx(plain.score, abs=1e-4)


@needs_tiles
def test_a_packed_captioner_in_bf16_is_near_what_it_was(model):  # noqa: F811
    if not packs(torch.bfloat16):
        pytest.skip("this processor has no bf16")
    ready = copy.deepcopy(model)
    ready.halve(torch.bfloat16)
    ready.amp = torch.bfloat16
    models.freeze(ready)
    assert copy.deepcopy(ready).decoder.packed_head is ready.decoder.packed_head
    hidden = torch.randn(40, ready.decoder.config.hidden_size)
    found, plain = (m.decoder.logits(hidden) for m in (ready, model))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), plain, atol=0.1, rtol=0.02)
    lines = [[model.text.bos]] * 3
    for style in (Style(beams=3), Style(beams=1), Style(sampling={"seed": 1, "top_k": 5})):
        for h in ready.written(pictures(3), lines, replace(style, max_tokens=6)):
            assert math.isfinite(h.score)


@needs_tiles
def test_no_gradient_is_lost_in_silence():
    layer = Packed(torch.ones(3, 4))
    with pytest.raises(AssertionError, match="no gradient"):
        layer(torch.ones(2, 4, requires_grad=True))
    with torch.no_grad():
        layer(torch.ones(2, 4, requires_grad=True))


@pytest.mark.parametrize("how", ["missing", "refused", "wrong"])
def test_without_torchs_function_or_a_right_one_all_stays_plain(monkeypatch, how):
    class Functions:
        def _reorder_linear_weight(self, weight, rows):
            if how == "refused":
                raise RuntimeError("needs another processor")
            return weight

        def _linear_pointwise(self, x, weight, bias, kind, numbers, name):
            return torch.zeros(*x.shape[:-1], len(weight))

    functions = object() if how == "missing" else Functions()
    monkeypatch.setattr(tinyvl.packed.torch.ops, "mkldnn", functions)
    packs.cache_clear()
    try:
        assert not packs(torch.float32)
        assert packed(torch.ones(3, 4)) is None
        decoder = ours(peer("llama"))
        before = logits(decoder, *left_padded())
        pack_decoder(decoder)
        assert decoder.packed_head is None
        assert torch.equal(logits(decoder, *left_padded()), before)
        encoder = encoder_of("vit_tiny_patch16_224", VIT)
        before = encoder(pixels(32)).tokens
        encoder.pack()
        assert torch.equal(encoder(pixels(32)).tokens, before)
    finally:
        packs.cache_clear()
