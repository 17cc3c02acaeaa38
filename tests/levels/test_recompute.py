"""A block that is computed again in the backward pass, under real engines: the same weights, to the bit.

At ZeRO-3 the block gathers and releases its weights once more inside the backward pass.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks._level_cases import STAGES
from benchmarks._level_toys import SEQ_LEN, gathered, levels, train
from benchmarks._ranks import Ranks
from nltrain.levels.scheduler import LevelScheduler
from nltrain.model import build, preset

QUANTA, SEQUENCES = 3, 4


def trained(stages: str, recompute: str, ranks: Ranks) -> dict[str, Tensor]:
    """The weights after QUANTA quanta of the tiny Hope."""
    config = levels(SEQUENCES * SEQ_LEN, (1, 1, 2, 2), STAGES[stages], {"optimizer": "sgd", "lr": 0.3})
    hope = preset("hope", "tiny")
    torch.manual_seed(0)
    model = build(replace(hope, rule=replace(hope.rule, chunk_mem=4, chunk_other=4), recompute=recompute))
    scheduler = LevelScheduler(model, config, SEQ_LEN)
    train(model, scheduler, ranks.rank, ranks.world_size, range(QUANTA), 1)
    weights = gathered(scheduler)
    scheduler.close()
    return weights


WHERE = [(1, "zero1"), (1, "zero3"), (2, "mix3211"), (2, "zero3")]
CASES = {
    world: {f"recompute-{s}-{r}": partial(trained, s, r) for w, s in WHERE if w == world for r in ("none", "block")}
    for world in (1, 2)
}


@pytest.mark.parametrize(("world_size", "stages"), WHERE)
def test_recomputed_blocks_train_to_the_same_bits(case, world_size, stages):
    kept, again = (case(world_size, f"recompute-{stages}-{how}") for how in ("none", "block"))
    assert kept and all(torch.equal(again[name], value) for name, value in kept.items())
