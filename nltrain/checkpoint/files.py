"""Data files of one rank: safetensors files laid out in advance, staged in host memory as the bytes they will be.

A `Part` says which pieces go where in one file; a `Staging` holds the files' bytes and is filled by one copy per piece
(pinned memory where there is a GPU). Staging is the rank's share plus headers, reused from save to save. No file is
larger than asked; a piece is cut where it does not fit.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nltrain.checkpoint.shares import DTYPES, Piece, itemsize
from nltrain.fragment import Fragment

_ALIGNMENT = 8


class Part(NamedTuple):
    """One file: its path in the checkpoint folder, its header, and each piece with its byte offset."""

    path: str
    header: bytes
    pieces: tuple[tuple[Piece, int], ...]
    num_bytes: int


def _entry_key(piece: Piece) -> str:
    return f"{piece.name}[{piece.start}:{piece.start + piece.numel}]"


def _entry_bound(piece: Piece) -> int:
    """Upper bound of the header bytes of one entry, whatever its offsets and cut."""
    return len(json.dumps(piece.name)) + 140


def pack(pieces: Iterable[Piece], path_prefix: str, max_file_bytes: int) -> list[Part]:
    """Cut pieces into files path_prefix-00000.safetensors, ... of at most `max_file_bytes` each."""
    files: list[list[Piece]] = []
    room = 0
    # Large items first, so that every element is aligned without gaps, which the format does not allow.
    for piece in sorted(pieces, key=lambda p: (-itemsize(p.dtype), p)):
        start, left, size = piece.start, piece.numel, itemsize(piece.dtype)
        while left or piece.total == 0:
            bound = _entry_bound(piece)
            if room - bound < size:
                files.append([])
                room = max_file_bytes - 2 * _ALIGNMENT
            numel = min(left, (room - bound) // size)
            files[-1].append(Piece(piece.name, start, numel, piece.total, piece.dtype))
            room -= bound + numel * size
            start, left = start + numel, left - numel
            if piece.total == 0:
                break
    return [_part(f"{path_prefix}-{index:05d}.safetensors", entries) for index, entries in enumerate(files)]


def _part(path: str, entries: Sequence[Piece]) -> Part:
    header, offset = {}, 0
    for piece in entries:
        header[_entry_key(piece)] = {
            "dtype": piece.dtype,
            "shape": [piece.numel],
            "data_offsets": [offset, offset + piece.num_bytes],
        }
        offset += piece.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    head = len(text).to_bytes(8, "little") + text
    offsets, position = [], len(head)
    for piece in entries:
        offsets.append((piece, position))
        position += piece.num_bytes
    return Part(path, head, tuple(offsets), position)


class Staging:
    """The bytes of this rank's files in host memory, kept from save to save and grown when a save needs more."""

    def __init__(self, pin: bool = False) -> None:
        self.parts: tuple[Part, ...] = ()
        self._pin = pin
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._buffers: list[Tensor] = []

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return self._memory.numel()

    def lay_out(self, parts: Sequence[Part]) -> None:
        """Make room for these files and write their headers."""
        needed = sum(_padded(part.num_bytes) for part in parts)
        if needed > self._memory.numel():
            self._buffers, self._memory = [], torch.empty(0, dtype=torch.uint8)  # frees the old before taking the new
            self._memory = torch.empty(needed, dtype=torch.uint8, pin_memory=self._pin)
            # Touches every page: the first save should cost what the later ones do.
            self._memory.zero_()
        self.parts, self._buffers, position = tuple(parts), [], 0
        for part in parts:
            buffer = self._memory[position : position + part.num_bytes]
            buffer[: len(part.header)] = torch.frombuffer(bytearray(part.header), dtype=torch.uint8)
            self._buffers.append(buffer)
            position += _padded(part.num_bytes)

    def fill(self, fragments: Mapping[str, Fragment]) -> None:
        """Copy the pieces out of the fragments; the values are taken when this returns."""
        devices = set()
        for part, buffer in zip(self.parts, self._buffers, strict=True):
            for piece, offset in part.pieces:
                fragment = fragments[piece.name]
                first = piece.start - fragment.start
                source = fragment.tensor.detach()[first : first + piece.numel]
                target = buffer[offset : offset + piece.num_bytes].view(DTYPES[piece.dtype])
                target.copy_(source, non_blocking=True)
                if source.is_cuda:
                    devices.add(source.device)
        for device in devices:
            torch.cuda.synchronize(device)

    def data(self, index: int) -> memoryview:
        """The bytes of the file `parts[index]`, header included; no copy."""
        return self._buffers[index].numpy().data


def _padded(num_bytes: int) -> int:
    return num_bytes + -num_bytes % _ALIGNMENT


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Fragment]:
    """Whole tensors of any shape as fragments, for state that is one rank's own."""
    flat = {name: tensor.detach().contiguous().view(-1) for name, tensor in tensors.items()}
    return {name: Fragment(tensor, 0, tensor.numel()) for name, tensor in flat.items()}


def layout_of(parts: Iterable[Part]) -> dict[str, dict]:
    """{tensor name: {dtype, total, pieces: [[start, numel, file, byte offset], ...]}} of files, as stored in JSON."""
    tensors: dict[str, dict] = {}
    for part in parts:
        for piece, offset in part.pieces:
            entry = tensors.setdefault(piece.name, {"dtype": piece.dtype, "total": piece.total, "pieces": []})
            entry["pieces"].append([piece.start, piece.numel, part.path, offset])
    for entry in tensors.values():
        entry["pieces"].sort()
    return tensors
