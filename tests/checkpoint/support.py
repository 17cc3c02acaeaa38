"""What the checkpoint tests share: real ranks, tensors whose every element is known, stores that fail on demand."""

import os
import tempfile
import threading
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import _forked as forked
from nltrain.checkpoint import CheckpointConfig
from nltrain.checkpoint.manifest import checkpoint_name
from nltrain.fragment import Fragment
from nltrain.store import Store, StoreError

# Of the run `r` of the fixture `run`: its config, and its checkpoints at 100 and 200 tokens.
CONFIG = {"seed": 1, "lr": 0.1}
OLD, NEW = checkpoint_name(100, 1), checkpoint_name(200, 1)

# Awkward sizes: odd, prime, smaller than the number of ranks, empty; and every element size.
TENSORS = {
    "embed.master": (5003, torch.float32),
    "embed.exp_avg": (5003, torch.float32),
    "block.w.master": (63 * 33, torch.bfloat16),
    "block.b.master": (3, torch.float64),
    "count": (1, torch.int64),
    "flags": (17, torch.bool),
    "none": (0, torch.float32),
}


def values(name: str, start: int, stop: int, salt: int = 0) -> torch.Tensor:
    """Elements [start, stop) of a tensor, a function of name and salt alone."""
    dtype = TENSORS[name][1]
    offset = sum(name.encode()) + salt
    integers = (torch.arange(start, stop, dtype=torch.int64) * 7919 + offset * 104729) % 251
    return (integers % 2 == 0) if dtype == torch.bool else integers.to(dtype)


def blank(name: str, numel: int) -> torch.Tensor:
    """Memory that shows when it was not filled."""
    dtype = TENSORS[name][1]
    return (
        torch.full((numel,), float("nan"), dtype=dtype) if dtype.is_floating_point else torch.zeros(numel, dtype=dtype)
    )


def even_slices(rank: int, size: int) -> dict[str, tuple[int, int]]:
    """As ZeRO-3 cuts each parameter: equal parts, the last ones short or absent."""
    cuts = {}
    for name, (total, _) in TENSORS.items():
        part = -(-total // size)
        start, stop = min(total, rank * part), min(total, (rank + 1) * part)
        if start < stop or (total == 0 and rank == 0):
            cuts[name] = (start, stop)
    return cuts


def one_flat_buffer(rank: int, size: int) -> dict[str, tuple[int, int]]:
    """As ZeRO-1 cuts: all parameters end to end, then equal parts; a rank may hold nothing of a parameter."""
    whole = sum(total for total, _ in TENSORS.values())
    part = -(-whole // size)
    cuts, position = {}, 0
    for name, (total, _) in TENSORS.items():
        start, stop = max(0, rank * part - position), min(total, (rank + 1) * part - position)
        if start < stop or (total == 0 and rank == size - 1):
            cuts[name] = (start, stop)
        position += total
    return cuts


def replicated(rank: int, size: int) -> dict[str, tuple[int, int]]:
    return {name: (0, total) for name, (total, _) in TENSORS.items()}


def overlapping(rank: int, size: int) -> dict[str, tuple[int, int]]:
    """Neighbours share elements, the last rank holds all of the small ones as well."""
    cuts = {}
    for name, (start, stop) in even_slices(rank, size).items():
        cuts[name] = (max(0, start - 10), min(TENSORS[name][0], stop + 5))
    if rank == size - 1:
        cuts |= {name: (0, total) for name, (total, _) in TENSORS.items() if total < 100}
    return cuts


LAYOUTS = {cut.__name__: cut for cut in (even_slices, one_flat_buffer, replicated, overlapping)}


def held(layout: str, rank: int, size: int, salt: int = 0) -> dict[str, Fragment]:
    cuts = LAYOUTS[layout](rank, size).items()
    return {name: Fragment(values(name, start, stop, salt), start, TENSORS[name][0]) for name, (start, stop) in cuts}


def wanted(layout: str, rank: int, size: int) -> dict[str, Fragment]:
    cuts = LAYOUTS[layout](rank, size).items()
    return {name: Fragment(blank(name, stop - start), start, TENSORS[name][0]) for name, (start, stop) in cuts}


def assert_filled(fragments: dict[str, Fragment], salt: int = 0) -> None:
    for name, (tensor, start, _) in fragments.items():
        expected = values(name, start, start + tensor.numel(), salt)
        assert torch.equal(tensor, expected), f"{name} from {start} on differs"


def settings(url: str, **changes: Any) -> CheckpointConfig:
    return CheckpointConfig(**({"url": url, "max_file_bytes": 1 << 16, "timeout_s": 60.0} | changes))


def _rank_main(
    environment: dict[str, str], rank: int, size: int, meeting: str, operation: Callable, arguments: tuple, errors: Any
) -> None:
    forked.begin(environment)
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
        operation(rank, size, *arguments)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        errors.put((rank, traceback.format_exc()))
        os._exit(1)  # a peer in a collective must see a closed connection, not wait


def run_ranks(size: int, operation: Callable, *arguments: Any) -> None:
    """operation(rank, size, *arguments) on `size` processes with a gloo group; a failure of one is raised here."""
    errors = forked.CONTEXT.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        meeting = os.path.join(folder, "meeting")
        ranks = [
            forked.CONTEXT.Process(
                target=_rank_main, args=(forked.environment(), rank, size, meeting, operation, arguments, errors)
            )
            for rank in range(size)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(300)
            if process.is_alive():
                process.kill()
    found = []
    while not errors.empty():
        found.append(errors.get())
    if found:
        raise AssertionError("\n".join(f"rank {rank} of {size} failed:\n{text}" for rank, text in found))
    assert [process.exitcode for process in ranks] == [0] * size


class FaultyStore:
    """A store whose writes fail, or wait, while a key contains a given text."""

    def __init__(self, store: Store) -> None:
        self._store, self.url = store, store.url
        self.failing = ""
        self.waiting = ""
        self.failing_once = ""  # an atomic create of a key with this text fails the next time
        self.may_go_on = threading.Event()
        self.reached = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def put(self, key: str, data: bytes) -> None:
        if self.waiting and self.waiting in key:
            self.reached.set()
            assert self.may_go_on.wait(60)
        if self.failing and self.failing in key:
            raise StoreError(f"{self.url}/{key}: refused by the test; stop testing")
        self._store.put(key, data)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        if self.failing_once and self.failing_once in key:
            self.failing_once = ""
            raise StoreError(f"{self.url}/{key}: refused by the test; stop testing")
        return self._store.put_if_absent(key, data)
