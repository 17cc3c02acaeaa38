"""One cluster of three raylets for the tests of this room."""

import time

import pytest

from nltrain.local.drill import Drill
from nltrain.local.processes import owned


@pytest.fixture(scope="package")
def drill(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drill") / "cluster"
    with Drill(folder, num_nodes=3) as drill:
        yield drill
        owner_id = drill.owner.id
    deadline = time.monotonic() + 10 * drill.slowness
    while (left := owned(owner_id)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left, f"left behind: {left}"
    assert not drill.owner.short.exists()
