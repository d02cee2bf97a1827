"""Frozen encoders of videos and sounds through transformers: TimeSformer, AST and Whisper.

The summaries of TimeSformer and AST are the [CLS] token of each layer after the final norm.
Whisper has no [CLS]: a summary is the mean over a layer's positions after the final norm, up to
the last position that is not silent, so that padding does not dilute it.

TimeSformer reads single pictures too, with its spatial attention alone (eP-ALM, appendix A). The
authors' code then drops only the time embeddings, and keeps the temporal attention.
"""

import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinyvl.encoders import Encoder, ImageEncoder, Percept, check_weights, refuse_missing
from tinyvl.files import read_object
from tinyvl.hub import harmless
from tinyvl.media_sound import MASKS, Sounds
from tinyvl.packed import pack_linears

KINDS = {  # model_type: the class in transformers, and where its layers and its final norm are
    "timesformer": ("TimesformerModel", "encoder.layer", "layernorm"),
    "audio-spectrogram-transformer": ("ASTModel", "layers", "layernorm"),
    "whisper": ("WhisperEncoder", "layers", "layer_norm"),
}


class Layered(Encoder):
    """A transformers encoder that records a summary of each layer."""

    def watch(self, model: Any, kind: str, levels: int | None) -> None:
        """Freezes a model and finds its layers and its final norm."""
        self.model = model.requires_grad_(False).eval()
        _, layers, norm = KINDS[kind]
        self.layers, self.norm = model.get_submodule(layers), model.get_submodule(norm)
        self.width = self.norm.weight.numel()
        self.first = len(self.layers) - (levels or len(self.layers))
        self.widths = [self.width] * (len(self.layers) - self.first)

    def pack(self) -> None:
        pack_linears(self.layers)

    def run(self, x: Tensor, summary: Callable[[nn.Module, Tensor], Tensor]) -> Percept:
        """The model's last states, and ``summary(norm, states)`` of each layer, lowest first."""
        found: list[Tensor] = []

        def keep(layer, inputs, output):
            states = output[0] if isinstance(output, tuple) else output
            found.append(summary(self.norm, states))

        hooks = [layer.register_forward_hook(keep) for layer in self.layers[self.first :]]
        try:
            with torch.set_grad_enabled(self.learns and torch.is_grad_enabled()):
                return Percept(self.model(x).last_hidden_state, found)
        finally:
            for hook in hooks:
                hook.remove()


def cls(norm: nn.Module, states: Tensor) -> Tensor:
    """(B, S, D) -> (B, D): the first token, normed."""
    return norm(states[:, 0])


class TimeSformer(Layered, ImageEncoder):
    """Bertasius, Wang and Torresani, https://arxiv.org/abs/2102.05095. uint8 (B, T, 3, H, W)."""

    def __init__(self, model: Any, *, fit: str, levels: int | None, processor: dict):
        Encoder.__init__(self)
        self.watch(model, "timesformer", levels)
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
        with self.spatial(images.shape[1]):
            return self.run(self.normalised(images), cls)

    @contextmanager
    def spatial(self, frames: int):
        """Sets the number of frames in the model's configuration; one frame has no time."""
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

    Sounds come as float32 (B, 1, frames, mel bins), as `media_sound.Sounds` makes them.
    """

    modality = "audio"
    extractor: Any

    def __init__(self, model: Any, *, levels: int | None, masks: tuple, processor: dict):
        super().__init__()
        kind, c, self.masks = model.config.model_type, model.config, tuple(masks)
        self.watch(model, kind, levels)
        self.whisper = kind == "whisper"
        if self.whisper:
            from transformers import WhisperFeatureExtractor

            self.seconds = c.max_source_positions / 50  # a position is of two frames of 10 ms
            self.extractor = WhisperFeatureExtractor(
                feature_size=c.num_mel_bins, chunk_length=int(self.seconds)
            )
            self.shape = (2 * c.max_source_positions, c.num_mel_bins)
        else:
            from transformers import ASTFeatureExtractor

            given = {k: v for k, v in processor.items() if k in ("mean", "std")}
            with warnings.catch_warnings():  # some of AST's own 128 mel bins are empty
                warnings.simplefilter("ignore")
                self.extractor = ASTFeatureExtractor(
                    num_mel_bins=c.num_mel_bins, max_length=c.max_length, **given
                )
            self.seconds = 0.01 * c.max_length + 0.025
            self.shape = (c.max_length, c.num_mel_bins)
        self.data_config = {"frames": self.shape[0], "mel_bins": self.shape[1]}

    def view(self, view: int = 0, seed: int = 0) -> Sounds:
        """A file to a spectrogram: as it is, or masked differently in each view."""
        key = f"{seed}/{view}" if view else None
        return Sounds(self.extractor, self.seconds, key=key, masks=self.masks)

    def crop(self, epoch: int, seed: int, area: float) -> Sounds:
        """A file to a spectrogram with masks new in every epoch; ``area`` is for pictures."""
        return Sounds(self.extractor, self.seconds, key=f"{seed}/{epoch}/crop", masks=self.masks)

    def probe(self) -> Tensor:
        """A silent input."""
        return torch.zeros(1, 1, *self.shape)

    def forward(self, sounds: Tensor) -> Percept:
        """float32 (B, 1, frames, mel bins) -> Percept."""
        x = sounds[:, 0].to(next(self.model.parameters()).dtype)
        if self.whisper:
            return self.run(x.transpose(1, 2), self.sounding(sounds[:, 0]))
        return self.run(x, cls)

    @staticmethod
    def sounding(x: Tensor):
        """The mean over the positions (two frames each) up to the last that is not silent."""
        loud = (x > x.amin((1, 2), keepdim=True)).any(2)  # (B, frames)
        loud = loud.unflatten(1, (-1, 2)).any(2)
        keep = loud.flip(1).cummax(1).values.flip(1)  # (B, positions)
        keep[~keep.any(1)] = True

        def summary(norm: nn.Module, states: Tensor) -> Tensor:
            states, weight = norm(states), keep[..., None].to(states.dtype)
            return (states * weight).sum(1) / weight.sum(1)

        return summary


def build(vision: dict[str, Any], folder: Path | None, levels: int | None) -> Encoder:
    """A TimeSformer or an `AudioEncoder`; the arguments are as in `models_build.build_encoder`."""
    model, processor = load_model(vision["config"], folder)
    if vision["config"]["model_type"] == "timesformer":
        return TimeSformer(model, fit=vision["fit"], levels=levels, processor=processor)
    masks = vision.get("masks", MASKS)
    return AudioEncoder(model, levels=levels, masks=masks, processor=processor)


def load_model(config: dict[str, Any], folder: Path | None) -> tuple[nn.Module, dict]:
    """A transformers model with a folder's weights, or random; and its preprocessor's config."""
    import transformers
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    name = KINDS[config["model_type"]][0]
    kind: Any = WhisperEncoder if name == "WhisperEncoder" else getattr(transformers, name)
    settings = {k: v for k, v in harmless(config).items() if k != "model_type"}
    made = kind.config_class(**settings)
    if folder is None:
        return kind(made), {}
    file = folder / "preprocessor_config.json"
    processor = read_object(file) if file.is_file() else {}
    if name == "WhisperEncoder":  # the file holds the decoder's weights too
        from safetensors.torch import load_file

        check_weights(lambda: kind(made), folder)
        model = kind(made)
        found = load_file(folder / "model.safetensors").items()
        parts = ((name.removeprefix("model.").partition("encoder."), t) for name, t in found)
        state = {rest: tensor for (before, _, rest), tensor in parts if not before}
        missing, _ = model.load_state_dict(state, strict=False)
    else:
        model, info = kind.from_pretrained(
            folder,
            config=made,
            local_files_only=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
        missing = sorted(info["missing_keys"])
    refuse_missing(missing, folder)
    return model, processor
