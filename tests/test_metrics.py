"""Answers, retrieval and zero-shot accuracy against golden values and slow obvious references."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tinyvl import UserError, metrics

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> dict:
    return json.loads((GOLDEN / name).read_text("utf-8"))


# Answers


def test_vqa_accuracy_is_the_official_programs():
    cases = golden("vqa_v2_accuracy_cases.json")
    values = []
    for case in cases["cases"]:
        values.append(metrics.vqa_accuracy(case["prediction"], case["answers"]))
        assert values[-1] == pytest.approx(case["accuracy"] / 100, abs=1e-12), case
    assert len(values) == 27
    assert 100 * sum(values) / len(values) == pytest.approx(cases["overall"], abs=5e-5)


def test_normalisation_is_the_official_programs():
    for case in golden("vqa_v2_accuracy_cases.json")["cases"]:
        plain = case["prediction"].replace("\n", " ").replace("\t", " ").strip()
        assert metrics.normalise_answer(plain) == case["normalised_prediction"]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("wouldnt've", "wouldn't've"),
        ("y'alld've", "y'all'd've"),
        ("somebody'd", "somebodyd"),  # the official table's slip
        ("Im", "im"),  # its capitals never match: words are lower-cased first
        ("1,000 (red)", "1000 red"),  # a comma between digits glues all marks
        ("ice-cream", "ice cream"),
        ("ice -cream", "ice cream"),
        ("3.5 p.m.", "3.5 pm"),
        ("." * 40, "." * 8),  # at most 32 periods go
        ("the A an", ""),
    ],
)
def test_normalisation_keeps_the_slips(answer, expected):
    assert metrics.normalise_answer(answer) == expected


def leave_one_out(answer: str, answers: list[str]) -> float:
    """The VQA v2 formula as it is written down, for answers that need no normalisation."""
    accuracies = []
    for left_out in range(len(answers)):
        others = [a for i, a in enumerate(answers) if i != left_out]
        accuracies.append(min(1, sum(a == answer for a in others) / 3))
    return sum(accuracies) / len(accuracies)


def test_vqa_accuracy_equals_leaving_out_each_annotator():
    rng = random.Random(0)
    for _ in range(500):
        answers = [rng.choice(["red", "green", "blue", "grey"]) for _ in range(rng.randint(4, 12))]
        expected = leave_one_out("red", answers)
        assert metrics.vqa_accuracy("red", answers) == pytest.approx(expected, abs=1e-12)


def test_few_answers_count_as_right_ones():
    assert metrics.vqa_accuracy("red", ["red"]) == 1
    assert metrics.vqa_accuracy("Red", ["red"]) == 0  # one answer agrees with itself
    assert metrics.vqa_accuracy("Red", ["red", "blue"]) == 1
    assert metrics.vqa_accuracy("green", ["red", "blue"]) == 0
    with pytest.raises(UserError, match="no answers"):
        metrics.vqa_accuracy("red", [])


def test_strict_accuracy_asks_for_the_most_frequent_answer():
    answers = ["red"] * 4 + ["blue"] * 5 + ["Blue"]
    assert metrics.strict_accuracy("blue", answers) == 1
    assert metrics.strict_accuracy("red", answers) == 0
    assert metrics.strict_accuracy("Blue", answers) == 0
    assert metrics.strict_accuracy(" dog", ["dog"]) == 1
    assert metrics.strict_accuracy("the dog", ["dog"]) == 0
    assert metrics.strict_accuracy("b", ["b", "a", "a", "b"]) == 1  # a draw: the first
    with pytest.raises(UserError, match="no answers"):
        metrics.strict_accuracy("red", [])


def test_gqa_is_equality():
    assert metrics.strict_accuracy("yes", ["yes"]) == 1
    assert metrics.strict_accuracy("Yes", ["yes"]) == 0


def test_means_of_all_and_of_each_group():
    found = metrics.mean_scores({"m": [1, 0, 0.5, 1]}, {"type": ["what", "is", "what", None]})
    assert found.metrics == {"m": 0.625}
    assert found.groups == {"type": {"is": {"items": 1, "m": 0}, "what": {"items": 2, "m": 0.75}}}
    assert list(found.groups["type"]) == ["is", "what"]
    assert metrics.mean_scores({"m": [1]}, {"type": [None]}).groups == {}


# Retrieval


def slow_ranks(scores: torch.Tensor, owner: list[int]) -> tuple[list[int], list[int]]:
    """For each image its best caption's rank, for each text its image's; ties count against."""
    texts_of = {i: [t for t, o in enumerate(owner) if o == i] for i in range(len(scores))}
    of_image, of_text = [], []
    for i in range(len(scores)):
        places = [
            sum(
                not scores[i, other] < scores[i, own]
                for other in range(len(owner))
                if owner[other] != i
            )
            for own in texts_of[i]
        ]
        of_image.append(min(places, default=len(owner)))
    for t, own in enumerate(owner):
        others = (i for i in range(len(scores)) if i != own)
        of_text.append(sum(not scores[i, t] < scores[own, t] for i in others))
    return of_image, of_text


def recall(images, texts, owner, **options) -> dict[str, float]:
    """Recall@k; TR takes the best of an image's captions, and images without are no queries."""
    of_image, of_text = metrics.ranks(images, texts, owner, **options)
    owner = torch.as_tensor(owner)
    owned = owner.unique()
    found = {"TR": (owned.numpy(), of_image[owned].numpy()), "IR": (owner.numpy(), of_text.numpy())}
    once = metrics.recall_of(found, len(images))(np.ones((1, len(images))))
    return {name: float(values[0]) for name, values in once.items()}


def test_recall_is_that_of_clip_benchmark_blip_and_torchmetrics():
    case = golden("retrieval_12x60.json")
    scores = torch.tensor(case["scores"])
    found = recall(scores, torch.eye(scores.shape[1]), case["text_owner"])
    for name, percent in case["expected_percent"].items():
        assert 100 * found[name] == pytest.approx(percent, abs=5e-5)
    assert found["TR-mean"] == pytest.approx(sum(found[f"TR@{k}"] for k in (1, 5, 10)) / 3)
    assert list(found) == [f"{w}{k}" for w in ("TR", "IR") for k in ("@1", "@5", "@10", "-mean")]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("block", [(2048, 4096), (7, 5), (1, 64), (40, 3)])
def test_blocks_of_any_size_equal_the_slow_reference(seed, block):
    """Any number of captions an image, none included, in any order, with many ties."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(-2, 3, (23, 4), generator=generator).float()
    texts = torch.randint(-2, 3, (61, 4), generator=generator).float()
    owner = torch.randint(0, 23, (61,), generator=generator)
    scores = images @ texts.T  # small integers: exact
    expected = slow_ranks(scores, owner.tolist())
    for found in (
        metrics.ranks(images, texts, owner, block=block),
        metrics.ranks(scores, torch.eye(61), owner.tolist(), block=block),
    ):
        assert [x.tolist() for x in found] == list(expected)
    found = recall(images, texts, owner, block=block)
    asked = [rank for i, rank in enumerate(expected[0]) if i in owner]
    assert len(asked) < 23  # some image has no caption
    for k in (1, 5, 10):
        assert found[f"TR@{k}"] == pytest.approx(sum(r < k for r in asked) / len(asked))
        assert found[f"IR@{k}"] == pytest.approx(sum(r < k for r in expected[1]) / 61)


def test_unit_embeddings_in_blocks_equal_the_dense_matrix():
    generator = torch.Generator().manual_seed(0)
    images = normalize(torch.randn(50, 32, generator=generator), dim=-1)
    owner = torch.arange(50).repeat_interleave(5)
    noise = torch.randn(250, 32, generator=generator)
    texts = normalize(images[owner] + 0.35 * noise, dim=-1)
    expected = slow_ranks((images.double() @ texts.double().T).float(), owner.tolist())
    found = metrics.ranks(images, texts, owner, block=(8, 33))
    assert [x.tolist() for x in found] == list(expected)
    assert 0 < recall(images, texts, owner)["IR@1"] < 1


def test_no_tensor_is_larger_than_a_block_or_the_input():
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor))
            return result

    images, owner = torch.eye(200), torch.arange(200).repeat_interleave(5)
    texts = torch.eye(200)[owner]  # 1000 x 200
    with Watch():
        found = recall(images, texts, owner, block=(16, 32))
    assert found["TR@1"] == found["IR@1"] == 1
    assert max(sizes) <= 32 * 200  # a block of texts; the matrix has 200,000


@pytest.mark.parametrize("width", [1, 32, 513])
def test_a_collapsed_model_finds_nothing(width):
    generator = torch.Generator().manual_seed(0)
    one = normalize(torch.randn(1, width, generator=generator), dim=-1)
    images, texts = one.repeat(60, 1), one.repeat(300, 1)
    owner = torch.arange(60).repeat_interleave(5)
    assert set(recall(images, texts, owner, block=(17, 41)).values()) == {0.0}


def test_scores_that_are_no_numbers_find_nothing():
    images = torch.full((20, 4), torch.nan)
    owner = torch.arange(20)
    assert set(recall(images, torch.randn(20, 4), owner).values()) == {0.0}
    scores = torch.eye(20)
    scores[3] = torch.nan  # of this image only
    assert recall(scores, torch.eye(20), owner)["TR@1"] == pytest.approx(19 / 20)
    images = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    texts = torch.randn(18, 4, generator=torch.Generator().manual_seed(1))
    texts[torch.rand(18, generator=torch.Generator().manual_seed(2)) < 0.2, 1] = torch.nan
    texts[::5, 0] = -torch.inf
    scores, owner = images @ texts.T, torch.arange(6).repeat(3)
    assert 0 < scores.isnan().sum() < scores.isinf().sum() < 60
    found = metrics.ranks(images, texts, owner, block=(4, 5))
    assert [x.tolist() for x in found] == list(slow_ranks(scores, owner.tolist()))


def test_texts_and_images_must_fit():
    images, texts = torch.eye(3), torch.eye(3)
    with pytest.raises(UserError, match="3 texts"):
        recall(images, texts, [0, 1])
    with pytest.raises(UserError, match="image 3"):
        recall(images, texts, [0, 1, 3])
    with pytest.raises(UserError, match="image -1"):
        recall(images, texts, [0, 1, -1])


# Zero-shot classification


def test_label_ranks_count_ties_as_misses():
    scores = torch.tensor(
        [
            [9.0, 1, 2, 3, 4, 5, 6],
            [1.0, 9, 9, 0, 0, 0, 0],  # a draw: not first, among five
            [0.0, 1, 2, 3, 4, 5, 6],
            [7.0, 7, 7, 7, 7, 7, 7],  # says nothing
        ]
    )
    ranks = metrics.label_ranks(scores, [0, 1, 2, 3])
    assert [(ranks < k).sum().item() for k in (1, 5)] == [1, 3]
    assert (metrics.label_ranks(torch.full((2, 9), torch.nan), [0, 1]) >= 5).all()


def test_label_ranks_equal_sorting():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(300, 20, generator=generator)
    labels = torch.randint(0, 20, (300,), generator=generator)
    order = scores.argsort(1, descending=True)
    found = metrics.label_ranks(scores, labels)
    for k in (1, 5):
        right = [int(label) in row[:k].tolist() for row, label in zip(order, labels, strict=True)]
        assert (found < k).tolist() == right


def test_chance_with_few_pictures_is_certainty():
    found = metrics.chance([1, 1])
    assert (found["IR@1"], found["IR@5"], found["TR@1"], found["TR@5"]) == (0.5, 1, 0.5, 1)
    assert found["IR-mean"] == pytest.approx(2.5 / 3)
