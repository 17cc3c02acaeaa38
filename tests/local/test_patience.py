"""Ray on a busy machine: a start is waited for and said, tried again, and what stays broken is one line."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray._private import services

from nltrain.local import cluster as local
from nltrain.local import patience
from nltrain.local.cluster import ClusterError, LocalCluster
from nltrain.local.processes import Owner
from nltrain.network import why_unreachable

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def start_raylet(tmp_path):
    """Starts a process of that name below this one; clusters of other tests may have theirs."""
    shutil.copy(shutil.which("sleep"), tmp_path / "raylet")
    started = []

    def start():
        started.append(subprocess.Popen([tmp_path / "raylet", "60"]))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def listed_after(seconds):
    """Ray's question for its node, answered once the node is listed."""
    began_s = time.monotonic()

    def get_node(address, node_id):
        if time.monotonic() - began_s < seconds:
            raise RuntimeError(f"No node found with {node_id}")
        return {"node_id": node_id, "address": address}

    return get_node


def test_a_node_is_waited_for_as_long_as_its_raylet_lives_and_the_wait_is_said(start_raylet, monkeypatch, capsys):
    monkeypatch.setattr(services, "get_node", listed_after(1.0))
    monkeypatch.setattr(patience, "SAY_EVERY_S", 0.2)
    patience.be_patient()
    patience.be_patient()
    start_raylet()
    assert services.get_node("here", "n1") == {"node_id": "n1", "address": "here"}
    assert "Ray is starting, " in capsys.readouterr().out


def test_a_node_whose_raylet_has_ended_is_not_waited_for(start_raylet, monkeypatch):
    monkeypatch.setattr(services, "get_node", listed_after(30.0))
    patience.be_patient()
    raylet = start_raylet()
    raylet.kill()
    raylet.wait()
    began_s = time.monotonic()
    with pytest.raises(RuntimeError, match="No node found"):
        services.get_node("here", "n1")
    assert time.monotonic() - began_s < 10


def test_the_wait_has_an_end(start_raylet, monkeypatch):
    monkeypatch.setattr(services, "get_node", listed_after(30.0))
    patience.be_patient(limit_s=0.5)
    start_raylet()
    with pytest.raises(RuntimeError, match="No node found"):
        services.get_node("here", "n1")


def test_ray_asks_for_its_node_where_we_answer():
    source = Path(sys.modules["ray"].__file__).parent / "_private" / "node.py"
    assert "ray._private.services.get_node(" in source.read_text()


def test_a_cluster_that_does_not_start_is_tried_again_and_then_told_in_one_line(tmp_path, monkeypatch, capsys):
    program = "print('Traceback ...'); raise SystemExit('The current node timed out during startup.')"
    monkeypatch.setattr(local, "RAY", (sys.executable, "-c", program))
    owner = Owner(tmp_path)
    try:
        with pytest.raises(ClusterError) as error, LocalCluster(tmp_path, owner, 1):
            pass
    finally:
        owner.close()
    assert "ended while starting (The current node timed out during startup.); see " in str(error.value)
    assert "\n" not in str(error.value)
    said = capsys.readouterr().out
    assert "try 2 of 3" in said and "try 3 of 3" in said


def test_addresses_that_name_no_place_are_left_to_ray():
    assert why_unreachable("auto", 1.0) == ""
    assert "refused" in why_unreachable("http://127.0.0.1:9/", 1.0)
    assert why_unreachable("127.0.0.1:port", 1.0)
