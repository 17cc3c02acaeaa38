"""Loading on all ranks together: each reads what it needs, every file is hashed, and all succeed or all fail."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from nltrain.checkpoint import errors
from nltrain.checkpoint.compare import Difference
from nltrain.checkpoint.errors import CheckpointError, MismatchError
from nltrain.checkpoint.manifest import Manifest
from nltrain.checkpoint.stored import StoredCheckpoint
from nltrain.collectives import Ranks
from nltrain.fragment import Fragment
from nltrain.store import StoreError

T = TypeVar("T")


@dataclass
class Loaded:
    """What a run goes on from; the fragments have been filled."""

    name: str
    tokens: int
    manifest: Manifest
    state: Any
    """The JSON state, equal on all ranks."""
    rank_state: Any
    """This rank's own state; None where the checkpoint was saved by another number of ranks."""
    same_world_size: bool
    stored: StoredCheckpoint
    """For the own states of the ranks that saved: stored.rank_state(r), r < manifest.world_size."""
    changes: list[Difference] = field(default_factory=list)
    """Config fields that differ from the stored ones, all allowed."""
    passed_over: list[tuple[str, str]] = field(default_factory=list)
    """(name, reason) of newer folders that were no sound checkpoints."""


def together(ranks: Ranks, operation: Callable[[], T]) -> T:
    """The result of `operation` where it succeeded on all ranks; otherwise one rank's error, raised on all alike."""
    failure: Exception | None = None
    result: T | None = None
    try:
        result = operation()
    except (CheckpointError, StoreError) as error:
        failure = error
    reports = ranks.gather(None if failure is None else [type(failure).__name__, str(failure)])
    found = [(kind, text, rank) for rank, report in enumerate(reports) if report for kind, text in [report]]
    if not found:
        return result  # type: ignore[return-value]
    # A store that cannot be reached says nothing about the checkpoint: it must not look like a corrupt one.
    kind, text, rank = min(found, key=lambda item: hasattr(errors, item[0]))
    if not hasattr(errors, kind):
        raise StoreError(text if rank == ranks.rank else f"rank {rank}: {text}") from failure
    raise getattr(errors, kind)(text) from failure


def load(
    stored: StoredCheckpoint,
    fragments: Mapping[str, Fragment],
    ranks: Ranks,
    hashed: bool,
    may_be_unused: tuple[str, ...] = (),
) -> Loaded:
    """Fill the fragments in place from their overlaps with the stored pieces, whatever the two world sizes.

    Raises MismatchError naming entries that are missing or of another size or dtype, or stored but asked for by no
    rank (unless they match a pattern of `may_be_unused`); CorruptCheckpointError for damage. On an error the
    fragments' content is undefined.
    """
    same = stored.manifest.world_size == ranks.size
    targets = together(ranks, lambda: stored.targets(fragments))
    asked = {name for names in ranks.gather(sorted(fragments)) for name in names}
    unused = [
        name
        for name in sorted(stored.layout.keys() - asked)
        if not any(fnmatchcase(name, pattern) for pattern in may_be_unused)
    ]
    if unused:
        raise MismatchError(
            f"{stored.run}/{stored.name} holds {', '.join(unused[:8])}{', ...' if len(unused) > 8 else ''} "
            f"({len(unused)} in all), which this model does not have: resume with the model and levels it had"
        )
    plain: Any = None
    own: dict = {}
    if same:
        plain, own, own_targets = together(ranks, lambda: stored.open_rank_state(ranks.rank))
        targets = targets | own_targets
    reads = set(targets)
    if hashed:
        read_by = ranks.gather(sorted(reads))
        unread = sorted(stored.files.keys() - {path for paths in read_by for path in paths})
        reads |= set(unread[ranks.rank :: ranks.size])
    together(ranks, lambda: stored.read(targets, sorted(reads), hashed))
    rank_state = together(ranks, lambda: stored.join_rank_state(plain, own)) if same else None
    return Loaded(stored.name, stored.manifest.tokens, stored.manifest, stored.state, rank_state, same, stored)
