"""CIDEr-D, to score captions (`caption_metrics`) and to reward them in training (`scst`)."""

import math
from collections import Counter
from collections.abc import Sequence

N = 4  # n-grams of up to so many words
SIGMA = 6.0  # of the penalty of another length

Vector = tuple[list[dict], list[float], int]  # for each n the weights and their norm; the length


class Cider:
    """CIDEr-D x 10 against references known ahead, whose n-gram weights are counted once.

    Vedantam et al., https://arxiv.org/abs/1411.5726, in pycocoevalcap's numbers and in about half
    of its time. As there, a caption is as long as its bigrams are many.

    Args:
        references: of each picture the words of its captions, joined by spaces.
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
        """Of a caption's words, joined by spaces, for one of the pictures."""
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
