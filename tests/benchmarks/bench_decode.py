"""Decoding 12-megapixel JPEGs: decode_images against a plain loop and torch's DataLoader.

    python tests/benchmarks/bench_decode.py [--images 48] [--workers N] [--target 260]

Prints pictures per second, and the ratio to the plain loop that decodes every picture whole.
"""

import argparse
import io
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from tinyvl.media import load_image
from tinyvl.media_workers import decode_images


def photo(seed: int) -> bytes:
    """A JPEG of 4000 x 3000 pixels and about 3 MB: noise at every scale, as in a photograph."""
    rng = np.random.default_rng(seed)
    total = np.zeros((3000, 4000, 3), np.float32)
    for octave in (4, 16, 64, 256, 1024, 3000):
        noise = rng.integers(0, 256, (octave * 3 // 4, octave, 3), dtype=np.uint8)
        layer = Image.fromarray(noise).resize((4000, 3000), Image.Resampling.BICUBIC)
        total += np.asarray(layer, np.float32) / octave**0.4
    file = io.BytesIO()
    Image.fromarray((total * (255 / total.max())).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


class Transform:
    """Shortest side to ``target``, centre crop: uint8 (3, target, target)."""

    def __init__(self, target: int):
        self.target = target

    def __call__(self, image: Image.Image) -> torch.Tensor:
        scale = self.target / min(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        image = image.resize(size, Image.Resampling.BICUBIC)
        left, top = (image.width - self.target) // 2, (image.height - self.target) // 2
        image = image.crop((left, top, left + self.target, top + self.target))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (3, target, target)


class Folder(Dataset):
    def __init__(self, paths: list[str], load: Callable[[str], torch.Tensor]):
        self.paths, self.load = paths, load

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.load(self.paths[index])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--target", type=int, default=260)
    options = parser.parse_args()
    transform, target, workers = Transform(options.target), options.target, options.workers

    def whole(path: str) -> torch.Tensor:
        with Image.open(path) as image:
            return transform(image.convert("RGB"))

    def draft(path: str) -> torch.Tensor:
        return transform(load_image(path, target))

    def loader(load: Callable[[str], torch.Tensor]) -> Iterable[torch.Tensor]:
        return DataLoader(Folder(paths, load), batch_size=16, num_workers=workers)

    with tempfile.TemporaryDirectory() as folder:
        for i in range(4):
            Path(folder, f"{i}.jpg").write_bytes(photo(i))
        paths = [str(Path(folder, f"{i % 4}.jpg")) for i in range(options.images)]
        for path in paths[:4]:  # the disk cache and Pillow's plugins are warm
            whole(path)
        ways: dict[str, Callable[[], Iterable]] = {
            "plain loop, whole": lambda: map(whole, paths),
            "plain loop, load_image": lambda: map(draft, paths),
            f"DataLoader, whole, {workers} workers": lambda: loader(whole),
            f"DataLoader, load_image, {workers} workers": lambda: loader(draft),
            f"decode_images, {workers} workers": lambda: decode_images(
                paths, transform, target=target, workers=workers
            ),
            "decode_images, in process": lambda: decode_images(
                paths, transform, target=target, workers=0
            ),
        }
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        print(f"{options.images} JPEGs of 12 megapixels, shortest side {target}, {cores} cores")
        plain = 0.0
        for name, way in ways.items():
            start = time.perf_counter()
            for _ in way():
                pass
            rate = len(paths) / (time.perf_counter() - start)
            plain = plain or rate
            print(f"{name:40} {rate:7.1f} pictures/s   x{rate / plain:.2f}")


if __name__ == "__main__":
    main()
