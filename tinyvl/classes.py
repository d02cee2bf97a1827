"""Zero-shot classification's words: class names, prompts around them, and their vectors."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tinyvl import UserError
from tinyvl.data import SYNSET, first_synonyms, read_names
from tinyvl.files import text_lines

PROMPT = "a photo of {}"  # LilT's one, section 6.5
# CLIP's seven for ImageNet (Radford et al. 2021, the notebook "Prompt engineering").
ENSEMBLE = (
    "itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}.",
    "a {} in a video game.", "art of the {}.", "a photo of the small {}.",
)  # fmt: skip


def templates(given: list[str] | None) -> list[str]:
    """Prompts with ``{}`` where the class name goes; None: LilT's one.

    A file stands for its lines, ``clip`` for CLIP's seven. Raises UserError for a file without
    prompts or a prompt without one ``{}``.
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


def class_embeddings(
    embed_texts: Callable[[list[str]], Tensor],
    names: Sequence[str],
    templates: Sequence[str],
    batch: int = 256,
) -> Tensor:
    """One unit vector a class (C, d): the mean of its prompts' unit vectors, made unit again.

    ``embed_texts`` maps texts to embeddings (n, d). Underscores in names become spaces.
    """
    texts = [t.replace("{}", name.replace("_", " ")) for name in names for t in templates]
    parts = [embed_texts(texts[i : i + batch]) for i in range(0, len(texts), batch)]
    prompts = normalize(torch.cat(parts).float(), dim=-1)
    return normalize(prompts.unflatten(0, (len(names), len(templates))).mean(1), dim=-1)


def names(
    labels: list[str], file: Path | None = None, *, all_classes: bool = False
) -> dict[str, str]:
    """The name of each of the data's classes: label -> words.

    Without a file labels are names themselves, and synsets have the names of timm's ImageNet list.
    A file is as for `data.read_names`; if it has names alone, labels are such names, or count them
    from 0, or have their order when sorted. ``all_classes`` adds the file's classes that the data
    has no picture of. (ImageNet-A has 200 of ImageNet's 1,000 and is usually evaluated among
    these.) Raises UserError if the file cannot be read or has no name for a label.
    """
    labels = sorted(set(labels))
    if file is None:
        return imagenet_names(labels) or {label: label.replace("_", " ") for label in labels}
    try:
        tables, listed = read_names(file)
    except UserError as error:
        raise UserError(str(error), 2) from None
    if tables:
        keyed = next((table for table in tables if table.keys() >= set(labels)), None)
        if keyed is None:
            missing = next(label for label in labels if label not in tables[0])
            raise UserError(f"{file}: has no name for the class {missing!r}.", 2)
        return first_synonyms(keyed if all_classes else {label: keyed[label] for label in labels})
    plain = {name.replace("_", " ").lower(): name for name in listed}
    words = [label.replace("_", " ").lower() for label in labels]
    others: dict[str, str] = {}
    if plain.keys() >= set(words):
        known = {label: plain[word] for label, word in zip(labels, words, strict=True)}
        others = {name: name for name in listed if name not in known.values()}
    elif all(label.isdecimal() and int(label) < len(listed) for label in labels):
        known = {label: listed[int(label)] for label in labels}
        others = {str(i): name for i, name in enumerate(listed) if str(i) not in known}
    elif len(labels) == len(listed):
        known = dict(zip(labels, listed, strict=True))
    else:
        wanted = f"the data has {len(labels)} classes, and a list without labels names each."
        message = f"lists {len(listed)} names, and {labels[0]!r} is none of them; {wanted}"
        raise UserError(f"{file}: {message}", 2)
    return known | (others if all_classes else {})


def imagenet_names(labels: list[str]) -> dict[str, str]:
    """Names of ImageNet's synsets, or of its classes 0 to 999; nothing for other labels."""
    numbered = {str(i) for i in range(1000)} == set(labels)
    if not numbered and not all(re.fullmatch(SYNSET, label) for label in labels):
        return {}
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    if numbered:
        return first_synonyms({i: info.index_to_description(int(i)) for i in labels})
    if not set(labels) <= set(info.label_names()):
        return {}
    return first_synonyms({synset: info.label_name_to_description(synset) for synset in labels})
