"""The batches of one rank, made ready ahead of the consumer on threads.

`TokenStream` takes the sample indices of this rank's slice of each micro-step and gives one `Batch` for each. It holds
no position: the caller knows how many samples its finished steps consumed and starts a new stream there. Guarantees:
batches come in the given order, verified; batches and transfers stay within `buffer_bytes`; an error is raised at the
batch that needs the data, after all earlier batches. Limits: the indices are taken ahead of time, so they must not
depend on what the consumer does.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from nltrain.data.batch import BYTES_PER_TOKEN, Arrangement, Batch
from nltrain.data.cache import ShardCache
from nltrain.data.config import DataConfig
from nltrain.data.errors import DataError
from nltrain.data.order import SampleOrder
from nltrain.data.reader import ByteMeter, ShardReader

# Addresses are computed for this many samples at once: one call costs about the same for one sample as for hundreds.
SAMPLES_PER_LOOKUP = 512
_END = object()


class TokenStream:
    """Iterator of batches; close it, or use it in a with block."""

    def __init__(
        self,
        config: DataConfig,
        order: SampleOrder,
        sample_ranges: Iterable[Sequence[int]],
        arrange: Callable[[Tensor], Arrangement] | None = None,
    ):
        """sample_ranges: for each micro-step the sample indices of this rank, possibly none. Raises DataError.

        arrange: `document_starts` of a batch -> its `arrangement`, made on the feeder's thread; None: there is none.
        """
        self.config, self.order, self._arrange = config, order, arrange
        self.wait_s = 0.0  # time the consumer spent waiting for batches
        self.num_batches = 0
        download_bytes = config.buffer_bytes // 4
        self._meter = ByteMeter(config.buffer_bytes - download_bytes)
        _check_cache(config, order)
        cache = ShardCache(config.cache_folder, config.cache_bytes)
        self._reader = ShardReader(order.datasets, cache, config.download_threads, download_bytes)
        self._sample_ranges = iter(sample_ranges)
        self._ready: deque[Batch | BaseException | object] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._feeder = threading.Thread(target=self._feed, name="nltrain-stream", daemon=True)
        self._feeder.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        started_s = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._closed)
            if self._closed:
                raise StopIteration
            item = self._ready[0]
            if isinstance(item, Batch):
                self._ready.popleft()
                self._changed.notify_all()
        self.wait_s += time.perf_counter() - started_s
        if item is _END:
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        assert isinstance(item, Batch)
        self._meter.release(item.num_bytes)
        self.num_batches += 1
        return item

    def close(self) -> None:
        """Stops all threads and discards the batches that were not taken."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._meter.close()
        self._reader.close()
        self._feeder.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def peak_buffer_bytes(self) -> int:
        """Peak bytes of batches made ready plus peak bytes of transfers in flight, so far."""
        return self._meter.peak_bytes + self._reader.meter.peak_bytes

    @property
    def num_damaged_transfers(self) -> int:
        """Transfers with a wrong checksum, each of which was repeated."""
        return self._reader.num_damaged_transfers

    def _feed(self) -> None:
        try:
            for number, (indices, addresses) in enumerate(self._located()):
                if not self._offer(self._make(number, indices, addresses)):
                    return
            self._put(_END)
        except BaseException as error:  # raised in the consumer by __next__
            self._put(error)

    def _located(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(sample indices [n], addresses [n, 3]) of each micro-step."""
        limit = 1  # the first micro-step is located alone, so that the first batch does not wait for the others
        while True:
            chunk: list[np.ndarray] = []
            while sum(len(samples) for samples in chunk) < limit and len(chunk) < limit:
                samples = next(self._sample_ranges, None)
                if samples is None:
                    break
                chunk.append(np.asarray(samples, np.int64))
            if not chunk:
                return
            limit = SAMPLES_PER_LOOKUP
            joined = np.concatenate(chunk)
            addresses = np.empty((0, 3), np.int64)
            if len(joined):
                found = self.order.addresses(joined)
                addresses = np.stack([found.dataset, found.shard, found.offset], axis=1)
            end = 0
            for indices in chunk:
                start, end = end, end + len(indices)
                yield indices, addresses[start:end]

    def _make(self, number: int, indices: np.ndarray, addresses: np.ndarray) -> Batch:
        seq_len = self.order.seq_len
        num_bytes = max(1, len(indices)) * seq_len * BYTES_PER_TOKEN
        self._check_size(len(indices), num_bytes)
        self._meter.acquire(num_bytes)
        batch = self._read(number, indices, addresses)
        if self._arrange:
            batch = replace(batch, arrangement=self._arrange(batch.document_starts))
            self._check_size(len(indices), batch.num_bytes)
            self._meter.acquire(batch.num_bytes - num_bytes)
        return batch.pinned() if torch.cuda.is_available() else batch

    def _check_size(self, num_sequences: int, num_bytes: int) -> None:
        if num_bytes > self._meter.limit_bytes:
            raise DataError(
                f"data.buffer_bytes: {self.config.buffer_bytes}: one batch of {num_sequences} x {self.order.seq_len} "
                f"tokens takes {num_bytes} of the {self._meter.limit_bytes} bytes for batches: raise it to "
                f"{2 * num_bytes} or more"
            )

    def _read(self, number: int, indices: np.ndarray, addresses: np.ndarray) -> Batch:
        """The batch of these samples, without an arrangement; padding where there are none."""
        seq_len = self.order.seq_len
        if not len(indices):
            return Batch.padding(seq_len, self.order.vocab_size)
        by_range = number < self.config.range_read_batches
        if number > 0 or not by_range:
            self._reader.want(self.order.windows_from(int(indices[0])))
        rows = [(int(row[0]), int(row[1]), int(row[2])) for row in addresses]
        return Batch.pack(self._reader.sequences(rows, by_range), indices, seq_len)

    def _offer(self, batch: Batch) -> bool:
        """As `_put`, but waits while prefetch_batches are ready."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._ready) < self.config.prefetch_batches)
        return self._put(batch)

    def _put(self, item: object) -> bool:
        """Hands an item to the consumer; False when the stream is closed."""
        with self._changed:
            if self._closed:
                return False
            self._ready.append(item)
            self._changed.notify_all()
            return True


def _check_cache(config: DataConfig, order: SampleOrder) -> None:
    needed = sum(
        min(len(dataset.shards), 2 * config.window_shards) * max(shard.num_bytes for shard in dataset.shards)
        for dataset in order.datasets
    )
    if config.cache_bytes < needed:
        raise DataError(
            f"data.cache_bytes: {config.cache_bytes}: two windows of {config.window_shards} shards take {needed} "
            "bytes: raise it, or lower data.window_shards"
        )


def sequential_ranges(num_sequences: int, batch_size: int, start: int = 0) -> Iterator[range]:
    """Sample indices [start, num_sequences) in ranges of batch_size, the last one shorter; for evaluation."""
    return (range(i, min(i + batch_size, num_sequences)) for i in range(start, num_sequences, batch_size))
