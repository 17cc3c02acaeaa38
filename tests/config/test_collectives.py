"""JSON and integers of all ranks, on all ranks; a failure of rank 0 is everyone's."""

import pytest

from nltrain.collectives import FirstRankError, Ranks
from tests.checkpoint.support import run_ranks


def everyone(rank: int, size: int) -> None:
    """Each collective once, with values that differ in length."""
    ranks = Ranks(timeout_s=60.0)
    assert (ranks.rank, ranks.size) == (rank, size)
    assert ranks.gather_ints([rank, 7]) == [[each, 7] for each in range(size)]
    assert ranks.gather({"text": "é" * rank}) == [{"text": "é" * each} for each in range(size)]
    assert ranks.from_first(lambda: [rank, None]) == [0, None]
    with pytest.raises(KeyError if rank == 0 else FirstRankError, match="planted"):
        ranks.from_first(lambda: {}["planted"])
    assert ranks.gather(rank) == list(range(size))


def test_two_ranks_agree() -> None:
    run_ranks(2, everyone)


def test_without_a_process_group_there_is_one_rank() -> None:
    ranks = Ranks()
    assert ranks.gather_ints([3]) == [[3]] and ranks.gather("a") == ["a"] and ranks.from_first(lambda: 5) == 5
