"""Data: exactly once under faults, throughput of one process on one core, time to the first batch, memory.

    python -m benchmarks.data [--json] [--quick]

Everything runs against a real S3 server process on loopback. Each figure is taken in a process of its own, held to
one core. --json prints one JSON object as the last line; the exit code is 1 when a bound is missed. Bounds are the
ones in BOUNDS; throughput counts from opening the dataset to the last token.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nltrain.data import DataConfig, SampleOrder, TokenDataset, TokenStream, open_order, train_tokenizer
from nltrain.data.prepare import PrepareConfig, prepare_tokens
from nltrain.data.stream import sequential_ranges
from nltrain.local.embedded_s3 import EmbeddedS3
from nltrain.local.fault_proxy import FaultProxy
from nltrain.store import open_store

SEQ_LEN = 1024
BATCH_SIZE = 8
CACHED_SAMPLES = 100_000  # over as many epochs as that takes
BOUNDS: dict[str, Callable[[float], bool]] = {
    "samples_lost": lambda x: x == 0,
    "samples_repeated": lambda x: x == 0,
    "samples_altered": lambda x: x == 0,
    "faults_injected": lambda x: x >= 200,
    "cold_tokens_per_s": lambda x: x >= 8e6,
    "cached_tokens_per_s": lambda x: x >= 15e6,
    "first_batch_s_at_10pct": lambda x: x <= 0.5,
    "first_batch_s_at_90pct": lambda x: x <= 0.5,
    "tar_overhead_share": lambda x: x <= 0.05,
}


def build(url: str, num_sequences: int, seq_len: int, **options: Any) -> TokenDataset:
    """A dataset of random tokens in documents of 800 tokens on average."""
    tokenizer = train_tokenizer(["a few words, not many"], 300)
    vocab_size = tokenizer.get_vocab_size()
    random = np.random.default_rng(0)

    def documents() -> Any:
        left, number = num_sequences * seq_len + 1, 0
        while left:
            num_tokens = min(left, 1 + int(random.exponential(800)))
            tokens = random.integers(1, vocab_size, num_tokens)
            tokens[0] = 0
            yield str(number), tokens
            left, number = left - num_tokens, number + 1

    config = PrepareConfig(seq_len=seq_len, validation_fraction=0.0, **options)
    prepare_tokens(documents(), open_store(url), tokenizer, config)
    return TokenDataset.open(url)


def tar_overhead_share(dataset: TokenDataset) -> float:
    """Bytes of the shards that are not tokens or document starts."""
    total = sum(shard.num_bytes for shard in dataset.shards)
    payload = 0
    for number in range(len(dataset.shards)):
        for member in dataset.index(number).members:
            payload += member.tokens.num_bytes + member.starts.num_bytes
    return 1 - payload / total


def measure_throughput(config: DataConfig, num_samples: int) -> dict[str, Any]:
    """Samples through the stream, in this process, from opening the dataset on."""
    anonymous_bytes = _anonymous_bytes()
    started_s = time.perf_counter()
    order = open_order(config)
    num_tokens = 0
    peak_anonymous_bytes = 0
    first_batch_s = 0.0
    with TokenStream(config, order, sequential_ranges(num_samples, BATCH_SIZE)) as stream:
        for number, batch in enumerate(stream):
            num_tokens += batch.tokens.numel()
            if number == 0:
                first_batch_s = time.perf_counter() - started_s
            if number % 500 == 0:
                peak_anonymous_bytes = max(peak_anonymous_bytes, _anonymous_bytes() - anonymous_bytes)
    seconds = time.perf_counter() - started_s
    return {
        "tokens_per_s": num_tokens / seconds,
        "first_batch_s": first_batch_s,
        "peak_buffer_bytes": stream.peak_buffer_bytes,
        "configured_buffer_bytes": config.buffer_bytes,
        "process_growth_bytes": peak_anonymous_bytes,
    }


def measure_first_batch(config: DataConfig, share: float) -> dict[str, Any]:
    """From restore() to the first tensor; opening the dataset is told apart."""
    import boto3  # noqa: F401 (imports are not part of the figure)

    started_s = time.perf_counter()
    order = open_order(config)
    open_s = time.perf_counter() - started_s
    num_sequences = order.datasets[0].num_sequences
    state = json.loads(json.dumps(order.state(int(share * num_sequences))))
    started_s = time.perf_counter()
    first = order.restore(state)
    with TokenStream(config, order, sequential_ranges(num_sequences, BATCH_SIZE, first)) as stream:
        next(stream)
        return {"open_s": open_s, "first_batch_s": time.perf_counter() - started_s}


def measure_faults(endpoint_url: str, bucket: str, num_faults: int) -> dict[str, Any]:
    """Epochs through a faulty network until enough faults have happened; every sample is compared with the truth."""
    url = f"s3://{bucket}/faults"
    # Small shards, for many requests: two for each shard, one for each sample read by range.
    dataset = build(url, 8000, 128, bytes_per_member=4096, bytes_per_shard=1)
    truth = sample_checksums(dataset)
    faults: Counter[str] = Counter()
    lost = repeated = altered = epochs = 0
    with FaultProxy(endpoint_url, probability=0.05, stall_s=5.0) as proxy:
        os.environ["AWS_ENDPOINT_URL"] = proxy.endpoint_url
        while proxy.num_faults < num_faults:
            with tempfile.TemporaryDirectory(prefix="nltrain-bench-") as cache:
                # Range reads and whole shards in turn.
                config = DataConfig(
                    prefix=url, seq_len=128, cache_dir=cache, timeout_s=0.5, attempts=10, seed=epochs, window_shards=8
                )
                config = replace(config, range_read_batches=0 if epochs % 2 else 10**9)
                seen = read_epoch(config, truth)
            lost += seen["lost"]
            repeated += seen["repeated"]
            altered += seen["altered"]
            epochs += 1
        os.environ["AWS_ENDPOINT_URL"] = endpoint_url
        faults = proxy.faults
    return {
        "samples_lost": lost,
        "samples_repeated": repeated,
        "samples_altered": altered,
        "faults_injected": faults.total(),
        "faults": dict(faults),
        "requests": proxy.num_requests,
        "epochs": epochs,
    }


def sample_checksums(dataset: TokenDataset) -> dict[tuple[int, int], int]:
    """{(shard, offset): CRC-32 of tokens and document starts}, read without the stream."""
    sequences = dataset.sequences()
    return {
        (shard, offset): _checksum(sequence.tokens, np.isin(np.arange(dataset.seq_len), sequence.starts))
        for shard, count in enumerate(dataset.sequences_per_shard)
        for offset, sequence in zip(range(count), sequences, strict=False)
    }


def read_epoch(config: DataConfig, truth: dict[tuple[int, int], int]) -> dict[str, int]:
    """Reads one epoch; counts samples lost, repeated and altered."""
    order: SampleOrder = open_order(config)
    seen: Counter[tuple[int, int]] = Counter()
    altered = 0
    with TokenStream(config, order, sequential_ranges(len(truth), BATCH_SIZE)) as stream:
        for batch in stream:
            for row, index in enumerate(batch.sample_indices):
                address = order(index)
                place = (address.shard, address.offset)
                seen[place] += 1
                last = batch.targets[row, -1:] if batch.targets[row, -1] >= 0 else batch.tokens[row, -1:] * 0
                tokens = np.concatenate([batch.tokens[row].numpy(), last.numpy()])
                altered += _checksum(tokens, batch.document_starts[row].numpy()) != truth[place]
    repeated = sum(count - 1 for count in seen.values())
    return {"lost": len(truth) - len(seen), "repeated": repeated, "altered": altered}


def _checksum(tokens: np.ndarray, starts: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(starts).tobytes(), zlib.crc32(tokens.astype(np.int64).tobytes()))


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def in_own_process(part: str, config: DataConfig, amount: float) -> dict[str, Any]:
    """Runs one measurement in a fresh process on one core."""
    request = json.dumps({"part": part, "config": vars(config), "amount": amount})
    command = [sys.executable, "-m", "benchmarks.data", "--part", request]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_part(request: dict[str, Any]) -> dict[str, Any]:
    """The child's side of `in_own_process`."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    config = DataConfig(**request["config"] | {"weights": tuple(request["config"]["weights"])})
    if request["part"] == "throughput":
        return measure_throughput(config, int(request["amount"]))
    return measure_first_batch(config, request["amount"])


def run(quick: bool) -> dict[str, Any]:
    """All measurements; keys as in the JSON."""
    num_sequences = 20_000 if quick else 100_000
    with EmbeddedS3("bench") as s3, s3.in_environment(), tempfile.TemporaryDirectory(prefix="nltrain-bench-") as folder:
        url = "s3://bench/tokens"
        dataset = build(url, num_sequences, SEQ_LEN)
        config = DataConfig(prefix=url, seq_len=SEQ_LEN, cache_dir=f"{folder}/cache")
        cold = in_own_process("throughput", config, num_sequences)
        cached = in_own_process("throughput", config, CACHED_SAMPLES)
        first = {
            share: in_own_process("first_batch", replace(config, cache_dir=f"{folder}/empty-{share}"), share)
            for share in (0.1, 0.9)
        }
        faults = measure_faults(s3.endpoint_url, "bench", num_faults=200)
        return {
            **faults,
            "cold_tokens_per_s": round(cold["tokens_per_s"]),
            "cached_tokens_per_s": round(cached["tokens_per_s"]),
            "first_batch_s_at_10pct": round(first[0.1]["first_batch_s"], 4),
            "first_batch_s_at_90pct": round(first[0.9]["first_batch_s"], 4),
            "open_s": round(max(first[0.1]["open_s"], first[0.9]["open_s"]), 4),
            "peak_buffer_bytes": cold["peak_buffer_bytes"],
            "configured_buffer_bytes": cold["configured_buffer_bytes"],
            "process_growth_bytes": cold["process_growth_bytes"],
            "tar_overhead_share": round(tar_overhead_share(dataset), 5),
            "num_sequences": num_sequences,
            "seq_len": SEQ_LEN,
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--quick", action="store_true", help="a fifth of the samples")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(run_part(json.loads(options.part))))
        return 0
    result = run(options.quick)
    missed = [name for name, holds in BOUNDS.items() if not holds(result[name])]
    if result["peak_buffer_bytes"] > result["configured_buffer_bytes"]:
        missed.append("peak_buffer_bytes")
    for name, value in result.items():
        print(f"{name:28} {value!s:>24}{'  MISSED' if name in missed else ''}")
    if options.json:
        print(json.dumps(result))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
