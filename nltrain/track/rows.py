"""The rows of a run's metrics: one frozen dataclass per kind, and the JSON objects that stand in the files.

`row.to_json()` gives the object that is written, with `kind` and `version`; `from_json` reads it back. Guarantees: rows
written before there was a version are read (their fields are the same); a field that is missing is read as the empty
value of its type (0, "", {}, None where the field allows it); a field that this version does not know is left out; a
kind that it does not know becomes an `UnknownRow`. A float that is not finite is written as null: JSON has no NaN.

To add a kind: write its dataclass here and add it to `KINDS`. To add a field: add it to its dataclass; readers see the
empty value in older rows. Raise `VERSION` only where a field changes its meaning.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

VERSION = 1
"""Version of the rows that this code writes. Rows without one are from before: their fields have the same meaning."""

LevelUpdates = dict[str, dict[str, int]]
"""{level: {"done", "skipped", "due"}}, counted from the start of the run."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What all rows have. Fields can also be read by name, `row["tokens"]`, where code treats all kinds alike."""

    kind: ClassVar[str] = ""
    tokens: int
    """T, the global tokens consumed, at that moment."""
    time_s: float = 0.0
    """Unix time; `MetricsLog` sets it when it writes the row."""

    def to_json(self) -> dict[str, Any]:
        """The JSON object of this row; floats that are not finite become None."""
        values = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        return {"kind": self.kind, "version": VERSION} | finite

    def __getitem__(self, name: str) -> Any:
        """The value that `to_json` has under `name`. Raises KeyError."""
        return self.to_json()[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The value that `to_json` has under `name`, or `default`."""
        return self.to_json().get(name, default)


@dataclass(frozen=True, kw_only=True)
class RunRow(Row):
    """A row that the run itself writes, as one of its attempts."""

    attempt: int = 0
    """Number of the attempt, from 1; `MetricsLog` sets it when it writes the row."""


@dataclass(frozen=True, kw_only=True)
class AttemptRow(RunRow):
    """The start of the run, or a resume."""

    kind = "attempt"
    workers: int
    """Ranks that take part."""
    resumed_from: str | None
    """Name of the checkpoint; None for a new run."""
    tokens_lost: int
    """Tokens beyond that checkpoint that earlier attempts had trained and this one trains again."""
    reason: str
    """Why there is another attempt; empty for the first."""
    started_s: float
    """Unix time at which rank 0's process began to work on the run; 0: not known."""
    python: str
    torch: str


@dataclass(frozen=True, kw_only=True)
class StepRow(RunRow):
    """The micro-steps since the last such row, over all ranks."""

    kind = "step"
    step: int
    """Quanta trained since T = 0."""
    total_tokens: int
    """T at which the run ends."""
    step_tokens: int
    """Tokens since the last such row."""
    tokens_per_s: float
    level_updates: LevelUpdates
    loss: float | None
    """Mean over the targets that counted [nats per token]; None where none did."""
    left_out: int
    """Micro-steps in which the guard left a rank out."""
    left_out_tokens: int
    """Targets of the ranks that were left out."""
    seconds: float
    """Wall time of these steps without evaluations and saves."""
    data_wait_s: float
    """Of the rank that waited longest for data."""
    slowest_rank: int
    slowest_over_median: float
    """Forward time of the slowest rank over that of the median rank."""
    memory_bytes: int
    """Peak memory of the rank that needs most."""


@dataclass(frozen=True, kw_only=True)
class LeftOutRow(RunRow):
    """What the guard left out since the last step row, by rank and sample."""

    kind = "left_out"
    left_out_tokens: int
    """Targets left out."""
    parts: list[dict[str, Any]]
    """[{rank, samples (global indices), tokens (targets), reason}]."""


@dataclass(frozen=True, kw_only=True)
class TickRow(RunRow):
    """One due update of one level: made, or skipped."""

    kind = "tick"
    level: str
    period_tokens: int
    window_tokens: int
    """Tokens since the level's last tick."""
    updates: int
    """Updates of the level so far, this one included."""
    lr: float | None
    grad_norm: float | None
    """Of the mean gradient over the window, before the clip."""
    update_ratio: float | None
    """||dW|| / ||W||; None where not measured."""
    drift: float | None
    """||W - W_0|| / ||W_0||; None where not measured."""
    skipped: str
    """Why the update was skipped; empty where it was made."""
    seconds: float
    num_bytes: float
    """Payload that one rank sent for this level since its last tick."""


@dataclass(frozen=True, kw_only=True)
class ValidationRow(RunRow):
    """The evaluation named "validation": the loss on held-out text."""

    kind = "validation"
    loss: float | None
    """Mean over the targets [nats per token]."""
    perplexity: float | None
    targets: int
    unigram_entropy: float | None
    """Cross-entropy of unigram counts on the same targets [nats per token]; None where not counted."""
    bigram_entropy: float | None
    """Cross-entropy of bigram counts on the same targets [nats per token]; None where not counted."""
    seconds: float
    """Wall time of the validation."""


@dataclass(frozen=True, kw_only=True)
class EvaluationRow(RunRow):
    """Any other evaluation."""

    kind = "evaluation"
    name: str
    metrics: dict[str, float | None]
    seconds: float
    """Wall time of the evaluation."""


@dataclass(frozen=True, kw_only=True)
class SaveRow(RunRow):
    """How one save ended; `tokens` is T when this became known."""

    name: str
    """Name of the checkpoint."""
    error: str
    """Why the save failed; empty where it was committed."""
    num_bytes: int
    """Of the files of all ranks."""
    stall_seconds: float
    """Time that training waited for the save."""
    write_seconds: float
    """Time from then to the commit."""
    deleted: list[str]
    """Checkpoints that retention removed."""
    saved_tokens: int
    """T of the checkpoint."""


@dataclass(frozen=True, kw_only=True)
class CheckpointRow(SaveRow):
    """A checkpoint was committed."""

    kind = "checkpoint"


@dataclass(frozen=True, kw_only=True)
class CheckpointFailedRow(SaveRow):
    """A save failed."""

    kind = "checkpoint_failed"


@dataclass(frozen=True, kw_only=True)
class SampleRow(RunRow):
    """Text that the model wrote at the end of the run."""

    kind = "sample"
    text: str


@dataclass(frozen=True, kw_only=True)
class GoodputRow(RunRow):
    """Where the run's time went up to now; see `goodput.py`."""

    kind = "goodput"
    wall_s: float
    training_s: float
    data_wait_s: float
    repeated_s: float
    validation_s: float
    checkpoint_stall_s: float
    startup_s: float
    restart_s: float
    finishing_s: float
    goodput: float
    """Share of the wall time that was training."""
    accounted: float
    """Share of the wall time that the parts explain."""


@dataclass(frozen=True, kw_only=True)
class EndRow(RunRow):
    """The end of an attempt that was not killed."""

    kind = "end"
    reason: str
    """finished, stopped, preempted or resized."""
    level_updates: LevelUpdates
    weights_sha256: str | None = None
    """Digest of the final weights; None where the run is not finished."""


@dataclass(frozen=True, kw_only=True)
class FaultRow(Row):
    """A fault that something outside the run caused; `tokens` is the T that its author saw."""

    kind = "fault"
    signal: str
    rank: int
    pid: int


@dataclass(frozen=True, kw_only=True)
class UnknownRow(RunRow):
    """A row of a kind that this version does not know."""

    values: dict[str, Any] = field(default_factory=dict)
    """The JSON object as it was read."""

    def to_json(self) -> dict[str, Any]:
        """The object as it was read."""
        return self.values


KINDS: dict[str, type[Row]] = {
    cls.kind: cls
    for cls in (
        AttemptRow, StepRow, LeftOutRow, TickRow, ValidationRow, EvaluationRow, CheckpointRow, CheckpointFailedRow,
        SampleRow, GoodputRow, EndRow, FaultRow,
    )
}  # fmt: skip
"""Every kind that is written."""

R = TypeVar("R", bound=Row)
_EMPTY_VALUES: dict[type[Row], dict[str, Any]] = {}


def from_json(values: Mapping[str, Any]) -> Row:
    """The row of a JSON object of any version; see the module's guarantees."""
    cls = KINDS.get(values.get("kind", ""), UnknownRow)
    known: dict[str, Any] = {}
    for name, empty in _empty_values(cls).items():
        found = values.get(name)
        known[name] = empty if found is None else found
    return UnknownRow(**known | {"values": dict(values)}) if cls is UnknownRow else cls(**known)


def of_kind(rows: Iterable[Row], kind: type[R]) -> list[R]:
    """The rows of one class, in order."""
    return [row for row in rows if isinstance(row, kind)]


def evaluation_row(name: str, tokens: int, metrics: Mapping[str, Any], seconds: float) -> ValidationRow | EvaluationRow:
    """The row of an evaluation's result; `metrics` of "validation" are the fields of `ValidationRow`."""
    if name == ValidationRow.kind:
        return ValidationRow(tokens=tokens, seconds=seconds, **metrics)
    return EvaluationRow(tokens=tokens, name=name, metrics=dict(metrics), seconds=seconds)


def _empty_values(cls: type[Row]) -> dict[str, Any]:
    """{field: what is read where it is missing}. Computed once per class, because runs have many rows."""
    if cls not in _EMPTY_VALUES:
        hints = typing.get_type_hints(cls)
        _EMPTY_VALUES[cls] = {each.name: _empty(hints[each.name]) for each in dataclasses.fields(cls)}
    return _EMPTY_VALUES[cls]


def _empty(hint: Any) -> Any:
    """The empty value of a field's type: None where it allows None."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return None
    return (typing.get_origin(hint) or hint)()
