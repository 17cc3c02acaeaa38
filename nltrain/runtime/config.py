"""Where a run's ranks live and how often they may fail."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ClusterConfig:
    """Workers of the Ray Train group; one worker is one rank."""

    max_workers: int = 2
    """Ranks wanted; also the largest world size the quantum has to serve."""
    min_workers: int | None = None
    """Fewest ranks to go on with after losing nodes; none: exactly max_workers."""
    device: Literal["cpu", "cuda"] = "cpu"
    """cuda: one GPU per rank, NCCL; cpu: gloo."""
    cpus_per_worker: float = 1.0
    """Ray CPUs reserved per rank."""
    threads_per_worker: int = 1
    """OMP threads per rank."""
    max_failures: int = 8
    """Restarts of the group after a failure before the run gives up; -1: without limit."""
    process_group_timeout_s: float = 600.0
    """A collective that waits longer than this fails the rank."""
    health_check_interval_s: float = 0.5
    """How often Ray looks after its workers; a lost rank is noticed after about this long."""

    def __post_init__(self) -> None:
        if self.max_workers < 1:
            raise ValueError(f"cluster.max_workers={self.max_workers}: must be at least 1")
        if self.min_workers is not None and not 1 <= self.min_workers <= self.max_workers:
            raise ValueError(
                f"cluster.min_workers={self.min_workers}: must lie between 1 and cluster.max_workers={self.max_workers}"
            )
        for name in ("cpus_per_worker", "threads_per_worker", "process_group_timeout_s", "health_check_interval_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"cluster.{name}={getattr(self, name)}: must be positive")
        if self.max_failures < -1:
            raise ValueError(f"cluster.max_failures={self.max_failures}: must be -1 (no limit) or more")
