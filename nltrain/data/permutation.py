"""The order of one dataset, epoch by epoch, without a list of its sequences; and the bijection of [0, n) behind it.

An epoch draws an order of shards, cuts it into windows of `window_shards` shards and permutes the sequences of each
window. The next epoch draws another order, so other shards share a window. Memory is O(shards) for each epoch held,
whatever the number of sequences; any position costs the same.
"""

from collections import OrderedDict
from typing import NamedTuple

import numpy as np

from nltrain.data.hashing import key64, mix64

FEISTEL_ROUNDS = 4
EPOCHS_HELD = 4


def permute(values: np.ndarray, n: int, key: int) -> np.ndarray:
    """The images of `values` (integers in [0, n)) under a pseudo-random bijection of [0, n) drawn by `key`.

    A balanced Feistel network over the next even number of bits, walked along its cycle until it falls below n.
    """
    half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    images = values.astype(np.uint64)
    pending = np.arange(len(images))
    while len(pending):
        left, right = images[pending] >> shift, images[pending] & mask
        for round_number in range(FEISTEL_ROUNDS):
            left, right = right, left ^ (mix64(right, key + round_number & 0xFFFFFFFFFFFFFFFF) & mask)
        walked = (left << shift) | right
        images[pending] = walked
        pending = pending[walked >= np.uint64(n)]
    return images.astype(np.int64)


class _Epoch(NamedTuple):
    shards: np.ndarray  # [shards] in the order of this epoch
    first_positions: np.ndarray  # [shards + 1] position of each one's first sequence before the permutation
    window_positions: np.ndarray  # [windows + 1]


class EpochOrder:
    """Cursor -> (epoch, shard, offset) for one dataset; a pure function of (key, sequences_per_shard, window_shards).

    The cursor counts the sequences read from this dataset, over all epochs.
    """

    def __init__(self, key: int, sequences_per_shard: np.ndarray, window_shards: int):
        self.key, self.window_shards = key, window_shards
        self.sequences_per_shard = np.asarray(sequences_per_shard, np.int64)
        self.num_sequences = int(self.sequences_per_shard.sum())
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()

    def locate(self, cursors: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(epoch, shard, offset), each [n] int64, of the sequences at these cursors [n]."""
        cursors = np.asarray(cursors, np.int64)
        epochs, positions = np.divmod(cursors, self.num_sequences)
        shards, offsets = np.empty_like(cursors), np.empty_like(cursors)
        for number in np.unique(epochs):
            epoch = self._epoch(int(number))
            windows = np.searchsorted(epoch.window_positions, positions, side="right") - 1
            for window in np.unique(windows[epochs == number]):
                chosen = np.nonzero((epochs == number) & (windows == window))[0]
                first, end = epoch.window_positions[window : window + 2]
                key = key64(self.key, "samples", int(number), int(window))
                mixed = first + permute(positions[chosen] - first, int(end - first), key)
                places = np.searchsorted(epoch.first_positions, mixed, side="right") - 1
                shards[chosen] = epoch.shards[places]
                offsets[chosen] = mixed - epoch.first_positions[places]
        return epochs, shards, offsets

    def shards_from(self, cursor: int, num_windows: int) -> list[list[int]]:
        """The shards of num_windows windows from the one at this cursor on, over the end of the epoch too."""
        number, position = divmod(cursor, self.num_sequences)
        epoch = self._epoch(number)
        window = int(np.searchsorted(epoch.window_positions, position, side="right")) - 1
        found: list[list[int]] = []
        while len(found) < num_windows:
            if window == len(epoch.window_positions) - 1:
                number, window = number + 1, 0
                epoch = self._epoch(number)
            first = window * self.window_shards
            found.append([int(shard) for shard in epoch.shards[first : first + self.window_shards]])
            window += 1
        return found

    def _epoch(self, number: int) -> _Epoch:
        epoch = self._epochs.get(number)
        if epoch is None:
            num_shards = len(self.sequences_per_shard)
            drawn = mix64(np.arange(num_shards), key64(self.key, "shards", number))
            shards = np.argsort(drawn, kind="stable")
            first_positions = np.concatenate([[0], np.cumsum(self.sequences_per_shard[shards])])
            window_starts = np.arange(0, num_shards, self.window_shards)
            window_positions = np.concatenate([first_positions[window_starts], [self.num_sequences]])
            epoch = _Epoch(shards, first_positions, window_positions)
            self._epochs[number] = epoch
            if len(self._epochs) > EPOCHS_HELD:
                self._epochs.popitem(last=False)
        return epoch
