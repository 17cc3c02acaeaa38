"""What all tests share: one thread per process, and who runs beside whom when `make test` uses two workers."""

import gc
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing import forkserver
from typing import Any

import pytest

# Before anything imports torch; children inherit it. Threads that spin for a core held by another process cost a
# factor of three.
os.environ["OMP_NUM_THREADS"] = "1"

# Hypothesis fails an example that takes 0.2 s of wall time: on busy cores that says nothing about the code. The
# machine of `make gpu-check`, which has torch and pytest only, lacks it and the tests that use it.
if importlib.util.find_spec("hypothesis"):
    from hypothesis import settings

    settings.register_profile("no deadline", deadline=None)
    settings.load_profile("no deadline")

# `make test` uses two workers. Each takes one unit after the other: the files that share the cluster of runtime, a
# room, or a file of the integration, which starts a world of its own. Long units go first, so that both end at about
# the same time; a room that is not named here is short. The tests on the cluster have times to keep: while one worker
# runs them, the other one runs rooms whose tests compute in one process.
CLUSTER = tuple(f"tests/runtime/test_{name}.py" for name in ("cluster", "doctor", "padding"))
BY_FILE = "tests/integration/"
ORDER = (
    CLUSTER[0], "tests/kernels", "tests/data", "tests/levels", f"{BY_FILE}test_spine.py", "tests/checkpoint",
    "tests/runtime", f"{BY_FILE}test_demo.py", "tests/model", "tests/local",
)  # fmt: skip


def unit(nodeid: str) -> str:
    """The unit that a test belongs to; one worker runs all of it."""
    path = nodeid.split("::")[0]
    if path in CLUSTER:
        return CLUSTER[0]
    return path if path.startswith(BY_FILE) else path.rsplit("/", 1)[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        own = unit(item.nodeid)
        return ORDER.index(own) if own in ORDER else len(ORDER) + own.startswith(BY_FILE)

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class ByUnit(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return unit(nodeid)

    return ByUnit(config, log)


def pytest_collection_finish() -> None:
    """Where ranks will be forked: start what forks them now, outside the environment of any test's cluster."""
    if "benchmarks._forked" in sys.modules:
        forkserver.ensure_running()
    # Modules and collected tests last as long as the session: no garbage collection has to look at them again. A test
    # that makes many tensors is a tenth faster.
    gc.collect()
    gc.freeze()


# On two quiet cores; what takes longer measures how busy the machine is.
QUIET_IMPORT_S = 3.0


@pytest.fixture(scope="session")
def slowness() -> float:
    """How many times longer a program takes to start here and now than on a quiet machine; 1 at least."""
    started_s = time.monotonic()
    subprocess.run([sys.executable, "-c", "import torch, ray"], check=True)
    return max(1.0, (time.monotonic() - started_s) / QUIET_IMPORT_S)


@pytest.fixture(scope="session")
def s3() -> Iterator[Any]:
    """One embedded S3 server for all tests of this worker that need no other."""
    from nltrain.local.embedded_s3 import EmbeddedS3  # absent where only torch and pytest are

    with EmbeddedS3() as server:
        yield server


@pytest.fixture
def bucket(s3: Any, request: pytest.FixtureRequest) -> Iterator[str]:
    """URL of an empty bucket; the environment points at the server."""
    name = f"test-{abs(hash(request.node.nodeid)) % 10**12}"
    with s3.in_environment():
        s3.create_bucket(name)
        yield f"s3://{name}"
