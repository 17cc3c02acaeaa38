"""What a run is doing, for `nltrain status`: one small JSON object in the run's folder and beside its checkpoints.

Rank 0 writes it at most every few seconds. The copy in the store survives the machine of rank 0: a resumed attempt
continues the history that it finds there.
"""

import json
import time
from pathlib import Path
from typing import Any

from nltrain.store import MissingObjectError, Store
from nltrain.track.publisher import Publisher
from nltrain.track.spared import Spared

KEY = "status.json"
EVERY_S = 5.0


class StatusBoard:
    """The values of `status.json`, in memory, with the methods that change and write them."""

    def __init__(self, folder: Path, publisher: Publisher, run: str) -> None:
        """`folder`: the run's folder; `run`: its name. Nothing is written yet."""
        self._path, self._publisher, self._key = folder / KEY, publisher, f"{run}/{KEY}"
        self._values: dict[str, Any] = {"run": run, "attempts": [], "max_tokens": 0}
        self._written_s = 0.0
        self._spared = Spared("status")

    def restore(self, history: dict[str, Any]) -> None:
        """Take over `attempts` and `max_tokens` of `history`, the object of an earlier attempt; it may be empty."""
        self._values |= {name: history[name] for name in ("attempts", "max_tokens") if name in history}

    def begin(self, **attempt: Any) -> None:
        """Record the start of an attempt."""
        self._values["attempts"] = [*self._values["attempts"], attempt]

    def update(self, force: bool = False, **values: Any) -> None:
        """Merge `values`. Write the object if the last write was `EVERY_S` ago, or in any case with `force`."""
        self._values |= values
        self._values["max_tokens"] = max(self._values["max_tokens"], self._values.get("tokens", 0))
        now_s = time.time()
        if not force and now_s - self._written_s < EVERY_S:
            return
        self._written_s = now_s
        data = json.dumps(self._values | {"time_s": round(now_s, 3)}, indent=1).encode()
        self._spared(lambda: self._write(data))
        self._publisher.offer(self._key, lambda: data)

    def _write(self, data: bytes) -> None:
        partial = self._path.with_suffix(".partial")
        partial.write_bytes(data)
        partial.replace(self._path)


def read_history(store: Store, run: str) -> dict[str, Any]:
    """The run's last object in the store; empty where there is none. Raises StoreError."""
    try:
        return json.loads(store.get(f"{run}/{KEY}"))
    except MissingObjectError:
        return {}
