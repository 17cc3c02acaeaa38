"""Whether a failed group of workers is started again: budgets of failures, and detection of crash loops. Pure; no Ray.

A failure with an error message stops the run when the same error comes again without progress beyond it. A failure
without one (a killed process, a lost node) may be bad luck, so more of them in a row are allowed. Preemptions have a
budget of their own. Errors of the configuration stop the run at once, because a restart does not change a config.
"""

import re
import traceback
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from nltrain.runtime.config import ClusterConfig

Kind = Literal["error", "death", "preemption", "capacity", "internal"]

# A restart does not help: the config cannot be run, or another attempt has taken over.
FATAL = {
    "ConfigError",
    "KernelError",
    "CompilerError",
    "ConfigChangedError",
    "MismatchError",
    "ShareError",
    "StaleAttemptError",
}
# Outages of services: they end by themselves, and their text is the same each time.
TRANSIENT = {"StoreError", "SaveFailedError", "FirstRankError"}
# The rank's device is faulty, not the program: the run can go on with another node.
DEVICE = {"DeviceRefusedError"}
_DEVICE = re.compile(
    r"uncorrectable|ECC error|CUDA error: (unspecified launch failure|hardware|unknown error)|NVLink error", re.I
)
# Errors of a rank whose peer is gone: the cause is elsewhere.
_COLLATERAL = re.compile(
    r"Connection (closed|reset|refused)|closed by peer|pair closure|Broken pipe|Socket Timeout|connectFullMesh"
    r"|ncclRemoteError|ncclSystemError|NCCL communicator was aborted|Watchdog caught collective|timed out waiting",
    re.IGNORECASE,
)
# In Ray's text about a lost worker: the lines that name a cause.
_TELLING = re.compile(r"because|terminated|unavailable|exited|killed|died", re.IGNORECASE)
MAX_SILENT = 4
"""Deaths, or transient errors, in a row without progress after which it is a crash loop."""


class NodeLeaving(Exception):
    """This rank has saved and leaves because a node of its group is being taken away."""


class RankError(Exception):
    """An error in a rank's training, with what is needed to compare it with the last one."""

    def __init__(self, rank: int, type_name: str, message: str, where: str, tokens: int, text: str) -> None:
        super().__init__(rank, type_name, message, where, tokens, text)
        self.rank, self.type_name, self.message = rank, type_name, message
        self.where, self.tokens, self.text = where, tokens, text

    def __str__(self) -> str:
        return f"{self.type_name}: {self.message} ({self.where})"

    @classmethod
    def of(cls, error: BaseException, rank: int, tokens: int) -> "RankError":
        """Describe `error`. The traceback is kept as text, so that every process can unpickle it.

        It is left out for errors of our own, whose message says what, where and what to do.
        """
        frames = traceback.extract_tb(error.__traceback__)
        where = f"{frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno}" if frames else "?"
        message = " ".join(str(error).split()) or "no message"
        text = "" if type(error).__module__.startswith("nltrain.") else traceback.format_exc()[-20000:]
        return cls(rank, type(error).__name__, message[:2000], where, tokens, text)

    @property
    def bad_device(self) -> bool:
        """Whether this rank's device is to blame."""
        return self.type_name in DEVICE or bool(_DEVICE.search(self.message))

    @property
    def collateral(self) -> bool:
        """Whether this error is the consequence of the loss of another rank."""
        own = self.type_name in FATAL | TRANSIENT | DEVICE or self.type_name.endswith(("DataError", "CheckpointError"))
        return not own and bool(_COLLATERAL.search(self.message))


@dataclass(frozen=True)
class Failure:
    """Why a group of workers came to its end."""

    kind: Kind
    text: str
    """One line for people."""
    type_name: str = ""
    signature: str = ""
    """Equal for the same error, whatever numbers its message contains."""
    tokens: int | None = None
    """T that the failing rank had reached; None where it is unknown."""
    traceback: str = ""
    ranks: tuple[int, ...] = ()
    """Ranks that were lost or whose device is bad: a strike against their node. An error of the program is none."""
    bad_device: bool = False

    @classmethod
    def of_ranks(cls, failures: dict[int, BaseException], preempted: bool = False) -> "Failure":
        """One failure from the errors of all ranks: the cause is chosen before its consequences."""
        errors = {rank: error for rank, error in sorted(failures.items()) if isinstance(error, RankError)}
        left = any(isinstance(error, NodeLeaving) for error in failures.values())
        silent = {rank: error for rank, error in sorted(failures.items()) if not isinstance(error, RankError)}
        if left or preempted:
            return cls("preemption", "a node was taken away" + (" (checkpoint saved before)" if left else ""))
        for rank, error in errors.items():
            if not error.collateral:
                signature = f"{error.type_name}|{error.where}|{re.sub('[0-9]+', '#', error.message)}"
                text = f"rank {rank}: {error}"
                kind: Kind = "death" if error.bad_device else "error"
                ranks = (rank,) if error.bad_device else ()
                return cls(
                    kind, text, error.type_name, signature, error.tokens, error.text, ranks, bool(error.bad_device)
                )
        for rank, gone in silent.items():
            words = f"rank {rank} was lost: {_last_words(gone)}"
            return cls("death", words, type(gone).__name__, ranks=tuple(silent))
        rank, error = next(iter(errors.items()))
        return cls(
            "death", f"rank {rank} lost contact to another rank: {str(error)[:160]}", error.type_name, "", error.tokens
        )


def _last_words(gone: BaseException) -> str:
    """The sentences of Ray's long text that say what happened to the process or its node."""
    gone = getattr(gone, "health_check_failure", gone)
    lines = [" ".join(line.split()) for line in str(gone).splitlines() if line.strip()]
    telling = [line for line in lines if _TELLING.search(line)] or lines[-1:]
    return "; ".join(telling[:2])[:200] or type(gone).__name__


class Verdict(NamedTuple):
    """Whether the group is started again, and why."""

    retry: bool
    why: str  # one line


class FailureLedger:
    """The failures of a run so far that this job has seen."""

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self._failed_s: list[float] = []
        self._preemptions = 0
        self._last: Failure | None = None
        self._reached = -1  # T that the run had reached by the last failure
        self._in_a_row = 0

    def judge(self, failure: Failure, reached: int | None, now_s: float) -> Verdict:
        """Whether to try again. `reached`: the highest T the run is known to have got to; None where unknown."""
        if failure.kind == "capacity":
            return Verdict(True, "waiting for nodes")
        if failure.kind == "preemption":
            self._preemptions += 1
            limit = self._config.max_preemptions
            if 0 <= limit < self._preemptions:
                return Verdict(False, f"preempted {self._preemptions} times (cluster.max_preemptions={limit})")
            return Verdict(True, f"preemption {self._preemptions}")
        if failure.kind == "internal" or failure.type_name in FATAL:
            return Verdict(False, "no restart would cure it")
        if (same := self._count_same(failure, reached)) is not None:
            return Verdict(False, same)
        window_s = 3600 * self._config.failure_window_hours
        self._failed_s = [*(then_s for then_s in self._failed_s if now_s - then_s < window_s), now_s]
        count, limit = len(self._failed_s), self._config.max_failures
        if 0 <= limit < count:
            hours = self._config.failure_window_hours
            return Verdict(False, f"{count} failures in {hours:g} hours (cluster.max_failures={limit})")
        return Verdict(True, f"failure {count}" + (f" of at most {limit}" if limit >= 0 else ""))

    def cause_removed(self) -> None:
        """The node that failed repeatedly is left out from now on: count the next failure as the first of its kind."""
        self._in_a_row, self._last = 0, None

    def _count_same(self, failure: Failure, reached: int | None) -> str | None:
        """Why this is a crash loop; None where it is not one (yet)."""
        named = failure.kind == "error" and failure.type_name not in TRANSIENT
        # Where an error carries its T, that T must grow: after a restart the run first repeats what was lost.
        position = failure.tokens if named and failure.tokens is not None else reached
        progress = position is None or position > self._reached
        last = self._last
        alike = last is not None and last.kind == failure.kind and last.signature == failure.signature
        self._in_a_row = self._in_a_row + 1 if alike and not progress else 1
        self._last = failure
        self._reached = max(self._reached, position if position is not None else -1)
        limit = self._config.max_same_failures if named else max(MAX_SILENT, self._config.max_same_failures)
        if self._in_a_row < limit:
            return None
        at = f" at {self._reached:,} tokens" if self._reached >= 0 else ""
        return f"the same failure {self._in_a_row} times in a row without progress{at}"


def summary(failure: Failure) -> dict[str, Any]:
    """The fields of the failure that an event row keeps."""
    return {"failure": failure.kind, "text": failure.text[:500], "error_type": failure.type_name}
