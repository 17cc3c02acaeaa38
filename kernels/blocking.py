"""Cuts packed sequences into blocks: runs of tokens of one document inside one chunk of at most 64 tokens.

Chunks are counted from each document's own start, so rows of a batch may be cut at different places. Then the tokens
are gathered into padded blocks; when all rows are cut alike (the common case) blocks are plain slices.
`build_blocking` works on the host: call it once per batch, not once per layer, and where the host holds the positions.
`Blocking.moved` brings the result to the device of the model.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.rule import MemoryRule

# Per row of the batch, or one answer for all rows.
RowMask = Tensor | bool


@dataclass(frozen=True)
class Block:
    """One step of the chunk loop."""

    begin: int
    """First token, in the padded order if there is one."""
    end: int
    """One past the last token."""
    resets: RowMask
    """Rows whose document begins with this block."""
    begins_mem: RowMask
    """Rows in which a chunk of the main memory begins with this block."""
    begins_other: RowMask
    """Rows in which a chunk of the other memories begins with this block."""

    def with_masks(self, take: Callable[[RowMask], RowMask]) -> "Block":
        """The same with `take` applied to its masks, in their order."""
        return Block(self.begin, self.end, take(self.resets), take(self.begins_mem), take(self.begins_other))


@dataclass(frozen=True)
class Blocking:
    """The blocks of a batch and where its tokens lie in them."""

    blocks: tuple[Block, ...]
    source: Tensor | None
    """[B, S] token of each padded slot (0 where empty); None: no padding, slots are the tokens."""
    valid: Tensor | None
    """[B, S] whether a slot holds a token."""
    slot: Tensor | None
    """[B, T] slot of each token."""
    ends_mem: RowMask
    """Rows that end with a complete chunk of the main memory."""
    ends_other: RowMask
    """Rows that end with a complete chunk of the other memories."""
    position: Tensor
    """[B] tokens since the document began, after the last token."""
    masks: Tensor | None = None
    """[K, B] bool: every mask above in which rows differ, in the order of the blocks; they are its rows."""

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor, each once."""
        return (x for x in (self.source, self.valid, self.slot, self.position, self.masks) if x is not None)

    def moved(self, change: Callable[[Tensor], Tensor]) -> "Blocking":
        """The same with `change` applied to every tensor; all masks are one tensor, hence one copy."""
        masks = None if self.masks is None else change(self.masks)
        rows = iter(() if masks is None else masks.unbind())

        def take(mask: RowMask) -> RowMask:
            return mask if isinstance(mask, bool) else next(rows)

        blocks = tuple(block.with_masks(take) for block in self.blocks)
        source, valid, slot = (None if x is None else change(x) for x in (self.source, self.valid, self.slot))
        ends_mem, ends_other = take(self.ends_mem), take(self.ends_other)
        return Blocking(blocks, source, valid, slot, ends_mem, ends_other, change(self.position), masks)


def token_positions(document_starts: Tensor | None, position: Tensor, num_tokens: int) -> Tensor:
    """[B, T] tokens since the document of each token began, given those before the first token."""
    steps = torch.arange(num_tokens, device=position.device)
    carried = position[:, None] + steps
    if document_starts is None:
        return carried
    last_start = torch.where(document_starts, steps, -1).cummax(1).values
    return torch.where(last_start >= 0, steps - last_start, carried)


def build_blocking(rule: MemoryRule, num_tokens: int, position: Tensor, document_starts: Tensor | None) -> Blocking:
    """The blocks of [B, num_tokens] tokens that continue documents at `position` [B], on the device of `position`.

    Reads `position` and `document_starts` on the host, which waits for an accelerator that holds them.
    """
    starts = None if document_starts is None else document_starts.cpu()
    found = _build_on_host(rule, token_positions(starts, position.cpu(), num_tokens))
    return found if position.device.type == "cpu" else found.moved(lambda x: x.to(position.device))


def _build_on_host(rule: MemoryRule, where: Tensor) -> Blocking:
    """The blocks of tokens at positions `where` [B, T] of their documents."""
    num_sequences, num_tokens = where.shape
    in_chunk = where % rule.chunk_min
    cuts = in_chunk % rule.block_tokens == 0
    cuts[:, 0] = True
    # A row that continues a document at its start is no reset; position 0 carries no state.
    starts = where == 0
    ends = where[:, -1] + 1
    ends_mem, ends_other = _row_masks(torch.stack([ends % rule.chunk_mem == 0, ends % rule.chunk_other == 0], 1))

    def blocks(begins: list[int], end: int, first: Tensor, has: Tensor | bool) -> tuple[Block, ...]:
        """first: [B, blocks], the first token of each row's block; has: whether the row has that block."""
        at = where.gather(1, first)
        masks = (starts.gather(1, first), at % rule.chunk_mem == 0, at % rule.chunk_other == 0)
        by_block = zip(*(_row_masks(mask & has) for mask in masks), strict=True)
        spans = zip(begins, [*begins[1:], end], strict=True)
        return tuple(Block(*span, *folded) for span, folded in zip(spans, by_block, strict=True))

    if bool((cuts == cuts[:1]).all()):
        first = cuts[0].nonzero().flatten()
        alike = blocks(first.tolist(), num_tokens, first.expand(num_sequences, -1), True)
        return _with_one_table(Blocking(alike, None, None, None, ends_mem, ends_other, ends))

    steps = torch.arange(num_tokens)
    block_index = cuts.cumsum(1) - 1
    begin_of = torch.where(cuts, steps, 0).cummax(1).values
    num_blocks = int(block_index.max()) + 1
    width = rule.block_tokens
    slot = block_index * width + (steps - begin_of)
    source = torch.zeros(num_sequences, num_blocks * width, dtype=torch.long).scatter(1, slot, steps.expand_as(slot))
    valid = torch.zeros_like(source, dtype=torch.bool).scatter(1, slot, True)
    begins = list(range(0, num_blocks * width, width))
    apart = blocks(begins, num_blocks * width, source[:, ::width], valid[:, ::width])
    return _with_one_table(Blocking(apart, source, valid, slot, ends_mem, ends_other, ends))


def _with_one_table(found: Blocking) -> Blocking:
    """The same with the masks as rows of one tensor."""
    masks = [m for b in found.blocks for m in (b.resets, b.begins_mem, b.begins_other)]
    apart = [mask for mask in (*masks, found.ends_mem, found.ends_other) if not isinstance(mask, bool)]
    return replace(found, masks=torch.stack(apart)).moved(lambda x: x) if apart else found


def _row_masks(masks: Tensor) -> list[RowMask]:
    """The columns of `masks` [B, n]; a column whose rows all agree becomes one bool."""
    every, some = masks.all(0).tolist(), masks.any(0).tolist()
    return [
        True if all_rows else masks[:, i] if any_row else False
        for i, (all_rows, any_row) in enumerate(zip(every, some, strict=True))
    ]
