"""The demo leaves nothing behind: after Ctrl-C, and after being killed outright and started again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from nltrain.local.processes import owned, reap_abandoned, record_folder, wait_gone

ROOT = Path(__file__).resolve().parents[2]


def demo_with_a_cluster_up(output: Path) -> subprocess.Popen[str]:
    """`make demo`'s program, at the moment when its S3 server and its Ray cluster are running."""
    process = subprocess.Popen(
        [sys.executable, "jobs/demo.py", "--output", str(output)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # As a terminal starts it: what runs in the background inherits a SIGINT that is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "Ray cluster up" in line:
            return process
    raise AssertionError(f"the demo ended early with {process.wait()}")


def owner_of(output: Path) -> str:
    (record,) = record_folder(output).glob("*.json")
    return record.stem


def test_ctrl_c_stops_everything_that_the_demo_started(tmp_path, slowness):
    process = demo_with_a_cluster_up(tmp_path / "demo")
    owner = owner_of(tmp_path / "demo")
    assert owned(owner)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=60 * slowness) == 130
    assert wait_gone(owner, timeout_s=5 * slowness) == []
    assert list(record_folder(tmp_path / "demo").glob("*.json")) == []


def test_what_a_killed_demo_left_is_ended_by_the_next_one(tmp_path):
    process = demo_with_a_cluster_up(tmp_path / "demo")
    owner = owner_of(tmp_path / "demo")
    process.kill()
    process.wait()
    time.sleep(1)
    assert owned(owner), "the Ray cluster should have outlived the demo: this test would show nothing"
    (line,) = reap_abandoned(tmp_path / "demo")
    assert f"pid {process.pid}" in line
    assert owned(owner) == []
    assert reap_abandoned(tmp_path / "demo") == []
