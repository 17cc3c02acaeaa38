#!/usr/bin/env python
"""Turns text into a dataset: one Ray task per group of input files, on the cluster at RAY_ADDRESS or on this machine.

ray job submit --working-dir . -- python jobs/prepare_shards.py input=s3://b/text output=s3://b/tokens
python jobs/prepare_shards.py input=/data/a.jsonl.gz,/data/b output=/data/tokens prepare.seq_len=2048 workers=4

After a kill the same command does only the rest; the bytes written do not depend on the number of workers. A relative
path starts at the folder where the command runs; a submitted job, which runs in a folder of Ray's, refuses it. A path
with a comma is written as JSON: input='["/data/a,b"]'.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from nltrain.config import describe, override  # noqa: E402
from nltrain.data import DataError  # noqa: E402
from nltrain.data.prepare import PrepareConfig, prepare_files  # noqa: E402
from nltrain.errors import ConfigError, UserError, require  # noqa: E402
from nltrain.local.own_ray import own_ray  # noqa: E402
from nltrain.store import StoreError  # noqa: E402
from nltrain.store.places import absolute_place, shown  # noqa: E402
from nltrain.terminal import print_anything  # noqa: E402


@dataclass(frozen=True)
class PrepareJob:
    """What to read, where to write, and how."""

    input: tuple[str, ...] = ()
    """Files, folders or s3:// prefixes of .txt, .md, .json, .jsonl, .ndjson (each also .gz .zst .bz2 .xz), .parquet."""
    output: str = ""
    """URL of the dataset: an empty s3:// prefix or folder, or the output of an unfinished run to continue."""
    tokenizer: str = ""
    """URL of a Hugging Face tokenizer.json; empty: one is trained on a sample of the input."""
    vocab_size: int = 32768
    """Tokens of a tokenizer trained here."""
    tokenizer_training_bytes: int = 64 << 20
    """Bytes of text that a tokenizer is trained on."""
    workers: int = 2
    """Tasks at once on this machine; a cluster (RAY_ADDRESS) runs as many as it has CPUs."""
    prepare: PrepareConfig = field(default_factory=PrepareConfig)

    def __post_init__(self) -> None:
        for name in ("workers", "tokenizer_training_bytes"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")


def on_ray(workers: int) -> Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[tuple[int, Any]]]:
    """A function that runs tasks on Ray and yields (position, result) as they finish.

    It raises DataError or StoreError, in one line, for a task that failed.
    """

    def execute(run: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Runs all tasks; ends its own Ray afterwards."""
        environment = {"PYTHONPATH": str(ROOT), "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        with own_ray(workers, environment) as ray:
            from ray.exceptions import RayError, RayTaskError

            try:
                remote = ray.remote(num_cpus=1)(run)
                pending = {remote.remote(task): position for position, task in enumerate(tasks)}
                while pending:
                    done, _ = ray.wait(list(pending), num_returns=1)
                    yield pending.pop(done[0]), ray.get(done[0])
            except RayTaskError as error:
                cause = error.cause
                if isinstance(cause, OSError):  # a full or broken disk of the machine where the task ran
                    cause = DataError(f"{cause.filename or 'a local file'}: {cause.strerror or cause}: check that disk")
                raise (cause if isinstance(cause, DataError | StoreError) else error) from None
            except RayError as error:
                said = " ".join(str(error).split())[:300]
                raise DataError(
                    f"a task ended without a result ({type(error).__name__}: {said}): start the command again, it does "
                    "the rest; if memory was short, lower workers or prepare.max_record_bytes"
                ) from None

    return execute


def placed(job: PrepareJob) -> PrepareJob:
    """The job with each place made absolute. Raises PlaceError for a relative path of a submitted job."""
    return replace(
        job,
        input=tuple(absolute_place("input", url) for url in job.input),
        output=absolute_place("output", job.output),
        tokenizer=absolute_place("tokenizer", job.tokenizer),
    )


def main() -> int:
    """Runs the command; returns its exit status."""
    print_anything()
    progress = functools.partial(print, flush=True)
    try:
        if len([argument for argument in sys.argv[1:] if argument.startswith("input=")]) > 1:
            raise ConfigError("input=... is given more than once: write input=A,B in one (a shell makes two of {A,B})")
        job = placed(override(PrepareJob(), sys.argv[1:]))
        if not job.input or not job.output:
            raise ConfigError("input=... and output=... are needed:\n" + describe(job))
        manifest = prepare_files(
            job.input,
            job.output,
            job.prepare,
            tokenizer=job.tokenizer,
            vocab_size=job.vocab_size,
            tokenizer_training_bytes=job.tokenizer_training_bytes,
            execute=on_ray(job.workers),
            progress=progress,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the same command does the rest", file=sys.stderr)
        return 130
    for name, split in manifest.splits.items():
        progress(f"{name}: {split.num_tokens} tokens, {split.num_documents} documents, {split.num_sequences} sequences")
    counts = {name: manifest.report[name] for name in ("tokens_in", "tokens_out", "records_in", "dropped_records")}
    progress(f"{shown(job.output)}: {counts}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
