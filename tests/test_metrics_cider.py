"""CIDEr for training against pycocoevalcap's."""

import random

import pytest

from tinyvl.metrics_captions import Cider, cider

WORDS = "a the dog cat runs sleeps on grass red two of with man ball"


def test_cider_is_pycocoevalcaps():
    chance = random.Random(0)

    def caption(least: int = 0) -> str:
        return " ".join(chance.choices(WORDS.split(), k=chance.randint(least, 12)))

    references = [[caption(1) for _ in range(chance.randint(1, 5))] for _ in range(40)]
    written = [caption() for _ in references]
    written[3], written[4] = "", references[4][0]
    known = Cider(references)
    found = [known.score(i, text) for i, text in enumerate(written)]
    assert found == pytest.approx(cider(references, written).tolist(), abs=1e-10)
    assert found[3] == 0
    assert max(found) > 1
