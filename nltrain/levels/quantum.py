"""How a quantum of sequences is cut into micro-steps over ranks: a pure function, the same for every rank.

No micro-step crosses the end of a quantum: the last one may be short. Its sequences are spread evenly, so that two
ranks differ by at most one sequence. A rank without a sequence gets an empty range and must still run a forward and
backward, on a batch whose targets are all ignored, because ZeRO-3 gathers weights collectively.
"""

from dataclasses import dataclass
from functools import cache

from nltrain.levels.config import LevelsError


def cut_quantum(num_sequences: int, micro_batch_size: int, world_size: int) -> list[list[range]]:
    """Micro-steps of a quantum of `num_sequences`, each a list over ranks of the range of sequences that rank takes."""
    for name, value in (
        ("num_sequences", num_sequences),
        ("micro_batch_size", micro_batch_size),
        ("world_size", world_size),
    ):
        if value < 1:
            raise LevelsError(f"cut_quantum: {name} = {value}, must be >= 1")
    steps = []
    for first in range(0, num_sequences, micro_batch_size * world_size):
        count = min(micro_batch_size * world_size, num_sequences - first)
        share, extra = divmod(count, world_size)
        start, step = first, []
        for rank in range(world_size):
            size = share + (rank < extra)
            step.append(range(start, start + size))
            start += size
        steps.append(step)
    return steps


# Fixed cost of a micro-step (kernel launches, ZeRO-2's reduction), in sequences of one rank. An estimate: it scales the
# predicted speeds and cannot change which size is best.
MICRO_STEP_COST = 1.0


@dataclass(frozen=True)
class GroupSize:
    """How many of the available ranks train, and the predicted speed."""

    available: int
    ranks: int
    """the fewest that are predicted to be as fast as any number; the others wait as spares"""
    num_micro_steps: int
    """per quantum"""
    padded: int
    """rank-micro-steps of padding per quantum"""
    speed: float
    """quanta per time, relative to one rank per sequence"""
    speed_of_all: float
    """the same if all available ranks trained"""

    def describe(self) -> str:
        """One line: available and training ranks, and the predicted speeds with both numbers."""
        waiting = self.available - self.ranks
        return (
            f"{self.available} workers fit, {self.ranks} train and {waiting} wait as spares: {self.num_micro_steps} "
            f"micro-steps per quantum, predicted speed {self.speed:.3f} of that of one worker per sequence, with all "
            f"{self.available} it would be {self.speed_of_all:.3f}"
        )


@cache
def quantum_cost(num_sequences: int, micro_batch_size: int, world_size: int) -> float:
    """Predicted time of a quantum, in sequences of one rank: in each micro-step all wait for the fullest rank."""
    steps = cut_quantum(num_sequences, micro_batch_size, world_size)
    return sum(MICRO_STEP_COST + len(step[0]) for step in steps)


def best_group_size(num_sequences: int, micro_batch_size: int, available: int, at_least: int = 1) -> GroupSize:
    """The fewest ranks, between `at_least` and `available`, that finish a quantum as soon as any number of them can.

    One more rank often gains nothing: with 128 sequences 63 ranks need as many rounds as 43. The 20 that wait can
    replace lost ranks, so that no quantum becomes slower.
    """
    most = min(available, num_sequences)
    if not 1 <= at_least <= most:
        raise LevelsError(
            f"best_group_size: {available} ranks for {num_sequences} sequences, at least {at_least}: that is no size"
        )
    costs = {size: quantum_cost(num_sequences, micro_batch_size, size) for size in range(at_least, most + 1)}
    size = min(costs, key=lambda ranks: (costs[ranks], ranks))
    steps = cut_quantum(num_sequences, micro_batch_size, size)
    fastest = quantum_cost(num_sequences, micro_batch_size, num_sequences)
    padded = sum(not indices for step in steps for indices in step)
    return GroupSize(available, size, len(steps), padded, fastest / costs[size], fastest / costs[most])


def size_table(num_sequences: int, micro_batch_size: int, num_ranks: int, at_least: int = 1) -> str:
    """A table with one line for each number of available ranks; ranks beyond one per sequence always wait."""
    lines = [
        f"{num_sequences} sequences per quantum, {micro_batch_size} per rank and micro-step; speed 1 is one rank per "
        "sequence",
        f"{'there':>6}{'train':>7}{'spare':>7}{'micro-steps':>13}{'padded':>8}{'speed':>8}{'of all':>8}",
    ]
    for available in range(max(1, at_least), num_ranks + 1):
        size = best_group_size(num_sequences, micro_batch_size, available, min(at_least, num_sequences))
        lines.append(
            f"{available:>6}{size.ranks:>7}{available - size.ranks:>7}{size.num_micro_steps:>13}{size.padded:>8}"
            f"{size.speed:>8.3f}{size.speed_of_all:>8.3f}"
        )
    return "\n".join(lines)
