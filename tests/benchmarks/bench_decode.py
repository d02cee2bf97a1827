"""Decoding 12-megapixel JPEGs: decode_images against a plain loop and torch's DataLoader.

    python tests/benchmarks/bench_decode.py [--images 48] [--workers N] [--target 260]

Peers decode every picture whole or as `load_image` does; a DataLoader has as many workers.
"""

import io
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timing import Report, Ways, alternate, parser
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
    options = parser(__doc__)
    options.add_argument("--images", type=int, default=48)
    options.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1))
    options.add_argument("--target", type=int, default=260)
    options = options.parse_args()
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
        peers: Ways = {
            "whole, plain loop": lambda: map(whole, paths),
            "whole, DataLoader": lambda: loader(whole),
            "load_image, plain loop": lambda: map(draft, paths),
            "load_image, DataLoader": lambda: loader(draft),
        }
        report = Report("decoding", options)
        for count in (workers, 0):
            own = {
                "decode_images": lambda n=count: decode_images(
                    paths, transform, target=target, workers=n
                )
            }
            ways = {
                name: lambda way=way: all(True for _ in way())
                for name, way in (own | peers).items()
                if count or not name.endswith("DataLoader")
            }
            taken = alternate(ways, options, warm=False)
            case = f"12 megapixels to {target}, {count} workers"
            report.speed(case, taken, "decode_images", len(paths), "pictures")
        report.show()


if __name__ == "__main__":
    main()
