"""Converts weights to safetensors, once: GGUF, .pth, CTranslate2 and .bin files."""

import json
import pickle
import re
import shutil
import struct
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import torch

from tinyvl import UserError, hub_e5
from tinyvl.files import write_tensors
from tinyvl.hub_table import write_json


def bins_to_safetensors(bins: list[Path], target: Path) -> None:
    """Writes each .bin file of a model, and the index of several, as safetensors.

    Raises UserError: a file is damaged, or holds more than tensors.
    """

    def renamed(file: str) -> str:
        return file.removeprefix("pytorch_").replace(".bin", ".safetensors")

    for file in bins:
        mapped = zipfile.is_zipfile(file)  # older files must be read whole
        try:
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError:
            raise UserError(f"{file} holds more than tensors; use another model.") from None
        except (RuntimeError, EOFError, LookupError, ValueError, TypeError) as error:
            raise UserError(f"{file} is damaged; use another model.") from error
        if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
            raise UserError(f"{file} holds more than tensors; use another model.")
        # Tied weights share memory, which safetensors does not write.
        copies = {key: tensor.clone() for key, tensor in tensors.items()}
        write_tensors(target / renamed(file.name), copies, {"format": "pt"})
    if len(bins) > 1:
        index = json.loads((bins[0].parent / "pytorch_model.bin.index.json").read_text())
        index["weight_map"] = {k: renamed(v) for k, v in index["weight_map"].items()}
        write_json(target / "model.safetensors.index.json", index)


def smollm2(source: Path, target: Path) -> None:
    """A Llama GGUF with a byte-level BPE -> what `LlamaForCausalLM.from_pretrained` reads, fp16."""
    import gguf

    reader = gguf.GGUFReader(next(source.glob("*.gguf")))

    def field(key: str):
        return reader.fields[key].contents()

    heads = field("llama.attention.head_count")
    kv_heads = field("llama.attention.head_count_kv")
    theta = float(field("llama.rope.freq_base"))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "vocab_size": field("llama.vocab_size"),
        "hidden_size": field("llama.embedding_length"),
        "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "max_position_embeddings": field("llama.context_length"),
        "rms_norm_eps": float(f"{field('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "rope_theta": theta,  # the spelling before transformers 5
        "tie_word_embeddings": "output.weight" not in {t.name for t in reader.tensors},
        # <|endoftext|> is all three for us; the chat markers are not used.
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "dtype": "float16",
    }  # fmt: skip
    tensors = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        if tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
            weight = unpermute(weight, heads if "attn_q" in tensor.name else kv_heads)
        tensors[llama_name(tensor.name)] = weight.half()
    write_tensors(target / "model.safetensors", tensors, {"format": "pt"})
    write_json(target / "config.json", config)
    parts = (field(f"tokenizer.ggml.{key}") for key in ("tokens", "merges", "token_type"))
    special = write_bpe(target, *parts)
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), special[0]),
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
    }
    write_json(target / "tokenizer_config.json", tokenizer)


def unpermute(weight, heads: int):
    """Reorders q's or k's rows (heads * d, D) from llama.cpp's interleaved RoPE to half-split."""
    return weight.reshape(heads, -1, 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def llama_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    parts = {
        "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    *block, part, kind = name.split(".")
    prefix = f"model.layers.{block[1]}." if block else ""
    return f"{prefix}{parts[part]}.{kind}"


def write_bpe(target: Path, tokens: list[str], merges: list[str], types: list[int]) -> list[str]:
    """Writes a tokenizer.json: single digits, then GPT-2's splits. Returns the special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    digits = pre_tokenizers.Digits(individual_digits=True)
    splits = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, splits])
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == 3]  # control
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.save(str(target / "tokenizer.json"))
    return special


def efficientnet_lite2(source: Path, target: Path) -> None:
    """EfficientNet-Lite2 as a .pth -> timm's names: same entries, same order, other names."""
    import timm

    theirs = torch.load(next(source.glob("*.pth")), map_location="cpu", weights_only=True)
    with torch.device("meta"):
        ours = timm.create_model("tf_efficientnet_lite2", pretrained=False).state_dict()
    if [tensor.shape for tensor in theirs.values()] != [tensor.shape for tensor in ours.values()]:
        advice = "install another version of timm, or name another image encoder"
        what = "EfficientNet-Lite2: the weights do not fit this timm's tf_efficientnet_lite2"
        raise UserError(f"{what}; {advice}.")
    tensors = dict(zip(ours, theirs.values(), strict=True))
    write_tensors(target / "model.safetensors", tensors, {"format": "pt"})
    pretrained = {
        "tag": "in1k", "input_size": [3, 260, 260], "fixed_input_size": False, "pool_size": [9, 9],
        "crop_pct": 0.89, "crop_mode": "center", "interpolation": "bicubic",
        "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "num_classes": 1000,
        "first_conv": "conv_stem", "classifier": "classifier", "license": "apache-2.0",
    }  # fmt: skip
    config = {"architecture": "tf_efficientnet_lite2", "num_classes": 1000, "num_features": 1280}
    write_json(target / "config.json", config | {"pretrained_cfg": pretrained})


def whisper(source: Path, target: Path) -> None:
    """Whisper tiny.en's encoder out of CTranslate2's model.bin -> transformers' names, fp16."""
    theirs = ctranslate2((source / "model.bin").read_bytes())
    theirs = {k.removeprefix("encoder/"): v for k, v in theirs.items() if k.startswith("encoder/")}
    heads = int(theirs.pop("num_heads"))
    tensors = {"embed_positions.weight": theirs.pop("position_encodings/encodings")}
    for name, value in theirs.items():
        name = whisper_name(name)
        if ".qkv." in name:  # in one; the keys have no bias, which is zero here
            for each, part in zip("qkv", np.split(value, 3), strict=True):
                tensors[name.replace("qkv", f"self_attn.{each}_proj")] = part
        else:
            tensors[name] = value
    tensors = {name: t for name, t in tensors.items() if not name.endswith("k_proj.bias")}
    copies = {f"model.encoder.{name}": torch.from_numpy(t.copy()) for name, t in tensors.items()}
    write_tensors(target / "model.safetensors", copies, {"format": "pt"})
    config = {
        "model_type": "whisper",
        "d_model": tensors["layer_norm.weight"].size,
        "encoder_layers": len({name.split(".")[1] for name in tensors if "layers." in name}),
        "encoder_attention_heads": heads,
        "encoder_ffn_dim": tensors["layers.0.fc1.bias"].size,
        "num_mel_bins": tensors["conv1.weight"].shape[1],
        "max_source_positions": len(tensors["embed_positions.weight"]),
        "vocab_size": 51864,
    }
    write_json(target / "config.json", config)


def whisper_name(name: str) -> str:
    """`layer_3/ffn/linear_0/weight` -> `layers.3.fc1.weight`; queries, keys and values: `qkv`."""
    name = re.sub(r"^layer_(\d+)/", r"layers.\1.", name).replace("/", ".")
    parts = {
        "self_attention.layer_norm": "self_attn_layer_norm",
        "self_attention.linear_0": "qkv", "self_attention.linear_1": "self_attn.out_proj",
        "ffn.layer_norm": "final_layer_norm", "ffn.linear_0": "fc1", "ffn.linear_1": "fc2",
        "gamma": "weight", "beta": "bias",
    }  # fmt: skip
    for theirs, ours in parts.items():
        name = name.replace(theirs, ours)
    return name


def ctranslate2(data: bytes) -> dict:
    """The variables of a model.bin (https://opennmt.net/CTranslate2), versions 4 to 6, by name.

    Raises UserError: another version, or a type of number that is not known.
    """
    at = 0

    def take(form: str):
        nonlocal at
        found = struct.unpack_from(f"<{form}", data, at)
        at += struct.calcsize(f"<{form}")
        return found

    def text() -> str:
        nonlocal at
        (size,) = take("H")  # with a zero behind it
        at += size
        return data[at - size : at - 1].decode()

    (version,) = take("I")
    if not 4 <= version <= 6:
        raise UserError(f"model.bin is of CTranslate2's version {version}, not 4 to 6.")
    text(), take("I")  # what kind of model, and which revision of it
    types = {0: np.float32, 4: np.float16, 3: np.int32, 1: np.int8, 2: np.int16}
    found = {}
    for _ in range(*take("I")):
        name = text()
        (rank,) = take("B")
        shape = take(f"{rank}I")
        kind, size = take("BI")
        if kind not in types:
            raise UserError(f"model.bin has {name} in a type that tinyvl does not read.")
        found[name] = np.frombuffer(data, types[kind], size // types[kind]().itemsize, at)
        found[name] = found[name].reshape(shape)
        at += size
    return found


CONVERT = {
    "SmolLM2-135M": smollm2,
    "EfficientNet-Lite2": efficientnet_lite2,
    "all-MiniLM-L6-v2": partial(shutil.copytree, dirs_exist_ok=True),
    "multilingual-e5-small": hub_e5.convert,
    "Whisper-tiny.en": whisper,
}
