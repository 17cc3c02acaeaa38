"""Loss on held-out sequences, by all ranks together.

At ZeRO-3 every forward is a collective, so all ranks run equally many, on padding where they have no sequence left.
"""

import dataclasses
import math
from typing import Any

import torch
import torch.distributed as dist

from nltrain.config import RunConfig
from nltrain.data import Batch, DataError, TokenDataset, TokenStream, open_order
from nltrain.evaluate.entropy import reference_entropies
from nltrain.levels.quantum import cut_quantum
from nltrain.model import LanguageModel


class Validation:
    """The held-out sequences of this rank, read once, and the entropies of the text to compare with."""

    def __init__(self, config: RunConfig, rank: int, world_size: int, device: torch.device) -> None:
        self._device = device
        # The same sequences whatever the order of training: losses of two seeds can be compared.
        data = dataclasses.replace(config.data, split="validation", weights=(), seed=0, window_shards=16)
        plan = open_order(data)
        available = sum(dataset.num_sequences for dataset in plan.datasets)
        num_sequences = min(config.train.validation_sequences, available)
        cut = cut_quantum(num_sequences, config.train.micro_batch_size, world_size)
        with TokenStream(data, plan, [step[rank] for step in cut]) as stream:
            self._batches: list[Batch] = list(stream)
        self._entropies = self._count(config, rank)

    @torch.no_grad()
    def run(self, model: LanguageModel) -> dict[str, Any]:
        """Mean loss [nats per token] over all held-out targets of all ranks, beside the entropies."""
        was_training = model.training
        model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self._device)
        for batch in self._batches:
            batch = batch.to(self._device)
            loss_sum = model.loss(batch.tokens, batch.targets, batch.document_starts)
            if batch.num_targets:  # padding may come to anything
                sums[0] += loss_sum
                sums[1] += batch.num_targets
        model.train(was_training)
        dist.all_reduce(sums)
        loss_sum, targets = sums.tolist()
        if not targets:
            raise DataError("the validation split holds no target: prepare the data with a larger validation_fraction")
        loss = loss_sum / targets
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "targets": int(targets)} | self._entropies

    @staticmethod
    def _count(config: RunConfig, rank: int) -> dict[str, float | None]:
        """Unigram and bigram entropies; counted on rank 0, which alone writes them down."""
        none: dict[str, float | None] = {"unigram_entropy": None, "bigram_entropy": None}
        if rank != 0:
            return none
        train = TokenDataset.open(config.data.prefixes[0], "train")
        limit = config.train.reference_max_tokens
        if train.num_tokens > limit:
            print(
                f"unigram and bigram entropies are not counted: {train.num_tokens:,} training tokens are more than "
                f"train.reference_max_tokens={limit:,}",
                flush=True,
            )
            return none
        found = reference_entropies(train, TokenDataset.open(config.data.prefixes[0], "validation"))
        return {"unigram_entropy": found.unigram_nats, "bigram_entropy": found.bigram_nats}
