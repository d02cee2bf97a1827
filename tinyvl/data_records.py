"""The record, its line in a JSON Lines file, and helpers that read fields from files.

A record is one line of JSON, its path relative to the file:

    {"image": "images/1.jpg", "captions": ["a dog runs"], "id": "1", "split": "train", "lang": "en"}
    {"video": "clips/7.mp4", "question": "what runs?", "answers": ["dog"], "question_id": "70"}

Only the path is required. Every function here raises `UserError` where a field is missing or
malformed, and names the file and the record.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from tinyvl import UserError
from tinyvl.files import dump, open_text, read_text, text_lines
from tinyvl.media import MODALITIES

# Some published formats do not say what a file is called. A reader then joins the names it may
# have, the likeliest first, by this character, which no path holds; `data_files.locate` picks one.
OR = "\0"


@dataclass(slots=True)
class Record:
    """A picture, a video or a sound with its captions, its question or its class.

    Exactly one of ``image``, ``video`` and ``audio`` is set, to an absolute path (a reader yields
    the path as the file has it). ``id`` names the picture on any machine. What the file does not
    say is None or empty. ``answers`` are as annotated, repeats kept.
    """

    image: str | None = None
    captions: list[str] = field(default_factory=list)
    id: str = ""
    split: str | None = None
    lang: str | None = None
    video: str | None = None
    audio: str | None = None
    question: str | None = None
    answers: list[str] = field(default_factory=list)
    choices: list[str] = field(default_factory=list)  # of a multiple-choice question
    question_id: str | None = None
    question_type: str | None = None
    answer_type: str | None = None
    label: str | None = None  # the class, in words
    domain: str | None = None  # NoCaps: in, near or out

    @property
    def modality(self) -> str:
        """``"image"``, ``"video"`` or ``"audio"``: the field that is set."""
        return next(kind for kind in MODALITIES if getattr(self, kind) is not None)

    @property
    def path(self) -> str:
        """The path of the picture, the video or the sound."""
        return getattr(self, self.modality)

    @path.setter
    def path(self, path: str) -> None:
        setattr(self, self.modality, path)


def line_of(record: Record, folder: Path) -> str:
    """A record's line in a JSON Lines file in ``folder``; `records_of` reads the same record."""
    entry = {f.name: getattr(record, f.name) for f in fields(record)}
    entry = {name: value for name, value in entry.items() if value is not None and value != []}
    try:
        entry[record.modality] = Path(os.path.relpath(record.path, folder.absolute())).as_posix()
    except ValueError:  # Windows: on another drive
        entry[record.modality] = record.path
    return dump(entry)


def read_jsonl(path: Path, malformed: list[UserError] | None = None) -> Iterator[Record]:
    """This package's own format: a record a line, or a JSON array of such records.

    A malformed line is an error, or where there is a list for them it goes there.
    """
    with open_text(path) as file:
        start = file.read(4096).lstrip()
    if start.startswith("["):
        for where, entry in json_items(path):
            yield from records_of(entry, where)
        return
    for where, line in text_lines(path):
        try:
            yield from records_of(parsed(line, where), where)
        except UserError as error:
            if malformed is None:
                raise
            malformed.append(error)


def records_of(entry: Any, where: object) -> Iterator[Record]:
    """The records of one JSON object: one, or one per language.

    ``captions`` and ``answers`` may be one text instead of a list, and may be called ``caption``
    and ``answer``; ``id`` may be called ``image_id``. ``{"image": ..., "en": [...], "de": [...]}``
    has captions by language.
    """
    named = [kind for kind in MODALITIES if isinstance(entry, dict) and entry.get(kind) is not None]
    if len(named) > 1:
        raise UserError(f"{where}: has {' and '.join(named)}; a record has one of them")
    kind = named[0] if named else "image"
    path = name_in(entry, kind, where)

    def text(key: str, *kinds: type) -> str | None:
        value = get(entry, key, kinds, where, default=None)
        return None if value is None else str(value)

    plain = ("split", "lang", "question", "question_type", "answer_type", "domain")
    record = Record(
        **{kind: path},
        **{key: text(key, str) for key in plain},
        **{key: text(key, str, int) for key in ("question_id", "label")},
        id=text("id", str, int) or text("image_id", str, int) or path,
        captions=texts_in(entry, "captions", "caption", where),
        answers=texts_in(entry, "answers", "answer", where),
    )
    record.choices = choices_in(entry, record.answers, where)
    code = re.compile("[a-z]{2}")
    languages = [k for k, v in entry.items() if code.fullmatch(k) and isinstance(v, list)]
    if languages and not {"captions", "caption", "question", "label"} & entry.keys():
        for lang in languages:
            yield replace(record, lang=lang, captions=texts_in(entry, lang, lang, where))
    else:
        yield record


def unlike(known: dict, name: Any, value: Any, where: object) -> None:
    """Keeps a value under its name. UserError: another one has that name."""
    if (first := known.setdefault(name, value)) != value:
        both = f"{str(first)[:99]!r} and {str(value)[:99]!r}"
        raise UserError(f"{where}: {name!r} names both {both}; give each a name of its own")


def clashes(records: list[Record]) -> Iterator[tuple[str, Record, str]]:
    """(kind, record, what is wrong) where a picture's or a question's id is another one's, too."""
    pictures: dict[str, str] = {}
    questions: dict[tuple, tuple] = {}
    for record in records:
        if (first := pictures.setdefault(record.id, record.path)) != record.path:
            both = f"the id {record.id!r} names both {first} and {record.path}"
            yield "two pictures of one id", record, both
        if record.question_id is not None:
            own = record.question, record.path
            key = record.split, record.lang, record.question_id
            if (asked := questions.setdefault(key, own)) != own:
                both = " and ".join(f"{question!r} ({path})" for question, path in (asked, own))
                error = f"the question id {record.question_id!r} names both {both}"
                yield "repeated question", record, error


def matched(pattern: re.Pattern[str], line: str, where: str, example: str) -> re.Match[str]:
    """The line's match of the whole pattern, or a `UserError` that shows an example."""
    if match := pattern.fullmatch(line):
        return match
    raise UserError(f"{where}: expected {example!r}, found {line[:60]!r}")


def splits_beside(path: Path, **lists: str) -> dict[str, str]:
    """The split of each name in the lists (``train="train.txt"``) that are beside a file."""
    found: dict[str, str] = {}
    for split, name in lists.items():
        for where, line in text_lines(path.with_name(name), optional=True):
            unlike(found, line, split, where)
    return found


def json_document(path: Path) -> Any:
    """A file's JSON."""
    return parsed(read_text(path), path)


def json_object(path: Path) -> dict[str, Any]:
    """A file's JSON, which must be an object."""
    return an_object(json_document(path), path)


def an_object(value: Any, where: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object, found {str(value)[:60]!r}")
    return value


def json_items(path: Path) -> Iterator[tuple[str, Any]]:
    """The items of a JSON array, one at a time: ("FILE, [3]", item).

    A published array can be 700 MB long (Visual Genome), and many times that as Python objects.
    """
    text, decoder = read_text(path), json.JSONDecoder(object_pairs_hook=once)
    blank = re.compile(r"[\s,]*")
    position = blank.match(text).end()
    if text[position : position + 1] != "[":
        raise UserError(f"{path}: expected a JSON array, found {text[:60]!r}")
    position, number = blank.match(text, position + 1).end(), 0
    while text[position : position + 1] != "]":
        try:
            item, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not JSON: {error}") from None
        yield f"{path}, [{number}]", item
        position, number = blank.match(text, position).end(), number + 1
    if rest := text[position + 1 :].strip():
        raise UserError(f"{path}: behind the end of its JSON array stands {rest[:60]!r}")


def parsed(text: str, where: object) -> Any:
    """A text's JSON."""
    try:
        return json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        place = str(error).removeprefix(error.msg) if "\n" in text.strip() else ""
        found = place or f" at character {error.pos + 1}"
        raise UserError(f"{where} is not JSON: {error.msg}{found}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}") from None


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. ValueError: two of its values have one name."""
    found = dict(pairs)
    for key, value in pairs if len(found) < len(pairs) else ():
        if value != found[key]:
            both = f"{str(value)[:60]!r} and {str(found[key])[:60]!r}"
            raise ValueError(f"{key!r} is there twice: {both}")
    return found


REQUIRED = object()
KINDS = {str: "a text", int: "a number", list: "a list", dict: "an object"}


def get(
    entry: Any, key: str, kinds: type | tuple[type, ...], where: object, default: Any = REQUIRED
) -> Any:
    """``entry[key]``, which must be of one of the kinds; null counts as missing."""
    an_object(entry, where)
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    value = entry.get(key)
    if value is None:
        if default is REQUIRED:
            raise UserError(f"{where}: {key!r} is missing; it should be {KINDS[kinds[0]]}")
        return default
    if not isinstance(value, kinds) or isinstance(value, bool):
        wanted = " or ".join(KINDS[kind] for kind in kinds)
        raise UserError(f"{where}: {key!r} should be {wanted}, found {str(value)[:60]!r}")
    return value


def entries(document: Any, key: str, where: object, **default: Any) -> Iterator[tuple[str, Any]]:
    """The items of the list ``document[key]``: ("FILE, images[3]", item)."""
    place = f"{where}, {key}" if isinstance(where, Path) else f"{where}.{key}"
    for i, entry in enumerate(get(document, key, list, where, **default)):
        yield f"{place}[{i}]", entry


def name_in(entry: Any, key: str, where: object) -> str:
    """``entry[key]``, which must name a file."""
    name = get(entry, key, str, where)
    if not name.strip():
        kind = {"video": "a video", "audio": "a sound"}.get(key, "a picture")
        raise UserError(f"{where}: {key!r} should name {kind}, found {name!r}")
    return name


def texts_in(entry: Any, plural: str, singular: str, where: object) -> list[str]:
    """A list of texts, or one text, under one of two names; an empty list if there is neither."""
    key = plural if plural in entry else singular
    texts = get(entry, key, (list, str), where, default=[])
    texts = [texts] if isinstance(texts, str) else texts
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: {key!r} should be texts")
    return texts


def choices_in(entry: Any, answers: list[str], where: object) -> list[str]:
    """``entry["choices"]``, a list of texts: one of them answers the question, if anything does."""
    choices = get(entry, "choices", list, where, default=[])
    if not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise UserError(f"{where}: 'choices' should be a list of texts")
    if choices and answers and not set(answers) & set(choices):
        raise UserError(f"{where}: the answer {answers[0]!r} is not among the 'choices'")
    return choices


PARTS = {
    **dict.fromkeys(("train", "training", "development"), "train"),
    **dict.fromkeys(("val", "valid", "validate", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "evaluation"), "test"),
    **{name: name for name in ("testdev", "challenge", "submission")},
}


def part_of(split: str | None) -> str | None:
    """A split by its usual name: ``validation``, ``valid`` and ``dev`` are ``val``."""
    word = (split or "").strip().lower()
    if word == "development":  # train in Clotho, val elsewhere
        return split
    return PARTS.get(word, split) if word else None


def split_in(name: str) -> str | None:
    """The split in a file's or folder's name: ``val_balanced_questions`` -> ``val``."""
    words = re.split("[^a-z]+", name.lower())
    return next((PARTS[word] for word in words if word in PARTS), None)
