"""What an upload costs a training loop, and what the loop costs the upload.

    python -m benchmarks.uploads [--json] [--quick]

The loop is launch-bound: a step is a few hundred operations on tensors of 16 elements, which never wait for anything.
Beside it files of 64 MiB are written as a checkpoint writes them, hashed and four at a time, into an HTTP server in
another process. The loop has a core of its own, as a rank on a GPU node has; all else shares the other cores.

The kernel's account of the loop's thread tells three things apart: it runs; it waits for its core, which another
process of this machine took; it does neither, and then waits for the interpreter's lock. A step's time here is without
the second: no process of an upload may run on the loop's core, so that wait belongs to what else this machine does.
It is printed all the same, and so is what this machine can resolve: "alone again" is the loop without uploads,
"neighbour" the same uploads from a process that shares nothing with the loop but the machine, and "one by one" a single
file at a time through the process.

Windows of one round run there and back (A B C C B A); a ratio is that of a round's two windows to its two windows
alone. Printed are the median over rounds and its 95 % interval, from order statistics. --json prints one object as the
last line; exit code 0 where the median of the step's ratio beside uploads through the process is within 1 %, and so
are the waits for the interpreter, median and mean. A machine on which other work takes more than 5 % of the loop's core
gives no verdict, and exit code 1.
"""

import argparse
import json
import math
import os
import select
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks._uploader import Uploader
from nltrain.store import s3 as store_module

OPERATIONS = 400  # of one step
WINDOW_S, SETTLE_S = 0.5, 0.05
LOOP_CORE, *OTHER_CORES = sorted(os.sched_getaffinity(0))
BOUND = 0.01
QUIET = 0.05  # of the loop's core, the most that other work may take where a verdict is given
# In rounds of their own, fewer: what they cost is far above what a round can resolve.
THREADS = {"threads, 16 KiB": 16 << 10, "threads, 1 MiB": 1 << 20}


class Window(NamedTuple):
    """Seconds of a step without waits for the core; shares of the time; megabytes stored in a second."""

    step_s: float
    waited_lock: float
    waited_core: float
    mb_per_s: float


class Neighbour:
    """Another process that uploads on demand."""

    def __init__(self) -> None:
        self.process = _start("neighbour")
        self.switch(True)  # its own process and its memory exist from now on
        time.sleep(1.0)
        self.switch(False)

    def switch(self, on: bool, meanwhile: Callable[[], Any] = lambda: time.sleep(0.002)) -> int:
        """Returns the bytes stored so far; with `on` False, once nothing is on its way."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("1\n" if on else "0\n")
        self.process.stdin.flush()
        while not select.select([self.process.stdout], [], [], 0)[0]:
            meanwhile()
        return int(self.process.stdout.readline())


class Beside:
    """Runs the loop for a window, with uploads of a given kind beside it."""

    def __init__(self) -> None:
        self._tensor = torch.zeros(16)
        self._uploader = Uploader("s3://sink/rank", OTHER_CORES)
        self._uploader.start()
        self.neighbour = Neighbour()
        os.sched_setaffinity(0, {LOOP_CORE})

    def window(self, name: str) -> Window:
        """One measurement. The files on their way at its end count for its rate and not for its steps."""
        started, before = time.perf_counter(), self._switch(name, True)
        self._steps(SETTLE_S)
        step_s, waited_lock, waited_core = self._steps(WINDOW_S)
        stored = self._switch(name, False) - before
        rate = stored / (time.perf_counter() - started) / 1e6
        self._steps(SETTLE_S)
        return Window(step_s, waited_lock, waited_core, rate)

    def _switch(self, name: str, on: bool) -> int:
        if name.startswith("alone"):
            return 0
        if name == "neighbour":
            return self.neighbour.switch(on, lambda: self._steps(0.005))
        uploader = self._uploader
        if on:
            uploader.way = name if name in ("process", "one by one") else "thread"
            store_module.UPLOAD_BLOCK_BYTES = THREADS.get(name, store_module.UPLOAD_BLOCK_BYTES)
            uploader.running.set()
        else:
            uploader.running.clear()
            while not uploader.idle.is_set():
                self._steps(0.005)
        return uploader.num_bytes

    def _steps(self, seconds: float) -> tuple[float, float, float]:
        """(seconds of a step without waits for the core, share waited for the interpreter, for the core)."""
        steps, core_s, ran_s, started = 0, _waited_for_core_s(), time.thread_time(), time.perf_counter()
        while not steps or time.perf_counter() < started + seconds:
            for _ in range(OPERATIONS):
                self._tensor.add_(1.0)
            steps += 1
        took = time.perf_counter() - started
        ran_s, core_s = time.thread_time() - ran_s, _waited_for_core_s() - core_s
        return (took - core_s) / steps, max(0.0, 1 - (ran_s + core_s) / took), core_s / took


def _waited_for_core_s() -> float:
    """Seconds in which this thread could run and its core ran another one (Linux)."""
    return int(Path(f"/proc/self/task/{threading.get_native_id()}/schedstat").read_text().split()[1]) / 1e9


def median_of(values: Sequence[float]) -> tuple[float, float, float]:
    """(median, lower, upper end of its 95 % interval). Below six values, which have none, the ends of the values."""
    ordered, num = sorted(values), len(values)
    outside, below = 0, 0.0  # values left off at each end; probability that the median is further out
    while (below := below + math.comb(num, outside) / 2**num) <= 0.025:
        outside += 1
    outside = max(0, outside - 1)
    return statistics.median(ordered), ordered[outside], ordered[num - 1 - outside]


def measure(beside: Beside, names: Sequence[str], rounds: int) -> dict[str, Any]:
    """Figures of each of `names` against "alone"."""
    ways = ["alone", *names]
    windows: dict[str, list[list[Window]]] = {name: [] for name in ways}
    for _ in range(rounds):
        pairs: dict[str, list[Window]] = {name: [] for name in ways}
        for name in (*ways, *reversed(ways)):
            pairs[name].append(beside.window(name))
        for name in ways:
            windows[name].append(pairs[name])
    found: dict[str, Any] = {}
    for name in ways:
        both = [window for pair in windows[name] for window in pair]
        figures = {
            "step_ms": round(1e3 * statistics.median(window.step_s for window in both), 4),
            "waited_interpreter": round(statistics.median(window.waited_lock for window in both), 4),
            "waited_interpreter_mean": round(statistics.mean(window.waited_lock for window in both), 4),
            "waited_core_mean": round(statistics.mean(window.waited_core for window in both), 4),
            "upload_mb_per_s": round(statistics.median(window.mb_per_s for window in both), 1),
        }
        if name != "alone":
            pairs_of = zip(windows[name], windows["alone"], strict=True)
            ratios = [sum(w.step_s for w in with_it) / sum(w.step_s for w in alone) for with_it, alone in pairs_of]
            ratio, lower, upper = median_of(ratios)
            figures |= {"step_ratio": round(ratio, 4), "interval": [round(lower, 4), round(upper, 4)]}
        found[name] = figures
    return found


def _start(part: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks._uploader", part]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    os.sched_setaffinity(process.pid, OTHER_CORES)
    return process


def main() -> int:
    """Prints the figures; 0 where both bounds are shown to hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="8 rounds instead of 28; of the threads 2 instead of 4")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sink = _start("sink")
    try:
        assert sink.stdout is not None
        os.environ |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{int(sink.stdout.readline())}", "AWS_REGION": "us-east-1"}
        os.environ |= {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none"}
        beside = Beside()
        try:
            rounds, rounds_of_threads = (8, 2) if options.quick else (28, 4)
            found = measure(beside, ("alone again", "process", "neighbour", "one by one"), rounds)
            slow = measure(beside, list(THREADS), rounds_of_threads)
        finally:
            beside.neighbour.process.kill()
            beside.neighbour.process.wait()
    finally:
        sink.kill()
        sink.wait()
    found |= {name: slow[name] for name in THREADS}
    through = found["process"]
    waited = max(through["waited_interpreter"], through["waited_interpreter_mean"])
    found["bound"] = "holds" if through["step_ratio"] <= 1 + BOUND else "missed"
    if max(found[name]["waited_core_mean"] for name in ("alone", "process", "neighbour")) > QUIET:
        found["bound"] = "not resolved"  # other work changes what the loop finds in its caches
    for name, figures in found.items():
        print(f"{name:18} {figures}", flush=True)
    if options.json:
        print(json.dumps(found), flush=True)
    return 0 if found["bound"] == "holds" and waited <= BOUND else 1


if __name__ == "__main__":
    sys.exit(main())
