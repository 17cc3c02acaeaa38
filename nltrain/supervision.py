"""The seam between the loop and whoever watches over it: the loop shows that it lives, and is told when to leave.

A leaf: the loop knows only this protocol; on a cluster `runtime/worker.py` stands behind it, alone nobody does.
"""

import math
from enum import IntEnum
from typing import Protocol


class Wish(IntEnum):
    """What is wanted of the loop, at the next end of a quantum; where ranks were told different things, the largest."""

    GO_ON = 0
    RESIZE = 1
    """Save and wait: the group is about to be made larger or smaller."""
    PREEMPTED = 2
    """Save and leave: a node of the group is going away."""
    STOP = 3
    """Save and end: the user stopped the job."""


LEFT_AS = {Wish.RESIZE: "resized", Wish.PREEMPTED: "preempted", Wish.STOP: "stopped"}

# What a rank is doing, for the watchdog and its report. Those of the first kind may take long without a beat.
STARTING, SAVING, FINISHING = "starting", "saving", "finishing"
WAITING_FOR_DATA, TRAINING, VALIDATING = "waiting for data", "training", "validating"
SLOW_PHASES = (STARTING, SAVING, VALIDATING, FINISHING)


class Supervision(Protocol):
    """All calls return at once; none is collective."""

    started_s: float
    """Unix time at which this rank's process began to work on the run."""

    def beat(self, phase: str, tokens: int) -> None:
        """This rank lives, is in `phase` and has consumed `tokens` (global T)."""

    def wish(self) -> Wish:
        """What this rank has been told so far."""

    def left_s(self) -> float:
        """Seconds until this process is killed, once it was told to leave; infinity where nobody will."""


class Unsupervised:
    """Nobody watches and nobody asks to leave: a run outside a cluster."""

    def __init__(self, started_s: float) -> None:
        self.started_s = started_s

    def beat(self, phase: str, tokens: int) -> None: ...

    def wish(self) -> Wish:
        return Wish.GO_ON

    def left_s(self) -> float:
        return math.inf
