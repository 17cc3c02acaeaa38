"""Blocks hold tokens of one document and one chunk, and every token lies in exactly one slot."""

import pytest
import torch

from kernels import MemoryRule
from kernels.blocking import build_blocking, token_positions

ZERO = torch.zeros(2, dtype=torch.long)


def test_positions_count_from_each_documents_start() -> None:
    starts = torch.tensor([[True, False, False, True, False], [False] * 5])
    position = torch.tensor([7, 3])
    assert token_positions(starts, position, 5).tolist() == [[0, 1, 2, 0, 1], [3, 4, 5, 6, 7]]
    assert token_positions(None, position, 3).tolist() == [[7, 8, 9], [3, 4, 5]]


@pytest.mark.parametrize(("chunk", "num_tokens", "lengths"), [(8, 20, [8, 8, 4]), (100, 130, [64, 36, 30])])
def test_rows_cut_alike_are_plain_slices(chunk: int, num_tokens: int, lengths: list[int]) -> None:
    blocking = build_blocking(MemoryRule(chunk_mem=chunk, chunk_other=chunk), num_tokens, ZERO, None)
    assert blocking.source is None and blocking.valid is None and blocking.slot is None
    assert [block.end - block.begin for block in blocking.blocks] == lengths
    assert [block.begins_mem for block in blocking.blocks] == [
        i % chunk == 0 for i in [b.begin for b in blocking.blocks]
    ]
    assert blocking.blocks[0].resets is True and blocking.blocks[1].resets is False
    assert blocking.position.tolist() == [num_tokens] * 2
    assert blocking.ends_mem is (num_tokens % chunk == 0)


def test_a_row_in_the_middle_of_a_document_is_no_reset() -> None:
    blocking = build_blocking(MemoryRule(chunk_mem=8, chunk_other=4), 10, ZERO + 6, None)
    assert [(block.begin, block.end) for block in blocking.blocks] == [(0, 2), (2, 6), (6, 10)]
    assert [(block.resets, block.begins_mem, block.begins_other) for block in blocking.blocks] == [
        (False, False, False), (False, True, True), (False, False, True),
    ]  # fmt: skip
    assert blocking.ends_mem is True and blocking.ends_other is True


def test_padded_slots_hold_every_token_once() -> None:
    rule = MemoryRule(chunk_mem=8, chunk_other=8)
    starts = torch.zeros(2, 30, dtype=torch.bool)
    starts[0, [3, 4, 20]] = True
    blocking = build_blocking(rule, 30, ZERO, starts)
    assert blocking.source is not None and blocking.valid is not None and blocking.slot is not None
    for row in range(2):
        held = blocking.source[row][blocking.valid[row]]
        assert sorted(held.tolist()) == list(range(30))
        assert blocking.source[row].gather(0, blocking.slot[row]).tolist() == list(range(30))
        for block in blocking.blocks:
            tokens = blocking.source[row, block.begin : block.end][blocking.valid[row, block.begin : block.end]]
            assert not starts[row, tokens[1:]].any()  # one document
    assert blocking.position.tolist() == [10, 30]


def test_a_move_changes_each_tensor_once_and_keeps_the_blocks() -> None:
    rule = MemoryRule(chunk_mem=8, chunk_other=4)
    starts = torch.zeros(2, 30, dtype=torch.bool)
    starts[0, [3, 20]] = True
    blocking = build_blocking(rule, 30, ZERO + 2, starts)
    changed: list[torch.Tensor] = []

    def copy(x: torch.Tensor) -> torch.Tensor:
        changed.append(x)
        return x.clone()

    moved = blocking.moved(copy)
    assert len(changed) == len(list(blocking.tensors())) == 5 and blocking.masks is not None
    own = moved.masks.untyped_storage().data_ptr()  # type: ignore[union-attr]
    for there, here in zip(moved.blocks, blocking.blocks, strict=True):
        assert (there.begin, there.end) == (here.begin, here.end)
        for name in ("resets", "begins_mem", "begins_other"):
            got, want = getattr(there, name), getattr(here, name)
            if isinstance(want, bool):
                assert got is want
            else:
                assert torch.equal(got, want) and got.untyped_storage().data_ptr() == own
    assert moved.ends_mem is blocking.ends_mem or torch.equal(moved.ends_mem, blocking.ends_mem)  # type: ignore[arg-type]
