"""The demo: starts a LocalWorld, prepares data, submits the job, kills one rank, and checks the summary."""

import contextlib
import json
import os
import re
import runpy
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nltrain.config import RunConfig, override
from nltrain.data.manifest import read_manifest
from nltrain.data.prepare.corpus import stdlib_corpus
from nltrain.errors import UserError
from nltrain.local.processes import reap_abandoned
from nltrain.local.world import LocalWorld, submit_arguments
from nltrain.store import open_store
from nltrain.terminal import print_anything
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
MAX_BAD_FRACTION = 0.1
PREPARE_FIELDS = ("prepare.", "tokenizer")
# The quick form: every step of the demo with less text and fewer, smaller quanta.
QUICK_QUANTA = 32
QUICK_QUANTUM_TOKENS = 2048
QUICK_CORPUS_BYTES = 3 << 20


class DemoError(UserError, RuntimeError):
    """The demo cannot run, or its result is not what it must show; the message says why."""


def quick(job: RunConfig) -> list[str]:
    """Overrides that make `job` short: levels, saves and validations keep their number of quanta, which are smaller."""
    seq_len = job.data.seq_len
    quantum = max(job.cluster.max_workers, QUICK_QUANTUM_TOKENS // seq_len) * seq_len
    total = QUICK_QUANTA * quantum
    periods = [
        f"levels.levels.{level.name}.period_tokens={level.period_tokens // job.quantum_tokens * quantum}"
        for level in job.levels.levels
    ]
    periods += [f"levels.levels.{level.name}.phase_tokens=none" for level in job.levels.levels if level.phase_tokens]
    return [
        f"levels.quantum_tokens={quantum}",
        *periods,
        f"levels.schedule.warmup_tokens={4 * quantum}",
        f"levels.schedule.total_tokens={total}",
        f"levels.fold_every_tokens={total // 4}",
        f"checkpoint.every_tokens={total // 4}",
        f"train.total_tokens={total}",
        f"train.validate_every_tokens={total // 2}",
        "train.validation_sequences=16",
        "train.sample_tokens=16",
        "track.log_every_quanta=2",
        "track.wandb=off",
    ]


class Demo:
    """`folder` receives everything; an older folder of that name is kept under another name.

    overrides: those of prepare.* and tokenizer* go to the job that prepares the data, the others to the training job.
    """

    def __init__(
        self,
        root: Path,
        folder: Path,
        corpus: Path | None = None,
        overrides: Sequence[str] = (),
        quick_form: bool = False,
    ) -> None:
        self.root, self.folder, self.corpus, self.is_quick = root, folder, corpus, quick_form
        self._prepare = [each for each in overrides if each.startswith(PREPARE_FIELDS)]
        job = runpy.run_path(str(root / "jobs" / "hope_tiny.py"))["config"]
        self._overrides = [
            *(quick(job) if quick_form else ()),
            *(each for each in overrides if each not in self._prepare),
        ]
        # A wrong field is an error now, not after the data are prepared.
        self._config: RunConfig = override(job, self._overrides)

    def run(self) -> dict[str, Any]:
        """The whole demo; returns the summary. Raises DemoError."""
        print_anything()
        self._check_machine()
        for line in reap_abandoned(self.folder):
            _say(line)
        _keep_old(self.folder)
        started_s = time.monotonic()
        num_cpus = max(2, os.cpu_count() or 2)
        # Nothing of the user's is read or written: profiles, caches, W&B's key.
        with LocalWorld(self.folder, BUCKET, num_cpus, with_own_home=True) as world:
            _say(f"embedded S3 at {world.s3.endpoint_url}")
            _say(f"Ray cluster up, jobs at {world.cluster.job_address}")
            prefix, extra = self._make_dataset(world)
            job = [
                "jobs/hope_tiny.py",
                f"output={self.folder}",
                f"data.prefix={prefix}",
                f"checkpoint.url=s3://{BUCKET}/runs",
                *(["track.wandb=offline"] if self._config.track.wandb == "auto" else []),
            ]
            with kill_one_rank_half_way(self.folder):
                self._submit(world, [*job, *self._overrides, *extra])
            world.stop()
            summary = write_report(self.folder)
        self._show(summary, time.monotonic() - started_s)
        return summary

    def _check_machine(self) -> None:
        place = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        if not os.access(place, os.W_OK | os.X_OK):
            raise DemoError(f"--output {self.folder}: {place} is not writable; name another folder")
        free = shutil.disk_usage(place).free
        if free < DISK_NEEDED_BYTES:
            raise DemoError(f"{free / 2**30:.1f} GiB free below {place}: the demo needs 2 GiB; free some")
        if not self.corpus:
            return
        if not self.corpus.exists():
            raise DemoError(f"--corpus {self.corpus}: no such file or folder; name one with text in it")
        if self.corpus.resolve().is_relative_to(self.folder):
            raise DemoError(f"--corpus {self.corpus}: lies in the run's folder, which is renamed; move it elsewhere")

    def _make_dataset(self, world: LocalWorld) -> tuple[str, list[str]]:
        """Prepare the text. Returns the dataset's URL, and overrides for a text too short to hold a document out."""
        prefix, text = f"s3://{BUCKET}/corpus", json.dumps([str(self._corpus())])
        config = self._config
        settings = [
            f"vocab_size={config.model.vocab_size}",
            f"tokenizer_training_bytes={(1 if self.is_quick else 4) << 20}",
            f"prepare.seq_len={config.data.seq_len}",
            # A user's folder may have empty and broken files; each one that is dropped is listed.
            *([f"prepare.max_bad_fraction={MAX_BAD_FRACTION}"] if self.corpus else []),
        ]

        def prepare(url: str, fraction: float) -> dict[str, int]:
            # As JSON, because a comma in the path would split it.
            command = ["jobs/prepare_shards.py", f"input={text}", f"output={url}", *settings]
            self._submit(world, [*command, f"prepare.validation_fraction={fraction}", *self._prepare])
            splits = read_manifest(open_store(url)).splits
            return {name: split.num_sequences for name, split in splits.items()}

        counts = prepare(prefix, 0.02)
        if not counts.get("train"):
            _say("all of the text was held out for validation: it is prepared again with none held out")
            prefix += "-whole"
            counts = prepare(prefix, 0.0)
        if counts.get("validation"):
            return prefix, []
        _say("too few documents to hold one out: the run goes on without validation")
        return prefix, ["train.validation_sequences=0"]

    def _corpus(self) -> Path:
        """The text to train on: the user's, or the standard library's sources as JSON lines."""
        if self.corpus:
            return self.corpus.resolve()
        folder = self.folder / "corpus"
        folder.mkdir()
        with (folder / "stdlib.jsonl").open("w", encoding="utf-8") as file:
            for name, text in stdlib_corpus(QUICK_CORPUS_BYTES if self.is_quick else None):
                if not text.strip():
                    continue  # an empty __init__.py
                file.write(json.dumps({"name": name, "text": text}) + "\n")
        return folder

    def _submit(self, world: LocalWorld, command: list[str]) -> None:
        """`ray job submit` as a user types it; the job's own lines go to the screen and to job.log."""
        entrypoint, log = ["python", *command], self.folder / "job.log"
        _say(" ".join(["ray job submit", *submit_arguments(entrypoint)]))
        reason = ""
        job = world.submit(entrypoint, log, self.root)
        for line in job.lines():
            if line.startswith("error: "):
                reason = line.removeprefix("error: ").strip()
            if shown := _for_people(line):
                print(shown, flush=True)
        if job.exit_code:
            raise DemoError(
                f"{command[0]} ended with exit code {job.exit_code}: {reason or 'see above'}; its whole log is {log}"
            )

    def _show(self, summary: dict[str, Any], seconds: float) -> None:
        unigram, bigram, loss = (summary[name] for name in ("unigram_entropy", "bigram_entropy", "val_loss"))
        print(json.dumps(summary, indent=2))
        _say(f"{self.folder}: summary.json, cadence.png, loss.png, metrics/ ({seconds:.0f} s in all)")
        parts = (("validation loss", loss), ("unigram", unigram), ("bigram", bigram))
        if known := [f"{name} {value:.3f}" for name, value in parts if value is not None]:
            _say(", ".join(known) + " nats per token")
        wrong = [
            f"level {name}: {count['done']} updates of {count['due']} due, {count['skipped']} skipped"
            for name, count in summary["level_updates"].items()
            if count["done"] != count["due"] or count["skipped"]
        ]
        if not summary["finished"]:
            wrong.append("the run did not finish")
        first, last = summary["loss_first"], summary["loss_last"]
        if first is None or last is None or last >= first:
            wrong.append(f"the loss went from {first} to {last} nats per token instead of falling")
        # The bound holds for our own text and the whole run; how well another text can be learned is unknown.
        own_text = not self.corpus and not self.is_quick
        if own_text and None not in (loss, unigram) and loss >= unigram - 1.0:
            wrong.append(f"validation loss {loss:.3f} is not 1 nat below the unigram entropy {unigram:.3f}")
        if not summary["kills"] == summary["resumes"] == 1:
            wrong.append(f"{summary['kills']} kills and {summary['resumes']} resumes instead of one each")
        if wrong:
            raise DemoError("; ".join(wrong))


@contextlib.contextmanager
def kill_one_rank_half_way(run_folder: Path) -> Iterator[None]:
    """While inside: SIGKILL the run's highest rank, once, when half of the tokens are trained and a save is there."""
    done = threading.Event()
    killer = threading.Thread(target=_kill_when_half, args=(run_folder, done), daemon=True)
    killer.start()
    try:
        yield
    finally:
        done.set()
        killer.join()


def _kill_when_half(run_folder: Path, done: threading.Event) -> None:
    saved = False
    for row in tail(run_folder / FOLDER / "attempt_0001.jsonl"):
        if done.is_set():
            return
        saved = saved or (row is not None and row["kind"] == "checkpoint")
        if not saved or row is None or row["kind"] != "step" or 2 * row["tokens"] < row["total_tokens"]:
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
    """A line as the screen shows it. None for Ray's lines about itself and for the config, which stay in job.log."""
    plain = COLOUR.sub("", line.rstrip("\n"))
    of_worker = WORKER_PREFIX.match(plain)
    plain = WORKER_PREFIX.sub("", plain)
    if not plain.strip() or NOISE.match(plain) or (not of_worker and OF_RAY.match(plain)):
        return None
    return plain


def _keep_old(folder: Path) -> None:
    """Rename an earlier run's folder after its modification time; nothing is deleted."""
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
