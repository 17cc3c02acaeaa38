"""A job's log is what `ray job submit` prints, also where it submits nothing; and only what this job has printed."""

from pathlib import Path

from nltrain.local.cluster import LocalCluster
from nltrain.local.job import Job
from nltrain.local.processes import Owner
from nltrain.local.world import submit_arguments


def test_the_log_and_the_lines_of_a_job_are_its_own_and_it_ends_with_an_exit_code(tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    log.write_text("an earlier job\n")
    (tmp_path / "run").mkdir()
    owner = Owner(tmp_path / "run")
    try:
        # A cluster that has not been started: nothing answers at its address.
        environment = LocalCluster(tmp_path / "run", owner, 1).client_environment
        job = Job(submit_arguments(["python", "nothing.py"]), tmp_path, log, environment)
        lines = list(job.lines())
    finally:
        owner.close()
    assert job.exit_code == job.wait() != 0
    assert "Failed to connect" in job.log and "earlier" not in job.log
    assert "".join(lines) == job.log
    assert all(line.endswith("\n") for line in lines[:-1])
    assert log.read_text() == "an earlier job\n" + job.log


def test_a_job_gets_the_folder_of_the_command_unless_it_is_to_run_where_the_cluster_does() -> None:
    assert submit_arguments(["python", "a.py"], "id-1") == [
        "--submission-id", "id-1", "--working-dir", ".", "--", "python", "a.py",
    ]  # fmt: skip
    assert submit_arguments(["jobs/a.py", "x=1"], with_working_dir=False) == ["jobs/a.py", "x=1"]
