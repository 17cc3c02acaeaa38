"""One thread per process: threads that spin for a core held by another process cost a factor of three."""

import os
import sys
from multiprocessing import forkserver

# Before anything imports torch; children inherit it.
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_finish() -> None:
    """Where ranks will be forked: start what forks them now, outside the environment of any test's cluster."""
    if "tests.forked" in sys.modules:
        forkserver.ensure_running()
