"""Reranking: a search model chooses among the texts that beam search found for a picture.

The likeliest caption is often a safe one, which would fit many pictures. Of the beams' texts the
one with the highest

    mean log-probability per token + WEIGHT * cosine similarity of text and picture

is taken, so that the two models have to agree. It is not in the papers. The picture is not read
anew: the search model's image encoder has to be the captioner's own, and what its projection reads
is a part of what the captioner has seen.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tinyvl import UserError
from tinyvl.decode import Hypothesis

if TYPE_CHECKING:
    from tinyvl.decode import Style
    from tinyvl.lilt import LilT

WEIGHT = 2.0  # of the similarity
NONE = "none"  # the name of no search model


def reranker(config: dict[str, Any], asked: str | None, style: "Style") -> str:
    """The name of the search model that reranks for a captioner of this ``config.json``.

    ``asked``: what the user named; None: what the config says. UserError: the search has no beams.
    """
    if style.sampling is None and style.beams > 1:
        return asked or config.get("rerank") or NONE
    if asked not in (None, NONE):
        how = "--sample" if style.sampling is not None else "--beams 1"
        raise UserError(f"--rerank chooses among beams: leave it or {how} out.", 2)
    return NONE


def check_encoders(captioner: dict[str, Any], search: dict[str, Any], name: str) -> None:
    """Raises a UserError where two configs' pictures are not the same to their encoders."""
    mine, other = captioner["vision"], search["image"]
    same = all(mine.get(key) == other.get(key) for key in ("sha256", "fit"))
    if not same or mine.get("modality", "image") != "image":
        raise UserError(
            f"--rerank {name}: it reads pictures by {other['name']} ({other['fit']}), this model "
            f"by {mine['name']} ({mine['fit']}); give a search model on the same encoder, or "
            f"--rerank {NONE}.",
            2,
        )


class Reranker:
    """A search model that says how well texts fit a picture which a captioner has seen."""

    def __init__(self, model: "LilT", name: str, size: int | None):
        """``size``: of the captioner's pictures. UserError: the model's encoder is not as it was,
        or reads pictures of another size.
        """
        if model.encoder.learns:
            raise UserError(f"--rerank {name}: its image encoder was changed in training.", 2)
        if model.encoder.size != size:
            side = model.encoder.size
            message = f"it reads pictures of {side} pixels, this model of {size}"
            raise UserError(f"--rerank {name}: {message}.", 2)
        self.model = model
        self.cells = model.encoder.tokens(model.encoder.probe().to(model.device)).shape[1]

    @torch.no_grad()
    def similarities(self, tokens: Tensor, texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """The cosine similarities of pictures and of each one's texts.

        ``tokens`` (I, S, D) are the captioner's: the encoder's last map comes first, in tokens
        (an enlarged picture's follow) and in numbers (lower maps' follow). UserError: they are
        something else.
        """
        width = self.model.encoder.width
        if tokens.shape[1] < self.cells or tokens.shape[2] < width:
            raise UserError(
                "These features do not have the picture's tokens, which reranking reads: leave out "
                f"--features, or give --rerank {NONE}.",
                2,
            )
        pictures = self.model.image_vectors(tokens[:, : self.cells, :width])
        vectors = self.model.embed_texts([text for own in texts for text in own])
        parts = vectors.split([len(own) for own in texts])
        return [(own @ picture).tolist() for own, picture in zip(parts, pictures, strict=True)]

    def best(
        self, tokens: Tensor, found: list[list[Hypothesis]], texts: Sequence[Sequence[str]]
    ) -> list[Hypothesis]:
        """Of each picture's hypotheses, whose ``texts`` these are, the best by both models."""
        return [
            max(zip(own, close, strict=True), key=lambda p: p[0].mean_logprob + WEIGHT * p[1])[0]
            for own, close in zip(found, self.similarities(tokens, texts), strict=True)
        ]
