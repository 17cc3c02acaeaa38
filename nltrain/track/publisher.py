"""Copies of what a run writes down, brought to the store on a thread of its own: a slow store never holds up training.

Per key only the newest copy matters, so what is offered while a put is under way is merged. A failure is said once,
until the next success, and does not stop the run: what is published is a view of the run, not the run.
"""

import threading
from collections.abc import Callable

from nltrain.track.metrics import EventStore


class Publisher:
    """`close` it: what was offered last is only then sure to be there."""

    def __init__(self, store: EventStore, allowed: Callable[[], bool] = lambda: True) -> None:
        """`allowed()`: asked before each put; what it refuses is dropped."""
        self._store, self._allowed = store, allowed
        self._changed = threading.Condition()
        self._offered: dict[str, Callable[[], bytes]] = {}
        self._closed = False
        self._failing: set[str] = set()
        self._thread = threading.Thread(target=self._work, name="nltrain-publisher", daemon=True)
        self._thread.start()

    def offer(self, key: str, read: Callable[[], bytes]) -> None:
        """Put what `read` returns, on the other thread; an older offer of the key that still waits is dropped."""
        with self._changed:
            self._offered[key] = read
            self._changed.notify()

    def close(self, timeout_s: float = 30.0) -> None:
        """Wait until everything offered is in the store, for `timeout_s` at most."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            print(f"the store did not take the run's last rows within {timeout_s:g} s: left behind", flush=True)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._offered or self._closed)
                if not self._offered:
                    return
                key = next(iter(self._offered))
                read = self._offered.pop(key)
            try:
                if self._allowed():
                    self._store.put(key, read())
                self._failing.discard(key)
            except Exception as error:  # whatever the store's trouble is
                if key not in self._failing:
                    print(f"{key} was not published ({error}): training goes on", flush=True)
                self._failing.add(key)
