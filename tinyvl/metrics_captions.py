"""Caption metrics as everyone else reports them: BLEU, METEOR, ROUGE-L, CIDEr, SPICE, SPIDEr.

They are pycocoevalcap's scorers and jars, called one by one: its own driver hangs, shifts captions
and downloads. Scores are between 0 and 1, except CIDEr and SPIDEr (1.0 is the papers' 100).
"""

import contextlib
import html
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from tinyvl import UserError
from tinyvl import metrics_java as jvm
from tinyvl.files import cache_dir
from tinyvl.text import has_words

T = TypeVar("T")

BLEU = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4")
CAPTION_METRICS = (*BLEU, "METEOR", "ROUGE-L", "CIDEr", "SPICE", "SPIDEr")
NEEDS_JAVA = f"needs Java, and none was found; get it by {jvm.INSTALL}"
OPT_IN = "SPICE is opt-in: --spice-jars DIR, a folder with CoreNLP 3.6.0's code and models"


@dataclass(frozen=True)
class Plan:
    """The metrics that `caption_scores` computes, and the programs for them."""

    metrics: tuple[str, ...]
    missing: dict[str, str]  # metric -> why it will be None
    java: jvm.Java | None
    spice_jars: Path | None


def plan_captions(
    metrics: Sequence[str] | None = None, java: str | None = None, spice_jars: Path | None = None
) -> Plan:
    """Finds Java (a program or its home; None: anywhere) and the jars, before a long run.

    ``metrics`` None: all, and what cannot be computed here is None with a reason. ``spice_jars`` is
    a folder with CoreNLP's jars, without which there is no SPICE. Raises UserError if one of
    ``metrics`` is unknown or cannot be computed here.
    """
    known = {name.lower(): name for name in CAPTION_METRICS}
    names = tuple(
        known.get(n.lower(), n) for n in (CAPTION_METRICS if metrics is None else metrics)
    )
    if unknown := [name for name in names if name not in CAPTION_METRICS]:
        raise UserError(f"No metric {unknown[0]!r}; there are {', '.join(CAPTION_METRICS)}.", 2)
    found = jvm.find_java(java)
    missing = {}
    for name in names:
        if name in ("SPICE", "SPIDEr") and spice_jars is None:
            missing[name] = OPT_IN
        elif name in ("METEOR", "SPICE", "SPIDEr") and found is None:
            missing[name] = f"{name} {NEEDS_JAVA}"
    if metrics is not None and missing:
        raise UserError(f"{next(iter(missing.values()))}.", 2)
    if spice_jars is not None and found is not None:
        jvm.spice_class_path(spice_jars)
    return Plan(names, missing, found, spice_jars)


@dataclass
class CaptionScores:
    """Scores of a corpus and of each caption.

    The corpus value of ROUGE-L, CIDEr, SPICE and SPIDEr is the mean of ``items[metric][id]``; that
    of BLEU and METEOR comes from sums of counts (``statistics``). CIDEr is relative to the whole
    set: its inverse document frequencies come from all references scored together.
    """

    metrics: dict[str, float | None]
    items: dict[str, dict[str, float]]
    tokenizer: str  # "java" | "python"
    missing: dict[str, str]  # metric -> why it is None
    ids: list[str] = field(default_factory=list)  # in the order of the rows of statistics
    # "BLEU": (N, 10) hypothesis and reference length, then the n-grams guessed and correct,
    # n = 1 to 4. "METEOR": (N, 23), METEOR's own. Sums over captions give the corpus value.
    statistics: dict[str, np.ndarray] = field(default_factory=dict)

    def resample(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        """The corpus scores when caption i of ``ids`` counts ``counts[r, i]`` times.

        ``counts`` (R, N), a bootstrap draw a row -> {metric: (R,)}. CIDEr keeps the document
        frequencies of the whole set.
        """
        counts = np.asarray(counts, dtype=np.float64)
        found = {}
        if "BLEU" in self.statistics:
            values = bleu_scores(counts @ self.statistics["BLEU"])
            found = {name: values[:, n] for n, name in enumerate(BLEU) if name in self.metrics}
        if "METEOR" in self.statistics:
            found["METEOR"] = meteor_score(counts @ self.statistics["METEOR"])
        for name, values in self.items.items():
            if name not in found and name not in BLEU:
                column = np.array([values[i] for i in self.ids])
                found[name] = counts @ column / counts.sum(1)
        return {name: found[name] for name in self.metrics if name in found}


def caption_scores(
    references: Mapping[str, Sequence[str]], hypotheses: Mapping[str, str], *,
    metrics: Sequence[str] | None = None, java: str | None = None, spice_jars: Path | None = None,
) -> CaptionScores:  # fmt: skip
    """Score captions {id: caption} against references {id: [captions]}, as pycocoevalcap does.

    `plan_captions` explains the options. Without Java our own tokenizer stands in (CIDEr moves by
    less than 0.0001). Raises UserError as `plan_captions` does, if an id lacks its caption or its
    references, or if a Java program fails that one of ``metrics`` needs.
    """
    plan = plan_captions(metrics, java, spice_jars)
    ids = check_captions(references, hypotheses)
    missing, statistics = dict(plan.missing), {}
    wanted = set(plan.metrics) - set(missing)
    corpus: dict[str, float] = {}
    each: dict[str, Sequence[float]] = {}

    def attempt(name: str, compute: Callable[[], T]) -> T | None:
        """None with a warning where Java fails, unless the metric was asked for by name."""
        try:
            return compute()
        except UserError as error:
            if metrics is not None:
                raise
            warn(f"no {name}: {error}")
            missing[name] = str(error)
            return None

    with contextlib.ExitStack() as stack:
        meteor = None
        if "METEOR" in wanted:  # starts while the captions are tokenised
            meteor = attempt("METEOR", lambda: stack.enter_context(jvm.Meteor(plan.java)))
        refs, hyps = tokenised(plan, [references[i] for i in ids], [hypotheses[i] for i in ids])
        if meteor:
            meteor.score(refs, hyps)
        if wanted & set(BLEU):
            counts = statistics["BLEU"] = bleu_statistics(refs, hyps)
            corpus |= zip(BLEU, bleu_scores(counts.sum(0)), strict=True)
            each |= zip(BLEU, bleu_scores(counts).T, strict=True)
        if "ROUGE-L" in wanted:
            each["ROUGE-L"] = rouge(refs, hyps)
        if wanted & {"CIDEr", "SPIDEr"}:
            each["CIDEr"] = cider(refs, hyps)
        corpus |= {name: np.mean(each[name]) for name in ("ROUGE-L", "CIDEr") if name in each}
        found = attempt("METEOR", meteor.statistics) if meteor else None
        if found is not None:
            statistics["METEOR"] = found
            corpus["METEOR"], each["METEOR"] = meteor_score(found.sum(0)), meteor_score(found)
    if wanted & {"SPICE", "SPIDEr"}:
        run = partial(jvm.spice, plan.java, plan.spice_jars, refs, hyps, cache_dir() / "spice")
        found = attempt("SPICE", run)
        if found is None:
            missing["SPIDEr"] = missing["SPICE"]
        else:
            corpus["SPICE"], values = found
            corpus["SPIDEr"] = (corpus.get("CIDEr", np.nan) + corpus["SPICE"]) / 2
            if values is not None:
                each["SPICE"] = values
                each["SPIDEr"] = (np.array(each.get("CIDEr", np.nan)) + values) / 2
    if len(ids) == 1 and "CIDEr" in wanted:
        warn("CIDEr of a single image is always 0: it weighs words by how few images have them")
    return CaptionScores(
        {name: float(corpus[name]) if name in corpus else None for name in plan.metrics},
        {n: dict(zip(ids, map(float, each[n]), strict=True)) for n in plan.metrics if n in each},
        "java" if plan.java else "python",
        {name: missing[name] for name in plan.metrics if name in missing},
        ids,
        statistics,
    )


def check_captions(
    references: Mapping[str, Sequence[str]], hypotheses: Mapping[str, str]
) -> list[str]:
    """The ids to score, in the references' order; UserError if something is missing."""
    if not references or not hypotheses:
        raise UserError("There are no captions to score.")
    for i in references:
        if i not in hypotheses:
            raise UserError(f"No caption was made for {i!r}, which has references.")
        if not references[i]:
            raise UserError(f"{i!r} has no reference captions; leave it out.")
    if extra := next((i for i in hypotheses if i not in references), None):
        raise UserError(f"{extra!r} has a caption and no references to score it by.")
    return list(references)


def tokenised(
    plan: Plan, references: Sequence[Sequence[str]], hypotheses: Sequence[str]
) -> tuple[list[list[str]], list[str]]:
    """References and hypotheses as tokens joined by spaces; ours without Java, with a warning.

    A caption without words has no tokens.
    """
    flat = [worded(caption) for candidates in references for caption in candidates]
    hypotheses = list(map(worded, hypotheses))
    if plan.java is None:
        warn(f"the Penn Treebank tokenizer {NEEDS_JAVA}; using our own")
        flat, hyps = list(map(tokenise, flat)), list(map(tokenise, hypotheses))
    else:  # each in a process of its own, as there: the tokenizer looks at the next line
        with (
            jvm.Tokenizer(plan.java, flat) as of_references,
            jvm.Tokenizer(plan.java, hypotheses) as of_hypotheses,
        ):
            flat, hyps = of_references.tokens(), of_hypotheses.tokens()
    tokens = iter(flat)
    return [[next(tokens) for _ in candidates] for candidates in references], hyps


def worded(caption: str) -> str:
    return caption if has_words(caption) else ""


@cache
def warn(message: str) -> None:
    """Say it on standard error once in a process: domains of a set are scored one by one."""
    print(f"tinyvl: {message}", file=sys.stderr)


def bleu_statistics(refs: Sequence[Sequence[str]], hyps: Sequence[str]) -> np.ndarray:
    """(N, 10): see ``CaptionScores.statistics``. The reference length is the closest one's."""
    from pycocoevalcap.bleu.bleu_scorer import cook_refs, cook_test

    rows = []
    for candidates, hypothesis in zip(refs, hyps, strict=True):
        counted = cook_test(hypothesis, cook_refs(candidates), eff="closest")
        rows.append([counted["testlen"], counted["reflen"], *counted["guess"], *counted["correct"]])
    return np.array(rows, dtype=np.float64)


def bleu_scores(statistics: np.ndarray) -> np.ndarray:
    """(..., 10) sums of counts -> (..., 4) BLEU-1 to BLEU-4, with pycocoevalcap's constants."""
    small, tiny = 1e-9, 1e-15
    length, reference = statistics[..., 0], statistics[..., 1]
    precision = (statistics[..., 6:] + tiny) / (statistics[..., 2:6] + small)
    bleu = np.cumprod(precision, -1) ** (1 / np.arange(1, 5))
    ratio = (length + tiny) / (reference + small)
    with np.errstate(over="ignore"):
        brevity = np.exp(np.minimum(0.0, 1 - 1 / ratio))
    return bleu * brevity[..., None]


# METEOR 1.5's parameters for English (its "rank" task), and the weights of exact, stem, synonym
# and paraphrase matches.
ALPHA, BETA, GAMMA, DELTA = 0.85, 0.2, 0.6, 0.75
STAGES = np.array([1.0, 0.6, 0.8, 0.6])


def meteor_score(statistics: np.ndarray) -> np.ndarray:
    """(..., 23) sums of METEOR's statistics -> (...) scores (Denkowski & Lavie 2014, section 3).

    The columns, in pairs of hypothesis and reference: words, function words; for each of the four
    stages the content words and the function words matched; then chunks (one column), and the
    words matched.
    """
    words, function = statistics[..., :2], statistics[..., 2:4]
    stages = statistics[..., 4:20].reshape(*statistics.shape[:-1], 4, 2, 2)
    matched = np.einsum("s,...sft->...ft", STAGES, stages)  # content | function, hyp | ref
    with np.errstate(divide="ignore", invalid="ignore"):
        share = DELTA * matched[..., 0, :] + (1 - DELTA) * matched[..., 1, :]
        share = share / (DELTA * (words - function) + (1 - DELTA) * function)
        mean = 1 / ((1 - ALPHA) / share[..., 0] + ALPHA / share[..., 1])  # precision, recall
        fragments = statistics[..., 20] / statistics[..., 21:].mean(-1)
        score = mean * (1 - GAMMA * fragments**BETA)
    return np.maximum(np.nan_to_num(score, nan=0.0), 0.0)


def rouge(refs: Sequence[Sequence[str]], hyps: Sequence[str]) -> list[float]:
    """ROUGE-L of each tokenised hypothesis."""
    from pycocoevalcap.rouge.rouge import Rouge

    scorer = Rouge()
    return [scorer.calc_score([h], candidates) for candidates, h in zip(refs, hyps, strict=True)]


def cider(refs: Sequence[Sequence[str]], hyps: Sequence[str]) -> np.ndarray:
    """CIDEr-D x 10 of each tokenised hypothesis; frequencies from all of ``refs``."""
    known = Cider(refs)
    return np.array([known.score(i, hypothesis) for i, hypothesis in enumerate(hyps)])


N = 4  # the longest n-grams
SIGMA = 6.0  # of the penalty for another length

Vector = tuple[list[dict], list[float], int]  # for each n the weights and their norm; the length


class Cider:
    """CIDEr-D x 10 against known references, whose n-gram weights are counted once.

    Vedantam et al., https://arxiv.org/abs/1411.5726, with pycocoevalcap's numbers in about half of
    its time. As there, the number of bigrams counts as a caption's length. The references are each
    picture's captions, each as words joined by spaces.
    """

    def __init__(self, references: Sequence[Sequence[str]]):
        cooked = [[ngrams(caption) for caption in captions] for captions in references]
        pictures = Counter()
        for captions in cooked:
            pictures.update(set().union(*(part for caption in captions for part in caption)))
        self.most = math.log(max(1, len(references)))  # the weight of an n-gram of no picture
        self.weight = {ngram: self.most - math.log(count) for ngram, count in pictures.items()}
        self.references = [[self.vector(caption) for caption in captions] for captions in cooked]

    def vector(self, counted: list[Counter]) -> Vector:
        """The tf-idf weights of counted n-grams."""
        weight, most = self.weight, self.most
        values = [{g: c * weight.get(g, most) for g, c in part.items()} for part in counted]
        return values, [math.hypot(*part.values()) for part in values], counted[1].total()

    def score(self, picture: int, caption: str) -> float:
        """The score of a caption (words joined by spaces) of this picture."""
        ours, our_norms, our_length = self.vector(ngrams(caption))
        total = 0.0
        for theirs, norms, length in self.references[picture]:
            penalty = math.exp(-((our_length - length) ** 2) / (2 * SIGMA**2))
            for a, b, norm, other in zip(ours, theirs, our_norms, norms, strict=True):
                product = sum(min(x, b[ngram]) * b[ngram] for ngram, x in a.items() if ngram in b)
                if product:
                    total += penalty * product / (norm * other)
        return 10 * total / N / len(self.references[picture])


def ngrams(caption: str) -> list[Counter]:
    """For n = 1 to 4 {n-gram: how often}."""
    words = caption.split()
    return [Counter(zip(*(words[i:] for i in range(n)), strict=False)) for n in range(1, N + 1)]


# Words that keep their point wherever they stand.
ABBREVIATIONS = (
    "mr|mrs|ms|dr|prof|gen|sgt|lt|capt|rev|jr|sr|st|ave|blvd|rd|ct|sq|bldg|mt|ft|dept|inc|co|corp"
    "|ltd|bros|est|etc|vs|al|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|calif|penn|ky|la"
)
SUFFIX = r"(?:s|m|d|ll|re|ve)\b"  # is, has, am, would, will, are, have
TOKEN = re.compile(
    rf"""
      https?://\S+\w | www\.\S+\w | [\w.]+@[\w.]+\w | @\w+ | <[a-z/][^<>]*>
    | \d+\ \d+/\d+                                    # 1 1/2 is one token
    | [+-]?\d+(?:[:.,/]\d+)+ | [+-]\d+ | \.\d+
    | (?:[a-z]\.)+[a-z]\.?(?!\w)                      # u.s. p.m t.v
    | (?:{ABBREVIATIONS})\.(?!\w) | no\.(?=\ \d) | ph\.d\.
    | (?-i:[A-HJ-Z])\.(?!\w) | [a-hj-z]\.(?=\ \S)     # an initial
    | \w+\.(?=[,;])
    | \w+?(?=n't\b) | n't\b | '{SUFFIX}
    | '(?:em|n'?|\d0s)(?!\w) | (?:dunkin|ol)'(?!\w) | 't(?=is\b|was\b) | y'(?=all\b)
    | can(?=not\b) | (?:gon|wan)(?=na\b) | got(?=ta\b) | (?:lem|gim)(?=me\b)
    | [a-hj-xz]'(?!{SUFFIX})\w\w+                     # o'clock, s'mores
    | (?-i:[A-Z]+&[A-Z]+)                             # AT&T
    | \w+(?:[-/.]\w+ | (?<=[aeiouy])'(?=[aeiou])(?!{SUFFIX})\w+)*
    | [!?]{{2,}}
    | [^\s\w\U00010000-\U0010ffff]                    # not emoji
    """,
    re.VERBOSE | re.IGNORECASE,
)
SPELT = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
    "€": "$", "£": "#", "½": "1/2",
}  # fmt: skip
DROPPED = set("'\"`.?!,:;-“”‘–—…")  # noqa: RUF001


def tokenise(caption: str) -> str:
    """An English caption's tokens: lower case, without punctuation, joined by spaces.

    They are CoreNLP's PTBTokenizer's on more than 99.99 % of COCO's captions. Of its grammar (some
    700 rules) only what captions have is here.
    """
    text = html.unescape(" ".join(caption.split())).replace("’", "'")  # noqa: RUF001
    found = TOKEN.findall(text)
    tokens = (SPELT.get(token, token).lower() for token in found if token not in DROPPED)
    return " ".join(token.replace(" ", "\u00a0") for token in tokens)
