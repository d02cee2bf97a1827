"""From a ``config.json`` to the model that it describes: options checked, backbones loaded.

A method's module is imported only where a model of this method is built.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from importlib import import_module
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tinyvl import UserError, files, hub
from tinyvl.models_config import ROLES, backbones, check_sizes, fitting, role_of, towers
from tinyvl.presets_options import METHODS, ImageTuning, TextTuning, Tuning, check_choices
from tinyvl.text import Questions, Text, read_text, slow_tokenizer

if TYPE_CHECKING:
    from tinyvl.captioner import Captioner
    from tinyvl.decoder import DecoderConfig
    from tinyvl.encoders import Encoder, ImageEncoder
    from tinyvl.lilt import LilT
    from tinyvl.lilt_towers import ImageTower, TextTower
    from tinyvl.method import Method

SOUNDS = ("audio-spectrogram-transformer", "whisper")  # model_type in transformers
QUESTIONS = ("task", "separator", "answer_only")  # options of `text.Questions`


def class_of(method: str) -> Any:
    """A method's class, which is named as its options; imports no other method's module."""
    return getattr(import_module(f"tinyvl.{method}"), METHODS[method].__name__)


def new_config(
    method: str, language: str, vision: str, *, fit: str, prompt: str, options: dict[str, Any],
    media: dict[str, Any] | None = None,
) -> dict:  # fmt: skip
    """The ``config.json`` of a model to be trained; fetches its backbones.

    ``media``: extra encoder options, as in `build_encoder`. UserError: a backbone is
    not known, or cannot be fetched.
    """
    config: dict[str, Any] = {"format": 1, "method": method}
    for side, name in zip(towers(method), (language, vision), strict=True):
        extra = (media or {}) if ROLES[side] == "vision" else {}
        folder = hub.fetch(name, role_of(side, extra))
        config[side] = {
            "name": name,
            "sha256": hub.fingerprint(folder),
            "config": files.read_object(folder / "config.json"),
        }
        if ROLES[side] == "vision":
            config[side] |= {"fit": fit, **extra}
    if method != "lilt":
        config["prompt"] = prompt
    return config | {"options": options}


def build(
    config: dict, *, device: torch.device, precision: torch.dtype, weights: bool = True,
    sides: Iterable[str] = tuple(ROLES), encoder: "ImageEncoder | None" = None,
) -> "Method":  # fmt: skip
    """The model of a ``config.json``, its trainable modules new.

    Without ``weights`` it is on the meta device; ``sides``: of a LilT's "text" and "image" those
    that are wanted; ``encoder``: a LilT's image tower has its model.

    UserError: an option is refused, or a backbone's weights are not those that the model was
    trained with.
    """
    lilt = partial(build_lilt, shared=encoder)
    assemble: Callable = lilt if config["method"] == "lilt" else build_captioner
    check_sizes(config)
    if not weights:
        with torch.device("meta"), fitting(config):
            return assemble(config, None, precision)
    folders = {}
    for side, part in backbones(config).items():
        if side not in sides or (encoder and side == "image"):
            continue
        folders[side] = hub.fetch(part["name"], role_of(side, part))
        check_sizes({side: {"config": files.read_object(folders[side] / "config.json")}})
        if part["sha256"] != hub.fingerprint(folders[side]):
            raise UserError(
                f"{part['name']}: the weights here are not those this model was trained with "
                f"(SHA-256 {part['sha256'][:12]}…); its answers would be wrong."
            )
    with fitting(config):
        model = assemble(config, folders, precision)
    return place(model, device, precision)


def place(model: "Method", device: torch.device, precision: torch.dtype) -> "Method":
    """Moves a model: frozen parts in ``precision``, trainable ones in float32 under autocast."""
    from tinyvl.encoders import ImageEncoder

    for module in model.modules():
        if isinstance(module, ImageEncoder):
            module.fold()
    if precision != torch.float32:
        model.halve(precision)
        model.amp = precision
    return model.to(device)


# -------------------------------------------------------------------------------------- captioners


def build_captioner(
    config: dict, folders: dict[str, Path] | None, precision: torch.dtype
) -> "Captioner":
    """A captioner over the backbones in these folders; None: parameters only, random."""
    from tinyvl.decoder import Decoder
    from tinyvl.decoder_weights import decoder_config, load_decoder

    kind = class_of(config["method"])
    lm, vision = config["decoder"], config["vision"]
    encoder = build_encoder(vision, folders and folders["vision"], levels=kind.levels)
    if folders is None:
        decoder, text = Decoder(decoder_config(lm["config"])), Text(None, 0, 0)
    else:
        decoder = load_decoder(folders["decoder"], dtype=precision)
        text = read_text(folders["decoder"], lm["config"])
    prompt = config.get("prompt", "") if folders else ""
    return with_options(config["method"], encoder, decoder, text, prompt, config["options"])


def with_options(
    method: str, encoder: Any, decoder: Any, text: Any, prompt: str, options: dict[str, Any]
) -> "Captioner":
    """A captioner with the options of a ``config.json``.

    UserError: an option is refused, or prompt and prefix leave no room for text.
    """
    own = {name: value for name, value in options.items() if name not in QUESTIONS}
    check_options(method, options, decoder.config, encoder)
    model = class_of(method)(encoder, decoder, text, prompt=prompt, **own)
    if model.room < 2:
        before = f"a prefix of {model.length} and " if model.length else ""
        raise UserError(
            f"This decoder's {decoder.config.max_positions} positions have no room for text "
            f"behind {before}a prompt of {len(model.prompt)} tokens.",
            2,
        )
    if (
        options.get("bare")
        and text.tokenizer is not None
        and model.text.decode([model.text.eos]) != "."
    ):
        raise UserError("--bare: this decoder's tokenizer has no full stop to end texts with.", 2)
    if options.get("task") == "vqa" and text.tokenizer is not None:
        model.questions = Questions(
            text,
            decoder.config.vocab_size,
            lead=" " if model.prompt else "",
            separator=options.get("separator"),
            answer_only=options.get("answer_only", False),
        )
    return model


def check_options(
    method: str, options: dict[str, Any], c: "DecoderConfig", encoder: "ImageEncoder"
) -> None:
    """Raises a UserError for a captioner's option that does not fit its decoder or encoder."""
    check_choices(method, options)
    known = signature(class_of(method)).parameters.values()
    o = SimpleNamespace(**{p.name: p.default for p in known} | options)
    if method == "itune" and not 0 <= o.drop < c.layers:
        raise UserError(f"--drop {o.drop} leaves no module in a decoder of {c.layers} layers.", 2)
    if method == "clipcap" and o.mapping == "transformer" and c.embed_size % o.heads:
        raise UserError(f"--heads {o.heads} does not divide the decoder's width {c.embed_size}.", 2)
    if method == "epalm":
        check_epalm(o, c, encoder)


def check_epalm(o: SimpleNamespace, c: "DecoderConfig", encoder: "ImageEncoder") -> None:
    from tinyvl.epalm import TOWERS, ranges

    within("inject", o.inject, c.layers)
    within("adapt", o.adapt, c.layers)
    if o.tokens == "all":
        if o.extract is not None:
            raise UserError("All tokens are those of the last level: leave out --extract.", 2)
    else:
        within("extract", o.extract, len(encoder.widths))
        extract, inject = ranges(o.extract, o.inject, len(encoder.widths), c.layers)
        if len(extract) > len(inject):
            raise UserError(
                f"{len(extract)} levels of the encoder do not fit into {len(inject)} "
                "layers of the decoder; give fewer levels (--extract) or more layers (--inject).",
                2,
            )
        widths = [encoder.widths[level] for level in extract]
        if o.shared and len(set(widths)) > 1:
            raise UserError(
                f"The encoder's levels differ in width ({', '.join(map(str, widths))}), so they "
                "cannot share one connection; give --separate.",
                2,
            )
    if o.adapters and o.adapters > c.hidden_size:
        raise UserError(f"--adapters {o.adapters} leaves nothing of a width of {c.hidden_size}.", 2)
    if not set(o.unfreeze or []) <= set(TOWERS):
        raise UserError("--unfreeze is vision, lm, or vision,lm.", 2)


def within(name: str, given: list[int] | None, number: int) -> None:
    """Raises a UserError for a range [first, end) that is not within so many."""
    if given is not None and not 0 <= given[0] < given[1] <= number:
        raise UserError(
            f"--{name} {given[0]}:{given[1]} is not within the {number} there are (0:{number}).", 2
        )


def build_encoder(
    vision: dict[str, Any], folder: Path | None = None, *, levels: int | None = None
) -> "Encoder":
    """The encoder as a ``config.json`` describes it; random without a folder.

    Videos' and sounds' code is imported only for them.

    Args:
        vision: ``config`` and ``fit``. Optional: the number of ``lower`` maps, the side of
            ``larger`` pictures, whether the head is read (``projected``: "plain" or "unit"), the
            ``modality``, the ``frames`` of a video, and the widest ``masks`` of a sound (mel bins,
            frames).

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
    from tinyvl.encoders import FRAMES, build_image_encoder

    check_sizes({"vision": vision})
    maps = {key: vision[key] for key in ("lower", "larger", "projected") if vision.get(key)}
    with fitting({"vision": vision}):
        if kind in (*SOUNDS, "timesformer"):
            from tinyvl import encoders_av

            for key, value in maps.items():
                what = "projection" if key == "projected" else "maps"
                raise UserError(f"--{key} {value}: this encoder has no {what}.", 2)
            encoder = encoders_av.build(vision, folder, levels)
        else:
            config, fit = vision["config"], vision["fit"]
            encoder = build_image_encoder(config, folder, fit=fit, levels=levels, **maps)
    if modality != "audio":
        encoder.modality, encoder.frames = modality, vision.get("frames", FRAMES)
    return encoder


# -------------------------------------------------------------------------------------------- LilT


def build_lilt(
    config: dict, folders: dict[str, Path] | None, precision: torch.dtype, *,
    shared: "ImageEncoder | None" = None,
) -> "LilT":  # fmt: skip
    """LilT over the backbones "image" and "text"; None: parameters only, random.

    The tower of a side that is not in ``folders`` is left out, and its projection. ``shared``: the
    image tower has this encoder's model, in which nothing may be trained.
    """
    from tinyvl.lilt import LilT

    check_choices("lilt", config["options"])
    options = dict(config["options"])
    tuned, read = ImageTuning(**options.pop("image", {})), TextTuning(**options.pop("text", {}))
    size, clean = options.pop("size", None), options.pop("clean", False)
    types = options.pop("token_types", True)
    random = options.pop("random_init", False)
    check_lilt((tuned, read), random)
    image = text = None
    if folders is None or shared or "image" in folders:
        folder = folders and folders.get("image")
        image = image_tower(config["image"], tuned, folder, size, random, shared)
    if folders is None or "text" in folders:
        folder = folders and folders["text"]
        whole = read.adapter == "deep" or read.unlock == "all"
        plain = random or (whole and image is not None)  # transformers' model, not our own
        text = text_tower(config["text"], read, folder, clean, random, plain, types)
    dropout = (tuned.dropout, read.dropout)
    own = {"map_width": tuned.width, "mlp": tuned.mlp}
    return LilT(image, text, dropout=dropout, **own, **options)


def check_lilt(tunings: tuple[Tuning, Tuning], random: bool) -> None:
    """Raises a UserError for tunings that contradict themselves, or random towers."""
    if any(tuning.layers and tuning.unlock == "none" for tuning in tunings):
        raise UserError(
            "Layers are chosen of what is unlocked: name that too, as by --text-unlock layernorm "
            "or --image-unlock layernorm.",
            2,
        )
    if random and not all(tuning.unlock == "all" and not tuning.layers for tuning in tunings):
        raise UserError(
            "--random-init is for towers that are trained whole; add --preset clip-base, or "
            "--image-unlock all --text-unlock all.",
            2,
        )


def image_tower(
    image: dict, tuning: ImageTuning, folder: Path | None, size: int | None, random: bool,
    shared: "ImageEncoder | None" = None,
) -> "ImageTower":  # fmt: skip
    """The image tower, tuned; a UserError where it lacks what the tuning asks for."""
    from tinyvl.lilt import add_layerwise_adapters
    from tinyvl.lilt_towers import ImageTower, image_model

    where, deep = image["name"], tuning.adapter == "deep"
    weights = None if random else folder
    if shared:
        model, depth = shared.model, 0  # nothing of it is trained
    else:
        model, depth = image_model(image["config"], weights, size=size, grow=deep)
    if tuning.adapter == "layerwise" and not (depth and add_layerwise_adapters(model)):
        raise UserError(
            f"{where} has no transformer blocks to put layerwise adapters in; use a deep "
            "adapter (--image-adapter deep) or a ViT.",
            2,
        )
    if tuning.layers and not depth:
        raise UserError(f"{where} has no transformer layers to choose from.", 2)
    has_token = bool(getattr(model, "num_prefix_tokens", 0))
    pool = tuning.pool or ("token" if has_token else "mean")
    if pool == "token" and not has_token:
        raise UserError(f"{where} has no [CLS] token; pool its tokens by their mean.", 2)
    over_map = deep and not depth
    own = replace(tuning, adapter="none") if over_map else tuning
    tuned = tuned_names(model, own, depth, where)
    read = {"fit": image["fit"], "pool": pool, "map_adapter": over_map, "blurred": tuning.blurred}
    tower = ImageTower(model, tuned=tuned, **read)
    tower.folded = bool(shared and shared.folded)
    return tower


def text_tower(
    text: dict, tuning: TextTuning, folder: Path | None, clean: bool, random: bool, plain: bool,
    types: bool = True,
) -> "TextTower":  # fmt: skip
    """The text tower, tuned; a UserError where it lacks what the tuning asks for.

    Without ``plain`` it is our own BERT where that can read the checkpoint, because importing
    transformers takes longer than a query. Without ``types`` its token-type embedding is zero.
    """
    from tinyvl import encoders_text
    from tinyvl.lilt import add_layerwise_adapters
    from tinyvl.lilt_towers import TextTower

    grow, where = tuning.adapter == "deep", text["name"]
    model: Any
    tokenizer: Any = None
    if folder and not plain and encoders_text.readable(folder):
        model, tokenizer = encoders_text.load(folder, grow=grow)
    else:
        if folder and not random:
            model = encoders_text.load_text_model(folder, grow=grow)
        else:
            model = encoders_text.build_text_model(text["config"], grow=grow)
        if folder:
            known = slow_tokenizer(folder)
            tokenizer = encoders_text.Tokenizer(known.backend_tokenizer, known.pad_token_id)
    if tuning.adapter == "layerwise" and not add_layerwise_adapters(model):
        raise UserError(f"{where} is no BERT that layerwise adapters fit into.", 2)
    tuned = tuned_names(model, tuning, model.config.num_hidden_layers - grow, where)
    if not types:
        table = getattr(model.embeddings, "token_type_embeddings", None)
        if table is None:
            raise UserError(f"{where} has no token-type embedding to leave out.", 2)
        table.weight.data = torch.zeros_like(table.weight)  # that of the file may be mapped
        tuned -= {"embeddings.token_type_embeddings.weight"}
    pool = tuning.pool or "token"
    return TextTower(model, tokenizer, clean=clean, prefix=tuning.prefix, pool=pool, tuned=tuned)


def tuned_names(model: nn.Module, tuning: Tuning, depth: int, where: str) -> frozenset[str]:
    """`lilt.unlocked`; a UserError where the model has nothing of that kind."""
    from tinyvl.lilt import unlocked

    if tuning.unlock != "none" and not unlocked(model, replace(tuning, adapter="none"), depth):
        what = {"layernorm": "LayerNorms", "bitfit": "biases"}.get(tuning.unlock, "parameters")
        first, last = (i if i >= 0 else depth + i for i in tuning.layers or (0, -1))
        layers = f" in the layers {first} to {last}" if tuning.layers else ""
        raise UserError(f"{where} has no {what}{layers} to unlock; choose another preset.", 2)
    return unlocked(model, tuning, depth)
