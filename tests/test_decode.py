import itertools
import math
from collections import Counter

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.generation import TopKLogitsWarper, TopPLogitsWarper

from tinyvl import decode
from tinyvl.decode import Hypothesis, beam, greedy, sample, truncate

EOS, PAD, VOCABULARY, NEW = 1, 0, 40, 10


class Uncached:
    """A step without a cache: every row's whole text, read again at every step."""

    def __init__(self, model, mask=None, per_prompt=1):
        self.model, self.mask, self.per_prompt = model, mask, per_prompt
        self.sizes = []  # prompts in the batch, call by call

    @torch.no_grad()
    def __call__(self, ids, rows):
        if rows is None:
            self.ids, self.seen = ids, torch.ones_like(ids) if self.mask is None else self.mask
            self.owner = torch.arange(len(ids))
        else:
            assert rows.dtype == torch.int64
            assert rows.shape == (len(ids),)
            assert ids.shape == (len(rows), 1)
            self.ids = torch.cat((self.ids[rows], ids), 1)
            self.seen = torch.cat((self.seen[rows], torch.ones_like(ids)), 1)
            self.owner = self.owner[rows]
            assert (self.owner.bincount()[self.owner.unique()] == self.per_prompt).all()
            assert (self.owner.diff() >= 0).all()  # contiguous, in order
        self.sizes.append(len(self.owner.unique()))
        position = (self.seen.cumsum(1) - 1).clamp(min=0)
        out = self.model(
            input_ids=self.ids, attention_mask=self.seen, position_ids=position, use_cache=False
        )
        return out.logits[:, -1]


class Table:
    """Random logits for every possible text: a model in which all is known."""

    def __init__(self, vocabulary, seed, scale=1.5, favoured=()):
        self.vocabulary, self.seed, self.scale, self.rows = vocabulary, seed, scale, []
        self.bias = torch.zeros(vocabulary)
        self.bias[list(favoured)] = 4.0

    def logits(self, text):
        code = self.seed
        for token in text:
            code = code * 31 + token + 1
        generator = torch.Generator().manual_seed(code)
        return torch.randn(self.vocabulary, generator=generator) * self.scale + self.bias

    def __call__(self, ids, rows):
        old = self.rows if rows is None else [self.rows[row] for row in rows.tolist()]
        new = ids.tolist()
        self.rows = new if rows is None else [a + b for a, b in zip(old, new, strict=True)]
        return torch.stack([self.logits(row) for row in self.rows])


def _model(family):
    torch.manual_seed(3)
    if family == "gpt2":
        config = GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=64,
            initializer_range=0.3, bos_token_id=2, eos_token_id=EOS, pad_token_id=PAD,
        )  # fmt: skip
        model = GPT2LMHeadModel(config)
    else:
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
            initializer_range=0.3, bos_token_id=2, eos_token_id=EOS, pad_token_id=PAD,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
    head = nn.Linear(32, VOCABULARY)
    with torch.no_grad():
        head.weight.normal_(std=0.7)
        head.bias.zero_()
        head.bias[EOS] = 6.0  # so that texts end, and at different steps
    model.lm_head = head
    return model.eval()


@pytest.fixture(scope="module")
def models():
    return {family: _model(family) for family in ("gpt2", "llama")}


@pytest.fixture(scope="module")
def prompts():
    """Eight prompts of 1 to 5 tokens, left padded: (ids, mask)."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (8, 5), generator=generator)
    mask = (torch.arange(5) >= torch.tensor([0, 4, 2, 1, 3, 0, 2, 4])[:, None]).long()
    return ids * mask, mask


def reference(model, ids, mask, eos=EOS, new=NEW, **options):
    """transformers' generate: per prompt, (tokens, finished, score or None) of each sequence."""
    out = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=new, eos_token_id=eos,
        pad_token_id=PAD, return_dict_in_generate=True, output_scores=True, **options,
    )  # fmt: skip
    stops = {eos} if isinstance(eos, int) else set(eos)
    texts = []
    for row in out.sequences[:, ids.shape[1] :].tolist():
        end = next((i for i, token in enumerate(row) if token in stops), None)
        texts.append((row[:end], end is not None))
    scores = getattr(out, "sequences_scores", None)
    scores = [None] * len(texts) if scores is None else scores.tolist()
    per_prompt = len(texts) // len(ids)
    flat = [(*text, score) for text, score in zip(texts, scores, strict=True)]
    return [flat[i : i + per_prompt] for i in range(0, len(flat), per_prompt)]


def assert_same(ours, theirs, length_penalty=1.0):
    assert len(ours) == len(theirs)
    for hypotheses, expected in zip(ours, theirs, strict=True):
        assert [(h.tokens, h.finished) for h in hypotheses] == [e[:2] for e in expected]
        for h, (_, _, score) in zip(hypotheses, expected, strict=True):
            length = len(h.tokens) + h.finished
            assert h.logprob == pytest.approx(h.score * length**length_penalty, abs=1e-4)
            assert h.mean_logprob == pytest.approx(h.logprob / length)
            if score is not None:
                assert h.score == pytest.approx(score, abs=1e-4)


def total_logprob(model, ids, mask, h):
    """The log-probability of a hypothesis, from one pass over prompt and text."""
    text = torch.tensor([h.tokens + [EOS] * h.finished])
    step = Uncached(model, mask)
    logits = [step(ids, None)]
    for token in text[0, :-1]:
        logits.append(step(token.view(1, 1), torch.tensor([0])))
    return torch.stack(logits, 1).log_softmax(-1).gather(-1, text[..., None]).sum().item()


# --- beam search -------------------------------------------------------------------------------


STOPPING = (True, False, "never")
GRID = [
    *itertools.product(["gpt2"], [3, 5], [8], [-1.0, 0.0, 0.6, 1.0, 2.0], STOPPING),
    *itertools.product(["llama"], [5], [8], [0.6, 2.0], STOPPING),
    *itertools.product(["gpt2", "llama"], [3, 5], [1], [0.0, 1.0], [True, False]),
]


@pytest.mark.parametrize(("family", "beams", "batch", "length_penalty", "early_stopping"), GRID)
def test_beam_equals_transformers(
    models, prompts, family, beams, batch, length_penalty, early_stopping
):
    model, (ids, mask) = models[family], (x[-batch:] for x in prompts)
    options = {"length_penalty": length_penalty, "early_stopping": early_stopping}
    theirs = reference(model, ids, mask, num_beams=beams, num_return_sequences=beams, **options)
    for returned in {1, beams} if batch == 1 else {beams}:
        step = Uncached(model, mask, beams)
        ours = beam(
            step, ids, beams=beams, returned=returned, eos=EOS, max_new_tokens=NEW, **options
        )
        assert_same(ours, [expected[:returned] for expected in theirs], length_penalty)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_models_tell_the_options_apart(models, prompts, family):
    """Without this the comparison above would show little."""
    model, (ids, mask) = models[family], prompts

    def texts(step, length_penalty, early_stopping):
        return beam(
            step, ids, beams=5, returned=5, eos=EOS, max_new_tokens=NEW,
            length_penalty=length_penalty, early_stopping=early_stopping,
        )  # fmt: skip

    step = Uncached(model, mask, 5)
    found = [h for hypotheses in texts(step, 1.0, False) for h in hypotheses]
    assert len({len(h.tokens) + h.finished for h in found}) >= 6
    assert {h.finished for h in found} == {True, False}
    assert len(set(step.sizes)) >= 4, step.sizes  # prompts leave one by one
    assert step.sizes == sorted(step.sizes, reverse=True)
    choices = itertools.product((0.0, 1.0, 2.0), STOPPING)
    different = {str(texts(Uncached(model, mask, 5), *choice)) for choice in choices}
    assert len(different) >= 7


@pytest.mark.parametrize("early_stopping", STOPPING)
def test_one_beam_is_greedy(models, prompts, early_stopping):
    ids, mask = prompts
    model = models["gpt2"]
    options = {"eos": EOS, "max_new_tokens": NEW}
    expected = greedy(Uncached(model, mask), ids, **options)
    assert_same([[h] for h in expected], reference(model, ids, mask, num_beams=1))
    found = beam(Uncached(model, mask), ids, beams=1, early_stopping=early_stopping, **options)
    for [h], e in zip(found, expected, strict=True):
        assert (h.tokens, h.finished) == (e.tokens, e.finished)
        assert h.score == pytest.approx(e.score, abs=1e-5)


@pytest.mark.parametrize("new", [1, 2])
def test_beam_at_the_length_limit(models, prompts, new):
    ids, mask = prompts
    model = models["llama"]
    theirs = reference(model, ids, mask, new=new, num_beams=4, num_return_sequences=3)
    step = Uncached(model, mask, 4)
    assert_same(beam(step, ids, beams=4, returned=3, eos=EOS, max_new_tokens=new), theirs)
    assert len(step.sizes) == new


def test_beam_with_several_end_tokens(models, prompts):
    ids, mask = prompts
    model, eos = models["gpt2"], [EOS, 7, 11]
    theirs = reference(model, ids, mask, eos=eos, num_beams=3, num_return_sequences=3)
    step = Uncached(model, mask, 3)
    ours = beam(step, ids, beams=3, returned=3, eos=eos, max_new_tokens=NEW)
    assert_same(ours, theirs)
    assert not {t for hs in ours for h in hs for t in h.tokens} & set(eos)


def test_beam_logprob_is_the_models(models, prompts):
    ids, mask = prompts
    step = Uncached(models["llama"], mask, 3)
    found = beam(step, ids, beams=3, eos=EOS, max_new_tokens=NEW, length_penalty=0.6)
    for i, [h] in enumerate(found):
        expected = total_logprob(models["llama"], ids[i : i + 1], mask[i : i + 1], h)
        assert h.logprob == pytest.approx(expected, abs=1e-4)


def every_text(table, prompt, eos, length):
    """Slow and obvious: all texts that end, or are `length` long, with their log-probability."""
    texts = {}
    for full in itertools.product(range(table.vocabulary), repeat=length):
        text = full[: full.index(eos) + 1] if eos in full else full
        if text not in texts:
            texts[text] = sum(
                table.logits([*prompt, *text[:i]]).log_softmax(-1)[token].item()
                for i, token in enumerate(text)
            )
    return texts


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.0])
@pytest.mark.parametrize("early_stopping", STOPPING)
def test_wide_beam_finds_every_text(length_penalty, early_stopping):
    eos, length = 3, 4
    prompt = torch.tensor([[0, 1], [2, 2], [1, 0]])
    found = beam(
        Table(4, seed=5), prompt, beams=128, returned=128, eos=eos, max_new_tokens=length,
        length_penalty=length_penalty, early_stopping=early_stopping,
    )  # fmt: skip
    for start, hypotheses in zip(prompt.tolist(), found, strict=True):
        texts = every_text(Table(4, seed=5), start, eos, length)
        assert len(texts) == 121  # 1 + 3 + 9 + 27 that end, 81 that do not
        score = {text: logprob / len(text) ** length_penalty for text, logprob in texts.items()}
        got = {(*h.tokens, *[eos] * h.finished): h.score for h in hypotheses}
        assert len(got) == len(hypotheses)
        assert got == pytest.approx(score, abs=1e-4)
        assert [h.score for h in hypotheses] == sorted(got.values(), reverse=True)


def slow_beam(table, prompt, beams, eos, length, penalty):
    """Beam search to the last step, a list at a time: [(text with its end, score)], best first."""

    def ends(text):
        return text[-1] in eos or len(text) == length

    running, done = [((), 0.0)], []
    for _ in range(length):
        options = [
            ((*text, token), total + logprob)
            for text, total in running
            for token, logprob in enumerate(table.logits([*prompt, *text]).log_softmax(-1).tolist())
        ]
        options.sort(key=lambda option: -option[1])
        done += [(x, total / len(x) ** penalty) for x, total in options[:beams] if ends(x)]
        running = [option for option in options if not ends(option[0])][:beams]
    return sorted(done, key=lambda option: -option[1])[:beams]


@pytest.mark.parametrize("length_penalty", [-1.0, -0.5, 0.0, 1.0])
@pytest.mark.parametrize("eos", [[7], [1, 4, 7]])
def test_never_stopping_early_loses_nothing(eos, length_penalty):
    """Peaked distributions in which texts often want to end: the hard case for both."""
    prompt = torch.arange(8)[:, None]
    for seed, beams in itertools.product(range(4), (2, 3)):
        table = Table(8, seed, scale=3.0, favoured=eos)
        found = beam(
            table, prompt, beams=beams, returned=beams, eos=eos, max_new_tokens=5,
            length_penalty=length_penalty, early_stopping="never",
        )  # fmt: skip
        for start, hypotheses in zip(prompt.tolist(), found, strict=True):
            expected = slow_beam(table, start, beams, eos, 5, length_penalty)
            got = [(*h.tokens,) for h in hypotheses]
            assert got == [x[:-1] if x[-1] in eos else x for x, _ in expected]
            scores = [score for _, score in expected]
            assert [h.score for h in hypotheses] == pytest.approx(scores, abs=1e-4)


# --- greedy ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_greedy_equals_transformers(models, prompts, family):
    model, (ids, mask) = models[family], prompts
    step = Uncached(model, mask)
    ours = greedy(step, ids, eos=EOS, max_new_tokens=NEW)
    assert_same([[h] for h in ours], reference(model, ids, mask))
    assert len(set(step.sizes)) > 1  # finished prompts left
    for i, h in enumerate(ours):
        expected = total_logprob(model, ids[i : i + 1], mask[i : i + 1], h)
        assert h.logprob == pytest.approx(expected, abs=1e-4)
        assert h.score == pytest.approx(h.mean_logprob)


def test_mean_logprob_counts_the_end():
    assert Hypothesis([5, 6], -1.0, -3.0, True).mean_logprob == -1.0
    assert Hypothesis([5, 6], -1.5, -3.0, False).mean_logprob == -1.5
    assert Hypothesis([], -3.0, -3.0, True).mean_logprob == -3.0


# --- sampling ----------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [0, 1, 5, 100])
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 1.0])
def test_truncate_equals_transformers(top_k, top_p):
    torch.manual_seed(0)
    logits = torch.randn(16, 50) * 3
    expected = TopKLogitsWarper(top_k)(None, logits) if top_k else logits
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    weight, order = truncate(logits, top_k, top_p)
    assert (weight.diff() <= 0).all()
    probability = torch.zeros_like(weight).scatter(-1, order, weight / weight.sum(-1, True))
    torch.testing.assert_close(probability, expected.softmax(-1))
    assert ((probability > 0) == expected.isfinite()).all()


def test_truncate_keeps_ties_with_the_kth():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]])
    weight, order = truncate(logits, 2, 1.0)
    assert order[weight > 0].tolist() == [1, 2, 3]
    assert TopKLogitsWarper(2)(None, logits).isfinite().sum() == 3


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5}, {"temperature": 2.0, "top_k": 4}, {"top_p": 0.8}]
)
def test_sampled_frequencies(options):
    """Chi-square of 5,000 first tokens, and of the second tokens given the first."""
    logits = torch.tensor([0.5, -1.0, 1.5, 0.0, -2.0, 1.0])
    n = 5_000
    found = sample(
        lambda ids, rows: logits.expand(len(ids), -1), torch.zeros(n, 1, dtype=torch.long),
        eos=(), max_new_tokens=2, seed=11, **options,
    )  # fmt: skip
    weight, order = truncate(
        logits[None] / options.get("temperature", 1), options.get("top_k", 0),
        options.get("top_p", 1.0),
    )  # fmt: skip
    expected = dict(zip(order[0].tolist(), (weight / weight.sum())[0].tolist(), strict=True))

    def chi_square(tokens):
        counts = Counter(tokens)
        assert all(expected[token] > 0 for token in counts)
        return sum(
            (counts[t] - len(tokens) * p) ** 2 / (len(tokens) * p)
            for t, p in expected.items()
            if p > 0
        )

    bound = 25.7  # 5 degrees of freedom: exceeded once in 10,000
    assert chi_square([h.tokens[0] for h in found]) < bound
    for first in {h.tokens[0] for h in found}:
        assert chi_square([h.tokens[1] for h in found if h.tokens[0] == first]) < bound


def test_sample_is_a_function_of_the_seed(models, prompts):
    ids, mask = prompts
    model = models["gpt2"]

    def texts(seed):
        step = Uncached(model, mask)
        return [h.tokens for h in sample(step, ids, eos=EOS, max_new_tokens=NEW, seed=seed)]

    state = torch.get_rng_state()
    assert texts(0) == texts(0)
    assert texts(0) != texts(1)
    assert torch.equal(state, torch.get_rng_state())


def test_equal_prompts_draw_different_texts(models):
    ids = torch.full((6, 2), 5)
    found = sample(Uncached(models["gpt2"]), ids, eos=EOS, max_new_tokens=NEW, seed=0)
    assert len({tuple(h.tokens) for h in found}) > 3


def test_sample_logprob_is_the_models(models, prompts):
    """... whatever the temperature and the cuts it was drawn with."""
    ids, mask = prompts
    model = models["llama"]
    found = sample(
        Uncached(model, mask), ids, eos=EOS, max_new_tokens=NEW, seed=2, temperature=1.5, top_k=9,
        top_p=0.9,
    )  # fmt: skip
    for i, h in enumerate(found):
        expected = total_logprob(model, ids[i : i + 1], mask[i : i + 1], h)
        assert h.logprob == pytest.approx(expected, abs=1e-4)
        assert EOS not in h.tokens
        assert len(h.tokens) + h.finished <= NEW


def test_cold_or_single_choice_sampling_is_greedy(models, prompts):
    ids, mask = prompts
    model = models["gpt2"]
    options = {"eos": EOS, "max_new_tokens": NEW}
    expected = [h.tokens for h in greedy(Uncached(model, mask), ids, **options)]
    for cut in ({"temperature": 1e-4}, {"top_k": 1}, {"top_p": 1e-6}):
        found = sample(Uncached(model, mask), ids, seed=4, **cut, **options)
        assert [h.tokens for h in found] == expected


def test_the_highest_random_number_draws_no_cut_token(monkeypatch):
    """0.99999999 is 1.0 in float32."""
    monkeypatch.setattr("tinyvl.decode.random.Random.random", lambda self: 0.99999999)
    logits = torch.linspace(0, 3, 1000)[None]
    [h] = sample(
        lambda ids, rows: logits, torch.zeros(1, 1, dtype=torch.long), eos=(), max_new_tokens=1,
        seed=0, top_k=10, forbid=[995],
    )  # fmt: skip
    assert h.tokens == [989]  # the least likely of the ten that are left


# --- all three ---------------------------------------------------------------------------------


def test_a_batch_equals_its_items(models, prompts):
    ids, mask = prompts
    model = models["gpt2"]
    options = {"eos": EOS, "max_new_tokens": NEW, "forbid": [PAD]}

    def run(method, rows):
        step, part = Uncached(model, mask[rows], 3 if method == "beam" else 1), ids[rows]
        if method == "beam":
            return beam(step, part, beams=3, returned=2, **options)
        if method == "greedy":
            return [[h] for h in greedy(step, part, **options)]
        found = sample(step, part, seed=9, indices=rows, top_p=0.95, **options)
        return [[h] for h in found]

    for method in ("greedy", "beam", "sample"):
        whole = run(method, list(range(8)))
        for parts in ([[i] for i in range(8)], [[6, 1, 3], [0, 2], [7, 5, 4]]):
            for rows in parts:
                for i, hypotheses in zip(rows, run(method, rows), strict=True):
                    assert [h.tokens for h in hypotheses] == [h.tokens for h in whole[i]]
                    for a, b in zip(hypotheses, whole[i], strict=True):
                        assert a.score == pytest.approx(b.score, abs=1e-5)


def test_forbidden_tokens(models, prompts):
    ids, mask = prompts
    model = models["gpt2"]
    options = {"eos": EOS, "max_new_tokens": NEW}
    forbid = sorted({t for h in greedy(Uncached(model, mask), ids, **options) for t in h.tokens})
    assert forbid
    options["forbid"] = forbid
    theirs = reference(model, ids, mask, suppress_tokens=forbid)
    assert_same([[h] for h in greedy(Uncached(model, mask), ids, **options)], theirs)
    theirs = reference(
        model, ids, mask, suppress_tokens=forbid, num_beams=3, renormalize_logits=True
    )
    assert_same(beam(Uncached(model, mask, 3), ids, beams=3, **options), theirs)
    for h in sample(Uncached(model, mask), ids, seed=0, **options):
        assert not set(h.tokens) & set(forbid)
    for h in greedy(Uncached(model, mask), ids, eos=EOS, max_new_tokens=NEW, forbid=[EOS]):
        assert (len(h.tokens), h.finished) == (NEW, False)


def test_half_precision_logits_and_the_steps_own_tensor_is_left_alone():
    logits = torch.randn(1, 9, dtype=torch.float32)
    before, both = logits.clone(), logits.repeat(2, 1)
    prompt = torch.zeros(1, 1, dtype=torch.long)
    for forbid in ([], [0]):
        common = {"eos": 8, "max_new_tokens": 3, "forbid": forbid}
        greedy(lambda ids, rows: logits, prompt, **common)
        sample(lambda ids, rows: logits, prompt, seed=1, top_k=3, top_p=0.8, **common)
        beam(lambda ids, rows: logits if rows is None else both, prompt, beams=2, **common)
        assert torch.equal(logits, before)
        assert torch.equal(both, before.repeat(2, 1))
    [h] = greedy(lambda ids, rows: logits, prompt, eos=8, max_new_tokens=2, forbid=[0])
    [half] = greedy(lambda ids, rows: logits.half(), prompt, eos=8, max_new_tokens=2, forbid=[0])
    assert half.logprob == pytest.approx(h.logprob, abs=1e-2)
    assert not math.isinf(half.logprob)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (greedy, {"max_new_tokens": 0}, "max_new_tokens"),
        (beam, {"beams": 0}, "returned"),
        (beam, {"beams": 2, "returned": 3}, "returned"),
        (beam, {"beams": 2, "early_stopping": "always"}, "early_stopping"),
        (sample, {"seed": 0, "temperature": 0.0}, "temperature"),
        (sample, {"seed": 0, "top_p": 0.0}, "top_p"),
        (sample, {"seed": 0, "top_p": 1.1}, "top_p"),
        (sample, {"seed": 0, "top_k": -1}, "top_k"),
        (sample, {"seed": 0, "indices": [1, 2]}, "indices"),
    ],
)
def test_options_out_of_range(method, options, message):
    options = {"eos": EOS, "max_new_tokens": 3} | options
    with pytest.raises(ValueError, match=message):
        method(None, torch.zeros(1, 1, dtype=torch.long), **options)


@pytest.mark.parametrize("size", [1, 63, 64, 65, 640, 1000])
@pytest.mark.parametrize("k", [1, 6, 10])
def test_the_largest_of_a_row_are_in_the_blocks_with_the_largest_maxima(size, k):
    torch.manual_seed(size)
    for x in (torch.randn(5, size), torch.randn(5, size).sort().values, -torch.ones(5, size)):
        x[:, ::3] = -math.inf
        k = min(k, size)
        found, index = decode._top(x, k)
        assert torch.equal(found, x.topk(k).values)
        assert torch.equal(x.gather(1, index), found)
        assert all(len(set(row)) == k for row in index.tolist())


def test_beams_do_not_depend_on_the_blocks(monkeypatch):
    torch.manual_seed(0)
    table = torch.randn(VOCABULARY, VOCABULARY)
    prompt = torch.tensor([[3], [7]])
    run = lambda: beam(  # noqa: E731
        lambda ids, rows: table[ids[:, -1]], prompt, beams=3, eos=EOS, max_new_tokens=6, returned=3
    )
    whole = run()
    monkeypatch.setattr(decode, "BLOCK", 4)
    for plain, blocks in zip(whole, run(), strict=True):
        assert blocks == plain


@pytest.mark.parametrize("size", [3, 40, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_continuations_are_the_best_of_all_probabilities(size, dtype):
    torch.manual_seed(size)
    logits = (3 * torch.randn(4 * 5, size)).to(dtype)
    logits[:, 1] = -math.inf
    running = -torch.rand(4, 5)
    running[2, 3:] = -math.inf
    score, parent, token = decode._extended(running, logits, 10)
    every = (running.flatten()[:, None] + logits.double().log_softmax(-1)).view(4, -1)
    expected = every.topk(min(10, every.shape[1])).values
    torch.testing.assert_close(score.double()[:, : expected.shape[1]], expected, atol=1e-5, rtol=0)
    own = every.gather(1, parent * size + token)
    assert parent.max() < 5
    assert token.max() < size
    finite = score > -math.inf
    torch.testing.assert_close(own[finite], score.double()[finite], atol=1e-5, rtol=0)
