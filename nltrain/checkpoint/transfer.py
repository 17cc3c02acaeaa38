"""Moves files between host memory and the store, several at a time, hashing beside the transfer.

Writing: each file's sha256 is computed while the file is sent, on another thread or in the process that sends it.
Reading: each file is read in pieces that go straight to where they belong, hashed on the way when asked; what is read
is never unpickled, only copied. Limits: what has no place in host memory (a device's tensors, bytes that nobody wants)
passes through buffers of up to READ_BYTES in each of `num_threads`.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from nltrain.checkpoint.errors import CorruptCheckpointError
from nltrain.checkpoint.manifest import FileEntry, StoredTensor
from nltrain.checkpoint.shares import DTYPES
from nltrain.store import Store

# A multiple of every element size, so that no element is cut. As large as a file usually is: a server may read all of
# an object to answer for a part of it.
READ_BYTES = 64 << 20


class Puts(Protocol):
    """What writing needs of a store, or of what sends to one."""

    def put(self, key: str, data: bytes | memoryview) -> str:
        """Create or replace the object, atomically; returns the sha256 of its bytes, in hex."""
        ...


class Hashed:
    """Puts into a store, and computes the sha256 on another thread meanwhile."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def put(self, key: str, data: bytes | memoryview) -> str:
        """As Puts.put. Raises StoreError."""
        with ThreadPoolExecutor(1) as beside:
            digest = beside.submit(lambda: hashlib.sha256(data).hexdigest())
            self._store.put(key, data)
            return digest.result()


def write_files(
    store: Puts, files: Sequence[tuple[str, str, Callable[[], bytes | memoryview]]], num_threads: int
) -> list[FileEntry]:
    """Put (key, path in the manifest, data) triples; returns their entries in order. The first failure is raised."""
    with ThreadPoolExecutor(num_threads) as senders:

        def write(key: str, path: str, produce: Callable[[], bytes | memoryview]) -> FileEntry:
            data = produce()
            return FileEntry(path, len(data), store.put(key, data))

        futures = [senders.submit(write, *file) for file in files]
        try:
            return [future.result() for future in futures]
        except BaseException:
            senders.shutdown(cancel_futures=True)
            raise


class Target(NamedTuple):
    """Bytes [offset, offset + num_bytes) of a file go to byte `position` of the flat tensor."""

    offset: int
    num_bytes: int
    tensor: Tensor
    position: int


def targets_of(
    tensors: Mapping[str, StoredTensor], wanted: Mapping[str, tuple[Tensor, int]]
) -> dict[str, list[Target]]:
    """For each file, what of it goes where. `wanted[name]`: a flat tensor and the element of the whole it starts at."""
    found: dict[str, list[Target]] = defaultdict(list)
    for name, (tensor, start) in wanted.items():
        stored = tensors[name]
        size, stop = DTYPES[stored.dtype].itemsize, start + tensor.numel()
        for piece in stored.pieces:
            first, last = max(start, piece.start), min(stop, piece.start + piece.numel)
            if first < last:
                offset = piece.offset + (first - piece.start) * size
                found[piece.file].append(Target(offset, (last - first) * size, tensor, (first - start) * size))
    for targets in found.values():
        targets.sort(key=lambda target: target.offset)
    return dict(found)


def read_files(
    store: Store,
    key_of: Callable[[str], str],
    entries: Iterable[FileEntry],
    targets: Mapping[str, list[Target]],
    hashed: bool,
    num_threads: int,
) -> None:
    """Fill the targets. With `hashed`, whole files are read and a wrong sha256 raises CorruptCheckpointError by name;
    otherwise only the bytes that have a target are read. Tensors' content is undefined after an error."""

    def read(entry: FileEntry) -> str | None:
        wanted = targets.get(entry.path, [])
        if any(first.offset + first.num_bytes > second.offset for first, second in pairwise(wanted)):
            return f"{entry.path} holds tensors that overlap"
        digest = hashlib.sha256()
        for start, stop in _ranges(entry, wanted, hashed):
            pieces = _pieces(start, stop, wanted)
            store.read_into(key_of(entry.path), start, [data.data for data, _ in pieces])
            for data, room in pieces:
                if hashed:
                    digest.update(data.data)
                if room is not None:
                    room.copy_(torch.from_numpy(data))
        if hashed and digest.hexdigest() != entry.sha256:
            return f"{entry.path} has sha256 {digest.hexdigest()[:16]}..., committed was {entry.sha256[:16]}..."
        return None

    with ThreadPoolExecutor(num_threads) as readers:
        wrong = [reason for reason in readers.map(read, entries) if reason]
    if wrong:
        raise CorruptCheckpointError("; ".join(wrong))


def _ranges(entry: FileEntry, wanted: Sequence[Target], all_of_it: bool) -> list[tuple[int, int]]:
    """Byte ranges to read, in order, each at most READ_BYTES."""
    spans = (
        [(0, entry.num_bytes)]
        if all_of_it
        else [(target.offset, target.offset + target.num_bytes) for target in wanted]
    )
    merged: list[tuple[int, int]] = []
    for start, stop in spans:
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return [
        (first, min(first + READ_BYTES, stop)) for start, stop in merged for first in range(start, stop, READ_BYTES)
    ]


def _pieces(start: int, stop: int, targets: Sequence[Target]) -> list[tuple[np.ndarray, Tensor | None]]:
    """Host memory for the bytes [start, stop) of a file, piece after piece, and what each is to be copied to, if any.

    What is in host memory is read in place; what no target wants goes nowhere.
    """
    found: list[tuple[np.ndarray, Tensor | None]] = []
    position = start
    for target in targets:  # sorted by offset, without overlaps
        first, last = max(start, target.offset), min(stop, target.offset + target.num_bytes)
        if first >= last:
            continue
        if position < first:
            found.append((np.empty(first - position, np.uint8), None))
        at = target.position + first - target.offset
        room = target.tensor.detach().view(torch.uint8)[at : at + last - first]
        if room.device.type == "cpu":
            found.append((room.numpy(), None))
        else:
            held = torch.empty(last - first, dtype=torch.uint8, pin_memory=room.is_cuda)
            found.append((held.numpy(), room))
        position = last
    if position < stop:
        found.append((np.empty(stop - position, np.uint8), None))
    return found
