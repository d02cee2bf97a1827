"""Training steps: I-Tuning against hooks in transformers, LilT against a plain two-tower step.

    python tests/benchmarks/bench_train.py [--layers 12] [--width 768] [--repeats 3] [--json FILE]

I-Tuning reads image tokens from a cache (197 x 768, as of CLIP ViT-B/16) and trains its modules in
a GPT-2. The peer is transformers' GPT-2 with the same modules in forward hooks and the loss over
all logits: forward, backward and AdamW of a micro-batch, which grows. With five captions a picture,
as Flickr8k and COCO have them, tinyvl makes a picture's keys and values once; a peer's row is a
picture and a caption. bf16 is measured where the processor multiplies it faster than fp32.

LilT trains adapters and LayerNorms in a BERT of 12 x 384 on pooled image features: 512 pairs by
gradient caching against one piece through transformers' BERT. Memory is the most that a process of
its own takes in a step above what it had before. The loss alone is compared with open_clip's.

Losses and gradients are compared first. Both sides keep freed memory (`tinyvl.device.keep_memory`).
"""

import argparse
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from shapes import BOS, Cached, Hooked, captions, gpt2, itune
from timing import Report, alternate, parser, precisions, skewed
from torch import Tensor, nn

from tinyvl import device, models
from tinyvl.captioner import Batch
from tinyvl.itune import ITune
from tinyvl.lilt import LilT, Pairs, add_layerwise_adapters, contrastive_loss, unlocked
from tinyvl.lilt_towers import TextTower
from tinyvl.method import pad
from tinyvl.presets_options import TextTuning

CPU = torch.device("cpu")
TOKENS, VISION = 197, 768  # of CLIP ViT-B/16
POOLED, EMBED = 1280, 256  # EfficientNet-Lite2's width, LilT's common space
TUNING = TextTuning(adapter="layerwise", unlock="layernorm")


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """The gradients by name, which are then none."""
    named = ((n.replace(".model.", "."), p) for n, p in module.named_parameters())
    found = {name: p.grad.clone() for name, p in named if p.grad is not None}
    module.zero_grad()
    return found


def check(what: str, ours: nn.Module, theirs: nn.Module, losses: tuple[float, float]) -> None:
    """AssertionError: a loss or a gradient differs by more than 1e-4 of the peer's."""
    assert abs(losses[0] - losses[1]) < 1e-4 * abs(losses[1]), (what, losses)
    mine, other = gradients(ours), gradients(theirs)
    assert mine.keys() == other.keys(), mine.keys() ^ other.keys()
    for name, gradient in mine.items():
        if not name.endswith(("k.bias", "key.bias")):  # zero in theory: a softmax ignores it
            far = skewed(gradient, other[name])
            assert far < 1e-4, (what, name, far)


# ---------------------------------------------------------------------------------- I-Tuning


def itune_batch(model: ITune, images: int, each: int) -> Batch:
    rng = np.random.default_rng(0)
    tokens = torch.from_numpy(rng.standard_normal((images, TOKENS, VISION), dtype=np.float32))
    rows = [i for i in range(images) for _ in range(each)]
    return model.collate(captions(rng, len(rows)), rows, tokens, list(range(images)))


def hooked_loss(peer: Hooked, batch: Batch) -> Tensor:
    """As one writes it: a picture for each caption, transformers' own loss over all logits."""
    peer.see(batch.pictures[batch.rows])
    mask = torch.cat((torch.ones_like(batch.targets[:, :1]), batch.targets[:, 1:]), 1)
    labels = batch.ids.masked_fill(~mask, -100)
    return peer.lm(input_ids=batch.ids, attention_mask=mask.long(), labels=labels).loss


def itune_steps(options: argparse.Namespace, report: Report, precision: torch.dtype) -> None:
    lm = gpt2(options.layers, options.width)
    model = itune(Cached(VISION), lm, BOS)
    peer = Hooked(lm, model)
    models.place(model, CPU, precision)
    low = precision != torch.float32
    optimizers = [
        torch.optim.AdamW(p for p in module.parameters() if p.requires_grad)
        for module in (model, peer)
    ]

    def step(batch: Batch) -> float:
        loss = float(model.accumulate([batch])["loss"])
        optimizers[0].step()
        optimizers[0].zero_grad()
        return loss

    def hooked_step(batch: Batch) -> float:
        with torch.autocast("cpu", precision, enabled=low):
            loss = hooked_loss(peer, batch)
        loss.backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
        return loss.item()

    batch = itune_batch(model, 2, 2)
    loss = hooked_loss(peer, batch)
    loss.backward()
    found = float(model.accumulate([batch])["loss"])
    if low:
        assert abs(found - loss.item()) < 0.02 * loss.item(), (found, loss.item())
        model.zero_grad()
        peer.zero_grad()
    else:
        check("I-Tuning", model, peer, (found, loss.item()))
    name = device.precision_name(precision)
    for images, each in ((options.images[-1], 1), *((i, 5) for i in options.images)):
        batch = itune_batch(model, images, each)
        ways = {"tinyvl": lambda b=batch: step(b), "hooks": lambda b=batch: hooked_step(b)}
        taken = alternate(ways, options)
        case = f"I-Tuning {name}, {images} x {each} captions"
        report.speed(case, taken, "tinyvl", images * each, "captions", hooks=1.8 if low else 1.3)


# -------------------------------------------------------------------------------------- LilT


class TwoTowers(nn.Module):
    """Pooled features and a BERT to a common space, and the loss, as one writes it."""

    def __init__(self, bert: nn.Module, model: LilT):
        super().__init__()
        self.text = bert
        self.image_projection = nn.Linear(POOLED, EMBED)
        self.text_projection = nn.Linear(bert.config.hidden_size, EMBED)
        self.temperature = nn.Parameter(model.temperature.detach().clone())
        for name in ("image_projection", "text_projection"):
            getattr(self, name).load_state_dict(getattr(model, name).state_dict())

    def forward(self, features: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        images = F.normalize(self.image_projection(features), dim=-1)
        states = self.text(input_ids=ids, attention_mask=mask).last_hidden_state
        pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        texts = F.normalize(self.text_projection(pooled), dim=-1)
        scores, own = texts @ images.T / self.temperature, torch.arange(len(ids))
        return (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2


def towers(options: argparse.Namespace) -> tuple[LilT, TwoTowers]:
    """LilT over tinyvl's BERT, and the peer over transformers', with the same weights."""
    from transformers import BertConfig, BertModel

    from tinyvl.encoders_text import Bert

    width = options.text_width
    config = BertConfig(
        vocab_size=options.vocabulary, hidden_size=width, num_hidden_layers=options.text_layers,
        num_attention_heads=max(1, width // 32), intermediate_size=4 * width,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    bert = BertModel(config, add_pooling_layer=False)
    own = Bert(SimpleNamespace(**config.to_dict()))
    for text in (bert, own):
        add_layerwise_adapters(text)
        tuned = unlocked(text, TUNING, options.text_layers)
        for name, parameter in text.named_parameters():
            parameter.requires_grad_(name in tuned)
    own.load_state_dict(bert.state_dict())
    tower = TextTower(own, None, clean=False, pool="mean", tuned=tuned)
    model = LilT(Cached(POOLED), tower, embed=EMBED)
    return model, TwoTowers(bert, model)


def pairs(options: argparse.Namespace, count: int) -> Pairs:
    rng = np.random.default_rng(0)
    features = torch.from_numpy(rng.standard_normal((count, 1, POOLED), dtype=np.float32))
    ids, real = pad(captions(rng, count, options.vocabulary), 0)
    each = torch.arange(count)
    return Pairs(features, each, ids, each, real.long())


def cached_step(model: LilT, batch: Pairs, micro: int) -> float:
    return float(model.accumulate(batch.split(-(-len(batch.ids) // micro)))["loss"])


def plain_step(peer: TwoTowers, batch: Pairs) -> float:
    loss = peer(batch.pictures[:, 0], batch.ids, batch.mask)
    loss.backward()
    return loss.item()


def lilt_memory(options: argparse.Namespace) -> None:
    """Prints what a step takes above what the process had, in MiB, of a way in this process."""
    model, peer = towers(options)

    def step(batch: Pairs) -> None:
        cached_step(model, batch, options.micro)

    way = step if options.memory_of == "tinyvl" else lambda batch: plain_step(peer, batch)
    batch = pairs(options, options.pairs)
    way(pairs(options, 8))  # what PyTorch keeps for itself, and the gradients
    before = device.peak_memory(CPU)
    way(batch)
    print((device.peak_memory(CPU) - before) / 2**20)


def lilt_steps(options: argparse.Namespace, report: Report, peaks: list[float]) -> None:
    """``peaks``: `memory_of` tinyvl's step and of the plain one."""
    model, peer = towers(options)
    batch = pairs(options, min(options.pairs, 32))
    losses = cached_step(model, batch, 8), plain_step(peer, batch)
    check("LilT", model, peer, losses)
    batch = pairs(options, options.pairs)
    trained = [[p for p in m.parameters() if p.requires_grad] for m in (model, peer)]
    optimizers = [torch.optim.AdamW(parameters) for parameters in trained]

    def ours(micro: int) -> None:
        cached_step(model, batch, micro)
        optimizers[0].step()
        optimizers[0].zero_grad()

    def theirs() -> None:
        plain_step(peer, batch)
        optimizers[1].step()
        optimizers[1].zero_grad()

    ways = {
        "tinyvl": lambda: ours(options.micro), "plain step": theirs,
        "tinyvl's in one piece": lambda: ours(options.pairs),
    }  # fmt: skip
    case = f"LilT, {options.pairs} pairs, pieces of {options.micro}"
    taken = alternate(ways, options, warm=False)
    report.speed(case, taken, "tinyvl", options.pairs, "pairs", plain=0.6)
    report.add(
        f"{case}: memory", ours=peaks[0], unit="MiB", peer="plain step", theirs=peaks[1],
        ratio=peaks[0] / max(1, peaks[1]), target=-0.4,
    )  # fmt: skip


def memory_of(way: str) -> float:
    """`lilt_memory` of a way, in a process of its own."""
    command = [sys.executable, *sys.argv, "--memory-of", way]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def losses(options: argparse.Namespace, report: Report) -> None:
    """The contrastive loss alone, forward and backward."""
    case = f"contrastive loss, {options.pairs} pairs"
    try:
        from open_clip.loss import ClipLoss
    except ImportError:
        report.add(case, note="open_clip is not installed: not compared")
        return
    rng, own = torch.Generator().manual_seed(0), torch.arange(options.pairs)
    images, texts = (
        F.normalize(torch.randn(options.pairs, EMBED, generator=rng), dim=-1).requires_grad_()
        for _ in range(2)
    )
    temperature, clip = torch.tensor(0.07), ClipLoss()

    def ours() -> Tensor:
        loss = contrastive_loss(images, texts, own, own, temperature)
        return torch.stack(torch.autograd.grad(loss, (images, texts)))

    def theirs() -> Tensor:
        loss = clip(images, texts, 1 / temperature)
        return torch.stack(torch.autograd.grad(loss, (images, texts)))

    assert skewed(ours(), theirs()) < 1e-4
    taken = alternate({"tinyvl": ours, "open_clip's ClipLoss": theirs}, options, times=10)
    report.speed(case, taken, "tinyvl", options.pairs, "pairs")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--layers", type=int, default=12)
    options.add_argument("--width", type=int, default=768)
    options.add_argument("--images", type=int, nargs="+", default=[1, 4, 12], help="of a batch")
    options.add_argument("--pairs", type=int, default=512)
    options.add_argument("--micro", type=int, default=64, help="LilT's micro-batch")
    options.add_argument("--text-layers", type=int, default=12)
    options.add_argument("--text-width", type=int, default=384)
    options.add_argument("--vocabulary", type=int, default=8192, help="of LilT's text tower")
    options.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = options.parse_args()
    torch.manual_seed(0)
    device.keep_memory()
    if options.memory_of:
        lilt_memory(options)
        return
    # First, because a process starts with the peak of the one that started it.
    peaks = [memory_of(way) for way in ("tinyvl", "plain")]
    report = Report("training", options)
    for precision in precisions(report, "I-Tuning"):
        itune_steps(options, report, precision)
    lilt_steps(options, report, peaks)
    losses(options, report)
    report.show()


if __name__ == "__main__":
    main()
