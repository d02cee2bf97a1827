"""Frozen encoders of videos and sounds through transformers: TimeSformer, AST and Whisper.

Their summaries are what `encoders` promises: of TimeSformer and AST the [CLS] token of each layer
after the final norm; of Whisper, which has none, the mean over a layer's positions after it, up to
the last that is not silent, so that padding does not thin it out.

TimeSformer reads single pictures too, by its spatial attention alone (eP-ALM, appendix A). The
authors' code drops only the time embeddings then, and leaves the temporal attention in.
"""

import json
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinyvl import UserError
from tinyvl.encoders import (
    ImageEncoder,
    Percept,
    build_image_encoder,
    load_image_encoder,
)
from tinyvl.media_av import MASKS, Sounds

FRAMES = 8
KINDS = {  # model_type: the class in transformers, and where its layers and its final norm are
    "timesformer": ("TimesformerModel", "encoder.layer", "layernorm"),
    "audio-spectrogram-transformer": ("ASTModel", "layers", "layernorm"),
    "whisper": ("WhisperEncoder", "layers", "layer_norm"),
}


class Layered(nn.Module):
    """A transformers encoder whose layers are summed up as they run."""

    def watch(self, model: nn.Module, kind: str, levels: int | None) -> None:
        """Takes the model over, frozen."""
        self.model = model.requires_grad_(False).eval()
        _, layers, norm = KINDS[kind]
        self.layers, self.norm = model.get_submodule(layers), model.get_submodule(norm)
        self.width = self.norm.weight.numel()
        self.first = len(self.layers) - (levels or len(self.layers))
        self.widths = [self.width] * (len(self.layers) - self.first)

    @contextmanager
    def watching(self, summary):
        """-> a list that gets ``summary`` of each layer's normed states, lowest first."""
        found: list[Tensor] = []

        def keep(layer, inputs, output):
            states = output[0] if isinstance(output, tuple) else output
            found.append(summary(self.norm, states))

        hooks = [layer.register_forward_hook(keep) for layer in self.layers[self.first :]]
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()


def cls(norm: nn.Module, states: Tensor) -> Tensor:
    """(B, S, D) -> (B, D): the first token, normed."""
    return norm(states[:, 0])


class TimeSformer(Layered, ImageEncoder):
    """Bertasius, Wang and Torresani, https://arxiv.org/abs/2102.05095. uint8 (B, T, 3, H, W)."""

    def __init__(
        self, model: nn.Module, *, fit: str, levels: int | None, processor: dict | None = None
    ):
        nn.Module.__init__(self)
        self.watch(model, "timesformer", levels)
        processor = processor or {}
        side = model.config.image_size
        config = {
            "input_size": (3, side, side),
            "interpolation": "bilinear",
            "mean": tuple(processor.get("image_mean", (0.45, 0.45, 0.45))),
            "std": tuple(processor.get("image_std", (0.225, 0.225, 0.225))),
            "crop_pct": 1.0,
            "crop_mode": "center",
        }
        self.prepare(config, fit)

    def forward(self, images: Tensor) -> Percept:
        """uint8 (B, T, 3, H, W), or pictures (B, 3, H, W) -> Percept."""
        images = images[:, None] if images.ndim == 4 else images
        dtype = next(self.model.parameters()).dtype
        x = ((images.float() / 255 - self.mean) / self.std).to(dtype)
        with (
            torch.set_grad_enabled(self.learns and torch.is_grad_enabled()),
            self.spatial(images.shape[1]),
            self.watching(cls) as summaries,
        ):
            tokens = self.model(x).last_hidden_state
        return Percept(tokens, summaries)

    @contextmanager
    def spatial(self, frames: int):
        """Tells transformers, by its configuration, how many frames there are: one has no time."""
        places = [self.model.embeddings, *self.layers] if frames == 1 else []
        before, kind = self.model.config.num_frames, self.model.config.attention_type
        self.model.config.num_frames = frames
        for place in places:
            place.attention_type = "space_only"
        try:
            yield
        finally:
            self.model.config.num_frames = before
            for place in places:
                place.attention_type = kind


class AudioEncoder(Layered):
    """AST (https://arxiv.org/abs/2104.01778) or Whisper's encoder (https://arxiv.org/abs/2212.04356).

    Sounds come as float32 (B, 1, frames, mel bins), as `media_av.Sounds` makes them.
    """

    modality, frames, size, fit, below, larger = "audio", None, None, "crop", (), 0

    def __init__(
        self, model: nn.Module, *, levels: int | None, masks: tuple, processor: dict | None = None
    ):
        super().__init__()
        kind, c, self.masks = model.config.model_type, model.config, tuple(masks)
        self.watch(model, kind, levels)
        self.whisper, self.learns = kind == "whisper", False
        if self.whisper:
            from transformers import WhisperFeatureExtractor

            self.seconds = c.max_source_positions / 50  # a position is of two frames of 10 ms
            self.extractor = WhisperFeatureExtractor(
                feature_size=c.num_mel_bins, chunk_length=int(self.seconds)
            )
            self.shape = (2 * c.max_source_positions, c.num_mel_bins)
        else:
            from transformers import ASTFeatureExtractor

            given = {k: v for k, v in (processor or {}).items() if k in ("mean", "std")}
            with warnings.catch_warnings():  # some of AST's own 128 mel bins are empty
                warnings.simplefilter("ignore")
                self.extractor = ASTFeatureExtractor(
                    num_mel_bins=c.num_mel_bins, max_length=c.max_length, **given
                )
            self.seconds = 0.01 * c.max_length + 0.025
            self.shape = (c.max_length, c.num_mel_bins)
        self.data_config: dict[str, Any] = {"frames": self.shape[0], "mel_bins": self.shape[1]}

    def view(self, view: int = 0, seed: int = 0) -> Sounds:
        """What makes a file into a spectrogram: as it is, or masked, differently in each view."""
        key = f"{seed}/{view}" if view else None
        return Sounds(self.extractor, self.seconds, key=key, masks=self.masks)

    def crop(self, epoch: int, seed: int, area: float) -> Sounds:
        """The same with masks that are new in every epoch; ``area`` is for pictures."""
        return Sounds(self.extractor, self.seconds, key=f"{seed}/{epoch}/crop", masks=self.masks)

    def transform(self) -> Sounds:
        return self.view()

    def probe(self) -> Tensor:
        """An input of nothing."""
        return torch.zeros(1, 1, *self.shape)

    def forward(self, sounds: Tensor) -> Percept:
        """float32 (B, 1, frames, mel bins) -> Percept."""
        x = sounds[:, 0].to(next(self.model.parameters()).dtype)
        summary = self.sounding(sounds[:, 0]) if self.whisper else cls
        with (
            torch.set_grad_enabled(self.learns and torch.is_grad_enabled()),
            self.watching(summary) as summaries,
        ):
            tokens = self.model(x.transpose(1, 2) if self.whisper else x).last_hidden_state
        return Percept(tokens, summaries)

    @staticmethod
    def sounding(x: Tensor):
        """A mean over the positions, of two frames each, up to the last that is not silent."""
        loud = (x > x.amin((1, 2), keepdim=True)).any(2)  # (B, frames)
        loud = loud.unflatten(1, (-1, 2)).any(2)
        keep = loud.flip(1).cummax(1).values.flip(1)  # (B, positions)
        keep[~keep.any(1)] = True

        def summary(norm: nn.Module, states: Tensor) -> Tensor:
            states, weight = norm(states), keep[..., None].to(states.dtype)
            return (states * weight).sum(1) / weight.sum(1)

        return summary

    def train(self, mode: bool = True):
        """A frozen encoder stays in eval mode."""
        return super().train(False)


Encoder = ImageEncoder | AudioEncoder


def build_encoder(
    vision: dict[str, Any], folder: Path | None = None, *, levels: int | None = None
) -> Encoder:
    """The encoder that a checkpoint's ``config.json`` describes; random without a folder.

    Args:
        vision: ``config``, ``fit``; where it has any, the number of ``lower`` maps and the side of
            ``larger`` pictures; and, where it is not of pictures, ``modality``, ``frames`` of a
            video, the widest ``masks`` of a sound (mel bins, frames).
    """
    modality, kind = vision.get("modality", "image"), vision["config"].get("model_type")
    if (modality == "audio") != (kind in KINDS and kind != "timesformer"):
        reads = "sounds" if modality != "audio" else "pictures or videos"
        raise UserError(
            f"{vision.get('name', 'This encoder')} reads {reads}, not {modality}; name another "
            f"--vision for --modality {modality}, or another --modality.",
            2,
        )
    more = {key: vision[key] for key in ("lower", "larger") if vision.get(key)}
    given = {"fit": vision["fit"], "levels": levels, **more}
    if kind in KINDS:
        for key, value in more.items():
            raise UserError(f"--{key} {value}: this encoder has no maps.", 2)
        model, processor = load_model(vision["config"], folder)
        if kind != "timesformer":
            masks = vision.get("masks", MASKS)
            return AudioEncoder(model, levels=levels, masks=masks, processor=processor)
        encoder = TimeSformer(model, fit=vision["fit"], levels=levels, processor=processor)
    elif folder is None:
        encoder = build_image_encoder(vision["config"], **given)
    else:
        encoder = load_image_encoder(folder, **given)
    encoder.modality, encoder.frames = modality, vision.get("frames", FRAMES)
    return encoder


def load_model(config: dict[str, Any], folder: Path | None) -> tuple[nn.Module, dict]:
    """A transformers model with the weights of a folder, or random, and how it is fed."""
    import transformers
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    name = KINDS[config["model_type"]][0]
    kind = WhisperEncoder if name == "WhisperEncoder" else getattr(transformers, name)
    settings = {k: v for k, v in config.items() if k != "model_type"}
    made = kind.config_class(**settings)
    if folder is None:
        return kind(made), {}
    file = folder / "preprocessor_config.json"
    processor = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if name == "WhisperEncoder":  # of the whole model's weights the encoder's
        from safetensors.torch import load_file

        model = kind(made)
        state = load_file(folder / "model.safetensors")
        state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
        parts = ((name.partition("encoder."), tensor) for name, tensor in state.items())
        state = {rest: tensor for (before, _, rest), tensor in parts if not before}
        missing, _ = model.load_state_dict(state, strict=False)
    else:
        model, info = kind.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
        missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(f"{folder}: the weights of {missing[0]} (and maybe more) are missing.")
    return model, processor
