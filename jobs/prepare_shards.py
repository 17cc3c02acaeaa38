#!/usr/bin/env python
"""Turns text into a dataset: one Ray task per group of input files, on the cluster at RAY_ADDRESS or on this machine.

ray job submit --working-dir . -- python jobs/prepare_shards.py input=s3://b/text output=s3://b/tokens
python jobs/prepare_shards.py input=/data/a.jsonl.gz,/data/b output=/data/tokens prepare.seq_len=2048 workers=4

Killed and started again, it does the rest; the bytes written do not depend on the number of workers.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from nltrain.config import ConfigError, describe, override  # noqa: E402
from nltrain.data import DataError, PrepareConfig, StoreError, prepare_files  # noqa: E402
from nltrain.runtime.environment import EnvironmentRefusedError, print_anything  # noqa: E402
from nltrain.runtime.own_ray import OwnRayError, own_ray  # noqa: E402


@dataclass(frozen=True)
class PrepareJob:
    """What to read, where to write, and how."""

    input: tuple[str, ...] = ()
    """Files, folders or s3:// prefixes of .txt, .md, .jsonl (each also .gz or .zst) and .parquet."""
    output: str = ""
    """URL of the dataset: an empty s3:// prefix or folder, or that of an unfinished run to go on with."""
    tokenizer: str = ""
    """URL of a Hugging Face tokenizer.json; empty: one is trained on a sample of the input."""
    vocab_size: int = 32768
    """Tokens of a tokenizer trained here."""
    tokenizer_training_bytes: int = 64 << 20
    """Text that a tokenizer is trained on, in bytes."""
    workers: int = 2
    """Tasks at once when no cluster is named (RAY_ADDRESS); a cluster runs as many as it has CPUs."""
    prepare: PrepareConfig = field(default_factory=PrepareConfig)

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ConfigError(f"workers={self.workers}: must be at least 1")


def on_ray(workers: int) -> Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[tuple[int, Any]]]:
    """Runs tasks on Ray; yields (position, result) as they finish."""

    def execute(run: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        environment = {"PYTHONPATH": str(ROOT), "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        with own_ray(workers, environment) as ray:
            from ray.exceptions import RayTaskError

            try:
                remote = ray.remote(num_cpus=1)(run)
                pending = {remote.remote(task): position for position, task in enumerate(tasks)}
                while pending:
                    done, _ = ray.wait(list(pending), num_returns=1)
                    yield pending.pop(done[0]), ray.get(done[0])
            except RayTaskError as error:
                raise (error.cause if isinstance(error.cause, DataError | StoreError) else error) from None

    return execute


def main() -> int:
    print_anything()
    try:
        job = override(PrepareJob(), sys.argv[1:])
        if not job.input or not job.output:
            raise ConfigError("input=... and output=... are needed:\n" + describe(job))
        report = lambda line: print(line, flush=True)  # noqa: E731
        manifest = prepare_files(
            job.input,
            job.output,
            job.prepare,
            tokenizer=job.tokenizer,
            vocab_size=job.vocab_size,
            tokenizer_training_bytes=job.tokenizer_training_bytes,
            execute=on_ray(job.workers),
            progress=report,
        )
    except (ConfigError, DataError, StoreError, OwnRayError, EnvironmentRefusedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, split in manifest.splits.items():
        report(f"{name}: {split.num_tokens} tokens, {split.num_documents} documents, {split.num_sequences} sequences")
    counts = {name: manifest.report[name] for name in ("tokens_in", "tokens_out", "records_in", "dropped_records")}
    report(f"{job.output}: {counts}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
