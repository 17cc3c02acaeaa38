"""The one word that levels and checkpoints share: a named slice of a flattened tensor.

A sharded optimizer owns pieces of parameters, not parameters. A `Fragment` says which piece: `levels/` hands them out,
`checkpoint/` writes and reads them, and neither knows the other.
"""

from typing import NamedTuple

import torch


class Fragment(NamedTuple):
    """Elements [start, start + tensor.numel()) of a flattened tensor of `total` elements, as held by this rank."""

    tensor: torch.Tensor  # 1-D; filled in place on load
    start: int
    total: int
