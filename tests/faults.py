"""`python tests/faults.py [PYTEST OPTIONS]`: tries every fault, and prints the table of them.

A row a test: the kind of fault (the issue's thirteen), what was tried, and whether it held. Slow
ones included, six minutes of a core; `-m "not slow"` leaves them out. Status 1: a
fault was not held.
"""

import re
import sys
from collections import Counter
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# What of each kind is tried by which tests: a file, and a pattern of the tests' names.
KINDS = {
    "1 text as people have it": [("test_text_files.py", ".")],
    "2 captions without words": [("test_text.py", "words|special|spelt")],
    "3 two things, one name": [("test_names.py", ".")],
    "4 nothing uncounted": [
        ("test_train_batches.py", "counted|nothing_is_said"),
        ("test_data_folders.py", "webdataset"),
        ("test_lilt.py", "a_query_is_as_long"),
    ],
    "5 video and sound": [("test_media_av.py", "."), ("test_media_sound.py", ".")],
    "6 pictures": [("test_media.py", "."), ("test_encoders.py", "thin|30_000")],
    "7 numbers gone wrong": [
        ("test_train.py", "finite|skipped|overflow|bad_steps"),
        ("test_features.py", "finite"),
        ("test_train_features.py", "finite"),
        ("test_device.py", "."),
    ],
    "8 kills, signals, locks": [
        ("test_kills.py", "."),
        ("test_faults.py", "lock|writer|saves_first|other_commands"),
        ("test_train.py", "killed|resumed"),
        ("test_index.py", "killed|one_writer"),
        ("test_cli_features.py", "killed"),
        ("test_cli_eval.py", "killed"),
        ("test_media_workers.py", "killed|whole_program"),
    ],
    "9 disks and folders": [("test_faults.py", "disk|cannot_be_written|vanishes")],
    "10 strangers": [
        ("test_strangers.py", "."),
        ("test_hub.py", "damaged|pickle"),
        ("test_hub_wheels.py", "hash"),
        ("test_models.py", "refused|damaged|pickle|fit"),
    ],
    "11 pipes": [
        ("test_faults.py", "endless|hundred_thousand|terminal|closes_early"),
        ("test_write.py", "pipe|stream"),
        ("test_cli_search.py", "closed_pipe"),
    ],
    "12 fuzz, hostile files": [("test_fuzz.py", ".")],
}
NOT_HANDLED = [
    "a file of captions (-o) that is removed while it is written: the system writes on to it",
    "a picture whose decoding never ends: a worker has no time limit",
    "a backbone's folder whose source.json claims another's hash: what you name is trusted",
    "downloads of the model hub where its cache has no links (Windows): only their size is checked",
    "two processes on file systems that have no locks (some network mounts)",
    "Windows and macOS as a whole: tried by reading and by stand-ins, on Linux alone by running",
]


class Table:
    """A pytest plugin: keeps the tests of `KINDS` and counts how they end."""

    def __init__(self) -> None:
        self.kinds: dict[str, str] = {}
        self.ended: dict[str, str] = {}

    def kind(self, file: str, name: str) -> str | None:
        for kind, parts in KINDS.items():
            if any(file == part and re.search(pattern, name) for part, pattern in parts):
                return kind
        return None

    def pytest_collection_modifyitems(self, items: list) -> None:
        for item in items:
            if kind := self.kind(item.path.name, item.name):
                self.kinds[item.nodeid] = kind
        items[:] = [item for item in items if item.nodeid in self.kinds]

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.ended[report.nodeid] = report.outcome

    def show(self) -> int:
        tests: dict[tuple[str, str], Counter] = {}
        for test, outcome in self.ended.items():
            name = test.split("::")[1].partition("[")[0].removeprefix("test_").replace("_", " ")
            tests.setdefault((self.kinds[test], name), Counter())[outcome] += 1
        order = {kind: i for i, kind in enumerate(KINDS)}
        for (kind, name), counts in sorted(tests.items(), key=lambda row: order[row[0][0]]):
            result = ", ".join(f"{outcome} {n}" for outcome, n in counts.items())
            print(f"{kind:<26}{name[:72]:<74}{result}")
        total = Counter(self.ended.values())
        tried = f"{sum(total.values())} faults tried in {len(tests)} tests"
        print(f"\n{tried}: " + ", ".join(f"{n} {outcome}" for outcome, n in total.items()))
        print("\nnot handled:")
        for fault in NOT_HANDLED:
            print(f"- {fault}")
        return int(total["failed"] > 0)


if __name__ == "__main__":
    table = Table()
    files = sorted({str(HERE / file) for parts in KINDS.values() for file, _ in parts})
    slow = [] if "-m" in sys.argv else ["-m", "slow or not slow"]
    pytest.main(["-q", "--no-header", *slow, *sys.argv[1:], *files], plugins=[table])
    sys.exit(table.show())
