"""Strikes against nodes: who is blamed for what, from when on a node is left out, and for how long."""

import pytest

from nltrain.runtime.controller import JudgedFailures
from nltrain.runtime.failures import Failure, NodeLeaving, RankError
from nltrain.runtime.strikes import Place, Strikes, note_strike
from nltrain.store import open_store
from nltrain.track.events import behind, put_event, read_events, reason_of

HOUR_S = 3600.0
A, B = Place("id-a", "node-a", "0"), Place("id-b", "node-b", "3")


def test_a_node_is_left_out_at_the_limit_and_again_used_when_its_strikes_are_old():
    strikes = Strikes(3, 24 * HOUR_S)
    for hour in range(3):
        assert strikes.out(hour * HOUR_S) == {}
        strikes.add(A, f"death {hour}", False, hour * HOUR_S)
        strikes.add(B, "elsewhere", False, 0.0) if hour < 2 else None
    assert strikes.out(3 * HOUR_S) == {"node-a": "3 strikes within 24 hours on GPU 0, the last: death 2"}
    assert strikes.out(24.5 * HOUR_S) == {}


def test_a_device_that_is_known_to_be_bad_is_left_out_at_once():
    strikes = Strikes(3, HOUR_S)
    strikes.add(B, "wrong sum", True, 0.0)
    assert list(strikes.out(1.0)) == ["node-b"]


def test_without_a_limit_no_node_is_left_out():
    strikes = Strikes(0, HOUR_S)
    strikes.add(A, "death", True, 0.0)
    assert strikes.out(1.0) == {}


def test_strikes_outlive_the_job(tmp_path):
    store = open_store(str(tmp_path))
    strikes = Strikes(2, HOUR_S)
    for _ in range(2):
        note_strike(store, "r", strikes.add(A, "death", False, 0.0))
    put_event(store, "r", "resize", "controller", reason="another kind")
    again = Strikes.read(2, HOUR_S, store, "r")
    assert list(again.out(read_events(store, "r")[-1]["time_s"])) == ["node-a"]
    assert reason_of(read_events(store, "r")) == "another kind"


def failed(**errors):
    return Failure.of_ranks({int(name[1:]): error for name, error in errors.items()})


def test_what_speaks_against_a_node_and_what_does_not():
    refused = RankError(2, "DeviceRefusedError", "3 elements are wrong", "probe.py:1", 0, "")
    bug = RankError(1, "ValueError", "boom", "loop.py:3", 0, "")
    ecc = RankError(0, "AcceleratorError", "CUDA error: uncorrectable ECC error encountered", "loop.py:3", 0, "")
    lost = RankError(0, "RuntimeError", "Connection closed by peer", "loop.py:3", 0, "")
    assert (failed(r2=refused).ranks, failed(r2=refused).bad_device, failed(r2=refused).kind) == ((2,), True, "death")
    assert (failed(r0=ecc).ranks, failed(r0=ecc).bad_device) == ((0,), True)
    assert failed(r1=bug, r2=RuntimeError("died")).ranks == ()
    assert failed(r0=lost).ranks == ()
    assert failed(r0=lost, r3=RuntimeError("died")).ranks == (3,)
    assert failed(r0=NodeLeaving("left"), r3=RuntimeError("died")).ranks == ()


def stuck(kind, rank, collectives, beats=7, state="S (sleeping)"):
    values = {"silent_s": 12.0, "tokens": 64, "phase": "training", "process_state": state, "stacks": f"{rank}.txt"}
    return {"kind": kind, "rank": rank, "collectives": collectives, "beats": beats} | values


def test_in_a_hang_of_a_collective_the_rank_that_is_behind_is_named():
    """All wait alike and have beaten alike; the watchdog of an innocent one was the first to act."""
    events = [stuck("stuck", 0, 41), stuck("stuck", 2, 40), stuck("stuck", 1, 41), stuck("hang", 0, 41)]
    assert behind(events)["rank"] == 2
    words = "hang: rank 2 made no progress for 12 s while training (process S (sleeping), 1 collectives behind); stacks"
    assert reason_of(events).startswith(words)


def test_a_process_that_does_not_run_explains_a_hang_before_any_count():
    events = [stuck("hang", 0, 40), stuck("stuck", 1, 41, state="T (stopped)")]
    assert behind(events)["rank"] == 1


def test_who_was_stuck_and_went_on_explains_nothing():
    assert behind([stuck("stuck", 0, 40)]) is None
    assert reason_of([stuck("stuck", 0, 40)]) == ""


@pytest.fixture
def policy(tmp_path, monkeypatch):
    from nltrain.config import to_dict
    from tests.runtime.test_leaving import config

    values = to_dict(config(tmp_path, "p", cluster__max_workers=3, cluster__min_workers=2))
    nodes = [
        {"NodeID": f"id-{each}", "NodeName": f"node-{each}", "Alive": True, "Resources": {"CPU": 1.0}} for each in "abc"
    ]
    monkeypatch.setattr("nltrain.runtime.controller.ray.nodes", lambda: nodes)
    policy = JudgedFailures(values)
    policy.placed_s = 0.0
    policy.places = {rank: Place(node["NodeID"], node["NodeName"], "") for rank, node in enumerate(nodes)}
    return policy


def test_a_hang_is_a_strike_against_the_node_of_the_rank_behind_not_of_the_killed(policy):
    # The word of a kill comes after the controller has heard of the death.
    for event in [stuck("stuck", 2, 40), stuck("stuck", 0, 41)]:
        put_event(policy._store(), "p", event.pop("kind"), str(event["rank"]), **event)
    policy._strike(failed(r0=RuntimeError("died"), r1=RuntimeError("died"), r2=RuntimeError("died")))
    [strike] = read_events(policy._store(), "p", kinds=("strike",))
    assert strike["node"] == "node-c"


def test_a_death_of_several_nodes_at_once_is_no_strike(policy):
    policy._strike(failed(r0=RuntimeError("died"), r1=RuntimeError("died")))
    assert read_events(policy._store(), "p", kinds=("strike",)) == []


def test_no_more_nodes_are_left_out_than_the_run_can_spare(policy, capsys):
    refused = "DeviceRefusedError"
    policy._strike(failed(r0=RankError(0, refused, "wrong", "probe.py:1", 0, "")))
    assert list(policy.avoided()) == ["id-a"]
    policy._strike(failed(r1=RankError(1, refused, "wrong", "probe.py:1", 0, "")))
    assert list(policy.avoided()) == ["id-a"]
    told = capsys.readouterr().out
    assert "node node-a is left out from now on: 1 strike within 24 hours" in told
    assert "node node-b is not left out, for fewer than cluster.min_workers would be left: 1 strike" in told
