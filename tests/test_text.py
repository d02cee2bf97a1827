"""Text and ids: special tokens that are spelt, captions without words, what is cut."""

from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tinyvl import data, data_check, train_cider
from tinyvl.captioner import Captioner
from tinyvl.data import Record
from tinyvl.encoders_text import Tokenizer as Framed
from tinyvl.metrics_captions import caption_scores, tokenise
from tinyvl.text import Questions, Text, cut, has_words, plain

TEXTS = ["a sign that says SEP on a wall", "end of text", "/s", "a b c d e f g h i j k l m n"]


def bpe() -> Tokenizer:
    """As GPT-2's and SmolLM2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def wordpiece() -> Tokenizer:
    """As BERT's."""
    letters = sorted(set("".join(TEXTS)) | set("[]<|>/"))
    words = ["[CLS]", "[SEP]", "[UNK]", *letters, *(f"##{letter}" for letter in letters)]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 1), ("[CLS]", 0))
    tokenizer.add_special_tokens(["[CLS]", "[SEP]", "[UNK]"])
    return tokenizer


def unigram() -> Tokenizer:
    """As XLM-R's and e5's, whose vocabulary has the special tokens among its words."""
    letters = sorted(set("".join(TEXTS)) | set("<>/"))
    pieces = [("<s>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0)]
    tokenizer = Tokenizer(models.Unigram(pieces + [(c, -2.0) for c in letters], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = processors.BertProcessing(("</s>", 1), ("<s>", 0))
    tokenizer.add_special_tokens(["<s>", "</s>", "<unk>"])
    return tokenizer


MADE = {"bpe": (bpe, "<|endoftext|>"), "bert": (wordpiece, "[SEP]"), "xlmr": (unigram, "</s>")}


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("place", ["{}", "a sign that says {} on a wall", "x{}y {}{}"])
def test_a_spelt_special_token_is_plain_characters(kind, place):
    make, token = MADE[kind]
    tokenizer, text = make(), place.replace("{}", token)
    special = {tokenizer.token_to_id(token), tokenizer.token_to_id("<unk>")}
    assert special & set(tokenizer.encode(text, add_special_tokens=False).ids)  # its own way
    (ids,) = plain(tokenizer, [text])
    assert not special & set(ids)
    spelt = "".join(tokenizer.id_to_token(i).removeprefix("##").strip("▁Ġ") for i in ids)
    assert spelt == text.replace(" ", "")


def test_other_texts_have_the_ids_they_had():
    for make, _ in MADE.values():
        wanted = [make().encode(text, add_special_tokens=False).ids for text in TEXTS]
        assert plain(make(), TEXTS) == wanted
    assert Text(bpe(), 0, 0).decode(Text(bpe(), 0, 0).encode(["a \ud83d"])[0]) == "a ?"


def test_begin_and_end_come_from_the_tokenizer_and_not_from_the_text():
    for make, token in (MADE["bert"], MADE["xlmr"]):
        known = PreTrainedTokenizerFast(tokenizer_object=make())
        framed = Framed(known.backend_tokenizer, None)
        first, second = framed([f"a {token} wall", ""])
        assert (first[0], first[-1], second) == (0, 1, [0, 1])
        assert 1 not in first[1:-1]


def test_a_word_of_rewards_ends_a_caption_and_stands_in_none():
    assert train_cider.words("a </s> wall", False).split().count(train_cider.END) == 0
    assert train_cider.words("A </S> WALL", True).split().count(train_cider.END) == 1


def test_what_is_cut_is_counted_and_keeps_its_end(caplog):
    assert cut([[1, 2, 3, 4], [1, 2], []], 3, "tokens", tail=1) == [[1, 2, 4], [1, 2], []]
    assert cut([[1, 2], [1]], 2, "tokens") == [[1, 2], [1]]
    assert [record.message for record in caplog.records] == ["tinyvl: cut 1 of 3 texts to 3 tokens"]


def test_a_captioners_texts_are_cut_and_counted(caplog):
    model = SimpleNamespace(prompt=[], room=9, text=Text(bpe(), 0, 0))
    assert [len(ids) for ids in Captioner.encode(model, ["q q q q q", "q"], 3)] == [3, 1]
    assert [len(ids) for ids in Captioner.encode(model, ["q" * 20], 99)] == [8]
    asked = Questions(model.text, 0)
    size = len(asked.separator)
    assert [len(ids) - size for ids in asked.ask(["q" * 20, "q"], 10 + size)] == [10, 1]
    assert [len(ids) - size for ids in asked.encode([("q", "z" * 20)], 10 + size, 4)] == [5]
    said = [message.removeprefix("tinyvl: cut ") for message in caplog.messages]
    assert said == [f"1 of {n} texts to {m} tokens" for n, m in ((2, 3), (1, 8), (2, 10), (1, 4))]


WORDLESS = [".", "...", "😀", "\u200b", "♥ !!!", "\ufffd", "\ue000", "- — -", "\U0010ffff"]


@pytest.mark.parametrize("text", WORDLESS)
def test_a_text_without_letters_and_digits_has_no_words(text):
    assert not has_words(text)
    assert has_words(f"{text} 猫")
    assert has_words(f"{text} 7")


def test_captions_without_words_are_left_out_and_counted(tmp_path, caplog):
    (tmp_path / "a.jpg").touch()
    (tmp_path / "a.txt").write_text("a dog\n" + "\n".join(WORDLESS), encoding="utf-8")
    assert [record.captions for record in data.read(tmp_path)] == [["a dog"]]
    assert f"left out {len(WORDLESS)} of {len(WORDLESS) + 1} captions: no words" in caplog.text
    report = data_check.check([tmp_path], fast=True)
    assert report["problems"] == {"no words": len(WORDLESS)}
    assert "caption 4 of 10 has no words: '😀'" in [d["error"] for d in report["details"]][2]
    asked = Record("a.jpg", id="1", question="??", answers=["x"])
    assert [p["problem"] for p in data_check.text_problems([asked])] == ["no words"]


@pytest.mark.parametrize("wordless", [*WORDLESS, ""])
def test_they_are_scored_as_empty_wherever_they_stand(wordless, monkeypatch):
    from tinyvl import metrics_java

    monkeypatch.setattr(metrics_java, "find_java", lambda explicit: None)
    references = {str(i): [f"the dog number {i} runs over grass"] for i in range(3)}
    for place in references:
        texts = {i: captions[0] for i, captions in references.items()} | {place: wordless}
        found = caption_scores(references, texts, metrics=["CIDEr", "BLEU-1"])
        empty = caption_scores(references, texts | {place: ""}, metrics=["CIDEr", "BLEU-1"])
        assert found.metrics == empty.metrics
        assert found.items["CIDEr"][place] == 0
        assert all(found.items["CIDEr"][i] > 5 for i in references if i != place)
    assert tokenise("...") == ""
