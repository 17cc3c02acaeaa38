"""What is local works whatever the user's environment says, and touches nothing of the user's."""

import ast
import dataclasses
import json
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from jobs.hope_tiny import config as tiny
from nltrain.config import override
from nltrain.data.manifest import read_manifest
from nltrain.errors import ConfigError
from nltrain.local import environment
from nltrain.local.cluster import LocalCluster
from nltrain.local.demo import Demo, DemoError, quick
from nltrain.local.embedded_s3 import EmbeddedS3
from nltrain.local.hostile import STRANGER, Trap, can_be_a_stranger, hostile, without_home
from nltrain.local.processes import Owner
from nltrain.store import open_store

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


def test_preparing_without_a_cluster_works_there_too(tmp_path):
    """Its own Ray, a temporary folder too deep for sockets, a user without name and home, a comma in the path."""
    deep = tmp_path / ("d" * 100)
    corpus = tmp_path / "a, b"
    for folder in (deep, corpus):
        folder.mkdir()
    for number in range(6):
        (corpus / f"{number}.txt").write_text(f"text number {number}, ö漢 and so on. " * 200, encoding="utf-8")
    prefix = STRANGER if can_be_a_stranger() else ()
    with hostile(tmp_path / "home") as (_, variables):
        del variables["RAY_ADDRESS"]  # a cluster that is named is meant
        done = subprocess.run(
            [*prefix, sys.executable, "jobs/prepare_shards.py", f"input={json.dumps([str(corpus)])}",
             f"output={tmp_path}/out", "vocab_size=300", "prepare.seq_len=64", "workers=1"],
            cwd=ROOT, env=without_home(variables) | {"TMPDIR": str(deep)}, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert read_manifest(open_store(f"{tmp_path}/out")).splits["train"].num_documents > 0
    assert list(deep.iterdir()) == []


def test_links_for_sockets_go_where_there_is_a_writable_short_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "SHORT_FOLDERS", ("/nowhere", str(tmp_path)))
    assert environment.short_folder() == tmp_path
    monkeypatch.setattr(environment, "SHORT_FOLDERS", ("/nowhere",))
    with pytest.raises(environment.EnvironmentRefusedError, match="none of /nowhere is a writable folder"):
        environment.short_folder()


@pytest.mark.parametrize("seq_len", [256, 1024])
def test_the_quick_form_fits_whatever_numbers_the_job_has(seq_len):
    job = override(
        tiny,
        [
            f"data.seq_len={seq_len}",
            f"levels.quantum_tokens={8 * seq_len}",
            *(f"levels.levels.{name}.period_tokens={8 * seq_len * times}"
              for name, times in (("base", 1), ("fast", 1), ("mid", 4), ("slow", 16))),
            f"levels.fold_every_tokens={80 * seq_len}",
            f"checkpoint.every_tokens={80 * seq_len}",
        ],
    )  # fmt: skip
    short = override(job, quick(job))
    assert short.train.total_tokens <= 100_000
    assert [level.period_tokens // short.quantum_tokens for level in short.levels.levels] == [1, 1, 4, 16]
    # The kill comes at half of the tokens: by then there is something to resume from.
    assert short.checkpoint.every_tokens < short.train.total_tokens // 2
    assert dataclasses.replace(short.model) == job.model


def test_the_demo_says_at_once_what_cannot_be(tmp_path):
    with pytest.raises(DemoError, match=r"--corpus .*nothing: no such file or folder"):
        Demo(ROOT, tmp_path / "run", tmp_path / "nothing").run()
    (tmp_path / "run" / "text").mkdir(parents=True)
    with pytest.raises(DemoError, match=r"--corpus .*text: lies in the run's folder, which is renamed"):
        Demo(ROOT, tmp_path / "run", tmp_path / "run" / "text").run()
    with pytest.raises(ConfigError, match=r"train\.total_toks: no such field; did you mean total_tokens"):
        Demo(ROOT, tmp_path / "run", overrides=["train.total_toks=3"])
    assert (tmp_path / "run" / "text").exists()


def test_settings_of_preparing_reach_it_and_the_others_the_job():
    demo = Demo(ROOT, Path("/nowhere"), overrides=["prepare.max_bad_fraction=0.5", "train.seed=3"])
    assert demo._prepare == ["prepare.max_bad_fraction=0.5"]
    assert demo._overrides == ["train.seed=3"]
