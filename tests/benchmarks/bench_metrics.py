"""All caption metrics but SPICE on 5,000 images x 5 references of COCO.

    python tests/benchmarks/bench_metrics.py [--images 5000] [--captions FILE]

FILE is COCO's captions_*.json; without it, the one in pycocoevalcap's SPICE jar (val2014) is read.
A hypothesis is the first half of one of its references and the second half of another image's.
Prints seconds, and seconds of a core, of each part alone and of all together.
"""

import json
import os
import random
import resource
import time
import zipfile
from pathlib import Path

from timing import Report, parser

from tinyvl import metrics_captions
from tinyvl import metrics_java as jvm


def coco(path: Path | None) -> dict[str, list[str]]:
    if path is None:
        with zipfile.ZipFile(jvm.jar("spice", "spice-1.0.jar")) as archive:
            document = json.loads(archive.read("coco/annotations/captions_val2014.json"))
    else:
        document = json.loads(path.read_text("utf-8"))
    captions: dict[str, list[str]] = {}
    for row in document["annotations"]:
        captions.setdefault(str(row["image_id"]), []).append(row["caption"])
    return captions


def main() -> None:
    options = parser(__doc__, repeats=1)
    options.add_argument("--images", type=int, default=5000)
    options.add_argument("--captions", type=Path)
    options = options.parse_args()
    report = Report("metrics", options)
    captions = coco(options.captions)
    references = {i: found[:5] for i, found in list(captions.items())[: options.images]}
    rng = random.Random(0)
    ids = list(references)
    hypotheses = {}
    for i in ids:
        words = rng.choice(references[i]).split()
        other = rng.choice(references[rng.choice(ids)]).split()
        hypotheses[i] = " ".join(words[: len(words) // 2] + other[len(other) // 2 :])
    print(f"{len(ids)} images, {sum(map(len, references.values()))} references")
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")

    def timed(name: str, function):
        begun, used = time.perf_counter(), cpu()
        result = function()
        took, core = time.perf_counter() - begun, cpu() - used
        print(f"{name:<10}{took:7.2f} s {core:7.2f} s of a core")
        report.add(f"{name}, {len(ids)} images", ours=took, unit="s", core=core)
        return result

    def cpu() -> float:
        both = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        return sum(sum(resource.getrusage(who)[:2]) for who in both)

    plan = metrics_captions.plan_captions()
    parts = [list(references.values()), list(hypotheses.values())]
    refs, hyps = timed("tokenizer", lambda: metrics_captions.tokenised(plan, *parts))
    timed("BLEU", lambda: metrics_captions.bleu_statistics(refs, hyps))
    timed("ROUGE-L", lambda: metrics_captions.rouge(refs, hyps))
    timed("CIDEr", lambda: metrics_captions.cider(refs, hyps))
    if plan.java is not None:

        def meteor():
            with jvm.Meteor(plan.java) as program:
                program.score(refs, hyps)
                return program.statistics()

        timed("METEOR", meteor)
    scores = timed("all", lambda: metrics_captions.caption_scores(references, hypotheses))
    print({name: round(value, 4) for name, value in scores.metrics.items() if value is not None})


if __name__ == "__main__":
    main()
