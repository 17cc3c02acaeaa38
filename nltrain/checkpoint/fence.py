"""Looks on a thread of its own whether a newer attempt of the run has begun.

Without it a stale attempt would train on until its next save.
"""

import threading

from nltrain.checkpoint.catalog import check_alive
from nltrain.checkpoint.errors import StaleAttemptError
from nltrain.store import Store, StoreError

EVERY_S = 5.0
"""Seconds between two looks: one listing of a few keys each."""


class Fence:
    """Watches one attempt of a run until `close`. every_s: seconds between two looks; None: EVERY_S."""

    def __init__(self, store: Store, run: str, attempt: int, every_s: float | None = None) -> None:
        self.stale = ""
        """Why this attempt must stop; empty while the store has shown no newer one."""
        self._store, self._run, self._attempt = store, run, attempt
        self._every_s = EVERY_S if every_s is None else every_s
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._look, name="nltrain-fence", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Look no more."""
        self._closed.set()

    def _look(self) -> None:
        while not self._closed.wait(self._every_s):
            try:
                check_alive(self._store, self._run, self._attempt)
            except StaleAttemptError as error:
                self.stale = str(error)
                return
            except StoreError:
                continue  # a save reports a store that does not answer; the next look may succeed
