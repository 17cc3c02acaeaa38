"""A world that cannot start leaves no process, no variable and no temporary file. Worlds that start: integration."""

import os
import sys
import tempfile
from pathlib import Path

import pytest

from nltrain.local import cluster
from nltrain.local.cluster import ClusterError
from nltrain.local.environment import added_to_environment
from nltrain.local.processes import owned, record_folder
from nltrain.local.world import LocalWorld


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
