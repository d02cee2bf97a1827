"""A checkpoint goes to a pretended model hub and comes back; what its card says."""

import base64
import hashlib
import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import shell
import tiny
import torch
import yaml
from offline import probe

from tinyvl import hub, hub_push, models, models_card

pytestmark = pytest.mark.usefixtures("alone")
TOKEN = "a-token"
TEXTS = ["a red square", "a blue circle at the left"]


class FakeHub(http.server.BaseHTTPRequestHandler):
    """Of the hub's HTTP API what uploads and downloads of a model call."""

    repositories: dict[str, dict[str, bytes]]
    stored: dict[str, bytes]
    created: list[dict]
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, value=None, status: int = 200, body: bytes | None = None, **headers: str):
        body = json.dumps(value).encode() if body is None else body
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def revision(self, repository: str) -> str:
        content = self.repositories[repository]
        return hashlib.sha1(b"".join(content[name] for name in sorted(content))).hexdigest()

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts == [""]:
            return self.reply({})
        api = parts[:2] == ["api", "models"]
        name = "/".join(parts[2:4] if api else parts[:2])
        content = self.repositories.get(name)
        if content is None:
            return self.reply({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        if api and parts[4] == "revision":
            siblings = [{"rfilename": file} for file in content]
            return self.reply({"id": name, "sha": self.revision(name), "siblings": siblings})
        if api and parts[4] == "tree":
            entries = []
            for file, data in content.items():
                oid = hashlib.sha256(data).hexdigest()
                entry = {"type": "file", "path": file, "size": len(data), "oid": oid[:40]}
                if file.endswith(".safetensors"):
                    entry["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 100}
                entries.append(entry)
            return self.reply(entries)
        data = content[parts[4]]  # owner/name/resolve/revision/file
        etag = hashlib.sha256(data).hexdigest()
        etag = etag if parts[4].endswith(".safetensors") else etag[:40]
        self.reply(body=data, ETag=f'"{etag}"', X_Repo_Commit=self.revision(name))

    def do_PUT(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.stored[self.path.rpartition("/")[2]] = data
        self.reply({})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.partition("?")[0]
        if path == "/api/validate-yaml":
            return self.reply({"errors": [], "warnings": []})
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self.reply({"error": "Forbidden"}, 403)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.created.append(asked)
            there = name in self.repositories
            self.repositories.setdefault(name, {})
            return self.reply({"url": f"{self.base}/{name}"}, 409 if there else 200)
        if path.endswith("/preupload/main"):
            modes = [
                {"path": f["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                for f in json.loads(body)["files"]
            ]  # fmt: skip
            return self.reply({"files": modes})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                one | {"actions": {"upload": {"href": f"{self.base}/lfs/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return self.reply({"objects": objects, "transfer": "basic"})
        assert path.endswith("/commit/main")
        name = "/".join(path.split("/")[3:5])
        content = self.repositories[name]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                content[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content[value["path"]] = self.stored[value["oid"]]
        oid = self.revision(name)
        self.reply(
            {"success": True, "commitOid": oid, "commitUrl": f"{self.base}/{name}/commit/{oid}"}
        )

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def fake_hub(monkeypatch, tmp_path) -> Iterator[type[FakeHub]]:
    import huggingface_hub.constants as constants

    kind = type("Hub", (FakeHub,), {"repositories": {}, "stored": {}, "created": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("HF_ENDPOINT", base)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        template = f"{base}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        for name, value in (
            ("ENDPOINT", base), ("HUGGINGFACE_CO_URL_TEMPLATE", template),
            ("HF_HUB_DISABLE_XET", True), ("HF_TOKEN_PATH", str(tmp_path / "no-token")),
        ):  # fmt: skip
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(hub, "_hub_answers", probe)
        hub.hub_reachable.cache_clear()
        yield kind
        server.shutdown()


@pytest.fixture(scope="module")
def captioner(tmp_path_factory) -> Path:
    """A run's folder: an untrained I-Tuning model, and the settings that a run keeps."""
    root = tmp_path_factory.mktemp("push")
    folder = tiny.write_captioner(root / "run", TEXTS)
    config = models.read_config(folder)
    training = {
        "data": str(root / "captions.jsonl"), "images": str(root / "photos"), "lang": "en",
        "language": config["decoder"]["name"], "recipe": {"epochs": 3, "batch": 8},
        "asked": {"data": str(root / "captions.jsonl"), "rate": 1e-3},
        "command": "tinyvl train itune --data captions.jsonl --epochs 3",
    }  # fmt: skip
    models.save_config(folder, config | {"training": training})
    return folder


def test_a_pushed_model_comes_back(captioner, fake_hub, tmp_path, monkeypatch):
    monkeypatch.chdir(captioner)  # where folders of the backbones' names lie
    weights = (captioner / "model.safetensors").read_bytes()
    scores = tmp_path / "scores"
    scores.mkdir()
    report = {"task": "caption", "data": "/far/val.json", "split": "val",
              "checkpoint": {"sha256": hashlib.sha256(weights).hexdigest()},
              "metrics": {"CIDEr": 0.5, "BLEU-4": 0.25, "SPICE": None}}  # fmt: skip
    (scores / "report.json").write_text(json.dumps(report))
    (captioner / "private.txt").write_text("stays here")
    done = shell.run("push", captioner, "me/tiny", "--private", "--scores", scores)
    assert (done.returncode, done.stdout) == (0, "hf://me/tiny\n"), done.stderr
    assert "decoder is a folder of this machine" in done.stderr
    assert fake_hub.created[0]["visibility"] == "private"
    content = fake_hub.repositories["me/tiny"]
    assert {*content} == {"config.json", "model.safetensors", "README.md"}
    assert content["model.safetensors"] == weights
    for name in ("config.json", "README.md"):
        assert str(captioner.parent) not in content[name].decode()
    config = json.loads(content["config.json"])
    assert (config["decoder"]["name"], config["vision"]["name"]) == ("lm", "vision")
    assert config["training"]["asked"] == {"data": "captions.jsonl", "rate": 1e-3}
    text = content["README.md"].decode()
    assert "```\ntinyvl train itune --data captions.jsonl --epochs 3\n```" in text
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["library_name"] == "tinyvl"
    assert head["pipeline_tag"] == "image-to-text"
    assert head["datasets"] == ["captions.jsonl"]
    assert head["license"] == "other"
    assert "base_model" not in head
    result = head["model-index"][0]["results"][0]
    assert result["dataset"] == {"type": "val.json", "name": "val.json", "split": "val"}
    assert {m["name"]: m["value"] for m in result["metrics"]} == {"CIDEr": 0.5, "BLEU-4": 0.25}

    place = {"device": torch.device("cpu"), "precision": torch.float32}
    here, back = models.load(str(captioner), **place), models.load("hf://me/tiny", **place)
    fetched = models.checkpoint_folder("hf://me/tiny")
    assert (fetched / "model.safetensors").read_bytes() == weights
    torch.manual_seed(0)
    pictures = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    assert here.caption(pictures, beams=2) == back.caption(pictures, beams=2)
    assert models.fingerprint(fetched, config) == models.fingerprint(
        captioner, models.read_config(captioner)
    )


def refused(*args: object) -> tuple[int, str]:
    done = shell.run("push", *args)
    assert not done.stdout
    assert done.stderr.count("\n") == 1, done.stderr
    return done.returncode, done.stderr


def test_what_cannot_be_pushed_is_one_sentence(captioner, fake_hub, tmp_path, monkeypatch):
    for bad in ("tiny", "me/tiny/er", "me/a b", "me/"):
        status, said = refused(captioner, bad)
        assert status == 2
        assert "owner/name" in said
    status, said = refused(tmp_path / "nothing", "me/tiny")
    assert status == 2
    assert "no tinyvl checkpoint" in said
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(captioner / name, broken)
    config = json.loads((broken / "config.json").read_text())
    config["options"] |= {"bottleneck": 7}
    (broken / "config.json").write_text(json.dumps(config))
    status, said = refused(broken, "me/tiny")
    assert "do not fit" in said
    monkeypatch.setenv("HF_TOKEN", "another")
    done = shell.run("push", captioner, "me/tiny")
    assert done.returncode == 1
    assert "this token may not write there" in done.stderr
    monkeypatch.delenv("HF_TOKEN")
    status, said = refused(captioner, "me/tiny")
    assert status == 1
    assert "HF_TOKEN" in said
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(hub, "_hub_answers", lambda session: False)
    hub.hub_reachable.cache_clear()
    status, said = refused(captioner, "me/tiny")
    assert status == 1
    assert "cannot be reached" in said
    assert not fake_hub.repositories


def test_a_card_that_a_person_wrote_stays(captioner, tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "README.md").write_text("# Mine\n")
    found = models.Checkpoint(folder, models.read_config(captioner), "own")
    assert hub_push.card(found, "me/tiny", []) == "# Mine\n"


def part(name: str, **config: str) -> dict:
    return {"name": name, "sha256": "0" * 64, "config": config, "fit": "crop"}


def card(**parts: dict) -> tuple[dict, str]:
    config = {"method": "epalm", **parts}
    text = models_card.card(config, parts, "video", "vqa", summary={}, command="tinyvl train epalm")
    return yaml.safe_load(text.split("---\n")[1]), text


def test_licences_are_told_apart():
    name = "facebook/timesformer-base-finetuned-k600"
    for vision in (part(name, model_type="timesformer"), part("/x/y", model_type="timesformer")):
        head, text = card(decoder=part("gpt2"), vision=vision)
        assert head["license"] == "cc-by-nc-4.0"
        assert "decoder: gpt2 (licence: MIT;" in text
        assert "The weights of TimeSformer (CC BY-NC 4.0) are for non-commercial use only" in text
        assert "/x" not in text
    head, text = card(decoder=part("gpt2"), vision=part("deit_base_patch16_224"))
    assert head["license"] == "apache-2.0"
    assert head["base_model"] == ["openai-community/gpt2", "timm/deit_base_patch16_224.fb_in1k"]
    assert head["pipeline_tag"] == "video-text-to-text"
    assert "non-commercial" not in text
    head, text = card(decoder=part("facebook/opt-125m"), vision=part("some/model"))
    assert head["license"] == "other"
    assert head["license_name"] == "opt-175b-licence-non-commercial"
    assert "The weights of facebook/opt-125m (OPT-175B licence) are for non-commercial" in text
    assert "some/model (licence: see its own card;" in text


def test_paths_become_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/a").mkdir(parents=True)
    told = ["--data=/far/x.jsonl", "~/y", "runs/a", "facebook/opt-125m", "a / b", "C:\\z\\q.json"]
    assert models_card.nameless({"x": told, "n": 1}) == {
        "x": ["--data=x.jsonl", "y", "a", "facebook/opt-125m", "a / b", "q.json"], "n": 1,
    }  # fmt: skip
