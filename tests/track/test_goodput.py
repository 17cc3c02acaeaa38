"""Where the time went, from rows alone."""

import pytest

from nltrain.track.goodput import goodput, stragglers
from nltrain.track.rows import from_json


def row(kind, time_s, attempt=1, tokens=0, **values):
    return from_json({"kind": kind, "time_s": time_s, "attempt": attempt, "tokens": tokens} | values)


def steps(first_s, attempt, tokens, count, seconds=1.0, wait_s=0.1):
    return [
        row("step", first_s + seconds * (n + 1), attempt, tokens + 10 * (n + 1), seconds=seconds, data_wait_s=wait_s)
        for n in range(count)
    ]


def attempt(time_s, number, tokens, started_s, lost=0, reason=""):
    values = {"workers": 3, "tokens_lost": lost, "started_s": started_s, "reason": reason}
    return row("attempt", time_s, number, tokens, **values)


def test_every_second_of_an_undisturbed_run_has_a_name():
    rows = [attempt(105, 1, 0, 100), *steps(107, 1, 0, 10)]
    rows += [row("validation", 119, 1, 100, seconds=2.0), row("checkpoint", 119.5, 1, 100, stall_seconds=0.5)]
    rows += [row("end", 121, 1, 100, reason="finished")]
    report = goodput(rows)
    assert report["wall_s"] == 21
    assert report["startup_s"] == 7
    assert report["training_s"] == pytest.approx(9.0)
    assert report["data_wait_s"] == pytest.approx(1.0)
    assert report["validation_s"] == 2
    assert report["checkpoint_stall_s"] == 0.5
    assert report["finishing_s"] == 1.5
    assert report["accounted"] == 1.0


def test_a_failure_costs_the_gap_and_the_work_done_twice():
    rows = [attempt(100, 1, 0, 100), *steps(100, 1, 0, 10)]
    rows += [attempt(125, 2, 50, 120, lost=50, reason="rank 1 was lost"), *steps(130, 2, 50, 10)]
    rows += [row("end", 140, 2, 150, reason="finished")]
    report = goodput(rows)
    assert report["repeated_s"] == pytest.approx(5.0)
    assert report["restart_s"] == pytest.approx(20.0)
    assert report["training_s"] + report["data_wait_s"] == pytest.approx(15.0)
    assert report["accounted"] == 1.0
    [restart] = report["restarts"]
    assert restart["tokens_wasted"] == 50
    assert restart["reason"] == "rank 1 was lost"


def test_the_night_between_a_stop_and_the_next_submission_is_not_the_runs():
    rows = [attempt(100, 1, 0, 100), *steps(100, 1, 0, 5), row("end", 106, 1, 50, reason="stopped")]
    rows += [attempt(50_005, 2, 50, 50_000, reason="submitted again"), *steps(50_006, 2, 50, 5)]
    rows += [row("end", 50_012, 2, 100, reason="finished")]
    report = goodput(rows)
    assert report["wall_s"] == pytest.approx(18.0)
    assert report["startup_s"] == pytest.approx(6.0)
    assert report["restart_s"] == 0
    assert report["accounted"] == 1.0


def test_what_nobody_wrote_down_is_not_accounted_for():
    rows = [attempt(100, 1, 0, 100), *steps(100, 1, 0, 5), *steps(125, 1, 50, 5)]
    assert goodput(rows)["accounted"] == pytest.approx(10 / 30, abs=0.01)


def test_the_rank_that_is_often_slowest_is_named():
    rows = [row("step", n, slowest_rank=2, slowest_over_median=1.5 if n % 2 else 1.05) for n in range(10)]
    assert stragglers(rows) == [{"rank": 2, "share_of_rows": 0.5, "median_ratio": 1.5}]


def test_attempts_on_machines_whose_clocks_differ_follow_one_another():
    """Attempt 2 begins, by its own clock, an hour before attempt 1 has ended."""
    rows = [attempt(3700, 1, 0, 3695), *steps(3700, 1, 0, 10)]
    rows += [attempt(125, 2, 50, 120, lost=50, reason="rank 1 was lost"), *steps(130, 2, 50, 10)]
    rows += [row("end", 140, 2, 150, reason="finished")]
    report = goodput(rows)
    assert report["wall_s"] == pytest.approx(15 + 20)
    assert report["restart_s"] == pytest.approx(10.0)
    assert report["training_s"] + report["data_wait_s"] == pytest.approx(15.0)
    assert report["accounted"] == 1.0
