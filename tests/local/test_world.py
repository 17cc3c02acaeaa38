"""A world that cannot start leaves no process, no variable and no temporary file. Worlds that start: integration."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from nltrain.local import cluster
from nltrain.local.cluster import ClusterError
from nltrain.local.environment import added_to_environment
from nltrain.local.processes import owned, record_folder
from nltrain.local.world import LocalWorld

ROOT = Path(__file__).resolve().parents[2]


def test_a_world_whose_cluster_does_not_start_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "RAY", (sys.executable, "-c", "raise SystemExit('no Ray today')"))
    world, before = LocalWorld(tmp_path / "run", "bucket", 1, with_own_home=True, can_cut_store=True), dict(os.environ)
    with pytest.raises(ClusterError, match="no Ray today"), world:
        pass
    assert dict(os.environ) == before
    assert owned(world.owner.id) == []
    assert not world.owner.short.exists()
    assert list(record_folder(tmp_path / "run").glob("*.json")) == []
    assert not (tmp_path / "run" / "tmp").exists()
    assert not Path(world.s3.folder).exists()


def test_variables_are_added_and_taken_away_and_temporary_files_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ADDED", raising=False)
    before, folder = dict(os.environ), tempfile.gettempdir()
    with added_to_environment({"TMPDIR": str(tmp_path), "ADDED": "1"}):
        assert (os.environ["ADDED"], tempfile.gettempdir()) == ("1", str(tmp_path))
    assert (dict(os.environ), tempfile.gettempdir()) == (before, folder)


# A `ray start` that never ends, and a program that is interrupted as jobs/demo.py is.
STARTS = """
import signal, sys, time
from pathlib import Path
from nltrain.local import cluster
from nltrain.local.world import LocalWorld
cluster.RAY = (sys.executable, "-c", "import time; print('head', flush=True); time.sleep(600)")
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
with LocalWorld(Path(sys.argv[1]), "bucket", 1, can_cut_store=True):
    pass
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_world_that_is_interrupted_while_it_starts_leaves_nothing(tmp_path: Path, how: signal.Signals) -> None:
    folder = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-c", STARTS, str(folder)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    log, deadline = folder / "ray" / "head.log", time.monotonic() + 60
    while not (log.exists() and "head" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    [record] = record_folder(folder).glob("*.json")
    assert len(owned(record.stem)) == 2  # the S3 server and the head
    process.send_signal(how)
    assert process.wait(30) == (143 if how == signal.SIGTERM else -signal.SIGINT)
    assert owned(record.stem) == []
    assert not record.exists() and not (folder / "tmp").exists()
