"""A job that is started without a cluster works on this machine alone; one that names a cluster does not."""

import json
import os
import subprocess
import sys
from pathlib import Path

from nltrain.data.manifest import read_manifest
from nltrain.local.hostile import STRANGER, can_be_a_stranger, hostile, without_home
from nltrain.store import open_store

ROOT = Path(__file__).resolve().parents[2]


def test_preparing_without_a_cluster_works_whatever_the_environment_says(tmp_path):
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


def test_preparing_at_a_cluster_that_is_not_there_is_one_line(tmp_path):
    (tmp_path / "a.txt").write_text("some text " * 500)
    command = [sys.executable, "jobs/prepare_shards.py", f"input={tmp_path}/a.txt", f"output={tmp_path}/out"]
    done = subprocess.run(
        [*command, "vocab_size=300"],
        cwd=ROOT,
        env=os.environ | {"RAY_ADDRESS": "127.0.0.1:9"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "no Ray cluster answers at RAY_ADDRESS=127.0.0.1:9" in line and "Traceback" not in done.stderr
