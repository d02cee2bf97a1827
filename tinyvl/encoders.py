"""Frozen perceptual encoders behind one result, `Percept`; here timm's image models, by name.

``tokens`` is the map a method may attend to (I-Tuning): the final tokens of a transformer, [CLS]
included and before any projection, or the cells of a CNN's last feature map. They arrive
normalised: by the encoder's own final norm, or where it has none by a LayerNorm without
parameters. ``summaries`` has one vector a level (eP-ALM): the [CLS] token of each block after the
final norm. An encoder without [CLS] gives the mean of each stage's feature map after a LayerNorm
without parameters; for the last stage that is the mean of its final features, after a CNN's head.
"""

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyvl import UserError
from tinyvl.encoders_fold import fold_norms, pad_within
from tinyvl.files import numbers_in
from tinyvl.media_augment import RandomCrop, SmallJpeg, Thin, View
from tinyvl.packed import pack_vit

ELSEWHERE = {"pretrained", "checkpoint_path", "cache_dir"}  # timm would load other files
FITS = ("crop", "squash", "jpeg")
FRAMES = 8  # of a video, where nobody says how many
# Pictures that a CPU encodes at once. The layers' outputs of more outgrow what malloc keeps (at
# most 32 MB a block): of EfficientNet-Lite2 on 32, in fp32, page faults took 35 of 75 ms a picture.
# With 4, bf16 takes half as long again.
CPU_PICTURES = 8  # of the model's own size; of larger ones fewer


@dataclass
class Percept:
    """What an encoder makes of a batch of pictures, videos or sounds."""

    tokens: Tensor  # (B, S, D)
    summaries: list[Tensor]  # one a level, lowest first: (B, D_level)

    @staticmethod
    def join(parts: "list[Percept]") -> "Percept":
        """One percept of several batches."""
        levels = zip(*(part.summaries for part in parts), strict=True)
        return Percept(torch.cat([part.tokens for part in parts]), [*map(torch.cat, levels)])


class Encoder(nn.Module):
    """A frozen encoder of pictures, videos or sounds: a batch of inputs -> `Percept`.

    What makes a file into an input are picklable transforms for `media_workers.decode_images`:
    ``view()``, and for training ``view(number, seed)`` and ``crop(epoch, seed, area)``.
    """

    modality = "image"
    frames: int | None = None  # of a video; None: videos are not read
    size: int | None = None  # side of the pictures, in pixels
    below: Sequence[int] = ()  # widths of the lower stages' parts of the tokens
    larger = 0  # side of the enlarged pictures whose tokens follow the picture's own
    learns = False  # whether a part of it is trained
    fit = "crop"
    model: Any
    width: int  # of the tokens
    widths: list[int]  # of the summaries
    data_config: dict[str, Any]  # how inputs are made, for the description of a feature cache

    def train(self, mode: bool = True):
        """A frozen encoder stays in eval mode."""
        return super().train(False)

    def pack(self) -> None:
        """Makes an encoder that only runs from now on faster, if there is a way."""


class ImageEncoder(Encoder):
    """A frozen timm model. Pictures come as uint8 (B, 3, H, W); it normalises them itself.

    Of videos (B, T, 3, H, W) it gives the mean over the frames (eP-ALM, Table 13).
    """

    size: int
    mean: Tensor
    std: Tensor
    folded = False

    def __init__(
        self, model: nn.Module, *, fit: str = "crop", levels: int | None = None, lower: int = 0,
        larger: int = 0, projected: str = "",
    ):  # fmt: skip
        """Args:
            fit: "crop" is the model's own transform (resize, centre crop); "squash" resizes the
                whole picture to the model's square, so that its edges stay; "jpeg" is "squash"
                after `media_augment.SmallJpeg`.
            levels: how many summaries, counted from the last level; None: all.
            lower: how many earlier CNN stages to concatenate to each token: averaged to the last
                map's cells, each normalised, highest first.
            larger: a side in pixels. The tokens of the picture enlarged to it follow the
                picture's own, so that a CNN's filters see smaller parts. 0: none.
            projected: the one summary is what the model's head makes of the picture, CLIP's
                embedding: "plain" as it is, "unit" scaled to length one. "": without the head.

        UserError: ``fit`` is unknown, or the model has no maps for ``lower`` or ``larger``.
        """
        super().__init__()
        from timm.data import resolve_data_config

        self.model = model.requires_grad_(False).eval().to(memory_format=torch.channels_last)
        self.levels = levels
        self.prepare(resolve_data_config(model=model), fit)
        norm = getattr(model, "norm", None)
        self.final_norm = norm is not None and isinstance(norm, norm_types())
        self.width = self.model.num_features
        info = getattr(model, "feature_info", None)
        stages = [stage["num_chs"] for stage in getattr(info, "info", info) or []]
        self.maps = info is not None and not hasattr(model, "cls_token")
        below = stages[:-1] if stages[-1:] == [self.width] else stages
        if lower and (not self.maps or lower > len(below)):
            has = f"{len(below)} stages below its last map" if self.maps else "no maps"
            raise UserError(f"--lower {lower}: this image encoder has {has}.", 2)
        self.larger = larger
        if larger:
            self.check_larger()
        self.below = below[::-1][:lower]
        self.last_is_map = below is not stages  # the last stage is the last map
        if self.maps and stages:
            stages = [*stages[:-1], self.width]
        self.projected = projected
        self.widths = [self.model.num_classes] if projected else stages[-(levels or 0) :]

    def check_larger(self) -> None:
        """Raises a UserError where the model cannot read larger pictures of this side."""
        why = ""
        if not self.maps:
            why = "this image encoder has no maps"
        elif self.model.pretrained_cfg.get("fixed_input_size"):
            why = "this image encoder reads one size only"
        elif self.larger <= self.size:
            why = f"give more than this image encoder's own {self.size} pixels"
        if why:
            raise UserError(f"--larger {self.larger}: {why}.", 2)

    def prepare(self, data_config: dict[str, Any], fit: str) -> None:
        """Sets how a picture becomes the model's input."""
        if fit not in FITS:
            raise UserError(f"--fit is one of {', '.join(FITS)}, not {fit!r}.", 2)
        self.fit, self.data_config = fit, data_config
        if fit != "crop":
            self.data_config |= {"crop_mode": "squash", "crop_pct": 1.0}
        self.size = self.data_config["input_size"][-1]
        mean, std = (torch.tensor(self.data_config[k]).view(3, 1, 1) for k in ("mean", "std"))
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def fold(self) -> None:
        """Makes a wholly frozen CNN's layers fewer and faster: the same maps, sooner."""
        if self.folded or any(p.requires_grad for p in self.model.parameters()):
            return
        fold_norms(self.model, lambda: self.look(self.probe().flatten(0, -4)))
        pad_within(self.model)
        self.model.requires_grad_(False).to(memory_format=torch.channels_last)
        self.folded = True

    def pack(self) -> None:
        if type(self.model).__module__.startswith("timm."):
            pack_vit(self.model)

    def transform(self) -> Callable:
        """A picklable function: RGB picture -> uint8 tensor (3, H, W)."""
        from timm.data import create_transform

        config = {k: v for k, v in self.data_config.items() if k not in ("mean", "std")}
        own = create_transform(**config, is_training=False, normalize=False)
        if self.fit == "jpeg":
            return SmallJpeg(own)
        return Thin(own) if config["crop_mode"] == "center" else own

    def view(self, view: int = 0, seed: int = 0, coarsest: int | None = None) -> Callable:
        """A file to an input: as it is, or in one of its varied views (`media_augment.View`)."""
        own = View(self.transform(), view, seed, coarsest) if view else self.transform()
        return self.clips(own, f"{seed}/{view}" if view else None)

    def crop(self, epoch: int, seed: int, area: float) -> Callable:
        """A file to an input: a random view, new in every epoch."""
        return self.clips(RandomCrop(self.size, epoch, seed, area), f"{seed}/{epoch}/crop")

    def clips(self, transform: Callable, key: str | None) -> Callable:
        """A transform that reads videos too, where the encoder reads them."""
        if self.frames is None:
            return transform
        from tinyvl.media_av import Clips

        return Clips(transform, self.frames, still=self.modality == "image", key=key)

    def probe(self) -> Tensor:
        """A black input."""
        frames = () if self.modality == "image" else (self.frames or FRAMES,)
        return torch.zeros(1, *frames, 3, self.size, self.size, dtype=torch.uint8)

    def normalised(self, images: Tensor) -> Tensor:
        """uint8 pixels to the model's range and dtype."""
        dtype = next(self.model.parameters()).dtype
        return ((images.float() / 255 - self.mean) / self.std).to(dtype)

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
        x = self.normalised(images).contiguous(memory_format=torch.channels_last)
        flat = {"norm": True, "return_prefix_tokens": True, "output_fmt": "NLC"}
        flat = {} if self.maps else flat
        wanted = self.levels and max(self.levels, len(self.below) + self.last_is_map)
        try:
            last, levels = self.model.forward_intermediates(x, indices=wanted, **flat)
        except TypeError:  # a model with prefix tokens of another kind, or none to return
            flat.pop("return_prefix_tokens", None)
            last, levels = self.model.forward_intermediates(x, indices=wanted, **flat)
        final = tokens = channels_last(last, self.width)
        if not self.final_norm:
            tokens = normal(tokens)
        if self.below:
            maps = levels[::-1][self.last_is_map :][: len(self.below)]
            if levels[-1].shape[-2:].numel() != tokens.shape[1]:
                raise UserError("--lower: the stages of this image encoder do not fit its map.", 2)
            tokens = torch.cat([tokens, *(normal(laid(x, levels[-1])) for x in maps)], -1)
        if self.projected:
            head = self.model.forward_head(last)
            return Percept(tokens, [F.normalize(head) if self.projected == "unit" else head])
        summaries = [summary(level) for level in levels[-(self.levels or 0) :]]
        if self.maps:
            summaries = [normal(x) for x in (*summaries[:-1], final.mean(1))]
        return Percept(tokens, summaries)


def channels_last(x: Tensor, width: int) -> Tensor:
    """(B, C, H, W), (B, H, W, C) or (B, S, C) -> (B, S, C)."""
    if x.ndim == 4:
        return x.flatten(2).transpose(1, 2) if x.shape[1] == width else x.flatten(1, 2)
    return x


def laid(x: Tensor, on: Tensor) -> Tensor:
    """A map (B, C, H, W) averaged to the cells of a smaller one: (B, S, C)."""
    if x.device.type == "mps":  # which has this only where the one side divides the other
        return laid(x.cpu(), on).to(x.device)
    return F.adaptive_avg_pool2d(x, (on.shape[-2], on.shape[-1])).flatten(2).transpose(1, 2)


def normal(x: Tensor) -> Tensor:
    """A LayerNorm without parameters."""
    return F.layer_norm(x.float(), x.shape[-1:]).to(x.dtype)


def summary(level: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """One level to (B, D): its [CLS] token, or the mean of its map."""
    if isinstance(level, tuple):  # (patches, prefix tokens): [CLS] is the first prefix token
        return level[1][:, 0] if level[1] is not None else level[0].mean(1)
    return level.mean((2, 3)) if level.ndim == 4 else level.mean(1)


def norm_types() -> tuple[type, ...]:
    """The classes of normalisation layers. timm's count if it is imported: that takes seconds."""
    layers = sys.modules.get("timm.layers")
    return (nn.LayerNorm, nn.RMSNorm, *([layers.LayerNorm, layers.RmsNorm] if layers else []))


def refuse_missing(names: Sequence[str], folder: Path) -> None:
    """Raises a UserError that names the first of the missing weights, if there are any."""
    if names:
        raise UserError(f"{folder}: the weights of {names[0]} (and maybe more) are missing.")


def check_weights(build: Callable[[], nn.Module], folder: Path) -> None:
    """Raises a UserError where a model is far larger than the weights in its folder.

    It is built without memory: the one that a stranger's config describes might not fit.
    """
    kept = numbers_in(folder / "model.safetensors")
    with torch.device("meta"):
        wanted = sum(parameter.numel() for parameter in build().parameters())
    if wanted > 2 * kept + 2**20:  # position embeddings may be resized
        has = f"config.json describes {wanted:,} parameters, and its weights are {kept:,}"
        raise UserError(f"{folder}: {has}.")


def build_image_encoder(
    config: dict[str, Any], folder: Path | None = None, **options: Any
) -> ImageEncoder:
    """The encoder a timm ``config.json`` describes, without classifier; ``options``: its own.

    It has the weights of the folder's ``model.safetensors``, or random ones. UserError: timm has no
    such model, the tokens of this one cannot be read, or weights are missing.
    """
    head = {"num_classes": head_size(config)} if options.get("projected") else {}
    if folder is not None and config.get("model_args"):  # else the sizes are timm's own
        check_weights(lambda: build_timm(config, **head), folder)
    model = build_timm(config, **head)
    if not hasattr(model, "forward_intermediates"):
        raise UserError(
            f"timm's {config['architecture']} has no forward_intermediates, so its tokens cannot "
            "be read; choose another image encoder.",
            2,
        )
    if folder is not None:
        from safetensors.torch import load_file

        state = load_file(folder / "model.safetensors")
        missing, _ = model.load_state_dict(state, strict=False)  # a classifier may be extra
        refuse_missing(missing, folder)
    return ImageEncoder(model, **options)


def head_size(config: dict[str, Any]) -> int:
    """How many numbers the head of a timm ``config.json`` gives: of CLIP's, the projection's.

    UserError: it does not say.
    """
    places = (config.get("model_args", {}), config, config.get("pretrained_cfg") or {})
    found = next((place["num_classes"] for place in places if place.get("num_classes")), 0)
    if not isinstance(found, int) or found < 1:
        name = config.get("architecture", "This image encoder")
        raise UserError(f"{name} has no projection that its config.json tells of.", 2)
    return found


def build_timm(config: dict[str, Any], **changes: Any) -> nn.Module:
    """The timm model a ``config.json`` describes, random, without classifier.

    ``changes`` are further arguments of timm's constructor. UserError: it is not a model of timm,
    or timm has none of this name.
    """
    import timm

    if "architecture" not in config:
        raise UserError(
            "This image encoder is not a timm model; name one of timm's, such as "
            "vit_base_patch16_clip_quickgelu_224.openai.",
            2,
        )
    settings = {"pretrained_cfg": config.get("pretrained_cfg"), **config.get("model_args", {})}
    name = str(config["architecture"])
    if odd := settings.keys() & ELSEWHERE:
        raise UserError(f"{name}: its config.json asks for {min(odd)}; use another model.", 2)
    if not re.fullmatch(r"[\w.]+", name):  # timm would read hf-hub:owner/name, or local-dir:folder
        raise UserError(f"timm has no image model named {name!r}.", 2)
    try:
        return timm.create_model(
            name, pretrained=False,
            **(settings | {"num_classes": 0} | changes),  # timm writes a number of its own
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        raise UserError(f"timm has no image model named {name!r}.", 2) from error
