"""Which checkpoints a run has, which attempt is alive, and what may be deleted.

Guarantees: an attempt's number is claimed by an atomic create, so no two attempts have the same. Claiming writes a
tombstone into every older unfinished folder, so late commits fail; a commit also looks for newer claims before it
creates its manifest. So an older attempt that wakes up, wherever it was stopped, cannot commit. Nothing outside the
run's own folders is ever listed for deletion. Limits: listings must show every object that was written before (S3 and
local folders do).
"""

import logging
import re
import time
from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import NamedTuple

from nltrain.checkpoint.errors import CheckpointError, CorruptCheckpointError, MismatchError, StaleAttemptError
from nltrain.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    check_run,
    checkpoints_prefix,
    key_of,
    parse_manifest,
    parse_name,
    tombstone,
)
from nltrain.checkpoint.tree import canonical_json
from nltrain.store import Store, StoreError, open_store
from nltrain.store.places import split_url
from nltrain.store.probe import check_atomic_create

log = logging.getLogger(__name__)
_CLAIM = re.compile(r"(\d{6,})\.json")


class CheckpointInfo(NamedTuple):
    """One folder of a run, as a listing shows it; newest last when sorted by `order`."""

    name: str
    tokens: int
    attempt: int
    complete: bool
    num_bytes: int  # of the files that are there
    created_s: float  # of the manifest, seconds since the epoch; of the newest file where there is none
    reason: str  # why it is not complete; empty where it is
    damaged: bool  # it has a manifest, but that or a file is not what was committed
    closed: bool  # its manifest key says that it was abandoned or deleted
    num_files: int

    @property
    def order(self) -> tuple[int, int]:
        """A later attempt's checkpoints are newer even at fewer tokens: it may have fallen back to an older one."""
        return self.attempt, self.tokens


def list_checkpoints(store: Store, run: str) -> list[CheckpointInfo]:
    """All folders of the run, oldest first; complete: its manifest is sound and every file has its size."""
    prefix = checkpoints_prefix(check_run(run))
    folders: dict[str, dict[str, tuple[int, float]]] = defaultdict(dict)
    for item in store.list(prefix):
        name, _, path = item.key.removeprefix(prefix).partition("/")
        if parse_name(name) and path:
            folders[name][path] = (item.num_bytes, item.modified_s)
    found = []
    for name, files in folders.items():
        tokens, attempt = parse_name(name) or (0, 0)
        created_s, reason, damaged, closed = max(modified for _, modified in files.values()), "", False, False
        if MANIFEST not in files:
            reason = "it has no manifest: unfinished"
        else:
            try:
                manifest = parse_manifest(store.get(key_of(run, name)), run, name)
                if isinstance(manifest, str):
                    reason, closed = manifest, True
                else:
                    check_sizes(manifest, {path: num_bytes for path, (num_bytes, _) in files.items()})
                    created_s = manifest.created_s
            except CorruptCheckpointError as error:
                reason, damaged = str(error), True
        size = sum(num_bytes for num_bytes, _ in files.values())
        found.append(
            CheckpointInfo(
                name, tokens, attempt, not reason, size, created_s, reason, damaged, closed, num_files=len(files)
            )
        )
    return sorted(found, key=lambda info: info.order)


def read_manifest(store: Store, run: str, name: str) -> Manifest:
    """Raises CorruptCheckpointError where it is damaged, abandoned, or another run's."""
    found = parse_manifest(store.get(key_of(run, name)), run, name)
    if isinstance(found, str):
        raise CorruptCheckpointError(f"{run}/{name} was abandoned: {found}")
    return found


def check_sizes(manifest: Manifest, num_bytes_of: dict[str, int]) -> None:
    """Raises CorruptCheckpointError naming each file that is missing or has another size."""
    wrong = []
    for entry in manifest.files:
        there = num_bytes_of.get(entry.path)
        if there is None:
            wrong.append(f"{entry.path} is missing ({entry.num_bytes} bytes)")
        elif there != entry.num_bytes:
            wrong.append(f"{entry.path} has {there} bytes instead of {entry.num_bytes}")
    if wrong:
        raise CorruptCheckpointError(f"{manifest.run}/{manifest.name}: " + "; ".join(wrong))


def attempts(store: Store, run: str) -> list[int]:
    """The claimed attempts of a run, ascending."""
    prefix = f"{check_run(run)}/attempts/"
    matches = [_CLAIM.fullmatch(item.key.removeprefix(prefix)) for item in store.list(prefix)]
    return sorted(int(match[1]) for match in matches if match)


def claim_attempt(store: Store, run: str, attempt: int | None = None, nonce: str = "") -> int:
    """Begin attempt number `attempt` (None: the next free one) and fence off all older ones; returns the number.

    Raises StaleAttemptError where that number, or a newer one, has begun before, StoreError where the store knows no
    atomic create: there is no fence without it.
    """
    check_atomic_create(store, f"{check_run(run)}/attempts")
    while True:
        taken = attempts(store, run)
        number = attempt if attempt is not None else (taken[-1] + 1 if taken else 1)
        if taken and taken[-1] >= number:
            raise StaleAttemptError(
                f"attempt {number} of run {run} cannot begin: attempt {taken[-1]} has begun already; use a higher one"
            )
        claim = canonical_json({"attempt": number, "begun_s": time.time(), "nonce": nonce})
        if store.put_if_absent(f"{run}/attempts/{number:06d}.json", claim):
            break
        if attempt is not None:
            raise StaleAttemptError(f"attempt {number} of run {run} was begun by another process at the same moment")
    for info in list_checkpoints(store, run):
        if info.attempt < number and not info.complete:
            reason = f"attempt {number} began before attempt {info.attempt} had committed it"
            # False where a manifest is there already: a commit that came first, a damaged one, or an earlier tombstone.
            if store.put_if_absent(key_of(run, info.name), tombstone(run, info.name, number, reason)):
                log.info("unfinished checkpoint %s/%s closed: %s", run, info.name, reason)
    return number


def check_alive(store: Store, run: str, attempt: int) -> None:
    """Raises StaleAttemptError once a newer attempt has begun."""
    newest = max(attempts(store, run), default=attempt)
    if newest > attempt:
        raise StaleAttemptError(
            f"attempt {attempt} of run {run} is stale: attempt {newest} has begun; this process must stop"
        )


def commit(store: Store, manifest: Manifest) -> None:
    """Make the folder a checkpoint: create its manifest. All files must be there.

    Raises StaleAttemptError where a newer attempt has begun or the folder is closed, StoreError where the manifest
    could not be written.
    """
    check_alive(store, manifest.run, manifest.attempt)
    data, key = manifest.to_bytes(), key_of(manifest.run, manifest.name)
    try:
        created = store.put_if_absent(key, data)
    except StoreError:
        _give_up(store, manifest)
        raise
    # The answer to a create that did happen may have been lost: what is there decides.
    if not created and store.get(key) != data:
        found = parse_manifest(store.get(key), manifest.run, manifest.name)
        why = found if isinstance(found, str) else f"it was committed before, at {found.created_s}"
        raise StaleAttemptError(
            f"{manifest.run}/{manifest.name} cannot be committed by attempt {manifest.attempt}: {why}"
        )


def _give_up(store: Store, manifest: Manifest) -> None:
    """After a create whose outcome is not known: close the folder, unless it is a checkpoint, and free its room."""
    try:
        closed = tombstone(manifest.run, manifest.name, manifest.attempt, "its manifest could not be written")
        if store.put_if_absent(key_of(manifest.run, manifest.name), closed):
            _delete_files(store, manifest.run, manifest.name)
    except StoreError as error:
        log.warning("what the failed save of %s/%s left stays: %s", manifest.run, manifest.name, error)


def discard_unfinished(store: Store, run: str, name: str) -> None:
    """Remove the files of a save that failed before its manifest; what cannot be removed is logged and stays."""
    try:
        _delete_files(store, run, name)
    except StoreError as error:
        log.warning("what the failed save of %s/%s left could not be removed: %s", run, name, error)


def to_delete(
    checkpoints: Sequence[CheckpointInfo],
    keep_last: int,
    keep_every_tokens: int = 0,
    refused: Collection[str] = (),
) -> list[str]:
    """Names of the complete checkpoints that retention deletes; a pure function.

    Kept: the newest `keep_last`; for each multiple of `keep_every_tokens` the first at or after it; those in `refused`,
    which failed verification and count towards neither. Incomplete folders are never named.
    """
    sound = sorted((c for c in checkpoints if c.complete and c.name not in refused), key=lambda info: info.order)
    kept = {info.name for info in sound[-max(1, keep_last) :]}
    if keep_every_tokens:
        first: dict[int, str] = {}
        for info in sorted(sound, key=lambda info: (info.tokens, info.attempt)):
            first.setdefault(info.tokens // keep_every_tokens, info.name)
        kept |= {name for bucket, name in first.items() if bucket > 0}
    return [info.name for info in sound if info.name not in kept]


def delete_checkpoint(store: Store, run: str, name: str, attempt: int) -> None:
    """Remove one checkpoint: first replace its manifest with a tombstone, then delete its files.

    The tombstone stays, a few hundred bytes, because the attempt that wrote the folder might still retry its commit.
    Raises CheckpointError where `name` is no checkpoint folder.
    """
    found = parse_name(name)
    if found is None:
        raise CheckpointError(f"{name!r} is no checkpoint folder: nothing was deleted")
    store.put(key_of(run, name), tombstone(run, name, attempt, f"deleted by attempt {attempt} (retention)"))
    _delete_files(store, run, name)
    if found[1] == attempt:
        store.delete(key_of(run, name))


def _delete_files(store: Store, run: str, name: str) -> None:
    folder = key_of(run, name, "")
    store.delete_many([item.key for item in store.list(folder) if item.key != folder + MANIFEST])


def apply_retention(
    store: Store, run: str, attempt: int, keep_last: int, keep_every_tokens: int, refused: Collection[str] = ()
) -> list[str]:
    """Delete what the policy does not keep, and the files of closed folders of older attempts; returns the names.

    Only the live attempt calls this, after a commit of its own. A folder in flight has no manifest and is left alone.
    Raises StaleAttemptError where a newer attempt has begun.
    """
    found = list_checkpoints(store, run)
    going = to_delete(found, keep_last, keep_every_tokens, refused)
    for name in going:
        check_alive(store, run, attempt)
        delete_checkpoint(store, run, name, attempt)
    for info in found:
        if info.closed and info.attempt < attempt and info.num_files > 1:
            _delete_files(store, run, info.name)
    return going


def split_resume_url(text: str) -> tuple[Store, str, int | None]:
    """(store, run, tokens) of URL[@tokens], where URL is a run's folder. Raises MismatchError for anything else."""
    url, at, number = text.rpartition("@")
    if not (at and number.isdigit()):
        url, number = text, ""
    parent, run = split_url(url)
    if not parent or not run:
        raise MismatchError(
            f"checkpoint.resume={text!r} is no URL[@tokens] of a run's folder, such as s3://b/runs/x@1000"
        )
    return open_store(parent), run, int(number) if number else None
