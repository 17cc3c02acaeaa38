"""What rank 0 writes down of a run: rows, W&B, status, lines for people. On the other ranks every call does nothing.

The rows lie in the run's folder, where they can be watched. Every save and the end of the run copy them beside the
checkpoints: a later attempt on another machine needs them, and so does a reader when the first machine is gone.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from nltrain.errors import ConfigError
from nltrain.store import Store, StoreError
from nltrain.track.config import TrackConfig
from nltrain.track.events import read_events, reason_of
from nltrain.track.goodput import goodput
from nltrain.track.lines import attempt_line
from nltrain.track.metrics import MetricsLog, fetch_missing, published_key, read_rows
from nltrain.track.publisher import Publisher
from nltrain.track.report import summarise, write_report
from nltrain.track.rows import AttemptRow, EvaluationRow, GoodputRow, Row, RunRow, StepRow, ValidationRow, of_kind
from nltrain.track.spared import FULL, Spared
from nltrain.track.status import StatusBoard, read_history
from nltrain.track.wandb_view import open_view


@dataclass(frozen=True)
class RunFacts:
    """What the records say of a run that does not change while it trains."""

    name: str
    """The run's name; its keys in the store begin with it."""
    output: str
    """The run's folder on rank 0's machine."""
    checkpoint_url: str
    """URL of the store with the checkpoints of the run."""
    total_tokens: int
    """T at which the run ends."""
    resolved: dict[str, Any]
    """The whole config, JSON-able, for display in W&B."""


class Record:
    """The written side of one rank's run."""

    def __init__(
        self, config: TrackConfig, facts: RunFacts, rank: int, store: Store, may_publish: Callable[[], bool]
    ) -> None:
        """`store`: the one at `facts.checkpoint_url`. `may_publish()`: whether this attempt is still the newest; where
        it is not, nothing in the store is touched."""
        self._facts, self._store, self._writes, self._may_publish = facts, store, rank == 0, may_publish
        self.folder = Path(facts.output)
        self.wandb_id = facts.name.replace("/", "-")
        self._metrics: MetricsLog | None = None
        self._status: StatusBoard | None = None
        self._publisher: Publisher | None = None
        self._spared = Spared("the run's records")
        self._view = open_view(config, rank, facts.name, self.wandb_id, str(self.folder), facts.resolved)

    def begin(self, attempt: int, workers: int, tokens: int, resumed_from: str | None, started_s: float) -> str:
        """Open this attempt's files and write its first row. Returns the line for people that announces it.

        tokens: T at which it starts; resumed_from: name of the checkpoint, if any; started_s: Unix time at which this
        process began to work on the run. Raises ConfigError where the folder belongs to another run or cannot be
        written.
        """
        if not self._writes:
            return ""
        name = self._facts.name
        self._spared(lambda: claim_folder(self.folder, name, self._facts.checkpoint_url))
        self._spared(lambda: fetch_missing(self._store, name, self.folder))
        before = [row.tokens for row in of_kind(read_rows(self.folder), StepRow)]
        history = read_history(self._store, name) if attempt > 1 else {}
        lost = max(0, max(before, default=0) - tokens, history.get("max_tokens", 0) - tokens)
        reason = self._why_again(history) if attempt > 1 else ""
        self._metrics = MetricsLog(self.folder, attempt)
        self._publisher = Publisher(self._store, self._may_publish)
        self._status = StatusBoard(self.folder, self._publisher, name)
        self._status.restore(history)
        self._status.begin(
            attempt=attempt,
            workers=workers,
            from_tokens=tokens,
            tokens_lost=lost,
            reason=reason,
            time_s=time.time(),
        )
        self.row(
            AttemptRow(
                tokens=tokens,
                workers=workers,
                resumed_from=resumed_from,
                tokens_lost=lost,
                reason=reason,
                started_s=round(started_s, 3),
                python=sys.version.split()[0],
                torch=torch.__version__,
            )
        )
        return attempt_line(attempt, workers, tokens, resumed_from, lost, reason)

    def row(self, row: RunRow) -> None:
        """Write a row, and show it in W&B. The attempt and the time are filled in."""
        if self._metrics:
            self._view.log(self._metrics.log(row))

    def say(self, text: str) -> None:
        """Print a line for people."""
        if self._writes:
            print(text, flush=True)

    def show(self, state: str, tokens: int, force: bool = False, **values: Any) -> None:
        """Bring `status.json` up to date: `tokens` is T, `values` are further entries of it."""
        if self._status:
            self._status.update(
                force,
                state=state,
                tokens=tokens,
                total_tokens=self._facts.total_tokens,
                checkpoint_url=self._facts.checkpoint_url,
                output=self._facts.output,
                **values,
            )

    def goodput(self, tokens: int) -> None:
        """Where the time went so far, as a row of its own."""
        rows = read_rows(self.folder) if self._writes else []
        if _has_steps(rows):
            report = goodput(rows)
            parts: dict[str, Any] = {each.name: report[each.name] for each in fields(GoodputRow) if each.name in report}
            self.row(GoodputRow(tokens=tokens, **parts))

    def publish(self) -> None:
        """Copy this attempt's rows beside the checkpoints, while training goes on; `close` waits for it."""
        if self._publisher and self._metrics:
            path = self._metrics.path
            self._publisher.offer(published_key(self._facts.name, path), path.read_bytes)

    def missing_evaluations(self, tokens: int, names: Sequence[str]) -> list[str]:
        """Those of `names` that have no row at T = `tokens` although the step to there is on record. Rank 0 knows."""
        rows = [row for row in read_rows(self.folder) if row.tokens == tokens]
        if not self._writes or not of_kind(rows, StepRow):
            return []
        done = {row.name for row in of_kind(rows, EvaluationRow)} | {row.kind for row in of_kind(rows, ValidationRow)}
        return [name for name in names if name not in done]

    def report(self) -> dict[str, Any] | None:
        """Write summary and plots; returns the summary. None on the other ranks, and where no step was ever logged."""
        if not self._writes:
            return None
        if not _has_steps(read_rows(self.folder)):
            self.say(f"no step is in the metrics of {self.folder} or of the store: no summary")
            return None
        summary: list[dict[str, Any]] = []
        self._spared(lambda: summary.append(write_report(self.folder)))
        return summary[0] if summary else summarise(read_rows(self.folder))

    def note_rank(self, who: dict[str, Any]) -> None:
        """Write down which process is this rank: `ranks/rank_0000.json` in the run's folder. Every rank writes one."""

        def write() -> None:
            ranks = self.folder / "ranks"
            ranks.mkdir(parents=True, exist_ok=True)
            partial = ranks / f".rank_{who['rank']:04d}"
            partial.write_text(json.dumps(who | {"time_s": time.time()}))
            partial.replace(ranks / f"rank_{who['rank']:04d}.json")

        self._spared(write)

    def close(self, exit_code: int) -> None:
        """Close files and W&B; wait for the copies to the store. `exit_code`: 0 where the run went well."""
        self._view.close(exit_code)
        if self._metrics:
            self._metrics.close()
        if self._publisher:
            self._publisher.close()

    def _why_again(self, history: dict[str, Any]) -> str:
        """What the controller or a watchdog noted since the last attempt began."""
        since = max((attempt["attempt"] for attempt in history.get("attempts", [])), default=0)
        try:
            return reason_of(read_events(self._store, self._facts.name, since)) or "submitted again"
        except StoreError as error:
            return f"reason not known ({error})"


def _has_steps(rows: Sequence[Row]) -> bool:
    """Whether a start and a step are on record: a full disk may have lost them."""
    return bool(of_kind(rows, AttemptRow) and of_kind(rows, StepRow))


def claim_folder(folder: Path, name: str, checkpoint_url: str) -> None:
    """Make `folder` that of run `name`: nothing in the rows says which of two runs they belong to.

    Raises ConfigError where it belongs to another run or cannot be written, OSError where only room is lacking.
    """
    owner = folder / "run.json"
    try:
        if owner.exists() and (other := _name_of_run(owner)) not in ("", name):
            raise ConfigError(f"output={folder}: holds the run {other!r}; give {name!r} a folder of its own")
        folder.mkdir(parents=True, exist_ok=True)
        owner.write_text(json.dumps({"name": name, "checkpoint_url": checkpoint_url}))
    except OSError as error:
        if error.errno in FULL:
            raise
        raise ConfigError(
            f"output={folder}: cannot be written ({error.strerror}); name a folder that rank 0 may write"
        ) from error


def _name_of_run(owner: Path) -> str:
    """The run that a folder belongs to; empty where a full disk cut the note short."""
    try:
        return str(json.loads(owner.read_text())["name"])
    except ValueError:
        return ""
