"""How many of the available workers train: no more than make a quantum faster. The others wait as spares."""

from nltrain.config import RunConfig
from nltrain.levels.quantum import best_group_size


class Sizes:
    """A function of the number of workers that fit on the nodes; returns how many the group shall have.

    Prints its choice, with both speeds, when the choice changes and leaves workers out.
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
        text = size.describe()
        if text != self._said and size.ranks < num_workers:
            print(text, flush=True)
        self._said = text
        return size.ranks
