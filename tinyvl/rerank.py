"""Reranking: a search model chooses among the texts that beam search found for a picture.

The likeliest caption is often a safe one, which would fit many pictures. Of the beams' texts the
one with the highest

    mean log-probability per token + WEIGHT * cosine similarity of text and picture

is taken, so that the two models have to agree. It is not in the papers. The picture is not read
anew: the search model's image encoder has to be the captioner's own, and what its projection reads
is a part of what the captioner has seen (but for the second reading of a blurred picture).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tinyvl import UserError
from tinyvl.decode import Hypothesis
from tinyvl.files import local

if TYPE_CHECKING:
    from tinyvl.decode import Style
    from tinyvl.encoders import Encoder
    from tinyvl.lilt import LilT
    from tinyvl.models import Checkpoint

WEIGHT = 4.0  # of the similarity; of 0.5 to 16 the best on 800 validation photos
NONE = "none"  # the name of no search model


def reranker(found: "Checkpoint", asked: str | None, style: "Style", *, stored: bool) -> str:
    """The name of the search model that reranks for a captioner.

    ``asked``: what the user named; None: what the captioner's config says. ``stored``: pictures
    come from a feature cache. UserError: there are no beams to choose among, or the cache does not
    have what a search model reads.
    """
    asked = asked and local(asked)
    if style.sampling is not None or style.beams == 1:
        if asked not in (None, NONE):
            how = "--sample" if style.sampling is not None else "--beams 1"
            raise UserError(f"--rerank chooses among beams: leave it or {how} out.", 2)
        return NONE
    name = asked or found.config.get("rerank") or NONE
    if stored and name != NONE and found.reads == "summaries":
        raise UserError(
            "--rerank reads tokens, and this model's features are summaries: leave out --features, "
            f"or give --rerank {NONE}.",
            2,
        )
    return name


def check_encoders(
    captioner: dict[str, Any], encoder: "Encoder", search: "Checkpoint", name: str
) -> None:
    """Raises a UserError where ``search`` embeds no pictures, or not by the captioner's encoder."""
    mine, modality = captioner["vision"], captioner["vision"].get("modality", "image")
    if search.task != "retrieve":
        raise UserError(f"--rerank {name}: this is no search model.", 2)
    if modality != "image":
        raise UserError(f"--rerank is for pictures, and this model perceives {modality}.", 2)
    other = search.image
    if any(mine.get(key) != other.get(key) for key in ("sha256", "fit", "config")):
        raise UserError(
            f"--rerank {name}: it reads pictures by {other['name']} ({other['fit']}), this model "
            f"by {mine['name']} ({mine['fit']}); give a search model on the same encoder, or "
            f"--rerank {NONE}.",
            2,
        )
    options = search.config.get("options", {})
    tuning = options.get("image", {})
    trained = any(tuning.get(key, "none") != "none" for key in ("adapter", "unlock"))
    if trained or encoder.learns:
        raise UserError(f"--rerank {name}: an image encoder was changed in training.", 2)
    if options.get("size") not in (None, encoder.size):
        size = f"{options['size']} pixels, this model {encoder.size}"
        raise UserError(f"--rerank {name}: it takes pictures of {size}.", 2)


class Reranker:
    """A search model that says how well texts fit a picture which a captioner has seen."""

    def __init__(self, model: "LilT"):
        """``model``: built on the captioner's encoder."""
        self.model = model
        with torch.no_grad(), model.autocast():
            self.cells = model.encoder.cells(model.encoder.probe().to(model.device)).shape[1]

    @torch.no_grad()
    def similarities(self, tokens: Tensor, texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """The cosine similarities of pictures and of each one's texts.

        ``tokens`` (I, S, D) are the captioner's: the encoder's last map comes first, in tokens
        (an enlarged picture's follow) and in numbers (lower maps' follow).
        """
        seen = tokens[:, : self.cells, : self.model.encoder.width]
        pictures = self.model.image_vectors(seen)
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
