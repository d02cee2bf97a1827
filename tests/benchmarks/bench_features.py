"""Extraction of features against the bare encoder: what decoding, keeping and writing cost.

    python tests/benchmarks/bench_features.py [--vision NAME] [--random] [--data FOLDER]

The bare encoder reads uint8 pictures from memory, in the same blocks and with the same threads:
timm's model as timm builds it, in the same precision, and tinyvl's own, whose layers are fewer
(`encoders_fold`, `packed`). `extract` reads files and leaves a cache on disk. They take turns, in
one process, so that what else the machine does strikes all. Two ratios of speeds are printed: of
wall-clock times, and of CPU seconds, workers included. Where decoding has no core of its own the
second is what the first comes to on an idle machine; where it has, as beside a GPU, the first is
the one to read.
The last line of each kind is the bound of the second ratio: with the encoder's and the decoder's
milliseconds of a core for a picture it is encoder / (encoder + decoder), whatever the program. For
0.9 of tinyvl's own encoder that has to take nine times as long as the decoder.
Workers are forked, and what this process writes first thereafter is copied page by page: in a
virtual machine half a second or more, which 100 pictures of a small encoder do not outweigh.
A plain loop opens each picture whole, encodes as many at once and saves the tokens; those of small
JPEGs are compared with the cache's first.
With --random the encoder, one of timm's, has random weights, which take as long as trained ones.
Small JPEGs are those of --data, or noise of 256 x 256 pixels; large ones have 12 megapixels.
"""

import io
import itertools
import json
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
from safetensors.torch import save_file
from timing import Report, parser, skewed

from tinyvl import features, hub, media, media_workers
from tinyvl.device import choose_device, choose_precision, keep_memory, precision_name
from tinyvl.encoders import build_timm
from tinyvl.models_build import build_encoder
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


def untrained(architecture: str, folder: Path) -> str:
    """A folder with random weights of one of timm's models."""
    config = {"architecture": architecture}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(build_timm(config).state_dict(), folder / "model.safetensors")
    return str(folder)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--vision", default="EfficientNet-Lite2")
    options.add_argument("--random", action="store_true")
    options.add_argument("--small", action="store_true", help="small JPEGs alone")
    options.add_argument("--fit", default="crop")
    options.add_argument("--data")
    options.add_argument("--images", type=int, default=256)
    options.add_argument("--batch", type=int, default=features.BLOCK)
    options.add_argument("--workers", type=int)
    options.add_argument("--device")
    options = options.parse_args()
    report = Report("features", options)
    keep_memory()
    device = choose_device(options.device)
    precision = choose_precision(None, device)
    with tempfile.TemporaryDirectory() as folder:
        name = untrained(options.vision, Path(folder)) if options.random else options.vision
        vision, encoder = features.load_encoder(
            name, options.fit, device=device, precision=precision
        )
        timms = build_encoder(vision, hub.fetch(name, "vision")).to(device).model.to(precision)
    head = features.contents(vision, encoder)
    print(
        f"{options.vision}, {device} {precision_name(precision)}, {media_workers.cores()} cores, "
        f"{torch.get_num_threads()} threads, {options.images} pictures, {options.repeats} turns"
    )
    transform = encoder.transform()
    number = itertools.count()
    with tempfile.TemporaryDirectory() as root:
        kinds = sets(Path(root), options.data, options.images)
        for name, files in itertools.islice(kinds, 1 if options.small else None):
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

            @torch.no_grad()
            def timm(memory: torch.Tensor = memory) -> None:
                for block in memory.split(options.batch):
                    x = encoder.normalised(block.to(device))
                    timms.forward_features(x.contiguous(memory_format=torch.channels_last))
                if device.type == "cuda":
                    torch.cuda.synchronize()

            def whole(turn: int, name: str = name, files: list[str] = files) -> None:
                out = Path(root, f"{name[:5]}-{turn}")
                run = Run(out, device, workers=options.workers, quiet=True)
                pictures = [(path, path) for path in files]
                features.extract(out, pictures, encoder, head, run, batch=options.batch)

            def plain(files: list[str] = files, name: str = name) -> None:
                kept = []
                for start in range(0, len(files), options.batch):
                    opened = (Image.open(path) for path in files[start : start + options.batch])
                    block = torch.stack([transform(image.convert("RGB")) for image in opened])
                    kept.append(features.percept(encoder, block).tokens.half().cpu())
                torch.save(torch.cat(kept), Path(root, f"{name[:5]}.pt"))

            ways = {
                "extraction": lambda: whole(next(number)),
                "bare encoder": timm,
                "tinyvl's own": bare,
                "loop": plain,
            }
            for way in ways.values():  # warm; and the results
                way()
            if name.startswith("small"):
                found = features.FeatureStore.open(Path(root, f"{name[:5]}-0"))
                expected = torch.load(Path(root, f"{name[:5]}.pt")).float()
                apart = skewed(found.tokens(range(len(files))).float(), expected)
                assert apart < 5e-3, apart
            taken = [{n: timed(way) for n, way in ways.items()} for _ in range(options.repeats)]
            for kind, i in (("wall clock", 0), ("CPU", 1)):
                seconds = {n: [turn[n][i] for turn in taken] for n in ways}
                case = f"{name}, {kind}"
                target = {"bare": 0.9, "tinyvl's": 0.9} if name.startswith("small") else {}
                report.speed(case, seconds, "extraction", len(files), "pictures", **target)
            bound = [statistics.median(turn["tinyvl's own"][1] for turn in taken), timed(decode)[1]]
            each = [1000 * seconds / len(files) for seconds in bound]
            report.add(
                f"{name}, of a core: encoder {each[0]:.1f} ms, decoder {each[1]:.1f} ms a picture",
                note=f"at most {each[0] / sum(each):.3f} where they share the cores",
            )
    report.show()


if __name__ == "__main__":
    main()
