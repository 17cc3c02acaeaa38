"""Events beside the checkpoints: which attempt they belong to, and how they explain its end."""

import time

import pytest

from nltrain.store import open_store
from nltrain.track.events import put_event, read_events, reason_of


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path / "store"))


def begin(store, run, attempt):
    store.put(f"{run}/attempts/{attempt:06d}.json", b"{}")


def test_a_hang_explains_the_deaths_it_leads_to_and_old_events_do_not(store):
    begin(store, "r", 1)
    put_event(store, "r", "failure", "controller", reason="old")
    begin(store, "r", 2)
    hang = {"phase": "training", "stacks": "x.txt"}
    put_event(store, "r", "hang", "rank_0000", rank=0, silent_s=21.0, beats=7, process_state="S (sleeping)", **hang)
    put_event(store, "r", "hang", "rank_0001", rank=1, silent_s=20.0, beats=8, process_state="T (stopped)", **hang)
    put_event(store, "r", "failure", "controller", reason="rank 1 was lost")
    found = read_events(store, "r", 2)
    assert len(found) == 3
    assert reason_of(found) == (
        "hang: rank 1 made no progress for 20 s while training (process T (stopped)); stacks in x.txt"
    )
    assert reason_of([]) == ""


def test_events_belong_to_attempts_whatever_the_clocks_say(store, monkeypatch):
    """The machine of attempt 2 is a day behind that of attempt 1."""
    for attempt, now_s, reason in ((1, 200_000.0, "first"), (2, 113_600.0, "second")):
        begin(store, "r", attempt)
        monkeypatch.setattr(time, "time", lambda now_s=now_s: now_s)
        put_event(store, "r", "failure", "controller", reason=reason)
    assert [event["reason"] for event in read_events(store, "r")] == ["first", "second"]
    assert [event["reason"] for event in read_events(store, "r", 2)] == ["second"]


def test_events_of_before_they_had_an_attempt_are_the_oldest(store):
    store.put("r/events/001700000000000-failure-controller.json", b'{"kind": "failure", "reason": "ancient"}')
    begin(store, "r", 1)
    put_event(store, "r", "failure", "controller", reason="new")
    assert [event["reason"] for event in read_events(store, "r", 1)] == ["new"]


def test_events_of_one_author_in_one_millisecond_are_all_kept_in_order(store, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1_700_000_000.0)
    for number in range(5):
        put_event(store, "r", "strike", "controller", number=number)
    assert [event["number"] for event in read_events(store, "r")] == list(range(5))
