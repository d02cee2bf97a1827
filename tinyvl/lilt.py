"""LilT: align an image encoder and a text encoder by training little of either.

Khan and Fu, "Contrastive Alignment of Vision to Language Through Parameter-Efficient Transfer
Learning", https://arxiv.org/abs/2301.04558. Each tower's token 0 after its last norm goes through
a linear projection to 256 numbers, scaled to length one. With s the products of all images and
texts of a batch, divided by a learned temperature (section 2.1):

    L = ½ (cross-entropy of each text among the images + of each image among the texts)   (1)

The towers are locked but for what a `Tuning` unlocks or adds: see `towers`.

What differs from the authors' code: the loss sees the whole batch, not each GPU's part; the
temperature has no weight decay; pictures are normalised as the encoder was trained; and two
captions of one picture are no negatives of each other.
"""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from tinyvl import UserError, encoders_text
from tinyvl.encoders_text import build_text_model, load_text_model, load_tokenizer
from tinyvl.lilt_towers import ImageTower, MapAdapter, TextTower, Tuning, image_model


def build(config: dict, folders: dict[str, Path] | None) -> "LilT":
    """The model of a checkpoint's ``config.json``; ``folders`` None: parameters only, random.

    Args:
        folders: of the backbones "image" and "text"; the tower of one that is not named is left
            out, and its projection.
    """
    image, text, options = config["image"], config["text"], dict(config["options"])
    tunings = [Tuning(**options.pop(side, {})) for side in ("image", "text")]
    size, clean = options.pop("size", None), options.pop("clean", False)
    random = options.pop("random_init", False)
    if random and not all(tuning.unlock == "all" and not tuning.layers for tuning in tunings):
        raise UserError(
            "--random-init is for towers that are trained whole; add --preset clip-base, or "
            "--image-unlock all --text-unlock all.",
            2,
        )
    grow = [tuning.adapter == "deep" for tuning in tunings]
    tower = words = None
    if folders is None or "image" in folders:
        state = None
        if folders and not random:
            state = load_file(folders["image"] / "model.safetensors")
        model = image_model(image["config"], size=size, grow=grow[0], state=state)
        tower = ImageTower(model, fit=image["fit"], tuning=tunings[0], where=image["name"])
    if folders is None or "text" in folders:
        where = folders["text"] if folders else Path()
        if folders and not random and tower is None and encoders_text.readable(where):
            model, tokenizer = encoders_text.load(where, grow=grow[1])
        else:
            tokenizer = load_tokenizer(where) if folders else None
            if folders and not random:
                model = load_text_model(where, grow=grow[1])
            else:
                model = build_text_model(text["config"], grow=grow[1])
        words = TextTower(model, tokenizer, clean=clean, tuning=tunings[1], where=text["name"])
    dropout = (tunings[0].dropout, tunings[1].dropout)
    return LilT(tower, words, map_width=tunings[0].width, dropout=dropout, **options)


# ------------------------------------------------------------------------------------------ loss


@dataclass
class Pairs:
    """A micro-batch: pictures, and captions that each belong to one of them."""

    pictures: Tensor  # uint8 (I, 3, H, W), or a locked tower's tokens (I, S, D) from a cache
    keys: Tensor  # (I,) a number for each picture: equal where pictures are the same
    rows: Tensor  # (B,) which picture each caption belongs to
    ids: Tensor  # (B, T), or a locked tower's vectors (B, D) from a cache
    mask: Tensor  # (B, T) 1 where there is a token

    def to(self, device: torch.device) -> "Pairs":
        return Pairs(*(t.to(device, non_blocking=True) for t in vars(self).values()))

    def split(self, pieces: int) -> list["Pairs"]:
        """The same captions in this many smaller batches."""
        if pieces == 1:
            return [self]
        size = -(-len(self.ids) // pieces)
        out = []
        for i in range(0, len(self.ids), size):
            used, rows = self.rows[i : i + size].unique(return_inverse=True)
            part = slice(i, i + size)
            out.append(
                Pairs(self.pictures[used], self.keys[used], rows, self.ids[part], self.mask[part])
            )
        return out


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


# ----------------------------------------------------------------------------------------- model


class LilT(nn.Module):
    """Two towers, two projections and a temperature."""

    crop_area = 0.2
    reads = "tokens"
    whole_steps = True  # the loss compares all the pairs of a step: they are drawn at random

    def __init__(
        self,
        encoder: ImageTower | None,
        text: TextTower | None,
        *,
        embed: int = 256,
        projections: bool = True,
        map_width: int = 384,
        dropout: tuple[float, float] = (0.0, 0.0),
        temperature: float = 0.07,
        learn_temperature: bool = True,
    ):
        """Args:
        encoder, text: None where only the other is asked for, as by `tinyvl retrieve`.
        embed: width d of the common space.
        projections: whether the projections are trained (Table 1, θ).
        dropout: of what the image's and the text's projection read.
        temperature: at the start, or, not learned, throughout.
        """
        super().__init__()
        self.encoder, self.text, self.width = encoder, text, embed
        self.projections, self.dropout = projections, dropout
        self.learn_temperature = learn_temperature
        self.map_adapter = None
        if encoder:
            wide = encoder.width
            if encoder.map_adapter:
                probe = torch.zeros(1, 3, encoder.size, encoder.size, device=encoder.mean.device)
                cells = encoder(probe).tokens.shape[1]
                self.map_adapter, wide = MapAdapter(cells, wide, map_width), map_width
            self.image_projection = nn.Linear(wide, embed)
        if text:
            self.text_projection = nn.Linear(text.width, embed)
        self.temperature = nn.Parameter(torch.tensor(float(temperature)))
        self.amp: torch.dtype | None = None  # autocast type, set by `models.place`
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(self.trainable(name))

    def trainable(self, name: str) -> bool:
        """Which parameters are trained, saved and counted."""
        part, _, rest = name.partition(".")
        if part in ("encoder", "text"):
            return rest.removeprefix("model.") in getattr(self, part).tuned
        if part == "temperature":
            return self.learn_temperature
        return self.projections or not part.endswith("projection")

    def kept(self, name: str) -> bool:
        """Which parameters a checkpoint holds: locked projections are random, so these too."""
        return self.trainable(name) or name.partition(".")[0].endswith("projection")

    def holds(self, name: str) -> bool:
        """Whether a parameter of the whole model is in this one, which may lack a tower."""
        side = self.text if name.startswith("text") else self.encoder
        return side is not None or name == "temperature"

    @property
    def device(self) -> torch.device:
        return self.temperature.device

    @property
    def fixed_pictures(self) -> bool:
        """Whether the image tower is locked: it makes the same of a picture in every epoch."""
        return not self.encoder.tuned

    @property
    def fixed_text(self) -> bool:
        return not self.text.tuned

    def decays(self, parameter: nn.Parameter) -> bool:
        """Whether weight decay pulls at it: at matrices, as in the authors' code, and at nothing
        else, the temperature included (which theirs decays)."""
        return parameter.ndim > 1

    def checkpoint(self, on: bool) -> None:
        """Recompute the towers' layers in the backward pass."""
        if on and self.encoder.tuned and hasattr(self.encoder.model, "set_grad_checkpointing"):
            self.encoder.model.set_grad_checkpointing(True)
        if on and self.text.tuned:
            model = self.text.model  # the first name is the one of newer versions
            enable = getattr(model, "activation_checkpointing_enable", None)
            (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})

    def autocast(self):
        """Mixed precision where the model was placed with it."""
        return torch.autocast(self.device.type, self.amp) if self.amp else nullcontext()

    def halve(self, dtype: torch.dtype) -> None:
        """Locked matrices and filters in half precision; all else stays float32 for autocast."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)) and not module.weight.requires_grad:
                module.to(dtype)

    def encode(self, captions: list[str], max_tokens: int) -> list[list[int]]:
        """Ids of captions, [CLS] and [SEP] included, as training reads them."""
        return self.text.encode(captions, max_tokens)

    def state_rows(self, caption: Sequence[int]) -> int:
        return 1

    @torch.no_grad()
    def states(self, captions: Sequence[Sequence[int]]) -> Tensor:
        """What the locked text tower makes of captions' ids: a vector each (B, D)."""
        ids, mask = self.text.pad(captions)
        with self.autocast():
            return self.eval().text(ids.to(self.device), mask.to(self.device)).float()

    def collate(
        self,
        captions: list[list[int]],
        rows: list[int],
        pictures: Tensor,
        keys: list[int],
        states: list[Tensor] | None = None,
    ) -> Pairs:
        """A micro-batch of caption ids, or of the locked text tower's vectors in their place."""
        ids, mask = self.text.pad(captions)
        if states is not None:
            ids = torch.cat(states)
        return Pairs(pictures, torch.tensor(keys), torch.tensor(rows), ids, mask)

    def image_vectors(self, pictures: Tensor) -> Tensor:
        """uint8 (I, 3, H, W), or a locked tower's tokens (I, S, D) -> unit vectors (I, d).

        Tokens may be all of the encoder's (`features`), or the pooled one of the run's own cache.
        """
        with self.autocast():
            seen = pictures
            if pictures.dtype == torch.uint8:
                seen = self.encoder(pictures).tokens
            pool = self.map_adapter or self.encoder.pooled
            seen = pool(seen if self.amp else seen.float())
            seen = F.dropout(seen, self.dropout[0], self.training)
            out = self.image_projection(seen)
        return F.normalize(out.float(), dim=-1)

    def text_vectors(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids and mask (B, T), or a locked tower's vectors (B, D) -> unit vectors (B, d)."""
        with self.autocast():
            read = ids if ids.is_floating_point() else self.text(ids, mask)
            read = F.dropout(read, self.dropout[1], self.training)
            out = self.text_projection(read)
        return F.normalize(out.float(), dim=-1)

    def loss(self, images: Tensor, texts: Tensor, batches: list[Pairs]) -> Tensor:
        """Equation 1 over all the pairs of some micro-batches, given their vectors."""
        with torch.no_grad():
            self.temperature.clamp_(0.001, 0.5)
        starts = [0]
        for batch in batches:
            starts.append(starts[-1] + len(batch.keys))
        rows = torch.cat([b.rows + start for b, start in zip(batches, starts, strict=False)])
        keys = torch.cat([b.keys for b in batches])
        return contrastive_loss(images, texts, rows, keys, self.temperature)

    def accumulate(
        self, batches: list[Pairs], scaler: torch.amp.GradScaler | None = None
    ) -> dict[str, float]:
        """Adds the gradients of one optimizer step, whose negatives are all of its pairs.

        Gradient caching (Gao et al., https://arxiv.org/abs/2101.06983): a pass without graph gives
        all vectors, the loss on them their gradients, and a second pass, with the same dropout,
        carries those into the towers a micro-batch at a time. -> {"loss", "captions"}.
        """
        self.train()
        batches = [batch.to(self.device) for batch in batches]
        seeds = torch.randint(2**62, (len(batches),)).tolist()

        def vectors(i: int) -> tuple[Tensor, Tensor]:
            torch.manual_seed(seeds[i])
            batch = batches[i]
            return self.image_vectors(batch.pictures), self.text_vectors(batch.ids, batch.mask)

        with torch.set_grad_enabled(len(batches) == 1):
            images, texts = map(torch.cat, zip(*map(vectors, range(len(batches))), strict=True))
        if len(batches) > 1:
            images.requires_grad_(), texts.requires_grad_()
        loss = self.loss(images, texts, batches)
        (scaler.scale(loss) if scaler else loss).backward()
        start = start_text = 0
        for i, batch in enumerate(batches if len(batches) > 1 else []):
            end, end_text = start + len(batch.keys), start_text + len(batch.ids)
            gradients = (images.grad[start:end], texts.grad[start_text:end_text])
            start, start_text = end, end_text
            pairs = [p for p in zip(vectors(i), gradients, strict=True) if p[0].requires_grad]
            torch.autograd.backward(*zip(*pairs, strict=True)) if pairs else None
        return {"loss": loss.item(), "captions": len(texts)}

    @torch.no_grad()
    def validate(self, batches: Iterable[Pairs]) -> float:
        """The loss with all given pairs as one batch."""
        self.eval()
        kept, images, texts = [], [], []
        for batch in batches:
            batch = batch.to(self.device)
            images.append(self.image_vectors(batch.pictures))
            texts.append(self.text_vectors(batch.ids, batch.mask))
            kept.append(batch)
        return self.loss(torch.cat(images), torch.cat(texts), kept).item() if kept else float("nan")

    @torch.no_grad()
    def embed_images(self, pictures: Tensor) -> Tensor:
        """Pictures as `encoder.transform` makes them, uint8 (B, 3, H, W) -> unit vectors (B, d)."""
        return self.image_vectors(pictures.to(self.device))

    @torch.no_grad()
    def embed_texts(self, texts: list[str], *, max_tokens: int = 30, batch: int = 256) -> Tensor:
        """Texts in any order -> unit vectors (B, d) in that order, float32.

        Args:
            max_tokens: longer texts are cut; 30 is the authors' length at evaluation.
        """
        ids = self.text.encode(texts, max_tokens)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        out = torch.empty(len(ids), self.width, device=self.device)
        for i in range(0, len(order), batch):
            rows = order[i : i + batch]
            tokens, mask = self.text.pad([ids[row] for row in rows])
            out[rows] = self.text_vectors(tokens.to(self.device), mask.to(self.device))
        return out
