"""Who writes which elements: a pure function of the ranks' fragment tables.

Every element of every tensor is written by exactly one rank, however often it is held: what only one rank has is its
own, what several have goes to the one with least to write. Elements that nobody holds are an error that names them.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from nltrain.checkpoint.errors import ShareError
from nltrain.fragment import Fragment

# The names that safetensors uses; a dtype outside this table is refused.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def itemsize(dtype_name: str) -> int:
    """Bytes of one element of a dtype of DTYPES."""
    return DTYPES[dtype_name].itemsize


class Piece(NamedTuple):
    """Elements [start, start + numel) of the flattened tensor `name`, which has `total` elements."""

    name: str
    start: int
    numel: int
    total: int
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Bytes of the elements."""
        return self.numel * itemsize(self.dtype)


def table(fragments: Mapping[str, Fragment]) -> list[Piece]:
    """The pieces that this rank holds, by name. A fragment that is no flat slice of its tensor raises ShareError."""
    pieces = []
    for name, (tensor, start, total) in sorted(fragments.items()):
        numel = tensor.numel()
        if tensor.dim() != 1 or not tensor.is_contiguous():
            raise ShareError(f"fragment {name} has shape {tuple(tensor.shape)}: it must be a contiguous 1-D slice")
        if tensor.dtype not in _NAMES:
            raise ShareError(f"fragment {name} has dtype {tensor.dtype}, which has no stored form")
        if start < 0 or start + numel > total:
            raise ShareError(
                f"fragment {name} covers [{start}, {start + numel}) of {total} elements: outside the tensor"
            )
        pieces.append(Piece(name, start, numel, total, _NAMES[tensor.dtype]))
    return pieces


def assign(tables: Sequence[Sequence[Piece]]) -> list[list[Piece]]:
    """For each rank the pieces it writes. `tables[r]` is what rank r holds; the result is the same on every rank."""
    held: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
    kinds: dict[str, tuple[int, str]] = {}
    for rank, pieces in enumerate(tables):
        for name, start, numel, total, dtype in pieces:
            kind = kinds.setdefault(name, (total, dtype))
            if kind != (total, dtype):
                raise ShareError(
                    f"fragment {name} has {total} elements of {dtype} on rank {rank}, elsewhere {kind[0]} of {kind[1]}"
                )
            # A tensor without elements is named by the first rank that has it.
            if numel or name not in held:
                held[name].append((start, start + numel, rank))
    written: list[list[Piece]] = [[] for _ in tables]
    load_bytes = [0] * len(tables)
    shared: list[tuple[Piece, list[int]]] = []
    for name, (total, dtype) in sorted(kinds.items()):
        for start, stop, holders in _cut(name, total, held[name]):
            piece = Piece(name, start, stop - start, total, dtype)
            if len(holders) == 1:
                written[holders[0]].append(piece)
                load_bytes[holders[0]] += piece.num_bytes
            else:
                shared.append((piece, holders))
        if total == 0:
            written[held[name][0][2]].append(Piece(name, 0, 0, 0, dtype))
    # Largest first, each to its least loaded holder: close to even, and the same on every rank.
    for piece, holders in sorted(shared, key=lambda item: (-item[0].num_bytes, item[0])):
        rank = min(holders, key=lambda holder: (load_bytes[holder], holder))
        written[rank].append(piece)
        load_bytes[rank] += piece.num_bytes
    return [sorted(pieces) for pieces in written]


def _cut(name: str, total: int, intervals: list[tuple[int, int, int]]) -> list[tuple[int, int, list[int]]]:
    """[0, total) as runs (start, stop, ranks that hold it)."""
    events: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for start, stop, rank in intervals:
        events[start].append((rank, 1))
        events[stop].append((rank, -1))
    runs, position = [], 0
    count: dict[int, int] = defaultdict(int)
    for boundary in sorted(events.keys() | {total}):
        if boundary > position:
            holders = sorted(rank for rank, times in count.items() if times)
            if not holders:
                raise ShareError(f"elements [{position}, {boundary}) of {name} ({total} in all) are held by no rank")
            runs.append((position, boundary, holders))
            position = boundary
        for rank, change in events.get(boundary, ()):
            count[rank] += change
    return runs
