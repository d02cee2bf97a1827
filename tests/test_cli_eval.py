"""`tinyvl eval` from the shell: what is printed, how it is killed and resumed, what it refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import shell
import torch
from PIL import Image
from tiny import write_captioner, write_text, write_vision

from tinyvl import UserError, models
from tinyvl.evaluate_compare import draw

TEXTS = ["a red dog runs", "two cats sleep", "the sky is blue", "a cat is red"]
SLOW = 40  # pictures of the run that is killed


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A captioner, a LilT, pictures in two classes, and captions of them."""
    root = tmp_path_factory.mktemp("eval")
    write_captioner(root / "captioner", TEXTS)
    write_text(root / "text", TEXTS)
    write_vision(root / "vision")
    write_lilt(root / "lilt", root)
    lines = []
    for i in range(SLOW):
        name = f"photos/{'dog' if i % 2 else 'cat'}/{i:02}.png"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (6 * i, 90, 255 - 6 * i)).save(root / name)
        entry = {"image": name, "captions": [TEXTS[i % 4], TEXTS[(i + 1) % 4]], "id": str(i)}
        lines.append(json.dumps(entry) + "\n")
    (root / "few.jsonl").write_text("".join(lines[:6]))
    (root / "all.jsonl").write_text("".join(lines))
    return root


def write_lilt(folder: Path, home: Path, **options: object) -> Path:
    """A checkpoint of an untrained LilT."""
    config = models.new_config(
        "lilt", str(home / "text"), str(home / "vision"),
        fit="squash", prompt="", options={"embed": 16, **options},
    )  # fmt: skip
    torch.manual_seed(0)
    model = models.build(config, device=torch.device("cpu"), precision=torch.float32)
    folder.mkdir()
    models.save_config(folder, config)
    models.save(model, folder)
    return folder


def invoke(*args: object) -> dict:
    """The one JSON object on standard output."""
    result = shell.invoke("eval", *args)
    assert result.exit_code == 0, result.output
    (line,) = result.stdout.splitlines()
    return json.loads(line)


QUICK = ("--device", "cpu", "--workers", 0, "--quiet")
CAPTION = ("--beams", 2, "--max-tokens", 6, "--metrics", "BLEU-4,CIDEr", *QUICK)


@pytest.fixture(autouse=True)
def _without_java(monkeypatch):
    monkeypatch.setattr("tinyvl.metrics_java.find_java", lambda explicit=None: None)


def test_captions_scored_by_a_model_and_again_from_its_folder(home, tmp_path):
    out, results = tmp_path / "out", tmp_path / "results.json"
    ran = invoke(
        "caption", home / "captioner", home / "few.jsonl", "-o", out, "--results", results, *CAPTION
    )
    assert {"task", "model", "data", "metrics"} <= set(ran)
    assert ran["task"] == "caption"
    assert (ran["model"], ran["data"]) == (str(home / "captioner"), str(home / "few.jsonl"))
    assert set(ran["metrics"]) == {"BLEU-4", "CIDEr"}
    assert [entry["image_id"] for entry in json.loads(results.read_text())] == list(range(6))
    for made in (out, out / "predictions.jsonl", results):
        again = invoke("caption", "--predictions", made, home / "few.jsonl", "--metrics", "CIDEr")
        assert again["metrics"]["CIDEr"] == pytest.approx(ran["metrics"]["CIDEr"], abs=1e-12)
    told = invoke("caption", "--predictions", out, home / "few.jsonl", "--metrics", "CIDEr")
    assert told["decoding"] == ran["decoding"]
    assert told["model"] == ran["model"]
    both = invoke("caption", "--compare", out, results, home / "few.jsonl", "--metrics", "CIDEr")
    assert both["difference"]["CIDEr"]["value"] == pytest.approx(0, abs=1e-12)


def test_what_tinyvl_caption_writes_is_scored(home, tmp_path):
    made = tmp_path / "captions.jsonl"
    args = ["caption", str(home / "photos"), "--model", str(home / "captioner"), "--json"]
    args += ["-o", str(made), "--beams", "2", "--max-tokens", "6", "--device", "cpu"]
    assert shell.invoke(*args).exit_code == 0
    found = invoke("caption", "--predictions", made, home / "all.jsonl", "--metrics", "CIDEr")
    ran = invoke("caption", home / "captioner", home / "all.jsonl", *CAPTION)
    assert found["metrics"]["CIDEr"] == pytest.approx(ran["metrics"]["CIDEr"], abs=1e-12)


def test_features_stand_in_for_pictures_that_are_not_there(home, tmp_path):
    data = tmp_path / "few.jsonl"
    data.write_text((home / "few.jsonl").read_text())
    shutil.copytree(home / "photos", tmp_path / "photos")
    ran = invoke("caption", home / "captioner", data, "-o", tmp_path / "with", *CAPTION)
    args = ["features", data, "--vision", home / "captioner/vision", "--fit", "squash"]
    args += ["--what", "tokens", "-o", tmp_path / "features", *QUICK]
    result = shell.invoke(*args)
    assert result.exit_code == 0, result.output
    shutil.rmtree(tmp_path / "photos")
    args = ("--features", tmp_path / "features", "-o", tmp_path / "without")
    found = invoke("caption", home / "captioner", data, *args, *CAPTION)
    assert (found["items"], found["failed"]) == (6, 0)
    assert found["features"] == str(tmp_path / "features")
    assert ran["features"] is None
    both = [
        [json.loads(line) for line in (tmp_path / name / "predictions.jsonl").open()]
        for name in ("with", "without")
    ]
    for one, other in zip(*both, strict=True):  # fp16 on disk
        assert one["caption"] == other["caption"]
        assert one["score"] == pytest.approx(other["score"], abs=0.01)


@pytest.mark.parametrize("pool", ["token", "mean"])
def test_features_stand_in_for_pictures_of_a_locked_tower(home, tmp_path, pool):
    """Retrieval and zero-shot: the same ranks, though no picture can be decoded any more."""
    shutil.copytree(home / "photos", tmp_path / "photos")
    lines = [json.loads(line) for line in (home / "few.jsonl").read_text().splitlines()]
    for line in lines:
        line["label"] = line["image"].split("/")[1]
    data = tmp_path / "few.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = write_lilt(tmp_path / "model", home, image={"pool": pool})
    store = tmp_path / "features"
    args = ["features", data, "--vision", home / "vision", "--fit", "squash", "-o", store, *QUICK]
    assert shell.invoke(*args).exit_code == 0

    def ranks(task: str, name: str, *args: object) -> tuple[dict, list[int]]:
        found = invoke(task, model, data, "-o", tmp_path / task / name, *args, *QUICK)
        made = (tmp_path / task / name / "predictions.jsonl").read_text().splitlines()
        return found, [json.loads(line)["rank"] for line in made]

    plain = {task: ranks(task, "plain") for task in ("retrieval", "zeroshot")}
    shutil.rmtree(tmp_path / "photos")
    for task, (wanted, ranked) in plain.items():
        found, again = ranks(task, "stored", "--features", store)
        assert (found["items"], found["failed"]) == (6, 0)
        assert again == ranked
        assert found["metrics"] == wanted["metrics"]
        assert (found["features"], wanted["features"]) == (str(store), None)


def test_features_are_refused_where_they_would_be_wrong(home, tmp_path):
    store = tmp_path / "features"
    args = ["features", home / "few.jsonl", "--vision", home / "vision", "--fit", "squash"]
    done = shell.invoke(*args, "-o", store, *QUICK)
    assert done.exit_code == 0
    trained = write_lilt(tmp_path / "trained", home, image={"unlock": "layernorm"})
    larger = write_lilt(tmp_path / "larger", home, size=48)
    for model, data, said in (
        (trained, "few.jsonl", "wholly frozen"),
        (larger, "few.jsonl", "input_size"),
        (home / "lilt", "all.jsonl", "34 of 40 pictures"),
    ):
        for task in ("retrieval", "zeroshot"):
            place = home / data
            if task == "zeroshot":  # the same pictures with classes
                lines = [json.loads(line) for line in place.read_text().splitlines()]
                rows = [{"image": str(home / e["image"]), "label": "cat"} for e in lines]
                rows[0]["label"] = "dog"
                place = tmp_path / "classes.jsonl"
                place.write_text("".join(json.dumps(row) + "\n" for row in rows))
            with pytest.raises(UserError, match=said):
                invoke(task, model, place, "--features", store, *QUICK)
    # A captioner of which the encoder was trained too.
    config = models.new_config(
        "epalm", str(home / "captioner/lm"), str(home / "vision"), fit="squash", prompt="",
        options={"unfreeze": ["vision"]},
    )  # fmt: skip
    model = models.build(config, device=torch.device("cpu"), precision=torch.float32)
    (tmp_path / "epalm").mkdir()
    models.save_config(tmp_path / "epalm", config)
    models.save(model, tmp_path / "epalm")
    with pytest.raises(UserError, match="wholly frozen"):
        invoke("caption", tmp_path / "epalm", home / "few.jsonl", "--features", store, *CAPTION)
    args = ["caption", "--model", str(tmp_path / "epalm"), "--features", str(store)]
    with pytest.raises(UserError, match="wholly frozen"):
        shell.invoke(*args)


def test_a_run_killed_by_kill_9_goes_on_to_the_same_result(home, tmp_path):
    args = ["caption", str(home / "captioner"), str(home / "all.jsonl"), *map(str, CAPTION)]
    args += ["--batch", "1", "-o", str(tmp_path / "out")]
    command = [sys.executable, "-m", "tinyvl.cli", "eval", *args]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=env)
    made = tmp_path / "out/predictions.jsonl"
    while process.poll() is None and not (made.exists() and made.read_text().count("\n") > 3):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = made.read_text().count("\n")
    assert 3 < kept < SLOW  # it was killed in the middle
    resumed = invoke(*args, "--resume")
    assert resumed["kept"] == kept
    whole = invoke(*args[:-1], str(tmp_path / "whole"))
    assert resumed["metrics"] == whole["metrics"]
    assert made.read_text() == (tmp_path / "whole/predictions.jsonl").read_text()


def test_retrieval_and_zeroshot_by_a_lilt(home, tmp_path):
    found = invoke("retrieval", home / "lilt", home / "few.jsonl", "-o", tmp_path / "r", *QUICK)
    names = [f"{way}{k}" for way in ("TR", "IR") for k in ("@1", "@5", "@10", "-mean")]
    assert set(found["metrics"]) == set(found["chance"]) == set(names)
    assert all(0 <= value <= 1 for value in found["metrics"].values())
    assert found["metrics"]["IR@10"] == 1  # of six pictures
    again = invoke("retrieval", "--predictions", tmp_path / "r")
    assert again["metrics"] == found["metrics"]
    found = invoke("zeroshot", home / "lilt", home / "photos", "-o", tmp_path / "z", *QUICK)
    assert set(found["metrics"]) == {"top1", "top5"}
    assert found["metrics"]["top5"] == 1  # of two classes
    assert set(found["groups"]["class"]) == {"cat", "dog"}
    report = invoke("zeroshot", "--compare", tmp_path / "z", tmp_path / "z")
    assert report["difference"]["top1"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_answers_made_elsewhere(tmp_path):
    rows = [("1", "what?", ["a dog"]), ("2", "who?", ["me"] * 4 + ["you"] * 6)]
    data = [{"image": "a.png", "question": q, "answers": a, "question_id": i} for i, q, a in rows]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in data))
    (tmp_path / "a.json").write_text(
        json.dumps([{"question_id": 1, "answer": "a dog"}, {"question_id": 2, "answer": "Me"}])
    )
    found = invoke("vqa", "--predictions", tmp_path / "a.json", tmp_path / "data.jsonl")
    assert found["metrics"] == {"accuracy": 1.0, "strict_accuracy": 0.5}


def test_a_broken_picture_leaves_status_1(home, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"nothing")
    good = home / "photos/cat/00.png"
    lines = [{"image": str(path), "captions": ["a cat"]} for path in (good, tmp_path / "bad.png")]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    args = ["eval", "caption", home / "captioner", tmp_path / "d.jsonl", *CAPTION]
    result = shell.invoke(*args)
    assert result.exit_code == 1
    assert json.loads(result.stdout)["failed"] == 1
    assert "bad.png" in result.stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["caption"], "[MODEL] DATA"),
        (["caption", "a", "b", "c"], "[MODEL] DATA"),
        (["caption", "--predictions", "p", "model", "data"], "DATA alone"),
        (["caption", "--predictions", "p", "--compare", "a", "b", "data"], "give one of them"),
        (["caption", "--predictions", "p", "--out", "o", "data"], "running a model"),
        (["caption", "--predictions", "p", "--shuffle-images", "data"], "running a model"),
        (["caption", "--predictions", "p", "--rerank", "none", "data"], "--rerank is for running"),
        (["caption", "--predictions", "p", "--beams", "5", "data"], "--beams is for running a"),
        (["caption", "--compare", "a", "b", "--frames", "4", "data"], "running a model"),
        (["vqa", "--compare", "a", "b", "--length-penalty", "1", "data"], "--length-penalty is"),
        (["vqa", "--compare", "a", "b", "--results", "r", "data"], "one set"),
        (["vqa", "--allow-missing", "m", "data"], "--predictions"),
        (["caption", "--resume", "m", "data"], "-o DIR"),
        (["caption", "--metrics", "BLEU", "FEW"], "BLEU-1"),
        (["caption", "no/such/model", "FEW"], "no tinyvl checkpoint"),
        (["caption", "CAPTIONER", "no/such/data"], "no/such/data"),
        (["caption", "CAPTIONER"], "is a model; name the data behind it"),
        (["caption", "CAPTIONER", "FEW", "--split", "test"], "no split 'test'"),
        (["caption", "CAPTIONER", "FEW", "--sample", "--temperature", "0"], "--temperature"),
        (["caption", "LILT", "FEW"], "lilt"),
        (["retrieval", "CAPTIONER", "FEW"], "does not embed"),
        (["retrieval", "LILT", "FEW", "--protocol", "xtd"], "full or lilt"),
        (["retrieval", "LILT", "FEW", "--protocol", "lilt"], "XTD10"),
        (["retrieval", "--predictions", "p", "data"], "nothing else"),
        (["zeroshot", "--predictions", "p", "--features", "f"], "nothing else"),
        (["retrieval", "--predictions", "p"], "eval retrieval -o"),
        (["zeroshot", "LILT", "FEW"], "no record has a class"),
        (["zeroshot", "LILT", "PHOTOS", "--prompt", "a photo"], "needs one {}"),
        (["zeroshot", "LILT", "PHOTOS", "--all-classes"], "--classes"),
        (["zeroshot", "LILT", "PHOTOS", "--classes", "no/such/file"], "no/such/file"),
        (["vqa", "CAPTIONER", "FEW"], "no record asks a question"),
    ],
)
def test_mistakes_are_one_sentence(home, args, said):
    places = {"FEW": "few.jsonl", "CAPTIONER": "captioner", "LILT": "lilt", "PHOTOS": "photos"}
    args = [str(home / places[arg]) if arg in places else arg for arg in args]
    with pytest.raises(UserError) as caught:
        invoke(*args, *(() if "--predictions" in args or "--compare" in args else QUICK))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.status in (1, 2)


def test_tables_on_a_terminal(capsys):
    report = {
        "task": "retrieval", "model": "m", "data": "d.jsonl", "split": None,
        "metrics": {"TR@1": 0.25, "IR@1": 0.5}, "chance": {"TR@1": 0.01, "IR@1": 0.02},
        "groups": {
            "language": {"de": {"items": 5, "TR@1": 0.125, "IR@1": 0.5}},
            "class": {str(i): {"items": 1, "TR@1": 0.0} for i in range(1000)},
        },
        "checkpoint": {"method": "lilt"}, "seconds": 1.5,
    }  # fmt: skip
    draw(report)
    drawn = capsys.readouterr().out
    for text in ("d.jsonl", "0.2500", "chance", "0.0200", "de", "0.1250", "1000 rows", "lilt"):
        assert text in drawn, text
    assert drawn.count("0.0200") == 2  # beside the metrics, and below the languages
    assert "999" not in drawn
    assert max(map(len, drawn.splitlines())) <= 80
    interval = {"value": 0.1, "low": -0.05, "high": 0.2}
    compared = report | {
        "predictions": "b",
        "baseline": {"predictions": "a", "metrics": {"TR@1": 0.15}, "checkpoint": {"steps": 7}},
        "difference": {"TR@1": interval}, "groups": {},
    }  # fmt: skip
    draw(compared)
    drawn = capsys.readouterr().out
    for text in ("B - A", "95 %", "-0.0500", "0.1500", "A: a", "B: b", "A, checkpoint: steps 7",
                 "B, checkpoint: method lilt"):  # fmt: skip
        assert text in drawn, text
    assert "model: m" in drawn.replace("B, model", "model")
    assert "\ncheckpoint" not in drawn
    names = [f"{way}@{k}" for way in ("TR", "IR") for k in (1, 5, 10)] + ["TR-mean", "IR-mean"]
    scores = dict.fromkeys(names, 0.1234)
    languages = {"en": {"items": 10_000, **scores}, "de": {"items": 10_000, **scores}}
    draw(report | {"metrics": scores, "chance": scores, "groups": {"language": languages}})
    drawn = capsys.readouterr().out
    assert drawn.count("chance") == 2  # not "chan...", for there are ten columns
    assert max(map(len, drawn.splitlines())) <= 80
