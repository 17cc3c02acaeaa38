"""A rank that makes no progress is dumped and killed, by a process of its own; one that does is left alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from nltrain.store import open_store
from nltrain.track.events import read_events, reason_of

ROOT = Path(__file__).resolve().parents[2]

# A rank without torch.distributed: it beats, and stops beating as it is told.
RANK = """
import sys, time
from nltrain.config import override
from nltrain.runtime.worker import RankSupervision
sys.path.insert(0, "jobs")
import hope_tiny

def stuck_in_a_read():
    time.sleep(600)

if __name__ == "__main__":
    seconds, how, *overrides = sys.argv[1:]
    supervision = RankSupervision(override(hope_tiny.config, overrides), 1, lambda: False)
    print(supervision._watchdog.pid, flush=True)
    end = time.monotonic() + float(seconds)
    while time.monotonic() < end:
        supervision.beat("training", 4096)
        time.sleep(0.05)
    if how == "close":
        supervision.close()
    else:
        stuck_in_a_read()
"""


@pytest.fixture
def start(tmp_path):
    started = []

    def begin(seconds, how="hang", timeout_s=2.0):
        script = tmp_path / "rank.py"
        script.write_text(RANK)
        overrides = [f"output={tmp_path}/out", f"checkpoint.url={tmp_path}/runs", "name=w"]
        overrides += [f"cluster.hang_timeout_s={timeout_s}", "cluster.slow_phase_timeout_s=60"]
        process = subprocess.Popen(
            [sys.executable, str(script), str(seconds), how, *overrides],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        watchdog = psutil.Process(int(process.stdout.readline()))
        started.append(watchdog)
        return process, watchdog

    yield begin
    for process in started:
        try:
            process.kill()
            process.wait()
        except psutil.NoSuchProcess:
            continue


def events(tmp_path, timeout_s=90.0):
    store, deadline = open_store(str(tmp_path / "runs")), time.monotonic() + timeout_s
    while not (found := read_events(store, "w", kinds=("hang",))) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


def test_a_hung_rank_is_dumped_and_killed(start, tmp_path):
    process, watchdog = start(1.0)
    assert process.wait(60) == -signal.SIGKILL
    [event] = events(tmp_path)
    assert event["rank"] == 1
    assert event["tokens"] == 4096
    assert event["phase"] == "training"
    assert event["silent_s"] >= 2.0
    stacks = Path(event["stacks"]).read_text()
    assert "stuck_in_a_read" in stacks
    assert reason_of([event]).startswith("hang: rank 1 made no progress for ")
    [stuck] = read_events(open_store(str(tmp_path / "runs")), "w", kinds=("stuck",))
    assert (stuck["rank"], stuck["beats"]) == (1, event["beats"])
    watchdog.wait(60)


def test_a_stopped_process_is_found_too(start, tmp_path):
    process, watchdog = start(600.0)
    time.sleep(0.5)
    process.send_signal(signal.SIGSTOP)
    assert process.wait(60) == -signal.SIGKILL
    [event] = events(tmp_path)
    assert "stopped" in event["process_state"]
    assert "rank.py" in Path(event["stacks"]).read_text()
    watchdog.wait(60)


def test_a_rank_that_lives_is_left_alone_and_its_watchdog_ends_with_it(start, tmp_path):
    process, watchdog = start(6.0, "close")
    assert process.wait(60) == 0
    watchdog.wait(10)
    assert read_events(open_store(str(tmp_path / "runs")), "w") == []


def test_the_watchdog_ends_when_its_rank_is_killed(start):
    process, watchdog = start(600.0)
    process.kill()
    process.wait()
    watchdog.wait(10)


def test_time_that_the_machine_stood_still_does_not_count(start, tmp_path):
    process, watchdog = start(600.0, timeout_s=3.0)
    time.sleep(0.5)
    # Both stop, as when a virtual machine is paused.
    watchdog.suspend()
    process.send_signal(signal.SIGSTOP)
    time.sleep(5.0)
    process.send_signal(signal.SIGCONT)
    watchdog.resume()
    time.sleep(2.0)
    assert process.poll() is None
    assert json.dumps(read_events(open_store(str(tmp_path / "runs")), "w")) == "[]"
