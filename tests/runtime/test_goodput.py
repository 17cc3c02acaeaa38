"""Where the time went, from rows alone; and what `nltrain status` makes of a run's snapshot."""

import json
import threading
import time

import pytest

from nltrain.cli import main
from nltrain.runtime.status import StatusError, describe_status, read_status
from nltrain.store import open_store
from nltrain.track.events import put_event, read_events, reason_of
from nltrain.track.goodput import goodput, stragglers
from nltrain.track.publisher import Publisher
from nltrain.track.status import StatusBoard, read_history


class MemoryStore:
    """The three calls that events and status need."""

    def __init__(self):
        self.objects = {}

    def get(self, key):
        return self.objects[key]

    def put(self, key, data):
        self.objects[key] = bytes(data)

    def list(self, prefix=""):
        return [type("Item", (), {"key": key}) for key in sorted(self.objects) if key.startswith(prefix)]


def row(kind, time_s, attempt=1, tokens=0, **values):
    return {"kind": kind, "time_s": time_s, "attempt": attempt, "tokens": tokens} | values


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


def begin(store, run, attempt):
    store.put(f"{run}/attempts/{attempt:06d}.json", b"{}")


def test_a_hang_explains_the_deaths_it_leads_to_and_old_events_do_not():
    store = MemoryStore()
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


def test_events_belong_to_attempts_whatever_the_clocks_say(monkeypatch):
    """The machine of attempt 2 is a day behind that of attempt 1."""
    store = MemoryStore()
    for attempt, now_s, reason in ((1, 200_000.0, "first"), (2, 113_600.0, "second")):
        begin(store, "r", attempt)
        monkeypatch.setattr(time, "time", lambda now_s=now_s: now_s)
        put_event(store, "r", "failure", "controller", reason=reason)
    assert [event["reason"] for event in read_events(store, "r")] == ["first", "second"]
    assert [event["reason"] for event in read_events(store, "r", 2)] == ["second"]


def test_events_of_before_they_had_an_attempt_are_the_oldest():
    store = MemoryStore()
    store.put("r/events/001700000000000-failure-controller.json", b'{"kind": "failure", "reason": "ancient"}')
    begin(store, "r", 1)
    put_event(store, "r", "failure", "controller", reason="new")
    assert [event["reason"] for event in read_events(store, "r", 1)] == ["new"]


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


def test_the_status_of_a_run_outlives_the_machine_that_wrote_it(tmp_path):
    store = MemoryStore()
    publisher = Publisher(store)
    board = StatusBoard(tmp_path, publisher, "r")
    board.begin(attempt=1, time_s=1.0)
    board.update(True, tokens=100, state="training")
    publisher.close()
    history = read_history(store, "r", KeyError)
    assert (history["max_tokens"], history["attempts"]) == (100, [{"attempt": 1, "time_s": 1.0}])
    publisher = Publisher(store)
    other = StatusBoard(tmp_path / ".", publisher, "r")
    other.restore(history)
    other.begin(attempt=2, time_s=2.0)
    other.update(True, tokens=50, state="training")
    publisher.close()
    history = read_history(store, "r", KeyError)
    assert history["max_tokens"] == 100
    assert len(history["attempts"]) == 2
    assert read_history(store, "another", KeyError) == {}


def test_a_store_that_fails_costs_the_view_and_not_the_run(tmp_path, capsys):
    class Broken(MemoryStore):
        def put(self, key, data):
            raise OSError("cut")

    publisher = Publisher(Broken())
    board = StatusBoard(tmp_path, publisher, "r")
    for tokens in (1, 2):
        board.update(True, tokens=tokens, state="training")
        time.sleep(0.05)
    publisher.close()
    assert json.loads((tmp_path / "status.json").read_text())["tokens"] == 2
    assert capsys.readouterr().out.count("r/status.json was not published (cut): training goes on") == 1


def test_a_slow_store_holds_nobody_up_and_gets_the_newest_of_each_key(capsys):
    under_way, go_on, puts = threading.Event(), threading.Event(), []

    class Slow(MemoryStore):
        def put(self, key, data):
            under_way.set()
            assert go_on.wait(10)
            puts.append((key, data))

    publisher = Publisher(Slow())
    publisher.offer("a", lambda: b"1")
    assert under_way.wait(10)
    for value in (b"2", b"3"):
        publisher.offer("a", lambda value=value: value)
        publisher.offer("b", lambda value=value: value)
    publisher.close(timeout_s=0.05)
    assert puts == []
    assert "did not take the run's last rows within 0.05 s" in capsys.readouterr().out
    go_on.set()
    publisher.close()
    assert puts == [("a", b"1"), ("a", b"3"), ("b", b"3")]


def test_an_attempt_that_was_overtaken_publishes_nothing_more():
    store, newest = MemoryStore(), [True]
    publisher = Publisher(store, lambda: newest[0])
    publisher.offer("r/status.json", lambda: b"mine")
    while "r/status.json" not in store.objects:
        time.sleep(0.01)
    newest[0] = False
    publisher.offer("r/status.json", lambda: b"too late")
    publisher.close()
    assert store.objects == {"r/status.json": b"mine"}


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
