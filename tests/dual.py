"""A dual encoder that fits in a page, and a command line that uses it: `python dual.py index …`."""

import os
import time
import zlib

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize

WIDTH, SIDE = 16, 8
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255,) * 3}


def transform(picture: Image.Image) -> torch.Tensor:
    small = picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1).contiguous()


class Encoder:
    size = SIDE

    def transform(self):
        return transform


class Dual:
    """Pictures through a fixed random matrix; the word of a colour means a picture of it."""

    width, temperature = WIDTH, torch.tensor(0.07)

    def __init__(self, fingerprint: str = "one"):
        self.fingerprint = fingerprint
        self.encoder = Encoder()
        rng = np.random.default_rng(0)
        matrix = rng.standard_normal((3 * SIDE * SIDE, WIDTH), dtype=np.float32)
        self.matrix = torch.from_numpy(matrix)
        self.seen: list[int] = []  # sizes of batches

    def embed_images(self, pictures: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(pictures))
        time.sleep(float(os.environ.get("DUAL_SLOW", 0)))
        return normalize((pictures.float() - 100).flatten(1) @ self.matrix, dim=1)

    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        return torch.stack([normalize(sum(map(self.word, t.split())), dim=0) for t in texts])

    def word(self, word: str) -> torch.Tensor:
        word = word.strip(".").lower()
        if word in COLOURS:
            picture = torch.tensor(COLOURS[word], dtype=torch.uint8).view(3, 1, 1)
            return self.embed_images(picture.expand(3, SIDE, SIDE)[None])[0]
        rng = np.random.default_rng(zlib.crc32(word.encode()))
        return 0.1 * torch.from_numpy(rng.standard_normal(WIDTH, dtype=np.float32))


if __name__ == "__main__":
    from tinyvl import cli, cli_search

    cli_search.load_model = lambda name, *rest, **more: Dual(os.environ.get("DUAL", "one"))
    cli.main()
