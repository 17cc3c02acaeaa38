"""How a quantum of sequences is cut into micro-steps over ranks: a pure function, the same for every rank.

No micro-step crosses the end of a quantum: its last one is short and is spread evenly, so that at most one sequence
separates the fullest rank from the emptiest. A rank without a sequence gets an empty range and must still run a
forward/backward (on a batch whose targets are all ignored): ZeRO-3 gathers weights collectively.
"""

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
