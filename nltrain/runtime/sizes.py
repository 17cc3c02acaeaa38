"""How many of the workers that could be placed train: no more than make a quantum faster. The others wait as spares."""

from nltrain.config import RunConfig
from nltrain.levels.quantum import GroupSize, best_group_size


class Sizes:
    """Called with the number of workers that fit on the nodes; returns how many the group shall have.

    Says its choice, with both speeds, whenever it changes and leaves workers out.
    """

    def __init__(self, config: RunConfig) -> None:
        self._sequences = config.quantum_tokens // config.data.seq_len
        self._micro_batch_size = config.train.micro_batch_size
        self._min_workers = config.cluster.min_workers or config.cluster.max_workers
        self._said = ""

    def __call__(self, num_workers: int) -> int:
        if num_workers < self._min_workers:
            return num_workers  # too few to start: what follows waits for more
        size = best_group_size(self._sequences, self._micro_batch_size, num_workers, self._min_workers)
        text = choice(size)
        if text != self._said and size.ranks < num_workers:
            print(text, flush=True)
        self._said = text
        return size.ranks


def choice(size: GroupSize) -> str:
    """One line: what is there, what trains, and the predicted speeds of both."""
    waiting = size.available - size.ranks
    return (
        f"{size.available} workers fit, {size.ranks} train and {waiting} wait as spares: {size.num_micro_steps} "
        f"micro-steps per quantum, predicted speed {size.speed:.3f} of that of one worker per sequence, with all "
        f"{size.available} it would be {size.speed_of_all:.3f}"
    )
