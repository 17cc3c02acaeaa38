"""The same global data on 1, 2, 3 and 4 ranks, cut differently: same ticks, same windows, same trajectory."""

from functools import partial

import pytest
import torch

from benchmarks._level_cases import CUTS, trajectory
from benchmarks._level_toys import relative_error


def _name(micro_batch: int) -> str:
    return f"trajectory-{micro_batch}"


CASES: dict = {}
for _world_size, _micro_batch in CUTS:
    CASES.setdefault(_world_size, {})[_name(_micro_batch)] = partial(trajectory, _micro_batch)


@pytest.mark.parametrize(("world_size", "micro_batch"), CUTS[1:])
def test_the_trajectory_does_not_depend_on_ranks_or_cuts(case, world_size, micro_batch):
    expected, got = case(1, _name(13)), case(world_size, _name(micro_batch))
    assert got["ticks"] == expected["ticks"]
    assert torch.allclose(torch.tensor(got["norms"]), torch.tensor(expected["norms"]), rtol=1e-4)
    worst = max(relative_error(got["weights"][name], value) for name, value in expected["weights"].items())
    assert worst <= 1e-5
