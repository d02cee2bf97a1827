"""LilT: align an image encoder and a text encoder by training little of either.

Khan and Fu, "Contrastive Alignment of Vision to Language Through Parameter-Efficient Transfer
Learning", https://arxiv.org/abs/2301.04558. Each tower's token 0 after its last norm goes through
a linear projection to 256 numbers, scaled to length one. With s the products of all images and
texts of a batch, divided by a learned temperature (section 2.1):

    L = ½ (cross-entropy of each text among the images + of each image among the texts)   (1)

The towers are locked but for what a `presets_options.Tuning` adds (2.2) or unlocks (2.3).
Layerwise adapters stand where the authors' code has them: on a ViT block's branch, before norm1
and norm2; in BERT after the dense layer and its dropout, before the LayerNorm that adds the
residual. A deep adapter is one more layer on top of a stack. The pretrained models, and what
training asks of them, are in ``lilt_towers.py``.

What differs from the authors' code: the loss sees the whole batch, not each GPU's part; the
temperature has no weight decay; pictures are normalised as the encoder was trained; two captions
of one picture are no negatives of each other; and BERT keeps its token-type embedding. Their text
tower has none: with random weights its text vectors differ from ours by up to 0.38, and by 3e-7
once ours is left out (``token_types``).

A CNN has no [CLS] and no layers to put adapters in. It is read by the mean of its last feature
map, or by a `MapAdapter`. What its picture says then goes through the projection alone, or also
through an MLP beside it, which starts at zero (neither is in the paper).
"""

import itertools
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyvl import ranks
from tinyvl.encoders import norm_types
from tinyvl.lilt_towers import DualEncoder, ImageTower, Pairs, TextTower
from tinyvl.presets_options import Tuning

# ---------------------------------------------------------------------------------- what is added


class Adapter(nn.Module):
    """x + W_up gelu(W_down x), with biases; the bottleneck has a quarter of the width."""

    def __init__(self, width: int, init: Callable[[Tensor], Any], reduction: int = 4):
        super().__init__()
        self.down = nn.Linear(width, width // reduction)
        self.up = nn.Linear(width // reduction, width)
        for layer in (self.down, self.up):
            init(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(F.gelu(self.down(x)))


def add_layerwise_adapters(model: nn.Module) -> int:
    """Two adapters in each layer of a timm ViT or a BERT, initialised as each is; -> how many."""
    count = 0
    modules: list[Any] = list(model.modules())
    for module in modules:
        if all(hasattr(module, name) for name in ("norm1", "attn", "norm2", "mlp")):
            for name in ("norm1", "norm2"):
                norm = getattr(module, name)
                adapter = Adapter(norm.weight.numel(), partial(nn.init.trunc_normal_, std=0.02))
                setattr(module, name, nn.Sequential(OrderedDict(adapter=adapter, norm=norm)))
                count += 1
        elif all(hasattr(module, name) for name in ("dense", "dropout", "LayerNorm")):
            # BERT: LayerNorm(dropout(dense(h)) + residual)
            adapter = Adapter(module.dense.out_features, partial(nn.init.normal_, std=0.02))
            parts = OrderedDict(dropout=module.dropout, adapter=adapter)
            module.dropout = nn.Sequential(parts)
            count += 1
    return count


class MapAdapter(nn.Module):
    """A deep adapter for a feature map: one transformer block over its cells, then their mean."""

    def __init__(self, cells: int, map_width: int, width: int):
        from timm.models.vision_transformer import Block

        super().__init__()
        self.project = nn.Linear(map_width, width)
        self.positions = nn.Parameter(torch.zeros(cells, width))
        self.block = Block(width, num_heads=max(1, width // 64), qkv_bias=True)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, S, D) -> (B, width)."""
        return self.norm(self.block(self.project(tokens) + self.positions)).mean(1)


# -------------------------------------------------------------------------------- what is unlocked


def unlocked(model: nn.Module, tuning: Tuning, depth: int) -> frozenset[str]:
    """Names of a tower's trainable parameters; ``depth`` counts its pretrained layers."""
    norm: tuple[type[nn.Module], ...] = norm_types()
    norms = {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, norm)
        for name, _ in module.named_parameters()
    }
    kinds: dict[str, Callable[[str], bool]] = {
        "none": lambda name: False,
        "layernorm": norms.__contains__,
        "bitfit": lambda name: "bias" in name,
        "all": lambda name: True,
    }
    first, last = (i if i >= 0 else depth + i for i in tuning.layers or (0, -1))

    def inside(name: str) -> bool:
        found = re.search(r"(?:^|\.)(?:layer|blocks)\.(\d+)\.", name)
        layer = int(found[1]) if found else depth - 1 if name.startswith("norm.") else 0
        return first <= layer <= last  # embeddings go with the first layer, the norm with the last

    added = re.compile(r"\.adapter\.")
    if tuning.adapter == "deep":  # the new layer, and the norm after a ViT's stack
        added = re.compile(rf"(^|\.)(layer|blocks)\.{depth}\.|^norm\.")
    return frozenset(
        name
        for name, _ in model.named_parameters()
        if (kinds[tuning.unlock](name) and (inside(name) or not tuning.layers))
        or (tuning.adapter != "none" and added.search(name))
    )


# ------------------------------------------------------------------------------------------ loss


def contrastive_loss(
    images: Tensor, texts: Tensor, rows: Tensor, keys: Tensor, temperature: Tensor
) -> Tensor:
    """Equation 1, a mean over the pairs.

    Args:
        images, texts: unit vectors (I, d) and (B, d).
        rows: (B,) the image of each text.
        keys: (I,) equal where two images are the same picture. A picture counts once, however
            often it is in the batch, and its texts are not each other's negatives.
    """
    own = torch.arange(len(rows), device=rows.device)
    picture = keys[rows]  # (B,)
    scores = texts @ images.T / temperature  # (B, I)
    others = scores - (keys[:, None] == keys).sum(0).log()  # copies share one picture's weight
    others = others.masked_fill(picture[:, None] == keys, -torch.inf)
    others[own, rows] = scores[own, rows]
    text_to_image = F.cross_entropy(others, rows)
    twins = picture[:, None] == picture  # (B, B)
    twins[own, own] = False
    pairs = scores.T[rows]  # (B, B): the image of each pair against all texts
    image_to_text = F.cross_entropy(pairs.masked_fill(twins, -torch.inf), own)
    return (image_to_text + text_to_image) / 2


def rows_and_keys(batches: list[Pairs]) -> tuple[Tensor, Tensor]:
    """Of some micro-batches as one: the image of each text (B,), and the images' keys (I,)."""
    starts = [0, *itertools.accumulate(len(batch.keys) for batch in batches)]
    rows = torch.cat([b.rows + start for b, start in zip(batches, starts, strict=False)])
    return rows, torch.cat([batch.keys for batch in batches])


# ----------------------------------------------------------------------------------------- model


class LilT(DualEncoder):
    """Two towers, two projections and a temperature."""

    def __init__(
        self, encoder: ImageTower | None, text: TextTower | None, *, embed: int = 256,
        projections: bool = True, map_width: int = 384, dropout: tuple[float, float] = (0.0, 0.0),
        mlp: int = 0, temperature: float = 0.07, learn_temperature: bool = True,
    ):  # fmt: skip
        """Args:
        encoder, text: None where only the other is wanted, as by `tinyvl retrieve`.
        embed: width d of the common space.
        projections: whether the projections are trained (Table 1, θ).
        map_width: of a `MapAdapter`, if the image tower has one.
        dropout: before the image's and the text's projection.
        mlp: width of an MLP beside the image's projection; 0: none.
        temperature: at the start, or, if it is not learned, throughout.
        """
        super().__init__(encoder, text)
        self.width = embed
        self.projections, self.dropout = projections, dropout
        self.learn_temperature = learn_temperature
        self.map_adapter = self.image_mlp = None
        if encoder:
            wide = encoder.width
            if encoder.map_adapter:
                probe = torch.zeros(1, 3, encoder.size, encoder.size, device=encoder.mean.device)
                cells = encoder(probe).tokens.shape[1]
                self.map_adapter, wide = MapAdapter(cells, wide, map_width), map_width
            self.image_projection = nn.Linear(wide, embed)
            if mlp:
                layers = nn.Linear(wide, mlp), nn.GELU(), nn.Linear(mlp, embed)
                self.image_mlp = nn.Sequential(*layers)
                nn.init.zeros_(layers[2].weight)
                nn.init.zeros_(layers[2].bias)
        if text:
            self.text_projection = nn.Linear(text.width, embed)
        self.temperature = nn.Parameter(torch.tensor(float(temperature)))
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(self.trainable(name))

    def trainable(self, name: str) -> bool:
        part, _, rest = name.partition(".")
        if part in ("encoder", "text"):
            return rest.removeprefix("model.") in getattr(self, part).tuned
        if part == "temperature":
            return self.learn_temperature
        return self.projections or not part.endswith("projection")

    def image_vectors(self, pictures: Tensor) -> Tensor:
        """uint8 (I, 3, H, W), or a locked tower's tokens (I, S, D) -> unit vectors (I, d).

        A feature cache has all the tokens, a run's own cache the pooled one.
        """
        with self.autocast():
            seen = pictures
            if pictures.dtype == torch.uint8:
                seen = self.encoder(pictures).tokens
            pool = self.map_adapter or self.encoder.pooled
            seen = pool(seen if self.amp else seen.float())
            seen = F.dropout(seen, self.dropout[0], self.training)
            out = self.projected(seen)
        return F.normalize(out.float(), dim=-1)

    def projected(self, seen: Tensor) -> Tensor:
        """What the image tower gives (I, D) to the common space (I, d)."""
        out = self.image_projection(seen)
        return out if self.image_mlp is None else out + self.image_mlp(seen)

    def text_vectors(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids and mask (B, T), or a locked tower's vectors (B, D) -> unit vectors (B, d).

        A GPU is not waited for where the mask is on the host.
        """
        with self.autocast():
            read = ids if ids.is_floating_point() else self.text(ids, mask)
            read = F.dropout(read, self.dropout[1], self.training)
            out = self.text_projection(read)
        return F.normalize(out.float(), dim=-1)

    def loss(self, images: Tensor, texts: Tensor, batches: list[Pairs]) -> Tensor:
        """Equation 1 over all the pairs of some micro-batches, given their vectors."""
        return self.contrast(images, texts, *rows_and_keys(batches))

    def contrast(self, images: Tensor, texts: Tensor, rows: Tensor, keys: Tensor) -> Tensor:
        """Equation 1 at the model's temperature; the arguments are as in `contrastive_loss`."""
        with torch.no_grad():
            self.temperature.clamp_(0.001, 0.5)
        return contrastive_loss(images, texts, rows, keys, self.temperature)

    def accumulate(
        self, batches: list[Pairs], scaler: torch.amp.GradScaler | None = None
    ) -> dict[str, Any]:
        """Adds the gradients of one optimizer step, whose negatives are all of its pairs.

        Gradient caching (Gao et al., https://arxiv.org/abs/2101.06983): a pass without graph gives
        all vectors, the loss on them their gradients, and a second pass, with the same dropout,
        carries those into the towers a micro-batch at a time. -> {"loss", "captions"}.

        Of several processes each has the vectors and the loss of all pairs, and carries back the
        gradients of its own.
        """
        self.train()
        batches = [replace(batch.to(self.device), mask=batch.mask) for batch in batches]
        counts = ranks.everyone(len(batches))
        seeds = torch.randint(2**62, (sum(counts),)).tolist()[sum(counts[: ranks.rank()]) :]

        def vectors(i: int) -> tuple[Tensor, Tensor]:
            torch.manual_seed(seeds[i])
            batch = batches[i]
            return self.image_vectors(batch.pictures), self.text_vectors(batch.ids, batch.mask)

        several = len(batches) > 1 or ranks.size() > 1
        with torch.set_grad_enabled(not several):
            none = torch.empty(0, self.width, device=self.device)  # another has the step's batches
            each = [vectors(i) for i in range(len(batches))] or [(none, none)]
            images, texts = map(torch.cat, zip(*each, strict=True))
        rows, keys = rows_and_keys(batches) if batches else torch.empty(2, 0, device=self.device)
        (images, my_images), (texts, my_texts) = ranks.joined(images), ranks.joined(texts)
        rows, _ = ranks.joined(rows.long() + my_images.start)
        keys, _ = ranks.joined(keys.long())
        if several:
            images.requires_grad_()
            texts.requires_grad_()
        loss = self.contrast(images, texts, rows, keys)
        (scaler.scale(loss) if scaler else loss).backward()
        if ranks.rank():  # all processes have the whole of this gradient
            self.temperature.grad = None
        if several:
            assert images.grad is not None
            assert texts.grad is not None
            image_grads = images.grad[my_images].split([len(batch.keys) for batch in batches])
            text_grads = texts.grad[my_texts].split([len(batch.ids) for batch in batches])
            for i, gradients in enumerate(zip(image_grads, text_grads, strict=True)):
                for found, gradient in zip(vectors(i), gradients, strict=True):
                    if found.requires_grad:
                        found.backward(gradient)
        return {"loss": loss.detach(), "captions": len(texts)}

    @torch.no_grad()
    def validate(self, batches: Iterable[Pairs]) -> float:
        """The loss with all given pairs as one batch."""
        self.eval()
        kept, images, texts = [], [], []
        for batch in batches:
            kept.append(batch.to(self.device))
            images.append(self.image_vectors(kept[-1].pictures))
            texts.append(self.text_vectors(kept[-1].ids, kept[-1].mask))
        return self.loss(torch.cat(images), torch.cat(texts), kept).item() if kept else float("nan")

    @torch.no_grad()
    def embed_images(self, pictures: Tensor) -> Tensor:
        """Pictures as `encoder.transform` makes them, uint8 (B, 3, H, W) -> unit vectors (B, d)."""
        return self.image_vectors(pictures.to(self.device))

    @torch.no_grad()
    def embed_texts(
        self, texts: list[str], *, max_tokens: int | None = None, batch: int = 256
    ) -> Tensor:
        """Texts in any order -> unit vectors (B, d) in that order, float32.

        Longer texts than ``max_tokens``, or than the text tower reads, are cut and counted.
        """
        ids = self.text.encode(texts, max_tokens)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        out = torch.empty(len(ids), self.width, device=self.device)
        for i in range(0, len(order), batch):
            rows = order[i : i + batch]
            tokens, mask = self.text.pad([ids[row] for row in rows])
            out[rows] = self.text_vectors(tokens.to(self.device), mask.to(self.device))
        return out
