"""Which tests stay together when `make test` spreads them over two workers (pytest-xdist), and in which order.

Tests that share something costly (a cluster, the spawned ranks of all level cases) run on one worker. What starts
clusters begins, what spawns ranks ends: beside each other, more processes than cores would wait for one another.
"""

import os
from typing import Any

import pytest

# One thread each, before anything imports torch: threads that spin for a core held by another process cost a factor
# of three. Children inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

TOGETHER = {
    "tests/runtime/test_cluster.py": "clusters",
    "tests/runtime/test_leaving.py": "clusters",
    "tests/integration/test_spine.py": "clusters",
    "tests/integration/test_interrupts.py": "clusters",
    "tests/levels/": "ranks",
    "tests/checkpoint/test_checkpoint_levels.py": "ranks",
    "tests/checkpoint/test_checkpoint_ranks.py": "ranks",
}
FIRST, LAST = "clusters", "ranks"


def group_of(nodeid: str) -> str:
    """The tests of one group run on one worker: those named above, otherwise those of a file."""
    return next((group for path, group in TOGETHER.items() if nodeid.startswith(path)), nodeid.partition("::")[0])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> tuple[bool, bool]:
        group = group_of(item.nodeid)
        return group != FIRST, group == LAST

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return ByGroup(config, log)
