"""`tests/gpu/run.sh`, rehearsed on a CPU: it is to run at once where there is a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent


@pytest.mark.slow
def test_the_figures_can_be_rehearsed():
    path = os.pathsep.join([str(ROOT), str(ROOT.parent)])
    done = subprocess.run(
        [sys.executable, ROOT / "gpu" / "figures.py", "--rehearse"], check=True,
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path, "TINYVL_BF16": "0"},
    )  # fmt: skip
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    units = {unit for row in rows for unit in row if unit.endswith("_per_second")}
    assert units == {
        "captions_per_second", "pictures_per_second", "answers_per_second", "steps_per_second",
    }  # fmt: skip
    assert {row.get("preset") for row in rows} >= {"itune-base", "itune-large", "epalm-pt-l"}
