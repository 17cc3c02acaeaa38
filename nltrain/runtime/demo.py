"""The demo as a machine sees it: S3, cluster, data, job, one planted kill, summary; and all of it stopped again."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nltrain.data.corpus import stdlib_corpus
from nltrain.data.embedded_s3 import EmbeddedS3
from nltrain.runtime.local import LocalCluster
from nltrain.runtime.processes import Owner, reap_abandoned
from nltrain.track.metrics import FOLDER, log_fault, tail
from nltrain.track.report import write_report

BUCKET = "nltrain-demo"
COLOUR = re.compile(r"\x1b\[\d*m")
WORKER_PREFIX = re.compile(r"^\(RayTrainWorker[^)]*\) ?")
OF_RAY = re.compile(
    r"^(\([A-Za-z][^)]*\)|[\d-]{10} [\d:,]+\s+(INFO|SUCC|WARNING)|Running entrypoint|[a-z_]+(\.\w+)* = )"
)
NOISE = re.compile(r"^(Setting up process group|DeepSpeed .* built|\[.*W\d* )")
DISK_NEEDED_BYTES = 2 * 2**30


class DemoError(RuntimeError):
    """The demo fell short of what it shows; the message says of what."""


class Demo:
    """`folder` receives everything; an older folder of that name is kept under another name."""

    def __init__(self, root: Path, folder: Path, corpus: Path | None = None, overrides: Sequence[str] = ()) -> None:
        self.root, self.folder, self.corpus, self.overrides = root, folder, corpus, list(overrides)

    def run(self) -> dict[str, Any]:
        """The whole demo; returns the summary. Raises DemoError."""
        self._check_machine()
        for line in reap_abandoned(self.folder):
            _say(line)
        _keep_old(self.folder)
        (self.folder / "tmp").mkdir(parents=True)
        owner = Owner(self.folder)
        os.environ.update(TMPDIR=str(owner.short / "tmp"), **owner.environment)
        tempfile.tempdir = None  # read TMPDIR again
        started_s = time.monotonic()
        try:
            with contextlib.ExitStack() as stack:
                s3 = stack.enter_context(EmbeddedS3(BUCKET))
                reach_s3: dict[str, Any] = {**s3.environment()}
                _say(f"embedded S3 at {s3.endpoint_url}")
                cluster = stack.enter_context(
                    LocalCluster(self.folder, owner, num_cpus=max(2, os.cpu_count() or 2), **reach_s3)
                )
                _say(f"Ray cluster up, jobs at {cluster.job_address}")
                prepare = ["vocab_size=4096", f"tokenizer_training_bytes={4 << 20}"]
                prepare += ["prepare.seq_len=1024", "prepare.validation_fraction=0.02"]
                self._submit(
                    cluster,
                    ["jobs/prepare_shards.py", f"input={self._corpus()}", f"output=s3://{BUCKET}/corpus", *prepare],
                )
                job = [
                    "jobs/hope_tiny.py",
                    f"output={self.folder}",
                    f"data.prefix=s3://{BUCKET}/corpus",
                    f"checkpoint.url=s3://{BUCKET}/runs",
                ]
                with kill_one_rank_half_way(self.folder):
                    self._submit(cluster, [*job, *self.overrides])
        finally:
            owner.close()
            shutil.rmtree(self.folder / "tmp", ignore_errors=True)
        summary = write_report(self.folder)
        self._show(summary, time.monotonic() - started_s)
        return summary

    def _check_machine(self) -> None:
        free = shutil.disk_usage(self.root).free
        if free < DISK_NEEDED_BYTES:
            raise DemoError(f"{free / 2**30:.1f} GiB free below {self.root}: the demo needs 2 GiB; free some")
        if self.corpus and not self.corpus.exists():
            raise DemoError(f"--corpus {self.corpus}: no such file or folder; name one with text in it")

    def _corpus(self) -> Path:
        """The text to train on: the user's, or the standard library's sources as JSON lines."""
        if self.corpus:
            return self.corpus.resolve()
        folder = self.folder / "corpus"
        folder.mkdir()
        with (folder / "stdlib.jsonl").open("w", encoding="utf-8") as file:
            for name, text in stdlib_corpus():
                if not text.strip():
                    continue  # an empty __init__.py says nothing
                file.write(json.dumps({"name": name, "text": text}) + "\n")
        return folder

    def _submit(self, cluster: LocalCluster, command: list[str]) -> None:
        """`ray job submit` as a user types it; the job's own lines go to the screen and to job.log."""
        ray = str(Path(sys.executable).parent / "ray")
        full = [ray, "job", "submit", "--working-dir", ".", "--", "python", *command]
        _say(" ".join(["ray", *full[1:]]))
        with (self.folder / "job.log").open("a", encoding="utf-8") as log:
            process = subprocess.Popen(
                full,
                cwd=self.root,
                env=cluster.client_environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            assert process.stdout is not None
            for line in process.stdout:
                log.write(line)
                if shown := _for_people(line):
                    print(shown, flush=True)
        if process.wait():
            raise DemoError(f"the job ended with exit code {process.returncode}; its whole log is {log.name}")

    def _show(self, summary: dict[str, Any], seconds: float) -> None:
        unigram, bigram, loss = (summary[name] for name in ("unigram_entropy", "bigram_entropy", "val_loss"))
        print(json.dumps(summary, indent=2))
        _say(f"{self.folder}: summary.json, cadence.png, loss.png, metrics/ ({seconds:.0f} s in all)")
        _say(f"validation loss {loss:.3f}, unigram {unigram:.3f}, bigram {bigram:.3f} nats per token")
        wrong = [
            f"level {name}: {count['done']} updates of {count['due']} due, {count['skipped']} skipped"
            for name, count in summary["level_updates"].items()
            if count["done"] != count["due"] or count["skipped"]
        ]
        if not summary["finished"]:
            wrong.append("the run did not finish")
        if loss >= unigram - 1.0:
            wrong.append(f"validation loss {loss:.3f} is not 1 nat below the unigram entropy {unigram:.3f}")
        if not summary["kills"] == summary["resumes"] == 1:
            wrong.append(f"{summary['kills']} kills and {summary['resumes']} resumes instead of one each")
        if wrong:
            raise DemoError("; ".join(wrong))


@contextlib.contextmanager
def kill_one_rank_half_way(run_folder: Path) -> Iterator[None]:
    """While inside: SIGKILL the run's highest rank, once, when half of the tokens are trained."""
    done = threading.Event()
    killer = threading.Thread(target=_kill_when_half, args=(run_folder, done), daemon=True)
    killer.start()
    try:
        yield
    finally:
        done.set()
        killer.join()


def _kill_when_half(run_folder: Path, done: threading.Event) -> None:
    for row in tail(run_folder / FOLDER / "attempt_0001.jsonl"):
        if done.is_set():
            return
        if row is None or row["kind"] != "step" or 2 * row["tokens"] < row["total_tokens"]:
            continue
        path = sorted((run_folder / "ranks").glob("rank_*.json"))[-1]
        rank = json.loads(path.read_text())
        os.kill(rank["pid"], signal.SIGKILL)
        log_fault(run_folder, signal="SIGKILL", rank=rank["rank"], pid=rank["pid"], tokens=row["tokens"])
        _say(f"killed rank {rank['rank']} (pid {rank['pid']}) with SIGKILL at {row['tokens']:,} tokens")
        return


def _say(text: str) -> None:
    print(f"demo: {text}", flush=True)


def _for_people(line: str) -> str | None:
    """The job's own words; Ray's lines about itself and the 120 lines of the config stay in job.log."""
    plain = COLOUR.sub("", line.rstrip("\n"))
    of_worker = WORKER_PREFIX.match(plain)
    plain = WORKER_PREFIX.sub("", plain)
    if not plain.strip() or NOISE.match(plain) or (not of_worker and OF_RAY.match(plain)):
        return None
    return plain


def _keep_old(folder: Path) -> None:
    """Rename an earlier run's folder by its time of change; nothing is deleted."""
    if not folder.exists():
        return
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(folder.stat().st_mtime))
    target = folder.with_name(f"{folder.name}-{stamp}")
    number = 1
    while target.exists():
        number += 1
        target = folder.with_name(f"{folder.name}-{stamp}-{number}")
    folder.rename(target)
    _say(f"the earlier run is kept as {target}")
