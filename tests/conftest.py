"""What all tests share: one thread per process, and who runs beside whom when `make test` uses two workers."""

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

# One worker begins with the runtime, on clusters that mostly wait for processes to start: its tests have times to keep.
# Beside it the other computes on one core. Whoever is done first takes the next folder, and at the end the next file of
# the integration, each of which brings up a world of its own.
ORDER = (
    "tests/runtime/", "tests/kernels/", "tests/model/", "tests/store/", "tests/data/", "tests/checkpoint/",
    "tests/levels/", "tests/local/",
)  # fmt: skip
BY_FILE = "tests/integration/"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        last = len(ORDER) + item.nodeid.startswith(BY_FILE)
        return next((i for i, path in enumerate(ORDER) if item.nodeid.startswith(path)), last)

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class ByRoom(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.split("::")[0]
            return path if path.startswith(BY_FILE) else path.rsplit("/", 1)[0]

    return ByRoom(config, log)


def pytest_collection_finish() -> None:
    """Where ranks will be forked: start what forks them now, outside the environment of any test's cluster."""
    if "benchmarks._forked" in sys.modules:
        forkserver.ensure_running()


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
