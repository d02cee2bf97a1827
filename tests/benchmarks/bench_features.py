"""Extraction of features against the bare encoder: what decoding, keeping and writing cost.

    python tests/benchmarks/bench_features.py [--vision NAME] [--fit FIT] [--data FOLDER]

The bare encoder reads uint8 pictures from memory, in the same blocks and with the same threads;
`extract` reads files and leaves a cache on disk. They take turns, in one process, so that what
else the machine does strikes both. Two ratios of speeds are printed: of wall-clock times, and of
CPU seconds, workers included. Where decoding has no core of its own the second is what the first
comes to on an idle machine; where it has, as beside a GPU, the first is the one to read.
The last line of each kind is the bound of the second ratio: with the encoder's and the decoder's
milliseconds of a core for a picture it is encoder / (encoder + decoder), whatever the program. For
0.9 the encoder has to take nine times as long as the decoder.
Small JPEGs are those of --data, or noise of 256 x 256 pixels; large ones have 12 megapixels.
"""

import argparse
import io
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from bench_decode import photo
from PIL import Image

from tinyvl import features, media, media_workers
from tinyvl.device import choose_device, choose_precision, keep_memory, precision_name
from tinyvl.presets import Run


def cpu() -> float:
    """CPU seconds of this process and of its workers that have ended."""
    own, children = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock and CPU seconds."""
    start, used = time.perf_counter(), cpu()
    work()
    return time.perf_counter() - start, cpu() - used


def sets(folder: Path, data: str | None, count: int) -> Iterator[tuple[str, list[str]]]:
    """The files of each kind of picture, ``count`` of them."""
    large = photo(0)
    small = io.BytesIO()
    Image.open(io.BytesIO(large)).resize((256, 256)).save(small, "JPEG", quality=75)
    for name, content in (("small JPEGs", small.getvalue()), ("12 megapixels", large)):
        if data and content is not large:
            yield f"{name} of {data}", list(media.expand([data]))[:count]
            continue
        (folder / name).mkdir()
        for i in range(count):
            if i:
                os.link(folder / name / "0.jpg", folder / name / f"{i}.jpg")
            else:
                (folder / name / "0.jpg").write_bytes(content)
        yield name, [str(folder / name / f"{i}.jpg") for i in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vision", default="EfficientNet-Lite2")
    parser.add_argument("--fit", default="crop")
    parser.add_argument("--data")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=features.BLOCK)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--device")
    options = parser.parse_args()
    keep_memory()
    device = choose_device(options.device)
    precision = choose_precision(None, device)
    vision, encoder = features.load_encoder(
        options.vision, options.fit, device=device, precision=precision
    )
    head = features.contents(vision, encoder)
    print(
        f"{options.vision}, {device} {precision_name(precision)}, {media_workers.cores()} cores, "
        f"{torch.get_num_threads()} threads, {options.images} pictures, {options.repeats} turns"
    )
    transform = encoder.transform()
    with tempfile.TemporaryDirectory() as root:
        for name, files in sets(Path(root), options.data, options.images):
            decoded = media_workers.decode_images(
                files, encoder.transform(), target=encoder.size, workers=options.workers
            )
            memory = torch.stack([picture for _, picture in decoded])

            def decode(files: list[str] = files) -> None:
                for path in files:
                    transform(media.load_image(path, encoder.size))

            def bare(memory: torch.Tensor = memory) -> None:
                for block in memory.split(options.batch):
                    features.percept(encoder, block)
                if device.type == "cuda":
                    torch.cuda.synchronize()

            def whole(turn: int, name: str = name, files: list[str] = files) -> None:
                out = Path(root, f"{name[:5]}-{turn}")
                run = Run(out, device, workers=options.workers, quiet=True)
                pictures = [(path, path) for path in files]
                features.extract(out, pictures, encoder, head, run, batch=options.batch)

            bare()
            turns = []
            for turn in range(options.repeats):
                turns.append((timed(bare), timed(lambda turn=turn: whole(turn))))
            for kind, i in (("wall clock", 0), ("CPU", 1)):
                ratio = statistics.median(b[i] / w[i] for b, w in turns)
                speeds = [
                    options.images / statistics.median(t[k][i] for t in turns) for k in (0, 1)
                ]
                print(
                    f"{name}, {kind}: bare {speeds[0]:.1f}, extraction {speeds[1]:.1f} "
                    f"pictures/s, ratio {ratio:.3f}"
                )
            bound = [statistics.median(t[0][1] for t in turns), timed(decode)[1]]
            each = [1000 * seconds / options.images for seconds in bound]
            print(
                f"{name}, of a core: encoder {each[0]:.1f} ms, decoder {each[1]:.1f} ms a picture, "
                f"so at most {each[0] / sum(each):.3f} where they share the cores"
            )


if __name__ == "__main__":
    main()
