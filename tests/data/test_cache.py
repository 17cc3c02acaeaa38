"""The shard cache: bounded, least recently used first, one transfer when two processes want the same shard."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nltrain.data import DataConfig, DataError, TokenStream, open_order
from nltrain.data.cache import ShardCache
from nltrain.data.stream import sequential_ranges
from nltrain.local.embedded_s3 import EmbeddedS3
from nltrain.local.fault_proxy import FaultProxy
from tests.data.support import contents, make_dataset, rows

ROOT = Path(__file__).resolve().parents[2]


def add(cache: ShardCache, data: bytes, **options: object) -> str:
    sha256 = hashlib.sha256(data).hexdigest()
    with cache.locked(sha256) as held:
        assert held
        assert cache.add(sha256, len(data), lambda: [data[:10], data[10:]], **options)  # type: ignore[arg-type]
    return sha256


def test_the_least_recently_used_shard_goes_first_and_the_limit_holds(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 3000)
    names = [add(cache, bytes([n]) * 1000) for n in range(3)]
    now = time.time()
    for age, name in enumerate(names):
        os.utime(tmp_path / f"{name}.shard", (now - 100 + age, now - 100 + age))
    assert cache.map(names[0]) is not None  # used just now
    added = add(cache, b"x" * 1000)
    assert cache.map(names[1]) is None
    assert all(cache.map(name) is not None for name in (names[0], names[2], added))
    assert cache.num_bytes() <= 3000
    # What the process needs soon goes last, however old.
    os.utime(tmp_path / f"{names[2]}.shard", (now - 200, now - 200))
    os.utime(tmp_path / f"{names[0]}.shard", (now - 150, now - 150))
    add(cache, b"y" * 1000, keep=[names[2]])
    assert cache.map(names[2]) is not None and cache.map(names[0]) is None


def test_a_dropped_shard_stays_readable_where_it_is_mapped(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 1500)
    mapped = cache.map(add(cache, b"a" * 1000))
    add(cache, b"b" * 1000)
    assert mapped is not None and mapped[:] == b"a" * 1000


def test_a_damaged_transfer_is_not_kept(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 10_000)
    sha256 = hashlib.sha256(b"right").hexdigest()
    assert not cache.add(sha256, 5, lambda: [b"wrong"])
    assert cache.map(sha256) is None and cache.num_bytes() == 0


HOLDER = """
import sys, time
from nltrain.data.cache import ShardCache
cache = ShardCache(sys.argv[1], 10_000)
with cache.locked(sys.argv[2]) as held:
    def parts():
        yield b"half"
        print("writing", flush=True)
        time.sleep(60)
    cache.add(sys.argv[2], 8, parts)
"""


def test_the_lock_of_a_killed_process_is_free_again(tmp_path: Path) -> None:
    sha256 = hashlib.sha256(b"halfhalf").hexdigest()
    command = [sys.executable, "-c", HOLDER, str(tmp_path), sha256]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    cache = ShardCache(tmp_path, 10_000)
    with cache.locked(sha256) as held:
        assert not held
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert cache.map(sha256) is None  # never half a shard
    with cache.locked(sha256) as held:
        assert held and cache.add(sha256, 8, lambda: [b"halfhalf"])
    mapped = cache.map(sha256)
    assert mapped is not None and mapped[:] == b"halfhalf"


READER = """
import sys
from nltrain.data import DataConfig, TokenStream, open_order
from nltrain.data.stream import sequential_ranges
config = DataConfig(prefix=sys.argv[1], seq_len=16, cache_dir=sys.argv[2], window_shards=4, range_read_batches=0)
order = open_order(config)
print("ready", flush=True)
sys.stdin.readline()
with TokenStream(config, order, sequential_ranges(order.datasets[0].num_sequences, 8)) as stream:
    print(sum(batch.num_targets for batch in stream), flush=True)
"""


def test_processes_that_want_the_same_shards_fetch_each_once(
    s3: EmbeddedS3, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make_dataset(bucket, 600)
    with FaultProxy(s3.endpoint_url, probability=0) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint_url)
        command = [sys.executable, "-c", READER, bucket, str(tmp_path / "cache")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        processes = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(2)]  # type: ignore[call-overload]
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        before = proxy.num_requests
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in processes:
            assert process.communicate()[0] == f"{dataset.num_targets}\n"
        # One transfer of each shard for both, one index for each.
        assert proxy.num_requests - before == 3 * len(dataset.shards)


def test_a_cache_smaller_than_the_dataset_still_reads_all_of_it(tmp_path: Path) -> None:
    url = str(tmp_path / "set")
    dataset = make_dataset(url, 800)
    limit = 6 * max(shard.num_bytes for shard in dataset.shards)
    assert limit < sum(shard.num_bytes for shard in dataset.shards) / 2
    config = DataConfig(prefix=url, seq_len=16, cache_dir=str(tmp_path / "cache"), cache_bytes=limit, window_shards=3)
    order = open_order(config)
    cache = ShardCache(config.cache_folder, limit)
    seen = []
    with TokenStream(config, order, sequential_ranges(1600, 8)) as stream:
        for batch in stream:
            seen += rows(batch, order)
            assert cache.num_bytes() <= limit
    assert len(seen) == 1600 and dict(seen) == contents(dataset)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data.cache_dir: .*file/cache"):
        ShardCache(tmp_path / "file" / "cache", 1000)
