"""Text from a step function: greedy, beam search and sampling.

Nothing here knows a model. A ``Step`` gives the logits of the next token, and its owner keeps the
caches::

    step(ids, rows) -> (N, V) logits of the last position, float32 or castable; only read here

    first call   ids (B, T) the prompts, LEFT padded (the owner knows the mask); rows None
    later calls  ids (N, 1) the last token of each row; rows (N,) int64: row j continues row
                 rows[j] of the previous call, and the owner re-orders its caches by it

What an owner may rely on: the rows of a finished prompt are never passed again; the rows of one
prompt are contiguous and prompts keep their order; greedy and sampling have one row per live
prompt, beam search has one in the first call and then ``beams``. So an image's keys and values can
be kept once and read by all its beams.

A prompt's result depends on nothing else in the batch. A step synchronises with the device once.
With ``stay`` finished prompts stay in the batch, to no effect, and only every so many steps it is
asked whether all have ended: a GPU goes on meanwhile, in tensors of the same shapes.

Beam search is that of transformers 5 (``GenerationMixin._beam_search``), to the sequence and the
score. Top-k: https://arxiv.org/abs/1805.04833; top-p: https://arxiv.org/abs/1904.09751.
"""

import math
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Step = Callable[[Tensor, Tensor | None], Tensor]


@dataclass
class Style:
    """How captions and answers are searched for, or sampled."""

    beams: int = 5  # 1: greedy
    max_tokens: int = 40  # of a caption, the end token included
    length_penalty: float = 1.0  # a beam's score is divided by its length to this power
    early_stopping: bool | Literal["never"] = True  # as soon as all beams have an end
    sampling: dict[str, Any] | None = None  # options of `decode.sample`; None: a search
    rerank: str | None = None  # the search model that chooses among the beams: `rerank.reranker`


@dataclass
class Hypothesis:
    """One continuation of a prompt."""

    tokens: list[int]  # the new ones, without the end token
    score: float  # logprob / length ** length_penalty (greedy, sampling: 1); length counts the end
    logprob: float  # the sum of the natural log-probabilities, the end token's included
    finished: bool  # an end token was produced within max_new_tokens

    @property
    def mean_logprob(self) -> float:
        """Mean log-probability per generated token, the end token included: a caption's score."""
        return self.logprob / (len(self.tokens) + self.finished)


ROWS = 8  # whose probabilities a CPU computes at once: its cache holds them, and no new memory
BLOCK = 64  # logits whose maximum `_top` takes first
PER_TOKEN = False  # a choice scores its log-probability, as Visual7W's do, or the mean per token


def chances(choices: Sequence[Hypothesis]) -> list[float]:
    """The probability of each choice, if one of them is right: a softmax of their scores."""
    scores = [choice.mean_logprob if PER_TOKEN else choice.logprob for choice in choices]
    return torch.tensor(scores, dtype=torch.float64).softmax(0).tolist()


def greedy(
    step: Step, prompt: Tensor, *, eos: int | Collection[int], max_new_tokens: int,
    forbid: Sequence[int] = (), stay: int = 0,
) -> list[Hypothesis]:  # fmt: skip
    """Takes the likeliest token at every step.

    Args:
        step: see the module.
        prompt: (B, T) int64 token ids, left padded.
        eos: the token that ends a text, or several.
        max_new_tokens: the length of a text at most, its end token included.
        forbid: tokens that are never produced: their logits become -inf before the softmax.
        stay: see the module; 0: prompts leave the batch when they have ended.

    -> one hypothesis per prompt. ValueError here and in the other searches: an option is out of its
    range.
    """
    best = lambda logits, live, t: logits.argmax(-1)  # noqa: E731
    return _single(step, prompt, best, eos, max_new_tokens, forbid, stay)


def sample(
    step: Step, prompt: Tensor, *, eos: int | Collection[int], max_new_tokens: int,
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int,
    indices: Sequence[int] | None = None, forbid: Sequence[int] = (), stay: int = 0,
) -> list[Hypothesis]:  # fmt: skip
    """Draws every token from the model's distribution, after temperature, top-k and top-p.

    Args:
        step, prompt, eos, max_new_tokens, forbid, stay: see `greedy`.
        temperature: the logits are divided by it; above 0.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the fewest tokens that together have this probability; 1 keeps all.
        seed: the random numbers are a function of (seed, index of the prompt, position).
        indices: each prompt's index among all inputs (default 0 to B-1). With it a prompt gets the
            same text in every batch.

    -> one hypothesis per prompt. Its log-probability is the model's own, before temperature, top-k
    and top-p, so it compares with those of the other searches.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0 (or use greedy)")
    if top_k < 0:
        raise ValueError(f"top_k is {top_k}; it must be 0 (off) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must be above 0 and at most 1 (off)")
    indices = range(len(prompt)) if indices is None else indices
    if len(indices) != len(prompt):
        raise ValueError(f"{len(indices)} indices for {len(prompt)} prompts")
    # Drawn ahead, on the host: the same numbers on every device and in every batch.
    generators = [random.Random(f"{seed}/{index}") for index in indices]
    uniform = torch.tensor(
        [[generator.random() for _ in range(max_new_tokens)] for generator in generators],
        dtype=torch.float32,
        device=prompt.device,
    )  # (B, L)

    def pick(logits: Tensor, live: Tensor, t: int) -> Tensor:
        if top_k == 0 and top_p == 1:  # nothing to cut: no need to sort
            weight, order = (logits / temperature).softmax(-1), None
        else:
            weight, order = truncate(logits / temperature, top_k, top_p)
        cdf = weight.cumsum(-1)
        at = torch.searchsorted(cdf, uniform[live, t, None] * cdf[:, -1:], right=True)
        # A float32 number may round to 1, and a parallel sum may still grow over the zeros.
        last = weight.shape[-1] - 1 - (weight.flip(-1) > 0).int().argmax(-1, keepdim=True)
        at = torch.minimum(at, last)
        return (at if order is None else order.gather(-1, at))[:, 0]

    return _single(step, prompt, pick, eos, max_new_tokens, forbid, stay)


def truncate(logits: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Top-k, then top-p: logits (N, V) to weights, likeliest first, and their tokens, both (N, V).

    What is cut has weight 0, and the rest is not normalised again. Keeps what transformers'
    TopKLogitsWarper and then TopPLogitsWarper keep: ties with the k-th token stay.
    """
    values, order = logits.sort(dim=-1, descending=True, stable=True)
    if 0 < top_k < values.shape[-1]:
        values = values.masked_fill(values < values[:, top_k - 1, None], -math.inf)
    weight = values.softmax(-1)
    if top_p < 1:
        tail = weight.flip(-1).cumsum(-1).flip(-1)  # of a token and all that are less likely
        cut = tail <= 1 - top_p
        cut[:, 0] = False
        weight = weight.masked_fill(cut, 0.0)
    return weight, order


@torch.no_grad()
def beam(
    step: Step, prompt: Tensor, *, beams: int, eos: int | Collection[int], max_new_tokens: int,
    length_penalty: float = 1.0, early_stopping: bool | Literal["never"] = False, returned: int = 1,
    forbid: Sequence[int] = (), stay: int = 0,
) -> list[list[Hypothesis]]:  # fmt: skip
    """Beam search with the rules of transformers' ``generate``.

    Each step finds the best (1 + number of end tokens) * beams continuations of a prompt. Of the
    first ``beams``, those that end join its finished texts, of which the ``beams`` best by score
    are kept; the best ``beams`` that do not end go on. In the last step all end. One beam is greedy
    search, whatever ``early_stopping`` says.

    Args:
        step, prompt, eos, max_new_tokens, forbid, stay: as for `greedy`. The tokens that are not
            forbidden add up to 1, as with transformers' ``renormalize_logits``.
        beams: texts kept per prompt.
        length_penalty: as in `Hypothesis.score`; more than 0 favours long texts.
        early_stopping: when a prompt with ``beams`` finished texts is done. True: at once. False:
            when its best running text scores no better at its present length than the worst of
            them. "never": when it would not even at the length most favourable to it.
        returned: how many texts per prompt, at most ``beams``.

    -> for each prompt its hypotheses, best first; fewer than ``returned`` if no more texts exist.
    """
    if not 1 <= returned <= beams:
        raise ValueError(f"returned is {returned}; it must be between 1 and beams ({beams})")
    if early_stopping not in (True, False, "never"):
        raise ValueError(f"early_stopping is {early_stopping!r}; it must be True, False or 'never'")
    stop, banned = _ids(prompt, eos, max_new_tokens, forbid)
    stops = set(stop.tolist())
    if beams == 1:
        early_stopping = True
    width = max(2, 1 + len(stops)) * beams  # of which at least `beams` do not end
    found: list[list[Hypothesis]] = [[] for _ in range(len(prompt))]
    live = list(range(len(prompt)))  # the prompts still in the batch, n of them
    ids, rows = prompt, None
    running = prompt.new_zeros(len(live), 1, dtype=torch.float32)  # log-probability, best first
    texts = prompt.new_full((len(live), 1, max_new_tokens), -1)  # their tokens, -1: none yet
    done = running.new_full((len(live), beams), -math.inf)  # scores of finished texts, best first
    done_texts = texts.expand(-1, beams, -1)
    closed = done[:, 0] > 0  # prompts that have ended: none yet
    row_of = torch.arange(len(live), device=prompt.device)
    for t in range(max_new_tokens):
        logits, r = _logits(step, ids, rows, banned), running.shape[1]  # r: 1, then beams
        score, parent, token = _extended(running, logits, width)
        texts = _take(texts, parent)
        texts[:, :, t] = token
        ends = torch.isin(token, stop) | (t + 1 == max_new_tokens)
        ended = (score / (t + 1) ** length_penalty).masked_fill(~ends, -math.inf)[:, :beams]
        ended = ended.masked_fill(closed[:, None], -math.inf)
        done, best = torch.cat((done, ended), 1).topk(beams)
        done_texts = _take(torch.cat((done_texts, texts[:, :beams]), 1), best)
        running, best = score.masked_fill(ends, -math.inf).topk(beams)
        texts, parent, token = _take(texts, best), parent.gather(1, best), token.gather(1, best)

        length = max_new_tokens if early_stopping == "never" and length_penalty > 0 else t + 1
        worst = done[:, -1]  # -inf where fewer than `beams` are done
        over = ~(running[:, 0] / length**length_penalty > worst)
        over |= (worst > -math.inf) & (early_stopping is True)
        closed = closed | over
        if stay:
            rows = (row_of[:, None] * r + parent).flatten()
            ids = token.view(-1, 1)
            if (t + 1) % stay and t + 1 < max_new_tokens:
                continue
        leaves = closed.tolist()  # the one synchronisation
        if stay and not all(leaves):
            continue
        for i in (i for i, is_over in enumerate(leaves) if is_over):
            scored = zip(
                done_texts[i, :returned].tolist(), done[i, :returned].tolist(), strict=True
            )
            found[live[i]] = [
                _hypothesis(text, s, length_penalty, stops) for text, s in scored if s != -math.inf
            ]
        stays = [i for i, is_over in enumerate(leaves) if not is_over]
        if not stays:
            break
        live = [live[i] for i in stays]
        keep = torch.tensor(stays, device=prompt.device)
        rows = (keep[:, None] * r + parent[keep]).flatten()
        ids = token[keep].view(-1, 1)
        each = running, texts, done, done_texts, closed
        running, texts, done, done_texts, closed = (x[keep] for x in each)
    return found


def _extended(running: Tensor, logits: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best continuations of running texts (n, r) by a token, from logits (n * r, V).

    -> their log-probabilities, best first, the text each goes on from, and its token: (n, width).
    """
    (n, r), vocabulary = running.shape, logits.shape[-1]
    k = min(width, vocabulary)  # no more of one text's continuations can be among them
    at_once = ROWS if logits.device.type == "cpu" else len(logits)
    found = [_best(part, k) for part in logits.split(at_once)]
    chance, token = (torch.cat(parts) for parts in zip(*found, strict=True))
    total = (running.flatten()[:, None] + chance).view(n, -1)  # (n, r * k)
    if total.shape[1] < width:
        total = F.pad(total, (0, width - total.shape[1]), value=-math.inf)
    score, index = total.topk(width)
    index = index.clamp(max=r * k - 1)
    return score, index // k, token.view(n, -1).gather(1, index)


def _best(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens of rows (N, V): their log-probabilities, float32, and they, (N, k)."""
    wide = logits.float()
    best, token = _top(wide, k)
    return best - wide.logsumexp(-1, keepdim=True), token


def _top(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`topk` of rows (N, V), which a CPU takes from the blocks with the largest maxima.

    Of equal numbers at the k-th place it may be another one.
    """
    blocks = x.shape[1] // BLOCK
    if x.device.type != "cpu" or blocks <= k:
        return x.topk(k)
    end = blocks * BLOCK  # what is behind it is no whole block, and is always looked at
    largest = x[:, :end].unflatten(1, (blocks, BLOCK)).amax(-1)
    chosen = largest.topk(k).indices.sort().values  # (N, k): all of the k best are in these
    index = (chosen[:, :, None] * BLOCK + torch.arange(BLOCK)).flatten(1)
    index = torch.cat((index, torch.arange(end, x.shape[1]).expand(len(x), -1)), 1)
    best, place = x.gather(1, index).topk(k)
    return best, index.gather(1, place)


@torch.no_grad()
def _single(
    step: Step, prompt: Tensor, pick: Callable[[Tensor, Tensor, int], Tensor],
    eos: int | Collection[int], max_new_tokens: int, forbid: Sequence[int], stay: int,
) -> list[Hypothesis]:  # fmt: skip
    """One text per prompt; ``pick(logits (n, V), prompts (n,), position)`` chooses (n,) tokens."""
    stop, banned = _ids(prompt, eos, max_new_tokens, forbid)
    texts = prompt.new_full((len(prompt), max_new_tokens), -1)
    total = prompt.new_zeros(len(prompt), dtype=torch.float32)
    live = torch.arange(len(prompt), device=prompt.device)  # (n,) the prompts still in the batch
    closed = live < 0  # with `stay`: which have ended
    ids, rows = prompt, None
    for t in range(max_new_tokens):
        logits = _logits(step, ids, rows, banned).float()  # (n, V)
        token = pick(logits, live, t)
        chance = logits.log_softmax(-1).gather(-1, token[:, None])[:, 0]
        if stay:
            texts[:, t] = token.masked_fill(closed, -1)
            total += chance.masked_fill(closed, 0.0)
            closed = closed | torch.isin(token, stop)
            rows, ids = live, token[:, None]
            if (t + 1) % stay == 0 and bool(closed.all()):  # the synchronisation
                break
            continue
        texts[live, t] = token
        total[live] += chance
        rows = (~torch.isin(token, stop)).nonzero()[:, 0]  # the one synchronisation
        if not len(rows):
            break
        live, ids = live[rows], token[rows, None]
    stops, means = set(stop.tolist()), total / (texts >= 0).sum(-1)
    scored = zip(texts.tolist(), means.tolist(), strict=True)
    return [_hypothesis(text, score, 1.0, stops) for text, score in scored]


def _ids(
    prompt: Tensor, eos: int | Collection[int], max_new_tokens: int, forbid: Sequence[int]
) -> tuple[Tensor, Tensor]:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    ends = {eos} if isinstance(eos, int) else set(eos)
    return prompt.new_tensor(sorted(ends)), prompt.new_tensor(list(forbid))


def _logits(step: Step, ids: Tensor, rows: Tensor | None, banned: Tensor) -> Tensor:
    logits = step(ids, rows)
    return logits.index_fill(-1, banned, -math.inf) if len(banned) else logits


def _take(texts: Tensor, index: Tensor) -> Tensor:
    """(n, a, L) texts, (n, b) which of the a -> (n, b, L)."""
    return texts.take_along_dim(index[:, :, None], 1)


def _hypothesis(
    text: list[int], score: float, length_penalty: float, stops: set[int]
) -> Hypothesis:
    text = [token for token in text if token >= 0]
    finished = text[-1] in stops
    logprob = score * len(text) ** length_penalty
    return Hypothesis(text[:-1] if finished else text, score, logprob, finished)
