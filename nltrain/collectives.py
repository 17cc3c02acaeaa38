"""Collectives of JSON values and integers, over a gloo group of their own.

Training's groups stay untouched, so that a thread may use a `Ranks` while training goes on. Two threads must not
interleave on one group: each thread has a `Ranks` of its own. Nothing is pickled. Without an initialised process group
there is one rank.
"""

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from nltrain.errors import UserError


class Ranks:
    """All ranks of the job, over one gloo group; create it on every rank, in the same order.

    timeout_s: longest wait of a collective, seconds.
    """

    def __init__(self, timeout_s: float = 1800.0) -> None:
        self._group = None
        self.rank, self.size = 0, 1
        if dist.is_available() and dist.is_initialized():
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
            if self.size > 1:
                self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    def gather_ints(self, values: list[int]) -> list[list[int]]:
        """Every rank's list (the same length everywhere, each an int64), in rank order, on every rank."""
        mine = torch.tensor(values, dtype=torch.int64)
        if self.size == 1:
            return [mine.tolist()]
        found = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(found, mine, group=self._group)
        return [row.tolist() for row in found]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's JSON value, in rank order, on every rank."""
        data = json.dumps(value).encode()
        if self.size == 1:
            return [json.loads(data)]
        lengths = [row[0] for row in self.gather_ints([len(data)])]
        mine = torch.zeros(max(lengths), dtype=torch.uint8)
        mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(found, mine, group=self._group)
        return [json.loads(row[:length].numpy().tobytes()) for row, length in zip(found, lengths, strict=True)]

    def from_first(self, produce: Callable[[], Any]) -> Any:
        """What `produce` returns on rank 0 (JSON), on every rank.

        An exception of `produce` is raised on rank 0 as it is, and on the other ranks as FirstRankError with its text.
        """
        if self.size == 1:
            return produce()
        answer: dict[str, Any] = {}
        error: Exception | None = None
        if self.rank == 0:
            try:
                answer = {"value": produce()}
            except Exception as failure:  # the other ranks wait for an answer whatever happens here
                answer, error = {"error": f"{type(failure).__name__}: {failure}"}, failure
        data = json.dumps(answer).encode()
        length = torch.tensor([len(data)], dtype=torch.int64)
        dist.broadcast(length, 0, group=self._group)
        payload = torch.zeros(int(length), dtype=torch.uint8)
        if self.rank == 0:
            payload = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        dist.broadcast(payload, 0, group=self._group)
        answer = json.loads(payload.numpy().tobytes())
        if error is not None:
            raise error
        if "error" in answer:
            raise FirstRankError(answer["error"])
        return answer["value"]


class FirstRankError(UserError):
    """Rank 0 failed while the others waited for its answer; the text is its error."""
