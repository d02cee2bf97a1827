"""The decoder against transformers, on random weights of every family."""

import json

import pytest
import torch
import transformers
from safetensors.torch import save_file

from tinyvl import UserError, decoder_head
from tinyvl import decoder as decoder_module
from tinyvl.decoder import Cache, Decoder, attend
from tinyvl.decoder_head import HeadLosses
from tinyvl.decoder_weights import build_decoder, decoder_config, load_decoder

SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
LLAMA = SMALL | {"intermediate_size": 96, "num_key_value_heads": 2}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
FAMILIES = {
    "gpt2": transformers.GPT2Config(
        vocab_size=97,
        n_embd=48,
        n_layer=3,
        n_head=4,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=1,
    ),
    "opt": transformers.OPTConfig(**SMALL, ffn_dim=96, word_embed_proj_dim=48),
    "opt-350m": transformers.OPTConfig(
        **SMALL, ffn_dim=96, word_embed_proj_dim=24, do_layer_norm_before=False
    ),
    "llama-tied": transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "llama": transformers.LlamaConfig(**LLAMA, attention_bias=True, mlp_bias=True),
    "llama-3": transformers.LlamaConfig(**LLAMA, rope_parameters=LLAMA3),
    "llama-linear": transformers.LlamaConfig(
        **LLAMA, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    ),
    "llama-head-dim": transformers.LlamaConfig(**LLAMA, head_dim=16),
    "qwen2": transformers.Qwen2Config(**LLAMA),
}


def peer(name: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[name]).eval()
    for parameter in model.parameters():  # no bias stays at zero, no scale at one
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def ours(model: transformers.PreTrainedModel) -> Decoder:
    raw = model.config.to_dict()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    return build_decoder(raw["model_type"], state, decoder_config(raw), torch.float32, "test")


@pytest.fixture(params=FAMILIES, scope="module")
def pair(request):
    model = peer(request.param)
    return model, ours(model)


def left_padded(batch: int = 3, length: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[1, :4], mask[2, :1] = False, False
    return ids, mask


def logits(decoder: Decoder, *args, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return decoder.logits(decoder(*args, **kwargs))


def test_logits_equal_transformers(pair):
    model, decoder = pair
    ids, mask = left_padded()
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        full = model(ids).logits
        padded = model(ids, attention_mask=mask.long(), position_ids=positions).logits
    torch.testing.assert_close(logits(decoder, ids), full, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(decoder, ids, mask)[mask], padded[mask], rtol=0, atol=1e-5)


def test_a_row_of_padding_alone_is_finite_and_so_are_its_gradients(pair):
    _, decoder = pair
    ids, mask = left_padded()
    mask[1] = False
    x = decoder.embed_tokens(ids).detach().requires_grad_()
    decoder.logits(decoder(x, mask)).square().mean().backward()
    assert x.grad.isfinite().all()
    cache = Cache()
    first = decoder(ids[:, :5], mask[:, :5], cache=cache)
    assert first.isfinite().all()
    assert decoder(ids[:, 5:], mask[:, 5:], cache=cache).isfinite().all()


@pytest.mark.parametrize("pad", [False, True])
def test_cached_equals_uncached(pair, pad):
    _, decoder = pair
    ids, mask = left_padded()
    mask = mask if pad else torch.ones_like(mask)
    cache, parts = Cache(), []
    for start, end in ((0, 5), (5, 6), (6, 7), (7, 11)):
        given = mask[:, start:end] if pad or start else None
        parts.append(logits(decoder, ids[:, start:end], given, cache=cache))
    expected = logits(decoder, ids, mask)
    torch.testing.assert_close(torch.cat(parts, 1)[mask], expected[mask], rtol=0, atol=1e-5)


def test_cache_rows_move_with_the_beams(pair):
    _, decoder = pair
    ids, mask = left_padded()
    rows = torch.tensor([2, 0, 0, 1])
    cache = Cache()
    logits(decoder, ids[:, :7], mask[:, :7], cache=cache)
    cache.reorder(rows)
    after = logits(decoder, ids[rows, 7:], cache=cache)
    expected = logits(decoder, ids[rows], mask[rows])[:, 7:]
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-5)


def test_right_padding_and_batches_change_nothing(pair):
    _, decoder = pair
    ids, _ = left_padded()
    short = logits(decoder, ids[:, :6])
    torch.testing.assert_close(logits(decoder, ids)[:, :6], short, rtol=0, atol=1e-5)
    alone = torch.cat([logits(decoder, row[None]) for row in ids])
    torch.testing.assert_close(logits(decoder, ids), alone, rtol=0, atol=1e-5)


def test_the_last_token_moves_no_earlier_logit(pair):
    _, decoder = pair
    ids, _ = left_padded()
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 97
    before, after = logits(decoder, ids), logits(decoder, changed)
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.equal(before[:, -1], after[:, -1])


def test_layers_in_two_parts_equal_the_whole(pair):
    _, decoder = pair
    ids, mask = left_padded()
    with torch.no_grad():
        lower = decoder(ids, mask, last=2)
        whole = decoder(lower, mask, first=2)
    torch.testing.assert_close(whole, decoder(ids, mask), rtol=0, atol=1e-6)


def test_embeddings_are_taken_like_ids(pair):
    _, decoder = pair
    ids, mask = left_padded()
    embedded = decoder.embed_tokens(ids)
    torch.testing.assert_close(logits(decoder, embedded, mask), logits(decoder, ids, mask))


def test_a_prefix_is_seen_by_all_and_sees_nothing(pair):
    """Slot tokens: against a slow reference that concatenates keys and values by hand."""
    _, decoder = pair
    ids, mask = left_padded(batch=4)
    mask[3, :2] = False
    hidden = torch.randn(2, 3, 48, generator=torch.Generator().manual_seed(2))  # two images
    with torch.no_grad():
        prefix = {1: decoder.prefix(1, hidden)}
    with_prefix = logits(decoder, ids, mask, prefix=prefix)
    assert (with_prefix - logits(decoder, ids, mask))[mask].abs().max() > 1e-4
    # the two rows of an image one by one, and in two steps with a cache
    for row, image in ((0, 0), (1, 0), (2, 1), (3, 1)):
        own = {1: tuple(t[image : image + 1] for t in prefix[1])}
        alone = logits(decoder, ids[row][mask[row]][None], prefix=own)
        torch.testing.assert_close(with_prefix[row][mask[row]], alone[0], rtol=0, atol=1e-5)
        cache = Cache()
        parts = [
            logits(decoder, piece[None], cache=cache, prefix=own)
            for piece in ids[row][mask[row]].split(4)
        ]
        torch.testing.assert_close(torch.cat(parts, 1), alone, rtol=0, atol=1e-5)
    changed = ids.clone()
    changed[:, -1] = 5
    after = logits(decoder, changed, mask, prefix=prefix)
    assert torch.equal(after[:, :-1][mask[:, :-1]], with_prefix[:, :-1][mask[:, :-1]])


def test_prefix_attention_against_softmax_by_hand():
    """One head, one layer's attention written out: softmax([q·prefix, q·text]) [v_prefix, v]."""
    decoder = ours(peer("gpt2"))
    x = torch.randn(1, 4, 48, generator=torch.Generator().manual_seed(3))
    extra = torch.randn(1, 2, 48, generator=torch.Generator().manual_seed(4))
    block = decoder.layers[0]
    seen = {}
    block.attention.o.register_forward_hook(lambda m, args, out: seen.update(mixed=args[0]))
    with torch.no_grad():
        decoder(x, prefix={0: decoder.prefix(0, extra)}, last=1)
        h = block.norm1(x + decoder.positions(torch.arange(4)))
        p = block.norm1(extra)
        a = block.attention
        for head in range(4):
            part = slice(12 * head, 12 * head + 12)
            q, k, v = a.q(h)[0, :, part], a.k(h)[0, :, part], a.v(h)[0, :, part]
            pk, pv = a.k(p)[0, :, part], a.v(p)[0, :, part]
            for t in range(4):
                scores = torch.cat((pk @ q[t], k[: t + 1] @ q[t])) / 12**0.5
                expected = scores.softmax(0) @ torch.cat((pv, v[: t + 1]))
                torch.testing.assert_close(seen["mixed"][0, t, part], expected, rtol=0, atol=1e-5)


def test_branches_add_to_the_feed_forward(pair):
    _, decoder = pair
    ids, _ = left_padded()
    inputs = {}

    def branch(x):
        inputs["x"] = x
        return torch.zeros_like(x)

    torch.testing.assert_close(logits(decoder, ids, branches={1: branch}), logits(decoder, ids))
    ffn_input = {}
    decoder.layers[1].ffn.register_forward_hook(lambda m, a, o: ffn_input.update(x=a[0], out=o))
    bias = torch.randn(48, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        shifted = decoder(ids, branches={1: lambda x: bias.expand_as(x)}, last=2)
        torch.testing.assert_close(inputs["x"], ffn_input["x"])
        # the same by a bias on the last linear layer of the feed-forward
        down = decoder.layers[1].ffn.down
        old = down.bias
        down.bias = torch.nn.Parameter(bias if old is None else old + bias)
        torch.testing.assert_close(shifted, decoder(ids, last=2), rtol=0, atol=1e-5)
        down.bias = old


def test_checkpointing_gives_the_same_gradients_and_only_where_there_are_some():
    decoder = ours(peer("llama"))
    ids, _ = left_padded()
    grads, runs, passes = [], [], [0] * 3

    def count(layer):
        return lambda module, args, out: passes.__setitem__(layer, passes[layer] + 1)

    for i, layer in enumerate(decoder.layers):
        layer.ffn.register_forward_hook(count(i))
    for on in (False, True):
        decoder.checkpointing, passes[:] = on, [0] * 3
        weight = torch.full((48,), 0.5, requires_grad=True)
        hidden = decoder(ids, branches={1: lambda x, w=weight: x * w})
        hidden.square().sum().backward()
        grads.append(weight.grad)
        runs.append(list(passes))
    torch.testing.assert_close(*grads)
    assert runs[0] == [1, 1, 1]
    assert runs[1][:2] == [1, 2]  # layer 0 carries no gradient: never recomputed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near(dtype):
    model = peer("llama")
    decoder = ours(model).to(dtype)
    ids, mask = left_padded()
    half = logits(decoder, ids, mask)
    assert half.dtype == torch.float32
    full = logits(ours(model), ids, mask)
    assert (half - full)[mask].abs().max() < 0.15 * full[mask].abs().max()


def test_it_is_frozen_and_stays_in_eval_mode():
    decoder = ours(peer("gpt2"))
    assert not any(p.requires_grad for p in decoder.parameters())
    assert not decoder.train().training


@pytest.mark.parametrize("name", ["gpt2", "opt-350m", "llama-tied", "llama", "qwen2"])
def test_folders_written_by_transformers_load(name, tmp_path):
    model = peer(name)
    model.save_pretrained(tmp_path)
    decoder = load_decoder(tmp_path)
    ids, _ = left_padded()
    with torch.no_grad():
        expected = model(ids).logits
    torch.testing.assert_close(logits(decoder, ids), expected, rtol=0, atol=1e-5)


def test_sharded_folders_and_bare_names_load(tmp_path):
    """gpt2 on the hub has no ``transformer.`` before its names, and masks among its tensors."""
    model = peer("gpt2")
    state = {
        k.removeprefix("transformer."): v.clone().contiguous()
        for k, v in model.state_dict().items()
        if k != "lm_head.weight"
    }
    state["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    names = list(state)
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    for i, part in enumerate((names[::2], names[1::2])):
        save_file({n: state[n] for n in part}, tmp_path / f"model-{i}.safetensors")
    index = {n: f"model-{i % 2}.safetensors" for i, n in enumerate(names)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    ids, _ = left_padded()
    with torch.no_grad():
        torch.testing.assert_close(
            logits(load_decoder(tmp_path), ids), model(ids).logits, rtol=0, atol=1e-5
        )


def test_missing_weights_are_named(tmp_path):
    model = peer("llama")
    model.save_pretrained(tmp_path)
    state = {k: v for k, v in model.state_dict().items() if "layers.1.mlp.up" not in k}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"layers\.1\.ffn\.up\.weight"):
        load_decoder(tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "mamba"}, "mamba"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "sliding"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn"),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2}}, "dynamic"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"final_logit_softcapping": 30.0}, "soft-capping"),
        ({"partial_rotary_factor": 0.5}, "partial rotary"),
        ({"hidden_act": "gelu_fast"}, "llama checkpoint uses the activation 'gelu_fast'"),
    ],
)
def test_what_we_do_not_do_is_refused_by_name(change, named):
    raw = FAMILIES["llama"].to_dict() | change
    with pytest.raises(UserError, match=named):
        decoder_config(raw)


def test_swish_is_silu():
    raw = FAMILIES["llama"].to_dict()
    swish, silu = (Decoder(decoder_config(raw | {"hidden_act": act})) for act in ("swish", "silu"))
    swish.load_state_dict(silu.state_dict())
    ids, _ = left_padded()
    assert torch.equal(logits(swish, ids), logits(silu, ids))


def test_published_shapes_have_the_published_sizes():
    from tinyvl.models import CONFIGS

    for name, millions in (("gpt2", 124.44), ("gpt2-medium", 354.82), ("gpt2-large", 774.03)):
        with torch.device("meta"):
            decoder = Decoder(decoder_config(CONFIGS[name]))
        assert sum(p.numel() for p in decoder.parameters()) == pytest.approx(
            millions * 1e6, rel=1e-4
        )


@pytest.mark.parametrize("chunk", [1, 97 * 4, 97 * 100])
def test_the_head_s_losses_and_their_gradients_are_torch_s(monkeypatch, chunk):
    monkeypatch.setattr(HeadLosses, "CPU_LOGITS", chunk)
    torch.manual_seed(0)
    weight, wanted = torch.randn(97, 24), torch.randint(97, (11,))
    hidden, own = (torch.randn(11, 24).mul_(3) for _ in range(2))
    shares = torch.rand(11)
    found = []
    for losses in (
        lambda h: HeadLosses.apply(h, weight, wanted),
        lambda h: torch.nn.functional.cross_entropy(h @ weight.T, wanted, reduction="none"),
    ):
        states = hidden.clone().requires_grad_()
        each = losses(states)
        (each * shares).sum().backward()
        found.append((each.detach(), states.grad))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert HeadLosses.apply(own, weight, wanted).shape == (11,)


def test_a_head_that_is_trained_has_torch_s_gradient():
    decoder = Decoder(decoder_config(FAMILIES["opt"].to_dict()))
    hidden, wanted = torch.randn(5, 48), torch.arange(5)
    decoder.losses(hidden, wanted).sum().backward()
    expected = torch.nn.functional.cross_entropy(decoder.logits(hidden), wanted, reduction="sum")
    (gradient,) = torch.autograd.grad(expected, [decoder.embed.weight])
    torch.testing.assert_close(decoder.embed.weight.grad, gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_head_in_blocks_is_one_product_in_float32(monkeypatch, dtype, rows):
    monkeypatch.setattr(decoder_head, "BLOCK", 40)
    torch.manual_seed(0)
    hidden, weight = torch.randn(rows, 24).to(dtype), torch.randn(97, 24).to(dtype)
    found = decoder_head.scores(hidden, weight)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, (hidden @ weight.T).float(), atol=1e-5, rtol=1e-2)
    kept = torch.full((rows, 97), 7.0, dtype=dtype)
    assert decoder_head.scores(hidden, weight, kept) is kept
    torch.testing.assert_close(kept.float(), found, atol=1e-5, rtol=1e-2)
    own = hidden.clone().requires_grad_()
    decoder_head.scores(own, weight).sum().backward()
    torch.testing.assert_close(own.grad, weight.sum(0).expand(rows, -1), atol=0.1, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_step_of_one_token_attends_in_float32(monkeypatch, dtype, family):
    """Under autocast too; against torch's own attention on the same numbers, in float64."""
    decoder = ours(peer(family)).to(dtype)
    seen, cache = [], Cache()
    plain = decoder_module.attend

    def spy(q, k, v, mask, causal):
        out = plain(q, k, v, mask, causal)
        wide = [x.double() for x in (q, k, v)]
        assert out.dtype == torch.float32
        expected = torch.nn.functional.scaled_dot_product_attention(*wide, mask, enable_gqa=True)
        torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=1e-5)
        seen.append(q.shape)
        return out

    ids, mask = left_padded()
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        decoder(ids[:, :-1], mask[:, :-1], cache=cache)
        monkeypatch.setattr(decoder_module, "attend", spy)
        last = decoder(ids[:, -1:], mask[:, -1:], cache=cache)[:, 0]
        monkeypatch.setattr(decoder_module, "attend", plain)
        whole = decoder(ids, mask)[:, -1]
    assert len(seen) == len(decoder.layers)
    monkeypatch.setattr(decoder_module, "MOST", 0)  # longer texts: as torch does it
    monkeypatch.setattr(decoder_module, "attend", None)
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        again = Cache()
        decoder(ids[:, :-1], mask[:, :-1], cache=again)
        torchs = decoder(ids[:, -1:], mask[:, -1:], cache=again)[:, 0]
    near = 1e-4 if dtype == torch.float32 else 0.1
    for found in (last, torchs):
        torch.testing.assert_close(found.float(), whole.float(), atol=near, rtol=near)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("how", ["causal", "mask", "all"])
def test_plain_attention_is_torch_s(groups, how):
    torch.manual_seed(0)
    q = torch.randn(2, 6, 5, 8, requires_grad=True)
    k, v = (torch.randn(2, groups, 5, 8, requires_grad=True) for _ in range(2))
    mask = torch.rand(2, 1, 5, 5) < 0.6
    mask |= torch.eye(5, dtype=torch.bool)
    mask = mask if how == "mask" else None
    mine = attend(q, k, v, mask, how == "causal")
    theirs = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, mask, is_causal=how == "causal", enable_gqa=True
    )
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    ours, expected = (torch.autograd.grad(x.pow(3).sum(), (q, k, v)) for x in (mine, theirs))
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
