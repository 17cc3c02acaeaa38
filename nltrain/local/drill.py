"""A small run on a cluster of several raylets on this machine, to lose nodes and workers of: for tests and benchmarks.

Everything is real: `ray start`, `ray job submit`, raylets, an S3 server behind a proxy that can be cut, the training
itself. Only the sizes are small. On leaving, every process is ended and the folder's Ray session is removed.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from nltrain.data import train_tokenizer
from nltrain.data.prepare import PrepareConfig, prepare, stdlib_corpus
from nltrain.errors import UserError
from nltrain.local.cluster import LocalCluster, LocalNode
from nltrain.local.embedded_s3 import EmbeddedS3
from nltrain.local.fault_proxy import FaultProxy
from nltrain.local.processes import Owner
from nltrain.store import open_store
from nltrain.track.metrics import read_rows
from nltrain.track.rows import Row

ROOT = Path(__file__).resolve().parents[2]
BUCKET = "drill"
SEQ_LEN = 64
QUANTUM = 768  # tokens: 12 sequences, which 1, 2, 3 and 4 ranks share evenly
CHECKPOINT_TOKENS = 8 * QUANTUM
VOCAB_SIZE = 512
OBJECT_STORE_BYTES = 100 << 20
# One raylet on two quiet cores; what takes longer measures how busy the machine is.
QUIET_START_S = 4.5

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


class Drill:
    """A head node without training CPUs is not modelled: each node, the head among them, has one CPU for one rank."""

    def __init__(self, folder: Path, num_nodes: int) -> None:
        self.folder, self.num_nodes = folder, num_nodes
        self.slowness = 1.0
        """How many times longer the cluster took to start than on a quiet machine; every wait is scaled by it."""
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True)
        self.owner = Owner(self.folder)
        self._stack.callback(self.owner.close)
        try:
            scratch = self.folder / "tmp"
            scratch.mkdir()
            self._stack.callback(shutil.rmtree, scratch, True)
            before = {name: os.environ.get(name) for name in ("TMPDIR", *self.owner.environment)}
            self._stack.callback(_restore, before)
            os.environ.update(TMPDIR=str(self.owner.short / "tmp"), **self.owner.environment)
            tempfile.tempdir = None  # read TMPDIR again
            s3 = self._stack.enter_context(EmbeddedS3(BUCKET))
            self.proxy = self._stack.enter_context(FaultProxy(s3.endpoint_url, probability=0.0, kinds=("reset",)))
            self.s3_environment = s3.environment() | dict.fromkeys(
                ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"), self.proxy.endpoint_url
            )
            before = {name: os.environ.get(name) for name in self.s3_environment}
            self._stack.callback(_restore, before)
            os.environ.update(self.s3_environment)
            _prepare(f"s3://{BUCKET}/corpus")
            began_s = time.monotonic()
            cluster = LocalCluster(self.folder, self.owner, 1, OBJECT_STORE_BYTES, **self.s3_environment)
            self.cluster = self._stack.enter_context(cluster)
            for _ in range(self.num_nodes - 1):
                self.cluster.add_node(1)
            self.slowness = max(1.0, (time.monotonic() - began_s) / (QUIET_START_S * self.num_nodes))
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self.cluster.remove_session_files()

    @property
    def nodes(self) -> list[LocalNode]:
        """The nodes beside the head, in the order they joined, those that were killed among them."""
        return self.cluster.nodes

    def submit(self, name: str, num_quanta: int, root: Path = ROOT, **overrides: Any) -> "Job":
        """`ray job submit` of jobs/hope_tiny.py below `root`, small, over all nodes; returns at once."""
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
        command = ["ray", "job", "submit", "--submission-id", job_id, "--working-dir", str(root), "--"]
        command += ["python", "jobs/hope_tiny.py", *(f"{key}={value}" for key, value in values.items())]
        return Job(self, job_id, output, self.folder / f"job-{name}-{number}.log", command)

    @contextlib.contextmanager
    def store_cut(self) -> Any:
        """Inside the with block every request to S3 is reset."""
        self.proxy.probability = 1.0
        try:
            yield
        finally:
            self.proxy.probability = 0.0

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


class Job:
    """A submitted job; its log streams into a file."""

    def __init__(self, drill: Drill, job_id: str, output: Path, log: Path, command: Sequence[str]) -> None:
        self.drill, self.id, self.output, self.log_path = drill, job_id, output, log
        self.submitted_s = time.time()
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ray.scripts.scripts", *command[1:]],
                env=drill.cluster.client_environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def rows(self, kind: str | None = None) -> list[Row]:
        return [row for row in read_rows(self.output) if kind in (None, row["kind"])]

    def tokens(self) -> int:
        """T of the last step row."""
        steps = self.rows("step")
        return steps[-1]["tokens"] if steps else 0

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
            ended = self._process.poll() is not None
            if value := condition():
                return value
            if ended or time.monotonic() > deadline:
                why = f"the job ended with {self._process.returncode}" if ended else f"not within {timeout_s:g} s"
                raise DrillError(f"{self.id}: {what}: {why}; its log ends with\n{self.log[-3000:]}")
            time.sleep(poll_s)

    def wait_for_tokens(self, tokens: int, timeout_s: float) -> int:
        return self.wait_until(f"T >= {tokens:,}", lambda: (t := self.tokens()) >= tokens and t, timeout_s)

    def wait_for_attempt(self, timeout_s: float, **values: Any) -> dict[str, Any]:
        """The newest attempt, once it has these values and has trained a step."""

        def trains() -> dict[str, Any] | None:
            attempts, steps = self.rows("attempt"), self.rows("step")
            last = attempts[-1] if attempts else None
            if last is None or any(last[name] != value for name, value in values.items()):
                return None
            after = [step for step in steps if step["attempt"] == last["attempt"]]
            return last.to_json() | {"first_step_s": after[0]["time_s"]} if after else None

        return self.wait_until(f"an attempt with {values}", trains, timeout_s)

    def wait(self, timeout_s: float) -> int:
        """The exit code of `ray job submit` once the job has ended."""
        timeout_s *= self.drill.slowness
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise DrillError(
                f"{self.id} did not end in {timeout_s:g} s; its log ends with\n{self.log[-3000:]}"
            ) from None

    def stop(self) -> None:
        """`ray job stop`, as a user types it."""
        self.drill.ray("job", "stop", self.id)


def planted(folder: Path, statement: str) -> Path:
    """The repository's code with a statement at the head of the training loop; the root to submit."""
    for name in ("nltrain", "kernels", "jobs"):
        shutil.copytree(ROOT / name, folder / "code" / name, ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / "code" / "nltrain" / "loop.py"
    head = "for quantum in run.quanta():\n"
    text = path.read_text()
    if text.count(head) != 1:
        raise DrillError(f"{path}: {head!r} stands there {text.count(head)} times; mend the drill")
    path.write_text(text.replace(head, f"{head}            {statement}\n"))
    return folder / "code"


# On a node that was added with BAD_NODE=1 a rank dies in its first quantum, without a word.
DIE_ON_BAD_NODE = "__import__('os').environ.get('BAD_NODE') and __import__('os')._exit(1)"


def _prepare(url: str) -> None:
    """About 0.4M tokens of the standard library's source."""
    documents = list(stdlib_corpus())[:60]
    tokenizer = train_tokenizer([text for _, text in documents[::3]], VOCAB_SIZE)
    prepare(documents, open_store(url), tokenizer, PrepareConfig(seq_len=SEQ_LEN, validation_fraction=0.05))


def _restore(before: dict[str, str | None]) -> None:
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    tempfile.tempdir = None
