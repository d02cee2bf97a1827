"""Recall@k of many images among many captions, both ways, and the memory that it takes.

    python tests/benchmarks/bench_recall.py [--images 100000] [--texts 500000] [--width 64]

Embeddings are random unit vectors, a caption's near its image's: a part of the ranks is small.
Memory is the most that the process had before, when it made the embeddings, and what the ranks
took above that; the whole matrix of scores would be 200 GB. The first --check images are ranked
once more by sorting.
"""

import resource
import time

import torch
from timing import Report, parser
from torch.nn.functional import normalize

from tinyvl import metrics


def peak() -> float:
    """Megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    options = parser(__doc__, repeats=1)
    options.add_argument("--images", type=int, default=100_000)
    options.add_argument("--texts", type=int, default=500_000)
    options.add_argument("--width", type=int, default=64)
    options.add_argument("--check", type=int, default=20)
    options = options.parse_args()
    torch.manual_seed(0)
    images = normalize(torch.randn(options.images, options.width), dim=1)
    owner = torch.arange(options.texts) % options.images
    noise = normalize(torch.randn(options.texts, options.width), dim=1)
    texts = normalize(images[owner] + 1.5 * noise, dim=1)
    metrics.ranks(images[:100], texts[:100], owner[:100])  # what PyTorch keeps for itself
    before = peak()
    start, used = time.perf_counter(), time.process_time()
    of_image, of_text = metrics.ranks(images, texts, owner)
    seconds, core = time.perf_counter() - start, time.process_time() - used
    print(
        f"{options.images:,} x {options.texts:,}, d = {options.width}, "
        f"{torch.get_num_threads()} threads: {seconds:.0f} s, {core:.0f} s of a core, "
        f"{peak() - before:.0f} MB above the {before:.0f} MB before"
    )
    case = f"{options.images:,} x {options.texts:,}, d = {options.width}"
    report = Report("recall", options)
    report.add(case, ours=seconds, unit="s", core=core, memory=peak() - before)
    shares = {f"TR@{k}": (of_image < k).double().mean() for k in (1, 5, 10)}
    shares |= {f"IR@{k}": (of_text < k).double().mean() for k in (1, 5, 10)}
    print(", ".join(f"{name} {value:.4f}" for name, value in shares.items()))
    for i in range(options.check):
        order = (texts.double() @ images[i].double()).float().argsort(descending=True)
        assert (owner[order] == i).nonzero()[0, 0] == of_image[i], i
        order = (images.double() @ texts[i].double()).float().argsort(descending=True)
        assert (order == owner[i]).nonzero()[0, 0] == of_text[i], i
    print(f"{options.check} images and captions ranked by sorting: the same")


if __name__ == "__main__":
    main()
