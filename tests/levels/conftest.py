"""Results of all cases of the collected modules, one spawn of processes per world size."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks._ranks import Case, CaseFailed, run_cases

WRITERS = 2  # the world size whose cases save what others load: it always runs first


@pytest.fixture(scope="session")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], Any]:
    """case(world_size, name) -> the result of that case, which some collected module lists in its CASES."""
    folder: Path = tmp_path_factory.mktemp("levels")
    finished: dict[int, dict[str, Any]] = {}
    cases: dict[int, dict[str, Case]] = {}
    for module in {item.module for item in request.session.items if hasattr(item, "module")}:
        for world_size, named in getattr(module, "CASES", {}).items():
            cases.setdefault(world_size, {}).update(named)

    def result(world_size: int, name: str) -> Any:
        for needed in dict.fromkeys((WRITERS, world_size)):
            if needed in cases and needed not in finished:
                finished[needed] = run_cases(needed, cases[needed], folder)
        found = finished[world_size][name]
        if isinstance(found, CaseFailed):
            raise found
        return found

    return result
