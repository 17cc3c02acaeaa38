"""Reading by address: the bytes in flight stay bounded, and closing ends every wait."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from nltrain.data import TokenDataset
from nltrain.data.cache import ShardCache
from nltrain.data.reader import ByteMeter, ReaderClosed, ShardReader
from tests.data.support import make_dataset


def test_a_meter_blocks_at_its_limit_and_records_the_peak() -> None:
    meter = ByteMeter(100)
    meter.acquire(70)
    acquired = threading.Event()
    thread = threading.Thread(target=lambda: (meter.acquire(40), acquired.set()))
    thread.start()
    assert not acquired.wait(0.05)
    meter.release(70)
    assert acquired.wait(10)
    thread.join()
    assert meter.held_bytes == 40 and meter.peak_bytes == 70


def test_one_holder_alone_may_be_over_the_limit() -> None:
    meter = ByteMeter(100)
    meter.acquire(1000)
    assert meter.held_bytes == meter.peak_bytes == 1000


def test_closing_a_meter_ends_all_waits() -> None:
    meter = ByteMeter(100)
    meter.acquire(100)
    threads = [threading.Thread(target=meter.acquire, args=(50,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    meter.close()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture
def dataset(tmp_path: Path) -> TokenDataset:
    return make_dataset(str(tmp_path / "set"), 60)


@pytest.mark.parametrize("by_range", [False, True], ids=["by shard", "by range"])
def test_sequences_come_in_the_order_asked_for(dataset: TokenDataset, tmp_path: Path, by_range: bool) -> None:
    stored = list(dataset.sequences())
    first = np.concatenate([[0], np.cumsum(dataset.sequences_per_shard)])
    numbers = np.random.default_rng(0).permutation(60)
    shards = np.searchsorted(first, numbers, side="right") - 1
    addresses = [(0, int(s), int(n - first[s])) for n, s in zip(numbers, shards, strict=True)]
    reader = ShardReader([dataset], ShardCache(tmp_path / "cache", 1 << 20), 2, 1 << 16)
    found = reader.sequences(addresses, by_range)
    reader.close()
    for number, sequence in zip(numbers, found, strict=True):
        assert np.array_equal(sequence.tokens, stored[number].tokens)
        assert np.array_equal(sequence.starts, stored[number].starts)
        assert sequence.num_targets == stored[number].num_targets
    assert 0 < reader.meter.peak_bytes <= 1 << 16 and reader.meter.held_bytes == 0
    assert bool(list((tmp_path / "cache").glob("*.shard"))) == (not by_range)


def test_a_closed_reader_gives_up_a_shard_that_another_process_fetches(dataset: TokenDataset, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 1 << 20)
    reader = ShardReader([dataset], cache, 1, 1 << 16)
    with cache.locked(dataset.shards[0].sha256) as held:
        assert held
        failed: list[BaseException] = []

        def read() -> None:
            try:
                reader.sequences([(0, 0, 0)], by_range=False)
            except ReaderClosed as error:
                failed.append(error)

        thread = threading.Thread(target=read)
        thread.start()
        time.sleep(0.1)
        reader.close()
        thread.join(10)
    assert len(failed) == 1
