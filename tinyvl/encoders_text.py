"""Text encoders of the BERT family: a `transformers` model without its pooler, and its tokenizer.

A text becomes ``[CLS] tokens [SEP]``, padded on the right under a mask. LilT
(https://arxiv.org/abs/2301.04558) reads token 0 of the last layer; sentence encoders such as
all-MiniLM-L6-v2 were trained for the mean over the tokens.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinyvl import UserError
from tinyvl.text import clean_caption, tidy

POOLS = ("token", "mean")


class TextEncoder(nn.Module):
    """A transformers text encoder: ids (B, T) and mask (B, T) -> final hidden states (B, T, D)."""

    def __init__(self, model: nn.Module, tokenizer: Any = None, *, clean: bool = False):
        """Args:
        tokenizer: transformers' own; None where only parameters are counted.
        clean: texts go through `clean_caption` first.
        """
        super().__init__()
        self.model, self.tokenizer, self.clean = model, tokenizer, clean
        self.width: int = model.config.hidden_size

    def encode(self, texts: list[str], max_tokens: int) -> list[list[int]]:
        """Ids of each text with the tokenizer's begin and end, cut to ``max_tokens`` in all."""
        texts = [clean_caption(text) if self.clean else tidy(text) for text in texts]
        longest = min(max_tokens, self.model.config.max_position_embeddings)
        return self.tokenizer(texts, truncation=True, max_length=longest)["input_ids"]

    def pad(self, ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Lists of ids to a tensor (B, T) padded on the right, and its mask (B, T)."""
        width = max(map(len, ids))
        out = torch.full((len(ids), width), self.tokenizer.pad_token_id or 0)
        mask = torch.zeros(len(ids), width, dtype=torch.long)
        for row, line in enumerate(ids):
            out[row, : len(line)] = torch.tensor(line)
            mask[row, : len(line)] = 1
        return out, mask

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model(input_ids=ids, attention_mask=mask).last_hidden_state


def pool_tokens(tokens: Tensor, mask: Tensor, how: str) -> Tensor:
    """Hidden states (B, T, D) to a vector each (B, D): that of token 0, or the mean of all."""
    if how == "token":
        return tokens[:, 0]
    weights = mask.to(tokens.dtype)[..., None]
    return (tokens * weights).sum(1) / weights.sum(1)


def build_text_model(config: dict, *, grow: int = 0) -> nn.Module:
    """The encoder that a transformers ``config.json`` describes, with random weights, no pooler.

    ``grow`` adds layers on top.
    """
    from transformers import AutoConfig, AutoModel

    own = {k: v for k, v in config.items() if k != "model_type"}
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


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def load_text_model(folder: Path, *, grow: int = 0) -> nn.Module:
    """The encoder of a transformers checkpoint folder; layers that ``grow`` adds stay random."""
    from transformers.utils import logging

    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
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
    depth = raw["num_hidden_layers"]
    new = tuple(f"encoder.layer.{depth + i}." for i in range(grow))
    missing = [name for name in sorted(info["missing_keys"]) if not name.startswith(new)]
    if missing or info["mismatched_keys"]:
        odd = (missing + sorted(map(str, info["mismatched_keys"])))[0]
        raise UserError(f"{folder}: the weights of {odd} (and maybe more) are missing.")
    return model
