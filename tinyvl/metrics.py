"""Scores of answers, of retrieval and of zero-shot classification; those of captions are passed on.

All lie between 0 and 1 (CIDEr and SPIDEr apart). VQA: the official program of VQA v2
(Goyal et al. 2017, https://visualqa.org/evaluation.html), restated.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tinyvl import UserError
from tinyvl.metrics_captions import CAPTION_METRICS, CaptionScores, caption_scores, plan_captions

__all__ = [
    "CAPTION_METRICS", "CaptionScores", "by_type", "caption_scores", "class_embeddings",
    "gqa_accuracy", "label_ranks", "normalise_answer", "plan_captions", "ranks", "recall",
    "strict_accuracy", "topk_accuracy", "vqa_accuracy",
]  # fmt: skip

# Answers

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

    Its slips are kept, or scores would differ: the look-behind of the period rule is misspelt
    (a period goes unless a digit follows), at most 32 periods go, and whether a punctuation mark
    becomes nothing or a space is decided on the answer as it came.
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
    """Official VQA v2 accuracy of one question: min(1, matches / 3), averaged over leaving out
    each annotator in turn. 3 matches of 10 give 0.9, 2 give 0.6, 1 gives 0.3.

    Answers are normalised only if the annotators do not all agree. With fewer than four
    answers, where three matches cannot be had (the measure is not defined for them), it is 1
    if ``answer`` is one of them.
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
    """1 if the answer is, to the letter, the (most frequent) annotated one; eP-ALM's measure.

    Of answers given equally often the first counts. White space at the ends does not.
    """
    if not answers:
        raise UserError(f"The question answered by {answer!r} has no answers to compare with.")
    truth = Counter(a.strip() for a in answers).most_common(1)[0][0]
    return float(answer.strip() == truth)


def gqa_accuracy(answer: str, answers: Sequence[str]) -> float:
    """GQA's measure: 1 if the answer equals the annotated one."""
    return strict_accuracy(answer, answers)


def by_type(values: Iterable[float], types: Iterable[str | None]) -> dict[str, float]:
    """The mean of each question (or answer) type's values, sorted by name; None is left out."""
    groups: dict[str, list[float]] = {}
    for value, kind in zip(values, types, strict=True):
        if kind is not None:
            groups.setdefault(kind, []).append(value)
    return {kind: float(np.mean(groups[kind])) for kind in sorted(groups)}


# Retrieval


def ranks(
    images: Tensor,
    texts: Tensor | None,
    image_of_text: Sequence[int] | Tensor,
    *,
    block: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """How many wrong ones come before the first right one, for every image and every text.

    ``images`` (N, d) and ``texts`` (M, d) embeddings, scored by dot product; or ``images`` a
    score matrix (N, M) and ``texts`` None. ``image_of_text`` (M,): the image of each caption;
    an image may have any number. -> (N,) and (M,) int64, 0 is a hit at 1. A tie (and a score
    that is not a number) counts against the model: a collapsed one finds nothing.

    Scores are dot products in double precision, rounded to single: which scores tie does not
    depend on ``block`` (images, texts), the largest part of the matrix that is ever in memory: on
    a CPU as much as its cache holds, which is three times as fast as larger ones.
    An image without captions has rank M.
    """
    if images.device.type == "mps":  # has no double precision
        images, texts = images.cpu(), None if texts is None else texts.cpu()
    owner = torch.as_tensor(image_of_text, dtype=torch.long, device=images.device)
    count, captions = len(images), len(owner)
    check_pairs(images, texts, owner)
    rows, columns = block or ((512, 1024) if images.device.type == "cpu" else (4096, 8192))

    def score(i: slice, j: slice) -> Tensor:
        if texts is None:
            return images[i, j].float()
        return (images[i].double() @ texts[j].double().T).float()

    if texts is None:
        own = images[owner, torch.arange(captions, device=owner.device)].float()  # (M,)
    else:
        parts = (images[owner[j]].double() * texts[j].double() for j in blocks(captions, columns))
        own = torch.cat([part.sum(1).float() for part in parts])
    best = torch.full((count,), -torch.inf, device=own.device)
    best.scatter_reduce_(0, owner, own.nan_to_num(-torch.inf, torch.inf, -torch.inf), "amax")
    of_image = torch.zeros(count, dtype=torch.long, device=own.device)
    of_text = torch.zeros(captions, dtype=torch.long, device=own.device)
    for i in blocks(count, rows):
        for j in blocks(captions, columns):
            scores = score(i, j)
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


def check_pairs(images: Tensor, texts: Tensor | None, owner: Tensor) -> None:
    columns = images.shape[1] if texts is None else len(texts)
    if len(owner) != columns or not columns:
        raise UserError(f"There are {columns} texts, and an image is named for {len(owner)}.")
    wrong = owner[(owner < 0) | (owner >= len(images))]
    if len(wrong):
        raise UserError(f"A text belongs to image {int(wrong[0])}; there are {len(images)}.")


def recall(
    images: Tensor,
    texts: Tensor | None,
    image_of_text: Sequence[int] | Tensor,
    ks: Sequence[int] = (1, 5, 10),
    **options,
) -> dict[str, float]:
    """Recall@k from image to text (TR) and text to image (IR), and the means over ``ks``.

    See ``ranks`` for the arguments. TR takes the best of an image's captions; images without
    captions are searched through and not asked for.
    """
    of_image, of_text = ranks(images, texts, image_of_text, **options)
    owned = torch.as_tensor(image_of_text, dtype=torch.long).cpu().unique()
    found = {}
    for way, places in (("TR", of_image[owned]), ("IR", of_text)):
        values = {f"{way}@{k}": float((places < k).double().mean()) for k in ks}
        found |= values | {f"{way}-mean": sum(values.values()) / len(values)}
    return found


# Zero-shot classification


def class_embeddings(
    embed_texts: Callable[[list[str]], Tensor],
    names: Sequence[str],
    templates: Sequence[str],
    *,
    batch: int = 256,
) -> Tensor:
    """One unit vector a class (C, d): the mean of its prompts' unit vectors, made unit again.

    ``embed_texts`` maps texts to embeddings (n, d). Underscores in names become spaces.
    """
    if wrong := next((t for t in templates if t.count("{}") != 1), None):
        raise UserError(f"The template {wrong!r} needs one {{}} where the class name goes.", 2)
    if not names or not templates:
        raise UserError("Zero-shot classification needs class names and a template.", 2)
    texts = [t.replace("{}", name.replace("_", " ")) for name in names for t in templates]
    parts = [embed_texts(texts[i]) for i in blocks(len(texts), batch)]
    prompts = normalize(torch.cat(parts).float(), dim=-1)
    return normalize(prompts.unflatten(0, (len(names), len(templates))).mean(1), dim=-1)


def label_ranks(scores: Tensor, labels: Sequence[int] | Tensor) -> Tensor:
    """How many classes come before the right one, ``scores`` (N, C) and ``labels`` (N,) -> (N,).

    0 is a hit at 1; a tie (and a score that is not a number) counts against the model.
    """
    labels = torch.as_tensor(labels, dtype=torch.long, device=scores.device)
    scores = scores.float()
    own = scores.gather(1, labels[:, None])
    return (~(scores < own)).sum(1) - 1  # its own score is not ahead of itself


def topk_accuracy(scores: Tensor, labels: Sequence[int] | Tensor) -> dict[str, float]:
    """``scores`` (N, C), ``labels`` (N,) -> {"top1", "top5"}; ties are misses."""
    ahead = label_ranks(scores, labels)
    return {f"top{k}": float((ahead < k).double().mean()) for k in (1, 5)}
