"""Miniatures of the published data sets, by their own schemas: a builder a format.

A builder writes a data set below a folder and returns the path to read and the records expected.
The files of the pictures are there and empty: readers look for them and do not open them.
"""

import io
import json
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from tinyvl import UserError, data
from tinyvl.data import Record

Built = tuple[Path, list[Record]]


def write(path: Path, text: str | bytes = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def write_json(path: Path, document: object) -> Path:
    return write(path, json.dumps(document))


def touch(folder: Path, *names: str) -> list[str]:
    return [str(write(folder / name)) for name in names]


def jsonl(folder: Path) -> Built:
    picture, video, sound = touch(folder / "files", "a.jpg", "b.mp4", "c.ogg")
    lines = [
        {"image": "files/a.jpg", "captions": ["ein Hund", "x\u2028y"], "id": "1", "lang": "de"},
        {"video": "files/b.mp4", "question": "what?", "answers": ["dog", "dog"], "split": "val",
         "question_id": 7, "question_type": "what", "answer_type": "other", "choices": ["dog"]},
        {"audio": "files/c.ogg", "label": "dog bark", "domain": "in"},
    ]  # fmt: skip
    path = write(folder / "set.jsonl", "\n".join(map(json.dumps, lines)))
    return path, [
        Record(picture, ["ein Hund", "x\u2028y"], "1", lang="de"),
        Record(
            video=video, id="files/b.mp4", split="val", question="what?", answers=["dog", "dog"],
            question_id="7", question_type="what", answer_type="other", choices=["dog"],
        ),
        Record(audio=sound, id="files/c.ogg", label="dog bark", domain="in"),
    ]  # fmt: skip


def karpathy(folder: Path) -> Built:
    (picture,) = touch(folder / "val2014", "COCO_val2014_000000000042.jpg")
    entry = {
        "filepath": "val2014", "filename": Path(picture).name, "imgid": 0, "cocoid": 42,
        "split": "restval", "sentids": [1], "sentences": [
            {"tokens": ["a", "dog"], "raw": "A dog.", "imgid": 0, "sentid": 1},
        ],
    }  # fmt: skip
    path = write_json(folder / "dataset_coco.json", {"images": [entry], "dataset": "coco"})
    return path, [Record(picture, ["A dog."], "42", "restval")]


def coco(folder: Path) -> Built:
    first, second = touch(folder / "val2017", "000000000042.jpg", "000000000043.jpg")
    document = {
        "info": {"year": 2017},
        "licenses": [],
        "images": [
            {"license": 1, "file_name": Path(name).name, "height": 4, "width": 4, "id": number}
            for number, name in ((42, first), (43, second))
        ],
        "annotations": [
            {"image_id": 43, "id": 1, "caption": "A cat"},
            {"image_id": 42, "id": 2, "caption": "A dog"},
            {"image_id": 43, "id": 3, "caption": "Two cats"},
        ],
    }
    path = write_json(folder / "annotations/captions_val2017.json", document)
    return path, [Record(first, ["A dog"], "42"), Record(second, ["A cat", "Two cats"], "43")]


def nocaps(folder: Path) -> Built:
    names = ("0013ea2087020901.jpg", "00a5fcfb86b1a8d4.jpg", "01a5fcfb86b1a8d4.jpg")
    pictures = touch(folder / "val", *names)
    document = {
        "licenses": [],
        "info": {"url": "http://nocaps.org", "version": "0.1"},
        "images": [
            {"id": i, "open_images_id": name[:16], "height": 4, "width": 4, "file_name": name,
             "coco_url": f"https://s3.amazonaws.com/nocaps/val/{name}", "domain": f"{d}-domain"}
            for i, (name, d) in enumerate(zip(names, ("near", "in", "out"), strict=True))
        ],
        "annotations": [
            {"image_id": i, "id": 2 * i + j, "caption": f"caption {i} {j}"}
            for i in range(3) for j in range(2)
        ],
    }  # fmt: skip
    path = write_json(folder / "nocaps_val_4500_captions.json", document)
    return path, [
        Record(picture, [f"caption {i} 0", f"caption {i} 1"], str(i), "val", domain=domain)
        for i, (picture, domain) in enumerate(zip(pictures, ("near", "in", "out"), strict=True))
    ]


def flickr(folder: Path) -> Built:
    first, second = touch(folder / "Flicker8k_Dataset", "a.jpg", "b.jpg")
    lines = "a.jpg#0\tA dog , running .\na.jpg#1\tTwo | dogs\nb.jpg#0\tA cat\n"
    write(folder / "Flickr_8k.trainImages.txt", "a.jpg\n")
    path = write(folder / "Flickr8k.token.txt", lines)
    return path, [
        Record(first, ["A dog , running .", "Two | dogs"], "a.jpg", "train"),
        Record(second, ["A cat"], "b.jpg"),
    ]


def visual_genome(folder: Path) -> Built:
    first, second = touch(folder, "VG_100K/1.jpg", "VG_100K_2/2.jpg")
    document = [
        {"id": number, "regions": [
            {"region_id": 10 * number + j, "image_id": number, "phrase": f"the clock {j}",
             "x": 0, "y": 0, "width": 3, "height": 3}
            for j in range(2)
        ]}
        for number in (1, 2)
    ]  # fmt: skip
    path = write_json(folder / "region_descriptions.json", document)
    phrases = ["the clock 0", "the clock 1"]
    return path, [Record(first, phrases, "1"), Record(second, phrases, "2")]


def cc3m(folder: Path) -> Built:
    urls = [f"http://example.org/{i}?x=1" for i in range(3)]
    first, third = touch(folder, *(f"training/{zlib.crc32(urls[i].encode())}" for i in (0, 2)))
    lines = "".join(f"a caption {i}\t{url}\n" for i, url in enumerate(urls))
    path = write(folder / "Train_GCC-training.tsv", lines)
    return path, [
        Record(first, ["a caption 0"], "0", "train"),
        Record(third, ["a caption 2"], "2", "train"),
    ]


def xtd10(folder: Path) -> Built:
    names = ["COCO_train2014_000000000001.jpg", "COCO_val2014_000000000002.jpg"]
    pictures = touch(folder / "coco", f"train2014/{names[0]}", f"val2014/{names[1]}")
    home = folder / "coco/XTD10"
    write(home / "test_image_names.txt", "\n".join(names) + "\n")
    write(home / "test_1kcaptions_de.txt", "ein Hund\neine Katze")
    write(home / "test_1kcaptions_jp.txt", "犬\n猫\n")
    return home, [
        Record(picture, [caption], name, "test", lang)
        for lang, captions in (("de", ("ein Hund", "eine Katze")), ("jp", ("犬", "猫")))
        for picture, name, caption in zip(pictures, names, captions, strict=True)
    ]


VQA_ANSWERS = ["net"] * 7 + ["netting", "mesh", "net "]


def vqa(folder: Path) -> Built:
    (picture,) = touch(folder / "val2014", "COCO_val2014_000000000042.jpg")
    common = {"info": {}, "data_type": "mscoco", "data_subtype": "val2014", "license": {}}
    questions = [
        {"image_id": 42, "question": "What is this?", "question_id": 42000},
        {"image_id": 42, "question": "Is it red?", "question_id": 42001},
    ]
    annotations = [
        {"question_type": kind, "multiple_choice_answer": answers[0], "image_id": 42,
         "answers": [
             {"answer": answer, "answer_confidence": "yes", "answer_id": i}
             for i, answer in enumerate(answers, 1)
         ],
         "answer_type": answer_type, "question_id": number}
        for kind, answers, answer_type, number in (
            ("is it", ["yes"] * 10, "yes/no", 42001),
            ("what is this", VQA_ANSWERS, "other", 42000),
        )
    ]  # fmt: skip
    path = write_json(
        folder / "v2_OpenEnded_mscoco_val2014_questions.json",
        common | {"task_type": "Open-Ended", "questions": questions},
    )
    write_json(folder / "v2_mscoco_val2014_annotations.json", common | {"annotations": annotations})
    return path, [
        Record(
            picture, id="42", split="val", question="What is this?", answers=VQA_ANSWERS,
            question_id="42000", question_type="what is this", answer_type="other",
        ),
        Record(
            picture, id="42", split="val", question="Is it red?", answers=["yes"] * 10,
            question_id="42001", question_type="is it", answer_type="yes/no",
        ),
    ]  # fmt: skip


def gqa(folder: Path) -> Built:
    (picture,) = touch(folder / "images", "2354786.jpg")
    document = {
        number: {
            "semantic": [{"operation": "select", "dependencies": [], "argument": "sky (1)"}],
            "entailed": [], "equivalent": [number], "question": question, "imageId": "2354786",
            "isBalanced": True, "groups": {"global": None, "local": "10q"}, "answer": answer,
            "semanticStr": "", "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
            "types": {"detailed": "x", "semantic": "attr", "structural": structure},
            "fullAnswer": f"It is {answer}.",
        }
        for number, question, answer, structure in (
            ("02930152", "Is the sky dark?", "yes", "verify"),
            ("07333408", "What is on the wall?", "pipe", "query"),
        )
    }  # fmt: skip
    path = write_json(folder / "questions/testdev_balanced_questions.json", document)
    return path, [
        Record(
            picture, id="2354786", split="testdev", question="Is the sky dark?", answers=["yes"],
            question_id="02930152", question_type="verify", answer_type="binary",
        ),
        Record(
            picture, id="2354786", split="testdev", question="What is on the wall?",
            answers=["pipe"], question_id="07333408", question_type="query", answer_type="open",
        ),
    ]  # fmt: skip


def daquar(folder: Path) -> Built:
    first, second = touch(folder / "nyu_depth_images", "image3.png", "image17.png")
    lines = (
        "what is on the left of the sink in the image3 ?\ntable\n"
        "what are the largest brown objects in this image17 ?\nknife, fork\n"
    )
    path = write(folder / "qa.37.raw.train.txt", lines)
    return path, [
        Record(
            first, id="image3", split="train", question="what is on the left of the sink",
            answers=["table"], question_id="0",
        ),
        Record(
            second, id="image17", split="train", question="what are the largest brown objects",
            answers=["knife, fork"], question_id="1",
        ),
    ]  # fmt: skip


def msrvtt(folder: Path) -> Built:
    first, second = touch(folder / "TrainValVideo", "video0.mp4", "video6513.webm")
    document = {
        "info": {"contributor": "Microsoft MSM group", "version": "1.0", "year": "2016"},
        "videos": [
            {"category": 9, "url": "https://www.youtube.com/watch?v=9lZi22qLlEo",
             "video_id": f"video{i}", "start time": 137.72, "end time": 149.44, "split": split,
             "id": i}
            for i, split in ((0, "train"), (6513, "validate"))
        ],
        "sentences": [
            {"caption": "a car is shown", "video_id": "video6513", "sen_id": 1},
            {"caption": "cartoon birds", "video_id": "video0", "sen_id": 0},
            {"caption": "birds fly", "video_id": "video0", "sen_id": 2},
        ],
    }  # fmt: skip
    path = write_json(folder / "train_val_videodatainfo.json", document)
    return path, [
        Record(video=first, captions=["cartoon birds", "birds fly"], id="video0", split="train"),
        Record(video=second, captions=["a car is shown"], id="video6513", split="val"),
    ]


def msrvtt_qa(folder: Path) -> Built:
    (video,) = touch(folder / "video", "video6513.mp4")
    document = [
        {"answer": "couch", "category_id": 14, "id": 158581, "question": "what are they on?",
         "video_id": 6513}
    ]  # fmt: skip
    path = write_json(folder / "val_qa.json", document)
    return path, [
        Record(
            video=video, id="video6513", split="val", question="what are they on?",
            answers=["couch"], question_id="158581",
        )
    ]  # fmt: skip


CLIP = "-4wsuPCjDBc_5_15"


def msvd(folder: Path) -> Built:
    first, second = touch(folder / "YouTubeClips", f"{CLIP}.avi", "mv89psg6zh4_33_46.avi")
    write(folder / "youtube_mapping.txt", f"{CLIP} vid1\nmv89psg6zh4_33_46 vid1301\n")
    lines = f"# comment\n\n{CLIP} a squirrel eats\nmv89psg6zh4_33_46 a bird\n{CLIP} it eats\n"
    path = write(folder / "AllVideoDescriptions.txt", lines)
    return path, [
        Record(video=first, captions=["a squirrel eats", "it eats"], id=CLIP, split="train"),
        Record(video=second, captions=["a bird"], id="mv89psg6zh4_33_46", split="test"),
    ]


def msvd_qa(folder: Path) -> Built:
    (video,) = touch(folder / "YouTubeClips", f"{CLIP}.avi")
    write(folder / "youtube_mapping.txt", f"{CLIP} vid1\n")
    document = [{"answer": "chew", "id": 0, "question": "what is it doing?", "video_id": 1}]
    path = write_json(folder / "test_qa.json", document)
    return path, [
        Record(
            video=video, id=CLIP, split="test", question="what is it doing?", answers=["chew"],
            question_id="0",
        )
    ]  # fmt: skip


def audiocaps(folder: Path) -> Built:
    first, third = touch(folder / "audio/test", "Y7fmOlUlwoNg.wav", "103545.flac")
    lines = (
        "audiocap_id,youtube_id,start_time,caption\n"
        "103549,7fmOlUlwoNg,20,Constant rattling noise\n"
        '103541,7fmOlUlwoNg,20,"Rattling, then vibrations"\n'
        "103542,6BJ455B1aAs,0,A rocket flies by\n"
        "103545,GOD8Bt5LfDE,100,Humming\n"
    )
    path = write(folder / "test.csv", lines)
    captions = ["Constant rattling noise", "Rattling, then vibrations"]
    return path, [
        Record(audio=first, captions=captions, id="7fmOlUlwoNg", split="test"),
        Record(audio=third, captions=["Humming"], id="GOD8Bt5LfDE", split="test"),
    ]


def clotho(folder: Path) -> Built:
    (sound,) = touch(folder / "clotho_audio_development/development", "Distorted AM Radio.wav")
    captions = [f"noise, {i}" for i in range(5)]
    header = ",".join(["file_name", *(f"caption_{i}" for i in range(1, 6))])
    row = ",".join(["Distorted AM Radio.wav", *(f'"{caption}"' for caption in captions)])
    path = write(folder / "clotho_captions_development.csv", f"{header}\r\n{row}\r\n")
    return path, [Record(audio=sound, captions=captions, id=Path(sound).name, split="train")]


def classes(folder: Path) -> Built:
    names = ["train/crane/a.jpg", "train/white fox/b.JPG", "val/crane/c.png", "val/white fox/d.png"]
    paths = touch(folder, *names)
    return folder, [
        Record(path, id=name, split=name.split("/")[0], label=name.split("/")[1])
        for path, name in zip(paths, names, strict=True)
    ]


def folder_of_pictures(folder: Path) -> Built:
    first, second = touch(folder, "a.jpg", "b/c.png")
    write(folder / "a.txt", "a dog\ntwo dogs\n")
    return folder, [Record(first, ["a dog", "two dogs"], "a.jpg"), Record(second, [], "b/c.png")]


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def raises(path: Path, complaint: str) -> None:
    """Reading fails, and the error names the file."""
    with pytest.raises(UserError) as caught:
        data.read(path)
    assert f"{path}{complaint}" in str(caught.value)


# Every format but WebDataset, whose records' paths are in the cache.
PUBLISHED: dict[str, Callable[[Path], Built]] = {
    "jsonl": jsonl,
    "karpathy": karpathy,
    "coco": coco,
    "nocaps": nocaps,
    "flickr": flickr,
    "visual-genome": visual_genome,
    "cc3m": cc3m,
    "xtd10": xtd10,
    "vqa": vqa,
    "gqa": gqa,
    "daquar": daquar,
    "msrvtt": msrvtt,
    "msrvtt-qa": msrvtt_qa,
    "msvd": msvd,
    "msvd-qa": msvd_qa,
    "audiocaps": audiocaps,
    "clotho": clotho,
    "classes": classes,
    "folder": folder_of_pictures,
}
