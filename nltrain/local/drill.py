"""Small runs on a cluster of several raylets on this machine, whose nodes and ranks can be killed.

Everything is real: `ray start`, `ray job submit`, raylets, an S3 server behind a proxy that can be cut, the training.
Only the sizes are small. On leaving, every process is ended and the folder's Ray session is removed.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from nltrain.data import train_tokenizer
from nltrain.data.prepare import PrepareConfig, prepare, stdlib_corpus
from nltrain.errors import UserError
from nltrain.local.cluster import LocalNode
from nltrain.local.job import Job
from nltrain.local.world import ROOT, LocalWorld, submit_arguments
from nltrain.store import open_store
from nltrain.track.metrics import RowsReader
from nltrain.track.rows import AttemptRow, Row, StepRow, of_kind

BUCKET = "drill"
SEQ_LEN = 64
QUANTUM = 768  # tokens: 12 sequences, which 1, 2, 3 and 4 ranks share evenly
CHECKPOINT_TOKENS = 8 * QUANTUM
VOCAB_SIZE = 512
OBJECT_STORE_BYTES = 100 << 20
# A line of the training loop (nltrain/loop.py), for `planted`.
FIRST_OF_A_QUANTUM = "for batch in run.micro_batches(quantum):"

SMALL = {
    "model.width": 32,
    "model.num_layers": 1,
    "model.head_dim": 16,
    "model.memory_hidden": 16,
    "model.cms_hidden": 96,
    "model.vocab_size": VOCAB_SIZE,
    "data.seq_len": SEQ_LEN,
    "levels.quantum_tokens": QUANTUM,
    "levels.levels.base.period_tokens": QUANTUM,
    "levels.levels.fast.period_tokens": QUANTUM,
    "levels.levels.mid.period_tokens": 4 * QUANTUM,
    "levels.levels.slow.period_tokens": 16 * QUANTUM,
    "levels.schedule.warmup_tokens": 4 * QUANTUM,
    "levels.fold_every_tokens": CHECKPOINT_TOKENS,
    "checkpoint.every_tokens": CHECKPOINT_TOKENS,
    "train.micro_batch_size": 4,
    "track.log_every_quanta": 1,
    "train.validate_every_tokens": 0,
    "train.validation_sequences": 4,
    "train.sample_tokens": 4,
    "train.reference_max_tokens": 0,
    "track.wandb": "off",
}


class DrillError(UserError, RuntimeError):
    """What was waited for did not happen; the message says what, and ends with the job's log."""


class Drill(LocalWorld):
    """A LocalWorld with a small dataset. Each node, the head among them, has one CPU for one rank."""

    def __init__(self, folder: Path, num_nodes: int) -> None:
        super().__init__(
            folder, BUCKET, 1, num_nodes=num_nodes, object_store_bytes=OBJECT_STORE_BYTES, can_cut_store=True
        )

    def __enter__(self) -> Self:
        super().__enter__()
        try:
            _prepare(f"s3://{BUCKET}/corpus")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self.cluster.remove_session_files()

    def train(self, name: str, num_quanta: int, root: Path = ROOT, **overrides: Any) -> "TrainingJob":
        """Submit jobs/hope_tiny.py below `root`, small, over all nodes; returns at once."""
        output = self.folder / f"out-{name}"
        number = len(list(self.folder.glob(f"job-{name}-*.log"))) + 1
        total_tokens = num_quanta * QUANTUM
        values = SMALL | {
            "name": name,
            "output": output,
            "data.prefix": f"s3://{BUCKET}/corpus",
            "data.cache_dir": self.folder / "cache",
            "checkpoint.url": f"s3://{BUCKET}/runs",
            "train.total_tokens": total_tokens,
            "levels.schedule.total_tokens": total_tokens,
            "cluster.max_workers": self.num_nodes,
            "cluster.min_workers": 1,
            "cluster.placement": "SPREAD",
            "cluster.resize_check_s": 10,
            "cluster.group_start_timeout_s": 15,
        }
        values |= {key.replace("__", "."): value for key, value in overrides.items()}
        job_id = f"{name}-{number}-{self.owner.id[:6]}"
        entrypoint = ["python", "jobs/hope_tiny.py", *(f"{key}={value}" for key, value in values.items())]
        return TrainingJob(self, job_id, output, entrypoint, root, self.folder / f"job-{name}-{number}.log")

    def ray(self, *arguments: str, timeout_s: float = 180.0) -> str:
        """The output of a `ray` command against this cluster. Raises DrillError where it fails."""
        done = subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", *arguments],
            env=self.cluster.client_environment,
            capture_output=True,
            text=True,
            timeout=timeout_s * self.slowness,
        )
        if done.returncode:
            raise DrillError(f"ray {' '.join(arguments)}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        return done.stdout

    def drain(self, node: LocalNode, grace_s: int) -> None:
        """A preemption notice for the node, as a cloud gives it: it goes in `grace_s` seconds."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node"]
        command += [f"--address=127.0.0.1:{self.cluster.port}", f"--node-id={node.node_id}"]
        command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=drill"]
        command += [f"--deadline-remaining-seconds={grace_s}"]
        done = subprocess.run(command, env=self.cluster.environment, capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise DrillError(f"drain-node: {done.stdout[-2000:]}{done.stderr[-2000:]}")


class TrainingJob(Job):
    """A submitted training run of a drill. Every wait is scaled by the drill's slowness."""

    def __init__(
        self, drill: Drill, job_id: str, output: Path, entrypoint: Sequence[str], root: Path, log: Path
    ) -> None:
        """output: the folder that the run writes to; root: the folder of the code to submit."""
        self.drill, self.id, self.output = drill, job_id, output
        self._rows = RowsReader(output)
        super().__init__(submit_arguments(entrypoint, job_id), root, log, drill.cluster.client_environment)

    def rows(self, kind: str | None = None) -> list[Row]:
        """The rows that the run has written, in order; only those of `kind` where one is given."""
        return [row for row in self._rows.read() if kind in (None, row["kind"])]

    def tokens(self) -> int:
        """T of the last step row."""
        return next((row.tokens for row in reversed(of_kind(self._rows.read(), StepRow))), 0)

    def ranks(self) -> dict[int, dict[str, Any]]:
        """{rank: {pid, attempt, ...}} of the newest attempt."""
        found = [json.loads(path.read_text()) for path in sorted((self.output / "ranks").glob("rank_*.json"))]
        newest = max(entry["attempt"] for entry in found)
        return {entry["rank"]: entry for entry in found if entry["attempt"] == newest}

    def kill_rank(self, rank: int, how: int = signal.SIGKILL) -> int:
        """Send a signal to a rank's process; returns its pid."""
        pid = int(self.ranks()[rank]["pid"])
        os.kill(pid, how)
        return pid

    def wait_until(self, what: str, condition: Callable[[], Any], timeout_s: float, poll_s: float = 0.25) -> Any:
        """The first true value of `condition`. Raises DrillError when the job ends or the time is over before."""
        timeout_s *= self.drill.slowness
        deadline = time.monotonic() + timeout_s
        while True:
            ended = self.exit_code is not None
            if value := condition():
                return value
            if ended or time.monotonic() > deadline:
                why = f"the job ended with {self.exit_code}" if ended else f"not within {timeout_s:g} s"
                raise DrillError(f"{self.id}: {what}: {why}; its log ends with\n{self.log[-3000:]}")
            time.sleep(poll_s)

    def wait_for_tokens(self, tokens: int, timeout_s: float) -> int:
        """T, once the run has trained `tokens`. Raises DrillError as wait_until does."""
        return self.wait_until(f"T >= {tokens:,}", lambda: (t := self.tokens()) >= tokens and t, timeout_s)

    def wait_for_attempt(self, timeout_s: float, **values: Any) -> dict[str, Any]:
        """The newest attempt, once it has these values and has trained a step."""

        def trains() -> dict[str, Any] | None:
            rows = self._rows.read()
            last = next(iter(reversed(of_kind(rows, AttemptRow))), None)
            if last is None or any(last[name] != value for name, value in values.items()):
                return None
            first = next((step for step in of_kind(rows, StepRow) if step.attempt == last.attempt), None)
            return last.to_json() | {"first_step_s": first.time_s} if first else None

        return self.wait_until(f"an attempt with {values}", trains, timeout_s)

    def wait(self, timeout_s: float | None = None) -> int:
        """The exit code, once the job has ended. Raises DrillError where it does not end within `timeout_s`."""
        try:
            return super().wait(timeout_s and timeout_s * self.drill.slowness)
        except subprocess.TimeoutExpired as error:
            raise DrillError(
                f"{self.id} did not end in {error.timeout:g} s; its log ends with\n{self.log[-3000:]}"
            ) from None

    def stop(self) -> None:
        """`ray job stop`, as a user types it."""
        self.drill.ray("job", "stop", self.id)


def planted(folder: Path, statement: str, before: str = FIRST_OF_A_QUANTUM) -> Path:
    """A copy of the code with a statement before a line of the training loop; returns the root to submit."""
    for name in ("nltrain", "kernels", "jobs"):
        shutil.copytree(ROOT / name, folder / "code" / name, ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / "code" / "nltrain" / "loop.py"
    lines = path.read_text().splitlines(keepends=True)
    places = [index for index, line in enumerate(lines) if line.strip() == before]
    if len(places) != 1:
        raise DrillError(f"{path}: the line {before!r} stands there {len(places)} times; adapt the drill")
    margin = lines[places[0]].partition(before)[0]
    lines.insert(places[0], textwrap.indent(statement, margin) + "\n")
    path.write_text("".join(lines))
    return folder / "code"


# On a node that was added with BAD_NODE=1 a rank dies in its first quantum, without a word.
DIE_ON_BAD_NODE = "__import__('os').environ.get('BAD_NODE') and __import__('os')._exit(1)"


def _prepare(url: str) -> None:
    """About 0.4M tokens of the standard library's source."""
    documents = list(stdlib_corpus())[:60]
    tokenizer = train_tokenizer([text for _, text in documents[::3]], VOCAB_SIZE)
    prepare(documents, open_store(url), tokenizer, PrepareConfig(seq_len=SEQ_LEN, validation_fraction=0.05))
