"""Random models at the papers' shapes: tinyvl's, and transformers' with the same weights.

Speed and memory do not depend on what a model has learnt.
"""

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from tinyvl.decoder import Decoder
from tinyvl.decoder_weights import build_decoder, decoder_config
from tinyvl.encoders import Encoder
from tinyvl.itune import ITune
from tinyvl.text import Text

VOCABULARY, BOS = 50257, 50256


class Ids(Text):
    """Texts are ids, and no id is spare."""

    def __init__(self, bos: int, eos: int):
        super().__init__(None, bos, eos)

    def spare(self, rows: int) -> range:
        return range(0)


class Cached(Encoder):
    """In place of an encoder whose tokens or vectors come from a cache."""

    tuned: frozenset[str] = frozenset()
    map_adapter = False

    def __init__(self, width: int, levels: int = 1):
        super().__init__()
        self.model, self.width, self.widths = nn.Identity(), width, [width] * levels

    def pooled(self, tokens: Tensor) -> Tensor:
        return tokens.mean(1)


def gpt2(layers: int, width: int) -> GPT2LMHeadModel:
    """GPT-2 as transformers has it, frozen; 12 layers and a width of 768 are its base model."""
    config = GPT2Config(
        n_layer=layers, n_embd=width, n_head=width // 64, bos_token_id=BOS, eos_token_id=None
    )
    lm = GPT2LMHeadModel(config).requires_grad_(False).eval()
    lm.loss_type = "ForCausalLM"  # what it takes anyway, with a warning
    return lm


def ours(lm: PreTrainedModel) -> Decoder:
    """The decoder of tinyvl with a copy of these weights."""
    raw = lm.config.to_dict()
    state = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    config = decoder_config(raw)
    return build_decoder(raw["model_type"], state, config, torch.float32, "the benchmark")


def itune(encoder: Encoder, lm: PreTrainedModel, eos: int) -> ITune:
    """I-Tuning in every layer, its modules as if trained: all their weights differ from zero."""
    model = ITune(encoder, ours(lm), Ids(BOS, eos))
    for module in model.itune.values():
        nn.init.normal_(module.o.weight, std=0.02)
    return model


class Filter(nn.Module):
    """I-Tuning's equations for one layer, as a forward hook of a feed-forward."""

    def __init__(self, width: int, vision: int):
        super().__init__()
        self.q = nn.Linear(width, width // 2)
        self.k, self.v = nn.Linear(vision, width // 2), nn.Linear(vision, width // 2)
        self.o = nn.Linear(width // 2, width)

    def see(self, tokens: Tensor) -> None:
        """Image tokens (B, S, D), a picture for each row of the texts."""
        self.keys, self.values = self.k(tokens), self.v(tokens)

    def hook(self, _: nn.Module, arguments: tuple[Tensor], out: Tensor) -> Tensor:
        scores = self.q(arguments[0]) @ self.keys.mT
        return out + self.o(scores.softmax(-1) @ self.values)


class Hooked(nn.Module):
    """transformers' GPT-2 with I-Tuning's modules hooked in: the same weights as ``model``."""

    def __init__(self, lm: GPT2LMHeadModel, model: ITune):
        super().__init__()
        self.lm, self.handles, self.itune = lm, [], nn.ModuleList()
        for block, module in zip(lm.transformer.h, model.itune.values(), strict=True):
            added = Filter(lm.config.n_embd, model.encoder.width)
            added.load_state_dict(module.state_dict())
            self.itune.append(added)
            self.handles.append(block.mlp.register_forward_hook(added.hook))

    def see(self, tokens: Tensor) -> None:
        for added in self.itune:
            added.see(tokens)

    def remove(self) -> None:
        """The language model is then as it was."""
        for handle in self.handles:
            handle.remove()


def captions(rng: np.random.Generator, count: int, vocabulary: int = VOCABULARY) -> list[list[int]]:
    """Random ids as many as COCO's captions have: 11.5 tokens, a few more or less."""
    lengths = rng.normal(11.5, 2.5, count).round().clip(6, 24).astype(int)
    return [rng.integers(10, vocabulary - 10, n).tolist() for n in lengths]
