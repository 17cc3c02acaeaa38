"""Real ranks: sharded writes, reshard on load at any world size, agreement about every failure."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from nltrain.checkpoint import Checkpointer, CheckpointError, MismatchError, SaveFailedError, StaleAttemptError
from nltrain.checkpoint.manifest import checkpoint_name, key_of
from nltrain.store import open_store
from tests.checkpoint.support import LAYOUTS, TENSORS, FaultyStore, assert_filled, held, run_ranks, settings, wanted

CUTS = sorted(LAYOUTS)
UNIQUE_BYTES = sum(total * dtype.itemsize for total, dtype in TENSORS.values())


def save_every_layout(rank: int, size: int, url: str) -> None:
    """One checkpoint per layout, run w<size>; then the failures that ranks must agree on."""
    store = open_store(url)
    checkpointer = Checkpointer(store, f"w{size}", None, settings(url, keep_last=100))
    for index, layout in enumerate(CUTS):
        own = {"rank": rank, "tensor": torch.arange(rank + 3), "window": torch.full((rank, 2), float(rank))}
        assert checkpointer.save(index, held(layout, rank, size), {"layout": layout, "config": {"size": 1}}, own)
        checkpointer.wait()
        assert checkpointer.newest_complete().tokens == index
        if rank == 0:
            files = store.list(key_of(f"w{size}", checkpoint_name(index, 1), ""))
            data = [item for item in files if "/state-" in item.key]
            # Once, not once per rank that holds it; the rest is headers.
            assert UNIQUE_BYTES <= sum(item.num_bytes for item in data) <= UNIQUE_BYTES + 1000 * size
            assert max(item.num_bytes for item in files) <= 1 << 16
            assert len({item.key.split("/")[3] for item in data}) >= min(size, 2)
    if size == 1:
        return
    with pytest.raises(CheckpointError, match="the state differs between ranks"):
        checkpointer.save(50, held("replicated", rank, size), {"rank": rank})
    with pytest.raises(CheckpointError, match="the token count differs"):
        checkpointer.save(50 + rank, held("replicated", rank, size), {})
    one_rank_cannot_write(rank, size, url)
    a_slow_rank_holds_back_the_commit(rank, size, url)


def one_rank_cannot_write(rank: int, size: int, url: str) -> None:
    store = FaultyStore(open_store(url))
    checkpointer = Checkpointer(store, f"faulty{size}", None, settings(url, max_failures=2))
    fragments = held("even_slices", rank, size)
    store.failing = "/state-" if rank == 1 else ""
    checkpointer.save(1, fragments, {})
    with pytest.raises(SaveFailedError, match=r"rank 1: StoreError: .* refused by the test"):
        checkpointer.wait()
    assert checkpointer.newest_complete() is None
    store.failing = ""
    checkpointer.save(2, fragments, {})
    checkpointer.wait()
    assert checkpointer.newest_complete().tokens == 2
    store.failing = "/state-" if rank == 1 else ""
    checkpointer.save(3, fragments, {})
    # Reported at the next call; training does not end.
    assert checkpointer.save(4, fragments, {})
    with pytest.raises(SaveFailedError, match="2 saves in a row failed"):
        checkpointer.save(5, fragments, {})
    assert [bool(result.error) for result in checkpointer.poll()] == [True, False, True, True]
    assert checkpointer.newest_complete().tokens == 2


def a_slow_rank_holds_back_the_commit(rank: int, size: int, url: str) -> None:
    store = FaultyStore(open_store(url))
    checkpointer = Checkpointer(store, f"slow{size}", None, settings(url, when_busy="skip"))
    store.waiting = "/state-" if rank == 1 else ""
    fragments = held("even_slices", rank, size, salt=1)
    assert checkpointer.save(1, fragments, {})
    for tensor, _, _ in fragments.values():
        tensor.zero_()  # training goes on
    # All ranks skip, also those that have long written their part.
    assert not checkpointer.save(2, fragments, {})
    assert checkpointer.newest_complete() is None
    store.may_go_on.set()
    checkpointer.wait()
    filled = wanted("one_flat_buffer", rank, size)
    checkpointer.load(checkpointer.newest_complete(), filled)
    assert_filled(filled, salt=1)


def load_every_layout(rank: int, size: int, url: str, saved_by: int) -> None:
    store = open_store(url)
    for verify in ("hashes", "sizes"):
        checkpointer = Checkpointer(store, f"w{saved_by}", None, settings(url, verify=verify, num_threads=2))
        for index, layout in enumerate(CUTS):
            asked = wanted(CUTS[(index + 1) % len(CUTS)], rank, size)
            loaded = checkpointer.load(checkpoint_name(index, 1), asked)
            assert_filled(asked)
            assert loaded.state["layout"] == layout and loaded.tokens == index
            assert loaded.same_world_size == (saved_by == size)
            if loaded.same_world_size:
                assert_own(loaded.rank_state, rank)
            for other in range(saved_by):
                assert_own(loaded.stored.rank_state(other), other)
        resumed = checkpointer.resume(wanted("even_slices", rank, size), {"size": 1})
        assert resumed.tokens == len(CUTS) - 1
    asked = wanted("even_slices", rank, size)
    if rank == size - 1:
        asked["only.here"] = asked["embed.master"]
    with pytest.raises(MismatchError, match=r"only\.here is missing"):
        checkpointer.load(checkpoint_name(0, 1), asked)
    asked = wanted("even_slices", rank, size)
    asked.pop("embed.exp_avg", None)
    with pytest.raises(MismatchError, match=r"holds embed\.exp_avg \(1 in all\), which this model does not have"):
        checkpointer.load(checkpoint_name(0, 1), asked)
    checkpointer.load(checkpoint_name(0, 1), asked, may_be_unused=("*.exp_avg",))
    assert_filled(asked)


def assert_own(own: Any, rank: int) -> None:
    assert own["rank"] == rank
    assert torch.equal(own["tensor"], torch.arange(rank + 3))
    assert torch.equal(own["window"], torch.full((rank, 2), float(rank)))


def all_of_one_world(rank: int, size: int, url: str, loads: tuple[int, ...]) -> None:
    logging.disable(logging.CRITICAL)
    for saved_by in loads:
        load_every_layout(rank, size, url, saved_by)
    save_every_layout(rank, size, url)


def test_what_four_ranks_save_any_number_loads_and_back(tmp_path: Path) -> None:
    url = str(tmp_path)
    run_ranks(4, all_of_one_world, url, ())
    for size in (3, 2, 1):
        run_ranks(size, all_of_one_world, url, (4,))
    run_ranks(4, load_back, url)


def load_back(rank: int, size: int, url: str) -> None:
    logging.disable(logging.CRITICAL)
    for saved_by in (4, 3, 2, 1):
        load_every_layout(rank, size, url, saved_by)
    # A second attempt has begun meanwhile: the first one hears of it on every rank, at its next commit.
    old = Checkpointer(open_store(url), "fenced", None, settings(url))
    Checkpointer(open_store(url), "fenced", None, settings(url))
    old.save(1, held("replicated", rank, size), {})
    with pytest.raises(StaleAttemptError, match="attempt 2 has begun"):
        old.wait()
    with pytest.raises(StaleAttemptError):
        old.save(2, held("replicated", rank, size), {})
