"""The job files, run as programs: one in a process of its own, the others in this one, which has imported torch."""

import os
import re
import resource
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nltrain import cli

ROOT = Path(__file__).resolve().parents[2]
LEVELS = ("base", "fast", "mid", "slow")


@pytest.fixture
def start(monkeypatch, capsys):
    """Runs a file of jobs/ with arguments, as `python jobs/...` does; (exit code, standard output, standard error)."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(ROOT)

    def run(job, *arguments):
        monkeypatch.setattr(sys, "argv", [f"jobs/{job}.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(f"jobs/{job}.py", run_name="__main__")
        return ended.value.code, *capsys.readouterr()

    return run


def is_the_plan_of(parameters, text):
    total = int(re.search(r"model: ([\d,]+) parameters", text)[1].replace(",", ""))
    assert abs(total / parameters - 1) <= 0.02
    for level in LEVELS:
        assert re.search(rf"^{level} +[\d,]+ +[\d,]+ +[\d,]+", text, re.MULTILINE)
        assert re.search(rf"^{level}: decay 0.1 on [\d,]+ of [\d,]+ parameters; not on ", text, re.MULTILINE)
    assert re.search(r"^base: .*\*memories\.\* \([\d,]+\)", text, re.MULTILINE)


def test_a_dry_run_prints_the_plan_of_the_largest_run_on_a_laptop(slowness):
    started_s = time.monotonic()
    command = [sys.executable, "jobs/hope_1p3b.py", "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    is_the_plan_of(1.3e9, done.stdout)
    assert time.monotonic() - started_s < 60 * slowness
    peak_kib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    assert peak_kib < 4 * 2**20


def test_a_dry_run_prints_the_plan_of_the_smaller_one(start):
    code, out, err = start("hope_760m", "--dry-run")
    assert code == 0, err
    is_the_plan_of(0.76e9, out)


@pytest.mark.parametrize("workers", [256, 512])
def test_the_recipes_for_more_gpus_give_every_gpu_a_sequence_in_one_micro_step(start, workers):
    code, out, err = start(f"hope_1p3b_{workers}", "--dry-run")
    assert code == 0, err
    assert f"{workers} ranks (cuda)" in out
    assert f"1 micro-steps per quantum, of {4096 * workers:,} tokens" in out
    assert f"{workers} workers fit, {workers} train and 0 wait as spares" in out
    lr = 4e-4 * (workers / 128) ** 0.5
    assert re.search(rf"^base +[\d,]+ +{4096 * workers:,} .* {lr:.2g} ", out, re.MULTILINE)


def test_too_many_ranks_are_refused_with_the_ways_out(start):
    code, _, err = start("hope_1p3b", "--dry-run", "cluster.max_workers=256")
    assert code == 1
    for words in ("128 sequences", "256 ranks", "1048576", "hope_1p3b_256.py", "at most 2048 tokens"):
        assert words in err


def test_a_table_of_sizes_is_printed_by_command(capsys):
    assert cli.main(["sizes", "jobs/hope_1p3b.py", "70", "train.micro_batch_size=1"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert len(rows) == 70 and rows[62][:4] == ["63", "43", "20", "3"]
    assert cli.main(["sizes", "jobs/none.py"]) == 1
    assert "jobs/none.py" in capsys.readouterr().err


def test_a_dry_run_takes_overrides_and_refuses_what_cannot_run(start):
    code, _, err = start("hope_1p3b", "--dry-run", "levels.levels.slow.period_tokens=1000")
    assert code == 1
    assert err.startswith("error: ")
    assert "slow" in err and "1000" in err


def test_without_a_cluster_a_job_says_how_to_start_it(start):
    code, _, err = start("hope_tiny")
    assert code == 1
    assert "RAY_ADDRESS is not set" in err and "ray job submit" in err


def test_a_cluster_that_does_not_answer_is_named(start, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    code, _, err = start("hope_tiny")
    assert code == 1
    assert "RAY_ADDRESS=127.0.0.1:9" in err and "check the address" in err


def test_a_relative_place_means_the_folder_in_which_the_command_runs(start, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    places = ("checkpoint.url=runs/ckpt", "output=runs/x", "data.prefix=a, s3://b/c#2")
    _, out, _ = start("hope_tiny", *places)
    assert f"in {ROOT}/runs/ckpt/hope-tiny; metrics, plots and summary in {ROOT}/runs/x" in out
    assert f"data from {ROOT}/a,s3://b/c#2;" in out


# Every file of jobs/ but paper.py, which the entry points of the paper's runs import.
ENTRY_POINTS = sorted(job for job in (ROOT / "jobs").glob("*.py") if "__main__" in job.read_text())


@pytest.mark.parametrize("job", ENTRY_POINTS)
def test_a_job_can_be_executed_as_it_is(job: Path) -> None:
    assert os.access(job, os.X_OK)
    assert job.read_text().startswith("#!/usr/bin/env python\n")
