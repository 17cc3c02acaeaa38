"""What a rank gets for one micro-step: tokens, targets and document starts as torch tensors.

A batch may also carry what a model needs to know of its documents, laid out beside the data by a function that the
stream was given; this room knows no more of it than `Arrangement`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from nltrain.data import shards

IGNORED_TARGET = -100
TOKENS_PER_PADDING_DOCUMENT = 512
BYTES_PER_TOKEN = 8 + 8 + 1  # tokens, targets, document_starts


class Arrangement(Protocol):
    """The documents of a batch as a model wants them, made on the host."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors that go to the device."""

    def pin_memory(self) -> "Arrangement":
        """The same in page-locked memory."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Arrangement":
        """The same on another device."""


@dataclass(frozen=True)
class Batch:
    """B sequences of T tokens."""

    tokens: Tensor
    """[B, T] int64."""
    targets: Tensor
    """[B, T] int64: the next token of each position, -100 where it is padding."""
    document_starts: Tensor
    """[B, T] bool: True at the first token of a document, where a model resets its memory."""
    sample_indices: tuple[int, ...]
    """Global index of each sequence; empty for padding."""
    num_targets: int
    """Targets of this batch that are not ignored."""
    arrangement: Arrangement | None = None
    """What a model is to know of the documents, where the stream was told to lay them out."""

    @classmethod
    def padding(cls, seq_len: int, vocab_size: int) -> Self:
        """One sequence whose targets are all ignored, for a rank without a sequence.

        The tokens are random but always the same, in short documents: a memory is least stable on thousands of equal
        tokens.
        """
        tokens = torch.randint(vocab_size, (1, seq_len), generator=torch.Generator().manual_seed(0))
        starts = torch.zeros(1, seq_len, dtype=torch.bool)
        starts[:, ::TOKENS_PER_PADDING_DOCUMENT] = True
        return cls(tokens, torch.full((1, seq_len), IGNORED_TARGET, dtype=torch.int64), starts, (), 0)

    @classmethod
    def pack(
        cls, sequences: Sequence[shards.Sequence], sample_indices: Sequence[int] | np.ndarray, seq_len: int
    ) -> Self:
        """The batch of these sequences; sample_indices are their global indices."""
        num = len(sequences)
        tokens, targets = np.empty((num, seq_len), np.int64), np.empty((num, seq_len), np.int64)
        starts = np.zeros((num, seq_len), np.bool_)
        num_targets = 0
        for row, sequence in enumerate(sequences):
            tokens[row] = sequence.tokens[:-1]
            targets[row] = sequence.tokens[1:]
            targets[row, sequence.num_targets :] = IGNORED_TARGET
            starts[row, sequence.starts] = True
            num_targets += sequence.num_targets
        tensors = [torch.from_numpy(array) for array in (tokens, targets, starts)]
        return cls(tensors[0], tensors[1], tensors[2], tuple(int(index) for index in sample_indices), num_targets)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The batch on another device."""
        arrangement = None if self.arrangement is None else self.arrangement.to(device, non_blocking)
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking), arrangement)

    def pinned(self) -> "Batch":
        """The batch in page-locked memory, so that copies to a GPU overlap with its work."""
        return self._mapped(Tensor.pin_memory, None if self.arrangement is None else self.arrangement.pin_memory())

    def _mapped(self, change: Callable[[Tensor], Tensor], arrangement: Arrangement | None) -> "Batch":
        tokens, targets, starts = change(self.tokens), change(self.targets), change(self.document_starts)
        return replace(self, tokens=tokens, targets=targets, document_starts=starts, arrangement=arrangement)

    @property
    def documents(self) -> Any:
        """What a model is told of the documents: the arrangement, or else `document_starts`."""
        return self.document_starts if self.arrangement is None else self.arrangement

    @property
    def num_bytes(self) -> int:
        """Bytes of its tensors, those of the arrangement included."""
        return self.tokens.numel() * BYTES_PER_TOKEN + (0 if self.arrangement is None else self.arrangement.num_bytes)
