"""W&B as a view of the metrics. A failure never stops a run: the first error is printed and the view is closed.

Offline, every resume opens a new W&B run directory. Every metric is plotted against our own `tokens` axis and carries
the attempt, so that after `wandb sync` the pieces form one curve.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

from nltrain.track.config import TrackConfig
from nltrain.track.rows import EvaluationRow, GoodputRow, RunRow, StepRow, TickRow, ValidationRow

SHOWN = (StepRow, TickRow, ValidationRow, EvaluationRow, GoodputRow)
"""Rows that W&B gets: all their numbers."""


class NoView:
    """The view of a run without W&B, and of every rank but 0."""

    def log(self, row: RunRow) -> None:
        """Nothing is shown."""

    def close(self, exit_code: int = 0) -> None:
        """Nothing is open."""


class WandbView:
    """A W&B run. Any call may raise: use it through `SafeView`."""

    def __init__(self, config: TrackConfig, name: str, run_id: str, folder: str, resolved: dict[str, Any]) -> None:
        """Open the W&B run `run_id`; its files go to `folder`. `resolved`: the run's config, for display."""
        import wandb  # 1 s of imports: only on rank 0, only when wanted

        online = config.wandb == "online" or (config.wandb == "auto" and bool(os.environ.get("WANDB_API_KEY")))
        os.makedirs(folder, exist_ok=True)
        self._run = wandb.init(
            project=config.wandb_project,
            name=name,
            id=run_id,
            dir=folder,
            config=resolved,
            mode="online" if online else "offline",
            resume="allow" if online else None,
            # W&B may lose the end of a run; it must not hold one up.
            settings=wandb.Settings(silent=True, console="off", init_timeout=30, finish_timeout=15),
        )
        self._run.define_metric("tokens")
        self._run.define_metric("*", step_metric="tokens")

    def log(self, row: RunRow) -> None:
        """Send the numbers of a row, if its kind is shown."""
        if isinstance(row, SHOWN):
            self._run.log(numbers(row) | {"tokens": row.tokens, "attempt": row.attempt})

    def close(self, exit_code: int = 0) -> None:
        """End the W&B run."""
        self._run.finish(exit_code=exit_code)


def numbers(row: RunRow) -> dict[str, float]:
    """{W&B's name of the metric: value} of a row: `step/loss`, `level/slow/lr`, `evaluation/NAME/accuracy`."""
    values = row.to_json()
    prefix = row.kind
    if isinstance(row, TickRow):
        prefix = f"level/{row.level}"
    elif isinstance(row, EvaluationRow):
        prefix = f"evaluation/{row.name}"
        values |= row.metrics
    skipped = ("tokens", "attempt", "version")
    return {f"{prefix}/{k}": v for k, v in values.items() if isinstance(v, int | float) and k not in skipped}


class SafeView:
    """Wraps a view: where it fails, a line is printed once and the view is given up; the run goes on."""

    def __init__(self, make: Callable[[], WandbView | NoView]) -> None:
        """`make` opens the view; it may fail, too."""
        self._view: WandbView | NoView = NoView()
        self._guard("start", lambda: setattr(self, "_view", make()))

    def log(self, row: RunRow) -> None:
        """Show a row. Never raises."""
        self._guard("log", lambda: self._view.log(row))

    def close(self, exit_code: int = 0) -> None:
        """Close the view. Never raises."""
        self._guard("finish", lambda: self._view.close(exit_code))

    def _guard(self, action: str, call: Callable[[], None]) -> None:
        """Run `call`; on any error print it and give the view up."""
        try:
            call()
        except Exception as error:
            self._view = NoView()
            print(
                f"W&B could not {action} ({error}): the run goes on, its metrics are in the JSONL",
                file=sys.stderr,
                flush=True,
            )


def open_view(
    config: TrackConfig, rank: int, name: str, run_id: str, folder: str, resolved: dict[str, Any]
) -> SafeView:
    """The view that `config` asks for; rank 0 alone has one. Never raises."""
    if rank != 0 or config.wandb == "off":
        return SafeView(NoView)
    return SafeView(lambda: WandbView(config, name, run_id, config.wandb_dir or folder, resolved))
