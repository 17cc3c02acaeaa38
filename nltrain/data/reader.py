"""Sequences by address, from whole cached shards or by range reads, always checked.

`ShardReader` fetches the wanted shards into the local cache on threads. A damaged transfer is repeated; a damaged shard
raises DataError with its URL and the names of its damaged members. Limits: bytes in flight stay within
`in_flight_bytes`; mapped shards belong to the page cache and are not counted.
"""

import hashlib
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from nltrain.data import shards
from nltrain.data.cache import ShardCache
from nltrain.data.dataset import TokenDataset
from nltrain.data.errors import DataError

PART_BYTES = 4 << 20
DAMAGED_TRANSFERS = 3
LOCK_POLL_S = 0.05

ShardId = tuple[int, int]  # (dataset, shard)


class ByteMeter:
    """Counts bytes held, blocks at a limit, records the peak; thread-safe."""

    def __init__(self, limit_bytes: int):
        self.limit_bytes = limit_bytes
        self.held_bytes = self.peak_bytes = 0
        self._changed = threading.Condition()
        self._closed = False

    def acquire(self, num_bytes: int) -> None:
        """Blocks until num_bytes fit below the limit, or nothing else is held."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or self.held_bytes == 0 or self.held_bytes + num_bytes <= self.limit_bytes
            )
            self.held_bytes += num_bytes
            self.peak_bytes = max(self.peak_bytes, self.held_bytes)

    def release(self, num_bytes: int) -> None:
        """Gives back bytes that were acquired."""
        with self._changed:
            self.held_bytes -= num_bytes
            self._changed.notify_all()

    def close(self) -> None:
        """Ends all present and later waits."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class ShardView:
    """The sequences of a whole shard that lies in memory or in a map."""

    def __init__(self, index: shards.ShardIndex, data: memoryview):
        self.index = index
        self._members = [shards.MemberView.cut(index, position, data) for position in range(len(index.members))]

    def sequence(self, offset: int) -> shards.Sequence:
        """The sequence at `offset`, counted in sequences from the shard's beginning."""
        position, slot = divmod(offset, self.index.sequences_per_member)
        return self._members[position].sequence(slot)


class ReaderClosed(Exception):
    """The reader was closed while a thread waited for a shard."""


class ShardReader:
    """Reads sequences of several datasets; close it to stop its threads."""

    def __init__(self, datasets: Sequence[TokenDataset], cache: ShardCache, threads: int, in_flight_bytes: int):
        self.datasets, self.cache = tuple(datasets), cache
        self.meter = ByteMeter(in_flight_bytes)
        self.num_damaged_transfers = 0
        self._views: dict[ShardId, ShardView] = {}
        self._fetches: dict[ShardId, Future[ShardView]] = {}
        self._wanted: list[ShardId] = []
        self._closed = threading.Event()
        self._fetchers = ThreadPoolExecutor(threads, "nltrain-shards")
        self._rangers = ThreadPoolExecutor(max(8, threads), "nltrain-ranges")

    def want(self, wanted: Sequence[ShardId]) -> None:
        """Fetches these shards into the cache, most urgent first, and maps them; releases all others."""
        self._wanted = list(wanted)
        keep = set(wanted)
        self._views = {shard: view for shard, view in self._views.items() if shard in keep}
        for shard, fetch in list(self._fetches.items()):
            if shard not in keep:
                fetch.cancel()
                del self._fetches[shard]
        for shard in wanted:
            if shard not in self._views and shard not in self._fetches:
                self._fetches[shard] = self._fetchers.submit(self._fetch, shard)

    def sequences(self, addresses: Sequence[tuple[int, int, int]], by_range: bool) -> list[shards.Sequence]:
        """The sequences at these (dataset, shard, offset), in order.

        by_range: reads a sequence whose shard is not mapped yet from the store by range. Otherwise waits for the shard.
        Raises DataError or StoreError for what cannot be read.
        """
        pending: dict[int, Future[shards.Sequence]] = {}
        found: list[shards.Sequence | None] = [None] * len(addresses)
        for place, (dataset, shard, offset) in enumerate(addresses):
            view = self._view((dataset, shard), wait=not by_range)
            if view is None:
                pending[place] = self._rangers.submit(self._read_range, dataset, shard, offset)
            else:
                found[place] = view.sequence(offset)
        for place, future in pending.items():
            found[place] = future.result()
        return found  # type: ignore[return-value]

    def close(self) -> None:
        """Stops the threads."""
        self._closed.set()
        self.meter.close()
        self._fetchers.shutdown(wait=True, cancel_futures=True)
        self._rangers.shutdown(wait=True, cancel_futures=True)
        self._views.clear()

    def _view(self, shard: ShardId, wait: bool) -> ShardView | None:
        view = self._views.get(shard)
        if view is not None:
            return view
        fetch = self._fetches.get(shard)
        if fetch is None or (fetch.done() and fetch.exception() is not None):
            if not wait:
                return None
            # An earlier fetch may have failed before the shard was needed: only a second failure is raised.
            fetch = self._fetches[shard] = self._fetchers.submit(self._fetch, shard)
        elif not wait and not fetch.done():
            return None
        view = fetch.result()
        self._views[shard] = view
        self._fetches.pop(shard, None)
        return view

    def _fetch(self, shard: ShardId) -> ShardView:
        dataset, number = self.datasets[shard[0]], shard[1]
        stored = dataset.shards[number]
        num_damaged = 0
        while num_damaged < DAMAGED_TRANSFERS:
            view = self._map(dataset, number)
            if view is not None:
                return view
            with self.cache.locked(stored.sha256) as held:
                if self._closed.is_set():
                    raise ReaderClosed
                if not held:  # another process fetches it
                    time.sleep(LOCK_POLL_S)
                    continue
                view = self._map(dataset, number)  # another process may just have finished
                if view is not None:
                    return view
                keep = [self.datasets[d].shards[s].sha256 for d, s in self._wanted]
                if not self.cache.add(stored.sha256, stored.num_bytes, lambda: self._parts(dataset, number), keep):
                    num_damaged += 1
                    self.num_damaged_transfers += 1
        # Every transfer was damaged, so the stored shard probably is: name its damaged members.
        dataset.check_shard(number, dataset.store.get(stored.key))
        raise DataError(f"{dataset.shard_url(number)}: {DAMAGED_TRANSFERS} damaged transfers: check the network")

    def _map(self, dataset: TokenDataset, number: int) -> ShardView | None:
        stored = dataset.shards[number]
        mapped = self.cache.map(stored.sha256)
        if mapped is None:
            return None
        data = memoryview(mapped)
        if len(data) != stored.num_bytes or hashlib.sha256(data).hexdigest() != stored.sha256:
            self.cache.remove(stored.sha256)  # damaged on the local disk: fetch it again
            self.num_damaged_transfers += 1
            return None
        return ShardView(dataset.index(number), data)

    def _parts(self, dataset: TokenDataset, number: int) -> Iterator[bytes]:
        stored = dataset.shards[number]
        part_bytes = max(1, min(PART_BYTES, self.meter.limit_bytes))
        for start in range(0, stored.num_bytes, part_bytes):
            length = min(part_bytes, stored.num_bytes - start)
            self.meter.acquire(length)
            try:
                if self._closed.is_set():
                    raise ReaderClosed
                yield dataset.store.get_range(stored.key, start, length)
            finally:
                self.meter.release(length)

    def _read_range(self, dataset_number: int, number: int, offset: int) -> shards.Sequence:
        dataset = self.datasets[dataset_number]
        index = dataset.index(number)
        position, slot = divmod(offset, index.sequences_per_member)
        start, length = shards.member_range(index.members[position])
        if length > self.meter.limit_bytes:
            raise DataError(
                f"data.buffer_bytes: the quarter for transfers, {self.meter.limit_bytes} bytes, does not hold a member "
                f"of {dataset.shard_url(number)} ({length} bytes): raise it to {4 * length} or more"
            )
        for _ in range(DAMAGED_TRANSFERS):
            self.meter.acquire(length)
            try:
                if self._closed.is_set():
                    raise ReaderClosed
                data = dataset.store.get_range(dataset.shards[number].key, start, length)
                view = shards.MemberView.cut(index, position, memoryview(data), base=start)
                if view.is_intact():
                    sequence = view.sequence(slot)
                    return sequence._replace(tokens=np.array(sequence.tokens))
            finally:
                self.meter.release(length)
            self.num_damaged_transfers += 1
        raise DataError(
            f"{dataset.shard_url(number)}: member {index.members[position].key}: checksum mismatch: the shard is "
            "damaged; restore it or prepare the dataset again"
        )
