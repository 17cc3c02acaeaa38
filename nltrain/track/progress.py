"""The counters behind the step rows. Losses stay on the device until a row is due."""

import contextlib
import math
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist


class Interval(NamedTuple):
    """What happened between two log rows, over all ranks."""

    loss: float  # nats per token over the micro-steps that counted; nan where none did
    left_out: int  # micro-steps in which the guard left a rank out
    left_out_tokens: int  # targets of the ranks that it left out
    seconds: float
    data_wait_s: float  # of the rank that waited longest
    slowest_rank: int
    slowest_over_median: float  # forward time of the slowest rank over the median rank's
    memory_bytes: int  # peak, of the rank that needs most


class Meter:
    """Counts micro-steps and this rank's times between two log rows; the only host sync is in `take`."""

    def __init__(self, device: torch.device) -> None:
        """The first interval begins now."""
        self._device = device
        # [sum of losses in nats, targets, micro-steps with a rank left out, targets left out]: already summed over the
        # ranks by the guard
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)
        self._started_s = time.monotonic()
        self._forward_s = 0.0
        self._begun: Any = None
        self._events: list[tuple[Any, Any]] = []

    def start(self) -> None:
        """A forward pass begins. It waits for no other rank, except for gathers at ZeRO-3."""
        self._begun = self._now()

    def forward_ended(self) -> None:
        """Call it before the backward, which waits for the other ranks."""
        if self._device.type == "cuda":
            self._events.append((self._begun, self._now()))
        else:
            self._forward_s += self._now() - self._begun

    def add(self, loss_sum: torch.Tensor, num_targets: torch.Tensor, left_out: torch.Tensor) -> None:
        """One micro-step as the guard saw it: sums over the ranks that count, and the targets of the others."""
        self._sums += torch.stack([loss_sum, num_targets, (left_out > 0).double(), left_out])

    def take(self, data_wait_s: float) -> Interval:
        """The interval since the last take; `data_wait_s` is what this rank waited for data in it. Collective."""
        for begun, ended in self._events:
            ended.synchronize()
            self._forward_s += begun.elapsed_time(ended) / 1000
        self._events.clear()
        rank, size = dist.get_rank(), dist.get_world_size()
        ranks = torch.zeros(3, size, dtype=torch.float64, device=self._device)
        ranks[:, rank] = torch.tensor([self._forward_s, data_wait_s, memory_bytes(self._device)], device=self._device)
        dist.all_reduce(ranks)
        forward_s, waits_s, memories = ranks.tolist()
        loss_sum, targets, left_out, left_out_tokens = self._sums.tolist()
        self._sums.zero_()
        self._forward_s = 0.0
        now_s = time.monotonic()
        seconds, self._started_s = now_s - self._started_s, now_s
        median = sorted(forward_s)[(size - 1) // 2]
        slowest = max(range(size), key=lambda other: forward_s[other])
        return Interval(
            loss=loss_sum / targets if targets else math.nan,
            left_out=int(left_out),
            left_out_tokens=int(left_out_tokens),
            seconds=seconds,
            data_wait_s=max(waits_s),
            slowest_rank=slowest,
            slowest_over_median=forward_s[slowest] / max(median, 1e-9),
            memory_bytes=int(max(memories)),
        )

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside (an evaluation, a save) does not count as time of the steps."""
        began_s = time.monotonic()
        try:
            yield
        finally:
            self._started_s += time.monotonic() - began_s

    def _now(self) -> Any:
        """Seconds on a CPU; on a GPU an event, which costs no sync."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Speed:
    """Tokens per second, smoothed over about the last 20 rows, for the ETA."""

    def __init__(self) -> None:
        """The first `update` sets the speed."""
        self._tokens_per_s: float | None = None

    def update(self, tokens: int, seconds: float) -> float:
        """Count `tokens` trained in `seconds`; returns the smoothed tokens per second."""
        now = tokens / max(seconds, 1e-9)
        self._tokens_per_s = now if self._tokens_per_s is None else 0.9 * self._tokens_per_s + 0.1 * now
        return self._tokens_per_s


def memory_bytes(device: torch.device) -> int:
    """Peak memory of this rank: of its GPU, or resident of its process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
