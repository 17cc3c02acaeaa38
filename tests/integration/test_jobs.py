"""The job files, as a user starts them."""

import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def start(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=clean | environment, capture_output=True, text=True, timeout=600
    )


@pytest.mark.parametrize(("job", "parameters"), [("hope_1p3b", 1.3e9), ("hope_760m", 0.76e9)])
def test_a_dry_run_prints_the_plan_of_a_large_run_on_a_laptop(job, parameters, slowness):
    started_s = time.monotonic()
    done = start(f"jobs/{job}.py", "--dry-run")
    assert done.returncode == 0, done.stderr
    total = int(re.search(r"model: ([\d,]+) parameters", done.stdout)[1].replace(",", ""))
    assert abs(total / parameters - 1) <= 0.02
    assert time.monotonic() - started_s < 60 * slowness
    peak_kib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    assert peak_kib < 4 * 2**20
    for level in ("base", "fast", "mid", "slow"):
        assert re.search(rf"^{level} +[\d,]+ +[\d,]+ +[\d,]+", done.stdout, re.MULTILINE)
        assert re.search(rf"^{level}: decay 0.1 on [\d,]+ of [\d,]+ parameters; not on ", done.stdout, re.MULTILINE)
    assert re.search(r"^base: .*\*memories\.\* \([\d,]+\)", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("workers", [256, 512])
def test_the_recipes_for_more_gpus_give_every_gpu_a_sequence_in_one_micro_step(workers):
    done = start(f"jobs/hope_1p3b_{workers}.py", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert f"{workers} ranks (cuda)" in done.stdout
    assert f"1 micro-steps per quantum, of {4096 * workers:,} tokens" in done.stdout
    assert f"{workers} workers fit, {workers} train and 0 wait as spares" in done.stdout
    lr = 4e-4 * (workers / 128) ** 0.5
    assert re.search(rf"^base +[\d,]+ +{4096 * workers:,} .* {lr:.2g} ", done.stdout, re.MULTILINE)


def test_too_many_ranks_are_refused_with_the_ways_out():
    done = start("jobs/hope_1p3b.py", "--dry-run", "cluster.max_workers=256")
    assert done.returncode == 1
    for words in ("128 sequences", "256 ranks", "1048576", "hope_1p3b_256.py", "at most 2048 tokens"):
        assert words in done.stderr


def test_a_table_of_sizes_is_printed_by_command():
    done = start("-m", "nltrain.cli", "sizes", "jobs/hope_1p3b.py", "70", "train.micro_batch_size=1")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[2:]]
    assert len(rows) == 70 and rows[62][:4] == ["63", "43", "20", "3"]
    refused = start("-m", "nltrain.cli", "sizes", "jobs/none.py")
    assert refused.returncode == 1 and "jobs/none.py" in refused.stderr and "Traceback" not in refused.stderr


def test_a_dry_run_takes_overrides_and_refuses_what_cannot_run():
    done = start("jobs/hope_1p3b.py", "--dry-run", "levels.levels.slow.period_tokens=1000")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "slow" in done.stderr and "1000" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_cluster_a_job_says_how_to_start_it():
    done = start("jobs/hope_tiny.py")
    assert done.returncode == 1
    assert "RAY_ADDRESS is not set" in done.stderr and "ray job submit" in done.stderr


def test_a_cluster_that_does_not_answer_is_named():
    done = start("jobs/hope_tiny.py", RAY_ADDRESS="127.0.0.1:9")
    assert done.returncode == 1
    assert "RAY_ADDRESS=127.0.0.1:9" in done.stderr and "check the address" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_relative_place_means_the_folder_in_which_the_command_runs():
    done = start("jobs/hope_tiny.py", "checkpoint.url=runs/ckpt", "output=runs/x", "data.prefix=a, s3://b/c#2",
                 RAY_ADDRESS="127.0.0.1:9")  # fmt: skip
    assert f"in {ROOT}/runs/ckpt/hope-tiny; metrics, plots and summary in {ROOT}/runs/x" in done.stdout
    assert f"data from {ROOT}/a,s3://b/c#2;" in done.stdout
    assert "Traceback" not in done.stderr


# Every file of jobs/ but paper.py, which the entry points of the paper's runs import.
ENTRY_POINTS = sorted(job for job in (ROOT / "jobs").glob("*.py") if "__main__" in job.read_text())


@pytest.mark.parametrize("job", ENTRY_POINTS)
def test_a_job_can_be_executed_as_it_is(job: Path) -> None:
    assert os.access(job, os.X_OK)
    assert job.read_text().startswith("#!/usr/bin/env python\n")
