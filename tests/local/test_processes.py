"""Processes of ours are found by what they inherited, ended whatever they do about it, and never left behind."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from nltrain.local.processes import Owner, owned, reap_abandoned, record_folder, wait_gone

IGNORES_SIGTERM = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
)


def start(program, environment, **options):
    process = subprocess.Popen(
        [sys.executable, "-c", program], env=os.environ | environment, stdout=subprocess.PIPE, text=True, **options
    )
    assert process.stdout.readline().strip() == "up"
    return process


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def test_a_daemon_that_left_its_parent_and_ignores_sigterm_is_found_and_ended(folder):
    owner = Owner(folder)
    daemon = (
        "import subprocess, sys; "
        f"p = subprocess.Popen([sys.executable, '-c', {IGNORES_SIGTERM!r}], start_new_session=True, "
        "stdout=subprocess.PIPE, text=True); p.stdout.readline(); print('up', flush=True)"
    )
    parent = start(daemon, owner.environment)
    parent.wait(10)
    [orphan] = owner.processes()
    owner.close(grace_s=1.0)
    assert not psutil.pid_exists(orphan.pid) or orphan.status() == psutil.STATUS_ZOMBIE
    assert owned(owner.id) == []
    assert not owner.short.exists()
    assert list(record_folder(folder).glob("*.json")) == []


def test_processes_of_others_are_left_alone(folder):
    owner = Owner(folder)
    other = start("import time; print('up', flush=True); time.sleep(600)", {})
    try:
        owner.close()
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_what_a_killed_orchestrator_left_is_ended_by_the_next_one(folder):
    program = (
        "import os, subprocess, sys, time; from pathlib import Path; from nltrain.local.processes import Owner; "
        f"owner = Owner(Path({str(folder)!r})); "
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], env=os.environ | owner.environment, "
        "start_new_session=True); print('up', flush=True); time.sleep(600)"
    )
    orchestrator = start(program, {})
    [record] = record_folder(folder).glob("*.json")
    owner_id = record.stem
    deadline = time.monotonic() + 10
    while not (left := owned(owner_id)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(left) == 1
    assert reap_abandoned(folder) == []  # it still lives
    orchestrator.send_signal(signal.SIGKILL)
    orchestrator.wait()
    [line] = reap_abandoned(folder)
    assert line == f"an earlier run (pid {orchestrator.pid}) was killed: 1 of its processes ended now"
    assert wait_gone(owner_id, 5.0) == []
    assert reap_abandoned(folder) == []
