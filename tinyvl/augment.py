"""Views of a picture: what training sees beside the picture itself.

An augmentation here is a function of the picture, the seed and the number of the view, and of
nothing else, so that a resumed run, a cached one and one with other workers see the same.
"""

import io
import random
import zlib
from collections.abc import Callable

from PIL import Image, ImageEnhance, ImageFilter
from torch import Tensor


class View:
    """A view of an upright RGB picture, then the encoder's own transform. Picklable.

    View 0 is the picture itself. In the others most of it is kept, for a caption speaks of all of
    it: a crop of 60 to 100 % of the area, perhaps mirrored, its light, sharpness and compression
    changed. The last two matter where all training pictures come from one small public set: the
    modules learn its very JPEG artefacts, and a sharp photo is outside of all they have seen.
    """

    def __init__(self, transform: Callable[[Image.Image], Tensor], view: int, seed: int = 0):
        self.transform, self.view, self.seed = transform, view, seed

    def __call__(self, picture: Image.Image) -> Tensor:
        if self.view:
            content = zlib.crc32(picture.tobytes())
            picture = vary(picture, random.Random(f"{self.seed}/{self.view}/{content}"))
        return self.transform(picture)


def vary(picture: Image.Image, rng: random.Random) -> Image.Image:
    """A random view of the same picture; its size may change."""
    area, aspect = rng.uniform(0.6, 1.0), rng.uniform(0.85, 1.18)
    width = min(1.0, (area * aspect) ** 0.5)
    height = min(1.0, area / width)
    left, top = rng.uniform(0, 1 - width), rng.uniform(0, 1 - height)
    box = (left, top, left + width, top + height)
    box = tuple(share * side for share, side in zip(box, picture.size * 2, strict=True))
    longest = rng.uniform(128, 256)  # finer detail is lost in some views
    scale = min(1.0, longest / max(box[2] - box[0], box[3] - box[1]))
    size = (max(1, round((box[2] - box[0]) * scale)), max(1, round((box[3] - box[1]) * scale)))
    picture = picture.resize(size, Image.Resampling.BICUBIC, box)
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
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=round(rng.uniform(30, 95)))
        picture = Image.open(file).convert("RGB")
    return picture
