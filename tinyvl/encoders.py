"""Frozen perceptual encoders behind one result, `Percept`: any timm image model by name.

``tokens`` is the map a method may attend to (I-Tuning): the final tokens of a transformer, [CLS]
included and before any projection, or the cells of a CNN's last feature map. They arrive
normalised: after the encoder's own final norm, or after a LayerNorm without parameters where it
has none. ``summaries`` has one vector a level (eP-ALM): the [CLS] token of each block after the
final norm. An encoder without [CLS] gives the mean of each stage's feature map after a LayerNorm
without parameters, and for the last stage that of its final features, a CNN's head included.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyvl import UserError
from tinyvl.media_augment import RandomCrop, View

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL.Image import Image


FITS = ("crop", "squash", "jpeg")
# Pictures that a CPU encodes at once. The layers' outputs of more outgrow what malloc keeps (at
# most 32 MB a block): of EfficientNet-Lite2 on 32, page faults took 35 of 75 ms a picture.
CPU_PICTURES = 4  # of the model's own size; of larger ones fewer


@dataclass
class Percept:
    """What an encoder makes of a batch of pictures."""

    tokens: Tensor  # (B, S, D)
    summaries: list[Tensor]  # a level each, lowest first: (B, D_level)

    @staticmethod
    def join(parts: "list[Percept]") -> "Percept":
        """One percept of all their pictures."""
        levels = zip(*(part.summaries for part in parts), strict=True)
        return Percept(
            torch.cat([part.tokens for part in parts]), [torch.cat(level) for level in levels]
        )


class ImageEncoder(nn.Module):
    """A frozen timm model. Pictures come as uint8 (B, 3, H, W); it normalises them itself.

    Of videos (B, T, 3, H, W) it gives the mean over the frames (eP-ALM, Table 13).
    """

    modality = "image"
    frames: int | None = None  # of a video; None: videos are not read
    below: Sequence[int] = ()  # widths of the lower stages' parts of the tokens
    larger = 0  # side of the enlarged pictures whose tokens stand behind

    def __init__(
        self,
        model: nn.Module,
        *,
        fit: str = "crop",
        levels: int | None = None,
        lower: int = 0,
        larger: int = 0,
    ):
        """Args:
        fit: "crop" is the model's own transform (resize, centre crop); "squash" resizes the
            whole picture to the model's square, so that nothing at its edges is lost; "jpeg"
            is squash after `small_jpeg`.
        levels: how many summaries, counted from the last level; None: all.
        lower: of a model that gives maps, how many of its stages below the last map the tokens
            hold behind it: laid on its cells (mean), each normalised, highest first.
        larger: a side in pixels. Behind the tokens of a picture stand those of the same picture
            enlarged to it: a CNN's filters then see smaller parts. 0: none of these.
        """
        super().__init__()
        from timm.data import resolve_data_config

        self.model = model.requires_grad_(False).eval().to(memory_format=torch.channels_last)
        self.levels = levels
        self.prepare(resolve_data_config(model=model), fit)
        norm = getattr(model, "norm", None)
        self.final_norm = norm is not None and isinstance(norm, norm_types())
        self.width: int = model.num_features
        info = getattr(model, "feature_info", None)
        stages = [stage["num_chs"] for stage in getattr(info, "info", info) or []]
        self.maps = info is not None and not hasattr(model, "cls_token")
        below = stages[:-1] if stages[-1:] == [self.width] else stages
        if lower and (not self.maps or lower > len(below)):
            has = f"{len(below)} stages below its last map" if self.maps else "no maps"
            raise UserError(f"--lower {lower}: this image encoder has {has}.", 2)
        self.larger = self.enlarged(larger)
        self.below = below[::-1][:lower]
        self.double = below is not stages  # the last stage is the last map
        if self.maps and stages:
            stages = [*stages[:-1], self.width]
        self.widths: list[int] = stages[-(levels or 0) :]  # of the summaries

    def enlarged(self, side: int) -> int:
        """The side of larger pictures, if the model can read them."""
        if side and not self.maps:
            raise UserError(f"--larger {side}: this image encoder has no maps.", 2)
        if side and self.model.pretrained_cfg.get("fixed_input_size"):
            raise UserError(f"--larger {side}: this image encoder reads one size only.", 2)
        if side and side <= self.size:
            raise UserError(
                f"--larger {side}: give more than this image encoder's own {self.size} pixels.", 2
            )
        return side

    def prepare(self, data_config: dict[str, Any], fit: str) -> None:
        """How pictures become what the model takes."""
        if fit not in FITS:
            raise UserError(f"--fit is one of {', '.join(FITS)}, not {fit!r}.", 2)
        self.fit, self.data_config = fit, data_config
        if fit != "crop":
            self.data_config |= {"crop_mode": "squash", "crop_pct": 1.0}
        self.size: int = self.data_config["input_size"][-1]
        mean, std = (torch.tensor(self.data_config[k]).view(3, 1, 1) for k in ("mean", "std"))
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.learns = False  # whether something in it is trained

    def transform(self) -> "Callable[[Image], Tensor]":
        """A picklable function: RGB picture -> uint8 tensor (3, H, W)."""
        from timm.data import create_transform

        config = {k: v for k, v in self.data_config.items() if k not in ("mean", "std")}
        own = create_transform(**config, is_training=False, normalize=False)
        return Chain(small_jpeg, own) if self.fit == "jpeg" else own

    def view(self, view: int = 0, seed: int = 0) -> "Callable":
        """What makes a file into an input: as it is, or in one of its varied views."""
        own = View(self.transform(), view, seed) if view else self.transform()
        return self.clips(own, f"{seed}/{view}" if view else None)

    def crop(self, epoch: int, seed: int, area: float) -> "Callable":
        """The same, in a random view that is new in every epoch."""
        return self.clips(RandomCrop(self.size, epoch, seed, area), f"{seed}/{epoch}/crop")

    def clips(self, transform: "Callable[[Image], Tensor]", key: str | None) -> "Callable":
        """The transform, of the frames of videos too where these are read."""
        if self.frames is None:
            return transform
        from tinyvl.media_augment import Clips

        return Clips(transform, self.frames, still=self.modality == "image", key=key)

    def probe(self) -> Tensor:
        """A black input."""
        frames = () if self.modality == "image" else (self.frames,)
        return torch.zeros(1, *frames, 3, self.size, self.size, dtype=torch.uint8)

    def forward(self, images: Tensor) -> Percept:
        """uint8 (B, 3, H, W) or (B, T, 3, H, W) -> Percept, in the dtype of the weights."""
        with torch.set_grad_enabled(self.learns and torch.is_grad_enabled()):
            if images.ndim == 4:
                return self._pieces(images)
            seen, shape = self._pieces(images.flatten(0, 1)), images.shape[:2]
            return Percept(
                seen.tokens.unflatten(0, shape).mean(1),
                [level.unflatten(0, shape).mean(1) for level in seen.summaries],
            )

    def _pieces(self, images: Tensor) -> Percept:
        largest = max(self.size, self.larger)
        at_once = max(1, CPU_PICTURES * self.size**2 // largest**2)
        if images.device.type != "cpu" or torch.is_grad_enabled() or len(images) <= at_once:
            return self._sizes(images)
        return Percept.join([self._sizes(piece) for piece in images.split(at_once)])

    def _sizes(self, images: Tensor) -> Percept:
        seen = self.look(images)
        if not self.larger:
            return seen
        side = (self.larger, self.larger)
        images = F.interpolate(images.float(), side, mode="bicubic").clamp(0, 255)
        return Percept(torch.cat([seen.tokens, self.look(images).tokens], 1), seen.summaries)

    def look(self, images: Tensor) -> Percept:
        """Pictures (B, 3, H, W) as they are, of a size the model reads."""
        dtype = next(self.model.parameters()).dtype
        x = ((images.float() / 255 - self.mean) / self.std).to(
            dtype, memory_format=torch.channels_last
        )
        flat = {"norm": True, "return_prefix_tokens": True, "output_fmt": "NLC"}
        flat = {} if self.maps else flat
        wanted = self.levels and max(self.levels, len(self.below) + self.double)
        try:
            last, levels = self.model.forward_intermediates(x, indices=wanted, **flat)
        except TypeError:  # a model with prefix tokens of another kind, or none to return
            flat.pop("return_prefix_tokens", None)
            last, levels = self.model.forward_intermediates(x, indices=wanted, **flat)
        final = tokens = channels_last(last, self.width)
        if not self.final_norm:
            tokens = normal(tokens)
        if self.below:
            maps = levels[::-1][self.double :][: len(self.below)]
            if levels[-1].shape[-2:].numel() != tokens.shape[1]:
                raise UserError("--lower: the stages of this image encoder do not fit its map.", 2)
            tokens = torch.cat([tokens, *(normal(laid(x, levels[-1])) for x in maps)], -1)
        summaries = [summary(level) for level in levels[-(self.levels or 0) :]]
        if self.maps:
            summaries = [normal(x) for x in (*summaries[:-1], final.mean(1))]
        return Percept(tokens, summaries)

    def train(self, mode: bool = True):
        """A frozen encoder stays in eval mode."""
        return super().train(False)


class Chain:
    """Two functions, one after the other; picklable, for worker processes."""

    def __init__(self, before: "Callable", after: "Callable"):
        self.before, self.after = before, after

    def __call__(self, picture: "Image") -> Tensor:
        return self.after(self.before(picture))


def small_jpeg(picture: "Image") -> "Image":
    """A larger picture as a JPEG of 256 x 256 pixels, quality 75, and back; small ones as they are.

    Small public sets are such files, and modules trained on them alone come to need the traces
    of compression: a sharp photo is outside of all they have seen. So it gets them too.
    """
    if max(picture.size) <= 256:
        return picture
    import io

    from PIL import Image

    file = io.BytesIO()
    picture.resize((256, 256), Image.Resampling.LANCZOS).save(file, "JPEG", quality=75)
    return Image.open(file).convert("RGB")


def channels_last(x: Tensor, width: int) -> Tensor:
    """(B, C, H, W), (B, H, W, C) or (B, S, C) -> (B, S, C)."""
    if x.ndim == 4:
        return x.flatten(2).transpose(1, 2) if x.shape[1] == width else x.flatten(1, 2)
    return x


def laid(x: Tensor, on: Tensor) -> Tensor:
    """A map (B, C, H, W) on the cells of a smaller one, their means: (B, S, C)."""
    if x.device.type == "mps":  # which has this only where the one side divides the other
        return laid(x.cpu(), on).to(x.device)
    return F.adaptive_avg_pool2d(x, on.shape[-2:]).flatten(2).transpose(1, 2)


def normal(x: Tensor) -> Tensor:
    """A LayerNorm without parameters."""
    return F.layer_norm(x.float(), x.shape[-1:]).to(x.dtype)


def summary(level: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """One level to (B, D): its [CLS] token, or the mean of its map."""
    if isinstance(level, tuple):  # (patches, prefix tokens): [CLS] is the first prefix token
        return level[1][:, 0] if level[1] is not None else level[0].mean(1)
    return level.mean((2, 3)) if level.ndim == 4 else level.mean(1)


def norm_types() -> tuple[type, ...]:
    """Normalisations with a scale of their own. timm is not imported for its: it takes seconds."""
    layers = sys.modules.get("timm.layers")
    return (nn.LayerNorm, nn.RMSNorm, *([layers.LayerNorm, layers.RmsNorm] if layers else []))


def load_image_encoder(
    folder: Path,
    *,
    fit: str = "crop",
    levels: int | None = None,
    lower: int = 0,
    larger: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> ImageEncoder:
    """An encoder from a timm checkpoint folder: ``config.json`` and ``model.safetensors``."""
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    encoder = build_image_encoder(config, fit=fit, levels=levels, lower=lower, larger=larger)
    state = load_file(folder / "model.safetensors")
    missing, _ = encoder.model.load_state_dict(state, strict=False)  # a classifier may be extra
    if missing:
        raise UserError(f"{folder}: the weights of {missing[0]} (and maybe more) are missing.")
    return encoder.to(device=device, dtype=dtype)


def build_image_encoder(
    config: dict,
    *,
    fit: str = "crop",
    levels: int | None = None,
    lower: int = 0,
    larger: int = 0,
) -> ImageEncoder:
    """The encoder a timm ``config.json`` describes, with random weights, without classifier."""
    model = build_timm(config)
    if not hasattr(model, "forward_intermediates"):
        raise UserError(
            f"timm's {config['architecture']} has no forward_intermediates, so its tokens cannot "
            "be read; choose another image encoder.",
            2,
        )
    return ImageEncoder(model, fit=fit, levels=levels, lower=lower, larger=larger)


def build_timm(config: dict, **changes: Any) -> nn.Module:
    """The timm model a ``config.json`` describes, random, without classifier.

    ``changes`` go to timm's constructor beside the configuration's own arguments.
    """
    import timm

    if "architecture" not in config:
        raise UserError(
            "This image encoder is not a timm model; name one of timm's, such as "
            "vit_base_patch16_clip_quickgelu_224.openai.",
            2,
        )
    settings = {"pretrained_cfg": config.get("pretrained_cfg"), **config.get("model_args", {})}
    try:
        return timm.create_model(
            config["architecture"], pretrained=False, num_classes=0, **(settings | changes)
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(f"timm has no image model named {config['architecture']!r}.", 2) from error
