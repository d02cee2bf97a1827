"""Scores of answers, retrieval and zero-shot classification: fractions between 0 and 1.

VQA: the official program of VQA v2 (Goyal et al. 2017, https://visualqa.org/evaluation.html),
restated. `metrics_captions` scores captions.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyvl import UserError

KS = (1, 5, 10)  # of recall@k

# (R, N) how often each of N items counts in each of R draws -> metric -> (R,) its values.
Resample = Callable[[np.ndarray], dict[str, np.ndarray]]


@dataclass
class Scores:
    """Overall and group scores, and a resampler."""

    metrics: dict[str, float | None]
    resample: Resample | None = None
    groups: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)  # further fields of the report


def mean_scores(
    items: dict[str, list[float | None]], kinds: Mapping[str, Sequence[str | None]], **extra: Any
) -> Scores:
    """The mean of each metric's items, overall and by group.

    ``items`` is metric -> N values (None: it is not one of this item), ``kinds`` kind of group ->
    each item's group or None.
    """
    columns = {name: np.asarray(values, dtype=float) for name, values in items.items()}  # NaN: None

    def mean(values: np.ndarray) -> float | None:
        own = values[~np.isnan(values)].tolist()
        return sum(own) / len(own) if own else None

    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for kind, names in kinds.items():
        rows: dict[str, list[int]] = {}
        for i, group in enumerate(names):
            if group is not None:
                rows.setdefault(group, []).append(i)
        for group, part in sorted(rows.items()):
            means = {name: mean(column[part]) for name, column in columns.items()}
            groups.setdefault(kind, {})[group] = {"items": len(part), **means}

    def resample(counts: np.ndarray) -> dict[str, np.ndarray]:
        return {
            name: counts @ np.nan_to_num(column) / np.maximum(counts @ ~np.isnan(column), 1)
            for name, column in columns.items()
        }

    whole = {name: mean(column) for name, column in columns.items()}
    return Scores(whole, resample, groups, extra)


# Of answers.
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5",
    "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't
mightn't've must've mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll
you're you've
""".split()  # noqa: SIM905
# Each is found with one apostrophe left out; the last entry is the official table's slip.
CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word
    for word in CONTRACTED
    for i, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}


def normalise_answer(answer: str) -> str:
    """The official VQA normalisation: punctuation, periods, number words, articles, contractions.

    Its slips are kept, or scores would differ: its period rule looks only at what follows (a period
    goes unless a digit follows), at most 32 periods go, and the answer as it came decides whether
    a punctuation mark becomes nothing or a space.
    """
    text = answer
    commas = re.search(r"\d,\d", answer) is not None
    for mark in PUNCTUATION:
        glued = not (mark + " " in answer or " " + mark in answer or commas)
        text = text.replace(mark, " " if glued else "")
    text = re.sub(r"\.(?!\d)", "", text, count=32)
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(w, w) for w in words if w not in ("a", "an", "the"))


def vqa_accuracy(answer: str, answers: Sequence[str]) -> float:
    """VQA v2's official accuracy of one question.

    It is min(1, matches / 3), averaged over leaving out each annotator in turn: 3 matches of 10
    give 0.9, 2 give 0.6, 1 gives 0.3. Answers are normalised only if the annotators do not all
    agree. The measure is not defined for fewer than four answers: there it is 1 if ``answer`` is
    one of them. Raises UserError if there are none.
    """
    answer, *truths = (a.replace("\n", " ").replace("\t", " ").strip() for a in (answer, *answers))
    if not truths:
        raise UserError(f"The question answered by {answer!r} has no answers to compare with.")
    if len(set(truths)) > 1:
        answer, *truths = map(normalise_answer, (answer, *truths))
    matches = truths.count(answer)
    if len(truths) < 4:
        return float(matches > 0)
    # Leaving out an annotator who agrees takes one match away.
    agreeing = matches * min(1.0, (matches - 1) / 3)
    others = (len(truths) - matches) * min(1.0, matches / 3)
    return (agreeing + others) / len(truths)


def strict_accuracy(answer: str, answers: Sequence[str]) -> float:
    """1 if the answer is, to the letter, the most frequent annotated one: eP-ALM's and GQA's.

    Of answers given equally often the first counts. White space at the ends does not. Raises
    UserError if there are no ``answers``.
    """
    if not answers:
        raise UserError(f"The question answered by {answer!r} has no answers to compare with.")
    truth = Counter(a.strip() for a in answers).most_common(1)[0][0]
    return float(answer.strip() == truth)


def ranks(
    images: Tensor, texts: Tensor, image_of_text: Sequence[int] | Tensor, *,
    block: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """How many wrong ones come before the first right one, for every image and every text.

    -> (N,) and (M,) int64; 0 is a hit at 1, and an image without captions has M. A tie (and a score
    that is not a number) counts against the model: a collapsed one finds nothing. Scores are dot
    products in double precision, rounded to single, so that ``block`` does not change which tie.

    ``images`` (N, d) and ``texts`` (M, d) are embeddings, ``image_of_text`` (M,) is the image of
    each caption; UserError if it does not fit. ``block``: images and texts of the largest part of
    the scores in memory; on a CPU what its cache holds is three times as fast as more.
    """
    if images.device.type == "mps":  # has no double precision
        images, texts = images.cpu(), texts.cpu()
    owner = torch.as_tensor(image_of_text, dtype=torch.long, device=images.device)
    count, captions = len(images), len(texts)
    if len(owner) != captions or not captions:
        raise UserError(f"There are {captions} texts, and an image is named for {len(owner)}.")
    wrong = owner[(owner < 0) | (owner >= count)]
    if len(wrong):
        raise UserError(f"A text belongs to image {int(wrong[0])}; there are {count}.")
    rows, columns = block or ((512, 1024) if images.device.type == "cpu" else (4096, 8192))
    parts = (images[owner[j]].double() * texts[j].double() for j in blocks(captions, columns))
    own = torch.cat([part.sum(1).float() for part in parts])  # (M,)
    best = torch.full((count,), -torch.inf, device=own.device)
    best.scatter_reduce_(0, owner, own.nan_to_num(-torch.inf, torch.inf, -torch.inf), "amax")
    of_image = torch.zeros(count, dtype=torch.long, device=own.device)
    of_text = torch.zeros(captions, dtype=torch.long, device=own.device)
    for i in blocks(count, rows):
        for j in blocks(captions, columns):
            scores = (images[i].double() @ texts[j].double().T).float()
            mine = ((owner[j] >= i.start) & (owner[j] < i.stop)).nonzero()[:, 0]
            pairs = owner[j][mine] - i.start, mine  # right ones are never ahead
            behind = scores < best[i, None]
            behind[pairs] = True
            of_image[i] += behind.shape[1] - behind.sum(1)
            behind = scores < own[None, j]
            behind[pairs] = True
            of_text[j] += behind.shape[0] - behind.sum(0)
    of_image[torch.bincount(owner, minlength=count) == 0] = captions
    return of_image.cpu(), of_text.cpu()


def blocks(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def recall_of(found: dict[str, tuple[np.ndarray, np.ndarray]], images: int) -> Resample:
    """The resampler of recall@k and its mean over k; an image counts with its captions.

    ``found`` has for "TR" (image to text) and "IR" (text to image) each query's image (Q,) and
    rank (Q,), 0 being a hit at 1; ``images`` is their number.
    """
    totals, hits = {}, {}
    for way, (rows, places) in found.items():
        totals[way] = np.bincount(rows, minlength=images)
        for k in KS:
            hits[way, k] = np.bincount(rows, weights=places < k, minlength=images)

    def resample(counts: np.ndarray) -> dict[str, np.ndarray]:
        values = {}
        for way, total in totals.items():
            own = {f"{way}@{k}": counts @ hits[way, k] / (counts @ total) for k in KS}
            values |= own | {f"{way}-mean": np.mean(list(own.values()), axis=0)}
        return values

    return resample


def chance(captions: Sequence[int]) -> dict[str, float]:
    """The expected recalls of a random order; ``captions``: how many each image has."""
    images, texts = len(captions), sum(captions)
    found = {}
    for k in KS:  # TR: none of an image's m captions among k of them all
        miss = [
            math.comb(texts - m, k) / math.comb(texts, k) if k <= texts else 0 for m in captions
        ]
        found[f"TR@{k}"] = 1 - sum(miss) / images
    found["TR-mean"] = sum(found.values()) / len(KS)
    of_text = {f"IR@{k}": min(1.0, k / images) for k in KS}
    return found | of_text | {"IR-mean": sum(of_text.values()) / len(KS)}


def label_ranks(scores: Tensor, labels: Sequence[int] | Tensor) -> Tensor:
    """How many classes come before the right one, ``scores`` (N, C) and ``labels`` (N,) -> (N,).

    0 is a hit at 1; a tie (and a score that is not a number) counts against the model.
    """
    labels = torch.as_tensor(labels, dtype=torch.long, device=scores.device)
    scores = scores.float()
    own = scores.gather(1, labels[:, None])
    return (~(scores < own)).sum(1) - 1  # its own score is not ahead of itself
