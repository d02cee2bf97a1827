"""Varied views of a picture, for training.

A view depends only on the picture, the seed and the number of the view or epoch. So a resumed
run, a run with a cache and one with other workers see the same.
"""

import io
import math
import random
import zlib
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from PIL.Image import Resampling
from torch import Tensor

GREY = (128, 128, 128)


def content(picture: Image.Image) -> int:
    """A checksum that tells a picture from others."""
    return zlib.crc32(picture.tobytes())


class Varied:
    """A transform of pictures that depends on what is in them: RGB -> uint8 (3, H, W). Picklable.

    All frames of a clip are given one ``content``: so `vary` does the same to each.
    """

    vary: Callable[[Image.Image, int], Tensor]

    def __call__(self, picture: Image.Image) -> Tensor:
        return self.vary(picture, content(picture))


def as_jpeg(picture: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


class SmallJpeg:
    """A larger picture as a JPEG of 256 x 256 pixels, quality 75; then a transform. Picklable.

    Small public sets are such files, and modules trained on them alone come to need the traces
    of compression: without them, a sharp photo is unlike anything they have seen.
    """

    def __init__(self, transform: Callable[[Image.Image], Tensor]):
        self.transform = transform

    def __call__(self, picture: Image.Image) -> Tensor:
        if max(picture.size) > 256:
            picture = as_jpeg(picture.resize((256, 256), Resampling.LANCZOS), 75)
        return self.transform(picture)


class Thin:
    """The middle of a very thin picture, any other as it is; then a centre crop. Picklable.

    The crop first enlarges the short side: 1 x 30,000 pixels would take gigabytes for ends that it
    then drops. What is cut off here leaves its pixels and their neighbours.
    """

    def __init__(self, transform: Callable[[Image.Image], Tensor], thin: int = 64, kept: int = 8):
        self.transform, self.thin, self.kept = transform, thin, kept

    def __call__(self, picture: Image.Image) -> Tensor:
        width, height = picture.size
        short = min(width, height)
        if max(width, height) > self.thin * short:
            cut = [max(0, side - self.kept * short) // 2 for side in picture.size]
            picture = picture.crop((cut[0], cut[1], width - cut[0], height - cut[1]))
        return self.transform(picture)


class View(Varied):
    """A varied view of an upright RGB picture, then the encoder's own transform.

    View 0 is the picture itself. The others keep most of it, as a caption speaks of all of it: a
    crop of 60 to 100 % of the area, perhaps mirrored, with other light, and with other sharpness
    and compression, which matter for the reason that `SmallJpeg` gives. The longer side has 128 to
    256 pixels; with ``coarsest`` pixels, that many to 256, most of them few.
    """

    def __init__(
        self, transform: Callable[[Image.Image], Tensor], view: int, seed: int = 0,
        coarsest: int | None = None,
    ):  # fmt: skip
        self.transform, self.view, self.seed, self.coarsest = transform, view, seed, coarsest

    def vary(self, picture: Image.Image, content: int) -> Tensor:
        if self.view:
            rng = random.Random(f"{self.seed}/{self.view}/{content}")
            picture = vary(picture, rng, self.coarsest)
        return self.transform(picture)


class RandomCrop(Varied):
    """A new view in every epoch: a random crop, mirrored or not, and two operations.

    The crop is ``area`` (LilT 0.2, eP-ALM 0.5) to all of the picture, with an aspect of 3/4 to
    4/3, resized bicubically. Then RandAugment (https://arxiv.org/abs/1909.13719) with N = 2, M = 7
    picks from the operations that leave colours alone; each is done with a chance of one half, as
    in LilT's and eP-ALM's code.
    """

    def __init__(self, size: int, epoch: int, seed: int = 0, area: float = 0.2):
        self.size, self.epoch, self.seed, self.area = size, epoch, seed, area

    def vary(self, picture: Image.Image, content: int) -> Tensor:
        rng = random.Random(f"{self.seed}/{self.epoch}/{content}/crop")
        box = random_box(*picture.size, rng, self.area)
        picture = picture.resize((self.size, self.size), Resampling.BICUBIC, box)
        if rng.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        for operation in rng.choices(OPERATIONS, k=2):
            if rng.random() < 0.5:
                picture = operation(picture, 0.7, rng.choice((-1, 1)))
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def vary(picture: Image.Image, rng: random.Random, coarsest: int | None = None) -> Image.Image:
    """A random view of the same picture; its size may change."""
    area, aspect = rng.uniform(0.6, 1.0), rng.uniform(0.85, 1.18)
    width = min(1.0, (area * aspect) ** 0.5)
    height = min(1.0, area / width)
    left, top = rng.uniform(0, 1 - width), rng.uniform(0, 1 - height)
    box = (left, top, left + width, top + height)
    box = tuple(share * side for share, side in zip(box, picture.size * 2, strict=True))
    longest = rng.uniform(128, 256)  # finer detail is lost in some views
    if coarsest is not None:
        share = rng.random()
        longest = coarsest ** (1 - share) * 256**share
    scale = min(1.0, longest / max(box[2] - box[0], box[3] - box[1]))
    size = (max(1, round((box[2] - box[0]) * scale)), max(1, round((box[3] - box[1]) * scale)))
    picture = picture.resize(size, Resampling.BICUBIC, box)
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        picture = enhance(picture).enhance(rng.uniform(0.75, 1.25))
    kind = rng.random()
    if kind < 0.4:
        picture = picture.filter(ImageFilter.UnsharpMask(1.5, round(rng.uniform(50, 200)), 0))
    elif kind < 0.6:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.2)))
    if rng.random() < 0.5:
        picture = as_jpeg(picture, round(rng.uniform(30, 95)))
    return picture


def random_box(
    width: int, height: int, rng: random.Random, least: float = 0.2
) -> tuple[float, float, float, float]:
    """A box (left, top, right, bottom) of ``least`` to 1 of the area, as torchvision draws it."""
    for _ in range(10):
        area = width * height * rng.uniform(least, 1.0)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def warp(picture: Image.Image, *matrix: float) -> Image.Image:
    """An affine map (2 x 3) from each pixel to its source; grey outside of the picture."""
    affine = Image.Transform.AFFINE
    return picture.transform(picture.size, affine, matrix, Resampling.BILINEAR, fillcolor=GREY)


OPERATIONS: tuple[Callable[[Image.Image, float, int], Image.Image], ...] = (
    lambda picture, m, sign: picture,
    lambda picture, m, sign: ImageOps.autocontrast(picture),
    lambda picture, m, sign: ImageOps.equalize(picture),
    lambda picture, m, sign: ImageEnhance.Brightness(picture).enhance(0.1 + 1.8 * m),
    lambda picture, m, sign: ImageEnhance.Sharpness(picture).enhance(0.1 + 1.8 * m),
    lambda picture, m, sign: warp(picture, 1, sign * 0.3 * m, 0, 0, 1, 0),  # shear
    lambda picture, m, sign: warp(picture, 1, 0, 0, sign * 0.3 * m, 1, 0),
    lambda picture, m, sign: warp(picture, 1, 0, sign * 10 * m, 0, 1, 0),  # 7 pixels
    lambda picture, m, sign: warp(picture, 1, 0, 0, 0, 1, sign * 10 * m),
    lambda picture, m, sign: picture.rotate(sign * 30 * m, Resampling.BILINEAR, fillcolor=GREY),
)
