"""bf16 on the wire is for the level that is due every quantum; windows of slow levels and folds stay fp32."""

from functools import partial

import pytest
import torch

from benchmarks._level_cases import REDUCE_SEQUENCES, base_gradient
from benchmarks._level_toys import SEQ_LEN, Toy, gathered, hope_tiny, levels, relative_error, train
from benchmarks._ranks import Ranks
from nltrain.levels.config import LevelsError
from nltrain.levels.scheduler import LevelScheduler


def slow_levels(reduce_dtype: str, ranks: Ranks) -> dict:
    """Base stands still, so that the slow levels' gradients do not depend on how base's are reduced."""
    made = levels(
        REDUCE_SEQUENCES * SEQ_LEN,
        (1, 2, 4, 8),
        (2, 2, 1, 1),
        {"optimizer": "sgd", "lr": 0.3, "clip_norm": None, "phase_tokens": 0},
        {"base": {"lr": 0.0}},
        reduce_dtype=reduce_dtype,
        fold_every_tokens=3 * REDUCE_SEQUENCES * SEQ_LEN,
        bucket_elements=2000,
    )
    model = Toy()
    scheduler = LevelScheduler(model, made, SEQ_LEN)
    train(model, scheduler, ranks.rank, ranks.world_size, range(15), 2)  # the last fold falls into open windows
    found = {"weights": gathered(scheduler)}
    found["folded"] = {n: f.tensor.clone() for n, f in scheduler.fragments().items() if n.endswith(".window")}
    scheduler.close()
    return found


STAGES = (1, 2, 3)
MAKES = {"toy": Toy, "hope": hope_tiny}
CASES = {
    world: {f"slow-{dtype}": partial(slow_levels, dtype) for dtype in ("fp32", "bf16")}
    | {f"base-{name}-{stage}": partial(base_gradient, make, stage) for name, make in MAKES.items() for stage in STAGES}
    for world in (2, 4)
}


@pytest.mark.parametrize("world_size", [2, 4])
def test_slow_levels_and_folds_are_the_same_to_the_bit_whatever_base_is_reduced_in(case, world_size):
    exact, rounded = case(world_size, "slow-fp32"), case(world_size, "slow-bf16")
    for kind in ("weights", "folded"):
        assert exact[kind] and all(torch.equal(rounded[kind][name], value) for name, value in exact[kind].items())


def test_slow_levels_do_not_depend_on_the_number_of_ranks_though_base_is_reduced_in_bf16(case):
    two, four = case(2, "slow-bf16")["weights"], case(4, "slow-bf16")["weights"]
    assert max(relative_error(four[name], value) for name, value in two.items()) <= 1e-5


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("make", MAKES)
def test_base_reduced_in_bf16_is_off_by_the_rounding_of_bf16(case, world_size, stage, make):
    # Each rank's sum is rounded once, by 2^-9 at most, and so is the sum over ranks after each of N - 1 additions.
    error = case(world_size, f"base-{make}-{stage}")
    assert 1e-4 < error <= 2**-9 * (1 + (world_size - 1) ** 0.5)


def test_bf16_is_refused_where_no_level_is_due_every_quantum():
    with pytest.raises(LevelsError, match=r"reduce_dtype='bf16': no level is due every quantum of 8 tokens"):
        levels(8, (2, 2, 4, 8), reduce_dtype="bf16")
