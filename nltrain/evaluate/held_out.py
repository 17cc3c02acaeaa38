"""The held-out sequences that all evaluations of a run share: read once, when the first evaluation needs them.

Guarantee: every rank has equally many batches, with padding where it has no sequence left, because at ZeRO-3 every
forward is a collective.
"""

import dataclasses
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from nltrain.data import Batch, DataError, TokenStream, open_order
from nltrain.evaluate.protocol import Setting
from nltrain.levels.quantum import cut_quantum
from nltrain.model import LanguageModel


class HeldOut:
    """This rank's share of the first `setting.num_sequences` sequences of the validation split."""

    def __init__(self, setting: Setting) -> None:
        """Nothing is read yet."""
        self._setting = setting
        self._batches: list[Batch] = []

    def batches(self) -> list[Batch]:
        """In host memory, read on the first call. Raises DataError or StoreError."""
        setting = self._setting
        if not self._batches:
            # The order does not depend on that of training, so losses of runs with different seeds can be compared.
            data = dataclasses.replace(setting.data, split="validation", weights=(), seed=0, window_shards=16)
            plan = open_order(data)
            available = sum(dataset.num_sequences for dataset in plan.datasets)
            cut = cut_quantum(min(setting.num_sequences, available), setting.micro_batch_size, setting.world_size)
            with TokenStream(data, plan, [step[setting.rank] for step in cut], setting.arrange) as stream:
                self._batches = list(stream)
        return self._batches

    @torch.no_grad()
    def sums(self, model: LanguageModel, measure: Callable[[Batch], Tensor]) -> tuple[list[float], int]:
        """(sums of `measure` over all batches of all ranks, number of targets). Collective.

        measure: a batch on the device -> [K] sums over its targets; it is also called on padding, where its result is
        ignored. The model is in eval mode meanwhile. Raises DataError where no target is held out.
        """
        batches, device = self.batches(), self._setting.device
        was_training = model.training
        model.eval()
        sums = torch.zeros(1, dtype=torch.float64, device=device)  # [1 + K]: targets, then what is measured
        for batch in batches:
            batch = batch.to(device)
            measured = measure(batch).double().reshape(-1)
            if len(sums) == 1:
                sums = torch.zeros(1 + len(measured), dtype=torch.float64, device=device)
            if batch.num_targets:  # on padding the result may be anything, NaN included
                sums[0] += batch.num_targets
                sums[1:] += measured
        model.train(was_training)
        dist.all_reduce(sums)
        targets, *measured_sums = sums.tolist()
        if not targets:
            raise DataError("the validation split holds no target: prepare the data with a larger validation_fraction")
        return measured_sums, int(targets)
