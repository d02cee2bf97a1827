"""BERT in plain PyTorch, for queries: the same vectors as transformers' BertModel, sooner.

Devlin et al., https://arxiv.org/abs/1810.04805. Importing transformers' model takes three seconds,
and a query's own work a hundredth of one: `tinyvl retrieve` reads texts with this. Training uses
transformers'. Names of modules and parameters are those of transformers, so its checkpoints load
as they are and LilT's adapters go to the same places.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from tinyvl import UserError


class Residual(nn.Module):
    """LayerNorm(dense(h) + x)."""

    def __init__(self, inner: int, width: int, eps: float):
        super().__init__()
        self.dense = nn.Linear(inner, width)
        self.dropout = nn.Identity()  # an adapter's place
        self.LayerNorm = nn.LayerNorm(width, eps=eps)

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(h)) + x)


class Layer(nn.Module):
    """Attention, then a feed-forward network, a LayerNorm after each."""

    def __init__(self, config: SimpleNamespace):
        super().__init__()
        width, inner, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        self.heads = config.num_attention_heads
        qkv = {name: nn.Linear(width, width) for name in ("query", "key", "value")}
        self.attention = nn.ModuleDict(
            {"self": nn.ModuleDict(qkv), "output": Residual(width, width, eps)}
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, inner)})
        self.output = Residual(inner, width, eps)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (B, T, D), mask (B, 1, 1, T) True where there is a token."""
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in self.attention["self"].values()
        )  # (B, heads, T, D / heads)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = self.attention["output"](seen.transpose(1, 2).flatten(2), x)
        return self.output(F.gelu(self.intermediate["dense"](x)), x)


class Bert(nn.Module):
    """ids and mask (B, T) -> ``last_hidden_state`` (B, T, D); no dropout, no pooler."""

    def __init__(self, config: SimpleNamespace):
        super().__init__()
        self.config, width = config, config.hidden_size
        rows = {
            "word_embeddings": config.vocab_size,
            "position_embeddings": config.max_position_embeddings,
            "token_type_embeddings": config.type_vocab_size,
        }
        # Without _weight it is drawn, and drawing on the meta device imports torch's compiler.
        tables = {n: nn.Embedding(r, width, _weight=torch.empty(r, width)) for n, r in rows.items()}
        self.embeddings = nn.ModuleDict(tables)
        self.embeddings["LayerNorm"] = nn.LayerNorm(width, eps=config.layer_norm_eps)
        layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layer": layers})

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        table = self.embeddings
        positions = table["position_embeddings"].weight[: input_ids.shape[1]]
        x = table["word_embeddings"](input_ids) + table["token_type_embeddings"].weight[0]
        x = table["LayerNorm"](x + positions)
        mask = attention_mask.bool()[:, None, None]
        for layer in self.encoder["layer"]:
            x = layer(x, mask)
        return SimpleNamespace(last_hidden_state=x)


class Tokenizer:
    """A ``tokenizer.json``, called as transformers' tokenizers are."""

    def __init__(self, file: Path, pad_token_id: int):
        import tokenizers

        self.tokenizer, self.pad_token_id = tokenizers.Tokenizer.from_file(str(file)), pad_token_id
        self.tokenizer.no_padding()

    def __call__(self, texts: list[str], *, truncation: bool, max_length: int) -> dict[str, Any]:
        self.tokenizer.enable_truncation(max_length)
        return {"input_ids": [found.ids for found in self.tokenizer.encode_batch(texts)]}


def readable(folder: Path) -> bool:
    """Whether a checkpoint folder is a BERT as it is here, with a tokenizer of one file."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return (
        config.get("model_type") == "bert"
        and config.get("hidden_act", "gelu") == "gelu"
        and config.get("position_embedding_type", "absolute") == "absolute"
        and not config.get("is_decoder", False)
        and (folder / "tokenizer.json").is_file()
    )


def load(folder: Path, *, grow: int = 0) -> tuple[Bert, Tokenizer]:
    """The model of a checkpoint folder and its tokenizer; layers that ``grow`` adds stay empty."""
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = SimpleNamespace(**{"layer_norm_eps": 1e-12, "type_vocab_size": 2, **raw})
    depth = config.num_hidden_layers
    config.num_hidden_layers += grow
    with torch.device("meta"):
        model = Bert(config)
    state = load_file(folder / "model.safetensors")
    old = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
    for name in list(state):
        new = name.removeprefix("bert.")
        for before, after in old.items():  # in Google's first checkpoints
            new = new.replace(before, after)
        state[new] = state.pop(name).float()
    missing, _ = model.load_state_dict(state, strict=False, assign=True)  # a pooler may be extra
    new = tuple(f"encoder.layer.{depth + i}." for i in range(grow))
    if missing := [name for name in missing if not name.startswith(new)]:
        raise UserError(f"{folder}: the weights of {missing[0]} (and maybe more) are missing.")
    for layer in model.encoder["layer"][depth:]:
        layer.to_empty(device="cpu")
    tokenizer = Tokenizer(folder / "tokenizer.json", raw.get("pad_token_id") or 0)
    return model.eval(), tokenizer
