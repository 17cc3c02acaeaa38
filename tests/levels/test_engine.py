"""Norms do not depend on how parameters are sharded, and a discarded window leaves nothing behind."""

import torch

from benchmarks._level_toys import SEQ_LEN, Toy, gathered, levels, train
from benchmarks._ranks import Ranks
from nltrain.levels.engine import sum_of_squares
from nltrain.levels.scheduler import LevelScheduler


def discarded(ranks: Ranks) -> dict:
    """Two quanta, the windows of all slow levels discarded after the first, against the second quantum alone."""
    quantum, found = 2 * ranks.world_size * SEQ_LEN, []
    still = {"base": {"lr": 0.0}}  # so that the second quantum starts from the same weights
    for first in (0, 1):
        settings = {"optimizer": "sgd", "lr": 0.3, "phase_tokens": 0}
        model = Toy()
        scheduler = LevelScheduler(model, levels(quantum, (1, 2, 2, 2), (1, 2, 3, 1), settings, still), SEQ_LEN)
        if first:
            scheduler.tokens = quantum
        else:
            train(model, scheduler, ranks.rank, ranks.world_size, range(1), 2)
            for name in ("fast", "mid", "slow"):
                scheduler.discard_window(name)
        ticks = train(model, scheduler, ranks.rank, ranks.world_size, range(1, 2), 2)
        assert [tick.name for tick in ticks] == ["base", "fast", "mid", "slow"]
        found.append(gathered(scheduler))
        scheduler.close()
    return {"equal": all(torch.equal(found[0][name], found[1][name]) for name in found[0])}


CASES = {2: {"discarded": discarded}}


def test_a_discarded_window_leaves_nothing_in_the_next_one(case):
    assert case(2, "discarded")["equal"]


def test_a_sum_of_squares_is_exact_to_1e_7_however_long_the_tensor():
    values = torch.rand(2_000_003, generator=torch.Generator().manual_seed(0))
    exact = values.double().square().sum()
    assert abs(sum_of_squares(values) / exact - 1).item() <= 1e-7
    parts = sum(sum_of_squares(part) for part in values.split(70_001))
    assert abs(parts / exact - 1).item() <= 1e-7
