"""The writing of saves: one at a time, on a thread, while training goes on.

Each rank writes its own files; then rank 0 commits the folder, if all ranks have written theirs, and lets retention
delete old checkpoints. A save that fails is logged at once; `raise_or_report` reports it again at the next call on the
training thread and raises after `max_failures` in a row, or when a newer attempt of the run has begun. The thread uses
a process group of its own.
"""

import logging
import threading
import time
import uuid
from functools import partial
from typing import Any, NamedTuple

from nltrain.checkpoint.catalog import apply_retention, commit, discard_unfinished
from nltrain.checkpoint.config import CheckpointConfig
from nltrain.checkpoint.environment import environment
from nltrain.checkpoint.errors import SaveFailedError, StaleAttemptError
from nltrain.checkpoint.files import Staging
from nltrain.checkpoint.manifest import LAYOUT, STATE, FileEntry, Manifest, key_of
from nltrain.checkpoint.stored import own_path
from nltrain.checkpoint.transfer import Hashed, write_files
from nltrain.collectives import Ranks
from nltrain.store import Store, StoreError
from nltrain.store.sender import sender_of

log = logging.getLogger(__name__)


class SaveResult(NamedTuple):
    """How one save ended; the same on all ranks but for the times."""

    name: str
    tokens: int
    error: str  # empty: committed
    num_bytes: int  # of all ranks' files
    stall_seconds: float  # what training waited for
    write_seconds: float  # from then to the commit
    deleted: tuple[str, ...]  # checkpoints that retention removed


class SaveJob(NamedTuple):
    """Everything that the thread needs for one save; nothing of it changes while the save is in flight."""

    name: str
    tokens: int
    staging: Staging  # this rank's share of the fragments
    layout: bytes  # of the fragments of all ranks
    state: bytes
    own: Staging  # the tensors of this rank's own state
    own_json: bytes
    config_hash: str
    dataset_fingerprint: str
    lineage: list[dict[str, Any]]
    stall_seconds: float
    retain: bool
    make_room: bool  # the same on all ranks


class SaveWriter:
    """Writes the saves of one attempt of a run.

    ranks: a process group that nothing else uses. refused: names of checkpoints that failed to load, which retention
    leaves alone; its owner adds to it. `start`, `join` and `raise_or_report` are for the training thread, on every rank
    in the same order.
    """

    def __init__(
        self, store: Store, run: str, attempt: int, config: CheckpointConfig, ranks: Ranks, refused: set[str]
    ) -> None:
        self._store, self._run, self._attempt, self._config = store, run, attempt, config
        # Reading and small requests stay here; only what would hold up the training loop goes through the process.
        self._sender = sender_of(store, config.num_threads) if config.upload_process else None
        self._ranks, self._refused = ranks, refused
        self._environment = environment() if ranks.rank == 0 else {}
        self._thread: threading.Thread | None = None
        self._results: list[SaveResult] = []
        self._unseen: SaveResult | None = None
        self.failures_in_row = 0
        self.stale = ""
        """Why this attempt may not commit any more; empty while it may."""
        self.saved_tokens = -1
        """T of the last committed save."""

    @property
    def busy(self) -> bool:
        """Whether a save is in flight."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, job: SaveJob) -> None:
        """Begin a save; none may be in flight."""
        self._thread = threading.Thread(target=self._write, args=(job,), name=f"save-{job.tokens}", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait for the save in flight. Raises SaveFailedError where it has not ended after `timeout_s`."""
        if self._thread is not None:
            self._thread.join(self._config.timeout_s)
            if self._thread.is_alive():
                raise SaveFailedError(
                    f"{self._thread.name} has not ended after checkpoint.timeout_s={self._config.timeout_s:g} s: "
                    "check the store and the other ranks, or raise the limit"
                )
            self._thread = None

    def settle(self, timeout_s: float) -> None:
        """Wait up to `timeout_s` seconds for the save in flight; whether it ended does not matter."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def close(self) -> None:
        """End the process that uploads, where there is one."""
        if self._sender is not None:
            self._sender.close()

    def poll(self) -> list[SaveResult]:
        """The saves that ended since the last call."""
        found, self._results = self._results, []
        return found

    def raise_or_report(self, failures_in_row: int, stale: bool) -> SaveResult | None:
        """Report a failed save that was not reported before, and return it.

        failures_in_row, stale: the worst of all ranks. Raises StaleAttemptError where one of them is stale, and
        SaveFailedError after `max_failures` failed saves in a row.
        """
        failed, self._unseen = self._unseen, None
        if stale:
            raise StaleAttemptError(self.stale or f"attempt {self._attempt} of run {self._run} is stale; it must stop")
        text = failed.error if failed is not None else "see the other ranks' logs"
        if failures_in_row >= self._config.max_failures:
            raise SaveFailedError(
                f"{failures_in_row} saves in a row failed (checkpoint.max_failures); the last: {text}"
            )
        if failed is not None:
            self._say(f"the last save, {failed.name}, had failed: {text}; training goes on", logging.ERROR)
        return failed

    # ---- on the thread -----------------------------------------------------------------------------------------------

    def _write(self, job: SaveJob) -> None:
        began = time.monotonic()
        outcome: dict[str, Any]
        report: dict[str, Any]
        try:
            if job.make_room:
                self._ranks.from_first(self._make_room)
            try:
                report = {"files": self._put(job)}
            except Exception as error:  # whatever it is, the other ranks wait for this one's report
                traced = not isinstance(error, StoreError)  # the store's errors say all in one line
                log.error("rank %d wrote no part of %s: %s", self._ranks.rank, job.name, error, exc_info=traced)
                report = {"error": f"rank {self._ranks.rank}: {type(error).__name__}: {error}"}
            reports = self._ranks.gather(report)
            outcome = self._ranks.from_first(lambda: self._commit(job, reports))
        except Exception as error:  # a rank that died in the middle, for example
            outcome = {"error": f"{type(error).__name__}: {error}"}
        self._note(job, outcome, time.monotonic() - began)

    def _note(self, job: SaveJob, outcome: dict[str, Any], seconds: float) -> None:
        """Keep and log how the save ended."""
        error_text = str(outcome.get("error", ""))
        deleted = tuple(outcome.get("deleted", ()))
        result = SaveResult(
            job.name, job.tokens, error_text, outcome.get("bytes", 0), job.stall_seconds, seconds, deleted
        )
        if outcome.get("stale"):
            self.stale = error_text
        if error_text:
            self.failures_in_row += 1
            self._unseen = result
            self._say(f"checkpoint {job.name} FAILED, {self.failures_in_row} in a row: {error_text}", logging.ERROR)
        else:
            self.failures_in_row, self._unseen, self.saved_tokens = 0, None, job.tokens
            self._say(f"checkpoint {job.name} committed: {result.num_bytes} bytes in {seconds:.1f} s")
        self._results.append(result)

    def _put(self, job: SaveJob) -> list[FileEntry]:
        """Write this rank's files, on rank 0 the shared ones as well."""
        rank = self._ranks.rank
        files: list[tuple[str, str, Any]] = []
        for source in (job.staging, job.own):
            for index, part in enumerate(source.parts):
                files.append((self._key(job, part.path), part.path, partial(source.data, index)))
        files.append((self._key(job, own_path(rank)), own_path(rank), lambda: job.own_json))
        if rank == 0:
            files.append((self._key(job, LAYOUT), LAYOUT, lambda: job.layout))
            files.append((self._key(job, STATE), STATE, lambda: job.state))
        return write_files(self._sender or Hashed(self._store), files, self._config.num_threads)

    def _commit(self, job: SaveJob, reports: list[dict[str, Any]]) -> dict[str, Any]:
        """On rank 0: make the folder a checkpoint if every rank wrote its files; returns how that went, as JSON."""
        if failed := [report["error"] for report in reports if "error" in report]:
            # No rank writes any more: what they wrote would only take the room of the next save.
            discard_unfinished(self._store, self._run, job.name)
            return {"error": "; ".join(failed)}
        manifest = Manifest(
            run=self._run,
            name=job.name,
            tokens=job.tokens,
            attempt=self._attempt,
            world_size=self._ranks.size,
            created_s=time.time(),
            config_hash=job.config_hash,
            dataset_fingerprint=job.dataset_fingerprint,
            nonce=uuid.uuid4().hex,
            files=tuple(FileEntry(*entry) for report in reports for entry in report["files"]),
            lineage=job.lineage,
            environment=self._environment,
        )
        try:
            commit(self._store, manifest)
        except StaleAttemptError as error:
            return {"error": str(error), "stale": True}
        except Exception as error:  # the other ranks wait for this answer
            return {"error": f"commit: {type(error).__name__}: {error}"}
        deleted: list[str] = []
        if not job.retain:
            return {"bytes": manifest.num_bytes, "deleted": deleted}
        try:
            deleted = self._retain(self._config.keep_last)
        except Exception:  # the checkpoint stands; what was not deleted now is deleted after the next save
            log.exception("old checkpoints of %s could not be deleted", self._run)
        return {"bytes": manifest.num_bytes, "deleted": deleted}

    def _make_room(self) -> None:
        """After a failed save: delete all checkpoints but the newest before the next one is written."""
        if gone := self._retain(1):
            self._say(f"the last save failed: room made by deleting {', '.join(gone)} (checkpoint.when_full=make_room)")

    def _retain(self, keep_last: int) -> list[str]:
        every = self._config.keep_every_tokens
        return apply_retention(self._store, self._run, self._attempt, keep_last, every, self._refused)

    def _say(self, text: str, level: int = logging.INFO) -> None:
        if self._ranks.rank == 0:
            log.log(level, "%s", text)

    def _key(self, job: SaveJob, path: str) -> str:
        return key_of(self._run, job.name, path)
