"""Streams off S3: exactly once over ranks and restarts, seeks instead of replays, bounded memory, faults survived."""

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nltrain.data import Batch, DataConfig, DataError, TokenStream, open_order
from nltrain.data.batch import BYTES_PER_TOKEN, Arrangement
from nltrain.data.stream import sequential_ranges
from nltrain.levels.quantum import cut_quantum
from nltrain.local.embedded_s3 import EmbeddedS3
from nltrain.local.fault_proxy import FaultProxy
from nltrain.model import arrange, preset
from nltrain.store import MissingObjectError, open_store
from tests.data.support import contents, make_dataset, rows

ROOT = Path(__file__).resolve().parents[2]
SEQ_LEN = 16


def config_for(url: str, tmp_path: Path, **options: object) -> DataConfig:
    defaults = {"seq_len": SEQ_LEN, "cache_dir": str(tmp_path / "cache"), "window_shards": 2}
    return DataConfig(prefix=url, **defaults | options)  # type: ignore[arg-type]


def rank_ranges(rank: int, world_size: int, micro: int, quantum: int, first: int, num: int) -> Iterator[range]:
    """This rank's samples of quanta [first, first + num)."""
    for number in range(first, first + num):
        for step in cut_quantum(quantum, micro, world_size):
            part = step[rank]
            yield range(number * quantum + part.start, number * quantum + part.stop)


def test_batches_hold_what_was_stored_in_the_order_of_the_samples(bucket: str, tmp_path: Path) -> None:
    dataset = make_dataset(bucket, 203)
    truth, config = contents(dataset), config_for(bucket, tmp_path)
    order = open_order(config)
    seen = []
    with TokenStream(config, order, sequential_ranges(203, 7)) as stream:
        for number, batch in enumerate(stream):
            assert batch.sample_indices == tuple(range(number * 7, min(203, number * 7 + 7)))
            assert batch.tokens.dtype == batch.targets.dtype == torch.int64
            assert batch.tokens.shape == batch.targets.shape == batch.document_starts.shape
            assert batch.num_targets == int((batch.targets != -100).sum())
            seen += rows(batch, order)
    assert dict(seen) == truth and len(seen) == len(truth) == 203
    assert stream.num_batches == 29 and stream.wait_s > 0


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_ranks_and_restarts_together_read_each_sample_once(bucket: str, tmp_path: Path, world_size: int) -> None:
    """Killed after every few quanta, with batches already made ready; each life begins where finished steps ended."""
    dataset = make_dataset(bucket, 150)
    truth, config = contents(dataset), config_for(bucket, tmp_path)
    quantum, micro, position = 11, 2, 0
    seen: Counter[tuple[int, int]] = Counter()
    consumed: list[int] = []
    order = open_order(config)
    for life in (1, 3, 2, 100):
        num = min(life, -(-150 // quantum) - position)
        samples: dict[int, tuple] = {}
        for rank in range(world_size):
            # Each rank would go on for ever; it is stopped after `num` quanta.
            ranges = rank_ranges(rank, world_size, micro, quantum, position, 1000)
            steps = num * len(cut_quantum(quantum, micro, world_size))
            with TokenStream(config, order, ranges) as stream:
                for _ in range(steps):
                    batch = next(stream)
                    samples |= dict(zip(batch.sample_indices, rows(batch, order), strict=True))
        position = order.restore(json.loads(json.dumps(order.state((position + num) * quantum)))) // quantum
        consumed += sorted(samples)
        for index, (place, content) in samples.items():
            if index < 150:
                seen[place] += 1
                assert content == truth[place]
    assert consumed == list(range(position * quantum)) and position * quantum >= 150
    assert seen == Counter(truth.keys())


def test_a_rank_without_a_sequence_gets_padding(tmp_path: Path) -> None:
    url = str(tmp_path / "set")
    make_dataset(url, 20)
    config = config_for(url, tmp_path)
    with TokenStream(config, open_order(config), iter([[], range(0), [5, 3], []])) as stream:
        batches = list(stream)
    assert [batch.sample_indices for batch in batches] == [(), (), (5, 3), ()]
    padding = Batch.padding(SEQ_LEN, open_order(config).vocab_size)
    for batch in (batches[0], batches[1], batches[3]):
        assert batch.num_targets == 0 and torch.equal(batch.tokens, padding.tokens)


def test_the_feeder_lays_the_documents_out_within_the_buffer(tmp_path: Path) -> None:
    url, model, threads = str(tmp_path / "set"), preset("hope", "tiny"), set()
    make_dataset(url, 60)
    config = config_for(url, tmp_path)

    def lay_out(starts: torch.Tensor) -> Arrangement:
        threads.add(threading.current_thread().name)
        return arrange(model, starts)

    with TokenStream(config, open_order(config), iter([[], range(4), range(4, 8)]), lay_out) as stream:
        batches = list(stream)
    assert threads == {"nltrain-stream"} and stream._meter.held_bytes == 0
    for batch in batches:
        want = arrange(model, batch.document_starts)
        assert torch.equal(batch.documents.positions, want.positions)
        assert batch.num_bytes == batch.tokens.numel() * BYTES_PER_TOKEN + want.num_bytes
    assert stream._meter.peak_bytes >= max(batch.num_bytes for batch in batches)
    small = replace(config, buffer_bytes=5000)  # three quarters of it hold 13 sequences, but not their arrangement too
    with (
        pytest.raises(DataError, match="one batch of 13 x"),
        TokenStream(small, open_order(small), [range(13)], lay_out) as stream,
    ):
        list(stream)


RESUME = """
import json, sys
from nltrain.data import DataConfig, TokenStream, open_order
from nltrain.data.stream import sequential_ranges
from nltrain.errors import ConfigError
request = json.loads(sys.stdin.read())
found = []
for number, state in enumerate(request["states"]):
    config = DataConfig(**request["config"] | {"weights": (), "cache_dir": f"{request['folder']}/{number}"})
    order = open_order(config)
    first = order.restore(state)
    with TokenStream(config, order, sequential_ranges(10**9, request["batch"], first)) as stream:
        batches = [next(stream) for _ in range(50)]
    found.append([[x.tokens.tolist(), x.targets.tolist(), x.document_starts.tolist()] for x in batches])
print(json.dumps(found))
"""


def test_restored_in_a_new_process_the_next_fifty_batches_are_equal(bucket: str, tmp_path: Path) -> None:
    make_dataset(bucket, 1000, bytes_per_shard=1 << 14)
    config = config_for(bucket, tmp_path)
    order = open_order(config)
    with TokenStream(config, order, sequential_ranges(10**9, 3)) as stream:
        batches = [next(stream) for _ in range(450)]
    steps = [0, 7, 177, 301, 400]  # the fourth crosses the end of an epoch
    states = [order.state(3 * step) for step in steps]
    request = json.dumps({"config": vars(config), "states": states, "batch": 3, "folder": str(tmp_path / "fresh")})
    command = [sys.executable, "-c", RESUME]
    done = subprocess.run(command, input=request, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    for step, found in zip(steps, json.loads(done.stdout), strict=True):
        here = batches[step : step + 50]
        assert found == [[x.tokens.tolist(), x.targets.tolist(), x.document_starts.tolist()] for x in here]


def test_a_seek_costs_the_same_number_of_requests_anywhere(
    s3: EmbeddedS3, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset(bucket, 1000)
    with FaultProxy(s3.endpoint_url, probability=0) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint_url)
        config = config_for(bucket, tmp_path)
        requests = []
        for share in (0.1, 0.9):
            order = open_order(config)
            before = proxy.num_requests
            ranges = [range(int(share * 1000), int(share * 1000) + 4)]
            with TokenStream(replace(config, cache_dir=str(tmp_path / str(share))), order, ranges) as stream:
                next(stream)
            requests.append(proxy.num_requests - before)
    assert max(requests) <= 2 * 4  # an index and a range for each sample


def test_faults_at_five_percent_of_requests_lose_double_and_alter_nothing(
    s3: EmbeddedS3, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A shard of four sequences: two requests for each shard, or one for each sequence that is read by range.
    truth = contents(make_dataset(bucket, 400, bytes_per_shard=1))
    # Flipped bits are ours to find: S3 itself sends no checksum with a range.
    monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
    kinds = ("error_500", "slow_down", "reset", "stall", "truncate", "flip", "flip")
    with FaultProxy(s3.endpoint_url, probability=0.05, kinds=kinds, stall_s=3.0) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint_url)
        epoch, num_flips = 0, 0
        while proxy.num_faults < 30 or num_flips == 0:
            cache = str(tmp_path / f"cache{epoch}")
            # Many transfers at once, so that stalls and waits overlap.
            config = config_for(bucket, tmp_path, cache_dir=cache, seed=epoch, window_shards=16, download_threads=16)
            config = replace(config, timeout_s=0.5, attempts=10, range_read_batches=10**6 if epoch % 2 else 0)
            order = open_order(config)
            with TokenStream(config, order, sequential_ranges(400, 32)) as stream:
                seen = [row for batch in stream for row in rows(batch, order)]
            assert len(seen) == 400 and dict(seen) == truth
            num_flips += stream.num_damaged_transfers
            epoch += 1


def test_a_flipped_bit_in_the_bucket_stops_with_shard_and_member(bucket: str, tmp_path: Path) -> None:
    dataset = make_dataset(bucket, 60, bytes_per_shard=1 << 16)
    store, shard = open_store(bucket), dataset.shards[0]
    damaged = bytearray(store.get(shard.key))
    damaged[dataset.index(0).members[1].tokens.offset] ^= 1
    store.put(shard.key, bytes(damaged))
    for range_read_batches in (0, 100):
        config = config_for(bucket, tmp_path, range_read_batches=range_read_batches)
        stream = TokenStream(config, open_order(config), sequential_ranges(60, 4))
        with stream, pytest.raises(DataError, match=rf"{bucket}/{shard.key}: .*member 000001"):
            list(stream)


def test_a_damaged_cache_file_is_fetched_again(bucket: str, tmp_path: Path) -> None:
    truth = contents(make_dataset(bucket, 60))
    config = config_for(bucket, tmp_path, range_read_batches=0)
    for _ in range(2):
        order = open_order(config)
        with TokenStream(config, order, sequential_ranges(60, 4)) as stream:
            assert dict(row for batch in stream for row in rows(batch, order)) == truth
        path = next((tmp_path / "cache").glob("*.shard"))
        data = bytearray(path.read_bytes())
        data[700] ^= 1
        path.write_bytes(data)
    assert stream.num_damaged_transfers == 1


def test_a_shard_deleted_under_way_stops_with_its_url_after_the_batches_before_it(bucket: str, tmp_path: Path) -> None:
    dataset = make_dataset(bucket, 400)
    config = config_for(bucket, tmp_path, window_shards=1, prefetch_batches=2)
    order = open_order(config)
    deleted = order(250).shard
    first_missing = min(i for i in range(400) if order(i).shard == deleted)
    open_store(bucket).delete(dataset.shards[deleted].key)
    seen = 0
    stream = TokenStream(config, order, sequential_ranges(400, 5))
    with stream, pytest.raises(MissingObjectError, match=rf"{bucket}/{dataset.shards[deleted].key}: "):
        for batch in stream:
            seen += len(batch.sample_indices)
    assert first_missing - 5 < seen <= first_missing
    assert order.restore(order.state(seen)) == seen


def test_memory_stays_within_the_configured_buffer(bucket: str, tmp_path: Path) -> None:
    make_dataset(bucket, 3000, 64, bytes_per_shard=1 << 15)
    buffer_bytes = 200_000
    config = config_for(bucket, tmp_path, seq_len=64, buffer_bytes=buffer_bytes, prefetch_batches=1000)
    with TokenStream(config, open_order(config), sequential_ranges(3000, 4)) as stream:
        next(stream)
        threading.Event().wait(0.5)  # a slow consumer: the threads fill what they may
        list(stream)
    assert 0.3 * buffer_bytes < stream.peak_buffer_bytes <= buffer_bytes


def test_two_datasets_are_mixed_by_weight(tmp_path: Path) -> None:
    urls = [str(tmp_path / name) for name in ("a", "b")]
    truths = [contents(make_dataset(url, 100, seed=number)) for number, url in enumerate(urls)]
    config = config_for(",".join(urls), tmp_path, weights=(3.0, 1.0))
    order = open_order(config)
    counts: Counter[int] = Counter()
    with TokenStream(config, order, sequential_ranges(2000, 8)) as stream:
        for batch in stream:
            for index, (place, content) in zip(batch.sample_indices, rows(batch, order), strict=True):
                number = order(index).dataset
                counts[number] += 1
                assert content == truths[number][place]
    assert abs(counts[0] - 1500) < 40


def test_closing_early_ends_all_threads(bucket: str, tmp_path: Path) -> None:
    make_dataset(bucket, 400)
    config = config_for(bucket, tmp_path)
    before = threading.active_count()
    for taken in (0, 1, 5):
        with TokenStream(config, open_order(config), sequential_ranges(400, 2)) as stream:
            for _ in range(taken):
                next(stream)
        with pytest.raises(StopIteration):
            next(stream)
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("options", "num_samples", "says"),
    [
        ({"cache_bytes": 5000}, 1, "data.cache_bytes: 5000: two windows of 2 shards take "),
        ({"buffer_bytes": 20_000}, 400, "data.buffer_bytes: 20000: one batch of 400 x 16 tokens takes 108800 of the "),
        ({"buffer_bytes": 480}, 1, "data.buffer_bytes: the quarter for transfers, 120 bytes, does not hold a member"),
    ],
    ids=["cache", "batch", "transfer"],
)
def test_a_size_that_is_too_small_is_refused_in_one_line(
    tmp_path: Path, options: dict[str, int], num_samples: int, says: str
) -> None:
    make_dataset(str(tmp_path / "set"), 400)
    config = config_for(str(tmp_path / "set"), tmp_path, **options)
    with pytest.raises(DataError) as error, TokenStream(config, open_order(config), [range(num_samples)]) as stream:
        list(stream)
    assert str(error.value).startswith(says) and "\n" not in str(error.value)


def test_missing_credentials_stop_a_stream_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(Exception, match=r"s3://somewhere/x/manifest.json: get: no AWS credentials found"):
        open_order(config_for("s3://somewhere/x", tmp_path))
