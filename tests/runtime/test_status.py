"""What `nltrain status` makes of a run's snapshot, and the other commands that need no cluster."""

import json
import time

import pytest

from nltrain.cli import main
from nltrain.runtime.status import StatusError, describe_status, read_status
from nltrain.store import open_store
from nltrain.track.events import put_event


def begin(store, run, attempt):
    store.put(f"{run}/attempts/{attempt:06d}.json", b"{}")


def snapshot(tmp_path, **values):
    level = {"next_tick_tokens": 1536, "period_tokens": 512, "done": 2, "skipped": 0, "due": 2}
    whole = {"run": "r", "state": "training", "time_s": time.time(), "tokens": 1024, "total_tokens": 4096}
    whole |= {"loss": 3.5, "tokens_per_s": 100.0, "attempt": 2, "workers": 3, "checkpoint_url": str(tmp_path / "ck")}
    whole |= {"levels": {"base": level}, "attempts": [
        {"attempt": 1, "workers": 3, "from_tokens": 0, "tokens_lost": 0, "reason": "", "time_s": 1.0},
        {"attempt": 2, "workers": 2, "from_tokens": 512, "tokens_lost": 256, "reason": "node gone", "time_s": 2.0},
    ]}  # fmt: skip
    (tmp_path / "status.json").write_text(json.dumps(whole | values))


def test_status_shows_a_live_run(tmp_path, capsys):
    snapshot(tmp_path)
    assert main(["status", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    for part in (
        "run r: training",
        "1,024 of 4,096 (25.0 %)",
        "loss        3.5000",
        "attempt     2 with 3 workers",
        "checkpoint  none yet",
        "restarts    1, 256 tokens trained again",
        "at 512 tokens, 2 workers, 256 tokens again: node gone",
        "level base       every 512 tokens, 2 of 2 updates, next at 1,536 (in 512)",
    ):
        assert part in text


def test_status_says_when_a_run_has_fallen_silent(tmp_path):
    snapshot(tmp_path, time_s=time.time() - 3600)
    status = read_status(str(tmp_path))
    assert not status["alive"]
    assert "silent for 1:00:00" in describe_status(status)


def run_of(tmp_path, *failures, attempts=1, **values):
    """A run's folder and store, where the events of the last attempt are `failures`."""
    store = open_store(str(tmp_path / "ck"))
    for number in range(1, attempts + 1):
        begin(store, "r", number)
    for failure in failures:
        put_event(store, "r", "failure", "controller", **failure)
    snapshot(tmp_path, **values)
    return store


GAVE_UP = {"reason": "rank 0: ValueError: boom (no restart would cure it)", "final": True, "error_type": "ValueError"}


@pytest.mark.parametrize("state", ["starting", "training"])
def test_status_says_that_a_job_has_failed_and_why(tmp_path, state):
    run_of(tmp_path, GAVE_UP, state=state)
    status = read_status(str(tmp_path))
    assert (status["state"], status["alive"]) == ("failed", False)
    assert "run r: failed: rank 0: ValueError: boom" in describe_status(status)


def test_a_failure_that_is_tried_again_is_none(tmp_path):
    run_of(tmp_path, GAVE_UP | {"final": False})
    assert read_status(str(tmp_path))["state"] == "training"


def test_a_failure_before_the_newest_attempt_is_over(tmp_path):
    begin(run_of(tmp_path, GAVE_UP), "r", 2)
    assert read_status(str(tmp_path))["state"] == "training"


def test_an_attempt_that_was_overtaken_has_not_failed_the_run(tmp_path):
    run_of(tmp_path, GAVE_UP | {"error_type": "StaleAttemptError"}, attempts=2)
    assert read_status(str(tmp_path))["state"] == "training"


def test_a_run_that_ended_stays_so(tmp_path):
    run_of(tmp_path, GAVE_UP, state="finished")
    assert read_status(str(tmp_path))["state"] == "finished"


def test_a_run_that_failed_before_its_first_status_has_one(tmp_path):
    put_event(open_store(str(tmp_path / "ck")), "r", "failure", "controller", **GAVE_UP)
    text = describe_status(read_status(str(tmp_path / "ck" / "r")))
    assert "run r: failed: rank 0: ValueError: boom" in text and "checkpoint  none yet" in text


def test_a_clock_that_is_ahead_makes_no_run_of_the_future(tmp_path):
    snapshot(tmp_path, time_s=time.time() + 3600)
    status = read_status(str(tmp_path))
    assert status["age_s"] == 0 and status["alive"]


def test_status_of_nothing_says_where_it_looked(tmp_path, capsys):
    with pytest.raises(StatusError):
        read_status(str(tmp_path))
    assert main(["status", str(tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().err


def test_an_unknown_command_names_those_there_are(capsys):
    assert main(["stauts"]) == 2
    assert "status, list, verify, export, sizes, doctor, plan" in capsys.readouterr().err


def test_plan_shows_a_job_without_a_cluster(capsys):
    lengths = ["train.total_tokens=409600", "levels.schedule.total_tokens=409600"]
    assert main(["plan", "jobs/hope_tiny.py", *lengths]) == 0
    assert "train.total_tokens = 409600" in capsys.readouterr().out
    assert main(["plan", "jobs/none.py"]) == 1
