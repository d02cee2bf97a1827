"""Random crops and operations on pictures, as LilT trains on them."""

import random

import numpy as np
import torch
from PIL import Image

from tinyvl import media_augment


def photo(width: int, height: int) -> Image.Image:
    rng = np.random.Generator(np.random.PCG64(0))
    small = rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def test_a_crop_is_a_function_of_seed_epoch_and_picture():
    picture = photo(120, 90)
    one = media_augment.RandomCrop(64, epoch=3, seed=1)(picture)
    assert one.shape == (3, 64, 64)
    assert one.dtype == torch.uint8
    assert torch.equal(one, media_augment.RandomCrop(64, epoch=3, seed=1)(picture.copy()))
    others = [(64, 4, 1), (64, 3, 2)]
    assert not any(torch.equal(one, media_augment.RandomCrop(*other)(picture)) for other in others)


def test_crops_have_the_area_and_aspect_of_random_resized_crops():
    rng = random.Random(0)
    for width, height in ((640, 480), (100, 300), (30, 30)):
        boxes = [media_augment.random_box(width, height, rng) for _ in range(300)]
        for left, top, right, bottom in boxes:
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height
        areas = [(r - x) * (b - y) / width / height for x, y, r, b in boxes]
        assert min(areas) > 0.15
        if width > 100:
            assert min(areas) < 0.25
            assert max(areas) > 0.9
            assert 0.5 < sum(areas) / 300 < 0.65


def test_the_operations_are_randaugments():
    picture = photo(64, 64)
    x = np.asarray(picture).astype(int)
    done = [operation(picture, 0.7, 1) for operation in media_augment.OPERATIONS]
    same, contrast, equal, bright, sharp, shear_x, shear_y, move_x, move_y, turned = (
        np.asarray(p).astype(int) for p in done
    )
    assert (same == x).all()
    assert contrast.min() == 0
    assert contrast.max() == 255
    assert equal.std() > x.std() * 0.9
    assert abs(bright - (x * 1.36).clip(0, 255)).max() <= 1  # 0.1 + 1.8 x 7/10
    assert abs(np.diff(sharp, axis=0)).mean() > abs(np.diff(x, axis=0)).mean()
    assert (move_x[:, :-7] == x[:, 7:]).all()  # seven pixels
    assert (move_x[:, -6:] == 128).all()
    assert (move_y[:-7] == x[7:]).all()
    assert abs(shear_x[0] - x[0]).mean() < 3  # the edge it turns about
    assert abs(shear_y[:, 0] - x[:, 0]).mean() < 3
    assert abs(shear_x[-8] - x[-8]).mean() > 10
    assert (turned[0, 0] == 128).all()
    assert abs(turned[32, 32] - x[32, 32]).max() < 40


def test_coarse_views_lose_detail_and_others_stay_as_they_were():
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (300, 200, 3), dtype=np.uint8))
    sizes = {}
    for coarsest in (None, 32):
        views = [media_augment.vary(noise, random.Random(f"{i}"), coarsest) for i in range(200)]
        sizes[coarsest] = [max(view.size) for view in views]
    assert 127 <= min(sizes[None]) <= max(sizes[None]) <= 256
    assert 31 <= min(sizes[32]) < 40
    assert 200 < max(sizes[32]) <= 256
    assert np.median(sizes[32]) < 110  # as many below 91 as above
    one, same, coarse = (
        media_augment.View(lambda p: torch.tensor(p.size), 1, 0, c)(noise) for c in (None, None, 32)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, coarse)
    assert media_augment.View(lambda p: p, 0, 0, 32)(noise) is noise  # the picture itself
