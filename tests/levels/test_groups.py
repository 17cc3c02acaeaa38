"""Groups keep the order of parameters; what the ranks hold of a group is every element of it once."""

import pytest
import torch
from torch import nn

from nltrain.levels.config import LevelsError
from nltrain.levels.groups import Group, arrange, consecutive
from nltrain.levels.layout import FlatLayout, RowLayout
from nltrain.levels.optimizers import OPTIMIZERS, AdamW


def parameters(*numels: int) -> list[tuple[str, nn.Parameter]]:
    return [(f"p{index}", nn.Parameter(torch.zeros(numel))) for index, numel in enumerate(numels)]


@pytest.mark.parametrize(
    ("numels", "groups"),
    [
        ((3, 3, 3), [("p0", "p1"), ("p2",)]),
        ((9, 1, 1), [("p0",), ("p1", "p2")]),
        ((1, 9, 1), [("p0",), ("p1",), ("p2",)]),
        ((6, 6), [("p0",), ("p1",)]),
    ],
)
def test_parameters_share_a_group_up_to_its_limit_and_a_larger_one_stands_alone(numels, groups):
    assert [group.names for group in consecutive(parameters(*numels), 6)] == groups
    assert [group.names for group in arrange(parameters(*numels), 6, OPTIMIZERS["adamw"])] == groups


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("rows", [False, True])
def test_the_fragments_of_all_ranks_are_every_element_once(world_size, rows):
    group = Group.of([("a", nn.Parameter(torch.zeros(2, 5))), ("b", nn.Parameter(torch.zeros(3)))])
    if rows:
        layout = RowLayout(group.numels, world_size)
    else:
        layout = FlatLayout(group.numels, world_size, -(-sum(group.numels) // world_size))
    seen = {"a.master": torch.zeros(10), "b.master": torch.zeros(3)}
    for rank in range(world_size):
        shard = torch.ones(layout.shard_numel)
        for name, fragment in group.fragments("master", layout, rank, shard):
            assert fragment.total == seen[name].numel()
            seen[name][fragment.start : fragment.start + fragment.tensor.numel()] += fragment.tensor
            fragment.tensor.zero_()  # a view: loading fills it in place
        assert shard.sum() == layout.shard_numel - sum(p.length for p in layout.spans(rank))
    assert all(bool((count == 1).all()) for count in seen.values())


class ByMatrix(AdamW):
    """An optimizer for which no layout exists yet."""

    name = "by_matrix"
    needs_whole_matrices = True


def test_an_optimizer_that_needs_whole_matrices_is_refused_while_shards_cut_anywhere():
    with pytest.raises(LevelsError, match="'by_matrix' needs whole matrices"):
        arrange(parameters(4), 6, ByMatrix())
