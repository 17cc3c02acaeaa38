"""What a job says before a cluster is asked for anything."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from jobs.hope_tiny import config as tiny
from nltrain.runtime.config import ClusterConfig
from nltrain.runtime.failures import Failure, Verdict
from nltrain.runtime.launch import _reason

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("max_workers", 0, "cluster.max_workers=0: must be at least 1"),
        ("min_workers", 3, "cluster.min_workers=3: must lie between 1 and cluster.max_workers=2"),
        ("hang_timeout_s", 0.0, "cluster.hang_timeout_s=0.0: must be positive"),
        ("max_failures", -2, "cluster.max_failures=-2: must be -1 (no limit) or more"),
        ("max_same_failures", 1, "cluster.max_same_failures=1: must be 2 or more"),
        ("slow_phase_timeout_s", 10.0, "cluster.slow_phase_timeout_s=10.0: must not be below"),
    ],
)
def test_an_impossible_setting_is_refused_by_name_and_value(field, value, words):
    with pytest.raises(ValueError) as error:
        dataclasses.replace(ClusterConfig(), **{field: value})
    assert str(error.value).startswith(words)


def test_a_group_is_elastic_only_where_it_may_shrink():
    assert not ClusterConfig(max_workers=2).elastic
    assert not ClusterConfig(max_workers=2, min_workers=2).elastic
    assert ClusterConfig(max_workers=2, min_workers=1).elastic


def test_a_job_without_a_cluster_says_how_it_is_started():
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "jobs/hope_tiny.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    [line] = done.stderr.strip().splitlines()
    assert line.startswith("error: RAY_ADDRESS is not set: start this file with `ray job submit")


def test_an_overtaken_job_is_not_told_to_be_submitted_again():
    text = (
        "rank 0: StaleAttemptError: attempt 1 of run r is stale: attempt 2 has begun; this process must stop (run.py:1)"
    )
    overtaken = (Failure("error", text, "StaleAttemptError"), Verdict(False, "no restart would cure it"))
    reason = _reason(tiny, SimpleNamespace(verdict=overtaken), RuntimeError())
    assert "attempt 2 has begun" in reason and "The newer attempt goes on" in reason
    assert "submit the same job again" not in reason
