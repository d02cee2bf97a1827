"""Zero-shot classification: which of some names fits a picture best, with which probability.

The names go into prompts (`classes.templates`), the prompts through the text tower; a picture's
probabilities are the softmax of its products with them, divided by the model's temperature: what
the model was trained to make right, with the names in the place of a batch's captions.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from tinyvl import UserError, media
from tinyvl.indexing import embed_images
from tinyvl.write import gathered


def read_labels(given: str) -> list[str]:
    """The lines of a file, or names between commas; each once.

    Raises:
        UserError: fewer than two.
    """
    file = Path(given)
    try:
        parts = file.read_text(encoding="utf-8-sig").splitlines() if is_file(file) else None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{given}: not a list of labels, a line each ({error}).", 2) from error
    parts = given.split(",") if parts is None else parts
    labels = list(dict.fromkeys(" ".join(part.split()) for part in parts))
    labels = [label for label in labels if label]
    if len(labels) < 2:
        raise UserError(
            f"--labels takes two names or more, between commas or a line each in a file; {given!r} "
            f"{'is no file and ' if not is_file(file) else ''}has {len(labels)}.",
            2,
        )
    return labels


def is_file(file: Path) -> bool:
    try:
        return file.is_file()
    except (OSError, ValueError):  # too long for a path
        return False


def classify(
    model: Any,
    paths: Iterable[str],
    labels: list[str],
    classes: Tensor,
    *,
    top: int = 1,
    batch: int = 16,
    workers: int | None = None,
) -> Iterator[tuple[str, list[tuple[str, float]] | UserError]]:
    """(path, the ``top`` likeliest labels with their probabilities, or what is wrong), in order.

    Args:
        classes: a unit vector for each label (C, d), from `metrics.class_embeddings`.
    """
    classes, temperature = classes.float().cpu(), float(model.temperature)
    encoder = model.encoder
    decoded = media.decode_images(paths, encoder.transform(), target=encoder.size, workers=workers)
    for group in gathered(decoded, batch):
        good = [picture for _, picture in group if isinstance(picture, Tensor)]
        found = iter(())
        if good:
            vectors = torch.from_numpy(embed_images(model, good, len(good)))  # (B, d)
            chances = (vectors @ classes.T / temperature).softmax(dim=1)  # (B, C)
            found = zip(*chances.topk(min(top, len(labels))), strict=True)
        for path, picture in group:
            if isinstance(picture, Tensor):
                values, which = next(found)
                yield path, [(labels[i], p) for i, p in zip(which, values.tolist(), strict=True)]
            else:
                yield path, picture


def write(
    results: Iterable[tuple[str, list[tuple[str, float]] | UserError]],
    stream: TextIO,
    *,
    as_json: bool,
    bare: bool,
) -> int:
    """A line a label, as they come; what failed goes to standard error. -> the exit status.

    ``bare``: without the path (one input); else ``path<TAB>label<TAB>probability``.
    """
    status = 0
    for path, found in results:
        lines = []
        if isinstance(found, UserError):
            status = 1
            print(f"tinyvl: {found}", file=sys.stderr)
            lines = [{"path": path, "error": str(found)}] if as_json else []
        else:
            for rank, (label, chance) in enumerate(found, 1):
                fields = {"path": path, "label": label, "probability": round(chance, 6)}
                lines.append(fields | {"rank": rank})
        for i, fields in enumerate(lines):
            if as_json:
                lines[i] = json.dumps(fields, ensure_ascii=False)
            else:
                text = f"{fields['label']}\t{fields['probability']:.4f}"
                lines[i] = text if bare else f"{path}\t{text}"
        if lines:  # all of a picture's at once: --resume finds whole pictures
            print("\n".join(lines), file=stream, flush=True)
    return status
