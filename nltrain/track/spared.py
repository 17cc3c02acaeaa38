"""Writes whose failure must not end a training run: a full disk costs records, not the run.

While writes fail, one line a minute says so.
"""

import errno
import math
import time
from collections.abc import Callable

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SAY_EVERY_S = 60.0


class Spared:
    """Runs writes of one kind."""

    def __init__(self, what: str) -> None:
        """`what` names the writes in the printed lines: "metrics"."""
        self._what, self._lost = what, 0
        self._said_s = -math.inf

    def __call__(self, write: Callable[[], object]) -> None:
        """Run `write`; an OSError is printed instead of raised."""
        try:
            write()
        except OSError as error:
            self._lost += 1
            where = f" {error.filename}" if error.filename else ""
            self._say(
                f"{self._what} cannot be written{where}: {error.strerror}: they are lost until that is mended; "
                "training goes on"
            )
        else:
            if self._lost and self._say(f"{self._what} are written again; {self._lost} were lost"):
                self._lost = 0

    def _say(self, line: str) -> bool:
        """Print the line unless one was printed within the last minute; returns whether it was printed.

        On a disk that is nearly full every other write may fail.
        """
        now_s = time.monotonic()
        if now_s - self._said_s < SAY_EVERY_S:
            return False
        self._said_s = now_s
        print(line, flush=True)
        return True
