"""Which tests stay together when `make test` spreads them over two workers (pytest-xdist), and which begin.

Tests that share something costly (a cluster, the spawned ranks of all level cases) run on one worker; the longest
stories come first, so that neither worker idles at the end.
"""

import pytest

LONGEST_FIRST = {
    "tests/runtime/test_cluster.py": "drill",
    "tests/runtime/test_leaving.py": "drill",
    "tests/levels/": "levels",
    "tests/integration/test_spine.py": "spine",
}


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in this same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = list(LONGEST_FIRST)

    def place(item: pytest.Item) -> int:
        return next((rank for rank, path in enumerate(ranks) if item.nodeid.startswith(path)), len(ranks))

    items.sort(key=place)
    for item in items:
        rank = place(item)
        name = LONGEST_FIRST[ranks[rank]] if rank < len(ranks) else item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group(name))
