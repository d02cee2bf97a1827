"""Captions of five beams and eP-ALM's answers of three, against transformers and no cache.

    python tests/benchmarks/bench_captions.py [--batches 1 8 32] [--repeats 3] [--json FILE]

Captions are of an I-Tuning model: a GPT-2 and a ViT whose 197 tokens each layer attends to. The
peers are transformers' `generate` on the bare GPT-2, which sees no picture and so has less to do,
and on the GPT-2 with the modules in forward hooks, which has a picture's keys and values once for
each of its beams and must write the same texts. Every text has --tokens tokens: there is no end.
A run starts with the pictures' pixels, on both sides, and the peers' encoder is as timm has it;
"decoder" rows start with the pictures' tokens. Where the processor multiplies bf16 faster both
sides are timed in it, too; texts are compared in fp32 alone, because in bf16 they may part where
two tokens are about as likely. What tinyvl's encoder and the frozen matrices take by themselves is
the bound of the ratio to the bare model.

Answers are eP-ALM's on an OPT of 125m's shape, the encoder's levels from a cache: with the slot's
and the prompt's keys kept, against running the whole sequence again for each token.
"""

import argparse
import copy
import statistics

import torch
from shapes import BOS, Cached, Hooked, Ids, gpt2, itune, ours
from timing import Report, alternate, parser, precisions
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM

from tinyvl import decode, device, models
from tinyvl.decode import Hypothesis, Style
from tinyvl.encoders import ImageEncoder, Percept, build_image_encoder
from tinyvl.epalm import EPalm
from tinyvl.itune import ITune
from tinyvl.presets_table import CLIP_B16

NO_END = -1  # an id that is in no vocabulary
LEVELS = 12  # of a ViT-B
QUESTION = 9  # tokens


def style(beams: int, tokens: int) -> Style:
    return Style(beams=beams, max_tokens=tokens)


def check(what: str, mine: list[Hypothesis], other: list[tuple[list[int], float]]) -> None:
    """AssertionError: a text differs, and not only because two are as likely."""
    assert len(mine) == len(other)
    for found, (tokens, score) in zip(mine, other, strict=True):
        assert len(found.tokens) == len(tokens), (what, found.tokens, tokens)
        assert abs(found.score - score) < 1e-4, (what, found.score, score)
        assert found.tokens == tokens or abs(found.score - score) < 1e-5, (what, found, tokens)


# ---------------------------------------------------------------------------------- captions


@torch.no_grad()
def generate(
    lm: torch.nn.Module, texts: int, beams: int, tokens: int, scored: bool = False
) -> list[tuple[list[int], float]]:
    """transformers' search from the begin token alone: tokens and, if ``scored``, scores."""
    ids = torch.full((texts, 1), BOS)
    out = lm.generate(
        ids, attention_mask=torch.ones_like(ids), num_beams=beams, max_new_tokens=tokens,
        do_sample=False, early_stopping=beams > 1 or None, return_dict_in_generate=True,
        output_scores=scored,
    )  # fmt: skip
    scores = out.sequences_scores.tolist() if scored else [0.0] * texts
    return list(zip(out.sequences[:, 1:].tolist(), scores, strict=True))


@torch.no_grad()
def seen(encoder: ImageEncoder, pictures: Tensor) -> Tensor:
    """Tokens of pictures as timm gives them, all at once."""
    return encoder.model.forward_features(encoder.normalised(pictures))


def hooked(
    peer: Hooked, tokens: Tensor, beams: int, length: int, scored: bool = False
) -> list[tuple[list[int], float]]:
    """Captions by `generate`; the hooks read a picture's keys and values for each of its rows."""
    with torch.no_grad():
        peer.see(tokens)
    for added in peer.itune:
        added.keys, added.values = (
            part.repeat_interleave(beams, 0) for part in (added.keys, added.values)
        )
    return generate(peer.lm, len(tokens), beams, length, scored)


@torch.no_grad()
def products(model: ITune, texts: int, beams: int, tokens: int) -> None:
    """The frozen decoder's matrix products in a search, and nothing else of it."""
    lm, d = model.decoder, model.decoder.config.hidden_size
    wide = torch.randn(texts * beams, 4 * d).to(lm.embed.weight.dtype)
    narrow = wide[:, :d].contiguous()
    for step in range(tokens):
        rows = texts * (beams if step else 1)
        for block in lm.layers:
            for name in ("q", "k", "v", "o"):
                block.attention.get_submodule(name)(narrow[:rows])
            block.ffn.up(narrow[:rows])
            block.ffn.down(wide[:rows])
        lm.logits(narrow[:rows])


def captions(options: argparse.Namespace, report: Report, precision: torch.dtype) -> None:
    encoder = build_image_encoder({"architecture": options.vision}, levels=1)
    lm, bare = (gpt2(options.layers, options.width) for _ in range(2))
    bare.load_state_dict(lm.state_dict())
    model = models.place(itune(encoder, lm, NO_END), torch.device("cpu"), precision)
    bare.to(precision)
    peer = Hooked(lm, model)
    timms = copy.deepcopy(encoder)
    models.freeze(model)  # as `models.load` makes a model ready to run
    exact, name = precision == torch.float32, device.precision_name(precision)

    def written(pictures: Tensor | Percept, beams: int) -> list[Hypothesis]:
        number = len(pictures.tokens if isinstance(pictures, Percept) else pictures)
        return model.written(pictures, [[BOS]] * number, style(beams, options.tokens))

    for batch in [b for b in options.batches if exact or b > 1]:
        pictures = torch.randint(0, 256, (batch, 3, encoder.size, encoder.size), dtype=torch.uint8)
        tokens = seen(timms, pictures)
        if exact and batch <= 8:
            found = hooked(peer, tokens, options.beams, options.tokens, scored=True)
            check("captions", written(pictures, options.beams), found)

        def plain(pictures: Tensor = pictures) -> None:
            generate(bare, len(seen(timms, pictures)), options.beams, options.tokens)

        ways = {
            "tinyvl": lambda p=pictures: written(p, options.beams),
            "generate on the bare model": plain,
        }
        if exact and batch <= 8:
            ways["hooks"] = lambda p=pictures: hooked(
                peer, seen(timms, p), options.beams, options.tokens
            )
        parts = {
            "encoder": lambda p=pictures: model.look(p),
            "products": lambda n=batch: products(model, n, options.beams, options.tokens),
        }
        taken = alternate(ways | parts, options, warm=False)
        least = [statistics.median(taken.pop(part)) for part in parts]
        case = f"{options.beams} beams, {name}, batch {batch}"
        target = {"generate": 1.3} if batch > 1 else {}
        report.speed(case, taken, "tinyvl", batch, "captions", **target)
        most = statistics.median(taken["generate on the bare model"]) / sum(least)
        spent = "encoder {:.2f} s, frozen matrices {:.2f} s".format(*least)
        report.add(f"{case}: {spent}", note=f"at most {most:.2f} by these alone")
        percept = Percept(tokens, [])
        growing = exact and batch == min(8, max(options.batches))
        for beams in options.growth if growing else ():
            ways = {
                "tinyvl": lambda p=percept, b=beams: written(p, b),
                "generate on the bare model": lambda n=batch, b=beams: generate(
                    bare, n, b, options.tokens
                ),
            }
            taken = alternate(ways, options, warm=False)
            report.speed(
                f"decoder, {beams} beams, batch {batch}", taken, "tinyvl", batch, "captions"
            )


# ----------------------------------------------------------------------------------- answers


class Uncached:
    """`decode`'s step by running slot, prompt and text again for every token."""

    def __init__(self, model: EPalm, percept: Percept):
        self.model, self.percept = model, percept

    def __call__(self, ids: Tensor, rows: Tensor | None) -> Tensor:
        self.ids = ids if rows is None else torch.cat((self.ids[rows], ids), 1)
        with torch.no_grad():
            hidden = self.model.run(self.ids, self.model.see(self.percept))
            return self.model.decoder.logits(hidden[:, -1])


def answers(options: argparse.Namespace, report: Report) -> None:
    width, layers = options.width, options.layers
    config = OPTConfig(
        hidden_size=width, num_hidden_layers=layers, ffn_dim=4 * width, word_embed_proj_dim=width,
        num_attention_heads=width // 64, dropout=0.0,
    )  # fmt: skip
    lm = OPTForCausalLM(config).requires_grad_(False).eval()
    model = EPalm(Cached(768, LEVELS), ours(lm), Ids(2, NO_END)).eval()
    batch, length = options.questions, options.answer
    levels = [torch.randn(batch, 768) for _ in range(LEVELS)]
    percept = Percept(torch.randn(batch, 1, 768), levels)
    lines = torch.randint(10, config.vocab_size, (batch, QUESTION))
    common = {"beams": 3, "eos": NO_END, "max_new_tokens": length}

    def cached() -> list[Hypothesis]:
        return model.written(percept, lines.tolist(), style(3, length))

    def again() -> list[Hypothesis]:
        found = decode.beam(Uncached(model, percept), lines, early_stopping=True, **common)
        return [best[0] for best in found]

    check("answers", cached(), [(found.tokens, found.score) for found in again()])
    ways = {"tinyvl": cached, "uncached": again}
    taken = alternate(ways, options, warm=False)
    case = f"eP-ALM, 3 beams, {batch} answers of {length} tokens"
    report.speed(case, taken, "tinyvl", batch, "answers", uncached=3)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--layers", type=int, default=12)
    options.add_argument("--width", type=int, default=768)
    options.add_argument("--vision", default=CLIP_B16, help="one of timm's encoders")
    options.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    options.add_argument("--beams", type=int, default=5)
    options.add_argument("--growth", type=int, nargs="*", default=[1, 3, 5, 10], help="beams")
    options.add_argument("--tokens", type=int, default=16, help="of a caption")
    options.add_argument("--questions", type=int, default=8)
    options.add_argument("--answer", type=int, default=10, help="its tokens")
    options = options.parse_args()
    torch.manual_seed(0)
    device.keep_memory()
    report = Report("captions", options)
    for precision in precisions(report, "captions"):
        captions(options, report, precision)
    answers(options, report)
    report.show()


if __name__ == "__main__":
    main()
