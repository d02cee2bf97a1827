"""Text encoders of the BERT family: transformers' models, and BERT in plain PyTorch.

A text becomes ``[CLS] tokens [SEP]``, padded on the right under a mask. LilT
(https://arxiv.org/abs/2301.04558) reads token 0 of the last layer; sentence encoders such as
all-MiniLM-L6-v2 were trained for the mean over the tokens.

Importing transformers' models takes three seconds and encoding a query a hundredth of one, so
texts are read with `Bert` (Devlin et al., https://arxiv.org/abs/1810.04805), which gives the same
vectors and trains faster on a CPU. Its modules and parameters have transformers' names: checkpoints
load as they are, and LilT's adapters go to the same places. Towers that are trained whole or grow a
layer, and those that `Bert` cannot read, are transformers' own.
"""

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tinyvl import UserError, files, hub
from tinyvl.text import plain

DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}  # BertConfig's own


def pool_tokens(tokens: Tensor, mask: Tensor, how: str) -> Tensor:
    """Hidden states (B, T, D) to a vector each (B, D): that of token 0, or the mean of all."""
    if how == "token":
        return tokens[:, 0]
    weights = mask.to(tokens.dtype)[..., None]
    return (tokens * weights).sum(1) / weights.sum(1)


def read_config(folder: Path) -> dict[str, Any]:
    return files.read_object(folder / "config.json")


def refuse_missing(names: Iterable[str], folder: Path, depth: int) -> None:
    """Raises a UserError for missing weights; those of layers from ``depth`` on may be missing."""
    for name in sorted(names):
        parts = name.split(".")
        if parts[:2] != ["encoder", "layer"] or int(parts[2]) < depth:
            raise UserError(f"{folder}: the weights of {name} (and maybe more) are missing.")


# ------------------------------------------------------------------------------ transformers'


def build_text_model(config: dict[str, Any], *, grow: int = 0) -> Any:
    """The encoder that a transformers ``config.json`` describes, with random weights, no pooler.

    ``grow`` more layers come on top. UserError: it is not of the BERT family.
    """
    from transformers import AutoConfig, AutoModel

    own = {k: v for k, v in hub.harmless(config).items() if k != "model_type"}
    try:
        settings = AutoConfig.for_model(config["model_type"], **own)
        settings.num_hidden_layers += grow
        return AutoModel.from_config(settings, add_pooling_layer=False)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"A text encoder of the type {config.get('model_type')!r} is not one tinyvl can use; "
            "name one of the BERT family (BERT, RoBERTa, XLM-R, MPNet, ELECTRA's kin).",
            2,
        ) from error


def load_text_model(folder: Path, *, grow: int = 0) -> nn.Module:
    """The encoder of a transformers checkpoint folder; ``grow`` random layers come on top.

    UserError: it is not of the BERT family, or weights are missing.
    """
    from transformers.utils import logging

    raw = read_config(folder)
    with torch.device("meta"):
        template = build_text_model(raw, grow=grow)
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # it would warn of the layers that are meant to be new
    logging.disable_progress_bar()
    try:
        model, info = type(template).from_pretrained(
            folder,
            config=template.config,
            add_pooling_layer=False,
            output_loading_info=True,
            local_files_only=True,
            dtype=torch.float32,
        )
    finally:
        logging.set_verbosity(before)
    odd = [*info["missing_keys"], *map(str, info["mismatched_keys"])]
    refuse_missing(odd, folder, raw["num_hidden_layers"])
    return model


# ------------------------------------------------------------------------------ plain BERT


class Residual(nn.Module):
    """LayerNorm(dense(h) + x)."""

    def __init__(self, inner: int, width: int, config: SimpleNamespace):
        super().__init__()
        self.dense = nn.Linear(inner, width)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)  # an adapter's place, behind it
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(h)) + x)


def placed(x: Tensor, device: torch.device) -> Tensor:
    """The same tensor on a device, which is not waited for."""
    return x.to(device, non_blocking=True)


class Piece:
    """Some texts of a batch, padded to the longest of these: attention costs its square."""

    TEXTS = 32  # on a CPU; elsewhere a batch is one piece

    def __init__(self, mask: Tensor, device: torch.device):
        """mask (B, T) True where there is a token."""
        longest = int(mask.any(0).nonzero().max()) + 1 if bool(mask.any()) else 1
        mask = mask[:, :longest]
        self.real = placed(mask.flatten().nonzero()[:, 0], device)  # (n,)
        self.mask = placed(mask, device)

    @staticmethod
    def of(mask: Tensor, device: torch.device) -> "list[Piece]":
        size = Piece.TEXTS if device.type == "cpu" else len(mask)
        return [Piece(part, device) for part in mask.split(max(1, size))]

    def spread(self, x: Tensor, heads: int) -> Tensor:
        """This piece's tokens (n, D) -> (B, heads, T, D / heads), 0 at padding."""
        places = x.new_zeros(self.mask.numel(), x.shape[-1]).index_copy(0, self.real, x)
        return places.view(*self.mask.shape, heads, -1).transpose(1, 2)

    def pack(self, x: Tensor) -> Tensor:
        """(B, T, ...) -> (n, D), the tokens that are there."""
        return x.reshape(self.mask.numel(), -1).index_select(0, self.real)


class Layer(nn.Module):
    """Attention, then a feed-forward network, a LayerNorm after each."""

    def __init__(self, config: SimpleNamespace):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.heads, self.dropout = config.num_attention_heads, config.attention_probs_dropout_prob
        qkv = {name: nn.Linear(width, width) for name in ("query", "key", "value")}
        self.attention: Any = nn.ModuleDict(
            {"self": nn.ModuleDict(qkv), "output": Residual(width, width, config)}
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, inner)})
        self.output = Residual(inner, width, config)

    def forward(self, x: Tensor, pieces: list[Piece]) -> Tensor:
        """x (N, D), tokens without padding, first those of the first piece."""
        sizes = [len(piece.real) for piece in pieces]
        projected = (project(x).split(sizes) for project in self.attention["self"].values())
        dropout, seen = self.dropout if self.training else 0.0, []
        for piece, *parts in zip(pieces, *projected, strict=True):
            q, k, v = (piece.spread(part, self.heads) for part in parts)
            mask = piece.mask[:, None, None]
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
            seen.append(piece.pack(mixed.transpose(1, 2)))
        x = self.attention["output"](torch.cat(seen), x)
        return self.output(F.gelu(self.intermediate["dense"](x)), x)


class Bert(nn.Module):
    """ids and mask (B, T) -> ``last_hidden_state`` (B, T, D), 0 at padding; no pooler.

    A GPU need not be waited for where the mask is on the host.
    """

    def __init__(self, config: SimpleNamespace):
        super().__init__()
        self.config, width = config, config.hidden_size
        self.recompute = False  # layers, in the backward pass
        rows = {
            "word_embeddings": config.vocab_size,
            "position_embeddings": config.max_position_embeddings,
            "token_type_embeddings": config.type_vocab_size,
        }
        # Without _weight torch draws one, which on the meta device imports torch's compiler.
        tables = {n: nn.Embedding(r, width, _weight=torch.empty(r, width)) for n, r in rows.items()}
        self.embeddings: Any = nn.ModuleDict(tables)
        self.embeddings["LayerNorm"] = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.embeddings["dropout"] = nn.Dropout(config.hidden_dropout_prob)
        layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.encoder: Any = nn.ModuleDict({"layer": layers})

    def gradient_checkpointing_enable(self, _: dict[str, Any]) -> None:
        self.recompute = True

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        table, mask, device = self.embeddings, attention_mask.bool(), input_ids.device
        # Padding costs the token-wise layers nothing.
        real = placed(mask.flatten().nonzero()[:, 0], device)
        ids, at = input_ids.flatten()[real], real % mask.shape[1]
        x = table["word_embeddings"](ids).float() + table["token_type_embeddings"].weight[0]
        x = table["dropout"](table["LayerNorm"](x + table["position_embeddings"](at)))
        pieces = Piece.of(mask, device)
        for layer in self.encoder["layer"]:
            if self.recompute and self.training:
                x = checkpoint(layer, x, pieces, use_reentrant=False)
            else:
                x = layer(x, pieces)
        x = x.new_zeros(mask.numel(), x.shape[-1]).index_copy(0, real, x)
        return SimpleNamespace(last_hidden_state=x.view(*mask.shape, -1))


class Tokenizer:
    """A tokenizer of texts with begin and end."""

    def __init__(self, tokenizer: Any, pad_token_id: int | None):
        """``tokenizer``: of the package ``tokenizers``, as in a ``tokenizer.json``."""
        self.tokenizer, self.pad_token_id = tokenizer, pad_token_id or 0
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.begin, *self.end = tokenizer.encode("").ids

    def __call__(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, with begin and end."""
        return [[self.begin, *line, *self.end] for line in plain(self.tokenizer, texts)]


def readable(folder: Path) -> bool:
    """Whether `load` can read a checkpoint folder: a plain BERT with a ``tokenizer.json``."""
    config = read_config(folder)
    return (
        config.get("model_type") == "bert"
        and config.get("hidden_act", "gelu") == "gelu"
        and config.get("position_embedding_type", "absolute") == "absolute"
        and not config.get("is_decoder", False)
        and (folder / "tokenizer.json").is_file()
    )


def load(folder: Path, *, grow: int = 0) -> tuple[Bert, Tokenizer]:
    """A `readable` folder's model and tokenizer; ``grow`` empty layers come on top.

    UserError: weights are missing.
    """
    import tokenizers
    from safetensors.torch import load_file

    raw = read_config(folder)
    config = SimpleNamespace(**{"layer_norm_eps": 1e-12, "type_vocab_size": 2, **DROPOUT, **raw})
    depth = config.num_hidden_layers
    config.num_hidden_layers += grow
    with torch.device("meta"):
        model = Bert(config)
    state = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        name = name.removeprefix("bert.")  # so in Google's first checkpoints, and the next two
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
        # The word embedding stays as the file has it, mapped: a text reads a few of its rows.
        kept = tensor if name.endswith("word_embeddings.weight") else tensor.float()
        state[name.replace("LayerNorm.beta", "LayerNorm.bias")] = kept
    missing, _ = model.load_state_dict(state, strict=False, assign=True)  # a pooler may be extra
    refuse_missing(missing, folder, depth)
    for layer in model.encoder["layer"][depth:]:
        layer.to_empty(device="cpu")
    known = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return model.eval(), Tokenizer(known, raw.get("pad_token_id"))
