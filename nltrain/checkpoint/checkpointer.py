"""Saves and resumes one run, on all its ranks together.

A save copies this rank's share to host memory; then a thread writes it while training goes on (writer.py). The folder
becomes a checkpoint when rank 0 creates its manifest, after all ranks have written. At most one save is in flight.
All methods but `poll` and `settle` are collective: call them on every rank in the same order.
"""

import logging
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from nltrain.checkpoint.catalog import CheckpointInfo, claim_attempt, list_checkpoints, split_resume_url
from nltrain.checkpoint.compare import Difference, check_state
from nltrain.checkpoint.config import CheckpointConfig
from nltrain.checkpoint.errors import CheckpointError, CorruptCheckpointError, MismatchError, SaveFailedError
from nltrain.checkpoint.files import Part, Staging, layout_of, pack, whole
from nltrain.checkpoint.load import Loaded, load, together
from nltrain.checkpoint.manifest import check_run, checkpoint_name
from nltrain.checkpoint.shares import Piece, assign, table
from nltrain.checkpoint.stored import StoredCheckpoint
from nltrain.checkpoint.tree import canonical_json, dump, sha256_of, split
from nltrain.checkpoint.writer import SaveJob, SaveResult, SaveWriter
from nltrain.collectives import Ranks
from nltrain.fragment import Fragment
from nltrain.store import Store

log = logging.getLogger(__name__)

_MAX_SHARES = 8
Weights = Mapping[str, tuple[str, Sequence[int]]]
Fragments = Mapping[str, Fragment]
# Which fragments exist can depend on the moment of the save (an open window): then the stored state decides.
FragmentsOf = Callable[[Any], Fragments]


class _Shares(NamedTuple):
    """Who writes what, for one set of tables: this rank's files and the layout of all."""

    parts: list[Part]
    layout: bytes


class _BeforeSave(NamedTuple):
    """What the ranks tell each other before a save, as integers."""

    tokens: int
    busy: int  # whether a save is in flight
    tables: int  # digest of the fragments' table and the weights' names
    failures_in_row: int
    stale: int
    state: int  # digest


class Checkpointer:
    """The checkpoints of one attempt of a run.

    attempt: its number; None claims the next one. Claiming fences off all older attempts of the run: they cannot commit
    any more. Raises StaleAttemptError where that number, or a newer one, has begun before.
    """

    def __init__(self, store: Store, run: str, attempt: int | None, config: CheckpointConfig) -> None:
        self.store, self.run, self.config = store, check_run(run), config
        self._ranks, writing_ranks = Ranks(config.timeout_s), Ranks(config.timeout_s)
        nonce = uuid.uuid4().hex
        self.attempt: int = self._ranks.from_first(lambda: claim_attempt(store, run, attempt, nonce))
        self._lineage: list[dict[str, Any]] = []
        self._refused: set[str] = set()
        self._writer = SaveWriter(store, self.run, self.attempt, config, writing_ranks, self._refused)
        self._shares: dict[tuple[int, ...], _Shares] = {}
        self._staging: Staging | None = None
        self._last_save_s = time.monotonic()

    def due(self, tokens_before: int, tokens: int, at_fold: bool = True) -> bool:
        """Whether the quantum that ended at `tokens` calls for a save. Collective only where every_minutes is on.

        at_fold: whether nothing is unreduced now, equal on all ranks; saves by the clock wait for that.
        """
        every = self.config.every_tokens
        if every and tokens // every > tokens_before // every:
            return True
        if self.config.every_minutes and at_fold:
            # Use rank 0's clock so that all ranks decide alike.
            late = time.monotonic() - self._last_save_s >= 60 * self.config.every_minutes
            return bool(self._ranks.gather_ints([late])[0][0])
        return False

    def prepare(self, fragments: Fragments, weights: Weights | None = None) -> None:
        """Decide who writes what and take the staging memory now; otherwise the first save does."""
        self._writer.join()
        rows = self._ranks.gather_ints([_digest([table(fragments), weights])])
        self._lay_out(tuple(row[0] for row in rows), fragments, weights or {})

    def _lay_out(self, key: tuple[int, ...], fragments: Fragments, weights: Weights) -> tuple[Staging, bytes]:
        """(memory for this rank's share, the stored form of the layout of all ranks' shares).

        key: which tables all ranks hold. Collective where the shares of these tables are not known yet.
        """
        if key not in self._shares:
            tables = [[Piece(*row) for row in rows] for rows in self._ranks.gather(table(fragments))]
            names = {name for name, _ in weights.values()}
            parts = [self._parts(rank, pieces, names) for rank, pieces in enumerate(assign(tables))]
            layout = layout_of(part for of_rank in parts for part in of_rank)
            if missing := sorted(names - layout.keys()):
                raise MismatchError(f"weights name the fragment {missing[0]}, which no rank holds")
            named = {parameter: [name, list(shape)] for parameter, (name, shape) in weights.items()}
            # Open windows come and go: a few sets of shares recur.
            if len(self._shares) >= _MAX_SHARES:
                self._shares.pop(next(iter(self._shares)))
            self._shares[key] = _Shares(parts[self._ranks.rank], dump({"tensors": layout, "weights": named}))
        shares = self._shares[key]
        if self._staging is None:
            self._staging = Staging(pin=any(fragment.tensor.is_cuda for fragment in fragments.values()))
        if self._staging.parts != tuple(shares.parts):
            self._staging.lay_out(shares.parts)
        return self._staging, shares.layout

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
            self._writer.join()
        rows = self._before_save(tokens, _digest([table(fragments), weights]), _digest(state))
        self._writer.raise_or_report(max(row.failures_in_row for row in rows), any(row.stale for row in rows))
        name = checkpoint_name(tokens, self.attempt)
        if any(row.busy for row in rows):
            self._say(f"save at {tokens} tokens skipped: the one before is still being written (when_busy=skip)")
            return False
        if tokens == self._writer.saved_tokens:
            self._say(f"checkpoint {name} is there already: not saved again")
            return True
        staging, layout = self._lay_out(tuple(row.tables for row in rows), fragments, weights or {})
        staging.fill(fragments)
        own, own_json = self._own_files(plain, tensors)
        self._last_save_s = time.monotonic()
        self._writer.start(
            SaveJob(
                name,
                tokens,
                staging,
                layout,
                data,
                own,
                own_json,
                config_hash=sha256_of(state["config"]) if "config" in state else "",
                dataset_fingerprint=str(state.get("dataset_fingerprint", "")),
                lineage=self._lineage,
                stall_seconds=self._last_save_s - began,
                retain=retain,
                make_room=self.config.when_full == "make_room" and any(row.failures_in_row for row in rows),
            )
        )
        if not self.config.asynchronous:
            self._writer.join()
        return True

    def _before_save(self, tokens: int, tables: int, state: int) -> list[_BeforeSave]:
        """Every rank's row, in rank order. Raises CheckpointError on all ranks where they do not save the same."""
        writer = self._writer
        own = _BeforeSave(tokens, writer.busy, tables, writer.failures_in_row, bool(writer.stale), state)
        rows = [_BeforeSave(*row) for row in self._ranks.gather_ints(list(own))]
        for what, values in (("token count", {row.tokens for row in rows}), ("state", {row.state for row in rows})):
            if len(values) > 1:
                raise CheckpointError(f"save at {tokens} tokens: the {what} differs between ranks; it must be the same")
        return rows

    def _own_files(self, plain: Any, tensors: Mapping[str, Tensor]) -> tuple[Staging, bytes]:
        """(this rank's own tensors, staged; the JSON that says what they are)."""
        own_tensors = whole(tensors)
        own = Staging()
        own.lay_out(pack(table(own_tensors), f"rank_{self._ranks.rank:05d}/own", self.config.max_file_bytes))
        own.fill(own_tensors)
        return own, dump({"state": plain, "tensors": layout_of(own.parts)})

    def note_in_lineage(self, change: str) -> None:
        """Keep with every later manifest that the run went on with `change` after it was loaded."""
        self._lineage[-1]["changes"].append(change)

    def wait(self) -> None:
        """Wait for the save in flight. Raises SaveFailedError or StaleAttemptError if the last save failed."""
        self._writer.join()
        failed = self._writer.raise_or_report(self._writer.failures_in_row, bool(self._writer.stale))
        if failed is not None:
            raise SaveFailedError(failed.error)

    def settle(self, timeout_s: float) -> None:
        """Wait up to `timeout_s` seconds for the save in flight; `save` and `wait` say how it ended. Not collective."""
        self._writer.settle(timeout_s)

    def close(self) -> None:
        """End the process that uploads, where there is one. Not collective."""
        self._writer.close()

    def poll(self) -> list[SaveResult]:
        """The saves that ended since the last call, for the metrics."""
        return self._writer.poll()

    def newest_complete(self) -> CheckpointInfo | None:
        """The newest checkpoint of this run whose manifest is sound and whose files have their sizes."""
        return next((info for info in reversed(self._list(self.store, self.run)) if info.complete), None)

    def load(self, checkpoint: CheckpointInfo | str, fragments: Fragments, may_be_unused: Iterable[str] = ()) -> Loaded:
        """Fill the fragments in place from a checkpoint of this run; see load.load for what is refused."""
        name = checkpoint if isinstance(checkpoint, str) else checkpoint.name
        return self._load(self.store, self.run, name, fragments, lambda _: [], tuple(may_be_unused), None)

    def resume(
        self,
        fragments: Fragments | FragmentsOf,
        config: Mapping[str, Any] | None = None,
        may_change: Iterable[str] = (),
        derived: Mapping[str, str] = MappingProxyType({}),
        may_be_unused: Iterable[str] = (),
    ) -> Loaded | None:
        """Go on from what config.resume names: fills the fragments and returns the rest, or None to start afresh.

        fragments: the mapping itself, or a function of the stored state that gives it.
        `config` is compared with the stored one, see compare.check_config for `may_change` and `derived`;
        config.may_change counts too. A damaged checkpoint is passed over for the one before, with its reason logged.
        Raises ConfigChangedError where another field differs, CorruptCheckpointError where there are checkpoints but
        none is sound.
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
        changes_since = partial(check_state, config=config, may_change=patterns, derived=derived)
        passed_over: list[tuple[str, str]] = []
        for info in reversed(found):
            reason = info.reason
            if info.complete:
                try:
                    loaded = self._load(store, run, info.name, fragments, changes_since, tuple(may_be_unused), by_hand)
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
        changes_since: Callable[[Any], list[Difference]],
        may_be_unused: tuple[str, ...],
        by_hand: str | None,
    ) -> Loaded:
        self._writer.join()
        stored = together(self._ranks, lambda: StoredCheckpoint(store, run, name, self.config.num_threads))
        changes = together(self._ranks, lambda: changes_since(stored.state))
        for change in changes:
            self._say(f"resuming with another {change}", logging.WARNING)
        wanted = fragments(stored.state) if callable(fragments) else fragments
        loaded = load(stored, wanted, self._ranks, self.config.verify == "hashes", may_be_unused)
        loaded.changes = changes
        step = {"url": store.url, "run": run, "name": name, "attempt": self.attempt, "by_hand": by_hand}
        self._lineage = [*stored.manifest.lineage, step | {"changes": [str(change) for change in changes]}]
        return loaded

    def _parts(self, rank: int, pieces: Sequence[Piece], weights: set[str]) -> list[Part]:
        """Weights in files of their own, so that evaluation and export need not read the optimizer."""
        limit, folder = self.config.max_file_bytes, f"rank_{rank:05d}"
        first = pack([piece for piece in pieces if piece.name in weights], f"{folder}/weights", limit)
        return first + pack([piece for piece in pieces if piece.name not in weights], f"{folder}/state", limit)

    def _say(self, text: str, level: int = logging.INFO) -> None:
        if self._ranks.rank == 0:
            log.log(level, "%s", text)


def _digest(value: Any) -> int:
    """60 bits of the hash: enough to compare ranks."""
    return int(sha256_of(value)[:15], 16)
