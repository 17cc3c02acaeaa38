"""Where documents begin in a batch, laid out once on the host and shared by all blocks.

Every part of the model sees only the tokens of a token's own document: memories, convolutions, attention and rotary
positions. What the parts need to know is computed on the host, beside the data, and copied to the device with the
batch, so that a step of the model never waits for its device. B sequences, T tokens.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kernels import MemoryRule
from kernels.blocking import Blocking, build_blocking, token_positions
from nltrain.model.config import ATTENTION_FAMILIES, ModelConfig


@dataclass(frozen=True)
class Packing:
    """The documents in tokens [B, T]; made by `Packing.of`."""

    streamed: bool
    """Whether the rows continue documents."""
    starts: Tensor | None
    """[B, T] bool, True where a document begins; None where none begins inside the batch."""
    positions: Tensor
    """[B, T] tokens since each token's document began."""
    host_starts: Tensor | None
    """`starts` in host memory."""
    host_first: Tensor
    """[B] tokens of its document that each row has read before, in host memory."""
    lengths: tuple[int, ...] | None = None
    """Tokens of each document, row after row; None where none begins inside the batch, and where rows are continued."""
    ends: Tensor | None = None
    """[K + 1] int32: 0 and the end of each document of `lengths` in the rows laid end to end. The last one is repeated
    until K is a power of two, so that few shapes occur."""
    attention: str = "mask"
    """How attention inside documents is computed (`nltrain.model.attention`); the model sets it."""
    blockings: dict[tuple[int, int], Blocking] = field(default_factory=dict)
    """The blocks of the chunk loop by the two chunk lengths, on the device of `positions`."""

    @classmethod
    def of(cls, shape: tuple[int, int], starts: Tensor | None = None, position: Tensor | None = None) -> "Packing":
        """The arrangement of tokens of `shape` [B, T], in host memory.

        starts: [B, T] bool, True where a document begins; None for none. position: [B] tokens of its document that each
        row has already read; None at the start of a sequence. Both are read on the host: where an accelerator holds
        them, that waits for it.
        """
        starts = None if starts is None else starts.cpu()
        streamed = position is not None
        first = position.cpu() if position is not None else torch.zeros(shape[0], dtype=torch.long)
        if starts is not None and not bool((starts if streamed else starts[:, 1:]).any()):
            starts = None
        positions = token_positions(starts, first, shape[1])
        lengths = ends = None
        if starts is not None and not streamed:
            lengths, ends = _documents(starts)
        return cls(streamed, starts, positions, starts, first, lengths, ends)

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.positions.shape[1]

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
        """The blocks of the chunk loop; the first call for a pair of chunk lengths makes them on the host."""
        key = (rule.chunk_mem, rule.chunk_other)
        if key not in self.blockings:
            found = build_blocking(rule, self.num_tokens, self.host_first, self.host_starts)
            self.blockings[key] = found.moved(lambda x: x.to(self.positions.device))
        return self.blockings[key]

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

    # ---- as a part of a batch ----------------------------------------------------------------------------------------

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Packing":
        """The arrangement on the device of the model."""
        return self._moved(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Packing":
        """The arrangement in page-locked memory."""
        return self._moved(Tensor.pin_memory)

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors that go to the device."""
        return sum(x.nbytes for x in self._tensors())

    def _tensors(self) -> Iterator[Tensor]:
        yield self.positions
        yield from (x for x in (self.starts, self.ends) if x is not None)
        for blocking in self.blockings.values():
            yield from blocking.tensors()

    def _moved(self, change: Callable[[Tensor], Tensor]) -> "Packing":
        starts, ends = (None if x is None else change(x) for x in (self.starts, self.ends))
        blockings = {key: blocking.moved(change) for key, blocking in self.blockings.items()}
        return replace(self, starts=starts, ends=ends, positions=change(self.positions), blockings=blockings)


def _documents(starts: Tensor) -> tuple[tuple[int, ...], Tensor]:
    """`Packing.lengths` and `Packing.ends` of [B, T] starts; a row begins a document whether it is marked or not."""
    first = torch.cat([torch.ones_like(starts[:, :1]), starts[:, 1:]], 1).flatten().nonzero().flatten()
    ends = torch.cat([first, first.new_tensor([starts.numel()])])
    padded = 1 << (len(first) - 1).bit_length()
    return tuple(ends.diff().tolist()), torch.cat([ends, ends[-1:].expand(padded - len(first))]).int()


def arrange(config: ModelConfig, document_starts: Tensor) -> Packing:
    """All that a model of `config` needs to know of documents in [B, T] tokens of whole sequences, made on the host.

    document_starts: [B, T] bool in host memory.
    """
    num_sequences, num_tokens = document_starts.shape
    packing = Packing.of((num_sequences, num_tokens), document_starts)
    if config.family not in ATTENTION_FAMILIES:
        packing.blocking(config.rule)
    return packing
