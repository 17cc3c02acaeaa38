"""Wishes that a rank leaves: what this rank's process has been asked, by whom, and whether it has left. No Ray.

The controller asks by calls into the rank's process, the machine by SIGTERM. `worker.py` hands the wish to the training
loop, which acts on it at the end of a quantum.
"""

import math
import sys
import threading
import time
from types import FrameType

from nltrain.supervision import Wish


class Asked:
    """What this process, which is one rank, has been asked so far. The controller may ask before training begins."""

    wish = Wish.GO_ON
    killed_s = math.inf
    """When the process will be killed, on this machine's monotonic clock."""
    training = threading.Event()
    """Set while this rank trains."""
    left = threading.Event()
    """Set once this rank has saved and left so that the group can be resized."""


def ask_to_leave(wish: int, left_s: float = math.inf) -> None:
    """Ask this rank to leave as `wish` (a Wish) says; the process is killed in `left_s` seconds.

    The controller calls it in the rank's process. Of several wishes the largest counts, of several times the first.
    """
    Asked.wish = max(Asked.wish, Wish(wish))
    Asked.killed_s = min(Asked.killed_s, time.monotonic() + left_s)


def wait_until_left(timeout_s: float) -> bool:
    """Whether this rank has saved and left within `timeout_s`. The controller calls it in the rank's process."""
    return Asked.left.wait(timeout_s)


def on_sigterm(signum: int, frame: FrameType | None) -> None:
    """SIGTERM to a rank that trains means that its machine goes away: save first. Otherwise it ends the process."""
    if Asked.training.is_set():
        ask_to_leave(Wish.PREEMPTED)
    else:
        sys.exit(128 + signum)
