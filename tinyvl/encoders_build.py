"""The encoder that a checkpoint describes. Videos' and sounds' code is imported only for them."""

from pathlib import Path
from typing import Any

from tinyvl import UserError
from tinyvl.encoders import FRAMES, Encoder, build_image_encoder

SOUNDS = ("audio-spectrogram-transformer", "whisper")  # model_type in transformers


def build_encoder(
    vision: dict[str, Any], folder: Path | None = None, *, levels: int | None = None
) -> Encoder:
    """The encoder that a checkpoint's ``config.json`` describes; random without a folder.

    Args:
        vision: ``config`` and ``fit``. Optional: the number of ``lower`` maps, the side of
            ``larger`` pictures, the ``modality``, the ``frames`` of a video, and the widest
            ``masks`` of a sound (mel bins, frames).

    UserError: it does not read this modality, or has no maps for ``lower`` or ``larger``.
    """
    modality, kind = vision.get("modality", "image"), vision["config"].get("model_type")
    if (modality == "audio") != (kind in SOUNDS):
        reads = "sounds" if kind in SOUNDS else "pictures or videos"
        raise UserError(
            f"{vision.get('name', 'This encoder')} reads {reads}, not {modality}; name another "
            f"--vision for --modality {modality}, or another --modality.",
            2,
        )
    maps = {key: vision[key] for key in ("lower", "larger") if vision.get(key)}
    if kind in (*SOUNDS, "timesformer"):
        from tinyvl import encoders_av

        for key, value in maps.items():
            raise UserError(f"--{key} {value}: this encoder has no maps.", 2)
        encoder = encoders_av.build(vision, folder, levels)
    else:
        config, fit = vision["config"], vision["fit"]
        encoder = build_image_encoder(config, folder, fit=fit, levels=levels, **maps)
    if modality != "audio":
        encoder.modality, encoder.frames = modality, vision.get("frames", FRAMES)
    return encoder
