"""The progress line and the counters behind it. Losses stay on the device until a line is due."""

import resource
import sys
import time

import torch
import torch.distributed as dist


class Meter:
    """Sums losses and targets between two log rows; the only host sync is in `take`."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)  # [sum of losses in nats, targets]
        self._started_s = time.monotonic()

    def add(self, loss_sum: torch.Tensor, num_targets: int) -> None:
        self._sums[0] += loss_sum.detach()
        self._sums[1] += num_targets

    def take(self) -> tuple[float, float]:
        """(mean loss over all ranks in nats per token, seconds since the last take); resets. Collective."""
        dist.all_reduce(self._sums)
        loss_sum, targets = self._sums.tolist()
        self._sums.zero_()
        now_s = time.monotonic()
        seconds, self._started_s = now_s - self._started_s, now_s
        return loss_sum / max(targets, 1.0), seconds

    def restart_clock(self) -> None:
        """Forget the time since the last row: it went into validation or a checkpoint, not into steps."""
        self._started_s = time.monotonic()


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
