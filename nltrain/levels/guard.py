"""Guards slow memory from bad data: decides on the device, before backward, whether a micro-step counts.

A micro-step is left out on all ranks when the loss of any rank is not finite or when the global mean loss spikes. The
one small all-reduce that agrees on it also sums loss and targets, so that the decision costs no collective of its own
and no host sync. Nothing here is read on the host until `host_state`, once per quantum at most.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nltrain.levels.ledger import CONTROL, Ledger

HISTORY = 128  # admitted micro-steps that a spike is measured against; none is called a spike before so many
MIN_RELATIVE_STD = 0.01  # a history of nearly equal losses would call noise a spike


class MicroStep(NamedTuple):
    """What one micro-step came to, over all ranks; tensors on the device, to be read when a log line is due."""

    loss_sum: Tensor  # float64, 0 where not finite
    num_targets: Tensor  # float64
    admitted: Tensor  # bool


class LossGuard:
    """Running statistics of admitted micro-steps, equal on all ranks."""

    def __init__(self, spike_sigma: float | None, device: torch.device, ledger: Ledger):
        self._spike_sigma, self._ledger = spike_sigma, ledger
        self._history = torch.zeros(HISTORY, dtype=torch.float64, device=device)
        # admitted with targets, left out, left out in a row
        self._counts = torch.zeros(3, dtype=torch.int64, device=device)
        self._slots = torch.arange(HISTORY, device=device)

    @torch.no_grad()
    def judge(self, loss_sum: Tensor, num_targets: int | Tensor) -> MicroStep:
        """All-reduces [loss, targets, not finite] and decides; once per micro-step on every rank, before backward."""
        device = self._history.device
        loss = loss_sum.detach().to(device, torch.float64).reshape(())
        if isinstance(num_targets, Tensor):
            targets = num_targets.detach().to(device, torch.float64).reshape(())
        else:
            targets = torch.full((), num_targets, dtype=torch.float64, device=device)
        finite = torch.isfinite(loss)
        totals = torch.stack([torch.where(finite, loss, 0.0), targets, (~finite).double()])
        with self._ledger.row("-", CONTROL):
            dist.all_reduce(totals)
        total_loss, total_targets, not_finite = totals.unbind()
        mean = total_loss / total_targets.clamp(min=1)
        admitted = not_finite == 0
        if self._spike_sigma is not None:
            centre = self._history.mean()
            spread = torch.maximum(self._history.std(), MIN_RELATIVE_STD * centre.abs())
            spike = (self._counts[0] >= HISTORY) & (total_targets > 0) & (mean > centre + self._spike_sigma * spread)
            admitted = admitted & ~spike
        self._record(mean, admitted, total_targets > 0)
        return MicroStep(total_loss, total_targets, admitted)

    def _record(self, mean: Tensor, admitted: Tensor, has_targets: Tensor) -> None:
        enters = admitted & has_targets
        here = enters & (self._slots == self._counts[0] % HISTORY)
        self._history = torch.where(here, mean, self._history)
        left_out = (~admitted).long()
        self._counts = torch.stack(
            [self._counts[0] + enters.long(), self._counts[1] + left_out, (self._counts[2] + left_out) * left_out]
        )

    def host_state(self) -> tuple[int, int]:
        """(micro-steps left out so far, left out in a row). A host sync."""
        _, left_out, in_a_row = self._counts.tolist()
        return left_out, in_a_row

    def state_dict(self) -> dict[str, Any]:
        """JSON-able, equal on all ranks. A host sync."""
        return {"history": self._history.tolist(), "counts": self._counts.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._history.copy_(torch.tensor(state["history"], dtype=torch.float64))
        self._counts = torch.tensor(state["counts"], dtype=torch.int64, device=self._counts.device)
