"""What the thread of a save does: training goes on meanwhile, a failure leaves nothing behind, a hang is named."""

import threading
import time

import pytest

from nltrain.checkpoint import Checkpointer, SaveFailedError
from nltrain.checkpoint.catalog import list_checkpoints
from nltrain.checkpoint.manifest import checkpoint_name
from nltrain.store import Store
from tests.checkpoint.support import FaultyStore, assert_filled, held, settings, wanted


def test_training_waits_for_the_copy_only_and_at_most_one_save_is_in_flight(run: Store) -> None:
    store = FaultyStore(run)
    store.waiting = "/state-"
    checkpointer = Checkpointer(store, "async", None, settings(run.url))
    fragments = held("replicated", 0, 1, salt=3)
    assert checkpointer.save(1, fragments, {})
    assert store.reached.wait(10)
    fragments["embed.master"].tensor.zero_()
    timer = threading.Timer(0.5, store.may_go_on.set)
    began = time.monotonic()
    timer.start()
    assert checkpointer.save(2, fragments, {})
    assert time.monotonic() - began >= 0.4
    checkpointer.wait()
    first, second = checkpointer.poll()
    assert first.stall_seconds < 0.2 and second.stall_seconds >= 0.4 and not first.error
    back = wanted("replicated", 0, 1)
    checkpointer.load(first.name, back)
    assert_filled(back, salt=3)


def test_a_save_that_hangs_ends_in_an_error_that_names_the_limit(run: Store) -> None:
    store = FaultyStore(run)
    store.waiting = "/state-"
    checkpointer = Checkpointer(store, "hang", None, settings(run.url, timeout_s=0.3))
    checkpointer.save(1, held("replicated", 0, 1), {})
    with pytest.raises(SaveFailedError, match=r"save-1 has not ended after checkpoint.timeout_s=0.3 s"):
        checkpointer.wait()
    store.may_go_on.set()


@pytest.mark.parametrize("how", ["failing", "failing_once"])
def test_a_save_that_fails_leaves_no_files_and_the_next_one_stands(run: Store, how: str) -> None:
    """While a rank's files are written, and when the manifest is created."""
    store = FaultyStore(run)
    checkpointer = Checkpointer(store, how, None, settings(run.url, asynchronous=False))
    setattr(store, how, "/state-" if how == "failing" else "/manifest.json")
    checkpointer.save(1, held("replicated", 0, 1), {})
    [failed] = checkpointer.poll()
    assert "refused by the test" in failed.error
    left = [item.key for item in run.list(f"{how}/checkpoints/") if not item.key.endswith("/manifest.json")]
    assert left == []
    store.failing = ""
    checkpointer.save(2, held("replicated", 0, 1), {})
    assert [info.name for info in list_checkpoints(run, how) if info.complete] == [checkpoint_name(2, 1)]
