"""Text as models read and write it: token ids, questions, and captions tidied for training."""

import json
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyvl import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = logging.getLogger(__name__)


def has_words(text: str) -> bool:
    """Whether a text has a letter or a digit: "...", emoji and U+200B have none."""
    return any(map(str.isalnum, text))


def plain(tokenizer: "Tokenizer", texts: list[str]) -> list[list[int]]:
    """Ids of the bare texts. What spells a special token, as "</s>", is characters as others are.

    What is no Unicode is read as a question mark.
    """
    tokenizer.encode_special_tokens = True  # tokenizers' word for not looking for them
    tokens = tokenizer.get_added_tokens_decoder().items()
    special = {i: token.content for i, token in tokens if token.special}
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    lines = []
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    for text, found in zip(texts, encoded, strict=True):
        line = found.ids
        if not special.keys().isdisjoint(line):  # XLM-R's vocabulary has them as words, too
            line = []
            for i, (start, end) in zip(found.ids, found.offsets, strict=True):
                spelt = special[i] if special.get(i) == text[start:end].strip() else ""
                line += [one.id for c in spelt for one in tokenizer.model.tokenize(c)] or [i]
        lines.append(line)
    return lines


def cut(lines: list, longest: int, what: str, tail: int = 0) -> list:
    """Lines of at most ``longest`` items, the last ``tail`` kept; says how many were longer."""
    if over := sum(len(line) > longest for line in lines):
        log.warning("tinyvl: cut %d of %d texts to %d %s", over, len(lines), longest, what)
    ends = [line[len(line) - tail :] for line in lines]
    return [
        line if len(line) <= longest else line[: longest - tail] + end
        for line, end in zip(lines, ends, strict=True)
    ]


ANSWERS = {"beams": 3, "max_tokens": 10}  # how answers are searched for, unless told otherwise


class Text:
    """A `tokenizers.Tokenizer` with the decoder's begin and end: text <-> ids."""

    def __init__(self, tokenizer: "Tokenizer | None", bos: int, eos: int):
        """``tokenizer`` None: where only parameters are counted."""
        self.tokenizer: Any = tokenizer
        self.bos, self.eos = bos, eos

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of the bare texts, without begin and end."""
        return plain(self.tokenizer, texts)

    def spare(self, rows: int) -> range:
        """The ids that an embedding of so many rows has and no text uses (OPT: 50265 to 50271)."""
        return range(self.tokenizer.get_vocab_size(), rows)

    def decode(self, ids: list[int]) -> str:
        """One line of text: line breaks that a model writes become spaces."""
        return " ".join(self.tokenizer.decode(ids, skip_special_tokens=True).split())


def read_text(folder: Path, config: dict) -> Text:
    """The tokenizer of a decoder's folder, with the ids that begin and end a sequence.

    A tokenizer.json is read as it is, because importing transformers takes longer than a caption.
    Where there is none (OPT), transformers reads the older files. ``config``, the decoder's
    ``config.json``, may name these ids. UserError: no token ends a text.
    """
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        names = folder / "tokenizer_config.json"
        special = json.loads(names.read_text(encoding="utf-8")) if names.is_file() else {}

        def own(key: str) -> int | None:
            token = special.get(key)
            token = token.get("content") if isinstance(token, dict) else token
            return None if token is None else tokenizer.token_to_id(token)

        bos, eos = own("bos_token"), own("eos_token")
    else:
        slow = slow_tokenizer(folder)
        bos, eos, tokenizer = slow.bos_token_id, slow.eos_token_id, slow.backend_tokenizer
    tokenizer.no_truncation()
    tokenizer.no_padding()
    eos = first(eos, config.get("eos_token_id"))
    bos = first(bos, config.get("bos_token_id"), eos)
    if eos is None:
        raise UserError(f"{folder}: this tokenizer has no token that ends a text.")
    return Text(tokenizer, bos, eos)


def slow_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer of a folder, which runs no code that lies there."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def first(*values: Any) -> Any:
    """The first value that is there; the first item of a list (several end tokens)."""
    value = next((v for v in values if v is not None), None)
    return value[0] if isinstance(value, list) else value


class Questions:
    """Questions and answers as ids: ``question</a>answer``.

    ``</a>`` is a spare row of the embedding (OPT has seven, frozen and never trained) or, where
    there is none, the words " Answer:".
    """

    def __init__(
        self, text: Text, rows: int, *, lead: str = "", separator: str | None = None,
        answer_only: bool = False,
    ):  # fmt: skip
        """Args:
            rows: of the decoder's embedding.
            lead: what stands before a question: a space, where a prompt ends in a word.
            separator: words between question and answer, in place of ``</a>``.
            answer_only: the loss is on the answer, not on question and answer as in the paper.

        UserError: the separator has no word that the tokenizer knows.
        """
        self.text, self.lead, self.answer_only = text, lead, answer_only
        spare = text.spare(rows)
        self.in_words = separator is not None or not spare
        words = " Answer:" if separator is None else separator
        self.separator = text.encode([words])[0] if self.in_words else [spare[0]]
        if not self.separator:
            raise UserError("--separator has no word of this decoder's vocabulary.", 2)

    def ask(self, questions: list[str], room: int) -> list[list[int]]:
        """Ids of ``question</a>``, at most ``room`` of them (but one): a long question is cut."""
        longest = max(1, room - len(self.separator))
        ids = self.text.encode([self.lead + " ".join(q.split()) for q in questions])
        return [line + self.separator for line in cut(ids, longest, "tokens")]

    def replies(self, answers: list[str]) -> list[list[int]]:
        """Ids of answers as they follow a question."""
        lead = " " if self.in_words else ""
        return self.text.encode([lead + " ".join(answer.split()) for answer in answers])

    def encode(self, pairs: list[tuple[str, str]], room: int, max_tokens: int) -> list[list[int]]:
        """Ids of ``question</a>answer``, the question in ``room``, the answer in ``max_tokens``.

        Each question and each answer is tokenised once.
        """
        questions = list(dict.fromkeys(question for question, _ in pairs))
        answers = list(dict.fromkeys(answer for _, answer in pairs))
        asked = dict(zip(questions, self.ask(questions, room), strict=True))
        replies = cut(self.replies(answers), max_tokens, "tokens")
        ids = dict(zip(answers, replies, strict=True))
        return [asked[question] + ids[answer] for question, answer in pairs]

    def answer_at(self, ids: list[int]) -> int:
        """Where the answer starts in the ids of ``question</a>answer``."""
        size = len(self.separator)
        ends = range(size, len(ids) + 1)
        return max(end for end in ends if ids[end - size : end] == self.separator)


def tidy(caption: str) -> str:
    """A caption as training reads it; tidying twice changes nothing more.

    White space is collapsed, the space that tokenised captions have before ``. , ; : ! ?``,
    ``'s`` and ``n't`` is dropped, LaTeX quotes become ``"``, and the final full stop goes: nine in
    ten of Flickr8k's captions have one and the rest do not, and the metrics' tokenizer ignores it.
    """
    text = " ".join(caption.split())
    text = re.sub(r" (?=[.,;:!?](?!\w)|(?:'s|n't)\b)", "", text)  # (?!\w): not before ".5"
    return text.replace("``", '"').replace("''", '"').rstrip(" .")


WORDS = 30  # the longest caption that LilT's authors train on


def clean_caption(text: str, max_words: int | None = WORDS) -> str:
    """A caption as LilT's authors (and ALBEF's) read it: lower case, hardly any punctuation.

    In their order: ``,.'!?"()*#:;~`` go, ``-`` and ``/`` become spaces, ``<person>``, which is a
    name in CC3M, becomes ``person``, and at most ``max_words`` words are left.
    """
    text = re.sub(r"[,.'!?\"()*#:;~]", "", text.lower()).replace("-", " ").replace("/", " ")
    return " ".join(text.replace("<person>", "person").split()[:max_words])
