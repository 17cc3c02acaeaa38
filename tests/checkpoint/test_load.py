"""Loading succeeds on all ranks or on none; a store that fails is not taken for damage."""

import pytest

from nltrain.checkpoint.errors import CorruptCheckpointError, MismatchError
from nltrain.checkpoint.load import load, together
from nltrain.checkpoint.manifest import checkpoint_name
from nltrain.checkpoint.stored import StoredCheckpoint
from nltrain.collectives import Ranks
from nltrain.store import Store, StoreError
from tests.checkpoint.support import NEW, assert_filled, run_ranks, wanted


def one_fails(rank: int, size: int) -> None:
    """Rank 1 alone fails, once with damage and once with a store."""
    ranks = Ranks(timeout_s=60.0)

    def fail(error: Exception) -> int:
        if rank == 1:
            raise error
        return rank

    assert together(ranks, lambda: rank) == rank
    with pytest.raises(CorruptCheckpointError, match="planted"):
        together(ranks, lambda: fail(CorruptCheckpointError("planted")))
    with pytest.raises(StoreError, match="gone" if rank == 1 else "rank 1: gone"):
        together(ranks, lambda: fail(StoreError("gone")))


def test_an_error_of_one_rank_is_raised_on_all() -> None:
    run_ranks(2, one_fails)


def test_the_fragments_are_filled_and_the_own_state_comes_with_the_same_world_size(run: Store) -> None:
    fragments = wanted("even_slices", 0, 1)
    loaded = load(StoredCheckpoint(run, "r", NEW), fragments, Ranks(), hashed=True)
    assert_filled(fragments, salt=200)
    assert (loaded.tokens, loaded.same_world_size, loaded.state["note"]) == (200, True, "aaaa")
    assert loaded.rank_state["window"].tolist() == [200.0] * 100


def test_what_is_no_checkpoint_and_a_rank_that_did_not_save_are_named(run: Store) -> None:
    with pytest.raises(CorruptCheckpointError, match="has no manifest: it is no checkpoint"):
        StoredCheckpoint(run, "r", checkpoint_name(7, 1))
    with pytest.raises(MismatchError, match="was saved by 1 ranks: no rank 1"):
        StoredCheckpoint(run, "r", NEW).rank_state(1)
