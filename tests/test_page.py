"""Pages of results: what is in them, that nothing gets out of them, and how they behave."""

import base64
import hashlib
import json
import shutil
import subprocess
import wave
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import shell
from PIL import Image
from test_media_av import even, write

EVIL = '<img src=x onerror="document.title=1">.jpg'
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


class Page(HTMLParser):
    """A page's tags with their attributes, and its text."""

    def __init__(self, source: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data.strip())

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def photos(tmp_path, monkeypatch) -> list[str]:
    """Three pictures, one of a name that would be code."""
    monkeypatch.chdir(tmp_path)
    names = ["a.png", EVIL, "c.webp"]
    for i, name in enumerate(names):
        Image.new("RGB", (400, 300 + i), (80 * i, 90, 200)).save(name)
    return names


def lines(name: str, *entries: dict) -> str:
    Path(name).write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return name


def captions(photos: list[str], name: str = "r.jsonl", *said: str) -> str:
    said = said or ("a dog", "<b>two</b> cats & 'more'", "the sea")
    entries = [
        {"path": path, "caption": text, "score": -1.5 + i}
        for i, (path, text) in enumerate(zip(photos, said, strict=True))
    ]
    return lines(name, *entries)


def made(*args: object, stdin: str = "") -> Page:
    done = shell.run("page", *args, "--quiet", stdin=stdin)
    assert done.returncode == 0, done.stderr
    return Page(done.stdout)


def test_names_and_captions_are_text(photos):
    page = made(captions(photos))
    assert len(page.all("img")) == len(page.all("article")) == 3
    assert [image["alt"] for image in page.all("img")][1] == "<b>two</b> cats & 'more'"
    assert "<b>two</b> cats & 'more'" in page.text
    assert EVIL in page.text
    assert not [name for _, found in page.tags for name in found if name.startswith("on")]
    sources = [found["src"] for _, found in page.tags if "src" in found]
    assert all(source.startswith("data:image/webp;base64,") for source in sources)
    assert len(page.all("script")) == 1


def test_a_page_has_links_to_its_files_and_is_small(tmp_path, monkeypatch):
    (tmp_path / "in:side").mkdir()
    monkeypatch.chdir(tmp_path)
    entries = []
    for i in range(20):  # noise, the worst there is
        noise = np.random.default_rng(i).integers(0, 256, (240, 320, 3), dtype=np.uint8)
        Image.fromarray(noise).save(f"in:side/{i}.jpg")
        entries.append({"path": f"in:side/{i}.jpg", "caption": "noise", "score": -1})
    (tmp_path / "out").mkdir()
    lines("r.jsonl", *entries)
    done = shell.run("page", "r.jsonl", "-o", "out/page.html")
    assert (done.returncode, done.stdout) == (0, "out/page.html\n")
    page = Page(Path("out/page.html").read_text())
    assert page.all("a")[0]["href"] == "../in%3Aside/0.jpg"
    assert Path("out/page.html").stat().st_size < 1.5e6 / 100 * 20


def test_searches_are_rows(photos):
    entries = [
        {"query": query, "rank": i + 1, "path": path, "score": 0.5 - i / 10}
        for query in ("a <dog>", "the sea")
        for i, path in enumerate(photos)
    ]
    page = made(lines("r.jsonl", *entries))
    assert [section["data-name"] for section in page.all("section")] == ["a <dog>", "the sea"]
    assert sum("row" in found.get("class", "").split() for found in page.all("div")) == 2
    assert page.all("img")[0]["alt"] == "a.png, result 1 for a <dog>"
    assert "score 0.500" in page.text


def test_answers_and_classes_have_bars_and_failures_are_said(photos):
    odds = {"cat": 0.25, "dog": 0.75}
    entries = [
        {"path": photos[0], "question": "what?", "answer": "dog", "score": -1, "choices": odds},
        {"path": photos[2], "label": "sea", "probability": 0.9, "rank": 1},
        {"path": photos[2], "label": "sky", "probability": 0.1, "rank": 2},
        {"path": "gone.png", "error": "gone.png: no such file"},
    ]
    page = made("-", stdin="".join(json.dumps(entry) + "\n" for entry in entries))
    assert [found["value"] for found in page.all("meter")] == [
        "0.7500",
        "0.2500",
        "0.9000",
        "0.1000",
    ]
    assert len(page.all("article")) == 3
    assert "no such file" in page.text
    assert "3 files, 1 failed" in page.text


def test_references_and_metrics_worst_first(photos):
    known = [{"image": p, "captions": [t, "words"]} for p, t in zip(photos, "abc", strict=True)]
    known = [entry | {"captions": [f"a red {entry['captions'][0]} runs"]} for entry in known]
    data = lines("data.jsonl", *known)
    page = made(captions(photos, "r.jsonl", "a red a runs", "no", "a red c"), "--data", data)
    assert "a red a runs" in page.text
    ways = {found["value"]: "selected" in found for found in page.all("option")}
    assert ways["+CIDEr"]
    assert not ways["-CIDEr"]
    assert "+ROUGE-L" in ways
    numbers = [json.loads(found["data-sort"])["CIDEr"] for found in page.all("article")]
    assert numbers[0] > numbers[2] > numbers[1] == 0
    asked = {"image": "a.png", "question": "what?", "answers": ["dog"] * 8 + ["cat"] * 2}
    answered = {"path": "a.png", "question": "what?", "answer": "cat", "score": -1}
    page = made(lines("a.jsonl", answered), "--data", lines("q.jsonl", asked))
    assert json.loads(page.all("article")[0]["data-sort"])["accuracy"] == pytest.approx(0.6)
    done = shell.run("page", "a.jsonl", "--data", "data.jsonl")
    assert done.returncode != 0


def test_two_runs_stand_side_by_side(photos):
    a = captions(photos, "a.jsonl", "one", "two", "three")
    b = captions(photos, "b.jsonl", "one", "zwei", "three")
    page = made("--compare", a, b)
    assert len(page.all("article")) == 3
    assert [text for text in page.text if text in ("two", "zwei", "one")] == ["two", "zwei"] + [
        "one"
    ] * 2
    assert "score, B less A" in json.loads(page.all("article")[0]["data-sort"])
    done = shell.run("page", "--compare", a)
    assert done.returncode == 2
    assert "two results" in done.stderr


def test_words_have_heat_maps(photos):
    words = [{"word": "a", "map": [[0, 1], [0, 0]]}, {"word": "<dog>", "note": "slot 6: 40 %"}]
    entry = {"path": photos[0], "caption": "a <dog>", "box": [0.1, 0, 0.9, 1], "words": words}
    page = made(lines("r.jsonl", entry))
    spans = [found for found in page.all("span") if found.get("class") == "word"]
    assert spans[0]["data-map"].startswith("data:image/webp")
    assert spans[1]["data-note"] == "slot 6: 40 %"
    (map,) = [found for found in page.all("img") if found.get("class") == "map"]
    assert "left:10.00%" in map["style"]
    assert "width:80.00%" in map["style"]


def test_videos_have_frames_and_sounds_a_player(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "clip.mp4", even(12))
    with wave.open("tone.wav", "wb") as out:
        out.setparams((1, 2, 16000, 0, "NONE", ""))
        out.writeframes((np.sin(np.arange(16000) / 9) * 9000).astype(np.int16).tobytes())
    entries = [{"path": name, "caption": "c", "score": 0} for name in ("clip.mp4", "tone.wav")]
    page = made(lines("r.jsonl", *entries))
    assert len(page.all("img")) == 4
    assert page.all("audio")[0]["src"].startswith("data:audio/mpeg;base64,")


def test_anything_else_is_a_table(photos):
    report = {"task": "caption", "model": "m", "metrics": {"CIDEr": 0.5}, "items": 3}
    page = made(lines("r.jsonl", report))
    assert "metrics CIDEr" in page.text
    assert "0.5" in page.text


@pytest.mark.parametrize(
    ("content", "said"), [("", "no lines"), ("[1]\n", "line 1: no JSON object"), ("x\n", "--json")]
)
def test_mistakes_cost_one_sentence(content, said, tmp_path):
    (tmp_path / "r.jsonl").write_text(content)
    done = shell.run("page", tmp_path / "r.jsonl")
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr


DRIVER = """
const found = {}, $ = (id) => document.getElementById(id);
const key = (key) => document.activeElement.dispatchEvent(
  new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
const names = () => [...document.querySelectorAll("article:not([hidden])")].map((one) => one.title);
found.title = document.title;
found.first = names();
key("/");
found.focus = document.activeElement.id;
$("filter").value = "DOG";
$("filter").dispatchEvent(new Event("input"));
found.filtered = names();
found.count = $("count").value;
key("ArrowDown");
found.reached = document.activeElement.closest("article").title;
key("Escape");
found.all = names().length;
key("ArrowRight");
found.next = document.activeElement.closest("article").title;
$("sort").value = "-score";
$("sort").dispatchEvent(new Event("change"));
found.sorted = names();
// A window in the background, as here on a busy machine, does not tell of its focus.
document.querySelector(".word").dispatchEvent(new FocusEvent("focusin", { bubbles: true }));
found.map = !document.querySelector(".map").hidden;
found.loaded = [...document.images].every((one) => one.complete || one.className === "map");
document.body.dataset.found = JSON.stringify(found);
"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium here (apt-get install chromium)")
def test_in_a_browser(photos, tmp_path):
    """Its own policy allows the script and refuses anything else; this test's script is added."""
    captions(photos)
    words = [{"word": "dog", "map": [[0, 1], [0, 0]]}]
    entry = {"path": photos[0], "caption": "dog", "score": 9, "box": [0, 0, 1, 1], "words": words}
    lines("w.jsonl", entry)
    done = shell.run("page", "r.jsonl", "w.jsonl", "-o", "p.html", "--quiet")
    assert done.returncode == 0, done.stderr
    digest = base64.b64encode(hashlib.sha256(DRIVER.encode()).digest()).decode()
    source = Path("p.html").read_text().replace("script-src ", f"script-src 'sha256-{digest}' ")
    Path("p.html").write_text(source.replace("</body>", f"<script>{DRIVER}</script></body>"))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1000,700", "--dump-dom"]
    done = subprocess.run(
        [*command, (tmp_path / "p.html").as_uri()], capture_output=True, text=True, timeout=180
    )
    assert "CONSOLE" not in done.stderr
    (body,) = Page(done.stdout).all("body")
    found = json.loads(body["data-found"])
    first = [*photos, photos[0]]
    assert found["title"] == "tinyvl: r.jsonl"
    assert found["first"] == first
    assert (found["focus"], found["filtered"]) == ("filter", ["a.png", "a.png"])
    assert found["count"] == "· 2 of 4"
    assert (found["reached"], found["all"], found["next"]) == ("a.png", 4, EVIL)
    assert found["sorted"] == [photos[0], photos[2], photos[1], photos[0]]
    assert found["map"]
