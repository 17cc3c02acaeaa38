"""What rank 0 writes down of a run: rows, W&B, status, lines for people. On the other ranks every call does nothing.

The rows lie in the run's folder, where they can be watched, and are copied beside the checkpoints with every save and
at the end: another machine that takes rank 0 over finds them there, and so does whoever asks when the first is gone.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nltrain.config import RunConfig, to_dict
from nltrain.errors import ConfigError
from nltrain.store import MissingObjectError, Store, StoreError
from nltrain.track.events import read_events, reason_of
from nltrain.track.goodput import goodput
from nltrain.track.metrics import MetricsLog, fetch_missing, published_key, read_rows
from nltrain.track.publisher import Publisher
from nltrain.track.report import summarise, write_report
from nltrain.track.spared import FULL, Spared
from nltrain.track.status import StatusBoard, read_history
from nltrain.track.wandb_view import open_view


class Record:
    """The written side of one rank's run; `tokens` is T at the moment of the call."""

    def __init__(self, config: RunConfig, rank: int, store: Store, may_publish: Callable[[], bool]) -> None:
        """`may_publish()`: whether this attempt is still the newest; what a newer one has published is not touched."""
        self._config, self._store, self._writes, self._may_publish = config, store, rank == 0, may_publish
        self.folder = Path(config.output)
        self.wandb_id = config.name.replace("/", "-")
        self._metrics: MetricsLog | None = None
        self._status: StatusBoard | None = None
        self._publisher: Publisher | None = None
        self._spared = Spared("the run's records")
        self._view = open_view(config.track, rank, config.name, self.wandb_id, str(self.folder), to_dict(config))

    def begin(
        self, attempt: int, workers: int, tokens: int, resumed_from: str | None, started_s: float
    ) -> tuple[int, str]:
        """Open this attempt's files. Returns (tokens that are trained again, why there is another attempt)."""
        if not self._writes:
            return 0, ""
        name = self._config.name
        self._spared(lambda: claim_folder(self.folder, name, self._config.checkpoint.url))
        self._spared(lambda: fetch_missing(self._store, name, self.folder))
        before = [row["tokens"] for row in read_rows(self.folder) if row["kind"] == "step"]
        history = read_history(self._store, name, MissingObjectError) if attempt > 1 else {}
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
            "attempt",
            tokens,
            workers=workers,
            resumed_from=resumed_from,
            tokens_lost=lost,
            reason=reason,
            started_s=round(started_s, 3),
            python=sys.version.split()[0],
            torch=torch.__version__,
        )
        return lost, reason

    def row(self, kind: str, tokens: int, **values: Any) -> None:
        if self._metrics:
            self._view.log(self._metrics.log(kind, tokens, **values))

    def say(self, text: str) -> None:
        if self._writes:
            print(text, flush=True)

    def show(self, state: str, tokens: int, force: bool = False, **values: Any) -> None:
        """Bring `status.json` up to date."""
        if self._status:
            config = self._config
            self._status.update(
                force,
                state=state,
                tokens=tokens,
                total_tokens=config.num_quanta * config.quantum_tokens,
                checkpoint_url=config.checkpoint.url,
                output=config.output,
                **values,
            )

    def goodput(self, tokens: int) -> None:
        """Where the time went so far, as a row of its own."""
        rows = read_rows(self.folder) if self._writes else []
        if _tells_of_a_run(rows):
            report = goodput(rows)
            self.row("goodput", tokens, **{name: value for name, value in report.items() if isinstance(value, float)})

    def publish(self) -> None:
        """Copy this attempt's rows beside the checkpoints, while training goes on; `close` waits for it."""
        if self._publisher and self._metrics:
            path = self._metrics.path
            self._publisher.offer(published_key(self._config.name, path), path.read_bytes)

    def lacks_validation(self, tokens: int) -> bool:
        """Whether the steps up to `tokens` are on record here, but no validation there. Rank 0 knows."""
        rows = [row for row in read_rows(self.folder) if row.get("tokens") == tokens]
        kinds = {row["kind"] for row in rows}
        return self._writes and "step" in kinds and "validation" not in kinds

    def report(self) -> dict[str, Any] | None:
        """Write summary and plots; None on the other ranks, and where no step was ever logged."""
        if not self._writes:
            return None
        if not _tells_of_a_run(read_rows(self.folder)):
            self.say(f"no step is in the metrics of {self.folder} or of the store: no summary")
            return None
        summary: list[dict[str, Any]] = []
        self._spared(lambda: summary.append(write_report(self.folder)))
        return summary[0] if summary else summarise(read_rows(self.folder))

    def note_rank(self, who: dict[str, Any]) -> None:
        """Which process is this rank, for whoever looks at the run's folder on this machine; each rank's own note."""

        def write() -> None:
            ranks = self.folder / "ranks"
            ranks.mkdir(parents=True, exist_ok=True)
            partial = ranks / f".rank_{who['rank']:04d}"
            partial.write_text(json.dumps(who | {"time_s": time.time()}))
            partial.replace(ranks / f"rank_{who['rank']:04d}.json")

        self._spared(write)

    def close(self, exit_code: int) -> None:
        self._view.close(exit_code)
        if self._metrics:
            self._metrics.close()
        if self._publisher:
            self._publisher.close()

    def _why_again(self, history: dict[str, Any]) -> str:
        """What the controller or a watchdog noted since the last attempt began."""
        since = max((attempt["attempt"] for attempt in history.get("attempts", [])), default=0)
        try:
            return reason_of(read_events(self._store, self._config.name, since)) or "submitted again"
        except StoreError as error:
            return f"reason not known ({error})"


def _tells_of_a_run(rows: list[dict[str, Any]]) -> bool:
    """Whether a start and a step are on record: a full disk may have cost them."""
    return {"attempt", "step"} <= {row["kind"] for row in rows}


def claim_folder(folder: Path, name: str, checkpoint_url: str) -> None:
    """Make `folder` that of run `name`: rows of two runs would be told apart by nothing. Raises ConfigError; OSError
    where only room is lacking."""
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
    """The run that a folder belongs to; empty where a full disk cut the note."""
    try:
        return str(json.loads(owner.read_text())["name"])
    except ValueError:
        return ""
