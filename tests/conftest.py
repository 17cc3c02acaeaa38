"""Which tests stay together when `make test` spreads them over two workers (pytest-xdist), and which begin.

Tests that share something costly (a cluster, the spawned ranks of all level cases) run on one worker; the longest
come first, so that neither worker idles at the end.
"""

import os
from typing import Any

import pytest

# One thread each, before anything imports torch: threads that spin for a core held by another process cost a factor
# of three. Children inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

TOGETHER = {
    "tests/runtime/test_cluster.py": "drill",
    "tests/runtime/test_leaving.py": "drill",
    "tests/levels/": "levels",
    "tests/integration/test_spine.py": "spine",
}


def group_of(nodeid: str) -> str:
    """The tests of one group run on one worker: those named above, otherwise those of a file."""
    return next((group for path, group in TOGETHER.items() if nodeid.startswith(path)), nodeid.partition("::")[0])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = list(dict.fromkeys(TOGETHER.values()))
    ranks = {group: rank for rank, group in enumerate(order)}
    items.sort(key=lambda item: ranks.get(group_of(item.nodeid), len(order)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return ByGroup(config, log)
