"""eP-ALM against a slow reference over transformers' own layers, and what must hold of it."""

import pytest
import torch
import transformers
from torch import nn

from tinyvl import UserError, decode, models, presets
from tinyvl.decoder import Cache
from tinyvl.decoder_weights import build_decoder, decoder_config
from tinyvl.encoders import Percept
from tinyvl.epalm import Adapter, EPalm, level_in
from tinyvl.text import Text

LAYERS, WIDTH = 5, 48
SMALL = {
    "vocab_size": 60, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "max_position_embeddings": 40, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
OPT = transformers.OPTConfig
FAMILIES = {
    "gpt2": transformers.GPT2Config(
        vocab_size=60, n_embd=WIDTH, n_layer=LAYERS, n_head=4, n_positions=40,
        bos_token_id=0, eos_token_id=0,
    ),
    "opt": OPT(**SMALL, ffn_dim=96, word_embed_proj_dim=WIDTH),
    "opt-350m": OPT(**SMALL, ffn_dim=96, word_embed_proj_dim=24, do_layer_norm_before=False),
    "llama": transformers.LlamaConfig(**SMALL, intermediate_size=96, num_key_value_heads=2),
}  # fmt: skip
WIDTHS = [20, 20, 20, 20]  # of the encoder's levels
VARIANTS = {
    "full": {},
    "pt": {"shared": True},
    "lin": {"shared": True, "soft": 0},
    "ada": {"soft": 0, "adapters": 8},
    "pt-l": {"shared": True, "mlp": False},
    "adapters and prompt": {"adapters": 4, "soft": 3},
    "deep": {"deep": True, "soft": 3},
    "the authors' range": {"inject": [2, 4], "soft": 3},
    "one layer in the middle": {"inject": [1, 2], "extract": [3, 4], "soft": 3},
    "all layers": {"inject": [0, 5], "extract": [1, 4]},
    "one level in two layers": {"extract": [3, 4], "inject": [3, 5]},
    "promptfuse": {"inject": [0, 1]},
    "limber": {"inject": [0, 1], "soft": 0},
    "magma": {"inject": [0, 1], "soft": 0, "adapters": 8},
    "magma-all": {"inject": [0, 1], "soft": 0, "adapters": 8, "tokens": "all"},
    "all tokens late, deep": {"inject": [3, 4], "deep": True, "soft": 2, "tokens": "all"},
}


class Eyes(nn.Module):
    """What eP-ALM asks of an encoder."""

    def __init__(self, widths=WIDTHS):
        super().__init__()
        self.widths, self.width, self.learns = widths, 20, False
        self.model = nn.Linear(1, 1)


class Words:
    """A tokenizer of numbers: "3 4" -> [3, 4]."""

    def __init__(self, size: int = 60):
        self.size = size

    def encode_batch(self, texts, add_special_tokens):
        ids = [[int(word) if word.isdigit() else 59 for word in t.split()] for t in texts]
        return [type("Encoding", (), {"ids": line}) for line in ids]

    def get_added_tokens_decoder(self) -> dict:
        return {}

    def get_vocab_size(self) -> int:
        return self.size

    def decode(self, ids, skip_special_tokens=True) -> str:
        return " ".join(map(str, ids))


def peer(family: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = FAMILIES[family]
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def ours(theirs: transformers.PreTrainedModel, words: int = 60, **options) -> EPalm:
    raw = theirs.config.to_dict()
    state = {k: v.clone() for k, v in theirs.state_dict().items()}
    decoder = build_decoder(raw["model_type"], state, decoder_config(raw), torch.float32, "test")
    torch.manual_seed(1)
    text, prompt = Text(Words(words), 0, 0), options.pop("prompt", "")
    model = models.with_options("epalm", Eyes(), decoder, text, prompt, options)
    for name, parameter in model.named_parameters():
        if model.trainable(name) and name.startswith("adapters"):
            parameter.data = 0.3 * torch.randn_like(parameter)  # not next to nothing
    return model.eval()


def percept(images: int, seed: int = 3) -> Percept:
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randn(images, 6, 20, generator=draw)
    return Percept(tokens, [torch.randn(images, width, generator=draw) for width in WIDTHS])


def slow_epalm(theirs, model: EPalm, seen: Percept, image: int, ids: list[int]) -> torch.Tensor:
    """Logits (T, V) of one text: one sequence, slot, prompt and text, layer by layer."""
    kind = theirs.config.model_type
    body = theirs.transformer if kind == "gpt2" else theirs.model
    body = body.decoder if kind == "opt" else body
    layers = body.h if kind == "gpt2" else body.layers
    widen = getattr(body, "project_in", None) or (lambda x: x)
    ids = torch.tensor(ids)
    place = torch.arange(len(ids))
    if kind == "gpt2":
        text = body.wte(ids) + body.wpe(place)
    elif kind == "opt":
        text = widen(body.embed_tokens(ids)) + body.embed_positions.weight[place + 2]
    else:
        text = body.embed_tokens(ids)
    if model.reads == "tokens":
        levels = [seen.tokens[image]]
    else:
        levels = [seen.summaries[level][image, None] for level in model.extract]
    shared = len(model.connector) == 1
    levels = [model.connector[0 if shared else i](level) for i, level in enumerate(levels)]
    start, end = model.inject.start, model.inject.stop
    slot, slot_rows = text[:0], len(levels[0])
    prompt = widen(model.soft()) if model.soft else text[:0]
    if model.deep:
        deep = model.deep().reshape(LAYERS, -1, WIDTH)
        prompt = deep[0]

    for number, layer in enumerate(layers):
        if start <= number < end:  # the slot is written anew
            slot = levels[(number - start) * len(levels) // (end - start)]
        if model.deep:
            prompt = deep[number]
        hidden = torch.cat((slot, prompt, text))
        rows = len(hidden)
        mask = torch.full((rows, rows), -1e9)
        for i in range(rows):
            for j in range(i + 1):  # slot before prompt before text: nothing sees what is behind
                mask[i, j] = 0.0
        options = {"attention_mask": mask[None, None]}
        if kind == "llama":  # slot and prompt are not turned, the text counts from 0
            positions = torch.cat((torch.zeros(rows - len(text)).long(), place))
            options["position_embeddings"] = body.rotary_emb(hidden[None], positions[None])
        with inserted(kind, layer, model.pairs.get(number)):
            hidden = layer(hidden[None], **options)
        hidden = (hidden[0] if isinstance(hidden, tuple) else hidden)[0]
        before = len(slot)
        slot, text = hidden[:before], hidden[before + len(prompt) :]
        prompt = hidden[before : before + len(prompt)]
        assert before in (0, slot_rows)
    norm = {"gpt2": "ln_f", "opt": "final_layer_norm", "llama": "norm"}[kind]
    if getattr(body, norm, None) is not None:
        text = getattr(body, norm)(text)
    if getattr(body, "project_out", None) is not None:
        text = body.project_out(text)
    return theirs.lm_head(text)


class inserted:
    """Adapters behind a layer's two last projections, as the authors insert them."""

    def __init__(self, kind: str, layer: nn.Module, pair):
        self.places, self.pair = [], pair or ()
        names = {
            "gpt2": ("attn.c_proj", "mlp.c_proj"), "opt": ("self_attn.out_proj", "fc2"),
            "llama": ("self_attn.o_proj", "mlp.down_proj"),
        }[kind]  # fmt: skip
        for name in names:
            *path, last = name.split(".")
            owner = layer.get_submodule(".".join(path))
            self.places.append((owner, last, getattr(owner, last)))

    def __enter__(self):
        for (owner, name, module), adapter in zip(self.places, self.pair, strict=False):
            setattr(owner, name, nn.Sequential(module, adapter))

    def __exit__(self, *error):
        for owner, name, module in self.places:
            setattr(owner, name, module)


TEXTS = [[0, 5, 6, 7, 8, 9], [0, 11, 12], [0, 3, 4, 3, 9], [0, 33]]
IMAGES = [0, 0, 1, 1]  # two texts each


def padded(lines: list[list[int]], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, lines))
    ids, real = torch.zeros(len(lines), width, dtype=torch.long), torch.zeros(len(lines), width)
    for i, line in enumerate(lines):
        place = slice(width - len(line), width) if left else slice(len(line))
        ids[i, place], real[i, place] = torch.tensor(line), 1
    return ids, real.bool()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_slow_reference_padded_and_cached(family, variant):
    theirs = peer(family)
    model = ours(theirs, **VARIANTS[variant])
    seen = percept(2)
    with torch.no_grad():
        visual = model.see(seen)
        per_text = model.pick(visual, torch.tensor(IMAGES))
        for left in (True, False):
            ids, mask = padded(TEXTS, left)
            for rows in (visual, per_text):  # a row an image serves its texts, or a row a text
                logits = model.decoder.logits(model.run(ids, rows, mask=mask))
                for i, line in enumerate(TEXTS):
                    slow = slow_epalm(theirs, model, seen, IMAGES[i], line)
                    torch.testing.assert_close(logits[i][mask[i]], slow, rtol=0, atol=1e-4)
        ids, mask = padded(TEXTS, True)
        whole = model.decoder.logits(model.run(ids, visual, mask=mask))
        cache = Cache()
        steps = [model.run(ids[:, :2], visual, cache, mask[:, :2])]
        for t in range(2, ids.shape[1]):
            steps.append(model.run(ids[:, t : t + 1], visual, cache, mask[:, t : t + 1]))
        cached = model.decoder.logits(torch.cat(steps, 1))
        torch.testing.assert_close(cached[mask], whole[mask], rtol=0, atol=1e-4)
        alone = model.see(Percept(seen.tokens[1:], [level[1:] for level in seen.summaries]))
        logits = model.decoder.logits(model.run(torch.tensor(TEXTS[2:3]), alone))
        torch.testing.assert_close(logits[0], whole[2][mask[2]], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_future_and_padding_are_never_seen_whatever_the_range(family):
    theirs = peer(family)
    base, real = padded(TEXTS, True)
    changed = base.clone()
    changed[:, -1] = 50
    odd = torch.where(real, base, 40)  # other ids where there is padding
    for start in range(LAYERS):
        for end in range(start + 1, LAYERS + 1):
            model = ours(theirs, inject=[start, end], extract=[3, 4], soft=2, mlp=False)
            with torch.no_grad():
                visual = model.see(percept(2))
                a, b, c = (model.run(x, visual, mask=real) for x in (base, changed, odd))
            assert torch.equal(a[:, :-1][real[:, :-1]], b[:, :-1][real[:, :-1]])
            assert not torch.equal(a[:, -1], b[:, -1])
            assert torch.equal(a[real], c[real])


def test_the_slot_is_seen_from_its_first_layer_on_and_each_level_in_its_share():
    model = ours(peer("opt"), inject=[1, 5], extract=[2, 4], soft=0)
    ids = torch.tensor([[0, 4, 5]])
    with torch.no_grad():
        seen = percept(1)
        prefix = model.slot(seen)
        assert sorted(prefix) == [1, 2, 3, 4]
        base = model.run(ids, prefix)
        for level, layers in ((2, {1, 2}), (3, {3, 4})):
            other = percept(1)
            other.summaries[level] = other.summaries[level] + 1
            changed = model.slot(other)
            assert {i for i in prefix if not torch.equal(prefix[i][0], changed[i][0])} == layers
            assert (model.run(ids, changed) - base).abs().max() > 1e-3
        for unread in (0, 1):
            other = percept(1)
            other.summaries[unread] += 1
            assert torch.equal(model.run(ids, model.slot(other)), base)


@pytest.mark.parametrize(
    ("layers", "levels", "expected"),
    [
        (12, 6, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]),  # the paper's
        (8, 3, [0, 0, 0, 1, 1, 1, 2, 2]),  # the authors' code: 0, 0, 1, 1, 2, 2, 2, 2
        (4, 4, [0, 1, 2, 3]),
        (3, 1, [0, 0, 0]),
    ],
)
def test_levels_share_the_layers(layers, levels, expected):
    inject = range(20, 20 + layers)
    assert [level_in(layer, inject, levels) for layer in inject] == expected


def test_defaults_are_the_papers_ranges():
    model = ours(peer("opt"))
    assert (model.inject, model.extract) == (range(3, 5), range(2, 4))  # half of 5 layers
    for name, inject, extract in (
        ("epalm", (20, 32), (6, 12)), ("epalm-pt-l", (20, 32), (18, 24)),
    ):  # fmt: skip
        row = presets.PRESETS[name]
        config = {
            "format": 1, "method": "epalm", "options": row.options, "prompt": "",
            "decoder": {"name": row.language, "config": presets.CONFIGS[row.language]},
            "vision": {
                "name": row.vision, "fit": "squash",
                "config": {"architecture": models.architecture(row.vision)},
            },
        }  # fmt: skip
        built = models.build(
            config, device=torch.device("meta"), precision=torch.float32, weights=False
        )
        assert (built.inject, built.extract) == (range(*inject), range(*extract))


@pytest.mark.parametrize(
    ("preset", "trainable", "percent"),
    [
        ("epalm", 24_949_760, 0.90),
        ("epalm-pt", 15_106_560, 0.55),
        ("epalm-pt-l", 4_239_360, 0.06),
        ("epalm-cc3m", 4_239_360, 0.06),
        ("epalm-lin", 1_968_640, 0.07),
        ("epalm-ada", 116_853_760, 4.09),
        ("magma", 107_010_560, 3.76),
        ("magma-all", 107_010_560, 3.76),
        ("promptfuse", 15_106_560, 0.55),
        ("limber", 1_968_640, 0.07),
        ("epalm-video", 24_949_760, 0.89),
        ("frozenbilm", 107_010_560, 3.72),
        ("epalm-audio", 24_949_760, 0.90),
    ],
)
def test_trained_parameters_are_the_papers(preset, trainable, percent):
    found = models.inspect(preset)
    assert found["trainable_parameters"] == trainable
    assert round(found["trainable_percent"], 2) == percent


def test_an_adapter_starts_next_to_the_identity():
    torch.manual_seed(0)
    adapter = Adapter(64, 8)
    values = torch.cat([p.flatten() for p in adapter.parameters()])
    assert values.abs().max() <= 2e-3
    assert 5e-4 < values.std() < 1.1e-3
    x = torch.randn(3, 64)
    torch.testing.assert_close(adapter(x), x, rtol=0, atol=5e-3)
    assert sum(p.numel() for p in adapter.parameters()) == 2 * 64 * 8 + 8 + 64


def test_what_does_not_fit_is_refused_in_a_sentence():
    theirs = peer("opt")
    with pytest.raises(UserError, match="2:9 is not within the 5 there are"):
        ours(theirs, inject=[2, 9])
    with pytest.raises(UserError, match="--adapt 2:6 is not within the 5"):
        ours(theirs, adapters=8, adapt=[2, 6])
    with pytest.raises(UserError, match="4 levels of the encoder do not fit into 1 layers"):
        ours(theirs, inject=[0, 1], extract=[0, 4])
    with pytest.raises(UserError, match="leave out --extract"):
        ours(theirs, tokens="all", extract=[0, 1])
    with pytest.raises(UserError, match="--unfreeze is vision, lm"):
        ours(theirs, unfreeze=["decoder"])
    with pytest.raises(UserError, match="--adapters 49 leaves nothing of a width of 48"):
        ours(theirs, adapters=49)
    raw = theirs.config.to_dict()
    state = {k: v.clone() for k, v in theirs.state_dict().items()}
    decoder = build_decoder(raw["model_type"], state, decoder_config(raw), torch.float32, "test")
    eyes, text = Eyes([8, 16, 20]), Text(Words(), 0, 0)
    with pytest.raises(UserError, match="differ in width"):
        models.with_options("epalm", eyes, decoder, text, "", {"shared": True})
    with pytest.raises(UserError, match="--tokens is cls or all, not 'patch'"):
        models.with_options("epalm", eyes, decoder, text, "", {"tokens": "patch"})
    with pytest.raises(UserError, match="--task is caption or vqa, not 'gqa'"):
        models.with_options("epalm", eyes, decoder, text, "", {"task": "gqa"})
    model = EPalm(eyes, decoder, text)  # a connection each
    assert [layer.in_features for layer in model.connector] == [16, 20]


def test_only_lin_leaves_layers_of_text_alone():
    theirs = peer("opt")
    layers = {
        "lin": ({"shared": True, "soft": 0}, 3),
        "soft": ({"shared": True}, 0),
        "deep": ({"deep": True}, 0),
        "adapters": ({"soft": 0, "adapters": 8}, 0),
        "upper adapters": ({"soft": 0, "adapters": 8, "adapt": [2, 5]}, 2),
        "uppermost adapters": ({"soft": 0, "adapters": 8, "adapt": [4, 5]}, 3),
        "upper adapters and soft": ({"adapters": 8, "adapt": [2, 5]}, 0),
        "lm": ({"soft": 0, "unfreeze": ["lm"]}, 0),
    }
    for options, expected in layers.values():
        assert ours(theirs, **options).text_layers == expected


def test_with_upper_adapters_the_text_below_them_is_read_once():
    model = ours(peer("llama"), soft=0, adapters=8, adapt=[2, 5])
    assert set(model.pairs) == {2, 3, 4}
    ids, seen = [[3, 4, 5], [6]], torch.randn(2, sum(WIDTHS))
    states = model.states(ids).split([model.state_rows(line) for line in ids])
    kept, fresh = (
        model.loss(model.collate(ids, [0, 1], seen, [0, 1], own))[0] for own in (list(states), None)
    )
    assert kept.item() == pytest.approx(fresh.item(), abs=1e-4)


# ------------------------------------------------------------------------ questions and answers


def answering(words: int = 58, **options) -> EPalm:
    return ours(peer("opt"), words, task="vqa", **options)


def test_the_separator_is_a_spare_row_or_words():
    assert answering().questions.separator == [58]
    assert answering(60).questions.separator == [59]  # "Answer:", unknown to these words
    assert answering(separator="7 8").questions.separator == [7, 8]
    with pytest.raises(UserError, match="--separator has no word"):
        answering(separator=" ")
    spare, plain = answering(), answering(60)
    pairs = [("3 4", "5"), ("3 4", "6 7")]
    assert spare.encode_answers(pairs, 9) == [[3, 4, 58, 5], [3, 4, 58, 6, 7]]
    assert plain.encode_answers(pairs, 9) == [[3, 4, 59, 5], [3, 4, 59, 6, 7]]
    long = " ".join(["3"] * 50)
    line = spare.encode_answers([(long, "5 6 7")], 9)[0]
    assert line[-4:] == [58, 5, 6, 7]
    assert len(line) < spare.room


@pytest.mark.parametrize("only", [False, True])
def test_the_loss_is_on_the_whole_string_or_on_the_answer(only):
    model = answering(answer_only=only)
    ids = model.encode_answers([("3 4", "5"), ("6", "7 8")], 9)
    batch = model.collate(ids, [0, 1], torch.zeros(2, 80), [0, 1])
    expected = [[3, 4, 58, 5, 0], [6, 58, 7, 8, 0]]
    if only:
        expected = [[5, 0], [7, 8, 0]]
    assert [row[t].tolist() for row, t in zip(batch.ids, batch.targets, strict=True)] == expected
    loss, count = model.loss(batch)
    assert count == sum(map(len, expected))
    assert loss.isfinite()


def test_an_answer_does_not_depend_on_the_batch_and_has_no_spare_rows():
    model = answering()
    pictures = torch.randn(4, sum(WIDTHS))  # summaries, as a cache has them
    questions = ["3 4 5 6 7 8", "9", "10 11", "12 13 14"]
    greedy = {"beams": 1, "max_tokens": 8}
    sampled = {"sampling": {"seed": 1, "temperature": 1.5}}
    for how in (greedy, {"beams": 3, "max_tokens": 8}, {"max_tokens": 8} | sampled):
        together = model.answer(pictures, questions, **how)
        for i, question in enumerate(questions):
            if "sampling" in how:
                how = how | {"sampling": how["sampling"] | {"indices": [i]}}
            ((text, score),) = model.answer(pictures[i : i + 1], [question], **how)
            assert text == together[i][0]
            assert score == pytest.approx(together[i][1], abs=1e-4)
            assert not {"58", "59"} & set(text.split())


def slow_likelihood(model: EPalm, picture: torch.Tensor, question: str, choice: str) -> float:
    """The log-probability of an answer and its end: one text, all of its tokens at once."""
    (line,) = model.encode_answers([(question, choice)], 99)
    ids = [model.text.bos, *line, model.text.eos]
    visual = model.see(model.percept(picture[None]))
    logits = model.decoder.logits(model.run(torch.tensor([ids[:-1]]), visual))[0]
    first = 1 + model.questions.answer_at(line)
    each = logits.log_softmax(-1)
    return sum(each[at - 1, ids[at]].item() for at in range(first, len(ids)))


ASKED = {
    "3 4 5 6 7 8": ["9", "9 10", "9 10 11 12"], "9": ["3 3"], "10 11": [],
    "12 13": ["5", "4 3 2 1", "6 6"],
}  # fmt: skip


CASES = ("opt", "full"), ("llama", "adapters and prompt"), ("llama", "deep"), ("gpt2", "magma-all")


@pytest.mark.parametrize(("family", "variant"), CASES)
@torch.no_grad()
def test_choices_have_the_likelihoods_of_a_slow_reference(family, variant):
    """All at once, so neither the batch nor its padding changes them."""
    model = ours(peer(family), 58, task="vqa", **VARIANTS[variant])
    width = (6, 20) if model.reads == "tokens" else (sum(WIDTHS),)
    pictures = torch.randn(4, *width, generator=torch.Generator().manual_seed(7))
    found = model.choose(pictures, list(ASKED), list(ASKED.values()))
    for picture, (question, choices), own in zip(pictures, ASKED.items(), found, strict=True):
        slow = [slow_likelihood(model, picture, question, choice) for choice in choices]
        assert [hypothesis.logprob for hypothesis in own] == pytest.approx(slow, abs=1e-4)
        assert [" ".join(map(str, hypothesis.tokens)) for hypothesis in own] == choices
        means = [s / (1 + len(c.split())) for s, c in zip(slow, choices, strict=True)]
        assert [hypothesis.mean_logprob for hypothesis in own] == pytest.approx(means, abs=1e-4)
        odds = decode.chances(own)
        assert odds == pytest.approx(torch.tensor(slow).softmax(0).tolist(), abs=1e-4)


@torch.no_grad()
def test_pictures_are_looked_at_once_for_an_answer_and_a_choice(monkeypatch):
    model = answering()
    asked = [[q for q, own in ASKED.items() if own], [own for own in ASKED.values() if own]]
    pictures = torch.randn(3, sum(WIDTHS), generator=torch.Generator().manual_seed(7))
    alone = model.answer(pictures, asked[0], beams=2), model.choose(pictures, *asked)
    seen = model.look(pictures)
    monkeypatch.setattr(model, "encoder", None)
    assert model.answer(seen, asked[0], beams=2) == alone[0]
    assert model.choose(seen, *asked) == alone[1]
    assert model.choose(seen, asked[0], [[], [], []]) == [[], [], []]


@pytest.mark.parametrize("how", [{"beams": 4}, {"beams": 1}, {"sampling": {"seed": 0}}])
def test_slot_and_prompt_are_made_once_for_a_picture(how):
    model, made = answering(), []
    for module in (*model.connector, model.soft):
        module.register_forward_hook(lambda module, read, out: made.append(module))
    model.answer(torch.randn(3, sum(WIDTHS)), ["3 4", "5", "6"], max_tokens=6, **how)
    assert made == [*model.connector, model.soft]


def test_a_model_does_what_it_was_trained_for():
    with pytest.raises(UserError, match="answers questions"):
        answering().caption(torch.randn(1, 80))
    with pytest.raises(UserError, match="makes captions"):
        ours(peer("opt")).answer(torch.randn(1, 80), ["3"])
    with pytest.raises(UserError, match="makes captions"):
        ours(peer("opt")).choose(torch.randn(1, 80), ["3"], [["4", "5"]])


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
@pytest.mark.parametrize("options", [{}, {"mlp": False}, {"deep": True, "mlp": False}])
def test_its_loss_in_bf16_is_that_in_fp32(family, options):
    """On a CPU, too, whose LayerNorms want one type."""
    model = ours(peer(family), **options)
    batch = model.collate([[3, 4], [5]], [0, 1], torch.randn(2, sum(WIDTHS)), [0, 1])
    expected = float(model.accumulate([batch])["loss"])
    models.place(model, torch.device("cpu"), torch.bfloat16)
    assert float(model.accumulate([batch])["loss"]) == pytest.approx(expected, rel=0.03)
