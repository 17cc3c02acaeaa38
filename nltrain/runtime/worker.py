"""One rank of a run, in the process that Ray Train has made for it.

RankSupervision writes signs of life for the watchdog and reads wishes to leave. A wish comes from Ray (a node of the
group is drained), from a SIGTERM to this process, or from the controller (the user's stop, a resize). The training loop
reads the wish at each end of a quantum and decides what to do.
"""

import contextlib
import ctypes
import faulthandler
import logging
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nltrain.config import RunConfig, from_dict
from nltrain.runtime.failures import NodeLeaving, RankError
from nltrain.runtime.leaving import Asked
from nltrain.runtime.watchdog import COLLECTIVES, HEART, HEART_BYTES, Watch
from nltrain.store.places import as_uri, join_url
from nltrain.supervision import SLOW_PHASES, Wish

_PR_SET_PTRACER = 0x59616D61
COUNT_EVERY_S = 0.5


class RankSupervision:
    """Signs of life of this rank, and the process that watches them; a `nltrain.supervision.Supervision`."""

    def __init__(self, config: RunConfig, rank: int, preempted: Callable[[], bool]) -> None:
        """Start the watchdog of this process. `preempted()`: whether Ray drains a node of the group."""
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
        """Count in a thread of its own, because training may be stuck in a collective.

        In a hang, the ranks that wait have joined one collective more than the rank that is behind.
        """
        while not self._closed.wait(COUNT_EVERY_S):
            COLLECTIVES.pack_into(self._heart, HEART.size, collectives_joined())

    def beat(self, phase: str, tokens: int) -> None:
        """Write a sign of life, with the time limit of `phase`, where the watchdog reads it."""
        self._beats += 1
        self.tokens = tokens
        slow = phase in SLOW_PHASES
        limit_s = self._cluster.slow_phase_timeout_s if slow else self._cluster.hang_timeout_s
        HEART.pack_into(self._heart, 0, self._beats, tokens, limit_s, phase.encode()[:32])

    def wish(self) -> Wish:
        """The largest wish so far, from Ray, SIGTERM or the controller."""
        return max(Asked.wish, Wish.PREEMPTED if self._preempted() else Wish.GO_ON)

    def left_s(self) -> float:
        """Seconds until this process is killed; infinity where nobody has said so."""
        return Asked.killed_s - time.monotonic()

    def close(self) -> None:
        """End the watchdog: from now on nothing watches this rank."""
        self._closed.set()
        HEART.pack_into(self._heart, 0, -1, self.tokens, 0.0, b"done")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._watchdog.wait(5.0)


def train_on_worker(values: dict[str, Any]) -> dict[str, Any]:
    """Train as one rank of the run whose config has these values; Ray Train calls it in every worker.

    Returns {"left": "finished" or "stopped" (by the user), "tokens": T, "checkpoint": URL}. Raises RankError for what
    went wrong, and NodeLeaving where the rank has saved because a node goes away.
    """
    from nltrain.loop import train
    from nltrain.runtime.controller import node_is_leaving, own_rank, register_with_ray

    config = from_dict(RunConfig, values)
    rank = own_rank()
    _quiet_libraries()
    supervision = RankSupervision(config, rank, node_is_leaving)
    Asked.training.set()
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
        # Ray shows the traceback of one rank only, and late. The job's log gets every traceback now, if there is one.
        print(f"rank {rank}: {found}" if found.collateral or not found.text else found.text, flush=True)
        raise found from None
    finally:
        Asked.training.clear()
        supervision.close()
    if left == "preempted":
        raise NodeLeaving(f"rank {rank} left at {tokens:,} tokens")
    if left == "resized":
        Asked.left.set()
        time.sleep(config.cluster.leave_timeout_s)  # the controller ends this process
        raise RankError(rank, "ResizeError", "the group was not resized after it had saved", "worker.py", 0, "")
    return {"left": left, "tokens": tokens, "checkpoint": url}


def collectives_joined() -> int:
    """Collectives that this rank has begun, over all its groups; 0 where torch.distributed is not initialised."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return 0
    # Torch counts them itself, in order to find ranks that called different collectives.
    groups: list[Any] = list(dist.distributed_c10d._world.pg_map)
    return sum(group._get_sequence_number_for_group() for group in groups)


def _probe(config: RunConfig) -> str:
    """Refuse a device that gives wrong answers before it trains. Collective; returns a line for the log."""
    from nltrain.device import prepare_device
    from nltrain.runtime.probe import probe, probe_link

    device, _ = prepare_device(config.cluster)  # of those that Ray lets this rank see
    text = probe(device)
    link = probe_link(device)
    return f"{text}; all-reduce {link.gb_per_s:.2f} GB/s a rank"


def _allow_stacks_to_be_read(pid: int) -> None:
    """Let the watchdog read this process's stacks: Linux may allow that to ancestors only (Yama), and it is a child."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, ctypes.c_ulong(pid), 0, 0, 0)


def _quiet_libraries() -> None:
    """Send our own log lines to the job's log, and hide the warning that DeepSpeed uses a deprecated name of torch."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s", stream=sys.stdout, force=True)
    logging.getLogger("nltrain").setLevel(logging.INFO)
    # The rank has printed its error; Ray would add the traceback of the RankError that carries it.
    logging.getLogger("ray.train.v2._internal.util").addFilter(
        lambda record: not record.getMessage().startswith("Error in training function")
    )
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed.*is deprecated")
