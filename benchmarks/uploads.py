"""What an upload costs a training loop, and what the loop costs the upload.

    python -m benchmarks.uploads [--json] [--quick]

The loop is launch-bound: a step is a few hundred operations on tensors of 16 elements, which never wait for anything.
Beside it one thread puts files of 64 MiB into an HTTP sink in another process: in blocks of 16 KiB, as urllib3 asks for
them; in blocks of 1 MiB, as the store sends them; and through a process of its own (`nltrain/store/sender.py`), as a
checkpoint does. The loop has a core of its own, as a rank on a GPU node has; all else shares the other cores. Windows
alternate, so that whatever else the machine does falls on all alike. What the interpreter
costs is told apart from what the cores cost by the kernel's own account of the loop's thread: neither running nor
waiting for a core, it waits for the interpreter's lock. --json prints one object as the last line; exit code 1 where
the loop waits for the interpreter, or its median step grows, by more than 1 % beside uploads through the process.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from nltrain.store import open_store
from nltrain.store import s3 as store_module
from nltrain.store.sender import Sender

FILE_BYTES = 64 << 20
OPERATIONS = 400  # of one step
# How files are sent, and the bytes of a block.
WAYS = {"none": 0, "16 KiB": 16 << 10, "1 MiB": 1 << 20, "process": 1 << 20}
WINDOW_S = 2.0
LOOP_CORE, *OTHER_CORES = sorted(os.sched_getaffinity(0))
BOUND = 0.01

SINK = """
import socket, threading
def serve(connection):
    buffer, rest = bytearray(1 << 20), b""
    while True:
        while b"\\r\\n\\r\\n" not in rest:
            got = connection.recv(1 << 16)
            if not got:
                return
            rest += got
        head, _, rest = rest.partition(b"\\r\\n\\r\\n")
        fields = dict(line.split(b": ", 1) for line in head.lower().split(b"\\r\\n")[1:])
        left = int(fields.get(b"content-length", 0)) - len(rest)
        if fields.get(b"expect"):
            connection.sendall(b"HTTP/1.1 100 Continue\\r\\n\\r\\n")
        while left > 0:
            left -= connection.recv_into(buffer, min(left, len(buffer)))
        rest = b""
        connection.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 0\\r\\nETag: x\\r\\n\\r\\n")
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""


class Uploader(threading.Thread):
    """Puts one file after the other while `running`; counts its bytes."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        direct = open_store(url)
        self._stores = {"process": Sender(direct, 1), "thread": direct}
        self.way, self._data = "thread", memoryview(bytearray(FILE_BYTES))
        self.running, self.idle, self.num_bytes = threading.Event(), threading.Event(), 0

    def run(self) -> None:
        os.sched_setaffinity(0, OTHER_CORES)  # of this thread, and of the process that it starts
        while True:
            self.idle.set()
            self.running.wait()
            self.idle.clear()
            self._stores[self.way].put("file", self._data)
            self.num_bytes += FILE_BYTES


def scheduled_s() -> float:
    """Seconds that this thread ran or waited for a core (Linux)."""
    ran, waited, _ = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat").read_text().split()
    return (int(ran) + int(waited)) / 1e9


def steps_of(seconds: float, tensor: torch.Tensor) -> tuple[float, float]:
    """(mean seconds of a step, share of the time in which the loop waited for the interpreter)."""
    steps, started, before_s = 0, time.perf_counter(), scheduled_s()
    while not steps or time.perf_counter() < started + seconds:
        for _ in range(OPERATIONS):
            tensor.add_(1.0)
        steps += 1
    took = time.perf_counter() - started
    return took / steps, max(0.0, 1 - (scheduled_s() - before_s) / took)


def measure(uploader: Uploader, rounds: int) -> dict[str, Any]:
    tensor = torch.zeros(16)
    steps: dict[str, list[float]] = {name: [] for name in WAYS}
    waited: dict[str, list[float]] = {name: [] for name in WAYS}
    moved: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(rounds):
        for name, block in WAYS.items():
            store_module.UPLOAD_BLOCK_BYTES = block
            uploader.way = "process" if name == "process" else "thread"
            before, started = uploader.num_bytes, time.perf_counter()
            if block:
                uploader.running.set()
            step_s, waiting = steps_of(WINDOW_S, tensor)
            uploader.running.clear()
            # The file that is on its way is part of the window's rate, not of its steps.
            while not uploader.idle.is_set():
                steps_of(0.01, tensor)
            steps[name].append(step_s)
            waited[name].append(waiting)
            moved[name].append((uploader.num_bytes - before) / (time.perf_counter() - started) / 1e6)
    alone = steps["none"]
    result: dict[str, Any] = {"step_ms": round(1e3 * statistics.median(alone), 3)}
    result["waited none"] = round(statistics.median(waited["none"]), 4)
    for name in list(WAYS)[1:]:
        ratios = [with_upload / without for with_upload, without in zip(steps[name], alone, strict=True)]
        result[f"step_ratio {name}"] = round(statistics.median(ratios), 4)
        result[f"upload_mb_per_s {name}"] = round(statistics.median(moved[name]), 1)
        result[f"waited {name}"] = round(statistics.median(waited[name]), 4)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of 12")
    options = parser.parse_args()
    sink = subprocess.Popen([sys.executable, "-c", SINK], stdout=subprocess.PIPE, text=True)
    try:
        assert sink.stdout is not None
        os.environ |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{int(sink.stdout.readline())}", "AWS_REGION": "us-east-1"}
        os.environ |= {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none"}
        torch.set_num_threads(1)
        os.sched_setaffinity(sink.pid, OTHER_CORES)
        uploader = Uploader("s3://sink/x")
        uploader.start()
        os.sched_setaffinity(0, {LOOP_CORE})
        found = measure(uploader, 3 if options.quick else 12)
    finally:
        sink.kill()
        sink.wait()
    for name, value in found.items():
        print(f"{name:28} {value}", flush=True)
    if options.json:
        print(json.dumps(found), flush=True)
    return 0 if found["waited process"] <= BOUND and found["step_ratio process"] <= 1 + BOUND else 1


if __name__ == "__main__":
    sys.exit(main())
