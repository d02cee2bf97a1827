"""TimeSformer, AST and Whisper against transformers' outputs and slow references of their own.

Random weights in the published configurations, shrunk in width and depth.
"""

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from tiny import AST, TIMESFORMER, VIT, shaken, write_vision

from tinyvl import UserError
from tinyvl.models_build import build_encoder
from tinyvl.packed import packs

WHISPER = {
    "model_type": "whisper", "d_model": 48, "encoder_layers": 3, "encoder_attention_heads": 4,
    "encoder_ffn_dim": 96, "num_mel_bins": 80, "max_source_positions": 1500, "vocab_size": 60,
    "decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 96, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    "max_target_positions": 20, "begin_suppress_tokens": None,
}  # fmt: skip


def write(folder, model):
    torch.manual_seed(0)
    shaken(model).save_pretrained(folder)
    return folder


def clips(batch: int, frames: int, side: int = 64) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (batch, frames, 3, side, side), generator=draw, dtype=torch.uint8)


def close(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


@pytest.fixture
def timesformer(tmp_path):
    settings = {k: v for k, v in TIMESFORMER.items() if k != "model_type"}
    theirs = transformers.TimesformerForVideoClassification(
        transformers.TimesformerConfig(**settings)
    )
    folder = write(tmp_path / "timesformer", theirs)
    vision = {"config": TIMESFORMER, "fit": "squash", "modality": "video", "frames": 8}
    return theirs.timesformer, build_encoder(vision, folder)


@torch.no_grad()
def test_timesformer_is_transformers_with_cls_after_the_final_norm(timesformer):
    theirs, ours = timesformer
    x = clips(2, 8)
    seen = ours(x)
    pixels = (x.float() / 255 - 0.45) / 0.225
    expected = theirs(pixels, output_hidden_states=True)
    close(seen.tokens, expected.last_hidden_state)
    assert len(seen.summaries) == 3
    assert ours.widths == [48] * 3
    for level, states in zip(seen.summaries, expected.hidden_states[1:], strict=True):
        close(level, theirs.layernorm(states)[:, 0])
    for i in range(2):  # a clip does not depend on the others
        close(ours(x[i : i + 1]).summaries[1][0], seen.summaries[1][i])
    back = ours(x.flip(1)).summaries[-1]
    assert (back - seen.summaries[-1]).abs().max() > 1e-3  # it tells forwards from backwards


@torch.no_grad()
def test_packed_matrices_change_nothing(timesformer):
    if not packs(torch.float32):
        pytest.skip("no oneDNN here")
    kinds = ({"config": c, "fit": "crop", "modality": "audio"} for c in (AST, WHISPER))
    ast, whisper = map(build_encoder, kinds)
    cases = (timesformer[1], clips(2, 8)), (ast, sounds(1024, 128)), (whisper, sounds(3000, 80))
    for model, x in cases:
        before = model(x)
        model.pack()
        assert not [m for m in model.layers.modules() if isinstance(m, torch.nn.Linear)]
        after = model(x)
        close(after.tokens, before.tokens)
        for level, plain in zip(after.summaries, before.summaries, strict=True):
            close(level, plain)


def attention(module, x: torch.Tensor) -> torch.Tensor:
    """Softmax attention of one sequence (S, D), slowly."""
    q, k, v = module.attention.qkv(x).view(len(x), 3, module.attention.num_heads, -1).unbind(1)
    out = torch.zeros_like(q)
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head].T / q.shape[-1] ** 0.5
        out[:, head] = scores.softmax(-1) @ v[:, head]
    return module.output.dense(out.flatten(1))


@pytest.mark.parametrize("frames", [1, 3, 16])
@torch.no_grad()
def test_timesformer_equals_a_slow_reference_at_any_number_of_frames(timesformer, frames):
    theirs, ours = timesformer
    x = clips(1, frames)
    pixels = ((x.float() / 255 - 0.45) / 0.225)[0]
    embed = theirs.embeddings
    patches = embed.patch_embeddings.projection(pixels).flatten(2).transpose(1, 2)  # (T, P, D)
    patches = patches + embed.position_embeddings[0, 1:]
    head = embed.cls_token[0, 0] + embed.position_embeddings[0, 0]
    if frames > 1:  # one has no time
        nearest = [int(i * 8 / frames) for i in range(frames)]
        patches = patches + embed.time_embeddings[0, nearest][:, None]
    for layer, level in zip(theirs.encoder.layer, ours(x).summaries, strict=True):
        if frames > 1:
            for p in range(patches.shape[1]):  # in time, a patch at a time
                mixed = attention(layer.temporal_attention, layer.temporal_layernorm(patches[:, p]))
                patches[:, p] = patches[:, p] + layer.temporal_dense(mixed)
        heads, moved = [], []
        for t in range(frames):  # in space, a frame at a time
            states = torch.cat((head[None], patches[t]))
            mixed = attention(layer.attention, layer.layernorm_before(states))
            heads.append(mixed[0])
            moved.append(patches[t] + mixed[1:])
        head, patches = head + torch.stack(heads).mean(0), torch.stack(moved)

        def mlp(states, layer=layer):
            inner = F.gelu(layer.intermediate.dense(layer.layernorm_after(states)))
            return states + layer.output.dense(inner)

        head, patches = mlp(head), mlp(patches)
        close(level[0], theirs.layernorm(head))


@torch.no_grad()
def test_timesformer_reads_pictures_as_clips_of_one_frame(timesformer):
    _, ours = timesformer
    x = clips(2, 1)
    close(ours(x[:, 0]).summaries[-1], ours(x).summaries[-1])
    assert ours.model.config.num_frames == 8
    assert {layer.attention_type for layer in ours.layers} == {"divided_space_time"}


@torch.no_grad()
def test_an_image_encoder_reads_a_video_by_the_mean_over_its_frames(tmp_path):
    folder = write_vision(tmp_path / "vit")
    vision = {"config": {"architecture": "vit_tiny_patch16_224", "model_args": VIT}}
    ours = build_encoder(vision | {"fit": "squash", "modality": "video"}, folder)
    x = clips(2, 4, 32)
    seen = ours(x)
    for i, clip in enumerate(x):
        alone = [ours(frame[None]) for frame in clip]
        close(seen.tokens[i], torch.stack([each.tokens[0] for each in alone]).mean(0))
        for number, level in enumerate(seen.summaries):
            close(level[i], torch.stack([each.summaries[number][0] for each in alone]).mean(0))


def sounds(frames: int, bins: int, batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 1, frames, bins, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def test_ast_is_transformers_with_its_first_token_after_the_final_norm(tmp_path):
    settings = {k: v for k, v in AST.items() if k != "model_type"}
    theirs = transformers.ASTForAudioClassification(transformers.ASTConfig(**settings))
    folder = write(tmp_path, theirs)
    ours = build_encoder({"config": AST, "fit": "crop", "modality": "audio"}, folder)
    x = sounds(1024, 128)
    seen, theirs = ours(x), theirs.audio_spectrogram_transformer
    expected = theirs(x[:, 0], output_hidden_states=True)
    close(seen.tokens, expected.last_hidden_state)
    assert seen.tokens.shape[1] == 1214  # 12 x 101 patches, [CLS] and the distillation token
    for level, states in zip(seen.summaries, expected.hidden_states[1:], strict=True):
        close(level, theirs.layernorm(states)[:, 0])
    close(ours(x[1:2]).summaries[0][0], seen.summaries[0][1])


@torch.no_grad()
def test_whisper_is_transformers_with_means_up_to_the_last_sound(tmp_path):
    settings = {k: v for k, v in WHISPER.items() if k != "model_type"}
    theirs = transformers.WhisperModel(transformers.WhisperConfig(**settings))
    folder = write(tmp_path, theirs)
    ours = build_encoder({"config": WHISPER, "fit": "crop", "modality": "audio"}, folder)
    x = sounds(3000, 80)
    x[0, :, 501:], x[1, :, 41:] = x.min() - 1, x.min() - 1  # silence behind
    x[2] = -1.5  # nothing but silence
    seen = ours(x)
    expected = theirs.encoder(x[:, 0].transpose(1, 2), output_hidden_states=True)
    close(seen.tokens, expected.last_hidden_state)
    states = x[:, 0].transpose(1, 2)  # layer by layer
    states = F.gelu(theirs.encoder.conv2(F.gelu(theirs.encoder.conv1(states)))).transpose(1, 2)
    states = states + theirs.encoder.embed_positions.weight
    for layer, level in zip(theirs.encoder.layers, seen.summaries, strict=True):
        states = layer(states, None)
        states = states[0] if isinstance(states, tuple) else states
        normed = theirs.encoder.layer_norm(states)
        for i, positions in enumerate((251, 21, 1500)):
            close(level[i], normed[i, :positions].mean(0))


def test_encoders_stay_frozen_and_take_only_what_they_read():
    ours = build_encoder({"config": AST, "fit": "crop", "modality": "audio"})
    assert not ours.train().model.training
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    with pytest.raises(UserError, match="reads sounds, not image"):
        build_encoder({"config": AST, "fit": "crop"})
    with pytest.raises(UserError, match="reads pictures or videos, not audio"):
        build_encoder({"config": TIMESFORMER, "fit": "crop", "modality": "audio"})
    levels = build_encoder({"config": WHISPER, "fit": "crop", "modality": "audio"}, levels=2)
    assert levels.widths == [48, 48]
    assert len(levels(levels.probe()).summaries) == 2


def test_missing_weights_are_named(tmp_path):
    save_file({"encoder.conv1.bias": torch.zeros(48)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"the weights of conv1.weight \(and maybe more\)"):
        build_encoder({"config": WHISPER, "fit": "crop", "modality": "audio"}, tmp_path)
