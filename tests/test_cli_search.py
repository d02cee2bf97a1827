"""`tinyvl index`, `retrieve` and `classify` from the shell: what is printed, and what it costs."""

import json
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import shell
from dual import COLOURS, Dual
from PIL import Image

from tinyvl import cli_search, media

Done = namedtuple("Done", "status out err")
DUAL = [sys.executable, str(Path(__file__).parent / "dual.py")]


@pytest.fixture
def loads() -> list[tuple]:
    """The towers that were loaded."""
    return []


@pytest.fixture
def tinyvl(monkeypatch, loads):
    """The command line in this process, with the little dual encoder."""

    def load(name, place, task, sides=("text", "image")):
        loads.append(tuple(sides))
        return Dual("two" if name == "two" else "one")

    def run(*args: object, stdin: str = "", tty: bool = False) -> Done:
        done = shell.run(*args, stdin=stdin, tty=tty)
        return Done(done.returncode, done.stdout, done.stderr)

    monkeypatch.setattr(cli_search, "load_model", load)
    return run


@pytest.fixture
def photos(tmp_path, monkeypatch) -> Path:
    """A picture of each colour; the working folder is the one above."""
    (tmp_path / "photos").mkdir()
    for name, colour in COLOURS.items():
        Image.new("RGB", (20, 20), colour).save(tmp_path / "photos" / f"{name}.png")
    monkeypatch.chdir(tmp_path)
    return Path("photos")


def best(text: str, photos: Path, count: int = 4) -> list[str]:
    """The pictures by their products with a text's vector."""
    model = Dual()
    files = sorted(photos.glob("*.png"))
    pictures = [model.embed_images(media_tensor(file)[None])[0] for file in files]
    (query,) = model.embed_texts([text])
    order = sorted(range(len(files)), key=lambda i: -float(pictures[i] @ query))
    return [str(files[i]) for i in order[:count]]


def media_tensor(file: Path):
    return Dual().encoder.transform()(media.load_image(file))


# --------------------------------------------------------------------------------- index, retrieve


def test_a_folder_is_indexed_and_searched(tinyvl, photos, loads):
    done = tinyvl("index", photos)
    assert (done.status, done.out) == (0, "photos/.tinyvl\n")
    assert done.err.endswith("photos/.tinyvl: 4 embedded\n")
    done = tinyvl("retrieve", photos, "--query", "green")
    assert (done.status, done.err) == (0, "")
    assert done.out.splitlines() == best("green", photos)
    assert done.out.startswith("photos/green.png\n")
    assert loads == [("text", "image"), ("text",)]
    assert tinyvl("index", photos).err == "photos/.tinyvl: 4 unchanged\n"


def test_without_an_index_the_current_folder_gets_one_first(tinyvl, photos, monkeypatch, loads):
    monkeypatch.chdir(photos)
    done = tinyvl("retrieve", "--query", "a red dog", "-k", "1")
    assert (done.status, done.out) == (0, "red.png\n")
    assert "no index yet; embedding 4 pictures into .tinyvl" in done.err
    again = tinyvl("retrieve", "--query", "a red dog", "-k", "1")
    assert (again.out, again.err) == ("red.png\n", "")
    assert loads == [("text", "image"), ("text",)]
    monkeypatch.chdir("..")
    assert tinyvl("retrieve", "--index", "photos/.tinyvl", "-q", "red", "-k1").out == (
        "photos/red.png\n"
    )


def test_json_has_the_agreed_fields(tinyvl, photos):
    tinyvl("index", photos, "-o", "there")
    done = tinyvl("retrieve", "--index", "there", "-q", "blue", "--json", "-k", "2")
    lines = [json.loads(line) for line in done.out.splitlines()]
    assert [list(line) for line in lines] == [["query", "rank", "path", "score"]] * 2
    assert [(line["query"], line["rank"]) for line in lines] == [("blue", 1), ("blue", 2)]
    assert lines[0]["path"] == "photos/blue.png"
    assert lines[0]["score"] == pytest.approx(1, abs=1e-5)


def test_several_queries_are_told_apart(tinyvl, photos):
    tinyvl("index", photos)
    done = tinyvl(
        "retrieve", photos, "-q", "red", "-q", "blue", "--image", "photos/white.png", "-k1"
    )
    assert done.out.splitlines() == [
        "red\tphotos/red.png", "blue\tphotos/blue.png", "photos/white.png\tphotos/white.png"
    ]  # fmt: skip
    for args in (("-q", "-"), ()):
        done = tinyvl("retrieve", photos, *args, "-k", "1", stdin="red\n\ngreen\n")
        assert done.out.splitlines() == ["red\tphotos/red.png", "green\tphotos/green.png"]
    done = tinyvl("retrieve", photos, "-q", "red", "-q", "blue", "-k1", "-0")
    assert done.out == "photos/red.png\0photos/blue.png\0"


def test_a_picture_as_the_query_needs_no_text_tower(tinyvl, photos, loads):
    tinyvl("index", photos)
    done = tinyvl("retrieve", photos, "--image", "photos/blue.png", "-k", "1")
    assert done.out == "photos/blue.png\n"
    assert loads[-1] == ("image",)
    (photos / "bad.png").write_bytes(b"no")
    done = tinyvl("retrieve", photos, "-i", "photos/bad.png", "-i", "photos/red.png", "-k", "1")
    assert (done.status, done.out) == (1, "photos/red.png\tphotos/red.png\n")
    assert done.err.splitlines()[-1].startswith("tinyvl: photos/bad.png: ")


def test_queries_are_added_and_subtracted(tinyvl, photos, loads):
    tinyvl("index", photos)
    done = tinyvl(
        "retrieve", photos, "-q", "red", "--plus", "photos/blue.png", "--minus", "red", "-k1"
    )
    assert done.out == "photos/blue.png\n"
    assert loads[-1] == ("text", "image")
    done = tinyvl("retrieve", photos, "-q", "red", "--plus", "green", "-k", "2")
    assert set(done.out.split()) == {"photos/red.png", "photos/green.png"}
    assert loads[-1] == ("text",)
    done = tinyvl("retrieve", photos, "-q", "red", "--minus", "red")
    assert (done.status, done.out) == (1, "")
    assert "nothing is left" in done.err
    done = tinyvl("retrieve", photos, "-q", "red", "--plus", "no.png")
    assert (done.status, done.out) == (1, "")
    assert "no.png: there is no such file" in done.err


def test_a_threshold_and_no_limit(tinyvl, photos):
    tinyvl("index", photos)
    assert tinyvl("retrieve", photos, "-q", "red", "--threshold", "0.99").out == "photos/red.png\n"
    done = tinyvl("retrieve", photos, "-q", "red", "-q", "x", "--threshold", "1", "--minus", "red")
    assert (done.status, done.out) == (1, "")
    done = tinyvl("retrieve", photos, "-q", "x", "--threshold", "0.9")
    assert (done.status, done.out) == (0, "")
    assert len(tinyvl("retrieve", photos, "-q", "red", "-k", "0").out.splitlines()) == 4


def test_captions_are_found_for_a_picture(tinyvl, photos):
    rows = [{"image": f"photos/{c}.png", "captions": [f"a {c} thing", "a thing"]} for c in COLOURS]
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert tinyvl("index", "data.jsonl").status == 2  # a file has no place for an index
    assert tinyvl("index", "data.jsonl", "-o", "i").err.endswith(
        "4 embedded, 5 captions embedded\n"
    )
    ask = ("retrieve", "--index", "i", "--captions", "--image", "photos/green.png", "-k", "1")
    assert tinyvl(*ask).out == "a green thing\n"
    line = json.loads(tinyvl(*ask, "--json").out)
    assert (line["path"], line["caption"]) == ("photos/green.png", "a green thing")
    done = tinyvl("retrieve", "--index", "i", "-q", "blue", "-k", "1")
    assert done.out == "photos/blue.png\n"
    tinyvl("index", photos)
    done = tinyvl("retrieve", photos, "--captions", "-q", "red")
    assert (done.status, done.out) == (2, "")
    assert "no captions" in done.err


def test_a_list_of_paths_on_standard_input(tinyvl, photos):
    names = ["photos/red.png", "photos/line\nbreak.png", "photos/latin \udce9.png"]
    for name in names[1:]:
        Image.new("RGB", (20, 20), "green").save(name)
    done = tinyvl("index", "-", "-0", "-o", "i", stdin="\0".join(names))
    assert done.err.endswith("i: 2 embedded, 1 moved or copied\n")
    asked = ("retrieve", "--index", "i", "-q", "green", "-k", "2", "--duplicates")
    done = tinyvl(*asked, "-0")
    assert sorted(done.out.split("\0")[:-1]) == sorted(names[1:])
    done = tinyvl(*asked, "--json")
    assert sorted(json.loads(line)["path"] for line in done.out.splitlines()) == sorted(names[1:])
    assert tinyvl("index", "-", "-o", "i", stdin="photos/red.png\n").err == (
        "i: 1 unchanged, 2 gone\n"
    )


def test_a_data_set_is_indexed_from_where_its_pictures_are(tinyvl, photos):
    Path("sets").mkdir()
    record = {"image": "green.png", "captions": ["green"]}
    Path("sets/x.txt").write_text(json.dumps(record) + "\n")
    told = ["--format", "jsonl", "--images", photos]
    done = tinyvl("index", "sets/x.txt", "-o", "home", *told)
    assert done.err.endswith("home: 1 embedded, 1 caption embedded\n")
    assert tinyvl("retrieve", "--index", "home", "--query", "green").out.endswith("green.png\n")
    done = tinyvl("index", photos, "--format", "jsonl")
    assert done.status == 2
    assert "go with a data set" in done.err


def test_a_bad_file_costs_status_1_and_the_rest_is_indexed(tinyvl, photos):
    (photos / "bad.png").write_bytes(b"nothing")
    done = tinyvl("index", photos)
    assert (done.status, done.out) == (1, "photos/.tinyvl\n")
    assert "skipping" in done.err
    assert "bad.png: " in done.err
    assert "4 embedded, 1 unreadable" in done.err


def test_a_folder_that_has_changed_is_indexed_before_it_is_searched(tinyvl, photos, loads):
    tinyvl("index", photos)
    Image.new("RGB", (20, 20), "black").save(photos / "black.png")
    (photos / "red.png").unlink()
    (photos / "bad.png").write_bytes(b"nothing")
    asked = ("retrieve", photos, "-q", "red", "-k", "0")
    old = tinyvl(*asked, "--no-update")
    assert (old.status, old.err, len(old.out.split())) == (0, "", 4)
    done = tinyvl(*asked)
    assert done.status == 1
    assert {Path(line).name for line in done.out.split()} == {
        "black.png", "green.png", "blue.png", "white.png"
    }  # fmt: skip
    said = done.err.splitlines()
    assert "photos: 2 new, 1 gone since it was indexed; bringing" in said[0]
    assert "skipping" in said[1]
    assert "bad.png: " in said[1]
    assert len(said) == 2
    again = tinyvl(*asked)
    assert (again.status, again.out, again.err) == (0, done.out, "")
    assert loads == [("text", "image"), ("text",), ("text", "image"), ("text",)]
    assert tinyvl("index", photos).err.endswith("4 unchanged, 1 unreadable as before "
                                                "(--retry tries again)\n")  # fmt: skip
    assert tinyvl("index", photos, "--retry").status == 1
    (photos / "bad.png").write_bytes((photos / "blue.png").read_bytes())  # mended
    assert len(tinyvl(*asked, "--duplicates").out.split()) == 5


def test_a_folder_nobody_may_write_to_is_searched_as_it_is(tinyvl, photos, monkeypatch):
    tinyvl("index", photos)
    (photos / "red.png").unlink()

    def refuse(*args, **more):
        raise PermissionError(13, "Permission denied", "there")

    monkeypatch.setattr("tinyvl.index.store.writing", refuse)
    done = tinyvl("retrieve", photos, "-q", "red", "-k", "1")
    assert (done.status, done.out) == (0, "photos/red.png\n")
    assert done.err.endswith("searching the index as it is\n")


def test_a_subfolder_is_searched_by_the_index_around_it(tinyvl, photos, monkeypatch, loads):
    (photos / "trip" / "day").mkdir(parents=True)
    Image.new("RGB", (20, 20), (250, 9, 9)).save(photos / "trip" / "day" / "a.png")
    Image.new("RGB", (20, 20), "navy").save(photos / "trip" / "b.png")
    tinyvl("index", photos)
    done = tinyvl("retrieve", photos / "trip", "-q", "red")
    assert (done.err, done.out) == ("", "photos/trip/day/a.png\nphotos/trip/b.png\n")
    monkeypatch.chdir(photos / "trip" / "day")
    assert tinyvl("retrieve", "-q", "red").out == "a.png\n"
    assert not Path(".tinyvl").exists()


def test_equal_pictures_are_one_hit_and_scores_are_shown(tinyvl, photos):
    for i in range(5):
        (photos / f"{i}.png").write_bytes((photos / "red.png").read_bytes())
    done = tinyvl("retrieve", photos, "-q", "red", "-k", "2", "--scores")
    first, second = (line.split("\t") for line in done.out.splitlines())
    assert (first, second[0] in ("photos/blue.png", "photos/green.png", "photos/white.png")) == (
        ["photos/0.png", "1.0000"], True
    )  # fmt: skip
    done = tinyvl("retrieve", photos, "-q", "red", "-k", "6", "--duplicates")
    assert "photos/red.png" in done.out.splitlines()


def test_an_empty_index_finds_nothing(tinyvl, photos):
    for file in photos.iterdir():
        file.write_bytes(b"nothing")
    assert tinyvl("index", photos).status == 1
    done = tinyvl("retrieve", photos, "-q", "red")
    assert (done.status, done.out) == (1, "")
    assert "holds no pictures" in done.err


@pytest.mark.parametrize(
    ("args", "status", "said"),
    [
        (["retrieve", "photos"], 2, "--query"),
        (["retrieve", "photos", "-q", " "], 2, "empty"),
        (["retrieve", "no/such", "-q", "x"], 2, "not a folder"),
        (["retrieve", "photos", "--index", "i", "-q", "x"], 2, "not both"),
        (["retrieve", "photos", "-q", "x", "--json", "-0"], 2, "not go together"),
        (["retrieve", "photos", "-q", "x", "--scores", "-0"], 2, "not go together"),
        (["retrieve", "photos", "-q", "x", "--threshold", "1.5"], 2, "from -1 to 1"),
        (["retrieve", "photos", "-i", "no.png"], 1, "no.png: there is no such file"),
        (["retrieve", "a dog"], 2, '--query "a dog"'),
        (["retrieve", "--index", "no/such", "-q", "x"], 2, "no index there"),
        (["retrieve", "photos", "-q", "x", "--model", "two"], 2, "another model"),
        (["index", "photos", "--model", "two"], 2, "another model"),
        (["index", "-"], 2, "-o INDEX"),
        (["index", "no/such", "-o", "i"], 2, "does not exist"),
        (["classify", "photos"], 2, "--labels"),
        (["classify", "photos", "--labels", "cat"], 2, "two names"),
        (["classify", "photos", "--labels", "cat,dog", "--resume"], 2, "-o FILE"),
        (["classify", "photos", "--labels", "cat,dog", "--prompt", "a photo"], 2, "{}"),
        (["classify", "--labels", "cat,dog"], 2, "Name pictures"),
    ],
)
def test_mistakes_cost_one_sentence(tinyvl, photos, args, status, said):
    tinyvl("index", photos)
    done = tinyvl(*args, tty=True)
    assert (done.status, done.out) == (status, "")
    assert said in done.err
    assert len(done.err.splitlines()) == 1
    assert not Path("i").exists()


def test_a_closed_pipe_ends_quietly(photos):
    for i in range(40):
        (photos / f"{i:03} {'x' * 200}.png").write_bytes((photos / "red.png").read_bytes())
    retrieve = " ".join(
        [*DUAL, "retrieve", str(photos), *(f"-q red{i}" for i in range(60)), "-k 0"]
    )
    subprocess.run([*DUAL, "index", str(photos)], capture_output=True, check=True)
    done = subprocess.run(
        ["bash", "-c", f"{retrieve} | head -n 1"], capture_output=True, text=True, check=True
    )
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == ""


# ---------------------------------------------------------------------------------------- classify


def chances(file: Path, labels: list[str], prompts: list[str]) -> dict[str, float]:
    """The softmax over labels, slowly."""
    from math import exp

    model = Dual()
    picture = model.embed_images(media_tensor(file)[None])[0]
    weights = {}
    for label in labels:
        mean = sum(model.embed_texts([p.replace("{}", label)])[0] for p in prompts) / len(prompts)
        weights[label] = exp(float(picture @ (mean / mean.norm())) / 0.07)
    return {label: weight / sum(weights.values()) for label, weight in weights.items()}


def test_a_picture_gets_its_likeliest_label(tinyvl, photos):
    done = tinyvl("classify", "photos/red.png", "--labels", "red,green, blue")
    expected = chances(photos / "red.png", ["red", "green", "blue"], ["a photo of {}"])
    assert (done.status, done.err) == (0, "")
    assert done.out == f"red\t{expected['red']:.4f}\n"


def test_several_pictures_and_prompts_in_json(tinyvl, photos):
    Path("labels.txt").write_text("red\n\n green\nblue\nred\n")
    prompts = ["a {}", "one {}.", "{}"]
    args = [arg for prompt in prompts for arg in ("--prompt", prompt)]
    done = tinyvl("classify", photos, "--labels", "labels.txt", "--top", "9", "--json", *args)
    lines = [json.loads(line) for line in done.out.splitlines()]
    files = [f"photos/{name}.png" for name in sorted(COLOURS)]
    assert [line["path"] for line in lines] == [file for file in files for _ in range(3)]
    for i, file in enumerate(files):
        mine = lines[3 * i : 3 * i + 3]
        expected = chances(Path(file), ["red", "green", "blue"], prompts)
        assert [list(line) for line in mine] == [["path", "label", "probability", "rank"]] * 3
        assert [line["rank"] for line in mine] == [1, 2, 3]
        assert [m["label"] for m in mine] == sorted(expected, key=expected.get, reverse=True)
        for line in mine:
            assert line["probability"] == pytest.approx(expected[line["label"]], abs=1e-5)


def test_classify_reads_paths_names_bad_files_and_resumes(tinyvl, photos):
    (photos / "bad.png").write_bytes(b"nothing")
    paths = ["photos/red.png", "photos/bad.png", "photos/blue.png"]
    stdin = "".join(path + "\n" for path in paths)
    args = ("classify", "--labels", "red,green,blue", "-k", "2")
    done = tinyvl(*args, "-", "--json", stdin=stdin)
    lines = [json.loads(line) for line in done.out.splitlines()]
    assert done.status == 1
    assert [line["path"] for line in lines] == [paths[i] for i in (0, 0, 1, 2, 2)]
    assert list(lines[2]) == ["path", "error"]
    error, end = done.err.splitlines()
    assert error.startswith("tinyvl: photos/bad.png: ")
    assert end.endswith("1 failed")

    done = tinyvl(*args, "-", "-o", "out.tsv", stdin=stdin)
    whole = Path("out.tsv").read_text()
    assert (done.status, done.out) == (1, "")
    assert [line.split("\t")[:2] for line in whole.splitlines()][::2] == [
        ["photos/red.png", "red"], ["photos/blue.png", "blue"]
    ]  # fmt: skip
    rows = whole.splitlines(keepends=True)
    Path("out.tsv").write_text("".join(rows[:3]))  # killed within a picture
    Path("photos/bad.png").write_bytes((photos / "green.png").read_bytes())
    assert tinyvl(*args, "-", "-o", "out.tsv", stdin=stdin).status == 2
    assert tinyvl(*args, "-", "-o", "out.tsv", "--resume", stdin=stdin).status == 0
    lines = Path("out.tsv").read_text().splitlines(keepends=True)
    assert lines[:2] == rows[:2]
    assert lines[4:] == rows[2:]
    assert lines[2].startswith("photos/bad.png\tgreen\t")
