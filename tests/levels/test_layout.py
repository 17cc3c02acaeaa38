"""Every element lies in exactly one place of the buffer, and spans describe the shards correctly."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nltrain.levels.layout import FlatLayout, Layout, RowLayout, add_parameter, read_parameter

sizes = st.lists(st.integers(1, 40), min_size=1, max_size=6)


def flat(numels: list[int], world_size: int) -> Layout:
    return FlatLayout(numels, world_size, -(-sum(numels) // (2 * world_size)) * 2)


@pytest.mark.parametrize("make", [flat, RowLayout])
@given(sizes, st.integers(1, 5))
def test_reading_returns_what_was_added_and_spans_cover_it_once(make, numels, world_size):
    layout = make(numels, world_size)
    buffer = torch.zeros(world_size * layout.shard_numel)
    values, first = [], 1
    for index, numel in enumerate(numels):
        values.append(torch.arange(first, first + numel, dtype=torch.float32))
        first += numel
        add_parameter(layout, buffer, index, values[-1])
    for index, value in enumerate(values):
        assert torch.equal(read_parameter(layout, buffer, index), value)
    assert int((buffer != 0).sum()) == sum(numels)  # nothing overlaps, padding stays zero
    shards, found = buffer.view(world_size, layout.shard_numel), [torch.zeros(n) for n in numels]
    for rank in range(world_size):
        for which, offset, start, length in layout.spans(rank):
            found[which][start : start + length] += shards[rank, offset : offset + length]
    assert all(torch.equal(a, b) for a, b in zip(found, values, strict=True))


def test_layouts_work_on_gradients_of_any_shape_and_dtype():
    layout = RowLayout([6], 4)
    buffer = torch.zeros(4 * layout.shard_numel)
    add_parameter(layout, buffer, 0, torch.full((2, 3), 0.5, dtype=torch.bfloat16).t())
    assert torch.equal(read_parameter(layout, buffer, 0), torch.full((6,), 0.5))
