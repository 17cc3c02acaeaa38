"""A small real world: an S3 server, a Ray cluster of ours and a dataset on it, and jobs submitted as a user would."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nltrain.data import train_tokenizer
from nltrain.data.prepare import PrepareConfig, prepare, stdlib_corpus
from nltrain.local.cluster import LocalCluster
from nltrain.local.drill import QUIET_START_S
from nltrain.local.embedded_s3 import EmbeddedS3
from nltrain.local.processes import Owner, wait_gone
from nltrain.store import open_store

ROOT = Path(__file__).resolve().parents[2]
BUCKET = "nltrain-test"
SEQ_LEN = 1024
QUANTUM = 3 * SEQ_LEN  # two ranks, 2 and 1 sequences
SMALL = (
    "model.vocab_size=512",
    "model.width=32",
    "model.num_layers=1",
    "model.head_dim=16",
    "model.memory_hidden=16",
    "model.cms_hidden=96",
    f"data.seq_len={SEQ_LEN}",
    f"levels.quantum_tokens={QUANTUM}",
    f"levels.levels.base.period_tokens={QUANTUM}",
    f"levels.levels.fast.period_tokens={QUANTUM}",
    f"levels.levels.mid.period_tokens={4 * QUANTUM}",
    f"levels.levels.slow.period_tokens={16 * QUANTUM}",
    "levels.schedule.kind=constant",
    f"levels.schedule.warmup_tokens={4 * QUANTUM}",
    f"levels.fold_every_tokens={10 * QUANTUM}",
    f"checkpoint.every_tokens={10 * QUANTUM}",
    f"train.total_tokens={60 * QUANTUM}",
    f"train.validate_every_tokens={30 * QUANTUM}",
    "train.validation_sequences=5",
    "train.sample_tokens=8",
    "train.micro_batch_size=3",
    "track.log_every_quanta=1",
)


@dataclass
class World:
    """Where things are; `submit` runs a job and returns its run folder."""

    folder: Path
    s3: EmbeddedS3
    cluster: LocalCluster
    owner: Owner

    @property
    def corpus(self) -> str:
        # Odd on purpose: a key of S3 means itself.
        return f"s3://{BUCKET}/corpus #1"

    def submit(self, name: str, *overrides: str, short: bool = False) -> tuple[int, str]:
        """`ray job submit` of jobs/hope_tiny.py, small; (exit code, what it printed)."""
        ray = [str(Path(sys.executable).parent / "ray"), "job", "submit"]
        long = [*ray, "--working-dir", ".", "--", "python", "jobs/hope_tiny.py"]
        command = [
            *([*ray, "jobs/hope_tiny.py"] if short else long), f"name={name}", f"output={self.folder / name}",
            f"data.prefix={self.corpus}", f"checkpoint.url=s3://{BUCKET}/runs", *SMALL, *overrides,
        ]  # fmt: skip
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=self.cluster.client_environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return done.returncode, done.stdout

    def summary(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / name / "summary.json").read_text())


@contextmanager
def world(folder: Path) -> Iterator[World]:
    """Everything up; at the end everything down, and nothing of it left: that is asserted."""
    run_folder = folder / "world"
    (run_folder / "tmp").mkdir(parents=True)
    owner = Owner(run_folder)
    added = {"TMPDIR": str(owner.short / "tmp"), **owner.environment}
    slowness = 1.0
    before = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    tempfile.tempdir = None  # read TMPDIR again
    try:
        with EmbeddedS3(BUCKET) as s3, s3.in_environment():
            small_corpus(f"s3://{BUCKET}/corpus #1")
            began_s = time.monotonic()
            with LocalCluster(run_folder, owner, num_cpus=4, **s3.environment()) as cluster:
                slowness = max(1.0, (time.monotonic() - began_s) / QUIET_START_S)
                yield World(run_folder, s3, cluster, owner)
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        tempfile.tempdir = None
        left = wait_gone(owner.id, timeout_s=20 * slowness)
        owner.close()
    assert not left, f"processes left behind: {[(process.pid, process.cmdline()) for process in left]}"
    assert not owner.short.exists()


def small_corpus(url: str) -> None:
    """About 100,000 tokens of a 512-token vocabulary."""
    documents = [document for document in stdlib_corpus(max_bytes=250_000) if document.text.strip()]
    tokenizer = train_tokenizer([document.text for document in documents], vocab_size=512)
    prepare(documents, open_store(url), tokenizer, PrepareConfig(seq_len=SEQ_LEN, validation_fraction=0.1))
