"""Where the elements of flattened parameters lie in the shards of a group, as ZeRO partitions it.

A group is a list of parameters that are reduced, stepped and gathered together. Its gradients fill a [world, shard]
buffer; rank r owns row r after a reduce-scatter. ZeRO 1 and 2 concatenate the parameters and cut the whole into equal
shards (`FlatLayout`). ZeRO-3 cuts every parameter by itself (`RowLayout`). Both are pure index arithmetic.
"""

from collections.abc import Container, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Span(NamedTuple):
    """shard[offset : offset + length] of one rank is elements [start, start + length) of one parameter of the group."""

    parameter: int
    offset: int
    start: int
    length: int


class Layout(Protocol):
    """How the parameters of a group lie in its [world * shard] buffer."""

    numels: tuple[int, ...]
    world_size: int
    shard_numel: int

    def slots(self, buffer: Tensor, index: int) -> list[Tensor]:
        """Views of `buffer` [world * shard] that together hold parameter `index`, in order of its elements."""
        ...

    def parts(self, flat: Tensor, index: int) -> list[Tensor]:
        """Views of the flattened parameter `index` that fit its slots one by one."""
        ...

    def spans(self, rank: int) -> list[Span]:
        """The parts of parameters in the shard of `rank`, in order of their offsets; padding belongs to no span."""
        ...


class FlatLayout:
    """ZeRO 1 and 2: parameters one after the other, padded to a multiple of the world size, cut into equal shards."""

    def __init__(self, numels: Sequence[int], world_size: int, shard_numel: int):
        self.numels, self.world_size, self.shard_numel = tuple(numels), world_size, shard_numel
        self.offsets = [sum(self.numels[:i]) for i in range(len(self.numels))]

    def slots(self, buffer: Tensor, index: int) -> list[Tensor]:
        """One view: the parameter is contiguous in `buffer`."""
        return [buffer.narrow(0, self.offsets[index], self.numels[index])]

    def parts(self, flat: Tensor, index: int) -> list[Tensor]:
        """The parameter itself."""
        return [flat]

    def spans(self, rank: int) -> list[Span]:
        """The parameters that overlap the shard of `rank`, the first and the last one possibly cut."""
        low, high = rank * self.shard_numel, (rank + 1) * self.shard_numel
        found = []
        for index, (offset, numel) in enumerate(zip(self.offsets, self.numels, strict=True)):
            first, last = max(offset, low), min(offset + numel, high)
            if first < last:
                found.append(Span(index, first - low, first - offset, last - first))
        return found


class RowLayout:
    """ZeRO-3: every parameter is cut into `world_size` equal chunks, the last ones padded; a shard has one of each."""

    def __init__(self, numels: Sequence[int], world_size: int):
        self.numels, self.world_size = tuple(numels), world_size
        self.chunks = [-(-numel // world_size) for numel in self.numels]
        self.offsets = [sum(self.chunks[:i]) for i in range(len(self.chunks))]
        self.shard_numel = sum(self.chunks)

    def _full_rows(self, index: int) -> int:
        return self.numels[index] // self.chunks[index] if self.chunks[index] else 0

    def slots(self, buffer: Tensor, index: int) -> list[Tensor]:
        """A table [full rows, chunk], and what the next row holds of the rest."""
        table = buffer.view(self.world_size, self.shard_numel)
        chunk, offset, full = self.chunks[index], self.offsets[index], self._full_rows(index)
        found = [table[:full, offset : offset + chunk]]
        if rest := self.numels[index] - full * chunk:
            found.append(table[full, offset : offset + rest])
        return found

    def parts(self, flat: Tensor, index: int) -> list[Tensor]:
        """The parameter as a table [full rows, chunk], and the rest."""
        chunk, full = self.chunks[index], self._full_rows(index)
        found = [flat[: full * chunk].view(full, chunk)]
        if self.numels[index] - full * chunk:
            found.append(flat[full * chunk :])
        return found

    def spans(self, rank: int) -> list[Span]:
        """One chunk of every parameter that reaches as far as `rank`."""
        found = []
        for index, (numel, chunk, offset) in enumerate(zip(self.numels, self.chunks, self.offsets, strict=True)):
            start = rank * chunk
            if start < numel:
                found.append(Span(index, offset, start, min(chunk, numel - start)))
        return found


def joined(spans: Sequence[Span], wanted: Container[int]) -> list[tuple[int, int]]:
    """(offset, length) of the slices of a shard that hold only parameters in `wanted`; adjacent ones are merged."""
    found: list[tuple[int, int]] = []
    for span in spans:
        if span.parameter not in wanted:
            continue
        if found and sum(found[-1]) == span.offset:
            found[-1] = (found[-1][0], found[-1][1] + span.length)
        else:
            found.append((span.offset, span.length))
    return found


def add_parameter(layout: Layout, buffer: Tensor, index: int, value: Tensor) -> None:
    """buffer += value at the slots of parameter `index`; value of any shape and floating dtype."""
    flat = value.reshape(-1)
    for slot, part in zip(layout.slots(buffer, index), layout.parts(flat, index), strict=True):
        slot.add_(part)


def read_parameter(layout: Layout, buffer: Tensor, index: int) -> Tensor:
    """The flattened parameter `index` out of a full buffer [world * shard]; a copy."""
    return torch.cat([slot.reshape(-1) for slot in layout.slots(buffer, index)])
