"""ClipCap's mappings against a plain restatement of the published ones, and the whole sequence."""

import pytest
import torch
import transformers
from test_epalm import FAMILIES, TEXTS, WIDTH, Eyes, Words, padded, peer, percept
from test_epalm import ours as epalm
from torch import nn

from tinyvl import UserError, models
from tinyvl.clipcap import ClipCap, Transformer
from tinyvl.decoder import Cache
from tinyvl.decoder_weights import build_decoder, decoder_config
from tinyvl.text import Text


def slow_mlp(mapping: nn.Module, vector: torch.Tensor, length: int) -> torch.Tensor:
    """One vector (D,) -> the prefix (length, d): two linear layers, half as wide between them."""
    first, _, second = mapping
    middle = torch.tanh(first.weight @ vector + first.bias)
    return (second.weight @ middle + second.bias).reshape(length, -1)


def slow_transformer(mapping: nn.Module, vector: torch.Tensor, length: int, heads: int):
    """One vector (D,) -> the prefix (length, d): attention by loops over heads and places."""

    def norm(x: torch.Tensor, by: nn.LayerNorm) -> torch.Tensor:
        mean, spread = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / (spread + 1e-5).sqrt() * by.weight + by.bias

    tokens = (mapping.linear.weight @ vector + mapping.linear.bias).reshape(length, -1)
    x = torch.cat((tokens, mapping.constants))  # (2 * length, d)
    width = x.shape[1]
    size = width // heads
    for layer in mapping.layers:
        normed = norm(x, layer.norm1)
        q = normed @ layer.q.weight.T
        k, v = normed @ layer.kv.weight[:width].T, normed @ layer.kv.weight[width:].T
        mixed = torch.zeros_like(x)
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            for place in range(len(x)):  # every place sees all
                scores = k[:, part] @ q[place, part] / size**0.5
                mixed[place, part] = scores.softmax(0) @ v[:, part]
        x = x + mixed @ layer.o.weight.T + layer.o.bias
        inner = norm(x, layer.norm2) @ layer.up.weight.T + layer.up.bias
        x = x + inner.clamp(min=0) @ layer.down.weight.T + layer.down.bias
    return x[length:]


OPTIONS = {
    "mlp": {},
    "transformer": {"mapping": "transformer", "layers": 2, "heads": 4},
    "short": {"mapping": "transformer", "layers": 1, "heads": 2, "length": 3},
}


def ours(theirs: transformers.PreTrainedModel, **options) -> ClipCap:
    raw = theirs.config.to_dict()
    state = {k: v.clone() for k, v in theirs.state_dict().items()}
    decoder = build_decoder(raw["model_type"], state, decoder_config(raw), torch.float32, "test")
    torch.manual_seed(1)
    text, prompt = Text(Words(), 0, 0), options.pop("prompt", "")
    model = models.with_options("clipcap", Eyes(), decoder, text, prompt, options)
    for parameter in model.mapping.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # norms and biases too
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", OPTIONS)
def test_equals_the_slow_reference_padded_and_cached(family, variant):
    """The prefix stands where words would: transformers reads prefix and text as embeddings."""
    options = OPTIONS[variant]
    theirs = peer(family)
    model, seen = ours(theirs, **options), percept(2)
    length = options.get("length", 10)
    images = [0, 0, 1, 1]
    with torch.no_grad():
        visual = model.see(seen)
        ids, mask = padded(TEXTS, left=True)
        fast = model.decoder.logits(model.run(ids, visual, mask=mask))
        for row, (image, line) in enumerate(zip(images, TEXTS, strict=True)):
            vector = seen.summaries[-1][image]
            if "mapping" in options:
                prefix = slow_transformer(model.mapping, vector, length, options["heads"])
            else:
                prefix = slow_mlp(model.mapping, vector, length)
            words = theirs.get_input_embeddings()(torch.tensor(line))
            slow = theirs(inputs_embeds=torch.cat((prefix, words))[None]).logits[0, length:]
            torch.testing.assert_close(fast[row][mask[row]], slow, rtol=0, atol=1e-4)
        cache = Cache()
        steps = [model.run(ids[:, :2], visual, cache, mask[:, :2])]
        for t in range(2, ids.shape[1]):
            steps.append(model.run(ids[:, t : t + 1], visual, cache, mask[:, t : t + 1]))
        cached = model.decoder.logits(torch.cat(steps, 1))
        torch.testing.assert_close(cached[mask], fast[mask], rtol=0, atol=1e-4)


def by_hand(vision: int, width: int, layers: int | None) -> int:
    """The published mapping's parameters for a prefix of 10."""
    if layers is None:
        middle = 5 * width
        return vision * middle + middle + middle * 10 * width + 10 * width
    attention = 3 * width * width + width * width + width  # no bias on queries, keys and values
    feed_forward = 2 * width * 2 * width + 2 * width + width
    layer = attention + feed_forward + 2 * 2 * width
    return vision * 10 * width + 10 * width + 10 * width + layers * layer


@pytest.mark.parametrize(
    ("preset", "layers", "trainable"),
    [("clipcap", None, 32_451_840), ("clipcap-transformer", 8, 43_711_488)],
)
def test_trained_parameters(preset, layers, trainable):
    assert by_hand(768, 768, layers) == trainable
    assert models.inspect(preset)["trainable_parameters"] == trainable


def test_the_papers_43_million_are_the_transformer_over_640_numbers():
    mapping = Transformer(640, 768, length=10, layers=8, heads=8)
    assert sum(p.numel() for p in mapping.parameters()) == by_hand(640, 768, 8) == 42_728_448


def test_the_prefix_is_made_once_for_a_picture_whatever_the_beams():
    model, made = ours(peer("gpt2")), []
    model.mapping.register_forward_hook(lambda module, read, out: made.append(len(out)))
    pictures = torch.randn(3, 80)
    found = model.caption(pictures, beams=4, max_tokens=6)
    assert made == [3]
    for i, (text, score) in enumerate(found):
        ((alone, own),) = model.caption(pictures[i : i + 1], beams=4, max_tokens=6)
        assert (alone, own) == (text, pytest.approx(score, abs=1e-4))


def test_what_does_not_fit_is_refused_in_a_sentence():
    theirs = peer("gpt2")
    with pytest.raises(UserError, match="--mapping is mlp or transformer"):
        ours(theirs, mapping="resampler")
    with pytest.raises(UserError, match=f"--heads 7 does not divide the decoder's width {WIDTH}"):
        ours(theirs, mapping="transformer", heads=7)
    with pytest.raises(UserError, match=r"40 positions .* behind a prefix of 38 and a prompt of 0"):
        ours(theirs, length=38)
    with pytest.raises(UserError, match="no room for text behind a prompt of 38 tokens"):
        epalm(theirs, prompt="3 " * 38)
    model = ours(theirs, length=37)  # [bos], a word, [eos]
    assert model.encode(["3 4 5"], 9) == [[3]]
    batch = model.collate([[3]], [0], torch.randn(1, 80), [0])
    assert model.loss(batch)[0].isfinite()
    assert len(model.caption(torch.randn(1, 80), beams=1)[0][0].split()) <= 2
