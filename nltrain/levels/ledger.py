"""The ledger: measured bytes on the wire, per level and purpose, and the formula that predicts them.

The ledger counts inside torch.distributed, in the methods of ProcessGroup through which every collective of this
process goes, DeepSpeed's included. Each collective is charged the bytes that one rank sends on average in the cheapest
algorithm (N ranks, M bytes in the full tensor): (N-1)/N M for all-gather, reduce-scatter, broadcast and reduce, twice
that for all-reduce. A collective outside of any `Ledger.row` is charged to "other". Limits: collectives issued from
C++ or by functional collectives (torch.ops._c10d_functional) are not counted; nothing in nltrain uses those.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, ClassVar

import torch
import torch.distributed as dist

GRADIENTS, WEIGHTS, FOLD, CONTROL, STATE = "gradients", "weights", "fold", "control", "state"
OTHER = ("-", "other")


def _num_bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(_num_bytes(item) for item in value)


# Full-tensor bytes M and the factor of (N-1)/N M that one rank sends, from the positional arguments of the method.
_FULL_FROM_FIRST: dict[str, float] = {"allreduce": 2, "allreduce_coalesced": 2, "broadcast": 1, "reduce": 1, "send": 1}
_FULL_FROM_OUTPUT = {
    "reduce_scatter",
    "_reduce_scatter_base",
    "reduce_scatter_single",
    "reduce_scatter_tensor_coalesced",
    "reduce_scatter_single_coalesced",
    "scatter",
}
_FULL_FROM_INPUT = {
    "allgather",
    "_allgather_base",
    "all_gather_single",
    "allgather_coalesced",
    "allgather_into_tensor_coalesced",
    "all_gather_single_coalesced",
    "gather",
}


def _sent(method: str, args: tuple[Any, ...], world: int) -> float:
    share = (world - 1) / world
    if method in _FULL_FROM_FIRST:
        return _FULL_FROM_FIRST[method] * share * _num_bytes(args[0])
    if method in _FULL_FROM_OUTPUT:
        return share * world * _num_bytes(args[0])
    if method == "gather":
        return share * _num_bytes(args[1])
    if method == "allgather_coalesced":
        return share * world * _num_bytes(args[1])
    return share * (_num_bytes(args[1]) * world if method in _FULL_FROM_INPUT else _num_bytes(args[1]))


@dataclass
class Row:
    """Collectives and bytes of one purpose of one level on this rank so far."""

    calls: int = 0
    num_bytes: float = 0.0


class Ledger:
    """Rows {(level, purpose): Row} of one scheduler; `close` stops the counting."""

    _open: ClassVar[list["Ledger"]] = []
    _hooked: ClassVar[bool] = False

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], Row] = {}
        self.optimizer_elements: dict[str, int] = {}
        self._label = threading.local()
        Ledger._hook_process_groups()
        Ledger._open.append(self)

    def close(self) -> None:
        """Stops the counting; the rows stay."""
        if self in Ledger._open:
            Ledger._open.remove(self)

    @contextmanager
    def row(self, level: str, purpose: str) -> Iterator[None]:
        """Collectives issued inside by this thread are charged to (level, purpose)."""
        before = getattr(self._label, "value", OTHER)
        self._label.value = (level, purpose)
        try:
            yield
        finally:
            self._label.value = before

    def charged(self, level: str, *purposes: str) -> float:
        """Bytes sent by one rank on average for `level`; for all purposes when none is named."""
        return sum(
            r.num_bytes for (name, p), r in self.rows.items() if name == level and (not purposes or p in purposes)
        )

    def payload(self, level: str) -> float:
        """Gradients and weights of `level`: what the formula predicts. Folds and control have rows of their own."""
        return self.charged(level, GRADIENTS, WEIGHTS)

    def table(self) -> str:
        """The rows as text."""
        lines = [f"{'level':<12} {'purpose':<10} {'calls':>8} {'bytes sent per rank':>20}"]
        for (level, purpose), row in sorted(self.rows.items()):
            lines.append(f"{level:<12} {purpose:<10} {row.calls:>8} {row.num_bytes:>20,.0f}")
        return "\n".join(lines)

    def _charge(self, num_bytes: float) -> None:
        row = self.rows.setdefault(getattr(self._label, "value", OTHER), Row())
        row.calls += 1
        row.num_bytes += num_bytes

    @classmethod
    def _hook_process_groups(cls) -> None:
        if cls._hooked:
            return
        cls._hooked = True
        for method in (*_FULL_FROM_FIRST, *_FULL_FROM_OUTPUT, *_FULL_FROM_INPUT, "alltoall", "alltoall_base"):
            original = getattr(dist.ProcessGroup, method, None)
            if original is not None:
                setattr(dist.ProcessGroup, method, cls._counting(method, original))

    @classmethod
    def _counting(cls, method: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def counted(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            if cls._open:
                num_bytes = _sent(method, args, group.size())
                for ledger in cls._open:
                    ledger._charge(num_bytes)
            return original(group, *args, **kwargs)

        return counted


def predicted_bytes(
    mode: str,
    num_parameters: int,
    world_size: int,
    ticks: int,
    micro_steps: int,
    gradient_bytes: int,
    weight_bytes: int,
) -> float:
    """Payload bytes one rank sends for a level, r = (N-1)/N: gradients of g bytes and weights of w bytes per parameter.

    local (ZeRO-1): r (g + w) P per tick; sharded (ZeRO-2): r g P per micro-step and r w P per tick; gathered (ZeRO-3):
    r (g + 2 w) P per micro-step.
    """
    share = (world_size - 1) / world_size * num_parameters
    if mode == "local":
        return share * (gradient_bytes + weight_bytes) * ticks
    if mode == "sharded":
        return share * (gradient_bytes * micro_steps + weight_bytes * ticks)
    return share * (gradient_bytes + 2 * weight_bytes) * micro_steps
