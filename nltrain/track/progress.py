"""The progress line and the counters behind it. Losses stay on the device until a line is due."""

import resource
import sys
import time
from typing import Any, NamedTuple

import torch
import torch.distributed as dist


class Interval(NamedTuple):
    """What happened between two log rows, over all ranks."""

    loss: float  # nats per token
    seconds: float
    slowest_rank: int
    slowest_over_median: float  # forward time of the slowest rank over the median rank's


class Meter:
    """Sums losses, targets and this rank's forward time between two log rows; the only host sync is in `take`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)  # [sum of losses in nats, targets]
        self._started_s = time.monotonic()
        self._forward_s = 0.0
        self._begun: Any = None
        self._events: list[tuple[Any, Any]] = []

    def start(self) -> None:
        """A forward pass begins. Forward passes wait for no other rank (but for gathers at ZeRO-3)."""
        self._begun = self._now()

    def add(self, loss_sum: torch.Tensor, num_targets: int) -> None:
        """A forward pass has ended; call it before the backward, which waits for the other ranks."""
        if self._begun is not None:
            if self._device.type == "cuda":
                self._events.append((self._begun, self._now()))
            else:
                self._forward_s += self._now() - self._begun
        self._sums[0] += loss_sum.detach()
        self._sums[1] += num_targets

    def take(self) -> Interval:
        """The interval since the last take, over all ranks; resets. Collective."""
        for begun, ended in self._events:
            ended.synchronize()
            self._forward_s += begun.elapsed_time(ended) / 1000
        self._events.clear()
        rank, size = dist.get_rank(), dist.get_world_size()
        shared = torch.zeros(2 + size, dtype=torch.float64, device=self._device)
        shared[:2] = self._sums
        shared[2 + rank] = self._forward_s
        dist.all_reduce(shared)
        loss_sum, targets, *forward_s = shared.tolist()
        self._sums.zero_()
        self._forward_s = 0.0
        now_s = time.monotonic()
        seconds, self._started_s = now_s - self._started_s, now_s
        median = sorted(forward_s)[(size - 1) // 2]
        slowest = max(range(size), key=lambda other: forward_s[other])
        return Interval(loss_sum / max(targets, 1.0), seconds, slowest, forward_s[slowest] / max(median, 1e-9))

    def restart_clock(self) -> None:
        """Forget the time since the last row: it went into validation or a checkpoint, not into steps."""
        self._started_s = time.monotonic()

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Speed:
    """Tokens per second, smoothed over about the last 20 rows, for the ETA."""

    def __init__(self) -> None:
        self._tokens_per_s: float | None = None

    def update(self, tokens: int, seconds: float) -> float:
        now = tokens / max(seconds, 1e-9)
        self._tokens_per_s = now if self._tokens_per_s is None else 0.9 * self._tokens_per_s + 0.1 * now
        return self._tokens_per_s


def memory_bytes(device: torch.device) -> int:
    """Peak memory of this rank: of its GPU, or resident of its process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def duration(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour."""
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{s:02d}" if hours else f"{minutes}:{s:02d}"


def progress_line(
    step: int,
    num_steps: int,
    tokens: int,
    loss: float,
    tokens_per_s: float,
    data_wait_share: float,
    memory: int,
    eta_s: float,
    ticked: str,
) -> str:
    """One log step for people; `ticked` names the levels that updated."""
    return (
        f"step {step:>{len(str(num_steps))}}/{num_steps} | {tokens:,} tokens | loss {loss:.4f} | "
        f"{tokens_per_s:,.0f} tok/s | data wait {100 * data_wait_share:.1f} % | memory {memory / 2**30:.2f} GiB | "
        f"ETA {duration(eta_s)} | {ticked}"
    )
