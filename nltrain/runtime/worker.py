"""One rank of a run in the process that Ray Train made for it: signs of life out, wishes to leave in.

Wishes come from three sides: a drained node (Ray tells its workers), a SIGTERM to this process, and the controller
(the user's stop, a resize). The loop asks at each end of a quantum; what it does about it is the loop's business.
"""

import contextlib
import ctypes
import faulthandler
import logging
import math
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

from nltrain.config import RunConfig, from_dict
from nltrain.places import as_uri, join_url
from nltrain.runtime.failures import NodeLeaving, RankError
from nltrain.runtime.watchdog import COLLECTIVES, HEART, HEART_BYTES, Watch
from nltrain.supervision import SLOW_PHASES, Wish

_PR_SET_PTRACER = 0x59616D61
COUNT_EVERY_S = 0.5


class _Told:
    """What this process has been told; the controller's words may come before the training begins."""

    wish = Wish.GO_ON
    killed_s = math.inf
    """on this machine's monotonic clock"""
    training = threading.Event()
    left = threading.Event()


def ask_to_leave(wish: int, left_s: float = math.inf) -> None:
    """Called in the rank's process by the controller: in `left_s` the process is killed."""
    _Told.wish = max(_Told.wish, Wish(wish))
    _Told.killed_s = min(_Told.killed_s, time.monotonic() + left_s)


def wait_until_left(timeout_s: float) -> bool:
    """Whether this rank has saved and left within `timeout_s`. Called in the rank's process by the controller."""
    return _Told.left.wait(timeout_s)


def on_sigterm(signum: int, frame: FrameType | None) -> None:
    """A SIGTERM to a rank that trains means that its machine goes: save first. Otherwise it ends the process."""
    if _Told.training.is_set():
        ask_to_leave(Wish.PREEMPTED)
    else:
        sys.exit(128 + signum)


class RankSupervision:
    """Signs of life of this rank, and the process that watches them."""

    def __init__(self, config: RunConfig, rank: int, preempted: Any) -> None:
        """`preempted()`: whether Ray has said that a node of the group is going away."""
        self.started_s = time.time()
        self.tokens = 0
        self._preempted = preempted
        self._cluster = config.cluster
        self._beats = 0
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (as long as the process)
        self._file.truncate(HEART_BYTES)
        self._heart = mmap.mmap(self._file.fileno(), HEART_BYTES)
        self._dump = tempfile.TemporaryFile()  # noqa: SIM115
        faulthandler.register(signal.SIGUSR1, file=self._dump, all_threads=True)
        self.beat("starting", 0)
        watch = Watch(
            heart_fd=self._file.fileno(),
            dump_fd=self._dump.fileno(),
            pid=os.getpid(),
            rank=rank,
            folder=config.output,
            store_url=config.checkpoint.url,
            run=config.name,
        )
        script = Path(__file__).with_name("watchdog.py")
        self._watchdog = subprocess.Popen(
            [sys.executable, "-P", str(script), watch.to_json()],
            pass_fds=(self._file.fileno(), self._dump.fileno()),
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ray ends a dead worker's process group; the watchdog still has to report
        )
        _allow_stacks_to_be_read(self._watchdog.pid)
        self._closed = threading.Event()
        threading.Thread(target=self._count_collectives, name="collectives", daemon=True).start()

    def _count_collectives(self) -> None:
        """Beside the training, which may be stuck in one: ranks that wait have joined it, the one behind has not."""
        while not self._closed.wait(COUNT_EVERY_S):
            COLLECTIVES.pack_into(self._heart, HEART.size, collectives_joined())

    def beat(self, phase: str, tokens: int) -> None:
        self._beats += 1
        self.tokens = tokens
        slow = phase in SLOW_PHASES
        limit_s = self._cluster.slow_phase_timeout_s if slow else self._cluster.hang_timeout_s
        HEART.pack_into(self._heart, 0, self._beats, tokens, limit_s, phase.encode()[:32])

    def wish(self) -> Wish:
        return max(_Told.wish, Wish.PREEMPTED if self._preempted() else Wish.GO_ON)

    def left_s(self) -> float:
        return _Told.killed_s - time.monotonic()

    def close(self) -> None:
        """Nobody watches any more."""
        self._closed.set()
        HEART.pack_into(self._heart, 0, -1, self.tokens, 0.0, b"done")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._watchdog.wait(5.0)


def train_on_worker(values: dict[str, Any]) -> dict[str, Any]:
    """One rank of the run. Returns {"left", "tokens", "checkpoint"}; left is "finished", or "stopped" by the user."""
    from nltrain.loop import train
    from nltrain.runtime.controller import node_is_leaving, own_rank, register_with_ray

    config = from_dict(RunConfig, values)
    rank = own_rank()
    _quiet_libraries()
    supervision = RankSupervision(config, rank, node_is_leaving)
    _Told.training.set()
    try:
        if config.cluster.probe_device:
            card = _probe(config)
            if rank == 0:
                print(card, flush=True)
        result = train(config, supervision)
        left, tokens = result.get("left", "finished"), result.get("tokens", supervision.tokens)
        url = join_url(config.checkpoint.url, config.name, "checkpoints", result["checkpoint"])
        if left in ("finished", "stopped"):
            register_with_ray(as_uri(url), {"tokens": tokens})
    except Exception as error:
        found = RankError.of(error, rank, supervision.tokens)
        # Ray shows the traceback of one rank only, and late; the job's log gets each one now, where it tells something.
        print(f"rank {rank}: {found}" if found.collateral or not found.text else found.text, flush=True)
        raise found from None
    finally:
        _Told.training.clear()
        supervision.close()
    if left == "preempted":
        raise NodeLeaving(f"rank {rank} left at {tokens:,} tokens")
    if left == "resized":
        _Told.left.set()
        time.sleep(config.cluster.leave_timeout_s)  # the controller ends this process
        raise RankError(rank, "ResizeError", "the group was not resized after it had saved", "worker.py", 0, "")
    return {"left": left, "tokens": tokens, "checkpoint": url}


def collectives_joined() -> int:
    """Collectives that this rank has begun, over all its groups; 0 where torch.distributed is not initialised."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return 0
    # As torch counts them itself, to tell ranks apart that went different ways.
    groups: list[Any] = list(dist.distributed_c10d._world.pg_map)
    return sum(group._get_sequence_number_for_group() for group in groups)


def _probe(config: RunConfig) -> str:
    """Refuse a device that gives wrong answers before it trains. Collective; returns a line for the log."""
    import torch

    from nltrain.runtime.probe import probe, probe_link

    device = torch.device(config.cluster.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())  # Ray has set it
    text = probe(device)
    link = probe_link(device)
    return f"{text}; all-reduce {link.gb_per_s:.2f} GB/s a rank"


def _allow_stacks_to_be_read(pid: int) -> None:
    """Linux may let only ancestors trace a process (Yama): name the watchdog, a child, as one that may."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, ctypes.c_ulong(pid), 0, 0, 0)


def _quiet_libraries() -> None:
    """Our own log lines to the job's log; DeepSpeed's use of a deprecated torch name is not the user's business."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s", stream=sys.stdout, force=True)
    logging.getLogger("nltrain").setLevel(logging.INFO)
    # The rank has told of its error; Ray would add the traceback of our report of it.
    logging.getLogger("ray.train.v2._internal.util").addFilter(
        lambda record: not record.getMessage().startswith("Error in training function")
    )
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed.*is deprecated")
