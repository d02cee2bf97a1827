"""Encoders against timm's own forward passes."""

import json
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from tiny import VIT, write_vision
from torch import nn

from tinyvl import UserError, encoders_fold
from tinyvl.encoders import ImageEncoder, build_image_encoder


def encoder_of(architecture, args=None, **kwargs):
    torch.manual_seed(0)
    config = {"architecture": architecture, "model_args": args or {}}
    encoder = build_image_encoder(config, **kwargs)
    for p in encoder.model.parameters():
        p.data += 0.02 * torch.randn_like(p)
    return encoder


def loaded(folder) -> ImageEncoder:
    return build_image_encoder(json.loads((folder / "config.json").read_text()), folder)


def pixels(side, n=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (n, 3, side, side), generator=generator, dtype=torch.uint8)


def normalised(encoder, x):
    return (x.float() / 255 - encoder.mean) / encoder.std


def test_vit_tokens_are_timms_and_summaries_are_cls_after_the_final_norm():
    encoder = encoder_of("vit_tiny_patch16_224", VIT)
    x = pixels(32)
    percept = encoder(x)
    with torch.no_grad():
        expected = encoder.model.forward_features(normalised(encoder, x))
        # a slow reference for the summaries: block by block, final norm, token 0
        model, levels = encoder.model, []
        h = model.patch_embed(normalised(encoder, x))
        h = model.norm_pre(model._pos_embed(h))
        for block in model.blocks:
            h = block(h)
            levels.append(model.norm(h)[:, 0])
    assert percept.tokens.shape == (2, 17, 32)  # 16 patches and [CLS]
    torch.testing.assert_close(percept.tokens, expected, rtol=0, atol=1e-5)
    assert len(percept.summaries) == 3
    for ours, theirs in zip(percept.summaries, levels, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_levels_counts_from_the_last():
    encoder = encoder_of("vit_tiny_patch16_224", VIT)
    some = encoder_of("vit_tiny_patch16_224", VIT, levels=2)
    some.model.load_state_dict(encoder.model.state_dict())
    x = pixels(32)
    assert len(some(x).summaries) == 2
    for a, b in zip(some(x).summaries, encoder(x).summaries[1:], strict=True):
        torch.testing.assert_close(a, b)


def test_clip_vit_is_quickgelu_before_the_projection():
    """The encoder of the paper, small: against the same computation written out."""
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    encoder = encoder_of("vit_base_patch16_clip_quickgelu_224", args)
    assert encoder.final_norm
    assert encoder.width == 32
    x = pixels(32)
    model = encoder.model
    h = model.norm_pre(model._pos_embed(model.patch_embed(normalised(encoder, x))))
    for block in model.blocks:
        h = h + block.attn(block.norm1(h))
        inner = block.mlp.fc1(block.norm2(h))
        h = h + block.mlp.fc2(inner * torch.sigmoid(1.702 * inner))
    torch.testing.assert_close(encoder(x).tokens, model.norm(h), rtol=0, atol=1e-5)


def test_the_papers_encoder_gives_197_tokens_of_768():
    with torch.device("meta"):
        encoder = build_image_encoder({"architecture": "vit_base_patch16_clip_quickgelu_224"})
    assert (encoder.width, encoder.size) == (768, 224)
    assert encoder.model.patch_embed.num_patches + encoder.model.num_prefix_tokens == 197


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext"])
def test_cnn_maps_become_normalised_tokens(name):
    encoder = encoder_of(name)
    x = pixels(encoder.size)
    percept = encoder(x)
    with torch.no_grad():
        fmap = encoder.model.forward_features(normalised(encoder, x))  # (B, C, H, W)
    if fmap.shape[1] == encoder.width:
        slow = torch.stack(
            [fmap[:, :, i, j] for i in range(fmap.shape[2]) for j in range(fmap.shape[3])], 1
        )
        slow = (slow - slow.mean(-1, keepdim=True)) / (
            slow.var(-1, unbiased=False, keepdim=True) + 1e-5
        ).sqrt()
        torch.testing.assert_close(percept.tokens, slow, rtol=0, atol=1e-4)
    assert percept.tokens.shape[-1] == encoder.width
    torch.testing.assert_close(
        percept.tokens.mean(-1), torch.zeros(percept.tokens.shape[:2]), atol=1e-3, rtol=0
    )
    assert len(percept.summaries) >= 4  # a stage each
    assert all(s.ndim == 2 for s in percept.summaries)


@pytest.mark.parametrize("levels", [None, 1, 5])
@pytest.mark.parametrize(
    ("name", "lower", "stages"),
    [("test_efficientnet", 2, [4, 3]), ("test_efficientnet", 1, [4]), ("test_resnet", 2, [3, 2])],
)
def test_lower_maps_lie_on_the_last_maps_cells(name, lower, stages, levels):
    """A ResNet's last stage is its last map; an EfficientNet's is widened once more behind it."""
    encoder = encoder_of(name, lower=lower, levels=levels)
    plain = encoder_of(name, levels=levels)
    plain.model.load_state_dict(encoder.model.state_dict())
    x = pixels(encoder.size)
    percept = encoder(x)
    with torch.no_grad():
        _, maps = encoder.model.forward_intermediates(normalised(encoder, x))
    side = maps[-1].shape[-1]
    expected = [plain(x).tokens]
    for stage in stages:
        step = maps[stage].shape[-1] // side  # here a whole number
        cells = maps[stage].unfold(2, step, step).unfold(3, step, step).mean((-2, -1))
        expected.append(F.layer_norm(cells.flatten(2).mT, cells.shape[1:2]))
    assert encoder.below == [x.shape[-1] for x in expected[1:]]
    torch.testing.assert_close(percept.tokens, torch.cat(expected, -1), rtol=0, atol=1e-4)
    for ours, theirs in zip(percept.summaries, plain(x).summaries, strict=True):
        assert torch.equal(ours, theirs)


def test_lower_maps_that_are_not_there_are_refused():
    with pytest.raises(UserError, match=r"--lower 9: .* 5 stages below its last map"):
        encoder_of("test_efficientnet", lower=9)
    with pytest.raises(UserError, match=r"--lower 1: .* no maps"):
        encoder_of("vit_tiny_patch16_224", VIT, lower=1)


def test_a_larger_picture_adds_its_tokens():
    encoder = encoder_of("test_efficientnet", lower=1, larger=208)
    plain = encoder_of("test_efficientnet", lower=1)
    plain.model.load_state_dict(encoder.model.state_dict())
    x = pixels(plain.size)
    assert encoder.size == plain.size == 160
    percept, seen = encoder(x), plain(x)
    large = x.float().permute(0, 2, 3, 1).numpy()
    large = np.stack([enlarged(enlarged(p, 208, 0), 208, 1) for p in large]).clip(0, 255)
    large = plain(torch.from_numpy(large).float().permute(0, 3, 1, 2))
    assert [p.tokens.shape[1] for p in (seen, large)] == [5 * 5, 7 * 7]
    expected = torch.cat([seen.tokens, large.tokens], 1)
    torch.testing.assert_close(percept.tokens, expected, rtol=0, atol=1e-3)
    for ours, theirs in zip(percept.summaries, seen.summaries, strict=True):
        assert torch.equal(ours, theirs)
    many = x.repeat(3, 1, 1, 1)  # more than a CPU encodes at once
    torch.testing.assert_close(encoder(many).tokens, percept.tokens.repeat(3, 1, 1))


def enlarged(picture, side, axis, a=-0.75):
    """Cubic convolution (Keys, 1981) along an axis, pixel by pixel, edges repeated."""
    picture = np.moveaxis(picture, axis, 0)
    rows = []
    for i in range(side):
        at = (i + 0.5) * len(picture) / side - 0.5
        first, total = int(np.floor(at)) - 1, 0.0
        for j in range(first, first + 4):
            t = abs(at - j)
            near = (a + 2) * t**3 - (a + 3) * t**2 + 1
            far = a * (t**3 - 5 * t**2 + 8 * t - 4)
            total = total + (near if t <= 1 else far) * picture[min(max(j, 0), len(picture) - 1)]
        rows.append(total)
    return np.moveaxis(np.stack(rows), 0, axis)


def test_larger_pictures_that_cannot_be_are_refused():
    with pytest.raises(UserError, match=r"--larger 160: give more than .* own 160 pixels"):
        encoder_of("test_efficientnet", larger=160)
    with pytest.raises(UserError, match=r"--larger 448: .* no maps"):
        encoder_of("vit_tiny_patch16_224", VIT, larger=448)
    with pytest.raises(UserError, match=r"--larger 448: .* one size only"):
        encoder_of("levit_128s", larger=448)


@pytest.mark.parametrize(
    "name",
    ["test_vit2", "test_vit3", "test_byobnet", "test_nfnet", "test_mambaout",
     "swin_tiny_patch4_window7_224", "tiny_vit_5m_224", "mobilevit_xxs", "maxvit_rmlp_pico_rw_256"],
)  # fmt: skip
def test_any_other_timm_model_gives_tokens_and_summaries(name):
    encoder = encoder_of(name)
    percept = encoder(pixels(encoder.size, 1))
    assert percept.tokens.ndim == 3
    assert percept.tokens.shape[-1] == encoder.width
    assert percept.tokens.shape[1] >= 9
    assert torch.isfinite(percept.tokens).all()
    assert all(s.ndim == 2 and len(s) == 1 for s in percept.summaries)


def test_a_vit_without_a_final_norm_gets_one_without_parameters():
    encoder = encoder_of("vit_tiny_patch16_224", VIT | {"global_pool": "avg", "fc_norm": True})
    tokens = encoder(pixels(32)).tokens
    torch.testing.assert_close(tokens, F.layer_norm(tokens, (32,)), rtol=0, atol=1e-2)


def test_a_batch_is_encoded_like_its_pictures_one_by_one():
    encoder = encoder_of("test_efficientnet")
    x = pixels(encoder.size, 3)
    alone = torch.cat([encoder(p[None]).tokens for p in x])
    torch.testing.assert_close(encoder(x).tokens, alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [(300, 200), (64, 500), (32, 32)])
def test_the_transform_is_timms_own(size):
    from timm.data import create_transform

    encoder = encoder_of("test_vit")
    generator = torch.Generator().manual_seed(0)
    array = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    picture = Image.fromarray(array.numpy())
    theirs = create_transform(**encoder.data_config, is_training=False)(picture)
    ours = encoder.transform()(picture)
    assert ours.dtype == torch.uint8
    torch.testing.assert_close(normalised(encoder, ours), theirs, rtol=0, atol=1e-5)


def test_of_a_thin_picture_only_the_middle_is_enlarged():
    from timm.data import create_transform

    encoder, generator = encoder_of("test_vit"), torch.Generator().manual_seed(0)
    whole = create_transform(**encoder.data_config, is_training=False, normalize=False)
    for size in ((1, 401), (400, 1), (2, 801), (7, 3000), (1500, 6)):
        array = torch.randint(0, 256, (*size, 3), generator=generator, dtype=torch.uint8)
        picture = Image.fromarray(array.numpy())
        ours, theirs = encoder.transform()(picture), whole(picture)
        assert (ours.float() - theirs.float()).abs().mean() < 3  # the lengths are rounded
        assert min(size) > 1 or torch.equal(ours, theirs)


@pytest.mark.parametrize("fit", ["crop", "squash", "jpeg"])
def test_a_picture_of_1_by_30_000_pixels_takes_no_gigabytes(fit, monkeypatch):
    largest, resize = [0], Image.Image.resize

    def counted(self, size, *args, **options):
        largest[0] = max(largest[0], size[0] * size[1])
        return resize(self, size, *args, **options)

    monkeypatch.setattr(Image.Image, "resize", counted)
    encoder, colour = encoder_of("test_vit", fit=fit), torch.tensor([90.0, 40, 10])
    for size in ((1, 30_000), (30_000, 1)):
        picture = Image.new("RGB", size, (90, 40, 10))
        found = encoder.view()(picture)
        assert (found - colour[:, None, None]).abs().max() < 4  # a JPEG's colours are near
        assert encoder.view(1)(picture).shape == found.shape
    assert 0 < largest[0] < 2_000_000


def test_squash_keeps_the_edges_of_the_picture():
    picture = Image.new("RGB", (400, 100), "black")
    picture.paste("white", (0, 0, 40, 100))  # a tenth at the left edge
    crop = encoder_of("test_vit").transform()(picture)
    squash = encoder_of("test_vit", fit="squash").transform()(picture)
    assert crop.float().mean() < 1
    assert squash.float().mean() == pytest.approx(25.5, rel=0.1)
    assert squash.shape == crop.shape


def test_jpeg_makes_large_pictures_small_jpegs():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (600, 400, 3), generator=generator, dtype=torch.uint8)
    gradient = torch.linspace(0, 255, 400).expand(600, 400)[..., None].expand(-1, -1, 3)
    picture = Image.fromarray(((noise.float() + 3 * gradient) / 4).to(torch.uint8).numpy())
    jpeg, squash = (encoder_of("test_vit", fit=f).transform()(picture) for f in ("jpeg", "squash"))
    assert jpeg.shape == squash.shape
    assert 0 < (jpeg.float() - squash.float()).abs().mean() < 8
    small = picture.resize((200, 256))
    as_it_is, made = (encoder_of("test_vit", fit=f).transform()(small) for f in ("squash", "jpeg"))
    assert torch.equal(as_it_is, made)
    with pytest.raises(UserError, match="--fit"):
        encoder_of("test_vit", fit="stretch")


def test_it_is_frozen_and_stays_in_eval_mode(tmp_path):
    encoder = loaded(write_vision(tmp_path / "v"))
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not encoder.train().model.training


def test_folders_load(tmp_path):
    folder = write_vision(tmp_path / "v", "test_resnet", {})
    encoder = loaded(folder)
    peer = timm.create_model("test_resnet")
    from safetensors.torch import load_file

    peer.load_state_dict(load_file(folder / "model.safetensors"))
    x = pixels(encoder.size)
    with torch.no_grad():
        fmap = peer.eval().forward_features(normalised(encoder, x)).flatten(2).transpose(1, 2)
    expected = F.layer_norm(fmap, fmap.shape[-1:])
    torch.testing.assert_close(encoder(x).tokens, expected, rtol=0, atol=1e-4)


def test_unknown_models_and_missing_weights_are_named(tmp_path):
    with pytest.raises(UserError, match="no_such_model"):
        build_image_encoder({"architecture": "no_such_model"})
    folder = write_vision(tmp_path / "v", state={"cls_token": torch.zeros(1, 1, 32)})
    with pytest.raises(UserError, match="missing"):
        loaded(folder)


def test_a_picture_imports_no_code_for_videos_and_sounds(tmp_path):
    folder = write_vision(tmp_path / "v")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    code = (
        "import json, sys; from pathlib import Path; from tinyvl import models_build, hub\n"
        f"folder = hub.fetch({str(folder)!r}, 'vision')\n"
        "config = json.loads((folder / 'config.json').read_text())\n"
        "encoder = models_build.build_encoder({'config': config, 'fit': 'crop'}, folder)\n"
        f"view = encoder.view(); encoder(view(view.load({str(tmp_path / 'a.png')!r}, 8))[None])\n"
        "rooms = ('encoders_av', 'hub_wheels', 'hub_convert')\n"
        "print([m for m in ('av', *(f'tinyvl.{r}' for r in rooms)) if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize(
    ("architecture", "left"),
    [("tf_efficientnet_lite0", 0), ("resnet18", 0), ("resnetv2_50", 17), ("convnext_atto", 0)],
)
def test_batch_norms_folded_into_convolutions_change_nothing(architecture, left):
    encoder = encoder_of(architecture)
    norms = [m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:  # as after training
        norm.running_mean.normal_(0, 0.1)
        norm.running_var.uniform_(0.5, 1.5)
    before = encoder(pixels(encoder.size, 1))
    encoder.fold()
    after = encoder(pixels(encoder.size, 1))
    assert sum(isinstance(m, nn.BatchNorm2d) for m in encoder.modules()) == left
    torch.testing.assert_close(after.tokens, before.tokens, rtol=0, atol=5e-4)
    for ours, theirs in zip(after.summaries, before.summaries, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_a_cnn_that_learns_keeps_its_batch_norms():
    encoder = encoder_of("resnet18")
    encoder.model.conv1.weight.requires_grad_(True)
    encoder.fold()
    assert isinstance(encoder.model.bn1, nn.BatchNorm2d)


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("size", [(16, 16), (17, 17), (16, 17), (5, 4), (1, 1), (2, 2)])
def test_tensorflows_padding_without_a_copy_is_timms(kernel, size):
    from timm.layers import Conv2dSame

    from tinyvl.encoders_fold import Same

    torch.manual_seed(0)
    for stride in (1, 2, 3):
        conv = Conv2dSame(6, 6, kernel, stride, groups=6).requires_grad_(False)
        x = torch.randn(2, 6, *size).contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(Same(conv)(x), conv(x), rtol=0, atol=1e-6)


def test_a_frozen_cnns_depthwise_convolutions_pad_within():
    encoder, plain = (encoder_of("tf_efficientnet_lite0") for _ in range(2))
    plain.model.load_state_dict(encoder.model.state_dict())
    encoder.fold()
    kinds = [type(m).__name__ for m in encoder.model.modules()]
    assert kinds.count("Same") == 4  # those of stride 2; the stem stays
    for side in (224, 195):
        x = pixels(side)
        torch.testing.assert_close(encoder(x).tokens, plain(x).tokens, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "fused"),
    [
        ("tf_efficientnet_lite0", 32),  # ReLU6; the stem pads on its own
        ("efficientnet_b0", 33),  # SiLU
        ("mobilenetv3_small_050", 23),  # ReLU and Hardswish
        ("regnety_002", 27),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_within_convolutions_change_nothing(monkeypatch, architecture, fused, dtype):
    if not encoders_fold.fuses(dtype):
        pytest.skip("this processor has no such function")
    encoder = encoder_of(architecture).to(dtype)
    encoder.fold()
    asked = []
    for side in (encoder.size, 195):
        asked.clear()
        monkeypatch.setattr(encoders_fold, "fuses", lambda dtype: asked.append(dtype) or True)
        found = encoder(pixels(side)).tokens
        assert asked == [dtype] * fused
        monkeypatch.setattr(encoders_fold, "fuses", lambda dtype: False)
        near = 1e-4 if dtype == torch.float32 else 0.3
        torch.testing.assert_close(found, encoder(pixels(side)).tokens, rtol=0, atol=near)


def test_without_torchs_function_convolution_and_activation_are_two_steps(monkeypatch):
    monkeypatch.setattr(encoders_fold.torch.ops, "mkldnn", object())
    encoders_fold.fuses.cache_clear()
    try:
        assert not encoders_fold.fuses(torch.float32)
        encoder = encoder_of("tf_efficientnet_lite0")
        before = encoder(pixels(encoder.size, 1)).tokens
        encoder.fold()
        after = encoder(pixels(encoder.size, 1)).tokens
        torch.testing.assert_close(after, before, rtol=0, atol=1e-4)
    finally:
        encoders_fold.fuses.cache_clear()


def test_a_picture_that_wants_a_gradient_gets_it_through_a_folded_cnn():
    encoder = encoder_of("tf_efficientnet_lite0")
    encoder.fold()
    x = torch.randn(1, 3, 96, 96, requires_grad=True)
    encoder.model.forward_features(x).sum().backward()
    assert x.grad.abs().sum() > 0
