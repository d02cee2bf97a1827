"""Settings of the tests as a whole."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # beside other workers: torch's threads would fight
    os.environ.setdefault("OMP_NUM_THREADS", "1")
