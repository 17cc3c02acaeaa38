"""Copies the run's records to the store on a thread of its own, so that a slow store never delays training.

Only the newest copy of a key matters, so copies offered during a put replace one another. A failure prints one line per
key until the next success; it does not stop the run, because the records are not needed to resume.
"""

import threading
from collections.abc import Callable

from nltrain.store import Store


class Publisher:
    """The last offers are sure to be in the store only after `close`."""

    def __init__(self, store: Store, allowed: Callable[[], bool] = lambda: True) -> None:
        """`allowed()` is called before each put; where it returns False the copy is dropped."""
        self._store, self._allowed = store, allowed
        self._changed = threading.Condition()
        self._offered: dict[str, Callable[[], bytes]] = {}
        self._closed = False
        self._failing: set[str] = set()
        self._thread = threading.Thread(target=self._work, name="nltrain-publisher", daemon=True)
        self._thread.start()

    def offer(self, key: str, read: Callable[[], bytes]) -> None:
        """Put what `read` returns, on the other thread; replaces an offer of the same key that still waits."""
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
        """The thread: put one offer after the other until `close`."""
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
            except Exception as error:  # a store may fail in any way; none may stop the run
                if key not in self._failing:
                    print(f"{key} was not published ({error}): training goes on", flush=True)
                self._failing.add(key)
