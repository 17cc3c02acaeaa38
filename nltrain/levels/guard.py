"""Guards slow memory from bad data: decides on the device, before backward, which ranks' parts of a micro-step count.

A rank is left out when its loss is not finite. Where the global mean loss spikes, the few ranks that cause the spike
are left out, or all ranks where a few do not explain it. A rank without targets contributes nothing, whatever its
forward gave. One small all-reduce carries the decision and the sums of loss and targets, so that the decision costs no
further collective and no host sync. The host reads nothing before `host_state`, at most once per quantum.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nltrain.levels.ledger import CONTROL, Ledger

HISTORY = 128  # earlier micro-steps that a loss is compared with; before there are so many, nothing is a spike
MIN_RELATIVE_STD = 0.01  # without it, noise would be a spike after nearly equal losses
FEW = 0.25  # where a spike needs a larger share of the targets left out, all ranks are left out
COUNTS, NOT_FINITE, SPIKE = 0, 1, 2  # verdicts on a rank's part


class MicroStep(NamedTuple):
    """Sums and verdict of one micro-step: tensors on the device, to be read when a log line is due."""

    loss_sum: Tensor  # float64, over the ranks that count
    num_targets: Tensor  # float64, over the ranks that count
    left_out: Tensor  # float64, targets of the ranks that were left out
    verdict: Tensor  # int64, on this rank's own part: COUNTS, NOT_FINITE or SPIKE
    admitted: Tensor  # bool, whether this rank's gradients enter the windows


class LossGuard:
    """Running statistics of admitted micro-steps, equal on all ranks."""

    def __init__(self, spike_sigma: float | None, device: torch.device, ledger: Ledger):
        self._spike_sigma, self._ledger = spike_sigma, ledger
        self._history = torch.zeros(HISTORY, dtype=torch.float64, device=device)
        # micro-steps that entered the history, micro-steps with a rank left out, the same in a row, targets left out
        self._counts = torch.zeros(4, dtype=torch.int64, device=device)
        self._slots = torch.arange(HISTORY, device=device)
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()

    @torch.no_grad()
    def judge(self, loss_sum: Tensor, num_targets: int | Tensor) -> MicroStep:
        """All-reduces every rank's [loss, targets, not finite] and decides; once per micro-step, before backward."""
        device = self._history.device
        loss = loss_sum.detach().to(device, torch.float64).reshape(())
        if isinstance(num_targets, Tensor):
            targets = num_targets.detach().to(device, torch.float64).reshape(())
        else:
            targets = torch.full((), num_targets, dtype=torch.float64, device=device)
        finite = torch.isfinite(loss)
        ranks = torch.zeros(self._world_size, 3, dtype=torch.float64, device=device)
        ranks[self._rank] = torch.stack([torch.where(finite, loss, 0.0), targets, (~finite).double()])
        with self._ledger.row("-", CONTROL):
            dist.all_reduce(ranks)
        verdicts = judge_ranks(ranks, self._limit())
        counted = torch.where((verdicts == COUNTS).unsqueeze(1), ranks[:, :2], 0.0)
        loss_total, num_counted = counted.sum(0).unbind()
        left_out = ranks[:, 1].sum() - num_counted
        self._record(loss_total / num_counted.clamp(min=1), num_counted > 0, left_out)
        verdict = verdicts[self._rank]
        return MicroStep(loss_total, num_counted, left_out, verdict, (verdict == COUNTS) & (targets > 0))

    def _limit(self) -> Tensor | None:
        """The mean loss above which a micro-step is a spike; infinite while there is too little to compare with."""
        if self._spike_sigma is None:
            return None
        centre = self._history.mean()
        spread = torch.maximum(self._history.std(), MIN_RELATIVE_STD * centre.abs())
        return torch.where(self._counts[0] >= HISTORY, centre + self._spike_sigma * spread, torch.inf)

    def _record(self, mean: Tensor, has_counted: Tensor, left_out: Tensor) -> None:
        here = has_counted & (self._slots == self._counts[0] % HISTORY)
        self._history = torch.where(here, mean, self._history)
        some = (left_out > 0).long()
        entered, with_some, in_a_row, targets = self._counts.unbind()
        self._counts = torch.stack(
            [entered + has_counted.long(), with_some + some, (in_a_row + some) * some, targets + left_out.long()]
        )

    def host_state(self) -> tuple[int, int, int]:
        """(micro-steps with a rank left out so far, the same in a row, targets left out so far). A host sync."""
        _, with_some, in_a_row, targets = self._counts.tolist()
        return with_some, in_a_row, targets

    def state_dict(self) -> dict[str, Any]:
        """JSON-able, equal on all ranks. A host sync."""
        return {"history": self._history.tolist(), "counts": self._counts.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._history.copy_(torch.tensor(state["history"], dtype=torch.float64))
        counts = (*state["counts"], 0)[:4]  # checkpoints of version 0.1.0 did not count targets
        self._counts = torch.tensor(counts, dtype=torch.int64, device=self._counts.device)


def judge_ranks(ranks: Tensor, limit: Tensor | None) -> Tensor:
    """Verdicts [N] int64 on the parts of N ranks. `ranks` [N, 3] float64: loss sum, targets, 1 where not finite.

    Where the mean over the finite ranks exceeds `limit`, the ranks with the highest means are left out, as few as bring
    the mean of the rest below it; all where that would take more than FEW of the targets. A rank without targets always
    counts: it has nothing to leave out.
    """
    has_targets = ranks[:, 1] > 0
    verdicts = torch.where(has_targets & (ranks[:, 2] > 0), NOT_FINITE, COUNTS)
    if limit is None:
        return verdicts
    candidates = has_targets & (verdicts == COUNTS)
    loss, targets = torch.where(candidates.unsqueeze(1), ranks[:, :2], 0.0).unbind(1)
    means = torch.where(candidates, loss / targets.clamp(min=1), -torch.inf)
    order = torch.argsort(means, descending=True, stable=True)
    # Row k: without the k ranks with the highest means. Not cumsum, which may differ between two GPUs.
    place = torch.arange(len(ranks), device=ranks.device)
    stays = place >= place.unsqueeze(1)
    rest_loss, rest_targets = (torch.where(stays, values[order], 0.0).sum(1) for values in (loss, targets))
    fits = (rest_loss <= limit * rest_targets) & (rest_targets >= (1 - FEW) * targets.sum())
    num_gone = torch.where(fits.any(), fits.long().argmax(), len(ranks))
    spiking = torch.zeros_like(candidates).scatter(0, order, place < num_gone)
    return torch.where(candidates & spiking, SPIKE, verdicts)
