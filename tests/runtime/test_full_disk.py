"""A disk that is really full, under the output and under the checkpoints: records may go, the run goes on."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nltrain.local.drill import QUANTUM
from tests.runtime.full_disk import FULL_DISK, MOUNT
from tests.runtime.test_going_on import QUANTA

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full_disk")
    for name in ("small", "disk"):
        (folder / name).mkdir()
    if not shutil.which("unshare") or subprocess.run([*FULL_DISK, MOUNT + "true", str(folder)]).returncode:
        pytest.skip("no mounts of one's own here")
    program = f"{sys.executable} -m tests.runtime.full_disk $0"
    done = subprocess.run([*FULL_DISK, MOUNT + program, str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "found.json").read_text())


def test_a_full_output_costs_records_and_not_the_run(found):
    run = found["run"]
    assert "metrics cannot be written" in run["said"] and "No space left on device" in run["said"]
    assert run["said"].count("metrics cannot be written") == 1
    assert "training goes on" in run["said"]
    assert run["tokens"][-1] == QUANTA * QUANTUM


def test_rows_that_were_written_before_are_whole(found):
    lines = found["run"]["rows"].splitlines()
    assert json.loads(lines[0])["kind"] == "attempt"
    assert all(json.loads(line)["attempt"] == 1 for line in lines)


def test_a_save_without_room_names_the_path_and_leaves_nothing(found):
    for tokens in ("300", "400"):
        assert "No space left on device" in found["fail"]["errors"][tokens]
        assert "tokens_000000000" + tokens in found["fail"]["errors"][tokens]
        assert found["fail"]["files"][tokens] == ["tokens_000000000100", "tokens_000000000200"]


def test_when_told_so_the_next_save_takes_the_room_of_the_last_but_one(found):
    made = found["make_room"]
    assert list(made["errors"]) == ["300"]
    assert made["files"]["300"] == ["tokens_000000000100", "tokens_000000000200"]
    assert made["files"]["400"] == ["tokens_000000000200", "tokens_000000000400"]
