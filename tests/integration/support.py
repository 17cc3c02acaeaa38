"""A small real world: an S3 server, a Ray cluster of ours and a dataset on it, and jobs submitted as a user would."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nltrain.data import train_tokenizer
from nltrain.data.prepare import PrepareConfig, prepare, stdlib_corpus
from nltrain.local.processes import wait_gone
from nltrain.local.world import LocalWorld
from nltrain.store import open_store

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


class World(LocalWorld):
    """A world with a small dataset at `corpus`; `run` submits a run of it."""

    corpus = f"s3://{BUCKET}/corpus #1"
    """Odd on purpose: a key of S3 means itself."""

    def run(self, name: str, *overrides: str, short: bool = False) -> tuple[int, str]:
        """`ray job submit` of jobs/hope_tiny.py, small; (exit code, what it printed)."""
        values = (
            f"name={name}", f"output={self.folder / name}", f"data.prefix={self.corpus}",
            f"checkpoint.url=s3://{BUCKET}/runs", *SMALL, *overrides,
        )  # fmt: skip
        entrypoint = ["jobs/hope_tiny.py", *values] if short else ["python", "jobs/hope_tiny.py", *values]
        number = len(list(self.folder.glob(f"job-{name}-*.log")))
        job = self.submit(entrypoint, self.folder / f"job-{name}-{number}.log", with_working_dir=not short)
        return job.wait(), job.log

    def summary(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / name / "summary.json").read_text())


@contextmanager
def raylet_of_another_cluster() -> Iterator[None]:
    """A process that Ray takes for the raylet of another cluster on this machine; nothing answers at its address."""
    command = ["raylet", "-c", "import time; time.sleep(3600)", "--gcs-address=127.0.0.1:1"]
    process = subprocess.Popen(command, executable=sys.executable)
    try:
        yield
    finally:
        process.kill()
        process.wait()


@contextmanager
def world(folder: Path) -> Iterator[World]:
    """Everything up, beside another cluster; at the end everything down, and nothing of it left: that is asserted."""
    with raylet_of_another_cluster(), World(folder / "world", BUCKET, num_cpus=4) as here:
        small_corpus(here.corpus)
        yield here
        here.stop()
        left = wait_gone(here.owner.id, timeout_s=20 * here.slowness)
        assert not left, f"processes left behind: {[(process.pid, process.cmdline()) for process in left]}"
    assert not here.owner.short.exists()


def small_corpus(url: str) -> None:
    """About 100,000 tokens of a 512-token vocabulary."""
    documents = [document for document in stdlib_corpus(max_bytes=250_000) if document.text.strip()]
    tokenizer = train_tokenizer([document.text for document in documents], vocab_size=512)
    prepare(documents, open_store(url), tokenizer, PrepareConfig(seq_len=SEQ_LEN, validation_fraction=0.1))
