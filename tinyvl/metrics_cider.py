"""CIDEr-D and a Penn Treebank tokenizer without Java: for scores and as a reward in training."""

import html
import math
import re
from collections import Counter
from collections.abc import Sequence

N = 4  # the longest n-grams
SIGMA = 6.0  # of the penalty for another length

Vector = tuple[list[dict], list[float], int]  # for each n the weights and their norm; the length


class Cider:
    """CIDEr-D x 10 against known references, whose n-gram weights are counted once.

    Vedantam et al., https://arxiv.org/abs/1411.5726, with pycocoevalcap's numbers in about half of
    its time. As there, the number of bigrams counts as a caption's length.

    Args:
        references: each picture's captions, each as words joined by spaces.
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
