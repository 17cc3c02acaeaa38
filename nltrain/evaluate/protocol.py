"""What an evaluation is, and what it is given: plain values, no run and no config of another room."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nltrain.data.batch import Arrangement
from nltrain.data.config import DataConfig
from nltrain.model import LanguageModel

Metrics = Mapping[str, float | None]
"""{metric: value}; None where it was not computed. Units belong to the name or to the evaluation's docstring."""


class Evaluation(Protocol):
    """One measurement of the model while it trains."""

    name: str
    """Names the result in rows, lines and W&B; unique among the evaluations of a run."""

    def due(self, tokens: int) -> bool:
        """Whether it is due at T = `tokens`, the end of a quantum. A pure function, so that all ranks decide alike."""

    def run(self, model: LanguageModel) -> Metrics:
        """Evaluate. Every rank calls it at the same T; at ZeRO-3 every forward is a collective, so all ranks must run
        equally many. The metrics count on rank 0 alone. The model must come back as it was, train mode included."""


@dataclass(frozen=True)
class Setting:
    """What evaluations are made of, the same on all ranks but for `rank` and `device`."""

    data: DataConfig
    """The run's data; evaluations read the validation split of it."""
    num_sequences: int
    """Held-out sequences to read, over all ranks; 0: none, and nothing is due."""
    micro_batch_size: int
    """Sequences per rank in one forward."""
    every_tokens: int
    """Tokens between two evaluations, rounded up to whole quanta; 0: only at the end of the run."""
    quantum_tokens: int
    """Tokens from one possible evaluation to the next: `due` is asked at whole multiples."""
    total_tokens: int
    """T at the end of the run, a whole number of quanta."""
    reference_max_tokens: int
    """Count the text's unigram and bigram entropies when it has at most this many training tokens."""
    rank: int
    """This rank."""
    world_size: int
    """Ranks that evaluate together."""
    device: torch.device
    """Device of the model on this rank."""
    arrange: Callable[[Tensor], Arrangement] | None = None
    """What lays out the documents of a batch for the model (`nltrain.model.arrange`); None: nothing does."""

    def due(self, tokens: int) -> bool:
        """The cadence of the validation: in the quantum in which floor(T / every_tokens) grows, and at the end."""
        if not self.num_sequences:
            return False
        before, every = tokens - self.quantum_tokens, self.every_tokens
        return tokens >= self.total_tokens or bool(every and tokens // every > before // every)
