"""The same global data on 1, 2, 3 and 4 ranks, cut differently: same ticks, same windows, same trajectory."""

from functools import partial

import pytest
import torch

from nltrain.levels.scheduler import LevelScheduler
from tests.levels.ranks import Ranks
from tests.levels.toys import SEQ_LEN, Toy, gathered, levels, relative_error, train

SEQUENCES = 13  # per quantum: no world size divides it, 4 ranks leave one without a sequence in the short micro-step
QUANTA = 24
STAGES = (3, 2, 1, 1)
# (world size, micro-batch): accumulation follows; 13 sequences in micro-steps of 13, 2, 10, 2, 6, 9, 4, 8.
CUTS = [(1, 13), (1, 2), (2, 5), (2, 1), (3, 2), (3, 3), (4, 1), (4, 2)]


def trajectory(micro_batch: int, ranks: Ranks) -> dict:
    config = levels(
        SEQUENCES * SEQ_LEN,
        periods=(1, 2, 4, 8),
        stages=STAGES,
        shared={"optimizer": "sgd", "lr": 0.3, "clip_norm": 0.5},
        bucket_elements=2000,
    )
    model = Toy(seed=ranks.rank)  # ranks start from rank 0's weights
    scheduler = LevelScheduler(model, config, SEQ_LEN)
    ticks = train(model, scheduler, ranks.rank, ranks.world_size, range(QUANTA), micro_batch)
    weights = gathered(scheduler)
    scheduler.close()
    return {
        "ticks": [(tick.name, tick.tokens, tick.window_tokens, tick.skipped) for tick in ticks],
        "norms": [tick.grad_norm for tick in ticks],
        "weights": weights,
    }


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
