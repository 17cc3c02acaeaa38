"""Whether the last save fits into the time until a kill."""

from types import SimpleNamespace

import pytest

from nltrain.checkpoint.checkpointer import SaveResult
from nltrain.collectives import Ranks
from nltrain.saving import LEAVE_RESERVE_S, SaveLog
from nltrain.supervision import Wish
from nltrain.track.rows import CheckpointFailedRow, CheckpointRow


@pytest.fixture
def found():
    """A log of two saves: one failed, one of 1 GB committed at 100 MB/s. Only the calls that it makes are recorded."""
    results = [
        SaveResult("a", 100, "no room", 5, 0.1, 9.0, ()),
        SaveResult("b", 200, "", 1_000_000_000, 0.2, 10.0, ("z",)),
    ]
    rows, said = [], []
    record = SimpleNamespace(row=rows.append, say=said.append, publish=lambda: None)
    saves = SaveLog(SimpleNamespace(poll=lambda: results), record, Ranks())
    saves.write(300)
    return saves, rows, said


def test_every_save_has_a_row(found):
    _, (failed, committed), _ = found
    assert isinstance(failed, CheckpointFailedRow) and isinstance(committed, CheckpointRow)
    assert (failed.error, failed.saved_tokens, failed.tokens) == ("no room", 100, 300)
    assert (committed.name, committed.deleted, committed.stall_seconds) == ("b", ["z"], 0.2)


@pytest.mark.parametrize(
    ("wish", "unreduced", "left_s", "fold"),
    [
        (Wish.STOP, 0, 1.0, False),  # nothing to fold
        (Wish.STOP, 10**9, float("inf"), False),  # nobody kills
        (Wish.STOP, 10**9, 21.0 + LEAVE_RESERVE_S, False),  # 2 GB take 20 s
        (Wish.STOP, 10**9, 19.0 + LEAVE_RESERVE_S, True),
        (Wish.RESIZE, 10**9, float("inf"), True),  # the order of summation changes anyway
        (Wish.PREEMPTED, 10**9, float("inf"), True),
    ],
)
def test_sums_are_folded_where_they_must_be(found, wish, unreduced, left_s, fold):
    saves, _, said = found
    assert saves.must_fold(wish, unreduced, left_s) is fold
    assert len(said) == (fold and wish == Wish.STOP)
