"""One cluster of three raylets for the tests of this room."""

import pytest

from nltrain.local.drill import Drill
from nltrain.local.processes import wait_gone


@pytest.fixture(scope="package")
def drill(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drill") / "cluster"
    with Drill(folder, num_nodes=3) as drill:
        yield drill
        owner_id = drill.owner.id
    left = wait_gone(owner_id, 10 * drill.slowness)
    assert not left, f"left behind: {left}"
    assert not drill.owner.short.exists()
