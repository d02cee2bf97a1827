"""Zero-shot classification's words: what the classes are called, and the prompts around them."""

import json
import re
from pathlib import Path

from tinyvl import UserError
from tinyvl.data import first_synonyms, text_lines

SYNSET = r"n\d{8}"  # WordNet's number of a class of ImageNet
PROMPT = "a photo of {}"  # LilT's one, section 6.5
# CLIP's seven for ImageNet (Radford et al. 2021, the notebook "Prompt engineering").
ENSEMBLE = (
    "itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}.",
    "a {} in a video game.", "art of the {}.", "a photo of the small {}.",
)  # fmt: skip


def templates(given: list[str] | None) -> list[str]:
    """Prompts, ``{}`` in the class's place; of several, `class_embeddings` takes the mean.

    A file stands for its lines, ``clip`` for CLIP's seven; None is the paper's one.
    """
    if not given:
        return [PROMPT]
    found: list[str] = []
    for prompt in given:
        if prompt == "clip":
            found += ENSEMBLE
        elif "{}" not in prompt and Path(prompt).expanduser().is_file():
            found += [line for _, line in text_lines(Path(prompt).expanduser())]
        else:
            found.append(prompt)
    if not found:
        raise UserError(f"{given[0]}: a file of prompts, but it has none.", 2)
    if wrong := next((prompt for prompt in found if prompt.count("{}") != 1), None):
        raise UserError(f"The prompt {wrong!r} needs one {{}} where the class name goes.", 2)
    return found


def names(
    labels: list[str], file: Path | None = None, *, all_classes: bool = False
) -> dict[str, str]:
    """What each class is called: label -> words.

    Args:
        labels: the classes that the data has: names, folders, numbers, or ImageNet's synsets.
        file: gives the names. JSON or text with a label and a name each (``n01440764 tench``,
            tab-separated, ``imagenet_class_index.json``); or names alone, which the labels are, or
            count from 0, or stand for in alphabetical order.
        all_classes: also those of the file that the data has no picture of (ImageNet-A has 200 of
            ImageNet's 1,000, and is usually evaluated among these).

    Without a file labels are names themselves; synsets are called by timm's list of ImageNet.
    """
    labels = sorted(set(labels))
    if file is None:
        return imagenet_names(labels) or {label: label.replace("_", " ") for label in labels}
    tables, listed = read_names(file)
    if tables:
        keyed = next((table for table in tables if table.keys() >= set(labels)), None)
        if keyed is None:
            missing = next(label for label in labels if label not in tables[0])
            raise UserError(f"{file}: has no name for the class {missing!r}.", 2)
        chosen = keyed if all_classes else {label: keyed[label] for label in labels}
        return first_synonyms(chosen)
    words = {name.replace("_", " ").lower(): name for name in listed}
    if all(label.replace("_", " ").lower() in words for label in labels):
        known = {label: words[label.replace("_", " ").lower()] for label in labels}
        others = {name: name for name in listed if name not in known.values()}
    elif all(label.isdecimal() and int(label) < len(listed) for label in labels):
        known = {label: listed[int(label)] for label in labels}
        others = {str(i): name for i, name in enumerate(listed) if str(i) not in known}
    elif len(labels) == len(listed):
        known, others = dict(zip(labels, listed, strict=True)), {}
    else:
        raise UserError(
            f"{file}: lists {len(listed)} names, and {labels[0]!r} is none of them; the data has "
            f"{len(labels)} classes, and a list without labels names each.",
            2,
        )
    return known | (others if all_classes else {})


def read_names(file: Path) -> tuple[list[dict[str, str]], list[str]]:
    """A file's tables of names by label (by number and by synset, say), or its names alone."""
    if not file.is_file():
        raise UserError(f"{file} does not exist", 2)
    if file.suffix == ".json":
        try:
            document = json.loads(file.read_text(encoding="utf-8-sig"))
        except ValueError as error:
            raise UserError(f"{file} is not JSON: {error}", 2) from None
        if isinstance(document, list):
            return [], [str(name) for name in document]
        tables: list[dict[str, str]] = [{}, {}]
        try:
            for label, name in document.items():  # "0": ["n01440764", "tench"], or "0": "tench"
                *synset, words = name if isinstance(name, list) else [name]
                for table, key in zip(tables, (label, *synset), strict=False):
                    table[str(key)] = str(words)
        except (AttributeError, ValueError):
            raise UserError(
                f"{file}: neither a list of names nor a name for each label.", 2
            ) from None
        return [table for table in tables if table], []
    lines = [line for _, line in text_lines(file)]
    pairs = [re.fullmatch(rf"([^\t]+)\t\s*(.+)|({SYNSET})[ ,]\s*(.+)", line) for line in lines]
    if lines and all(pairs):
        return [{pair[1] or pair[3]: pair[2] or pair[4] for pair in pairs}], []
    return [], lines


def imagenet_names(labels: list[str]) -> dict[str, str]:
    """Names of ImageNet's synsets, or of its classes 0 to 999; nothing for other labels."""
    from timm.data import ImageNetInfo

    numbered = {str(i) for i in range(1000)} == set(labels)
    if not numbered and not all(re.fullmatch(SYNSET, label) for label in labels):
        return {}
    info = ImageNetInfo("imagenet-1k")
    if numbered:
        known = {label: info.index_to_description(int(label)) for label in labels}
    else:
        synsets = set(info.label_names())
        if not synsets.issuperset(labels):
            return {}
        known = {label: info.label_name_to_description(label) for label in labels}
    return first_synonyms(known)
