"""tinyvl from Python: what `tinyvl.load` and `tinyvl.open_index` give.

What the commands do, by the same functions: a picture that is named by its path gets the same
caption, answer, vector and score. Errors are `UserError`s of one sentence.
"""

import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path as Folder
from typing import Any, NamedTuple, TypedDict, Unpack

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tinyvl import UserError, media, media_workers, models, write
from tinyvl.decode import Style
from tinyvl.device import Pieces, choose_device, choose_precision
from tinyvl.text import ANSWERS

Path = str | os.PathLike[str]
Picture = Path | Image.Image | Tensor  # a tensor: (3, H, W), uint8, or floats between 0 and 1


class Said(NamedTuple):
    """A caption or an answer."""

    text: str
    score: float  # mean log-probability per token
    choices: dict[str, float] | None = None  # the probability of each, where there were some


class Search(TypedDict, total=False):
    """How texts are searched for; see `decode.Style`."""

    beams: int
    max_tokens: int
    length_penalty: float
    early_stopping: Any
    sampling: dict[str, Any] | None  # {"temperature": 0.7, "top_p": 0.9, "seed": 1}


class Model:
    """A model of one task. Pictures are one or many: paths, PIL images or tensors.

    ``batch`` pictures are in the model at once, fewer where memory is short; ``workers`` processes
    decode files ahead (0: this one). A picture that cannot be read raises a UserError.
    """

    def __init__(
        self, name: Path, task: str | None, device: Any, precision: str | None,
        rerank: str | None = None,
    ):  # fmt: skip
        checkpoint = models.open_checkpoint(os.fspath(name), task or "caption")
        self.task = task or checkpoint.task
        place = choose_device(None if device is None else str(device))
        dtype = choose_precision(precision, place)
        self.model = models.load(
            checkpoint, task=self.task, device=place, precision=dtype, rerank=rerank
        )
        self.pieces = Pieces(advice=write.ADVICE)

    def caption(
        self, images: Picture | Iterable[Picture], *, batch: int = 16, workers: int = 0,
        **search: Unpack[Search],
    ) -> list[Said]:  # fmt: skip
        """A caption of each picture, as `tinyvl caption` writes it."""
        self.check("caption")
        style, out = Style(**search), []
        for group in grouped(self.inputs(images, workers), batch):
            out += write.run(self.model, group, style, self.pieces)
        return [Said(*found) for found in out]

    def answer(
        self, images: Picture | Iterable[Picture], questions: str | Iterable[str], *,
        choices: Iterable[str] | None = None, batch: int = 16, workers: int = 0,
        **search: Unpack[Search],
    ) -> list[Said]:  # fmt: skip
        """An answer about each picture, as `tinyvl ask` gives it.

        Args:
            questions: one for all pictures, or one each.
            choices: the likeliest of these is the answer.
        """
        self.check("vqa")
        options: Any = ANSWERS | search
        style = Style(**options) if choices is None else None
        more = () if choices is None else (list(dict.fromkeys(choices)),)
        pictures = several(images)
        asked = [questions] * len(pictures) if isinstance(questions, str) else list(questions)
        if len(asked) != len(pictures):
            raise UserError(f"{len(asked)} questions for {len(pictures)} pictures.", 2)
        pairs, out = zip(self.inputs(pictures, workers), asked, strict=True), []
        items = ((*picture, question, *more) for picture, question in pairs)
        for group in grouped(items, batch):
            out += write.run(self.model, group, style, self.pieces)
        return [Said(*found) for found in out]

    def embed_images(
        self, images: Picture | Iterable[Picture], *, batch: int = 16, workers: int = 0
    ) -> Tensor:
        """Unit vectors (N, d) of pictures, float32 on the CPU, as `tinyvl index` keeps them."""
        from tinyvl.index import embed_images

        self.check("retrieve")
        groups = grouped(self.inputs(images, workers), batch)
        tensors = ([picture for _, picture in group] for group in groups)
        out = [embed_images(self.model, group, batch, self.pieces) for group in tensors]
        return torch.from_numpy(np.concatenate(out)) if out else torch.empty(0, self.model.width)

    def embed_texts(self, texts: str | Iterable[str], *, batch: int = 256) -> Tensor:
        """Unit vectors (N, d) of texts, float32 on the CPU, as `tinyvl retrieve` looks for them."""
        from tinyvl.index_source import one_line

        self.check("retrieve")
        lines = [one_line(text) for text in ([texts] if isinstance(texts, str) else texts)]
        return self.model.embed_texts(lines, batch=batch).float().cpu()

    def check(self, task: str) -> None:
        if self.task != task:
            does, wanted = models.DOES[self.task], models.DOES[task]
            load = f'tinyvl.load("default", task="{task}") gives one'
            raise UserError(f"This model is to {does}; to {wanted}, {load}.", 2)

    def inputs(
        self, images: Picture | Iterable[Picture], workers: int
    ) -> Iterator[tuple[str, Tensor]]:
        """A name of each picture, and the encoder's input."""
        pictures, encoder = several(images), self.model.encoder
        view = encoder.view()
        paths = [os.fspath(each) for each in pictures if isinstance(each, (str, os.PathLike))]
        decoded = media_workers.decode_images(paths, view, target=encoder.size, workers=workers)
        for number, picture in enumerate(pictures):
            if isinstance(picture, (str, os.PathLike)):
                name, found = next(decoded)
                if isinstance(found, UserError):
                    raise found
                yield name, found
            elif encoder.modality == "audio":
                raise UserError("This model reads sounds: give it the paths of their files.", 2)
            else:
                yield str(number), view(in_memory(picture))


def several(images: Picture | Iterable[Picture]) -> list[Any]:
    single = isinstance(images, Tensor) and images.ndim == 3
    one = single or isinstance(images, (str, os.PathLike, Image.Image))
    return [images] if one else list(images)  # type: ignore[arg-type]


def in_memory(picture: Image.Image | Tensor) -> Image.Image:
    """A picture that is no file, upright and in RGB."""
    if isinstance(picture, Image.Image):
        return media.upright(picture.copy())
    if picture.ndim != 3 or len(picture) != 3:
        raise UserError(f"A picture's tensor is (3, H, W), not {tuple(picture.shape)}.", 2)
    if picture.is_floating_point():
        if not 0 <= float(picture.min()) <= float(picture.max()) <= 1:
            raise UserError("A picture of floats has numbers between 0 and 1.", 2)
        picture = (255 * picture).round()
    return Image.fromarray(picture.to("cpu", torch.uint8).permute(1, 2, 0).contiguous().numpy())


def grouped(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while group := list(islice(items, size)):
        yield group


class Hit(NamedTuple):
    """A result of a search."""

    path: str
    score: float  # the cosine of the angle between the query and the picture


class Searcher:
    """An index, and the model that made it; of its towers those that were needed so far."""

    def __init__(self, folder: Path, model: Path | None, device: Any):
        from tinyvl import search_open
        from tinyvl.index import Index, read_about

        given = os.fspath(folder)
        inside = read_about(Folder(given)) is None  # a folder of pictures, its index hidden in it
        self.index = Index(Folder(given) / search_open.HIDDEN if inside else Folder(given))
        self.shown = search_open.shown(self.index, given if inside else None)
        self.about: dict[str, Any] = self.index.about or {}
        self.name = self.about["model"] if model is None else os.fspath(model)
        self.device = choose_device(None if device is None else str(device))
        self.sides: dict[str, Any] = {}

    def search(
        self, text: str | None = None, *, image: Path | None = None, k: int = 10,
        threshold: float | None = None,
    ) -> list[Hit]:  # fmt: skip
        """The ``k`` pictures (0: all) most like a text, or like the picture ``image``, best first.

        ``threshold``: those that score less are left out.
        """
        from tinyvl.search import Query, answers

        if (text is None) == (image is None):
            raise UserError("search takes a text or an image.", 2)
        query = Query(text or "") if image is None else Query(os.fspath(image), True)
        model = self.side("image" if query.picture else "text")
        found = answers(self.index, model, [query], k=k, threshold=threshold, show=self.shown)
        hits = next(found)
        if isinstance(hits, UserError):
            raise hits
        return [Hit(hit.path, hit.score) for hit in hits]

    def side(self, side: str) -> Any:
        """The model with this tower."""
        if side not in self.sides:
            from tinyvl.files import local
            from tinyvl.index import check_model

            name = local(self.name)
            model = models.load(name, task="retrieve", device=self.device, sides=[side])
            check_model(self.index.folder, self.about, model, name)
            self.sides[side] = model
        return self.sides[side]
