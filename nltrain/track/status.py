"""What a run is doing, for `nltrain status`: one small JSON object in the run's folder and beside its checkpoints.

Rank 0 writes it at most every few seconds, to the store on a thread of its own, so that a slow store never holds up
training. Failing to publish is said once and does not stop the run. The object outlives the machine that rank 0 was on:
a resumed attempt goes on with the history it finds there.
"""

import json
import threading
import time
from pathlib import Path
from typing import Any

from nltrain.track.events import EventStore

KEY = "status.json"
EVERY_S = 5.0


class StatusBoard:
    """`history`: what the earlier attempts left, `max_tokens` and `attempts` among it; empty for a new run."""

    def __init__(self, folder: Path, store: EventStore, run: str) -> None:
        self._path, self._store, self._key = folder / KEY, store, f"{run}/{KEY}"
        self._values: dict[str, Any] = {"run": run, "attempts": [], "max_tokens": 0}
        self._changed = threading.Condition()
        self._pending: bytes | None = None
        self._closed = False
        self._failed = False
        self._written_s = 0.0
        self._thread = threading.Thread(target=self._publish, name="nltrain-status", daemon=True)
        self._thread.start()

    def restore(self, history: dict[str, Any]) -> None:
        """Take over the attempts that an earlier process recorded."""
        self._values |= {name: history[name] for name in ("attempts", "max_tokens") if name in history}

    def begin(self, **attempt: Any) -> None:
        """Record the start of an attempt."""
        self._values["attempts"] = [*self._values["attempts"], attempt]

    def update(self, force: bool = False, **values: Any) -> None:
        """Merge values; write them out when the last time is `EVERY_S` ago, or now with `force`."""
        self._values |= values
        self._values["max_tokens"] = max(self._values["max_tokens"], self._values.get("tokens", 0))
        now_s = time.time()
        if not force and now_s - self._written_s < EVERY_S:
            return
        self._written_s = now_s
        data = json.dumps(self._values | {"time_s": round(now_s, 3)}, indent=1).encode()
        partial = self._path.with_suffix(".partial")
        partial.write_bytes(data)
        partial.replace(self._path)
        with self._changed:
            self._pending = data
            self._changed.notify()

    def close(self, timeout_s: float = 10.0) -> None:
        """Wait for the last object to be published, for `timeout_s` at most."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout_s)

    def _publish(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending is not None or self._closed)
                data, self._pending = self._pending, None
            if data is None:
                return
            try:
                self._store.put(self._key, data)
                self._failed = False
            except Exception as error:  # a view of the run, whatever the store's trouble is
                if not self._failed:
                    print(f"status was not published ({error}): training goes on", flush=True)
                self._failed = True


def read_history(store: EventStore, run: str, missing: type[Exception]) -> dict[str, Any]:
    """The last object of the run; empty where the store raises `missing`."""
    try:
        return json.loads(store.get(f"{run}/{KEY}"))
    except missing:
        return {}
