"""What is local works whatever the user's environment says, and touches nothing of the user's."""

import ast
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from nltrain.local import environment
from nltrain.local.cluster import LocalCluster
from nltrain.local.embedded_s3 import EmbeddedS3
from nltrain.local.hostile import STRANGER, Trap, can_be_a_stranger, hostile, without_home
from nltrain.local.processes import Owner

ROOT = Path(__file__).resolve().parents[2]


def embedded_s3(variables: dict[str, str], *prefix: str) -> str:
    """What a program under these variables read back from its embedded S3, as its encoding could say it."""
    command = [*prefix, sys.executable, "-m", "nltrain.local.hostile"]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return ast.literal_eval(f'"{done.stdout.strip()}"')


def test_the_trap_notices_who_follows_the_environment():
    trap = Trap()
    try:
        with pytest.raises(urllib.error.HTTPError, match="418"):
            urllib.request.build_opener(urllib.request.ProxyHandler({"http": trap.url})).open("http://example.test/x")
        assert trap.requests == ["GET http://example.test/x HTTP/1.1"]
    finally:
        trap.close()


def test_the_embedded_s3_stays_here_whatever_the_environment_says(tmp_path):
    with hostile(tmp_path) as (_, variables):
        assert embedded_s3(variables) == "ö漢"


def test_it_stays_here_without_a_home_too(tmp_path):
    with hostile(tmp_path) as (_, variables):
        assert embedded_s3(without_home(variables)) == "ö漢"


@pytest.mark.skipif(not can_be_a_stranger(), reason="no user namespaces here")
def test_it_works_for_a_user_who_has_no_name(tmp_path):
    with hostile(tmp_path) as (_, variables):
        assert embedded_s3(without_home(variables), *STRANGER) == "ö漢"


def test_a_proxy_for_all_but_the_hosts_of_the_user_is_not_used_for_this_machine(monkeypatch):
    for given, wanted in (
        ("corp.example", "corp.example,127.0.0.1,localhost"),
        ("*", "*"),
        ("", "127.0.0.1,localhost"),
    ):
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.setenv("no_proxy", given)
        with EmbeddedS3() as server:
            assert server.environment()["no_proxy"] == server.environment()["NO_PROXY"] == wanted


def test_a_local_cluster_inherits_no_place_of_the_users(tmp_path, monkeypatch):
    with hostile(tmp_path / "home") as (trap, variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        folder = tmp_path / "run"
        folder.mkdir()
        owner = Owner(folder)
        try:
            cluster = LocalCluster(folder, owner, 1)
        finally:
            owner.close()
        found = cluster.environment
        assert not [name for name, value in found.items() if trap.url in value or str(tmp_path / "home") in value]
        assert not [name for name in found if name.startswith(("AWS_", "WANDB_", "GLOO_"))]
        assert "RAY_ADDRESS" not in found and "RAY_API_SERVER_ADDRESS" not in found
        assert found["RAY_AUTH_TOKEN_PATH"].startswith(str(folder))
        assert Path(found["HOME"]).is_relative_to(folder)


def test_links_for_sockets_go_where_there_is_a_writable_short_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "SHORT_FOLDERS", ("/nowhere", str(tmp_path)))
    assert environment.short_folder() == tmp_path
    monkeypatch.setattr(environment, "SHORT_FOLDERS", ("/nowhere",))
    with pytest.raises(environment.EnvironmentRefusedError, match="none of /nowhere is a writable folder"):
        environment.short_folder()
