"""Which parameters of a level are flattened together, and in which order.

A group is reduced, stepped and gathered as one flat tensor, with one collective each. The ZeRO stage decides how a flat
tensor is cut (`layout.py`). The order of the parameters decides what lies in one shard; `arrange` chooses that order by
what the level's optimizer needs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nltrain.fragment import Fragment
from nltrain.levels.config import LevelsError
from nltrain.levels.layout import Layout
from nltrain.levels.optimizers import LevelOptimizer


@dataclass(frozen=True, eq=False)
class Group:
    """Parameters that are flattened together, in this order."""

    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    shapes: tuple[torch.Size, ...]
    """of the whole parameters; ZeRO-3 empties the parameters themselves"""

    @classmethod
    def of(cls, parameters: Sequence[tuple[str, nn.Parameter]]) -> "Group":
        """A group of (name, whole parameter)."""
        return cls(
            tuple(name for name, _ in parameters),
            tuple(parameter for _, parameter in parameters),
            tuple(parameter.shape for _, parameter in parameters),
        )

    @property
    def numels(self) -> list[int]:
        """Elements of each parameter."""
        return [shape.numel() for shape in self.shapes]

    def fragments(self, kind: str, layout: Layout, rank: int, shard: Tensor) -> Iterator[tuple[str, Fragment]]:
        """("NAME.kind", slice) for what `shard` [layout.shard_numel] of `rank` holds of each parameter; views."""
        for index, offset, start, length in layout.spans(rank):
            total = self.shapes[index].numel()
            yield f"{self.names[index]}.{kind}", Fragment(shard.narrow(0, offset, length), start, total)


def arrange(
    parameters: Sequence[tuple[str, nn.Parameter]], max_elements: int, optimizer: LevelOptimizer
) -> list[Group]:
    """The groups of a level: the one place where the optimizer decides what lies where.

    An optimizer that works element by element gets the parameters in model order, and ZeRO may cut them anywhere. One
    that needs whole matrices must get an order in which every cut falls between two of them; until `arrange` can make
    such an order, it is refused.
    """
    if optimizer.needs_whole_matrices:
        raise LevelsError(
            f"optimizer {optimizer.name!r} needs whole matrices, but the groups of a level are cut into equal shards "
            "anywhere: use an optimizer that works element by element, such as adamw"
        )
    return consecutive(parameters, max_elements)


def consecutive(parameters: Sequence[tuple[str, nn.Parameter]], max_elements: int) -> list[Group]:
    """Parameters in their order, as many in a group as fit into `max_elements`; a larger one by itself."""
    found: list[list[tuple[str, nn.Parameter]]] = []
    size = max_elements
    for name, parameter in parameters:
        if size + parameter.numel() > max_elements:
            found.append([])
            size = 0
        found[-1].append((name, parameter))
        size += parameter.numel()
    return [Group.of(group) for group in found]
