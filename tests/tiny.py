"""Tiny backbones for tests: checkpoint folders like those of the hub, made on the spot."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

WORDS = ["<end>", "<unknown>"]
SHAPES = {
    "gpt2": {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "opt": {
        "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 96,
        "max_position_embeddings": 64, "word_embed_proj_dim": 48,
    },
    "llama": {
        "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 96, "max_position_embeddings": 64,
    },
}  # fmt: skip
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4}


def write_decoder(
    folder: Path, family: str, texts: list[str], *, seed: int = 0, **shape: int
) -> Path:
    """A random language model over the words of some texts, id 0 beginning and ending them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    words = sorted({word for text in texts for word in text.split()})
    vocabulary = {word: i for i, word in enumerate(WORDS + words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=WORDS[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=WORDS[0], eos_token=WORDS[0], unk_token=WORDS[1]
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        family,
        vocab_size=len(vocabulary),
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        **(SHAPES[family] | shape),
    )
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def write_vision(
    folder: Path,
    architecture: str = "vit_tiny_patch16_224",
    model_args: dict | None = None,
    state: dict | None = None,
    seed: int = 0,
) -> Path:
    """A timm model as the hub keeps it: config.json and model.safetensors."""
    import timm

    model_args = VIT if model_args is None else model_args
    torch.manual_seed(seed)
    model = timm.create_model(architecture, **model_args)
    folder.mkdir(parents=True, exist_ok=True)
    state = state or model.state_dict()
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")
    side = model_args.get("img_size") or model.default_cfg["input_size"][-1]
    cfg = {
        "input_size": [3, side, side], "mean": [0.5] * 3, "std": [0.5] * 3,
        "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center",
    }  # fmt: skip
    config = {"architecture": architecture, "model_args": model_args, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
