"""Text as models read and write it: token ids, and captions tidied for training."""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Text:
    """A `tokenizers.Tokenizer` with the decoder's begin and end: text <-> ids."""

    def __init__(self, tokenizer: "Tokenizer", bos: int, eos: int):
        self.tokenizer, self.bos, self.eos = tokenizer, bos, eos

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of the bare texts, without begin and end."""
        return [e.ids for e in self.tokenizer.encode_batch(texts, add_special_tokens=False)]

    def spare(self, rows: int) -> range:
        """The ids of an embedding of so many rows that no text has (OPT: 50265 to 50271)."""
        return range(self.tokenizer.get_vocab_size(), rows)

    def decode(self, ids: list[int]) -> str:
        """One line of text: line breaks a model may produce become spaces."""
        return " ".join(self.tokenizer.decode(ids, skip_special_tokens=True).split())


def tidy(caption: str) -> str:
    """A caption as training reads it; tidying twice changes nothing more.

    White space is collapsed, the space that tokenised captions have before ``. , ; : ! ?``,
    ``'s`` and ``n't`` is dropped, LaTeX quotes become ``"``, and the final full stop goes: nine in
    ten of Flickr8k's captions have one and the rest do not, and the metrics' tokenizer ignores it.
    """
    text = " ".join(caption.split())
    text = re.sub(r" (?=[.,;:!?](?!\w)|(?:'s|n't)\b)", "", text)  # (?!\w): not before ".5"
    return text.replace("``", '"').replace("''", '"').rstrip(" .")


def clean_caption(text: str, max_words: int = 30) -> str:
    """A caption as LilT's authors (and ALBEF's) read it: lower case, hardly any punctuation.

    ``,.'!?"()*#:;~`` go, ``-`` and ``/`` become spaces, and at most ``max_words`` words are left.
    """
    text = re.sub(r"[,.'!?\"()*#:;~]", "", text.lower()).replace("-", " ").replace("/", " ")
    return " ".join(text.split()[:max_words])
