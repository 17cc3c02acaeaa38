"""The seam between the training loop and its supervisor: the loop reports progress and asks whether it must leave.

The loop knows only the protocol. On a cluster `runtime/worker.py` implements it; a run without a supervisor uses
`Unsupervised`. This module imports nothing of the project.
"""

import math
from enum import IntEnum
from typing import Protocol


class Wish(IntEnum):
    """What the supervisor wants at the end of the next quantum; where ranks differ, the largest counts."""

    GO_ON = 0
    RESIZE = 1
    """Save and end: the group of workers will be started again, larger or smaller."""
    PREEMPTED = 2
    """Save and end: a node of the group is about to be taken away."""
    STOP = 3
    """Save and end: the user stopped the job."""


# How the end of such a run is called in its rows and its status.
LEFT_AS = {Wish.RESIZE: "resized", Wish.PREEMPTED: "preempted", Wish.STOP: "stopped"}

# What a rank is doing, for the watchdog and its report. A slow phase may take long without a beat. Saving is a copy to
# host memory; the files are written while training goes on, and only waiting for them is slow.
STARTING, SAVING, WAITING_FOR_SAVE, FINISHING = "starting", "saving", "waiting for a save", "finishing"
WAITING_FOR_DATA, TRAINING, VALIDATING = "waiting for data", "training", "validating"
SLOW_PHASES = (STARTING, WAITING_FOR_SAVE, VALIDATING, FINISHING)


class Supervision(Protocol):
    """What watches one rank. All calls return at once; none is collective."""

    started_s: float
    """Unix time at which this rank's process began to work on the run."""

    def beat(self, phase: str, tokens: int) -> None:
        """Report that this rank makes progress, is in `phase` and has consumed `tokens` (global T)."""

    def wish(self) -> Wish:
        """What is wanted of this rank, as far as it knows by now."""

    def left_s(self) -> float:
        """Seconds until this process is killed, once it was asked to leave; infinity where nothing will kill it."""


class Unsupervised:
    """A run outside a cluster: it has no supervisor and is never asked to leave."""

    def __init__(self, started_s: float) -> None:
        """`started_s`: Unix time at which this process began to work on the run."""
        self.started_s = started_s

    def beat(self, phase: str, tokens: int) -> None:
        """Nothing is reported."""

    def wish(self) -> Wish:
        """Always to go on."""
        return Wish.GO_ON

    def left_s(self) -> float:
        """Always infinity."""
        return math.inf
