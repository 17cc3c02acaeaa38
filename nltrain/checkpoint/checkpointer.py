"""Saves and resumes one run, on all its ranks together.

A save copies this rank's share to host memory, then a thread writes it while training goes on; the folder becomes a
checkpoint when rank 0 creates its manifest, after all ranks have written. At most one save is in flight. A failed one
is logged at once and told again at the next call; training ends after `max_failures` in a row, or when a newer attempt
of the run has begun. All methods but `poll` and `settle` are collective: call them on every rank in the same order.
"""

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from nltrain.checkpoint.catalog import (
    CheckpointInfo,
    apply_retention,
    claim_attempt,
    commit,
    discard_unfinished,
    list_checkpoints,
    split_resume_url,
)
from nltrain.checkpoint.compare import check_state
from nltrain.checkpoint.config import CheckpointConfig
from nltrain.checkpoint.environment import environment
from nltrain.checkpoint.errors import (
    CheckpointError,
    CorruptCheckpointError,
    MismatchError,
    SaveFailedError,
    StaleAttemptError,
)
from nltrain.checkpoint.files import Part, Staging, layout_of, pack, whole
from nltrain.checkpoint.load import Loaded, load, together
from nltrain.checkpoint.manifest import LAYOUT, STATE, FileEntry, Manifest, check_run, checkpoint_name, key_of
from nltrain.checkpoint.plan import Piece, assign, table
from nltrain.checkpoint.stored import StoredCheckpoint, own_path
from nltrain.checkpoint.transfer import write_files
from nltrain.checkpoint.tree import canonical_json, dump, sha256_of, split
from nltrain.collectives import Ranks
from nltrain.fragment import Fragment
from nltrain.store import Store, StoreError
from nltrain.store.sender import SendingStore, sending

log = logging.getLogger(__name__)

_MAX_PLANS = 8
Weights = Mapping[str, tuple[str, Sequence[int]]]
Fragments = Mapping[str, Fragment]
# Which fragments exist can depend on the moment of the save (an open window): then the stored state decides.
FragmentsOf = Callable[[Any], Fragments]


class SaveResult(NamedTuple):
    """How one save ended; the same on all ranks but for the times."""

    name: str
    tokens: int
    error: str  # empty: committed
    num_bytes: int  # of all ranks' files
    stall_seconds: float  # what training waited for
    write_seconds: float  # from then to the commit
    deleted: tuple[str, ...]  # checkpoints that retention removed


class _Job(NamedTuple):
    """Everything the writing thread needs; nothing of it changes while it runs."""

    name: str
    tokens: int
    state: bytes
    config_hash: str
    dataset_fingerprint: str
    own: Staging
    own_json: bytes
    stall_seconds: float
    retain: bool
    make_room: bool  # the same on all ranks


class _Plan(NamedTuple):
    """Who writes what, for one set of tables: this rank's files and the layout of all."""

    parts: list[Part]
    layout: bytes


class Checkpointer:
    """`attempt` None claims the next number. Claiming one fences off all older attempts of the run."""

    def __init__(self, store: Store, run: str, attempt: int | None, config: CheckpointConfig) -> None:
        self.store, self.run, self.config = store, check_run(run), config
        # Reading and small requests stay here; only what would hold up the training loop goes through the process.
        self._uploads = sending(store, config.num_threads) if config.upload_process else store
        self._ranks, self._writing_ranks = Ranks(config.timeout_s), Ranks(config.timeout_s)
        nonce = uuid.uuid4().hex
        self.attempt: int = self._ranks.from_first(lambda: claim_attempt(store, run, attempt, nonce))
        self._environment = environment() if self._ranks.rank == 0 else {}
        self._lineage: list[dict[str, Any]] = []
        self._refused: set[str] = set()
        self._plans: dict[tuple[int, ...], _Plan] = {}
        self._staging: Staging | None = None
        self._layout: bytes = b""
        self._thread: threading.Thread | None = None
        self._results: list[SaveResult] = []
        self._unseen: SaveResult | None = None
        self._failures_in_row = 0
        self._stale = ""
        self._saved_tokens = -1
        self._last_save_s = time.monotonic()

    def due(self, tokens_before: int, tokens: int, at_fold: bool = True) -> bool:
        """Whether the quantum that ended at `tokens` calls for a save. Collective only where every_minutes is on.

        `at_fold`: whether nothing is unreduced now, equal on all ranks; saves by the clock wait for it."""
        every = self.config.every_tokens
        if every and tokens // every > tokens_before // every:
            return True
        if self.config.every_minutes and at_fold:
            # One rank's clock decides: clocks that differ must not part the ranks.
            late = time.monotonic() - self._last_save_s >= 60 * self.config.every_minutes
            return bool(self._ranks.gather_ints([late])[0][0])
        return False

    def prepare(self, fragments: Fragments, weights: Weights | None = None) -> None:
        """Plan who writes what and take the staging memory now; otherwise the first save does."""
        self._join()
        rows = self._ranks.gather_ints([_digest([table(fragments), weights])])
        self._lay_out(tuple(row[0] for row in rows), fragments, weights or {})

    def _lay_out(self, key: tuple[int, ...], fragments: Fragments, weights: Weights) -> Staging:
        """Collective where the plan for these tables is not known yet; `key` says which tables all ranks hold."""
        if key not in self._plans:
            tables = [[Piece(*row) for row in rows] for rows in self._ranks.gather(table(fragments))]
            names = {name for name, _ in weights.values()}
            parts = [self._parts(rank, pieces, names) for rank, pieces in enumerate(assign(tables))]
            layout = layout_of(part for of_rank in parts for part in of_rank)
            if missing := sorted(names - layout.keys()):
                raise MismatchError(f"weights name the fragment {missing[0]}, which no rank holds")
            named = {parameter: [name, list(shape)] for parameter, (name, shape) in weights.items()}
            # Open windows come and go: a few plans recur.
            if len(self._plans) >= _MAX_PLANS:
                self._plans.pop(next(iter(self._plans)))
            self._plans[key] = _Plan(parts[self._ranks.rank], dump({"tensors": layout, "weights": named}))
        plan = self._plans[key]
        self._layout = plan.layout
        if self._staging is None:
            self._staging = Staging(pin=any(fragment.tensor.is_cuda for fragment in fragments.values()))
        if self._staging.parts != tuple(plan.parts):
            self._staging.lay_out(plan.parts)
        return self._staging

    def save(
        self,
        tokens: int,
        fragments: Fragments,
        state: Mapping[str, Any],
        rank_state: Mapping[str, Any] | None = None,
        weights: Weights | None = None,
        retain: bool = True,
    ) -> bool:
        """Save at `tokens`; returns False where the policy skipped it because one is in flight.

        state: JSON, equal on all ranks; its entries "config" and "dataset_fingerprint" are named in the manifest.
        rank_state: JSON and tensors of this rank alone. weights: {parameter: (fragment name, shape)}, for export.
        retain: False where ranks wait to leave; nothing old is deleted then. Values are taken before this returns.
        Raises StaleAttemptError when a newer attempt has begun, SaveFailedError after config.max_failures in a row.
        """
        began = time.monotonic()
        data = canonical_json(state)
        plain, tensors = split(rank_state or {})
        if self.config.when_busy == "wait":
            self._join()
        digest = _digest([table(fragments), weights])
        row = [tokens, self._busy(), digest, self._failures_in_row, bool(self._stale), _digest(state)]
        rows = self._ranks.gather_ints(row)
        for column, what in ((0, "token count"), (5, "state")):
            if len({row[column] for row in rows}) > 1:
                raise CheckpointError(f"save at {tokens} tokens: the {what} differs between ranks; it must be the same")
        self._surface(max(row[3] for row in rows), any(row[4] for row in rows))
        name = checkpoint_name(tokens, self.attempt)
        if any(row[1] for row in rows):
            self._say(f"save at {tokens} tokens skipped: the one before is still being written (when_busy=skip)")
            return False
        if tokens == self._saved_tokens:
            self._say(f"checkpoint {name} is there already: not saved again")
            return True
        self._lay_out(tuple(row[2] for row in rows), fragments, weights or {}).fill(fragments)
        own_tensors = whole(tensors)
        prefix = f"rank_{self._ranks.rank:05d}/own"
        own = Staging()
        own.lay_out(pack(table(own_tensors), prefix, self.config.max_file_bytes))
        own.fill(own_tensors)
        own_json = dump({"state": plain, "tensors": layout_of(own.parts)})
        config_hash = sha256_of(state["config"]) if "config" in state else ""
        fingerprint = str(state.get("dataset_fingerprint", ""))
        self._last_save_s = time.monotonic()
        make_room = self.config.when_full == "make_room" and any(row[3] for row in rows)
        stall_s = self._last_save_s - began
        job = _Job(name, tokens, data, config_hash, fingerprint, own, own_json, stall_s, retain, make_room)
        self._thread = threading.Thread(target=self._write, args=(job,), name=f"save-{tokens}", daemon=True)
        self._thread.start()
        if not self.config.asynchronous:
            self._join()
        return True

    def note_in_lineage(self, change: str) -> None:
        """Keep with every later manifest that the run went on with `change` after it was loaded."""
        self._lineage[-1]["changes"].append(change)

    def wait(self) -> None:
        """Until the save in flight has ended; raises SaveFailedError or StaleAttemptError if the last one failed."""
        self._join()
        failed = self._unseen
        self._surface(self._failures_in_row, bool(self._stale))
        if failed is not None:
            raise SaveFailedError(failed.error)

    def settle(self, timeout_s: float) -> None:
        """Give the save in flight up to `timeout_s` to end, on the way out of a run that failed. Not collective."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def close(self) -> None:
        """End the process that uploads, where there is one. Not collective."""
        if isinstance(self._uploads, SendingStore):
            self._uploads.close()

    def poll(self) -> list[SaveResult]:
        """The saves that ended since the last call, for the metrics."""
        found, self._results = self._results, []
        return found

    def newest_complete(self) -> CheckpointInfo | None:
        """The newest checkpoint of this run whose manifest is sound and whose files have their sizes."""
        return next((info for info in reversed(self._list(self.store, self.run)) if info.complete), None)

    def load(self, checkpoint: CheckpointInfo | str, fragments: Fragments, may_be_unused: Iterable[str] = ()) -> Loaded:
        """Fill the fragments in place from a checkpoint of this run; see load.load for what is refused."""
        name = checkpoint if isinstance(checkpoint, str) else checkpoint.name
        return self._load(self.store, self.run, name, fragments, None, (), tuple(may_be_unused), None)

    def resume(
        self,
        fragments: Fragments | FragmentsOf,
        config: Mapping[str, Any] | None = None,
        may_change: Iterable[str] = (),
        may_be_unused: Iterable[str] = (),
    ) -> Loaded | None:
        """Go on from what config.resume names: fills the fragments and returns the rest, or None to start afresh.

        fragments: the mapping itself, or a function of the stored state that gives it.
        A damaged checkpoint is passed over for the one before, with its reason logged. `config` is compared with the
        stored one: ConfigChangedError where a field differs that matches no pattern of `may_change` or
        config.may_change. Raises CorruptCheckpointError where there are checkpoints but none is sound.
        """
        if self.config.resume == "never":
            return None
        store, run, tokens = self.store, self.run, None
        by_hand = self.config.resume if self.config.resume != "auto" else None
        found = [info for info in self._list(store, run) if info.attempt > self.config.ignore_attempts_up_to]
        if by_hand and not self._went_on_from(by_hand, found):
            store, run, tokens = split_resume_url(by_hand)
            found = [info for info in self._list(store, run) if tokens in (None, info.tokens)]
            if not found:
                raise MismatchError(f"checkpoint.resume={by_hand!r}: no such checkpoint; list them with `nltrain list`")
        patterns = (*may_change, *self.config.may_change)
        passed_over: list[tuple[str, str]] = []
        for info in reversed(found):
            reason = info.reason
            if info.complete:
                try:
                    loaded = self._load(
                        store, run, info.name, fragments, config, patterns, tuple(may_be_unused), by_hand
                    )
                except CorruptCheckpointError as error:
                    reason = str(error)
                else:
                    loaded.passed_over = passed_over
                    self._say(f"resumed from {store.url}/{run}/{info.name}")
                    return loaded
            passed_over.append((info.name, reason))
            self._refused.add(info.name)
            self._say(f"checkpoint {run}/{info.name} passed over: {reason}", logging.WARNING)
        if by_hand or any(info.complete or info.damaged for info in found):
            raise CorruptCheckpointError(
                f"{store.url}/{run}: none of {len(found)} folders is a sound checkpoint; newest: {passed_over[0][1]}. "
                "Restore the files, or set checkpoint.resume=never to start afresh"
            )
        return None

    def _went_on_from(self, by_hand: str, found: list[CheckpointInfo]) -> bool:
        """Whether this run has already resumed from there and saved since: then its own newest is the one to take."""

        def look() -> bool:
            complete = [info for info in found if info.complete]
            if not complete:
                return False
            lineage = StoredCheckpoint(self.store, self.run, complete[-1].name).manifest.lineage
            return any(entry.get("by_hand") == by_hand for entry in lineage)

        return self._ranks.from_first(look)

    def _list(self, store: Store, run: str) -> list[CheckpointInfo]:
        return [CheckpointInfo(*row) for row in self._ranks.from_first(lambda: list_checkpoints(store, run))]

    def _load(
        self,
        store: Store,
        run: str,
        name: str,
        fragments: Fragments | FragmentsOf,
        config: Mapping[str, Any] | None,
        may_change: Sequence[str],
        may_be_unused: tuple[str, ...],
        by_hand: str | None,
    ) -> Loaded:
        self._join()
        stored = together(self._ranks, lambda: StoredCheckpoint(store, run, name, self.config.num_threads))
        changes = together(self._ranks, lambda: check_state(stored.state, config, may_change))
        for change in changes:
            self._say(f"resuming with another {change}", logging.WARNING)
        wanted = fragments(stored.state) if callable(fragments) else fragments
        loaded = load(stored, wanted, self._ranks, self.config.verify == "hashes", may_be_unused)
        loaded.changes = changes
        step = {"url": store.url, "run": run, "name": name, "attempt": self.attempt, "by_hand": by_hand}
        self._lineage = [*stored.manifest.lineage, step | {"changes": [str(change) for change in changes]}]
        return loaded

    def _write(self, job: _Job) -> None:
        began = time.monotonic()
        outcome: dict[str, Any]
        report: dict[str, Any]
        try:
            if job.make_room:
                self._writing_ranks.from_first(self._make_room)
            try:
                report = {"files": self._put(job)}
            except Exception as error:  # whatever it is, the other ranks wait for this one's report
                traced = not isinstance(error, StoreError)  # the store's errors say all in one line
                log.error("rank %d wrote no part of %s: %s", self._ranks.rank, job.name, error, exc_info=traced)
                report = {"error": f"rank {self._ranks.rank}: {type(error).__name__}: {error}"}
            reports = self._writing_ranks.gather(report)
            outcome = self._writing_ranks.from_first(lambda: self._commit(job, reports))
        except Exception as error:  # a rank that died in the middle, for example
            outcome = {"error": f"{type(error).__name__}: {error}"}
        error_text = str(outcome.get("error", ""))
        seconds = time.monotonic() - began
        deleted = tuple(outcome.get("deleted", ()))
        result = SaveResult(
            job.name, job.tokens, error_text, outcome.get("bytes", 0), job.stall_seconds, seconds, deleted
        )
        if outcome.get("stale"):
            self._stale = error_text
        if error_text:
            self._failures_in_row += 1
            self._unseen = result
            self._say(f"checkpoint {job.name} FAILED, {self._failures_in_row} in a row: {error_text}", logging.ERROR)
        else:
            self._failures_in_row, self._unseen, self._saved_tokens = 0, None, job.tokens
            self._say(f"checkpoint {job.name} committed: {result.num_bytes} bytes in {seconds:.1f} s")
        self._results.append(result)

    def _put(self, job: _Job) -> list[FileEntry]:
        staging, rank = self._staging, self._ranks.rank
        assert staging is not None
        files: list[tuple[str, str, Any]] = []
        for source in (staging, job.own):
            for index, part in enumerate(source.parts):
                files.append((self._key(job, part.path), part.path, partial(source.data, index)))
        files.append((self._key(job, own_path(rank)), own_path(rank), lambda: job.own_json))
        if rank == 0:
            files.append((self._key(job, LAYOUT), LAYOUT, lambda: self._layout))
            files.append((self._key(job, STATE), STATE, lambda: job.state))
        return write_files(self._uploads, files, self.config.num_threads)

    def _commit(self, job: _Job, reports: list[dict[str, Any]]) -> dict[str, Any]:
        if failed := [report["error"] for report in reports if "error" in report]:
            # No rank writes any more: what they wrote would only take the room of the next save.
            discard_unfinished(self.store, self.run, job.name)
            return {"error": "; ".join(failed)}
        manifest = Manifest(
            run=self.run,
            name=job.name,
            tokens=job.tokens,
            attempt=self.attempt,
            world_size=self._ranks.size,
            created_s=time.time(),
            config_hash=job.config_hash,
            dataset_fingerprint=job.dataset_fingerprint,
            nonce=uuid.uuid4().hex,
            files=tuple(FileEntry(*entry) for report in reports for entry in report["files"]),
            lineage=self._lineage,
            environment=self._environment,
        )
        try:
            commit(self.store, manifest)
        except StaleAttemptError as error:
            return {"error": str(error), "stale": True}
        except Exception as error:  # the other ranks wait for this answer
            return {"error": f"commit: {type(error).__name__}: {error}"}
        deleted: list[str] = []
        if not job.retain:
            return {"bytes": manifest.num_bytes, "deleted": deleted}
        try:
            deleted = self._retain(self.config.keep_last)
        except Exception:  # the checkpoint stands; what was not deleted now is deleted after the next save
            log.exception("old checkpoints of %s could not be deleted", self.run)
        return {"bytes": manifest.num_bytes, "deleted": deleted}

    def _make_room(self) -> None:
        """After a failed save: the newest checkpoint alone stays, before the next one is written."""
        if gone := self._retain(1):
            self._say(f"the last save failed: room made by deleting {', '.join(gone)} (checkpoint.when_full=make_room)")

    def _retain(self, keep_last: int) -> list[str]:
        every = self.config.keep_every_tokens
        return apply_retention(self.store, self.run, self.attempt, keep_last, every, self._refused)

    def _parts(self, rank: int, pieces: Sequence[Piece], weights: set[str]) -> list[Part]:
        """Weights in files of their own, so that evaluation and export need not read the optimizer."""
        limit, folder = self.config.max_file_bytes, f"rank_{rank:05d}"
        first = pack([piece for piece in pieces if piece.name in weights], f"{folder}/weights", limit)
        return first + pack([piece for piece in pieces if piece.name not in weights], f"{folder}/state", limit)

    def _busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join(self.config.timeout_s)
            if self._thread.is_alive():
                raise SaveFailedError(
                    f"{self._thread.name} has not ended after checkpoint.timeout_s={self.config.timeout_s:g} s: "
                    "check the store and the other ranks, or raise the limit"
                )
            self._thread = None

    def _surface(self, failures_in_row: int, stale: bool) -> None:
        """Tell of a failed save once more; raise where it must not go on."""
        failed, self._unseen = self._unseen, None
        if stale:
            raise StaleAttemptError(self._stale or f"attempt {self.attempt} of run {self.run} is stale; it must stop")
        text = failed.error if failed is not None else "see the other ranks' logs"
        if failures_in_row >= self.config.max_failures:
            raise SaveFailedError(
                f"{failures_in_row} saves in a row failed (checkpoint.max_failures); the last: {text}"
            )
        if failed is not None:
            self._say(f"the last save, {failed.name}, had failed: {text}; training goes on", logging.ERROR)

    def _say(self, text: str, level: int = logging.INFO) -> None:
        if self._ranks.rank == 0:
            log.log(level, "%s", text)

    def _key(self, job: _Job, path: str) -> str:
        return key_of(self.run, job.name, path)


def _digest(value: Any) -> int:
    """60 bits of the hash: enough to compare ranks."""
    return int(sha256_of(value)[:15], 16)
