"""Class names, prompts, and class vectors."""

import pytest
import torch

from tinyvl import UserError, classes


def test_class_embeddings_average_unit_vectors_of_all_templates():
    seen = []

    def embed(texts):
        seen.append(list(texts))
        return torch.stack([vector(text) for text in texts])

    def vector(text):
        return 3 * torch.randn(8, generator=torch.Generator().manual_seed(hash(text) % 2**31))

    names, templates = ["dog", "ice_cream"], ["a photo of a {}.", "art of the {}."]
    found = classes.class_embeddings(embed, names, templates, batch=3)
    assert seen == [
        ["a photo of a dog.", "art of the dog.", "a photo of a ice cream."],
        ["art of the ice cream."],
    ]
    for row, name in zip(found, ["dog", "ice cream"], strict=True):
        units = [vector(t.format(name)) for t in templates]
        mean = sum(u / u.norm() for u in units) / 2
        torch.testing.assert_close(row, mean / mean.norm(), atol=1e-6, rtol=0)


def named(tmp_path, content: str, labels: list[str], suffix: str = ".txt", **options):
    file = tmp_path / f"names{suffix}"
    file.write_text(content)
    return classes.names(labels, file, **options)


def test_labels_are_names_without_a_file():
    assert classes.names(["aquarium_fish", "bear", "bear"]) == {
        "aquarium_fish": "aquarium fish", "bear": "bear",
    }  # fmt: skip
    assert classes.names(["0", "1"]) == {"0": "0", "1": "1"}  # SVHN's digits


def test_imagenets_folders_are_called_by_timms_list():
    found = classes.names(["n01440764", "n02012849", "n03126707"])
    assert found["n01440764"] == "tench"
    assert "crane" in found["n02012849"]
    assert found["n02012849"] != found["n03126707"]  # the bird and the machine
    numbered = classes.names([str(i) for i in range(1000)])  # ImageNet-V2
    assert (numbered["0"], numbered["999"]) == ("tench", "toilet tissue")
    assert len(numbered) == 1000
    assert list(numbered) == sorted(numbered)


SYNSETS = "n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\nn02012849 crane\n"


@pytest.mark.parametrize(
    ("content", "labels", "suffix", "wanted"),
    [
        (SYNSETS, ["n01443537"], ".txt", {"n01443537": "goldfish"}),
        ("b\ta bee\na\tan_ant\n", ["a", "b"], ".txt", {"a": "an ant", "b": "a bee"}),
        ('{"a": "ant", "b": "bee"}', ["b"], ".json", {"b": "bee"}),
        ('{"0": ["n01440764", "tench"]}', ["n01440764"], ".json", {"n01440764": "tench"}),
        ('{"0": ["n01440764", "tench"]}', ["0"], ".json", {"0": "tench"}),
        ('["ant", "bee"]', ["x", "y"], ".json", {"x": "ant", "y": "bee"}),
        ("ant\nBlue Bee\ncat\n", ["blue_bee"], ".txt", {"blue_bee": "Blue Bee"}),
        ("ant\nbee\ncat\n", ["0", "2"], ".txt", {"0": "ant", "2": "cat"}),
        ("ant\nbee\n", ["y", "x"], ".txt", {"x": "ant", "y": "bee"}),
    ],
)
def test_class_name_files(tmp_path, content, labels, suffix, wanted):
    assert named(tmp_path, content, labels, suffix) == wanted


def test_all_classes_of_a_file(tmp_path):
    assert len(named(tmp_path, SYNSETS, ["n01443537"], all_classes=True)) == 3
    pairs = '{"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish"]}'
    assert named(tmp_path, pairs, ["1"], ".json", all_classes=True) == {
        "0": "tench",
        "1": "goldfish",
    }
    assert list(named(tmp_path, "ant\nbee\ncat\n", ["bee"], all_classes=True).values()) == [
        "bee", "ant", "cat",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "suffix", "said"),
    [
        ("a\tant\nb\tbee\n", ".txt", "no name for the class 'x'"),
        ("ant\nbee\n", ".txt", "2 names, and 'x'"),
        ("{", ".json", "is not JSON"),
        ("3", ".json", "neither a list"),
        ('{"x": []}', ".json", "neither a list"),
    ],
)
def test_class_name_files_that_do_not_fit(tmp_path, content, suffix, said):
    with pytest.raises(UserError, match=said) as caught:
        named(tmp_path, content, ["x"], suffix)
    assert caught.value.status == 2


def test_prompts(tmp_path):
    assert classes.templates(None) == ["a photo of {}"]
    several = classes.templates(["clip", "{}"])
    assert len(several) == 8
    assert all(prompt.count("{}") == 1 for prompt in several)
    (tmp_path / "blank.txt").write_text("\n\n")
    with pytest.raises(UserError, match="it has none"):
        classes.templates([str(tmp_path / "blank.txt")])
    for wrong in ("a photo", "{} and {}", str(tmp_path / "none.txt")):
        with pytest.raises(UserError, match="needs one"):
            classes.templates([wrong])
