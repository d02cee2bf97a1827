"""Transformers checkpoints of the GPT-2, OPT, Llama and Qwen2 families -> a frozen `Decoder`."""

from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from tinyvl import UserError, files, hub
from tinyvl.decoder import ACTIVATIONS, Decoder, DecoderConfig

FAMILIES = "GPT-2, OPT, Llama, SmolLM2, TinyLlama or Qwen2/2.5"


def decoder_config(config: dict) -> DecoderConfig:
    """Reads transformers' ``config.json``.

    UserError: the checkpoint is of another family, or needs something that we do not compute.
    """
    kind = config.get("model_type")
    readers = {"gpt2": gpt2_config, "opt": opt_config, "llama": llama_config, "qwen2": llama_config}
    if kind not in readers:
        raise UserError(
            f"tinyvl cannot read a language model of the type {kind!r}; choose one of {FAMILIES}.",
            2,
        )
    if config.get("quantization_config"):
        refuse(config, "quantised weights")
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(key):
            refuse(config, f"soft-capping ({key})")
    read = readers[kind](config)
    if read.activation not in ACTIVATIONS:
        refuse(config, f"the activation {read.activation!r}")
    return read


def refuse(config: dict, what: str) -> NoReturn:
    raise UserError(
        f"This {config['model_type']} checkpoint uses {what}, which tinyvl's decoder does not "
        f"implement; choose another language model ({FAMILIES}).",
        2,
    )


def gpt2_config(config: dict) -> DecoderConfig:
    if config.get("scale_attn_by_inverse_layer_idx") or not config.get("scale_attn_weights", True):
        refuse(config, "another attention scale")
    d, heads = config["n_embd"], config["n_head"]
    return DecoderConfig(
        config["vocab_size"], d, config["n_layer"], heads, heads, d // heads,
        config.get("n_inner") or 4 * d, config["n_positions"],
        config.get("activation_function", "gelu_new"), config.get("layer_norm_epsilon", 1e-5), d,
        tied=config.get("tie_word_embeddings", True),
    )  # fmt: skip


def opt_config(config: dict) -> DecoderConfig:
    if not config.get("layer_norm_elementwise_affine", True):
        refuse(config, "LayerNorms without weights")
    d, heads = config["hidden_size"], config["num_attention_heads"]
    bias, pre = config.get("enable_bias", True), config.get("do_layer_norm_before", True)
    return DecoderConfig(
        config["vocab_size"], d, config["num_hidden_layers"], heads, heads, d // heads,
        config["ffn_dim"], config["max_position_embeddings"],
        config.get("activation_function", "relu"), 1e-5, config.get("word_embed_proj_dim") or d,
        pre_norm=pre, final_norm=pre and not config.get("_remove_final_layer_norm", False),
        qkv_bias=bias, o_bias=bias, ffn_bias=bias,
        tied=config.get("tie_word_embeddings", True), position_offset=2,
    )  # fmt: skip


def llama_config(config: dict) -> DecoderConfig:
    """Of Llama and of Qwen2, which differ in the biases of the queries, keys and values."""
    if config.get("use_sliding_window"):
        refuse(config, "sliding-window attention")
    if "full_attention" not in (config.get("layer_types") or ["full_attention"]):
        refuse(config, "layers without full attention")
    d, heads = config["hidden_size"], config["num_attention_heads"]
    bias, size = config.get("attention_bias", False), config.get("head_dim") or d // heads
    return DecoderConfig(
        config["vocab_size"], d, config["num_hidden_layers"], heads,
        config.get("num_key_value_heads") or heads, size,
        config["intermediate_size"], config["max_position_embeddings"],
        config.get("hidden_act", "silu"), config.get("rms_norm_eps", 1e-6), d,
        gated=True, rms_norm=True, qkv_bias=config["model_type"] == "qwen2" or bias, o_bias=bias,
        ffn_bias=config.get("mlp_bias", False), tied=config.get("tie_word_embeddings", False),
        rope=frequencies(config, size),
    )  # fmt: skip


def frequencies(config: dict, size: int) -> tuple[float, ...]:
    """RoPE's frequencies of a head of this size; transformers computes those that are scaled."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    kind = rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "linear", "llama3"):
        refuse(config, f"RoPE scaling of the type {kind!r}")
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        refuse(config, "partial rotary embeddings")
    if kind == "default":
        steps = torch.arange(0, size, 2, device="cpu").float() / size
        return tuple((1.0 / rope["rope_theta"] ** steps).tolist())
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    peer = LlamaConfig(
        hidden_size=config["hidden_size"],
        num_attention_heads=config["num_attention_heads"],
        head_dim=size,
        max_position_embeddings=config["max_position_embeddings"],
        rope_parameters=rope,
    )
    return tuple(ROPE_INIT_FUNCTIONS[kind](peer, torch.device("cpu"))[0].tolist())


# Our names for transformers' ones, by family; {i} is the layer.
NAMES = {
    "gpt2": {
        "embed": "wte", "positions": "wpe", "norm": "ln_f", "layers.{i}.norm1": "h.{i}.ln_1",
        "layers.{i}.norm2": "h.{i}.ln_2", "layers.{i}.attention.o": "h.{i}.attn.c_proj",
        "layers.{i}.ffn.up": "h.{i}.mlp.c_fc", "layers.{i}.ffn.down": "h.{i}.mlp.c_proj",
    },
    "opt": {
        "embed": "embed_tokens", "positions": "embed_positions", "norm": "final_layer_norm",
        "project_in": "project_in", "project_out": "project_out",
        "layers.{i}.norm1": "layers.{i}.self_attn_layer_norm",
        "layers.{i}.norm2": "layers.{i}.final_layer_norm",
        "layers.{i}.attention.q": "layers.{i}.self_attn.q_proj",
        "layers.{i}.attention.k": "layers.{i}.self_attn.k_proj",
        "layers.{i}.attention.v": "layers.{i}.self_attn.v_proj",
        "layers.{i}.attention.o": "layers.{i}.self_attn.out_proj",
        "layers.{i}.ffn.up": "layers.{i}.fc1", "layers.{i}.ffn.down": "layers.{i}.fc2",
    },
    "llama": {
        "embed": "embed_tokens", "norm": "norm",
        "layers.{i}.norm1": "layers.{i}.input_layernorm",
        "layers.{i}.norm2": "layers.{i}.post_attention_layernorm",
        "layers.{i}.attention.q": "layers.{i}.self_attn.q_proj",
        "layers.{i}.attention.k": "layers.{i}.self_attn.k_proj",
        "layers.{i}.attention.v": "layers.{i}.self_attn.v_proj",
        "layers.{i}.attention.o": "layers.{i}.self_attn.o_proj",
        "layers.{i}.ffn.up": "layers.{i}.mlp.up_proj",
        "layers.{i}.ffn.gate": "layers.{i}.mlp.gate_proj",
        "layers.{i}.ffn.down": "layers.{i}.mlp.down_proj",
    },
}  # fmt: skip
NAMES["qwen2"] = NAMES["llama"]
STEMS = ("transformer.", "model.decoder.", "decoder.", "model.")  # longest first where nested


def convert_state(kind: str, state: dict[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    """A transformers state dict under our names. Nothing is copied but GPT-2's transposes."""

    def bare(name: str) -> str:
        return next((name[len(s) :] for s in STEMS if name.startswith(s)), name)

    head = state.get("lm_head.weight")
    state = {bare(name): tensor for name, tensor in state.items() if name != "lm_head.weight"}
    out = {} if config.tied or head is None else {"head.weight": head}
    transposed = kind == "gpt2"  # Conv1D keeps its weight as (in, out)
    for ours, theirs in NAMES[kind].items():
        for i in range(config.layers) if "{i}" in ours else (None,):
            for part in ("weight", "bias"):
                tensor = state.get(f"{theirs.format(i=i)}.{part}")
                if tensor is None:
                    continue
                linear = transposed and tensor.ndim == 2 and "{i}" in ours
                out[f"{ours.format(i=i)}.{part}"] = tensor.T.contiguous() if linear else tensor
    if kind == "gpt2":
        for i in range(config.layers):
            for part in ("weight", "bias"):
                fused = state[f"h.{i}.attn.c_attn.{part}"]
                for name, tensor in zip("qkv", fused.chunk(3, -1), strict=True):
                    tensor = tensor.T.contiguous() if part == "weight" else tensor.clone()
                    out[f"layers.{i}.attention.{name}.{part}"] = tensor
    return out


def load_decoder(folder: Path, *, dtype: torch.dtype = torch.float32) -> Decoder:
    """A frozen `Decoder` from a transformers checkpoint folder (safetensors, sharded or not)."""
    from safetensors.torch import load_file

    raw = files.read_object(folder / "config.json")
    config = decoder_config(raw)
    parts = hub.weight_files(folder)
    if not parts or parts[0].suffix != ".safetensors":
        raise UserError(f"{folder}: no .safetensors weights in this folder.")
    state: dict[str, Tensor] = {}
    for file in parts:
        state.update(load_file(file))
    return build_decoder(raw["model_type"], state, config, dtype, str(folder))


def build_decoder(
    kind: str, state: dict[str, Tensor], config: DecoderConfig, dtype: torch.dtype, where: str
) -> Decoder:
    """A frozen decoder of these transformers weights; ``where`` names them in errors."""
    state = convert_state(kind, state, config)
    if not config.tied and "head.weight" not in state:
        config = replace(config, tied=True)  # the file was saved without its (shared) head
    with torch.device("meta"):
        decoder = Decoder(config)
    wanted = dict(decoder.named_parameters())
    missing = sorted(wanted.keys() - state.keys())
    wrong = [n for n in wanted.keys() & state.keys() if wanted[n].shape != state[n].shape]
    if missing or wrong:
        raise UserError(f"{where}: weights missing or of another shape: {(missing + wrong)[:3]}.")
    state = {name: state.pop(name).to(dtype) for name in wanted}  # never two copies of all
    decoder.load_state_dict(state, assign=True)
    return decoder.requires_grad_(False).eval()
