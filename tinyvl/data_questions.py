"""Readers of questions: VQA v2, GQA and DAQUAR about pictures, MSRVTT-QA and MSVD-QA about videos.

A record is a question, as in `data_captions`: its path is not yet looked for.
"""

import logging
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from tinyvl import UserError
from tinyvl.data_captions import youtube_mapping
from tinyvl.data_records import (
    OR,
    Record,
    entries,
    get,
    json_items,
    json_object,
    matched,
    split_in,
    splits_beside,
    unlike,
)
from tinyvl.files import text_lines

log = logging.getLogger(__name__)


def read_vqa(path: Path) -> Iterator[Record]:
    """VQA v2 (https://visualqa.org): a questions file or its annotations file, either will do.

    The other file is looked for by its official name, beside the first or in a folder ``Questions``
    or ``Annotations`` beside that folder. Questions without annotations, as in the test set, have
    no answers. VQA v1 (with its choices), its abstract scenes and OK-VQA have the same format. The
    ten answers are kept as annotated.
    """
    document = json_object(path)
    partner = next((file for file in partners(path) if file.exists()), None)
    if "questions" in document:
        questions, questions_file, annotations_file = document, path, partner
    elif partner is None:
        name = next((file.name for file in partners(path)), "as they were published")
        where = f"they should be in the same folder, named {name}"
        raise UserError(f"{path}: its questions are not beside it; {where}")
    else:
        questions, questions_file, annotations_file = json_object(partner), partner, path
    year = re.search(r"(train|val|test(-[a-z]+)?)20\d\d", questions_file.name)
    subtype = get(questions, "data_subtype", str, questions_file, *([year[0]] if year else []))
    annotations: dict[int | str, dict[str, Any]] = {}
    if annotations_file is not None:
        answered = document if annotations_file is path else json_object(annotations_file)
        for where, entry in entries(answered, "annotations", annotations_file):
            number = get(entry, "question_id", (int, str), where)
            own: dict[str, Any] = {
                key: get(entry, key, str, where, default=None)
                for key in ("question_type", "answer_type")
            }
            answers = entries(entry, "answers", where)
            own["answers"] = [get(each, "answer", str, at) for at, each in answers]
            unlike(annotations, number, own, where)
    elif not subtype.startswith("test"):
        log.warning("%s: no annotations are beside it, so its questions have no answers", path)
    kind = get(questions, "data_type", str, questions_file, default="mscoco")
    years = re.sub("test-[a-z]+", "test", subtype)  # test-dev2015's pictures are test2015's
    for where, entry in entries(questions, "questions", questions_file):
        image = get(entry, "image_id", int, where)
        if kind == "mscoco":  # the name has the split in it in 2014, and not in 2017
            picture = f"COCO_{years}_{image:012d}.jpg{OR}{image:012d}.jpg"
        else:
            picture = f"{kind}_{years}_{image:012d}.png"
        number = get(entry, "question_id", (int, str), where)
        if annotations_file is not None and number not in annotations:
            raise UserError(f"{where}: question {number} has no annotation in its other file")
        choices = get(entry, "multiple_choices", list, where, default=[])
        yield Record(
            picture, id=str(image), split=re.sub(r"20\d\d$", "", subtype),  # train, test-dev, ...
            question=get(entry, "question", str, where), question_id=str(number),
            choices=[str(choice) for choice in choices],
            **annotations.get(number, {}),
        )  # fmt: skip


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

    ``question_type`` is the structural type (verify, query, choose, logical, compare), and as in
    the official program ``answer_type`` is ``open`` for a query and ``binary`` for the rest.
    Questions of the test and challenge sets have no answers.
    """
    for number, entry in json_object(path).items():
        where = f"{path}, question {number}"
        image = str(get(entry, "imageId", (str, int), where))
        answer = get(entry, "answer", str, where, default=None)
        types = get(entry, "types", dict, where, default={})
        structure = get(types, "structural", str, f"{where}.types", default=None)
        yield Record(
            f"{image}.jpg", id=image, split=split_in(path.name), question_id=number,
            question=get(entry, "question", str, where), answers=[] if answer is None else [answer],
            question_type=structure,
            answer_type=structure and ("open" if structure == "query" else "binary"),
        )  # fmt: skip


DAQUAR = re.compile(r".*\bimage(\d+) *\?", re.IGNORECASE)
DAQUAR_END = re.compile(r"( (in |on |of )?(the |this )?image\d+ *\?)$", re.IGNORECASE)


def read_daquar(path: Path) -> Iterator[Record]:
    """DAQUAR's ``qa.*.txt`` and ``all_qa_pairs.txt``: a line a question, then a line its answer.

    The end of the question, "... in the image7 ?", names the picture, and is taken off.
    Several answers ("knife, fork") are one text, as annotated. The split is the file name's, or
    that of ``{train,test}_images_list.txt`` or ``{train,test}.txt`` beside the file.
    """
    splits = splits_beside(path, train="train_images_list.txt", test="test_images_list.txt")
    splits |= splits_beside(path, train="train.txt", test="test.txt")
    lines, split = text_lines(path), split_in(path.name)
    for number, (where, line) in enumerate(lines):
        image = f"image{matched(DAQUAR, line, where, '... in the image7 ?')[1]}"
        _, answer = next(lines, (where, ""))
        if not answer or DAQUAR.fullmatch(answer):
            raise UserError(f"{where}: this question is not followed by an answer")
        yield Record(
            f"{image}.png", id=image, split=split or splits.get(image), question_id=str(number),
            question=DAQUAR_END.sub("", line), answers=[answer],
        )  # fmt: skip


def read_msrvtt_qa(path: Path) -> Iterator[Record]:
    """MSRVTT-QA's ``{train,val,test}_qa.json`` (https://github.com/xudejing/video-question-answering)."""
    for record, number in _video_questions(path):
        record.video, record.id = f"video{number}.mp4", f"video{number}"
        yield record


def read_msvd_qa(path: Path) -> Iterator[Record]:
    """MSVD-QA's ``{train,val,test}_qa.json``, of the same authors and shape.

    Video 7 is ``vid7``, or its clip in ``youtube_mapping.txt``, if that is beside the file.
    """
    clips = {number: clip for clip, number in youtube_mapping(path).items()}
    for record, number in _video_questions(path):
        clip, name = clips.get(number), f"vid{number}"
        record.video = f"{clip}.avi{OR}{name}.avi" if clip else f"{name}.avi"
        record.id = clip or name
        yield record


def _video_questions(path: Path) -> Iterator[tuple[Record, int]]:
    for where, entry in json_items(path):
        answer = get(entry, "answer", str, where, default=None)
        number = get(entry, "id", (int, str), where, default=None)
        record = Record(
            split=split_in(path.name), question=get(entry, "question", str, where),
            answers=[] if answer is None else [answer],
            question_id=None if number is None else str(number),
        )  # fmt: skip
        yield record, get(entry, "video_id", int, where)
