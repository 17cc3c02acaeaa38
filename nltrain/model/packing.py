"""Where documents begin in a batch, computed once and shared by all blocks.

Every part of the model sees only the tokens of a token's own document: memories, convolutions, attention and rotary
positions.
"""

import torch
from torch import Tensor

from kernels import MemoryRule
from kernels.blocking import Blocking, build_blocking, token_positions


class Packing:
    """The documents in tokens [B, T].

    starts: [B, T] bool, True where a document begins; None for none. position: [B] tokens of its document that each row
    has already read; None at the start of a sequence. The constructor reads on the host whether a document begins
    inside the batch: one synchronisation per batch on an accelerator.
    """

    def __init__(self, tokens: Tensor, starts: Tensor | None, position: Tensor | None) -> None:
        num_sequences, self.num_tokens = tokens.shape
        device = tokens.device
        self.streamed = position is not None
        self.first_position = (
            position if position is not None else torch.zeros(num_sequences, dtype=torch.long, device=device)
        )
        if starts is not None and not bool((starts if self.streamed else starts[:, 1:]).any()):
            starts = None
        self.starts = starts
        self._positions: Tensor | None = None
        self._blockings: dict[tuple[int, int], Blocking] = {}

    @property
    def positions(self) -> Tensor:
        """[B, T] tokens since each token's document began."""
        if self._positions is None:
            self._positions = token_positions(self.starts, self.first_position, self.num_tokens)
        return self._positions

    @property
    def next_position(self) -> Tensor:
        """[B] tokens since the document began, after the last token."""
        return self.positions[:, -1] + 1

    def taps_seen(self, num_taps: int, dtype: torch.dtype) -> Tensor | None:
        """[B, T, num_taps]: 1 where the token 1, 2, ... positions earlier is of the same document, else 0.

        None where no mask is needed: a single document per row, whose missing taps are zeros.
        """
        if self.starts is None and not self.streamed:
            return None
        taps = torch.arange(1, num_taps + 1, device=self.positions.device)
        return (self.positions.unsqueeze(-1) >= taps).to(dtype)

    def blocking(self, rule: MemoryRule) -> Blocking:
        """The blocks of the chunk loop."""
        key = (rule.chunk_mem, rule.chunk_other)
        if key not in self._blockings:
            self._blockings[key] = build_blocking(rule, self.num_tokens, self.first_position, self.starts)
        return self._blockings[key]

    def attention_mask(self, num_past: int) -> Tensor | None:
        """[B, 1, T, num_past + T] bool, True for the keys that a token sees; None for plain causal attention."""
        if self.starts is None and not num_past:
            return None
        device = self.positions.device
        query = num_past + torch.arange(self.num_tokens, device=device)
        key = torch.arange(num_past + self.num_tokens, device=device)
        # The document of a token began positions tokens before it.
        first = (query - self.positions).unsqueeze(-1)
        return ((key <= query.unsqueeze(-1)) & (key >= first)).unsqueeze(1)
