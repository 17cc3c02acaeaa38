"""How many ranks train: the fewest that are as fast as any number of those that are there."""

import pytest

from nltrain.levels.config import LevelsError
from nltrain.levels.quantum import best_group_size, cut_quantum, quantum_cost, size_table


def simulated(num_sequences: int, micro_batch_size: int, world_size: int) -> tuple[int, int]:
    """(sequences that a quantum waits for, micro-steps), played through rank by rank."""
    waited = steps = 0
    queue = num_sequences
    while queue:
        loads = [0] * world_size
        for place in range(min(queue, micro_batch_size * world_size)):
            loads[place % world_size] += 1
        queue -= sum(loads)
        waited, steps = waited + max(loads), steps + 1
    return waited, steps


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_the_choice_for_128_sequences_is_the_simulated_optimum_for_1_to_256_ranks(micro_batch_size):
    times = {n: simulated(128, micro_batch_size, n) for n in range(1, 129)}
    for available in range(1, 257):
        size = best_group_size(128, micro_batch_size, available)
        reachable = [times[n] for n in range(1, min(available, 128) + 1)]
        # No other size waits for fewer sequences or takes fewer micro-steps, whatever a micro-step costs.
        assert times[size.ranks] == (min(w for w, _ in reachable), min(s for _, s in reachable))
        assert all(times[n] != times[size.ranks] for n in range(1, size.ranks))
        assert size.num_micro_steps == times[size.ranks][1]
        assert size.speed >= size.speed_of_all


def test_the_size_that_is_left_after_one_of_64_ranks_keeps_20_spares_and_loses_nothing_more():
    assert best_group_size(128, 2, 64).ranks == 64
    size = best_group_size(128, 2, 63)
    assert (size.ranks, size.num_micro_steps, size.padded) == (43, 2, 1)
    assert size.speed == size.speed_of_all == pytest.approx(0.4)
    # 20 more may go before a quantum gets slower again.
    assert best_group_size(128, 2, 43).speed == size.speed > best_group_size(128, 2, 42).speed


def test_a_group_is_never_smaller_than_asked_for():
    assert best_group_size(128, 2, 63, at_least=48).ranks == 48
    with pytest.raises(LevelsError, match="8 ranks for 128 sequences, at least 9"):
        best_group_size(128, 2, 8, at_least=9)


def test_the_table_has_a_line_per_number_of_ranks():
    lines = size_table(128, 2, 256).splitlines()[2:]
    assert [int(line.split()[0]) for line in lines] == list(range(1, 257))
    for line in lines:
        there, train, spare, steps, padded = map(int, line.split()[:5])
        assert train + spare == there and train <= 128
        assert len(cut_quantum(128, 2, train)) == steps and padded <= train * steps
        # Relative to one rank per sequence: one micro-step of one sequence.
        assert float(line.split()[5]) == pytest.approx(
            quantum_cost(128, 2, 128) / quantum_cost(128, 2, train), abs=5e-4
        )
