"""Checkpoints: killed runs end as if never killed, other world sizes, damage, stall, throughput, memory.

    python -m benchmarks.checkpoint [--json] [--quick]

Everything runs in real processes against a real S3 server on loopback. --json prints one JSON object as the last line;
the exit code is 1 when a bound of BOUNDS is missed. The speed is taken at a state of 1 GB (128 MB with --quick), the
store's own speed beside it with as many files, of the same size, from as many threads.
"""

import argparse
import gc
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks import _checkpoint_runs as runs
from nltrain.checkpoint import CheckpointConfig, Checkpointer, CorruptCheckpointError
from nltrain.checkpoint.manifest import checkpoint_name, key_of
from nltrain.checkpoint.stored import StoredCheckpoint
from nltrain.fragment import Fragment
from nltrain.local.embedded_s3 import EmbeddedS3
from nltrain.store import Store, open_store

BUCKET = "checkpoints"
NUM_FRAGMENTS = 96
REPEATS = 3
BOUNDS: dict[str, Callable[[Any], bool]] = {
    "final_state_bitwise_equal": lambda x: x is True,
    "sigterm_resume_bitwise_equal": lambda x: x is True,
    "reshard_max_rel_err": lambda x: x <= runs.RESHARD_BOUND,
    "stall_over_sync_save": lambda x: x <= 0.10,
    "staging_over_share": lambda x: x <= 1.1,
    "largest_file_over_configured": lambda x: x <= 1,
    "save_over_store_throughput": lambda x: x >= 0.60,
    "load_over_store_throughput": lambda x: x >= 0.60,
    "corruptions_missed": lambda x: x == 0,
}


def fragments_of(num_bytes: int) -> dict[str, Fragment]:
    """fp32 tensors of together `num_bytes`, of different sizes."""
    generator = torch.Generator().manual_seed(0)
    weights = [1 + index % 7 for index in range(NUM_FRAGMENTS)]
    found = {}
    for index, weight in enumerate(weights):
        numel = num_bytes // 4 * weight // sum(weights)
        tensor = torch.empty(numel, dtype=torch.int32).random_(generator=generator).view(torch.float32)
        found[f"layer.{index:02d}.master"] = Fragment(tensor, 0, numel)
    return found


class PeakMemory:
    """Largest growth of this process's own memory inside the with block, bytes."""

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        self.start_bytes = self.peak_bytes = _own_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def growth_bytes(self) -> int:
        """Largest resident memory since the start, less that of the start."""
        return self.peak_bytes - self.start_bytes

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            self.peak_bytes = max(self.peak_bytes, _own_bytes())


def _own_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon: this benchmark needs Linux")


def raw_speed(store: Store, sizes: list[int], num_threads: int) -> tuple[float, float]:
    """Seconds to put and to get files of these sizes, nothing else done."""
    blobs = [os.urandom(min(size, 1 << 20)) * (size // (1 << 20)) or os.urandom(size) for size in sizes]

    def timed(operation: Callable[[int], Any]) -> float:
        began = time.perf_counter()
        with ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(operation, range(len(blobs))))
        return time.perf_counter() - began

    put = timed(lambda index: store.put(f"raw/{index}", blobs[index]))
    get = timed(lambda index: len(store.get(f"raw/{index}")))
    return put, get


def measure_speed(url: str, num_bytes: int) -> dict[str, Any]:
    """Saving and loading in this process, one rank."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    store, fragments = open_store(url), fragments_of(num_bytes)
    total = sum(fragment.tensor.numel() * 4 for fragment in fragments.values())
    config = CheckpointConfig(url=url, keep_last=1)
    waiting = Checkpointer(store, "sync", None, CheckpointConfig(url=url, keep_last=1, asynchronous=False))
    beside = Checkpointer(store, "async", None, config)
    with PeakMemory() as memory:
        beside.prepare(fragments)
        beside.save(1, fragments, {})
        beside.wait()
    assert beside._staging is not None
    staging = beside._staging.num_bytes
    sync_s, stall_s, save_s, load_s, put_s, get_s = [], [], [], [], [], []
    sizes = [part.num_bytes for part in beside._staging.parts]
    for repeat in range(REPEATS):
        put, get = raw_speed(store, sizes, config.num_threads)
        put_s.append(put)
        get_s.append(get)
        began = time.perf_counter()
        waiting.save(repeat + 1, fragments, {})
        sync_s.append(time.perf_counter() - began)
        waiting.wait()
        began = time.perf_counter()
        beside.save(repeat + 2, fragments, {})
        stall_s.append(time.perf_counter() - began)
        beside.wait()
        save_s.append(time.perf_counter() - began)
        # Memory that exists already, as a model's does.
        filled = {name: Fragment(f.tensor.clone().fill_(1.0), 0, f.total) for name, f in fragments.items()}
        began = time.perf_counter()
        beside.load(checkpoint_name(repeat + 2, 1), filled)
        load_s.append(time.perf_counter() - began)
        if not all(
            torch.equal(filled[n].tensor.view(torch.int32), f.tensor.view(torch.int32)) for n, f in fragments.items()
        ):
            raise AssertionError("what was loaded is not what was saved")
    files = [item.num_bytes for item in store.list(key_of("async", checkpoint_name(REPEATS + 1, 1), ""))]
    medians = {
        name: statistics.median(values)
        for name, values in (
            ("sync_save_s", sync_s), ("stall_s", stall_s), ("save_s", save_s),
            ("load_s", load_s), ("store_put_s", put_s), ("store_get_s", get_s),
        )
    }  # fmt: skip
    return medians | {
        "state_bytes": total,
        "largest_file_over_configured": max(files) / config.max_file_bytes,
        "staging_over_share": staging / total,
        "save_memory_growth_over_share": memory.growth_bytes / total,
        "stall_over_sync_save": medians["stall_s"] / medians["sync_save_s"],
        "save_mb_per_s": total / medians["save_s"] / 1e6,
        "load_mb_per_s": total / medians["load_s"] / 1e6,
        "store_put_mb_per_s": sum(sizes) / medians["store_put_s"] / 1e6,
        "store_get_mb_per_s": sum(sizes) / medians["store_get_s"] / 1e6,
        "save_over_store_throughput": medians["store_put_s"] / medians["save_s"],
        "load_over_store_throughput": medians["store_get_s"] / medians["load_s"],
    }


def in_own_process(function: str, *arguments: Any) -> dict[str, Any]:
    """The figures of a measuring function of this module, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.checkpoint", "--measure", json.dumps([function, *arguments])]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    return json.loads(done.stdout.splitlines()[-1])


def try_corruptions(url: str) -> dict[str, Any]:
    """Every file missing, cut, grown and with a flipped byte at several places; each must be refused by name."""
    logging.disable(logging.CRITICAL)
    store = open_store(url)
    checkpointer = Checkpointer(store, "damage", None, CheckpointConfig(url=url, max_file_bytes=1 << 16))
    fragments = fragments_of(200_000)
    for tokens in (1, 2):
        checkpointer.save(tokens, fragments, {"config": {"a": 1}, "tokens": tokens}, {"rng": torch.arange(1000)})
        checkpointer.wait()
    name = checkpoint_name(2, 1)
    stored = StoredCheckpoint(store, "damage", name)
    tried, missed = 0, []
    for path in [*stored.files, "manifest.json"]:
        key = key_of("damage", name, path)
        good = store.get(key)
        bad: dict[str, bytes | None] = {"missing": None, "cut": good[:-1], "grown": good + b" ", "empty": b""}
        for place in sorted({0, 5, len(good) // 3, len(good) // 2, len(good) - 2}):
            bad[f"byte {place} flipped"] = good[:place] + bytes([good[place] ^ 0x04]) + good[place + 1 :]
        for kind, data in bad.items():
            if path == "manifest.json" and kind == "grown":
                continue  # white space after JSON changes nothing that it says
            if data is None:
                store.delete(key)
            else:
                store.put(key, data)
            tried += 1
            try:
                checkpointer.load(name, fragments)
                missed.append(f"{path} {kind}")
            except CorruptCheckpointError as error:
                if path not in str(error) and "manifest" not in str(error):
                    missed.append(f"{path} {kind}: refused without its name ({error})")
            store.put(key, good)
    checkpointer.load(name, fragments)
    return {"corruptions_tried": tried, "corruptions_refused": tried - len(missed), "missed": missed}


def main() -> int:
    """Runs the benchmark and prints what it found. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--quick", action="store_true", help="three kills, one other world size, a smaller state")
    parser.add_argument("--only", choices=("runs", "damage", "speed"), help="one part alone; no verdict")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        function, *arguments = json.loads(options.measure)
        print(json.dumps({"measure_speed": measure_speed, "try_corruptions": try_corruptions}[function](*arguments)))
        return 0
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="nltrain-") as folder, EmbeddedS3(BUCKET) as s3, s3.in_environment():
        url = f"s3://{BUCKET}"
        if options.only in (None, "speed"):
            result |= in_own_process("measure_speed", f"{url}/speed", (128 if options.quick else 1000) * 10**6)
            local = in_own_process("measure_speed", f"{folder}/speed", (128 if options.quick else 1000) * 10**6)
            result["local_folder"] = local
        if options.only in (None, "damage"):
            result |= in_own_process("try_corruptions", f"{url}/damage")
            result["corruptions_missed"] = len(result["missed"])
        if options.only in (None, "runs"):
            result |= runs.prove(url, Path(folder), quick=options.quick)
    short = [name for name, fits in BOUNDS.items() if name in result and not fits(result[name])]
    if options.only is None:
        short += [name for name in BOUNDS if name not in result]
    for name, value in result.items():
        mark = "  <-- falls short" if name in short else ""
        print(f"{name:<36} {value:.4g}{mark}" if isinstance(value, float) else f"{name:<36} {value}{mark}")
    if options.json:
        print(json.dumps(result | {"short_of": short}))
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
