"""I-Tuning against its equations, written out slowly, and the properties it must have."""

from pathlib import Path

import pytest
import torch
from tiny import VIT, write_decoder, write_vision

from tinyvl import UserError, itune, models, presets, presets_table
from tinyvl.decoder import Cache
from tinyvl.encoders import Percept
from tinyvl.itune import ITune, ITuneModule

TEXTS = ["a red dog runs", "two cats sleep on the mat", "the sky is blue", "a b c d e f g"]
D = VIT["embed_dim"]


def slow_itune(module: ITuneModule, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Equations 1 to 5 for one row: x (T, d), tokens (S, D), a loop a student can read."""
    out = []
    for position in x:
        q = module.q.weight @ position + module.q.bias  # (1)
        keys = [module.k.weight @ v + module.k.bias for v in tokens]  # (2)
        values = [module.v.weight @ v + module.v.bias for v in tokens]  # (3)
        scores = torch.stack([q @ k for k in keys])
        s = scores.exp() / scores.exp().sum()  # (4): no 1/sqrt(r)
        mixed = sum(weight * value for weight, value in zip(s, values, strict=True))
        out.append(module.scale * (module.o.weight @ mixed) + module.o.bias)  # (5)
    return torch.stack(out)


def shake(model: torch.nn.Module, seed: int = 7) -> None:
    """Random values for what starts at zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if not name.startswith(("encoder.", "decoder.")):
            p.data += 0.2 * torch.randn(p.shape, generator=generator)


@pytest.fixture(params=["gpt2", "opt", "llama"], scope="module")
def model(request, tmp_path_factory) -> ITune:
    folder = tmp_path_factory.mktemp(request.param)
    config = models.new_config(
        "itune",
        str(write_decoder(folder / "lm", request.param, TEXTS)),
        str(write_vision(folder / "vision")),
        fit="crop",
        prompt="",
        options={"drop": 1, "scale": 1.5},
    )
    torch.manual_seed(0)
    built = models.build(config, device=torch.device("cpu"), precision=torch.float32)
    shake(built)
    return built.eval()


def pictures(n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randint(0, 256, (n, 3, 32, 32), generator=generator, dtype=torch.uint8)


def batch_of(model: ITune, captions: list[str], rows: list[int]):
    ids = model.text.encode(captions)
    images = max(rows) + 1
    return model.collate(ids, rows, pictures(images), list(range(images)))


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_module_equals_the_equations(scale):
    torch.manual_seed(0)
    module = ITuneModule(12, 20, 6, scale)
    shake(module)
    x, tokens = torch.randn(4, 5, 12), torch.randn(2, 7, 20)
    with torch.no_grad():
        fast = module(x, module.see(tokens))  # rows 0 and 1 are of image 0, 2 and 3 of image 1
        slow = torch.stack([slow_itune(module, x[i], tokens[i // 2]) for i in range(4)])
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-5)


def test_gradients_equal_those_of_the_equations():
    torch.manual_seed(0)
    module = ITuneModule(6, 8, 3, 2.0).double()
    shake(module)
    x, tokens = torch.randn(1, 4, 6).double(), torch.randn(1, 5, 8).double()
    module(x, module.see(tokens)).square().sum().backward()
    fast = {n: p.grad.clone() for n, p in module.named_parameters()}
    module.zero_grad()
    slow_itune(module, x[0], tokens[0]).square().sum().backward()
    for name, p in module.named_parameters():
        torch.testing.assert_close(fast[name], p.grad, rtol=1e-9, atol=1e-9)


def test_new_modules_leave_the_language_model_as_it_is(model):
    fresh = ITune(model.encoder, model.decoder, model.text)
    ids = torch.tensor([[0, 3, 4, 5]])
    with torch.no_grad():
        visual = fresh.see(Percept(torch.randn(1, 9, D), []))
        assert torch.equal(fresh.run(ids, visual), model.decoder(ids))


def test_it_looks_at_the_picture_in_every_layer_it_is_in(model):
    ids = torch.tensor([[0, 3, 4, 5]])
    tokens = torch.randn(1, 9, D, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        base = model.run(ids, model.see(Percept(tokens, [])))
        other = model.run(ids, model.see(Percept(tokens + 1, [])))
        assert (base - other).abs().max() > 1e-3
        for i in ("1", "2"):  # drop=1: none in layer 0
            visual = model.see(Percept(tokens, []))
            visual.pop(int(i))
            assert (model.run(ids, visual) - base).abs().max() > 1e-4
    assert sorted(model.itune) == ["1", "2"]


def test_the_branch_reads_the_input_of_the_feed_forward(model):
    seen = {}
    hooks = [
        model.decoder.layers[2].ffn.register_forward_hook(lambda m, a, o: seen.update(ffn=a[0])),
        model.itune["2"].register_forward_hook(lambda m, a, o: seen.update(x=a[0])),
    ]
    with torch.no_grad():
        model.run(torch.tensor([[0, 3, 4]]), model.see(Percept(torch.randn(1, 9, D), [])))
    for hook in hooks:
        hook.remove()
    assert torch.equal(seen["ffn"], seen["x"])


def test_the_last_token_moves_no_earlier_state(model):
    visual = model.see(Percept(torch.randn(1, 9, D), []))
    with torch.no_grad():
        a = model.run(torch.tensor([[0, 3, 4, 5, 6]]), visual)
        b = model.run(torch.tensor([[0, 3, 4, 5, 2]]), visual)
    assert torch.equal(a[:, :-1], b[:, :-1])
    assert not torch.equal(a[:, -1], b[:, -1])


def test_cached_equals_uncached_and_left_padding_changes_nothing(model):
    visual = model.see(Percept(torch.randn(2, 9, D), []))
    ids = torch.tensor([[0, 3, 4, 5, 6], [0, 6, 5, 4, 3]])
    with torch.no_grad():
        whole = model.run(ids, visual)
        cache = Cache()
        parts = [model.run(ids[:, i : i + 1], visual, cache) for i in range(5)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-5)
        padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), ids), 1)
        mask = torch.ones(2, 8, dtype=torch.bool)
        mask[:, :3] = False
        left = model.run(padded, visual, mask=mask)[:, 3:]
    torch.testing.assert_close(left, whole, rtol=0, atol=1e-5)


def test_the_loss_of_a_batch_is_the_mean_over_its_captions_tokens(model):
    """Grouped, padded captions against each caption alone through plain log-softmax."""
    captions = ["a red dog", "two cats sleep on the mat", "sky", "a b c d"]
    rows = [0, 0, 1, 2]
    batch = batch_of(model, captions, rows)
    with torch.no_grad():
        loss, count = model.loss(batch)
        expected, tokens = 0.0, 0
        for caption, row in zip(captions, rows, strict=True):
            ids = torch.tensor([[0, *model.text.encode([caption])[0], 0]])
            visual = model.see(model.encoder(batch.pictures[row : row + 1]))
            log = model.decoder.logits(model.run(ids[:, :-1], visual)).log_softmax(-1)
            expected -= log[0].gather(1, ids[0, 1:, None]).sum()
            tokens += ids.shape[1] - 1
    assert count == tokens
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_accumulated_gradients_do_not_depend_on_the_micro_batches(model):
    captions = ["a red dog", "two cats sleep on the mat", "sky", "a b c d"]
    whole = batch_of(model, captions, [0, 0, 1, 2])
    grads = []
    for parts in ([whole], whole.split(2), whole.split(4)):
        model.zero_grad()
        metrics = model.accumulate(parts)
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        assert metrics["captions"] == 4
    for other in grads[1:]:
        for name in grads[0]:
            torch.testing.assert_close(other[name], grads[0][name], rtol=1e-3, atol=1e-5)
    model.zero_grad()


def test_only_the_modules_train_and_lower_layers_keep_nothing(model):
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert names == {n for n, _ in model.named_parameters() if model.trainable(n)}
    assert all(n.startswith("itune.") for n in names)
    states = {}
    hooks = [
        layer.register_forward_hook(lambda m, a, o, i=i: states.update({i: o}))
        for i, layer in enumerate(model.decoder.layers)
    ]
    model.loss(batch_of(model, ["a red dog"], [0]))
    for hook in hooks:
        hook.remove()
    assert states[0].grad_fn is None  # below the first module: no graph at all
    assert states[1].grad_fn is not None


def test_image_keys_and_values_are_computed_once_per_image(model, monkeypatch):
    calls, see = [], model.see
    monkeypatch.setattr(model, "see", lambda p: calls.append(len(p.tokens)) or see(p))
    model.caption(pictures(3), beams=3, max_tokens=6)
    assert calls == [3]


def test_all_layers_keys_and_values_are_those_of_their_modules(model):
    percept = model.percept(pictures(3))
    for i, (k, v) in model.see(percept).items():
        own = model.itune[str(i)].see(percept.tokens)
        torch.testing.assert_close((k, v), own, rtol=1e-5, atol=1e-6)
        with torch.no_grad():  # laid out for decoding, keys in the precision of the scores
            for low in (torch.float32, torch.bfloat16):
                with torch.autocast("cpu", low, enabled=low != torch.float32):
                    fixed = model.see(percept)[i]
                assert [x.dtype for x in fixed] == [torch.float32, low]
                assert all(x.is_contiguous() for x in fixed)
                near = 1e-5 if low == torch.float32 else 0.05
                wide = tuple(x.float() for x in fixed)
                torch.testing.assert_close(wide, (k, v), rtol=near, atol=near)


@pytest.mark.parametrize(
    "style", [{"beams": 1}, {"beams": 3}, {"sampling": {"temperature": 1.0, "seed": 3}}]
)
def test_a_batch_is_captioned_like_its_pictures_one_by_one(model, style):

    together = model.caption(pictures(4), max_tokens=8, **style)
    first = model.caption(pictures(4)[:1], max_tokens=8, **style)
    assert together[0][0] == first[0][0]
    assert together[0][1] == pytest.approx(first[0][1], abs=1e-4)
    if "sampling" not in style:
        alone = [model.caption(p[None], max_tokens=8, **style)[0] for p in pictures(4)]
        assert [text for text, _ in together] == [text for text, _ in alone]


def test_the_score_is_the_mean_log_probability(model, monkeypatch):
    seen = []
    monkeypatch.setattr(model.text, "decode", lambda ids: seen.append(ids) or "")
    ((_, score),) = model.caption(pictures(1), beams=1, max_tokens=5)
    ids = seen[0] + [0] * (len(seen[0]) < 5)  # the end counts where it was reached
    with torch.no_grad():
        visual = model.see(model.encoder(pictures(1)))
        log = model.decoder.logits(model.run(torch.tensor([[0, *ids[:-1]]]), visual)).log_softmax(
            -1
        )
    expected = log[0].gather(1, torch.tensor(ids)[:, None]).mean().item()
    assert score == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("itune-base", 14_178_816),
        ("itune-medium", 44_101_632),
        ("itune-large", 94_487_040),
        ("itune-large-drop18", 47_243_520),
    ],
)
def test_the_papers_parameter_counts(preset, parameters):
    assert models.inspect(preset)["trainable_parameters"] == parameters


def test_lower_maps_start_as_nothing_and_are_then_read(tmp_path):
    """Tokens are t + W_up W_down b, with b the lower maps' part; W_up starts at zero."""
    names = {
        "language": str(write_decoder(tmp_path / "lm", "llama", TEXTS)),
        "vision": str(write_vision(tmp_path / "vision", "test_efficientnet", {})),
    }
    common = {"fit": "crop", "prompt": ""}
    cpu = {"device": torch.device("cpu"), "precision": torch.float32}
    options = {"rank": 6}
    config = models.new_config("itune", **names, **common, options=options, media={"lower": 2})
    assert config["vision"]["lower"] == 2
    lower = models.build(config, **cpu).eval()
    plain = models.build(models.new_config("itune", **names, **common, options={}), **cpu).eval()
    shake(plain)
    own = {n: p for n, p in plain.state_dict().items() if not n.startswith(("enc", "dec"))}
    missing, _ = lower.load_state_dict(own, strict=False)
    below, width = sum(lower.encoder.below), lower.encoder.width
    shapes = {n: list(p.shape) for n, p in lower.named_parameters() if n.startswith("lower.")}
    assert shapes == {"lower.down.weight": [6, below], "lower.up.weight": [width, 6]}
    assert {n for n in missing if not n.startswith(("enc", "dec"))} == set(shapes)

    torch.manual_seed(2)
    images = torch.randint(0, 256, (2, 3, 160, 160), dtype=torch.uint8)
    percept = lower.encoder(images)
    for i, (k, v) in plain.see(plain.encoder(images)).items():
        torch.testing.assert_close(lower.see(percept)[i][0], k)
        torch.testing.assert_close(lower.see(percept)[i][1], v)
    lower.lower.up.weight.data.normal_()
    up, down = lower.lower.up.weight, lower.lower.down.weight
    mixed = percept.tokens[:, :, :width].clone()
    for i, tokens in enumerate(percept.tokens):
        for j, token in enumerate(tokens):
            mixed[i, j] += (up @ (down @ token[width:])).detach()
    for i, (k, v) in plain.see(Percept(mixed, [])).items():
        torch.testing.assert_close(lower.see(percept)[i][0], k, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(lower.see(percept)[i][1], v, rtol=1e-4, atol=1e-4)


def test_dropping_everything_is_refused(model):
    with pytest.raises(UserError, match="--drop 3"):
        models.check_options("itune", {"drop": 3}, model.decoder.config, model.encoder)


def test_the_documentation_names_the_file_of_the_rates():
    """Of I-Tuning the rates are ours, and they stand in `presets_table.PAPER`."""
    assert presets.PRESETS["itune-base"].recipe.rate == presets_table.PAPER.rate
    assert "rates are in ``presets_table.py``" in itune.__doc__
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    assert "`presets_table.py`" in readme
    assert "`itune.py` and `models.py`" not in readme
