"""Where a run's ranks are placed, how often they may fail, and after what time a rank counts as stuck."""

from dataclasses import dataclass
from typing import Literal

from nltrain.errors import require

STOP_WAIT_S = 120
"""Seconds a cluster of ours gives a stopped job to save (RAY_JOB_STOP_WAIT_TIME_S at `ray start`; Ray's own: 3)."""


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
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """Precision of products of fp32 matrices, as torch.set_float32_matmul_precision takes it. "high": TF32 on a GPU;
    the memories compute in fp32, their states stay fp32."""
    allocator: str = ""
    """Settings of torch's allocator on a GPU, as in PYTORCH_ALLOC_CONF: "expandable_segments:True" lets batches of many
    shapes share memory. Empty: what the environment says."""
    placement: Literal["PACK", "SPREAD", "STRICT_SPREAD"] = "PACK"
    """PACK: as few nodes as possible; SPREAD: as many; STRICT_SPREAD: one rank per node, or wait."""
    max_failures: int = 8
    """Restarts after failures within `failure_window_hours` before the run gives up; -1: without limit."""
    failure_window_hours: float = 24.0
    """Failures older than this no longer count."""
    max_preemptions: int = -1
    """Restarts because a node was taken away, over the whole run; -1: without limit."""
    max_same_failures: int = 2
    """Stop when the same error occurred this many times in a row without progress beyond it."""
    max_node_strikes: int = 3
    """Deaths of ranks on one node, or hangs that one of its ranks caused, within `failure_window_hours`, after which
    the run avoids the node; a device that fails the probe counts as all of them. 0: no node is ever left out."""
    probe_device: bool = True
    """Before training each rank multiplies, remembers and adds up known integers on its device, and leaves if wrong."""
    hang_timeout_s: float = 300.0
    """A rank without progress in training for this long is dumped and killed, and the group is restarted."""
    slow_phase_timeout_s: float = 1800.0
    """The same limit for starting, waiting for a save, validating and finishing: they report no progress in between."""
    group_start_timeout_s: float = 60.0
    """Longest wait for all workers to be placed; after it the nodes are counted again."""
    resize_check_s: float = 20.0
    """How often a running group looks for new nodes."""
    leave_timeout_s: float = 300.0
    """Longest wait for the checkpoint before a resize; after it the group is resized without one."""
    process_group_timeout_s: float = 600.0
    """A collective that waits longer than this fails the rank."""
    health_check_interval_s: float = 0.5
    """How often Ray checks its workers; a lost rank is noticed after about this long."""

    def __post_init__(self) -> None:
        require(self.max_workers >= 1, "cluster.max_workers", self.max_workers, "must be at least 1")
        require(
            self.min_workers is None or 1 <= self.min_workers <= self.max_workers,
            "cluster.min_workers",
            self.min_workers,
            f"must lie between 1 and cluster.max_workers={self.max_workers}",
        )
        for name in (
            "cpus_per_worker",
            "threads_per_worker",
            "failure_window_hours",
            "hang_timeout_s",
            "slow_phase_timeout_s",
            "group_start_timeout_s",
            "resize_check_s",
            "leave_timeout_s",
            "process_group_timeout_s",
            "health_check_interval_s",
        ):
            value = getattr(self, name)
            require(value > 0, f"cluster.{name}", value, "must be positive")
        for name in ("max_failures", "max_preemptions"):
            value = getattr(self, name)
            require(value >= -1, f"cluster.{name}", value, "must be -1 (no limit) or more")
        require(
            0 <= self.max_node_strikes <= 3,
            "cluster.max_node_strikes",
            self.max_node_strikes,
            "must lie between 0 and 3, because 4 deaths in a row without progress end the run",
        )
        require(self.max_same_failures >= 2, "cluster.max_same_failures", self.max_same_failures, "must be 2 or more")
        require(
            self.slow_phase_timeout_s >= self.hang_timeout_s,
            "cluster.slow_phase_timeout_s",
            self.slow_phase_timeout_s,
            f"must not be below cluster.hang_timeout_s={self.hang_timeout_s}",
        )

    @property
    def elastic(self) -> bool:
        """Whether the group may have fewer than `max_workers` ranks."""
        return self.min_workers not in (None, self.max_workers)
