"""W&B as a view of the metrics. Losing it never stops a run: the first error is printed and the view goes dark.

Offline, every resume opens a new W&B run directory; every metric is plotted against our own `tokens` axis and carries
the attempt, so that the pieces line up after `wandb sync`.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

from nltrain.track.config import TrackConfig
from nltrain.track.metrics import Row

SHOWN = ("step", "tick", "validation", "goodput")


class NoView:
    """The view of a run that has none, and of every rank but 0."""

    run_id: str | None = None

    def log(self, row: Row) -> None: ...

    def close(self, exit_code: int = 0) -> None: ...


class WandbView:
    def __init__(self, config: TrackConfig, name: str, run_id: str, folder: str, resolved: dict[str, Any]) -> None:
        import wandb  # 1 s of imports: only on rank 0, only when wanted

        online = config.wandb == "online" or (config.wandb == "auto" and bool(os.environ.get("WANDB_API_KEY")))
        self.run_id = run_id
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

    def log(self, row: Row) -> None:
        if row["kind"] not in SHOWN:
            return
        prefix = f"level/{row['level']}" if row["kind"] == "tick" else row["kind"]
        values = {
            f"{prefix}/{k}": v for k, v in row.items() if isinstance(v, int | float) and k not in ("tokens", "attempt")
        }
        self._run.log(values | {"tokens": row["tokens"], "attempt": row["attempt"]})

    def close(self, exit_code: int = 0) -> None:
        self._run.finish(exit_code=exit_code)


class SafeView:
    """Wraps a view so that its failure costs the view, not the run; says so once."""

    def __init__(self, make: Callable[[], WandbView | NoView]) -> None:
        self._view: WandbView | NoView = NoView()
        self._guard("start", lambda: setattr(self, "_view", make()))

    @property
    def run_id(self) -> str | None:
        return self._view.run_id

    def log(self, row: Row) -> None:
        self._guard("log", lambda: self._view.log(row))

    def close(self, exit_code: int = 0) -> None:
        self._guard("finish", lambda: self._view.close(exit_code))

    def _guard(self, action: str, call: Callable[[], None]) -> None:
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
    """The view that `config` asks for."""
    if rank != 0 or config.wandb == "off":
        return SafeView(NoView)
    return SafeView(lambda: WandbView(config, name, run_id, config.wandb_dir or folder, resolved))
