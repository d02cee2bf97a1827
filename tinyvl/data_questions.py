"""Readers of questions about pictures: VQA v2, GQA, DAQUAR. A record is a question."""

import logging
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from tinyvl import UserError
from tinyvl.data_records import OR, Record, get, json_document, json_object, split_in, text_lines

log = logging.getLogger(__name__)


def read_vqa(path: Path) -> Iterator[Record]:
    """VQA v2 (https://visualqa.org): a questions file or its annotations, whichever is named.

    The partner is found beside it, or in a folder ``Questions`` or ``Annotations`` beside that, by
    the official names (``v2_OpenEnded_mscoco_val2014_questions.json`` and
    ``v2_mscoco_val2014_annotations.json``). Questions without annotations have no answers: those of
    the test set. VQA v1 (with its choices), its abstract scenes and OK-VQA share the format. The
    ten answers are kept as annotated.
    """
    document = json_object(path)
    if "questions" in document:
        questions_file, questions = path, document
        annotations_file = _partner(path)
    else:
        annotations_file, questions_file = path, _partner(path)
        if questions_file is None:
            expected = [file.name for file in partners(path)[:1]]
            raise UserError(
                f"{path}: its questions are not beside it; they should be in the same folder, "
                f"named {expected[0] if expected else 'as they were published'}"
            )
        questions = json_document(questions_file)
    annotations = {}
    year = re.search(r"(train|val|test(-[a-z]+)?)20\d\d", questions_file.name)
    subtype = get(questions, "data_subtype", str, path, *([year[0]] if year else []))
    if annotations_file is None and not subtype.startswith("test"):
        log.warning("%s: no annotations are beside it, so its questions have no answers", path)
    if annotations_file is not None:
        answered = document if annotations_file is path else json_document(annotations_file)
        for i, entry in enumerate(get(answered, "annotations", list, annotations_file)):
            where = f"{annotations_file}, annotations[{i}]"
            annotations[get(entry, "question_id", (int, str), where)] = entry, where
    kind = get(questions, "data_type", str, questions_file, default="mscoco")
    split = re.sub(r"20\d\d$", "", subtype)  # train, val, test, test-dev
    picture = _coco_names if kind == "mscoco" else f"{kind}_{{1}}_{{0:012d}}.png".format
    years = re.sub("test-[a-z]+", "test", subtype)  # test-dev2015's pictures are test2015's
    for i, entry in enumerate(get(questions, "questions", list, questions_file)):
        where = f"{questions_file}, questions[{i}]"
        image = get(entry, "image_id", int, where)
        number = get(entry, "question_id", (int, str), where)
        answers, types = [], (None, None)
        if annotations_file is not None:
            if number not in annotations:
                raise UserError(f"{where}: question {number} has no annotation in its other file")
            answers, types = _annotation(*annotations[number])
        choices = get(entry, "multiple_choices", list, where, default=[])
        yield Record(
            picture(image, years),
            id=str(image),
            split=split,
            question=get(entry, "question", str, where),
            answers=answers,
            choices=[str(choice) for choice in choices],
            question_id=str(number),
            question_type=types[0],
            answer_type=types[1],
        )


def _coco_names(image: int, years: str) -> str:
    """A COCO picture is named with its split in 2014 and without in 2017; the numbers are one."""
    return f"COCO_{years}_{image:012d}.jpg{OR}{image:012d}.jpg"


def _annotation(entry: Any, where: str) -> tuple[list[str], tuple[str | None, str | None]]:
    answers = [
        get(answer, "answer", str, f"{where}.answers[{j}]")
        for j, answer in enumerate(get(entry, "answers", list, where))
    ]
    types = (get(entry, key, str, where, default=None) for key in ("question_type", "answer_type"))
    return answers, tuple(types)


def _partner(path: Path) -> Path | None:
    return next((file for file in partners(path) if file.exists()), None)


def partners(path: Path) -> list[Path]:
    """Where the other file of a pair may be, the likeliest first."""
    if "_questions" in path.name:
        name = re.sub("(OpenEnded|MultipleChoice)_", "", path.name)
        names, folder = [name.replace("_questions", "_annotations")], "Annotations"
    elif "_annotations" in path.name:
        name = path.name.replace("_annotations", "_questions")
        version, rest = re.fullmatch("(v2_)?(.*)", name).groups(default="")
        names = [f"{version}{task}{rest}" for task in ("OpenEnded_", "MultipleChoice_", "")]
        folder = "Questions"
    else:
        return []
    around = [path.parent, *(path.absolute().parent.parent / f for f in (folder, folder.lower()))]
    return [place / name for place, name in product(around, names)]


def read_gqa(path: Path) -> Iterator[Record]:
    """GQA's ``*_questions.json`` (https://cs.stanford.edu/people/dorarad/gqa): a dict by question.

    ``question_type`` is the structural type (verify, query, choose, logical, compare), and
    ``answer_type`` is ``open`` for a query and ``binary`` for the rest, as the official program
    has it. Questions of the test and challenge sets have no answers.
    """
    for number, entry in json_object(path).items():
        where = f"{path}, question {number}"
        image = str(get(entry, "imageId", (str, int), where))
        answer = get(entry, "answer", str, where, default=None)
        types = get(entry, "types", dict, where, default={})
        structure = get(types, "structural", str, f"{where}.types", default=None)
        yield Record(
            f"{image}.jpg",
            id=image,
            split=split_in(path.name),
            question=get(entry, "question", str, where),
            answers=[] if answer is None else [answer],
            question_id=number,
            question_type=structure,
            answer_type=structure and ("open" if structure == "query" else "binary"),
        )


DAQUAR = re.compile(r".*\bimage(\d+) *\?", re.IGNORECASE)
DAQUAR_END = re.compile(r"( (in |on |of )?(the |this )?image\d+ *\?)$", re.IGNORECASE)


def read_daquar(path: Path) -> Iterator[Record]:
    """DAQUAR's ``qa.*.txt`` and ``all_qa_pairs.txt``: a line a question, then a line its answer.

    The picture is named at the end of the question, "... in the image7 ?", which is taken off.
    Several answers ("knife, fork") are one text, as annotated. The split is the file name's, or
    that of ``{train,test}_images_list.txt`` or ``{train,test}.txt`` where these lie beside.
    """
    splits = {}
    for part in ("train", "test"):
        for listing in (path.with_name(f"{part}_images_list.txt"), path.with_name(f"{part}.txt")):
            if listing.exists():
                splits |= {line: part for _, line in text_lines(listing)}
    lines, split = text_lines(path), split_in(path.name)
    for number, (where, line) in enumerate(lines):
        match = DAQUAR.fullmatch(line)
        if not match:
            raise UserError(f"{where}: expected '... in the image7 ?', found {line[:60]!r}")
        _, answer = next(lines, (where, ""))
        if not answer or DAQUAR.fullmatch(answer):
            raise UserError(f"{where}: this question is not followed by an answer")
        image = f"image{match[1]}"
        question = DAQUAR_END.sub("", line)
        yield Record(
            f"{image}.png",
            id=image,
            split=split or splits.get(image),
            question=question,
            answers=[answer],
            question_id=str(number),
        )
