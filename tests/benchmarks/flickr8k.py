"""Captions of a test set scored by pycocoevalcap (needs Java), with and without the right picture.

    python tests/benchmarks/flickr8k.py flickr8k_test.jsonl [--model default] [--out FILE.jsonl]

The second row gives each picture's place to another one: a model that looks at pictures scores
far lower there.
"""

import argparse
import json
import time

import torch
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from tinyvl import data, media, models


def score(references: dict[str, list[str]], captions: dict[str, str]) -> dict[str, float]:
    tokenizer = PTBTokenizer()
    fold = lambda text: {"caption": " ".join(text.split())}  # noqa: E731
    gold = tokenizer.tokenize({i: [fold(c) for c in cs] for i, cs in references.items()})
    said = tokenizer.tokenize({i: [fold(c)] for i, c in captions.items()})
    bleu = Bleu(4).compute_score(gold, said, verbose=0)[0]
    return {
        **{f"BLEU-{n}": bleu[n - 1] for n in range(1, 5)},
        "METEOR": Meteor().compute_score(gold, said)[0],
        "ROUGE-L": Rouge().compute_score(gold, said)[0],
        "CIDEr": Cider().compute_score(gold, said)[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--model", default="default")
    parser.add_argument("--beams", type=int, default=5)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--length-penalty", type=float, default=1.0)
    parser.add_argument("--out")
    args = parser.parse_args()
    records = data.read(args.data, lang="en")[: args.limit]
    references = {r.id: r.captions for r in records}
    model = models.load(args.model)
    encoder = model.encoder
    decoded = media.decode_images(
        (r.image for r in records), encoder.transform(), target=encoder.size
    )
    pictures = torch.stack([picture for _, picture in decoded])
    for shuffled in (False, True):
        seen = pictures.roll(len(pictures) // 2, 0) if shuffled else pictures
        started = time.monotonic()
        found = []
        for part in seen.split(args.batch):
            found += model.caption(part, beams=args.beams, length_penalty=args.length_penalty)
        seconds = time.monotonic() - started
        captions = {r.id: text for r, (text, _) in zip(records, found, strict=True)}
        metrics = {name: round(value, 4) for name, value in score(references, captions).items()}
        speed = round(len(records) / seconds, 2)
        row = {"model": args.model, "images": len(records), "beams": args.beams}
        row |= {"shuffled": shuffled, **metrics, "images_per_second": speed}
        print(json.dumps(row), flush=True)
        if args.out and not shuffled:
            with open(args.out, "w", encoding="utf-8") as file:
                for r, (text, value) in zip(records, found, strict=True):
                    print(json.dumps({"path": r.image, "caption": text, "score": value}), file=file)


if __name__ == "__main__":
    main()
